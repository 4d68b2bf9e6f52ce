//! The two headers and which of them counts: spec chapter 2.2.2.

use alloc::vec::Vec;

use instar_blockio::{BlockRead, BlockWrite, ReadPart, Result as BlockResult, zeroed};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::crc::checksum;
use crate::error::{Error, LogFault, Region, Result};
use crate::format::{FILE_SIGNATURE, HEADER_AT, HEADER_LEN, HEADER_SECTION, HEADER_SIGNATURE, MIB, RawHeader};
use crate::guid::Guid;

/// The only version there is.
const VERSION: u16 = 1;

/// A valid header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The header with the larger one counts.
    pub sequence: u64,
    /// Changes when a file is opened for writing.
    pub file_write_guid: Guid,
    /// Changes when the contents of the disk change; what a child knows its parent by.
    pub data_write_guid: Guid,
    /// Of the entries in the log that count; zero: the log is empty.
    pub log_guid: Guid,
    /// Log version, 0.
    pub log_version: u16,
    /// Bytes of the log.
    pub log_len: u32,
    /// Where the log begins.
    pub log_at: u64,
    /// Which of the two places it lies at, 0 or 1.
    slot: usize,
}

impl Header {
    /// The first header of a new file.
    pub(crate) fn fresh(
        sequence: u64,
        file_write_guid: Guid,
        data_write_guid: Guid,
        log_at: u64,
        log_len: u32,
    ) -> Self {
        Self {
            sequence,
            file_write_guid,
            data_write_guid,
            log_guid: Guid::ZERO,
            log_version: 0,
            log_len,
            log_at,
            slot: 0,
        }
    }

    fn parse(bytes: &[u8], slot: usize) -> Option<Self> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).ok()?;
        let valid = raw.signature == HEADER_SIGNATURE
            && raw.version.get() == VERSION
            && raw.checksum.get() == checksum(bytes.get(..HEADER_LEN)?);
        valid.then_some(Self {
            sequence: raw.sequence.get(),
            file_write_guid: Guid(raw.file_write_guid),
            data_write_guid: Guid(raw.data_write_guid),
            log_guid: Guid(raw.log_guid),
            log_version: raw.log_version.get(),
            log_len: raw.log_len.get(),
            log_at: raw.log_at.get(),
            slot,
        })
    }

    /// The header that counts.
    ///
    /// # Errors
    /// [`Error::NotVhdx`], [`Error::NoHeader`], what is wrong with the log's place, or the device's error.
    pub(crate) fn read<D: BlockRead>(file: &D) -> Result<Self> {
        let (signature, headers) = read_parts(file)?;
        if signature != FILE_SIGNATURE {
            return Err(Error::NotVhdx);
        }
        let [first, second] = [0, 1].map(|slot| Self::parse(&headers[slot], slot));
        let header = match (first, second) {
            (Some(a), Some(b)) if a.sequence == b.sequence && headers[0] != headers[1] => return Err(Error::NoHeader),
            (Some(a), Some(b)) => Some(if b.sequence > a.sequence { b } else { a }),
            (one, other) => one.or(other),
        };
        let header = header.ok_or(Error::NoHeader)?;
        header.check_log()?;
        Ok(header)
    }

    /// How many of the two headers are valid.
    pub(crate) fn count_valid<D: BlockRead>(file: &D) -> Result<usize> {
        let (_, headers) = read_parts(file)?;
        Ok((0..2).filter(|&slot| Self::parse(&headers[slot], slot).is_some()).count())
    }

    fn check_log(&self) -> Result<()> {
        if self.log_version != 0 {
            return Err(LogFault::Version(self.log_version).into());
        }
        let (at, len) = (self.log_at, u64::from(self.log_len));
        let fits = at.checked_add(len).is_some_and(|end| end <= i64::MAX as u64);
        let placed = at >= HEADER_SECTION && at.is_multiple_of(MIB) && len.is_multiple_of(MIB) && fits;
        if len > 0 && !placed { Err(Error::RegionPlace(Region::Log, at)) } else { Ok(()) }
    }

    /// The log may hold changes.
    pub(crate) fn has_log(&self) -> bool {
        self.log_guid != Guid::ZERO && self.log_len > 0
    }

    /// The 4 KiB as they lie in the file.
    fn emit(&self) -> [u8; HEADER_LEN] {
        let mut raw = RawHeader::new_zeroed();
        raw.signature = HEADER_SIGNATURE;
        raw.sequence = self.sequence.into();
        raw.file_write_guid = self.file_write_guid.0;
        raw.data_write_guid = self.data_write_guid.0;
        raw.log_guid = self.log_guid.0;
        raw.log_version = self.log_version.into();
        raw.version = VERSION.into();
        raw.log_len = self.log_len.into();
        raw.log_at = self.log_at.into();
        let mut bytes = [0; HEADER_LEN];
        bytes[..size_of::<RawHeader>()].copy_from_slice(raw.as_bytes());
        let sum = checksum(&bytes);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Writes both headers of a new file; the second one counts.
    pub(crate) fn write_both<D: BlockWrite>(&mut self, file: &mut D) -> BlockResult<()> {
        file.write_at(HEADER_AT[0], &self.emit())?;
        self.sequence = self.sequence.wrapping_add(1);
        self.slot = 1;
        file.write_at(HEADER_AT[1], &self.emit())
    }

    /// Writes the changed header over the one that does not count. Until that is durable, the old one does.
    pub(crate) fn update<D: BlockWrite>(&mut self, file: &mut D) -> BlockResult<()> {
        let next = Self { sequence: self.sequence.wrapping_add(1), slot: 1 - self.slot, ..*self };
        file.write_at(HEADER_AT[next.slot], &next.emit())?;
        file.flush()?;
        *self = next;
        Ok(())
    }
}

/// The signature of the file and the bytes of both headers.
fn read_parts<D: BlockRead>(file: &D) -> Result<([u8; 8], [Vec<u8>; 2])> {
    let mut signature = [0; 8];
    let mut headers = [zeroed(HEADER_LEN)?, zeroed(HEADER_LEN)?];
    if file.size() < HEADER_AT[1] + HEADER_LEN as u64 {
        if file.size() >= 8 {
            file.read_at(0, &mut signature)?;
        }
        return Ok((signature, headers));
    }
    let [first, second] = &mut headers;
    let mut parts = [
        ReadPart { offset: 0, buf: &mut signature },
        ReadPart { offset: HEADER_AT[0], buf: first },
        ReadPart { offset: HEADER_AT[1], buf: second },
    ];
    file.read_many(&mut parts)?;
    Ok((signature, headers))
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_blockio::MemBlock;

    fn file(change: impl Fn(&mut MemBlock)) -> Result<Header> {
        let mut file = MemBlock::zeroed(1 << 20);
        file.write_at(0, b"vhdxfile").unwrap();
        let mut header = Header::fresh(7, Guid([1; 16]), Guid([2; 16]), MIB, 1 << 20);
        header.write_both(&mut file).unwrap();
        change(&mut file);
        Header::read(&file)
    }

    #[test]
    fn the_newer_one_counts() {
        let header = file(|_| ()).unwrap();
        assert_eq!((header.sequence, header.slot, header.log_at), (8, 1, MIB));
        // A bit changed in the newer one.
        let header = file(|file| file.as_bytes_mut()[0x20fff] ^= 1).unwrap();
        assert_eq!((header.sequence, header.slot), (7, 0));
        assert_eq!(header.data_write_guid, Guid([2; 16]));
        let both = |file: &mut MemBlock| {
            file.as_bytes_mut()[0x10008] ^= 1;
            file.as_bytes_mut()[0x20008] ^= 1;
        };
        assert_eq!(file(both), Err(Error::NoHeader));
    }

    #[test]
    fn equally_new_and_different_is_none() {
        let twin = |different: u8| {
            file(|file| {
                let mut header = Header::read(file).unwrap();
                header.log_at = MIB * u64::from(1 + different);
                file.write_at(HEADER_AT[0], &header.emit()).unwrap();
            })
        };
        assert_eq!(twin(0).map(|header| header.slot), Ok(0));
        assert_eq!(twin(1), Err(Error::NoHeader));
    }

    #[test]
    fn an_update_goes_to_the_other_place() {
        let mut disk = MemBlock::zeroed(1 << 20);
        disk.write_at(0, b"vhdxfile").unwrap();
        let mut header = Header::fresh(1, Guid::ZERO, Guid::ZERO, MIB, 1 << 20);
        header.write_both(&mut disk).unwrap();
        header.log_guid = Guid([3; 16]);
        header.update(&mut disk).unwrap();
        let read = Header::read(&disk).unwrap();
        assert_eq!((read, read.slot, read.sequence), (header, 0, 3));
    }

    #[test]
    fn what_is_no_header() {
        assert_eq!(Header::read(&MemBlock::zeroed(0)), Err(Error::NotVhdx));
        assert_eq!(Header::read(&MemBlock::from(b"vhdxfile".to_vec())), Err(Error::NoHeader));
        assert_eq!(file(|file| file.as_bytes_mut()[0] = b'V'), Err(Error::NotVhdx));
        let log = |at: u64, len: u32, version: u16| {
            file(|file| {
                let mut header = Header::fresh(9, Guid::ZERO, Guid::ZERO, at, len);
                header.log_version = version;
                header.write_both(file).unwrap();
            })
        };
        assert!(log(1, 0, 0).is_ok());
        for at in [0, MIB + 4096, u64::MAX - MIB + 1] {
            assert_eq!(log(at, 1 << 20, 0), Err(Error::RegionPlace(Region::Log, at)));
        }
        assert_eq!(log(MIB, 4096, 0), Err(Error::RegionPlace(Region::Log, MIB)));
        assert_eq!(log(MIB, 1 << 20, 1), Err(Error::Log(LogFault::Version(1))));
    }
}
