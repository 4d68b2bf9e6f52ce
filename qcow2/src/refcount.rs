//! Reference counts of every width: spec chapter "Refcount table", and how much metadata they need.

use instar_blockio::{BlockRead, is_zero};

use crate::addr::Geometry;
use crate::error::Result;
use crate::format::REFCOUNT_BLOCK_MASK;
use crate::open::Image;

/// Clusters of the file that are looked at to find out how many are in use.
const MOST_COUNTED: u64 = 1 << 24;

impl<D: BlockRead> Image<D> {
    /// Are more than `few` clusters of the file in use by their counts? The first 2^24 clusters are looked at, and no further than it takes.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io): refcount blocks that can't be read.
    pub fn uses_more_clusters(&self, few: u64) -> Result<bool> {
        let header = &self.header;
        let geometry = header.geometry;
        let clusters = geometry.clusters(self.pages.file().size()).min(MOST_COUNTED);
        // The usual file is no longer than what it takes, and no count is read.
        if clusters <= few {
            return Ok(false);
        }
        let table_bytes = u64::from(header.refcount_table_clusters).saturating_mul(geometry.cluster_size());
        let (mut first, mut used, mut at) = (0, 0, header.refcount_table_offset.0);
        let table_end = at.saturating_add(table_bytes);
        while first < clusters && at < table_end {
            let mut entry = [0; 8];
            self.pages.read(at, &mut entry)?;
            let block = u64::from_be_bytes(entry) & REFCOUNT_BLOCK_MASK;
            let counts = geometry.refcounts_per_block().min(clusters - first);
            if block != 0 {
                used += self.used_in_block(block, counts)?;
                if used > few {
                    return Ok(true);
                }
            }
            first += counts;
            at = at.saturating_add(8);
        }
        Ok(false)
    }

    /// Counts above zero among the first of a block.
    fn used_in_block(&self, block: u64, counts: u64) -> Result<u64> {
        /// Read at once.
        const PIECE: u64 = 4096;
        let order = self.header.geometry.refcount_order();
        let len = (counts << order).div_ceil(8);
        let (mut used, mut done) = (0, 0);
        while done < len {
            let bytes = self.pages.read_vec(block.saturating_add(done), (len - done).min(PIECE) as usize)?;
            if !is_zero(&bytes) {
                let here = ((bytes.len() as u64 * 8) >> order).min(counts - ((done * 8) >> order));
                used += (0..here as usize).filter(|&index| count_at(&bytes, order, index) != 0).count() as u64;
            }
            done += PIECE;
        }
        Ok(used)
    }
}

/// The largest count of a width given as log2 of its bits (0 to 6).
pub(crate) const fn max_count(order: u32) -> u64 {
    if order >= 6 { u64::MAX } else { (1 << (1 << order)) - 1 }
}

/// The count at `index` of a refcount block. Widths below a byte fill each byte from its low bits.
pub(crate) fn count_at(block: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let bit = index << order;
        return u64::from(block[bit / 8]) >> (bit % 8) & max_count(order);
    }
    let len = 1 << (order - 3);
    block[index * len..(index + 1) * len].iter().fold(0, |count, &byte| count << 8 | u64::from(byte))
}

/// Sets the count at `index`; `count` must not exceed the width.
pub(crate) fn set_count(block: &mut [u8], order: u32, index: usize, count: u64) {
    if order < 3 {
        let bit = index << order;
        let mask = (max_count(order) as u8) << (bit % 8);
        let byte = &mut block[bit / 8];
        *byte = *byte & !mask | (count << (bit % 8)) as u8 & mask;
        return;
    }
    let len = 1 << (order - 3);
    block[index * len..(index + 1) * len].copy_from_slice(&count.to_be_bytes()[8 - len..]);
}

/// Refcount blocks that `clusters` clusters need, those of the blocks themselves and of the refcount table included.
///
/// `generous` leaves room for the table to grow by half, so that it need not move soon again.
pub(crate) fn blocks_needed(geometry: Geometry, clusters: u64, generous: bool) -> u64 {
    let blocks_per_table_cluster = geometry.cluster_size() / 8;
    let fixed_point = |clusters: u64| {
        let (mut blocks, mut table, mut total) = (0u64, 0u64, 0u64);
        loop {
            blocks = clusters.saturating_add(table).saturating_add(blocks).div_ceil(geometry.refcounts_per_block());
            table = blocks.div_ceil(blocks_per_table_cluster);
            let next = clusters.saturating_add(blocks).saturating_add(table);
            if next == total {
                return (blocks, table);
            }
            total = next;
        }
    };
    let (blocks, table) = fixed_point(clusters);
    if generous { fixed_point(clusters.saturating_add(table.div_ceil(2))).0 } else { blocks }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let mut block = [0; 64];
            let entries = 512 >> order;
            for index in 0..entries {
                set_count(&mut block, order, index, max_count(order));
                assert_eq!(count_at(&block, order, index), max_count(order), "order {order} index {index}");
                assert!((0..entries).all(|other| (count_at(&block, order, other) != 0) == (other == index)));
                set_count(&mut block, order, index, 0);
                assert_eq!(block, [0; 64]);
            }
        }
    }

    #[test]
    fn layout_of_the_specification() {
        let mut block = [0; 8];
        set_count(&mut block, 0, 9, 1); // bit 1 of byte 1
        set_count(&mut block, 2, 4, 0xa); // low half of byte 2
        assert_eq!(block, [0, 2, 0x0a, 0, 0, 0, 0, 0]);
        set_count(&mut block, 4, 2, 0x1234); // big-endian
        assert_eq!(block[4..6], [0x12, 0x34]);
    }

    #[test]
    fn blocks_count_themselves() {
        let geometry = Geometry::new(16, false, 4).unwrap();
        assert_eq!(blocks_needed(geometry, 1, false), 1);
        assert_eq!(blocks_needed(geometry, 32768 - 2, false), 1);
        assert_eq!(blocks_needed(geometry, 32768 - 1, false), 2);
        // 512-byte clusters, 64-bit counts: 64 counts per block, 64 blocks per table cluster.
        let small = Geometry::new(9, false, 6).unwrap();
        assert_eq!(blocks_needed(small, 62, false), 1);
        assert_eq!(blocks_needed(small, 63, false), 2);
    }
}
