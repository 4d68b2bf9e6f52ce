//! QEMU's qcow2 disk images, versions 2 and 3, without an operating system.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod addr;
mod allocator;
mod bitmap_store;
mod cache;
mod create;
mod error;
mod extension;
mod format;
mod header;
mod l1;
mod l2;
mod refcount;
mod reserve;
mod store;
mod write;
mod zero;

pub use addr::{Geometry, GuestOffset, HostOffset};
pub use create::{CreateOptions, OptionError, Preallocation, create};
pub use error::{BitmapsFault, Corruption, DirectoryFault, Error, Result, Table};
pub use extension::{
    BitmapDirectory, CryptoHeader, Extensions, FeatureKind, FeatureName, FeatureNames, UnknownExtension,
};
pub use header::{Autoclear, Compatible, CompressionType, EncryptionMethod, Header, Incompatible};
pub use l1::L1Entry;
pub use l2::{L2Entry, L2Format, SubclusterState, Subclusters};
pub use write::Writer;
