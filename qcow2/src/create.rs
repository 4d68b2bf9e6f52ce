//! New images: the options, what they may not combine, and the layout of a fresh file.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use instar_blockio::{self as blockio, BlockWrite, Codec, ErrorKind, FileId, SectorCipher, ZeroMode};

use crate::addr::{Geometry, HostOffset};
use crate::allocator::{Allocator, State};
use crate::crypt::ContentsCipher;
use crate::error::Error;
use crate::extension::{Extensions, FeatureName};
use crate::format::{
    HEADER_LEN, HEADER_LEN_V2, MAX_BACKING_FORMAT, MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_CLUSTER_WITHOUT_NAMES,
    MAX_L1_BYTES, MIN_CLUSTER_BITS, V2_REFCOUNT_ORDER,
};
use crate::header::{Autoclear, Compatible, CompressionType, EncryptionMethod, Header, Incompatible};
use crate::reserve::Link;
use crate::store::Store;
use crate::write::Writer;

/// Smallest clusters with extended L2 entries, bytes.
const MIN_EXTENDED_CLUSTER: u64 = 16384;

/// What is allocated when an image is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Tables and places, but no space.
    Metadata,
    /// Tables, and space without writing it.
    Falloc,
    /// Tables, and space by writing zeroes.
    Full,
}

/// How a new image is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum NewEncryption {
    /// Not at all.
    #[default]
    None,
    /// By the legacy method.
    Aes,
    /// As a LUKS volume, whose header takes so many bytes.
    Luks(u64),
}

/// Options of a new image. The default is that of `qemu-img create` for a disk of size 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Bytes of a cluster: a power of two, 512 to 2 MiB.
    pub cluster_size: u64,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// Width of a refcount: a power of two, 1 to 64.
    pub refcount_bits: u32,
    /// Set the feature bit that lets writers keep refcounts lazily.
    pub lazy_refcounts: bool,
    /// How clusters will be compressed: [`Codec::Zstd`], or zlib's deflate for both others.
    pub compression: Codec,
    /// Name of the external data file, as it is stored.
    pub data_file: Option<Vec<u8>>,
    /// The external data file is to be a valid raw image at all times.
    pub data_file_raw: bool,
    /// Name of the backing file, as it is stored.
    pub backing_file: Option<Vec<u8>>,
    /// Name of the backing file's format.
    pub backing_format: Option<Vec<u8>>,
    /// What is allocated at once.
    pub preallocation: Preallocation,
    /// How the contents are encrypted.
    pub encryption: NewEncryption,
    /// Bytes of the disk; rounded up to a sector of 512.
    pub size: u64,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            version: 3,
            cluster_size: 65536,
            extended_l2: false,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression: Codec::Deflate,
            data_file: None,
            data_file_raw: false,
            backing_file: None,
            backing_format: None,
            preallocation: Preallocation::Off,
            encryption: NewEncryption::None,
            size: 0,
        }
    }
}

/// What is wrong with the options of a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OptionError {
    /// There is no such version.
    Version(u32),
    /// The cluster size is no power of two between 512 and 2 MiB.
    ClusterSize(u64),
    /// Extended L2 entries need version 3.
    ExtendedL2Version,
    /// Extended L2 entries need clusters of 16 KiB.
    ExtendedL2ClusterSize(u64),
    /// Preallocation with a backing file needs extended L2 entries.
    BackingWithPreallocation,
    /// A backing format without a backing file.
    BackingFormatAlone,
    /// Lazy refcounts need version 3.
    LazyRefcountsVersion,
    /// The refcount width is no power of two between 1 and 64.
    RefcountBits(u32),
    /// Refcounts of other than 16 bits need version 3.
    RefcountBitsVersion,
    /// `data_file_raw` needs `data_file`.
    DataFileRawAlone,
    /// A backing file and a raw external data file exclude each other.
    BackingWithDataFileRaw,
    /// External data files need version 3.
    DataFileVersion,
    /// Compression other than zlib needs version 3.
    CompressionVersion,
    /// The disk is too large for clusters of this size: bytes.
    SizeTooLarge(u64),
    /// The backing file's name has more than 1023 bytes: its length.
    BackingNameTooLong(usize),
    /// The backing format's name has more than 15 bytes: its length.
    BackingFormatTooLong(usize),
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Version(version) => write!(f, "no version {version}"),
            Self::ClusterSize(size) => write!(f, "cluster size {size} is no power of two from 512 to 2097152"),
            Self::ExtendedL2Version => f.write_str("extended L2 entries need version 3"),
            Self::ExtendedL2ClusterSize(size) => write!(f, "cluster size {size} is too small for extended L2 entries"),
            Self::BackingWithPreallocation => {
                f.write_str("preallocation with a backing file needs extended L2 entries")
            }
            Self::BackingFormatAlone => f.write_str("backing format without backing file"),
            Self::LazyRefcountsVersion => f.write_str("lazy refcounts need version 3"),
            Self::RefcountBits(bits) => write!(f, "refcount width {bits} is no power of two from 1 to 64"),
            Self::RefcountBitsVersion => f.write_str("refcount widths other than 16 need version 3"),
            Self::DataFileRawAlone => f.write_str("raw external data without a data file"),
            Self::BackingWithDataFileRaw => f.write_str("backing file and raw external data exclude each other"),
            Self::DataFileVersion => f.write_str("external data files need version 3"),
            Self::CompressionVersion => f.write_str("compression other than zlib needs version 3"),
            Self::SizeTooLarge(size) => write!(f, "disk of {size} bytes is too large for this cluster size"),
            Self::BackingNameTooLong(len) => write!(f, "backing file name of {len} bytes is too long"),
            Self::BackingFormatTooLong(len) => write!(f, "backing format of {len} bytes is too long"),
        }
    }
}

impl core::error::Error for OptionError {}

impl From<OptionError> for Error {
    fn from(error: OptionError) -> Self {
        Self::Options(error)
    }
}

impl CreateOptions {
    /// Finds contradictions, in the order in which `qemu-img create` does.
    ///
    /// # Errors
    /// The first one.
    pub fn check(&self) -> Result<(), OptionError> {
        self.layout().map(|_| ())
    }

    fn layout(&self) -> Result<Geometry, OptionError> {
        let v3 = match self.version {
            2 => false,
            3 => true,
            other => return Err(OptionError::Version(other)),
        };
        let size = self.cluster_size;
        if !size.is_power_of_two() || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&size.trailing_zeros()) {
            return Err(OptionError::ClusterSize(size));
        }
        let backed = self.backing_file.is_some();
        let has_data_file = self.data_file.is_some();
        let bits_valid = self.refcount_bits.is_power_of_two() && self.refcount_bits <= 64;
        let faults = [
            (self.extended_l2 && !v3, OptionError::ExtendedL2Version),
            (self.extended_l2 && size < MIN_EXTENDED_CLUSTER, OptionError::ExtendedL2ClusterSize(size)),
            (
                backed && self.preallocation != Preallocation::Off && !self.extended_l2,
                OptionError::BackingWithPreallocation,
            ),
            (self.backing_format.is_some() && !backed, OptionError::BackingFormatAlone),
            (self.lazy_refcounts && !v3, OptionError::LazyRefcountsVersion),
            (!bits_valid, OptionError::RefcountBits(self.refcount_bits)),
            (self.refcount_bits != 16 && !v3, OptionError::RefcountBitsVersion),
            (self.data_file_raw && !has_data_file, OptionError::DataFileRawAlone),
            (backed && self.data_file_raw, OptionError::BackingWithDataFileRaw),
            (has_data_file && !v3, OptionError::DataFileVersion),
            (self.compression == Codec::Zstd && !v3, OptionError::CompressionVersion),
        ];
        if let Some((_, fault)) = faults.into_iter().find(|(wrong, _)| *wrong) {
            return Err(fault);
        }
        let geometry = Geometry::new(size.trailing_zeros(), self.extended_l2, self.refcount_bits.trailing_zeros())
            .ok_or(OptionError::ClusterSize(size))?;
        self.check_lengths(geometry)?;
        Ok(geometry)
    }

    fn check_lengths(&self, geometry: Geometry) -> Result<(), OptionError> {
        let fits = self.virtual_size().is_some_and(|size| geometry.l1_entries(size) <= MAX_L1_BYTES / 8);
        if !fits {
            return Err(OptionError::SizeTooLarge(self.size));
        }
        let len = |name: &Option<Vec<u8>>| name.as_ref().map_or(0, Vec::len);
        match (len(&self.backing_file), len(&self.backing_format)) {
            (name, _) if name > MAX_BACKING_NAME as usize => Err(OptionError::BackingNameTooLong(name)),
            (_, format) if format > MAX_BACKING_FORMAT as usize => Err(OptionError::BackingFormatTooLong(format)),
            _ => Ok(()),
        }
    }

    /// Bytes of the disk in whole sectors.
    fn virtual_size(&self) -> Option<u64> {
        self.size.checked_next_multiple_of(512).filter(|&size| size <= i64::MAX as u64)
    }

    /// A raw data file must be all there, so its clusters are all mapped.
    fn effective_preallocation(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            other => other,
        }
    }

    fn header(&self, geometry: Geometry) -> Header {
        let zstd = self.compression == Codec::Zstd;
        let mut header = Header {
            version: self.version,
            geometry,
            virtual_size: 0,
            backing_offset: 0,
            backing_len: 0,
            encryption: match self.encryption {
                NewEncryption::None => EncryptionMethod::None,
                NewEncryption::Aes => EncryptionMethod::Aes,
                NewEncryption::Luks(_) => EncryptionMethod::Luks,
            },
            l1_entries: 0,
            l1_offset: HostOffset(0),
            refcount_table_offset: HostOffset(0),
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: HostOffset(0),
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            header_len: if self.version == 2 { HEADER_LEN_V2 } else { HEADER_LEN } as u32,
            compression: if zstd { CompressionType::Zstd } else { CompressionType::Zlib },
        };
        header.incompatible.set(Incompatible::DATA_FILE, self.data_file.is_some());
        header.incompatible.set(Incompatible::COMPRESSION, zstd);
        header.incompatible.set(Incompatible::EXTENDED_L2, self.extended_l2);
        header.compatible.set(Compatible::LAZY_REFCOUNTS, self.lazy_refcounts);
        header.autoclear.set(Autoclear::DATA_FILE_RAW, self.data_file_raw);
        debug_assert!(self.version != 2 || geometry.refcount_order() == V2_REFCOUNT_ORDER);
        header
    }

    fn extensions(&self) -> Extensions {
        let names = self.version >= 3 && self.cluster_size > MAX_CLUSTER_WITHOUT_NAMES;
        Extensions {
            backing_format: self.backing_format.clone(),
            data_file: self.data_file.clone(),
            feature_names: if names { FeatureName::defaults() } else { Vec::new() },
            ..Extensions::default()
        }
    }
}

/// Lays out a fresh image in `file`, which the caller has emptied. `data` is the external data file, empty too, for
/// options that name one.
///
/// The layout is `qemu-img create`'s: header, refcount table, refcount block, L1 table, then what
/// [`Preallocation`] asks for. The file is no image before [`Writer::finish`].
///
/// # Errors
/// [`Error::Options`]; [`Error::DataFileMissing`] if `data` and the options don't agree; what the files report.
pub fn create<D: BlockWrite>(
    file: D,
    id: FileId,
    data: Option<(D, FileId)>,
    options: &CreateOptions,
) -> Result<Writer<D>, Error> {
    create_encrypted(file, id, data, options, None)
}

/// The same for an image that [is encrypted](CreateOptions::encryption), by this cipher. The caller
/// [writes](Writer::write_crypto_header) the LUKS header itself.
///
/// # Errors
/// As [`create`]; [`Error::EncryptedWrite`] without a cipher.
pub fn create_encrypted<D: BlockWrite>(
    file: D,
    id: FileId,
    data: Option<(D, FileId)>,
    options: &CreateOptions,
    cipher: Option<Arc<dyn SectorCipher>>,
) -> Result<Writer<D>, Error> {
    let geometry = options.layout()?;
    if data.is_some() != options.data_file.is_some() {
        return Err(Error::DataFileMissing);
    }
    let mut main = Store::fresh(file, id);
    let data = data.map(|(file, id)| Store::fresh(file, id));
    let alloc = Allocator::fresh(geometry, &mut main)?;
    let header = options.header(geometry);
    let cipher = match (header.encryption, cipher) {
        (EncryptionMethod::None, _) => None,
        (method, Some(cipher)) => Some(ContentsCipher::new(cipher, method)),
        (_, None) => return Err(Error::EncryptedWrite),
    };
    let mut writer = Writer::new(main, data, header, options.extensions(), State::Fresh, alloc);
    writer.cipher = cipher;
    let size = options.virtual_size().ok_or(OptionError::SizeTooLarge(options.size))?;
    writer.grow_l1(geometry.l1_entries(size))?;
    writer.header.virtual_size = size;
    writer.preallocate(options.effective_preallocation())?;
    if let NewEncryption::Luks(len) = options.encryption {
        writer.place_crypto_header(len)?;
    }
    writer.backing_name = options.backing_file.clone().unwrap_or_default();
    writer.first_cluster()?; // everything fits into it
    writer.alloc.rewind();
    Ok(writer)
}

impl<D: BlockWrite> Writer<D> {
    fn preallocate(&mut self, mode: Preallocation) -> Result<(), Error> {
        let size = self.header.virtual_size;
        match mode {
            Preallocation::Off => {
                if let Some(data) = &mut self.data {
                    data.extend(size);
                }
            }
            Preallocation::Falloc | Preallocation::Full if self.data.is_none() => self.preallocate_area(0, mode)?,
            _ => self.preallocate_places(mode)?,
        }
        Ok(())
    }

    /// Gives every cluster a place, tables and clusters in the order in which writes would.
    fn preallocate_places(&mut self, mode: Preallocation) -> blockio::Result<()> {
        let size = self.header.virtual_size;
        let mut offset = 0;
        while offset < size {
            offset += self.preallocate_run(offset, size - offset)?.len;
        }
        if let Some(data) = &mut self.data {
            data.extend(size);
            allocate_space(data, 0, size, mode)?;
        }
        Ok(())
    }

    /// Gives every cluster from `offset` on a place in one area at the end of the file; the tables lie where there is room.
    pub(crate) fn preallocate_area(&mut self, offset: u64, mode: Preallocation) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        let disk_len = self.header.virtual_size - offset;
        let clusters = geometry.clusters(disk_len);
        let end = self.main.end();
        let start = self.alloc.last_used(&mut self.main, end)? + 1;
        // One table more than needed, as the area may begin inside one.
        let tables = clusters.div_ceil(geometry.l2_entries()) + 1;
        let first = self.alloc.move_table(&mut self.main, start, clusters + tables, true, None)?;
        if self.state == State::Live {
            self.sync()?; // QEMU uses the old table's place again
        }
        if self.alloc.allocate_at(&mut self.main, first, clusters)? != clusters {
            return Err(ErrorKind::NoSpace.into());
        }
        let (at, len) = (first * geometry.cluster_size(), clusters * geometry.cluster_size());
        self.main.extend(at + len);
        allocate_space(&mut self.main, at, len, mode)?;
        self.link(offset, len, at, Link::Place)
    }
}

/// Makes the file hold space for a range that belongs to the image.
pub(crate) fn allocate_space<D: BlockWrite>(
    store: &mut Store<D>,
    at: u64,
    len: u64,
    mode: Preallocation,
) -> blockio::Result<()> {
    match mode {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => {
            store.settle()?;
            store.file_mut().write_zeroes(at, len, ZeroMode::KeepAllocated)
        }
        Preallocation::Full => store.fill(at, len),
    }
}
