//! Where the clusters of a disk lie.

use instar_blockio::{BlockRead, BlockWrite, Error, ErrorKind, Result};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U32;

use super::header::{Header, IN_USE, TABLE_OFFSET};
use crate::image::{Map, Run, consecutive, run_len};
use crate::store::{Rank, Store};
use crate::writer::Allocate;

/// The allocation table of an image.
#[derive(Clone, Debug)]
pub struct Layout {
    header: Header,
    /// The first byte behind the last cluster in use.
    end: u64,
}

impl Layout {
    pub(super) fn of(header: Header) -> Self {
        Self { end: header.data_start, header }
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    pub(super) fn header_mut(&mut self) -> &mut Header {
        &mut self.header
    }

    pub(super) fn set_end(&mut self, end: u64) {
        self.end = end;
    }

    /// Where the cluster of an entry lies; `None`: nowhere.
    pub(super) fn entry<D: BlockRead>(&self, store: &Store<D>, index: u64) -> Result<Option<u64>> {
        let entry = u32::from_le_bytes(store.get(entry_at(index))?);
        // 2^32 clusters of 2^31 bytes.
        Ok(Some(u64::from(entry) * self.header.entry_unit).filter(|&host| host != 0))
    }

    /// How many of the `count` entries from `index` on are 0 for certain.
    pub(super) fn absent<D: BlockRead>(&self, store: &Store<D>, index: u64, count: u64) -> Result<u64> {
        Ok(store.zero_run(entry_at(index), count * 4, 4)? / 4)
    }

    /// Looks through the table for the end of the clusters.
    pub(super) fn find_end<D: BlockRead>(&mut self, store: &Store<D>) -> Result<()> {
        self.end = self.header.data_start;
        let mut index = 0;
        while index < u64::from(self.header.entries) {
            let left = u64::from(self.header.entries) - index;
            match self.absent(store, index, left)? {
                0 => {
                    if let Some(host) = self.entry(store, index)? {
                        self.end = self.end.max(host + self.header.cluster_size);
                    }
                    index += 1;
                }
                run => index += run,
            }
        }
        Ok(())
    }

    /// Enters a place; `None`: nowhere.
    pub(super) fn set_entry<D: BlockWrite>(&self, store: &mut Store<D>, index: u64, host: Option<u64>) -> Result<()> {
        let unit = self.header.entry_unit;
        let host = host.unwrap_or(0);
        let entry = u32::try_from(host / unit).ok().filter(|_| host.is_multiple_of(unit));
        let entry = entry.ok_or(Error::new(ErrorKind::NoSpace).at(host))?;
        store.put(entry_at(index), &entry.to_le_bytes(), Rank::Root)
    }

    pub(super) fn put_in_use<D: BlockWrite>(&mut self, store: &mut Store<D>, in_use: bool) -> Result<()> {
        self.header.raw.in_use = U32::new(if in_use { IN_USE } else { 0 });
        self.header.in_use = in_use;
        store.put(0, self.header.raw.as_bytes(), Rank::Root)
    }
}

fn entry_at(index: u64) -> u64 {
    TABLE_OFFSET + index * 4
}

impl Map for Layout {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn run<D: BlockRead>(&self, store: &Store<D>, offset: u64, max_len: u64) -> Result<(u64, Run)> {
        let unit = self.header.cluster_size;
        let (index, skip) = (offset / unit, offset % unit);
        let entries = u64::from(self.header.entries);
        if index >= entries {
            return Ok((max_len, Run::Unallocated));
        }
        let count = (skip.saturating_add(max_len)).div_ceil(unit).min(entries - index);
        let place = |index| self.entry(store, index);
        let (units, kind) = match place(index)? {
            Some(host) => (consecutive(host, unit, count, |next| place(index + next))?, Run::Data(host + skip)),
            None => (self.absent(store, index, count)?.max(1), Run::Unallocated),
        };
        Ok((run_len(units, unit, skip, max_len), kind))
    }
}

impl Allocate for Layout {
    fn unit(&self) -> u64 {
        self.header.cluster_size
    }

    fn end(&self) -> u64 {
        self.end
    }

    fn allocate<D: BlockWrite>(&mut self, _: &mut Store<D>, index: u64, count: u64) -> Result<(u64, u64)> {
        let full = Error::new(ErrorKind::NoSpace);
        let count = count.min(u64::from(self.header.entries).saturating_sub(index));
        let host = self.end.checked_next_multiple_of(self.header.entry_unit).ok_or(full)?;
        let end = count.checked_mul(self.header.cluster_size).and_then(|len| host.checked_add(len)).ok_or(full)?;
        if count == 0 || end / self.header.entry_unit > u64::from(u32::MAX) || i64::try_from(end).is_err() {
            return Err(full);
        }
        self.end = end;
        Ok((host, count))
    }

    fn link<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, host: u64, count: u64) -> Result<()> {
        for done in 0..count {
            self.set_entry(store, index + done, Some(host + done * self.header.cluster_size))?;
        }
        Ok(())
    }

    fn release(&mut self, host: u64, count: u64) {
        if host + count * self.header.cluster_size == self.end {
            self.end = host;
        }
    }

    fn begin<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        self.put_in_use(store, true)
    }

    fn put_header<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        self.put_in_use(store, false)
    }
}
