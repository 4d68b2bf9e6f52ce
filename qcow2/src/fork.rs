//! Going over from one state of an image to another by one write of its first sector.
//!
//! ```text
//! taken      clusters for what is to be written anew          a crash leaves them to nobody
//! forked     counts, L2 tables and more change, there         nothing in the image points there
//! switched   the header names the new tables                  a flush before, and one after it
//! cleared    the space of what is left behind is given back
//! ```
//!
//! So counts, copied flags and what they tell of agree in every state that a crash can leave.
//!
//! What was moved is then brought back in the same way, to where QEMU would have changed it in place, unless it is very much.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::mem::{offset_of, take};

use instar_blockio::{self as blockio, BlockWrite, Error, ErrorKind};

use crate::addr::HostOffset;
use crate::allocator::{Span, add_run};
use crate::cache::TableCache;
use crate::error::Result;
use crate::format::RawHeader;
use crate::header::Header;
use crate::l1::L1Entry;
use crate::write::{L2_CACHE_LEN, SIZE_FIELD, Writer};

/// Runs of clusters of a tree that are remembered until their space can be given back; of more, the tree is.
const MAX_LEFT: usize = 1 << 16;
/// Bytes of tables that are brought back. More stay where they are, and the image ends a little later than QEMU's.
const MAX_BACK: u64 = 64 << 20;
/// Where the header fields end that tell the disk's size and where tables lie. All are in the first sector.
const TABLE_FIELDS_END: usize = offset_of!(RawHeader, incompatible_features);

/// The state that is made beside the one in the image.
#[derive(Debug, Default)]
pub(crate) struct Fork {
    /// Clusters for what is written in one piece.
    pieces: Vec<Span>,
    /// Clusters for L2 tables.
    tables: Vec<u64>,
    /// Clusters that the new state does without.
    left: Vec<Span>,
    /// L1 tables that it does without, where clusters that they alone refer to are not all among those.
    trees: Vec<Vec<u64>>,
    /// L2 tables that were moved: from where, and where to.
    moved: Vec<(u64, u64)>,
}

impl Fork {
    /// Clusters of piece `index`.
    pub(crate) fn piece(&self, index: usize) -> Span {
        self.pieces.get(index).copied().unwrap_or(Span { first: 0, count: 0 })
    }

    /// A place for the L2 table at `old`.
    pub(crate) fn move_to(&mut self, old: u64, cluster_size: u64) -> blockio::Result<u64> {
        let new = self.tables.pop().ok_or(Error::new(ErrorKind::NoSpace))? * cluster_size;
        self.moved.try_reserve(1).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        self.moved.push((old, new));
        Ok(new)
    }
}

/// A state that the image went over to, and the one before.
#[derive(Debug)]
pub(crate) struct Done {
    fork: Fork,
    before: Before,
    /// Refcount blocks of the state before, and where their table lies.
    blocks: Vec<u64>,
    table_offset: u64,
}

/// Where tables have their place for good.
#[derive(Debug, Default)]
pub(crate) struct Home {
    /// Pieces that only serve there.
    pub(crate) pieces: Vec<Span>,
    /// Of the active L1 table, if not where it was.
    pub(crate) l1: Option<u64>,
    /// Where the last byte lies of what was added to the image.
    pub(crate) end: u64,
}

/// The state in the image.
#[derive(Debug)]
struct Before {
    header: Header,
    l1: Vec<u64>,
    end: u64,
}

impl<D: BlockWrite> Writer<D> {
    /// Lets `change` work on counts, flags, `self.l1` and `self.header`, and goes over to what comes of that. After an error before
    /// this point, the image is as it was. There are clusters for `pieces` of so many bytes, and for so many L2 `tables`.
    pub(crate) fn in_one_step(
        &mut self,
        pieces: &[u64],
        tables: usize,
        change: impl FnOnce(&mut Self, &mut Fork) -> Result<()>,
    ) -> Result<Done> {
        self.go_over(|this, taken| this.fork(pieces, tables, taken), change)
    }

    fn go_over(
        &mut self,
        prepare: impl FnOnce(&mut Self, &mut Vec<Span>) -> Result<Fork>,
        change: impl FnOnce(&mut Self, &mut Fork) -> Result<()>,
    ) -> Result<Done> {
        self.sync()?;
        let before = Before { header: self.header.clone(), l1: self.l1.clone(), end: self.main.end() };
        let mut taken = Vec::new();
        let made = prepare(self, &mut taken).and_then(|mut fork| {
            change(self, &mut fork)?;
            self.write_fork(&mut fork)?;
            Ok(fork)
        });
        match made {
            Ok(fork) => {
                let switched = self.switch();
                self.failed = switched.is_err();
                let (blocks, table_offset) = switched?;
                Ok(Done { fork, before, blocks, table_offset })
            }
            Err(error) => {
                self.failed = self.go_back(before, &taken).is_err();
                Err(error)
            }
        }
    }

    /// Brings back what was moved, and gives the space of what the image left back. `also` writes what goes into `home.pieces`.
    pub(crate) fn settle_down(
        &mut self,
        mut done: Done,
        home: &Home,
        also: impl FnOnce(&mut Self, &mut Fork, &[u64]) -> Result<()>,
    ) -> Result<()> {
        let cluster_size = self.header.geometry.cluster_size();
        let tables = done.fork.moved.len() as u64 + self.alloc.moved_from(&done.blocks).count() as u64;
        let back = match tables.saturating_mul(cluster_size) {
            0..=MAX_BACK => self.bring_back(&done, home, also),
            _ => Err(Error::new(ErrorKind::Unsupported).into()),
        };
        match back {
            Ok(back) => {
                done.fork.left.extend(back.fork.left);
                // Refcount blocks may have been added, and a longer table of them.
                let end = self.counts_end().max(done.before.end).max(home.end);
                self.main.set_end(end)?;
            }
            // What was to go there has its place elsewhere, and all is well.
            Err(_) if !self.failed => {
                for &piece in &home.pieces {
                    self.alloc.free(&mut self.main, piece)?;
                }
                self.sync()?;
            }
            Err(error) => return Err(error),
        }
        Ok(self.clear_up(done.fork)?)
    }

    fn bring_back(
        &mut self,
        done: &Done,
        home: &Home,
        also: impl FnOnce(&mut Self, &mut Fork, &[u64]) -> Result<()>,
    ) -> Result<Done> {
        let geometry = self.header.geometry;
        let bits = geometry.cluster_bits();
        let Before { header, l1, .. } = &done.before;
        let l1_len = self.l1.len() as u64 * 8;
        let l1_home = home.l1.unwrap_or(header.l1_offset.0);
        let moves_l1 = self.header.l1_offset.0 != l1_home;
        if moves_l1 && home.l1.is_none() && geometry.clusters(l1.len() as u64 * 8) < geometry.clusters(l1_len) {
            return Err(Error::new(ErrorKind::NoSpace).into());
        }
        let prepare = |this: &mut Self, taken: &mut Vec<Span>| -> Result<Fork> {
            let mut take = |this: &mut Self, at: u64, count: u64| -> Result<bool> {
                let first = at >> bits;
                if !this.alloc.is_free(&mut this.main, first, count)? {
                    return Ok(false);
                }
                let got = this.alloc.allocate_at(&mut this.main, first, count)?;
                add_run(taken, Span { first, count: got })?;
                Ok(got == count)
            };
            let blocks: Vec<(u64, u64)> = this.alloc.moved_from(&done.blocks).collect();
            let mut all = take(this, done.table_offset, this.alloc.table_clusters().into())?;
            if moves_l1 && home.l1.is_none() {
                all &= take(this, l1_home, geometry.clusters(l1_len))?;
            }
            for &(_, at) in &blocks {
                all &= take(this, at, 1)?;
            }
            if !all {
                return Err(Error::new(ErrorKind::NoSpace).into());
            }
            let mut fork = Fork::default();
            for &(old, new) in &done.fork.moved {
                // Where another state uses one, it stays for that.
                if take(this, old, 1)? {
                    fork.moved.push((new, old));
                }
            }
            let places = blocks.iter().rev().map(|(_, at)| at >> bits).collect();
            this.alloc.fork(&mut this.main, done.table_offset, places, &[])?;
            for (index, _) in blocks {
                this.alloc.move_block(&mut this.main, index)?;
            }
            Ok(fork)
        };
        self.go_over(prepare, |this, fork| {
            let homes: BTreeMap<u64, u64> = take(&mut fork.moved).into_iter().collect();
            for (&from, &to) in &homes {
                this.carry_table(fork, from, to)?;
            }
            if !moves_l1 {
                return if homes.is_empty() {
                    also(this, fork, &this.l1.clone())
                } else {
                    Err(Error::new(ErrorKind::NoSpace).into())
                };
            }
            let mut l1 = this.l1.clone();
            for entry in &mut l1 {
                let L1Entry { table, copied } = L1Entry::decode(*entry);
                if let Some(home) = table.and_then(|at| homes.get(&at.0)) {
                    *entry = L1Entry { table: Some(HostOffset(*home)), copied }.encode();
                }
            }
            also(this, fork, &l1)?;
            this.place_l1(fork, l1_home, l1)
        })
    }

    /// Moves an L2 table with its count.
    fn carry_table(&mut self, fork: &mut Fork, from: u64, to: u64) -> blockio::Result<()> {
        let cluster_size = self.header.geometry.cluster_size();
        let cluster = |at: u64| at >> self.header.geometry.cluster_bits();
        let (old, new) = (cluster(from), cluster(to));
        // The active state's, and perhaps a new snapshot's. The new place has one count from when it was taken.
        let count = self.alloc.count(&mut self.main, old)?;
        if count > 2 {
            return Err(Error::new(ErrorKind::Corrupt).at(from));
        }
        for _ in 1..count {
            self.alloc.raise(&mut self.main, new)?;
        }
        self.copy_table(from, to)?;
        (0..count).try_for_each(|_| self.leave(fork, from, cluster_size))
    }

    fn fork(&mut self, pieces: &[u64], tables: usize, taken: &mut Vec<Span>) -> Result<Fork> {
        let bits = self.header.geometry.cluster_bits();
        let busy = self.busy_places()?;
        let mut take = |this: &mut Self, count: u64| -> blockio::Result<Span> {
            let span = Span { first: this.alloc.allocate(&mut this.main, count)?, count };
            add_run(taken, span)?;
            this.main.check_room((span.first + count) << bits)?;
            match busy.get(busy.partition_point(|&place| place < span.first)) {
                Some(&place) if place < span.first + count => Err(Error::new(ErrorKind::Corrupt).at(place << bits)),
                _ => Ok(span),
            }
        };
        let mut fork = Fork::default();
        for &len in pieces {
            let piece = take(self, self.header.geometry.clusters(len))?;
            fork.pieces.push(piece);
        }
        for _ in 0..tables {
            add_cluster(&mut fork.tables, take(self, 1)?.first)?;
        }
        // Taking places for blocks may need further blocks, or a longer table.
        let (mut blocks, mut table) = (Vec::new(), Span { first: 0, count: 0 });
        loop {
            let missing = self.alloc.block_offsets().count().saturating_sub(blocks.len());
            let table_clusters = u64::from(self.alloc.table_clusters());
            if missing == 0 && table.count == table_clusters {
                break;
            }
            for _ in 0..missing {
                add_cluster(&mut blocks, take(self, 1)?.first)?;
            }
            if table.count != table_clusters {
                // What was taken for a shorter one serves for blocks, or is given back with the places that are left.
                for cluster in table.first..table.first + table.count {
                    add_cluster(&mut blocks, cluster)?;
                }
                table = take(self, table_clusters)?;
            }
        }
        fork.tables.reverse();
        blocks.reverse();
        self.alloc.fork(&mut self.main, table.first << bits, blocks, taken)?;
        Ok(fork)
    }

    /// Clusters that are known to be in use, sorted, whatever their counts say.
    fn busy_places(&self) -> blockio::Result<Vec<u64>> {
        let bits = self.header.geometry.cluster_bits();
        let mut places = self.fixed_places();
        let snapshots = self.header.snapshots_offset.0 >> bits;
        places.extend(snapshots..snapshots.saturating_add(u64::from(self.header.snapshot_count != 0)));
        let tables = self.l1.iter().filter_map(|&entry| L1Entry::decode(entry).table);
        places.try_reserve(self.l1.len()).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        places.extend(tables.map(|at| at.0 >> bits));
        places.sort_unstable();
        Ok(places)
    }

    /// Where piece `index` lies, bytes.
    pub(crate) fn piece(&self, fork: &Fork, index: usize) -> u64 {
        fork.piece(index).first << self.header.geometry.cluster_bits()
    }

    /// The new state does without these bytes.
    pub(crate) fn leave(&mut self, fork: &mut Fork, at: u64, len: u64) -> blockio::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let span = self.alloc.touched(at, len);
        for cluster in span.first..span.first.saturating_add(span.count) {
            if self.alloc.lower(&mut self.main, cluster)? == 0 {
                self.forget_table(cluster << self.header.geometry.cluster_bits());
                add_run(&mut fork.left, Span { first: cluster, count: 1 })?;
            }
        }
        Ok(())
    }

    /// The new state does without an L1 table's references.
    pub(crate) fn leave_tree(&mut self, fork: &mut Fork, l1: Vec<u64>) -> blockio::Result<()> {
        let limit = fork.left.len() + MAX_LEFT;
        let mut all = true;
        self.for_each_cluster(&l1, &mut |this, span| {
            for cluster in span.first..span.first.saturating_add(span.count) {
                if this.alloc.lower(&mut this.main, cluster)? == 0 {
                    this.forget_table(cluster << this.header.geometry.cluster_bits());
                    if fork.left.len() < limit {
                        add_run(&mut fork.left, Span { first: cluster, count: 1 })?;
                    } else {
                        all = false;
                    }
                }
            }
            Ok(())
        })?;
        if !all {
            fork.trees.push(l1);
        }
        Ok(())
    }

    /// Writes all that is new.
    fn write_fork(&mut self, fork: &mut Fork) -> blockio::Result<()> {
        for place in take(&mut fork.tables) {
            self.alloc.lower(&mut self.main, place)?;
        }
        for cluster in self.alloc.settle_fork(&mut self.main)? {
            add_run(&mut fork.left, Span { first: cluster, count: 1 })?;
        }
        self.l2.write_dirty(&mut self.main)?;
        self.main.settle()?;
        self.main.flush()
    }

    /// Returns the refcount table of the state before, and its place.
    fn switch(&mut self) -> blockio::Result<(Vec<u64>, u64)> {
        self.header.refcount_table_offset = HostOffset(self.alloc.table_offset());
        self.header.refcount_table_clusters = self.alloc.table_clusters();
        let fields = self.header.emit();
        self.main.write(SIZE_FIELD, fields.get(SIZE_FIELD as usize..TABLE_FIELDS_END).unwrap_or_default())?;
        self.main.flush()?;
        Ok(self.alloc.end_fork())
    }

    /// Gives space back.
    fn clear_up(&mut self, fork: Fork) -> blockio::Result<()> {
        let bits = self.header.geometry.cluster_bits();
        for tree in &fork.trees {
            self.for_each_cluster(tree, &mut |this, span| {
                for cluster in span.first..span.first.saturating_add(span.count) {
                    if this.alloc.count(&mut this.main, cluster)? == 0 {
                        this.main.discard(cluster << bits, 1 << bits);
                    }
                }
                Ok(())
            })?;
        }
        let end = self.main.end();
        self.give_space_back(&fork.left, end)
    }

    /// Forgets the new state, and what was taken for it.
    fn go_back(&mut self, before: Before, taken: &[Span]) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        self.l2 = TableCache::new(geometry.cluster_size() as usize, L2_CACHE_LEN);
        self.side = RefCell::new(None);
        (self.header, self.l1) = (before.header, before.l1);
        self.alloc.abandon_fork();
        for span in taken {
            for cluster in span.first..span.first.saturating_add(span.count) {
                if self.alloc.count(&mut self.main, cluster)? != 0 {
                    self.alloc.lower(&mut self.main, cluster)?;
                }
            }
        }
        self.alloc.write_blocks(&mut self.main)?;
        // Refcount blocks may have been added, and a longer table of them.
        let end = self.counts_end();
        self.main.set_end(before.end.max(end))?;
        self.main.flush()
    }

    /// Where the last of refcount table and blocks ends.
    fn counts_end(&self) -> u64 {
        let geometry = self.header.geometry;
        let table_end = self.alloc.table_offset() + (u64::from(self.alloc.table_clusters()) << geometry.cluster_bits());
        self.alloc.block_offsets().map(|at| at + geometry.cluster_size()).fold(table_end, u64::max)
    }
}

/// How many L2 tables an L1 table names.
pub(crate) fn tables_in(l1: &[u64]) -> usize {
    l1.iter().filter(|&&entry| L1Entry::decode(entry).table.is_some()).count()
}

fn add_cluster(clusters: &mut Vec<u64>, cluster: u64) -> blockio::Result<()> {
    clusters.try_reserve(1).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
    clusters.push(cluster);
    Ok(())
}
