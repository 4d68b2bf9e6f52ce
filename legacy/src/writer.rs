//! What the writers of all formats have in common: units are given places, filled, and entered in the table.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;

use instar_blockio::{
    BlockAlloc, BlockMap, BlockRead, BlockWrite, Error, ErrorKind, Extent, FileId, Limits, Reservation, Result,
    ZeroMode, check_range, zeroed,
};

use crate::image::{Map, Run, Unpacked, extent, read};
use crate::store::Store;

/// Units of a reservation at most.
const MAX_UNITS: u64 = 8192;
/// Bytes copied at a time where a unit is moved.
const PIECE: u64 = 1 << 20;

/// How a format gives places to units.
pub trait Allocate: Map {
    /// Bytes of a unit.
    fn unit(&self) -> u64;

    /// What is not allocated is answered by a backing image.
    fn has_backing(&self) -> bool {
        false
    }

    /// The first byte of the file behind all that is in use.
    fn end(&self) -> u64;

    /// Finds places for up to `count` units from unit `index` on that lie one behind the other: where, and how many.
    ///
    /// # Errors
    /// The table or the file is full, or fails.
    fn allocate<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, count: u64) -> Result<(u64, u64)>;

    /// Enters the places of units, whose tables [`allocate`](Self::allocate) has made.
    ///
    /// # Errors
    /// Those of the file.
    fn link<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, host: u64, count: u64) -> Result<()>;

    /// Finds a place for a compressed unit.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for formats without such; else as [`allocate`](Self::allocate).
    fn allocate_packed<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, len: u32) -> Result<u64> {
        let _ = (store, index, len);
        Err(Error::new(ErrorKind::Unsupported))
    }

    /// Enters a compressed unit.
    ///
    /// # Errors
    /// Those of the file.
    fn link_packed<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, host: u64, len: u32) -> Result<()> {
        let _ = (store, index, host, len);
        Err(Error::new(ErrorKind::Unsupported))
    }

    /// Takes back units that [`allocate`](Self::allocate) gave and that were not linked. Without this they stay unused.
    fn release(&mut self, host: u64, count: u64) {
        let _ = (host, count);
    }

    /// Makes unallocated units read as zero without allocating them; says whether the format can.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    fn link_zero<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, count: u64) -> Result<bool> {
        let _ = (store, index, count);
        Ok(false)
    }

    /// The disk can get another size, in this format and by QEMU.
    const RESIZES: bool = false;

    /// Changes the size of the disk, where that is possible.
    ///
    /// # Errors
    /// A size that can't be.
    fn set_size(&mut self, size: u64) -> Result<()> {
        let _ = size;
        Ok(())
    }

    /// What is to be noted in the header before the first change of an existing image.
    ///
    /// # Errors
    /// Those of the file.
    fn begin<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        let _ = store;
        Ok(())
    }

    /// Puts the header as it is to be in the end.
    ///
    /// # Errors
    /// Those of the file.
    fn put_header<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()>;
}

/// An image of the format that `F` describes, open for writing. See the module of each format for how to make or open one.
///
/// A fresh image becomes valid by [`finish`](Self::finish), which writes its header last.
pub struct Writer<D, F> {
    pub(crate) store: Store<D>,
    pub(crate) format: F,
    id: FileId,
    /// Units that have a place and no entry yet: the first of a run, how many, and where.
    pending: BTreeMap<u64, (u64, u64)>,
    /// The units of open reservations: the first, and how many.
    open: Vec<(u64, u64)>,
    unpacked: RefCell<Unpacked>,
    /// The header says that the image is being changed, or there is none yet.
    begun: bool,
}

impl<D, F: fmt::Debug> fmt::Debug for Writer<D, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("format", &self.format).field("id", &self.id).finish_non_exhaustive()
    }
}

impl<D: BlockWrite, F: Allocate> Writer<D, F> {
    pub(crate) fn new(store: Store<D>, format: F, id: FileId, fresh: bool) -> Self {
        Self {
            store,
            format,
            id,
            pending: BTreeMap::new(),
            open: Vec::new(),
            unpacked: RefCell::default(),
            begun: fresh,
        }
    }

    /// Writes the rest of the metadata, the header last, and gives the file back.
    ///
    /// # Errors
    /// Those of the file; a fresh image is then not valid.
    pub fn finish(mut self) -> Result<D> {
        if !self.begun {
            return Ok(self.store.into_file());
        }
        self.write_tables()?;
        let end = self.format.end();
        if self.store.file().limits().grows && self.store.file().size() < end {
            self.store.file_mut().set_size(end)?;
        }
        self.store.file_mut().flush()?;
        self.format.put_header(&mut self.store)?;
        self.store.write_dirty(end)?;
        self.store.file_mut().flush()?;
        Ok(self.store.into_file())
    }

    fn write_tables(&mut self) -> Result<()> {
        self.store.file_mut().flush()?;
        self.store.write_dirty(self.format.end())
    }

    /// Before the first change.
    pub(crate) fn begin(&mut self) -> Result<()> {
        if !self.begun {
            self.format.begin(&mut self.store)?;
            self.store.write_dirty(self.format.end())?;
            self.store.file_mut().flush()?;
            self.begun = true;
        }
        self.unpacked.get_mut().forget();
        Ok(())
    }

    /// The place of a unit that may be written as it is.
    fn place(&self, index: u64) -> Result<Option<u64>> {
        if let Some((&first, &(count, host))) = self.pending.range(..=index).next_back()
            && index - first < count
        {
            return Ok(Some(host + (index - first) * self.format.unit()));
        }
        match self.old(index)? {
            Run::Data(host) => Ok(Some(host)),
            _ => Ok(None),
        }
    }

    /// What the table says of a unit.
    fn old(&self, index: u64) -> Result<Run> {
        let offset = index * self.format.unit();
        Ok(self.format.run(&self.store, offset, self.unit_len(index))?.1)
    }

    /// Bytes of a unit that lie inside the disk.
    fn unit_len(&self, index: u64) -> u64 {
        let offset = index * self.format.unit();
        self.format.unit().min(self.format.size() - offset)
    }

    /// The disk bytes of a run of units, and the units that a range touches.
    fn units_of(&self, offset: u64, len: u64) -> (u64, u64) {
        let unit = self.format.unit();
        let first = offset / unit;
        (first, (offset + len - 1) / unit - first + 1)
    }

    /// Prepares what a reservation leaves of a new unit at `host`, of which the bytes `from..to` will be written.
    fn fill_edges(&mut self, index: u64, host: u64, from: u64, to: u64) -> Result<()> {
        let unit = self.format.unit();
        let whole = self.unit_len(index);
        if let Run::Packed(packed) = self.old(index)?
            && (from > 0 || to < whole)
        {
            let bytes = self.unpacked.get_mut().unpack(self.store.file(), &packed)?.to_vec();
            let (from, to) = (from as usize, (to as usize).min(bytes.len()));
            // A write of nothing behind the end of a file is out of bounds.
            if from > 0 {
                self.store.file_mut().write_at(host, &bytes[..from])?;
            }
            if to < bytes.len() {
                self.store.file_mut().write_at(host + to as u64, &bytes[to..])?;
            }
            return Ok(());
        }
        if from > 0 {
            self.store.clear_file(host, from)?;
        }
        if to < unit {
            self.store.clear_file(host + to, unit - to)?;
        }
        Ok(())
    }

    /// Refuses to write a part of a unit of which the rest is only known to the backing image.
    fn check_backed(&self, index: u64, from: u64, to: u64) -> Result<()> {
        let partial = from > 0 || to < self.unit_len(index);
        match partial
            && self.format.has_backing()
            && self.place(index)?.is_none()
            && self.old(index)? == Run::Unallocated
        {
            true => Err(Error::new(ErrorKind::InvalidInput).at(index * self.format.unit())),
            false => Ok(()),
        }
    }

    /// A reservation is open no longer.
    fn close(&mut self, units: (u64, u64)) {
        if let Some(at) = self.open.iter().position(|&open| open == units) {
            self.open.swap_remove(at);
        }
    }

    /// Takes the units out of those that wait for an entry: the parts that did, each with its place.
    fn take_pending(&mut self, first: u64, count: u64) -> Vec<(u64, u64, u64)> {
        let unit = self.format.unit();
        let end = first + count;
        let touched: Vec<u64> = self
            .pending
            .range(..end)
            .rev()
            .take_while(|&(&start, &(count, _))| start + count > first)
            .map(|(&start, _)| start)
            .collect();
        let mut taken = Vec::new();
        for start in touched {
            let Some((count, host)) = self.pending.remove(&start) else { continue };
            let (from, to) = (start.max(first), (start + count).min(end));
            if start < from {
                self.pending.insert(start, (from - start, host));
            }
            if to < start + count {
                self.pending.insert(to, (start + count - to, host + (to - start) * unit));
            }
            taken.push((from, to - from, host + (from - start) * unit));
        }
        taken
    }

    /// Makes a part of one unit zero.
    fn zero_part(&mut self, index: u64, from: u64, to: u64, mode: ZeroMode) -> Result<()> {
        let offset = index * self.format.unit();
        let old = if self.place(index)?.is_some() { None } else { Some(self.old(index)?) };
        let blank = match old {
            Some(Run::Zero) => true,
            Some(Run::Unallocated) => !self.format.has_backing(),
            _ => false,
        };
        if blank && mode == ZeroMode::Unmap {
            return Ok(());
        }
        if old.is_none() {
            let Some(host) = self.place(index)? else { return Ok(()) };
            let end = self.store.file().size().min(host + to);
            return match host + from < end {
                true => self.store.file_mut().write_zeroes(host + from, end - (host + from), mode),
                false => Ok(()),
            };
        }
        // QEMU does not take the last unit for a whole one where the disk ends inside of it.
        let whole = from == 0 && to == self.format.unit();
        if whole
            && mode == ZeroMode::Unmap
            && old == Some(Run::Unallocated)
            && self.format.link_zero(&mut self.store, index, 1)?
        {
            return Ok(());
        }
        let place = self.reserve(offset + from, to - from)?;
        self.store.clear_file(place.host, place.len)?;
        self.commit(place)
    }
}

impl<D: BlockRead, F: Map> BlockRead for Writer<D, F> {
    fn size(&self) -> u64 {
        self.format.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        read(&self.store, &self.format, None, &mut self.unpacked.borrow_mut(), offset, buf)
    }

    fn limits(&self) -> Limits {
        Limits::BYTE
    }
}

impl<D: BlockRead, F: Map> BlockMap for Writer<D, F> {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        extent(&self.store, &self.format, self.id, offset, max_len)
    }
}

impl<D: BlockWrite, F: Allocate> BlockAlloc for Writer<D, F> {
    fn reserve(&mut self, offset: u64, len: u64) -> Result<Reservation> {
        check_range(self.size(), offset, len)?;
        if len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        self.begin()?;
        let unit = self.format.unit();
        let (first, units) = self.units_of(offset, len);
        let units = units.min(MAX_UNITS);
        let skip = offset - first * unit;
        let mut count = 1;
        let host = match self.place(first)? {
            Some(host) => {
                while count < units && self.place(first + count)? == host.checked_add(count * unit) {
                    count += 1;
                }
                host
            }
            None => {
                while count < units && self.place(first + count)?.is_none() {
                    count += 1;
                }
                let end_of = |count: u64| (skip + len).min(count * unit);
                self.check_backed(first, skip, end_of(1))?;
                let last = count - 1;
                if last > 0 && self.check_backed(first + last, 0, end_of(count) - last * unit).is_err() {
                    count = last;
                }
                let (host, given) = self.format.allocate(&mut self.store, first, count)?;
                count = given.clamp(1, count);
                let file = self.store.file();
                if !file.limits().grows && self.format.end() > file.size() {
                    return Err(Error::new(ErrorKind::NoSpace).at(offset));
                }
                self.fill_edges(first, host, skip, if count == 1 { end_of(1) } else { unit })?;
                if count > 1 {
                    let last = count - 1;
                    self.fill_edges(first + last, host + last * unit, 0, end_of(count) - last * unit)?;
                }
                self.pending.insert(first, (count, host));
                host
            }
        };
        let len = len.min(count * unit - skip);
        self.open.push(self.units_of(offset, len));
        Ok(Reservation { offset, len, file: self.id, host: host + skip, stored_len: len, compressed: false })
    }

    fn reserve_compressed(&mut self, offset: u64, stored_len: u32) -> Result<Reservation> {
        check_range(self.size(), offset, 1)?;
        let unit = self.format.unit();
        if !offset.is_multiple_of(unit) || stored_len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        self.begin()?;
        let index = offset / unit;
        let host = self.format.allocate_packed(&mut self.store, index, stored_len)?;
        let len = self.unit_len(index);
        Ok(Reservation { offset, len, file: self.id, host, stored_len: stored_len.into(), compressed: true })
    }

    fn commit(&mut self, done: Reservation) -> Result<()> {
        let unit = self.format.unit();
        self.unpacked.get_mut().forget();
        if done.compressed {
            let len = u32::try_from(done.stored_len).map_err(|_| Error::new(ErrorKind::InvalidInput))?;
            return self.format.link_packed(&mut self.store, done.offset / unit, done.host, len);
        }
        let (first, count) = self.units_of(done.offset, done.len.max(1));
        self.close((first, count));
        for (index, count, host) in self.take_pending(first, count) {
            self.format.link(&mut self.store, index, host, count)?;
        }
        Ok(())
    }

    /// New units that no other open reservation touches are given up.
    fn abort(&mut self, undone: Reservation) -> Result<()> {
        if undone.compressed {
            return Ok(());
        }
        let (first, count) = self.units_of(undone.offset, undone.len.max(1));
        self.close((first, count));
        for index in (first..first + count).rev() {
            if self.open.iter().any(|&(first, count)| (first..first + count).contains(&index)) {
                continue;
            }
            for (_, count, host) in self.take_pending(index, 1) {
                self.format.release(host, count);
            }
        }
        Ok(())
    }

    fn alloc_unit(&self) -> u64 {
        // Units of Parallels images need not be powers of two.
        let unit = self.format.unit();
        1 << unit.trailing_zeros()
    }
}

impl<D: BlockWrite, F: Allocate> BlockWrite for Writer<D, F> {
    /// Writes data. With a backing image, units that are not allocated yet can only be written as a whole:
    /// [`ErrorKind::InvalidInput`] otherwise.
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(self.size(), offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let place = self.reserve(at, rest.len() as u64)?;
            let (now, later) = rest.split_at(place.len as usize);
            self.store.file_mut().write_at(place.host, now)?;
            self.commit(place)?;
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        check_range(self.size(), offset, len)?;
        self.begin()?;
        let unit = self.format.unit();
        let (mut at, end) = (offset, offset + len);
        while at < end {
            // What is not there is zero already, however long it is.
            if mode == ZeroMode::Unmap && !self.format.has_backing() && self.pending.is_empty() {
                let (run, kind) = self.format.run(&self.store, at, end - at)?;
                if matches!(kind, Run::Unallocated | Run::Zero) {
                    at += run;
                    continue;
                }
            }
            let (index, from) = (at / unit, at % unit);
            let to = (from + (end - at)).min(unit);
            self.zero_part(index, from, to, mode)?;
            at += to - from;
        }
        Ok(())
    }

    /// Makes the range zero where no backing image would show through.
    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        check_range(self.size(), offset, len)?;
        if self.format.has_backing() { Ok(()) } else { self.write_zeroes(offset, len, ZeroMode::Unmap) }
    }

    fn set_size(&mut self, size: u64) -> Result<()> {
        // What is refused leaves no trace.
        if !F::RESIZES && size != self.size() {
            return Err(Error::new(ErrorKind::Unsupported));
        }
        self.begin()?;
        self.format.set_size(size)
    }

    fn flush(&mut self) -> Result<()> {
        self.write_tables()?;
        self.store.file_mut().flush()
    }
}

/// Copies bytes inside a file; what lies behind its end is zero.
pub fn copy_within<D: BlockWrite>(file: &mut D, from: u64, to: u64, len: u64) -> Result<()> {
    let mut bytes = zeroed(len.min(PIECE) as usize)?;
    let mut done = 0;
    while done < len {
        let part = &mut bytes[..(len - done).min(PIECE) as usize];
        crate::store::read_padded(file, from + done, part)?;
        file.write_at(to + done, part)?;
        done += part.len() as u64;
    }
    Ok(())
}
