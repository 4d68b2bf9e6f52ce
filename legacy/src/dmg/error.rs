use core::fmt;

use instar_blockio as blockio;

/// Why an image can't be opened. Each cause carries the offending value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed.
    Io(blockio::Error),
    /// Fewer than 512 bytes.
    TooShort(u64),
    /// No trailer at the end of the file.
    NoTrailer,
    /// The data fork lies behind the trailer: its offset.
    DataFork(u64),
    /// The resource fork does not lie before the trailer: its offset.
    ResourceFork(u64),
    /// The property list does not lie before the trailer: its offset.
    Plist(u64),
    /// The disk has more bytes than fit 63 bits: its sectors.
    Sectors(u64),
    /// Neither resource fork nor property list.
    NoTables,
    /// The resource fork contradicts itself, at this offset of the file.
    Resource(u64),
    /// More bytes of property list than are accepted.
    PlistTooLong(u64),
    /// The property list has a `<data>` without an end.
    PlistData,
    /// A chunk has more sectors than are accepted.
    ChunkSectors {
        /// Its number.
        chunk: u32,
        /// Its sectors.
        count: u64,
    },
    /// A chunk takes more bytes than are accepted.
    ChunkLength {
        /// Its number.
        chunk: u32,
        /// Its bytes.
        len: u64,
    },
    /// More chunks than are accepted.
    TooManyChunks,
}

impl From<blockio::Error> for Error {
    fn from(error: blockio::Error) -> Self {
        Self::Io(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(_) => f.write_str("file can't be accessed"),
            Self::TooShort(len) => write!(f, "file of {len} bytes is too short"),
            Self::NoTrailer => f.write_str("no trailer"),
            Self::DataFork(at) => write!(f, "data fork behind the trailer, at {at}"),
            Self::ResourceFork(at) => write!(f, "resource fork outside the file, at {at}"),
            Self::Plist(at) => write!(f, "property list outside the file, at {at}"),
            Self::Sectors(count) => write!(f, "disk of {count} sectors"),
            Self::NoTables => f.write_str("neither resource fork nor property list"),
            Self::Resource(at) => write!(f, "damaged resource fork, at {at}"),
            Self::PlistTooLong(len) => write!(f, "property list of {len} bytes"),
            Self::PlistData => f.write_str("property list with a data element that has no end"),
            Self::ChunkSectors { chunk, count } => write!(f, "chunk {chunk} of {count} sectors"),
            Self::ChunkLength { chunk, len } => write!(f, "chunk {chunk} of {len} stored bytes"),
            Self::TooManyChunks => f.write_str("too many chunks"),
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
