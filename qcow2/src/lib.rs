//! QEMU's qcow2 disk images, versions 2 and 3, without an operating system.
//!
//! An [`Image`] reads: it says what an image is, and where the bytes of its disk lie. A [`Writer`] makes and changes
//! images. Both follow QEMU's `docs/interop/qcow2.rst`, and refuse what QEMU refuses.
//!
//! ```text
//! file ──► Image::open ──► BlockMap    where each run of the disk lies, without reading it
//!            │        └──► BlockRead   the disk's bytes (unallocated ones as zero: join layers by an overlay)
//!            └───────────► header, extensions, snapshots, bitmaps
//!
//! empty file ──► create ───────┬──► BlockWrite, BlockAlloc ──► Writer::finish
//! image      ──► Writer::open ─┤
//!                              ├──► create_snapshot, apply_snapshot, delete_snapshot
//!                              ├──► load_bitmaps, merge_bitmap …, store_bitmaps
//!                              └──► amend
//! ```
//!
//! What changes an existing image leaves it valid at every moment: after a crash it is the old one or the new one, with
//! clusters that nobody uses at worst.
//!
//! # Supported
//! Versions 2 and 3, clusters of 512 bytes to 2 MiB, refcounts of 1 to 64 bits, standard and extended L2 entries
//! (subclusters), clusters compressed by zlib and zstd, external data files, names of backing files, internal
//! snapshots, persistent dirty bitmaps, feature name tables.
//!
//! # Not supported
//! Keys: encrypted images are read and written by a cipher that the caller hands in ([`Image::set_cipher`],
//! [`Writer::open_encrypted`], [`create_encrypted`]); without it their contents are an error. No other file is ever opened here; names of backing and data files are handed to the caller.
//!
//! # Hostile images
//! No byte of an image makes this crate panic, and none sizes an allocation that is not bounded first: metadata is
//! read through a cache of [`OpenOptions::cache_bytes`]; snapshots and bitmaps have the bounds told at
//! [`Image::snapshots`] and [`Image::bitmaps`].
//!
//! # Example
//! ```
//! use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, ExtentKind, FileId, MemBlock};
//! use instar_qcow2::{CreateOptions, Image, OpenOptions, create};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Any block device will do: `instar_blockio::file::HostFile`, or a disk in memory.
//! let mut file = MemBlock::default();
//! let options = CreateOptions { size: 1 << 30, ..CreateOptions::default() };
//! let mut writer = create(&mut file, FileId(0), None, &options)?;
//! writer.write_at(1 << 20, b"hello")?;
//! writer.finish()?;
//!
//! let image = Image::open(&file, FileId(0), &OpenOptions::default())?;
//! assert_eq!((image.virtual_size(), image.cluster_size()), (1 << 30, 65536));
//! let mut word = [0; 5];
//! image.read_at(1 << 20, &mut word)?;
//! assert_eq!(&word, b"hello");
//!
//! // Where the data lie, without reading them: one cluster.
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

#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct ProjectReadme;

extern crate alloc;
#[cfg(test)]
#[macro_use]
extern crate std;

mod addr;
mod allocator;
mod amend;
mod backing;
mod bitmap;
mod bitmap_edit;
mod bitmap_store;
mod cache;
mod check;
mod create;
mod crypt;
mod empty;
mod error;
mod extension;
mod fork;
mod format;
mod header;
mod l1;
mod l2;
mod map;
mod open;
mod pages;
mod read;
mod record;
mod refcount;
mod refcount_width;
mod reserve;
mod resize;
mod rewrite;
mod snapshot;
mod snapshot_edit;
mod store;
mod tree;
mod write;
mod zero;

pub use addr::{Geometry, GuestOffset, HostOffset};
pub use amend::{AmendError, AmendOptions};
pub use bitmap::{BitmapFlags, BitmapInfo, BitmapRun, BitmapRunKind};
pub use bitmap_edit::{BitmapError, Bitmaps};
pub use check::Finding;
pub use create::{CreateOptions, NewEncryption, OptionError, Preallocation, create, create_encrypted};
pub use crypt::ContentsCipher;
pub use error::{BitmapsFault, Corruption, DirectoryFault, EntryFault, Error, NameAt, Result, Table};
pub use extension::{
    BitmapDirectory, CryptoHeader, Extensions, FeatureKind, FeatureName, FeatureNames, UnknownExtension,
};
pub use header::{Autoclear, Compatible, CompressionType, EncryptionMethod, Header, Incompatible};
pub use l1::L1Entry;
pub use l2::{L2Entry, L2Format, SubclusterState, Subclusters};
pub use open::{Encryption, Image, OpenOptions, feature_names};
pub use resize::{Growth, ResizeError};
pub use snapshot::{Snapshot, SnapshotSelector};
pub use snapshot_edit::NewSnapshot;
pub use write::Writer;
