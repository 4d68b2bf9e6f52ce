//! Making, applying and deleting internal snapshots in an existing image.
//!
//! A new snapshot table lies in clusters of its own; writing two header fields makes it the table. Counts rise before
//! anything new points somewhere, and fall after nothing old does. What a crash leaves: clusters that nobody uses, and
//! clusters in use once without a copied flag, which the next write copies without need.

use alloc::string::ToString;
use alloc::vec::Vec;

use instar_blockio::{self as blockio, BlockWrite, ErrorKind};

use crate::addr::HostOffset;
use crate::error::{Error, Result, Table};
use crate::format::{MAX_L1_BYTES, MAX_SNAPSHOTS, RawHeader};
use crate::header::check_table;
use crate::pages::Pages;
use crate::snapshot::{self, Snapshot, SnapshotSelector, Stored};
use crate::store::zeroed;
use crate::tree::Flags;
use crate::write::{SIZE_FIELD, Writer};

/// What a device writes as a whole, bytes.
const SECTOR: usize = 512;
/// Header fields: entries and place of the snapshot table.
const SNAPSHOT_FIELDS: u64 = core::mem::offset_of!(RawHeader, nb_snapshots) as u64;

/// A snapshot to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name.
    pub name: Vec<u8>,
    /// The time: seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
}

impl<D: BlockWrite> Writer<D> {
    /// Keeps the present state as a snapshot, whose id is one more than the largest there is.
    ///
    /// # Errors
    /// [`Error::SnapshotsWithDataFile`], [`Error::TooManySnapshots`], [`Error::RefcountOverflow`] if a count can't rise, after
    /// which nothing has changed; what tables and file report.
    pub fn create_snapshot(&mut self, new: &NewSnapshot) -> Result<()> {
        let (mut all, old_len) = self.load_snapshots()?;
        if all.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::TooManySnapshots);
        }
        let geometry = self.header.geometry;
        let l1_len = self.l1.len() as u64 * 8;
        let l1_offset = HostOffset(self.take_clusters(geometry.clusters(l1_len))? * geometry.cluster_size());
        self.write_table_at(l1_offset.0, &self.l1.clone())?;
        self.set_active_flags(Flags::Clear)?;
        let l1 = self.l1.clone();
        if let Err(error) = self.raise_tree(&l1) {
            self.alloc.free(&mut self.main, self.alloc.touched(l1_offset.0, l1_len))?;
            self.set_active_flags(Flags::ByCount)?;
            return Err(overflow(error));
        }
        self.sync()?;
        let snapshot = Snapshot {
            id: next_id(&all).to_string().into_bytes(),
            name: new.name.clone(),
            l1_offset,
            l1_entries: self.header.l1_entries,
            date_sec: new.date_sec,
            date_nsec: new.date_nsec,
            vm_clock_nsec: 0,
            vm_state_size: 0,
            virtual_size: self.header.virtual_size,
            icount: Some(0),
        };
        all.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        all.push(Stored { snapshot, extra_len: 0, unknown: Vec::new() });
        self.store_snapshots(&all, old_len)
    }

    /// Makes the state of a snapshot the present one, its disk size included. The snapshot stays.
    ///
    /// # Errors
    /// [`Error::SnapshotNotFound`]; as [`create_snapshot`](Self::create_snapshot).
    pub fn apply_snapshot(&mut self, selector: SnapshotSelector<'_>) -> Result<()> {
        let (all, _) = self.load_snapshots()?;
        let Snapshot { l1_offset, l1_entries, virtual_size, .. } = self.pick(&all, selector)?.snapshot.clone();
        let needed = self.header.geometry.l1_entries(virtual_size);
        if needed > MAX_L1_BYTES / 8 || virtual_size > i64::MAX as u64 {
            return Err(Error::ImageTooBig(virtual_size));
        }
        let mut stored = self.read_table(l1_offset, l1_entries)?;
        if self.set_flags(&mut stored, Flags::Clear)? {
            self.write_table_at(l1_offset.0, &stored)?;
        }
        self.sync()?;
        self.main.flush()?;
        self.raise_tree(&stored).map_err(overflow)?;
        self.sync()?;
        self.main.flush()?;
        let old = core::mem::replace(&mut self.l1, stored);
        let entries = (needed as usize).max(self.l1.len()).max(old.len());
        self.l1.try_reserve(entries - self.l1.len()).map_err(|_| Error::OutOfMemory)?;
        self.l1.resize(entries, 0);
        self.switch_l1(&old, virtual_size)?;
        self.lower_tree(&old)?;
        self.set_active_flags(Flags::ByCount)?;
        Ok(())
    }

    /// Forgets a snapshot, and frees what it alone uses.
    ///
    /// # Errors
    /// [`Error::SnapshotNotFound`]; as [`create_snapshot`](Self::create_snapshot).
    pub fn delete_snapshot(&mut self, selector: SnapshotSelector<'_>) -> Result<()> {
        let (mut all, old_len) = self.load_snapshots()?;
        let _ = self.pick(&all, selector)?;
        let index = snapshot::find(&all, selector).ok_or(Error::SnapshotNotFound)?;
        let Snapshot { l1_offset, l1_entries, .. } = all.remove(index).snapshot;
        let l1 = self.read_table(l1_offset, l1_entries)?;
        self.store_snapshots(&all, old_len)?;
        self.lower_tree(&l1)?;
        self.drop_clusters(l1_offset.0, u64::from(l1_entries) * 8)?;
        Ok(self.set_active_flags(Flags::ByCount)?)
    }

    /// The snapshot table and its length in bytes.
    pub(crate) fn load_snapshots(&mut self) -> Result<(Vec<Stored>, u64)> {
        if self.data.is_some() {
            return Err(Error::SnapshotsWithDataFile);
        }
        self.begin_metadata()?;
        let header = self.header.clone();
        snapshot::load(&Pages::new(self.main.file(), 0), &header)
    }

    fn pick<'a>(&self, all: &'a [Stored], selector: SnapshotSelector<'_>) -> Result<&'a Stored> {
        let stored = snapshot::find(all, selector).and_then(|index| all.get(index)).ok_or(Error::SnapshotNotFound)?;
        let Snapshot { l1_offset, l1_entries, .. } = stored.snapshot;
        check_table(self.header.geometry, Table::SnapshotL1, l1_offset, l1_entries, 8, MAX_L1_BYTES)?;
        Ok(stored)
    }

    /// Writes the snapshot table into new clusters and makes it the table; frees the old one of `old_len` bytes.
    pub(crate) fn store_snapshots(&mut self, all: &[Stored], old_len: u64) -> Result<()> {
        let bytes = snapshot::emit(all)?;
        let geometry = self.header.geometry;
        let at = self.take_clusters(geometry.clusters(bytes.len() as u64))? * geometry.cluster_size();
        self.main.write(at, &bytes)?;
        self.sync()?;
        self.main.flush()?;
        let old = self.header.snapshots_offset.0;
        (self.header.snapshot_count, self.header.snapshots_offset) = (all.len() as u32, HostOffset(at));
        let mut fields = [0; 12];
        fields[..4].copy_from_slice(&self.header.snapshot_count.to_be_bytes());
        fields[4..].copy_from_slice(&at.to_be_bytes());
        self.main.write(SNAPSHOT_FIELDS, &fields)?;
        self.main.flush()?;
        Ok(self.drop_clusters(old, old_len)?)
    }

    fn write_table_at(&mut self, at: u64, table: &[u64]) -> blockio::Result<()> {
        let mut bytes = zeroed(table.len() * 8)?;
        for (to, from) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(table) {
            *to = from.to_be_bytes();
        }
        self.main.write(at, &bytes)
    }

    /// Makes `self.l1` the active table in the place of `old`, and `virtual_size` the size of the disk: by one write of one
    /// sector.
    fn switch_l1(&mut self, old: &[u64], virtual_size: u64) -> Result<()> {
        let per_sector = SECTOR / 8;
        let differing = |sector: usize| {
            let at = sector * per_sector;
            let part = |table: &[u64]| table.get(at..table.len().min(at + per_sector)).map(<[u64]>::to_vec);
            part(old) != part(&self.l1)
        };
        let mut changed = (0..self.l1.len().div_ceil(per_sector)).filter(|&sector| differing(sector));
        let (first, more) = (changed.next(), changed.next().is_some());
        if old.len() == self.l1.len() && virtual_size == self.header.virtual_size && !more {
            if let Some(sector) = first {
                let at = sector * per_sector;
                self.write_l1(at..self.l1.len().min(at + per_sector))?;
                self.main.flush()?;
            }
            return Ok(());
        }
        let geometry = self.header.geometry;
        let (old_at, old_len) = (self.header.l1_offset.0, old.len() as u64 * 8);
        let entries = u32::try_from(self.l1.len()).map_err(|_| Error::ImageTooBig(virtual_size))?;
        let at = self.take_clusters(geometry.clusters(u64::from(entries) * 8))? * geometry.cluster_size();
        self.header.l1_offset = HostOffset(at);
        self.write_l1(0..self.l1.len())?;
        self.sync()?;
        self.main.flush()?;
        (self.header.l1_entries, self.header.virtual_size) = (entries, virtual_size);
        let fields = self.header.emit();
        let changed = SIZE_FIELD as usize..core::mem::offset_of!(RawHeader, refcount_table_offset);
        self.main.write(SIZE_FIELD, fields.get(changed).unwrap_or_default())?;
        self.main.flush()?;
        if old_len != 0 {
            self.alloc.free(&mut self.main, self.alloc.touched(old_at, old_len))?;
        }
        Ok(())
    }
}

/// One more than the largest id; ids that are no numbers count as 0, and what follows a number is no part of it.
fn next_id(all: &[Stored]) -> u64 {
    let number = |id: &[u8]| {
        let digits = id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0u64, |number, digit| number.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
    };
    all.iter().map(|stored| number(&stored.snapshot.id)).max().unwrap_or(0).wrapping_add(1)
}

/// The only thing that is wrong with a count that can't rise is its width.
fn overflow(error: blockio::Error) -> Error {
    match error.kind() {
        ErrorKind::InvalidInput => Error::RefcountOverflow(error.offset().unwrap_or(0)),
        _ => Error::Io(error),
    }
}
