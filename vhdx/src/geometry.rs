//! Blocks, chunks and the order of BAT entries: spec chapter 2.5.

use crate::format::{BITMAP_BLOCK, MAX_BLOCK_SIZE, MAX_VIRTUAL_SIZE, MIN_BLOCK_SIZE};

/// log2 of the sectors that a sector bitmap block describes.
const CHUNK_SECTOR_BITS: u32 = (BITMAP_BLOCK * 8).trailing_zeros();

/// Sizes and index arithmetic that follow from block size, sector size and virtual size.
///
/// A chunk is what one sector bitmap block describes, 2^23 sectors. In the BAT the entries of its payload blocks come first, then that
/// of its bitmap block:
///
/// ```text
///   | payload 0 | payload 1 | … | payload r-1 | bitmap | payload r | …        r: the chunk ratio
/// ```
///
/// Valid by construction, so that no shift in this crate can overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    block_bits: u32,
    sector_bits: u32,
    virtual_size: u64,
}

impl Geometry {
    /// `None` unless the block size is a power of two from 1 to 256 MiB, sectors have 512 or 4096 bytes, and the disk
    /// consists of whole sectors and has at most 64 TiB.
    pub fn new(block_size: u64, sector_size: u32, virtual_size: u64) -> Option<Self> {
        let valid = block_size.is_power_of_two()
            && (MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size)
            && matches!(sector_size, 512 | 4096)
            && virtual_size <= MAX_VIRTUAL_SIZE
            && virtual_size.is_multiple_of(sector_size.into());
        valid.then_some(Self {
            block_bits: block_size.trailing_zeros(),
            sector_bits: sector_size.trailing_zeros(),
            virtual_size,
        })
    }

    /// Bytes of the disk.
    pub const fn virtual_size(self) -> u64 {
        self.virtual_size
    }

    /// Bytes of a payload block.
    pub const fn block_size(self) -> u64 {
        1 << self.block_bits
    }

    /// Bytes of a logical sector.
    pub const fn sector_size(self) -> u64 {
        1 << self.sector_bits
    }

    const fn chunk_ratio_bits(self) -> u32 {
        CHUNK_SECTOR_BITS + self.sector_bits - self.block_bits
    }

    /// Payload blocks of a chunk: 16 to 32768.
    pub const fn chunk_ratio(self) -> u64 {
        1 << self.chunk_ratio_bits()
    }

    /// Payload blocks of the disk.
    pub const fn blocks(self) -> u64 {
        self.virtual_size.div_ceil(self.block_size())
    }

    /// BAT entries: with a parent each chunk, even an incomplete one, has its bitmap entry.
    pub const fn bat_entries(self, has_parent: bool) -> u64 {
        let blocks = self.blocks();
        if has_parent {
            blocks.div_ceil(self.chunk_ratio()) * (self.chunk_ratio() + 1)
        } else if blocks == 0 {
            0
        } else {
            blocks + (blocks - 1) / self.chunk_ratio()
        }
    }

    /// Index of the payload block of a disk offset.
    pub const fn block_of(self, offset: u64) -> u64 {
        offset >> self.block_bits
    }

    /// Disk offset of a payload block.
    pub const fn block_start(self, block: u64) -> u64 {
        block << self.block_bits
    }

    /// The part of a disk offset inside its block.
    pub const fn in_block(self, offset: u64) -> u64 {
        offset & (self.block_size() - 1)
    }

    /// Bytes of a block that belong to the disk: less than its size only for the last one.
    pub const fn block_len(self, block: u64) -> u64 {
        let left = self.virtual_size.saturating_sub(self.block_start(block));
        if left < self.block_size() { left } else { self.block_size() }
    }

    /// BAT index of a payload block.
    pub const fn entry_of(self, block: u64) -> u64 {
        block + (block >> self.chunk_ratio_bits())
    }

    /// BAT index of the sector bitmap of a payload block's chunk.
    pub const fn bitmap_entry_of(self, block: u64) -> u64 {
        ((block >> self.chunk_ratio_bits()) + 1) * (self.chunk_ratio() + 1) - 1
    }

    /// The payload block that a BAT index stands for; `None` for a sector bitmap.
    pub const fn block_of_entry(self, entry: u64) -> Option<u64> {
        let chunk = entry / (self.chunk_ratio() + 1);
        let inside = entry % (self.chunk_ratio() + 1);
        if inside == self.chunk_ratio() { None } else { Some(chunk * self.chunk_ratio() + inside) }
    }

    /// Where in the bitmap of its chunk a disk offset has its bit.
    pub const fn bit_of(self, offset: u64) -> u64 {
        (offset >> self.sector_bits) & ((1 << CHUNK_SECTOR_BITS) - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_order_of_entries() {
        // 256 MiB blocks of 512-byte sectors: 16 to a chunk of 4 GiB.
        let g = Geometry::new(256 * MIB, 512, 10 << 30).unwrap();
        assert_eq!((g.chunk_ratio(), g.blocks(), g.bat_entries(false), g.bat_entries(true)), (16, 40, 42, 51));
        assert_eq!([0, 15, 16, 39].map(|block| g.entry_of(block)), [0, 15, 17, 41]);
        assert_eq!([0, 15, 16, 39].map(|block| g.bitmap_entry_of(block)), [16, 16, 33, 50]);
        for block in 0..40 {
            assert_eq!(g.block_of_entry(g.entry_of(block)), Some(block));
            assert_eq!(g.block_of_entry(g.bitmap_entry_of(block)), None);
        }
        assert_eq!(g.bit_of((4 << 30) + 1536), 3);
    }

    #[test]
    fn ends() {
        let g = Geometry::new(MIB, 4096, 64 << 40).unwrap();
        assert_eq!((g.chunk_ratio(), g.blocks()), (32768, 1 << 26));
        let g = Geometry::new(8 * MIB, 512, 8 * MIB + 512).unwrap();
        assert_eq!((g.blocks(), g.block_len(0), g.block_len(1)), (2, 8 * MIB, 512));
        let g = Geometry::new(8 * MIB, 512, 0).unwrap();
        assert_eq!((g.blocks(), g.bat_entries(false), g.bat_entries(true)), (0, 0, 0));
    }

    #[test]
    fn limits() {
        let sizes = [0, 1, MIB / 2, 3 * MIB, 512 * MIB, u64::MAX];
        assert!(sizes.iter().all(|&size| Geometry::new(size, 512, 0).is_none()));
        assert!([0, 1, 511, 1024, 8192].iter().all(|&size| Geometry::new(MIB, size, 0).is_none()));
        assert!(Geometry::new(MIB, 512, (64 << 40) + 512).is_none());
        assert!(Geometry::new(MIB, 4096, 512).is_none());
    }
}
