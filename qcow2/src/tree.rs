//! What a whole L1 table refers to: counting its clusters, and the copied flags of its entries.
//!
//! Every L1 table, the active one and that of each snapshot, adds one to the count of each L2 table it names and of each
//! cluster that those name. The copied flag of an entry says that the count is exactly one.

use alloc::vec::Vec;

use instar_blockio::{self as blockio, BlockWrite, Error, ErrorKind};

use crate::addr::{GuestOffset, HostOffset};
use crate::allocator::Span;
use crate::error::Corruption;
use crate::format::COPIED;
use crate::l1::L1Entry;
use crate::l2::L2Entry;
use crate::write::{Writer, corrupt};

/// Freed runs that are kept before their space is given back.
const MAX_FREED: usize = 1 << 16;
/// L1 entries that are read at once.
const L1_ENTRIES_PER_READ: u64 = 1 << 13;

/// Which copied flags entries get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flags {
    /// None.
    Clear,
    /// Those that the counts ask for.
    ByCount,
}

impl<D: BlockWrite> Writer<D> {
    /// The L1 table of a snapshot, as it stands in the file.
    pub(crate) fn read_table(&self, at: HostOffset, entries: u32) -> blockio::Result<Vec<u64>> {
        let mut table = Vec::new();
        table.try_reserve_exact(entries as usize).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        let mut done = 0;
        while done < u64::from(entries) {
            let step = L1_ENTRIES_PER_READ.min(u64::from(entries) - done);
            let mut bytes = crate::store::zeroed(step as usize * 8)?;
            self.main.read(at.0.saturating_add(done * 8), &mut bytes)?;
            table.extend(bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)));
            done += step;
        }
        Ok(table)
    }

    /// The L2 table that entry `index` of an L1 table names.
    pub(crate) fn table_of(&self, index: usize, entry: u64) -> blockio::Result<Option<HostOffset>> {
        let geometry = self.header.geometry;
        match L1Entry::decode(entry).table {
            Some(table) if !geometry.is_aligned(table.0) => {
                let (l1_index, guest) = (index as u64, (index as u64).saturating_mul(geometry.l2_span()));
                Err(corrupt(guest, Corruption::L2Unaligned { table, l1_index }))
            }
            table => Ok(table),
        }
    }

    /// Calls `visit` with each run of clusters that an L1 table refers to, as often as it does: those of each L2 table,
    /// then the table itself. `visit` answers whether to go on.
    pub(crate) fn for_each_cluster(
        &mut self,
        l1: &[u64],
        visit: &mut dyn FnMut(&mut Self, Span) -> blockio::Result<bool>,
    ) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        for (index, &entry) in l1.iter().enumerate() {
            let Some(table) = self.table_of(index, entry)? else { continue };
            for slot in 0..geometry.l2_entries() {
                let guest =
                    (index as u64).saturating_mul(geometry.l2_span()).saturating_add(slot << geometry.cluster_bits());
                let span = match self.entry_in(table.0, guest)? {
                    L2Entry::Compressed { host, len } => self.alloc.touched(host.0, len),
                    L2Entry::Cluster { host: Some(host), .. } => self.alloc.touched(host.0, 1),
                    L2Entry::Cluster { host: None, .. } => continue,
                };
                if !visit(self, span)? {
                    return Ok(());
                }
            }
            if !visit(self, self.alloc.touched(table.0, 1))? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Adds one to the counts of everything that an L1 table refers to. What was added before a failure is taken back.
    pub(crate) fn raise_tree(&mut self, l1: &[u64]) -> blockio::Result<()> {
        let mut raised = 0u64;
        let done = self.for_each_cluster(l1, &mut |this, span| {
            for cluster in span.first..span.first.saturating_add(span.count) {
                this.alloc.raise(&mut this.main, cluster)?;
                raised += 1;
            }
            Ok(true)
        });
        if done.is_err() {
            self.for_each_cluster(l1, &mut |this, span| {
                for cluster in span.first..span.first.saturating_add(span.count) {
                    if raised == 0 {
                        return Ok(false);
                    }
                    this.alloc.lower(&mut this.main, cluster)?;
                    raised -= 1;
                }
                Ok(true)
            })?;
        }
        done
    }

    /// Takes one from the counts of everything that an L1 table refers to, and gives back the space of what nobody uses any
    /// more. Nothing on disk may point there by this table.
    pub(crate) fn lower_tree(&mut self, l1: &[u64]) -> blockio::Result<()> {
        let mut freed: Vec<Span> = Vec::new();
        self.for_each_cluster(l1, &mut |this, span| {
            for cluster in span.first..span.first.saturating_add(span.count) {
                if this.alloc.lower(&mut this.main, cluster)? == 0 {
                    this.forget_table(cluster << this.header.geometry.cluster_bits());
                    match freed.last_mut() {
                        Some(last) if last.first + last.count == cluster => last.count += 1,
                        _ => freed.push(Span { first: cluster, count: 1 }),
                    }
                }
            }
            if freed.len() > MAX_FREED {
                this.give_back(&core::mem::take(&mut freed))?;
            }
            Ok(true)
        })?;
        self.give_back(&freed)
    }

    /// Frees clusters at once and gives back their space.
    pub(crate) fn drop_clusters(&mut self, at: u64, len: u64) -> blockio::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let span = self.alloc.touched(at, len);
        let mut freed = Vec::new();
        for cluster in span.first..span.first.saturating_add(span.count) {
            if self.alloc.lower(&mut self.main, cluster)? == 0 {
                freed.push(Span { first: cluster, count: 1 });
            }
        }
        self.give_back(&freed)
    }

    /// Makes lowered counts durable, then gives back the space of what they freed.
    pub(crate) fn give_back(&mut self, freed: &[Span]) -> blockio::Result<()> {
        self.alloc.write_blocks(&mut self.main)?;
        self.main.flush()?;
        let bits = self.header.geometry.cluster_bits();
        freed.iter().try_for_each(|span| self.main.discard(span.first << bits, span.count << bits))
    }

    fn forget_table(&mut self, at: u64) {
        self.l2.forget(at);
        self.forget_side(at);
    }

    /// Sets or clears the copied flags of the L2 tables that an L1 table names, and of the table itself; returns whether an L1
    /// entry changed. Changed L2 tables are in the cache afterwards.
    pub(crate) fn set_flags(&mut self, l1: &mut [u64], how: Flags) -> blockio::Result<bool> {
        let geometry = self.header.geometry;
        let places = self.fixed_places();
        let mut changed = false;
        for (index, entry) in l1.iter_mut().enumerate() {
            let Some(table) = self.table_of(index, *entry)? else { continue };
            for slot in 0..geometry.l2_entries() {
                let guest =
                    (index as u64).saturating_mul(geometry.l2_span()).saturating_add(slot << geometry.cluster_bits());
                if let L2Entry::Cluster { host: Some(host), copied, .. } = self.entry_in(table.0, guest)?
                    && copied != self.wanted_flag(host.0, how)?
                {
                    let hit = places.binary_search(&(table.0 >> geometry.cluster_bits())).is_ok();
                    if hit || table.0 >= self.main.end() {
                        return Err(Error::new(ErrorKind::Corrupt).at(table.0));
                    }
                    self.flip_flag(table.0, guest)?;
                }
            }
            let flagged = if self.wanted_flag(table.0, how)? { *entry | COPIED } else { *entry & !COPIED };
            changed |= flagged != *entry;
            *entry = flagged;
        }
        Ok(changed)
    }

    /// [`set_flags`](Self::set_flags) for the active state; durable afterwards.
    pub(crate) fn set_active_flags(&mut self, how: Flags) -> blockio::Result<()> {
        let mut l1 = core::mem::take(&mut self.l1);
        let done = self.set_flags(&mut l1, how);
        self.l1 = l1;
        if done? && !self.l1.is_empty() {
            let (first, last) = (0, self.l1.len() - 1);
            self.set_l1(first, self.l1[first]);
            self.set_l1(last, self.l1[last]);
        }
        self.sync()?;
        self.main.flush()
    }

    fn wanted_flag(&mut self, host: u64, how: Flags) -> blockio::Result<bool> {
        Ok(match how {
            Flags::Clear => false,
            Flags::ByCount => self.alloc.count(&mut self.main, host >> self.header.geometry.cluster_bits())? == 1,
        })
    }

    fn flip_flag(&mut self, table: u64, guest: u64) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        let start = geometry.l2_index(GuestOffset(guest)) as usize * geometry.l2_entry_size() as usize;
        self.make_room(table)?;
        // The flag is the first bit of the entry.
        self.l2.load(&self.main, table)?.change(start..start + 1)[0] ^= 0x80;
        self.forget_side(table);
        Ok(())
    }

    /// Clusters that can't be L2 tables, sorted: header, active L1 table, refcount table and blocks.
    fn fixed_places(&self) -> Vec<u64> {
        let bits = self.header.geometry.cluster_bits();
        let l1 = self.alloc.touched(self.header.l1_offset.0, (self.l1.len() as u64 * 8).max(1));
        let table_at = self.alloc.table_offset() >> bits;
        let mut places: Vec<u64> = self.alloc.block_offsets().map(|at| at >> bits).collect();
        places.push(0);
        places.extend(l1.first..l1.first.saturating_add(l1.count));
        places.extend(table_at..table_at + u64::from(self.alloc.table_clusters()));
        places.sort_unstable();
        places
    }
}
