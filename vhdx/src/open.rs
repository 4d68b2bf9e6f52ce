//! Opening an image, and what it says of itself.

use instar_blockio::{BlockRead, BlockWrite, FileId, zeroed};

use crate::bat::Rules;
use crate::changes::{self, Replayed};
use crate::error::{Error, Result};
use crate::format::BAT_ENTRY;
use crate::geometry::Geometry;
use crate::guid::Guid;
use crate::header::Header;
use crate::locator::ParentLocator;
use crate::log;
use crate::metadata::Metadata;
use crate::pages::Pages;
use crate::region::Regions;

/// BAT entries that are checked when an image is opened: 16 MiB of them, enough for 64 TiB in blocks of 64 MiB. The others are
/// checked when they are used.
const CHECKED_ENTRIES: u64 = (16 << 20) / BAT_ENTRY;
/// Bytes of the BAT looked at in one request.
const PIECE: u64 = 1 << 20;

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Memory for pieces of the BAT and of sector bitmaps, bytes.
    pub cache_bytes: usize,
    /// Check the places of blocks at once, as QEMU does; up to 2 million of them. Otherwise each is checked when it is used.
    pub check_bat: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { cache_bytes: 1 << 20, check_bat: true }
    }
}

/// A VHDX image, open for reading.
///
/// If its log holds changes that were not carried out, they are seen as if they had been, and the file stays as it is: see
/// [`is_dirty`](Self::is_dirty).
#[derive(Debug)]
pub struct Image<D> {
    pub(crate) pages: Pages<Replayed<D>>,
    pub(crate) id: FileId,
    pub(crate) header: Header,
    pub(crate) regions: Regions,
    pub(crate) metadata: Metadata,
}

impl<D: BlockRead> Image<D> {
    /// Opens the image in `file`, which extents will name `id`.
    ///
    /// # Errors
    /// What contradicts the specification, or the device's error.
    pub fn open(file: D, id: FileId, options: &OpenOptions) -> Result<Self> {
        let header = Header::read(&file)?;
        let replay = log::replay(&file, &header)?;
        let pages = Pages::new(Replayed::new(file, replay), options.cache_bytes);
        let regions = Regions::read(&pages, &header)?;
        let metadata = Metadata::read(&pages, regions.metadata)?;
        let present = regions.bat.len / BAT_ENTRY;
        let image = Self { pages, id, header, regions, metadata };
        if image.bat_entries() > present {
            return Err(Error::BatTooSmall(present));
        }
        if options.check_bat {
            image.entries(CHECKED_ENTRIES, |index, entry| image.rules().check(index, entry).map(|_| ()))?;
        }
        Ok(image)
    }

    /// Shows the BAT entries, as far as they are not 0, in order; at most `limit` entries are looked at.
    pub(crate) fn entries(&self, limit: u64, mut see: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let end = self.bat_entries().min(limit) * BAT_ENTRY;
        let mut piece = zeroed(end.min(PIECE) as usize)?;
        let mut at = 0;
        while at < end {
            let bytes = &mut piece[..(end - at).min(PIECE) as usize];
            crate::pages::read_padded(self.pages.file(), self.regions.bat.at + at, bytes)?;
            for (index, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
                if *entry != [0; 8] {
                    see(at / BAT_ENTRY + index as u64, u64::from_le_bytes(*entry))?;
                }
            }
            at += bytes.len() as u64;
        }
        Ok(())
    }

    pub(crate) fn rules(&self) -> Rules<'_> {
        Rules {
            geometry: self.metadata.geometry,
            regions: &self.regions,
            has_parent: self.has_parent(),
            file_len: self.pages.file().size(),
        }
    }

    pub(crate) fn bat_entries(&self) -> u64 {
        self.metadata.geometry.bat_entries(self.has_parent())
    }

    /// Bytes of the disk.
    pub fn virtual_size(&self) -> u64 {
        self.metadata.geometry.virtual_size()
    }

    /// Bytes of a payload block.
    pub fn block_size(&self) -> u64 {
        self.metadata.geometry.block_size()
    }

    /// Block and sector arithmetic.
    pub fn geometry(&self) -> Geometry {
        self.metadata.geometry
    }

    /// Bytes of a physical sector, as the image says.
    pub fn physical_sector_size(&self) -> u32 {
        self.metadata.physical_sector_size
    }

    /// All blocks are to be allocated.
    pub fn is_fixed(&self) -> bool {
        self.metadata.fixed
    }

    /// Identity of the disk, the same for all images of a chain ("page 83 data").
    pub fn disk_id(&self) -> Guid {
        self.metadata.disk_id
    }

    /// The header that counts.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The image is differencing: what it does not hold, its parent does.
    pub fn has_parent(&self) -> bool {
        self.metadata.parent.is_some()
    }

    /// How it names its parent; `None` unless it is differencing.
    pub fn parent(&self) -> Option<&ParentLocator> {
        self.metadata.parent.as_ref()
    }

    /// The log held changes, which are seen in memory only: the image was not closed cleanly.
    pub fn is_dirty(&self) -> bool {
        self.pages.file().is_changed()
    }
}

/// Carries out in the file what its log holds, if anything, and empties the log; says whether there was something.
///
/// A crash on the way does no harm: the log is emptied last.
///
/// # Errors
/// A file or log that contradicts the specification, or the device's error.
pub fn replay_log<D: BlockWrite>(file: &mut D) -> Result<bool> {
    let mut header = Header::read(file)?;
    let replay = log::replay(file, &header)?;
    let was_dirty = replay.is_some();
    if let Some(replay) = replay {
        changes::apply(file, &replay)?;
    }
    if header.log_guid != Guid::ZERO {
        header.log_guid = Guid::ZERO;
        header.update(file)?;
    }
    Ok(was_dirty)
}
