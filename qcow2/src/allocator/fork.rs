//! Counts of a state that the image does not know yet: blocks that change move to other places, and so does the table.

use alloc::vec::Vec;
use core::mem;

use instar_blockio::{BlockWrite, Error, ErrorKind, Result};

use super::{Allocator, CACHE_LEN, Span};
use crate::cache::TableCache;
use crate::store::Store;

/// What it takes to go over to the new counts, or back.
#[derive(Debug)]
pub(super) struct Fork {
    /// The table that the image has, and its place.
    table: Vec<u64>,
    table_offset: u64,
    /// Clusters that blocks can move to; each has a count of one.
    places: Vec<u64>,
    /// Clusters that only the old table and its blocks take.
    left: Vec<u64>,
}

impl Allocator {
    /// Leaves the counts of the image as they are from now on, and changes others, which begin as the same. Clusters that were
    /// `taken` for them just before have a count of one: a table at the byte `table_offset`, and `places` enough for all blocks.
    pub(crate) fn fork<D: BlockWrite>(
        &mut self,
        store: &mut Store<D>,
        table_offset: u64,
        places: Vec<u64>,
        taken: &[Span],
    ) -> Result<()> {
        let mut table = Vec::new();
        table.try_reserve_exact(self.table.len()).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        table.extend_from_slice(&self.table);
        let first = self.table_offset >> self.geometry.cluster_bits();
        let left = (first..first + u64::from(self.table_clusters())).collect();
        self.fork = Some(Fork { table, table_offset: self.table_offset, places, left });
        self.table_offset = table_offset;
        // The image need not hear of what was taken. If room was needed for a block meanwhile, it has some leaked clusters.
        for span in taken.iter().filter(|span| span.count > 0) {
            let last = span.first + (span.count - 1);
            for index in span.first / self.per_block()..=last / self.per_block() {
                self.move_block(store, index)?;
            }
        }
        Ok(())
    }

    pub(crate) fn is_forked(&self) -> bool {
        self.fork.is_some()
    }

    /// Gives block `index` a place of its own before it changes.
    pub(crate) fn move_block<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64) -> Result<()> {
        let Some(fork) = &mut self.fork else { return Ok(()) };
        let Ok(index) = usize::try_from(index) else { return Ok(()) };
        let old = match (self.table.get(index), fork.table.get(index)) {
            (Some(&at), Some(&old)) if at == old && at != 0 => old,
            _ => return Ok(()),
        };
        let corrupt = Error::new(ErrorKind::Corrupt).at(old);
        let new = fork.places.pop().ok_or(corrupt)? << self.geometry.cluster_bits();
        fork.left.push(old >> self.geometry.cluster_bits());
        self.make_room(store, old)?;
        let counts = self.blocks.load(store, old)?.bytes().to_vec();
        self.blocks.forget(old);
        self.blocks.create(new)?.change(0..counts.len()).copy_from_slice(&counts);
        store.extend(new + self.geometry.cluster_size());
        self.table[index] = new;
        Ok(())
    }

    /// Takes the counts away from what the new counts don't need: places that are left, and the old table and blocks, whose clusters
    /// it returns.
    pub(crate) fn settle_fork<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<Vec<u64>> {
        let mut free = Vec::new();
        // This may move blocks.
        while let Some(cluster) = self.fork.as_mut().and_then(|fork| fork.left.pop()) {
            if self.lower(store, cluster)? == 0 {
                free.push(cluster);
            }
        }
        // This not: the blocks that count the places moved at first.
        let places = self.fork.as_mut().map(|fork| mem::take(&mut fork.places));
        for place in places.unwrap_or_default() {
            self.lower(store, place)?;
        }
        self.write_blocks(store)?;
        // Where a table goes back to its place, it may still lie there, holes of the file included.
        if !store.holds_words(self.table_offset, &self.table)? {
            self.write_table(store)?;
        }
        Ok(free)
    }

    /// The image has gone over to the new counts. Returns the table that it had, and where that lies.
    pub(crate) fn end_fork(&mut self) -> (Vec<u64>, u64) {
        self.fork.take().map(|fork| (fork.table, fork.table_offset)).unwrap_or_default()
    }

    /// The blocks that lie elsewhere than in `table`: their numbers, and where they lie there.
    pub(crate) fn moved_from<'a>(&'a self, table: &'a [u64]) -> impl Iterator<Item = (u64, u64)> + 'a {
        let both = self.table.iter().zip(table).zip(0..);
        both.filter(|((now, then), _)| now != then && **then != 0).map(|((_, then), index)| (index, *then))
    }

    /// Goes back to the counts of the image.
    pub(crate) fn abandon_fork(&mut self) {
        if let Some(fork) = self.fork.take() {
            (self.table, self.table_offset) = (fork.table, fork.table_offset);
            self.blocks = TableCache::new(self.geometry.cluster_size() as usize, CACHE_LEN);
            self.rewind();
        }
    }
}
