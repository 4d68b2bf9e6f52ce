//! On-disk structures of \[MS-VHDX\], byte for byte. Everything is little-endian.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

// 2.2 Header section: what lies in the first MiB of a file.

/// "vhdxfile", the first bytes of a file.
pub(crate) const FILE_SIGNATURE: [u8; 8] = *b"vhdxfile";
/// Where the creator's name lies (UTF-16), behind the signature.
pub(crate) const CREATOR_AT: u64 = 8;
/// UTF-16 units of the creator's name.
pub(crate) const CREATOR_UNITS: usize = 256;
pub(crate) const HEADER_AT: [u64; 2] = [64 * KIB, 128 * KIB];
pub(crate) const REGION_TABLE_AT: [u64; 2] = [192 * KIB, 256 * KIB];
/// Bytes of a header under its checksum.
pub(crate) const HEADER_LEN: usize = 4 << 10;
pub(crate) const REGION_TABLE_LEN: usize = 64 << 10;
/// Everything else begins behind the header section.
pub(crate) const HEADER_SECTION: u64 = MIB;
/// Entries of a region table or of the metadata table, at most.
pub(crate) const MAX_TABLE_ENTRIES: u32 = 2047;

pub(crate) const HEADER_SIGNATURE: [u8; 4] = *b"head";
pub(crate) const REGION_SIGNATURE: [u8; 4] = *b"regi";

/// A 16-byte identifier as it is stored (the first three fields little-endian).
pub(crate) type RawGuid = [u8; 16];

/// 2.2.2 Header: the fields in front; the rest of the 4 KiB is reserved.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub sequence: U64,
    pub file_write_guid: RawGuid,
    pub data_write_guid: RawGuid,
    pub log_guid: RawGuid,
    pub log_version: U16,
    pub version: U16,
    pub log_len: U32,
    pub log_at: U64,
}

/// 2.2.3.1 Region table header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawRegionTable {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub entry_count: U32,
    pub reserved: U32,
}

/// 2.2.3.2 Region table entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawRegion {
    pub guid: RawGuid,
    pub at: U64,
    pub len: U32,
    pub flags: U32,
}

/// The region must be understood by who opens the file.
pub(crate) const REGION_REQUIRED: u32 = 1;

/// {2DC27766-F623-4200-9D64-115E9BFD4A08}
pub(crate) const BAT_REGION: RawGuid =
    [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08];
/// {8B7CA206-4790-4B9A-B8FE-575F050F886E}
pub(crate) const METADATA_REGION: RawGuid =
    [0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e];

// 2.3 Log.

/// Unit of everything in the log.
pub(crate) const LOG_SECTOR: u64 = 4 * KIB;
pub(crate) const ENTRY_SIGNATURE: [u8; 4] = *b"loge";
pub(crate) const ZERO_SIGNATURE: [u8; 4] = *b"zero";
pub(crate) const DATA_DESCRIPTOR_SIGNATURE: [u8; 4] = *b"desc";
pub(crate) const DATA_SECTOR_SIGNATURE: [u8; 4] = *b"data";

/// 2.3.1.1 Log entry header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawEntry {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub len: U32,
    pub tail: U32,
    pub sequence: U64,
    pub descriptor_count: U32,
    pub reserved: U32,
    pub log_guid: RawGuid,
    pub flushed_file_offset: U64,
    pub last_file_offset: U64,
}

/// 2.3.1.2 and 2.3.1.3: zero and data descriptors. The second field is reserved or the trailing bytes, the third the
/// length or the leading bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawDescriptor {
    pub signature: [u8; 4],
    pub trailing: [u8; 4],
    pub len_or_leading: [u8; 8],
    pub file_offset: U64,
    pub sequence: U64,
}

/// Bytes of a data sector in front of the data: signature and upper half of the sequence number.
pub(crate) const DATA_SECTOR_HEAD: usize = 8;
/// Bytes behind the data: lower half of the sequence number.
pub(crate) const DATA_SECTOR_TAIL: usize = 4;

// 2.5 BAT.

/// Bytes of an entry.
pub(crate) const BAT_ENTRY: u64 = 8;
/// Bits 0 to 2 of an entry.
pub(crate) const BAT_STATE_MASK: u64 = 7;
/// Bits 20 to 63 of an entry: the place in MiB, so as bytes without a shift.
pub(crate) const BAT_PLACE_MASK: u64 = !(MIB - 1);
/// Bytes of a sector bitmap block; with 512-byte sectors it describes 4 GiB.
pub(crate) const BITMAP_BLOCK: u64 = MIB;

// 2.6 Metadata.

pub(crate) const METADATA_SIGNATURE: [u8; 8] = *b"metadata";
pub(crate) const METADATA_TABLE_LEN: u64 = 64 * KIB;
/// Bytes of an item that is not the user's.
pub(crate) const MAX_ITEM_LEN: u32 = 1 << 20;

/// 2.6.1.1 Metadata table header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawMetadataTable {
    pub signature: [u8; 8],
    pub reserved: U16,
    pub entry_count: U16,
    pub reserved2: [u8; 20],
}

/// 2.6.1.2 Metadata table entry. The place counts from the region's start.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawItem {
    pub guid: RawGuid,
    pub at: U32,
    pub len: U32,
    pub flags: U32,
    pub reserved: U32,
}

pub(crate) const ITEM_IS_USER: u32 = 1;
pub(crate) const ITEM_IS_VIRTUAL_DISK: u32 = 2;
pub(crate) const ITEM_IS_REQUIRED: u32 = 4;

/// {CAA16737-FA36-4D43-B3B6-33F0AA44E76B}
pub(crate) const FILE_PARAMETERS: RawGuid =
    [0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b];
/// {2FA54224-CD1B-4876-B211-5DBED83BF4B8}
pub(crate) const VIRTUAL_DISK_SIZE: RawGuid =
    [0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8];
/// {BECA12AB-B2E6-4523-93EF-C309E000C746}, "page 83 data"
pub(crate) const VIRTUAL_DISK_ID: RawGuid =
    [0xab, 0x12, 0xca, 0xbe, 0xe6, 0xb2, 0x23, 0x45, 0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46];
/// {8141BF1D-A96F-4709-BA47-F233A8FAAB5F}
pub(crate) const LOGICAL_SECTOR_SIZE: RawGuid =
    [0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 0x09, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f];
/// {CDA348C7-445D-4471-9CC9-E9885251C556}
pub(crate) const PHYSICAL_SECTOR_SIZE: RawGuid =
    [0xc7, 0x48, 0xa3, 0xcd, 0x5d, 0x44, 0x71, 0x44, 0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56];
/// {A8D35F2D-B30B-454D-ABF7-D3D84834AB0C}
pub(crate) const PARENT_LOCATOR: RawGuid =
    [0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c];

/// 2.6.2.1 File parameters.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawParameters {
    pub block_size: U32,
    pub flags: U32,
}

/// Blocks stay allocated: the disk is fixed.
pub(crate) const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
pub(crate) const HAS_PARENT: u32 = 2;

pub(crate) const MIN_BLOCK_SIZE: u64 = MIB;
pub(crate) const MAX_BLOCK_SIZE: u64 = 256 * MIB;
/// Largest disk, bytes: 64 TiB.
pub(crate) const MAX_VIRTUAL_SIZE: u64 = 64 << 40;

/// 2.6.2.6.1 Parent locator header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawLocator {
    pub kind: RawGuid,
    pub reserved: U16,
    pub entry_count: U16,
}

/// 2.6.2.6.2 Parent locator entry. Places count from the item's start.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawLocatorEntry {
    pub key_at: U32,
    pub value_at: U32,
    pub key_len: U16,
    pub value_len: U16,
}

/// {B04AEFB7-D19E-4A81-B789-25B8E9445913}: the parent is a VHDX file.
pub(crate) const VHDX_LOCATOR: RawGuid =
    [0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13];

const _: () = {
    assert!(size_of::<RawHeader>() == 80);
    assert!(size_of::<RawRegionTable>() == 16);
    assert!(size_of::<RawRegion>() == 32);
    assert!(size_of::<RawEntry>() == 64);
    assert!(size_of::<RawDescriptor>() == 32);
    assert!(size_of::<RawMetadataTable>() == 32);
    assert!(size_of::<RawItem>() == 32);
    assert!(size_of::<RawLocator>() == 20);
    assert!(size_of::<RawLocatorEntry>() == 12);
};
