use core::fmt;

use instar_blockio as blockio;

use super::OptionError;

/// Why an image can't be opened or made. Each cause carries the offending value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed.
    Io(blockio::Error),
    /// A disk of more bytes than are accepted.
    SizeTooLarge(u64),
    /// The signature is another.
    Signature(u32),
    /// Neither version 1.1 nor one like it.
    UnsupportedVersion(u32),
    /// The block map does not begin at a sector.
    MapOffset(u32),
    /// The data do not begin at a sector.
    DataOffset(u32),
    /// Bytes of a sector other than 512.
    SectorSize(u32),
    /// Bytes of a block other than 1 MiB.
    BlockSize(u32),
    /// The block map has room for fewer bytes than the disk has.
    MapTooSmall {
        /// Bytes of the disk.
        disk: u64,
        /// Bytes that the map has room for.
        room: u64,
    },
    /// Linked to another image.
    Linked,
    /// A differencing image.
    HasParent,
    /// Blocks of a disk: too many.
    TooManyBlocks(u32),
    /// The options of a new image.
    Options(OptionError),
}

impl From<blockio::Error> for Error {
    fn from(error: blockio::Error) -> Self {
        Self::Io(error)
    }
}

impl From<OptionError> for Error {
    fn from(error: OptionError) -> Self {
        Self::Options(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(_) => f.write_str("file can't be accessed"),
            Self::SizeTooLarge(size) => write!(f, "disk of {size} bytes is too large"),
            Self::Signature(signature) => write!(f, "not a VDI image (signature {signature:#010x})"),
            Self::UnsupportedVersion(version) => {
                write!(f, "unsupported version {}.{}", version >> 16, version & 0xffff)
            }
            Self::MapOffset(at) => write!(f, "block map between sectors, at {at}"),
            Self::DataOffset(at) => write!(f, "data between sectors, at {at}"),
            Self::SectorSize(size) => write!(f, "sectors of {size} bytes"),
            Self::BlockSize(size) => write!(f, "blocks of {size} bytes"),
            Self::MapTooSmall { disk, room } => write!(f, "disk of {disk} bytes, block map for {room}"),
            Self::Linked => f.write_str("linked to another image"),
            Self::HasParent => f.write_str("differencing image"),
            Self::TooManyBlocks(count) => write!(f, "disk of {count} blocks is too large"),
            Self::Options(_) => f.write_str("invalid options"),
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            Self::Options(error) => Some(error),
            _ => None,
        }
    }
}
