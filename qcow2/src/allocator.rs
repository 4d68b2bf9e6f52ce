//! The cluster allocator: reference counts, the tables that hold them, and where the next cluster goes.
//!
//! The search order is QEMU's, so that a fresh image has the layout that `qemu-img` gives it: the first free cluster at
//! or after the last one handed out; a refcount block lies behind the run whose counts it is the first to need; a refcount
//! table that is too small moves to a new area that describes itself.
//!
//! What is freed in an image that others may read is only *noted*: its count falls after the tables that pointed to it
//! have been written ([`Allocator::release`]), so that no crash leaves a cluster with two owners.

mod fork;

use alloc::vec::Vec;

use instar_blockio::{BlockWrite, Error, ErrorKind, Result, zeroed};

use crate::addr::Geometry;
use crate::cache::TableCache;
use crate::format::MAX_REFCOUNT_TABLE_BYTES;
use crate::refcount::{blocks_needed, count_at, max_count, set_count};
use crate::store::Store;

/// Memory for refcount blocks, bytes.
const CACHE_LEN: usize = 2 << 20;
/// Clusters are addressed by 56 bits.
const MAX_OFFSET: u64 = (1 << 56) - 1;
/// A refcount table entry: where the block lies.
const ENTRY_MASK: u64 = !0x1ff;

/// Neighbouring clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Span {
    pub(crate) fn overlaps(self, other: Span) -> bool {
        self.first < other.first.saturating_add(other.count) && other.first < self.first.saturating_add(self.count)
    }
}

/// Adds a run to a list; joined to the last one, if it follows that.
pub(crate) fn add_run(runs: &mut Vec<Span>, run: Span) -> Result<()> {
    match runs.last_mut() {
        Some(last) if last.first.checked_add(last.count) == Some(run.first) => last.count += run.count,
        _ => {
            runs.try_reserve(1).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
            runs.push(run);
        }
    }
    Ok(())
}

/// Whether a search has to start again, because a refcount block may have taken its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
enum Step {
    Done,
    Again,
}

/// What the file is to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It has no header yet: nobody reads it, the order of writes doesn't matter.
    Fresh,
    /// A valid image, which every single write must leave valid.
    Live,
}

/// The allocator of one image file.
#[derive(Debug)]
pub(crate) struct Allocator {
    geometry: Geometry,
    state: State,
    table: Vec<u64>,
    table_offset: u64,
    blocks: TableCache,
    next_cluster: u64,
    next_byte: u64,
    /// Fresh: clusters that were used before. Live: clusters to be freed.
    freed: Vec<Span>,
    /// The counts are those of another state, which the image may go over to.
    fork: Option<fork::Fork>,
}

impl Allocator {
    /// The allocator of an empty file: a header cluster, a refcount table of one cluster, and the first refcount block,
    /// which are in use.
    pub(crate) fn fresh<D: BlockWrite>(geometry: Geometry, store: &mut Store<D>) -> Result<Self> {
        let cluster = geometry.cluster_size();
        let mut table = alloc::vec![0; (cluster / 8) as usize];
        table[0] = 2 * cluster;
        let mut this = Self::new(geometry, State::Fresh, table, cluster);
        this.blocks.create(2 * cluster)?;
        store.extend(3 * cluster);
        this.allocate(store, 3)?;
        Ok(this)
    }

    /// The allocator of an image with this refcount table.
    ///
    /// # Errors
    /// `Corrupt` if an entry is not aligned, lies behind the end of the file, or occurs twice.
    pub(crate) fn existing<D: BlockWrite>(
        geometry: Geometry,
        store: &Store<D>,
        offset: u64,
        clusters: u32,
    ) -> Result<Self> {
        let len = u64::from(clusters) * geometry.cluster_size();
        if len > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::new(ErrorKind::Corrupt).at(offset));
        }
        let mut bytes = zeroed(len as usize)?;
        store.read(offset, &mut bytes)?;
        let table: Vec<u64> =
            bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry) & ENTRY_MASK).collect();
        let mut used: Vec<u64> = table.iter().copied().filter(|&at| at != 0).collect();
        used.sort_unstable();
        if let Some(&at) = used.iter().find(|&&at| !geometry.is_aligned(at) || at >= store.end()) {
            return Err(Error::new(ErrorKind::Corrupt).at(at));
        }
        if let Some(twice) = used.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::new(ErrorKind::Corrupt).at(twice[0]));
        }
        Ok(Self::new(geometry, State::Live, table, offset))
    }

    fn new(geometry: Geometry, state: State, table: Vec<u64>, table_offset: u64) -> Self {
        let blocks = TableCache::new(geometry.cluster_size() as usize, CACHE_LEN);
        Self {
            geometry,
            state,
            table,
            table_offset,
            blocks,
            next_cluster: 0,
            next_byte: 0,
            freed: Vec::new(),
            fork: None,
        }
    }

    /// Where the refcount table lies, bytes.
    pub(crate) fn table_offset(&self) -> u64 {
        self.table_offset
    }

    /// Clusters of the refcount table.
    pub(crate) fn table_clusters(&self) -> u32 {
        // At most 8 MiB / 512.
        (self.table.len() as u64 * 8 / self.geometry.cluster_size()) as u32
    }

    /// Where the refcount blocks lie, bytes.
    pub(crate) fn block_offsets(&self) -> impl Iterator<Item = u64> + '_ {
        self.table.iter().copied().filter(|&at| at != 0)
    }

    /// Starts the search from the beginning of the file again, as an image that was just opened does.
    pub(crate) fn rewind(&mut self) {
        self.next_cluster = 0;
        self.next_byte = 0;
    }

    /// A cluster of a fresh file that was never used for anything, so it reads as zero.
    pub(crate) fn is_pristine(&self, span: Span) -> bool {
        self.state == State::Fresh && !self.freed.iter().any(|used| used.overlaps(span))
    }

    fn per_block(&self) -> u64 {
        self.geometry.refcounts_per_block()
    }

    /// Refcounts of neighbouring clusters, from `first` to the end of its block; `None` where all are zero.
    fn counts<D: BlockWrite>(&mut self, store: &mut Store<D>, first: u64) -> Result<Option<&[u8]>> {
        let index = first / self.per_block();
        match usize::try_from(index).ok().and_then(|index| self.table.get(index)).copied() {
            None | Some(0) => Ok(None),
            Some(at) => {
                self.make_room(store, at)?;
                Ok(Some(self.blocks.load(store, at)?.bytes()))
            }
        }
    }

    /// How many of the clusters from `first` on, at most `limit`, are free (`true`) or in use (`false`).
    fn run<D: BlockWrite>(&mut self, store: &mut Store<D>, first: u64, limit: u64, free: bool) -> Result<u64> {
        let (order, per_block) = (self.geometry.refcount_order(), self.per_block());
        let mut found = 0;
        while found < limit {
            let start = (first + found) % per_block;
            let stop = per_block.min(start + (limit - found));
            let part = match self.counts(store, first + found)? {
                Some(block) => (start..stop)
                    .take_while(|&index| (count_at(block, order, index as usize) == 0) == free)
                    .count() as u64,
                None if free => stop - start,
                None => 0,
            };
            found += part;
            if part < stop - start {
                break;
            }
        }
        Ok(found)
    }

    /// The count of the cluster at `cluster`.
    pub(crate) fn count<D: BlockWrite>(&mut self, store: &mut Store<D>, cluster: u64) -> Result<u64> {
        let (order, index) = (self.geometry.refcount_order(), cluster % self.per_block());
        Ok(self.counts(store, cluster)?.map_or(0, |block| count_at(block, order, index as usize)))
    }

    /// Adds one to the count of a cluster, in memory.
    ///
    /// # Errors
    /// `InvalidInput` if the count can't rise any more.
    pub(crate) fn raise<D: BlockWrite>(&mut self, store: &mut Store<D>, cluster: u64) -> Result<()> {
        if self.count(store, cluster)? >= max_count(self.geometry.refcount_order()) {
            return Err(Error::new(ErrorKind::InvalidInput).at(cluster.saturating_mul(self.geometry.cluster_size())));
        }
        while self.take(store, Span { first: cluster, count: 1 })? == Step::Again {}
        Ok(())
    }

    /// Takes one from the count of a cluster at once, in memory, and returns what is left. Everything that pointed there must have
    /// been overwritten durably.
    pub(crate) fn lower<D: BlockWrite>(&mut self, store: &mut Store<D>, cluster: u64) -> Result<u64> {
        self.give_back(store, Span { first: cluster, count: 1 })?;
        self.count(store, cluster)
    }

    /// Clusters that the refcount table covers.
    pub(crate) fn covered(&self) -> u64 {
        self.table.len() as u64 * self.per_block()
    }

    /// Whether all counts of `count` clusters from `first` on are zero.
    pub(crate) fn is_free<D: BlockWrite>(&mut self, store: &mut Store<D>, first: u64, count: u64) -> Result<bool> {
        Ok(self.run(store, first, count, true)? == count)
    }

    /// Goes over to another refcount table, which is in the file already and counts everything that this one does.
    pub(crate) fn adopt(&mut self, geometry: Geometry, table: Vec<u64>, offset: u64) {
        self.geometry = geometry;
        self.table = table;
        self.table_offset = offset;
        self.blocks = TableCache::new(geometry.cluster_size() as usize, CACHE_LEN);
    }

    /// How many of the clusters from `first` on, at most `limit`, are free.
    pub(crate) fn free_run<D: BlockWrite>(&mut self, store: &mut Store<D>, first: u64, limit: u64) -> Result<u64> {
        self.run(store, first, limit, true)
    }

    /// Takes refcount blocks that count nothing but themselves out of the table and frees them. No freed cluster may wait.
    pub(crate) fn drop_unused_blocks<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        let mut dropped = Vec::new();
        for index in 0..self.table.len() {
            let at = self.table[index];
            if at != 0 && self.counts_only_itself(store, index, at)? {
                self.table[index] = 0;
                dropped.push((index as u64, at / self.geometry.cluster_size()));
            }
        }
        if dropped.is_empty() {
            return Ok(());
        }
        self.write_table(store)?;
        store.flush()?;
        for (index, cluster) in dropped {
            self.blocks.forget(cluster * self.geometry.cluster_size());
            if cluster / self.per_block() != index {
                self.give_back(store, Span { first: cluster, count: 1 })?;
            }
        }
        self.write_blocks(store)
    }

    fn counts_only_itself<D: BlockWrite>(&mut self, store: &mut Store<D>, index: usize, at: u64) -> Result<bool> {
        let (order, per_block) = (self.geometry.refcount_order(), self.per_block());
        let own = at / self.geometry.cluster_size();
        let own = (own / per_block == index as u64).then_some(own % per_block);
        let Some(block) = self.counts(store, index as u64 * per_block)? else { return Ok(false) };
        let expected = |slot: u64| u64::from(own == Some(slot));
        Ok((0..per_block).all(|slot| count_at(block, order, slot as usize) == expected(slot)))
    }

    /// Finds `count` free neighbours, without taking them.
    fn find<D: BlockWrite>(&mut self, store: &mut Store<D>, count: u64) -> Result<u64> {
        let last = MAX_OFFSET >> self.geometry.cluster_bits();
        loop {
            let first = self.next_cluster;
            if first > last || count > last {
                return Err(ErrorKind::NoSpace.into());
            }
            let free = self.run(store, first, count, true)?;
            if free == count {
                self.next_cluster = first + count;
                return Ok(first);
            }
            let used = self.run(store, first + free, last, false)?;
            self.next_cluster = first + free + used;
        }
    }

    /// Adds one to the counts of `span`.
    fn take<D: BlockWrite>(&mut self, store: &mut Store<D>, span: Span) -> Result<Step> {
        let (order, per_block) = (self.geometry.refcount_order(), self.per_block());
        let mut done = 0;
        while done < span.count {
            let at = span.first + done;
            if self.ensure_block(store, at)? == Step::Again {
                self.next_cluster = self.next_cluster.min(span.first);
                self.give_back(store, Span { count: done, ..span })?;
                return Ok(Step::Again);
            }
            let step = (per_block - at % per_block).min(span.count - done);
            self.change(store, at, step, |count| if count < max_count(order) { Some(count + 1) } else { None })?;
            done += step;
        }
        Ok(Step::Done)
    }

    /// Takes one from the counts of `span`.
    fn give_back<D: BlockWrite>(&mut self, store: &mut Store<D>, span: Span) -> Result<()> {
        let per_block = self.per_block();
        let mut done = 0;
        while done < span.count {
            let at = span.first.saturating_add(done);
            let step = (per_block - at % per_block).min(span.count - done);
            self.change(store, at, step, |count| count.checked_sub(1))?;
            done += step;
        }
        Ok(())
    }

    /// Changes the counts of clusters that share a block.
    fn change<D: BlockWrite>(
        &mut self,
        store: &mut Store<D>,
        first: u64,
        count: u64,
        next: impl Fn(u64) -> Option<u64>,
    ) -> Result<()> {
        let (order, start) = (self.geometry.refcount_order(), first % self.per_block());
        self.move_block(store, first / self.per_block())?;
        let corrupt = Error::new(ErrorKind::Corrupt).at(first.saturating_mul(self.geometry.cluster_size()));
        let block = usize::try_from(first / self.per_block()).ok().and_then(|index| self.table.get(index)).copied();
        let at = block.filter(|&at| at != 0).ok_or(corrupt)?;
        self.make_room(store, at)?;
        let block = self.blocks.load(store, at)?;
        let mut lowest_free = None;
        for index in start..start + count {
            let new = next(count_at(block.bytes(), order, index as usize)).ok_or(corrupt)?;
            let bit = (index as usize) << order;
            let bytes = bit / 8..(bit + (1 << order)).div_ceil(8);
            let within = if order < 3 { index as usize % (8 >> order) } else { 0 };
            set_count(block.change(bytes), order, within, new);
            if new == 0 && lowest_free.is_none() {
                lowest_free = Some(first + (index - start));
            }
        }
        if let Some(free) = lowest_free {
            self.next_cluster = self.next_cluster.min(free);
        }
        Ok(())
    }

    fn make_room<D: BlockWrite>(&mut self, store: &mut Store<D>, at: u64) -> Result<()> {
        // Counts only rise before the tables are written (`release`), so a block may be written at any time.
        if self.blocks.is_full() && !self.blocks.contains(at) {
            self.blocks.write_dirty(store)?;
            self.blocks.trim();
        }
        Ok(())
    }

    /// Makes sure that there is a refcount block for `cluster`.
    fn ensure_block<D: BlockWrite>(&mut self, store: &mut Store<D>, cluster: u64) -> Result<Step> {
        let per_block = self.per_block();
        let index = cluster / per_block;
        let in_table = usize::try_from(index).ok().filter(|&index| index < self.table.len());
        if in_table.is_some_and(|index| self.table[index] != 0) {
            return Ok(Step::Done);
        }
        if self.is_forked() {
            // It is referred to and has no count.
            return Err(Error::new(ErrorKind::Corrupt).at(cluster.saturating_mul(self.geometry.cluster_size())));
        }
        let new = self.find(store, 1)?;
        if new == 0 {
            return Err(Error::new(ErrorKind::Corrupt).at(0));
        }
        let at = new * self.geometry.cluster_size();
        if new / per_block == index {
            self.make_room(store, at)?;
            let block = self.blocks.create(at)?;
            let len = block.bytes().len();
            set_count(block.change(0..len), self.geometry.refcount_order(), (new % per_block) as usize, 1);
        } else {
            if self.take(store, Span { first: new, count: 1 })? == Step::Again {
                return Ok(Step::Again);
            }
            self.make_room(store, at)?;
            self.blocks.create(at)?;
        }
        store.extend(at + self.geometry.cluster_size());
        match in_table {
            Some(index) => self.hook(store, index, at)?,
            None => {
                let used = (cluster + 1).max(new).div_ceil(per_block);
                self.move_table(store, used * per_block, 0, false, Some((index, at)))?;
            }
        }
        Ok(Step::Again)
    }

    /// Enters a new refcount block in the table.
    fn hook<D: BlockWrite>(&mut self, store: &mut Store<D>, index: usize, at: u64) -> Result<()> {
        if self.state == State::Live {
            self.blocks.write_dirty(store)?;
            store.flush()?;
            store.write(self.table_offset + index as u64 * 8, &at.to_be_bytes())?;
        }
        self.table[index] = at;
        Ok(())
    }

    /// Lays refcount blocks and a new refcount table at cluster `start`, behind which nothing is in use: blocks for
    /// everything up to the end of the new area and for `additional` clusters more. Returns the cluster behind it.
    pub(crate) fn move_table<D: BlockWrite>(
        &mut self,
        store: &mut Store<D>,
        start: u64,
        additional: u64,
        exact: bool,
        new_block: Option<(u64, u64)>,
    ) -> Result<u64> {
        let (cluster_size, per_block) = (self.geometry.cluster_size(), self.per_block());
        let blocks = blocks_needed(self.geometry, start.saturating_add(additional), !exact);
        let wanted = if exact { blocks } else { blocks.saturating_add(blocks.div_ceil(2)) };
        let entries = wanted.saturating_add(cluster_size / 8 - 1) / (cluster_size / 8) * (cluster_size / 8);
        if entries > MAX_REFCOUNT_TABLE_BYTES / 8 {
            return Err(ErrorKind::NoSpace.into());
        }
        let table_clusters = entries * 8 / cluster_size;
        let mut table: Vec<u64> = Vec::new();
        table.try_reserve_exact(entries as usize).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        table.extend(self.table.iter().take(entries as usize));
        table.resize(entries as usize, 0);
        if let Some((index, at)) = new_block {
            *table.get_mut(index as usize).ok_or(Error::new(ErrorKind::Corrupt).at(at))? = at;
        }
        let first_block = start / per_block;
        let missing = (first_block..blocks).filter(|&index| table[index as usize] == 0).count() as u64;
        let table_at = start + missing;
        let end = table_at + table_clusters;
        let mut next = start;
        for index in first_block..blocks {
            let slot = &mut table[index as usize];
            let created = *slot == 0;
            if created {
                *slot = next * cluster_size;
                next += 1;
            }
            let at = *slot;
            self.make_room(store, at)?;
            let block = if created { self.blocks.create(at)? } else { self.blocks.load(store, at)? };
            let covers = index * per_block;
            let len = block.bytes().len();
            for cluster in start.max(covers)..end.min(covers + per_block) {
                let order = self.geometry.refcount_order();
                if count_at(block.bytes(), order, (cluster - covers) as usize) != 0 {
                    return Err(Error::new(ErrorKind::Corrupt).at(cluster * cluster_size));
                }
                set_count(block.change(0..len), order, (cluster - covers) as usize, 1);
            }
        }
        store.extend(end * cluster_size);
        self.switch(store, table, table_at * cluster_size)?;
        Ok(end)
    }

    /// Makes `table` at `offset` the refcount table and frees the old one.
    fn switch<D: BlockWrite>(&mut self, store: &mut Store<D>, table: Vec<u64>, offset: u64) -> Result<()> {
        let old =
            Span { first: self.table_offset / self.geometry.cluster_size(), count: u64::from(self.table_clusters()) };
        match self.state {
            // The old table stays in the file where nothing overwrites it, and images are compared byte for byte.
            State::Fresh => self.write_table(store)?,
            State::Live => self.blocks.write_dirty(store)?,
        }
        self.table = table;
        self.table_offset = offset;
        if self.state == State::Live {
            self.write_table(store)?;
            store.flush()?;
            let mut fields = [0; 12];
            fields[..8].copy_from_slice(&self.table_offset.to_be_bytes());
            fields[8..].copy_from_slice(&self.table_clusters().to_be_bytes());
            store.write(REFCOUNT_FIELDS, &fields)?;
            store.flush()?;
        }
        self.free(store, old)
    }

    /// Writes the refcount table.
    pub(crate) fn write_table<D: BlockWrite>(&self, store: &mut Store<D>) -> Result<()> {
        store.write_words(self.table_offset, &self.table)
    }

    /// Takes `count` neighbouring clusters and returns the first.
    pub(crate) fn allocate<D: BlockWrite>(&mut self, store: &mut Store<D>, count: u64) -> Result<u64> {
        loop {
            let first = self.find(store, count)?;
            if self.take(store, Span { first, count })? == Step::Done {
                return Ok(first);
            }
        }
    }

    /// Takes as many as are free, up to `count`, of the clusters from `first` on; returns how many.
    pub(crate) fn allocate_at<D: BlockWrite>(&mut self, store: &mut Store<D>, first: u64, count: u64) -> Result<u64> {
        loop {
            let free = self.run(store, first, count, true)?;
            if self.take(store, Span { first, count: free })? == Step::Done {
                return Ok(free);
            }
        }
    }

    /// Takes `len` bytes (at most a cluster) for a compressed stream; streams are packed, so clusters get one count for
    /// each stream that touches them.
    pub(crate) fn allocate_bytes<D: BlockWrite>(&mut self, store: &mut Store<D>, len: u64) -> Result<u64> {
        let cluster_size = self.geometry.cluster_size();
        let mut at = self.next_byte;
        if at != 0 && self.count(store, at / cluster_size)? == max_count(self.geometry.refcount_order()) {
            at = 0;
        }
        loop {
            if at == 0 || cluster_size - at % cluster_size < len {
                let new = self.find(store, 1)? * cluster_size;
                if new == 0 {
                    return Err(Error::new(ErrorKind::Corrupt).at(0));
                }
                if at == 0 || at.next_multiple_of(cluster_size) != new {
                    at = new;
                }
            }
            if self.take(store, self.touched(at, len))? == Step::Done {
                let end = at + len;
                self.next_byte = if self.geometry.is_aligned(end) { 0 } else { end };
                return Ok(at);
            }
            at = 0;
        }
    }

    /// The clusters that a range of bytes touches.
    pub(crate) fn touched(&self, at: u64, len: u64) -> Span {
        let first = at >> self.geometry.cluster_bits();
        let last = at.saturating_add(len.saturating_sub(1)) >> self.geometry.cluster_bits();
        Span { first, count: last - first + 1 }
    }

    /// The last cluster in use before the byte `end`.
    pub(crate) fn last_used<D: BlockWrite>(&mut self, store: &mut Store<D>, end: u64) -> Result<u64> {
        let mut cluster = self.geometry.clusters(end);
        while cluster > 0 {
            cluster -= 1;
            if self.count(store, cluster)? != 0 {
                return Ok(cluster);
            }
        }
        Ok(0)
    }

    /// Frees clusters: at once in a fresh file, else by the next [`release`](Self::release).
    pub(crate) fn free<D: BlockWrite>(&mut self, store: &mut Store<D>, span: Span) -> Result<()> {
        if span.count == 0 {
            return Ok(());
        }
        if self.state == State::Fresh {
            for cluster in span.first..span.first.saturating_add(span.count) {
                self.blocks.forget(cluster.saturating_mul(self.geometry.cluster_size()));
            }
            self.give_back(store, span)?;
        }
        add_run(&mut self.freed, span)
    }

    /// Clusters of an external data file, which has no counts, were used and are not any more.
    pub(crate) fn note_used(&mut self, span: Span) -> Result<()> {
        if self.state == State::Fresh { add_run(&mut self.freed, span) } else { Ok(()) }
    }

    /// Whether clusters wait for [`release`](Self::release), and how many runs of them.
    pub(crate) fn waiting(&self) -> usize {
        if self.state == State::Live { self.freed.len() } else { 0 }
    }

    /// Lowers the counts of what was freed. Everything that pointed there must have been overwritten durably.
    pub(crate) fn release<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        if self.state == State::Live {
            for span in core::mem::take(&mut self.freed) {
                self.give_back(store, span)?;
            }
        }
        Ok(())
    }

    /// Writes the refcount blocks that changed.
    pub(crate) fn write_blocks<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        self.blocks.write_dirty(store)
    }
}

/// Where the header names the refcount table: its offset (8 bytes) and clusters (4 bytes).
const REFCOUNT_FIELDS: u64 = core::mem::offset_of!(crate::format::RawHeader, refcount_table_offset) as u64;
