//! The driver: requests of an operation become requests of the ring.

use core::mem;

use instar_blockio::{Error, ErrorKind, FileId, Result, ZeroMode};
use instar_guest_protocol::limits::{MAX_COPY_BYTES, MAX_REQUEST_BYTES};
use instar_guest_protocol::ring::{
    HoleRun, RequestFlags, RequestHeader, RequestKind, RequestStatus, STATUS_IO_ERROR, STATUS_OK, STATUS_REFUSED,
    STATUS_TARGET_ERROR,
};
use zerocopy::IntoBytes;

use super::queue::{Data, Outcome, Queue};
use crate::files::FileTable;
use crate::platform::{FailedIo, Io};

/// See [`Platform::submit`](crate::platform::Platform::submit).
pub fn submit(queue: &mut Queue, files: &FileTable, batch: &mut [Io<'_>]) -> core::result::Result<(), FailedIo> {
    let mut at = Cursor { index: 0, done: 0 };
    while at.index < batch.len() {
        at = turn(queue, files, batch, at)?;
    }
    Ok(())
}

/// See [`Platform::hole_runs`](crate::platform::Platform::hole_runs).
pub fn hole_runs(queue: &mut Queue, file: FileId, offset: u64, len: u64, runs: &mut [HoleRun]) -> Result<usize> {
    let room = runs.len();
    let mut turn = queue.turn();
    let header = RequestHeader { len, ..header(RequestKind::Holes, file, offset) };
    turn.push(header, Data::Read(runs.as_mut_bytes()), 0);
    let outcome = turn.run().next().ok_or(Error::new(ErrorKind::Io))?;
    result(&outcome.status, offset)?;
    Ok(usize::try_from(outcome.status.value).map_or(room, |count| count.min(room)))
}

/// What comes next: `done` bytes of request `index` are done.
#[derive(Clone, Copy)]
struct Cursor {
    index: usize,
    done: u64,
}

/// Executes as many requests as the queue holds.
fn turn(
    queue: &mut Queue,
    files: &FileTable,
    batch: &mut [Io<'_>],
    from: Cursor,
) -> core::result::Result<Cursor, FailedIo> {
    let mut turn = queue.turn();
    let mut at = from;
    for (index, io) in batch.iter_mut().enumerate().skip(from.index) {
        // The file's length decides about both of these, and an earlier request of the turn may be about to change it.
        if let Err(error) = files.check(io) {
            if turn.is_empty() {
                return Err(FailedIo { index, error, on_target: false });
            }
            break;
        }
        if !turn.is_empty() && reaches_past_end(files, io) {
            break;
        }
        let mut rest = Rest::new(files, io);
        rest.skip(at.done);
        while turn.has_room()
            && let Some((header, data)) = rest.take()
        {
            at.done += header.len;
            turn.push(header, data, index);
        }
        if !rest.is_empty() {
            break;
        }
        at = Cursor { index: index + 1, done: 0 };
    }
    let mut failed: Option<FailedIo> = None;
    let mut noted = from.index;
    for outcome in turn.run() {
        match result(&outcome.status, outcome.offset) {
            // What came before, and was not part of a failure.
            Ok(()) => {
                note_difference(batch, &outcome);
                batch[noted..outcome.tags.end.min(at.index).max(noted)].iter().for_each(|io| files.done(io));
            }
            Err(error) if failed.is_none() => {
                let on_target = outcome.status.status == STATUS_TARGET_ERROR;
                failed = Some(FailedIo { index: outcome.tags.start, error, on_target });
            }
            Err(_) => {}
        }
        noted = noted.max(outcome.tags.end.min(at.index));
    }
    failed.map_or(Ok(at), Err)
}

/// Takes over that a comparison, or a piece of one, found a difference.
fn note_difference(batch: &mut [Io<'_>], outcome: &Outcome) {
    if let Some(Io::Compare { equal, .. }) = batch.get_mut(outcome.tags.start) {
        **equal &= outcome.status.value >= outcome.len;
    }
}

/// A read that the end of the file cuts short.
fn reaches_past_end(files: &FileTable, io: &Io<'_>) -> bool {
    match io {
        Io::Read { file, offset, buf } => {
            files.get(*file).is_some_and(|state| state.inside(*offset, buf.len()) < buf.len())
        }
        _ => false,
    }
}

/// What is left of a request: pieces within the limits of the ring.
struct Rest<'b> {
    header: RequestHeader,
    data: Data<'b>,
    left: u64,
    /// Bytes of one piece.
    limit: u64,
    /// Has no length, and is due.
    due: bool,
}

impl<'b> Rest<'b> {
    fn new(files: &FileTable, io: &'b mut Io<'_>) -> Self {
        match io {
            Io::Read { file, offset, buf } => {
                let inside = files.get(*file).map_or(0, |state| state.inside(*offset, buf.len()));
                let (inside, behind) = buf.split_at_mut(inside);
                behind.fill(0);
                let left = inside.len() as u64;
                Self::range(header(RequestKind::Read, *file, *offset), Data::Read(inside), left, MAX_REQUEST_BYTES)
            }
            Io::Write { file, offset, buf } => {
                let header = header(RequestKind::Write, *file, *offset);
                Self::range(header, Data::Write(buf), buf.len() as u64, MAX_REQUEST_BYTES)
            }
            Io::Copy { from, offset, to, to_offset, len, skip_zero } => {
                let flags = if skip_zero.is_some() { RequestFlags::SKIP_ZERO } else { RequestFlags::empty() };
                let header = RequestHeader {
                    target_device: to.0,
                    target_offset: *to_offset,
                    granularity: skip_zero.unwrap_or(0),
                    flags: flags.bits(),
                    ..header(RequestKind::Copy, *from, *offset)
                };
                // A multiple of every granularity, so that the blocks of all pieces count from `offset`.
                Self::range(header, Data::Write(&[]), *len, MAX_COPY_BYTES)
            }
            Io::Share { from, offset, to, to_offset, len } => {
                let header = RequestHeader {
                    target_device: to.0,
                    target_offset: *to_offset,
                    flags: RequestFlags::ONLY_SHARE.bits(),
                    ..header(RequestKind::Copy, *from, *offset)
                };
                Self::range(header, Data::Write(&[]), *len, MAX_COPY_BYTES)
            }
            Io::Compare { file, offset, other, other_offset, len, .. } => {
                let header = RequestHeader {
                    target_device: other.0,
                    target_offset: *other_offset,
                    ..header(RequestKind::Compare, *file, *offset)
                };
                Self::range(header, Data::Write(&[]), *len, MAX_COPY_BYTES)
            }
            Io::WriteZeroes { file, offset, len, mode } => {
                let flags = if *mode == ZeroMode::Unmap { RequestFlags::UNMAP } else { RequestFlags::empty() };
                let header = RequestHeader { flags: flags.bits(), ..header(RequestKind::WriteZeroes, *file, *offset) };
                Self::range(header, Data::Write(&[]), *len, u64::MAX)
            }
            Io::Discard { file, offset, len } => {
                Self::range(header(RequestKind::Discard, *file, *offset), Data::Write(&[]), *len, u64::MAX)
            }
            Io::Allocate { file, offset, len } => {
                Self::range(header(RequestKind::Allocate, *file, *offset), Data::Write(&[]), *len, u64::MAX)
            }
            Io::SetLen { file, len } => Self::once(header(RequestKind::SetLen, *file, *len)),
            Io::Flush { file } => Self::once(header(RequestKind::Flush, *file, 0)),
        }
    }

    fn range(header: RequestHeader, data: Data<'b>, left: u64, limit: u64) -> Self {
        Self { header, data, left, limit, due: false }
    }

    fn once(header: RequestHeader) -> Self {
        Self { header, data: Data::Write(&[]), left: 0, limit: u64::MAX, due: true }
    }

    fn is_empty(&self) -> bool {
        self.left == 0 && !self.due
    }

    /// The next piece.
    fn take(&mut self) -> Option<(RequestHeader, Data<'b>)> {
        if self.is_empty() {
            return None;
        }
        let len = self.left.min(self.limit);
        let header = RequestHeader { len, ..self.header };
        self.due = false;
        Some((header, self.split_off(len)))
    }

    /// Leaves out what is done.
    fn skip(&mut self, done: u64) {
        self.split_off(done.min(self.left));
    }

    /// Takes the first `len` bytes, of those that are left, off. (No overflow: `check` has seen the whole range.)
    fn split_off(&mut self, len: u64) -> Data<'b> {
        self.left -= len;
        self.header.offset += len;
        self.header.target_offset += len;
        match &mut self.data {
            Data::Read(buf) => {
                let (head, tail) = mem::take(buf).split_at_mut(len as usize);
                *buf = tail;
                Data::Read(head)
            }
            Data::Write([]) => Data::Write(&[]),
            Data::Write(buf) => {
                let (head, tail) = buf.split_at(len as usize);
                *buf = tail;
                Data::Write(head)
            }
        }
    }
}

fn header(kind: RequestKind, file: FileId, offset: u64) -> RequestHeader {
    RequestHeader { kind: kind as u32, device: file.0, offset, ..RequestHeader::default() }
}

fn result(status: &RequestStatus, offset: u64) -> Result<()> {
    match (status.status, i32::try_from(status.errno)) {
        (STATUS_OK, _) => Ok(()),
        (STATUS_IO_ERROR | STATUS_REFUSED | STATUS_TARGET_ERROR, Ok(errno @ 1..)) => {
            Err(Error::from_os(errno).at(offset))
        }
        // It was checked here by the same rules, so the file has become shorter behind our back.
        (STATUS_REFUSED, _) => Err(Error::new(ErrorKind::OutOfBounds).at(offset)),
        _ => Err(Error::new(ErrorKind::Io).at(offset)),
    }
}
