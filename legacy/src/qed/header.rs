use alloc::vec::Vec;

use instar_blockio::{BlockRead, zeroed};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Error;
use crate::store::{SECTOR, read_padded};

/// `QED\0`.
pub(super) const MAGIC: u32 = 0x0044_4551;
/// Bytes of the header.
pub(super) const HEADER_LEN: u32 = size_of::<RawHeader>() as u32;
/// Longest backing file name, bytes (QEMU's limit).
pub(super) const MAX_BACKING_NAME: u32 = 4095;
/// Bytes of a cluster.
pub(super) const CLUSTER_SIZES: core::ops::RangeInclusive<u32> = 4096..=64 << 20;
/// Clusters of a table.
pub(super) const TABLE_SIZES: core::ops::RangeInclusive<u32> = 1..=16;

/// The header as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub magic: U32,
    pub cluster_size: U32,
    pub table_size: U32,
    pub header_size: U32,
    pub features: U64,
    pub compatible: U64,
    pub autoclear: U64,
    pub l1_offset: U64,
    pub image_size: U64,
    pub backing_offset: U32,
    pub backing_len: U32,
}

const _: () = assert!(size_of::<RawHeader>() == 64);

/// Feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// There is a backing file.
    pub const BACKING: Self = Self(1);
    /// The image was not closed cleanly.
    pub const NEED_CHECK: Self = Self(2);
    /// The backing file is raw, whatever it looks like.
    pub const BACKING_IS_RAW: Self = Self(4);

    const KNOWN: u64 = 7;

    /// Are all of these set?
    pub fn contains(self, bits: Self) -> bool {
        self.0 & bits.0 == bits.0
    }
}

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// Bytes of a cluster: a power of two from 4 KiB to 64 MiB.
    pub cluster_size: u32,
    /// Clusters of a table: a power of two from 1 to 16.
    pub table_size: u32,
    /// Clusters of the header.
    pub header_size: u32,
    /// Incompatible features.
    pub features: Features,
    /// Compatible features.
    pub compatible: u64,
    /// Features that a writer which does not know them clears.
    pub autoclear: u64,
    /// Offset of the L1 table, bytes.
    pub l1_offset: u64,
    /// Bytes of the disk, whole sectors.
    pub image_size: u64,
    /// Where the backing file's name lies, bytes.
    pub backing_offset: u32,
    /// Bytes of that name.
    pub backing_len: u32,
    /// Name of the backing file.
    pub backing_file: Option<Vec<u8>>,
}

impl Header {
    pub(super) fn read<D: BlockRead>(file: &D) -> Result<Self, Error> {
        let mut raw = RawHeader::new_zeroed();
        read_padded(file, 0, raw.as_mut_bytes())?;
        let mut header = Self::parse(&raw)?;
        header.check_l1(file.size())?;
        header.check_backing()?;
        if header.features.contains(Features::BACKING) {
            let mut name = zeroed(header.backing_len as usize)?;
            read_padded(file, header.backing_offset.into(), &mut name)?;
            // A name that goes on behind a zero is kept whole, so that nobody follows a part of what others see.
            let end = name.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
            name.truncate(end);
            header.backing_file = Some(name).filter(|name| !name.is_empty());
        }
        Ok(header)
    }

    /// In the order in which QEMU complains.
    fn parse(raw: &RawHeader) -> Result<Self, Error> {
        if raw.magic.get() != MAGIC {
            return Err(Error::NotQed);
        }
        let features = Features(raw.features.get());
        if features.0 & !Features::KNOWN != 0 {
            return Err(Error::UnknownFeatures(features.0 & !Features::KNOWN));
        }
        let header = Self {
            cluster_size: raw.cluster_size.get(),
            table_size: raw.table_size.get(),
            header_size: raw.header_size.get(),
            features,
            compatible: raw.compatible.get(),
            autoclear: raw.autoclear.get(),
            l1_offset: raw.l1_offset.get(),
            image_size: raw.image_size.get(),
            backing_offset: raw.backing_offset.get(),
            backing_len: raw.backing_len.get(),
            backing_file: None,
        };
        header.check_sizes()?;
        Ok(header)
    }

    /// Checks the sizes of clusters, tables and the disk.
    pub(super) fn check_sizes(&self) -> Result<(), Error> {
        if !self.cluster_size.is_power_of_two() || !CLUSTER_SIZES.contains(&self.cluster_size) {
            return Err(Error::ClusterSize(self.cluster_size));
        }
        if !self.table_size.is_power_of_two() || !TABLE_SIZES.contains(&self.table_size) {
            return Err(Error::TableSize(self.table_size));
        }
        if !self.image_size.is_multiple_of(SECTOR) || u128::from(self.image_size) > self.max_size() {
            return Err(Error::ImageSize(self.image_size));
        }
        Ok(())
    }

    fn check_l1(&self, file_len: u64) -> Result<(), Error> {
        match self.is_table(self.l1_offset, self.whole_clusters(file_len)) {
            true => Ok(()),
            false => Err(Error::TableOffset(self.l1_offset)),
        }
    }

    fn check_backing(&self) -> Result<(), Error> {
        if self.header_size.checked_mul(self.cluster_size).is_none() {
            return Err(Error::HeaderSize(self.header_size));
        }
        if !self.features.contains(Features::BACKING) {
            return Ok(());
        }
        if u64::from(self.backing_offset) + u64::from(self.backing_len) > self.header_len() {
            return Err(Error::BackingOffset(self.backing_offset));
        }
        match self.backing_len > MAX_BACKING_NAME {
            true => Err(Error::BackingNameTooLong(self.backing_len)),
            false => Ok(()),
        }
    }

    /// Entries of a table.
    pub fn table_entries(&self) -> u64 {
        self.table_len() / 8
    }

    /// Bytes of a table.
    pub(super) fn table_len(&self) -> u64 {
        u64::from(self.cluster_size) * u64::from(self.table_size)
    }

    /// Bytes of the disk that an L1 entry stands for.
    pub(super) fn l1_reach(&self) -> u64 {
        self.table_entries() * u64::from(self.cluster_size)
    }

    /// Bytes of the header and what belongs to it.
    pub(super) fn header_len(&self) -> u64 {
        u64::from(self.header_size) * u64::from(self.cluster_size)
    }

    /// Bytes of the largest disk. QEMU counts in 64 bits, in which the largest tables hold nothing.
    pub(super) fn max_size(&self) -> u128 {
        u128::from(self.l1_reach().wrapping_mul(self.table_entries()))
    }

    /// Bytes of the whole clusters of a file.
    pub(super) fn whole_clusters(&self, file_len: u64) -> u64 {
        file_len & !(u64::from(self.cluster_size) - 1)
    }

    /// May a cluster lie here, in a file with so many bytes of clusters?
    pub(super) fn is_cluster(&self, offset: u64, file_end: u64) -> bool {
        offset.is_multiple_of(self.cluster_size.into()) && offset >= self.header_len() && offset < file_end
    }

    /// May a table lie here? (To QEMU none of a single cluster may.)
    pub(super) fn is_table(&self, offset: u64, file_end: u64) -> bool {
        match offset.checked_add(self.table_len() - u64::from(self.cluster_size)) {
            Some(last) if last > offset => self.is_cluster(offset, file_end) && self.is_cluster(last, file_end),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use instar_blockio::MemBlock;

    use super::*;

    /// A disk of 10 MiB on `base`, which is raw, without the rest of the first cluster.
    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0; 5 << 16];
        bytes[..4].copy_from_slice(b"QED\0");
        bytes[6] = 1; // cluster of 64 KiB
        bytes[8] = 4;
        bytes[12] = 1;
        bytes[16] = 5;
        bytes[42] = 1; // L1 table at 64 KiB
        bytes[50] = 0xa0; // 10 MiB
        bytes[56] = 64;
        bytes[60] = 4;
        bytes[64..68].copy_from_slice(b"base");
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
        assert_eq!((header.cluster_size, header.table_size, header.header_size), (65536, 4, 1));
        assert_eq!((header.l1_offset, header.image_size), (65536, 10 << 20));
        assert_eq!(header.backing_file.as_deref(), Some(&b"base"[..]));
        assert!(header.features.contains(Features::BACKING_IS_RAW) && !header.features.contains(Features::NEED_CHECK));
        assert_eq!((header.table_entries(), header.l1_reach()), (32768, 2 << 30));
    }

    #[test]
    fn complaints() {
        let error = |at, part: &[u8]| parsed(&[(at, part)]).unwrap_err();
        assert_eq!(error(0, b"x"), Error::NotQed);
        assert_eq!(error(16, &[13]), Error::UnknownFeatures(8));
        assert_eq!(error(4, &[1]), Error::ClusterSize(65537));
        assert_eq!(error(4, &[0, 8, 0]), Error::ClusterSize(2048));
        assert_eq!((error(8, &[3]), error(8, &[32])), (Error::TableSize(3), Error::TableSize(32)));
        assert_eq!(error(48, &[1]), Error::ImageSize((10 << 20) + 1));
        assert_eq!(error(54, &[1]), Error::ImageSize((1 << 48) + (10 << 20)));
        assert_eq!(error(40, &[0, 0, 2]), Error::TableOffset(2 << 16));
        assert_eq!(error(40, &[1]), Error::TableOffset(65537));
        assert_eq!(error(40, &[0, 0, 0]), Error::TableOffset(0));
        assert_eq!(error(8, &[1]), Error::TableOffset(65536));
        assert_eq!(error(56, &[0xfd, 0xff, 0, 0]), Error::BackingOffset(65533));
        assert_eq!(error(60, &[0, 16, 0, 0]), Error::BackingNameTooLong(4096));
        // Then the L1 table lies in the header as well.
        assert_eq!(error(12, &[0, 0, 1, 0]), Error::TableOffset(65536));
        assert_eq!(Header::read(&MemBlock::default()).unwrap_err(), Error::NotQed);
    }
}
