//! Version 2 (*LUKS2 On-Disk Format Specification*, version 1.1): two copies of a binary header, each with a text (JSON) of key
//! slots, segments and digests. Read only.

mod metadata;
mod unlock;

use alloc::vec::Vec;

use instar_blockio::BlockRead;
use subtle::ConstantTimeEq;
use zerocopy::FromBytes;

pub use self::metadata::{Metadata, Segment};
use crate::error::{Error, Result};
use crate::format::{MAGIC, RawHeader2, SECOND_MAGIC};
use crate::hash::Hash;

/// Bytes of the binary header, with its padding.
const BINARY_LEN: u64 = 4096;
/// Sizes of a header that the specification allows, bytes; the second header lies right behind the first.
const SIZES: [u64; 9] = [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];

/// A checked header of version 2.
#[derive(Debug)]
pub struct Header2 {
    metadata: Metadata,
    uuid: [u8; 40],
}

impl Header2 {
    /// Reads the newer of the two headers that is undamaged. `at`: where the volume begins, bytes.
    ///
    /// # Errors
    /// [`Error::NotLuks`], [`Error::Checksum`] if both are damaged, [`Error::Metadata`], or the device's error.
    pub fn read<D: BlockRead + ?Sized>(disk: &D, at: u64) -> Result<Self> {
        let first = read_copy(disk, at, 0, &MAGIC);
        let second = match &first {
            Ok(copy) => read_copy(disk, at, copy.len, &SECOND_MAGIC),
            // Without the first nobody says where the second is.
            Err(_) => SIZES
                .iter()
                .map(|size| read_copy(disk, at, *size, &SECOND_MAGIC))
                .find(Result::is_ok)
                .unwrap_or(Err(Error::Checksum)),
        };
        let copy = match (first, second) {
            (Ok(first), Ok(second)) if second.sequence > first.sequence => second,
            (Ok(first), _) => first,
            (Err(_), Ok(second)) => second,
            (Err(error), Err(_)) => return Err(error),
        };
        let text = copy.text.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Self { metadata: Metadata::parse(text)?, uuid: copy.uuid })
    }

    /// UUID as text.
    pub fn uuid(&self) -> &[u8] {
        self.uuid.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// Key slots, segments and digests.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// One undamaged copy.
struct Copy {
    len: u64,
    sequence: u64,
    uuid: [u8; 40],
    text: Vec<u8>,
}

fn read_copy<D: BlockRead + ?Sized>(disk: &D, at: u64, offset: u64, magic: &[u8; 6]) -> Result<Copy> {
    let place = at.checked_add(offset).ok_or(Error::Checksum)?;
    let left = disk.size().saturating_sub(place);
    let mut binary = [0; size_of::<RawHeader2>()];
    if left < BINARY_LEN {
        return Err(Error::TooShort(left as usize));
    }
    disk.read_at(place, &mut binary)?;
    let (raw, _) = RawHeader2::read_from_prefix(&binary).map_err(|_| Error::TooShort(binary.len()))?;
    if raw.magic != *magic {
        return Err(Error::NotLuks);
    }
    if raw.version.get() != 2 {
        return Err(Error::UnsupportedVersion(raw.version.get()));
    }
    let len = raw.header_len.get();
    if !SIZES.contains(&len) || raw.offset.get() != offset || left < len {
        return Err(Error::Checksum);
    }
    // At most 4 MiB, and no longer than the volume.
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len as usize).map_err(|_| Error::OutOfMemory)?;
    bytes.resize(len as usize, 0);
    disk.read_at(place, &mut bytes)?;
    let checksum_at = size_of::<RawHeader2>() - raw.checksum.len();
    bytes[checksum_at..][..raw.checksum.len()].fill(0);
    let name = raw.checksum_algorithm.split(|byte| *byte == 0).next().unwrap_or_default();
    let hash = Hash::named(name).ok_or(Error::Checksum)?;
    let digest = hash.digest(&[&bytes]);
    if !bool::from(digest.ct_eq(&raw.checksum[..digest.len()])) {
        return Err(Error::Checksum);
    }
    let text = bytes.split_off(BINARY_LEN as usize);
    Ok(Copy { len, sequence: raw.sequence.get(), uuid: raw.uuid, text })
}
