//! From a file to an [`Image`].

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::ops::Range;

use instar_blockio::{BlockRead, FileId, SectorCipher};

use crate::addr::HostOffset;
use crate::error::{Error, Result};
use crate::extension::{self, Extensions, FeatureNames, file_name};
use crate::format::HEADER_LEN;
use crate::header::{Autoclear, CompressionType, EncryptionMethod, Header, Incompatible};
use crate::l2::L2Format;
use crate::map::Ahead;
use crate::pages::{PAGE, Pages};
use crate::read::Unpacker;
use crate::{bitmap, snapshot};

/// How an image is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Bytes of metadata kept in memory; at least 128 KiB are used.
    pub cache_bytes: usize,
    /// Tables and data clusters behind the end of the file are an error. Otherwise they read as zero, as with QEMU,
    /// and a file that was cut short loses data without a word.
    pub strict: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { cache_bytes: 1 << 20, strict: false }
    }
}

/// How the contents of an image are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Not at all.
    None,
    /// AES-128 in CBC mode, legacy.
    Aes,
    /// As a LUKS volume.
    Luks {
        /// Where its header lies in the image file.
        offset: HostOffset,
        /// Length of the header, bytes.
        len: u64,
    },
}

/// An image that is read: where the bytes of its disk lie, and what it says of itself.
///
/// Opening reads the header; the tables are read when they are needed, a page at a time.
///
/// ```text
/// Image::open ──► attach_data_file, if needs_data_file
///             ──► select_snapshot, to see an older state
///             ──► BlockMap, BlockRead │ snapshots, bitmaps, header …
/// ```
#[derive(Debug)]
pub struct Image<D> {
    pub(crate) pages: Pages<D>,
    pub(crate) id: FileId,
    pub(crate) data_file: Option<(D, FileId)>,
    pub(crate) header: Header,
    pub(crate) extensions: Extensions,
    pub(crate) backing_file: Vec<u8>,
    pub(crate) l1: L1Place,
    pub(crate) l2: L2Format,
    pub(crate) strict: bool,
    pub(crate) cipher: Option<Arc<dyn SectorCipher>>,
    pub(crate) unpacker: RefCell<Unpacker>,
    pub(crate) ahead: Cell<Ahead>,
}

/// The L1 table in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct L1Place {
    pub(crate) offset: HostOffset,
    pub(crate) entries: u64,
}

impl<D: BlockRead> Image<D> {
    /// Opens the image in `file`, which extents will call `id`.
    ///
    /// # Errors
    /// What QEMU refuses when it opens an image; the same cause where there are several.
    pub fn open(file: D, id: FileId, options: &OpenOptions) -> Result<Self> {
        let mut pages = Pages::new(file, options.cache_bytes);
        let header = Header::parse(&read_array::<_, HEADER_LEN>(&pages)?)?;
        let extensions = Extensions::parse(&header, &read_area(&pages, header.extension_area())?)?;
        let backing_file = match header.backing_name()? {
            Some(place) => file_name(&pages.read_vec(place.start as u64, place.len())?).to_vec(),
            None => Vec::new(),
        };
        snapshot::check(&pages, &header)?;
        if let Some(directory) = &extensions.bitmaps {
            bitmap::check(&pages, &header, directory)?;
        }
        pages.fit(header.geometry.cluster_size());
        Ok(Self {
            pages,
            id,
            data_file: None,
            l1: L1Place { offset: header.l1_offset, entries: header.l1_entries.into() },
            l2: L2Format::new(&header),
            header,
            extensions,
            backing_file,
            strict: options.strict,
            cipher: None,
            unpacker: RefCell::default(),
            ahead: Cell::default(),
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The header extensions.
    pub fn extensions(&self) -> &Extensions {
        &self.extensions
    }

    /// Size of the disk, bytes; not rounded.
    pub fn virtual_size(&self) -> u64 {
        self.header.virtual_size
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.header.geometry.cluster_size()
    }

    /// Name of the backing file as stored, up to its first zero byte.
    pub fn backing_file(&self) -> Option<&[u8]> {
        Some(self.backing_file.as_slice()).filter(|name| !name.is_empty())
    }

    /// Name of the backing file's format as stored, up to its first zero byte.
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extensions.backing_format.as_deref().filter(|name| !name.is_empty())
    }

    /// Clusters lie in an external data file.
    pub fn needs_data_file(&self) -> bool {
        self.l2.data_file
    }

    /// Name of the external data file as stored; also where the image doesn't use it.
    pub fn data_file_name(&self) -> Option<&[u8]> {
        self.extensions.data_file.as_deref()
    }

    /// The external data file is a valid raw image of its own.
    pub fn data_file_raw(&self) -> bool {
        self.header.autoclear.contains(Autoclear::DATA_FILE_RAW)
    }

    /// Hands in the external data file, which extents will call `id`.
    pub fn attach_data_file(&mut self, file: D, id: FileId) {
        self.data_file = Some((file, id));
    }

    /// How the contents are encrypted.
    pub fn encryption(&self) -> Encryption {
        match (self.header.encryption, self.extensions.crypto) {
            (EncryptionMethod::Luks, Some(crypto)) => Encryption::Luks { offset: crypto.offset, len: crypto.len },
            (EncryptionMethod::Aes, _) => Encryption::Aes,
            _ => Encryption::None,
        }
    }

    /// Hands in the cipher of the contents, by which they can be read: that of the LUKS volume, or for [`Encryption::Aes`] AES-128 in
    /// CBC mode with `plain64` vectors.
    pub fn set_cipher(&mut self, cipher: Arc<dyn SectorCipher>) {
        self.cipher = Some(cipher);
    }

    /// The cipher that was handed in.
    pub fn cipher(&self) -> Option<&Arc<dyn SectorCipher>> {
        self.cipher.as_ref()
    }

    /// How compressed clusters are stored.
    pub fn compression(&self) -> CompressionType {
        self.header.compression
    }

    /// The image was not closed: its refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.header.incompatible.contains(Incompatible::DIRTY)
    }

    /// Some structure is known to be wrong.
    pub fn is_corrupt(&self) -> bool {
        self.header.incompatible.contains(Incompatible::CORRUPT)
    }

    /// Whether the contents can be read at all, apart from the data file being attached.
    ///
    /// # Errors
    /// [`Error::DataFileMissing`] if one is needed but not named, [`Error::RawFlagWithoutDataFile`],
    /// [`Error::Encrypted`].
    pub fn check_readable(&self) -> Result<()> {
        if self.needs_data_file() && self.data_file_name().is_none() {
            return Err(Error::DataFileMissing);
        }
        if self.data_file_raw() && !self.needs_data_file() {
            return Err(Error::RawFlagWithoutDataFile);
        }
        if self.encryption() != Encryption::None && self.cipher.is_none() { Err(Error::Encrypted(0)) } else { Ok(()) }
    }
}

/// What the image in `file` calls the incompatible features of `bits`, for [`Error::UnknownFeatures`].
///
/// # Errors
/// [`Error::Io`].
pub fn feature_names<D: BlockRead>(file: &D, bits: u64) -> Result<FeatureNames> {
    let pages = Pages::new(file, 0);
    let head = read_array::<_, HEADER_LEN>(&pages)?;
    let area = match Header::extension_area_of(&head) {
        Some(area) => read_area(&pages, area)?,
        None => Vec::new(),
    };
    Ok(FeatureNames::in_area(&area, bits))
}

fn read_array<D: BlockRead, const N: usize>(pages: &Pages<D>) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    pages.read(0, &mut bytes)?;
    Ok(bytes)
}

/// The extension area; of a large one only what lies in the first page, unless the extensions go on behind it.
fn read_area<D: BlockRead>(pages: &Pages<D>, area: Range<usize>) -> Result<Vec<u8>> {
    let (start, len) = (area.start as u64, area.len());
    let window = pages.read_vec(start, len.min(PAGE - area.start % PAGE))?;
    let enough = window.len() == len || extension::end_inside(&window, len);
    if enough { Ok(window) } else { Ok(pages.read_vec(start, len)?) }
}
