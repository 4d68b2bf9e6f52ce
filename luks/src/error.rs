use core::fmt;

use instar_blockio as blockio;

/// Why a volume can't be described, opened or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The device failed.
    Io(blockio::Error),
    /// The header is cut short: bytes that are there.
    TooShort(usize),
    /// The magic number is missing.
    NotLuks,
    /// Neither version 1 nor 2.
    UnsupportedVersion(u16),
    /// A text field is not ended by a zero byte.
    UnterminatedText(TextField),
    /// The cipher mode is not of the form `MODE-IVGEN`.
    CipherMode,
    /// Cipher, mode, hash or generator of initialisation vectors that is not known.
    UnknownName(TextField),
    /// The cipher has no keys of so many bytes.
    KeySize(u32),
    /// Keys of so many bytes are not accepted.
    KeyTooLong(u32),
    /// The mode needs a cipher with blocks of 16 bytes.
    ModeNeedsWideBlocks,
    /// ESSIV by a hash of so many bytes is not possible with the cipher.
    EssivKeySize(usize),
    /// The encrypted contents begin inside the header: at which sector.
    PayloadInHeader(u32),
    /// PBKDF2 without iterations, of the master key's digest.
    NoIterations,
    /// PBKDF2 without iterations, of this key slot.
    SlotNoIterations(usize),
    /// A key slot is neither active nor inactive: its number and the value.
    SlotState(usize, u32),
    /// A key slot has not 4000 stripes: its number and how many.
    SlotStripes(usize, u32),
    /// The key material of a slot begins inside the header.
    SlotInHeader(usize),
    /// The key material of a slot reaches into the encrypted contents.
    SlotInPayload(usize),
    /// The key material of two slots overlaps.
    SlotsOverlap(usize, usize),
    /// The passphrase opens no key slot.
    WrongPassphrase,
    /// The key derivation costs more than [`Limits::iterations`](crate::Limits::iterations): what it costs.
    TooManyIterations(u64),
    /// The key derivation needs more memory than [`Limits::memory`](crate::Limits::memory): bytes.
    TooMuchMemory(u64),
    /// Parameters that the key derivation does not take.
    KeyDerivation,
    /// No checksum of a version 2 header is right.
    Checksum,
    /// The metadata of a version 2 header can't be understood.
    Metadata,
    /// No encrypted segment, or more than one.
    Segments(usize),
    /// A valid feature of version 2 that is not supported, such as authenticated encryption.
    Unsupported,
    /// No such key slot: its number.
    NoSuchSlot(usize),
    /// The key slot is in use.
    SlotInUse(usize),
    /// The key slot is not in use.
    SlotUnused(usize),
    /// All key slots are in use.
    NoFreeSlot,
    /// Erasing the only active key slot, which makes the contents unreadable for ever.
    LastSlot(usize),
    /// Memory can't be had.
    OutOfMemory,
}

/// A text of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextField {
    /// Cipher.
    Cipher,
    /// Block mode and generator of initialisation vectors.
    Mode,
    /// Generator of initialisation vectors.
    IvGen,
    /// Hash of ESSIV.
    IvHash,
    /// Hash of the key derivation.
    Hash,
    /// UUID.
    Uuid,
}

/// Result of working with a volume.
pub type Result<T> = core::result::Result<T, Error>;

impl From<blockio::Error> for Error {
    fn from(error: blockio::Error) -> Self {
        Self::Io(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(_) => f.write_str("the volume can't be read or written"),
            Self::TooShort(len) => write!(f, "LUKS header of only {len} bytes"),
            Self::NotLuks => f.write_str("not a LUKS volume"),
            Self::UnsupportedVersion(version) => write!(f, "unsupported LUKS version {version}"),
            Self::UnterminatedText(field) => write!(f, "{field} without end"),
            Self::CipherMode => f.write_str("cipher mode without initialisation vectors"),
            Self::UnknownName(field) => write!(f, "unknown {field}"),
            Self::KeySize(len) => write!(f, "the cipher has no keys of {len} bytes"),
            Self::KeyTooLong(len) => write!(f, "key of {len} bytes"),
            Self::ModeNeedsWideBlocks => f.write_str("the mode needs a cipher with blocks of 16 bytes"),
            Self::EssivKeySize(len) => write!(f, "the cipher has no keys of {len} bytes for ESSIV"),
            Self::PayloadInHeader(sector) => write!(f, "contents at sector {sector}, inside the header"),
            Self::NoIterations => f.write_str("key derivation without iterations"),
            Self::SlotNoIterations(slot) => write!(f, "key slot {slot} without iterations"),
            Self::SlotState(slot, state) => write!(f, "key slot {slot} in unknown state {state:#x}"),
            Self::SlotStripes(slot, stripes) => write!(f, "key slot {slot} with {stripes} stripes"),
            Self::SlotInHeader(slot) => write!(f, "key slot {slot} lies in the header"),
            Self::SlotInPayload(slot) => write!(f, "key slot {slot} reaches into the contents"),
            Self::SlotsOverlap(a, b) => write!(f, "key slots {a} and {b} overlap"),
            Self::WrongPassphrase => f.write_str("the passphrase opens no key slot"),
            Self::TooManyIterations(cost) => write!(f, "key derivation of {cost} iterations"),
            Self::TooMuchMemory(bytes) => write!(f, "key derivation in {bytes} bytes of memory"),
            Self::KeyDerivation => f.write_str("impossible parameters of the key derivation"),
            Self::Checksum => f.write_str("damaged header"),
            Self::Metadata => f.write_str("metadata that can't be understood"),
            Self::Segments(count) => write!(f, "{count} encrypted segments"),
            Self::Unsupported => f.write_str("unsupported feature"),
            Self::NoSuchSlot(slot) => write!(f, "there is no key slot {slot}"),
            Self::SlotInUse(slot) => write!(f, "key slot {slot} is in use"),
            Self::SlotUnused(slot) => write!(f, "key slot {slot} is not in use"),
            Self::NoFreeSlot => f.write_str("all key slots are in use"),
            Self::LastSlot(slot) => write!(f, "key slot {slot} is the last one"),
            Self::OutOfMemory => f.write_str("out of memory"),
        }
    }
}

impl fmt::Display for TextField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cipher => "cipher",
            Self::Mode => "cipher mode",
            Self::IvGen => "generator of initialisation vectors",
            Self::IvHash => "hash of initialisation vectors",
            Self::Hash => "hash",
            Self::Uuid => "UUID",
        })
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
