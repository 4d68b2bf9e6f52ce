//! The parameters of the streams, where both deflate libraries share them.

/// log2 of the largest deflate window there is. Streams of smaller windows are read with it too.
#[cfg(any(feature = "std", feature = "c-allocator"))]
pub const INFLATE_WINDOW_BITS: u8 = 15;
/// log2 of the window that is written for: 4 KiB, all that QEMU promises to readers of qcow2.
pub const DEFLATE_WINDOW_BITS: u8 = 12;
/// The level that zlib's default (which QEMU asks for) stands for.
pub const DEFLATE_LEVEL: u8 = 6;
/// Memory for the deflate search, 1 to 9, as in QEMU.
#[cfg(any(feature = "std", feature = "c-allocator"))]
pub const DEFLATE_MEM_LEVEL: i32 = 9;
/// Zstandard's default level, as in QEMU.
pub const ZSTD_LEVEL: i32 = 3;
/// Largest window of a frame of unknown size: what libzstd accepts unless told otherwise, hence QEMU. No memory stands behind it.
pub const ZSTD_MAX_WINDOW: u64 = 1 << 27;
