//! What the checkers have in common.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;

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
#[non_exhaustive]
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
}

impl CheckReport {
    /// Counts a fault, which is repaired or not. (QEMU takes repaired ones off the number of faults at the end.)
    pub(crate) fn corruption(&mut self, repaired: bool) {
        match repaired {
            true => self.corruptions_fixed += 1,
            false => self.corruptions += 1,
        }
    }
}

/// Clusters of the file that are in use. Takes memory for what is in it, however far apart.
#[derive(Debug, Default)]
pub(crate) struct ClusterSet {
    pages: BTreeMap<u64, Box<[u64; WORDS]>>,
    len: u64,
}

/// Words of a page.
const WORDS: usize = 64;
/// Clusters of a page.
const REACH: u64 = WORDS as u64 * 64;

impl ClusterSet {
    /// Adds a cluster; says whether it was not there.
    pub fn insert(&mut self, cluster: u64) -> bool {
        let page = self.pages.entry(cluster / REACH).or_insert_with(|| Box::new([0; WORDS]));
        let inside = cluster % REACH;
        let (word, bit) = (&mut page[(inside / 64) as usize], 1 << (inside % 64));
        let new = *word & bit == 0;
        *word |= bit;
        self.len += u64::from(new);
        new
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The first that is not there.
    pub fn first_free(&self) -> u64 {
        let mut next = 0;
        for (&number, page) in &self.pages {
            if number != next {
                break;
            }
            if let Some(at) = page.iter().position(|&word| word != u64::MAX) {
                return number * REACH + at as u64 * 64 + u64::from(page[at].trailing_ones());
            }
            next = number + 1;
        }
        next * REACH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters() {
        let mut set = ClusterSet::default();
        assert_eq!(set.first_free(), 0);
        assert!(set.insert(0) && set.insert(u64::MAX) && !set.insert(0));
        assert_eq!((set.len(), set.first_free()), (2, 1));
        for cluster in 1..REACH + 3 {
            assert!(set.insert(cluster));
        }
        assert_eq!(set.first_free(), REACH + 3);
    }
}
