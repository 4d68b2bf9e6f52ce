//! Another size for the disk of an existing image.
//!
//! One write of the header switches from the old size to the new one, bitmaps included:
//!
//! ```text
//! longer   L1 table, places, zero marks behind the old end │ header │
//! shorter                                                  │ header │ entries behind the new end │ freed counts │ file cut
//! ```
//!
//! Each bar is a flush. What lies behind the end that the header tells is invisible, so a crash at any point leaves the old
//! disk or the new one, and clusters that nobody uses at worst.

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use instar_blockio::{
    self as blockio, BlockAlloc, BlockMap, BlockRead, BlockWrite, Error as IoError, ErrorKind, ExtentKind, ZeroMode,
    is_zero, zeroed,
};

use crate::addr::GuestOffset;
use crate::allocator::{Span, State};
use crate::create::{Preallocation, allocate_space};
use crate::error::{Error, Result};
use crate::format::MAX_L1_BYTES;
use crate::l1::L1Entry;
use crate::l2::{L2Entry, SubclusterState};
use crate::write::{SIZE_FIELD, Writer, is_unallocated};

/// Sizes are multiples of this, bytes.
const SECTOR: u64 = 512;
/// Freed runs of which the space is given back to the file system; what is more stays in the file as free clusters.
const MAX_DISCARDS: usize = 1 << 16;

/// What a longer disk gets behind its old end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Growth<'a> {
    /// What is allocated.
    pub preallocation: Preallocation,
    /// Bytes of the disk of the backing image: what it holds behind the old end must not show through. 0 without one.
    pub backing_size: u64,
    /// What the backing image holds in the range of [`Writer::backed_tail`], if it is longer than the old disk.
    pub tail: &'a [u8],
}

/// Why a disk can't get the wanted size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResizeError {
    /// The size is no multiple of 512: bytes.
    Unaligned(u64),
    /// An image of version 2 has snapshots, which don't tell their size.
    SnapshotsInVersion2,
    /// The L1 table would exceed QEMU's limit: bytes of the disk.
    TooLarge(u64),
    /// Version 2 has no zero clusters to hide what the backing image holds behind the old end.
    ZeroesInVersion2,
    /// A disk that gets shorter gains nothing that could be allocated.
    PreallocationOnShrink,
}

impl fmt::Display for ResizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unaligned(size) => write!(f, "size {size} is no multiple of 512"),
            Self::SnapshotsInVersion2 => f.write_str("version 2 image with snapshots can't be resized"),
            Self::TooLarge(size) => write!(f, "disk of {size} bytes is too large for this cluster size"),
            Self::ZeroesInVersion2 => f.write_str("version 2 can't hide what a longer backing image holds"),
            Self::PreallocationOnShrink => f.write_str("nothing to allocate in a shorter disk"),
        }
    }
}

impl core::error::Error for ResizeError {}

impl From<ResizeError> for Error {
    fn from(error: ResizeError) -> Self {
        Self::Resize(error)
    }
}

impl<D: BlockWrite> Writer<D> {
    /// Gives the disk of an existing image another size, its bitmaps included; durable afterwards.
    ///
    /// What was cut off is gone: a disk that grows again reads as zero there.
    ///
    /// # Errors
    /// [`Error::Resize`], after which nothing has changed; [`Error::Bitmap`] or what tables and file report.
    pub fn resize(&mut self, size: u64, growth: Growth<'_>) -> Result<()> {
        let old = self.header.virtual_size;
        self.check_size(size, growth)?;
        let mut bitmaps = self.load_bitmaps()?;
        let had_bitmaps = bitmaps.names().next().is_some();
        if size > old {
            self.grow_disk(size, growth)?;
        }
        self.flush()?;
        self.header.virtual_size = size;
        if had_bitmaps {
            self.store_bitmaps(&mut bitmaps)?;
        } else {
            self.main.write(SIZE_FIELD, &size.to_be_bytes())?;
        }
        self.flush()?;
        if size < old {
            self.cut_off(size)?;
        }
        self.settle_data_file(size)?;
        Ok(self.flush()?)
    }

    pub(crate) fn check_size(&self, size: u64, growth: Growth<'_>) -> Result<()> {
        let old = self.header.virtual_size;
        let longer = size > old;
        let fits = self.header.geometry.l1_entries(size) <= MAX_L1_BYTES / 8 && size <= i64::MAX as u64;
        let shows = longer && growth.backing_size > old;
        let faults = [
            (!size.is_multiple_of(SECTOR), ResizeError::Unaligned(size)),
            (self.header.snapshot_count != 0 && self.header.version < 3, ResizeError::SnapshotsInVersion2),
            (size < old && growth.preallocation != Preallocation::Off, ResizeError::PreallocationOnShrink),
            (longer && !fits, ResizeError::TooLarge(size)),
            (shows && !self.format.zero_clusters, ResizeError::ZeroesInVersion2),
        ];
        match faults.into_iter().find(|(wrong, _)| *wrong) {
            Some((_, fault)) => Err(fault.into()),
            None => Ok(()),
        }
    }

    /// Prepares everything for a longer disk but the size in the header. `self.header` has the new size afterwards.
    pub(crate) fn grow_disk(&mut self, size: u64, growth: Growth<'_>) -> Result<()> {
        // Nothing that happens here changes what a bitmap tells.
        let changed = core::mem::replace(&mut self.changed, true);
        let done = self.grow_disk_by_parts(size, growth);
        self.changed = changed;
        self.failed |= done.is_err();
        done
    }

    /// The part of the last unit of the disk, if the disk ends inside a unit that this image leaves to its backing image.
    ///
    /// # Errors
    /// What tables and file report.
    pub fn backed_tail(&self) -> blockio::Result<Option<Range<u64>>> {
        let end = self.header.virtual_size;
        let start = end - end % self.alloc_unit();
        let backed = self.has_backing() && start != end && self.state_at(start)? == SubclusterState::Unallocated;
        Ok(backed.then_some(start..end))
    }

    fn grow_disk_by_parts(&mut self, size: u64, growth: Growth<'_>) -> Result<()> {
        let old = self.header.virtual_size;
        if growth.backing_size > old
            && let Some(tail) = self.backed_tail()?
        {
            if growth.tail.len() as u64 != tail.end - tail.start {
                return Err(IoError::new(ErrorKind::InvalidInput).at(tail.start).into());
            }
            self.write_at(tail.start, growth.tail)?;
        }
        self.grow_l1(self.header.geometry.l1_entries(size))?;
        self.header.virtual_size = size;
        self.clear_behind(old)?;
        match growth.preallocation {
            Preallocation::Off => {}
            Preallocation::Falloc | Preallocation::Full if self.data.is_none() => {
                self.preallocate_new_area(old, growth.preallocation)?;
            }
            mode => self.preallocate_new_places(old, mode)?,
        }
        if growth.backing_size > old {
            self.zero(old, size - old, ZeroMode::KeepAllocated)?;
        }
        Ok(())
    }

    /// Zeroes in the rest of the cluster in which the disk ended at `old`: it may hold what was cut off before.
    fn clear_behind(&mut self, old: u64) -> blockio::Result<()> {
        let end = old.next_multiple_of(self.header.geometry.cluster_size()).min(self.header.virtual_size);
        let mut at = old;
        while at < end {
            let extent = self.extent_at(at, end - at)?;
            if matches!(extent.kind, ExtentKind::Data { .. } | ExtentKind::Encrypted { .. } | ExtentKind::Compressed(_))
            {
                let mut bytes = zeroed(extent.len as usize)?;
                self.read_at(at, &mut bytes)?;
                if !is_zero(&bytes) {
                    bytes.fill(0);
                    self.write_at(at, &bytes)?;
                }
            }
            at = extent.end();
        }
        Ok(())
    }

    /// Where preallocation begins: what holds a part of the old disk is left as it is.
    fn first_new(&self, old: u64) -> blockio::Result<u64> {
        let start = self.header.geometry.cluster_start(old);
        let free = start == old || (!self.has_backing() && self.state_at(start)? == SubclusterState::Unallocated);
        Ok(if free { start } else { start.saturating_add(self.header.geometry.cluster_size()) })
    }

    fn preallocate_new_places(&mut self, old: u64, mode: Preallocation) -> Result<()> {
        let size = self.header.virtual_size;
        let first = self.first_new(old)?;
        let mut offset = first;
        while offset < size {
            let place = self.preallocate_run(offset, size - offset)?;
            if self.data.is_none() {
                self.clear_used(place.host, place.len)?;
            }
            offset += place.len;
        }
        if let Some(data) = &mut self.data {
            data.extend(size);
            if first < size {
                allocate_space(data, first, size - first, mode)?;
            }
        }
        Ok(())
    }

    /// Makes a new place read as zero, as far as the file has held something there.
    fn clear_used(&mut self, host: u64, len: u64) -> blockio::Result<()> {
        let inside = self.main.file().size().saturating_sub(host).min(len);
        if inside == 0 {
            return Ok(());
        }
        self.main.file_mut().write_zeroes(host, inside, ZeroMode::Unmap)
    }

    fn preallocate_new_area(&mut self, old: u64, mode: Preallocation) -> Result<()> {
        let first = self.first_new(old)?;
        if first < self.header.virtual_size {
            self.sync()?;
            self.preallocate_area(first, mode)?;
        }
        Ok(())
    }

    // --- Shorter

    /// Gives the disk a smaller size. Its bitmaps are the caller's.
    pub(crate) fn shorten(&mut self, size: u64) -> Result<()> {
        self.flush()?;
        self.header.virtual_size = size;
        self.main.write(SIZE_FIELD, &size.to_be_bytes())?;
        self.flush()?;
        self.cut_off(size)?;
        Ok(self.settle_data_file(size)?)
    }

    /// Frees everything behind the end of the disk and cuts the file. The header has the new size already.
    fn cut_off(&mut self, size: u64) -> Result<()> {
        let geometry = self.header.geometry;
        let start = size.next_multiple_of(geometry.cluster_size());
        let mut freed = Vec::new();
        let first_table = geometry.l1_entries(start) as usize;
        for index in (first_table..self.l1.len()).rev() {
            self.drop_table(index, &mut freed)?;
        }
        if !start.is_multiple_of(geometry.l2_span()) {
            self.drop_rest_of_table(start, &mut freed)?;
        }
        self.sync()?;
        self.main.flush()?;
        self.alloc.drop_unused_blocks(&mut self.main)?;
        self.main.flush()?;
        let end = self.main.end();
        let end = (self.alloc.last_used(&mut self.main, end)? + 1).saturating_mul(geometry.cluster_size());
        self.give_space_back(&freed, end)?;
        self.main.set_end(end)?;
        self.alloc.rewind();
        Ok(())
    }

    /// Takes an L1 entry away and frees the L2 table with its clusters.
    fn drop_table(&mut self, index: usize, freed: &mut Vec<Span>) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        let Some(table) = self.table_of(index, self.l1[index])? else { return Ok(()) };
        self.set_l1(index, L1Entry::default().encode());
        let guest = (index as u64).saturating_mul(geometry.l2_span());
        for slot in 0..geometry.l2_entries() {
            let entry = self.entry_in(table.0, guest.saturating_add(slot << geometry.cluster_bits()))?;
            self.free_noted(entry, freed)?;
        }
        self.l2.forget(table.0);
        self.forget_side(table.0);
        note(self.alloc.touched(table.0, geometry.cluster_size()), freed);
        self.alloc.free(&mut self.main, self.alloc.touched(table.0, geometry.cluster_size()))?;
        self.settle_freed()
    }

    /// Takes the entries from `start` on out of the table that it lies in.
    fn drop_rest_of_table(&mut self, start: u64, freed: &mut Vec<Span>) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        let index = geometry.l1_index(GuestOffset(start)) as usize;
        if self.l1.get(index).is_none_or(|&entry| L1Entry::decode(entry).table.is_none()) {
            return Ok(());
        }
        for slot in geometry.l2_index(GuestOffset(start))..geometry.l2_entries() {
            let guest =
                (index as u64).saturating_mul(geometry.l2_span()).saturating_add(slot << geometry.cluster_bits());
            let table = self.table(guest)?.ok_or(IoError::new(ErrorKind::Corrupt).at(guest))?;
            let old = self.entry_in(table, guest)?;
            if is_unallocated(old) {
                continue;
            }
            let table = self.own_table(guest)?;
            self.set_entry(table, guest, L2Entry::UNALLOCATED)?;
            self.free_noted(old, freed)?;
            self.settle_freed()?;
        }
        Ok(())
    }

    pub(crate) fn free_noted(&mut self, entry: L2Entry, freed: &mut Vec<Span>) -> blockio::Result<()> {
        if let (L2Entry::Cluster { host: Some(host), .. }, true) = (entry, self.data.is_none()) {
            note(self.alloc.touched(host.0, 1), freed);
        }
        self.free_entry(entry)
    }

    /// Gives the space of what is free now back, as far as it lies before `end`.
    pub(crate) fn give_space_back(&mut self, freed: &[Span], end: u64) -> blockio::Result<()> {
        let bits = self.header.geometry.cluster_bits();
        for span in freed.iter().filter(|span| span.first << bits < end) {
            // A snapshot may use a part of it.
            let (mut at, stop) = (span.first, span.first.saturating_add(span.count).min(end >> bits));
            while at < stop {
                let free = self.alloc.free_run(&mut self.main, at, stop - at)?;
                if free != 0 {
                    self.main.discard(at << bits, free << bits);
                }
                at += free + 1;
            }
        }
        Ok(())
    }

    fn settle_data_file(&mut self, size: u64) -> blockio::Result<()> {
        match &mut self.data {
            Some(data) => data.set_end(size),
            None => Ok(()),
        }
    }

    /// Growth by [`BlockWrite::set_size`]: nothing is allocated, and whatever a backing image holds stays hidden.
    pub(crate) fn set_size_rounded(&mut self, size: u64) -> blockio::Result<()> {
        let size = size.checked_next_multiple_of(SECTOR).ok_or(IoError::new(ErrorKind::OutOfBounds))?;
        let backing_size = if self.has_backing() { u64::MAX } else { 0 };
        self.lengthen(size, Growth { backing_size, ..Growth::default() })
    }

    /// Gives the disk a size of whole sectors that is not smaller than its own.
    pub(crate) fn lengthen(&mut self, size: u64, growth: Growth<'_>) -> blockio::Result<()> {
        if size < self.header.virtual_size {
            return Err(ErrorKind::Unsupported.into());
        }
        self.begin()?;
        self.grow_disk(size, growth)?;
        if let Some(data) = &mut self.data {
            data.extend(size);
            data.settle()?;
        }
        if self.state == State::Live {
            self.sync()?;
            self.barrier()?;
            self.main.write(SIZE_FIELD, &size.to_be_bytes())?;
        }
        Ok(())
    }
}

/// Adds a run to those of which the space is given back.
fn note(span: Span, freed: &mut Vec<Span>) {
    let full = freed.len() >= MAX_DISCARDS;
    match freed.last_mut() {
        Some(last) if last.first.checked_add(last.count) == Some(span.first) => last.count += span.count,
        _ if full => {}
        _ => freed.push(span),
    }
}
