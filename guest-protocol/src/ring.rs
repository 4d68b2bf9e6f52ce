//! Requests on granted files, carried by one virtqueue per vCPU.
//!
//! The device is a multiplexer: like a virtio-scsi LUN, `device` in the header names the granted file. Kinds and numbers
//! of the standard requests are those of virtio-blk (virtio 1.2, 5.2.6); offsets and lengths are **bytes**, since image
//! files end anywhere.
//!
//! A request is a descriptor chain: one readable descriptor with a [`RequestHeader`], the data descriptors (readable for
//! [`Write`](RequestKind::Write), writable for [`Read`](RequestKind::Read) and [`Holes`](RequestKind::Holes), none else), one writable descriptor with a [`RequestStatus`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// virtio device id of the multiplexer as the transport reports it (that of a block device).
pub const DEVICE_ID: u32 = 2;

/// First descriptor of every request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RequestHeader {
    /// [`RequestKind`].
    pub kind: u32,
    /// Granted file.
    pub device: u32,
    /// Offset in it, bytes.
    pub offset: u64,
    /// Length, bytes; for reads and writes equal to the sum of the data descriptors.
    pub len: u64,
    /// [`RequestFlags`].
    pub flags: u32,
    /// [`Copy`](RequestKind::Copy): the file that takes the bytes; [`Compare`](RequestKind::Compare): the other file.
    pub target_device: u32,
    /// Offset in `target_device`, bytes.
    pub target_offset: u64,
    /// [`Copy`](RequestKind::Copy) with [`SKIP_ZERO`](RequestFlags::SKIP_ZERO): bytes of a block (a power of two, 512 to 16 MiB).
    pub granularity: u32,
    /// Zero.
    pub reserved: u32,
}

/// Last descriptor of every request, written by the monitor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RequestStatus {
    /// [`STATUS_OK`], [`STATUS_IO_ERROR`], [`STATUS_REFUSED`] or [`STATUS_TARGET_ERROR`].
    pub status: u32,
    /// `errno` of the host, 0 if none.
    pub errno: u32,
    /// [`Holes`](RequestKind::Holes): entries written; [`Copy`](RequestKind::Copy): bytes really written;
    /// [`Compare`](RequestKind::Compare): equal bytes before the first difference; else 0.
    pub value: u64,
}

/// Done.
pub const STATUS_OK: u32 = 0;
/// The host's system call failed.
pub const STATUS_IO_ERROR: u32 = 1;
/// The request breaks the rules (bounds, kind, rights); nothing was done.
pub const STATUS_REFUSED: u32 = 2;
/// The host's system call on the target of a [`Copy`](RequestKind::Copy) failed.
pub const STATUS_TARGET_ERROR: u32 = 3;
/// What the guest presets, so that an answer that never came is not taken for success.
pub const STATUS_PENDING: u32 = u32::MAX;

/// One run of a file's hole map, the element of [`RequestKind::Holes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HoleRun {
    /// Length of the run, bytes.
    pub len: u64,
    /// 1: data, 0: hole (reads as zero).
    pub data: u64,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum RequestKind {
    /// Read `len` bytes. Past the end of the file is refused.
    Read = 0,
    /// Write `len` bytes. A regular file grows.
    Write = 1,
    /// Make the file durable (fdatasync).
    Flush = 4,
    /// Give the space of the range back (punch hole; on a block device BLKDISCARD).
    Discard = 11,
    /// Make the range zero; with [`UNMAP`](RequestFlags::UNMAP) space may be given back.
    WriteZeroes = 13,
    /// The runs of data and holes of `offset..offset + len`, as many [`HoleRun`]s as fit; they start at `offset`.
    Holes = 0x100,
    /// Copy `len` bytes from `device` at `offset` to `target_device` at `target_offset`. What lies past the end of
    /// the source counts as zero.
    Copy = 0x101,
    /// Set the file's length to `offset` (truncate or extend with a hole).
    SetLen = 0x102,
    /// Allocate the range (fallocate), extending the file; contents are kept, new bytes are zero.
    Allocate = 0x103,
    /// Compare `len` bytes of `device` at `offset` with those of `target_device` at `target_offset`. What lies past the end of a
    /// file counts as zero.
    Compare = 0x104,
}

impl TryFrom<u32> for RequestKind {
    type Error = u32;

    fn try_from(value: u32) -> Result<Self, u32> {
        Ok(match value {
            0 => Self::Read,
            1 => Self::Write,
            4 => Self::Flush,
            11 => Self::Discard,
            13 => Self::WriteZeroes,
            0x100 => Self::Holes,
            0x101 => Self::Copy,
            0x102 => Self::SetLen,
            0x103 => Self::Allocate,
            0x104 => Self::Compare,
            other => return Err(other),
        })
    }
}

bitflags::bitflags! {
    /// Modifiers of a request.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct RequestFlags: u32 {
        /// [`WriteZeroes`](RequestKind::WriteZeroes): space may be given back.
        const UNMAP = 1 << 0;
        /// [`Copy`](RequestKind::Copy): leave out blocks of the source that are all zero (the target is known to read as zero
        /// there), judged in blocks of `granularity` bytes counted from `offset`.
        const SKIP_ZERO = 1 << 1;
        /// [`Copy`](RequestKind::Copy): let the files share the blocks of the whole range (reflink) or fail, with `EOPNOTSUPP` where the file
        /// system or the places don't allow it.
        const ONLY_SHARE = 1 << 2;
    }
}

const _: () = {
    assert!(size_of::<RequestHeader>() == 48);
    assert!(size_of::<RequestStatus>() == 16);
    assert!(size_of::<HoleRun>() == 16);
};
