use core::fmt;

use instar_blockio as blockio;

use super::OptionError;

/// Why an image can't be opened or made. Each cause carries the offending value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed.
    Io(blockio::Error),
    /// The magic number or the version is another.
    NotParallels,
    /// Clusters without sectors.
    NoSectors,
    /// Sectors of a cluster: too many.
    ClusterTooBig(u32),
    /// Sectors of the disk: more bytes than fit 63 bits.
    SizeTooLarge(u64),
    /// Entries of the table: too many.
    TableTooLarge(u32),
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
            Self::NotParallels => f.write_str("not a Parallels image"),
            Self::NoSectors => f.write_str("clusters without sectors"),
            Self::ClusterTooBig(sectors) => write!(f, "clusters of {sectors} sectors"),
            Self::SizeTooLarge(sectors) => write!(f, "disk of {sectors} sectors"),
            Self::TableTooLarge(entries) => write!(f, "table of {entries} entries"),
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
