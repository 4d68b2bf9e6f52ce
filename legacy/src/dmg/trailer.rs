use instar_blockio::BlockRead;

use super::Error;
use crate::store::{SECTOR, read_padded};

const MAGIC: &[u8] = b"koly";
/// Bytes in which QEMU looks for the magic: it sees file lengths in whole sectors, so the trailer may begin before the last.
const SEARCHED: u64 = 515;

/// A part of the file, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub offset: u64,
    pub len: u64,
}

/// What the trailer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trailer {
    /// Offset of the data fork.
    pub data_fork: u64,
    pub resource_fork: Part,
    pub plist: Part,
    /// Bytes of the disk.
    pub size: u64,
}

impl Trailer {
    /// In the order in which QEMU complains.
    pub fn read<D: BlockRead>(file: &D) -> Result<Self, Error> {
        let at = find(file)?;
        let mut bytes = [0; 512];
        read_padded(file, at, &mut bytes)?;
        let field = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let part = |at| Part { offset: field(at), len: field(at + 8) };
        let inside = |part: Part| part.offset < at && part.len <= at - part.offset;
        let (data_fork, resource_fork, plist) = (field(0x18), part(0x28), part(0xd8));
        if data_fork > at {
            return Err(Error::DataFork(data_fork));
        }
        if !inside(resource_fork) {
            return Err(Error::ResourceFork(resource_fork.offset));
        }
        if !inside(plist) {
            return Err(Error::Plist(plist.offset));
        }
        let sectors = field(0x1ec);
        let size = sectors.checked_mul(SECTOR).filter(|&size| i64::try_from(size).is_ok());
        Ok(Self { data_fork, resource_fork, plist, size: size.ok_or(Error::Sectors(sectors))? })
    }
}

fn find<D: BlockRead>(file: &D) -> Result<u64, Error> {
    let len = file.size().checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
    if len < SECTOR {
        return Err(Error::TooShort(file.size()));
    }
    let start = len.saturating_sub(2 * SECTOR - 1);
    let mut bytes = [0; SEARCHED as usize];
    let searched = &mut bytes[..len.min(SEARCHED) as usize];
    read_padded(file, start, searched)?;
    let found = searched.windows(MAGIC.len()).position(|window| window == MAGIC);
    found.map(|found| start + found as u64).ok_or(Error::NoTrailer)
}

#[cfg(test)]
mod tests {
    use instar_blockio::MemBlock;

    use super::*;

    /// A trailer behind `before` bytes, with `after` bytes behind it.
    fn parsed(before: usize, after: usize, fields: &[(usize, u64)]) -> Result<Trailer, Error> {
        let mut bytes = vec![0; before + 512 + after];
        bytes[before..before + 4].copy_from_slice(MAGIC);
        for (at, value) in fields {
            bytes[before + at..before + at + 8].copy_from_slice(&value.to_be_bytes());
        }
        Trailer::read(&MemBlock::from(bytes))
    }

    #[test]
    fn fields() {
        let trailer = parsed(5000, 0, &[(0x18, 16), (0xd8, 100), (0xe0, 4900), (0x1ec, 24)]).unwrap();
        let expected = Trailer {
            data_fork: 16,
            resource_fork: Part { offset: 0, len: 0 },
            plist: Part { offset: 100, len: 4900 },
            size: 24 * 512,
        };
        assert_eq!(trailer, expected);
    }

    #[test]
    fn it_may_begin_a_sector_early() {
        // The file is counted as 6144 bytes; the search begins at 5121.
        assert_eq!(parsed(5120, 600, &[]), Err(Error::NoTrailer));
        assert!(parsed(5121, 511, &[]).is_ok() && parsed(5632, 0, &[]).is_ok());
        assert_eq!(parsed(0, 0, &[]), Err(Error::ResourceFork(0)));
        assert_eq!(Trailer::read(&MemBlock::default()), Err(Error::TooShort(0)));
        assert_eq!(Trailer::read(&MemBlock::zeroed(100)), Err(Error::NoTrailer));
    }

    #[test]
    fn complaints() {
        let error = |fields: &[(usize, u64)]| parsed(1000, 0, fields).unwrap_err();
        assert_eq!(error(&[(0x18, 1001)]), Error::DataFork(1001));
        assert_eq!(error(&[(0x28, 1000)]), Error::ResourceFork(1000));
        assert_eq!(error(&[(0x28, 10), (0x30, 991)]), Error::ResourceFork(10));
        assert_eq!(error(&[(0xd8, 10), (0xe0, u64::MAX)]), Error::Plist(10));
        assert_eq!(error(&[(0x1ec, 1 << 63)]), Error::Sectors(1 << 63));
        assert_eq!(error(&[(0x1ec, 1 << 54)]), Error::Sectors(1 << 54));
    }
}
