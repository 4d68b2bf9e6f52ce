//! Compressed loop images, version 2, for reading.
//!
//! ```text
//! 128 bytes of shell script │ block size, number of blocks │ offsets of the blocks and of their end │ streams of zlib
//! ```
//!
//! All numbers are big-endian. Source: QEMU's `block/cloop.c`.

use core::fmt;

use instar_blockio::{BlockRead, Codec, Error as BlockError, ErrorKind, FileId, Result as BlockResult};

use crate::image::{self, Map, Packed, Run};
use crate::store::{SECTOR, Store, read_padded};

pub use crate::image::OpenOptions;

/// Where the numbers begin, bytes.
const NUMBERS: u64 = 128;
/// Where the offsets begin, bytes.
const OFFSETS: u64 = NUMBERS + 8;
/// Most bytes of a block (QEMU's limit).
const MAX_BLOCK: u32 = 64 << 20;
/// Most bytes of a stream (QEMU's limit).
const MAX_STREAM: u64 = 2 * MAX_BLOCK as u64;
/// Most bytes of offsets (QEMU's limit).
const MAX_OFFSETS: u64 = 512 << 20;
/// Most blocks whose offsets QEMU can count the bytes of in 32 bits.
const MAX_BLOCKS: u32 = (u32::MAX - 1) / 8;

/// An opened image.
pub type Image<D> = image::Image<D, Layout>;

/// Why an image can't be opened. Each cause carries the offending value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed.
    Io(BlockError),
    /// Bytes of a block: 0.
    BlockSizeZero,
    /// Bytes of a block: not whole sectors.
    BlockSize(u32),
    /// Bytes of a block: too many.
    BlockTooLarge(u32),
    /// Blocks: too many.
    TooManyBlocks(u32),
    /// Blocks: their offsets take too much room.
    TooManyOffsets(u32),
    /// The offset with this number lies before the one before it.
    OffsetOrder(u32),
    /// The stream that ends at the offset with this number is too long.
    StreamTooLong(u32),
}

impl From<BlockError> for Error {
    fn from(error: BlockError) -> Self {
        Self::Io(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(_) => f.write_str("file can't be accessed"),
            Self::BlockSizeZero => f.write_str("blocks without bytes"),
            Self::BlockSize(size) | Self::BlockTooLarge(size) => write!(f, "blocks of {size} bytes"),
            Self::TooManyBlocks(count) | Self::TooManyOffsets(count) => write!(f, "{count} blocks"),
            Self::OffsetOrder(index) => write!(f, "offset {index} lies before the one before it"),
            Self::StreamTooLong(index) => write!(f, "stream that ends at offset {index} is too long"),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            _ => None,
        }
    }
}

/// The blocks of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    block_size: u32,
    blocks: u32,
}

impl<D: BlockRead> Image<D> {
    /// Opens an image that lies in `file`, which extents call `id`. Reads through all offsets in the file once.
    ///
    /// # Errors
    /// Numbers that can't be, or the file's error.
    pub fn open(file: D, id: FileId, options: &OpenOptions) -> Result<Self, Error> {
        let mut numbers = [0; 8];
        read_padded(&file, NUMBERS, &mut numbers)?;
        let (size, blocks) = numbers.split_at(4);
        let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let layout = Layout::parse(number(size), number(blocks))?;
        layout.check_offsets(&file)?;
        Ok(Self::new(Store::new(file, options.strict), layout, id))
    }
}

impl Layout {
    /// In the order in which QEMU complains.
    fn parse(block_size: u32, blocks: u32) -> Result<Self, Error> {
        if !block_size.is_multiple_of(SECTOR as u32) {
            return Err(Error::BlockSize(block_size));
        }
        if block_size == 0 {
            return Err(Error::BlockSizeZero);
        }
        if block_size > MAX_BLOCK {
            return Err(Error::BlockTooLarge(block_size));
        }
        if blocks > MAX_BLOCKS {
            return Err(Error::TooManyBlocks(blocks));
        }
        match (u64::from(blocks) + 1) * 8 > MAX_OFFSETS {
            true => Err(Error::TooManyOffsets(blocks)),
            false => Ok(Self { block_size, blocks }),
        }
    }

    /// Offsets must rise, and not by too much.
    fn check_offsets<D: BlockRead>(&self, file: &D) -> Result<(), Error> {
        const PIECE: usize = 64 << 10;
        let count = u64::from(self.blocks) + 1;
        // Behind the end of the file all are 0: the first of these tells as much as all.
        let inside = file.size().saturating_sub(OFFSETS).div_ceil(8);
        let looked_at = count.min(inside + 1);
        let mut piece = instar_blockio::zeroed(PIECE)?;
        let (mut index, mut before) = (0, 0);
        while index < looked_at {
            let len = ((looked_at - index) * 8).min(PIECE as u64) as usize;
            read_padded(file, OFFSETS + index * 8, &mut piece[..len])?;
            let (entries, _) = piece[..len].as_chunks::<8>();
            for entry in entries {
                let offset = u64::from_be_bytes(*entry);
                if index > 0 && offset < before {
                    return Err(Error::OffsetOrder(index as u32));
                }
                if index > 0 && offset - before > MAX_STREAM {
                    return Err(Error::StreamTooLong(index as u32));
                }
                before = offset;
                index += 1;
            }
        }
        Ok(())
    }
}

impl Map for Layout {
    fn size(&self) -> u64 {
        u64::from(self.blocks) * u64::from(self.block_size)
    }

    fn run<D: BlockRead>(&self, store: &Store<D>, offset: u64, max_len: u64) -> BlockResult<(u64, Run)> {
        let unit = u64::from(self.block_size);
        let (index, skip) = (offset / unit, offset % unit);
        let corrupt = || BlockError::new(ErrorKind::Corrupt).at(offset);
        let pair: [u8; 16] = store.get(OFFSETS + index * 8)?;
        let (pair, _) = pair.as_chunks::<8>();
        let [start, end] = [0, 1].map(|at| u64::from_be_bytes(pair[at]));
        // The file may have changed since the offsets were checked.
        let len = end.checked_sub(start).filter(|&len| len <= MAX_STREAM).ok_or_else(corrupt)?;
        let packed = Packed {
            host: start,
            stored_len: len as u32,
            unit_offset: offset - skip,
            unit_len: self.block_size,
            codec: Codec::Zlib,
        };
        Ok(((unit - skip).min(max_len), Run::Packed(packed)))
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use instar_blockio::MemBlock;
    use instar_codec::Encoder;

    use super::*;

    /// Three blocks of 4096 bytes: of 1, 2 and 3.
    fn bytes() -> Vec<u8> {
        let mut streams = Vec::new();
        let mut ends = vec![0];
        for value in 1..4 {
            Encoder::new(Codec::Zlib).encode(&[value; 4096], &mut streams).unwrap().unwrap();
            ends.push(streams.len());
        }
        let mut bytes = vec![0; 128];
        bytes.extend(4096u32.to_be_bytes());
        bytes.extend(3u32.to_be_bytes());
        ends.iter().for_each(|end| bytes.extend((168 + *end as u64).to_be_bytes()));
        bytes.extend(streams);
        bytes
    }

    fn open(change: &[(usize, &[u8])]) -> Result<Image<MemBlock>, Error> {
        let mut bytes = bytes();
        for (at, part) in change {
            bytes[*at..at + part.len()].copy_from_slice(part);
        }
        Image::open(MemBlock::from(bytes), FileId(0), &OpenOptions::default())
    }

    #[test]
    fn blocks_are_decoded() {
        let image = open(&[]).unwrap();
        assert_eq!(image.size(), 3 * 4096);
        let mut all = vec![0; 3 * 4096];
        image.read_at(0, &mut all).unwrap();
        assert!(all.chunks(4096).zip(1..).all(|(block, value)| block.iter().all(|&byte| byte == value)));
        // A stream that ends early or late is damaged.
        let image = open(&[(130, &[8])]).unwrap();
        assert_eq!(image.read_at(0, &mut [0; 8]).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn complaints() {
        let error = |at, part: &[u8]| open(&[(at, part)]).unwrap_err();
        assert_eq!((error(131, &[1]), error(130, &[0])), (Error::BlockSize(4097), Error::BlockSizeZero));
        assert_eq!(error(128, &[5]), Error::BlockTooLarge(0x0500_1000));
        assert_eq!(error(132, &[0xff]), Error::TooManyBlocks(0xff00_0003));
        assert_eq!(error(132, &[0x04]), Error::TooManyOffsets(0x0400_0003));
        assert_eq!(error(144, &[0; 8]), Error::OffsetOrder(1));
        assert_eq!(error(152, &[0, 0, 0, 0, 0x10]), Error::StreamTooLong(2));
        // The table goes on behind the end of the file.
        assert!(matches!(error(133, &[0x80]), Error::OffsetOrder(_) | Error::StreamTooLong(_)));
        assert!(Image::open(MemBlock::zeroed(10), FileId(0), &OpenOptions::default()).is_err());
    }
}
