//! LUKS volumes: headers of version 1 and 2, key slots, and the ciphers of the contents.
//!
//! Sources: *LUKS1 On-Disk Format Specification*, version 1.2.3, and *LUKS2 On-Disk Format Specification*, version 1.1. A header
//! lies at the start of the volume (in qcow2: at the place that the encryption header extension names); all binary numbers are
//! big-endian.
//!
//! ```text
//!  version 1:   0 magic, version │ 8 cipher, mode, hash │ 104 payload, key bytes │ 112 digest, salt, iterations │ 168 uuid
//!               208 eight key slots (48 bytes each) │ 4096 key material of slot 0, 1, … │ contents
//!
//!  passphrase ─ PBKDF2 or Argon2 ─► slot key ─ decrypts ─► key material ─ anti-forensic merge ─► master key ─ digest fits?
//!                                                                                                    └► SectorCipher
//! ```
//!
//! [`Volume`] reads and opens volumes of either version, [`create`] makes a header of version 1, and [`Header`] adds and erases its
//! key slots. The ciphers are [`SectorCipher`](instar_blockio::SectorCipher)s, that work on any thread.
//!
//! | | |
//! |---|---|
//! | ciphers | AES, Serpent, Twofish (keys of 128, 192 and 256 bits), CAST5 (128) |
//! | modes | XTS, CBC, CTR, ECB |
//! | vectors | plain, plain64, ESSIV |
//! | hashes | MD5, SHA-1, SHA-2, RIPEMD-160, SM3 |
//! | version 2 | read only, one segment, without authenticated encryption |
//!
//! A header is hostile until the contrary is shown: key derivation is bounded by [`Limits`], allocations by constants. Keys are
//! cleared when they are dropped, and compared in constant time.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

extern crate alloc;

mod af;
mod cipher;
mod error;
mod format;
mod hash;
mod header;
mod key;
mod limits;
mod luks2;
mod random;
mod sector;
mod slots;
mod volume;

pub use cipher::{Algorithm, CipherMode, CipherSpec, IvGen, Mode};
pub use error::{Error, Result, TextField};
pub use format::{HEADER_LEN, MAGIC, SLOT_COUNT};
pub use hash::Hash;
pub use header::{Header, KeySlot};
pub use key::MasterKey;
pub use limits::Limits;
pub use luks2::{Header2, Metadata, Segment};
pub use random::Random;
pub use slots::{CreateOptions, Fresh, Patch, create};
pub use volume::{Payload, Volume};
