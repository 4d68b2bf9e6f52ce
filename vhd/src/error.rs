use core::fmt;

use instar_blockio::{Error as BlockError, ErrorKind};

/// Result of an operation on an image.
pub type Result<T> = core::result::Result<T, Error>;

/// Why an image can't be opened, read, made or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed.
    Io(BlockError),
    /// The file is too short for a footer: its length in bytes.
    TooShort(u64),
    /// No footer at either end.
    NotVhd,
    /// A footer with a wrong checksum, and no good copy of it.
    Checksum,
    /// The footer names a kind of disk that is none: its number.
    DiskType(u32),
    /// The disk is larger than 2040 GiB: sectors of 512 bytes.
    SizeTooLarge(u64),
    /// No dynamic header where the footer says: its offset in bytes.
    Header(u64),
    /// The dynamic header does not begin with its mark.
    HeaderMark,
    /// Block size in bytes: no power of two, or less than a sector.
    BlockSize(u32),
    /// The block allocation table has too few entries for the disk: their number.
    TableTooSmall(u32),
    /// The block allocation table has too many entries: their number.
    TableTooLarge(u32),
    /// The block allocation table ends behind the end of the file: its offset in bytes.
    TablePlace(u64),
    /// A block ends behind the end of the file: its number.
    Truncated(u32),
    /// A differencing image is to be written.
    DifferencingWrite,
    /// A fixed image is to be opened as one with an allocation table.
    Fixed,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Io(error) => error.fmt(f),
            Self::TooShort(len) => write!(f, "a file of {len} bytes is too short for a VHD"),
            Self::NotVhd => f.write_str("not a VHD"),
            Self::Checksum => f.write_str("the footer has a wrong checksum, and there is no good copy of it"),
            Self::DiskType(kind) => write!(f, "unknown disk type {kind}"),
            Self::SizeTooLarge(sectors) => write!(f, "a disk of {sectors} sectors exceeds 2040 GiB"),
            Self::Header(at) => write!(f, "no dynamic header at offset {at}"),
            Self::HeaderMark => f.write_str("the dynamic header lacks its mark"),
            Self::BlockSize(size) => write!(f, "impossible block size {size}"),
            Self::TableTooSmall(count) => write!(f, "a block allocation table of {count} entries is too small"),
            Self::TableTooLarge(count) => write!(f, "a block allocation table of {count} entries is too large"),
            Self::TablePlace(at) => write!(f, "the block allocation table at offset {at} ends behind the file"),
            Self::Truncated(block) => write!(f, "block {block} ends behind the end of the file"),
            Self::DifferencingWrite => f.write_str("differencing images can't be written"),
            Self::Fixed => f.write_str("a fixed image has no blocks"),
        }
    }
}

impl core::error::Error for Error {}

impl From<BlockError> for Error {
    fn from(error: BlockError) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for BlockError {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) => error,
            Error::DifferencingWrite | Error::Fixed => ErrorKind::Unsupported.into(),
            _ => ErrorKind::Corrupt.into(),
        }
    }
}
