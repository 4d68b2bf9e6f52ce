//! The walk over everything that refers to clusters of the file.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use instar_blockio::{BlockRead, ReadPart, zeroed};

use super::Finding;
use super::compare::Checker;
use crate::addr::HostOffset;
use crate::bitmap;
use crate::error::Result;
use crate::format::{BITMAP_OFFSET_MASK, COPIED, L1_OFFSET_MASK, L2_COMPRESSED, L2_OFFSET_MASK, L2_ZERO, MAX_L1_BYTES};
use crate::l2::L2Entry;
use crate::snapshot;

/// Reserved bits of an L1 entry.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of an L2 entry that is not compressed, without extended entries.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bytes of tables read at once.
const BATCH: usize = 2 << 20;

/// L2 tables that are remembered, see [`Walked`]; what lies beyond is read each time.
const MOST_WALKED: usize = 1 << 16;

/// L2 tables without a fault, and how often they were met again since they were read. Snapshots share most of their tables with each other and
/// with the disk: what such a table refers to is counted once more for each meeting, but the table is not read each time.
type Walked = BTreeMap<u64, u64>;

/// An L2 table or refcount block as it was read.
pub(super) struct Table {
    /// Where it lies.
    pub offset: u64,
    bytes: Vec<u8>,
}

impl Table {
    /// Its cluster.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The word at `index`, of 8 bytes.
    pub fn word(&self, index: usize) -> u64 {
        self.bytes.get(index * 8..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u64::from_be_bytes(*word))
    }
}

impl<D: BlockRead> Checker<'_, D> {
    /// Counts every reference.
    pub fn count(&mut self) -> Result<()> {
        let header = self.header();
        let (refcount_table, table_clusters) = (header.refcount_table_offset.0, header.refcount_table_clusters);
        let cluster = header.geometry.cluster_size();
        self.refer(0, cluster);
        let active = (header.l1_offset.0, u64::from(header.l1_entries));
        let mut walked = Walked::new();
        self.count_l1(active.0, active.1, true, &mut walked)?;
        let (snapshots, len) = snapshot::load(&self.image.pages, self.header())?;
        for stored in &snapshots {
            let (offset, entries) = (stored.snapshot.l1_offset.0, u64::from(stored.snapshot.l1_entries));
            if entries * 8 <= MAX_L1_BYTES {
                self.count_l1(offset, entries, false, &mut walked)?;
            } else {
                self.fault(Finding::BehindEnd { offset, len: entries * 8 });
            }
        }
        self.count_again(walked)?;
        self.refer(self.header().snapshots_offset.0, len);
        if let Some(crypto) = self.image.extensions.crypto {
            self.refer(crypto.offset.0, crypto.len);
        }
        self.count_bitmaps()?;
        self.refer(refcount_table, u64::from(table_clusters) * cluster);
        self.count_blocks()
    }

    /// An L1 table and everything below it.
    fn count_l1(&mut self, offset: u64, entries: u64, active: bool, walked: &mut Walked) -> Result<()> {
        self.refer(offset, entries * 8);
        let tables = self.l1_entries(offset, entries)?;
        let cluster = self.header().geometry.cluster_size();
        for chunk in tables.chunks(self.tables_at_once()) {
            let mut aligned = Vec::new();
            for &(_, entry) in chunk {
                let table = entry & L1_OFFSET_MASK;
                if entry & L1_RESERVED != 0 {
                    self.fault(Finding::L1Reserved { entry });
                }
                self.uncopied |= active && entry & COPIED == 0;
                self.refer(table, cluster);
                if !self.header().geometry.is_aligned(table) {
                    self.fault(Finding::L2Unaligned { offset: table });
                }
                match walked.get_mut(&table).filter(|_| !active) {
                    Some(again) => *again += 1,
                    None => aligned.push(table),
                }
            }
            for table in self.read_tables(&aligned)? {
                let faults = self.report.corruptions - self.overflows;
                self.count_l2(&table, active, 1);
                let is_met_again = self.header().snapshot_count > 0 && walked.len() < MOST_WALKED;
                if is_met_again && self.report.corruptions - self.overflows == faults {
                    walked.entry(table.offset).or_default();
                }
            }
        }
        Ok(())
    }

    /// What tables refer to that were met more than once.
    fn count_again(&mut self, walked: Walked) -> Result<()> {
        let again: Vec<(u64, u64)> = walked.into_iter().filter(|(_, times)| *times > 0).collect();
        for chunk in again.chunks(self.tables_at_once()) {
            let offsets: Vec<u64> = chunk.iter().map(|(offset, _)| *offset).collect();
            for (table, (_, times)) in self.read_tables(&offsets)?.iter().zip(chunk) {
                self.count_l2(table, false, *times);
            }
        }
        Ok(())
    }

    /// The entries of an L1 table that name L2 tables, with their numbers. What lies behind the end of the file is zero.
    pub fn l1_entries(&self, offset: u64, entries: u64) -> Result<Vec<(u64, u64)>> {
        const PIECE: u64 = 8192;
        let mut found = Vec::new();
        let mut index = 0;
        while index < entries {
            let at = offset.saturating_add(index * 8);
            if at >= self.file_len {
                break;
            }
            let count = (entries - index).min(PIECE);
            let bytes = self.image.pages.read_vec(at, (count * 8) as usize)?;
            for (number, word) in (index..).zip(bytes.as_chunks::<8>().0) {
                let entry = u64::from_be_bytes(*word);
                if entry & L1_OFFSET_MASK != 0 {
                    found.try_reserve(1).map_err(|_| crate::Error::OutOfMemory)?;
                    found.push((number, entry));
                }
            }
            index += count;
        }
        Ok(found)
    }

    /// Tables of a cluster each that are read in one turn.
    pub fn tables_at_once(&self) -> usize {
        (BATCH as u64 / self.header().geometry.cluster_size()).max(1) as usize
    }

    /// Reads tables of a cluster each in one turn; those behind the end of the file are left out.
    pub fn read_tables(&self, offsets: &[u64]) -> Result<Vec<Table>> {
        let cluster = self.header().geometry.cluster_size();
        let mut tables = Vec::new();
        for &offset in offsets.iter().filter(|offset| **offset < self.file_len) {
            let bytes = zeroed(cluster as usize)?;
            tables.push(Table { offset, bytes });
        }
        let mut parts: Vec<ReadPart<'_>> = Vec::new();
        for table in &mut tables {
            let inside = (self.file_len - table.offset).min(cluster) as usize;
            parts.push(ReadPart { offset: table.offset, buf: &mut table.bytes[..inside] });
        }
        self.image.pages.file().read_many(&mut parts)?;
        Ok(tables)
    }

    /// What an L2 table refers to, if it was met `times` times.
    fn count_l2(&mut self, table: &Table, active: bool, times: u64) {
        let geometry = self.header().geometry;
        let words = if geometry.extended_l2() { 2 } else { 1 };
        // Where the next cluster would be if the disk lay in one piece.
        let mut expected = None;
        for index in 0..geometry.l2_entries() {
            let entry = table.word(index as usize * words);
            let bitmap = if words == 2 { table.word(index as usize * words + 1) } else { 0 };
            if entry == 0 {
                continue;
            }
            if entry & L2_COMPRESSED != 0 {
                self.count_compressed(index, entry, bitmap, active, times);
                continue;
            }
            if entry & L2_RESERVED != 0 && words == 1 {
                self.fault(Finding::L2Reserved { entry });
            }
            let host = entry & L2_OFFSET_MASK;
            if host == 0 && !(self.image.l2.data_file && entry & COPIED != 0) {
                continue;
            }
            if !geometry.is_aligned(host) {
                self.fault(Finding::ClusterUnaligned { offset: host, zero: words == 1 && entry & L2_ZERO != 0 });
            }
            if active {
                self.uncopied |= entry & COPIED == 0;
                self.clusters.allocated += 1;
                self.clusters.fragmented += u64::from(expected.is_some_and(|expected| expected != host));
                expected = Some(host.wrapping_add(geometry.cluster_size()));
            }
            if !self.image.l2.data_file {
                self.refer_times(host, geometry.cluster_size(), times);
            }
        }
    }

    fn count_compressed(&mut self, index: u64, entry: u64, bitmap: u64, active: bool, times: u64) {
        let decoded = self.image.l2.decode(crate::GuestOffset(0), entry & !COPIED, 0);
        if self.image.l2.data_file {
            return self.fault(Finding::CompressedInDataFile { index, entry });
        }
        if bitmap != 0 {
            return self.fault(Finding::CompressedSubclusters { index, entry });
        }
        let Ok(L2Entry::Compressed { host: HostOffset(offset), len }) = decoded else { return };
        if entry & COPIED != 0 {
            self.fault(Finding::CompressedCopied { offset });
        }
        let start = offset & !511;
        self.refer_times(start, offset.saturating_add(len) - start, times);
        if active {
            self.clusters.allocated += 1;
            self.clusters.compressed += 1;
            // They lie anywhere by nature.
            self.clusters.fragmented += 1;
        }
    }

    fn count_bitmaps(&mut self) -> Result<()> {
        let Some(directory) = self.image.extensions.bitmaps else { return Ok(()) };
        self.refer(directory.offset.0, directory.len);
        let cluster = self.header().geometry.cluster_size();
        for bitmap in bitmap::load(&self.image.pages, self.header(), &directory)? {
            let entries = u64::from(bitmap.table_entries);
            self.refer(bitmap.table.0, entries * 8);
            let mut index = 0;
            while index < entries {
                let count = (entries - index).min(8192);
                let bytes =
                    self.image.pages.read_vec(bitmap.table.0.saturating_add(index * 8), (count * 8) as usize)?;
                for word in bytes.as_chunks::<8>().0 {
                    let offset = u64::from_be_bytes(*word) & BITMAP_OFFSET_MASK;
                    if offset != 0 {
                        self.refer(offset, cluster);
                    }
                }
                index += count;
            }
        }
        Ok(())
    }
}
