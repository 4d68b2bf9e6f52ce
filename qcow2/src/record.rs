//! Bitmaps go on recording while an image is written. In the file they are invalid from the first change on; those of the finished image
//! tell what was written.

use core::ops::Range;

use alloc::vec::Vec;

use instar_blockio::BlockWrite;

use crate::bitmap_edit::Bitmaps;
use crate::error::Result;
use crate::write::Writer;

/// Ranges that are kept apart at most; more become one.
const MAX_RANGES: usize = 1 << 16;

/// The bitmaps of an image as they were before its first change, and what was written since.
#[derive(Debug)]
pub(crate) struct Record {
    bitmaps: Bitmaps,
    written: Vec<Range<u64>>,
}

impl<D: BlockWrite> Writer<D> {
    /// Reads the bitmaps that are about to become invalid. Those that can't be read are lost.
    pub(crate) fn start_record(&mut self) {
        if let Ok(bitmaps) = self.load_bitmaps()
            && bitmaps.names().next().is_some()
        {
            self.record = Some(Record { bitmaps, written: Vec::new() });
        }
    }

    /// Takes note of a change of the disk.
    pub(crate) fn note_written(&mut self, offset: u64, len: u64) {
        let Some(Record { written, .. }) = &mut self.record else { return };
        let end = offset.saturating_add(len);
        let full = written.len() >= MAX_RANGES || written.try_reserve(1).is_err();
        match written.last_mut() {
            Some(last) if full || (offset <= last.end && last.start <= end) => {
                *last = last.start.min(offset)..last.end.max(end);
            }
            _ => written.push(offset..end),
        }
    }

    /// Stores the bitmaps with what they have recorded. Everything that was written is durable before they are valid again.
    pub(crate) fn finish_record(&mut self) -> Result<()> {
        let Some(mut record) = self.record.take() else { return Ok(()) };
        self.flush()?;
        for range in &record.written {
            self.mark(&mut record.bitmaps, range)?;
        }
        self.store_bitmaps(&mut record.bitmaps)
    }
}
