//! Files that are written: asked from the host once the sources are open.

use alloc::vec::Vec;

use instar_blockio::{BlockRead, BlockWrite, FileId, Limits, ReadPart, Result as BlockResult, WritePart, ZeroMode};
use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::message::{Cause, Failure, FileRole, Format, OpenFile, Step};

use crate::ops::failure::{about, failure};
use crate::platform::{File, Platform};

/// A file of the target, opened by the host.
pub struct TargetFile<P> {
    /// The file.
    pub file: File<P>,
    /// Its device.
    pub id: FileId,
    /// It can't grow, and a fresh one does not read as zero.
    pub block_device: bool,
}

impl<P: Platform> TargetFile<P> {
    /// The file as a format's writer takes it.
    pub fn disk(self, durable: bool) -> TargetDisk<P> {
        TargetDisk { file: self.file, durable }
    }
}

/// Asks the host for a file of the target, a disk of `size` bytes.
///
/// # Errors
/// The host's refusal; the host knows why.
pub fn open_target_file<P: Platform>(platform: &P, role: FileRole, size: u64) -> Result<TargetFile<P>, Failure> {
    let answer = platform.open(OpenFile {
        role: role.into(),
        referrer: 0,
        name: Vec::new(),
        size,
        writable: true,
        format: Format::Unknown.into(),
    });
    let file = answer.granted.then(|| platform.file(answer.device)).flatten();
    let file = file.ok_or_else(|| failure(Step::Create, Cause::OpenRefused))?;
    let flags = DeviceFlags::from_bits_truncate(answer.flags);
    Ok(TargetFile { file, id: FileId(answer.device), block_device: flags.contains(DeviceFlags::BLOCK_DEVICE) })
}

/// A file that is granted already, to be written.
///
/// # Errors
/// There is no such device.
pub fn granted_target_file<P: Platform>(platform: &P, device: u32) -> Result<TargetFile<P>, Failure> {
    let id = FileId(device);
    let file = platform.file(device).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    let block_device = file.flags().contains(DeviceFlags::BLOCK_DEVICE);
    Ok(TargetFile { file, id, block_device })
}

/// A file of the target. It flushes only if the user asked for a durable target: otherwise the order in which the host's page cache
/// reaches the disk is left to the host, as qemu-img does.
#[derive(Clone, Debug)]
pub struct TargetDisk<P> {
    file: File<P>,
    durable: bool,
}

impl<P> TargetDisk<P> {
    /// Wraps a writable file.
    pub fn new(file: File<P>, durable: bool) -> Self {
        Self { file, durable }
    }
}

impl<P: Platform> BlockRead for TargetDisk<P> {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        self.file.read_at(offset, buf)
    }

    fn read_many(&self, parts: &mut [ReadPart<'_>]) -> BlockResult<()> {
        self.file.read_many(parts)
    }

    fn limits(&self) -> Limits {
        self.file.limits()
    }
}

impl<P: Platform> BlockWrite for TargetDisk<P> {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> BlockResult<()> {
        self.file.write_at(offset, buf)
    }

    fn write_many(&mut self, parts: &[WritePart<'_>]) -> BlockResult<()> {
        self.file.write_many(parts)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> BlockResult<()> {
        self.file.write_zeroes(offset, len, mode)
    }

    fn discard(&mut self, offset: u64, len: u64) -> BlockResult<()> {
        self.file.discard(offset, len)
    }

    fn set_size(&mut self, size: u64) -> BlockResult<()> {
        self.file.set_size(size)
    }

    fn flush(&mut self) -> BlockResult<()> {
        if self.durable { self.file.flush() } else { Ok(()) }
    }
}
