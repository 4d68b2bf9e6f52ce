//! VirtualBox disk images, version 1.1.
//!
//! ```text
//! header │ block map ──► blocks of 1 MiB, in the order in which they were allocated
//! ```
//!
//! All numbers are little-endian. An entry of the block map is the number of a block of data, or one of two marks for blocks that are not
//! there. Source: QEMU's `block/vdi.c` and images of VirtualBox.
//!
//! Differencing images (with the UUID of a parent) are refused, as by QEMU.

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
pub use self::header::{BLOCK_SIZE, Header};
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
    /// Opens an existing image.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open(file: D, id: FileId) -> Result<Self, Error> {
        let header = Header::read(&file)?;
        let store = Store::new(file, false);
        let mut layout = Layout::of(header);
        layout.count_blocks(&store)?;
        Ok(Self::new(store, layout, id, false))
    }
}
