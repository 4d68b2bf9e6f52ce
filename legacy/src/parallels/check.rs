use core::fmt;

use instar_blockio::{BlockRead, BlockWrite, Result as BlockResult};
use zerocopy::byteorder::little_endian::U32;

use super::layout::Layout;
use super::{Error, Image, Writer};
use crate::check::{CheckReport, ClusterSet, Clusters, Repair};
use crate::store::{SECTOR, Store};
use crate::writer::copy_within;

/// Something wrong with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// The image was not closed after it was written.
    InUse,
    /// The header says wrongly where the clusters begin.
    DataOffset,
    /// An entry of the table, by its number, whose cluster lies outside the file.
    Outside(u32),
    /// Bytes of the file behind the last cluster.
    Leaked(u64),
    /// An entry of the table, by its number, whose cluster another entry has.
    Shared(u32),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse => f.write_str("the image was not closed"),
            Self::DataOffset => f.write_str("the header says wrongly where the data begin"),
            Self::Outside(index) => write!(f, "cluster {index} lies outside the file"),
            Self::Leaked(bytes) => write!(f, "nothing refers to the last {bytes} bytes of the file"),
            Self::Shared(index) => write!(f, "cluster {index} lies where another does"),
        }
    }
}

impl<D: BlockRead> Image<D> {
    /// Looks through header and table for faults.
    ///
    /// # Errors
    /// A table that can't be read.
    pub fn check(&self, found: &mut dyn FnMut(Finding)) -> Result<CheckReport, Error> {
        let mut report = CheckReport::default();
        if self.header().in_use {
            found(Finding::InUse);
            report.corruption(false);
        }
        if self.header().data_start_is_wrong {
            found(Finding::DataOffset);
            report.corruption(false);
        }
        let mut walk = Walk::new(&self.format, &self.store);
        let end = walk.image_end(|index, _| {
            found(Finding::Outside(index));
            report.corruption(false);
            Ok(())
        })?;
        let leaked = walk.file_end.saturating_sub(end);
        if leaked > 0 {
            found(Finding::Leaked(leaked));
            report.leaks = leaked.div_ceil(self.header().cluster_size);
        }
        walk.shared(|index, _| {
            found(Finding::Shared(index));
            report.corruption(false);
            Ok(())
        })?;
        report.image_end_offset = Some(end);
        report.clusters = Some(walk.statistics(end)?);
        Ok(report)
    }
}

impl<D: BlockWrite> Writer<D> {
    /// Looks through header and table, and repairs: entries that can't be are cleared, of clusters that two entries share the later gets a
    /// copy, and what nothing refers to at the end of the file is cut off.
    ///
    /// # Errors
    /// A table that can't be read or written.
    pub fn check(&mut self, repair: Repair, found: &mut dyn FnMut(Finding)) -> Result<CheckReport, Error> {
        let fix = repair.corruptions;
        let mut report = CheckReport::default();
        if self.format.header().in_use {
            found(Finding::InUse);
            report.corruption(fix);
            if fix {
                self.format.put_in_use(&mut self.store, false)?;
            }
        }
        if self.format.header().data_start_is_wrong {
            found(Finding::DataOffset);
            report.corruption(fix);
            if fix {
                self.correct_data_offset()?;
            }
        }
        let mut wrong = alloc::vec::Vec::new();
        let mut walk = Walk::new(&self.format, &self.store);
        let mut end = walk.image_end(|index, _| {
            found(Finding::Outside(index));
            report.corruption(fix);
            wrong.push(index);
            Ok(())
        })?;
        let file_end = walk.file_end;
        if fix {
            for index in core::mem::take(&mut wrong) {
                self.format.set_entry(&mut self.store, index.into(), None)?;
            }
        }
        let leaked = file_end.saturating_sub(end);
        if leaked > 0 {
            found(Finding::Leaked(leaked));
            let clusters = leaked.div_ceil(self.format.header().cluster_size);
            if repair.leaks {
                self.store.write_dirty(u64::MAX)?;
                self.store.file_mut().set_size(end)?;
                report.leaks_fixed = clusters;
            } else {
                report.leaks = clusters;
            }
        }
        let mut twice = alloc::vec::Vec::new();
        let mut walk = Walk::new(&self.format, &self.store);
        let used = walk.shared(|index, host| {
            found(Finding::Shared(index));
            report.corruption(fix);
            twice.push((index, host));
            Ok(())
        })?;
        if fix && !twice.is_empty() {
            end = self.separate(used, &twice, end)?;
        }
        self.format.set_end(end);
        self.store.write_dirty(u64::MAX)?;
        self.store.file_mut().flush()?;
        report.image_end_offset = Some(end);
        report.clusters = Some(Walk::new(&self.format, &self.store).statistics(end)?);
        Ok(report)
    }

    /// Gives clusters of their own to entries that shared one, in the first holes or at the end.
    fn separate(&mut self, mut used: ClusterSet, twice: &[(u32, u64)], end: u64) -> Result<u64, Error> {
        let (unit, start) = (self.format.header().cluster_size, self.format.header().data_start);
        let mut end = end;
        for &(index, old) in twice {
            let free = used.first_free();
            let new = free.saturating_mul(unit).saturating_add(start);
            self.format.set_entry(&mut self.store, index.into(), Some(new))?;
            copy_within(self.store.file_mut(), old, new, unit)?;
            used.insert(free);
            end = end.max(new + unit);
        }
        Ok(end)
    }

    fn correct_data_offset(&mut self) -> Result<(), Error> {
        let header = self.format.header_mut();
        header.raw.data_offset = U32::new(u32::try_from(header.data_start / SECTOR).unwrap_or(u32::MAX));
        header.data_start_is_wrong = false;
        let in_use = header.in_use;
        Ok(self.format.put_in_use(&mut self.store, in_use)?)
    }

    /// Repairs an image that was not closed, or in whose table something is wrong.
    pub(super) fn recover(&mut self) -> Result<(), Error> {
        let header = self.format.header();
        let (in_use, unit) = (header.in_use, header.cluster_size);
        let wrong_start = header.data_start_is_wrong;
        let mut walk = Walk::new(&self.format, &self.store);
        let mut outside = false;
        let end = walk.image_end(|_, _| {
            outside = true;
            Ok(())
        })?;
        let mut shared = false;
        walk.shared(|_, _| {
            shared = true;
            Ok(())
        })?;
        // What lies behind the end is written over.
        let leaked = walk.file_end > end.saturating_add(unit);
        if in_use || wrong_start || outside || shared || leaked {
            self.check(Repair { leaks: true, corruptions: true }, &mut |_| {})?;
        }
        Ok(())
    }
}

/// A walk over the entries that are not zero.
struct Walk<'a, D> {
    layout: &'a Layout,
    store: &'a Store<D>,
    /// Bytes of the file.
    file_end: u64,
}

impl<'a, D: BlockRead> Walk<'a, D> {
    fn new(layout: &'a Layout, store: &'a Store<D>) -> Self {
        // QEMU counts files in sectors.
        let file_end = store.file().size().checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
        Self { layout, store, file_end }
    }

    fn entries(&mut self, mut visit: impl FnMut(u32, u64) -> BlockResult<()>) -> BlockResult<()> {
        let count = u64::from(self.layout.header().entries);
        let mut index = 0;
        while index < count {
            let absent = self.layout.absent(self.store, index, count - index)?;
            if absent == 0
                && let Some(host) = self.layout.entry(self.store, index)?
            {
                visit(index as u32, host)?;
            }
            index += absent.max(1);
        }
        Ok(())
    }

    /// Where the last cluster inside the file ends; tells of those outside.
    fn image_end(&mut self, mut outside: impl FnMut(u32, u64) -> BlockResult<()>) -> BlockResult<u64> {
        let (unit, file_end) = (self.layout.header().cluster_size, self.file_end);
        let mut end = None;
        self.entries(|index, host| {
            if host + unit > file_end {
                return outside(index, host);
            }
            end = end.max(Some(host + unit));
            Ok(())
        })?;
        Ok(end.unwrap_or(self.layout.header().data_start))
    }

    /// Tells of entries whose cluster an earlier one has. Gives the clusters in use, counted from the start of the data.
    fn shared(&mut self, mut twice: impl FnMut(u32, u64) -> BlockResult<()>) -> BlockResult<ClusterSet> {
        let header = self.layout.header();
        let (unit, start, file_end) = (header.cluster_size, header.data_start, self.file_end);
        let mut used = ClusterSet::default();
        self.entries(|index, host| {
            let inside = host >= start && host + unit <= file_end;
            match inside && !used.insert((host - start) / unit) {
                true => twice(index, host),
                false => Ok(()),
            }
        })?;
        Ok(used)
    }

    fn statistics(&mut self, end: u64) -> BlockResult<Clusters> {
        let header = self.layout.header();
        let unit = header.cluster_size;
        let mut clusters = Clusters { total: header.entries.into(), ..Clusters::default() };
        let (mut before, mut next) = (0, 0);
        self.entries(|index, host| {
            if index != next {
                before = 0;
            }
            next = index + 1;
            if host + unit > end {
                before = 0;
                return Ok(());
            }
            clusters.fragmented += u64::from(before != 0 && before + unit != host);
            clusters.allocated += 1;
            before = host;
            Ok(())
        })?;
        Ok(clusters)
    }
}
