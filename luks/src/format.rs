//! On-disk structures (specification, figure 1 and 2).

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first six bytes of a volume.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Bytes of the header.
pub const HEADER_LEN: usize = 592;
/// Key slots of a volume.
pub const SLOT_COUNT: usize = 8;

/// [`RawSlot::active`] of a slot in use.
pub(crate) const SLOT_ACTIVE: u32 = 0x00ac_71f3;
/// [`RawSlot::active`] of an unused slot.
pub(crate) const SLOT_INACTIVE: u32 = 0x0000_dead;
/// Bytes of the sectors in which places are counted.
pub(crate) const SECTOR: u64 = 512;

/// Where the key material of the first slot may begin, bytes.
pub(crate) const SLOTS_AT: u64 = 4096;
/// Key material takes a multiple of so many bytes.
pub(crate) const SLOT_ALIGN: u64 = 4096;
/// Anti-forensic stripes of each slot.
pub(crate) const STRIPES: u32 = 4000;

/// The first six bytes of the second header of a version 2 volume.
pub(crate) const SECOND_MAGIC: [u8; 6] = *b"SKUL\xba\xbe";

/// The binary header of version 2 as it lies on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader2 {
    pub magic: [u8; 6],
    pub version: U16,
    /// Bytes of this header and the text behind it.
    pub header_len: U64,
    /// The header with the higher one is newer.
    pub sequence: U64,
    pub label: [u8; 48],
    pub checksum_algorithm: [u8; 32],
    pub salt: [u8; 64],
    pub uuid: [u8; 40],
    pub subsystem: [u8; 48],
    /// Where this header lies, bytes.
    pub offset: U64,
    pub reserved: [u8; 184],
    pub checksum: [u8; 64],
}

const _: () = assert!(size_of::<RawHeader2>() == 512);

/// The header as it lies on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub magic: [u8; 6],
    pub version: U16,
    pub cipher_name: [u8; 32],
    pub cipher_mode: [u8; 32],
    pub hash_spec: [u8; 32],
    /// Sectors.
    pub payload_offset: U32,
    pub key_bytes: U32,
    pub digest: [u8; 20],
    pub digest_salt: [u8; 32],
    pub digest_iterations: U32,
    pub uuid: [u8; 40],
    pub slots: [RawSlot; SLOT_COUNT],
}

/// A key slot as it lies on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawSlot {
    pub active: U32,
    pub iterations: U32,
    pub salt: [u8; 32],
    /// Sectors.
    pub key_offset: U32,
    pub stripes: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);
