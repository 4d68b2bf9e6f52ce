//! References against reference counts.

use alloc::vec::Vec;

use instar_blockio::BlockRead;
use instar_blockio::check::{CheckReport, Clusters, Repair};

use super::Finding;
use super::counts::{Counts, REACH};
use super::tables::Table;
use crate::error::Result;
use crate::format::{COPIED, L1_OFFSET_MASK, L2_COMPRESSED, L2_OFFSET_MASK, REFCOUNT_BLOCK_MASK};
use crate::header::Header;
use crate::open::Image;
use crate::refcount::{count_at, max_count};

const BLOCK_RESERVED: u64 = 0x1ff;

/// Changes a count: cluster and new count.
pub(super) type SetCount<'a> = dyn FnMut(u64, u64) -> Result<()> + 'a;
/// Changes an entry: offset in the file and new value.
pub(super) type SetEntry<'a> = dyn FnMut(u64, u64) -> Result<()> + 'a;

/// A check under way.
pub(super) struct Checker<'a, D> {
    pub image: &'a Image<D>,
    pub file_len: u64,
    pub counts: Counts,
    pub report: CheckReport,
    pub clusters: Clusters,
    /// The refcount structures contradict themselves, or lack counts: correcting them one by one does not help.
    pub rebuild: bool,
    /// Where the refcount blocks lie, by number; 0 for none.
    pub blocks: Vec<u64>,
    /// Some entry of the active tables lacks the COPIED flag.
    pub uncopied: bool,
    /// Those of the corruptions that are references beyond what a count can hold.
    pub overflows: u64,
    found: &'a mut dyn FnMut(Finding),
}

impl<'a, D: BlockRead> Checker<'a, D> {
    pub fn new(image: &'a Image<D>, found: &'a mut dyn FnMut(Finding)) -> Self {
        let geometry = image.header.geometry;
        let total = geometry.clusters(image.header.virtual_size);
        Self {
            image,
            file_len: image.pages.file().size(),
            counts: Counts::default(),
            report: CheckReport::default(),
            clusters: Clusters { total, ..Clusters::default() },
            rebuild: false,
            blocks: Vec::new(),
            uncopied: false,
            overflows: 0,
            found,
        }
    }

    pub fn header(&self) -> &'a Header {
        &self.image.header
    }

    pub fn tell(&mut self, finding: Finding) {
        (self.found)(finding);
    }

    /// Tells a fault that is not repaired.
    pub fn fault(&mut self, finding: Finding) {
        self.report.corruptions += 1;
        self.tell(finding);
    }

    /// Clusters of the file.
    pub fn file_clusters(&self) -> u64 {
        self.header().geometry.clusters(self.file_len)
    }

    /// Counts a reference to each cluster of a range.
    pub fn refer(&mut self, offset: u64, len: u64) {
        self.refer_times(offset, len, 1);
    }

    /// Counts so many references to each cluster of a range.
    pub fn refer_times(&mut self, offset: u64, len: u64, times: u64) {
        let geometry = self.header().geometry;
        if len == 0 {
            return;
        }
        // The last cluster may lie only partly in the file.
        let end = offset.saturating_add(len);
        if end > self.file_len && end - self.file_len >= geometry.cluster_size() {
            return self.fault(Finding::BehindEnd { offset, len });
        }
        let most = max_count(geometry.refcount_order());
        for cluster in offset >> geometry.cluster_bits()..=(end - 1) >> geometry.cluster_bits() {
            let fitting = times.min(most.saturating_sub(self.counts.get(cluster)));
            self.counts.add(cluster, fitting);
            for _ in fitting..times {
                self.overflows += 1;
                self.fault(Finding::CountOverflow { offset: cluster << geometry.cluster_bits() });
            }
        }
    }

    /// The refcount blocks: they are referred to, and refer to all others.
    pub fn count_blocks(&mut self) -> Result<()> {
        let geometry = self.header().geometry;
        let cluster = geometry.cluster_size();
        let table = self.header().refcount_table_offset.0;
        let entries = u64::from(self.header().refcount_table_clusters) * cluster / 8;
        let mut index = 0;
        while index < entries {
            let at = table.saturating_add(index * 8);
            if at >= self.file_len {
                break;
            }
            let count = (entries - index).min(8192);
            let bytes = self.image.pages.read_vec(at, (count * 8) as usize)?;
            for (index, word) in (index..).zip(bytes.as_chunks::<8>().0) {
                let entry = u64::from_be_bytes(*word);
                if entry != 0 {
                    self.count_block(index, entry)?;
                }
            }
            index += count;
        }
        Ok(())
    }

    fn count_block(&mut self, index: u64, entry: u64) -> Result<()> {
        let geometry = self.header().geometry;
        let offset = entry & REFCOUNT_BLOCK_MASK;
        if entry & BLOCK_RESERVED != 0 {
            self.rebuild = true;
            self.fault(Finding::RefcountTableReserved { index });
            return Ok(());
        }
        if !geometry.is_aligned(offset) {
            self.rebuild = true;
            self.fault(Finding::BlockUnaligned { index });
            return Ok(());
        }
        if offset >> geometry.cluster_bits() >= self.file_clusters() {
            self.rebuild = true;
            self.fault(Finding::BlockOutside { index });
            return Ok(());
        }
        let index_in_memory = usize::try_from(index).map_err(|_| crate::Error::OutOfMemory)?;
        if self.blocks.len() <= index_in_memory {
            let more = index_in_memory + 1 - self.blocks.len();
            self.blocks.try_reserve(more).map_err(|_| crate::Error::OutOfMemory)?;
            self.blocks.resize(index_in_memory + 1, 0);
        }
        self.blocks[index_in_memory] = offset;
        self.refer(offset, geometry.cluster_size());
        let count = self.counts.get(offset >> geometry.cluster_bits());
        if count != 1 {
            self.rebuild = true;
            self.fault(Finding::BlockShared { index, count });
        }
        Ok(())
    }

    /// Compares each count with the references; gives the highest cluster in use. `set` corrects what `repair` allows.
    ///
    /// Only those parts of the file are looked at for which there is a refcount block or a reference.
    pub fn compare(&mut self, repair: Repair, set: &mut SetCount<'_>) -> Result<u64> {
        let geometry = self.header().geometry;
        let per_block = geometry.refcounts_per_block();
        let mut highest = 0;
        let mut numbers: Vec<u64> =
            (0..).zip(&self.blocks).filter(|(_, at)| **at != 0).map(|(number, _)| number).collect();
        for page in self.counts.pages() {
            numbers.extend(page / per_block..=(page + REACH - 1) / per_block);
        }
        numbers.sort_unstable();
        numbers.dedup();
        for group in numbers.chunks(self.tables_at_once()) {
            let offsets: Vec<u64> = group.iter().map(|number| self.block_at(*number)).collect();
            let tables = self.read_tables(&offsets.iter().copied().filter(|at| *at != 0).collect::<Vec<_>>())?;
            for (number, offset) in group.iter().zip(offsets) {
                let block = tables.iter().find(|table| offset != 0 && table.offset == offset).map(Table::bytes);
                highest = self.compare_block(*number, block, repair, set)?.unwrap_or(highest);
            }
        }
        Ok(highest)
    }

    /// Where a refcount block lies; 0 if there is none.
    fn block_at(&self, number: u64) -> u64 {
        usize::try_from(number).ok().and_then(|number| self.blocks.get(number)).copied().unwrap_or(0)
    }

    /// Compares the counts of one block with the references; gives the highest cluster in use.
    fn compare_block(
        &mut self,
        number: u64,
        block: Option<&[u8]>,
        repair: Repair,
        set: &mut SetCount<'_>,
    ) -> Result<Option<u64>> {
        let geometry = self.header().geometry;
        let mut highest = None;
        let first = number.saturating_mul(geometry.refcounts_per_block());
        let end = first.saturating_add(geometry.refcounts_per_block()).min(self.file_clusters());
        let mut cluster = first;
        while cluster < end {
            // Where nothing is counted and nothing referred to, whole pages are passed over.
            if block.is_none() && !self.counts.has_page(cluster) {
                cluster = (cluster / REACH + 1) * REACH;
                continue;
            }
            let stored =
                block.map_or(0, |block| count_at(block, geometry.refcount_order(), (cluster - first) as usize));
            let referenced = self.counts.get(cluster);
            if stored != 0 || referenced != 0 {
                highest = Some(cluster);
            }
            if stored != referenced {
                self.differs(cluster, stored, referenced, repair, set)?;
            }
            cluster += 1;
        }
        Ok(highest)
    }

    fn differs(
        &mut self,
        cluster: u64,
        stored: u64,
        referenced: u64,
        repair: Repair,
        set: &mut SetCount<'_>,
    ) -> Result<()> {
        let leaked = stored > referenced;
        if stored == 0 {
            self.rebuild = true;
        }
        let repaired = stored != 0 && if leaked { repair.leaks } else { repair.corruptions };
        self.tell(Finding::Count { cluster, stored, referenced, repaired });
        if repaired {
            set(cluster, referenced)?;
        }
        match (leaked, repaired) {
            (true, true) => self.report.leaks_fixed += 1,
            (true, false) => self.report.leaks += 1,
            (false, true) => self.report.corruptions_fixed += 1,
            (false, false) => self.report.corruptions += 1,
        }
        Ok(())
    }

    /// Compares the COPIED flags of the active tables with the counts as they are stored (`trust`: as they were found to be right).
    pub fn copied(&mut self, set: &mut SetEntry<'_>, repair: bool) -> Result<()> {
        // The usual image: everything has the flag, nothing is referred to twice, and the counts say so.
        let clean =
            self.report.corruptions + self.report.corruptions_fixed + self.report.leaks + self.report.leaks_fixed;
        if clean == 0 && !self.uncopied && !self.counts.any_shared() {
            return Ok(());
        }
        let header = self.header();
        let geometry = header.geometry;
        let tables = self.l1_entries(header.l1_offset.0, header.l1_entries.into())?;
        let words = if geometry.extended_l2() { 2 } else { 1 };
        for chunk in tables.chunks(self.tables_at_once()) {
            let mut offsets = Vec::new();
            for &(index, entry) in chunk {
                let offset = entry & L1_OFFSET_MASK;
                if let Some(count) = self.stored(offset >> geometry.cluster_bits(), repair)?
                    && (count == 1) != (entry & COPIED != 0)
                {
                    self.report.corruption(repair);
                    self.tell(Finding::CopiedTable { index, entry, count, repaired: repair });
                    if repair {
                        set(header.l1_offset.0 + index * 8, with_copied(entry, count))?;
                    }
                }
                offsets.push(offset);
            }
            for table in self.read_tables(&offsets)? {
                for index in 0..geometry.l2_entries() as usize {
                    let entry = table.word(index * words);
                    let host = entry & L2_OFFSET_MASK;
                    if host == 0 || entry & L2_COMPRESSED != 0 || self.image.l2.data_file {
                        continue;
                    }
                    if let Some(count) = self.stored(host >> geometry.cluster_bits(), repair)?
                        && (count == 1) != (entry & COPIED != 0)
                    {
                        self.report.corruption(repair);
                        self.tell(Finding::CopiedCluster { entry, count, repaired: repair });
                        if repair {
                            set(table.offset + (index * words * 8) as u64, with_copied(entry, count))?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The count of a cluster; after a repair, what it was corrected to.
    fn stored(&self, cluster: u64, repaired: bool) -> Result<Option<u64>> {
        if repaired {
            return Ok(Some(self.counts.get(cluster)));
        }
        let geometry = self.header().geometry;
        let per_block = geometry.refcounts_per_block();
        let offset = self.block_at(cluster / per_block);
        if offset == 0 {
            return Ok(Some(0));
        }
        let order = geometry.refcount_order();
        let index = cluster % per_block;
        let (skip, len, first) = match order {
            0..3 => ((index << order) / 8, 1, ((index << order) % 8) >> order),
            _ => (index << (order - 3), 1 << (order - 3), 0),
        };
        let mut bytes = [0; 8];
        self.image.pages.read(offset + skip, &mut bytes[..len])?;
        Ok(Some(count_at(&bytes, order, first as usize)))
    }

    /// The numbers; `highest`: the last cluster in use.
    pub fn finish(self, highest: u64) -> CheckReport {
        let end = highest.saturating_add(1).saturating_mul(self.header().geometry.cluster_size());
        CheckReport { image_end_offset: Some(end), clusters: Some(self.clusters), ..self.report }
    }
}

fn with_copied(entry: u64, count: u64) -> u64 {
    if count == 1 { entry | COPIED } else { entry & !COPIED }
}
