//! Entries of the L2 tables, standard and extended: spec chapters "Cluster mapping" and "Extended L2 Entries".

use crate::addr::{Geometry, GuestOffset, HostOffset};
use crate::error::EntryFault;
use crate::format::{COMPRESSED_SECTOR, COPIED, L2_COMPRESSED, L2_OFFSET_MASK, L2_ZERO};
use crate::header::{Header, Incompatible};

/// What decides about the meaning of an L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Format {
    /// Cluster size and kind of entries.
    pub geometry: Geometry,
    /// Version 3: a cluster can be zero.
    pub zero_clusters: bool,
    /// Clusters lie in an external data file, at their disk offset.
    pub data_file: bool,
}

/// An L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L2Entry {
    /// A cluster stored compressed.
    Compressed {
        /// Where the stream begins; any byte.
        host: HostOffset,
        /// Bytes that it takes at most: to the end of its last sector.
        len: u64,
    },
    /// A cluster that may have a place of its own.
    Cluster {
        /// That place, a multiple of the cluster size.
        host: Option<HostOffset>,
        /// The place's refcount is exactly one.
        copied: bool,
        /// What its subclusters are; without extended L2 entries the cluster is one subcluster.
        subclusters: Subclusters,
    },
}

/// The state of each subcluster. Bit n belongs to subcluster n; no bit is set in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Subclusters {
    /// Its data lie in the cluster's place.
    pub allocated: u32,
    /// Reads as zero.
    pub zero: u32,
}

/// The state of one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SubclusterState {
    /// Its data lie in the cluster's place.
    Allocated,
    /// Reads as zero.
    Zero,
    /// Ask the backing image.
    Unallocated,
}

impl Subclusters {
    /// Every subcluster holds data; `count` is 1 or 32.
    pub const fn all_allocated(count: u32) -> Self {
        Self { allocated: u32::MAX >> (u32::BITS - count), zero: 0 }
    }

    /// Every subcluster reads as zero; `count` is 1 or 32.
    pub const fn all_zero(count: u32) -> Self {
        Self { allocated: 0, zero: u32::MAX >> (u32::BITS - count) }
    }

    /// The state of subcluster `index`, `0..32`.
    pub const fn state(self, index: u32) -> SubclusterState {
        if self.allocated >> index & 1 != 0 {
            SubclusterState::Allocated
        } else if self.zero >> index & 1 != 0 {
            SubclusterState::Zero
        } else {
            SubclusterState::Unallocated
        }
    }

    /// How many of `count` subclusters, from `index` on, have the same state; at least 1.
    pub const fn run(self, index: u32, count: u32) -> u32 {
        let same = match self.state(index) {
            SubclusterState::Allocated => self.allocated,
            SubclusterState::Zero => self.zero,
            SubclusterState::Unallocated => !(self.allocated | self.zero),
        };
        let run = (same >> index).trailing_ones();
        let left = count - index;
        if run < left { run } else { left }
    }
}

impl L2Entry {
    /// Nothing there.
    pub const UNALLOCATED: Self =
        Self::Cluster { host: None, copied: false, subclusters: Subclusters { allocated: 0, zero: 0 } };

    /// A whole cluster of data that is referred to once.
    pub const fn data(geometry: Geometry, host: HostOffset) -> Self {
        Self::Cluster {
            host: Some(host),
            copied: true,
            subclusters: Subclusters::all_allocated(geometry.subclusters()),
        }
    }

    /// A whole cluster that reads as zero; `host` is the place that stays reserved for it.
    pub const fn zero(geometry: Geometry, host: Option<HostOffset>) -> Self {
        Self::Cluster { host, copied: host.is_some(), subclusters: Subclusters::all_zero(geometry.subclusters()) }
    }
}

impl L2Format {
    /// What the header says.
    pub fn new(header: &Header) -> Self {
        Self {
            geometry: header.geometry,
            zero_clusters: header.version >= 3,
            data_file: header.incompatible.contains(Incompatible::DATA_FILE),
        }
    }

    /// Bits of a compressed descriptor that hold the offset.
    const fn compressed_shift(self) -> u32 {
        62 - (self.geometry.cluster_bits() - 8)
    }

    /// Reads the entry of the cluster at `guest`; `bitmap` is its second half in extended tables.
    ///
    /// Reserved bits are ignored, as QEMU does when it reads.
    ///
    /// # Errors
    /// What QEMU reports as corrupt when it reads the cluster.
    pub fn decode(self, guest: GuestOffset, entry: u64, bitmap: u64) -> Result<L2Entry, EntryFault> {
        if entry & L2_COMPRESSED != 0 {
            return self.decode_compressed(entry);
        }
        let offset = entry & L2_OFFSET_MASK;
        let copied = entry & COPIED != 0;
        // In a data file, offset 0 is a place like any other, and the copied bit tells it from none.
        let placed = offset != 0 || (self.data_file && copied);
        let subclusters = if self.geometry.extended_l2() {
            Subclusters { allocated: bitmap as u32, zero: (bitmap >> 32) as u32 }
        } else if entry & L2_ZERO != 0 {
            if !self.zero_clusters {
                return Err(EntryFault::ZeroInV2);
            }
            Subclusters { allocated: 0, zero: 1 }
        } else {
            Subclusters { allocated: placed.into(), zero: 0 }
        };
        let contradiction = subclusters.allocated & subclusters.zero != 0;
        if contradiction || (!placed && subclusters.allocated != 0) {
            return Err(EntryFault::Subclusters);
        }
        let host = if placed && (offset != 0 || self.geometry.extended_l2() || subclusters.zero == 0) {
            Some(self.check_place(guest, offset)?)
        } else {
            None
        };
        Ok(L2Entry::Cluster { host, copied, subclusters })
    }

    fn check_place(self, guest: GuestOffset, offset: u64) -> Result<HostOffset, EntryFault> {
        if !self.geometry.is_aligned(offset) {
            return Err(EntryFault::Unaligned(HostOffset(offset)));
        }
        if self.data_file && offset != self.geometry.cluster_start(guest.0) {
            return Err(EntryFault::DataFileOffset(HostOffset(offset)));
        }
        Ok(HostOffset(offset))
    }

    fn decode_compressed(self, entry: u64) -> Result<L2Entry, EntryFault> {
        if self.data_file {
            return Err(EntryFault::CompressedWithDataFile);
        }
        let shift = self.compressed_shift();
        let host = entry & ((1 << shift) - 1);
        let more_sectors = (entry & !(L2_COMPRESSED | COPIED)) >> shift;
        let len = (more_sectors + 1) * COMPRESSED_SECTOR - host % COMPRESSED_SECTOR;
        Ok(L2Entry::Compressed { host: HostOffset(host), len })
    }

    /// The entry as it stands in the table, with its second half for extended tables (else 0).
    ///
    /// `None` if a compressed stream's place or length has no room in the descriptor.
    pub fn encode(self, entry: L2Entry) -> Option<(u64, u64)> {
        match entry {
            L2Entry::Compressed { host, len } => Some((self.encode_compressed(host.0, len)?, 0)),
            L2Entry::Cluster { host, copied, subclusters } => {
                let mut word = host.map_or(0, |host| host.0);
                if copied && host.is_some() {
                    word |= COPIED;
                }
                if self.geometry.extended_l2() {
                    return Some((word, u64::from(subclusters.zero) << 32 | u64::from(subclusters.allocated)));
                }
                Some((if subclusters.zero & 1 != 0 { word | L2_ZERO } else { word }, 0))
            }
        }
    }

    fn encode_compressed(self, host: u64, len: u64) -> Option<u64> {
        let shift = self.compressed_shift();
        let end = host.checked_add(len)?.checked_sub(1)?;
        let more_sectors = (end / COMPRESSED_SECTOR).checked_sub(host / COMPRESSED_SECTOR)?;
        let fits = host >> shift == 0 && more_sectors >> (62 - shift) == 0;
        fits.then_some(L2_COMPRESSED | more_sectors << shift | host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: GuestOffset = GuestOffset(0x3_0000);

    fn format(extended_l2: bool) -> L2Format {
        L2Format { geometry: Geometry::new(16, extended_l2, 4).unwrap(), zero_clusters: true, data_file: false }
    }

    #[test]
    fn standard_entries() {
        let f = format(false);
        for (word, entry) in [
            (0, L2Entry::UNALLOCATED),
            (0x8000_0000_0005_0000, L2Entry::data(f.geometry, HostOffset(0x5_0000))),
            (1, L2Entry::zero(f.geometry, None)),
            (0x8000_0000_0005_0001, L2Entry::zero(f.geometry, Some(HostOffset(0x5_0000)))),
        ] {
            assert_eq!(f.decode(GUEST, word, 0), Ok(entry));
            assert_eq!(f.encode(entry), Some((word, 0)));
        }
        assert_eq!(f.decode(GUEST, 0x8000_0000_0005_0200, 0), Err(EntryFault::Unaligned(HostOffset(0x5_0200))));
        // Reserved bits.
        assert_eq!(f.decode(GUEST, 0x3f00_0000_0000_01fe, 0), Ok(L2Entry::UNALLOCATED));
    }

    #[test]
    fn version_2_has_no_zero_clusters() {
        let f = L2Format { zero_clusters: false, ..format(false) };
        assert_eq!(f.decode(GUEST, 1, 0), Err(EntryFault::ZeroInV2));
    }

    #[test]
    fn compressed_entries() {
        let f = format(false);
        // 64 KiB clusters: 54 bits of offset, 8 bits of further sectors.
        let word = 0x4000_0000_0000_0000 | 2 << 54 | 0x5_01ff;
        let entry = f.decode(GUEST, word, 0).unwrap();
        assert_eq!(entry, L2Entry::Compressed { host: HostOffset(0x5_01ff), len: 2 * 512 + 1 });
        assert_eq!(f.encode(entry), Some((word, 0)));
        // The copied bit has no meaning here.
        assert_eq!(f.decode(GUEST, word | COPIED, 0), Ok(entry));
        assert_eq!(f.encode(L2Entry::Compressed { host: HostOffset(1 << 54), len: 1 }), None);
        assert_eq!(f.encode(L2Entry::Compressed { host: HostOffset(0), len: 256 * 512 + 1 }), None);
        assert_eq!(f.encode(L2Entry::Compressed { host: HostOffset(0), len: 0 }), None);
    }

    #[test]
    fn smallest_clusters_have_one_size_bit() {
        let f = L2Format { geometry: Geometry::new(9, false, 4).unwrap(), ..format(false) };
        let word = L2_COMPRESSED | 1 << 61 | 0x1234;
        let entry = L2Entry::Compressed { host: HostOffset(0x1234), len: 1024 - 0x34 };
        assert_eq!(f.decode(GUEST, word, 0), Ok(entry));
        assert_eq!(f.encode(entry), Some((word, 0)));
    }

    #[test]
    fn extended_entries() {
        let f = format(true);
        let entry = L2Entry::Cluster {
            host: Some(HostOffset(0x5_0000)),
            copied: true,
            subclusters: Subclusters { allocated: 0b0011, zero: 0b1100 },
        };
        let words = (0x8000_0000_0005_0000, 0x0000_000c_0000_0003);
        assert_eq!(f.decode(GUEST, words.0, words.1), Ok(entry));
        assert_eq!(f.encode(entry), Some(words));
        // Both bits of a subcluster; data without a place.
        assert_eq!(f.decode(GUEST, words.0, 0x1_0000_0001), Err(EntryFault::Subclusters));
        assert_eq!(f.decode(GUEST, 0, 1), Err(EntryFault::Subclusters));
        // The zero bit of standard entries is reserved.
        assert_eq!(f.decode(GUEST, 1, 0), Ok(L2Entry::UNALLOCATED));
    }

    #[test]
    fn runs_of_subclusters() {
        let map = Subclusters { allocated: 0x8000_0003, zero: 0x0000_000c };
        assert_eq!((map.state(0), map.run(0, 32)), (SubclusterState::Allocated, 2));
        assert_eq!((map.state(3), map.run(3, 32)), (SubclusterState::Zero, 1));
        assert_eq!((map.state(4), map.run(4, 32)), (SubclusterState::Unallocated, 27));
        assert_eq!(map.run(31, 32), 1);
        assert_eq!(Subclusters::all_allocated(1).run(0, 1), 1);
        assert_eq!(Subclusters::default().run(0, 1), 1);
        assert_eq!(Subclusters::all_zero(32).run(5, 32), 27);
    }

    #[test]
    fn data_file_entries() {
        let f = L2Format { data_file: true, ..format(false) };
        let at_zero = L2Entry::data(f.geometry, HostOffset(0));
        assert_eq!(f.decode(GuestOffset(0), COPIED, 0), Ok(at_zero));
        assert_eq!(f.encode(at_zero), Some((COPIED, 0)));
        assert_eq!(f.decode(GuestOffset(0), 0, 0), Ok(L2Entry::UNALLOCATED));
        assert_eq!(f.decode(GUEST, COPIED | 0x4_0000, 0), Err(EntryFault::DataFileOffset(HostOffset(0x4_0000))));
        assert_eq!(f.decode(GUEST, L2_COMPRESSED, 0), Err(EntryFault::CompressedWithDataFile));
    }
}
