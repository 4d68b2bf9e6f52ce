//! Write-back cache for tables of one cluster: L2 tables and refcount blocks.
//!
//! The cache knows nothing of write order. Its owner calls [`TableCache::write_dirty`] when the order allows it, and
//! [`TableCache::trim`] only after that.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

use instar_blockio::{BlockWrite, Error, ErrorKind, Result, WritePart, zeroed};

use crate::store::Store;

/// Tables are read and written in multiples of this many bytes (a cluster has at least as many).
const SECTOR: usize = 512;
/// Neighbouring tables are written in one request up to this many bytes.
const MAX_WRITE: usize = 1 << 20;

/// A table in memory.
#[derive(Debug)]
pub(crate) struct Table {
    bytes: Vec<u8>,
    /// Bytes that differ from the file.
    dirty: Option<Range<usize>>,
    used: u64,
}

impl Table {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of `range`, which count as changed from now on.
    pub(crate) fn change(&mut self, range: Range<usize>) -> &mut [u8] {
        self.dirty = Some(match &self.dirty {
            Some(old) => old.start.min(range.start)..old.end.max(range.end),
            None => range.clone(),
        });
        &mut self.bytes[range]
    }

    fn sectors(&self) -> Option<Range<usize>> {
        self.dirty.as_ref().map(|dirty| dirty.start / SECTOR * SECTOR..dirty.end.next_multiple_of(SECTOR))
    }
}

/// Tables by their place in the file.
#[derive(Debug)]
pub(crate) struct TableCache {
    tables: BTreeMap<u64, Table>,
    table_len: usize,
    limit: usize,
    clock: u64,
}

impl TableCache {
    /// A cache of tables of `table_len` bytes that holds `limit` bytes, but two tables at least.
    pub(crate) fn new(table_len: usize, limit: usize) -> Self {
        Self { tables: BTreeMap::new(), table_len, limit: (limit / table_len).max(2), clock: 0 }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.tables.len() >= self.limit
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.tables.values().any(|table| table.dirty.is_some())
    }

    pub(crate) fn contains(&self, at: u64) -> bool {
        self.tables.contains_key(&at)
    }

    /// The table at `at`, if it is in memory.
    pub(crate) fn peek(&self, at: u64) -> Option<&[u8]> {
        self.tables.get(&at).map(Table::bytes)
    }

    /// The table at `at`, read if it is not in memory.
    pub(crate) fn load<D: BlockWrite>(&mut self, store: &Store<D>, at: u64) -> Result<&mut Table> {
        if !self.contains(at) {
            let mut bytes = zeroed(self.table_len)?;
            store.read(at, &mut bytes)?;
            self.tables.insert(at, Table { bytes, dirty: None, used: 0 });
        }
        self.touch(at)
    }

    /// A new table of zeroes at `at`, all of it to be written.
    pub(crate) fn create(&mut self, at: u64) -> Result<&mut Table> {
        let bytes = zeroed(self.table_len)?;
        self.tables.insert(at, Table { bytes, dirty: Some(0..self.table_len), used: 0 });
        self.touch(at)
    }

    fn touch(&mut self, at: u64) -> Result<&mut Table> {
        self.clock += 1;
        let table = self.tables.get_mut(&at).ok_or(Error::new(ErrorKind::InvalidInput).at(at))?;
        table.used = self.clock;
        Ok(table)
    }

    /// Forgets the table at `at`: its cluster is free.
    pub(crate) fn forget(&mut self, at: u64) {
        self.tables.remove(&at);
    }

    /// Writes what changed, in one turn, neighbours together.
    pub(crate) fn write_dirty<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        let out_of_memory = |_| Error::new(ErrorKind::OutOfMemory);
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (&at, table) in &self.tables {
            let Some(sectors) = table.sectors() else { continue };
            let start = at + sectors.start as u64;
            let joins = runs.last().is_some_and(|(at, run)| start == at + run.len() as u64 && run.len() < MAX_WRITE);
            if !joins {
                runs.try_reserve(1).map_err(out_of_memory)?;
                runs.push((start, Vec::new()));
            }
            if let Some((_, run)) = runs.last_mut() {
                run.try_reserve(sectors.len()).map_err(out_of_memory)?;
                run.extend_from_slice(&table.bytes[sectors]);
            }
        }
        let mut parts = Vec::new();
        parts.try_reserve_exact(runs.len()).map_err(out_of_memory)?;
        parts.extend(runs.iter().map(|(offset, run)| WritePart { offset: *offset, buf: run }));
        if !parts.is_empty() {
            store.write_many(&parts)?;
        }
        self.tables.values_mut().for_each(|table| table.dirty = None);
        Ok(())
    }

    /// Drops the half of the tables that was not used for the longest time. Changed ones stay.
    pub(crate) fn trim(&mut self) {
        let mut ages: Vec<u64> = self.tables.values().map(|table| table.used).collect();
        ages.sort_unstable();
        let Some(&median) = ages.get(ages.len() / 2) else { return };
        self.tables.retain(|_, table| table.dirty.is_some() || table.used > median);
    }
}

#[cfg(test)]
mod tests {
    use instar_blockio::{FileId, MemBlock};

    use super::*;

    #[test]
    fn neighbours_are_written_and_old_tables_dropped() {
        let mut store = Store::existing(MemBlock::zeroed(4096), FileId(0));
        let mut cache = TableCache::new(512, 2048);
        for at in [512, 1024, 3072] {
            cache.create(at).unwrap().change(0..1)[0] = at as u8 | 7;
        }
        assert!(!cache.is_full());
        cache.load(&store, 0).unwrap();
        assert!(cache.is_full() && cache.is_dirty());
        cache.write_dirty(&mut store).unwrap();
        assert!(!cache.is_dirty());
        let mut file = [0; 4096];
        store.read(0, &mut file).unwrap();
        assert_eq!((file[512], file[1024], file[3072]), (7, 7, 7));
        cache.trim();
        assert!(cache.contains(0) && !cache.contains(512));
    }

    #[test]
    fn only_the_changed_sectors_are_written() {
        let mut store = Store::existing(MemBlock::zeroed(4096), FileId(0));
        let mut cache = TableCache::new(2048, 4096);
        cache.load(&store, 2048).unwrap().change(600..601)[0] = 9;
        store.write(2048, &[1; 512]).unwrap(); // behind the cache's back: must survive
        cache.write_dirty(&mut store).unwrap();
        let mut file = [0; 1024];
        store.read(2048, &mut file).unwrap();
        assert_eq!((file[0], file[600]), (1, 9));
    }
}
