//! The codecs of compressed disk images: one cluster or grain at a time, bounded on both sides.
//!
//! * [`Decoder`] fills exactly the buffer that it is given. Output never exceeds it, a stream that ends early is an error, and bytes
//!   behind the end of the stream are ignored, since formats know the length of a stream in sectors only.
//! * [`Encoder`] appends a stream that is shorter than its input, or says that the input does not shrink.
//!
//! Both keep their working memory from call to call; make one per thread.
//!
//! | codec | decoding | encoding | memory of a decoder, an encoder |
//! |---|---|---|---|
//! | [`Deflate`](Codec::Deflate), [`Zlib`](Codec::Zlib) | zlib-rs | zlib-rs, level 6, window 4 KiB (`Zlib`: 32 KiB) | 48 KiB, 0.4 MiB |
//! | [`Zstd`](Codec::Zstd) | structured-zstd | structured-zstd, level 3 | 0.2 MiB, below 16 MiB for a unit of 2 MiB |
//!
//! Stack, optimised: 16 KiB, and 48 KiB to encode Zstandard.
//!
//! A unit is decoded right into the caller's buffer: what a stream claims (a window, a size) never sizes an allocation.
//!
//! The tests hold the libraries against others: miniz_oxide and ruzstd read what is written here, and read the same from damaged
//! streams; the zstd program's frames of all kinds of levels are read; streams of odd shapes are judged as by qemu-img.
//!
//! # Speed
//! MB/s of 10^6 bytes of uncompressed data; medians of CPU time over 128 clusters of 64 KiB, half programs from `/usr/bin` and half text
//! from `/usr/share`, on a shared two-core Xeon with overflow checks on and full link-time optimisation.
//!
//! | | `std` | `c-allocator` | neither | libzstd 1.5.7 |
//! |---|---|---|---|---|
//! | decode deflate | 729 | 620 | 300 | |
//! | encode deflate (stored size) | 111 (31.7 %) | 103 (31.7 %) | 61 (34.6 %) | |
//! | decode zstd | 1166 | 1105 | 1104 | 1400 |
//! | encode zstd, level 3 (stored size) | 212 (30.3 %) | 188 (30.3 %) | 189 (30.3 %) | 390 (30.3 %) |
//!
//! On the same clusters, by wall time under some load: miniz_oxide decodes deflate at 500 MB/s with its release defaults (zlib-rs 620),
//! ruzstd decodes Zstandard at 260 (structured-zstd 1120) and encodes it at 53 (its only level; structured-zstd 175).
//!
//! # Features
//! * `std` (default): for hosted programs. zlib-rs, with Rust's allocator; vector code where the processor has it.
//! * `c-allocator`: for freestanding programs, with `default-features = false`. zlib-rs, with the functions `posix_memalign`, `calloc` and
//!   `free`, which the program provides.
//! * Neither: miniz_oxide in place of zlib-rs. It has no 4 KiB window, so its memory is cleared after each 4 KiB.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

extern crate alloc;

mod decoder;
#[cfg_attr(any(feature = "std", feature = "c-allocator"), path = "zlib.rs")]
#[cfg_attr(not(any(feature = "std", feature = "c-allocator")), path = "miniz.rs")]
mod deflate;
mod encoder;
mod error;
mod inflated;
mod params;
mod zstd;

pub use decoder::Decoder;
pub use encoder::Encoder;
pub use error::{Error, Result};
#[doc(no_inline)]
pub use instar_blockio::Codec;
