//! VHD disk images (Virtual PC, Hyper-V, Azure; `vpc` to QEMU) without an operating system.
//!
//! An [`Image`] reads: it says what an image is, and where the bytes of its disk lie. A [`Writer`] makes dynamic images and changes their
//! contents; a fixed image is its disk with a footer behind it ([`fixed`]). Both follow Microsoft's "Virtual Hard Disk Image Format
//! Specification", version 1.0.
//!
//! ```text
//! file ──► Image::open ──► BlockMap    where each run of the disk lies, without reading it
//!            │        └──► BlockRead   the disk's bytes (those of the parent as zero: join layers by an overlay)
//!            ├───────────► footer, header, parent names
//!            └───────────► check       what is wrong with it
//!
//! empty file ──► create ───────┬──► BlockWrite, BlockAlloc ──► Writer::finish
//! image      ──► Writer::open ─┘
//! image      ──► repair                copies the good footer over the bad one
//! ```
//!
//! # Supported
//! Fixed, dynamic and differencing images, all block sizes, footers of 511 bytes, sizes by geometry or as recorded ([`SizeRule`]), and
//! images of whose two footers only one is good ([`Image::is_copy_used`], [`Image::is_end_footer_lost`]).
//!
//! # Not supported
//! Differencing images are read, not written. No other file is ever opened here: names of parents are handed to the caller
//! ([`Image::parent_names`]), and so is the proof that a file is the parent ([`Image::is_parent`]). Images are not resized.
//! In dynamic images (not differencing ones) the sector bitmap of a block is not asked, as in QEMU: its data are all there.
//!
//! # Hostile images
//! No byte of an image makes this crate panic, and none sizes an allocation that is not bounded first. The table and the sector
//! bitmaps are read through a cache of [`OpenOptions::cache_bytes`]; parent locators are cut at 64 KiB.
//!
//! # Example
//! ```
//! use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, ExtentKind, FileId, MemBlock};
//! use instar_vhd::{CreateOptions, Image, OpenOptions, create};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Any block device will do: `instar_blockio::file::HostFile`, or a disk in memory.
//! let options = CreateOptions { size: 1 << 30, uuid: *b"some random byte", ..CreateOptions::default() };
//! let mut writer = create(MemBlock::default(), FileId(0), &options)?;
//! writer.write_at(100 << 20, b"hello")?;
//! let file = writer.finish()?;
//!
//! let image = Image::open(&file, FileId(0), &OpenOptions::default())?;
//! // Rounded up to whole cylinders.
//! assert_eq!((image.virtual_size(), image.block_size()), (1_073_995_776, Some(2 << 20)));
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

mod check;
mod create;
mod error;
mod footer;
mod geometry;
mod header;
mod locator;
mod map;
mod open;
mod pages;
mod write;

pub use check::{CheckReport, Finding, check, repair};
pub use create::{BLOCK_SIZE, CreateOptions, create, fixed};
pub use error::{Error, Result};
pub use footer::{DiskType, FOOTER, Footer};
pub use geometry::{Geometry, MAX_SECTORS, SECTOR};
pub use header::Header;
pub use open::{Image, OpenOptions, SizeRule};
pub use write::Writer;
