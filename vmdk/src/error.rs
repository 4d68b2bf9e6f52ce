use alloc::vec::Vec;
use core::fmt;

use instar_blockio::Error as BlockError;

/// Result of this crate's own operations.
pub type Result<T> = core::result::Result<T, Error>;

/// Why an image can't be opened or made. Texts are cut to [`Error::MAX_TEXT`] bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The device failed.
    Io(BlockError),
    /// Neither a sparse extent nor a descriptor.
    NotVmdk,
    /// The descriptor names no type of image.
    InvalidDescriptor,
    /// A sparse extent whose descriptor has no content id, or none at all: a part of an image in several files.
    NoContentId,
    /// A type of image that can't be read: devices, partitions, or an unknown one.
    UnsupportedType(Vec<u8>),
    /// A line of the descriptor that should tell of an extent and does not.
    InvalidExtentLine(Vec<u8>),
    /// An extent of a type that does not exist or can't be read.
    UnsupportedExtent(Vec<u8>),
    /// More extents than [`Error::MAX_EXTENTS`].
    TooManyExtents(usize),
    /// The extents together exceed 2^63 bytes, or one of them the file's addresses.
    SizeOverflow,
    /// The version of a sparse extent.
    UnsupportedVersion(u64),
    /// More grain table entries in a table than 512.
    TableSize(u64),
    /// Sectors of a grain: none, more than 2^21, or too many for a compressed grain.
    GrainSize(u64),
    /// Entries of a grain directory, more than 2^25.
    DirectorySize(u64),
    /// The file should have so many bytes at least.
    Truncated(u64),
    /// The footer is not what it should be.
    Footer,
    /// A field of a seSparse header has a value that is not handled: its place in the header, bytes.
    SeSparse(u64),
    /// A seSparse extent with a journal that was not replayed.
    SeSparseDirty,
    /// The header of the extent itself is none.
    ExtentMagic(u32),
    /// The extent can't be written: its type.
    ReadOnlyType,
    /// A disk of so many bytes can't be made.
    SizeTooLarge(u64),
}

impl Error {
    /// Bytes of a text from the image that an error carries.
    pub const MAX_TEXT: usize = 256;
    /// Extents of an image.
    pub const MAX_EXTENTS: usize = 1000;

    pub(crate) fn text(bytes: &[u8]) -> Vec<u8> {
        bytes[..bytes.len().min(Self::MAX_TEXT)].to_vec()
    }
}

impl From<BlockError> for Error {
    fn from(error: BlockError) -> Self {
        Self::Io(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "{error}"),
            Self::NotVmdk => f.write_str("not a VMDK image"),
            Self::InvalidDescriptor => f.write_str("the descriptor has no type of image"),
            Self::NoContentId => f.write_str("the descriptor has no content id (CID)"),
            Self::UnsupportedType(text) => write!(f, "unsupported type of image: {}", text.escape_ascii()),
            Self::InvalidExtentLine(text) => write!(f, "invalid extent: {}", text.escape_ascii()),
            Self::UnsupportedExtent(text) => write!(f, "unsupported type of extent: {}", text.escape_ascii()),
            Self::TooManyExtents(count) => write!(f, "{count} extents"),
            Self::SizeOverflow => f.write_str("the extents are too large"),
            Self::UnsupportedVersion(version) => write!(f, "unsupported version {version}"),
            Self::TableSize(count) => write!(f, "grain tables of {count} entries"),
            Self::GrainSize(sectors) => write!(f, "grains of {sectors} sectors"),
            Self::DirectorySize(count) => write!(f, "a grain directory of {count} entries"),
            Self::Truncated(bytes) => write!(f, "the file is shorter than {bytes} bytes"),
            Self::Footer => f.write_str("the footer is damaged"),
            Self::SeSparse(at) => write!(f, "unsupported value at byte {at} of a seSparse header"),
            Self::SeSparseDirty => f.write_str("a journal waits to be replayed"),
            Self::ExtentMagic(magic) => write!(f, "no extent begins with {magic:#010x}"),
            Self::ReadOnlyType => f.write_str("extents of this type are not written"),
            Self::SizeTooLarge(size) => write!(f, "a disk of {size} bytes is too large"),
        }
    }
}

impl core::error::Error for Error {}
