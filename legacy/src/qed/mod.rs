//! QEMU enhanced disk.
//!
//! ```text
//! header, backing file name │ L1 table ──► L2 tables ──► data clusters
//! ```
//!
//! All numbers are little-endian. Tables have a power of two of clusters each; an entry is the offset of a table or cluster, 0 for
//! unallocated, and 1, in an L2 table, for a cluster of zeroes. What lies behind the last whole cluster of the file does not exist, so a file
//! grows by whole clusters. Source: QEMU's `docs/interop/qed_spec.rst`.

mod check;
mod create;
mod error;
mod header;
mod layout;

use instar_blockio::{BlockRead, BlockWrite, FileId};

use crate::image;
use crate::store::Store;
use crate::writer::{self, Allocate};

pub use self::check::Finding;
pub use self::create::{CreateOptions, OptionError, create};
pub use self::error::Error;
pub use self::header::{Features, Header};
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
        self.format.header().cluster_size.into()
    }

    /// Name of the backing file.
    pub fn backing_file(&self) -> Option<&[u8]> {
        self.format.header().backing_file.as_deref()
    }

    /// Name of the backing file's format, of which only that it is raw can be recorded.
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.format.header().features.contains(Features::BACKING_IS_RAW).then_some(b"raw")
    }
}

impl<D: BlockWrite> Writer<D> {
    /// Opens an existing image. One that was not closed cleanly is checked and repaired first, as QEMU does.
    ///
    /// # Errors
    /// As [`Image::open`]; an image that can't be repaired.
    pub fn open(file: D, id: FileId) -> Result<Self, Error> {
        let header = Header::read(&file)?;
        let layout = Layout::of(&header, file.size());
        let mut writer = Self::new(Store::new(file, false), layout, id, false);
        if header.features.contains(Features::NEED_CHECK) {
            writer.recover()?;
        }
        Ok(writer)
    }

    /// Makes the disk longer by one write of the header, durable afterwards: what lies behind the old end reads as zero, unless a
    /// longer backing image holds something there.
    ///
    /// # Errors
    /// [`Error::ImageSize`] for a size that the tables do not reach or that is not whole sectors, and one below the old;
    /// those of the file.
    pub fn resize(&mut self, size: u64) -> Result<(), Error> {
        Allocate::set_size(&mut self.format, size).map_err(|_| Error::ImageSize(size))?;
        let features = self.format.header().features;
        self.format.put_features(&mut self.store, features)?;
        self.store.write_dirty(u64::MAX)?;
        Ok(self.store.file_mut().flush()?)
    }

    /// The image will get another backing file ([`set_backing`](Self::set_backing)): from now on, zeroes are written where nothing is
    /// allocated, too, also if it has none yet.
    pub fn expect_backing(&mut self) {
        self.format.expect_backing();
    }

    /// Names another backing file, or none (an empty name). What the image shares with the old one is not copied.
    ///
    /// # Errors
    /// [`Error::BackingNameTooLong`] for a name that does not fit into the header or has more than 4095 bytes; those of the file.
    pub fn set_backing(&mut self, name: &[u8], is_raw: bool) -> Result<(), Error> {
        self.begin()?;
        let too_long = |_| Error::BackingNameTooLong(u32::try_from(name.len()).unwrap_or(u32::MAX));
        self.format.set_backing(name, is_raw).map_err(too_long)
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.format.header().cluster_size.into()
    }
}
