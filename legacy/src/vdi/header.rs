use instar_blockio::BlockRead;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Error;
use crate::store::{SECTOR, read_padded};

/// Bytes of a block: the only size that QEMU and VirtualBox write.
pub const BLOCK_SIZE: u64 = 1 << 20;
/// What identifies the format, at byte 64.
pub(super) const SIGNATURE: u32 = 0xbeda_107f;
/// 1.1.
pub(super) const VERSION: u32 = 0x0001_0001;
/// The text before the signature.
pub(super) const TEXT: &[u8] = b"<<< QEMU VM Virtual Disk Image >>>\n";
/// Bytes of the header that count, as QEMU writes it.
pub(super) const HEADER_SIZE: u32 = 0x180;
/// An image that grows.
pub(super) const DYNAMIC: u32 = 1;
/// An image that was allocated as a whole.
pub(super) const STATIC: u32 = 2;
/// Most blocks of a disk (QEMU's limit).
pub(super) const MAX_BLOCKS: u32 = (i32::MAX as u32 + 1 - SECTOR as u32) / 4;
/// Most bytes of a disk.
pub(super) const MAX_SIZE: u64 = MAX_BLOCKS as u64 * BLOCK_SIZE;

/// The header as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub text: [u8; 64],
    pub signature: U32,
    pub version: U32,
    pub header_size: U32,
    pub image_type: U32,
    pub image_flags: U32,
    pub description: [u8; 256],
    pub map_offset: U32,
    pub data_offset: U32,
    pub cylinders: U32,
    pub heads: U32,
    pub sectors: U32,
    pub sector_size: U32,
    pub unused: U32,
    pub disk_size: U64,
    pub block_size: U32,
    pub block_extra: U32,
    pub blocks: U32,
    pub blocks_allocated: U32,
    pub uuid: [u8; 16],
    pub uuid_snapshot: [u8; 16],
    pub uuid_link: [u8; 16],
    pub uuid_parent: [u8; 16],
    pub rest: [u8; 56],
}

const _: () = assert!(size_of::<RawHeader>() == 512);

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// Bytes of the disk, rounded up to sectors.
    pub disk_size: u64,
    /// All blocks were allocated when the image was made.
    pub is_static: bool,
    /// Offset of the block map, bytes.
    pub map_offset: u32,
    /// Offset of the first block of data, bytes.
    pub data_offset: u32,
    /// Entries of the block map.
    pub blocks: u32,
    /// Blocks of data, as the header says.
    pub blocks_allocated: u32,
    /// As it is stored, for writing it back.
    pub(super) raw: RawHeader,
}

impl Header {
    pub(super) fn read<D: BlockRead>(file: &D) -> Result<Self, Error> {
        let mut raw = RawHeader::new_zeroed();
        read_padded(file, 0, raw.as_mut_bytes())?;
        Self::parse(raw)
    }

    /// In the order in which QEMU complains.
    pub(super) fn parse(raw: RawHeader) -> Result<Self, Error> {
        let disk_size = raw.disk_size.get();
        if disk_size > MAX_SIZE {
            return Err(Error::SizeTooLarge(disk_size));
        }
        if raw.signature.get() != SIGNATURE {
            return Err(Error::Signature(raw.signature.get()));
        }
        if raw.version.get() != VERSION {
            return Err(Error::UnsupportedVersion(raw.version.get()));
        }
        let sector = SECTOR as u32;
        if !raw.map_offset.get().is_multiple_of(sector) {
            return Err(Error::MapOffset(raw.map_offset.get()));
        }
        if !raw.data_offset.get().is_multiple_of(sector) {
            return Err(Error::DataOffset(raw.data_offset.get()));
        }
        if raw.sector_size.get() != sector {
            return Err(Error::SectorSize(raw.sector_size.get()));
        }
        if u64::from(raw.block_size.get()) != BLOCK_SIZE {
            return Err(Error::BlockSize(raw.block_size.get()));
        }
        // MAX_SIZE is whole sectors.
        let disk_size = disk_size.next_multiple_of(SECTOR);
        let room = u64::from(raw.blocks.get()) * BLOCK_SIZE;
        if disk_size > room {
            return Err(Error::MapTooSmall { disk: disk_size, room });
        }
        if raw.uuid_link != [0; 16] {
            return Err(Error::Linked);
        }
        if raw.uuid_parent != [0; 16] {
            return Err(Error::HasParent);
        }
        if raw.blocks.get() > MAX_BLOCKS {
            return Err(Error::TooManyBlocks(raw.blocks.get()));
        }
        Ok(Self {
            disk_size,
            is_static: raw.image_type.get() == STATIC,
            map_offset: raw.map_offset.get(),
            data_offset: raw.data_offset.get(),
            blocks: raw.blocks.get(),
            blocks_allocated: raw.blocks_allocated.get(),
            raw,
        })
    }
}

#[cfg(test)]
mod tests {
    use instar_blockio::MemBlock;
    use std::vec::Vec;

    use super::*;

    /// A disk of 10 MiB as qemu-img makes it.
    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[64..72].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe, 1, 0, 1, 0]);
        bytes[76] = 1;
        bytes[341] = 2; // block map at 512
        bytes[345] = 4; // data at 1024
        bytes[361] = 2; // sectors of 512 bytes
        bytes[370] = 0xa0;
        bytes[378] = 0x10;
        bytes[384] = 10;
        bytes[388] = 3;
        bytes[392..424].fill(7);
        bytes
    }

    fn parsed(change: &[(usize, &[u8])]) -> Result<Header, Error> {
        let mut bytes = bytes();
        for (at, part) in change {
            bytes[*at..at + part.len()].copy_from_slice(part);
        }
        Header::read(&MemBlock::from(bytes))
    }

    #[test]
    fn fields() {
        let header = parsed(&[]).unwrap();
        assert_eq!((header.disk_size, header.is_static), (10 << 20, false));
        assert_eq!((header.map_offset, header.data_offset), (512, 1024));
        assert_eq!((header.blocks, header.blocks_allocated), (10, 3));
        assert!(parsed(&[(76, &[2])]).unwrap().is_static);
        assert_eq!(parsed(&[(368, &[1]), (384, &[11])]).unwrap().disk_size, (10 << 20) + 512);
    }

    #[test]
    fn complaints() {
        let error = |at, part: &[u8]| parsed(&[(at, part)]).unwrap_err();
        assert_eq!(error(64, &[0]), Error::Signature(0xbeda_1000));
        assert_eq!(error(68, &[0]), Error::UnsupportedVersion(0x10000));
        assert_eq!(error(340, &[1]), Error::MapOffset(513));
        assert_eq!(error(344, &[1]), Error::DataOffset(1025));
        assert_eq!(error(361, &[4]), Error::SectorSize(1024));
        assert_eq!(error(378, &[0x20]), Error::BlockSize(2 << 20));
        assert_eq!(error(368, &[1]), Error::MapTooSmall { disk: (10 << 20) + 512, room: 10 << 20 });
        assert_eq!(error(424, &[1]), Error::Linked);
        assert_eq!(error(440, &[1]), Error::HasParent);
        assert_eq!(error(368, &[0xff; 8]), Error::SizeTooLarge(u64::MAX));
        assert_eq!(error(384, &[0xff; 4]), Error::TooManyBlocks(u32::MAX));
        assert_eq!((MAX_BLOCKS, MAX_SIZE), (0x1fff_ff80, 0x1_ffff_f800_0000));
    }
}
