use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

use crate::{BlockMap, BlockRead, BlockWrite, Error, ErrorKind, Extent, Limits, Result, ZeroMode};

/// A request that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// [`BlockRead::read_at`] (each part of a `read_many`).
    Read,
    /// Any change of contents or size: write, zero, discard, set size.
    Write,
    /// [`BlockWrite::flush`].
    Flush,
}

/// A store that works until it is told not to.
///
/// ```
/// use instar_blockio::test::{Faulty, Op};
/// use instar_blockio::{BlockRead, ErrorKind, MemBlock};
/// let (disk, faults) = Faulty::new(MemBlock::zeroed(1024));
/// faults.fail_nth(Op::Read, 1, ErrorKind::Io);
/// let mut sector = [0; 512];
/// assert!(disk.read_at(0, &mut sector).is_ok());
/// assert_eq!(disk.read_at(0, &mut sector).unwrap_err().kind(), ErrorKind::Io);
/// assert!(disk.read_at(0, &mut sector).is_ok());
/// ```
#[derive(Debug)]
pub struct Faulty<D> {
    inner: D,
    faults: Faults,
}

/// Tells a [`Faulty`] what to fail. Clones speak to the same store.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Plan>>);

#[derive(Debug, Default)]
struct Plan {
    rules: Vec<Rule>,
    counts: [u64; 3],
    max_size: Option<u64>,
}

#[derive(Debug)]
struct Rule {
    op: Op,
    when: When,
    kind: ErrorKind,
}

#[derive(Debug)]
enum When {
    Nth(u64),
    From(u64),
    Touches(Range<u64>),
}

impl Faults {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails one request: the `n`th of its kind from now on, counted from 0. It changes nothing.
    pub fn fail_nth(&self, op: Op, n: u64, kind: ErrorKind) {
        let mut plan = self.plan();
        let nth = plan.counts[op as usize] + n;
        plan.rules.push(Rule { op, when: When::Nth(nth), kind });
    }

    /// Fails all requests of a kind from the `n`th on: the device is gone.
    pub fn fail_from(&self, op: Op, n: u64, kind: ErrorKind) {
        let mut plan = self.plan();
        let first = plan.counts[op as usize] + n;
        plan.rules.push(Rule { op, when: When::From(first), kind });
    }

    /// Fails every request that touches a byte of `range`: a bad spot of the medium.
    pub fn fail_range(&self, op: Op, range: Range<u64>, kind: ErrorKind) {
        self.plan().rules.push(Rule { op, when: When::Touches(range), kind });
    }

    /// Lets the store grow to `size` bytes and no further ([`ErrorKind::NoSpace`]). As on a full file
    /// system, the part of a write that still fits is written.
    pub fn limit_space(&self, size: u64) {
        self.plan().max_size = Some(size);
    }

    /// Forgets all faults; the counts go on.
    pub fn clear(&self) {
        let mut plan = self.plan();
        plan.rules.clear();
        plan.max_size = None;
    }

    /// Requests of a kind so far, failed ones included.
    pub fn count(&self, op: Op) -> u64 {
        self.plan().counts[op as usize]
    }

    fn pass(&self, op: Op, offset: u64, len: u64) -> Result<()> {
        let mut plan = self.plan();
        let number = plan.counts[op as usize];
        plan.counts[op as usize] += 1;
        let hit = plan.rules.iter().find(|rule| {
            rule.op == op
                && match &rule.when {
                    When::Nth(nth) => number == *nth,
                    When::From(first) => number >= *first,
                    When::Touches(range) => offset < range.end && range.start < offset.saturating_add(len),
                }
        });
        hit.map_or(Ok(()), |rule| Err(Error::new(rule.kind).at(offset)))
    }

    /// How much of `offset..offset + len` the space suffices for.
    fn space(&self, offset: u64, len: u64) -> u64 {
        self.plan().max_size.map_or(len, |max| len.min(max.saturating_sub(offset)))
    }
}

impl<D> Faulty<D> {
    /// A store without faults, and the handle to change that.
    pub fn new(inner: D) -> (Self, Faults) {
        let faults = Faults::default();
        (Self { inner, faults: faults.clone() }, faults)
    }

    /// The store underneath.
    pub fn into_inner(self) -> D {
        self.inner
    }
}

impl<D: BlockRead> BlockRead for Faulty<D> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.faults.pass(Op::Read, offset, buf.len() as u64)?;
        self.inner.read_at(offset, buf)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }
}

impl<D: BlockWrite> BlockWrite for Faulty<D> {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        self.faults.pass(Op::Write, offset, buf.len() as u64)?;
        let fits = self.faults.space(offset, buf.len() as u64) as usize;
        if fits > 0 || buf.is_empty() {
            self.inner.write_at(offset, &buf[..fits])?;
        }
        if fits < buf.len() { Err(Error::new(ErrorKind::NoSpace).at(offset + fits as u64)) } else { Ok(()) }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.faults.pass(Op::Write, offset, len)?;
        self.inner.write_zeroes(offset, len, mode)
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.faults.pass(Op::Write, offset, len)?;
        self.inner.discard(offset, len)
    }

    fn set_size(&mut self, size: u64) -> Result<()> {
        self.faults.pass(Op::Write, size, 0)?;
        if self.faults.space(0, size) < size {
            return Err(Error::new(ErrorKind::NoSpace).at(size));
        }
        self.inner.set_size(size)
    }

    fn flush(&mut self) -> Result<()> {
        self.faults.pass(Op::Flush, 0, 0)?;
        self.inner.flush()
    }
}

impl<D: BlockMap> BlockMap for Faulty<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        self.inner.extent_at(offset, max_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemBlock;

    #[test]
    fn the_nth_write_fails_and_changes_nothing() {
        let (mut disk, faults) = Faulty::new(MemBlock::zeroed(4));
        disk.write_at(0, b"a").unwrap();
        faults.fail_nth(Op::Write, 1, ErrorKind::Io);
        disk.write_at(1, b"b").unwrap();
        assert_eq!(disk.write_at(2, b"c").unwrap_err(), Error::new(ErrorKind::Io).at(2));
        disk.write_zeroes(0, 1, ZeroMode::Unmap).unwrap();
        assert_eq!(faults.count(Op::Write), 4);
        assert_eq!(disk.into_inner().as_bytes(), b"\0b\0\0");
    }

    #[test]
    fn a_dead_device_stays_dead_until_cleared() {
        let (mut disk, faults) = Faulty::new(MemBlock::zeroed(4));
        faults.fail_from(Op::Flush, 1, ErrorKind::Io);
        disk.flush().unwrap();
        assert!(disk.flush().is_err() && disk.flush().is_err());
        faults.clear();
        disk.flush().unwrap();
        assert_eq!(faults.count(Op::Flush), 4);
    }

    #[test]
    fn a_bad_spot_fails_every_request_that_touches_it() {
        let (disk, faults) = Faulty::new(MemBlock::zeroed(16));
        faults.fail_range(Op::Read, 4..6, ErrorKind::Io);
        for (offset, len, good) in [(0, 4, true), (6, 4, true), (3, 2, false), (5, 1, false), (0, 16, false)] {
            assert_eq!(disk.read_at(offset, &mut [0; 16][..len]).is_ok(), good, "{offset}+{len}");
        }
    }

    #[test]
    fn a_full_disk_takes_what_fits() {
        let (mut disk, faults) = Faulty::new(MemBlock::zeroed(2));
        faults.limit_space(4);
        assert_eq!(disk.write_at(2, b"abc").unwrap_err(), Error::new(ErrorKind::NoSpace).at(4));
        assert_eq!(disk.write_at(9, b"a").unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(disk.set_size(5).unwrap_err().kind(), ErrorKind::NoSpace);
        disk.write_at(3, b"B").unwrap();
        assert_eq!(disk.into_inner().as_bytes(), b"\0\0aB");
    }
}
