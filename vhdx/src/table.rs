//! The BAT of an image that is written: pages in memory, and which of their sectors differ from the file.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use instar_blockio::{BlockRead, Result, zeroed};

use crate::format::{BAT_ENTRY, LOG_SECTOR};
use crate::pages::{PAGE, read_padded};

/// Pages in memory, at most: 4 MiB, which describe 4 TiB in blocks of 8 MiB.
const MAX_PAGES: usize = 64;

const SECTOR: usize = LOG_SECTOR as usize;

/// Entries as they are to be.
#[derive(Debug)]
pub(crate) struct Table {
    at: u64,
    pages: BTreeMap<u64, Page>,
    clock: u64,
}

#[derive(Debug)]
struct Page {
    bytes: Vec<u8>,
    /// A bit for each sector that differs from the file.
    dirty: u16,
    used: u64,
}

impl Table {
    /// The table that begins at `at` in the file.
    pub(crate) fn new(at: u64) -> Self {
        Self { at, pages: BTreeMap::new(), clock: 0 }
    }

    /// Another page would be one too many, and none can be dropped: the changes must be written first.
    pub(crate) fn is_full(&self) -> bool {
        self.pages.len() >= MAX_PAGES && self.pages.values().all(|page| page.dirty != 0)
    }

    /// The entry of an index inside the table.
    pub(crate) fn get<D: BlockRead>(&mut self, file: &D, index: u64) -> Result<u64> {
        let (number, place) = split(index);
        let page = self.page(file, number)?;
        Ok(page.bytes[place..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    /// The same without keeping what had to be read for it.
    pub(crate) fn look<D: BlockRead>(&self, file: &D, index: u64) -> Result<u64> {
        let (number, place) = split(index);
        let mut entry = [0; BAT_ENTRY as usize];
        match self.pages.get(&number) {
            Some(page) => entry.copy_from_slice(&page.bytes[place..place + BAT_ENTRY as usize]),
            None => read_padded(file, self.at + index * BAT_ENTRY, &mut entry)?,
        }
        Ok(u64::from_le_bytes(entry))
    }

    /// Changes the entry of an index inside the table.
    pub(crate) fn set<D: BlockRead>(&mut self, file: &D, index: u64, entry: u64) -> Result<()> {
        let (number, place) = split(index);
        let page = self.page(file, number)?;
        page.bytes[place..place + BAT_ENTRY as usize].copy_from_slice(&entry.to_le_bytes());
        page.dirty |= 1 << (place / SECTOR);
        Ok(())
    }

    fn page<D: BlockRead>(&mut self, file: &D, number: u64) -> Result<&mut Page> {
        self.clock += 1;
        if !self.pages.contains_key(&number) {
            if self.pages.len() >= MAX_PAGES {
                let clean = self.pages.iter().filter(|(_, page)| page.dirty == 0);
                if let Some(oldest) = clean.min_by_key(|(_, page)| page.used).map(|(number, _)| *number) {
                    self.pages.remove(&oldest);
                }
            }
            let mut bytes = zeroed(PAGE)?;
            read_padded(file, self.at + number * PAGE as u64, &mut bytes)?;
            self.pages.insert(number, Page { bytes, dirty: 0, used: 0 });
        }
        let page = self.pages.entry(number).or_insert_with(|| Page { bytes: Vec::new(), dirty: 0, used: 0 });
        page.used = self.clock;
        Ok(page)
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.pages.values().any(|page| page.dirty != 0)
    }

    /// The sectors that differ from the file, with their places, in order; at most `limit`.
    pub(crate) fn dirty(&self, limit: usize) -> Vec<(u64, &[u8])> {
        let sectors = self.pages.iter().flat_map(|(number, page)| {
            let start = self.at + number * PAGE as u64;
            let sectors = page.bytes.chunks_exact(SECTOR).enumerate();
            sectors
                .filter(|(index, _)| page.dirty >> index & 1 == 1)
                .map(move |(index, bytes)| (start + (index * SECTOR) as u64, bytes))
        });
        sectors.take(limit).collect()
    }

    /// These sectors, by their places, are in the file now.
    pub(crate) fn written(&mut self, places: &[u64]) {
        for place in places {
            let offset = place - self.at;
            if let Some(page) = self.pages.get_mut(&(offset / PAGE as u64)) {
                page.dirty &= !(1 << (offset % PAGE as u64 / LOG_SECTOR));
            }
        }
    }
}

/// Page number, and place in the page, of an index.
fn split(index: u64) -> (u64, usize) {
    let offset = index * BAT_ENTRY; // tables have less than 4 GiB
    (offset / PAGE as u64, (offset % PAGE as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_blockio::MemBlock;

    #[test]
    fn changes_are_seen_and_listed() {
        let file = MemBlock::from(vec![7; 3 * PAGE]);
        let mut table = Table::new(PAGE as u64);
        let last = PAGE as u64 / 8;
        assert_eq!(table.get(&file, 0), Ok(0x0707_0707_0707_0707));
        for index in [last, 512, 513, 1] {
            table.set(&file, index, index).unwrap();
        }
        assert_eq!((table.get(&file, 513), table.get(&file, last)), (Ok(513), Ok(last)));
        let page = PAGE as u64;
        let places: Vec<u64> = table.dirty(9).iter().map(|(place, _)| *place).collect();
        assert_eq!(places, [page, page + 4096, 2 * page]);
        assert_eq!(table.dirty(1)[0].1[8..16], [1, 0, 0, 0, 0, 0, 0, 0]);
        table.written(&places[..2]);
        assert_eq!(table.dirty(9).len(), 1);
        assert!(table.is_dirty());
        // Behind the end of the file are zeroes.
        assert_eq!(table.get(&file, 2 * last), Ok(0));
    }

    #[test]
    fn only_clean_pages_make_room() {
        let file = MemBlock::zeroed(0);
        let mut table = Table::new(0);
        let first = |page: u64| page * PAGE as u64 / 8;
        for page in 0..MAX_PAGES as u64 {
            table.set(&file, first(page), page + 1).unwrap();
        }
        assert!(table.is_full());
        let place = table.dirty(1)[0].0;
        table.written(&[place]);
        assert!(!table.is_full());
        table.set(&file, first(1000), 5).unwrap();
        assert!(table.is_full());
        assert_eq!(table.get(&file, first(63)), Ok(64));
    }
}
