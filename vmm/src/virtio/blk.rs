//! The work behind a request: bounds, rights, system calls.

use std::os::fd::BorrowedFd;

use instar_guest_protocol::ring::{
    HoleRun, RequestFlags, RequestHeader, RequestKind, RequestStatus, STATUS_IO_ERROR, STATUS_OK, STATUS_REFUSED,
    STATUS_TARGET_ERROR,
};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync, seek};
use rustix::io::{Errno, pread, pwrite, retry_on_intr};
use zerocopy::IntoBytes;

use super::copy::Scratch;
use super::device::{Device, DeviceTable, Lacks};
use super::request::{Direction, Request};
use crate::faults::FaultKinds;
use crate::rawio;
use crate::stats::Counters;

/// Why a request was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It breaks the rules.
    Refused,
    /// A system call failed.
    Io(Errno),
    /// A system call on the target of a copy failed.
    Target(Errno),
}

impl Fault {
    /// The same on the target of a copy.
    pub fn on_target(self) -> Self {
        match self {
            Self::Io(errno) => Self::Target(errno),
            other => other,
        }
    }
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self::Io(errno)
    }
}

/// What a request may touch.
pub struct Job<'a> {
    /// The granted files.
    pub devices: &'a DeviceTable,
    /// The buffer of this thread.
    pub scratch: &'a mut Scratch,
}

impl Job<'_> {
    /// Does what `request` asks for, if it may.
    pub fn run(self, mut request: Request<'_>, counters: &Counters) -> RequestStatus {
        let outcome = match RequestKind::try_from(request.header.kind) {
            Err(_) => Err(Fault::Refused),
            Ok(kind) => {
                let bytes = if request.data_len > 0 { request.data_len } else { request.header.len };
                let (devices, header) = (self.devices, request.header);
                let outcome = self.dispatch(kind, &mut request);
                let moved = if outcome.is_ok() { bytes } else { 0 };
                counters.request(kind, moved);
                if let Some(device) = devices.get(header.device) {
                    device.counters.request(kind, moved);
                }
                if kind == RequestKind::Copy
                    && let Some(target) = devices.get(header.target_device)
                {
                    target.counters.copied_to(moved);
                }
                outcome
            }
        };
        match outcome {
            Ok(value) => RequestStatus { status: STATUS_OK, errno: 0, value },
            Err(Fault::Refused) => RequestStatus { status: STATUS_REFUSED, errno: 0, value: 0 },
            Err(Fault::Io(errno)) => failed(STATUS_IO_ERROR, errno),
            Err(Fault::Target(errno)) => failed(STATUS_TARGET_ERROR, errno),
        }
    }

    fn dispatch(self, kind: RequestKind, request: &mut Request<'_>) -> Result<u64, Fault> {
        let flags = RequestFlags::from_bits(request.header.flags).ok_or(Fault::Refused)?;
        let device = self.devices.get(request.header.device).ok_or(Fault::Refused)?;
        // From here on offsets are those of the file.
        request.header.offset = device.in_file(request.header.offset).ok_or(Fault::Refused)?;
        let mut header = request.header;
        let direction = match kind {
            RequestKind::Write => Direction::Out,
            RequestKind::Read | RequestKind::Holes => Direction::In,
            _ => Direction::None,
        };
        // A read or write of nothing has no data descriptors.
        if request.direction != direction && request.data_len != 0 {
            return Err(Fault::Refused);
        }
        let writes = !matches!(
            kind,
            RequestKind::Read | RequestKind::Holes | RequestKind::Copy | RequestKind::Compare | RequestKind::Flush
        );
        if writes && !device.is_writable() {
            return Err(Fault::Refused);
        }
        if let Some(fault) = kind_of_fault(kind) {
            device.pass(fault, header.offset, header.len)?;
        }
        match (kind, device.nbd()) {
            (RequestKind::Holes | RequestKind::Copy | RequestKind::Compare, _) | (_, None) => {}
            (kind, Some(nbd)) => return nbd.serve(kind, request),
        }
        match kind {
            RequestKind::Read => read(device, request),
            RequestKind::Write => write(device, request),
            RequestKind::Flush => Ok(retry_on_intr(|| fdatasync(device.file())).map(|()| 0)?),
            RequestKind::Discard => discard(device, &header),
            RequestKind::WriteZeroes => {
                write_zeroes(device, header.offset, header.len, flags.contains(RequestFlags::UNMAP), self.scratch)
            }
            RequestKind::Holes => holes(device, request),
            RequestKind::Copy => {
                let target = self.devices.get(header.target_device).ok_or(Fault::Refused)?;
                header.target_offset = target.in_file(header.target_offset).ok_or(Fault::Refused)?;
                super::copy::copy(device, target, &header, flags, self.scratch)
            }
            RequestKind::Compare => {
                let other = self.devices.get(header.target_device).ok_or(Fault::Refused)?;
                header.target_offset = other.in_file(header.target_offset).ok_or(Fault::Refused)?;
                other.pass(FaultKinds::READ, header.target_offset, header.len)?;
                super::compare::compare(device, other, &header, self.scratch)
            }
            RequestKind::SetLen => set_len(device, header.offset),
            RequestKind::Allocate => allocate(device, header.offset, header.len, self.scratch),
        }
    }
}

fn failed(status: u32, errno: Errno) -> RequestStatus {
    RequestStatus { status, errno: errno.raw_os_error().unsigned_abs(), value: 0 }
}

/// As what a request on its device may be made to fail.
fn kind_of_fault(kind: RequestKind) -> Option<FaultKinds> {
    Some(match kind {
        RequestKind::Read | RequestKind::Copy | RequestKind::Compare => FaultKinds::READ,
        RequestKind::Write => FaultKinds::WRITE,
        RequestKind::Discard => FaultKinds::DISCARD,
        RequestKind::Flush => FaultKinds::FLUSH,
        // Zeroes are written for copies, too.
        RequestKind::WriteZeroes | RequestKind::Holes | RequestKind::SetLen | RequestKind::Allocate => return None,
    })
}

fn read(device: &Device, request: &mut Request<'_>) -> Result<u64, Fault> {
    let RequestHeader { offset, len, .. } = request.header;
    let end = offset.checked_add(len).ok_or(Fault::Refused)?;
    if len != request.data_len || end > device.len() {
        return Err(Fault::Refused);
    }
    request.data.read_from(device.file(), offset)?;
    Ok(0)
}

fn write(device: &Device, request: &mut Request<'_>) -> Result<u64, Fault> {
    let RequestHeader { offset, len, .. } = request.header;
    if len != request.data_len || !device.may_hold(offset, len) {
        return Err(Fault::Refused);
    }
    if len > 0 {
        device.write_parts(offset, len as usize, |at, count| request.data.write_to(device.file(), at, count))?;
    }
    Ok(0)
}

fn discard(device: &Device, header: &RequestHeader) -> Result<u64, Fault> {
    let &RequestHeader { offset, len, .. } = header;
    let end = offset.checked_add(len).ok_or(Fault::Refused)?;
    if end > device.len() {
        return Err(Fault::Refused);
    }
    if len == 0 {
        return Ok(0);
    }
    // Where space can't be given back it stays taken.
    let given_back = Lacks::try_once(&device.lacks.punch_hole, || match device.is_block_device() {
        true => rawio::block_device_discard(device.file(), offset, len),
        false => punch(device.file(), offset, len),
    });
    Ok(given_back.unwrap_or(Ok(())).map(|()| 0)?)
}

fn punch(file: BorrowedFd<'_>, offset: u64, len: u64) -> rustix::io::Result<()> {
    retry_on_intr(|| fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len))
}

/// Makes a range zero, by the cheapest means that the file offers. A regular file grows.
pub fn write_zeroes(device: &Device, offset: u64, len: u64, unmap: bool, scratch: &mut Scratch) -> Result<u64, Fault> {
    if !device.may_hold(offset, len) {
        return Err(Fault::Refused);
    }
    if len == 0 {
        return Ok(0);
    }
    device.pass(FaultKinds::WRITE_ZEROES, offset, len)?;
    if let Some(nbd) = device.nbd() {
        return Ok(nbd.write_zeroes(offset, len, unmap).map(|()| 0)?);
    }
    let (mut end, old_end) = (offset + len, device.len());
    if unmap && end > old_end {
        // What lies past the end becomes a hole by growing.
        device.set_len(end, true)?;
        end = end.min(old_end);
        if offset >= end {
            return Ok(0);
        }
    }
    let len = end - offset;
    if unmap {
        let punched = Lacks::try_once(&device.lacks.punch_hole, || punch(device.file(), offset, len));
        if let Some(result) = punched {
            return Ok(result.map(|()| 0)?);
        }
    }
    let zeroed = Lacks::try_once(&device.lacks.zero_range, || {
        device.growing(end, || retry_on_intr(|| fallocate(device.file(), FallocateFlags::ZERO_RANGE, offset, len)))
    });
    if let Some(result) = zeroed {
        return Ok(result.map(|()| 0)?);
    }
    if device.grows() {
        // Where that is not known (tmpfs): a hole, and space for it.
        let inside = old_end.min(end).saturating_sub(offset);
        let cleared = match inside {
            0 => Some(Ok(())),
            inside => Lacks::try_once(&device.lacks.punch_hole, || punch(device.file(), offset, inside)),
        };
        if let Some(Ok(())) = cleared {
            match reserve(device, offset, end) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                result => return Ok(result.map(|()| 0)?),
            }
        }
    }
    fill_with_zeroes(device, offset, end, scratch)
}

/// Takes space for `offset` to `end`. What is there stays; the file grows.
fn reserve(device: &Device, offset: u64, end: u64) -> rustix::io::Result<()> {
    let len = end - offset;
    device.growing(end, || retry_on_intr(|| fallocate(device.file(), FallocateFlags::empty(), offset, len)))
}

/// Writes zeroes from `offset` to `end`.
fn fill_with_zeroes(device: &Device, offset: u64, end: u64, scratch: &mut Scratch) -> Result<u64, Fault> {
    let buffer = scratch.zeroes();
    device.growing(end, || {
        let mut at = offset;
        while at < end {
            let count = (end - at).min(buffer.len() as u64) as usize;
            write_all(device.file(), &buffer[..count], at)?;
            at += count as u64;
        }
        Ok(0)
    })
}

/// Fills `bytes` from `offset` on; what lies past the end of the device is zero.
pub fn read_padded(device: &Device, offset: u64, bytes: &mut [u8]) -> rustix::io::Result<()> {
    let have = device.len().saturating_sub(offset).min(bytes.len() as u64) as usize;
    let (data, rest) = bytes.split_at_mut(have);
    read_all(device, offset, data)?;
    rest.fill(0);
    Ok(())
}

/// Fills `bytes` from `offset` on, all of which the device has.
pub fn read_all(device: &Device, offset: u64, bytes: &mut [u8]) -> rustix::io::Result<()> {
    if let Some(nbd) = device.nbd() {
        return nbd.read(offset, bytes);
    }
    let mut done = 0;
    while done < bytes.len() {
        match retry_on_intr(|| pread(device.file(), &mut bytes[done..], offset + done as u64))? {
            // The file shrank under us.
            0 => return Err(Errno::IO),
            count => done += count,
        }
    }
    Ok(())
}

/// Writes all of `bytes`, however many calls it takes.
pub fn write_all(file: BorrowedFd<'_>, mut bytes: &[u8], mut offset: u64) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match retry_on_intr(|| pwrite(file, bytes, offset))? {
            0 => return Err(Errno::IO),
            count => {
                bytes = &bytes[count..];
                offset += count as u64;
            }
        }
    }
    Ok(())
}

fn set_len(device: &Device, len: u64) -> Result<u64, Fault> {
    if !device.grows() || len > i64::MAX as u64 {
        return Err(Fault::Refused);
    }
    device.set_len(len, false)?;
    Ok(0)
}

fn allocate(device: &Device, offset: u64, len: u64, scratch: &mut Scratch) -> Result<u64, Fault> {
    if !device.may_hold(offset, len) {
        return Err(Fault::Refused);
    }
    if len == 0 || !device.grows() {
        return Ok(0);
    }
    let end = offset + len;
    match reserve(device, offset, end) {
        // Only the new part can be allocated by hand without disturbing what is there.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) if end > device.len() => {
            fill_with_zeroes(device, offset.max(device.len()), end, scratch)
        }
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(0),
        result => Ok(result.map(|()| 0)?),
    }
}

/// The kind of what is at an offset of a file, and where it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// First byte behind.
    pub end: u64,
    /// Data, not a hole.
    pub data: bool,
}

/// The run of data or hole at `offset`, which lies before the end of the file. What the host can't tell is data.
fn run_at(device: &Device, offset: u64) -> Result<Run, Errno> {
    let all_data = Run { end: device.len(), data: true };
    let found = Lacks::try_once(&device.lacks.seek_data, || {
        let data = match seek(device.file(), SeekFrom::Data(offset)) {
            Err(Errno::NXIO) => return Ok(Run { end: device.len(), data: false }),
            result => result?,
        };
        if data > offset {
            return Ok(Run { end: data, data: false });
        }
        Ok(Run { end: seek(device.file(), SeekFrom::Hole(offset))?, data: true })
    });
    match found {
        None => Ok(all_data),
        // The file changed in between: what is past its end is data that can't be read.
        Some(Err(Errno::NXIO)) => Ok(all_data),
        // An answer that does not go forward would never end.
        Some(Ok(run)) if run.end <= offset => Ok(all_data),
        Some(result) => result,
    }
}

/// Where data begins at or behind `offset`: the length of the device if there is none, `offset` if that can't be told.
pub fn next_data(device: &Device, offset: u64) -> Result<u64, Errno> {
    match Lacks::try_once(&device.lacks.seek_data, || seek(device.file(), SeekFrom::Data(offset))) {
        None => Ok(offset),
        Some(Err(Errno::NXIO)) => Ok(device.len().max(offset)),
        Some(found) => Ok(found?.max(offset)),
    }
}

fn holes(device: &Device, request: &mut Request<'_>) -> Result<u64, Fault> {
    let RequestHeader { offset, len, .. } = request.header;
    let end = offset.checked_add(len).ok_or(Fault::Refused)?;
    let room = request.data_len / size_of::<HoleRun>() as u64;
    if room == 0 && len != 0 {
        return Err(Fault::Refused);
    }
    let file_end = device.len();
    let (mut at, mut count) = (offset, 0);
    while at < end && count < room {
        // What is past the end counts as a hole.
        let run = if at < file_end { run_at(device, at)? } else { Run { end, data: false } };
        // A hole at the end goes on behind it; data that go on behind it are not the guest's.
        let run_end = if !run.data && run.end >= file_end { end } else { run.end.min(file_end.max(at)).min(end) };
        request.data.put(HoleRun { len: run_end - at, data: u64::from(run.data) }.as_bytes());
        at = run_end;
        count += 1;
    }
    Ok(count)
}
