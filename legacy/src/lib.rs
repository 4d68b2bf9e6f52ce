//! Older formats of disk images, without an operating system.
#![no_std]
#![forbid(unsafe_code)]

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
