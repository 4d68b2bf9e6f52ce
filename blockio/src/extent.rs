use core::ops::Range;

use crate::{BlockMap, Result};

/// Names one of the files that an image consists of.
///
/// The number is chosen by whoever opens the file (in the sandbox it is the number of the granted
/// device), so an extent names its file without ambiguity even through a chain of images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// A run of the disk with one property: *what* lies at `offset`, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where the run begins on the disk (guest offset), bytes.
    pub offset: u64,
    /// Length of the run, bytes; never 0.
    pub len: u64,
    /// Which layer of a chain answers: 0 is the image itself, 1 its backing, …
    pub depth: u32,
    /// What lies there.
    pub kind: ExtentKind,
}

/// What lies in an [`Extent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExtentKind {
    /// The bytes lie in `file` at `host`, one to one. A part behind the end of the file reads as zero.
    Data {
        /// The file that holds the bytes.
        file: FileId,
        /// Offset in that file.
        host: u64,
    },
    /// Reads as zero, whatever a backing image holds.
    Zero {
        /// Where space stays reserved for the run, if any.
        host: Option<(FileId, u64)>,
    },
    /// Not present in this layer: ask the backing image; zero without one.
    Unallocated,
    /// One compressed unit (or a part of one).
    Compressed(CompressedRun),
    /// Encrypted bytes at this place of the file: read, then decrypt by the [`SectorCipher`](crate::SectorCipher) that goes with
    /// the file. Runs begin and end between sectors.
    Encrypted {
        /// The file.
        file: FileId,
        /// Offset in it, bytes.
        host: u64,
        /// Position of the first sector for the cipher, bytes.
        position: u64,
    },
}

/// A compressed unit: a cluster or grain stored as one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedRun {
    /// The file that holds the stream.
    pub file: FileId,
    /// Offset of the stream in that file.
    pub host: u64,
    /// Bytes to read at `host`. The stream may end earlier (formats round up), never later.
    pub stored_len: u32,
    /// Disk offset at which the unit begins; at or before the extent's own offset.
    pub unit_offset: u64,
    /// Length of the unit after decompression.
    pub unit_len: u32,
    /// How it is compressed.
    pub codec: Codec,
}

/// How a compressed unit is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// Raw deflate, RFC 1951.
    Deflate,
    /// Deflate in a zlib wrapper, RFC 1950.
    Zlib,
    /// Zstandard frame, RFC 8878.
    Zstd,
}

impl Extent {
    /// First disk offset behind the run.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Appends `next` if both describe one longer run; says whether it did.
    pub fn join(&mut self, next: &Extent) -> bool {
        use ExtentKind::{Data, Encrypted, Unallocated, Zero};
        let joined = self.end() == next.offset
            && self.depth == next.depth
            && match (self.kind, next.kind) {
                (Data { file: a, host: x }, Data { file: b, host: y }) => a == b && x.checked_add(self.len) == Some(y),
                (Zero { host: None }, Zero { host: None }) | (Unallocated, Unallocated) => true,
                (Zero { host: Some((a, x)) }, Zero { host: Some((b, y)) }) => {
                    a == b && x.checked_add(self.len) == Some(y)
                }
                (Encrypted { file: a, host: x, position: p }, Encrypted { file: b, host: y, position: q }) => {
                    a == b && x.checked_add(self.len) == Some(y) && p.checked_add(self.len) == Some(q)
                }
                _ => false,
            };
        if joined {
            self.len += next.len;
        }
        joined
    }

    /// The part of the run inside `offset..offset + len`; `None` if they share no byte.
    pub fn clip(&self, offset: u64, len: u64) -> Option<Extent> {
        let start = self.offset.max(offset);
        let end = self.end().min(offset.saturating_add(len));
        if start >= end {
            return None;
        }
        let skip = start - self.offset;
        let kind = match self.kind {
            ExtentKind::Data { file, host } => ExtentKind::Data { file, host: host.checked_add(skip)? },
            ExtentKind::Zero { host: Some((file, host)) } => {
                ExtentKind::Zero { host: Some((file, host.checked_add(skip)?)) }
            }
            ExtentKind::Encrypted { file, host, position } => {
                ExtentKind::Encrypted { file, host: host.checked_add(skip)?, position: position.checked_add(skip)? }
            }
            other => other,
        };
        Some(Extent { offset: start, len: end - start, depth: self.depth, kind })
    }
}

/// The runs of a range, neighbours joined; made by [`BlockMapExt::extents`](crate::BlockMapExt::extents).
#[derive(Debug)]
pub struct Extents<'a, M: ?Sized> {
    map: &'a M,
    range: Range<u64>,
    held: Option<Extent>,
    failed: bool,
}

impl<'a, M: BlockMap + ?Sized> Extents<'a, M> {
    pub(crate) fn new(map: &'a M, range: Range<u64>) -> Self {
        Self { map, range, held: None, failed: false }
    }
}

impl<M: BlockMap + ?Sized> Iterator for Extents<'_, M> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.failed && self.range.start < self.range.end {
            let next = match self.map.extent_at(self.range.start, self.range.end - self.range.start) {
                Ok(extent) => extent,
                // The run before the fault is still good: hand it out first, the error at the next call.
                Err(error) => {
                    return Some(match self.held.take() {
                        Some(extent) => Ok(extent),
                        None => {
                            self.failed = true;
                            Err(error)
                        }
                    });
                }
            };
            self.range.start = next.end();
            let joined = self.held.as_mut().is_some_and(|held| held.join(&next));
            if !joined && let Some(done) = self.held.replace(next) {
                return Some(Ok(done));
            }
        }
        self.held.take().map(Ok)
    }
}
