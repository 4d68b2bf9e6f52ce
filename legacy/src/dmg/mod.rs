//! Apple disk images (UDIF), for reading.
//!
//! ```text
//! data fork: chunks │ property list or resource fork: tables of chunks │ trailer "koly", 512 bytes
//! ```
//!
//! All numbers are big-endian. The tables ("mish" blocks) lie in base64 in the property list, or as they are in the resource fork. Source:
//! QEMU's `block/dmg.c`; Apple published nothing.
//!
//! Chunks of zeroes, plain ones and those compressed by zlib (UDZO) are read. Other kinds (ADC, bzip2, LZFSE, LZMA) are told by
//! [`Image::unreadable`], and reading them is an error, as it is in QEMU without its modules.

mod chunk;
mod error;
mod plist;
mod trailer;

use alloc::vec::Vec;

use instar_blockio::{BlockRead, Codec, Error as BlockError, ErrorKind, FileId, Result as BlockResult};

use self::chunk::{Chunk, Chunks, Kind};
use self::trailer::Trailer;
use crate::image::{self, Map, Packed, Run};
use crate::store::{SECTOR, Store};

pub use self::error::Error;
pub use crate::image::OpenOptions;

/// An opened image.
pub type Image<D> = image::Image<D, Layout>;

/// The chunks of an image.
#[derive(Clone, Debug)]
pub struct Layout {
    size: u64,
    chunks: Vec<Chunk>,
    unreadable: Vec<u32>,
}

impl<D: BlockRead> Image<D> {
    /// Opens an image that lies in `file`, which extents call `id`.
    ///
    /// The tables of chunks are kept in memory: at most 16 MiB of property list and 2^20 chunks are accepted.
    ///
    /// # Errors
    /// No trailer, tables that can't be, or the file's error.
    pub fn open(file: D, id: FileId, options: &OpenOptions) -> Result<Self, Error> {
        let trailer = Trailer::read(&file)?;
        let mut found = Chunks::new(trailer.data_fork);
        if trailer.resource_fork.len != 0 {
            chunk::read_resource_fork(&file, trailer.resource_fork, &mut found)?;
        } else if trailer.plist.len != 0 {
            plist::read(&file, trailer.plist, &mut found)?;
        } else {
            return Err(Error::NoTables);
        }
        let layout = Layout { size: trailer.size, chunks: found.chunks, unreadable: found.unreadable };
        Ok(Self::new(Store::new(file, options.strict), layout, id))
    }

    /// Kinds of chunks that can't be read, each once, in the order in which they occur: types as they are stored.
    pub fn unreadable(&self) -> &[u32] {
        &self.format.unreadable
    }
}

impl Layout {
    /// The chunk of a sector, by QEMU's search: the tables are taken to be sorted, and where they are not, what it finds counts.
    fn find(&self, sector: u64) -> Option<&Chunk> {
        let (mut low, mut high) = (0, self.chunks.len());
        while low <= high {
            let middle = (low + high) / 2;
            let chunk = self.chunks.get(middle)?;
            if chunk.sector > sector {
                high = middle.checked_sub(1)?;
            } else if chunk.sector.wrapping_add(chunk.count) > sector {
                return Some(chunk);
            } else {
                low = middle + 1;
            }
        }
        None
    }
}

impl Map for Layout {
    fn size(&self) -> u64 {
        self.size
    }

    fn run<D: BlockRead>(&self, _: &Store<D>, offset: u64, max_len: u64) -> BlockResult<(u64, Run)> {
        let corrupt = BlockError::new(ErrorKind::Corrupt).at(offset);
        let chunk = self.find(offset / SECTOR).ok_or(corrupt)?;
        // The chunk begins at or before the offset and ends behind it.
        let start = chunk.sector * SECTOR;
        let skip = offset - start;
        let whole = chunk.count.saturating_mul(SECTOR);
        let len = (whole - skip).min(max_len);
        Ok(match chunk.kind {
            Kind::Zero => (len, Run::Zero),
            // Fewer bytes than there are sectors: zero behind them.
            Kind::Plain if skip >= chunk.len => (len, Run::Zero),
            Kind::Plain => {
                let host = chunk.offset.checked_add(skip).ok_or(corrupt)?;
                (len.min(chunk.len - skip), Run::Data(host))
            }
            Kind::Zlib => {
                let packed = Packed {
                    host: chunk.offset,
                    stored_len: u32::try_from(chunk.len).map_err(|_| corrupt)?,
                    unit_offset: start,
                    unit_len: u32::try_from(whole).map_err(|_| corrupt)?,
                    codec: Codec::Zlib,
                };
                (len, Run::Packed(packed))
            }
        })
    }
}
