//! Where the blocks of a disk lie.

use instar_blockio::{BlockRead, BlockWrite, Error, ErrorKind, Result};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U32;

use super::header::{BLOCK_SIZE, Header};
use crate::image::{Map, Run, consecutive, run_len};
use crate::store::{Rank, Store};
use crate::writer::Allocate;

/// Entries from here on are marks: discarded, unallocated.
const MARKS: u32 = 0xffff_fffe;
/// Entry of a block that was never written.
pub(super) const NONE: u32 = 0xffff_ffff;

/// The block map of an image.
#[derive(Clone, Debug)]
pub struct Layout {
    header: Header,
    /// Blocks of data in the file.
    used: u32,
}

impl Layout {
    pub(super) fn of(header: Header) -> Self {
        Self { used: header.blocks_allocated, header }
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    fn entry_at(&self, index: u64) -> u64 {
        u64::from(self.header.map_offset) + index * 4
    }

    /// The number of a block of data; `None`: there is none.
    pub(super) fn entry<D: BlockRead>(&self, store: &Store<D>, index: u64) -> Result<Option<u32>> {
        let entry = u32::from_le_bytes(store.get(self.entry_at(index))?);
        Ok(Some(entry).filter(|&entry| entry < MARKS))
    }

    /// Where a block of data lies.
    fn place(&self, block: u32) -> u64 {
        u64::from(self.header.data_offset) + u64::from(block) * BLOCK_SIZE
    }

    /// Makes sure that no block in use is given away, whatever the header counts.
    pub(super) fn count_blocks<D: BlockRead>(&mut self, store: &Store<D>) -> Result<()> {
        let stored = self.stored_entries(store);
        for index in 0..stored.into() {
            if let Some(block) = self.entry(store, index)? {
                self.used = self.used.max(block + 1);
            }
        }
        if stored < self.header.blocks {
            self.used = self.used.max(1);
        }
        Ok(())
    }

    /// Entries of the map that begin inside the file; all behind them are 0.
    pub(super) fn stored_entries<D: BlockRead>(&self, store: &Store<D>) -> u32 {
        let inside = store.file().size().saturating_sub(self.header.map_offset.into()).div_ceil(4);
        u32::try_from(inside).unwrap_or(u32::MAX).min(self.header.blocks)
    }
}

impl Map for Layout {
    fn size(&self) -> u64 {
        self.header.disk_size
    }

    fn run<D: BlockRead>(&self, store: &Store<D>, offset: u64, max_len: u64) -> Result<(u64, Run)> {
        let (index, skip) = (offset / BLOCK_SIZE, offset % BLOCK_SIZE);
        let count = (skip + max_len).div_ceil(BLOCK_SIZE);
        let place = |index| Ok(self.entry(store, index)?.map(|block| self.place(block)));
        Ok(match place(index)? {
            Some(host) => {
                let units = consecutive(host, BLOCK_SIZE, count, |next| place(index + next))?;
                (run_len(units, BLOCK_SIZE, skip, max_len), Run::Data(host + skip))
            }
            None => {
                let absent = |next| Ok(if place(index + next)?.is_none() { Some(0) } else { None });
                let units = consecutive(0, 0, count, absent)?;
                (run_len(units, BLOCK_SIZE, skip, max_len), Run::Unallocated)
            }
        })
    }
}

impl Allocate for Layout {
    fn unit(&self) -> u64 {
        BLOCK_SIZE
    }

    fn end(&self) -> u64 {
        self.place(self.used)
    }

    fn allocate<D: BlockWrite>(&mut self, _: &mut Store<D>, _: u64, count: u64) -> Result<(u64, u64)> {
        let left = self.header.blocks.saturating_sub(self.used);
        let count = u32::try_from(count).unwrap_or(u32::MAX).min(left);
        if count == 0 {
            return Err(Error::new(ErrorKind::NoSpace));
        }
        let host = self.place(self.used);
        self.used += count;
        Ok((host, count.into()))
    }

    fn link<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, host: u64, count: u64) -> Result<()> {
        let first = (host - u64::from(self.header.data_offset)) / BLOCK_SIZE;
        for done in 0..count {
            let block = u32::try_from(first + done).map_err(|_| Error::new(ErrorKind::NoSpace))?;
            store.put(self.entry_at(index + done), &block.to_le_bytes(), Rank::Root)?;
        }
        Ok(())
    }

    fn release(&mut self, host: u64, count: u64) {
        if host + count * BLOCK_SIZE == self.end() {
            self.used -= count as u32;
        }
    }

    fn put_header<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        let mut raw = self.header.raw;
        raw.blocks_allocated = U32::new(self.used);
        store.put(0, raw.as_bytes(), Rank::Root)
    }
}
