//! Changing the width of refcounts: new blocks and a new table beside the old ones, then one write of the header.

use alloc::vec::Vec;

use instar_blockio::{BlockWrite, Error as BlockError, ErrorKind, zeroed};

use crate::addr::Geometry;
use crate::amend::{AmendError, Steps};
use crate::error::{Error, Result};
use crate::format::MAX_REFCOUNT_TABLE_BYTES;
use crate::refcount::{max_count, set_count};
use crate::write::Writer;

impl<D: BlockWrite> Writer<D> {
    /// Gives refcounts a width of 2^`order` bits.
    pub(crate) fn change_refcount_order(&mut self, order: u32, steps: &mut Steps<'_>) -> Result<()> {
        let old = self.header.geometry;
        let new = Geometry::new(old.cluster_bits(), old.extended_l2(), order).ok_or(Error::RefcountOrder(order))?;
        self.check_counts(order)?;
        let (table, table_offset, walks) = self.place_blocks(new, steps)?;
        self.write_new_blocks(new, &table, walks, steps)?;
        self.main.write_words(table_offset, &table)?;
        // The old blocks count the new ones, whichever table a crash leaves.
        self.sync()?;
        self.main.flush()?;
        let old_blocks: Vec<u64> = self.alloc.block_offsets().collect();
        let (old_table, old_clusters) = (self.alloc.table_offset(), u64::from(self.alloc.table_clusters()));
        self.header.geometry = new;
        self.format.geometry = new;
        self.alloc.adopt(new, table, table_offset);
        self.rewrite_header()?;
        for block in old_blocks {
            self.alloc.free(&mut self.main, self.alloc.touched(block, 1))?;
        }
        self.alloc.free(&mut self.main, self.alloc.touched(old_table, old_clusters * new.cluster_size()))?;
        self.sync()?;
        Ok(self.main.flush()?)
    }

    /// Finds a count that is too large for the new width.
    fn check_counts(&mut self, order: u32) -> Result<()> {
        let old = self.header.geometry;
        if order >= old.refcount_order() {
            return Ok(());
        }
        for first in (0..self.alloc.covered()).step_by(old.refcounts_per_block() as usize) {
            if self.alloc.is_free(&mut self.main, first, old.refcounts_per_block())? {
                continue;
            }
            for cluster in first..first + old.refcounts_per_block() {
                let count = self.alloc.count(&mut self.main, cluster)?;
                if count > max_count(order) {
                    let offset = cluster << old.cluster_bits();
                    return Err(AmendError::RefcountTooLarge { bits: 1 << order, offset, count }.into());
                }
            }
        }
        Ok(())
    }

    /// Takes clusters for the new blocks, which must count themselves, and for the new table. Returns the table, its place,
    /// and how often the counts were walked over.
    fn place_blocks(&mut self, new: Geometry, steps: &mut Steps<'_>) -> Result<(Vec<u64>, u64, u64)> {
        let per_table_cluster = new.cluster_size() / 8;
        let mut table: Vec<u64> = Vec::new();
        let mut place: Option<(u64, u64)> = None;
        for walk in 0u64.. {
            let mut taken = false;
            let walks = (walk + 2).max(3);
            self.walk(new, walk, walks, steps, &mut |this, index| {
                let known = table.get(index as usize).is_some_and(|&at| at != 0);
                let per_block = new.refcounts_per_block();
                if !known && !this.alloc.is_free(&mut this.main, index * per_block, per_block)? {
                    let entries = (index + 1).next_multiple_of(per_table_cluster);
                    if entries > MAX_REFCOUNT_TABLE_BYTES / 8 {
                        return Err(AmendError::RefcountTable.into());
                    }
                    if table.len() < entries as usize {
                        let more = entries as usize - table.len();
                        table.try_reserve(more).map_err(|_| Error::OutOfMemory)?;
                        table.resize(entries as usize, 0);
                    }
                    table[index as usize] = this.take_clusters(1)? << new.cluster_bits();
                    taken = true;
                }
                Ok(())
            })?;
            match place {
                Some((at, _)) if !taken => return Ok((table, at, walk + 1)),
                None if !taken => break,
                _ => {}
            }
            if let Some((at, clusters)) = place.take() {
                for cluster in 0..clusters {
                    // Nobody has seen it.
                    self.alloc.lower(&mut self.main, (at >> new.cluster_bits()) + cluster)?;
                }
            }
            let clusters = new.clusters(table.len() as u64 * 8);
            place = Some((self.take_clusters(clusters)? << new.cluster_bits(), clusters));
        }
        // The header's cluster has a count in any sound image.
        Err(BlockError::new(ErrorKind::Corrupt).into())
    }

    fn write_new_blocks(&mut self, new: Geometry, table: &[u64], walks: u64, steps: &mut Steps<'_>) -> Result<()> {
        self.walk(new, walks, walks + 1, steps, &mut |this, index| {
            let Some(&at) = table.get(index as usize).filter(|at| **at != 0) else { return Ok(()) };
            let first = index * new.refcounts_per_block();
            let mut block = zeroed(new.cluster_size() as usize)?;
            for slot in 0..new.refcounts_per_block() {
                let count = this.alloc.count(&mut this.main, first.saturating_add(slot))?;
                if count != 0 {
                    set_count(&mut block, new.refcount_order(), slot as usize, count);
                }
            }
            Ok(this.main.write(at, &block)?)
        })
    }

    /// Walks over the counts, one of the new blocks after the other; each step is an entry of the old table.
    fn walk(
        &mut self,
        new: Geometry,
        walk: u64,
        walks: u64,
        steps: &mut Steps<'_>,
        visit: &mut dyn FnMut(&mut Self, u64) -> Result<()>,
    ) -> Result<()> {
        let per_old_block = self.header.geometry.refcounts_per_block();
        let (mut index, mut old_index) = (0u64, 0u64);
        // The table may grow on the way.
        while old_index * per_old_block < self.alloc.covered() {
            let entries = self.alloc.covered() / per_old_block;
            steps.step(walk * entries + old_index, walks * entries);
            old_index += 1;
            let end = old_index * per_old_block;
            while (index + 1) * new.refcounts_per_block() <= end {
                visit(self, index)?;
                index += 1;
            }
        }
        if index * new.refcounts_per_block() < self.alloc.covered() {
            visit(self, index)?;
        }
        let entries = self.alloc.covered() / per_old_block;
        steps.step((walk + 1) * entries, walks * entries);
        Ok(())
    }
}
