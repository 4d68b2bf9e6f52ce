//! Into an image with an allocation table: chunks are read and transformed in any order, places are given out in the
//! order of the disk, so that the same input always gives the same image.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};

use super::Sparse;
use super::fill::{Batch, Fault, Outcome, Scratch, fill, read_under};
use super::plan::{Chunk, Segment, segments_of};
use crate::formats::{Compression, MappedImage};
use crate::lock::Lock;
use crate::platform::{Io, Platform};
use instar_blockio::{
    BlockRead, ErrorKind, Extent, ExtentKind, FileId, Layer, Reservation, ZeroMode, data_runs, is_zero,
};
use instar_codec::Encoder;
use instar_guest_protocol::message::Step;
use instar_qcow2::ContentsCipher;
use instar_vmdk::marker;

/// The image that is written, and how.
pub(in crate::ops) struct MappedTarget<P: Platform> {
    pub image: Lock<Box<dyn MappedImage<P>>>,
    /// What reads through where the source writes nothing into a unit: the recorded backing image, or what the image held before.
    pub backing: Option<Lock<Box<dyn Layer>>>,
    /// The image exists already: what is around the written bytes stays.
    pub existing: bool,
    /// Areas that nobody writes read as zero.
    pub zero_init: bool,
    /// Pieces are whole units of this many bytes; 1: any run.
    pub unit: u64,
    /// A run of a fresh image is filled up with zeroes to multiples of this; 1: it is not.
    pub grain: u64,
    /// A unit is zero if the tables say so, whatever its bytes are.
    pub zero_by_tables: bool,
    /// Units are stored compressed in this way.
    pub compress: Option<Compression>,
    /// Encrypts what is written.
    pub cipher: Option<ContentsCipher>,
    /// Finished chunks that wait for their turn.
    pub order: Lock<Order>,
    /// Source and target may be able to share blocks; cleared once they were not.
    pub shares: AtomicBool,
}

/// Alignment that sharing asks for, on all file systems that can.
const SHARED_BLOCK: u64 = 4096;

/// The order in which places are given out.
#[derive(Default)]
pub(in crate::ops) struct Order {
    turn: u64,
    waiting: BTreeMap<u64, Finished>,
}

impl Order {
    /// Sequence number of the chunk whose turn it is.
    pub fn turn(&self) -> u64 {
        self.turn
    }
}

/// A chunk that is ready to be written.
pub(in crate::ops) struct Finished {
    pub bytes: Vec<u8>,
    /// Where bytes that are written as they were read came from: files may share such blocks. Empty for all others.
    pub sources: Vec<Extent>,
    pub pieces: Vec<Piece>,
}

/// A part of the disk that is written in one way.
pub(in crate::ops) struct Piece {
    pub offset: u64,
    pub len: u64,
    pub kind: PieceKind,
}

/// How a part of the disk is written.
pub(in crate::ops) enum PieceKind {
    /// Plain bytes at this place of the buffer.
    Data { at: usize },
    /// A stream of `stored_len` bytes at this place of the buffer.
    Compressed { at: usize, stored_len: u32 },
    /// Nothing but zeroes.
    Zeroes,
}

impl<P: Platform> MappedTarget<P> {
    /// Reads a chunk. Nothing needs reading where all of it is zero.
    pub(super) fn read(
        &self,
        platform: &P,
        chunk: &Chunk,
        sparse: &Sparse,
        bytes: &mut Vec<u8>,
        scratch: &mut Scratch<'_>,
    ) -> Outcome<()> {
        if says_zero(chunk, sparse) {
            return Ok(());
        }
        bytes.resize(chunk.len as usize, 0);
        let wanted = |extent: &Extent| self.whole_pieces(sparse) || self.grain > 1 || holds_data(extent);
        self.with_backing(|under| fill(platform, chunk, bytes, scratch, under, wanted, Batch::default()))
    }

    /// Calls `f` with what answers for the areas that the source does not allocate.
    pub fn with_backing<R>(&self, f: impl FnOnce(Option<&dyn BlockRead>) -> R) -> R {
        let backing = self.backing.as_ref().map(|backing| backing.lock());
        f(backing.as_ref().map(|layer| &***layer as &dyn BlockRead))
    }

    /// Cuts the bytes of a chunk into pieces, compressed where asked for.
    pub(super) fn transform(
        &self,
        chunk: &Chunk,
        sparse: &Sparse,
        mut bytes: Vec<u8>,
        encoder: Option<&mut Encoder>,
    ) -> Outcome<Finished> {
        if says_zero(chunk, sparse) {
            let pieces = alloc::vec![Piece { offset: chunk.offset, len: chunk.len, kind: PieceKind::Zeroes }];
            return Ok(Finished { bytes, sources: Vec::new(), pieces });
        }
        if let Some(encoder) = encoder {
            return self.compress_units(chunk, sparse, bytes, encoder);
        }
        let pieces = match self.whole_pieces(sparse) {
            true => self.whole_units(chunk, sparse, &mut bytes)?,
            false => filled(runs(chunk, sparse, &bytes), chunk, self.grain),
        };
        let is_plain = |extent: &&Extent| matches!(extent.kind, ExtentKind::Data { .. });
        // What is encrypted has nothing in common with its source.
        let sources = match self.cipher.is_none() && self.shares.load(Ordering::Relaxed) {
            true => chunk.extents.iter().filter(is_plain).copied().collect(),
            false => Vec::new(),
        };
        Ok(Finished { bytes, sources, pieces })
    }

    /// Every byte of a chunk is written or said to be zero, not only the runs of data.
    fn whole_pieces(&self, sparse: &Sparse) -> bool {
        self.unit > 1 || sparse.allocate_all()
    }

    /// Whole units: data, or zeroes that must be said.
    fn whole_units(&self, chunk: &Chunk, sparse: &Sparse, bytes: &mut Vec<u8>) -> Outcome<Vec<Piece>> {
        let segments = self.whole_segments(chunk, bytes)?;
        let unit = self.unit.max(sparse.alignment().into()) as usize;
        let mut pieces: Vec<Piece> = Vec::new();
        for segment in segments {
            let Range { start: mut at, end } = segment.range();
            while at < end {
                let len = unit.min(end - at);
                let offset = segment.offset + (at - segment.at) as u64;
                if self.touches(chunk, offset, len as u64) {
                    let zero = match self.zero_by_tables {
                        true => self.is_told_zero(chunk, offset, len as u64)?,
                        false => !sparse.allocate_all() && is_zero(&bytes[at..at + len]),
                    };
                    let kind = if zero { PieceKind::Zeroes } else { PieceKind::Data { at } };
                    // The user says that nothing need be done where an existing image is to be zero.
                    if !zero || !self.existing || !self.zero_init {
                        push_joined(&mut pieces, Piece { offset, len: len as u64, kind });
                    }
                }
                at += len;
            }
        }
        Ok(pieces)
    }

    /// The segments of a chunk, the last unit extended by what the image holds behind the end of the source.
    fn whole_segments(&self, chunk: &Chunk, bytes: &mut Vec<u8>) -> Outcome<Vec<Segment>> {
        let mut segments = chunk.segments();
        let Some(last) = segments.last_mut() else { return Ok(segments) };
        let end = last.offset + last.len;
        let image = self.image.lock();
        let whole = end.checked_next_multiple_of(self.unit).unwrap_or(end).min(image.disk().size());
        if !self.existing || whole <= end {
            return Ok(segments);
        }
        let start = bytes.len();
        bytes.resize(start + (whole - end) as usize, 0);
        last.len += whole - end;
        let rest = &mut bytes[start..];
        let read = match &self.backing {
            Some(backing) => read_under(Some(&**backing.lock()), end, rest),
            None => image.disk().read_at(end, rest),
        };
        read.map_err(Fault::read(end))?;
        Ok(segments)
    }

    /// Does the source say anything of this unit (or does the backing image answer for all of it)?
    fn touches(&self, chunk: &Chunk, offset: u64, len: u64) -> bool {
        self.backing.is_none()
            || chunk
                .extents
                .iter()
                .any(|extent| extent.clip(offset, len).is_some_and(|part| part.kind != ExtentKind::Unallocated))
    }

    /// Does one run of zeroes reach over this unit, as far as the source does?
    fn is_told_zero(&self, chunk: &Chunk, offset: u64, len: u64) -> Outcome<bool> {
        let end = chunk.extents.last().map_or(offset, Extent::end).min(offset + len);
        let covering = chunk.extents.iter().find(|extent| extent.offset <= offset && end <= extent.end());
        match (covering.map(|extent| extent.kind), &self.backing) {
            (Some(ExtentKind::Zero { .. }), _) | (Some(ExtentKind::Unallocated), None) => Ok(true),
            (Some(ExtentKind::Unallocated), Some(backing)) => {
                let backing = backing.lock();
                let inside = backing.size().saturating_sub(offset).min(end - offset);
                if inside == 0 {
                    return Ok(true);
                }
                let below = backing.extent_at(offset, inside).map_err(Fault::read(offset))?;
                Ok(below.len >= inside && !holds_data(&below))
            }
            _ => Ok(false),
        }
    }

    /// Compresses unit by unit; what does not shrink stays plain.
    fn compress_units(
        &self,
        chunk: &Chunk,
        sparse: &Sparse,
        mut plain: Vec<u8>,
        encoder: &mut Encoder,
    ) -> Outcome<Finished> {
        let segments = self.whole_segments(chunk, &mut plain)?;
        let unit = self.unit as usize;
        // A last unit that the disk cuts short is compressed as if it were whole.
        plain.resize(plain.len().next_multiple_of(unit), 0);
        let units = segments.iter().flat_map(|segment| {
            (0..segment.len).step_by(unit).map(|skip| Segment {
                offset: segment.offset + skip,
                len: self.unit.min(segment.len - skip),
                at: segment.at + skip as usize,
            })
        });
        let mut bytes = Vec::with_capacity(plain.len());
        let mut pieces = Vec::new();
        for Segment { offset, len, at: start } in units {
            let input = &plain[start..start + unit];
            if !self.touches(chunk, offset, len) {
                continue;
            }
            let at = bytes.len();
            if !sparse.allocate_all() && is_zero(input) {
                if !self.zero_init {
                    push_joined(&mut pieces, Piece { offset, len, kind: PieceKind::Zeroes });
                }
                continue;
            }
            let out_of_memory = |_| Fault::write(offset)(ErrorKind::OutOfMemory.into());
            let encoded = match self.compress {
                Some(Compression { always: true, grain_markers, .. }) => {
                    Some(encode_always(encoder, grain_markers, offset, input, &mut bytes).map_err(out_of_memory)?)
                }
                _ => encoder.encode(input, &mut bytes).map_err(out_of_memory)?,
            };
            let kind = match encoded {
                Some(stored) => PieceKind::Compressed { at, stored_len: stored as u32 },
                None => {
                    bytes.truncate(at);
                    bytes.extend_from_slice(&input[..len as usize]);
                    PieceKind::Data { at }
                }
            };
            pieces.push(Piece { offset, len, kind });
        }
        Ok(Finished { bytes, sources: Vec::new(), pieces })
    }

    /// Hands in a finished chunk and writes every chunk whose turn has come. Gives the buffers back.
    pub fn finish(&self, platform: &P, seq: u64, finished: Finished) -> Outcome<Vec<Vec<u8>>> {
        let mut ready = Vec::new();
        {
            let mut order = self.order.lock();
            order.waiting.insert(seq, finished);
            while let Some(next) = {
                let turn = order.turn;
                order.waiting.remove(&turn)
            } {
                let places = self.assign(&next.pieces)?;
                order.turn += 1;
                ready.push((next, places));
            }
        }
        if ready.is_empty() {
            return Ok(Vec::new());
        }
        if let Some(cipher) = &self.cipher {
            for (finished, places) in &mut ready {
                encrypt(cipher, finished, places)?;
            }
        }
        if !self.share(platform, &ready)? {
            let mut writes = Batch::default();
            for (finished, places) in &ready {
                for stretch in stretches(places) {
                    writes.push(stretch.offset, stretch.write(finished));
                }
            }
            writes.submit(platform)?;
        }
        let mut image = self.image.lock();
        let writer = image.disk_mut();
        let mut buffers = Vec::with_capacity(ready.len());
        for (finished, places) in ready {
            for place in places {
                let at = place.reservation.offset;
                writer.commit(place.reservation).map_err(Fault::write(at))?;
            }
            buffers.push(finished.bytes);
        }
        Ok(buffers)
    }

    /// Lets the target share what it can with the source, and writes the rest; `false` if that is not possible here, and all is to be
    /// written.
    ///
    /// What is zero has been found by reading, so that the same image comes out as by copying.
    fn share(&self, platform: &P, ready: &[(Finished, Vec<Place>)]) -> Outcome<bool> {
        let mut requests = Batch::default();
        let mut shared = false;
        for (finished, places) in ready {
            for stretch in stretches(places) {
                let request = stretch.share(&finished.sources);
                shared |= request.is_some();
                requests.push(stretch.offset, request.unwrap_or_else(|| stretch.write(finished)));
            }
        }
        if !shared {
            return Ok(false);
        }
        match requests.submit(platform) {
            Ok(()) => Ok(true),
            Err(fault) if fault.step == Step::Read => {
                self.shares.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(fault) => Err(fault),
        }
    }

    /// Finds the place of each piece, in order.
    fn assign(&self, pieces: &[Piece]) -> Outcome<Vec<Place>> {
        let mut image = self.image.lock();
        let writer = image.disk_mut();
        let mut places = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let located = Fault::write(piece.offset);
            match piece.kind {
                PieceKind::Zeroes => {
                    writer.write_zeroes(piece.offset, piece.len, ZeroMode::Unmap).map_err(&located)?;
                }
                PieceKind::Compressed { at, stored_len } => {
                    let reservation = writer.reserve_compressed(piece.offset, stored_len);
                    let reservation = reservation.map_err(|error| located(told_as_errno(error)))?;
                    places.push(Place { at, reservation });
                }
                PieceKind::Data { mut at } => {
                    let mut offset = piece.offset;
                    let end = piece.offset + piece.len;
                    while offset < end {
                        let reservation = writer.reserve(offset, end - offset).map_err(&located)?;
                        offset += reservation.len;
                        let next = at + reservation.len as usize;
                        places.push(Place { at, reservation });
                        at = next;
                    }
                }
            }
        }
        Ok(places)
    }
}

/// What an image can't do, as the system would say it.
fn told_as_errno(error: instar_blockio::Error) -> instar_blockio::Error {
    const EOPNOTSUPP: i32 = 95;
    match error.kind() {
        ErrorKind::Unsupported => instar_blockio::Error::from_os(EOPNOTSUPP),
        _ => error,
    }
}

/// Appends the stream of a unit, with what the format has around it; tells the length of all that.
fn encode_always(
    encoder: &mut Encoder,
    grain_markers: bool,
    offset: u64,
    input: &[u8],
    out: &mut Vec<u8>,
) -> Result<usize, instar_codec::Error> {
    let start = out.len();
    if !grain_markers {
        return encoder.encode_always(input, out);
    }
    let empty = marker(offset, 0);
    out.extend_from_slice(&empty);
    let len = encoder.encode_always(input, out)?;
    out[start..start + empty.len()].copy_from_slice(&marker(offset, len as u32));
    out.resize(start + (empty.len() + len).next_multiple_of(super::SECTOR as usize), 0);
    Ok(out.len() - start)
}

/// Encrypts the pieces of a buffer for their places.
fn encrypt(cipher: &ContentsCipher, finished: &mut Finished, places: &[Place]) -> Outcome<()> {
    places.iter().try_for_each(|Place { at, reservation }| {
        let bytes = &mut finished.bytes[*at..*at + reservation.len as usize];
        let done = cipher.encrypt(reservation.offset, reservation.host, bytes);
        done.map_err(Fault::write(reservation.offset))
    })
}

/// Where a piece of the buffer goes.
struct Place {
    at: usize,
    reservation: Reservation,
}

/// The chunk is one run of zeroes that the target must be told of.
fn says_zero(chunk: &Chunk, sparse: &Sparse) -> bool {
    chunk.is_zero() && !sparse.allocate_all()
}

fn holds_data(extent: &Extent) -> bool {
    !matches!(extent.kind, ExtentKind::Zero { .. } | ExtentKind::Unallocated)
}

/// Runs of data inside what the source allocates.
fn runs(chunk: &Chunk, sparse: &Sparse, bytes: &[u8]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for span in segments_of(&chunk.extents, holds_data) {
        for run in data_runs(&bytes[span.range()], span.offset, sparse.alignment(), sparse.min_zero()) {
            let kind = PieceKind::Data { at: span.at + run.start };
            pieces.push(Piece { offset: span.offset + run.start as u64, len: run.len() as u64, kind });
        }
    }
    pieces
}

/// The runs of data with the zeroes around them, up to multiples of `grain`, as far as the chunk reaches. A cluster that is only partly
/// there has a hole of the file for each rest, and whoever reads the image must ask for them one by one.
fn filled(runs: Vec<Piece>, chunk: &Chunk, grain: u64) -> Vec<Piece> {
    if grain <= 1 {
        return runs;
    }
    let segments = chunk.segments();
    let mut segments = segments.iter();
    let mut segment = segments.next();
    let mut pieces: Vec<Piece> = Vec::with_capacity(runs.len());
    for run in runs {
        while segment.is_some_and(|segment| segment.offset + segment.len <= run.offset) {
            segment = segments.next();
        }
        let Some(around) = segment else { break };
        let end = (run.offset + run.len).next_multiple_of(grain).min(around.offset + around.len);
        // The run before may have filled the cluster. Runs are not joined: clusters and tables have their places in that order.
        let filled = pieces.last().map_or(0, |last| last.offset + last.len);
        let offset = (run.offset - run.offset % grain).max(around.offset).max(filled);
        if offset < end {
            let kind = PieceKind::Data { at: around.at + (offset - around.offset) as usize };
            pieces.push(Piece { offset, len: end - offset, kind });
        }
    }
    pieces
}

/// Appends a piece, joined with the one before where both are of one kind.
fn push_joined(pieces: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = pieces.last_mut()
        && last.offset + last.len == piece.offset
    {
        match (&last.kind, &piece.kind) {
            (PieceKind::Zeroes, PieceKind::Zeroes) => return last.len += piece.len,
            (PieceKind::Data { at: a }, PieceKind::Data { at: b }) if a + last.len as usize == *b => {
                return last.len += piece.len;
            }
            _ => {}
        }
    }
    pieces.push(piece);
}

/// Bytes that are contiguous in the buffer, in the target's file, and on the disk.
struct Stretch {
    offset: u64,
    at: usize,
    file: FileId,
    host: u64,
    len: u64,
}

/// The stretches of a chunk's places, in order.
fn stretches(places: &[Place]) -> impl Iterator<Item = Stretch> {
    places
        .chunk_by(|a, b| {
            let (before, next) = (&a.reservation, &b.reservation);
            next.file == before.file
                && next.host == before.host + before.stored_len
                && b.at == a.at + before.stored_len as usize
                && next.offset == before.offset + before.len
        })
        .filter_map(|places| {
            let Place { at, reservation: Reservation { offset, file, host, .. } } = *places.first()?;
            let len = places.iter().map(|place| place.reservation.stored_len).sum();
            Some(Stretch { offset, at, file, host, len })
        })
}

impl Stretch {
    fn write<'b>(&self, finished: &'b Finished) -> Io<'b> {
        let buf = &finished.bytes[self.at..self.at + self.len as usize];
        Io::Write { file: self.file, offset: self.host, buf }
    }

    /// If one run of the source holds it, where blocks can be shared.
    fn share<'b>(&self, sources: &[Extent]) -> Option<Io<'b>> {
        let end = self.offset.checked_add(self.len)?;
        let source = sources.iter().find(|source| source.offset <= self.offset && end <= source.end())?;
        let ExtentKind::Data { file, host } = source.kind else { return None };
        let offset = host + (self.offset - source.offset);
        let aligned = [offset, self.host, self.len].iter().all(|place| place.is_multiple_of(SHARED_BLOCK));
        aligned.then_some(Io::Share { from: file, offset, to: self.file, to_offset: self.host, len: self.len })
    }
}
