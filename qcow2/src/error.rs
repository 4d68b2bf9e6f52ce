use core::fmt;

use instar_blockio as blockio;

use crate::addr::HostOffset;
use crate::amend::AmendError;
use crate::bitmap_edit::BitmapError;
use crate::create::OptionError;
use crate::resize::ResizeError;

/// Why an image can't be opened, read, made or changed. Each cause carries the offending value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed.
    Io(blockio::Error),
    /// The file doesn't begin with the magic number.
    NotQcow2,
    /// Neither version 2 nor 3.
    UnsupportedVersion(u32),
    /// log2 of a cluster size outside 9 to 21.
    UnsupportedClusterBits(u32),
    /// A version 3 header of less than 104 bytes: its length.
    HeaderTooShort(u32),
    /// A header longer than a cluster: its length.
    HeaderTooLong(u32),
    /// The backing file name lies behind the first cluster: its offset.
    BackingOffset(u64),
    /// The backing file name is longer than 1023 bytes or reaches behind the first cluster: its length.
    BackingNameTooLong(u32),
    /// Incompatible feature bits that have no meaning here; [`feature_names`](crate::feature_names) may name them.
    UnknownFeatures(u64),
    /// Compression type that is neither zlib nor zstd.
    UnknownCompression(u8),
    /// The compression feature bit is set although the type is zlib.
    CompressionBitSet,
    /// The compression feature bit is missing although the type is not zlib.
    CompressionBitMissing,
    /// Extended L2 entries with subclusters of less than 512 bytes: their size.
    SubclusterSize(u32),
    /// log2 of a refcount width above 64 bits.
    RefcountOrder(u32),
    /// Encryption method that is neither none, AES nor LUKS.
    EncryptionMethod(u32),
    /// The refcount table has no clusters.
    NoRefcountTable,
    /// A table has more entries (clusters, for the refcount table) than are accepted.
    TableTooLarge(Table, u32),
    /// A table's offset is not a multiple of the cluster size, or it ends behind 2^63.
    TableOffset(Table, u64),
    /// The virtual size needs more L1 entries than there can be.
    ImageTooBig(u64),
    /// The virtual size can't be rounded up to a whole L2 table within 64 bits.
    SizeOverflow(u64),
    /// The active L1 table has fewer entries than the virtual size needs: entries present.
    L1TooSmall(u32),
    /// A header extension reaches behind its area: its length.
    ExtensionTooLarge(u32),
    /// The backing format's name has more than 15 bytes: its length.
    BackingFormatTooLong(u32),
    /// An encryption header pointer in an image that is not encrypted by LUKS.
    UnexpectedCryptoHeader,
    /// The encryption header pointer has a wrong length.
    CryptoExtensionLength(u32),
    /// The encryption header is not aligned to a cluster: its offset.
    CryptoHeaderOffset(u64),
    /// LUKS without an encryption header pointer.
    NoCryptoHeader,
    /// The bitmaps extension contradicts the specification.
    BitmapsExtension(BitmapsFault),
    /// The bitmap directory can't be read as such.
    BitmapDirectory(DirectoryFault),
    /// A snapshot table entry has more than 1024 bytes of extra data: its number.
    SnapshotExtraData(u32),
    /// The snapshot table has more than 64 MiB: how many snapshots lie behind that.
    SnapshotTableTooBig(u32),
    /// No snapshot answers to the selector.
    SnapshotNotFound,
    /// The image needs its external data file, which is not named or has not been attached.
    DataFileMissing,
    /// The external data file is said to be raw, but there is none.
    RawFlagWithoutDataFile,
    /// The cluster at this disk offset (or, at 0, the whole disk) is encrypted.
    Encrypted(u64),
    /// A table entry that can't be.
    Corrupt {
        /// Disk offset at which that was seen.
        offset: u64,
        /// What can't be.
        cause: Corruption,
    },
    /// A bitmap table entry is not aligned or has reserved bits: the entry.
    BitmapEntry(u64),
    /// The image is marked corrupt, so it must not be written.
    MarkedCorrupt,
    /// The image was not closed cleanly, so its refcounts may be wrong and it must not be written.
    MarkedDirty,
    /// Writing into encrypted images is not supported.
    EncryptedWrite,
    /// Options of a new image contradict each other or the format.
    Options(OptionError),
    /// An image with an external data file has no internal snapshots.
    SnapshotsWithDataFile,
    /// There are 65536 snapshots already.
    TooManySnapshots,
    /// The count of the cluster at this file offset can't rise any more: refcounts are too narrow.
    RefcountOverflow(u64),
    /// A bitmap can't be changed as wanted.
    Bitmap(BitmapError),
    /// An option of an existing image can't be changed as wanted.
    Amend(AmendError),
    /// The disk can't get the wanted size.
    Resize(ResizeError),
    /// An image can't get this backing file: its external data file is a raw image of its own, or the name is too long.
    BackingRefused,
    /// The first cluster has no room for the name of the backing file.
    HeaderFull,
    /// Memory for a bounded table could not be had.
    OutOfMemory,
}

/// A table that the header or a snapshot points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Active L1 table.
    ActiveL1,
    /// L1 table of a snapshot.
    SnapshotL1,
    /// Refcount table.
    Refcount,
    /// Snapshot table.
    Snapshots,
}

/// What is wrong with the bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapsFault {
    /// It doesn't have 24 bytes: its length.
    Length(u32),
    /// Its reserved field is not zero.
    Reserved,
    /// More than 65535 bitmaps: their number.
    TooMany(u32),
    /// No bitmap.
    None,
    /// The directory is not aligned to a cluster: its offset.
    DirectoryOffset(u64),
    /// The directory is too long: bytes.
    DirectorySize(u64),
}

/// What is wrong with the bitmap directory, or with what it refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectoryFault {
    /// It has no bytes.
    Empty,
    /// An entry reaches behind its end.
    Broken,
    /// More entries than the header extension says.
    MoreThanSaid,
    /// Fewer entries than the header extension says.
    FewerThanSaid,
    /// An entry has extra data.
    ExtraData,
    /// An entry's fields contradict the specification or the disk.
    Constraints(NameAt),
    /// Two bitmaps have one name.
    Duplicate(NameAt),
    /// An entry of the bitmap's table can't be.
    Table(NameAt),
    /// The bitmap's table has not as many entries as the disk needs.
    TableSize(NameAt),
}

impl DirectoryFault {
    /// The bitmap concerned, if it is one.
    pub const fn name(self) -> Option<NameAt> {
        match self {
            Self::Constraints(name) | Self::Duplicate(name) | Self::Table(name) | Self::TableSize(name) => Some(name),
            _ => None,
        }
    }
}

/// Where the name of a bitmap lies in the image file, for those who want to tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameAt {
    /// Its place, bytes.
    pub offset: u64,
    /// Its length, bytes.
    pub len: u16,
}

/// What can't be in the cluster mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Corruption {
    /// An L1 entry refers to an L2 table that is not aligned to a cluster.
    L2Unaligned {
        /// Where it would lie.
        table: HostOffset,
        /// The L1 entry's number.
        l1_index: u64,
    },
    /// An L2 entry contradicts itself or the image.
    Entry {
        /// How.
        fault: EntryFault,
        /// Where its table lies.
        table: HostOffset,
        /// Its number in the table.
        index: u64,
    },
    /// A table lies behind the end of the file (only if [strict](crate::OpenOptions::strict)).
    TablePastEnd(HostOffset),
    /// A data cluster lies behind the end of the file (only if [strict](crate::OpenOptions::strict)).
    DataPastEnd(HostOffset),
    /// A compressed cluster lies behind the end of the file, or can't be decoded: where it lies.
    Compressed(HostOffset),
}

/// How an L2 entry contradicts itself or the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EntryFault {
    /// Its cluster is not aligned.
    Unaligned(HostOffset),
    /// A zero cluster in a version 2 image.
    ZeroInV2,
    /// A compressed cluster although there is an external data file.
    CompressedWithDataFile,
    /// A cluster that lies elsewhere in the external data file than on the disk.
    DataFileOffset(HostOffset),
    /// A subcluster is allocated and zero at once, or allocated without a cluster.
    Subclusters,
}

/// Result of an operation on an image.
pub type Result<T> = core::result::Result<T, Error>;

impl From<blockio::Error> for Error {
    fn from(error: blockio::Error) -> Self {
        Self::Io(error)
    }
}

/// The kind of the cause, for those who see the image as a block device only.
impl From<Error> for blockio::Error {
    fn from(error: Error) -> Self {
        use blockio::ErrorKind;
        match error {
            Error::Io(error) => error,
            Error::Corrupt { offset, .. } => Self::new(ErrorKind::Corrupt).at(offset),
            Error::Encrypted(offset) => Self::new(ErrorKind::Encrypted).at(offset),
            Error::OutOfMemory => ErrorKind::OutOfMemory.into(),
            Error::DataFileMissing | Error::SnapshotNotFound => ErrorKind::InvalidInput.into(),
            Error::UnsupportedVersion(_) | Error::UnknownFeatures(_) | Error::UnknownCompression(_) => {
                ErrorKind::Unsupported.into()
            }
            Error::EncryptedWrite => ErrorKind::Encrypted.into(),
            Error::Options(_) | Error::RefcountOverflow(_) | Error::Bitmap(_) | Error::Amend(_) | Error::Resize(_) => {
                ErrorKind::InvalidInput.into()
            }
            Error::SnapshotsWithDataFile | Error::TooManySnapshots => ErrorKind::Unsupported.into(),
            _ => ErrorKind::Corrupt.into(),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ActiveL1 => "active L1 table",
            Self::SnapshotL1 => "snapshot L1 table",
            Self::Refcount => "refcount table",
            Self::Snapshots => "snapshot table",
        })
    }
}

impl fmt::Display for BitmapsFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Length(len) => write!(f, "length {len}"),
            Self::Reserved => f.write_str("reserved field"),
            Self::TooMany(count) => write!(f, "{count} bitmaps"),
            Self::None => f.write_str("no bitmap"),
            Self::DirectoryOffset(offset) => write!(f, "directory at {offset:#x}"),
            Self::DirectorySize(len) => write!(f, "directory of {len} bytes"),
        }
    }
}

impl fmt::Display for DirectoryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "empty",
            Self::Broken => "entry reaches behind the end",
            Self::MoreThanSaid => "more entries than recorded",
            Self::FewerThanSaid => "fewer entries than recorded",
            Self::ExtraData => "entry with extra data",
            Self::Constraints(_) => "invalid entry",
            Self::Duplicate(_) => "two entries of one name",
            Self::Table(_) => "invalid entry in a bitmap table",
            Self::TableSize(_) => "bitmap table of the wrong size",
        })
    }
}

impl fmt::Display for EntryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unaligned(host) => write!(f, "cluster at {:#x} is not aligned", host.0),
            Self::ZeroInV2 => f.write_str("zero cluster in version 2"),
            Self::CompressedWithDataFile => f.write_str("compressed cluster despite a data file"),
            Self::DataFileOffset(host) => write!(f, "misplaced cluster at {:#x} of the data file", host.0),
            Self::Subclusters => f.write_str("contradictory subclusters"),
        }
    }
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::L2Unaligned { table, l1_index } => {
                write!(f, "L2 table at {:#x} (L1 index {l1_index}) is not aligned", table.0)
            }
            Self::Entry { fault, table, index } => write!(f, "{fault} (L2 table at {:#x}, index {index})", table.0),
            Self::TablePastEnd(host) => write!(f, "table at {:#x} lies behind the end of the file", host.0),
            Self::DataPastEnd(host) => write!(f, "cluster at {:#x} lies behind the end of the file", host.0),
            Self::Compressed(host) => write!(f, "undecodable compressed cluster at {:#x}", host.0),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Io(_) => f.write_str("the image file failed"),
            Self::NotQcow2 => f.write_str("not a qcow2 image"),
            Self::UnsupportedVersion(version) => write!(f, "version {version} is not supported"),
            Self::UnsupportedClusterBits(bits) => write!(f, "cluster size 2^{bits} is not supported"),
            Self::HeaderTooShort(len) => write!(f, "header of {len} bytes is too short"),
            Self::HeaderTooLong(len) => write!(f, "header of {len} bytes exceeds the cluster"),
            Self::BackingOffset(at) => write!(f, "backing file name at {at:#x} lies behind the first cluster"),
            Self::BackingNameTooLong(len) => write!(f, "backing file name of {len} bytes is too long"),
            Self::UnknownFeatures(bits) => write!(f, "unknown incompatible features {bits:#x}"),
            Self::UnknownCompression(kind) => write!(f, "unknown compression type {kind}"),
            Self::CompressionBitSet => f.write_str("compression feature bit set for zlib"),
            Self::CompressionBitMissing => f.write_str("compression feature bit missing"),
            Self::SubclusterSize(size) => write!(f, "subclusters of {size} bytes are too small"),
            Self::RefcountOrder(order) => write!(f, "refcounts of 2^{order} bits are too wide"),
            Self::EncryptionMethod(method) => write!(f, "unknown encryption method {method}"),
            Self::NoRefcountTable => f.write_str("no refcount table"),
            Self::TableTooLarge(table, count) => write!(f, "{table} with size {count} is too large"),
            Self::TableOffset(table, at) => write!(f, "{table} at {at:#x} is misplaced"),
            Self::ImageTooBig(size) => write!(f, "virtual size {size} is too big"),
            Self::SizeOverflow(size) => write!(f, "virtual size {size} is out of range"),
            Self::L1TooSmall(count) => write!(f, "active L1 table of {count} entries is too small"),
            Self::ExtensionTooLarge(len) => write!(f, "header extension of {len} bytes is too large"),
            Self::BackingFormatTooLong(len) => write!(f, "backing format of {len} bytes is too long"),
            Self::UnexpectedCryptoHeader => f.write_str("encryption header without LUKS encryption"),
            Self::CryptoExtensionLength(len) => write!(f, "encryption header pointer of {len} bytes"),
            Self::CryptoHeaderOffset(at) => write!(f, "encryption header at {at:#x} is not aligned"),
            Self::NoCryptoHeader => f.write_str("encryption header is missing"),
            Self::BitmapsExtension(fault) => write!(f, "bitmaps extension: {fault}"),
            Self::BitmapDirectory(fault) => write!(f, "bitmap directory: {fault}"),
            Self::SnapshotExtraData(index) => write!(f, "snapshot entry {index} has too much extra data"),
            Self::SnapshotTableTooBig(_) => f.write_str("snapshot table is too big"),
            Self::SnapshotNotFound => f.write_str("no such snapshot"),
            Self::DataFileMissing => f.write_str("external data file is missing"),
            Self::RawFlagWithoutDataFile => f.write_str("raw external data file, but no data file"),
            Self::Encrypted(at) => write!(f, "disk offset {at:#x} is encrypted"),
            Self::Corrupt { offset, cause } => write!(f, "disk offset {offset:#x}: {cause}"),
            Self::BitmapEntry(entry) => write!(f, "invalid bitmap table entry {entry:#x}"),
            Self::MarkedCorrupt => f.write_str("image is marked corrupt"),
            Self::MarkedDirty => f.write_str("image was not closed cleanly"),
            Self::EncryptedWrite => f.write_str("encrypted images can't be written"),
            Self::Options(error) => write!(f, "{error}"),
            Self::SnapshotsWithDataFile => f.write_str("no snapshots with an external data file"),
            Self::TooManySnapshots => f.write_str("too many snapshots"),
            Self::RefcountOverflow(at) => write!(f, "refcount of the cluster at {at:#x} can't rise"),
            Self::Bitmap(error) => write!(f, "{error}"),
            Self::Amend(error) => write!(f, "{error}"),
            Self::Resize(error) => write!(f, "{error}"),
            Self::BackingRefused => f.write_str("the image can't have this backing file"),
            Self::HeaderFull => f.write_str("no room for the backing file name"),
            Self::OutOfMemory => f.write_str("out of memory"),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            _ => None,
        }
    }
}
