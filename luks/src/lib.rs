//! LUKS volume headers, version 1: what a volume says of its cipher and key slots, without any key.
//!
//! Source: *LUKS1 On-Disk Format Specification*, version 1.2.3. A header is 592 bytes at the start of the volume (in qcow2: at the
//! place that the encryption header extension names); all numbers are big-endian.
//!
//! ```text
//!   0 magic, version │ 8 cipher, mode, hash │ 104 payload, key bytes │ 112 digest, salt, iterations │ 168 uuid │ 208 eight key slots
//! ```
//!
//! Not supported: opening volumes (key derivation, ciphers), and version 2.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod cipher;
mod error;
mod format;
mod header;

pub use cipher::CipherMode;
pub use error::{Error, Result};
pub use format::{HEADER_LEN, MAGIC, SLOT_COUNT};
pub use header::{Header, KeySlot};
