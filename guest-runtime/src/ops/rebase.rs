//! `rebase`: another backing image for the same contents.
//!
//! ```text
//!            Planner (locked)                              each vCPU                     image
//!  image ──► runs that it leaves to its backing image ─┐
//!  old   ──► what they hold there ─────────────────────┼─► read both, compare units ──► in turn: reserve ─► write ─► commit
//!  new   ──► what they hold here ──────────────────────┘
//! ```
//!
//! What differs is copied into the image first, and then the image names its new backing file: its contents are the same at every
//! moment. Runs that lie in one place of one file for both, or are zero for both, need no look.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use instar_blockio::{Extent, ExtentKind, FileId, Layer, is_zero};
use instar_codec::Encoder;
use instar_guest_protocol::message::{
    Call, Cause, EditReply, Failure, FileRole, Format, OpenFile, Progress, RebaseRequest, Source, Step, call,
};

use crate::chain::{Opening, open_below, open_source};
use crate::formats::{
    ImageWriter, MappedImage, OpenImage, TargetImage, open_in_place, open_metadata_in_place, open_named,
};
use crate::lock::Lock;
use crate::ops::convert::fill::{Batch, Fault, Outcome, Scratch, fill};
use crate::ops::convert::mapped::{Finished, MappedTarget, Piece, PieceKind};
use crate::ops::convert::plan::Chunk;
use crate::ops::failure::{about, block, failure};
use crate::platform::Platform;

/// Bytes that are compared at once, those of qemu-img's requests.
const CHUNK: u64 = 2 << 20;

/// Does as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &RebaseRequest) -> Result<EditReply, Failure> {
    let mut image = open_named(platform, &request.image)?;
    let format = image.format();
    let of_format = |failure: Failure| Failure { format: format.into(), ..failure };
    let is_qcow2 = image.as_qcow2().is_some();
    if request.compress && !is_qcow2 {
        return Err(of_format(failure(Step::Edit, Cause::CompressionUnsupported)));
    }
    image.open_parts(platform)?;
    let unsupported = || of_format(failure(Step::Edit, Cause::BackingUnsupported));
    if format == Format::Parallels {
        return Err(unsupported());
    }
    let backings = match request.only_name {
        true => None,
        false => Some(Backings::open(platform, request, &*image).map_err(|failure| match failure.cause() {
            // Nothing else is told of the format.
            Cause::OpenRefused => of_format(failure),
            _ => failure,
        })?),
    };
    drop(image);
    let nameless = !request.name.is_empty() && request.format_name.is_empty();
    let format_missing = || of_format(failure(Step::Edit, Cause::BackingFormatMissing));
    let target = match format {
        Format::Qcow2 if request.only_name => open_metadata_in_place(platform, request.image.device, request.flush)?,
        Format::Qcow2 | Format::Qed => open_in_place(platform, request.image.device, format, &[], request.flush)?,
        // qemu-img finds out once it has copied everything.
        _ if nameless => return Err(format_missing()),
        _ => return Err(unsupported()),
    };
    let TargetImage::Mapped(mut target) = target else { return Err(unsupported()) };
    if let Some(backings) = backings {
        if backings.new.is_some() {
            target.expect_backing();
        }
        target = copy(platform, request, target, backings).map_err(of_format)?;
    }
    if nameless {
        return Err(format_missing());
    }
    let format_name: &[u8] = if request.name.is_empty() { &[] } else { &request.format_name };
    target.set_backing(&request.name, format_name).unwrap_or_else(|| Err(unsupported())).map_err(of_format)?;
    target.finish()?;
    Ok(EditReply { format: format.into(), ..EditReply::default() })
}

/// The two disks that are compared.
struct Backings {
    old: Option<Box<dyn Layer>>,
    new: Option<Box<dyn Layer>>,
}

impl Backings {
    fn open<P: Platform>(platform: &P, request: &RebaseRequest, image: &dyn OpenImage<P>) -> Result<Self, Failure> {
        let old = open_below(platform, request.image.device, image, &Opening::of(&request.image, true))?;
        if request.name.is_empty() {
            return Ok(Self { old, new: None });
        }
        let answer = platform.open(OpenFile {
            role: FileRole::NewBacking.into(),
            referrer: request.image.device,
            name: request.name.clone(),
            size: 0,
            writable: false,
            format: request.format,
        });
        if !answer.granted {
            return Err(about(Step::Open, FileId(request.image.device), Cause::OpenRefused));
        }
        let below = request.new_below.clone();
        let source = Source { device: answer.device, format: request.format, below, ..request.image.clone() };
        Ok(Self { old, new: Some(open_source(platform, &source, false)?) })
    }
}

/// Copies what the image must hold itself from now on.
fn copy<P: Platform>(
    platform: &P,
    request: &RebaseRequest,
    image: Box<dyn MappedImage<P>>,
    backings: Backings,
) -> Result<Box<dyn MappedImage<P>>, Failure> {
    let compression = image.compression().filter(|_| request.compress);
    let size = image.disk().size();
    let unit = compression.map_or(image.disk().alloc_unit(), |compression| compression.unit);
    let old_size = backings.old.as_ref().map_or(0, |old| old.size());
    let cipher = image.contents_cipher().cloned();
    let target = MappedTarget {
        cipher,
        image: Lock::new(image),
        backing: None,
        existing: true,
        zero_init: false,
        unit,
        grain: 1,
        zero_by_tables: false,
        compress: compression,
        order: Lock::default(),
        shares: AtomicBool::new(false),
    };
    let job = Job {
        platform,
        planner: Lock::new(Planner { backings, unit, cursor: 0, end: size, seq: 0 }),
        target: &target,
        unit,
        old_size,
        threads: platform.vcpus().min(request.threads.max(1) as usize),
        progress: request.progress,
        total: size,
        told: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        failure: Lock::new(None),
    };
    job.run()?;
    Ok(target.image.into_inner())
}

/// Finds the runs that must be compared, in the order of the disk.
struct Planner {
    backings: Backings,
    unit: u64,
    cursor: u64,
    end: u64,
    seq: u64,
}

/// A run that must be compared.
struct Work {
    /// What the old backing image holds.
    old: Chunk,
    /// What the new one holds.
    new: Chunk,
    /// Units may be stored compressed.
    whole_units: bool,
}

impl Planner {
    fn next(&mut self, image: &dyn ImageWriter) -> Outcome<Option<Work>> {
        while self.cursor < self.end {
            let own = image.extent_at(self.cursor, self.end - self.cursor).map_err(metadata(self.cursor))?;
            if own.kind != ExtentKind::Unallocated {
                self.cursor = own.end();
                continue;
            }
            let old = answer(&self.backings.old, self.cursor, own.len).map_err(old_side(self.cursor))?;
            let new = answer(&self.backings.new, self.cursor, own.len).map_err(new_side(self.cursor))?;
            if agree(&old, &new) {
                self.cursor += old.len.min(new.len);
                continue;
            }
            return self.gather(image).map(Some);
        }
        Ok(None)
    }

    /// A chunk from the unit of the cursor on, of what the image leaves to its backing image.
    fn gather(&mut self, image: &dyn ImageWriter) -> Outcome<Work> {
        let alloc_unit = image.alloc_unit();
        let first = self.cursor - self.cursor % self.unit;
        let inner = self.cursor - self.cursor % alloc_unit;
        let found = image.extent_at(first, self.end - first).map_err(metadata(first))?;
        let own_end = if found.kind == ExtentKind::Unallocated { found.end() } else { first };
        let last = if own_end == self.end { self.end } else { own_end - own_end % self.unit };
        // Of a unit that is partly there already, the rest can't be stored compressed.
        let whole_units = last > self.cursor;
        let (start, limit) = if whole_units {
            (first, last)
        } else {
            let own = image.extent_at(inner, self.end - inner).map_err(metadata(inner))?;
            (inner, own.end().min(first.saturating_add(self.unit)))
        };
        let stop = limit.min(start.saturating_add(CHUNK.max(self.unit)));
        let gather = |layer: &Option<Box<dyn Layer>>| {
            let mut extents: Vec<Extent> = Vec::new();
            let mut at = start;
            while at < stop {
                let extent = answer(layer, at, stop - at)?;
                at = extent.end();
                if !extents.last_mut().is_some_and(|last| last.join(&extent)) {
                    extents.push(extent);
                }
            }
            Ok(Chunk { seq: self.seq, offset: start, len: stop - start, extents })
        };
        let old = gather(&self.backings.old).map_err(old_side(start))?;
        let new = gather(&self.backings.new).map_err(new_side(start))?;
        self.cursor = stop;
        self.seq += 1;
        Ok(Work { old, new, whole_units })
    }
}

/// What a disk holds at `offset`; zero behind its end, and where there is none.
fn answer(layer: &Option<Box<dyn Layer>>, offset: u64, max_len: u64) -> instar_blockio::Result<Extent> {
    let zero = Extent { offset, len: max_len, depth: 0, kind: ExtentKind::Zero { host: None } };
    match layer {
        Some(layer) if offset < layer.size() => {
            let extent = layer.extent_at(offset, max_len.min(layer.size() - offset))?;
            // Two chains may differ in how they come to zeroes.
            Ok(Extent { depth: 0, kind: if is_zero_run(&extent) { zero.kind } else { extent.kind }, ..extent })
        }
        _ => Ok(zero),
    }
}

fn is_zero_run(extent: &Extent) -> bool {
    matches!(extent.kind, ExtentKind::Zero { .. } | ExtentKind::Unallocated)
}

/// Both read the same bytes for sure, as far as both reach.
fn agree(old: &Extent, new: &Extent) -> bool {
    old.kind == new.kind
}

fn metadata(offset: u64) -> impl Fn(instar_blockio::Error) -> Fault {
    move |error| Fault { step: Step::ReadMetadata, offset, error }
}

fn old_side(offset: u64) -> impl Fn(instar_blockio::Error) -> Fault {
    move |error| Fault { step: Step::ReadOld, offset, error }
}

fn new_side(offset: u64) -> impl Fn(instar_blockio::Error) -> Fault {
    move |error| Fault { step: Step::ReadNew, offset, error }
}

/// The work shared by the vCPUs.
struct Job<'a, P: Platform> {
    platform: &'a P,
    planner: Lock<Planner>,
    target: &'a MappedTarget<P>,
    unit: u64,
    old_size: u64,
    threads: usize,
    progress: bool,
    total: u64,
    told: AtomicU64,
    failed: AtomicBool,
    failure: Lock<Option<Failure>>,
}

impl<P: Platform> Job<'_, P> {
    fn run(&self) -> Result<(), Failure> {
        self.platform.parallel(self.threads, &|_| {
            if let Err(fault) = self.work() {
                self.failure.lock().get_or_insert(block(fault.step, None, fault.offset, fault.error));
                self.failed.store(true, Ordering::SeqCst);
                self.platform.wake();
            }
        });
        match self.failure.lock().take() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    fn work(&self) -> Outcome<()> {
        let mut scratch = Scratch::default();
        let mut encoder = self.target.compress.map(|compression| Encoder::new(compression.codec));
        let (mut old, mut new) = (Vec::new(), Vec::new());
        while let Some((work, cursor)) = self.take()? {
            self.read(&work.old, &mut old, &mut scratch).map_err(|fault| as_read(fault, Step::ReadOld))?;
            let none = work.new.extents.iter().all(is_zero_run);
            new.clear();
            if !none {
                self.read(&work.new, &mut new, &mut scratch).map_err(|fault| as_read(fault, Step::ReadNew))?;
            }
            let encoder = encoder.as_mut().filter(|_| work.whole_units);
            let finished = self.compare(&work.old, &mut old, &new, encoder)?;
            let freed = self.target.finish(self.platform, work.old.seq, finished)?;
            if let Some(buffer) = freed.into_iter().next() {
                old = buffer;
            }
            self.platform.wake();
            self.report(cursor);
        }
        Ok(())
    }

    /// The next run, and how far the disk is planned then.
    fn take(&self) -> Outcome<Option<(Work, u64)>> {
        self.wait_for_room();
        if self.failed.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let mut planner = self.planner.lock();
        let image = self.target.image.lock();
        let work = planner.next(image.disk())?;
        Ok(work.map(|work| (work, planner.cursor)))
    }

    /// Bounds the chunks that are finished but not yet due.
    fn wait_for_room(&self) {
        let window = 2 * self.threads as u64;
        loop {
            let epoch = self.platform.epoch();
            let next = self.planner.lock().seq;
            if self.failed.load(Ordering::SeqCst) || next <= self.target.order.lock().turn() + window {
                return;
            }
            self.platform.wait(epoch);
        }
    }

    fn read(&self, chunk: &Chunk, buf: &mut Vec<u8>, scratch: &mut Scratch) -> Outcome<()> {
        buf.resize(chunk.len as usize, 0);
        fill(self.platform, chunk, buf, scratch, None, |_| true, Batch::default())
    }

    /// What must be written: runs of units that differ. Without `new`, the new backing image reads as zero.
    fn compare(
        &self,
        chunk: &Chunk,
        old: &mut Vec<u8>,
        new: &[u8],
        encoder: Option<&mut Encoder>,
    ) -> Outcome<Finished> {
        let unit = self.unit.min(chunk.len).max(1) as usize;
        let differs = |at: usize| {
            let unit = &old[at..old.len().min(at + unit)];
            match new.get(at..at + unit.len()) {
                Some(new) => unit != new,
                None => !is_zero(unit),
            }
        };
        let mut pieces = Vec::new();
        // Behind the end of the old backing image qemu-img writes zeroes, once it has come so far.
        let mut behind = chunk.offset >= self.old_size;
        let mut at = 0;
        while at < old.len() {
            let start = at;
            let found = differs(at);
            while at < old.len() && differs(at) == found {
                at = old.len().min(at + unit);
            }
            let offset = chunk.offset + start as u64;
            if found {
                let kind = if behind { PieceKind::Zeroes } else { PieceKind::Data { at: start } };
                pieces.push(Piece { offset, len: (at - start) as u64, kind });
            }
            behind |= chunk.offset + at as u64 >= self.old_size;
        }
        let bytes = core::mem::take(old);
        match encoder {
            Some(encoder) => self.compress(pieces, &bytes, encoder),
            None => Ok(Finished { bytes, sources: Vec::new(), pieces }),
        }
    }

    /// Compresses unit by unit; what does not shrink stays plain.
    fn compress(&self, pieces: Vec<Piece>, plain: &[u8], encoder: &mut Encoder) -> Outcome<Finished> {
        let mut bytes = Vec::new();
        let mut out = Vec::new();
        for piece in pieces {
            let PieceKind::Data { at } = piece.kind else {
                out.push(piece);
                continue;
            };
            for (index, input) in plain[at..at + piece.len as usize].chunks(self.unit as usize).enumerate() {
                let offset = piece.offset + index as u64 * self.unit;
                let mut padded = Vec::new();
                let whole = match input.len() as u64 == self.unit {
                    true => input,
                    false => {
                        // The disk ends inside the unit.
                        padded.extend_from_slice(input);
                        padded.resize(self.unit as usize, 0);
                        &padded
                    }
                };
                let at = bytes.len();
                let encoded = encoder.encode(whole, &mut bytes);
                let kind =
                    match encoded.map_err(|_| Fault::write(offset)(instar_blockio::ErrorKind::OutOfMemory.into()))? {
                        Some(stored) => PieceKind::Compressed { at, stored_len: stored as u32 },
                        None => {
                            bytes.truncate(at);
                            bytes.extend_from_slice(input);
                            PieceKind::Data { at }
                        }
                    };
                out.push(Piece { offset, len: input.len() as u64, kind });
            }
        }
        Ok(Finished { bytes, sources: Vec::new(), pieces: out })
    }

    fn report(&self, done: u64) {
        if self.progress && self.told.fetch_max(done, Ordering::SeqCst) < done {
            let progress = Progress { done, total: self.total };
            self.platform.call(&Call { kind: Some(call::Kind::Progress(progress)) });
        }
    }
}

fn as_read(fault: Fault, step: Step) -> Fault {
    Fault { step, ..fault }
}
