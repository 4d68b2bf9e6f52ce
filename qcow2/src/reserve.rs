//! Reserve, write, commit: where data go, in QEMU's order.
//!
//! A reservation is one run in one file. It may begin in a cluster that the disk offset already owns and go on in new
//! clusters right behind that one. New clusters that no entry refers to yet are kept in [`Reserved`], so that a second
//! reservation for another part of the same cluster gets the same place.

use alloc::vec::Vec;

use instar_blockio::{BlockAlloc, BlockRead, BlockWrite, Error, ErrorKind, Reservation, Result, check_range, zeroed};

use crate::addr::{GuestOffset, HostOffset};
use crate::allocator::Span;
use crate::l2::{L2Entry, SubclusterState, Subclusters};
use crate::write::Writer;

/// Longest reservation before rounding down to clusters, bytes (QEMU's limit for a request).
const MAX_RESERVATION: u64 = i32::MAX as u64;

/// Open reservations.
#[derive(Debug, Default)]
pub(crate) struct Reserved {
    open: Vec<Reservation>,
    runs: Vec<Run>,
}

/// New clusters that belong to open reservations.
#[derive(Debug)]
struct Run {
    /// Disk offset of the first, divided by the cluster size.
    guest: Span,
    /// Byte in the file where the first lies.
    host: u64,
    /// Reservations that include some of them.
    users: u32,
    /// One of these was given back: not every cluster may have got an entry.
    aborted: bool,
}

/// How an entry changes when clusters are linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// They hold data now.
    Data,
    /// They only have a place; subclusters stay unallocated.
    Place,
}

impl Reserved {
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// The place of a new cluster.
    fn place(&self, cluster: u64, cluster_bits: u32) -> Option<u64> {
        let run = self.runs.iter().find(|run| run.guest.overlaps(Span { first: cluster, count: 1 }))?;
        Some(run.host + ((cluster - run.guest.first) << cluster_bits))
    }

    /// Whether an open reservation touches disk bytes.
    pub(crate) fn touches(&self, start: u64, end: u64) -> bool {
        self.open.iter().any(|open| open.offset < end && start < open.offset + open.len)
    }
}

impl<D: BlockWrite> Writer<D> {
    fn cluster_of(&self, guest: u64) -> u64 {
        guest >> self.header.geometry.cluster_bits()
    }

    /// The clusters that a range of the disk touches.
    fn guest_span(&self, offset: u64, len: u64) -> Span {
        let first = self.cluster_of(offset);
        Span { first, count: self.cluster_of(offset + len - 1) - first + 1 }
    }

    /// The place where the cluster at `guest` may be written as it is.
    fn writable_place(&self, table: u64, guest: u64) -> Result<Option<u64>> {
        if let Some(place) = self.reserved.place(self.cluster_of(guest), self.header.geometry.cluster_bits()) {
            return Ok(Some(place));
        }
        Ok(match self.entry_in(table, guest)? {
            L2Entry::Cluster { host: Some(host), copied: true, .. } => Some(host.0),
            _ => None,
        })
    }

    /// A part of a reservation: from `offset` on, clusters that are either all writable or all new. `wanted` is where the
    /// part before ended; `None` if this one can't lie there.
    fn reserve_part(&mut self, offset: u64, len: u64, wanted: Option<u64>) -> Result<Option<(u64, u64)>> {
        let geometry = self.header.geometry;
        let table = self.own_table(offset)?;
        let (start, skip) = (geometry.cluster_start(offset), geometry.in_cluster(offset));
        let left = geometry.l2_entries() - geometry.l2_index(GuestOffset(offset));
        let limit = geometry.clusters(skip + len).min(left);
        let guest = |index: u64| start + index * geometry.cluster_size();
        let mut count = 1;
        let host = if let Some(host) = self.writable_place(table, offset)? {
            if wanted.is_some_and(|wanted| wanted != host + skip) {
                return Ok(None);
            }
            while count < limit
                && self.writable_place(table, guest(count))? == Some(host + count * geometry.cluster_size())
            {
                count += 1;
            }
            if self.data.is_none() {
                self.check_place(Span { first: self.cluster_of(host), count })?;
            }
            host
        } else {
            while count < limit && self.writable_place(table, guest(count))?.is_none() {
                count += 1;
            }
            let Some(host) = self.take_run(start, &mut count, wanted)? else { return Ok(None) };
            let guest = Span { first: self.cluster_of(start), count };
            self.reserved.runs.push(Run { guest, host, users: 0, aborted: false });
            host
        };
        Ok(Some((host + skip, len.min(count * geometry.cluster_size() - skip))))
    }

    /// Takes new clusters for the disk offset `start`, at `wanted` if that is given.
    fn take_run(&mut self, start: u64, count: &mut u64, wanted: Option<u64>) -> Result<Option<u64>> {
        let geometry = self.header.geometry;
        if self.data.is_some() {
            return Ok(Some(start));
        }
        let first = match wanted {
            None => self.take_clusters(*count)?,
            Some(wanted) => {
                let first = self.cluster_of(wanted);
                *count = self.alloc.allocate_at(&mut self.main, first, *count)?;
                if *count == 0 {
                    return Ok(None);
                }
                self.main.check_room((first + *count) * geometry.cluster_size())?;
                self.check_place(Span { first, count: *count })?;
                first
            }
        };
        Ok(Some(first * geometry.cluster_size()))
    }

    /// Refuses to write a part of a unit of which the rest is only known to the backing image.
    fn check_backed_edges(&self, offset: u64, len: u64) -> Result<()> {
        let (unit, end) = (self.alloc_unit(), offset + len);
        if !self.has_backing() {
            return Ok(());
        }
        for start in [offset / unit * unit, (end - 1) / unit * unit] {
            let stop = (start + unit).min(self.size());
            let partial = start < offset || end < stop;
            if partial && !self.reserved.touches(start, stop) && self.state_at(start)? == SubclusterState::Unallocated {
                return Err(Error::new(ErrorKind::InvalidInput).at(offset));
            }
        }
        Ok(())
    }

    /// The state of the subcluster at a disk offset. What is compressed counts as allocated.
    pub(crate) fn state_at(&self, guest: u64) -> Result<SubclusterState> {
        Ok(match self.entry(guest)? {
            L2Entry::Compressed { .. } => SubclusterState::Allocated,
            L2Entry::Cluster { subclusters, .. } => {
                subclusters.state(self.header.geometry.subcluster_index(GuestOffset(guest)))
            }
        })
    }

    /// Prepares what a reservation leaves of the units that it touches: copies the old contents or makes them zero.
    fn fill_edges(&mut self, offset: u64, len: u64, host: u64) -> Result<()> {
        let geometry = self.header.geometry;
        let (size, end) = (geometry.cluster_size(), offset + len);
        let (first, last) = (geometry.cluster_start(offset), geometry.cluster_start(end - 1));
        for start in [Some(first), (last != first).then_some(last)].into_iter().flatten() {
            let (from, to) = (offset.max(start) - start, end.min(start + size) - start);
            if to - from < size {
                let place = host - geometry.in_cluster(offset) + (start - first);
                self.fill_cluster(start, place, from, to)?;
            }
        }
        Ok(())
    }

    /// [`fill_edges`](Self::fill_edges) for the cluster at `guest` with its place `place`, of which the bytes
    /// `from..to` will be written.
    fn fill_cluster(&mut self, guest: u64, place: u64, from: u64, to: u64) -> Result<()> {
        let geometry = self.header.geometry;
        let size = geometry.cluster_size();
        let others = self.reserved.touches(guest, guest + size);
        let (old, subclusters) = match self.entry(guest)? {
            L2Entry::Compressed { .. } if others => return Ok(()),
            L2Entry::Compressed { host, len } => {
                let old = self.decompressed(guest, host.0, len)?;
                self.write_contents(guest, place, &old[..from as usize])?;
                return self.write_contents(guest + to, place + to, &old[to as usize..]);
            }
            L2Entry::Cluster { host, subclusters, .. } => (host.map(|host| host.0), subclusters),
        };
        let kept = old == Some(place);
        let unit = geometry.subcluster_size();
        for index in 0..geometry.subclusters() {
            let (start, end) = (u64::from(index) * unit, (u64::from(index) + 1) * unit);
            let touched = start < to && from < end;
            let prepared = others && self.reserved.touches(guest + start, guest + end);
            let gaps =
                if touched { [(start, from.max(start)), (to.min(end), end)] } else { [(start, end), (end, end)] };
            for (start, end) in gaps.into_iter().filter(|(start, end)| start < end) {
                match (subclusters.state(index), old) {
                    (SubclusterState::Allocated, Some(old)) if !kept && !others => {
                        self.copy(guest + start, old + start, place + start, end - start)?;
                    }
                    (SubclusterState::Allocated, _) => (),
                    // Another reservation of this subcluster has cleared it before.
                    _ if !touched || prepared => (),
                    // The place may hold what was there before the zeroes.
                    (SubclusterState::Zero, _) if kept => {
                        self.fill_contents(guest + start, place + start, end - start)?
                    }
                    _ => self.clear(guest, place, start, end)?,
                }
            }
        }
        Ok(())
    }

    fn copy(&mut self, guest: u64, from: u64, to: u64, len: u64) -> Result<()> {
        let mut bytes = zeroed(len as usize)?;
        self.read_contents(guest, from, &mut bytes)?;
        self.write_contents(guest, to, &bytes)
    }

    /// Makes the bytes `start..end` of the cluster for `guest` at `place` zero.
    fn clear(&mut self, guest: u64, place: u64, start: u64, end: u64) -> Result<()> {
        let pristine = self.alloc.is_pristine(Span { first: self.cluster_of(place), count: 1 });
        if pristine && self.cipher.is_none() && self.clusters_file().is_sparse() {
            self.clusters_file().extend(place + end);
            return Ok(());
        }
        self.fill_contents(guest + start, place + start, end - start)
    }

    /// Enters clusters in the L2 tables and frees what they replace.
    pub(crate) fn link(&mut self, offset: u64, len: u64, host: u64, how: Link) -> Result<()> {
        let geometry = self.header.geometry;
        let (size, end) = (geometry.cluster_size(), offset + len);
        let first = geometry.cluster_start(offset);
        let mut guest = first;
        while guest < end {
            let table = self.own_table(guest)?;
            let old = self.entry_in(table, guest)?;
            let place = host - geometry.in_cluster(offset) + (guest - first);
            let mask = match how {
                Link::Place if geometry.extended_l2() => 0,
                _ => self.touched_subclusters(offset.max(guest) - guest, end.min(guest + size) - guest),
            };
            let (new, replaced) = linked(old, HostOffset(place), mask, geometry.subclusters());
            if new != old {
                self.set_entry(table, guest, new)?;
            }
            if replaced {
                self.free_entry(old)?;
            }
            guest += size;
        }
        Ok(())
    }

    /// Gives the beginning of `offset..offset + len` a place, which it returns.
    pub(crate) fn preallocate_run(&mut self, offset: u64, len: u64) -> Result<Reservation> {
        let place = self.reserve(offset, len)?;
        self.take_open(&place)?;
        self.link(place.offset, place.len, place.host, Link::Place)?;
        self.leave_runs(&place, false)?;
        Ok(place)
    }

    /// Bits of the subclusters that the bytes `from..to` of a cluster touch.
    pub(crate) fn touched_subclusters(&self, from: u64, to: u64) -> u32 {
        let unit = self.header.geometry.subcluster_size();
        let (first, last) = ((from / unit) as u32, ((to - 1) / unit) as u32);
        (u32::MAX >> (31 - (last - first))) << first
    }

    /// Ends a reservation's part in its new clusters.
    fn leave_runs(&mut self, done: &Reservation, aborted: bool) -> Result<()> {
        let span = self.guest_span(done.offset, done.len);
        for run in self.reserved.runs.iter_mut().filter(|run| run.guest.overlaps(span)) {
            run.users = run.users.saturating_sub(1);
            run.aborted |= aborted;
        }
        let mut unused = Vec::new();
        self.reserved.runs.retain_mut(|run| {
            if run.users == 0 && run.aborted {
                unused.push((run.guest, run.host));
            }
            run.users != 0
        });
        for (guest, host) in unused {
            self.free_unlinked(guest, host)?;
        }
        Ok(())
    }

    /// Frees the clusters at `host` that were meant for `guest` but got no entry.
    fn free_unlinked(&mut self, guest: Span, host: u64) -> Result<()> {
        let size = self.header.geometry.cluster_size();
        if self.data.is_some() {
            return self.alloc.note_used(guest);
        }
        for index in 0..guest.count {
            let place = host + index * size;
            let linked = matches!(
                self.entry((guest.first + index) * size)?,
                L2Entry::Cluster { host: Some(host), .. } if host.0 == place
            );
            if !linked {
                self.alloc.free(&mut self.main, self.alloc.touched(place, 1))?;
            }
        }
        Ok(())
    }

    fn take_open(&mut self, reservation: &Reservation) -> Result<()> {
        let index = self.reserved.open.iter().position(|open| open == reservation);
        let index = index.ok_or(Error::new(ErrorKind::InvalidInput).at(reservation.offset))?;
        let _ = self.reserved.open.swap_remove(index);
        Ok(())
    }
}

/// The entry after the subclusters of `mask` at `place` have been written, and whether the old one's place is left.
fn linked(old: L2Entry, place: HostOffset, mask: u32, count: u32) -> (L2Entry, bool) {
    let (subclusters, replaced) = match old {
        L2Entry::Compressed { .. } => (Subclusters::all_allocated(count), true),
        L2Entry::Cluster { host, subclusters, .. } => {
            let now = Subclusters { allocated: subclusters.allocated | mask, zero: subclusters.zero & !mask };
            (now, host.is_some_and(|host| host != place))
        }
    };
    (L2Entry::Cluster { host: Some(place), copied: true, subclusters }, replaced)
}

impl<D: BlockWrite> BlockAlloc for Writer<D> {
    fn reserve(&mut self, offset: u64, len: u64) -> Result<Reservation> {
        check_range(self.size(), offset, len)?;
        if len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        self.begin()?;
        let len = len.min(MAX_RESERVATION & !(self.header.geometry.cluster_size() - 1));
        self.check_backed_edges(offset, len)?;
        let (mut host, mut got) = (0, 0);
        while got < len {
            let wanted = (got != 0).then_some(host + got);
            let Some((place, more)) = self.reserve_part(offset + got, len - got, wanted)? else { break };
            if got == 0 {
                host = place;
            }
            got += more;
        }
        let span = self.guest_span(offset, got);
        for run in self.reserved.runs.iter_mut().filter(|run| run.guest.overlaps(span)) {
            run.users += 1;
        }
        let id = self.data.as_ref().unwrap_or(&self.main).id;
        let reservation = Reservation { offset, len: got, file: id, host, stored_len: got, compressed: false };
        let filled = self.fill_edges(offset, got, host);
        self.reserved.open.push(reservation);
        if let Err(error) = filled {
            self.abort(reservation)?;
            return Err(error);
        }
        self.clusters_file().extend(host + got);
        Ok(reservation)
    }

    /// `offset` is a multiple of the cluster size; `stored_len` is 1 to the cluster size.
    fn reserve_compressed(&mut self, offset: u64, stored_len: u32) -> Result<Reservation> {
        let size = self.header.geometry.cluster_size();
        check_range(self.size(), offset, 1)?;
        if !self.header.geometry.is_aligned(offset) || stored_len == 0 || u64::from(stored_len) > size {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        if self.data.is_some() {
            return Err(ErrorKind::Unsupported.into());
        }
        self.begin()?;
        let table = self.own_table(offset)?;
        if self.writable_place(table, offset)?.is_some() {
            // QEMU does not overwrite a cluster by a compressed one either.
            return Err(Error::from_os(EIO).at(offset));
        }
        let host = self.alloc.allocate_bytes(&mut self.main, stored_len.into())?;
        self.check_place(self.alloc.touched(host, stored_len.into()))?;
        self.main.extend(host + u64::from(stored_len));
        let reservation = Reservation {
            offset,
            len: size.min(self.size() - offset),
            file: self.main.id,
            host,
            stored_len: stored_len.into(),
            compressed: true,
        };
        self.reserved.open.push(reservation);
        Ok(reservation)
    }

    fn commit(&mut self, done: Reservation) -> Result<()> {
        self.take_open(&done)?;
        self.note_written(done.offset, done.len);
        if done.compressed {
            let table = self.own_table(done.offset)?;
            let old = self.entry_in(table, done.offset)?;
            let new = L2Entry::Compressed { host: HostOffset(done.host), len: done.stored_len };
            self.set_entry(table, done.offset, new)?;
            self.free_entry(old)?;
        } else {
            self.link(done.offset, done.len, done.host, Link::Data)?;
            self.leave_runs(&done, false)?;
        }
        self.settle_freed()
    }

    /// Bytes that were written before are not undone where a cluster stays in use: for another open reservation, or
    /// because the disk offset owned it before.
    fn abort(&mut self, undone: Reservation) -> Result<()> {
        self.take_open(&undone)?;
        if undone.compressed {
            let span = self.alloc.touched(undone.host, undone.stored_len);
            return self.alloc.free(&mut self.main, span);
        }
        self.leave_runs(&undone, true)
    }

    fn alloc_unit(&self) -> u64 {
        self.header.geometry.subcluster_size()
    }
}

/// `EIO`, an input/output error.
const EIO: i32 = 5;
