//! The footer, 512 bytes at the end of the file and, unless the disk is fixed, a copy of it at the beginning: chapter
//! "Hard Disk Footer Format" of the specification.

use crate::geometry::Geometry;

/// Bytes of a footer.
pub const FOOTER: usize = 512;
/// The mark at its beginning.
pub(crate) const MARK: &[u8; 8] = b"conectix";

/// How a disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskType {
    /// In one piece.
    Fixed,
    /// In blocks that are allocated when they are written.
    Dynamic,
    /// As dynamic; what was not written since its creation lies with the parent.
    Differencing,
}

impl DiskType {
    fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }

    /// From the number that is stored.
    pub(crate) fn of_number(number: u32) -> Option<Self> {
        [Self::Fixed, Self::Dynamic, Self::Differencing].into_iter().find(|kind| kind.number() == number)
    }
}

/// What a footer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Offset of the dynamic header in bytes; all ones for a fixed disk.
    pub data_offset: u64,
    /// When the disk was made, in seconds since the year 2000.
    pub timestamp: u32,
    /// The program that made it.
    pub creator: [u8; 4],
    /// Bytes of the disk when it was made.
    pub original_size: u64,
    /// Bytes of the disk.
    pub current_size: u64,
    /// Geometry of the disk.
    pub geometry: Geometry,
    /// Number of the disk type, which may be none.
    pub disk_type: u32,
    /// Identity of the disk.
    pub uuid: [u8; 16],
}

/// `N` bytes at a place inside of a structure of fixed size.
pub(crate) fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    core::array::from_fn(|index| bytes.get(at + index).copied().unwrap_or_default())
}

/// One's complement of the sum of all bytes outside of the field of the checksum.
pub(crate) fn checksum(bytes: &[u8], field: usize) -> u32 {
    let outside = bytes.iter().enumerate().filter(|(at, _)| !(field..field + 4).contains(at));
    !outside.fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

const CHECKSUM_AT: usize = 64;

/// Whether the bytes begin as a footer does.
pub(crate) fn has_mark(bytes: &[u8; FOOTER]) -> bool {
    bytes.starts_with(MARK)
}

/// Whether the bytes are a whole footer.
pub(crate) fn is_good(bytes: &[u8; FOOTER]) -> bool {
    has_mark(bytes) && u32::from_be_bytes(bytes_at(bytes, CHECKSUM_AT)) == checksum(bytes, CHECKSUM_AT)
}

impl Footer {
    /// Reads the fields; mark and checksum are not looked at.
    pub(crate) fn parse(bytes: &[u8; FOOTER]) -> Self {
        Self {
            data_offset: u64::from_be_bytes(bytes_at(bytes, 16)),
            timestamp: u32::from_be_bytes(bytes_at(bytes, 24)),
            creator: bytes_at(bytes, 28),
            original_size: u64::from_be_bytes(bytes_at(bytes, 40)),
            current_size: u64::from_be_bytes(bytes_at(bytes, 48)),
            geometry: Geometry {
                cylinders: u16::from_be_bytes(bytes_at(bytes, 56)),
                heads: bytes[58],
                sectors: bytes[59],
            },
            disk_type: u32::from_be_bytes(bytes_at(bytes, 60)),
            uuid: bytes_at(bytes, 68),
        }
    }

    /// The bytes of a new disk's footer, as QEMU fills them in.
    pub(crate) fn encode(&self) -> [u8; FOOTER] {
        let mut bytes = [0; FOOTER];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, MARK);
        put(8, &2u32.to_be_bytes()); // always set
        put(12, &0x1_0000u32.to_be_bytes());
        put(16, &self.data_offset.to_be_bytes());
        put(24, &self.timestamp.to_be_bytes());
        put(28, &self.creator);
        put(32, &0x5_0003u32.to_be_bytes());
        put(36, b"Wi2k");
        put(40, &self.original_size.to_be_bytes());
        put(48, &self.current_size.to_be_bytes());
        put(56, &self.geometry.cylinders.to_be_bytes());
        put(58, &[self.geometry.heads, self.geometry.sectors]);
        put(60, &self.disk_type.to_be_bytes());
        put(68, &self.uuid);
        let sum = checksum(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }
}

impl From<DiskType> for u32 {
    fn from(kind: DiskType) -> Self {
        kind.number()
    }
}
