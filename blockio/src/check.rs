//! What the checkers of the formats have in common.

/// What a check may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repair {
    /// Space that nothing refers to.
    pub leaks: bool,
    /// Everything that contradicts itself.
    pub corruptions: bool,
}

/// The numbers that a check comes to, as `qemu-img check` tells them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Faults found and not repaired.
    pub corruptions: u64,
    /// Faults repaired.
    pub corruptions_fixed: u64,
    /// Units that nothing refers to.
    pub leaks: u64,
    /// Such units given back.
    pub leaks_fixed: u64,
    /// Parts that could not be checked.
    pub check_errors: u64,
    /// Where the image ends in the file, bytes, if the format tells.
    pub image_end_offset: Option<u64>,
    /// How the disk is allocated, if the format tells.
    pub clusters: Option<Clusters>,
}

/// How a disk is allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clusters {
    /// Clusters of the disk.
    pub total: u64,
    /// Clusters that have a place.
    pub allocated: u64,
    /// Clusters that do not lie behind the one before.
    pub fragmented: u64,
    /// Clusters stored compressed.
    pub compressed: u64,
}

impl CheckReport {
    /// Counts a fault, which is repaired or not. (QEMU takes repaired ones off the number of faults at the end.)
    pub fn corruption(&mut self, repaired: bool) {
        match repaired {
            true => self.corruptions_fixed += 1,
            false => self.corruptions += 1,
        }
    }
}
