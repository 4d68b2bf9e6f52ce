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
    NotQcow,
    /// Not version 1.
    UnsupportedVersion(u32),
    /// A disk of less than two bytes.
    SizeTooSmall(u64),
    /// log2 of a cluster size outside 9 to 16.
    ClusterBits(u8),
    /// log2 of a number of L2 entries outside 6 to 13.
    L2Bits(u8),
    /// Neither unencrypted nor AES.
    EncryptionMethod(u32),
    /// The disk needs more L1 entries than are accepted: its size in bytes.
    ImageTooLarge(u64),
    /// The backing file name has more than 1023 bytes: its length.
    BackingNameTooLong(u32),
    /// The image is encrypted and can't be written here.
    Encrypted,
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
            Self::NotQcow => f.write_str("not a qcow image"),
            Self::UnsupportedVersion(version) => write!(f, "unsupported version {version}"),
            Self::SizeTooSmall(size) => write!(f, "disk of {size} bytes"),
            Self::ClusterBits(bits) => write!(f, "unsupported cluster size 2^{bits}"),
            Self::L2Bits(bits) => write!(f, "unsupported number of L2 entries 2^{bits}"),
            Self::EncryptionMethod(method) => write!(f, "unknown encryption method {method}"),
            Self::ImageTooLarge(size) => write!(f, "disk of {size} bytes is too large"),
            Self::BackingNameTooLong(len) => write!(f, "backing file name of {len} bytes"),
            Self::Encrypted => f.write_str("encrypted image"),
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
