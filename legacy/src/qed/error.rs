use core::fmt;

use instar_blockio as blockio;

use super::OptionError;

/// Why an image can't be opened or made. Each cause carries the offending value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed.
    Io(blockio::Error),
    /// The file doesn't begin with the magic number.
    NotQed,
    /// Feature bits that have no meaning here.
    UnknownFeatures(u64),
    /// Bytes of a cluster: not a power of two from 4 KiB to 64 MiB.
    ClusterSize(u32),
    /// Clusters of a table: not a power of two from 1 to 16.
    TableSize(u32),
    /// Bytes of the disk: not whole sectors, or more than two levels of tables hold.
    ImageSize(u64),
    /// The L1 table does not lie inside the file: its offset.
    TableOffset(u64),
    /// Clusters of the header: more than 4 GiB.
    HeaderSize(u32),
    /// The backing file's name does not lie in the header: its offset.
    BackingOffset(u32),
    /// The backing file's name is longer than 4095 bytes: its length.
    BackingNameTooLong(u32),
    /// Not closed cleanly, and with faults that can't be repaired.
    Damaged,
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
            Self::NotQed => f.write_str("not a QED image"),
            Self::UnknownFeatures(bits) => write!(f, "unknown features {bits:#x}"),
            Self::ClusterSize(size) => write!(f, "unsupported cluster size {size}"),
            Self::TableSize(size) => write!(f, "unsupported table size {size}"),
            Self::ImageSize(size) => write!(f, "unsupported disk size {size}"),
            Self::TableOffset(at) => write!(f, "L1 table outside the file, at {at}"),
            Self::HeaderSize(size) => write!(f, "header of {size} clusters"),
            Self::BackingOffset(at) => write!(f, "backing file name outside the header, at {at}"),
            Self::BackingNameTooLong(len) => write!(f, "backing file name of {len} bytes"),
            Self::Damaged => f.write_str("damaged image"),
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
