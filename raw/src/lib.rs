//! Raw disk images: the bytes of the file are the bytes of the disk.
//!
//! * [`Image`]: a raw image over any device. Holes of the file are known from the device's own map; a
//!   file that ends inside a sector is filled up with zeros.
//! * [`partition`]: says whether a disk begins with an MBR or a GUID partition table. A raw image has no
//!   mark of its own, so a partition table is the best evidence that a file is one.
//!
//! ```
//! use instar_blockio::{BlockRead, MemBlock};
//! use instar_raw::{Image, partition};
//!
//! let image = Image::open(MemBlock::from(b"not much".to_vec()))?;
//! assert_eq!(image.size(), 512);
//! assert_eq!(partition::find(&image)?, None);
//! # Ok::<(), instar_blockio::Error>(())
//! ```
//!
//! Not here: reading what lies inside a partition.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
extern crate std;

mod crc32;
mod image;
pub mod partition;

pub use image::{Image, SECTOR};
