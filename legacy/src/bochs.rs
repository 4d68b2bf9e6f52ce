//! Growing disk images of Bochs, for reading.
//!
//! ```text
//! header │ catalog ──► extents, each: bitmap of its sectors, the sectors
//! ```
//!
//! All numbers are little-endian. An entry of the catalog is the number of an extent in the file, or [`u32::MAX`]. Source: QEMU's
//! `block/bochs.c`.

use core::fmt;

use instar_blockio::{BlockRead, Error as BlockError, ErrorKind, FileId, Result as BlockResult};
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::image::{self, Map, Run, consecutive, run_len};
use crate::store::{SECTOR, Store, read_padded};

pub use crate::image::OpenOptions;

/// Most entries of a catalog (QEMU's limit).
const MAX_CATALOG: u32 = 0x10_0000;
/// Most bytes of an extent (QEMU's limit).
const MAX_EXTENT: u32 = 0x80_0000;

/// An opened image.
pub type Image<D> = image::Image<D, Layout>;

/// The header as it is stored. Version 1 has no word before the disk's size.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 32],
    kind: [u8; 16],
    subtype: [u8; 16],
    version: U32,
    header_len: U32,
    catalog: U32,
    bitmap: U32,
    extent: U32,
    tail: [u8; 12],
}

const _: () = assert!(size_of::<RawHeader>() == 96);

/// Why an image can't be opened. Each cause carries the offending value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed.
    Io(BlockError),
    /// The texts or the version at the start are others.
    NotBochs,
    /// Entries of the catalog: too many.
    CatalogTooLarge(u32),
    /// Bytes of an extent: fewer than a sector has.
    ExtentTooSmall(u32),
    /// Bytes of an extent: no power of two.
    ExtentNotPowerOfTwo(u32),
    /// Bytes of an extent: too many.
    ExtentTooLarge(u32),
    /// Entries of the catalog: too few for the disk.
    CatalogTooSmall(u32),
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
            Self::NotBochs => f.write_str("not a growing Bochs image"),
            Self::CatalogTooLarge(entries) => write!(f, "catalog of {entries} entries"),
            Self::ExtentTooSmall(size) | Self::ExtentNotPowerOfTwo(size) | Self::ExtentTooLarge(size) => {
                write!(f, "extents of {size} bytes")
            }
            Self::CatalogTooSmall(entries) => write!(f, "catalog of {entries} entries is too small for the disk"),
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

/// The catalog of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    size: u64,
    catalog_offset: u64,
    data_offset: u64,
    extent_size: u64,
    /// Bytes of an extent's bitmap, whole sectors.
    bitmap_len: u64,
    /// Bytes of an extent's sectors.
    extent_len: u64,
}

impl<D: BlockRead> Image<D> {
    /// Opens an image that lies in `file`, which extents call `id`.
    ///
    /// # Errors
    /// A header that can't be, or the file's error.
    pub fn open(file: D, id: FileId, options: &OpenOptions) -> Result<Self, Error> {
        let mut raw = RawHeader::new_zeroed();
        read_padded(&file, 0, raw.as_mut_bytes())?;
        Ok(Self::new(Store::new(file, options.strict), Layout::parse(&raw)?, id))
    }
}

impl Layout {
    /// In the order in which QEMU complains.
    fn parse(raw: &RawHeader) -> Result<Self, Error> {
        let version = raw.version.get();
        let texts = is_text(&raw.magic, b"Bochs Virtual HD Image")
            && is_text(&raw.kind, b"Redolog")
            && is_text(&raw.subtype, b"Growing");
        if !texts || !matches!(version, 0x1_0000 | 0x2_0000) {
            return Err(Error::NotBochs);
        }
        let size_at = if version == 0x1_0000 { 0 } else { 4 };
        let size = raw.tail[size_at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (catalog, extent) = (raw.catalog.get(), raw.extent.get());
        if catalog > MAX_CATALOG {
            return Err(Error::CatalogTooLarge(catalog));
        }
        if u64::from(extent) < SECTOR {
            return Err(Error::ExtentTooSmall(extent));
        }
        if !extent.is_power_of_two() {
            return Err(Error::ExtentNotPowerOfTwo(extent));
        }
        if extent > MAX_EXTENT {
            return Err(Error::ExtentTooLarge(extent));
        }
        let size = size / SECTOR * SECTOR;
        if u64::from(catalog) < size.div_ceil(extent.into()) {
            return Err(Error::CatalogTooSmall(catalog));
        }
        let catalog_offset = u64::from(raw.header_len.get());
        Ok(Self {
            size,
            catalog_offset,
            data_offset: catalog_offset + u64::from(catalog) * 4,
            extent_size: extent.into(),
            // A bitmap of no bytes is one of 2^32 to QEMU.
            bitmap_len: u64::from(raw.bitmap.get().wrapping_sub(1) / SECTOR as u32 + 1) * SECTOR,
            extent_len: extent.into(),
        })
    }

    /// Where an extent's bitmap lies; `None`: it is not there.
    fn extent<D: BlockRead>(&self, store: &Store<D>, index: u64) -> BlockResult<Option<u64>> {
        let entry = u32::from_le_bytes(store.get(self.catalog_offset + index * 4)?);
        // Below 2^33 + 2^32 * (2^33 + 2^23).
        let step = u128::from(self.bitmap_len + self.extent_len);
        let at = u128::from(self.data_offset) + u128::from(entry) * step;
        match (entry, i64::try_from(at)) {
            (u32::MAX, _) => Ok(None),
            (_, Ok(at)) => Ok(Some(at.unsigned_abs())),
            _ => Err(BlockError::new(ErrorKind::Corrupt)),
        }
    }
}

impl Map for Layout {
    fn size(&self) -> u64 {
        self.size
    }

    fn run<D: BlockRead>(&self, store: &Store<D>, offset: u64, max_len: u64) -> BlockResult<(u64, Run)> {
        let (index, inside) = (offset / self.extent_size, offset % self.extent_size);
        let located = |error: BlockError| error.at(offset);
        let Some(bitmap) = self.extent(store, index).map_err(located)? else {
            let count = (inside + max_len).div_ceil(self.extent_size);
            let absent = |next| Ok(if self.extent(store, index + next)?.is_none() { Some(0) } else { None });
            let units = consecutive(0, 0, count, absent)?;
            return Ok((run_len(units, self.extent_size, inside, max_len), Run::Unallocated));
        };
        let (sector, skip) = (inside / SECTOR, inside % SECTOR);
        let count = (skip + max_len).div_ceil(SECTOR).min(self.extent_size / SECTOR - sector);
        let is_there = |sector: u64| -> BlockResult<bool> {
            let [byte] = store.get(bitmap + sector / 8)?;
            Ok(byte >> (sector % 8) & 1 != 0)
        };
        let there = is_there(sector)?;
        let same = |next| Ok(if is_there(sector + next)? == there { Some(0) } else { None });
        let sectors = consecutive(0, 0, count, same)?;
        let kind = if there { Run::Data(bitmap + self.bitmap_len + inside) } else { Run::Unallocated };
        Ok((run_len(sectors, SECTOR, skip, max_len), kind))
    }
}

/// Is the field this text and the zero that ends it?
fn is_text(field: &[u8], text: &[u8]) -> bool {
    field.strip_prefix(text).is_some_and(|rest| rest.first() == Some(&0))
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use instar_blockio::{BlockMapExt, ExtentKind, MemBlock};

    use super::*;

    /// Four extents of 4096 bytes; the second lies first in the file, with its sectors 1 and 2.
    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0; 512 + 16 + 512 + 4096];
        bytes[..22].copy_from_slice(b"Bochs Virtual HD Image");
        bytes[32..39].copy_from_slice(b"Redolog");
        bytes[48..55].copy_from_slice(b"Growing");
        bytes[66] = 2;
        bytes[69] = 2; // header of 512 bytes
        bytes[72] = 4;
        bytes[76] = 1;
        bytes[81] = 16;
        bytes[89] = 64; // 16384 bytes
        bytes[512..528].fill(0xff);
        bytes[516..520].fill(0);
        bytes[528] = 0b110;
        bytes[1040 + 512..1040 + 1536].fill(0x5a);
        bytes
    }

    fn open(change: &[(usize, &[u8])]) -> Result<Image<MemBlock>, Error> {
        let mut bytes = bytes();
        for (at, part) in change {
            bytes[*at..at + part.len()].copy_from_slice(part);
        }
        Image::open(MemBlock::from(bytes), FileId(3), &OpenOptions::default())
    }

    #[test]
    fn sectors_are_found() {
        let image = open(&[]).unwrap();
        let runs: Vec<_> =
            image.extents(0..image.size()).map(|run| run.map(|run| (run.offset, run.kind)).unwrap()).collect();
        let data = ExtentKind::Data { file: FileId(3), host: 1040 + 512 };
        assert_eq!(runs, [(0, ExtentKind::Unallocated), (4608, data), (5632, ExtentKind::Unallocated)]);
        let mut buf = [1; 1200];
        image.read_at(4500, &mut buf).unwrap();
        assert!(buf[..108].iter().all(|&b| b == 0) && buf[108..1132].iter().all(|&b| b == 0x5a) && buf[1132] == 0);
    }

    #[test]
    fn older_headers_have_the_size_earlier() {
        let image = open(&[(66, &[1]), (84, &[0, 32, 0, 0, 0, 0, 0, 0])]).unwrap();
        assert_eq!(image.size(), 8192);
    }

    #[test]
    fn complaints() {
        let error = |at, part: &[u8]| open(&[(at, part)]).unwrap_err();
        assert_eq!((error(22, b"x"), error(66, &[3])), (Error::NotBochs, Error::NotBochs));
        assert_eq!(error(72, &[1, 0, 16]), Error::CatalogTooLarge(0x10_0001));
        assert_eq!(error(80, &[0, 1]), Error::ExtentTooSmall(256));
        assert_eq!(error(80, &[1]), Error::ExtentNotPowerOfTwo(4097));
        assert_eq!(error(80, &[0, 0, 0, 1]), Error::ExtentTooLarge(1 << 24));
        assert_eq!(error(72, &[3]), Error::CatalogTooSmall(3));
        assert_eq!(error(88, &[0xff; 8]), Error::CatalogTooSmall(4));
        let far = open(&[(516, &[0xfe, 0xff, 0xff, 0xff]), (76, &[0; 4])]).unwrap();
        assert!(far.extent_at_checked().is_err());
    }

    impl Image<MemBlock> {
        fn extent_at_checked(&self) -> BlockResult<instar_blockio::Extent> {
            instar_blockio::BlockMap::extent_at(self, 4096, 1)
        }
    }
}
