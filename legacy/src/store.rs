//! A file and the tables in it: pages in memory, changed ones written back sector by sector.
//!
//! Only tables go through the pages. Data lies in other sectors, moves without them, and may make an unchanged sector of a page stale;
//! such a sector becomes part of a table only by being written as a whole.

use alloc::vec::Vec;
use core::cell::RefCell;

use instar_blockio::{BlockRead, BlockWrite, Error, ErrorKind, ReadPart, Result, ZeroMode, is_zero, zeroed};

/// Bytes of a page.
const PAGE: usize = 64 << 10;
/// Pages kept; more only while all of them wait to be written.
const PAGES: usize = 64;
/// Pages read at once where pages are wanted one behind the other.
const READ_AHEAD: u64 = 16;
/// The unit in which changes are written.
pub const SECTOR: u64 = 512;

/// Which tables must be in the file before which: what refers to others is a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// Refers to data only.
    Leaf,
    /// May refer to leaves; written behind them.
    Root,
}

/// A file whose tables are cached. What lies behind its end reads as zero.
#[derive(Debug)]
pub struct Store<D> {
    file: D,
    kept: RefCell<Kept>,
    strict: bool,
}

#[derive(Debug, Default)]
struct Kept {
    pages: Vec<Page>,
    /// Where in `pages` the last one was found.
    last: usize,
    clock: u64,
    /// The page behind the last one that was read.
    next: u64,
}

#[derive(Debug)]
struct Page {
    number: u64,
    /// A whole page, zero behind the end of the file.
    bytes: Vec<u8>,
    used: u64,
    /// Changed sectors, one bit each.
    leaves: u128,
    roots: u128,
}

impl<D> Store<D> {
    /// `strict`: tables behind the end of the file are an error.
    pub fn new(file: D, strict: bool) -> Self {
        Self { file, kept: RefCell::default(), strict }
    }

    /// The file, for data.
    pub fn file(&self) -> &D {
        &self.file
    }

    /// Likewise, to be written.
    pub fn file_mut(&mut self) -> &mut D {
        &mut self.file
    }

    /// Is what lies behind the end of the file an error?
    pub fn is_strict(&self) -> bool {
        self.strict
    }

    /// Gives the file back; changes that were not written are lost.
    pub fn into_file(self) -> D {
        self.file
    }
}

impl<D: BlockRead> Store<D> {
    /// Fills `buf` from `offset`.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        if self.strict && offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.file.size()) {
            return Err(Error::new(ErrorKind::Corrupt).at(offset));
        }
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let skip = (at % PAGE as u64) as usize;
            let (now, later) = rest.split_at_mut(rest.len().min(PAGE - skip));
            self.with_page(at / PAGE as u64, |page| now.copy_from_slice(&page.bytes[skip..skip + now.len()]))?;
            at = at.checked_add(now.len() as u64).ok_or(Error::new(ErrorKind::OutOfBounds).at(offset))?;
            rest = later;
        }
        Ok(())
    }

    /// The `N` bytes at `offset`.
    pub fn get<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// How many of the `max` bytes from `offset` on are zero for certain, in multiples of `width`: looks no further than the page, unless
    /// the file has ended.
    pub fn zero_run(&self, offset: u64, max: u64, width: u64) -> Result<u64> {
        /// Bytes that are tested at once.
        const STEP: usize = 256;
        if self.strict {
            return Ok(0);
        }
        let waits = |page: &Page| page.is_dirty() && page.number >= offset / PAGE as u64;
        if offset >= self.file.size() && !self.kept.borrow().pages.iter().any(waits) {
            return Ok(max / width * width);
        }
        let skip = (offset % PAGE as u64) as usize;
        let len = max.min((PAGE - skip) as u64) as usize;
        let run = self.with_page(offset / PAGE as u64, |page| {
            let bytes = &page.bytes[skip..skip + len];
            bytes.chunks(STEP).take_while(|chunk| is_zero(chunk)).map(<[u8]>::len).sum::<usize>()
        })?;
        Ok(run as u64 / width * width)
    }

    fn with_page<R>(&self, number: u64, look: impl FnOnce(&mut Page) -> R) -> Result<R> {
        let mut kept = self.kept.borrow_mut();
        let at = match kept.find(number) {
            Some(at) => at,
            None => self.load(&mut kept, number)?,
        };
        Ok(look(&mut kept.pages[at]))
    }

    /// Reads a page, and those behind it if it is the one that was to be expected. Tells where it is.
    fn load(&self, kept: &mut Kept, number: u64) -> Result<usize> {
        let size = self.file.size();
        let wanted = if kept.next == number && number > 0 { READ_AHEAD } else { 1 };
        let inside = size.div_ceil(PAGE as u64).saturating_sub(number).clamp(1, wanted);
        let mut new = Vec::new();
        for number in number..number.saturating_add(inside) {
            if number != u64::MAX && !kept.pages.iter().any(|page| page.number == number) {
                new.push(Page { number, bytes: zeroed(PAGE)?, used: 0, leaves: 0, roots: 0 });
            }
        }
        let mut parts = Vec::new();
        for page in &mut new {
            let start = page.number.saturating_mul(PAGE as u64);
            let len = size.saturating_sub(start).min(PAGE as u64) as usize;
            if len > 0 {
                parts.push(ReadPart { offset: start, buf: &mut page.bytes[..len] });
            }
        }
        self.file.read_many(&mut parts)?;
        kept.next = number.saturating_add(inside);
        // The wanted page last, so that none of the others takes its place.
        for page in new.into_iter().rev() {
            kept.insert(page)?;
        }
        kept.find(number).ok_or(Error::new(ErrorKind::OutOfBounds))
    }
}

impl<D: BlockWrite> Store<D> {
    /// Changes a table.
    pub fn put(&mut self, offset: u64, bytes: &[u8], rank: Rank) -> Result<()> {
        self.change(offset, bytes.len() as u64, rank, |part, from| {
            part.copy_from_slice(&bytes[from..from + part.len()]);
        })
    }

    /// Fills a part of a table with a byte.
    pub fn fill(&mut self, offset: u64, len: u64, byte: u8, rank: Rank) -> Result<()> {
        self.change(offset, len, rank, |part, _| part.fill(byte))
    }

    /// Shows the pages of a range to `edit`, with the place in the range at which each part begins.
    fn change(&mut self, offset: u64, len: u64, rank: Rank, mut edit: impl FnMut(&mut [u8], usize)) -> Result<()> {
        let end = offset.checked_add(len).ok_or(Error::new(ErrorKind::OutOfBounds).at(offset))?;
        let mut at = offset;
        while at < end {
            self.make_room()?;
            let skip = (at % PAGE as u64) as usize;
            let now = (end - at).min((PAGE - skip) as u64) as usize;
            let from = (at - offset) as usize;
            self.with_page(at / PAGE as u64, |page| {
                edit(&mut page.bytes[skip..skip + now], from);
                let sectors = sectors(skip, now);
                match rank {
                    Rank::Leaf => page.leaves |= sectors,
                    Rank::Root => page.roots |= sectors,
                }
            })?;
            at += now as u64;
        }
        Ok(())
    }

    fn make_room(&mut self) -> Result<()> {
        let kept = self.kept.get_mut();
        match kept.pages.len() >= PAGES && kept.pages.iter().all(Page::is_dirty) {
            true => self.write_dirty(u64::MAX),
            false => Ok(()),
        }
    }

    /// Writes what has been changed: leaves, then roots. Nothing is written at or behind `end`.
    pub fn write_dirty(&mut self, end: u64) -> Result<()> {
        let kept = self.kept.get_mut();
        if !kept.pages.iter().any(Page::is_dirty) {
            return Ok(());
        }
        kept.pages.sort_unstable_by_key(|page| page.number);
        kept.last = 0;
        if kept.pages.iter().any(|page| page.leaves != 0) {
            for page in &mut kept.pages {
                let sectors = core::mem::take(&mut page.leaves) & !page.roots;
                page.write(&mut self.file, sectors, end)?;
            }
            self.file.flush()?;
        }
        for page in &mut kept.pages {
            let sectors = core::mem::take(&mut page.roots);
            page.write(&mut self.file, sectors, end)?;
        }
        Ok(())
    }

    /// Makes a range of the file read as zero: a new table, or the part of a new unit that nobody writes. A file that grows is only as
    /// long as it has been written, and reads as zero behind its end.
    pub fn clear_file(&mut self, offset: u64, len: u64) -> Result<()> {
        let size = self.file.size();
        let end = offset.checked_add(len).ok_or(Error::new(ErrorKind::OutOfBounds).at(offset))?;
        if self.file.limits().grows && offset >= size {
            return Ok(());
        }
        let end = if self.file.limits().grows { end.min(size) } else { end };
        self.file.write_zeroes(offset, end - offset, ZeroMode::KeepAllocated)
    }
}

impl Kept {
    fn find(&mut self, number: u64) -> Option<usize> {
        self.clock += 1;
        if self.pages.get(self.last).is_none_or(|page| page.number != number) {
            self.last = self.pages.iter().position(|page| page.number == number)?;
        }
        self.pages[self.last].used = self.clock;
        Some(self.last)
    }

    fn insert(&mut self, mut page: Page) -> Result<()> {
        page.used = self.clock;
        let clean = self.pages.iter().enumerate().filter(|(_, page)| !page.is_dirty());
        let oldest = clean.min_by_key(|(_, page)| page.used).map(|(at, _)| at);
        match oldest {
            Some(at) if self.pages.len() >= PAGES => self.pages[at] = page,
            _ => {
                self.pages.try_reserve(1).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
                self.pages.push(page);
            }
        }
        Ok(())
    }
}

impl Page {
    fn is_dirty(&self) -> bool {
        self.leaves | self.roots != 0
    }

    /// Writes the runs of sectors, up to `end` of the file.
    fn write<D: BlockWrite>(&self, file: &mut D, sectors: u128, end: u64) -> Result<()> {
        let start = self.number * PAGE as u64;
        let mut rest = sectors;
        while rest != 0 {
            let first = rest.trailing_zeros();
            let count = (rest >> first).trailing_ones();
            rest &= !run_of_bits(first, count);
            let (from, to) = (first as usize * SECTOR as usize, (first + count) as usize * SECTOR as usize);
            let to = to.min(usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX));
            if from < to {
                file.write_at(start + from as u64, &self.bytes[from..to])?;
            }
        }
        Ok(())
    }
}

/// Bits of the sectors that `len` bytes at `skip` of a page touch; `len` is not 0.
fn sectors(skip: usize, len: usize) -> u128 {
    let (first, last) = (skip / SECTOR as usize, (skip + len - 1) / SECTOR as usize);
    run_of_bits(first as u32, (last - first + 1) as u32)
}

fn run_of_bits(first: u32, count: u32) -> u128 {
    (u128::MAX >> (128 - count)) << first
}

/// Reads data of a file, zero behind its end.
pub fn read_padded<D: BlockRead>(file: &D, offset: u64, buf: &mut [u8]) -> Result<()> {
    let inside = file.size().saturating_sub(offset).min(buf.len() as u64) as usize;
    let (head, tail) = buf.split_at_mut(inside);
    tail.fill(0);
    if head.is_empty() { Ok(()) } else { file.read_at(offset, head) }
}

#[cfg(test)]
mod tests {
    use instar_blockio::MemBlock;

    use super::*;

    fn counted(len: usize) -> MemBlock {
        (0..len).map(|at| (at / 253 + at % 253) as u8).collect::<Vec<u8>>().into()
    }

    #[test]
    fn reads_across_pages_and_the_end() {
        let store = Store::new(counted(PAGE + 100), false);
        let mut buf = vec![1; 200];
        store.read(PAGE as u64 - 50, &mut buf).unwrap();
        assert_eq!(&buf[..150], &store.file().as_bytes()[PAGE - 50..]);
        assert!(is_zero(&buf[150..]));
        assert_eq!(store.get::<8>(u64::MAX - 8).unwrap(), [0; 8]);
        assert_eq!(store.get::<8>(u64::MAX - 3).unwrap_err().kind(), ErrorKind::OutOfBounds);
        let strict = Store::new(counted(100), true);
        assert!(strict.get::<4>(96).is_ok());
        assert_eq!(strict.get::<4>(97).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn only_changed_sectors_are_written() {
        let mut store = Store::new(MemBlock::zeroed(4096), false);
        store.put(510, b"abcd", Rank::Leaf).unwrap();
        // Data that did not pass through the pages.
        store.file_mut().write_at(1024, b"data").unwrap();
        store.put(3000, b"e", Rank::Root).unwrap();
        store.write_dirty(3001).unwrap();
        let bytes = store.into_file().into_bytes();
        assert_eq!((&bytes[510..514], &bytes[1024..1028], bytes[3000]), (&b"abcd"[..], &b"data"[..], b'e'));
    }

    #[test]
    fn more_pages_than_are_kept() {
        let mut store = Store::new(MemBlock::default(), false);
        for number in 0..2 * PAGES as u64 + 3 {
            store.put(number * PAGE as u64 + 7, &number.to_le_bytes(), Rank::Leaf).unwrap();
        }
        for number in (0..2 * PAGES as u64 + 3).rev() {
            assert_eq!(store.get(number * PAGE as u64 + 7).unwrap(), number.to_le_bytes());
        }
        assert!(store.kept.get_mut().pages.len() <= PAGES + READ_AHEAD as usize);
    }

    #[test]
    fn zero_runs() {
        let mut bytes = vec![0; PAGE + 4096];
        bytes[2000] = 1;
        let store = Store::new(MemBlock::from(bytes), false);
        assert_eq!(store.zero_run(16, 1 << 20, 8).unwrap(), 1792);
        assert_eq!(store.zero_run(16, 1001, 4).unwrap(), 1000);
        assert_eq!(store.zero_run(2008, 1 << 20, 8).unwrap(), PAGE as u64 - 2008);
        assert_eq!(store.zero_run(2000, 1 << 20, 8).unwrap(), 0);
    }

    #[test]
    fn bits() {
        assert_eq!(sectors(0, PAGE), u128::MAX);
        assert_eq!(sectors(511, 2), 0b11);
        assert_eq!(sectors(PAGE - 1, 1), 1 << 127);
    }
}
