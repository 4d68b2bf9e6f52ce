//! Zeroes and discards.

use instar_blockio::{BlockAlloc, BlockRead, BlockWrite, Error, ErrorKind, Result, ZeroMode, check_range, zeroed};

use crate::header::Autoclear;
use crate::l2::{L2Entry, SubclusterState, Subclusters};
use crate::write::{Writer, zero_entry};

/// Longest write of zeroes as data, bytes, unless a cluster is longer.
const MAX_ZEROES: u64 = 1 << 20;

impl<D: BlockWrite> Writer<D> {
    /// Refuses to change a range under an open reservation.
    pub(crate) fn check_unreserved(&self, offset: u64, len: u64) -> Result<()> {
        check_range(self.size(), offset, len)?;
        if self.reserved.touches(offset, offset + len) {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        Ok(())
    }

    /// Makes a range of the disk read as zero.
    pub(crate) fn zero(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.zero_raw_data(offset, len)?;
        if !self.format.zero_clusters {
            return self.write_zero_bytes(offset, len);
        }
        let (unit, end) = (self.alloc_unit(), offset + len);
        let head = end.min(offset.next_multiple_of(unit));
        let tail = if end == self.size() { end } else { head.max(end / unit * unit) };
        self.zero_part(offset, head - offset)?;
        self.zero_units(head, tail, mode)?;
        self.zero_part(tail, end - tail)
    }

    /// Zeroes in a part of a unit.
    fn zero_part(&mut self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        match self.state_at(offset)? {
            SubclusterState::Zero => Ok(()),
            // As QEMU does, all of it is marked.
            SubclusterState::Unallocated if !self.has_backing() => {
                let (unit, start) = (self.alloc_unit(), offset - offset % self.alloc_unit());
                self.zero_units(start, start.saturating_add(unit).min(self.size()), ZeroMode::KeepAllocated)
            }
            _ => self.write_zero_bytes(offset, len),
        }
    }

    /// An external data file that is a raw image itself must hold the zeroes.
    fn zero_raw_data(&mut self, offset: u64, len: u64) -> Result<()> {
        let raw = self.header.autoclear.contains(Autoclear::DATA_FILE_RAW);
        match &mut self.data {
            Some(data) if raw && len != 0 => {
                data.extend(offset + len);
                data.settle()?;
                data.file_mut().write_zeroes(offset, len, ZeroMode::Unmap)
            }
            _ => Ok(()),
        }
    }

    fn write_zero_bytes(&mut self, offset: u64, len: u64) -> Result<()> {
        // No write ends inside a cluster that the next one goes on with: what it does not cover would have to come from the backing image.
        let most = MAX_ZEROES.max(self.header.geometry.cluster_size());
        let zeroes = zeroed(len.min(most) as usize)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let step = (end - at).min(most - at % most);
            self.write_at(at, &zeroes[..step as usize])?;
            at += step;
        }
        Ok(())
    }

    /// Zero marks for the units `start..end`. The last one may reach over the end of the disk.
    fn zero_units(&mut self, start: u64, end: u64, mode: ZeroMode) -> Result<()> {
        let geometry = self.header.geometry;
        let mut offset = start;
        while offset < end {
            // Also where nothing is allocated and nothing lies below, as QEMU does.
            let table = self.own_table(offset)?;
            let guest = geometry.cluster_start(offset);
            let next = guest + geometry.cluster_size();
            let mask = self.touched_subclusters(offset - guest, end.min(next) - guest);
            let whole = mask == Subclusters::all_zero(geometry.subclusters()).zero;
            let old = self.entry_in(table, guest)?;
            if matches!(old, L2Entry::Compressed { .. }) && !whole {
                self.write_zero_bytes(offset, end.min(next) - offset)?;
            } else {
                let new = if whole { self.zeroed_entry(old, mode) } else { with_zeroes(old, mask) };
                self.replace(table, guest, old, new)?;
            }
            offset = next;
        }
        Ok(())
    }

    fn zeroed_entry(&self, old: L2Entry, mode: ZeroMode) -> L2Entry {
        match old {
            L2Entry::Cluster { host: Some(host), copied, .. } if mode == ZeroMode::KeepAllocated => L2Entry::Cluster {
                host: Some(host),
                copied,
                subclusters: Subclusters::all_zero(self.header.geometry.subclusters()),
            },
            _ => zero_entry(self.format),
        }
    }

    /// Puts `new` in the place of `old`, whose cluster is freed unless `new` has it too.
    fn replace(&mut self, table: u64, guest: u64, old: L2Entry, new: L2Entry) -> Result<()> {
        if old == new {
            return Ok(());
        }
        self.set_entry(table, guest, new)?;
        match (old, new) {
            (L2Entry::Cluster { host: before, .. }, L2Entry::Cluster { host: now, .. }) if before == now => Ok(()),
            _ => self.free_entry(old),
        }
    }

    /// Gives the place of whole clusters back.
    pub(crate) fn discard_clusters(&mut self, offset: u64, len: u64) -> Result<()> {
        let geometry = self.header.geometry;
        // Without zero marks, what the backing image holds would show through.
        if !self.format.zero_clusters && self.has_backing() {
            return Ok(());
        }
        let start = offset.next_multiple_of(geometry.cluster_size());
        let end = match offset + len {
            end if end == self.size() => end,
            end => geometry.cluster_start(end),
        };
        if start >= end {
            return Ok(());
        }
        self.zero_raw_data(start, end - start)?;
        let mut guest = start;
        while guest < end {
            match self.table(guest)? {
                None if !self.has_backing() => {
                    guest = guest - guest % geometry.l2_span() + geometry.l2_span();
                    continue;
                }
                _ => {
                    let table = self.own_table(guest)?;
                    let old = self.entry_in(table, guest)?;
                    if self.has_backing() || !matches!(old, L2Entry::Cluster { host: None, .. }) {
                        self.replace(table, guest, old, zero_entry(self.format))?;
                    }
                }
            }
            guest += geometry.cluster_size();
        }
        Ok(())
    }
}

/// The entry with the subclusters of `mask` reading as zero.
fn with_zeroes(old: L2Entry, mask: u32) -> L2Entry {
    match old {
        L2Entry::Cluster { host, copied, subclusters } => L2Entry::Cluster {
            host,
            copied,
            subclusters: Subclusters { allocated: subclusters.allocated & !mask, zero: subclusters.zero | mask },
        },
        compressed => compressed,
    }
}
