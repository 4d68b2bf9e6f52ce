//! Where the clusters of a disk lie.

use instar_blockio::{BlockRead, BlockWrite, Codec, Error, ErrorKind, Result};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U16, U32, U64};

use super::header::{HEADER_LEN, Header, MAGIC, RawHeader};
use crate::image::{Map, Packed, Run, consecutive, run_len};
use crate::store::{Rank, SECTOR, Store};
use crate::writer::Allocate;

/// Marks the entry of a compressed cluster.
const PACKED: u64 = 1 << 63;

/// The tables of an image.
#[derive(Clone, Debug)]
pub struct Layout {
    header: Header,
    /// The first byte behind all that is in use.
    end: u64,
    /// Encrypted, and nobody has the key.
    locked: bool,
}

impl Layout {
    pub(super) fn of(header: &Header, end: u64) -> Self {
        Self { header: header.clone(), end, locked: header.encrypted }
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// Lets encrypted clusters be found.
    pub(super) fn unlock(&mut self) {
        self.locked = false;
    }

    fn l1_at(&self, index: u64) -> Result<u64> {
        self.header.l1_offset.checked_add(index * 8).ok_or(Error::new(ErrorKind::Corrupt))
    }

    /// The L2 table of an L1 entry; `None`: there is none.
    fn l2<D: BlockRead>(&self, store: &Store<D>, l1_index: u64) -> Result<Option<u64>> {
        let at = self.l1_at(l1_index)?;
        let entry = u64::from_be_bytes(store.get(at)?);
        match i64::try_from(entry) {
            Ok(_) => Ok(Some(entry).filter(|&entry| entry != 0)),
            Err(_) => Err(Error::new(ErrorKind::Corrupt).at(at)),
        }
    }

    /// A compressed cluster's entry.
    fn packed(&self, entry: u64, unit_offset: u64) -> Packed {
        let shift = 63 - self.header.cluster_bits;
        Packed {
            host: entry & ((1 << shift) - 1),
            stored_len: ((entry & !PACKED) >> shift) as u32,
            unit_offset,
            unit_len: self.header.cluster_size() as u32,
            codec: Codec::Deflate,
        }
    }

    /// How far no L2 table is there, from an L1 entry that is 0 on.
    fn missing<D: BlockRead>(&self, store: &Store<D>, l1_index: u64, max_len: u64) -> Result<u64> {
        let left = (self.header.l1_entries() - l1_index).min(max_len.div_ceil(self.header.l1_reach()) + 1);
        Ok(store.zero_run(self.l1_at(l1_index)?, left * 8, 8)?.max(8) / 8)
    }

    /// The L2 table for a cluster, made if there is none.
    fn make_l2<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64) -> Result<u64> {
        let l1_index = index >> self.header.l2_bits;
        if let Some(table) = self.l2(store, l1_index)? {
            return Ok(table);
        }
        let (table, len) = (self.aligned_end()?, 8 << self.header.l2_bits);
        self.end = end_of(table, len)?;
        store.fill(table, len, 0, Rank::Leaf)?;
        store.put(self.l1_at(l1_index)?, &table.to_be_bytes(), Rank::Root)?;
        Ok(table)
    }

    fn aligned_end(&self) -> Result<u64> {
        self.end.checked_next_multiple_of(self.header.cluster_size()).ok_or(Error::new(ErrorKind::NoSpace))
    }

    /// The place of the L2 entry of a cluster whose table is there.
    fn entry_at<D: BlockRead>(&self, store: &Store<D>, index: u64) -> Result<u64> {
        let table = self.l2(store, index >> self.header.l2_bits)?.ok_or(Error::new(ErrorKind::InvalidInput))?;
        table.checked_add((index & (self.l2_entries() - 1)) * 8).ok_or(Error::new(ErrorKind::Corrupt))
    }

    fn l2_entries(&self) -> u64 {
        1 << self.header.l2_bits
    }
}

/// Offsets must fit the lower bits of an entry.
fn end_of(offset: u64, len: u64) -> Result<u64> {
    offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok()).ok_or(Error::new(ErrorKind::NoSpace))
}

impl Map for Layout {
    fn size(&self) -> u64 {
        self.header.virtual_size()
    }

    fn run<D: BlockRead>(&self, store: &Store<D>, offset: u64, max_len: u64) -> Result<(u64, Run)> {
        if self.locked {
            return Err(Error::new(ErrorKind::Encrypted).at(offset));
        }
        let unit = self.header.cluster_size();
        let (reach, skip) = (self.header.l1_reach(), offset % unit);
        let Some(table) = self.l2(store, offset / reach)? else {
            let run = self.missing(store, offset / reach, max_len)?;
            return Ok((run_len(run, reach, offset % reach, max_len), Run::Unallocated));
        };
        let index = offset % reach / unit;
        let entry = |index: u64| {
            let at = table.checked_add(index * 8).ok_or(Error::new(ErrorKind::Corrupt).at(table))?;
            Ok(u64::from_be_bytes(store.get(at)?))
        };
        let count = (self.l2_entries() - index).min((skip + max_len).div_ceil(unit));
        let first = entry(index)?;
        if first & PACKED != 0 {
            let packed = self.packed(first, offset - skip);
            return Ok((run_len(1, unit, skip, max_len), Run::Packed(packed)));
        }
        // As in QEMU, which also finds entries out of the range of file offsets this way: no file has such a place.
        if !first.is_multiple_of(SECTOR) {
            return Err(Error::new(ErrorKind::Corrupt).at(table));
        }
        let step = if first == 0 { 0 } else { unit };
        let units = consecutive(first, step, count, |next| entry(index + next).map(Some))?;
        let kind = match first {
            0 => Run::Unallocated,
            host => Run::Data(host + skip),
        };
        Ok((run_len(units, unit, skip, max_len), kind))
    }
}

impl Allocate for Layout {
    fn unit(&self) -> u64 {
        self.header.cluster_size()
    }

    fn has_backing(&self) -> bool {
        self.header.backing_file.is_some()
    }

    fn end(&self) -> u64 {
        self.end
    }

    fn allocate<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, count: u64) -> Result<(u64, u64)> {
        self.make_l2(store, index)?;
        let count = count.min(self.l2_entries() - (index & (self.l2_entries() - 1)));
        let host = self.aligned_end()?;
        self.end = end_of(host, count * self.unit())?;
        Ok((host, count))
    }

    fn link<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, host: u64, count: u64) -> Result<()> {
        for done in 0..count {
            let at = self.entry_at(store, index + done)?;
            store.put(at, &(host + done * self.unit()).to_be_bytes(), Rank::Leaf)?;
        }
        Ok(())
    }

    fn allocate_packed<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, len: u32) -> Result<u64> {
        if u64::from(len) >= self.unit() {
            return Err(Error::new(ErrorKind::InvalidInput));
        }
        self.make_l2(store, index)?;
        // QEMU counts files in sectors, and so begins at one.
        let host = self.end.next_multiple_of(SECTOR);
        if host >> (63 - self.header.cluster_bits) != 0 {
            return Err(Error::new(ErrorKind::NoSpace));
        }
        self.end = end_of(host, len.into())?;
        Ok(host)
    }

    fn link_packed<D: BlockWrite>(&mut self, store: &mut Store<D>, index: u64, host: u64, len: u32) -> Result<()> {
        let entry = PACKED | u64::from(len) << (63 - self.header.cluster_bits) | host;
        let at = self.entry_at(store, index)?;
        store.put(at, &entry.to_be_bytes(), Rank::Leaf)
    }

    fn put_header<D: BlockWrite>(&mut self, store: &mut Store<D>) -> Result<()> {
        let header = &self.header;
        let name = header.backing_file.as_deref().unwrap_or_default();
        let raw = RawHeader {
            magic: U32::new(MAGIC),
            version: U32::new(1),
            backing_offset: U64::new(if name.is_empty() { 0 } else { HEADER_LEN }),
            backing_len: U32::new(name.len() as u32),
            mtime: U32::ZERO,
            size: U64::new(header.size),
            cluster_bits: header.cluster_bits as u8,
            l2_bits: header.l2_bits as u8,
            padding: U16::ZERO,
            crypt_method: U32::ZERO,
            l1_offset: U64::new(header.l1_offset),
        };
        // Nothing in the header of an existing image changes.
        if store.get(0)? != MAGIC.to_be_bytes() {
            store.put(HEADER_LEN, name, Rank::Root)?;
            store.put(0, raw.as_bytes(), Rank::Root)?;
        }
        Ok(())
    }
}
