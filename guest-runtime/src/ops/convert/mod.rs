//! `convert`: sources, read one behind the other, into one target.
//!
//! ```text
//!            Planner (locked)            each vCPU                             target
//!  sources ─► next chunk: its runs ─► raw: copy requests, decode ──────────► same offset
//!                                  └► image: read, decode, find data,  ──► in turn: reserve ─► write ─► commit
//!                                     compress
//! ```
//!
//! All vCPUs do the same: take the next chunk, work on it, bring it to the target. Their requests run on the host while the others
//! compute, so reading, transforming and writing overlap.

mod bitmaps;
pub(in crate::ops) mod fill;
pub(in crate::ops) mod mapped;
mod part;
pub(in crate::ops) mod plan;
mod raw;
mod target;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use instar_blockio::{BlockRead, Concat, Layer};
use instar_codec::Encoder;
use instar_guest_protocol::message::{
    Blocks, Call, Cause, ConvertReply, ConvertRequest, Failure, Progress, Step, call,
};

use self::fill::{Fault, Outcome, Scratch};
use self::part::Part;
use self::plan::{Chunk, Planner};
use self::target::Target;
use crate::chain::open_source;
use crate::formats::TargetImage;
use crate::lock::Lock;
use crate::ops::failure::{block, failure};
use crate::platform::Platform;

/// Disks are whole sectors to qemu-img.
const SECTOR: u64 = 512;
/// Fewer bytes are not moved at once.
const MIN_BLOCK: u64 = 64 << 10;

/// Bytes between two reports of progress that is not shown, but may be asked for by a signal: some 15 ms of work.
const HIDDEN_STEP: u64 = 64 << 20;

/// When zeroes stay unallocated.
#[derive(Clone, Copy, Debug)]
struct Sparse {
    bytes: u64,
}

impl Sparse {
    /// Nothing is left out.
    fn allocate_all(&self) -> bool {
        self.bytes == 0
    }

    /// Blocks in which zeroes are looked for: the largest power of two in the wanted run, at least 4 KiB.
    fn alignment(&self) -> u32 {
        let bytes = self.bytes.clamp(4096, 16 << 20) as u32;
        1 << bytes.ilog2()
    }

    /// Zero runs shorter than this count as data.
    fn min_zero(&self) -> u32 {
        self.bytes.clamp(u64::from(self.alignment()), 16 << 20) as u32
    }
}

/// What was done, for the reply and the progress line.
#[derive(Default)]
struct Counters {
    copied: AtomicU64,
    transformed: AtomicU64,
}

impl Counters {
    fn add_copied(&self, bytes: u64) {
        self.copied.fetch_add(bytes, Ordering::Relaxed);
    }

    fn add_transformed(&self, bytes: u64) {
        self.transformed.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Converts as the request says.
///
/// # Errors
/// What the host makes its message of. The target is then incomplete and, if it was new, without a valid header.
pub fn run<P: Platform>(platform: &P, request: &ConvertRequest) -> Result<ConvertReply, Failure> {
    let source = open_sources(platform, request)?;
    let (source, skipped_all) = match &request.blocks {
        Some(blocks) => part(source, blocks)?,
        None => (join(source)?, false),
    };
    let bitmaps = bitmaps::find(platform, request)?;
    let size = source.size();
    let target = Target::prepare(platform, request, size)?;
    let job = Job::new(platform, request, source, &target);
    job.run()?;
    let counters = job.counters;
    target.finish(platform, bitmaps, request.flush)?;
    Ok(ConvertReply {
        virtual_size: size,
        copied: counters.copied.into_inner(),
        transformed: counters.transformed.into_inner(),
        skipped_all,
    })
}

/// The part that `dd` copies, and whether nothing is left to be copied because too much is skipped. Blocks are counted from the
/// beginning of the disk, those that are skipped included, as qemu-img does.
fn part(mut layers: Vec<Box<dyn Layer>>, blocks: &Blocks) -> Result<(Box<dyn Layer>, bool), Failure> {
    let source = layers.pop().filter(|_| layers.is_empty() && blocks.size > 0);
    let source = source.ok_or_else(|| failure(Step::Open, Cause::BadRequest))?;
    let end = blocks.count.and_then(|count| count.checked_mul(blocks.size)).unwrap_or(u64::MAX).min(source.size());
    let start = blocks.skip.checked_mul(blocks.size).filter(|&start| start <= end);
    let range = start.unwrap_or(end)..end;
    if range == (0..source.size()) {
        return Ok((join(alloc::vec![source])?, start.is_none()));
    }
    let part = Part::new(source, range).map_err(|error| block(Step::Read, None, 0, error))?;
    // Padded to whole sectors.
    Ok((join(alloc::vec![Box::new(part)])?, start.is_none()))
}

/// How much at once, and what is heard of it.
pub(super) struct Pace {
    /// vCPUs to use.
    pub threads: u32,
    /// Send progress.
    pub progress: bool,
    /// Upper bound of bytes per second, 0 for none.
    pub rate_limit: u64,
}

/// Writes what `source` allocates into an image below it, which is complete and durable afterwards. `under` is the disk of that image
/// as it was before, with everything below.
pub(super) fn into_image_below<P: Platform>(
    platform: &P,
    source: Box<dyn Layer>,
    image: TargetImage<P>,
    under: Box<dyn Layer>,
    pace: &Pace,
) -> Result<(), Failure> {
    let request = ConvertRequest {
        sparse_bytes: SECTOR,
        threads: pace.threads,
        progress: pace.progress,
        rate_limit: pace.rate_limit,
        flush: true,
        ..ConvertRequest::default()
    };
    let target = Target::below(image, under);
    Job::new(platform, &request, source, &target).run()?;
    target.finish(platform, None, request.flush)
}

fn open_sources<P: Platform>(platform: &P, request: &ConvertRequest) -> Result<Vec<Box<dyn Layer>>, Failure> {
    // With a backing image on the target, only the source's own layer is copied: the backing answers for the rest.
    let top_only = request.target.backing.is_some();
    if request.sources.is_empty() {
        return Err(failure(Step::Open, Cause::BadRequest));
    }
    request.sources.iter().map(|source| open_source(platform, source, top_only)).collect()
}

fn join(mut layers: Vec<Box<dyn Layer>>) -> Result<Box<dyn Layer>, Failure> {
    match layers.len() {
        // A single source of whole sectors needs no padding.
        1 if layers[0].size().is_multiple_of(SECTOR) => Ok(layers.swap_remove(0)),
        _ => match Concat::new(layers) {
            Ok(concat) => Ok(Box::new(concat)),
            Err(_) => Err(failure(Step::Create, Cause::SizeTooLarge)),
        },
    }
}

fn to_failure(fault: Fault) -> Failure {
    block(fault.step, None, fault.offset, fault.error)
}

/// The work shared by the vCPUs.
struct Job<'a, P: Platform> {
    platform: &'a P,
    planner: Lock<Planner>,
    target: &'a Target<P>,
    sparse: Sparse,
    counters: Counters,
    threads: usize,
    salvage: bool,
    progress: ProgressReport,
    buffers: Lock<Vec<Vec<u8>>>,
    sleepers: AtomicU32,
    failed: AtomicBool,
    failure: Lock<Option<Failure>>,
}

/// When the user hears of progress.
struct ProgressReport {
    total: u64,
    done: AtomicU64,
    told: Lock<u64>,
    /// The host delays the answer to keep a rate.
    paced: bool,
    /// Told each time that so many bytes more are done, and at the end.
    step: u64,
}

impl<'a, P: Platform> Job<'a, P> {
    fn new(platform: &'a P, request: &ConvertRequest, source: Box<dyn Layer>, target: &'a Target<P>) -> Self {
        let sparse = Sparse { bytes: request.sparse_bytes };
        let paced = request.rate_limit > 0;
        let total = source.size();
        // A line that nobody sees is kept up to date at a price that nobody notices.
        let step = if request.progress { total / 100 } else { HIDDEN_STEP.max(total / 100) };
        let progress = ProgressReport { total, done: AtomicU64::new(0), told: Lock::new(0), paced, step };
        let mut rules = target.rules();
        rules.allocate_all |= sparse.allocate_all();
        if let Some(blocks) = &request.blocks {
            // Clusters are taken as by writes of a block each.
            let block = blocks.size.checked_next_power_of_two().unwrap_or(rules.chunk);
            rules.chunk = block.clamp(rules.unit.max(MIN_BLOCK), rules.chunk);
        }
        Self {
            platform,
            planner: Lock::new(Planner::new(source, rules)),
            target,
            sparse,
            counters: Counters::default(),
            threads: platform.vcpus().min(request.threads.max(1) as usize),
            salvage: request.salvage,
            progress,
            buffers: Lock::new(Vec::new()),
            sleepers: AtomicU32::new(0),
            failed: AtomicBool::new(false),
            failure: Lock::new(None),
        }
    }

    fn run(&self) -> Result<(), Failure> {
        self.platform.parallel(self.threads, &|_| {
            if let Err(failure) = self.work() {
                self.failure.lock().get_or_insert(failure);
                self.failed.store(true, Ordering::SeqCst);
                self.platform.wake();
            }
        });
        match self.failure.lock().take() {
            Some(failure) => Err(failure),
            None if self.planner.lock().release() => self.work(),
            None => Ok(()),
        }
    }

    /// What each vCPU does until the disk is done.
    fn work(&self) -> Result<(), Failure> {
        let read = |offset: u64, part: &mut [u8]| self.planner.lock().source().read_at(offset, part);
        let mut scratch = Scratch::with_source(&read);
        let mut encoder = self.target.encoder();
        while let Some(chunk) = self.take_chunk()? {
            self.convert(&chunk, &mut scratch, encoder.as_mut()).map_err(to_failure)?;
            self.report(chunk.len);
        }
        Ok(())
    }

    fn take_chunk(&self) -> Result<Option<Chunk>, Failure> {
        self.wait_for_room();
        if self.failed.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let (chunk, skipped) = {
            let mut planner = self.planner.lock();
            (planner.next(), planner.take_skipped())
        };
        self.report(skipped);
        chunk.map_err(to_failure)
    }

    /// Bounds the chunks that are finished but not yet due.
    fn wait_for_room(&self) {
        let Target::Mapped(mapped) = self.target else { return };
        let window = 2 * self.threads as u64;
        let full = || {
            let next = self.planner.lock().next_seq();
            !self.failed.load(Ordering::SeqCst) && next > mapped.order.lock().turn() + window
        };
        while full() {
            let epoch = self.platform.epoch();
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            if full() {
                self.platform.wait(epoch);
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn convert(&self, chunk: &Chunk, scratch: &mut Scratch<'_>, encoder: Option<&mut Encoder>) -> Outcome<()> {
        let mut buf = self.buffers.lock().pop().unwrap_or_default();
        match self.target {
            Target::Raw(raw, _) => {
                let whole = raw.write_chunk(self.platform, chunk, &self.sparse, &mut buf, scratch, &self.counters);
                if let Err(fault) = whole {
                    self.salvage(fault, chunk, &mut buf, None)?;
                    raw.write_bytes(self.platform, chunk, &self.sparse, &mut buf)?;
                }
                self.buffers.lock().push(buf);
            }
            Target::Mapped(mapped) => {
                if let Err(fault) = mapped.read(self.platform, chunk, &self.sparse, &mut buf, scratch) {
                    mapped.with_backing(|under| self.salvage(fault, chunk, &mut buf, under))?;
                }
                self.counters.add_transformed(chunk.len);
                let finished = mapped.transform(chunk, &self.sparse, buf, encoder)?;
                let freed = mapped.finish(self.platform, chunk.seq, finished)?;
                self.buffers.lock().extend(freed);
                if self.sleepers.load(Ordering::SeqCst) > 0 {
                    self.platform.wake();
                }
            }
        }
        Ok(())
    }

    /// After a read error: what can still be read, if the user wants that; the error otherwise.
    fn salvage(&self, fault: Fault, chunk: &Chunk, buf: &mut Vec<u8>, under: Option<&dyn BlockRead>) -> Outcome<()> {
        if !self.salvage || fault.step != Step::Read {
            return Err(fault);
        }
        buf.resize(chunk.len as usize, 0);
        let planner = self.planner.lock();
        fill::salvage(chunk, buf, planner.source(), under, |offset, error| {
            let kind = call::Kind::Warning(block(Step::Read, None, offset, error));
            self.platform.call(&Call { kind: Some(kind) });
        });
        Ok(())
    }

    fn report(&self, bytes: u64) {
        let report = &self.progress;
        let done = report.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let progress = Progress { done, total: report.total };
        if report.paced && bytes > 0 {
            self.platform.call(&Call { kind: Some(call::Kind::Pace(progress.clone())) });
        }
        let mut told = report.told.lock();
        // The line shows hundredths of a percent; one in a hundred is often enough, as in qemu-img.
        let due = done > *told && (done - *told >= report.step || (done >= report.total && report.step < HIDDEN_STEP));
        if due {
            *told = done;
            self.platform.call(&Call { kind: Some(call::Kind::Progress(progress)) });
        }
    }
}
