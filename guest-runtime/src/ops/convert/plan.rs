//! What is to be copied next: the disk cut into chunks, holes left out.

use alloc::boxed::Box;
use alloc::vec::Vec;

use instar_blockio::{Extent, ExtentKind, Layer};

use super::fill::{Fault, Outcome};

/// A run of zeroes is handed out in pieces of at most this many bytes, so that progress stays visible.
const MAX_ZERO_CHUNK: u64 = 1 << 30;

/// Segments of one chunk at most.
const MAX_SEGMENTS: usize = 32;

/// What the target makes of areas that hold no data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) struct Rules {
    /// Areas of the target that nobody writes read as zero.
    pub zero_init: bool,
    /// What the source does not allocate, the target's backing image answers.
    pub skip_unallocated: bool,
    /// Zeroes are written as data (`-S 0`).
    pub allocate_all: bool,
    /// Chunks begin and end at multiples of this (a power of two; 1: anywhere).
    pub unit: u64,
    /// Bytes of a chunk, a power of two and a multiple of `unit`.
    pub chunk: u64,
    /// Bytes at the end of the disk that come last, when all others are written.
    pub held_back: u64,
}

/// One piece of work: a segment of the disk, or several where little lies here and there. One turn with the host serves them all.
#[derive(Debug)]
pub(in crate::ops) struct Chunk {
    /// Position in the order of the disk: 0, 1, 2, …
    pub seq: u64,
    /// Where it begins on the disk.
    pub offset: u64,
    /// Bytes of all segments. In a buffer they lie one behind the other.
    pub len: u64,
    /// Its runs, in order. Where one does not begin where the one before ends, a new segment begins.
    pub extents: Vec<Extent>,
}

/// A part of the disk without gaps, and where its bytes lie in the buffer of its chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) struct Segment {
    pub offset: u64,
    pub len: u64,
    pub at: usize,
}

impl Segment {
    /// Its bytes in the buffer.
    pub fn range(&self) -> core::ops::Range<usize> {
        self.at..self.at + self.len as usize
    }
}

impl Chunk {
    /// Its segments, in order; at least one.
    pub fn segments(&self) -> Vec<Segment> {
        segments_of(&self.extents, |_| true)
    }

    /// Does `next` begin where this ends?
    fn touches(&self, next: &Self) -> bool {
        self.extents.last().is_some_and(|last| last.end() == next.offset)
    }

    /// One run of zeroes, possibly longer than a buffer.
    pub fn is_zero(&self) -> bool {
        matches!(self.extents.as_slice(), [Extent { kind: ExtentKind::Zero { .. } | ExtentKind::Unallocated, .. }])
    }
}

/// Neighbouring wanted runs of a chunk.
pub(in crate::ops) fn segments_of(extents: &[Extent], wanted: impl Fn(&Extent) -> bool) -> Vec<Segment> {
    let mut found: Vec<Segment> = Vec::new();
    let mut at = 0;
    for extent in extents {
        let len = extent.len as usize;
        if wanted(extent) {
            match found.last_mut() {
                Some(last) if last.offset + last.len == extent.offset => last.len += extent.len,
                _ => found.push(Segment { offset: extent.offset, len: extent.len, at }),
            }
        }
        at += len;
    }
    found
}

/// Hands out chunks in the order of the disk.
pub(in crate::ops) struct Planner {
    source: Box<dyn Layer>,
    rules: Rules,
    cursor: u64,
    end: u64,
    seq: u64,
    skipped: u64,
    /// What did not fit into the last chunk any more.
    kept: Option<Chunk>,
}

impl Planner {
    pub fn new(source: Box<dyn Layer>, rules: Rules) -> Self {
        let end = source.size().saturating_sub(rules.held_back);
        Self { source, rules, cursor: 0, end, seq: 0, skipped: 0, kept: None }
    }

    /// Lets [`next`](Self::next) go on to the end of the disk; `false` if nothing was held back.
    pub fn release(&mut self) -> bool {
        self.end = self.source.size();
        self.rules.held_back > 0
    }

    /// Sequence number of the chunk that [`next`](Self::next) would give.
    pub fn next_seq(&self) -> u64 {
        self.seq
    }

    /// Bytes passed over since the last call, because they need no work.
    pub fn take_skipped(&mut self) -> u64 {
        core::mem::take(&mut self.skipped)
    }

    /// Reads from the source itself, for what the extents could not give.
    pub fn source(&self) -> &dyn Layer {
        &*self.source
    }

    /// The next chunk; `None` at the end of the disk.
    ///
    /// # Errors
    /// The source's error.
    pub fn next(&mut self) -> Outcome<Option<Chunk>> {
        let Some(mut chunk) = self.next_segment()? else { return Ok(None) };
        let mut segments = 1;
        while segments < MAX_SEGMENTS && chunk.len < self.rules.chunk && !chunk.is_zero() {
            // What lies before an error is still good.
            let Ok(Some(more)) = self.next_segment() else { break };
            // Segments are looked at one by one, so two that touch do not make one chunk.
            if more.is_zero() || chunk.len + more.len > self.rules.chunk || chunk.touches(&more) {
                self.kept = Some(more);
                break;
            }
            chunk.len += more.len;
            chunk.extents.extend(more.extents);
            segments += 1;
        }
        chunk.seq = self.seq;
        self.seq += 1;
        Ok(Some(chunk))
    }

    /// The next chunk of one segment.
    fn next_segment(&mut self) -> Outcome<Option<Chunk>> {
        if let Some(chunk) = self.kept.take() {
            return Ok(Some(chunk));
        }
        while self.cursor < self.end {
            let first = self.extent(self.cursor, self.end - self.cursor)?;
            if self.skips(&first) {
                self.skipped += first.len;
                self.cursor = first.end();
                continue;
            }
            let chunk = match self.long_zero(&first) {
                Some(chunk) => chunk,
                None => self.gather()?,
            };
            self.cursor = chunk.offset + chunk.len;
            return Ok(Some(chunk));
        }
        Ok(None)
    }

    /// A long run of zeroes that must be written is one chunk, without a buffer.
    fn long_zero(&self, first: &Extent) -> Option<Chunk> {
        let zero = match first.kind {
            ExtentKind::Zero { .. } => true,
            ExtentKind::Unallocated => !self.rules.skip_unallocated,
            _ => false,
        };
        let unit = self.rules.unit;
        if !zero || self.rules.allocate_all || !first.offset.is_multiple_of(unit) {
            return None;
        }
        let len = match first.len.min(MAX_ZERO_CHUNK) {
            len if first.offset + len == self.end => len,
            len => len - len % unit,
        };
        if len < self.rules.chunk.min(self.end - first.offset) {
            return None;
        }
        let extents = alloc::vec![Extent { len, ..*first }];
        Some(Chunk { seq: self.seq, offset: first.offset, len, extents })
    }

    /// The runs from the cursor (rounded down to the unit) to the end of the chunk.
    fn gather(&self) -> Outcome<Chunk> {
        let start = self.cursor - self.cursor % self.rules.unit;
        let stop = ((self.cursor / self.rules.chunk + 1).saturating_mul(self.rules.chunk)).min(self.end);
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = start;
        while at < stop {
            let extent = self.extent(at, stop - at)?;
            at = extent.end();
            if !extents.last_mut().is_some_and(|last| last.join(&extent)) {
                extents.push(extent);
            }
        }
        self.trim_tail(&mut extents);
        let len = extents.last().map_or(0, |last| last.end() - start);
        Ok(Chunk { seq: self.seq, offset: start, len, extents })
    }

    /// Drops what may be skipped at the end, down to the unit.
    fn trim_tail(&self, extents: &mut Vec<Extent>) {
        while let [.., before, last] = extents.as_slice()
            && self.skips(last)
            && before.end().is_multiple_of(self.rules.unit)
        {
            extents.pop();
        }
        if let [.., before, last] = extents.as_mut_slice()
            && self.skips(last)
        {
            // The rest of the unit in which data end.
            last.len = last.len.min(before.end().next_multiple_of(self.rules.unit) - last.offset);
        }
    }

    fn extent(&self, at: u64, max_len: u64) -> Outcome<Extent> {
        self.source.extent_at(at, max_len).map_err(Fault::read(at))
    }

    fn skips(&self, extent: &Extent) -> bool {
        match extent.kind {
            ExtentKind::Unallocated => {
                self.rules.skip_unallocated || (self.rules.zero_init && !self.rules.allocate_all)
            }
            ExtentKind::Zero { .. } => self.rules.zero_init && !self.rules.allocate_all,
            _ => false,
        }
    }
}
