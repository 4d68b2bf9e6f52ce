//! Writing: a fresh image, or the blocks of an existing one.
//!
//! A fresh image gets its tables in place, since nobody takes it for an image before its first bytes are written. The BAT of an existing
//! one is changed through the log, so that a crash leaves it either as it was or as it is to be:
//!
//! ```text
//!   data ─► flush ─► log entry ─► flush ─► header names the log ─► BAT ─► flush ─► header names no log
//! ```

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use instar_blockio::{
    BlockAlloc, BlockMap, BlockRead, BlockWrite, Error as BlockError, ErrorKind, Extent, ExtentKind, FileId, Limits,
    Reservation, Result as BlockResult, ZeroMode, check_range,
};

use crate::bat::{Block, full};
use crate::error::{Error, Region, Result};
use crate::format::MIB;
use crate::guid::{Guid, GuidSource};
use crate::header::Header;
use crate::log::{MAX_ENTRY_SECTORS, write_entry};
use crate::metadata::Metadata;
use crate::open::{Image, OpenOptions, replay_log};
use crate::pages::read_padded;
use crate::region::Regions;
use crate::table::Table;

/// What kind of image is written.
#[derive(Debug)]
pub(crate) enum State {
    /// No image yet.
    Fresh {
        /// Name of the program.
        creator: String,
    },
    /// An image.
    Existing {
        /// Its header tells that it was changed.
        touched: bool,
    },
}

/// A place given to a block that no entry names yet.
#[derive(Clone, Copy, Debug)]
struct Pending {
    place: u64,
    /// Open reservations in it.
    users: u32,
}

/// A VHDX image, open for writing.
///
/// Dropped without [`finish`](Self::finish), a fresh image is none, and an existing one is as it was at the last flush.
#[derive(Debug)]
pub struct Writer<D> {
    pub(crate) file: D,
    id: FileId,
    pub(crate) header: Header,
    pub(crate) regions: Regions,
    pub(crate) metadata: Metadata,
    state: State,
    guids: GuidSource,
    table: Table,
    /// Where the image ends in the file.
    end: u64,
    /// A fixed image has its blocks in order from here on.
    base: Option<u64>,
    pending: BTreeMap<u64, Pending>,
}

impl<D: BlockWrite> Writer<D> {
    #[expect(clippy::too_many_arguments, reason = "the parts of an image, named where it is made")]
    pub(crate) fn new(
        file: D,
        id: FileId,
        header: Header,
        regions: Regions,
        metadata: Metadata,
        state: State,
        guids: GuidSource,
        end: u64,
        base: Option<u64>,
    ) -> Self {
        let table = Table::new(regions.bat.at);
        Self { file, id, header, regions, metadata, state, guids, table, end, base, pending: BTreeMap::new() }
    }

    /// Opens an existing image. Changes that its log holds are carried out. `seed`: random bytes for new GUIDs.
    ///
    /// # Errors
    /// As [`Image::open`]; [`Error::DifferencingWrite`].
    pub fn open(mut file: D, id: FileId, seed: [u8; 16]) -> Result<Self> {
        // Judged before it is changed.
        let image = Image::open(&file, id, &OpenOptions::default())?;
        if image.has_parent() {
            return Err(Error::DifferencingWrite);
        }
        replay_log(&mut file)?;
        let image = Image::open(&file, id, &OpenOptions::default())?;
        let (header, regions) = (*image.header(), image.regions);
        if regions.log.len == 0 {
            return Err(Error::RegionPlace(Region::Log, regions.log.at));
        }
        let mut end = file.size().max(regions.end());
        image.entries(u64::MAX, |index, entry| {
            if let Ok(Some(area)) = image.rules().claim(index, entry) {
                end = end.max(area.end());
            }
            Ok(())
        })?;
        let metadata = image.metadata;
        let state = State::Existing { touched: false };
        Ok(Self::new(file, id, header, regions, metadata, state, GuidSource::new(seed), end, None))
    }

    /// Bytes of a payload block.
    pub fn block_size(&self) -> u64 {
        self.metadata.geometry.block_size()
    }

    /// What the file does not hold yet reads as zero. A block device keeps what it held.
    pub(crate) fn is_sparse(&self) -> bool {
        self.file.limits().grows
    }

    /// Can the file hold bytes up to `end`?
    pub(crate) fn check_room(&self, end: u64) -> BlockResult<()> {
        if self.is_sparse() || end <= self.file.size() { Ok(()) } else { Err(ErrorKind::NoSpace.into()) }
    }

    fn entry(&mut self, block: u64) -> BlockResult<u64> {
        if self.table.is_full() {
            self.checkpoint()?;
        }
        self.table.get(&self.file, self.metadata.geometry.entry_of(block))
    }

    fn set_entry(&mut self, block: u64, entry: u64) -> BlockResult<()> {
        if self.table.is_full() {
            self.checkpoint()?;
        }
        self.table.set(&self.file, self.metadata.geometry.entry_of(block), entry)
    }

    /// The place of a block that has one.
    fn place(&mut self, block: u64) -> BlockResult<Option<u64>> {
        if let Some(pending) = self.pending.get(&block) {
            return Ok(Some(pending.place));
        }
        let entry = self.entry(block)?;
        match Block::decode(entry) {
            Block::Full(place) => Ok(Some(place)),
            Block::NotPresent | Block::Zero => Ok(None),
            Block::Partial(_) | Block::Invalid => Err(BlockError::new(ErrorKind::Corrupt).at(entry)),
        }
    }

    /// Where a new block would lie.
    fn next_place(&self, block: u64) -> BlockResult<u64> {
        let geometry = self.metadata.geometry;
        let (place, needed) = match self.base {
            // The last block of a fixed image may be cut short.
            Some(base) => (base + geometry.block_start(block), geometry.block_len(block)),
            None => (self.end.checked_next_multiple_of(MIB).ok_or(ErrorKind::NoSpace)?, geometry.block_size()),
        };
        let end = place.checked_add(needed).filter(|&end| end <= i64::MAX as u64).ok_or(ErrorKind::NoSpace)?;
        self.check_room(end)?;
        Ok(place)
    }

    /// Gives a block a place, and sees to it that its bytes read as zero unless all will be written.
    fn take(&mut self, block: u64, place: u64, whole: bool) -> BlockResult<()> {
        let geometry = self.metadata.geometry;
        self.end = self.end.max(match self.base {
            Some(_) => place + geometry.block_len(block),
            None => place + geometry.block_size(),
        });
        if !self.is_sparse() && !whole {
            self.file.write_zeroes(place, geometry.block_len(block), ZeroMode::KeepAllocated)?;
        }
        self.pending.insert(block, Pending { place, users: 0 });
        Ok(())
    }

    /// Tells in the header of an existing image that it is being changed, before it is.
    fn touch(&mut self) -> BlockResult<()> {
        if let State::Existing { touched: touched @ false } = &mut self.state {
            *touched = true;
            self.header.file_write_guid = self.guids.guid();
            self.header.data_write_guid = self.guids.guid();
            self.header.update(&mut self.file)?;
        }
        Ok(())
    }

    /// Gives the file the length that the image needs.
    fn settle(&mut self) -> BlockResult<()> {
        if self.is_sparse() && self.file.size() < self.end { self.file.set_size(self.end) } else { Ok(()) }
    }

    /// Brings the changed entries into the file.
    fn checkpoint(&mut self) -> BlockResult<()> {
        match self.state {
            State::Fresh { .. } => self.write_entries(usize::MAX),
            State::Existing { .. } => {
                self.settle()?;
                while self.table.is_dirty() {
                    self.log_entries()?;
                }
                Ok(())
            }
        }
    }

    /// Writes the first changed sectors of the table to their places.
    fn write_entries(&mut self, limit: usize) -> BlockResult<()> {
        let sectors = self.table.dirty(limit);
        let places: Vec<u64> = sectors.iter().map(|(at, _)| *at).collect();
        for (at, bytes) in sectors {
            self.file.write_at(at, bytes)?;
        }
        self.table.written(&places);
        Ok(())
    }

    /// The same by way of the log, with as many sectors as one entry of it holds.
    fn log_entries(&mut self) -> BlockResult<()> {
        self.file.flush()?;
        let guid = self.guids.guid();
        write_entry(&mut self.file, self.regions.log, guid, &self.table.dirty(MAX_ENTRY_SECTORS))?;
        self.file.flush()?;
        self.header.log_guid = guid;
        self.header.update(&mut self.file)?;
        self.write_entries(MAX_ENTRY_SECTORS)?;
        self.file.flush()?;
        self.header.log_guid = Guid::ZERO;
        self.header.update(&mut self.file)
    }

    /// Writes what is left, the first bytes of a fresh image last.
    ///
    /// # Errors
    /// The device's error; a fresh image is then none.
    pub fn finish(mut self) -> Result<()> {
        self.settle()?;
        self.checkpoint()?;
        match core::mem::replace(&mut self.state, State::Existing { touched: true }) {
            State::Fresh { creator } => self.write_header_section(&creator),
            State::Existing { .. } => Ok(self.file.flush()?),
        }
    }

    /// Calls `f` with each block that a range of the disk touches: its number, and the first and last (exclusive) byte inside it.
    fn each_block(
        &mut self,
        offset: u64,
        len: u64,
        mut f: impl FnMut(&mut Self, u64, u64, u64) -> BlockResult<()>,
    ) -> BlockResult<()> {
        check_range(self.size(), offset, len)?;
        let geometry = self.metadata.geometry;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let block = geometry.block_of(at);
            let next = (geometry.block_start(block) + geometry.block_size()).min(end);
            f(self, block, geometry.in_block(at), next - geometry.block_start(block))?;
            at = next;
        }
        Ok(())
    }

    /// The blocks of a reservation that wait for it.
    fn release(&mut self, reservation: &Reservation, done: bool) -> BlockResult<()> {
        let last = reservation.offset + reservation.len;
        let geometry = self.metadata.geometry;
        for block in geometry.block_of(reservation.offset)..=geometry.block_of(last.saturating_sub(1)) {
            let Some(pending) = self.pending.get_mut(&block) else { continue };
            pending.users = pending.users.saturating_sub(1);
            let pending = *pending;
            if pending.users == 0 {
                self.pending.remove(&block);
            }
            if done {
                self.set_entry(block, full(pending.place))?;
            } else if pending.users == 0 && Block::decode(self.entry(block)?) != Block::Full(pending.place) {
                // Given back, if nothing lies behind it.
                let end = pending.place + geometry.block_size();
                if self.base.is_none() && end == self.end && self.file.size() < end {
                    self.end = pending.place;
                }
            }
        }
        Ok(())
    }
}

impl<D: BlockWrite> BlockRead for Writer<D> {
    fn size(&self) -> u64 {
        self.metadata.geometry.virtual_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        check_range(self.size(), offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let extent = self.extent_at(at, rest.len() as u64)?;
            let (now, later) = rest.split_at_mut(extent.len as usize);
            match extent.kind {
                ExtentKind::Data { host, .. } => read_padded(&self.file, host, now)?,
                _ => now.fill(0),
            }
            (at, rest) = (at + extent.len, later);
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
        check_range(self.size(), offset, 1)?;
        let geometry = self.metadata.geometry;
        let block = geometry.block_of(offset);
        let len = (geometry.block_len(block) - geometry.in_block(offset)).min(max_len);
        let entry = self.table.look(&self.file, geometry.entry_of(block))?;
        let kind = match Block::decode(entry) {
            Block::Full(place) => ExtentKind::Data { file: self.id, host: place + geometry.in_block(offset) },
            Block::NotPresent => ExtentKind::Unallocated,
            Block::Zero => ExtentKind::Zero { host: None },
            Block::Partial(_) | Block::Invalid => return Err(BlockError::new(ErrorKind::Corrupt).at(offset)),
        };
        Ok(Extent { offset, len, depth: 0, kind })
    }
}

impl<D: BlockWrite> BlockAlloc for Writer<D> {
    fn reserve(&mut self, offset: u64, len: u64) -> BlockResult<Reservation> {
        if len == 0 {
            return Err(BlockError::new(ErrorKind::InvalidInput).at(offset));
        }
        check_range(self.size(), offset, len)?;
        self.touch()?;
        let geometry = self.metadata.geometry;
        let end = offset + len;
        let mut host = None;
        let mut at = offset;
        while at < end {
            let block = geometry.block_of(at);
            let (start, next) = (geometry.block_start(block), geometry.block_start(block) + geometry.block_size());
            let (found, place) = match self.place(block)? {
                Some(place) => (true, place),
                None => (false, self.next_place(block)?),
            };
            let here = place + geometry.in_block(at);
            match host {
                None => host = Some(here),
                Some(host) if here == host + (at - offset) => {}
                Some(_) => break,
            }
            if !found {
                self.take(block, place, at == start && end >= start + geometry.block_len(block))?;
            }
            if let Some(pending) = self.pending.get_mut(&block) {
                pending.users += 1;
            }
            at = next.min(end);
        }
        let host = host.ok_or(BlockError::new(ErrorKind::InvalidInput).at(offset))?;
        let len = at - offset;
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
        check_range(self.size(), offset, buf.len() as u64)?;
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
        self.each_block(offset, len, |writer, block, from, to| match writer.place(block)? {
            Some(place) => {
                writer.touch()?;
                let end = (place + to).min(writer.file.size());
                if place + from < end {
                    writer.file.write_zeroes(place + from, end - place - from, mode)
                } else {
                    Ok(())
                }
            }
            None if mode == ZeroMode::KeepAllocated => {
                writer.touch()?;
                let place = writer.next_place(block)?;
                writer.take(block, place, false)?;
                writer.pending.remove(&block);
                writer.set_entry(block, full(place))
            }
            None => Ok(()),
        })
    }

    fn discard(&mut self, offset: u64, len: u64) -> BlockResult<()> {
        self.write_zeroes(offset, len, ZeroMode::Unmap)
    }

    fn set_size(&mut self, _: u64) -> BlockResult<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> BlockResult<()> {
        if let State::Existing { .. } = self.state {
            self.checkpoint()?;
        }
        self.file.flush()
    }
}
