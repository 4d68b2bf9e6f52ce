//! Making images, laid out as QEMU does:
//!
//! ```text
//!   dynamic:  footer | dynamic header | table, whole sectors | block: bitmap, data | … | footer
//!             0        512              1536
//!   fixed:    disk | footer
//! ```

use alloc::vec::Vec;

use instar_blockio::{BlockWrite, ErrorKind, FileId};

use crate::error::Result;
use crate::footer::{DiskType, FOOTER, Footer};
use crate::geometry::{SECTOR, disk_for};
use crate::write::{Parts, Writer};

/// Bytes of a block of a new image.
pub const BLOCK_SIZE: u32 = 2 << 20;
/// Where the table of a new image lies.
pub(crate) const TABLE_AT: u64 = 1536;

/// What is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk; rounded up unless it is kept exactly.
    pub size: u64,
    /// Keep the size (in whole sectors) instead of rounding it to what a geometry expresses.
    pub force_size: bool,
    /// Seconds since the year 2000.
    pub timestamp: u32,
    /// Identity of the disk: random bytes.
    pub uuid: [u8; 16],
}

impl CreateOptions {
    /// The footer of such a disk. Its [`current_size`](Footer::current_size) is the size of the disk.
    ///
    /// # Errors
    /// [`SizeTooLarge`](crate::Error::SizeTooLarge).
    fn footer(&self, kind: DiskType) -> Result<Footer> {
        let (geometry, sectors) = disk_for(self.size, self.force_size)?;
        let size = sectors * SECTOR; // at most 2040 GiB
        Ok(Footer {
            data_offset: if kind == DiskType::Fixed { u64::MAX } else { FOOTER as u64 },
            timestamp: self.timestamp,
            creator: if self.force_size { *b"qem2" } else { *b"qemu" },
            original_size: size,
            current_size: size,
            geometry,
            disk_type: kind.into(),
            uuid: self.uuid,
        })
    }
}

/// A fixed image: bytes of its disk, and the footer that follows them.
///
/// # Errors
/// [`SizeTooLarge`](crate::Error::SizeTooLarge).
pub fn fixed(options: &CreateOptions) -> Result<(u64, [u8; FOOTER])> {
    let footer = options.footer(DiskType::Fixed)?;
    Ok((footer.current_size, footer.encode()))
}

/// Begins a dynamic image in an empty file. It is none before [`Writer::finish`].
///
/// # Errors
/// [`SizeTooLarge`](crate::Error::SizeTooLarge), or the device's error.
pub fn create<D: BlockWrite>(mut file: D, id: FileId, options: &CreateOptions) -> Result<Writer<D>> {
    let footer = options.footer(DiskType::Dynamic)?;
    let entries = footer.current_size.div_ceil(BLOCK_SIZE.into()) as u32; // at most 1044480
    if file.limits().grows {
        file.set_size(0)?;
    } else if file.size() >= SECTOR {
        // An image that lay here before must not be taken for this one.
        file.write_at(0, &[0; FOOTER])?;
    }
    let mut table = Vec::new();
    table.try_reserve_exact(entries as usize).map_err(|_| instar_blockio::Error::new(ErrorKind::OutOfMemory))?;
    table.resize(entries as usize, crate::open::NO_BLOCK);
    let end = TABLE_AT + (u64::from(entries) * 4).next_multiple_of(SECTOR);
    let size = footer.current_size;
    let parts = Parts { footer: footer.encode(), size, block_size: BLOCK_SIZE, table_at: TABLE_AT, table, end };
    Ok(Writer::fresh(file, id, parts))
}
