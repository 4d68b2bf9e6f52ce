//! Making, applying and deleting internal snapshots in an existing image: counts, copied flags, L1 table and snapshot table change in
//! one step.

use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use instar_blockio::{self as blockio, BlockWrite, ErrorKind};

use crate::addr::HostOffset;
use crate::error::{Error, Result, Table};
use crate::fork::{Fork, Home, tables_in};
use crate::format::{COPIED, MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::header::check_table;
use crate::pages::Pages;
use crate::snapshot::{self, Snapshot, SnapshotSelector, Stored};
use crate::tree::Flags;
use crate::write::Writer;

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
    /// [`Error::SnapshotsWithDataFile`], [`Error::TooManySnapshots`], [`Error::RefcountOverflow`] if a count can't rise; what tables
    /// and file report. The image is as it was, unless the header could not be written.
    pub fn create_snapshot(&mut self, new: &NewSnapshot) -> Result<()> {
        let (mut all, old_len) = self.load_snapshots()?;
        if all.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::TooManySnapshots);
        }
        let snapshot = Snapshot {
            id: next_id(&all).to_string().into_bytes(),
            name: new.name.clone(),
            l1_offset: HostOffset(0),
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
        let l1_len = self.l1.len() as u64 * 8;
        let table_len = snapshot::emit(&all)?.len() as u64;
        // The snapshot's L1 table and the snapshot table have their places first, and others for as long as L2 tables are elsewhere.
        let mut home = Home::default();
        // QEMU copies the table with its flags, which mean nothing in a snapshot.
        let before = self.l1.clone();
        let pieces = [l1_len, table_len, l1_len, table_len, l1_len];
        let done = self.in_one_step(&pieces, tables_in(&self.l1), |this, fork| {
            home.pieces = vec![fork.piece(0), fork.piece(1)];
            home.end = (this.piece(fork, 0) + l1_len).max(this.piece(fork, 1) + table_len);
            let mut l1 = this.l1.clone();
            this.set_flags(fork, &mut l1, Flags::Clear)?;
            this.raise_tree(&l1).map_err(overflow)?;
            let places = [2, 3].map(|index| this.piece(fork, index));
            this.place_snapshot(fork, places, &mut all, &flagged_as(&before, &l1), old_len)?;
            this.place_l1_if_changed(fork, this.piece(fork, 4), l1)
        })?;
        let bits = self.header.geometry.cluster_bits();
        let [own, table] = [home.pieces[0], home.pieces[1]].map(|span| span.first << bits);
        self.settle_down(done, &home, |this, fork, l1| {
            let temporary = all.last().map_or(0, |stored| stored.snapshot.l1_offset.0);
            this.leave(fork, temporary, l1_len)?;
            this.place_snapshot(fork, [own, table], &mut all, &flagged_as(&before, l1), table_len)
        })
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
        let stored = self.read_table(l1_offset, l1_entries)?;
        let mut l1: Vec<u64> = stored.iter().map(|entry| entry & !COPIED).collect();
        if l1 != stored {
            // Flags of a snapshot mean nothing; QEMU clears them here.
            self.check_place(self.alloc.touched(l1_offset.0, u64::from(l1_entries) * 8))?;
            self.main.write_words(l1_offset.0, &l1)?;
        }
        let entries = (needed as usize).max(l1.len()).max(self.l1.len());
        let len = entries as u64 * 8;
        // A longer table has a place of its own.
        let grows = entries > self.l1.len();
        let mut home = Home::default();
        let done = self.in_one_step(&[if grows { len } else { 0 }, len], tables_in(&l1), |this, fork| {
            if grows {
                let at = this.piece(fork, 0);
                home = Home { pieces: vec![fork.piece(0)], l1: Some(at), end: at + len };
            }
            this.raise_tree(&l1).map_err(overflow)?;
            this.leave_tree(fork, this.l1.clone())?;
            this.set_flags(fork, &mut l1, Flags::ByCount)?;
            l1.try_reserve(entries - l1.len()).map_err(|_| Error::OutOfMemory)?;
            l1.resize(entries, 0);
            this.header.virtual_size = virtual_size;
            this.place_l1_if_changed(fork, this.piece(fork, 1), l1)
        })?;
        self.settle_down(done, &home, |_, _, _| Ok(()))
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
        let theirs = self.read_table(l1_offset, l1_entries)?;
        let table_len = snapshot::emit(&all)?.len() as u64;
        let l1_len = self.l1.len() as u64 * 8;
        let mut home = Home::default();
        let done = self.in_one_step(&[table_len, l1_len], tables_in(&self.l1), |this, fork| {
            home.end = this.piece(fork, 0) + table_len;
            this.leave_tree(fork, theirs)?;
            this.leave(fork, l1_offset.0, u64::from(l1_entries) * 8)?;
            this.place_snapshots(fork, this.piece(fork, 0), &all, old_len)?;
            let mut l1 = this.l1.clone();
            this.set_flags(fork, &mut l1, Flags::ByCount)?;
            this.place_l1_if_changed(fork, this.piece(fork, 1), l1)
        })?;
        self.settle_down(done, &home, |_, _, _| Ok(()))
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

    /// Writes the snapshot table anew; the old one has `old_len` bytes.
    pub(crate) fn replace_snapshots(&mut self, all: &[Stored], old_len: u64) -> Result<()> {
        let len = snapshot::emit(all)?.len() as u64;
        let mut home = Home::default();
        let done = self.in_one_step(&[len], 0, |this, fork| {
            home.end = this.piece(fork, 0) + len;
            this.place_snapshots(fork, this.piece(fork, 0), all, old_len)
        })?;
        self.settle_down(done, &home, |_, _, _| Ok(()))
    }

    /// Writes the L1 table of the last snapshot, which is `l1`, and the table of `all`.
    fn place_snapshot(
        &mut self,
        fork: &mut Fork,
        [own, table]: [u64; 2],
        all: &mut [Stored],
        l1: &[u64],
        old_len: u64,
    ) -> Result<()> {
        self.main.write_words(own, l1)?;
        if let Some(Stored { snapshot, .. }) = all.last_mut() {
            snapshot.l1_offset = HostOffset(own);
        }
        self.place_snapshots(fork, table, all, old_len)
    }

    /// Writes the snapshot table to `at`; the old one has `old_len` bytes.
    fn place_snapshots(&mut self, fork: &mut Fork, at: u64, all: &[Stored], old_len: u64) -> Result<()> {
        self.main.write(at, &snapshot::emit(all)?)?;
        self.leave(fork, self.header.snapshots_offset.0, old_len)?;
        (self.header.snapshot_count, self.header.snapshots_offset) = (all.len() as u32, HostOffset(at));
        Ok(())
    }

    /// Makes `l1` the active L1 table, at `at` if it differs from the one that there is.
    fn place_l1_if_changed(&mut self, fork: &mut Fork, at: u64, l1: Vec<u64>) -> Result<()> {
        if l1 == self.l1 { Ok(self.leave(fork, at, l1.len() as u64 * 8)?) } else { self.place_l1(fork, at, l1) }
    }

    /// Makes `l1` the active L1 table, at `at`.
    pub(crate) fn place_l1(&mut self, fork: &mut Fork, at: u64, l1: Vec<u64>) -> Result<()> {
        self.main.write_words(at, &l1)?;
        self.leave(fork, self.header.l1_offset.0, self.l1.len() as u64 * 8)?;
        self.header.l1_entries = u32::try_from(l1.len()).map_err(|_| Error::ImageTooBig(self.header.virtual_size))?;
        self.header.l1_offset = HostOffset(at);
        self.l1 = l1;
        Ok(())
    }
}

/// The entries of `l1`, which have no copied flags, with the flags of `before`.
fn flagged_as(before: &[u64], l1: &[u64]) -> Vec<u64> {
    l1.iter().zip(before).map(|(entry, before)| entry | before & COPIED).collect()
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
