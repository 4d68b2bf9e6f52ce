//! Read cache of metadata: the file in pages, the least recently used of which make room.

use alloc::vec::Vec;
use core::cell::RefCell;

use instar_blockio::{BlockRead, Error, ErrorKind, Result, zeroed};

/// Bytes read at a time: 8192 BAT entries.
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

    /// Shows the bytes from `offset` to the end of its page.
    pub(crate) fn view<R>(&self, offset: u64, look: impl FnOnce(&[u8]) -> R) -> Result<R> {
        let (number, skip) = (offset / PAGE as u64, (offset % PAGE as u64) as usize);
        let mut kept = self.kept.borrow_mut();
        let page = match kept.find(number) {
            Some(page) => page,
            None => {
                let page = self.load(number)?;
                kept.insert(page)?
            }
        };
        Ok(look(&page.bytes[skip..]))
    }

    /// Fills `buf` from `offset`.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let len = rest.len().min(PAGE - (at % PAGE as u64) as usize);
            let (now, later) = rest.split_at_mut(len);
            self.view(at, |bytes| now.copy_from_slice(&bytes[..len]))?;
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
        let start = number * PAGE as u64; // number was an offset divided by it
        let mut bytes = zeroed(PAGE)?;
        read_padded(&self.file, start, &mut bytes)?;
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

/// Fills `buf`; what lies behind the end of the file reads as zero.
pub(crate) fn read_padded<D: BlockRead + ?Sized>(file: &D, offset: u64, buf: &mut [u8]) -> Result<()> {
    let have = file.size().saturating_sub(offset).min(buf.len() as u64) as usize;
    let (inside, behind) = buf.split_at_mut(have);
    behind.fill(0);
    if inside.is_empty() { Ok(()) } else { file.read_at(offset, inside) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;
    use instar_blockio::MemBlock;

    /// Counts requests.
    struct Counted(MemBlock, Cell<u32>);

    impl BlockRead for Counted {
        fn size(&self) -> u64 {
            self.0.size()
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            self.1.set(self.1.get() + 1);
            self.0.read_at(offset, buf)
        }
    }

    #[test]
    fn pages_are_kept_and_padded() {
        let bytes: Vec<u8> = (0..3 * PAGE + 100).map(|i| (i / 251 + i % 251) as u8).collect();
        let pages = Pages::new(Counted(MemBlock::from(bytes.clone()), Cell::new(0)), 0);
        let mut buf = vec![1; 2 * PAGE];
        pages.read(2 * PAGE as u64 - 7, &mut buf).unwrap();
        assert_eq!(buf[..PAGE + 107], bytes[2 * PAGE - 7..]);
        assert!(buf[PAGE + 107..].iter().all(|&byte| byte == 0));
        assert_eq!(pages.file().1.get(), 3);
        pages.view(3 * PAGE as u64, |page| assert_eq!(page[..100], bytes[3 * PAGE..])).unwrap();
        assert_eq!(pages.file().1.get(), 3);
        pages.view(1 << 60, |page| assert!(page.iter().all(|&byte| byte == 0))).unwrap();
        assert_eq!(pages.read(u64::MAX - 3, &mut [0; 8]).unwrap_err().kind(), ErrorKind::OutOfBounds);
    }
}
