//! Read cache of metadata: the file in pages, the least recently used of which make room.

use alloc::vec::Vec;
use core::cell::RefCell;

use instar_blockio::{BlockRead, Error, ErrorKind, Result, zeroed};

/// Bytes read at a time. Large enough that a table of common clusters is one request.
pub(crate) const PAGE: usize = 64 << 10;

/// A file whose metadata is read page by page. What lies behind its end reads as zero.
#[derive(Debug)]
pub(crate) struct Pages<D> {
    file: D,
    kept: RefCell<Kept>,
}

#[derive(Debug)]
struct Kept {
    pages: Vec<Page>,
    limit: usize,
    clock: u64,
}

#[derive(Debug)]
struct Page {
    number: u64,
    /// Shorter than a page only at the end of the file.
    bytes: Vec<u8>,
    used: u64,
}

impl<D: BlockRead> Pages<D> {
    /// Keeps at most `limit` bytes, but two pages at least.
    pub(crate) fn new(file: D, limit: usize) -> Self {
        Self { file, kept: RefCell::new(Kept { pages: Vec::new(), limit: (limit / PAGE).max(2), clock: 0 }) }
    }

    pub(crate) fn file(&self) -> &D {
        &self.file
    }

    /// Shows the bytes from `offset` to the end of its page, or to the end of the file if that comes first.
    pub(crate) fn view<R>(&self, offset: u64, look: impl FnOnce(&[u8]) -> R) -> Result<R> {
        if offset >= self.file.size() {
            return Ok(look(&[]));
        }
        let (number, skip) = (offset / PAGE as u64, (offset % PAGE as u64) as usize);
        let mut kept = self.kept.borrow_mut();
        let page = match kept.find(number) {
            Some(page) => page,
            None => {
                let page = self.load(number)?;
                kept.insert(page)?
            }
        };
        Ok(look(page.bytes.get(skip..).unwrap_or_default()))
    }

    /// Fills `buf` from `offset`.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let len = rest.len().min(PAGE - (at % PAGE as u64) as usize);
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

    fn load(&self, number: u64) -> Result<Page> {
        // Only called for a page that begins inside the file.
        let start = number * PAGE as u64;
        let len = (self.file.size() - start).min(PAGE as u64) as usize;
        let mut bytes = zeroed(len)?;
        self.file.read_at(start, &mut bytes)?;
        Ok(Page { number, bytes, used: 0 })
    }
}

impl Kept {
    fn find(&mut self, number: u64) -> Option<&Page> {
        self.clock += 1;
        let page = self.pages.iter_mut().find(|page| page.number == number)?;
        page.used = self.clock;
        Some(page)
    }

    fn insert(&mut self, mut page: Page) -> Result<&Page> {
        page.used = self.clock;
        let oldest = self.pages.iter().enumerate().min_by_key(|(_, page)| page.used).map(|(at, _)| at);
        let at = match oldest {
            Some(at) if self.pages.len() >= self.limit => {
                self.pages[at] = page;
                at
            }
            _ => {
                self.pages.try_reserve(1).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
                self.pages.push(page);
                self.pages.len() - 1
            }
        };
        Ok(&self.pages[at])
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
    fn nothing_is_read_behind_the_end() {
        let pages = pages(10, 0);
        pages.view(10, |bytes| assert!(bytes.is_empty())).unwrap();
        pages.view(1 << 60, |bytes| assert!(bytes.is_empty())).unwrap();
        assert_eq!(pages.file().reads.get(), 0);
    }
}
