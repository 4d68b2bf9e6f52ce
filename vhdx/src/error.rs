use core::fmt;

use instar_blockio::{self as blockio, ErrorKind};

use crate::guid::Guid;

/// Result of what this crate does.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// Why an image can't be opened, read or made. Each cause carries the offending value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file below failed.
    Io(blockio::Error),
    /// The file doesn't begin with the signature.
    NotVhdx,
    /// Neither header is valid, or both are, equally new and different.
    NoHeader,
    /// Neither region table has its signature and checksum.
    NoRegionTable,
    /// A region table with more than 2047 entries: how many.
    TooManyRegions(u32),
    /// A region that must be understood and is not known.
    UnknownRegion(Guid),
    /// Two regions of one kind.
    DuplicateRegion(Guid),
    /// There is no BAT or no metadata region.
    MissingRegion(Region),
    /// A region, or the log, is empty, not aligned to 1 MiB, or reaches behind 2^63: where it begins.
    RegionPlace(Region, u64),
    /// Two of header section, log, BAT and metadata overlap.
    RegionsOverlap(Region, Region),
    /// The metadata table has no signature.
    NoMetadata,
    /// A metadata table with more than 2047 entries: how many.
    TooManyItems(u16),
    /// An item that must be understood and is not known.
    UnknownItem(Guid),
    /// An item that every disk has is missing.
    MissingItem(Item),
    /// Two items of one kind.
    DuplicateItem(Item),
    /// An item lies outside the metadata region or has an impossible length: bytes.
    ItemPlace(Item, u32),
    /// Block size other than a power of two from 1 to 256 MiB: bytes.
    BlockSize(u32),
    /// Logical sectors of neither 512 nor 4096 bytes.
    SectorSize(u32),
    /// The disk has more than 64 TiB or does not consist of whole sectors: bytes.
    VirtualSize(u64),
    /// The BAT region has too few entries: how many it has.
    BatTooSmall(u64),
    /// The parent locator is not one of VHDX: its kind.
    LocatorKind(Guid),
    /// The parent locator contradicts itself: the number of the entry.
    Locator(u16),
    /// The log can't be replayed.
    Log(LogFault),
    /// A BAT entry that can't be.
    Entry {
        /// BAT index.
        index: u64,
        /// The entry.
        entry: u64,
        /// What can't be.
        fault: EntryFault,
    },
    /// Differencing images can't be written.
    DifferencingWrite,
    /// The log has changes that were not replayed, so the file must not be written.
    DirtyLog,
    /// Options of a new image can't be met.
    Options(OptionError),
    /// Memory for a bounded table could not be had.
    OutOfMemory,
}

/// An area of the file with a place of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// The first MiB.
    HeaderSection,
    /// Log.
    Log,
    /// Block allocation table.
    Bat,
    /// Metadata.
    Metadata,
}

/// A metadata item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Item {
    /// Block size and kind of the image.
    FileParameters,
    /// Bytes of the disk.
    VirtualDiskSize,
    /// Identity of the disk.
    VirtualDiskId,
    /// Bytes of a logical sector.
    LogicalSectorSize,
    /// Bytes of a physical sector.
    PhysicalSectorSize,
    /// Names of the parent.
    ParentLocator,
}

/// Why a log can't be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LogFault {
    /// Log version other than 0.
    Version(u16),
    /// The log's entries claim one another's space, so that checking them would take too long.
    Work,
    /// More changes than are kept in memory.
    TooManyChanges,
    /// A descriptor is broken: place of its entry in the log.
    Descriptor(u64),
    /// A data sector is missing or broken: place of its entry in the log.
    DataSector(u64),
    /// A descriptor changes the headers or the log: at this offset.
    Target(u64),
    /// The file has lost bytes that it had when the entry was written: how long it was.
    Truncated(u64),
    /// The file would become larger than 128 TiB: bytes.
    FileLength(u64),
    /// A payload block is changed through the log, which no writer does: at this offset.
    Payload(u64),
}

/// What is wrong with a BAT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EntryFault {
    /// A reserved state, or one that only a differencing image has.
    State,
    /// The block begins behind the end of the file, which has so many bytes.
    StartPastEnd(u64),
    /// The block ends behind the end of the file, which has so many bytes.
    EndPastEnd(u64),
    /// The block's end can't be counted.
    Overflow,
    /// The block overlaps a region.
    Overlap(Region),
    /// A partially present block has no sector bitmap.
    NoBitmap,
}

/// What is wrong with the options of a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OptionError {
    /// More than 64 TiB: bytes.
    SizeTooLarge(u64),
    /// Block size that is no power of two: bytes.
    BlockSize(u64),
    /// No log at all.
    LogSizeZero,
    /// A log of 4 GiB or more: bytes.
    LogSizeTooLarge(u64),
}

impl From<blockio::Error> for Error {
    fn from(error: blockio::Error) -> Self {
        match error.kind() {
            ErrorKind::OutOfMemory => Self::OutOfMemory,
            _ => Self::Io(error),
        }
    }
}

impl From<OptionError> for Error {
    fn from(error: OptionError) -> Self {
        Self::Options(error)
    }
}

impl From<LogFault> for Error {
    fn from(fault: LogFault) -> Self {
        Self::Log(fault)
    }
}

impl From<Error> for blockio::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) => error,
            Error::OutOfMemory => ErrorKind::OutOfMemory.into(),
            Error::UnknownRegion(_)
            | Error::UnknownItem(_)
            | Error::LocatorKind(_)
            | Error::Log(LogFault::Payload(_) | LogFault::TooManyChanges)
            | Error::DifferencingWrite => ErrorKind::Unsupported.into(),
            Error::Options(_) => ErrorKind::InvalidInput.into(),
            Error::Entry { entry, .. } => Self::new(ErrorKind::Corrupt).at(entry & crate::format::BAT_PLACE_MASK),
            _ => ErrorKind::Corrupt.into(),
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HeaderSection => "header section",
            Self::Log => "log",
            Self::Bat => "BAT",
            Self::Metadata => "metadata region",
        })
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FileParameters => "file parameters",
            Self::VirtualDiskSize => "virtual disk size",
            Self::VirtualDiskId => "virtual disk id",
            Self::LogicalSectorSize => "logical sector size",
            Self::PhysicalSectorSize => "physical sector size",
            Self::ParentLocator => "parent locator",
        })
    }
}

impl fmt::Display for LogFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Version(version) => write!(f, "log version {version}"),
            Self::Work => f.write_str("log entries claim one another's space"),
            Self::TooManyChanges => f.write_str("log with too many changes"),
            Self::Descriptor(at) => write!(f, "broken descriptor in the log entry at {at}"),
            Self::DataSector(at) => write!(f, "broken data sector in the log entry at {at}"),
            Self::Target(at) => write!(f, "log changes headers or log at offset {at}"),
            Self::Truncated(len) => write!(f, "file had {len} bytes when the log was written, and has less"),
            Self::FileLength(len) => write!(f, "log makes the file {len} bytes long"),
            Self::Payload(at) => write!(f, "log changes a payload block at offset {at}"),
        }
    }
}

impl fmt::Display for EntryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State => f.write_str("has an invalid state"),
            Self::StartPastEnd(len) => write!(f, "begins behind the end of the file ({len})"),
            Self::EndPastEnd(len) => write!(f, "ends behind the end of the file ({len})"),
            Self::Overflow => f.write_str("has an end that can't be counted"),
            Self::Overlap(region) => write!(f, "overlaps the {region}"),
            Self::NoBitmap => f.write_str("has no sector bitmap"),
        }
    }
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SizeTooLarge(size) => write!(f, "disk of {size} bytes exceeds 64 TiB"),
            Self::BlockSize(size) => write!(f, "block size {size} is no power of two"),
            Self::LogSizeZero => f.write_str("no room for a log"),
            Self::LogSizeTooLarge(size) => write!(f, "log of {size} bytes exceeds 4 GiB"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            // The source tells.
            Self::Io(_) => f.write_str("the file below failed"),
            Self::NotVhdx => f.write_str("not a VHDX file"),
            Self::NoHeader => f.write_str("no valid header"),
            Self::NoRegionTable => f.write_str("no valid region table"),
            Self::TooManyRegions(count) => write!(f, "{count} regions"),
            Self::UnknownRegion(guid) => write!(f, "unknown region {guid}"),
            Self::DuplicateRegion(guid) => write!(f, "two regions {guid}"),
            Self::MissingRegion(region) => write!(f, "no {region}"),
            Self::RegionPlace(region, at) => write!(f, "{region} with an impossible place ({at})"),
            Self::RegionsOverlap(a, b) => write!(f, "{a} and {b} overlap"),
            Self::NoMetadata => f.write_str("no metadata table"),
            Self::TooManyItems(count) => write!(f, "{count} metadata items"),
            Self::UnknownItem(guid) => write!(f, "unknown metadata item {guid}"),
            Self::MissingItem(item) => write!(f, "no item '{item}'"),
            Self::DuplicateItem(item) => write!(f, "two items '{item}'"),
            Self::ItemPlace(item, len) => write!(f, "item '{item}' with an impossible place or length ({len})"),
            Self::BlockSize(size) => write!(f, "block size {size}"),
            Self::SectorSize(size) => write!(f, "sector size {size}"),
            Self::VirtualSize(size) => write!(f, "virtual size {size}"),
            Self::BatTooSmall(count) => write!(f, "BAT of only {count} entries"),
            Self::LocatorKind(guid) => write!(f, "parent locator of unknown kind {guid}"),
            Self::Locator(entry) => write!(f, "broken parent locator (entry {entry})"),
            Self::Log(fault) => fault.fmt(f),
            Self::Entry { index, entry, fault } => write!(f, "block of BAT entry {index} ({entry:#x}) {fault}"),
            Self::DifferencingWrite => f.write_str("differencing images can't be written"),
            Self::DirtyLog => f.write_str("log must be replayed first"),
            Self::Options(error) => error.fmt(f),
            Self::OutOfMemory => f.write_str("out of memory"),
        }
    }
}

impl core::error::Error for OptionError {}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            _ => None,
        }
    }
}
