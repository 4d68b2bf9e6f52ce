use core::fmt;

/// Why a unit can't be decoded or encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The stream is damaged, or wants a dictionary or a window that units do not have.
    Damaged,
    /// The stream ends before the unit is full: bytes decoded.
    TooShort(usize),
    /// The stream goes on behind the end of the unit.
    TooLong,
    /// This codec is not handled.
    Unsupported,
    /// Working memory could not be had.
    OutOfMemory,
}

/// Result of decoding or encoding.
pub type Result<T> = core::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged => f.write_str("damaged compressed stream"),
            Self::TooShort(len) => write!(f, "compressed stream ends after {len} bytes"),
            Self::TooLong => f.write_str("compressed stream does not end with its unit"),
            Self::Unsupported => f.write_str("unsupported codec"),
            Self::OutOfMemory => f.write_str("out of memory"),
        }
    }
}

impl core::error::Error for Error {}
