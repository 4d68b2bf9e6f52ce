//! `compare`: do two disks read the same?
//!
//! The disks are cut into pieces in order; the vCPUs read and compare them side by side. Pieces in which both are zero are
//! passed over. Of several differences the first on the disk counts.

use alloc::vec::Vec;

use instar_blockio::{Error, Extent, ExtentKind, FileId};
use instar_guest_protocol::message::{Call, CompareReply, CompareRequest, Failure, Progress, Step, call};

use super::status::{Disk, Status};
use super::strict;
use crate::lock::Lock;
use crate::ops::convert::fill::{Batch, Scratch, fill};
use crate::ops::convert::plan::Chunk;
use crate::ops::failure::block;
use crate::platform::{Io, Platform};

/// Bytes of a piece.
const PIECE: u64 = 2 << 20;
/// Parts of one piece at most.
const MAX_PARTS: usize = 24;
/// The unit in which a difference is told.
const SECTOR: usize = 512;
/// Bytes between two reports of progress that is not shown.
const HIDDEN_STEP: u64 = 64 << 20;

/// A difference.
#[derive(Clone, Copy, Debug)]
struct Mismatch {
    offset: u64,
    allocation: bool,
}

/// What went wrong: at which disk offset, with which image.
struct Fault {
    step: Step,
    offset: u64,
    side: usize,
    error: Error,
}

/// Parts of both disks, the same of each.
struct Piece {
    offset: u64,
    len: u64,
    extents: [Vec<Extent>; 2],
}

impl Piece {
    /// Where on the disk the byte at `index` of what was read lies.
    fn disk_offset(&self, index: usize) -> u64 {
        let mut rest = index as u64;
        for extent in &self.extents[0] {
            if rest < extent.len {
                return extent.offset + rest;
            }
            rest -= extent.len;
        }
        self.offset
    }

    /// Without what is zero at the end of both.
    fn trimmed(mut self) -> Self {
        while let ([.., first], [.., second]) = (&*self.extents[0], &*self.extents[1])
            && is_zero_run(first)
            && is_zero_run(second)
        {
            let len = first.len.min(second.len);
            self.len -= len;
            for extents in &mut self.extents {
                if let Some(last) = extents.last_mut() {
                    last.len -= len;
                    if last.len == 0 {
                        extents.pop();
                    }
                }
            }
        }
        self
    }

    fn is_zero(&self) -> bool {
        self.extents.iter().flatten().all(is_zero_run)
    }
}

fn is_zero_run(extent: &Extent) -> bool {
    matches!(extent.kind, ExtentKind::Zero { .. } | ExtentKind::Unallocated)
}

struct Plan<P: Platform> {
    disks: [Disk<P>; 2],
    cursor: u64,
    mismatch: Option<Mismatch>,
    fault: Option<Fault>,
    done: u64,
    told: u64,
}

/// Compares as the request says.
///
/// # Errors
/// An image that can't be opened ([`Step::Open`]), tables ([`Step::Map`]) or contents ([`Step::Read`]) that can't be read:
/// [`Failure::value2`] is then 0 for the first image and 1 for the second.
pub fn run<P: Platform>(platform: &P, request: &CompareRequest) -> Result<CompareReply, Failure> {
    let disks = [Disk::open(platform, &request.first)?, Disk::open(platform, &request.second)?];
    let [first_size, second_size] = [disks[0].size(), disks[1].size()];
    let mut reply = CompareReply { first_size, second_size, ..CompareReply::default() };
    if request.strict && first_size != second_size {
        return Ok(reply);
    }
    let total = first_size.max(second_size);
    // What is allocated is compared first: it costs no look at the contents, and ends the search for differences of these.
    let (mismatch, fault) = match request.strict.then(|| strict::first_difference(&disks)).flatten() {
        None => (None, None),
        Some(Ok(offset)) => (Some(Mismatch { offset, allocation: true }), None),
        Some(Err((side, offset, error))) => (None, Some(Fault { step: Step::Map, offset, side, error })),
    };
    let step = if request.progress { total / 100 } else { HIDDEN_STEP.max(total / 100) };
    let plan = Plan { disks, cursor: 0, mismatch, fault, done: 0, told: 0 };
    let plan = Lock::new(plan);
    let threads = platform.vcpus().min(request.threads.max(1) as usize);
    platform.parallel(threads, &|_| work(platform, &plan, total, step));
    let plan = plan.into_inner();
    // A difference before the fault is the answer all the same.
    if let Some(fault) = plan.fault
        && plan.mismatch.is_none_or(|mismatch| mismatch.offset >= fault.offset)
    {
        let failure = block(fault.step, None, fault.offset, fault.error);
        return Err(Failure { value2: fault.side as u64, ..failure });
    }
    reply.mismatch = plan.mismatch.map(|mismatch| mismatch.offset);
    reply.allocation = plan.mismatch.is_some_and(|mismatch| mismatch.allocation);
    Ok(reply)
}

/// What each vCPU does until the disks are done or differ.
fn work<P: Platform>(platform: &P, plan: &Lock<Plan<P>>, total: u64, step: u64) {
    let first = |offset: u64, buf: &mut [u8]| plan.lock().disks[0].read_at(offset, buf);
    let second = |offset: u64, buf: &mut [u8]| plan.lock().disks[1].read_at(offset, buf);
    let mut scratch = [Scratch::with_source(&first), Scratch::with_source(&second)];
    let mut buffers = [Vec::new(), Vec::new()];
    loop {
        let Some(piece) = plan.lock().next() else { return };
        let found = compare(platform, &piece, &mut scratch, &mut buffers);
        let mut plan = plan.lock();
        match found {
            Ok(None) => {}
            Ok(Some(offset)) => plan.found(Mismatch { offset, allocation: false }),
            Err(fault) => plan.failed(fault),
        }
        if plan.mismatch.is_some() {
            continue;
        }
        plan.done += piece.len;
        let done = plan.done;
        if done > plan.told && (done - plan.told >= step || (done >= total && step < HIDDEN_STEP)) {
            plan.told = done;
            platform.call(&Call { kind: Some(call::Kind::Progress(Progress { done, total })) });
        }
    }
}

impl<P: Platform> Plan<P> {
    /// The next piece in which at least one disk may hold something else than zeroes. Where little lies here and there, several parts
    /// make one piece: they are read in one turn.
    fn next(&mut self) -> Option<Piece> {
        let mut piece: Option<Piece> = None;
        for _ in 0..MAX_PARTS {
            if piece.as_ref().is_some_and(|piece| piece.len >= PIECE / 2) {
                break;
            }
            let Some(more) = self.next_part() else { break };
            match &mut piece {
                None => piece = Some(more),
                Some(piece) => {
                    piece.len += more.len;
                    for (extents, more) in piece.extents.iter_mut().zip(more.extents) {
                        extents.extend(more);
                    }
                }
            }
        }
        piece
    }

    fn next_part(&mut self) -> Option<Piece> {
        loop {
            let end = self.disks[0].size().max(self.disks[1].size());
            let limit = self.mismatch.map_or(end, |mismatch| mismatch.offset).min(self.fault_offset());
            if self.cursor >= limit {
                return None;
            }
            let part = self.gather((self.cursor / PIECE + 1).saturating_mul(PIECE).min(end))?;
            let len = part.len;
            if part.is_zero() {
                self.done += len;
                continue;
            }
            let part = part.trimmed();
            self.done += len - part.len;
            return Some(part);
        }
    }

    fn fault_offset(&self) -> u64 {
        self.fault.as_ref().map_or(u64::MAX, |fault| fault.offset)
    }

    /// The runs of both disks from the cursor to `stop`, or a long run that is zero in both.
    fn gather(&mut self, stop: u64) -> Option<Piece> {
        let start = self.cursor;
        let end = self.disks[0].size().max(self.disks[1].size());
        let mut extents = [Vec::new(), Vec::new()];
        while self.cursor < stop {
            let at = self.cursor;
            // At the beginning of a piece, runs of zeroes are taken as long as they are.
            let room = if at == start { end - at } else { stop - at };
            let mut runs = [None, None];
            for (side, run) in runs.iter_mut().enumerate() {
                match self.status(side, at, room) {
                    Ok(status) => *run = status,
                    Err(error) => {
                        self.failed(Fault { step: Step::Map, offset: at, side, error });
                        return (at > start).then(|| Piece { offset: start, len: at - start, extents });
                    }
                }
            }
            let len = runs.iter().flatten().map(|run| run.len).min().unwrap_or(room);
            let zero = runs.iter().flatten().all(|run| run.zero || matches!(run.kind, ExtentKind::Zero { .. }));
            if zero && at == start && len >= PIECE {
                self.cursor += len;
                for list in &mut extents {
                    list.push(Extent { offset: at, len, depth: 0, kind: ExtentKind::Zero { host: None } });
                }
                break;
            }
            let len = len.min(stop - at);
            for (list, run) in extents.iter_mut().zip(&runs) {
                let kind = run.map_or(ExtentKind::Zero { host: None }, |run| run.kind);
                let extent = Extent { offset: at, len, depth: 0, kind };
                if !list.last_mut().is_some_and(|last: &mut Extent| last.join(&extent)) {
                    list.push(extent);
                }
            }
            self.cursor += len;
        }
        Some(Piece { offset: start, len: self.cursor - start, extents })
    }

    /// What a disk holds; `None` behind its end.
    fn status(&self, side: usize, at: u64, room: u64) -> Result<Option<Status>, Error> {
        let disk = &self.disks[side];
        match disk.size().saturating_sub(at) {
            0 => Ok(None),
            left => disk.status_at(at, room.min(left)).map(Some),
        }
    }

    fn found(&mut self, mismatch: Mismatch) {
        if self.mismatch.is_none_or(|known| mismatch.offset < known.offset) {
            self.mismatch = Some(mismatch);
        }
    }

    fn failed(&mut self, fault: Fault) {
        if fault.offset < self.fault_offset() {
            self.fault = Some(fault);
        }
    }
}

/// Offset of the first sector in which the disks differ.
fn compare<P: Platform>(
    platform: &P,
    piece: &Piece,
    scratch: &mut [Scratch<'_>; 2],
    buffers: &mut [Vec<u8>; 2],
) -> Result<Option<u64>, Fault> {
    if equal_on_host(platform, piece) {
        return Ok(None);
    }
    for (side, (buffer, scratch)) in buffers.iter_mut().zip(scratch).enumerate() {
        buffer.resize(piece.len as usize, 0);
        let extents = piece.extents[side].clone();
        let chunk = Chunk { seq: 0, offset: piece.offset, len: piece.len, extents };
        let filled = fill(platform, &chunk, buffer, scratch, None, |_| true, Batch::default());
        filled.map_err(|fault| Fault { step: Step::Read, offset: fault.offset, side, error: fault.error })?;
    }
    let [first, second] = &*buffers;
    if first == second {
        return Ok(None);
    }
    let sectors = first.chunks(SECTOR).zip(second.chunks(SECTOR));
    let index = sectors.enumerate().find(|(_, (a, b))| a != b).map_or(0, |(index, _)| index);
    Ok(Some(piece.disk_offset(index * SECTOR)))
}

/// A run that lies plain in files of both disks: a place in each.
struct PlainRun {
    places: [(FileId, u64); 2],
    len: u64,
}

/// The runs of a piece, if each lies plain in files of both disks or is zero in both.
fn plain_runs(piece: &Piece) -> Option<Vec<PlainRun>> {
    let mut runs = Vec::new();
    let [mut first, mut second] = [piece.extents[0].iter().copied(), piece.extents[1].iter().copied()];
    let (mut a, mut b) = (first.next(), second.next());
    while let (Some(left), Some(right)) = (a, b) {
        let len = left.len.min(right.len);
        match (left.kind, right.kind) {
            (ExtentKind::Data { file, host }, ExtentKind::Data { file: other, host: other_host }) => {
                runs.push(PlainRun { places: [(file, host), (other, other_host)], len });
            }
            _ if is_zero_run(&left) && is_zero_run(&right) => {}
            _ => return None,
        }
        a = left.clip(left.offset + len, left.len - len).or_else(|| first.next());
        b = right.clip(right.offset + len, right.len - len).or_else(|| second.next());
    }
    Some(runs)
}

/// Whether the host finds both disks equal here. What it can't compare, or finds different, is looked at more closely.
fn equal_on_host<P: Platform>(platform: &P, piece: &Piece) -> bool {
    let Some(runs) = plain_runs(piece) else { return false };
    let mut equal = alloc::vec![true; runs.len()];
    let compare = |(run, equal)| {
        let PlainRun { places: [(file, offset), (other, other_offset)], len } = run;
        Io::Compare { file, offset, other, other_offset, len, equal }
    };
    let mut requests: Vec<Io<'_>> = runs.into_iter().zip(&mut equal).map(compare).collect();
    platform.submit(&mut requests).is_ok() && equal.iter().all(|equal| *equal)
}
