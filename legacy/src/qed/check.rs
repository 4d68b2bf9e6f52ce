use core::fmt;

use instar_blockio::{BlockRead, BlockWrite, Error as BlockError, ErrorKind, Result as BlockResult};

use super::header::Features;
use super::layout::{Layout, NONE, ZERO};
use super::{Error, Image, Writer};
use crate::check::{CheckReport, ClusterSet, Clusters, Repair};
use crate::store::{Rank, Store};

/// Something wrong with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// An L1 entry whose table lies outside the file: its number, and its value.
    Table(u64, u64),
    /// A disk offset whose cluster lies outside the file, and the entry's value.
    Cluster(u64, u64),
    /// A cluster of the file, by its offset, that is referred to more than once.
    Shared(u64),
    /// Clusters of the file that nothing refers to: their number.
    Leaked(u64),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(index, at) => write!(f, "L1 entry {index} refers to a table at {at:#x}, outside the image"),
            Self::Cluster(offset, at) => write!(f, "disk offset {offset:#x} lies at {at:#x}, outside the image"),
            Self::Shared(at) => write!(f, "cluster at {at:#x} is referred to more than once"),
            Self::Leaked(count) => write!(f, "nothing refers to {count} clusters"),
        }
    }
}

impl<D: BlockRead> Image<D> {
    /// Looks through all tables for faults.
    ///
    /// # Errors
    /// A table that can't be read.
    pub fn check(&self, found: &mut dyn FnMut(Finding)) -> Result<CheckReport, Error> {
        let mut check = Check::new(&self.format, found);
        check.tables(&self.store, &mut |_, _| Ok(()))?;
        Ok(check.finish())
    }
}

impl<D: BlockWrite> Writer<D> {
    /// Looks through all tables, and clears entries that can't be if they are to be repaired. Clusters that are shared or leaked stay so,
    /// as with QEMU. Then the image counts as closed cleanly.
    ///
    /// # Errors
    /// A table that can't be read or written.
    pub fn check(&mut self, repair: Repair, found: &mut dyn FnMut(Finding)) -> Result<CheckReport, Error> {
        let mut check = Check::new(&self.format, found);
        // QEMU's driver makes no difference between the two.
        check.repair = repair.corruptions || repair.leaks;
        let mut cleared = alloc::vec::Vec::new();
        check.tables(&self.store, &mut |at, rank| {
            cleared.try_reserve(1).map_err(|_| BlockError::new(ErrorKind::OutOfMemory))?;
            cleared.push((at, rank));
            Ok(())
        })?;
        let report = check.finish();
        for (at, rank) in cleared {
            self.store.put(at, &NONE.to_le_bytes(), rank)?;
        }
        self.store.write_dirty(u64::MAX)?;
        let needed = self.format.header().features.contains(Features::NEED_CHECK);
        if (repair.corruptions || repair.leaks) && needed && report.corruptions == 0 {
            self.store.file_mut().flush()?;
            let features = self.format.header().features.0 & !Features::NEED_CHECK.0;
            self.format.put_features(&mut self.store, Features(features))?;
            self.store.write_dirty(u64::MAX)?;
        }
        Ok(report)
    }

    /// Repairs an image that was not closed cleanly.
    pub(super) fn recover(&mut self) -> Result<(), Error> {
        let report = self.check(Repair { leaks: true, corruptions: true }, &mut |_| {})?;
        if report.corruptions > 0 { Err(Error::Damaged) } else { Ok(()) }
    }
}

/// Takes the place of an entry that is to be cleared.
type Clear<'a> = dyn FnMut(u64, Rank) -> BlockResult<()> + 'a;

struct Check<'a> {
    layout: &'a Layout,
    repair: bool,
    used: ClusterSet,
    report: CheckReport,
    clusters: Clusters,
    found: &'a mut dyn FnMut(Finding),
}

impl<'a> Check<'a> {
    fn new(layout: &'a Layout, found: &'a mut dyn FnMut(Finding)) -> Self {
        let header = layout.header();
        let total = header.image_size.div_ceil(header.cluster_size.into());
        Self {
            layout,
            repair: false,
            used: ClusterSet::default(),
            report: CheckReport::default(),
            clusters: Clusters { total, ..Clusters::default() },
            found,
        }
    }

    fn tables<D: BlockRead>(&mut self, store: &Store<D>, clear: &mut Clear<'_>) -> BlockResult<()> {
        let header = self.layout.header();
        let entries = header.table_entries();
        self.use_clusters(header.l1_offset, header.table_size.into());
        let mut index = 0;
        while index < entries {
            let at = header.l1_offset + index * 8;
            let absent = store.zero_run(at, (entries - index) * 8, 8)? / 8;
            if absent > 0 {
                index += absent;
                continue;
            }
            match self.layout.entry(store, header.l1_offset, index)? {
                NONE => {}
                table if !header.is_table(table, self.layout.file_end()) => {
                    self.wrong(Finding::Table(index, table), at, Rank::Root, clear)?;
                }
                // A table that was met before is not looked through again.
                table if self.use_clusters(table, header.table_size.into()) => {
                    self.entries(store, table, index * header.l1_reach(), clear)?;
                }
                _ => {}
            }
            index += 1;
        }
        Ok(())
    }

    /// The entries of an L2 table, for the disk from `start` on.
    fn entries<D: BlockRead>(
        &mut self,
        store: &Store<D>,
        table: u64,
        start: u64,
        clear: &mut Clear<'_>,
    ) -> BlockResult<()> {
        let header = self.layout.header();
        let (entries, unit) = (header.table_entries(), u64::from(header.cluster_size));
        let mut last = 0u64;
        let mut index = 0;
        while index < entries {
            let at = table + index * 8;
            let absent = store.zero_run(at, (entries - index) * 8, 8)? / 8;
            if absent > 0 {
                index += absent;
                continue;
            }
            let entry = self.layout.entry(store, table, index)?;
            if entry != NONE && entry != ZERO {
                self.clusters.allocated += 1;
                if last != 0 && last.wrapping_add(unit) != entry {
                    self.clusters.fragmented += 1;
                }
                last = entry;
                match self.layout.is_cluster(entry) {
                    true => {
                        self.use_clusters(entry, 1);
                    }
                    false => {
                        let offset = start.saturating_add(index * unit);
                        self.wrong(Finding::Cluster(offset, entry), at, Rank::Leaf, clear)?;
                    }
                }
            }
            index += 1;
        }
        Ok(())
    }

    fn wrong(&mut self, finding: Finding, at: u64, rank: Rank, clear: &mut Clear<'_>) -> BlockResult<()> {
        (self.found)(finding);
        self.report.corruption(self.repair);
        if self.repair { clear(at, rank) } else { Ok(()) }
    }

    /// Notes that clusters are in use; says whether none of them was before.
    fn use_clusters(&mut self, offset: u64, count: u64) -> bool {
        let unit = u64::from(self.layout.header().cluster_size);
        let mut new = true;
        for cluster in offset / unit..offset / unit + count {
            if !self.used.insert(cluster) {
                (self.found)(Finding::Shared(cluster * unit));
                self.report.corruption(false);
                new = false;
            }
        }
        new
    }

    fn finish(mut self) -> CheckReport {
        let header = self.layout.header();
        let clusters = self.layout.file_end() / u64::from(header.cluster_size);
        let leaks = clusters.saturating_sub(header.header_size.into()).saturating_sub(self.used.len());
        if leaks > 0 {
            (self.found)(Finding::Leaked(leaks));
        }
        self.report.leaks = leaks;
        self.report.clusters = Some(self.clusters);
        self.report
    }
}
