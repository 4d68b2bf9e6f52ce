//! Read cache of metadata: the file in pages, the least recently used of which make room.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::cell::RefCell;

use instar_blockio::{BlockRead, Error, ErrorKind, ReadPart, Result, zeroed};

/// Bytes read at a time, unless the tables are smaller. Large enough that a table of common clusters is one request.
pub(crate) const PAGE: usize = 64 << 10;
/// The smallest page.
const MIN_PAGE: usize = 4 << 10;

/// A file whose metadata is read page by page. What lies behind its end reads as zero.
#[derive(Debug)]
pub(crate) struct Pages<D> {
    file: D,
    /// Bytes of a page, a power of two.
    size: usize,
    kept: RefCell<Kept>,
}

/// Pages by their number.
#[derive(Debug)]
struct Kept {
    pages: BTreeMap<u64, Page>,
    limit: usize,
    clock: u64,
}

#[derive(Debug)]
struct Page {
    /// Shorter than a page only at the end of the file.
    bytes: Vec<u8>,
    used: u64,
}

impl<D: BlockRead> Pages<D> {
    /// Keeps at most `limit` bytes, but two pages at least.
    pub(crate) fn new(file: D, limit: usize) -> Self {
        let kept = Kept { pages: BTreeMap::new(), limit: (limit / PAGE).max(2), clock: 0 };
        Self { file, size: PAGE, kept: RefCell::new(kept) }
    }

    /// Reads no more at a time than a table of `table_len` bytes has: around it lies what nobody asked for.
    pub(crate) fn fit(&mut self, table_len: u64) {
        let size = usize::try_from(table_len).unwrap_or(PAGE).clamp(MIN_PAGE, PAGE);
        if !size.is_power_of_two() || size >= self.size {
            return;
        }
        let kept = self.kept.get_mut();
        let parts = self.size / size;
        let old = core::mem::take(&mut kept.pages);
        kept.limit *= parts;
        for (number, page) in old {
            let parts = (number * parts as u64..).zip(page.bytes.chunks(size));
            kept.pages.extend(parts.map(|(number, bytes)| (number, Page { bytes: bytes.to_vec(), used: page.used })));
        }
        self.size = size;
    }

    /// Bytes from `offset` to the end of its page.
    pub(crate) fn rest(&self, offset: u64) -> u64 {
        self.size as u64 - offset % self.size as u64
    }

    /// Where the pages of `len` bytes from `offset`, the start of one, begin.
    pub(crate) fn starts(&self, offset: u64, len: u64) -> impl Iterator<Item = u64> + use<D> {
        (offset..offset.saturating_add(len)).step_by(self.size)
    }

    pub(crate) fn file(&self) -> &D {
        &self.file
    }

    /// Shows the bytes from `offset` to the end of its page, or to the end of the file if that comes first.
    pub(crate) fn view<R>(&self, offset: u64, look: impl FnOnce(&[u8]) -> R) -> Result<R> {
        if offset >= self.file.size() {
            return Ok(look(&[]));
        }
        let (number, skip) = (self.number(offset), (offset % self.size as u64) as usize);
        let mut kept = self.kept.borrow_mut();
        let page = match kept.find(number) {
            Some(page) => page,
            None => {
                let page = self.load(number)?;
                kept.insert(number, page)
            }
        };
        Ok(look(page.bytes.get(skip..).unwrap_or_default()))
    }

    /// Whether the page of `offset` is in memory.
    pub(crate) fn holds(&self, offset: u64) -> bool {
        self.kept.borrow().pages.contains_key(&self.number(offset))
    }

    /// Pages that may be read ahead without driving out what is in use.
    pub(crate) fn room_ahead(&self) -> usize {
        self.kept.borrow().limit / 2
    }

    /// Reads the pages of these offsets in one turn, as far as they are not in memory and begin inside the file.
    ///
    /// # Errors
    /// Memory is short, or the device's error; nothing is kept then.
    pub(crate) fn read_ahead(&self, offsets: &[u64]) -> Result<()> {
        let mut pages: BTreeMap<u64, Page> = BTreeMap::new();
        for &offset in offsets.iter().filter(|&&offset| offset < self.file.size() && !self.holds(offset)) {
            pages.insert(self.number(offset), self.blank(self.number(offset))?);
        }
        let parts = pages.iter_mut();
        let parts = parts.map(|(number, page)| ReadPart { offset: number * self.size as u64, buf: &mut page.bytes });
        self.file.read_many(&mut parts.collect::<Vec<_>>())?;
        let mut kept = self.kept.borrow_mut();
        for (number, page) in pages {
            kept.insert(number, page);
        }
        Ok(())
    }

    /// Fills `buf` from `offset`.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let len = rest.len().min(self.rest(at) as usize);
            let (now, later) = rest.split_at_mut(len);
            self.view(at, |bytes| {
                let have = bytes.len().min(len);
                now[..have].copy_from_slice(&bytes[..have]);
                now[have..].fill(0);
            })?;
            at = at.checked_add(len as u64).ok_or(Error::new(ErrorKind::OutOfBounds).at(offset))?;
            rest = later;
        }
        Ok(())
    }

    /// `len` bytes from `offset` in memory of their own.
    pub(crate) fn read_vec(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = zeroed(len)?;
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    fn number(&self, offset: u64) -> u64 {
        offset / self.size as u64
    }

    fn load(&self, number: u64) -> Result<Page> {
        let mut page = self.blank(number)?;
        self.file.read_at(number * self.size as u64, &mut page.bytes)?;
        Ok(page)
    }

    /// Memory for a page that begins inside the file.
    fn blank(&self, number: u64) -> Result<Page> {
        let len = (self.file.size() - number * self.size as u64).min(self.size as u64) as usize;
        Ok(Page { bytes: zeroed(len)?, used: 0 })
    }
}

impl Kept {
    fn find(&mut self, number: u64) -> Option<&Page> {
        self.clock += 1;
        let page = self.pages.get_mut(&number)?;
        page.used = self.clock;
        Some(page)
    }

    fn insert(&mut self, number: u64, mut page: Page) -> &Page {
        page.used = self.clock;
        if self.pages.len() >= self.limit {
            let oldest = self.pages.iter().min_by_key(|(_, page)| page.used).map(|(number, _)| *number);
            oldest.map(|oldest| self.pages.remove(&oldest));
        }
        self.pages.entry(number).or_insert(page)
    }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use instar_blockio::MemBlock;

    use super::*;

    /// Counts requests.
    struct Counted {
        disk: MemBlock,
        reads: Cell<u32>,
    }

    impl BlockRead for Counted {
        fn size(&self) -> u64 {
            self.disk.size()
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            self.reads.set(self.reads.get() + 1);
            self.disk.read_at(offset, buf)
        }
    }

    fn pages(len: usize, limit: usize) -> Pages<Counted> {
        let bytes: Vec<u8> = (0..len).map(|i| (i / 251 + i % 251) as u8).collect();
        Pages::new(Counted { disk: MemBlock::from(bytes), reads: Cell::new(0) }, limit)
    }

    #[test]
    fn reads_across_pages_and_the_end() {
        let pages = pages(3 * PAGE + 100, 0);
        let mut buf = vec![1; 2 * PAGE];
        pages.read(2 * PAGE as u64 - 7, &mut buf).unwrap();
        let inside = PAGE + 107;
        assert_eq!(&buf[..inside], &pages.file().disk.as_bytes()[2 * PAGE - 7..]);
        assert!(buf[inside..].iter().all(|&b| b == 0));
        pages.read(u64::MAX - 3, &mut [0; 3]).unwrap();
        assert_eq!(pages.read(u64::MAX - 3, &mut [0; 8]).unwrap_err().kind(), ErrorKind::OutOfBounds);
    }

    #[test]
    fn keeps_what_was_used_last() {
        let pages = pages(4 * PAGE, 2 * PAGE);
        let touch = |number: u64| {
            pages.view(number * PAGE as u64 + 5, |bytes| assert_eq!(bytes.len(), PAGE - 5)).unwrap();
            pages.file().reads.get()
        };
        assert_eq!([touch(0), touch(1), touch(0), touch(2)], [1, 2, 2, 3]);
        assert_eq!([touch(0), touch(1)], [3, 4]);
    }

    #[test]
    fn pages_read_ahead_are_there() {
        let pages = pages(4 * PAGE + 9, 4 * PAGE);
        assert_eq!(pages.room_ahead(), 2);
        let last = 4 * PAGE as u64;
        pages.read_ahead(&[7, 9, last, last + 8, last + 9, u64::MAX]).unwrap();
        assert_eq!(pages.file().reads.get(), 2, "each page once, none behind the end");
        assert!(pages.holds(0) && pages.holds(last) && !pages.holds(PAGE as u64));
        pages.view(last, |bytes| assert_eq!(bytes, &pages.file().disk.as_bytes()[4 * PAGE..])).unwrap();
        pages.read_ahead(&[7, PAGE as u64]).unwrap();
        assert_eq!(pages.file().reads.get(), 3);
    }

    #[test]
    fn small_tables_make_small_pages() {
        let mut pages = pages(PAGE + 9000, 2 * PAGE);
        pages.view(PAGE as u64 + 5, |_| ()).unwrap();
        pages.fit(8192);
        assert_eq!((pages.rest(8191), pages.rest(8192), pages.room_ahead()), (1, 8192, 8));
        let all = pages.file().disk.as_bytes().to_vec();
        pages.view(PAGE as u64 + 8192, |bytes| assert_eq!(bytes, &all[PAGE + 8192..])).unwrap();
        pages.view(PAGE as u64 + 8, |bytes| assert_eq!(bytes, &all[PAGE + 8..PAGE + 8192])).unwrap();
        assert_eq!(pages.file().reads.get(), 1, "what was read is kept");
        pages.view(8200, |bytes| assert_eq!(bytes, &all[8200..16384])).unwrap();
        assert_eq!(pages.file().reads.get(), 2);
        pages.fit(512);
        assert_eq!(pages.rest(0), 4096);
        pages.fit(1 << 20);
        assert_eq!(pages.rest(0), 4096);
        assert_eq!(pages.starts(4096, 8192).collect::<Vec<_>>(), [4096, 8192]);
    }

    #[test]
    fn nothing_is_read_behind_the_end() {
        let pages = pages(10, 0);
        pages.view(10, |bytes| assert!(bytes.is_empty())).unwrap();
        pages.view(1 << 60, |bytes| assert!(bytes.is_empty())).unwrap();
        assert_eq!(pages.file().reads.get(), 0);
    }
}
