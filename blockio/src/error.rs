use core::fmt;

/// Result of a block operation.
pub type Result<T> = core::result::Result<T, Error>;

/// What went wrong, for matching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The range does not lie inside the device.
    OutOfBounds,
    /// The device failed; [`Error::os`] may say how.
    Io,
    /// No space is left for the data.
    NoSpace,
    /// The device can't be written.
    ReadOnly,
    /// Metadata contradicts itself or the file, or compressed data can't be decoded.
    Corrupt,
    /// A valid request or image that this implementation does not handle.
    Unsupported,
    /// The data is encrypted and no key was given.
    Encrypted,
    /// The caller's argument breaks the contract (alignment, granularity, order of calls).
    InvalidInput,
    /// Memory for a bounded table could not be had.
    OutOfMemory,
    /// The policy of the opener refused a file.
    Refused,
}

/// A block error: a kind to match on, and the facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    offset: Option<u64>,
    os: Option<i32>,
}

impl Error {
    /// An error of this kind, without further facts.
    pub const fn new(kind: ErrorKind) -> Self {
        Self { kind, offset: None, os: None }
    }

    /// An I/O error with the operating system's error number (`errno`).
    pub const fn from_os(os: i32) -> Self {
        let kind = match os {
            28 | 122 => ErrorKind::NoSpace, // ENOSPC, EDQUOT
            30 => ErrorKind::ReadOnly,      // EROFS
            12 => ErrorKind::OutOfMemory,   // ENOMEM
            _ => ErrorKind::Io,
        };
        Self { kind, offset: None, os: Some(os) }
    }

    /// The same error, located at a byte offset of the device.
    pub const fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    /// What went wrong.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Byte offset on the device concerned, where known.
    pub const fn offset(&self) -> Option<u64> {
        self.offset
    }

    /// The operating system's error number, where there is one.
    pub const fn os(&self) -> Option<i32> {
        self.os
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self::new(kind)
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfBounds => "range outside the device",
            Self::Io => "input/output error",
            Self::NoSpace => "no space left",
            Self::ReadOnly => "device is read-only",
            Self::Corrupt => "corrupt data",
            Self::Unsupported => "unsupported feature",
            Self::Encrypted => "encrypted data without a key",
            Self::InvalidInput => "invalid argument",
            Self::OutOfMemory => "out of memory",
            Self::Refused => "refused by policy",
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(offset) = self.offset {
            write!(f, " at offset {offset}")?;
        }
        if let Some(os) = self.os {
            write!(f, " (os error {os})")?;
        }
        Ok(())
    }
}

impl core::error::Error for Error {}
