use core::fmt;

/// Why bytes are not a header that can be described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Fewer than 592 bytes: how many.
    TooShort(usize),
    /// The magic number is missing.
    NotLuks,
    /// Another version than 1.
    UnsupportedVersion(u16),
    /// A text field is not ended by a zero byte.
    UnterminatedText,
    /// A key slot is neither active nor inactive: its number and the value.
    SlotState(usize, u32),
}

/// Result of parsing.
pub type Result<T> = core::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort(len) => write!(f, "LUKS header of only {len} bytes"),
            Self::NotLuks => f.write_str("not a LUKS volume"),
            Self::UnsupportedVersion(version) => write!(f, "unsupported LUKS version {version}"),
            Self::UnterminatedText => f.write_str("text field without end"),
            Self::SlotState(slot, state) => write!(f, "key slot {slot} in unknown state {state:#x}"),
        }
    }
}

impl core::error::Error for Error {}
