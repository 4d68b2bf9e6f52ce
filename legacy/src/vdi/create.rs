use core::fmt;

use instar_blockio::{BlockWrite, FileId, ZeroMode};
use zerocopy::FromZeros;
use zerocopy::byteorder::little_endian::{U32, U64};

use super::header::{BLOCK_SIZE, DYNAMIC, HEADER_SIZE, Header, MAX_SIZE, RawHeader, SIGNATURE, STATIC, TEXT, VERSION};
use super::layout::{Layout, NONE};
use super::{Error, Writer};
use crate::store::{Rank, SECTOR, Store};

/// What a new image is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to sectors.
    pub size: u64,
    /// All blocks are allocated at once.
    pub is_static: bool,
    /// UUIDs of the image and of its last change. They ought to be random.
    pub uuids: [[u8; 16]; 2],
}

/// What is wrong with the options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionError {
    /// More bytes than a disk can have.
    SizeTooLarge(u64),
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SizeTooLarge(size) => write!(f, "disk of {size} bytes is too large"),
        }
    }
}

impl core::error::Error for OptionError {}

impl CreateOptions {
    /// Checks them.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn check(&self) -> Result<(), OptionError> {
        match self.size.checked_next_multiple_of(SECTOR) {
            Some(size) if size <= MAX_SIZE => Ok(()),
            _ => Err(OptionError::SizeTooLarge(self.size)),
        }
    }

    fn header(&self) -> Result<Header, Error> {
        self.check()?;
        let size = self.size.next_multiple_of(SECTOR);
        // Within the largest size, so it fits.
        let blocks = size.div_ceil(BLOCK_SIZE) as u32;
        let map_len = (blocks * 4).next_multiple_of(SECTOR as u32);
        let map_offset = size_of::<RawHeader>() as u32;
        let mut raw = RawHeader::new_zeroed();
        raw.text[..TEXT.len()].copy_from_slice(TEXT);
        raw.signature = U32::new(SIGNATURE);
        raw.version = U32::new(VERSION);
        raw.header_size = U32::new(HEADER_SIZE);
        raw.image_type = U32::new(if self.is_static { STATIC } else { DYNAMIC });
        raw.map_offset = U32::new(map_offset);
        raw.data_offset = U32::new(map_offset + map_len);
        raw.sector_size = U32::new(SECTOR as u32);
        raw.disk_size = U64::new(size);
        raw.block_size = U32::new(BLOCK_SIZE as u32);
        raw.blocks = U32::new(blocks);
        raw.blocks_allocated = U32::new(if self.is_static { blocks } else { 0 });
        [raw.uuid, raw.uuid_snapshot] = self.uuids;
        Header::parse(raw)
    }
}

/// Makes an image in `file`, which is empty (or a device).
///
/// # Errors
/// Options that can't be met, or the file's error.
pub fn create<D: BlockWrite>(mut file: D, id: FileId, options: &CreateOptions) -> Result<Writer<D>, Error> {
    let header = options.header()?;
    let (map, data) = (u64::from(header.map_offset), u64::from(header.data_offset));
    let blocks = u64::from(header.blocks);
    if !file.limits().grows {
        let end = data + if options.is_static { blocks * BLOCK_SIZE } else { 0 };
        file.write_zeroes(0, end, ZeroMode::KeepAllocated)?;
    }
    let mut store = Store::new(file, false);
    if options.is_static {
        for index in 0..header.blocks {
            store.put(map + u64::from(index) * 4, &index.to_le_bytes(), Rank::Root)?;
        }
    } else {
        // What is left of the last sector stays zero.
        store.fill(map, blocks * 4, (NONE & 0xff) as u8, Rank::Root)?;
    }
    Ok(Writer::new(store, Layout::of(header), id, true))
}
