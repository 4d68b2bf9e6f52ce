use instar_blockio::BlockRead;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Error;
use crate::store::{SECTOR, read_padded};

/// Entries count sectors.
pub(super) const MAGIC_SECTORS: &[u8; 16] = b"WithoutFreeSpace";
/// Entries count clusters.
pub(super) const MAGIC_CLUSTERS: &[u8; 16] = b"WithouFreSpacExt";
pub(super) const VERSION: u32 = 2;
/// Stands in the header while the image is open for writing.
pub(super) const IN_USE: u32 = 0x746f_6e59;
/// Most sectors of a cluster (QEMU's limit).
pub(super) const MAX_CLUSTER_SECTORS: u32 = i32::MAX as u32 / 513;
/// Most entries of the table (QEMU's limit).
pub(super) const MAX_ENTRIES: u32 = i32::MAX as u32 / 4;
/// Where the table begins, bytes.
pub(super) const TABLE_OFFSET: u64 = size_of::<RawHeader>() as u64;

/// The header as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub magic: [u8; 16],
    pub version: U32,
    pub heads: U32,
    pub cylinders: U32,
    pub cluster_sectors: U32,
    pub entries: U32,
    pub sectors: U64,
    pub in_use: U32,
    pub data_offset: U32,
    pub flags: U32,
    pub extension_offset: U64,
}

const _: () = assert!(size_of::<RawHeader>() == 64);

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster, whole sectors; not always a power of two.
    pub cluster_size: u64,
    /// Entries of the table; the disk may have more clusters, which are then zero.
    pub entries: u32,
    /// Bytes that an entry counts in.
    pub entry_unit: u64,
    /// The image was not closed after it was written.
    pub in_use: bool,
    /// Offset of the format extension, bytes.
    pub extension: Option<u64>,
    /// Where the first cluster may lie, bytes.
    pub data_start: u64,
    /// What the header says of that can't be.
    pub data_start_is_wrong: bool,
    /// As it is stored, for writing it back.
    pub(super) raw: RawHeader,
}

impl Header {
    pub(super) fn read<D: BlockRead>(file: &D) -> Result<Self, Error> {
        let mut raw = RawHeader::new_zeroed();
        read_padded(file, 0, raw.as_mut_bytes())?;
        let mut header = Self::parse(raw)?;
        header.find_data(file.size());
        Ok(header)
    }

    /// In the order in which QEMU complains.
    pub(super) fn parse(raw: RawHeader) -> Result<Self, Error> {
        let in_sectors = raw.magic == *MAGIC_SECTORS;
        if raw.version.get() != VERSION || !(in_sectors || raw.magic == *MAGIC_CLUSTERS) {
            return Err(Error::NotParallels);
        }
        let cluster_sectors = raw.cluster_sectors.get();
        if cluster_sectors == 0 {
            return Err(Error::NoSectors);
        }
        if cluster_sectors > MAX_CLUSTER_SECTORS {
            return Err(Error::ClusterTooBig(cluster_sectors));
        }
        if raw.entries.get() > MAX_ENTRIES {
            return Err(Error::TableTooLarge(raw.entries.get()));
        }
        // Older images leave garbage in the upper half.
        let sectors = if in_sectors { raw.sectors.get() & 0xffff_ffff } else { raw.sectors.get() };
        let cluster_size = u64::from(cluster_sectors) * SECTOR;
        Ok(Self {
            size: sectors
                .checked_mul(SECTOR)
                .filter(|&size| i64::try_from(size).is_ok())
                .ok_or(Error::SizeTooLarge(sectors))?,
            cluster_size,
            entries: raw.entries.get(),
            entry_unit: if in_sectors { SECTOR } else { cluster_size },
            in_use: raw.in_use.get() == IN_USE,
            extension: Some(raw.extension_offset.get()).filter(|&at| at != 0).map(|at| at.saturating_mul(SECTOR)),
            data_start: 0,
            data_start_is_wrong: false,
            raw,
        })
    }

    /// Where the clusters begin; images with the older magic need not say so.
    fn find_data(&mut self, file_len: u64) {
        let old = self.entry_unit == SECTOR && self.raw.magic == *MAGIC_SECTORS;
        let table_end = TABLE_OFFSET + u64::from(self.entries) * 4;
        let least = match old {
            true => table_end.next_multiple_of(SECTOR),
            // Below 2^31 and 2^31.
            false => table_end.next_multiple_of(self.cluster_size),
        };
        let said = u64::from(self.raw.data_offset.get()) * SECTOR;
        let said = if said == 0 && old { least } else { said };
        self.data_start_is_wrong = said < least || said > file_len.next_multiple_of(SECTOR);
        self.data_start = if self.data_start_is_wrong { least } else { said };
    }
}

#[cfg(test)]
mod tests {
    use instar_blockio::MemBlock;
    use std::vec::Vec;

    use super::*;

    /// A disk of 10 MiB as qemu-img makes it.
    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        bytes[..16].copy_from_slice(MAGIC_CLUSTERS);
        bytes[16] = 2;
        bytes[29] = 8; // 2048 sectors in a cluster
        bytes[32] = 10;
        bytes[37] = 0x50; // 20480 sectors
        bytes[49] = 8; // data at 1 MiB
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
        assert_eq!((header.size, header.cluster_size, header.entries), (10 << 20, 1 << 20, 10));
        assert_eq!((header.entry_unit, header.in_use, header.extension), (1 << 20, false, None));
        assert_eq!((header.data_start, header.data_start_is_wrong), (1 << 20, false));
        let old = parsed(&[(0, MAGIC_SECTORS), (41, &[1]), (48, &[0, 0]), (44, b"Ynot"), (56, &[3])]).unwrap();
        assert_eq!((old.size, old.entry_unit, old.data_start), (10 << 20, 512, 512));
        assert_eq!((old.in_use, old.extension, old.data_start_is_wrong), (true, Some(1536), false));
    }

    #[test]
    fn complaints() {
        let error = |at, part: &[u8]| parsed(&[(at, part)]).unwrap_err();
        assert_eq!((error(0, b"x"), error(16, &[3])), (Error::NotParallels, Error::NotParallels));
        assert_eq!(error(29, &[0]), Error::NoSectors);
        assert_eq!(error(28, &[0, 0, 0, 1]), Error::ClusterTooBig(1 << 24));
        assert_eq!(error(32, &[0, 0, 0, 0x20]), Error::TableTooLarge(1 << 29));
        assert_eq!(error(36, &[0xff; 8]), Error::SizeTooLarge(u64::MAX));
        for wrong in [[0, 0], [1, 0], [1, 8]] {
            let header = parsed(&[(48, &wrong)]).unwrap();
            assert_eq!((header.data_start, header.data_start_is_wrong), (1 << 20, true), "{wrong:?}");
        }
    }
}
