use alloc::vec::Vec;

use instar_blockio::BlockRead;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Error, read_name};
use crate::store::{SECTOR, read_padded};

/// `QFI\xfb`.
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Bytes of the header.
pub(super) const HEADER_LEN: u64 = size_of::<RawHeader>() as u64;
/// Most L1 entries (QEMU's limit).
pub(super) const MAX_L1_ENTRIES: u64 = i32::MAX as u64 / 8;
/// Longest backing file name, bytes (QEMU's limit).
pub(super) const MAX_BACKING_NAME: u32 = 1023;

const AES: u32 = 1;

/// The header as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub magic: U32,
    pub version: U32,
    pub backing_offset: U64,
    pub backing_len: U32,
    pub mtime: U32,
    pub size: U64,
    pub cluster_bits: u8,
    pub l2_bits: u8,
    pub padding: U16,
    pub crypt_method: U32,
    pub l1_offset: U64,
}

const _: () = assert!(size_of::<RawHeader>() == 48);

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// Bytes of the disk as stored; the disk has whole sectors only, rounded down.
    pub size: u64,
    /// log2 of the cluster size, 9 to 16.
    pub cluster_bits: u32,
    /// log2 of the entries of an L2 table, 6 to 13.
    pub l2_bits: u32,
    /// Clusters are encrypted by AES-CBC.
    pub encrypted: bool,
    /// Offset of the L1 table, bytes.
    pub l1_offset: u64,
    /// Name of the backing file.
    pub backing_file: Option<Vec<u8>>,
}

impl Header {
    pub(super) fn read<D: BlockRead>(file: &D) -> Result<Self, Error> {
        let mut raw = RawHeader::new_zeroed();
        read_padded(file, 0, raw.as_mut_bytes())?;
        let mut header = Self::parse(&raw)?;
        if raw.backing_offset != 0 {
            let len = raw.backing_len.get();
            if len > MAX_BACKING_NAME {
                return Err(Error::BackingNameTooLong(len));
            }
            let name = read_name(file, raw.backing_offset.get(), len)?;
            header.backing_file = Some(name).filter(|name| !name.is_empty());
        }
        Ok(header)
    }

    /// In the order in which QEMU complains.
    fn parse(raw: &RawHeader) -> Result<Self, Error> {
        let size = raw.size.get();
        if raw.magic.get() != MAGIC {
            return Err(Error::NotQcow);
        }
        if raw.version.get() != 1 {
            return Err(Error::UnsupportedVersion(raw.version.get()));
        }
        if size <= 1 {
            return Err(Error::SizeTooSmall(size));
        }
        if !(9..=16).contains(&raw.cluster_bits) {
            return Err(Error::ClusterBits(raw.cluster_bits));
        }
        if !(6..=13).contains(&raw.l2_bits) {
            return Err(Error::L2Bits(raw.l2_bits));
        }
        if raw.crypt_method.get() > AES {
            return Err(Error::EncryptionMethod(raw.crypt_method.get()));
        }
        let header = Self {
            size,
            cluster_bits: raw.cluster_bits.into(),
            l2_bits: raw.l2_bits.into(),
            encrypted: raw.crypt_method.get() == AES,
            l1_offset: raw.l1_offset.get(),
            backing_file: None,
        };
        match size.checked_next_multiple_of(header.l1_reach()).map(|size| size / header.l1_reach()) {
            Some(entries) if entries <= MAX_L1_ENTRIES => Ok(header),
            _ => Err(Error::ImageTooLarge(size)),
        }
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the disk that QEMU shows.
    pub fn virtual_size(&self) -> u64 {
        self.size / SECTOR * SECTOR
    }

    /// Bytes of the disk that an L1 entry stands for.
    pub(super) fn l1_reach(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits)
    }

    /// Entries of the L1 table.
    pub(super) fn l1_entries(&self) -> u64 {
        self.size.div_ceil(self.l1_reach())
    }
}

#[cfg(test)]
mod tests {
    use instar_blockio::MemBlock;

    use super::*;

    /// A disk of 10 MiB as qemu-img makes it, on `base`.
    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x01");
        bytes[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 0, 4]); // name: offset, length
        bytes[24..32].copy_from_slice(&(10u64 << 20).to_be_bytes());
        bytes[32..34].copy_from_slice(&[9, 12]);
        bytes[40..48].copy_from_slice(&56u64.to_be_bytes());
        bytes[48..52].copy_from_slice(b"base");
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
        let expected = Header {
            size: 10 << 20,
            cluster_bits: 9,
            l2_bits: 12,
            encrypted: false,
            l1_offset: 56,
            backing_file: Some(b"base".to_vec()),
        };
        assert_eq!(header, expected);
        assert_eq!((header.l1_reach(), header.l1_entries()), (2 << 20, 5));
        assert!(parsed(&[(39, &[1])]).unwrap().encrypted);
    }

    #[test]
    fn complaints() {
        let error = |at, part: &[u8]| parsed(&[(at, part)]).unwrap_err();
        assert_eq!(error(0, b"x"), Error::NotQcow);
        assert_eq!(error(7, &[2]), Error::UnsupportedVersion(2));
        assert_eq!(error(24, &1u64.to_be_bytes()), Error::SizeTooSmall(1));
        assert_eq!((error(32, &[8]), error(32, &[17])), (Error::ClusterBits(8), Error::ClusterBits(17)));
        assert_eq!((error(33, &[5]), error(33, &[14])), (Error::L2Bits(5), Error::L2Bits(14)));
        assert_eq!(error(39, &[2]), Error::EncryptionMethod(2));
        assert_eq!(error(24, &[0xff; 8]), Error::ImageTooLarge(u64::MAX));
        assert_eq!(error(24, &(1u64 << 49).to_be_bytes()), Error::ImageTooLarge(1 << 49));
        assert!(parsed(&[(24, &((1u64 << 49) - (2 << 20)).to_be_bytes())]).is_ok());
        assert_eq!(error(16, &1024u32.to_be_bytes()), Error::BackingNameTooLong(1024));
        assert_eq!(Header::read(&MemBlock::default()).unwrap_err(), Error::NotQcow);
    }
}
