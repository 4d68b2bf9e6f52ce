//! Emptying an image: whatever it held, its backing image answers from then on.
//!
//! An image with nothing but a disk gets the layout of a fresh one. Its L1 table is cleared first, which changes nothing of
//! what is read if the backing image holds the same; then one write of the header's first sector goes over to new metadata:
//!
//! ```text
//! header │ refcount table │ refcount block │ L1 table          wanted: clusters 1, 2, 3 …
//! ```
//!
//! What lies there already is in use until the header says otherwise, so the metadata take a place behind at first if need
//! be. Images with more (snapshots, bitmaps, a data file, version 2) keep their tables, whose entries are cleared.

use alloc::vec::Vec;

use instar_blockio::{self as blockio, BlockWrite, zeroed};

use crate::addr::HostOffset;
use crate::allocator::Span;
use crate::cache::TableCache;
use crate::error::Result;
use crate::format::RawHeader;
use crate::header::EncryptionMethod;
use crate::l1::L1Entry;
use crate::l2::L2Entry;
use crate::refcount::set_count;
use crate::write::{L2_CACHE_LEN, Writer, is_unallocated};

/// Header fields from the place of the L1 table to the size of the refcount table.
const TABLE_FIELDS: u64 = core::mem::offset_of!(RawHeader, l1_table_offset) as u64;

impl<D: BlockWrite> Writer<D> {
    /// Takes everything out of an existing image, so that its backing image answers for the whole disk; durable afterwards.
    ///
    /// # Errors
    /// What tables and file report.
    pub fn make_empty(&mut self) -> Result<()> {
        self.flush()?;
        self.begin_metadata()?;
        match self.free_place() {
            Some(aside) => self.empty_completely(aside)?,
            None => self.clear_entries()?,
        }
        Ok(self.flush()?)
    }

    /// Clusters of the L1 table.
    fn l1_clusters(&self) -> u64 {
        self.header.geometry.clusters(self.l1.len() as u64 * 8)
    }

    /// Where the metadata can lie while those in use are overwritten: [`Self::l1_clusters`] and two more that the first refcount
    /// block counts. `None` if there is no such place, or if the image has more than a disk.
    fn free_place(&self) -> Option<u64> {
        let header = &self.header;
        let plain = header.version >= 3
            && header.snapshot_count == 0
            && self.extensions.bitmaps.is_none()
            && header.encryption != EncryptionMethod::Luks
            && self.data.is_none();
        let (geometry, count) = (header.geometry, self.l1_clusters() + 2);
        let limit = geometry.refcounts_per_block();
        if !plain || 1 + 2 * count > limit {
            return None;
        }
        let mut used: Vec<Span> = self.alloc.block_offsets().map(|at| self.alloc.touched(at, 1)).collect();
        used.push(
            self.alloc
                .touched(self.alloc.table_offset(), u64::from(self.alloc.table_clusters()) * geometry.cluster_size()),
        );
        used.push(self.alloc.touched(header.l1_offset.0, self.l1.len() as u64 * 8));
        let mut first = 1 + count;
        while let Some(hit) = used.iter().find(|used| used.overlaps(Span { first, count })) {
            first = hit.first.checked_add(hit.count)?;
        }
        (first.checked_add(count)? <= limit).then_some(first)
    }

    fn empty_completely(&mut self, aside: u64) -> blockio::Result<()> {
        self.failed = true; // until all is well
        self.l1.fill(0);
        self.write_l1(0..self.l1.len())?;
        self.main.flush()?;
        let cluster_size = self.header.geometry.cluster_size();
        self.l2 = TableCache::new(cluster_size as usize, L2_CACHE_LEN);
        self.side.get_mut().take();
        self.move_metadata(aside)?;
        self.move_metadata(1)?;
        self.main.set_end((3 + self.l1_clusters()) * cluster_size)?;
        self.failed = false;
        Ok(())
    }

    /// Lays metadata of an empty image at cluster `first` and makes the header name them.
    fn move_metadata(&mut self, first: u64) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        let (cluster_size, l1_clusters) = (geometry.cluster_size(), self.l1_clusters());
        let mut bytes = zeroed(((2 + l1_clusters) * cluster_size) as usize)?;
        let (table, rest) = bytes.split_at_mut(cluster_size as usize);
        let block_at = (first + 1) * cluster_size;
        table[..8].copy_from_slice(&block_at.to_be_bytes());
        let block = &mut rest[..cluster_size as usize];
        for cluster in core::iter::once(0).chain(first..first + 2 + l1_clusters) {
            set_count(block, geometry.refcount_order(), cluster as usize, 1);
        }
        self.main.write(first * cluster_size, &bytes)?;
        self.main.flush()?;
        let (table_at, l1_at) = (first * cluster_size, (first + 2) * cluster_size);
        let mut fields = [0; 20];
        fields[..8].copy_from_slice(&l1_at.to_be_bytes());
        fields[8..16].copy_from_slice(&table_at.to_be_bytes());
        fields[16..].copy_from_slice(&1u32.to_be_bytes());
        self.main.write(TABLE_FIELDS, &fields)?;
        self.main.flush()?;
        let mut table = alloc::vec![0; (cluster_size / 8) as usize];
        table[0] = block_at;
        self.header.l1_offset = HostOffset(l1_at);
        self.header.refcount_table_offset = HostOffset(table_at);
        self.header.refcount_table_clusters = 1;
        self.alloc.adopt(geometry, table, table_at);
        self.alloc.rewind();
        Ok(())
    }

    /// Clears all entries of all L2 tables.
    fn clear_entries(&mut self) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        let mut freed: Vec<Span> = Vec::new();
        for index in 0..self.l1.len() {
            if L1Entry::decode(self.l1[index]).table.is_none() {
                continue;
            }
            for slot in 0..geometry.l2_entries() {
                let guest =
                    (index as u64).saturating_mul(geometry.l2_span()).saturating_add(slot << geometry.cluster_bits());
                let old = self.entry(guest)?;
                if is_unallocated(old) {
                    continue;
                }
                let table = self.own_table(guest)?;
                self.set_entry(table, guest, L2Entry::UNALLOCATED)?;
                self.free_noted(old, &mut freed)?;
            }
            self.settle_freed()?;
        }
        self.sync()?;
        self.main.flush()?;
        let end = self.main.end();
        self.give_space_back(&freed, end)
    }
}
