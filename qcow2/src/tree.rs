//! What a whole L1 table refers to: counting its clusters, and the copied flags of its entries.
//!
//! Every L1 table, the active one and that of each snapshot, adds one to the count of each L2 table it names and of each
//! cluster that those name. The copied flag of an entry says that the count is exactly one.

use alloc::vec::Vec;

use instar_blockio::{self as blockio, BlockWrite, Error, ErrorKind, zeroed};

use crate::addr::{GuestOffset, HostOffset};
use crate::allocator::Span;
use crate::error::Corruption;
use crate::fork::Fork;
use crate::l1::L1Entry;
use crate::l2::L2Entry;
use crate::write::{Writer, corrupt};

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
            let mut bytes = zeroed(step as usize * 8)?;
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
    /// then the table itself.
    pub(crate) fn for_each_cluster(
        &mut self,
        l1: &[u64],
        visit: &mut dyn FnMut(&mut Self, Span) -> blockio::Result<()>,
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
                visit(self, span)?;
            }
            visit(self, self.alloc.touched(table.0, 1))?;
        }
        Ok(())
    }

    /// Adds one to the counts of everything that an L1 table refers to.
    pub(crate) fn raise_tree(&mut self, l1: &[u64]) -> blockio::Result<()> {
        self.for_each_cluster(l1, &mut |this, span| {
            (span.first..span.first.saturating_add(span.count))
                .try_for_each(|cluster| this.alloc.raise(&mut this.main, cluster))
        })
    }

    /// Makes lowered counts durable, then gives back the space of what they freed.
    pub(crate) fn give_back(&mut self, freed: &[Span]) -> blockio::Result<()> {
        self.alloc.write_blocks(&mut self.main)?;
        self.main.flush()?;
        let bits = self.header.geometry.cluster_bits();
        freed.iter().for_each(|span| self.main.discard(span.first << bits, span.count << bits));
        Ok(())
    }

    pub(crate) fn forget_table(&mut self, at: u64) {
        self.l2.forget(at);
        self.forget_side(at);
    }

    /// Gives the entries of an L1 table, which is to be the active one, and of its L2 tables the copied flags that they are to have.
    /// L2 tables that change get other places.
    pub(crate) fn set_flags(&mut self, fork: &mut Fork, l1: &mut [u64], how: Flags) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        let metadata = self.fixed_places();
        for (index, entry) in l1.iter_mut().enumerate() {
            let Some(table) = self.table_of(index, *entry)? else { continue };
            let mut at = table.0;
            for slot in 0..geometry.l2_entries() {
                let guest =
                    (index as u64).saturating_mul(geometry.l2_span()).saturating_add(slot << geometry.cluster_bits());
                if let L2Entry::Cluster { host: Some(host), copied, .. } = self.entry_in(at, guest)?
                    && copied != self.wanted_flag(host.0, how)?
                {
                    if at == table.0 {
                        if metadata.binary_search(&(at >> geometry.cluster_bits())).is_ok() || at >= self.main.end() {
                            return Err(Error::new(ErrorKind::Corrupt).at(at));
                        }
                        at = self.move_table(fork, at)?;
                    }
                    self.flip_flag(at, guest)?;
                }
            }
            *entry = L1Entry { table: Some(HostOffset(at)), copied: self.wanted_flag(at, how)? }.encode();
        }
        Ok(())
    }

    /// Copies an L2 table to a place of the fork, and leaves the old one. Returns the place.
    fn move_table(&mut self, fork: &mut Fork, old: u64) -> blockio::Result<u64> {
        let cluster_size = self.header.geometry.cluster_size();
        let new = fork.move_to(old, cluster_size)?;
        self.copy_table(old, new)?;
        self.leave(fork, old, cluster_size)?;
        Ok(new)
    }

    /// Copies an L2 table to a place of its own.
    pub(crate) fn copy_table(&mut self, from: u64, to: u64) -> blockio::Result<()> {
        let cluster_size = self.header.geometry.cluster_size();
        let mut bytes = zeroed(cluster_size as usize)?;
        self.with_table(from, |table| bytes.copy_from_slice(table))?;
        self.make_room(to)?;
        self.l2.create(to)?.change(0..bytes.len()).copy_from_slice(&bytes);
        self.forget_side(to);
        self.main.extend(to + cluster_size);
        Ok(())
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
    pub(crate) fn fixed_places(&self) -> Vec<u64> {
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
