//! A part of a disk as the source, as `dd` copies it.

use alloc::boxed::Box;
use core::ops::Range;

use instar_blockio::{BlockMap, BlockRead, Extent, ExtentKind, Layer, Limits, Result, check_range};

/// Bytes `start..start + len` of a disk. A compressed unit that begins before them keeps its beginning, modulo 2^64: the distance
/// to it is what [`fill`](super::fill) asks for.
pub(super) struct Part {
    inner: Box<dyn Layer>,
    start: u64,
    len: u64,
}

impl Part {
    /// A range that lies inside the disk.
    ///
    /// # Errors
    /// `OutOfBounds` if it doesn't.
    pub fn new(inner: Box<dyn Layer>, range: Range<u64>) -> Result<Self> {
        let len = range.end.saturating_sub(range.start);
        check_range(inner.size(), range.start, len)?;
        Ok(Self { inner, start: range.start, len })
    }
}

impl BlockRead for Part {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.len, offset, buf.len() as u64)?;
        self.inner.read_at(self.start + offset, buf)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }
}

impl BlockMap for Part {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        check_range(self.len, offset, 1)?;
        let mut extent = self.inner.extent_at(self.start + offset, max_len.min(self.len - offset))?;
        extent.offset = offset;
        if let ExtentKind::Compressed(run) = &mut extent.kind {
            run.unit_offset = run.unit_offset.wrapping_sub(self.start);
        }
        Ok(extent)
    }
}
