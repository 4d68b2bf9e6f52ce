//! The on-disk structures and constants, named as in QEMU's `docs/interop/qcow2.rst`.
//!
//! Bytes with names: nothing here judges a value. All numbers are big-endian.
//!
//! ```text
//! cluster 0          header │ header extensions │ backing file name
//! refcount table ──► refcount blocks
//! L1 table       ──► L2 tables ──► data clusters, compressed streams
//! snapshot table ──► L1 table of each snapshot
//! bitmap directory ► bitmap tables ──► bitmap data
//! ```

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `QFI\xfb`, the first four bytes of every image.
pub const MAGIC: u32 = 0x5146_49fb;

/// Header length of version 2, bytes.
pub const HEADER_LEN_V2: usize = 72;
/// Smallest header length of version 3, bytes.
pub const HEADER_LEN_V3: usize = 104;
/// Header length that [`RawHeader`] covers, bytes: version 3 with its compression type.
pub const HEADER_LEN: usize = 112;

/// Smallest log2 of the cluster size.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest log2 of the cluster size (QEMU's limit).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// log2 of the refcount width of version 2: 16 bits.
pub const V2_REFCOUNT_ORDER: u32 = 4;
/// Subclusters of a cluster in an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

/// Largest L1 table, bytes (QEMU's limit).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, bytes (QEMU's limit).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Clusters up to this size, bytes, have no room for the feature name table (QEMU's rule).
pub const MAX_CLUSTER_WITHOUT_NAMES: u64 = 4096;
/// Most snapshots (QEMU's limit).
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Largest snapshot table, bytes (QEMU's limit).
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// Largest extra data of a snapshot, bytes (QEMU's limit).
pub const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Longest backing file name, bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Longest backing format name, bytes (QEMU's limit).
pub const MAX_BACKING_FORMAT: u32 = 15;
/// Most bitmaps (QEMU's limit).
pub const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory, bytes (QEMU's limit).
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// Longest bitmap name, bytes.
pub const MAX_BITMAP_NAME: u16 = 1023;
/// Most entries of a bitmap table (QEMU's limit).
pub const MAX_BITMAP_TABLE: u32 = 0x0800_0000;
/// Largest bitmap, bytes (QEMU's limit).
pub const MAX_BITMAP_BYTES: u64 = 0x2000_0000;
/// log2 of the smallest bitmap granularity.
pub const MIN_BITMAP_GRANULARITY_BITS: u8 = 9;
/// log2 of the largest bitmap granularity.
pub const MAX_BITMAP_GRANULARITY_BITS: u8 = 31;

/// Longest file, bytes (QEMU's limit).
pub const MAX_FILE_LEN: u64 = 0x7fff_ffff_c000_0000;

/// Sector of a compressed cluster descriptor, bytes.
pub const COMPRESSED_SECTOR: u64 = 512;

/// The header. Version 2 ends after `snapshots_offset`, the rest then counts as absent.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// 0: [`MAGIC`].
    pub magic: U32,
    /// 4: 2 or 3.
    pub version: U32,
    /// 8: where the backing file name lies, 0 for none.
    pub backing_file_offset: U64,
    /// 16: its length, bytes.
    pub backing_file_size: U32,
    /// 20: log2 of the cluster size.
    pub cluster_bits: U32,
    /// 24: virtual size, bytes.
    pub size: U64,
    /// 32: 0 none, 1 AES, 2 LUKS.
    pub crypt_method: U32,
    /// 36: entries of the active L1 table.
    pub l1_size: U32,
    /// 40: where it lies.
    pub l1_table_offset: U64,
    /// 48: where the refcount table lies.
    pub refcount_table_offset: U64,
    /// 56: clusters that it takes.
    pub refcount_table_clusters: U32,
    /// 60: entries of the snapshot table.
    pub nb_snapshots: U32,
    /// 64: where it lies.
    pub snapshots_offset: U64,
    /// 72: [`Incompatible`](crate::Incompatible).
    pub incompatible_features: U64,
    /// 80: [`Compatible`](crate::Compatible).
    pub compatible_features: U64,
    /// 88: [`Autoclear`](crate::Autoclear).
    pub autoclear_features: U64,
    /// 96: log2 of the refcount width in bits.
    pub refcount_order: U32,
    /// 100: length of the header, bytes; the extensions follow.
    pub header_length: U32,
    /// 104: 0 zlib, 1 zstd; present if the header is longer than 104 bytes.
    pub compression_type: u8,
    /// 105: zero.
    pub padding: [u8; 7],
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<RawHeader>() == HEADER_LEN);
    assert!(offset_of!(RawHeader, incompatible_features) == HEADER_LEN_V2);
    assert!(offset_of!(RawHeader, compression_type) == HEADER_LEN_V3);
    assert!(size_of::<RawExtension>() == 8);
    assert!(size_of::<RawFeatureName>() == 48);
    assert!(size_of::<RawBitmapsExtension>() == 24);
    assert!(size_of::<RawCryptoExtension>() == 16);
    assert!(size_of::<RawSnapshot>() == 40);
    assert!(size_of::<RawBitmap>() == 24);
};

/// What precedes the data of a header extension; the data is padded to a multiple of 8 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawExtension {
    /// 0: one of `EXT_*`, or unknown.
    pub magic: U32,
    /// 4: length of the data, bytes, without the padding.
    pub len: U32,
}

/// End of the header extensions.
pub const EXT_END: u32 = 0;
/// Name of the backing file's format.
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// [`RawFeatureName`]s.
pub const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// [`RawBitmapsExtension`].
pub const EXT_BITMAPS: u32 = 0x2385_2875;
/// [`RawCryptoExtension`].
pub const EXT_CRYPTO: u32 = 0x0537_be77;
/// Name of the external data file.
pub const EXT_DATA_FILE: u32 = 0x4441_5441;

/// An entry of the feature name table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawFeatureName {
    /// 0: 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// 1: bit number.
    pub bit: u8,
    /// 2: name, padded with zeroes.
    pub name: [u8; 46],
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawBitmapsExtension {
    /// 0: entries of the bitmap directory.
    pub nb_bitmaps: U32,
    /// 4: zero.
    pub reserved: U32,
    /// 8: length of the directory, bytes.
    pub directory_size: U64,
    /// 16: where it lies.
    pub directory_offset: U64,
}

/// The full disk encryption header pointer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawCryptoExtension {
    /// 0: where the LUKS header lies.
    pub offset: U64,
    /// 8: its length, bytes.
    pub len: U64,
}

/// Refcount table entry: where the refcount block lies.
pub const REFCOUNT_BLOCK_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// L1 entry: where the L2 table lies.
pub const L1_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L1 and L2 entry: the refcount is exactly one.
pub const COPIED: u64 = 1 << 63;
/// L2 entry: a compressed cluster descriptor.
pub const L2_COMPRESSED: u64 = 1 << 62;
/// L2 entry: where the cluster lies.
pub const L2_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L2 entry, version 3 without subclusters: reads as zero.
pub const L2_ZERO: u64 = 1;

/// An entry of the snapshot table. Extra data, id and name follow, then padding to 8 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawSnapshot {
    /// 0: where its L1 table lies.
    pub l1_table_offset: U64,
    /// 8: entries of that.
    pub l1_size: U32,
    /// 12: length of the id, bytes.
    pub id_str_size: U16,
    /// 14: length of the name, bytes.
    pub name_size: U16,
    /// 16: seconds since 1970.
    pub date_sec: U32,
    /// 20: and nanoseconds.
    pub date_nsec: U32,
    /// 24: machine clock, nanoseconds.
    pub vm_clock_nsec: U64,
    /// 32: bytes of machine state (version 2; see the extra data).
    pub vm_state_size: U32,
    /// 36: bytes of extra data: machine state size, virtual size, instruction count (8 bytes each).
    pub extra_data_size: U32,
}

/// An entry of the bitmap directory. Extra data and name follow, then padding to 8 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawBitmap {
    /// 0: where its table lies.
    pub table_offset: U64,
    /// 8: entries of that.
    pub table_size: U32,
    /// 12: [`BitmapFlags`](crate::BitmapFlags).
    pub flags: U32,
    /// 16: 1, a dirty tracking bitmap.
    pub kind: u8,
    /// 17: log2 of the bytes per bit.
    pub granularity_bits: u8,
    /// 18: length of the name, bytes.
    pub name_size: U16,
    /// 20: bytes of extra data.
    pub extra_data_size: U32,
}

/// Type of a dirty tracking bitmap.
pub const BITMAP_DIRTY_TRACKING: u8 = 1;
/// Bitmap table entry: where the cluster of bits lies.
pub const BITMAP_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bitmap table entry without offset: all bits are one.
pub const BITMAP_ALL_ONES: u64 = 1;
/// Bitmap table entry: reserved bits.
pub const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;
