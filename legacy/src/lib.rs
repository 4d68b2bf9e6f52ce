//! Older formats of disk images, without an operating system.
//!
//! ```text
//! file ──► qcow::Image::open, … ──► BlockMap    where each run of the disk lies, without reading it
//!                              └──► BlockRead   the disk's bytes (unallocated ones as zero: join layers by an overlay)
//!
//! empty file ──► qcow::create, … ──────┬──► BlockWrite, BlockAlloc ──► Writer::finish
//! image      ──► qcow::Writer::open, … ┘
//! ```
//!
//! | format | module | source |
//! |---|---|---|
//! | QEMU copy on write, version 1 | [`qcow`] | QEMU's `block/qcow.c` |
//! | QEMU enhanced disk | [`qed`] | QEMU's `docs/interop/qed_spec.rst` |
//! | VirtualBox | [`vdi`] | QEMU's `block/vdi.c` |
//! | Parallels | [`parallels`] | QEMU's `docs/interop/parallels.rst` |
//! | Apple disk images | [`dmg`] | QEMU's `block/dmg.c` |
//! | Bochs, growing | [`bochs`] | QEMU's `block/bochs.c` |
//! | compressed loop | [`cloop`] | QEMU's `block/cloop.c` |
//!
//! The first four are also written, the last three only read. All images are one [`Image`], all writers one [`Writer`]; a format's module
//! says how they are opened and made, and what else they tell.
//!
//! # Hostile images
//! No byte of an image makes this crate panic, and none sizes an allocation that is not bounded first: tables are read through a cache of
//! 4 MiB; compressed units have 64 MiB at most (QEMU's limit), their streams 128 MiB; chunks of Apple disk images, which are kept in memory,
//! 40 bytes each, and 2^20 of them are accepted. A check takes memory for what is allocated, a bit for each cluster.
//!
//! # Example
//! ```
//! use instar_blockio::{BlockRead, BlockWrite, FileId, MemBlock};
//! use instar_legacy::{OpenOptions, vdi};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Any block device will do: `instar_blockio::file::HostFile`, or a disk in memory.
//! let options = vdi::CreateOptions { size: 8 << 20, uuids: [[1; 16], [2; 16]], ..Default::default() };
//! let mut writer = vdi::create(MemBlock::default(), FileId(0), &options)?;
//! writer.write_at(5 << 20, b"hello")?;
//! let file = writer.finish()?;
//!
//! let image = vdi::Image::open(file, FileId(0), &OpenOptions::default())?;
//! let mut word = [0; 5];
//! image.read_at(5 << 20, &mut word)?;
//! assert_eq!((image.size(), &word), (8 << 20, b"hello"));
//! assert_eq!(image.check(&mut |finding| panic!("{finding}"))?.corruptions, 0);
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
mod image;
mod store;
mod writer;

pub mod bochs;
pub mod cloop;
pub mod dmg;
pub mod parallels;
pub mod qcow;
pub mod qed;
pub mod vdi;

pub use check::{CheckReport, Clusters, Repair};
pub use image::{Image, OpenOptions};
pub use writer::Writer;
