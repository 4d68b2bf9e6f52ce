//! Bulk copies between granted files, without the guest's memory.

use std::ops::Range;

use instar_guest_protocol::limits::MAX_COPY_BYTES;
use instar_guest_protocol::ring::{RequestFlags, RequestHeader};
use rustix::fs::copy_file_range;
use rustix::io::{Errno, retry_on_intr};

use super::blk::{Fault, next_data, read_all, write_all, write_zeroes};
use super::device::{Device, Lacks};
use crate::faults::FaultKinds;
use crate::rawio::clone_range;

/// Bytes moved by one pair of system calls: large enough to make the cost of handing the file on to the next writer vanish, small enough
/// to stay in the processor's cache between reading, looking for zeroes and writing.
const CHUNK: usize = 1 << 20;
/// Bytes of a page.
const PAGE: usize = 4096;
/// Alignment that reflinks ask for.
const CLONE_ALIGNMENT: u64 = 4096;
/// Smallest and largest block of [`RequestFlags::SKIP_ZERO`].
const GRANULARITY: std::ops::RangeInclusive<u64> = 512..=16 << 20;

/// The buffer of one thread, made when it is first needed.
#[derive(Debug, Default)]
pub struct Scratch {
    buffer: Vec<u8>,
}

impl Scratch {
    /// The buffer. It begins on a page: the processor copies much more slowly to places that lie askew to those they come from.
    pub fn chunk(&mut self) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = vec![0; CHUNK + PAGE];
        }
        let skip = self.buffer.as_ptr().align_offset(PAGE).min(PAGE);
        &mut self.buffer[skip..skip + CHUNK]
    }

    /// A buffer full of zeroes.
    pub fn zeroes(&mut self) -> &[u8] {
        let chunk = self.chunk();
        chunk.fill(0);
        chunk
    }
}

/// A copy with checked ranges.
struct Plan<'a> {
    source: &'a Device,
    target: &'a Device,
    offset: u64,
    target_offset: u64,
}

/// Copies as `header` says; returns the bytes that were written.
pub fn copy(
    source: &Device,
    target: &Device,
    header: &RequestHeader,
    flags: RequestFlags,
    scratch: &mut Scratch,
) -> Result<u64, Fault> {
    let &RequestHeader { offset, len, target_offset, .. } = header;
    let end = offset.checked_add(len).ok_or(Fault::Refused)?;
    let overlap = std::ptr::eq(source, target) && offset < target_offset.saturating_add(len) && target_offset < end;
    if !target.is_writable() || len > MAX_COPY_BYTES || overlap || !target.may_hold(target_offset, len) {
        return Err(Fault::Refused);
    }
    let plan = Plan { source, target, offset, target_offset };
    if flags.contains(RequestFlags::SKIP_ZERO) {
        let block = u64::from(header.granularity);
        if !block.is_power_of_two() || !GRANULARITY.contains(&block) {
            return Err(Fault::Refused);
        }
        return plan.copy_nonzero(len, block, scratch);
    }
    if flags.contains(RequestFlags::ONLY_SHARE) {
        return match plan.share(0..len)? == (0..len) {
            true => Ok(len),
            false => Err(Fault::Io(Errno::OPNOTSUPP)),
        };
    }
    // What lies past the end of the source counts as zero.
    let present = end.min(source.len()).saturating_sub(offset);
    plan.copy_all(present, scratch)?;
    if present < len {
        write_zeroes(target, target_offset + present, len - present, false, scratch).map_err(Fault::on_target)?;
    }
    Ok(len)
}

impl Plan<'_> {
    /// Copies the first `len` bytes, all of which the source has.
    fn copy_all(&self, len: u64, scratch: &mut Scratch) -> Result<(), Fault> {
        let mut done = self.share(0..len)?.end;
        done = self.copy_in_kernel(done, len)?;
        while done < len {
            let count = (len - done).min(CHUNK as u64) as usize;
            let chunk = &mut scratch.chunk()[..count];
            self.read(done, chunk)?;
            self.write(done, chunk)?;
            done += count as u64;
        }
        Ok(())
    }

    /// Lets the files share the aligned blocks of `range` from its start on. Returns what was done; empty if it can't be.
    fn share(&self, range: Range<u64>) -> Result<Range<u64>, Fault> {
        let none = range.start..range.start;
        let (from, to) = (self.offset + range.start, self.target_offset + range.start);
        let len = (range.end - range.start) / CLONE_ALIGNMENT * CLONE_ALIGNMENT;
        if len == 0
            || from.checked_add(len).is_none_or(|end| end > self.source.len())
            || !from.is_multiple_of(CLONE_ALIGNMENT)
            || !to.is_multiple_of(CLONE_ALIGNMENT)
            || self.has_block_device()
            || self.target.has_faults()
        {
            return Ok(none);
        }
        let shared = Lacks::try_once(&self.target.lacks.clone_range, || {
            self.target.growing(to + len, || {
                retry_on_intr(|| clone_range(self.source.file(), from, len, self.target.file(), to))
            })
        });
        match shared {
            None => Ok(none),
            Some(result) => Ok(result.map(|()| range.start..range.start + len).map_err(of_either)?),
        }
    }

    /// Copies from `done` on with `copy_file_range`, as far as it goes.
    fn copy_in_kernel(&self, mut done: u64, len: u64) -> Result<u64, Fault> {
        if self.has_block_device() || self.target.has_faults() {
            return Ok(done);
        }
        let _guard = self.target.extension(self.target_offset + len);
        while done < len {
            let (mut from, mut to) = (self.offset + done, self.target_offset + done);
            let count = usize::try_from(len - done).map_err(|_| Fault::Refused)?;
            let copied = Lacks::try_once(&self.target.lacks.copy_range, || {
                retry_on_intr(|| {
                    copy_file_range(self.source.file(), Some(&mut from), self.target.file(), Some(&mut to), count)
                })
            });
            match copied {
                // Not possible, or some file systems' way to say so.
                None | Some(Ok(0)) => break,
                Some(count) => done += count.map_err(of_either)? as u64,
            }
            self.target.has_grown_to(self.target_offset + done);
        }
        Ok(done)
    }

    fn has_block_device(&self) -> bool {
        self.source.is_block_device() || self.target.is_block_device()
    }

    /// Copies blocks that are not all zero.
    ///
    /// Whether the source has holes is asked only where a whole chunk was zero: the question can cost more than reading
    /// (a file system in memory looks at every page), and data answers it with no.
    fn copy_nonzero(&self, len: u64, block: u64, scratch: &mut Scratch) -> Result<u64, Fault> {
        // Past the end of the source everything is zero; the block across it is judged whole.
        let present = self.source.len().saturating_sub(self.offset).min(len);
        // Sharing costs no space, so zeroes need not be left out.
        let shared = self.share(0..present)?;
        let mut written = shared.end - shared.start;
        // Goes on at a block boundary; what was shared of that block is copied again.
        let mut at = shared.end / block * block;
        while at < present {
            let end = at.saturating_add(block.max(CHUNK as u64)).min(present).next_multiple_of(block).min(len);
            let copied = self.copy_blocks(at..end, present, block, scratch)?;
            written += copied;
            at = if copied == 0 { self.behind_hole(end, present, block)? } else { end };
        }
        Ok(written)
    }

    /// The first block at or behind `at` that does not lie in a hole of the source as a whole.
    fn behind_hole(&self, at: u64, present: u64, block: u64) -> Result<u64, Fault> {
        if at >= present {
            return Ok(at);
        }
        let data = next_data(self.source, self.offset + at)?.saturating_sub(self.offset);
        Ok(if data >= present { present } else { at.max(data / block * block) })
    }

    /// Copies the blocks of `range` that are not all zero.
    fn copy_blocks(&self, range: Range<u64>, present: u64, block: u64, scratch: &mut Scratch) -> Result<u64, Fault> {
        if block > CHUNK as u64 {
            return self.copy_large_block(range, present, scratch);
        }
        let chunk = &mut scratch.chunk()[..(range.end - range.start) as usize];
        self.read_padded(range.start, present, chunk)?;
        self.write_blocks(range.start, chunk, block as usize)
    }

    /// Writes the blocks of `chunk` that are not all zero, neighbours together.
    fn write_blocks(&self, at: u64, chunk: &[u8], block: usize) -> Result<u64, Fault> {
        let mut written = 0;
        let mut start = 0;
        while start < chunk.len() {
            let mut end = start;
            while end < chunk.len() {
                let next = (end + block).min(chunk.len());
                if is_zero(&chunk[end..next]) {
                    break;
                }
                end = next;
            }
            if end > start {
                self.write(at + start as u64, &chunk[start..end])?;
                written += (end - start) as u64;
            }
            start = end + block;
        }
        Ok(written)
    }

    /// One block that is larger than the buffer: looked through first, then copied.
    fn copy_large_block(&self, range: Range<u64>, present: u64, scratch: &mut Scratch) -> Result<u64, Fault> {
        for write in [false, true] {
            let mut at = range.start;
            let mut zero = true;
            while at < range.end {
                let count = (range.end - at).min(CHUNK as u64);
                let chunk = &mut scratch.chunk()[..count as usize];
                self.read_padded(at, present, chunk)?;
                if write {
                    self.write(at, chunk)?;
                } else if !is_zero(chunk) {
                    zero = false;
                    break;
                }
                at += count;
            }
            if !write && zero {
                return Ok(0);
            }
        }
        Ok(range.end - range.start)
    }

    /// Reads at `at`; what lies past `present` is zero.
    fn read_padded(&self, at: u64, present: u64, chunk: &mut [u8]) -> Result<(), Fault> {
        let have = present.saturating_sub(at).min(chunk.len() as u64) as usize;
        let (data, rest) = chunk.split_at_mut(have);
        self.read(at, data)?;
        rest.fill(0);
        Ok(())
    }

    fn read(&self, at: u64, chunk: &mut [u8]) -> Result<(), Fault> {
        Ok(read_all(self.source, self.offset + at, chunk)?)
    }

    fn write(&self, at: u64, chunk: &[u8]) -> Result<(), Fault> {
        let offset = self.target_offset + at;
        self.target.pass(FaultKinds::WRITE, offset, chunk.len() as u64).map_err(Fault::Target)?;
        if let Some(nbd) = self.target.nbd() {
            return nbd.write(offset, chunk).map_err(Fault::Target);
        }
        self.target.write_parts(offset, chunk.len(), |at, count| {
            write_all(self.target.file(), &chunk[(at - offset) as usize..][..count], at).map_err(Fault::Target)
        })
    }
}

/// Of a call on both files, which does not say where it failed: only writing runs out of space.
fn of_either(errno: Errno) -> Fault {
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::ROFS => Fault::Target(errno),
        _ => Fault::Io(errno),
    }
}

/// Whether all bytes are zero. Written so that the compiler uses vector registers: 256 bytes at a time, no test within.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<256>();
    words.iter().all(|chunk| {
        let (words, _) = chunk.as_chunks::<8>();
        words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
    }) && rest.iter().all(|byte| *byte == 0)
}
