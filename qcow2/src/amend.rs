//! Changing the options of an existing image: version, refcount width, feature bits, data file, size.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::fmt;

use instar_blockio::{self as blockio, BlockWrite, ZeroMode};

use crate::addr::HostOffset;
use crate::bitmap_edit::Bitmaps;
use crate::error::{Error, Result};
use crate::format::V2_REFCOUNT_ORDER;
use crate::header::{Autoclear, Compatible, Incompatible};
use crate::l2::{L2Entry, SubclusterState, Subclusters};
use crate::resize::Growth;
use crate::snapshot::Stored;
use crate::write::Writer;

/// Changes to an existing image; what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AmendOptions {
    /// 2 or 3.
    pub version: Option<u32>,
    /// Width of refcounts, bits.
    pub refcount_bits: Option<u64>,
    /// Refcounts may be written late. (This crate never does.)
    pub lazy_refcounts: Option<bool>,
    /// Name of the external data file; an empty one takes the name away.
    pub data_file: Option<Vec<u8>>,
    /// The external data file is a valid raw image of its own.
    pub data_file_raw: Option<bool>,
    /// Name of the backing file, which must be the one it has.
    pub backing_file: Option<Vec<u8>>,
    /// Format of the backing file, which must be the one it has.
    pub backing_format: Option<Vec<u8>>,
    /// Size of the disk, bytes; 0 for no change.
    pub size: Option<u64>,
    /// Bytes of the disk of the backing image, for a disk that gets longer; absent: not known, as if there were no end of them.
    pub backing_size: Option<u64>,
    /// What the backing image holds in the range of [`Writer::backed_tail`], for a disk that gets longer.
    pub tail: Vec<u8>,
}

/// Why an option of an existing image can't be changed as wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AmendError {
    /// Neither version 2 nor 3.
    Version(u32),
    /// A refcount width that is no power of two from 1 to 64.
    RefcountBits(u64),
    /// Refcounts of another width than 16 need version 3.
    RefcountBitsVersion,
    /// A count is too large for the new width.
    RefcountTooLarge {
        /// The new width, bits.
        bits: u32,
        /// Where the cluster lies, bytes.
        offset: u64,
        /// Its count.
        count: u64,
    },
    /// The refcount table would exceed its limit.
    RefcountTable,
    /// A name for the data file of an image that has none.
    NoDataFile,
    /// The data file can't become raw any more.
    DataFileRaw,
    /// The backing file can't be changed in this way.
    Backing,
    /// Lazy refcounts need version 3.
    LazyRefcountsVersion,
    /// Version 2 has refcounts of 16 bits.
    DowngradeRefcountBits,
    /// Version 2 has no external data file.
    DowngradeDataFile,
    /// A snapshot's disk size or machine state can't be told in version 2.
    DowngradeSnapshots,
    /// Version 2 has no incompatible features: those of the image.
    DowngradeFeatures(u64),
    /// A size between sectors (512 bytes).
    SizeUnaligned,
    /// A size of 2^63 bytes or more.
    SizeNegative,
}

impl fmt::Display for AmendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Version(version) => write!(f, "no version {version}"),
            Self::RefcountBits(bits) => write!(f, "refcount width {bits} is no power of two from 1 to 64"),
            Self::RefcountBitsVersion => f.write_str("refcount widths other than 16 need version 3"),
            Self::RefcountTooLarge { bits, offset, count } => {
                write!(f, "refcount {count} of the cluster at {offset:#x} does not fit {bits} bits")
            }
            Self::RefcountTable => f.write_str("the refcount table would be too large"),
            Self::NoDataFile => f.write_str("the image has no external data file"),
            Self::DataFileRaw => f.write_str("the data file of an existing image can't become raw"),
            Self::Backing => f.write_str("the backing file can't be amended"),
            Self::LazyRefcountsVersion => f.write_str("lazy refcounts need version 3"),
            Self::DowngradeRefcountBits => f.write_str("version 2 has refcounts of 16 bits"),
            Self::DowngradeDataFile => f.write_str("version 2 has no external data file"),
            Self::DowngradeSnapshots => f.write_str("version 2 can't describe the snapshots"),
            Self::SizeUnaligned => f.write_str("the size is no multiple of 512 bytes"),
            Self::SizeNegative => f.write_str("the size has more than 63 bits"),
            Self::DowngradeFeatures(bits) => write!(f, "version 2 has no features {bits:#x}"),
        }
    }
}

impl core::error::Error for AmendError {}

impl From<AmendError> for Error {
    fn from(error: AmendError) -> Self {
        Self::Amend(error)
    }
}

/// Where the progress of an amendment is reported: steps done and steps in all.
pub(crate) struct Steps<'a> {
    report: &'a mut dyn FnMut(u64, u64),
    /// Operations that report steps, in all, and those that are done.
    operations: u64,
    operations_done: u64,
    /// Steps of the operations that are done, and of the present one.
    before: u64,
    last: u64,
}

impl Steps<'_> {
    /// Reports a step of the present operation. The operations to come are taken to be as long as those so far.
    pub(crate) fn step(&mut self, done: u64, total: u64) {
        self.last = total;
        let so_far = self.before.saturating_add(total);
        let left = self.operations.saturating_sub(self.operations_done + 1);
        let projected = so_far.saturating_mul(left) / (self.operations_done + 1);
        (self.report)(self.before.saturating_add(done), so_far.saturating_add(projected));
    }

    fn operation_done(&mut self) {
        self.before = self.before.saturating_add(self.last);
        self.operations_done += 1;
    }
}

/// How far zero clusters are expanded.
struct Expansion {
    /// L1 entries, of so many.
    visited: u64,
    total: u64,
    /// L2 tables without zero clusters: snapshots share them.
    done: BTreeSet<u64>,
}

impl<D: BlockWrite> Writer<D> {
    /// Changes options, in QEMU's order: upgrade, refcount width, header, lazy refcounts, size, downgrade. What was changed before
    /// a refusal stays. `progress` is called with the steps done and the steps in all. `bitmaps` are those of the image, to be
    /// stored afterwards whatever happens: a new size is theirs too, and version 2 has none.
    ///
    /// # Errors
    /// [`Error::Amend`], or what tables and file report.
    pub fn amend(
        &mut self,
        options: &AmendOptions,
        bitmaps: &mut Bitmaps,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let old_version = self.header.version;
        let version = options.version.unwrap_or(old_version);
        let order = self.check_amendment(options, version)?;
        let operations = u64::from(version != old_version) + u64::from(order != self.header.geometry.refcount_order());
        let mut steps = Steps { report: progress, operations, operations_done: 0, before: 0, last: 0 };
        if version > old_version {
            self.upgrade(&mut steps)?;
            steps.operation_done();
        }
        if order != self.header.geometry.refcount_order() {
            if version < 3 && order != V2_REFCOUNT_ORDER {
                return Err(AmendError::RefcountBitsVersion.into());
            }
            self.change_refcount_order(order, &mut steps)?;
            steps.operation_done();
        }
        self.amend_header(options)?;
        self.check_backing(options)?;
        self.amend_lazy_refcounts(options, version)?;
        if let Some(size) = options.size.filter(|&size| size != 0) {
            if size > i64::MAX as u64 {
                return Err(AmendError::SizeNegative.into());
            }
            if !size.is_multiple_of(512) {
                return Err(AmendError::SizeUnaligned.into());
            }
            let unknown = if self.has_backing() { u64::MAX } else { 0 };
            let backing_size = options.backing_size.unwrap_or(unknown);
            let growth = Growth { backing_size, tail: &options.tail, ..Growth::default() };
            self.check_size(size, growth)?;
            match size < self.header.virtual_size {
                true => self.shorten(size)?,
                false => self.lengthen(size, growth)?,
            }
            self.flush()?;
        }
        if version < old_version {
            self.downgrade(bitmaps, &mut steps)?;
        }
        Ok(self.flush()?)
    }

    /// The backing file can be named only as it is.
    fn check_backing(&self, options: &AmendOptions) -> Result<()> {
        let name = Some(&self.backing_name).filter(|name| !name.is_empty());
        let format = self.extensions.backing_format.as_ref().filter(|name| !name.is_empty());
        let same = options.backing_file.as_ref() == name && options.backing_format.as_ref() == format;
        let named = options.backing_file.is_some() || options.backing_format.is_some();
        if named && !same { Err(AmendError::Backing.into()) } else { Ok(()) }
    }

    /// What is refused before anything changes; returns log2 of the refcount width.
    fn check_amendment(&self, options: &AmendOptions, version: u32) -> Result<u32> {
        if !(2..=3).contains(&version) {
            return Err(AmendError::Version(version).into());
        }
        let has_data_file = self.header.incompatible.contains(Incompatible::DATA_FILE);
        if options.data_file.is_some() && !has_data_file {
            return Err(AmendError::NoDataFile.into());
        }
        if options.data_file_raw == Some(true) && !self.header.autoclear.contains(Autoclear::DATA_FILE_RAW) {
            return Err(AmendError::DataFileRaw.into());
        }
        match options.refcount_bits {
            None => Ok(self.header.geometry.refcount_order()),
            Some(bits) if bits.is_power_of_two() && bits <= 64 => Ok(bits.trailing_zeros()),
            Some(bits) => Err(AmendError::RefcountBits(bits).into()),
        }
    }

    fn upgrade(&mut self, steps: &mut Steps<'_>) -> Result<()> {
        steps.step(0, 2);
        if self.header.snapshot_count != 0 {
            let (all, old_len) = self.load_snapshots()?;
            // Machine state and disk size, 8 bytes each.
            if all.iter().any(|stored| stored.extra_len < 16) {
                self.replace_snapshots(&all, old_len)?;
            }
        }
        steps.step(1, 2);
        self.header.version = 3;
        self.format.zero_clusters = true;
        self.rewrite_header()?;
        steps.step(2, 2);
        Ok(())
    }

    fn amend_header(&mut self, options: &AmendOptions) -> Result<()> {
        if let Some(raw) = options.data_file_raw {
            self.header.autoclear.set(Autoclear::DATA_FILE_RAW, raw);
        }
        if let Some(name) = &options.data_file {
            self.extensions.data_file = Some(name.clone()).filter(|name| !name.is_empty());
        }
        self.rewrite_header()
    }

    fn amend_lazy_refcounts(&mut self, options: &AmendOptions, version: u32) -> Result<()> {
        let present = self.header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        match options.lazy_refcounts {
            Some(wanted) if wanted != present => {
                if wanted && version < 3 {
                    return Err(AmendError::LazyRefcountsVersion.into());
                }
                self.header.compatible.set(Compatible::LAZY_REFCOUNTS, wanted);
                self.rewrite_header()
            }
            _ => Ok(()),
        }
    }

    /// Goes back to version 2. Its headers can't vouch for bitmaps, so they go.
    fn downgrade(&mut self, bitmaps: &mut Bitmaps, steps: &mut Steps<'_>) -> Result<()> {
        if self.header.geometry.refcount_order() != V2_REFCOUNT_ORDER {
            return Err(AmendError::DowngradeRefcountBits.into());
        }
        if self.data.is_some() {
            return Err(AmendError::DowngradeDataFile.into());
        }
        let (snapshots, _) = self.load_snapshots()?;
        let told = |stored: &Stored| {
            stored.snapshot.virtual_size == self.header.virtual_size
                && u32::try_from(stored.snapshot.vm_state_size).is_ok()
        };
        if !snapshots.iter().all(told) {
            return Err(AmendError::DowngradeSnapshots.into());
        }
        let features = self.header.incompatible - Incompatible::DIRTY;
        if !features.is_empty() {
            return Err(AmendError::DowngradeFeatures(features.bits()).into());
        }
        self.expand_zero_clusters(&snapshots, steps)?;
        let names: Vec<Vec<u8>> = bitmaps.names().map(<[u8]>::to_vec).collect();
        for name in names {
            self.remove_bitmap(bitmaps, &name)?;
        }
        self.header.version = 2;
        self.header.compatible = Compatible::empty();
        self.header.autoclear = Autoclear::empty();
        self.format.zero_clusters = false;
        self.rewrite_header()
    }

    /// Turns zero clusters, which version 2 has not, into data clusters or none, in the active state and all snapshots.
    fn expand_zero_clusters(&mut self, snapshots: &[Stored], steps: &mut Steps<'_>) -> Result<()> {
        let in_snapshots: u64 = snapshots.iter().map(|stored| u64::from(stored.snapshot.l1_entries)).sum();
        let total = in_snapshots + self.l1.len() as u64;
        let mut progress = Expansion { visited: 0, total, done: BTreeSet::new() };
        let active = self.l1.clone();
        self.expand_in_tables(&active, &mut progress, steps)?;
        for Stored { snapshot, .. } in snapshots {
            let l1 = self.read_table(snapshot.l1_offset, snapshot.l1_entries)?;
            self.expand_in_tables(&l1, &mut progress, steps)?;
        }
        self.sync()?;
        Ok(self.main.flush()?)
    }

    fn expand_in_tables(&mut self, l1: &[u64], progress: &mut Expansion, steps: &mut Steps<'_>) -> Result<()> {
        let geometry = self.header.geometry;
        for (index, &entry) in l1.iter().enumerate() {
            if let Some(table) = self.table_of(index, entry)?
                // One behind the end of the file reads as empty.
                && table.0 < self.main.end()
                && progress.done.insert(table.0)
            {
                let start = (index as u64).saturating_mul(geometry.l2_span());
                let cluster = table.0 >> geometry.cluster_bits();
                let users = self.alloc.count(&mut self.main, cluster)?;
                for slot in 0..geometry.l2_entries() {
                    self.expand_cluster(table.0, start.saturating_add(slot << geometry.cluster_bits()), users)?;
                }
            }
            progress.visited += 1;
            steps.step(progress.visited, progress.total);
        }
        Ok(())
    }

    /// Expands one entry of a table that `users` L1 tables name.
    fn expand_cluster(&mut self, table: u64, guest: u64, users: u64) -> Result<()> {
        let L2Entry::Cluster { host, subclusters, .. } = self.entry_in(table, guest)? else { return Ok(()) };
        if subclusters.state(0) != SubclusterState::Zero {
            return Ok(());
        }
        let cluster_size = self.header.geometry.cluster_size();
        let place = match host {
            Some(host) => host.0,
            None if !self.has_backing() => return Ok(self.set_entry(table, guest, L2Entry::UNALLOCATED)?),
            None => {
                let first = self.take_clusters(1)?;
                for _ in 1..users {
                    self.alloc.raise(&mut self.main, first)?;
                }
                first * cluster_size
            }
        };
        self.zero_place(place, cluster_size)?;
        let entry = L2Entry::Cluster {
            host: Some(HostOffset(place)),
            copied: users == 1,
            subclusters: Subclusters::all_allocated(self.header.geometry.subclusters()),
        };
        Ok(self.set_entry(table, guest, entry)?)
    }

    /// Makes a place of the file read as zero.
    fn zero_place(&mut self, at: u64, len: u64) -> blockio::Result<()> {
        self.main.check_room(at + len)?;
        self.main.extend(at + len);
        self.main.settle()?;
        self.main.file_mut().write_zeroes(at, len, ZeroMode::KeepAllocated)
    }
}
