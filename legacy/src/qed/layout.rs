//! Where the clusters of a disk lie.

use instar_blockio::{BlockRead, BlockWrite, Error, ErrorKind, Result};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U32, U64};

use super::header::{Features, HEADER_LEN, Header, MAGIC, MAX_BACKING_NAME, RawHeader};
use crate::image::{Map, Run, consecutive, run_len};
use crate::store::{Rank, Store};
use crate::writer::Allocate;

/// Entry of an unallocated cluster or table.
pub(super) const NONE: u64 = 0;
/// Entry of a cluster of zeroes.
pub(super) const ZERO: u64 = 1;

/// There is no room for the name of a backing file.
pub(super) struct BackingNameTooLong;

/// The tables of an image.
#[derive(Clone, Debug)]
pub struct Layout {
    header: Header,
    /// Bytes of the whole clusters of the file.
    end: u64,
    /// It has no backing file, and will get one.
    expects_backing: bool,
}

impl Layout {
    pub(super) fn of(header: &Header, file_len: u64) -> Self {
        Self { header: header.clone(), end: header.whole_clusters(file_len), expects_backing: false }
    }

    /// For a fresh image: header and L1 table.
    pub(super) fn fresh(header: Header) -> Self {
        Self { end: header.header_len() + header.table_len(), header, expects_backing: false }
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    pub(super) fn file_end(&self) -> u64 {
        self.end
    }

    /// An entry of a table whose place has been checked.
    pub(super) fn entry<D: BlockRead>(&self, store: &Store<D>, table: u64, index: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(store.get(table + index * 8)?))
    }

    fn is_table(&self, offset: u64) -> bool {
        self.header.is_table(offset, self.end)
    }

    pub(super) fn is_cluster(&self, offset: u64) -> bool {
        self.header.is_cluster(offset, self.end)
    }

    /// The L2 table of an L1 entry; `None`: there is none.
    fn l2<D: BlockRead>(&self, store: &Store<D>, l1_index: u64) -> Result<Option<u64>> {
        match self.entry(store, self.header.l1_offset, l1_index)? {
            NONE => Ok(None),
            table if self.is_table(table) => Ok(Some(table)),
            table => Err(Error::new(ErrorKind::Corrupt).at(table)),
        }
    }

    fn split(&self, index: u64) -> (u64, u64) {
        (index / self.header.table_entries(), index % self.header.table_entries())
    }

    fn take(&mut self, len: u64) -> Result<u64> {
        let at = self.end;
        let end = at.checked_add(len).filter(|&end| i64::try_from(end).is_ok());
        self.end = end.ok_or(Error::new(ErrorKind::NoSpace))?;
        Ok(at)
    }

    pub(super) fn expect_backing(&mut self) {
        self.expects_backing = true;
    }

    /// Names another backing file, or none; the header says so once it is put.
    pub(super) fn set_backing(&mut self, name: &[u8], is_raw: bool) -> core::result::Result<(), BackingNameTooLong> {
        let header = &mut self.header;
        let room = header.header_len().saturating_sub(HEADER_LEN.into()).min(MAX_BACKING_NAME.into());
        let len = u32::try_from(name.len()).ok().filter(|&len| u64::from(len) <= room);
        header.backing_len = len.ok_or(BackingNameTooLong)?;
        let named = if name.is_empty() { 0 } else { Features::BACKING.0 };
        let raw = if name.is_empty() || !is_raw { 0 } else { Features::BACKING_IS_RAW.0 };
        header.features =
            Features(header.features.0 & !(Features::BACKING.0 | Features::BACKING_IS_RAW.0) | named | raw);
        header.backing_offset = if name.is_empty() { 0 } else { HEADER_LEN };
        header.backing_file = Some(name.to_vec()).filter(|name| !name.is_empty());
        Ok(())
    }

    /// Puts the header with these features.
    pub(super) fn put_features<D: BlockWrite>(&mut self, store: &mut Store<D>, features: Features) -> Result<()> {
        self.header.features = features;
        let header = &self.header;
        let raw = RawHeader {
            magic: U32::new(MAGIC),
            cluster_size: U32::new(header.cluster_size),
            table_size: U32::new(header.table_size),
            header_size: U32::new(header.header_size),
            features: U64::new(features.0),
            compatible: U64::new(header.compatible),
            // None is known here, so all are cleared by a writer.
            autoclear: U64::ZERO,
            l1_offset: U64::new(header.l1_offset),
            image_size: U64::new(header.image_size),
            backing_offset: U32::new(header.backing_offset),
            backing_len: U32::new(header.backing_len),
        };
        store.put(0, raw.as_bytes(), Rank::Root)
    }
}

impl Map for Layout {
    fn size(&self) -> u64 {
        self.header.image_size
    }

    fn run<D: BlockRead>(&self, store: &Store<D>, offset: u64, max_len: u64) -> Result<(u64, Run)> {
        let unit = u64::from(self.header.cluster_size);
        let (reach, skip) = (self.header.l1_reach(), offset % unit);
        let Some(table) = self.l2(store, offset / reach)? else {
            let left = (self.header.table_entries() - offset / reach).min(max_len.div_ceil(reach) + 1);
            let run = store.zero_run(self.header.l1_offset + offset / reach * 8, left * 8, 8)?.max(8) / 8;
            return Ok((run_len(run, reach, offset % reach, max_len), Run::Unallocated));
        };
        let index = offset % reach / unit;
        let count = (self.header.table_entries() - index).min((skip + max_len).div_ceil(unit));
        let first = self.entry(store, table, index)?;
        let step = if first == NONE || first == ZERO { 0 } else { unit };
        if step != 0 && !self.is_cluster(first) {
            return Err(Error::new(ErrorKind::Corrupt).at(offset));
        }
        let units = consecutive(first, step, count, |next| {
            let entry = self.entry(store, table, index + next)?;
            Ok(Some(entry).filter(|&entry| step == 0 || self.is_cluster(entry)))
        })?;
        let kind = match first {
            NONE => Run::Unallocated,
            ZERO => Run::Zero,
            host => Run::Data(host + skip),
        };
        Ok((run_len(units, unit, skip, max_len), kind))
    }
}

impl Allocate for Layout {
    fn unit(&self) -> u64 {
        self.header.cluster_size.into()
    }

    fn has_backing(&self) -> bool {
        self.expects_backing || self.header.backing_file.is_some()
    }

    fn end(&self) -> u64 {
        self.end
    }

    fn allocate<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, count: u64) -> Result<(u64, u64)> {
        let (l1_index, l2_index) = self.split(index);
        let count = count.min(self.header.table_entries() - l2_index);
        let missing = self.l2(store, l1_index)?.is_none();
        let host = self.take(count * self.unit())?;
        // Behind the data, as QEMU does.
        if missing {
            let len = self.header.table_len();
            let table = self.take(len)?;
            store.fill(table, len, 0, Rank::Leaf)?;
            store.put(self.header.l1_offset + l1_index * 8, &table.to_le_bytes(), Rank::Root)?;
        }
        Ok((host, count))
    }

    fn link<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, host: u64, count: u64) -> Result<()> {
        for done in 0..count {
            let (l1_index, l2_index) = self.split(index + done);
            let table = self.l2(store, l1_index)?.ok_or(Error::new(ErrorKind::InvalidInput))?;
            store.put(table + l2_index * 8, &(host + done * self.unit()).to_le_bytes(), Rank::Leaf)?;
        }
        Ok(())
    }

    fn link_zero<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, count: u64) -> Result<bool> {
        for index in index..index + count {
            let (l1_index, l2_index) = self.split(index);
            if self.l2(store, l1_index)?.is_none() {
                self.allocate(store, index, 0)?;
            }
            let table = self.l2(store, l1_index)?.ok_or(Error::new(ErrorKind::InvalidInput))?;
            store.put(table + l2_index * 8, &ZERO.to_le_bytes(), Rank::Leaf)?;
        }
        Ok(true)
    }

    const RESIZES: bool = true;

    fn set_size(&mut self, size: u64) -> Result<()> {
        let old = self.header.image_size;
        if size < old {
            return Err(Error::new(ErrorKind::Unsupported));
        }
        self.header.image_size = size;
        self.header.check_sizes().map_err(|_| {
            self.header.image_size = old;
            Error::new(ErrorKind::InvalidInput).at(size)
        })
    }

    fn begin<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        let features = self.header.features.0 | Features::NEED_CHECK.0;
        self.put_features(store, Features(features))
    }

    fn put_header<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        if let Some(name) = self.header.backing_file.clone() {
            store.put(self.header.backing_offset.into(), &name, Rank::Root)?;
        }
        self.put_features(store, Features(self.header.features.0 & !Features::NEED_CHECK.0))
    }
}
