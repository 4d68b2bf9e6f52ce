//! VMware's VMDK disk images, without an operating system.
//!
//! An [`Image`] reads: it says what an image is, and where the bytes of its disk lie. A [`Writer`] makes images and fills them. The
//! contract is "Virtual Disk Format 5.0" by VMware; where that is silent (seSparse, zeroed grains), what QEMU does.
//!
//! ```text
//! file ──► Image::open ──► wanted? ──► attach ──► BlockMap, BlockRead
//!            │               ▲            │
//!            │               └────────────┘  one file for each extent that the descriptor names
//!            └───────────► descriptor, extents_info
//!
//! empty files ──► create ──► BlockWrite, BlockAlloc ──► Writer::finish
//! ```
//!
//! # Supported
//! monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized (also with its directory in a footer),
//! vmfs, vmfsThin, vmfsSparse (COWD) and seSparse are read; the first five are made, exactly as qemu-img makes them. Descriptors of
//! their own and embedded ones, zero extents, second grain directories, zeroed grains, names and CIDs of parents.
//!
//! # Not supported
//! Images of devices and partitions are refused. No file is ever opened here: names of extents and parents are handed to the caller.
//!
//! # Hostile images
//! No byte of an image makes this crate panic, and none sizes an allocation that is not bounded first: a descriptor has 1 MiB and
//! [`Error::MAX_EXTENTS`] extents at most, tables are read through a cache.
//!
//! # Example
//! ```
//! use instar_blockio::{BlockRead, BlockWrite, FileId, MemBlock};
//! use instar_vmdk::{CreateOptions, Image, OpenOptions, create};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut file = MemBlock::default();
//! let options = CreateOptions { size: 1 << 30, name: b"disk.vmdk".to_vec(), cid: 0x12345678, ..CreateOptions::default() };
//! let mut writer = create(&mut file, FileId(0), Vec::new(), options)?;
//! writer.write_at(1 << 20, b"hello")?;
//! writer.finish()?;
//!
//! let image = Image::open(&file, FileId(0), &OpenOptions::default())?;
//! assert_eq!(image.descriptor().create_type, b"monolithicSparse");
//! assert_eq!((image.virtual_size(), image.grain_size()), (1 << 30, Some(65536)));
//! let mut word = [0; 5];
//! image.read_at(1 << 20, &mut word)?;
//! assert_eq!(&word, b"hello");
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
mod descriptor;
mod error;
mod format;
mod image;
mod pages;
mod sparse;
mod write;

pub use check::{CheckReport, Finding, check};
pub use create::{CreateOptions, PART, Subformat};
pub use descriptor::{Descriptor, ExtentLine, ExtentType, NO_PARENT};
pub use error::{Error, Result};
pub use image::{ExtentInfo, Image, OpenOptions};
pub use write::{GRAIN, Writer, create, marker};
