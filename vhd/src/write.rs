//! Writing a dynamic image: a fresh one, or the blocks of an existing one.
//!
//! The table is changed last, after the data and the footer behind them, so that a crash leaves at worst space that nobody
//! uses; the footer at the beginning is good all the time.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use instar_blockio::{
    BlockAlloc, BlockMap, BlockRead, BlockWrite, Error as BlockError, ErrorKind, Extent, ExtentKind, FileId, Limits,
    Reservation, Result as BlockResult, ZeroMode, check_range, zeroed,
};

use crate::error::{Error, Result};
use crate::footer::FOOTER;
use crate::geometry::SECTOR;
use crate::header::{HEADER, Header};
use crate::open::{Image, NO_BLOCK, OpenOptions, SizeRule};
use crate::pages::read_padded;

/// Entries that a table may have to be held in memory: 16 MiB.
const MAX_WRITTEN_ENTRIES: u32 = 4 << 20;
/// Entries in a piece of the table that is written at once: 4 KiB.
const PIECE: usize = 1024;

/// What an image consists of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub footer: [u8; FOOTER],
    pub size: u64,
    pub block_size: u32,
    pub table_at: u64,
    pub table: Vec<u32>,
    /// Where the last block ends.
    pub end: u64,
}

/// A block's place that no table entry names yet.
#[derive(Clone, Copy, Debug)]
struct Pending {
    entry: u32,
    /// Open reservations in it.
    users: u32,
}

/// A dynamic image, open for writing.
///
/// Dropped without [`finish`](Self::finish), a fresh image is none, and an existing one is as it was at the last flush.
#[derive(Debug)]
pub struct Writer<D> {
    file: D,
    id: FileId,
    parts: Parts,
    bitmap_len: u64,
    fresh: bool,
    pending: BTreeMap<u64, Pending>,
    /// Pieces of the table that differ from the file's.
    dirty: BTreeSet<usize>,
    /// The footer behind the last block is not where it should be.
    moved: bool,
    /// The block whose bitmap is known to be full.
    full: Option<u64>,
}

fn bitmap_len(block_size: u32) -> u64 {
    u64::from(block_size).div_ceil(SECTOR * 8).next_multiple_of(SECTOR)
}

impl<D: BlockWrite> Writer<D> {
    fn new(file: D, id: FileId, parts: Parts, fresh: bool) -> Self {
        let bitmap_len = bitmap_len(parts.block_size);
        let (pending, dirty) = (BTreeMap::new(), BTreeSet::new());
        Self { file, id, parts, bitmap_len, fresh, pending, dirty, moved: fresh, full: None }
    }

    pub(crate) fn fresh(file: D, id: FileId, parts: Parts) -> Self {
        Self::new(file, id, parts, true)
    }

    /// Opens an existing dynamic image.
    ///
    /// # Errors
    /// As [`Image::open`]; [`Error::Fixed`], whose disk is the beginning of the file; [`Error::DifferencingWrite`];
    /// [`Error::TableTooLarge`] beyond 4 million entries.
    pub fn open(file: D, id: FileId, size_rule: SizeRule) -> Result<Self> {
        let image = Image::open(&file, id, &OpenOptions { size_rule, ..OpenOptions::default() })?;
        let header = image.header().ok_or(Error::Fixed)?;
        if image.has_parent() {
            return Err(Error::DifferencingWrite);
        }
        if header.entries > MAX_WRITTEN_ENTRIES {
            return Err(Error::TableTooLarge(header.entries));
        }
        let mut table = Vec::new();
        table.try_reserve_exact(header.entries as usize).map_err(|_| BlockError::new(ErrorKind::OutOfMemory))?;
        table.resize(header.entries as usize, NO_BLOCK);
        let block_len = header.bitmap_len() + u64::from(header.block_size);
        let mut end = header.table_offset + (u64::from(header.entries) * 4).next_multiple_of(SECTOR);
        end = end.max(image.footer().data_offset.saturating_add(HEADER as u64)).next_multiple_of(SECTOR);
        image.entries(u32::MAX, |block, entry| {
            end = end.max(u64::from(entry) * SECTOR + block_len);
            if let Some(known) = table.get_mut(block as usize) {
                *known = entry;
            }
            Ok(())
        })?;
        let at = if image.is_copy_used() { crate::open::end_footer_at(file.size()).unwrap_or(0) } else { 0 };
        let footer = crate::open::read_footer(&file, at)?;
        let (size, block_size, table_at) = (image.virtual_size(), header.block_size, header.table_offset);
        drop(image);
        Ok(Self::new(file, id, Parts { footer, size, block_size, table_at, table, end }, false))
    }

    fn block_size(&self) -> u64 {
        self.parts.block_size.into()
    }

    fn block_len(&self) -> u64 {
        self.bitmap_len + self.block_size()
    }

    fn entry(&self, block: u64) -> Option<u32> {
        let pending = self.pending.get(&block).map(|pending| pending.entry);
        let entry = pending.or_else(|| self.parts.table.get(usize::try_from(block).ok()?).copied());
        entry.filter(|entry| *entry != NO_BLOCK)
    }

    /// Where the data of a block begin.
    fn data_at(&self, entry: u32) -> u64 {
        u64::from(entry) * SECTOR + self.bitmap_len
    }

    fn set_entry(&mut self, block: u64, entry: u32) {
        let at = block as usize; // inside the disk, so inside of the table
        if let Some(known) = self.parts.table.get_mut(at).filter(|known| **known != entry) {
            *known = entry;
            self.dirty.insert(at / PIECE);
        }
    }

    /// Gives a block a place at the end of the image. `whole`: all of it will be written.
    fn take(&mut self, block: u64, whole: bool) -> BlockResult<u32> {
        let at = self.parts.end;
        let end = at.checked_add(self.block_len()).ok_or(ErrorKind::NoSpace)?;
        let entry = u32::try_from(at / SECTOR).ok().filter(|entry| *entry != NO_BLOCK).ok_or(ErrorKind::NoSpace)?;
        let grows = self.file.limits().grows;
        if !grows && end + FOOTER as u64 > self.file.size() {
            return Err(ErrorKind::NoSpace.into());
        }
        // What lay behind the last block, such as the old footer, must not show through.
        let stale = if grows { self.file.size().min(end) } else { end };
        let from = if whole { stale.min(at) } else { at };
        if from < stale {
            self.file.write_zeroes(from, stale - from, ZeroMode::KeepAllocated)?;
        }
        self.parts.end = end;
        self.moved = true;
        self.pending.insert(block, Pending { entry, users: 0 });
        Ok(entry)
    }

    /// Marks all sectors of a block as present, as QEMU does.
    fn fill_bitmap(&mut self, block: u64, entry: u32) -> BlockResult<()> {
        if self.full == Some(block) {
            return Ok(());
        }
        const ONES: [u8; 4096] = [0xff; 4096];
        let (mut at, end) = (u64::from(entry) * SECTOR, self.data_at(entry));
        while at < end {
            let len = (end - at).min(ONES.len() as u64);
            self.file.write_at(at, &ONES[..len as usize])?;
            at += len;
        }
        self.full = Some(block);
        Ok(())
    }

    /// Ends a reservation in one block.
    fn release(&mut self, done: &Reservation, written: bool) -> BlockResult<()> {
        let block = done.offset / self.block_size();
        let entry = self.entry(block);
        let last = match self.pending.get_mut(&block) {
            Some(pending) => {
                pending.users = pending.users.saturating_sub(1);
                pending.users == 0
            }
            None => false,
        };
        if let Some(entry) = entry.filter(|_| written) {
            self.fill_bitmap(block, entry)?;
            self.pending.remove(&block);
            self.set_entry(block, entry);
        } else if last {
            self.pending.remove(&block);
        }
        Ok(())
    }

    /// Brings the file up to date: footer, then table.
    fn checkpoint(&mut self) -> BlockResult<()> {
        if self.moved {
            let at = match self.file.limits().grows {
                true => self.parts.end,
                // The last sector is where readers look.
                false => self.file.size() / SECTOR * SECTOR - SECTOR,
            };
            self.file.write_at(at, &self.parts.footer)?;
            self.moved = false;
        }
        if self.dirty.is_empty() && !self.fresh {
            return Ok(());
        }
        self.file.flush()?;
        self.write_table()?;
        self.file.flush()
    }

    fn write_table(&mut self) -> BlockResult<()> {
        if self.fresh {
            self.dirty = (0..self.parts.table.len().div_ceil(PIECE)).collect();
        }
        for piece in core::mem::take(&mut self.dirty) {
            let entries = self.parts.table.chunks(PIECE).nth(piece).unwrap_or_default();
            let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            if self.fresh {
                // Behind the last entry the table is filled up to a whole sector.
                bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0xff);
            }
            self.file.write_at(self.parts.table_at + (piece * PIECE * 4) as u64, &bytes)?;
        }
        Ok(())
    }

    /// Writes what is left, the first bytes of a fresh image last, and gives the file back.
    ///
    /// # Errors
    /// The device's error; a fresh image is then none.
    pub fn finish(mut self) -> Result<D> {
        if self.fresh && !self.file.limits().grows && self.parts.end + FOOTER as u64 > self.file.size() {
            return Err(BlockError::new(ErrorKind::NoSpace).into());
        }
        self.checkpoint()?;
        if self.fresh {
            let entries = self.parts.table.len() as u32; // bounded when it was made
            let header = Header::encode(self.parts.table_at, entries, self.parts.block_size);
            self.file.write_at(FOOTER as u64, &header)?;
            self.file.flush()?;
            self.file.write_at(0, &self.parts.footer)?;
        }
        self.file.flush()?;
        Ok(self.file)
    }

    /// Calls `f` with each piece of the range that lies in one block: its block, offset and length.
    fn each_block(
        &mut self,
        offset: u64,
        len: u64,
        mut f: impl FnMut(&mut Self, u64, u64, u64) -> BlockResult<()>,
    ) -> BlockResult<()> {
        check_range(self.parts.size, offset, len)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let block = at / self.block_size();
            let next = ((block + 1) * self.block_size()).min(end);
            f(self, block, at, next - at)?;
            at = next;
        }
        Ok(())
    }
}

impl<D: BlockWrite> BlockRead for Writer<D> {
    fn size(&self) -> u64 {
        self.parts.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        check_range(self.parts.size, offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let extent = self.extent_at(at, rest.len() as u64)?;
            let (now, later) = rest.split_at_mut(extent.len as usize);
            match extent.kind {
                ExtentKind::Data { host, .. } => read_padded(&self.file, host, now)?,
                _ => now.fill(0),
            }
            (at, rest) = (extent.end(), later);
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits::BYTE
    }
}

impl<D: BlockWrite> BlockMap for Writer<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> BlockResult<Extent> {
        if max_len == 0 {
            return Err(BlockError::new(ErrorKind::InvalidInput).at(offset));
        }
        check_range(self.parts.size, offset, 1)?;
        let (block, skip) = (offset / self.block_size(), offset % self.block_size());
        let len = (self.block_size() - skip).min(max_len).min(self.parts.size - offset);
        // Reserved and not committed yet is not seen.
        let entry = self.parts.table.get(block as usize).copied().filter(|entry| *entry != NO_BLOCK);
        let kind = match entry {
            Some(entry) => ExtentKind::Data { file: self.id, host: self.data_at(entry) + skip },
            None => ExtentKind::Zero { host: None },
        };
        Ok(Extent { offset, len, depth: 0, kind })
    }
}

impl<D: BlockWrite> BlockAlloc for Writer<D> {
    fn reserve(&mut self, offset: u64, len: u64) -> BlockResult<Reservation> {
        check_range(self.parts.size, offset, len)?;
        if len == 0 {
            return Err(BlockError::new(ErrorKind::InvalidInput).at(offset));
        }
        let (block, skip) = (offset / self.block_size(), offset % self.block_size());
        let len = len.min(self.block_size() - skip);
        let entry = match self.entry(block) {
            Some(entry) => entry,
            None => self.take(block, len == self.block_size())?,
        };
        if let Some(pending) = self.pending.get_mut(&block) {
            pending.users += 1;
        }
        let host = self.data_at(entry) + skip;
        Ok(Reservation { offset, len, file: self.id, host, stored_len: len, compressed: false })
    }

    fn commit(&mut self, done: Reservation) -> BlockResult<()> {
        self.release(&done, true)
    }

    fn abort(&mut self, undone: Reservation) -> BlockResult<()> {
        self.release(&undone, false)
    }

    fn alloc_unit(&self) -> u64 {
        self.block_size()
    }
}

impl<D: BlockWrite> BlockWrite for Writer<D> {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> BlockResult<()> {
        check_range(self.parts.size, offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let reservation = self.reserve(at, rest.len() as u64)?;
            let (now, later) = rest.split_at(reservation.len as usize);
            match self.file.write_at(reservation.host, now) {
                Ok(()) => self.commit(reservation)?,
                Err(error) => {
                    self.abort(reservation)?;
                    return Err(error);
                }
            }
            (at, rest) = (at + now.len() as u64, later);
        }
        Ok(())
    }

    /// Blocks keep their space; absent ones stay absent unless they are to be allocated.
    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> BlockResult<()> {
        self.each_block(offset, len, |writer, block, at, len| {
            let Some(entry) = writer.entry(block) else {
                if mode == ZeroMode::KeepAllocated {
                    let entry = writer.take(block, false)?;
                    writer.fill_bitmap(block, entry)?;
                    writer.pending.remove(&block);
                    writer.set_entry(block, entry);
                }
                return Ok(());
            };
            let from = writer.data_at(entry) + at % writer.block_size();
            let end = (from + len).min(writer.file.size());
            if from < end { writer.file.write_zeroes(from, end - from, mode) } else { Ok(()) }
        })
    }

    fn discard(&mut self, offset: u64, len: u64) -> BlockResult<()> {
        self.write_zeroes(offset, len, ZeroMode::Unmap)
    }

    fn set_size(&mut self, _: u64) -> BlockResult<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> BlockResult<()> {
        if !self.fresh {
            self.checkpoint()?;
        }
        self.file.flush()
    }
}

/// Writes the good one of the two footers over the other; see [`repair`](crate::repair).
pub(crate) fn copy_footer<D: BlockWrite + ?Sized>(file: &mut D, from: u64, to: u64) -> BlockResult<()> {
    let mut bytes = zeroed(FOOTER)?;
    read_padded(file, from, &mut bytes)?;
    file.write_at(to, &bytes)?;
    file.flush()
}
