//! Addresses with types, and the arithmetic of clusters.

use crate::format::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, SUBCLUSTERS};

/// An offset on the disk that the guest sees, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestOffset(pub u64);

/// An offset in the image file (or its external data file), bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostOffset(pub u64);

/// Sizes and index arithmetic that follow from the cluster size, the kind of L2 entries and the refcount width.
///
/// Valid by construction, so that no shift in this crate can overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    cluster_bits: u32,
    extended_l2: bool,
    refcount_order: u32,
}

impl Geometry {
    /// `cluster_bits` is the log2 of the cluster size, `refcount_order` that of the refcount width in bits.
    ///
    /// `None` unless they are 9 to 21 and 0 to 6, and subclusters, if any, have at least 512 bytes.
    pub fn new(cluster_bits: u32, extended_l2: bool, refcount_order: u32) -> Option<Self> {
        let least = if extended_l2 { MIN_CLUSTER_BITS + SUBCLUSTERS.trailing_zeros() } else { MIN_CLUSTER_BITS };
        ((least..=MAX_CLUSTER_BITS).contains(&cluster_bits) && refcount_order <= 6).then_some(Self {
            cluster_bits,
            extended_l2,
            refcount_order,
        })
    }

    /// log2 of the cluster size.
    pub const fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes of a cluster, 512 to 2 MiB.
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// L2 entries have 16 bytes and describe subclusters.
    pub const fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// Subclusters of a cluster: 32, or 1 without extended L2 entries.
    pub const fn subclusters(self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// Bytes of a subcluster; of a cluster without extended L2 entries.
    pub const fn subcluster_size(self) -> u64 {
        self.cluster_size() / self.subclusters() as u64
    }

    /// Bytes of an L2 entry: 8 or 16.
    pub const fn l2_entry_size(self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub const fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// log2 of the disk bytes that one L1 entry describes.
    const fn l1_shift(self) -> u32 {
        self.cluster_bits + self.l2_entries().trailing_zeros()
    }

    /// Disk bytes that one L2 table describes.
    pub const fn l2_span(self) -> u64 {
        1 << self.l1_shift()
    }

    /// L1 entries that a disk of this size needs.
    pub const fn l1_entries(self, virtual_size: u64) -> u64 {
        virtual_size.div_ceil(self.l2_span())
    }

    /// Index in the L1 table.
    pub const fn l1_index(self, offset: GuestOffset) -> u64 {
        offset.0 >> self.l1_shift()
    }

    /// Index in the L2 table, `0..l2_entries()`.
    pub const fn l2_index(self, offset: GuestOffset) -> u64 {
        (offset.0 >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// Index of the subcluster in its cluster, `0..subclusters()`.
    pub const fn subcluster_index(self, offset: GuestOffset) -> u32 {
        (self.in_cluster(offset.0) / self.subcluster_size()) as u32
    }

    /// The part of an offset inside its cluster.
    pub const fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The offset at which the cluster of `offset` begins.
    pub const fn cluster_start(self, offset: u64) -> u64 {
        offset - self.in_cluster(offset)
    }

    /// Whether an offset is a multiple of the cluster size.
    pub const fn is_aligned(self, offset: u64) -> bool {
        self.in_cluster(offset) == 0
    }

    /// Clusters that `len` bytes take.
    pub const fn clusters(self, len: u64) -> u64 {
        len.div_ceil(self.cluster_size())
    }

    /// log2 of the refcount width in bits.
    pub const fn refcount_order(self) -> u32 {
        self.refcount_order
    }

    /// Width of a refcount, 1 to 64 bits.
    pub const fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// Refcounts of a refcount block.
    pub const fn refcounts_per_block(self) -> u64 {
        self.cluster_size() * 8 / self.refcount_bits() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_geometry() {
        let g = Geometry::new(16, false, 4).unwrap();
        assert_eq!((g.cluster_size(), g.l2_entries(), g.l2_span()), (65536, 8192, 512 << 20));
        assert_eq!(g.l1_entries((512 << 20) + 1), 2);
        assert_eq!((g.l1_index(GuestOffset(0x2001_2345)), g.l2_index(GuestOffset(0x2001_2345))), (1, 1));
        assert_eq!(g.in_cluster(0x2001_2345), 0x2345);
        assert_eq!(g.refcounts_per_block(), 32768);
        assert_eq!(g.l1_entries(u64::MAX), 1 << 35);
    }

    #[test]
    fn subclusters() {
        let g = Geometry::new(16, true, 0).unwrap();
        assert_eq!((g.subcluster_size(), g.l2_entries(), g.subclusters()), (2048, 4096, 32));
        assert_eq!(g.subcluster_index(GuestOffset(0x1_0fff)), 1);
        assert_eq!(g.refcounts_per_block(), 65536 * 8);
    }

    #[test]
    fn limits() {
        assert!(Geometry::new(8, false, 4).is_none());
        assert!(Geometry::new(22, false, 4).is_none());
        assert!(Geometry::new(13, true, 4).is_none());
        assert!(Geometry::new(14, true, 4).is_some());
        assert!(Geometry::new(9, false, 7).is_none());
    }
}
