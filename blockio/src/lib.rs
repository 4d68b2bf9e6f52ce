//! Block I/O contract of the instar crates: what a disk-image format sits on, and what an
//! image offers.
//!
//! ```text
//!   BlockRead ──► BlockWrite ─┐
//!       │                     ├─► BlockIo           (a disk that can be read, written, mapped)
//!       └───────► BlockMap  ──┘
//!                    └────────► BlockAlloc          (bulk writing: reserve, move bytes, commit)
//! ```
//!
//! * A **format** (qcow2, VMDK, …) reads its file through [`BlockRead`] and offers [`BlockMap`]:
//!   it says *where* the bytes of the disk lie, as [`Extent`]s. Reading is built on that once.
//! * Metadata belongs to the format, payload to the caller: [`BlockMap::extent_at`] and
//!   [`BlockAlloc::reserve`] give places in a file, and the caller moves the bytes.
//! * Everything is synchronous, `&self` reads and `&mut self` changes. A second thread opens its
//!   own handle, or shares one behind a lock for look-ups only.
//!
//! Offsets and lengths are bytes in `u64`; sectors, clusters and grains stay inside their crate.
//!
//! # Features
//! * `std`: [`file`], a host file as a block device, over `rustix` and without `unsafe`.
//! * `test`: [`test`], stores that fail chosen requests and that record the order of writes.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

extern crate alloc;
#[cfg(any(feature = "std", feature = "test", test))]
extern crate std;

pub mod check;
mod concat;
mod error;
mod extent;
mod impls;
mod limits;
mod mem;
mod overlay;
mod sector_cipher;
mod traits;
mod window;
mod zero;

#[cfg(feature = "std")]
pub mod file;
#[cfg(feature = "test")]
pub mod test;

pub use concat::Concat;
pub use error::{Error, ErrorKind, Result};
pub use extent::{Codec, CompressedRun, Extent, ExtentKind, Extents, FileId};
pub use limits::{Limits, check_range};
pub use mem::MemBlock;
pub use overlay::Overlay;
pub use sector_cipher::{SectorCipher, read_encrypted};
pub use traits::{
    BlockAlloc, BlockIo, BlockMap, BlockMapExt, BlockRead, BlockWrite, Layer, ReadPart, Reservation, WritePart,
    ZeroMode,
};
pub use window::Window;
pub use zero::{data_runs, is_zero, zeroed};
