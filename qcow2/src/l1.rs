//! Entries of the L1 table: spec chapter "Cluster mapping".

use crate::addr::HostOffset;
use crate::format::{COPIED, L1_OFFSET_MASK};

/// An L1 entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct L1Entry {
    /// Where the L2 table lies; `None`: there is none, all its clusters are unallocated.
    pub table: Option<HostOffset>,
    /// The table's refcount is exactly one.
    pub copied: bool,
}

impl L1Entry {
    /// Reads an entry as it stands in the table. Reserved bits are ignored, as QEMU does when it reads.
    pub const fn decode(entry: u64) -> Self {
        let offset = entry & L1_OFFSET_MASK;
        let table = if offset == 0 { None } else { Some(HostOffset(offset)) };
        Self { table, copied: entry & COPIED != 0 }
    }

    /// The entry as it stands in the table.
    pub const fn encode(self) -> u64 {
        match self.table {
            Some(offset) => offset.0 | if self.copied { COPIED } else { 0 },
            None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let entry = L1Entry { table: Some(HostOffset(0x5_0000)), copied: true };
        assert_eq!(entry.encode(), 0x8000_0000_0005_0000);
        assert_eq!(L1Entry::decode(0x8000_0000_0005_0000), entry);
        assert_eq!(L1Entry::decode(0), L1Entry::default());
    }

    #[test]
    fn reserved_bits_are_ignored() {
        assert_eq!(L1Entry::decode(0x7f00_0000_0005_01ff).table, Some(HostOffset(0x5_0000)));
        assert_eq!(L1Entry::decode(0x7f00_0000_0000_01ff).table, None);
    }
}
