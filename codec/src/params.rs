//! The parameters of the streams, where both deflate libraries share them.

/// log2 of the largest deflate window there is. Streams of smaller windows are read with it too.
#[cfg(any(feature = "std", feature = "c-allocator"))]
pub const INFLATE_WINDOW_BITS: u8 = 15;
/// log2 of the window that raw streams are written for: 4 KiB, all that QEMU promises to readers of qcow2.
pub const DEFLATE_WINDOW_BITS: u8 = 12;
/// log2 of the window of streams with a zlib header, which tells it to readers.
#[cfg(any(feature = "std", feature = "c-allocator"))]
pub const ZLIB_WINDOW_BITS: i32 = 15;
/// The level that zlib's default (which QEMU asks for) stands for.
pub const DEFLATE_LEVEL: u8 = 6;
/// Memory for the symbols of a deflate block, 1 to 9. QEMU asks for 9; but zlib-rs, which finds fewer matches than zlib, makes up for a part
/// of that by shorter blocks, whose codes fit better: 0.45 % smaller than with 9, for 7 % more time.
#[cfg(any(feature = "std", feature = "c-allocator"))]
pub const DEFLATE_MEM_LEVEL: i32 = 7;
/// Zstandard's default level, as in QEMU.
pub const ZSTD_LEVEL: i32 = 3;
/// Largest window of a frame of unknown size: what libzstd accepts unless told otherwise, hence QEMU. No memory stands behind it.
pub const ZSTD_MAX_WINDOW: u64 = 1 << 27;
