//! A file for targets that costs nothing to open: borrowed bytes, and above them the pages that were written.

use std::collections::BTreeMap;
use std::ops::Range;

use instar_blockio::{BlockRead, BlockWrite, Error, ErrorKind, Limits, Result, ZeroMode, check_range};

/// Bytes of a page.
const PAGE: u64 = 4096;

/// A file that reads as its parts lie, with zeroes between and behind them, and that grows up to a limit.
#[derive(Clone, Debug)]
pub struct Disk<'a> {
    parts: Vec<(u64, &'a [u8])>,
    size: u64,
    most: u64,
    /// `None`: zeroes.
    pages: BTreeMap<u64, Option<Box<[u8; PAGE as usize]>>>,
}

impl<'a> Disk<'a> {
    /// A file of these bytes, which can't grow.
    pub fn of(bytes: &'a [u8]) -> Self {
        Self::of_parts(vec![(0, bytes)], bytes.len() as u64)
    }

    /// A file of `size` bytes with parts in it, in order and apart from each other.
    pub fn of_parts(parts: Vec<(u64, &'a [u8])>, size: u64) -> Self {
        Self { parts, size, most: size, pages: BTreeMap::new() }
    }

    /// The same file with room to grow to `most` bytes.
    pub fn with_room(self, most: u64) -> Self {
        Self { most: most.max(self.size), ..self }
    }

    /// What lies there below the written pages.
    fn read_base(&self, offset: u64, buf: &mut [u8]) {
        if let [(0, bytes)] = self.parts[..]
            && let Some(run) = bytes.get(offset as usize..offset as usize + buf.len())
        {
            return buf.copy_from_slice(run);
        }
        buf.fill(0);
        let end = offset + buf.len() as u64;
        for (at, bytes) in &self.parts {
            let (from, to) = (offset.max(*at), end.min(at + bytes.len() as u64));
            if from < to {
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            }
        }
    }

    /// The pieces of a range, page by page: the page, where in it, where in the range.
    fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
        let end = offset + len as u64;
        (offset / PAGE..end.div_ceil(PAGE)).map(move |page| {
            let (from, to) = (offset.max(page * PAGE), end.min((page + 1) * PAGE));
            let within = (from - page * PAGE) as usize..(to - page * PAGE) as usize;
            (page, within, (from - offset) as usize..(to - offset) as usize)
        })
    }

    /// Writes inside the file.
    fn put(&mut self, offset: u64, buf: &[u8]) {
        for (page, within, of_buf) in Self::pieces(offset, buf.len()) {
            let bytes = &buf[of_buf];
            if bytes.len() as u64 == PAGE && instar_blockio::is_zero(bytes) {
                self.pages.insert(page, None);
                continue;
            }
            if !self.pages.contains_key(&page) {
                let mut fresh = Box::new([0; PAGE as usize]);
                self.read_base(page * PAGE, &mut fresh[..]);
                self.pages.insert(page, Some(fresh));
            }
            let Some(slot) = self.pages.get_mut(&page) else { continue };
            slot.get_or_insert_with(|| Box::new([0; PAGE as usize]))[within].copy_from_slice(bytes);
        }
    }

    /// Makes a range inside the file zero.
    fn clear(&mut self, offset: u64, len: u64) {
        let (end, whole) = (offset + len, offset.div_ceil(PAGE)..(offset + len) / PAGE);
        if whole.start >= whole.end {
            return self.put(offset, &vec![0; len as usize]);
        }
        self.put(offset, &vec![0; (whole.start * PAGE - offset) as usize]);
        self.put(whole.end * PAGE, &vec![0; (end - whole.end * PAGE) as usize]);
        self.pages.retain(|page, _| !whole.contains(page));
        for (at, bytes) in &self.parts {
            let covered = at / PAGE..(at + bytes.len() as u64).div_ceil(PAGE);
            for page in covered.start.max(whole.start)..covered.end.min(whole.end) {
                self.pages.insert(page, None);
            }
        }
    }
}

impl BlockRead for Disk<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        if self.pages.is_empty() {
            self.read_base(offset, buf);
            return Ok(());
        }
        for (page, within, of_buf) in Self::pieces(offset, buf.len()) {
            match self.pages.get(&page) {
                Some(Some(bytes)) => buf[of_buf].copy_from_slice(&bytes[within]),
                Some(None) => buf[of_buf].fill(0),
                None => self.read_base(page * PAGE + within.start as u64, &mut buf[of_buf]),
            }
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits { discard_zeroes: true, grows: true, ..Limits::BYTE }
    }
}

impl BlockWrite for Disk<'_> {
    /// As on a full file system, the part that still fits is written.
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        let fits = (buf.len() as u64).min(self.most.saturating_sub(offset));
        if fits > 0 {
            self.size = self.size.max(offset + fits);
            self.put(offset, &buf[..fits as usize]);
        }
        if fits < buf.len() as u64 { Err(Error::new(ErrorKind::NoSpace).at(offset)) } else { Ok(()) }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, _mode: ZeroMode) -> Result<()> {
        check_range(self.size, offset, len)?;
        self.clear(offset, len);
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, ZeroMode::Unmap)
    }

    fn set_size(&mut self, size: u64) -> Result<()> {
        if size > self.most {
            return Err(Error::new(ErrorKind::NoSpace).at(size));
        }
        if let Some(gone) = self.size.checked_sub(size) {
            self.clear(size, gone);
        }
        self.size = size;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use instar_blockio::MemBlock;
    use instar_blockio::test::Faulty;

    use super::*;
    use crate::Random;

    /// Any sequence of requests has the results that it has on memory.
    #[test]
    fn it_is_like_memory() {
        const MOST: u64 = 60_000;
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let bytes: Vec<u8> = (0..random.below(20_000)).map(|_| random.word() as u8).collect();
            let (head, tail) = bytes.split_at(bytes.len() / 3);
            let size = bytes.len() as u64 + 9000;
            let mut disk = Disk::of_parts(vec![(0, head), (size - tail.len() as u64, tail)], size).with_room(MOST);
            let model = [head, &[0; 9000], tail].concat();
            let (mut model, faults) = Faulty::new(MemBlock::from(model));
            faults.limit_space(MOST);
            for _ in 0..60 {
                let (offset, len) = (random.below(70_000) as u64, random.below(12_000));
                let data = vec![[0, 1, 2][random.below(3)]; len];
                let results = match random.below(5) {
                    0 => (disk.set_size(offset), model.set_size(offset)),
                    1 => (disk.discard(offset, len as u64), model.discard(offset, len as u64)),
                    _ => (disk.write_at(offset, &data), model.write_at(offset, &data)),
                };
                assert_eq!(results.0.is_ok(), results.1.is_ok());
                assert_eq!(disk.size(), model.size());
                let (mut left, mut right) = (vec![7; disk.size() as usize], vec![8; disk.size() as usize]);
                disk.read_at(0, &mut left).unwrap();
                model.read_at(0, &mut right).unwrap();
                assert!(left == right, "seed {seed}");
            }
            assert!(disk.read_at(disk.size(), &mut [0]).is_err());
        }
    }
}
