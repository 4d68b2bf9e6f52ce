//! Opening an image, and what it says of itself.

use alloc::string::String;
use alloc::vec::Vec;

use instar_blockio::{BlockRead, FileId, zeroed};

use crate::error::{Error, Result};
use crate::footer::{DiskType, FOOTER, Footer, has_mark, is_good};
use crate::geometry::{Geometry, MAX_SECTORS, SECTOR};
use crate::header::Header;
use crate::pages::{Pages, read_padded};

/// Table entry of a block that has no place.
pub(crate) const NO_BLOCK: u32 = u32::MAX;
/// Table entries that are checked when an image is opened: 16 MiB of them, enough for 2040 GiB in blocks of 512 KiB.
const CHECKED_ENTRIES: u32 = 4 << 20;
/// Table entries that QEMU accepts at most.
const MAX_ENTRIES: u32 = i32::MAX as u32 / 4;
/// Bytes of the table looked at in one request.
const PIECE: u64 = 1 << 20;

/// Which of the two sizes that a footer tells is the disk's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SizeRule {
    /// By the program that made the image: Virtual PC (`vpc `) and QEMU without `force_size` (`qemu`) mean the geometry, unless it is
    /// the largest one; Hyper-V, Azure, disk2vhd, XenServer and all others mean the recorded size.
    #[default]
    ByCreator,
    /// The geometry, unless it is the largest one.
    Geometry,
    /// The recorded size.
    CurrentSize,
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Memory for pieces of the table and of sector bitmaps, bytes.
    pub cache_bytes: usize,
    /// Which size counts.
    pub size_rule: SizeRule,
    /// Refuse an image with blocks behind the end of the file, as QEMU does; the first 4 million are looked at.
    pub check_table: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { cache_bytes: 1 << 20, size_rule: SizeRule::default(), check_table: true }
    }
}

/// The footer that counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FoundFooter {
    pub footer: Footer,
    pub kind: DiskType,
    /// The one at the beginning is damaged.
    pub copy_used: bool,
    /// The one at the end is damaged or missing.
    pub end_lost: bool,
}

/// Where the footer at the end begins. Old versions of Virtual PC wrote one byte less, which is as good as zero.
pub(crate) fn end_footer_at(file_len: u64) -> Option<u64> {
    (file_len.checked_next_multiple_of(SECTOR)?).checked_sub(FOOTER as u64)
}

pub(crate) fn read_footer<D: BlockRead + ?Sized>(file: &D, at: u64) -> Result<[u8; FOOTER]> {
    let mut bytes = [0; FOOTER];
    read_padded(file, at, &mut bytes)?;
    Ok(bytes)
}

impl FoundFooter {
    /// Looks at both ends of the file.
    fn find<D: BlockRead + ?Sized>(file: &D) -> Result<Self> {
        let end = end_footer_at(file.size()).ok_or(Error::TooShort(file.size()))?;
        let front = read_footer(file, 0)?;
        let kind_of = |footer: &Footer| DiskType::of_number(footer.disk_type);
        if is_good(&front) {
            let footer = Footer::parse(&front);
            let kind = kind_of(&footer).ok_or(Error::DiskType(footer.disk_type))?;
            if kind != DiskType::Fixed {
                let end_lost = !is_good(&read_footer(file, end)?);
                return Ok(Self { footer, kind, copy_used: false, end_lost });
            }
        }
        let back = read_footer(file, end)?;
        let footer = Footer::parse(&back);
        match kind_of(&footer) {
            _ if !has_mark(&back) => Err(if has_mark(&front) { Error::Checksum } else { Error::NotVhd }),
            _ if !is_good(&back) => Err(Error::Checksum),
            None => Err(Error::DiskType(footer.disk_type)),
            Some(kind) => Ok(Self { footer, kind, copy_used: kind != DiskType::Fixed, end_lost: false }),
        }
    }
}

/// Sectors of the disk.
fn sectors(footer: &Footer, rule: SizeRule) -> Result<u64> {
    let by_geometry = match rule {
        SizeRule::ByCreator => matches!(&footer.creator, b"vpc " | b"qemu"),
        SizeRule::Geometry => true,
        SizeRule::CurrentSize => false,
    };
    let sectors = match by_geometry && footer.geometry.total() != Geometry::MAX.total() {
        true => footer.geometry.total(),
        false => footer.current_size / SECTOR,
    };
    if sectors > MAX_SECTORS { Err(Error::SizeTooLarge(sectors)) } else { Ok(sectors) }
}

/// A VHD image, open for reading.
#[derive(Debug)]
pub struct Image<D> {
    pub(crate) pages: Pages<D>,
    pub(crate) id: FileId,
    footer: Footer,
    kind: DiskType,
    copy_used: bool,
    end_lost: bool,
    size: u64,
    /// `None`: the disk lies in one piece.
    pub(crate) header: Option<Header>,
    names: Vec<String>,
}

impl<D: BlockRead> Image<D> {
    /// Opens the image in `file`, which extents will name `id`.
    ///
    /// # Errors
    /// What contradicts the specification so that the disk can't be read, or the device's error.
    pub fn open(file: D, id: FileId, options: &OpenOptions) -> Result<Self> {
        let FoundFooter { footer, kind, copy_used, end_lost } = FoundFooter::find(&file)?;
        let size = sectors(&footer, options.size_rule)? * SECTOR;
        let header = match kind {
            DiskType::Fixed => None,
            _ => Some(Header::read(&file, footer.data_offset)?),
        };
        let names = match &header {
            Some(header) if kind == DiskType::Differencing => header.parent_names(&file)?,
            _ => Vec::new(),
        };
        let pages = Pages::new(file, options.cache_bytes);
        let image = Self { pages, id, footer, kind, copy_used, end_lost, size, header, names };
        image.check_table(options.check_table)?;
        Ok(image)
    }

    fn check_table(&self, check_places: bool) -> Result<()> {
        let Some(header) = &self.header else { return Ok(()) };
        let room = u64::from(header.entries) * u64::from(header.block_size); // both are u32
        if room < self.size {
            return Err(Error::TableTooSmall(header.entries));
        }
        if header.entries > MAX_ENTRIES {
            return Err(Error::TableTooLarge(header.entries));
        }
        let place = Error::TablePlace(header.table_offset);
        let end = header.table_offset.checked_add(u64::from(header.entries) * 4).ok_or(place)?;
        if end > self.file_len() {
            return Err(place);
        }
        if !check_places {
            return Ok(());
        }
        let block_len = header.bitmap_len() + u64::from(header.block_size);
        self.entries(CHECKED_ENTRIES, |block, entry| {
            let inside = u64::from(entry) * SECTOR + block_len <= self.file_len();
            if inside { Ok(()) } else { Err(Error::Truncated(block)) }
        })
    }

    /// Shows the entries of blocks that have a place, in order; at most `limit` entries are looked at.
    pub(crate) fn entries(&self, limit: u32, mut see: impl FnMut(u32, u32) -> Result<()>) -> Result<()> {
        let Some(header) = &self.header else { return Ok(()) };
        let end = u64::from(header.entries.min(limit)) * 4;
        let mut piece = zeroed(end.min(PIECE) as usize)?;
        let mut at = 0;
        let mut block = 0;
        while at < end {
            let bytes = &mut piece[..(end - at).min(PIECE) as usize];
            read_padded(self.pages.file(), header.table_offset + at, bytes)?;
            for entry in bytes.as_chunks::<4>().0 {
                let entry = u32::from_be_bytes(*entry);
                if entry != NO_BLOCK {
                    see(block, entry)?;
                }
                block += 1;
            }
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Length of the file, its last sector filled up.
    pub(crate) fn file_len(&self) -> u64 {
        let len = self.pages.file().size();
        len.checked_next_multiple_of(SECTOR).unwrap_or(len)
    }

    /// Bytes of the disk.
    pub fn virtual_size(&self) -> u64 {
        self.size
    }

    /// How the disk is stored.
    pub fn disk_type(&self) -> DiskType {
        self.kind
    }

    /// The footer that counts.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The dynamic header; `None` for a fixed disk.
    pub fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// Bytes of a block; `None` for a fixed disk.
    pub fn block_size(&self) -> Option<u64> {
        self.header.as_ref().map(|header| header.block_size.into())
    }

    /// The footer at the beginning of the file is damaged, so that the one at the end was used.
    pub fn is_copy_used(&self) -> bool {
        self.copy_used
    }

    /// The footer at the end of a dynamic or differencing image is damaged or missing; the one at the beginning serves.
    pub fn is_end_footer_lost(&self) -> bool {
        self.end_lost
    }

    /// What is not in a differencing image is with its parent.
    pub fn has_parent(&self) -> bool {
        self.kind == DiskType::Differencing
    }

    /// The names under which to look for the parent, best first: its path seen from the image's folder, then bare file names beside
    /// the image. Empty if it has no parent, or one without any name.
    pub fn parent_names(&self) -> &[String] {
        &self.names
    }

    /// Whether an image with this [`uuid`](Footer::uuid) is the parent.
    ///
    /// The parent's recorded modification time is not asked: copying the files changes it.
    pub fn is_parent(&self, uuid: [u8; 16]) -> bool {
        self.header.as_ref().is_some_and(|header| header.parent_uuid == uuid)
    }
}
