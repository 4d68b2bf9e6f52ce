//! Hyper-V's VHDX disk images without an operating system.
//!
//! An [`Image`] reads: it says what an image is, and where the bytes of its disk lie. A [`Writer`] makes images and changes their contents.
//! Both follow \[MS-VHDX\].
//!
//! ```text
//! file ──► Image::open ──► BlockMap    where each run of the disk lies, without reading it
//!            │        └──► BlockRead   the disk's bytes (those of the parent as zero: join layers by an overlay)
//!            ├───────────► header, parent locator, geometry
//!            └───────────► check       what is wrong with it
//!
//! empty file ──► create ───────┬──► BlockWrite, BlockAlloc ──► Writer::finish
//! image      ──► Writer::open ─┘
//! image      ──► replay_log            what a crash has left in the log is carried out
//! ```
//!
//! # Supported
//! Fixed, dynamic and differencing images (sector bitmaps, parent locators), logical sectors of 512 and 4096 bytes, disks up to 64 TiB,
//! either of the two headers and region tables. Changes that are still in the log are replayed in memory when an image is read, so that a
//! file that was not closed cleanly can be read without being changed.
//!
//! # Not supported
//! Differencing images are read, not written. No other file is ever opened here: names of parents are handed to the caller
//! ([`ParentLocator::names`]), and so is the proof that a file is the parent ([`ParentLocator::is_parent`]). Images are not resized.
//!
//! # Hostile images
//! No byte of an image makes this crate panic, and none sizes an allocation that is not bounded first. The BAT and sector bitmaps are
//! read through a cache of [`OpenOptions::cache_bytes`]; the log is looked at a bounded number of times and keeps at most 262144
//! changes; a parent locator has at most a MiB.
//!
//! # Features
//! * `std`: checksums by the processor's CRC-32C instruction, found at run time.
//!
//! # Example
//! ```
//! use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, ExtentKind, FileId, MemBlock};
//! use instar_vhdx::{CreateOptions, Image, OpenOptions, create};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Any block device will do: `instar_blockio::file::HostFile`, or a disk in memory.
//! let mut file = MemBlock::default();
//! let options = CreateOptions { size: 1 << 30, seed: *b"some random byte", ..CreateOptions::default() };
//! let mut writer = create(&mut file, FileId(0), &options)?;
//! writer.write_at(100 << 20, b"hello")?;
//! writer.finish()?;
//!
//! let image = Image::open(&file, FileId(0), &OpenOptions::default())?;
//! assert_eq!((image.virtual_size(), image.block_size()), (1 << 30, 8 << 20));
//! let mut word = [0; 5];
//! image.read_at(100 << 20, &mut word)?;
//! assert_eq!(&word, b"hello");
//!
//! // Where the data lie, without reading them: one block.
//! let data = image.extents(0..image.size()).filter(|e| matches!(e, Ok(e) if matches!(e.kind, ExtentKind::Data { .. })));
//! assert_eq!(data.count(), 1);
//! # Ok(())
//! # }
//! ```
#![no_std]
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

extern crate alloc;
#[cfg(test)]
#[macro_use]
extern crate std;

mod bat;
mod changes;
mod check;
mod crc;
mod create;
mod error;
mod format;
mod geometry;
mod guid;
mod header;
mod locator;
mod log;
mod map;
mod metadata;
mod open;
mod pages;
mod region;
mod table;
mod write;

pub use check::{CheckReport, Finding, check};
pub use crc::crc32c;
pub use create::{CreateOptions, create};
pub use error::{EntryFault, Error, Item, LogFault, OptionError, Region, Result};
pub use geometry::Geometry;
pub use guid::Guid;
pub use header::Header;
pub use locator::ParentLocator;
pub use open::{Image, OpenOptions, replay_log};
pub use write::Writer;
