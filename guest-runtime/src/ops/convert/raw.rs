//! Into a disk that lies in one piece in a file: chunks need no order.

use alloc::sync::Arc;
use alloc::vec::Vec;

use instar_blockio::{Extent, ExtentKind, FileId, SectorCipher, ZeroMode, data_runs};

use super::fill::{Batch, Fault, Outcome, Scratch, fill};
use super::plan::{Chunk, segments_of};
use super::{Counters, Sparse};
use crate::platform::{Io, Platform};

/// The file that is written.
pub(in crate::ops) struct RawTarget {
    pub file: FileId,
    /// Where in it the disk begins.
    pub base: u64,
    /// Encrypts the disk; positions are offsets of the disk.
    pub cipher: Option<Arc<dyn SectorCipher>>,
    /// Areas that nobody writes read as zero.
    pub zero_init: bool,
    /// What the source does not allocate stays as it is.
    pub keeps_unallocated: bool,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes at its end that are written last; until then the file ends before them.
    pub held_back: u64,
}

impl RawTarget {
    /// Brings one chunk into the file: what lies plain in a source file is copied by the host, the rest goes through `buf`.
    pub fn write_chunk<P: Platform>(
        &self,
        platform: &P,
        chunk: &Chunk,
        sparse: &Sparse,
        buf: &mut Vec<u8>,
        scratch: &mut Scratch<'_>,
        counters: &Counters,
    ) -> Outcome<()> {
        let mut batch = Batch::default();
        // What the host can do by itself. Zeroes are said inside the file only.
        let inside = if self.held_back == 0 { u64::MAX } else { self.size.saturating_sub(self.held_back) };
        let direct = |extent: &Extent| {
            self.cipher.is_none()
                && match extent.kind {
                    ExtentKind::Compressed(_) | ExtentKind::Encrypted { .. } => false,
                    ExtentKind::Data { .. } => true,
                    _ => extent.end() <= inside,
                }
        };
        let stays = |extent: &Extent| self.keeps_unallocated && extent.kind == ExtentKind::Unallocated;
        for extent in chunk.extents.iter().filter(|extent| direct(extent) && !stays(extent)) {
            batch.push(extent.offset, self.direct_request(extent, sparse, counters));
        }
        if chunk.extents.iter().all(direct) {
            return batch.submit(platform);
        }
        buf.resize(chunk.len as usize, 0);
        fill(platform, chunk, buf, scratch, None, |extent| !direct(extent), batch)?;
        self.encrypt(chunk, buf)?;
        let mut writes = Batch::default();
        for span in segments_of(&chunk.extents, |extent| !direct(extent)) {
            self.write_span(span.offset, &buf[span.range()], sparse, &mut writes);
            counters.add_transformed(span.len);
        }
        writes.submit(platform)
    }

    /// Encrypts the bytes of a chunk, where the target is encrypted: all of it goes through the buffer then.
    fn encrypt(&self, chunk: &Chunk, bytes: &mut [u8]) -> Outcome<()> {
        let Some(cipher) = &self.cipher else { return Ok(()) };
        chunk.segments().iter().try_for_each(|segment| {
            cipher.encrypt(segment.offset, &mut bytes[segment.range()]).map_err(Fault::write(segment.offset))
        })
    }

    /// Writes a chunk whose bytes are there already.
    pub fn write_bytes<P: Platform>(
        &self,
        platform: &P,
        chunk: &Chunk,
        sparse: &Sparse,
        bytes: &mut [u8],
    ) -> Outcome<()> {
        self.encrypt(chunk, bytes)?;
        let mut writes = Batch::default();
        for segment in chunk.segments() {
            self.write_span(segment.offset, &bytes[segment.range()], sparse, &mut writes);
        }
        writes.submit(platform)
    }

    fn direct_request<'b>(&self, extent: &Extent, sparse: &Sparse, counters: &Counters) -> Io<'b> {
        let (offset, len) = (extent.offset, extent.len);
        if let ExtentKind::Data { file, host } = extent.kind {
            counters.add_copied(len);
            let skip_zero = (self.zero_init && !sparse.allocate_all()).then_some(sparse.alignment());
            return Io::Copy { from: file, offset: host, to: self.file, to_offset: self.base + offset, len, skip_zero };
        }
        let mode = if sparse.allocate_all() { ZeroMode::KeepAllocated } else { ZeroMode::Unmap };
        Io::WriteZeroes { file: self.file, offset: self.base + offset, len, mode }
    }

    /// Writes the runs of a span that hold data; the others too where the file would not read as zero.
    fn write_span<'b>(&self, offset: u64, bytes: &'b [u8], sparse: &Sparse, writes: &mut Batch<'b>) {
        let mut write = |start: usize, end: usize| {
            let at = offset + start as u64;
            writes.push(at, Io::Write { file: self.file, offset: self.base + at, buf: &bytes[start..end] });
        };
        if sparse.allocate_all() || !self.zero_init {
            return write(0, bytes.len());
        }
        for run in data_runs(bytes, offset, sparse.alignment(), sparse.min_zero()) {
            write(run.start, run.end);
        }
    }
}
