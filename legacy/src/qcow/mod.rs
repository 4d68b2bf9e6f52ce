//! QEMU copy on write, version 1.
//!
//! ```text
//! header │ backing file name │ L1 table ──► L2 tables ──► data clusters, streams of raw deflate
//! ```
//!
//! All numbers are big-endian. An L1 entry is the offset of an L2 table, an L2 entry that of a cluster; 0 means unallocated. Bit 63 of an L2
//! entry marks a compressed cluster, whose length in bytes then lies in the bits from `63 - cluster_bits` on. Source: QEMU's
//! `block/qcow.c`; there is no other specification.
//!
//! Images may be encrypted by AES, compressed clusters excepted: they are read by a cipher that the caller hands in, and not written.

mod create;
mod error;
mod header;
mod layout;

use alloc::sync::Arc;
use alloc::vec::Vec;

use instar_blockio::{BlockRead, BlockWrite, FileId, SectorCipher};

use crate::image;
use crate::store::Store;
use crate::writer;

pub use self::create::{CreateOptions, OptionError, create};
pub use self::error::Error;
pub use self::header::Header;
pub use self::layout::Layout;
pub use crate::image::OpenOptions;

/// An opened image.
pub type Image<D> = image::Image<D, Layout>;

/// An image open for writing.
pub type Writer<D> = writer::Writer<D, Layout>;

impl<D: BlockRead> Image<D> {
    /// Opens an image that lies in `file`, which extents call `id`.
    ///
    /// # Errors
    /// A header that can't be, or the file's error.
    pub fn open(file: D, id: FileId, options: &OpenOptions) -> Result<Self, Error> {
        let header = Header::read(&file)?;
        let layout = Layout::of(&header, file.size());
        Ok(Self::new(Store::new(file, options.strict), layout, id))
    }

    /// What the header says.
    pub fn header(&self) -> &Header {
        self.format.header()
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.format.header().cluster_size()
    }

    /// Is it encrypted? Then its contents can be read by the [right cipher](Self::set_cipher) only.
    pub fn is_encrypted(&self) -> bool {
        self.format.header().encrypted
    }

    /// Hands in the cipher of an encrypted image: AES-128 in CBC mode, the vector of a sector being its number on the disk. Extents
    /// are [`Encrypted`](instar_blockio::ExtentKind::Encrypted) from now on. An image that is not encrypted takes none.
    pub fn set_cipher(&mut self, cipher: Arc<dyn SectorCipher>) {
        if self.is_encrypted() {
            self.cipher = Some(cipher);
            self.format.unlock();
        }
    }

    /// Name of the backing file.
    pub fn backing_file(&self) -> Option<&[u8]> {
        self.format.header().backing_file.as_deref()
    }
}

impl<D: BlockWrite> Writer<D> {
    /// Opens an existing image.
    ///
    /// # Errors
    /// As [`Image::open`]; an encrypted image.
    pub fn open(file: D, id: FileId) -> Result<Self, Error> {
        let header = Header::read(&file)?;
        if header.encrypted {
            return Err(Error::Encrypted);
        }
        let layout = Layout::of(&header, file.size());
        Ok(Self::new(Store::new(file, false), layout, id, false))
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.format.header().cluster_size()
    }
}

/// Reads a name of the file.
fn read_name<D: BlockRead>(file: &D, offset: u64, len: u32) -> Result<Vec<u8>, Error> {
    let mut name = instar_blockio::zeroed(len as usize)?;
    crate::store::read_padded(file, offset, &mut name)?;
    // To QEMU it is a C string; one that goes on behind a zero is kept whole, so that nobody follows a part of what others see.
    let end = name.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    name.truncate(end);
    Ok(name)
}
