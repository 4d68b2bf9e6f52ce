//! Parallels disk images (`.hdd`, `.hds`), version 2 of both magics.
//!
//! ```text
//! header │ block allocation table ──► clusters
//! ```
//!
//! All numbers are little-endian. With the older magic, `WithoutFreeSpace`, an entry of the table counts sectors; with the newer,
//! `WithouFreSpacExt`, clusters. 0 means unallocated. Source: QEMU's `docs/interop/parallels.rst`.
//!
//! A format extension (dirty bitmaps) is neither read nor written: the disk does not depend on it.

mod check;
mod create;
mod error;
mod header;
mod layout;

use instar_blockio::{BlockRead, BlockWrite, FileId};

use crate::image;
use crate::store::Store;
use crate::writer;

pub use self::check::Finding;
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
        Ok(Self::new(Store::new(file, options.strict), Layout::of(header), id))
    }

    /// What the header says.
    pub fn header(&self) -> &Header {
        self.format.header()
    }
}

impl<D: BlockWrite> Writer<D> {
    /// Opens an existing image. One that was not closed cleanly, or whose table is damaged, is repaired first, as QEMU does.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open(file: D, id: FileId) -> Result<Self, Error> {
        let mut writer = Self::open_to_check(file, id)?;
        writer.recover()?;
        Ok(writer)
    }

    /// The same without the repair, for those who want to tell of it.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open_to_check(file: D, id: FileId) -> Result<Self, Error> {
        let header = Header::read(&file)?;
        let store = Store::new(file, false);
        let mut layout = Layout::of(header);
        layout.find_end(&store)?;
        Ok(Self::new(store, layout, id, false))
    }
}
