//! The codecs of compressed disk images: one cluster or grain at a time, bounded on both sides.
//!
//! * [`Decoder`] fills exactly the buffer that it is given. Output never exceeds it, a stream that ends early is an error, and bytes
//!   behind the end of the stream are ignored, since formats know the length of a stream in sectors only.
//! * [`Encoder`] appends a stream that is shorter than its input, or says that the input does not shrink.
//!
//! Both keep their working memory from call to call; make one per thread.
//!
//! | codec | decoding | encoding |
//! |---|---|---|
//! | [`Deflate`](Codec::Deflate), [`Zlib`](Codec::Zlib) | zlib-rs | zlib-rs, level 6, window 4 KiB |
//! | [`Zstd`](Codec::Zstd) | structured-zstd | structured-zstd, level 3 |
//!
//! zlib-rs inflates about 1.5 times as fast as miniz_oxide and can deflate at level 6 into the 4 KiB window that readers of qcow2 may rely
//! on, which miniz_oxide can't; structured-zstd decodes about 3.5 times as fast as ruzstd. The tests hold each against the other:
//! miniz_oxide and ruzstd read what is written here, and read the same from damaged streams.
//!
//! # Features
//! * `std` (default): for hosted programs.
//! * `c-allocator`: for freestanding programs, with `default-features = false`; they provide `posix_memalign`, `calloc` and `free`.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

extern crate alloc;

mod decoder;
mod encoder;
mod error;

pub use decoder::Decoder;
pub use encoder::Encoder;
pub use error::{Error, Result};
#[doc(no_inline)]
pub use instar_blockio::Codec;
