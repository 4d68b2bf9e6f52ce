//! Changing the persistent bitmaps of an existing image.
//!
//! Bitmaps are never changed in place. [`Writer::load_bitmaps`] reads the directory; changes are kept in memory;
//! [`Writer::store_bitmaps`] writes every bitmap and the directory into new clusters, and one write of the header makes them the
//! bitmaps of the image. So after a crash they are the old ones or the new ones.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use instar_blockio::{BlockWrite, ErrorKind, zeroed};
use zerocopy::IntoBytes;

use crate::addr::HostOffset;
use crate::bitmap::{self, BitmapFlags, BitmapRunKind};
use crate::error::{Error, Result};
use crate::extension::BitmapDirectory;
use crate::format::{
    BITMAP_DIRTY_TRACKING, MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME,
    MAX_BITMAPS, MIN_BITMAP_GRANULARITY_BITS, RawBitmap,
};
use crate::header::Autoclear;
use crate::pages::Pages;
use crate::write::Writer;

/// Why a bitmap can't be changed as wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapError {
    /// Version 2 can't tell programs that don't know bitmaps to leave them alone.
    Version,
    /// No bitmap has this name.
    NotFound,
    /// A bitmap has this name already.
    Exists,
    /// The bitmap was not saved properly: it can only be removed.
    Inconsistent,
    /// The name is empty.
    NameEmpty,
    /// The name has more than 1023 bytes.
    NameTooLong,
    /// The granularity is not a power of two from 512 bytes to 2 GiB.
    Granularity,
    /// The bits would take more than 512 MiB.
    TooLarge,
    /// There are 65535 bitmaps already.
    TooMany,
    /// The directory would exceed its limit.
    DirectoryFull,
}

impl fmt::Display for BitmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "bitmaps need version 3",
            Self::NotFound => "no such bitmap",
            Self::Exists => "the bitmap exists already",
            Self::Inconsistent => "the bitmap is inconsistent",
            Self::NameEmpty => "the bitmap's name is empty",
            Self::NameTooLong => "the bitmap's name is too long",
            Self::Granularity => "the bitmap's granularity is out of range",
            Self::TooLarge => "the bitmap is too large",
            Self::TooMany => "too many bitmaps",
            Self::DirectoryFull => "the bitmap directory is full",
        })
    }
}

impl core::error::Error for BitmapError {}

impl From<BitmapError> for Error {
    fn from(error: BitmapError) -> Self {
        Self::Bitmap(error)
    }
}

/// The bitmaps of an image with the changes made to them.
#[derive(Debug, Default)]
pub struct Bitmaps {
    list: Vec<Bitmap>,
    /// Where the directory lies that the header names.
    directory: Option<BitmapDirectory>,
}

/// One of them.
#[derive(Debug)]
struct Bitmap {
    name: Vec<u8>,
    granularity_bits: u8,
    flags: BitmapFlags,
    /// Its table in the file, if it is there.
    table: Option<(HostOffset, u32)>,
    /// What was read from the table and not cleared since: so many bits.
    kept_bits: u64,
    /// Clusters of bits that differ from the file.
    changed: BTreeMap<u64, Vec<u8>>,
}

impl Bitmap {
    fn is_inconsistent(&self) -> bool {
        self.flags.contains(BitmapFlags::IN_USE)
    }

    fn clear(&mut self) {
        self.kept_bits = 0;
        self.changed.clear();
    }

    fn bit_count(&self, virtual_size: u64) -> u64 {
        virtual_size.div_ceil(1 << self.granularity_bits)
    }
}

impl Bitmaps {
    /// The names, in the order of the directory.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.list.iter().map(|bitmap| bitmap.name.as_slice())
    }

    fn find(&mut self, name: &[u8]) -> Result<&mut Bitmap> {
        Ok(self.list.iter_mut().find(|bitmap| bitmap.name == name).ok_or(BitmapError::NotFound)?)
    }

    fn usable(&mut self, name: &[u8]) -> Result<&mut Bitmap> {
        let bitmap = self.find(name)?;
        if bitmap.is_inconsistent() { Err(BitmapError::Inconsistent.into()) } else { Ok(bitmap) }
    }

    /// Granularity of a bitmap that is not inconsistent: log2 of the disk bytes that a bit stands for.
    ///
    /// # Errors
    /// [`BitmapError::NotFound`] and [`BitmapError::Inconsistent`].
    pub fn granularity_bits(&mut self, name: &[u8]) -> Result<u8> {
        Ok(self.usable(name)?.granularity_bits)
    }

    /// Makes all bits zero.
    ///
    /// # Errors
    /// [`BitmapError::NotFound`] and [`BitmapError::Inconsistent`].
    pub fn clear(&mut self, name: &[u8]) -> Result<()> {
        self.usable(name)?.clear();
        Ok(())
    }

    /// Says whether the bitmap goes on recording when the image is opened for writing.
    ///
    /// # Errors
    /// [`BitmapError::NotFound`] and [`BitmapError::Inconsistent`].
    pub fn set_enabled(&mut self, name: &[u8], enabled: bool) -> Result<()> {
        self.usable(name)?.flags.set(BitmapFlags::AUTO, enabled);
        Ok(())
    }

    fn directory_len(&self) -> u64 {
        self.list.iter().map(|bitmap| entry_len(bitmap.name.len())).sum()
    }

    fn emit(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for bitmap in &self.list {
            let (offset, size) = bitmap.table.unwrap_or_default();
            let raw = RawBitmap {
                table_offset: offset.0.into(),
                table_size: size.into(),
                flags: bitmap.flags.bits().into(),
                kind: BITMAP_DIRTY_TRACKING,
                granularity_bits: bitmap.granularity_bits,
                name_size: (bitmap.name.len() as u16).into(),
                extra_data_size: 0.into(),
            };
            out.try_reserve(entry_len(bitmap.name.len()) as usize).map_err(|_| Error::OutOfMemory)?;
            out.extend_from_slice(raw.as_bytes());
            out.extend_from_slice(&bitmap.name);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        Ok(out)
    }
}

/// Bytes that a directory entry takes.
fn entry_len(name_len: usize) -> u64 {
    (size_of::<RawBitmap>() + name_len).next_multiple_of(8) as u64
}

impl<D: BlockWrite> Writer<D> {
    /// Reads what bitmaps the image has.
    ///
    /// # Errors
    /// What is wrong with the directory, or [`Error::Io`].
    pub fn load_bitmaps(&mut self) -> Result<Bitmaps> {
        self.begin_metadata()?;
        let Some(directory) = self.extensions.bitmaps else { return Ok(Bitmaps::default()) };
        let mut list = Vec::new();
        let pages = Pages::new(self.main.file(), 0);
        bitmap::check(&pages, &self.header, &directory)?;
        for entry in bitmap::load(&pages, &self.header, &directory)? {
            let kept_bits = self.header.virtual_size.div_ceil(1 << entry.granularity_bits);
            list.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
            list.push(Bitmap {
                name: entry.name,
                granularity_bits: entry.granularity_bits,
                flags: entry.flags,
                table: Some((entry.table, entry.table_entries)),
                kept_bits,
                changed: BTreeMap::new(),
            });
        }
        Ok(Bitmaps { list, directory: Some(directory) })
    }

    /// Adds a bitmap without a bit set, which goes on recording when the image is opened for writing.
    ///
    /// # Errors
    /// Most of [`BitmapError`].
    pub fn add_new_bitmap(&self, bitmaps: &mut Bitmaps, name: &[u8], granularity_bits: u8) -> Result<()> {
        if granularity_bits < MIN_BITMAP_GRANULARITY_BITS {
            return Err(BitmapError::Granularity.into());
        }
        if bitmaps.find(name).is_ok() {
            return Err(BitmapError::Exists.into());
        }
        if self.header.version < 3 {
            return Err(BitmapError::Version.into());
        }
        let granularity = MIN_BITMAP_GRANULARITY_BITS..=MAX_BITMAP_GRANULARITY_BITS;
        let bits = self.header.virtual_size.div_ceil(1 << granularity_bits.min(MAX_BITMAP_GRANULARITY_BITS));
        let faults = [
            (name.is_empty(), BitmapError::NameEmpty),
            (!granularity.contains(&granularity_bits), BitmapError::Granularity),
            (bits.div_ceil(8) > MAX_BITMAP_BYTES, BitmapError::TooLarge),
            (name.len() > MAX_BITMAP_NAME.into(), BitmapError::NameTooLong),
            (bitmaps.list.len() >= MAX_BITMAPS as usize, BitmapError::TooMany),
            (bitmaps.directory_len() + entry_len(name.len()) > MAX_BITMAP_DIRECTORY_BYTES, BitmapError::DirectoryFull),
        ];
        if let Some((_, fault)) = faults.into_iter().find(|(wrong, _)| *wrong) {
            return Err(fault.into());
        }
        bitmaps.list.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        bitmaps.list.push(Bitmap {
            name: name.to_vec(),
            granularity_bits,
            flags: BitmapFlags::AUTO,
            table: None,
            kept_bits: 0,
            changed: BTreeMap::new(),
        });
        Ok(())
    }

    /// Removes a bitmap, at once.
    ///
    /// # Errors
    /// [`BitmapError::NotFound`]; what the file reports.
    pub fn remove_bitmap(&mut self, bitmaps: &mut Bitmaps, name: &[u8]) -> Result<()> {
        let index = bitmaps.list.iter().position(|bitmap| bitmap.name == name).ok_or(BitmapError::NotFound)?;
        let removed = bitmaps.list.remove(index);
        let Some(table) = removed.table else { return Ok(()) };
        let added: Vec<Bitmap> = bitmaps.list.extract_if(.., |bitmap| bitmap.table.is_none()).collect();
        self.replace_directory(bitmaps)?;
        bitmaps.list.extend(added);
        self.free_table(table)?;
        Ok(self.sync()?)
    }

    /// Adds the bits of one bitmap to those of another. A bit of a coarser bitmap sets all bits of a finer one that it stands for.
    ///
    /// # Errors
    /// [`BitmapError::NotFound`] and [`BitmapError::Inconsistent`] for either; what the file reports.
    pub fn merge_bitmap(&mut self, bitmaps: &mut Bitmaps, from: &[u8], into: &[u8]) -> Result<()> {
        let (from_bits, _) = (bitmaps.granularity_bits(from)?, bitmaps.granularity_bits(into)?);
        if from == into {
            return Ok(());
        }
        let cluster_size = self.header.geometry.cluster_size();
        let len = bitmaps.usable(from)?.bit_count(self.header.virtual_size).div_ceil(8);
        for cluster in 0..len.div_ceil(cluster_size) {
            let source = bitmaps.usable(from)?;
            if let Some(bytes) = self.bits(source, cluster)? {
                self.merge_bits(bitmaps, into, from_bits, cluster * cluster_size, &bytes)?;
            }
        }
        Ok(())
    }

    /// Adds bits to those of a bitmap: `bytes` are those at byte `at` of a bitmap of the same disk whose bits stand for
    /// 2^`granularity_bits` bytes each.
    ///
    /// # Errors
    /// As [`merge_bitmap`](Self::merge_bitmap).
    pub fn merge_bits(
        &mut self,
        bitmaps: &mut Bitmaps,
        into: &[u8],
        granularity_bits: u8,
        at: u64,
        bytes: &[u8],
    ) -> Result<()> {
        let target = bitmaps.usable(into)?;
        let end = target.bit_count(self.header.virtual_size);
        let to_disk = |bit: u64| bit.saturating_mul(1 << granularity_bits);
        let mut bit = at.saturating_mul(8);
        let last = bit.saturating_add(bytes.len() as u64 * 8);
        let is_set = |bit: u64| {
            let index = bit - at * 8;
            bytes.get((index / 8) as usize).is_some_and(|byte| byte >> (index % 8) & 1 != 0)
        };
        while bit < last {
            if !is_set(bit) {
                bit +=
                    if bit.is_multiple_of(8) && bytes.get(((bit - at * 8) / 8) as usize) == Some(&0) { 8 } else { 1 };
                continue;
            }
            let start = bit;
            while bit < last && is_set(bit) {
                bit += 1;
            }
            let first = to_disk(start) >> target.granularity_bits;
            let stop = to_disk(bit).min(self.header.virtual_size).div_ceil(1 << target.granularity_bits).min(end);
            self.set_bits(target, first, stop)?;
        }
        Ok(())
    }

    /// Sets the bits of a range of the disk in all bitmaps that record.
    pub(crate) fn mark(&self, bitmaps: &mut Bitmaps, range: &Range<u64>) -> Result<()> {
        let records = |bitmap: &&mut Bitmap| bitmap.flags.contains(BitmapFlags::AUTO) && !bitmap.is_inconsistent();
        for bitmap in bitmaps.list.iter_mut().filter(records) {
            let end = range.end.min(self.header.virtual_size).div_ceil(1 << bitmap.granularity_bits);
            self.set_bits(bitmap, range.start >> bitmap.granularity_bits, end)?;
        }
        Ok(())
    }

    fn set_bits(&self, bitmap: &mut Bitmap, first: u64, end: u64) -> Result<()> {
        let per_cluster = self.header.geometry.cluster_size() * 8;
        let mut bit = first;
        while bit < end {
            let cluster = bit / per_cluster;
            let stop = end.min((cluster + 1) * per_cluster);
            if !bitmap.changed.contains_key(&cluster) {
                let bytes = match self.bits(bitmap, cluster)? {
                    Some(bytes) => bytes,
                    None => zeroed(self.header.geometry.cluster_size() as usize)?,
                };
                bitmap.changed.insert(cluster, bytes);
            }
            let Some(bytes) = bitmap.changed.get_mut(&cluster) else { return Err(Error::OutOfMemory) };
            while bit < stop {
                let at = ((bit % per_cluster) / 8) as usize;
                if bit.is_multiple_of(8) && stop - bit >= 8 {
                    bytes[at] = 0xff;
                    bit += 8;
                } else {
                    bytes[at] |= 1 << (bit % 8);
                    bit += 1;
                }
            }
        }
        Ok(())
    }

    /// A cluster of a bitmap's bits; `None` if none is set.
    fn bits(&self, bitmap: &Bitmap, cluster: u64) -> Result<Option<Vec<u8>>> {
        let cluster_size = self.header.geometry.cluster_size();
        if let Some(bytes) = bitmap.changed.get(&cluster) {
            return Ok(Some(bytes.clone()));
        }
        let Some((table, entries)) = bitmap.table.filter(|(_, entries)| cluster < u64::from(*entries)) else {
            return Ok(None);
        };
        debug_assert!(cluster < u64::from(entries));
        let kept = bitmap.kept_bits.saturating_sub(cluster * cluster_size * 8).min(cluster_size * 8);
        if kept == 0 {
            return Ok(None);
        }
        // The table is looked at cluster by cluster, as an L2 table is.
        let entry_at = table.0.saturating_add(cluster * 8);
        let skip = self.header.geometry.in_cluster(entry_at) as usize;
        let word = self.with_table(entry_at - skip as u64, |part| part[skip..].first_chunk().copied())?;
        let mut bytes = zeroed(cluster_size as usize)?;
        match bitmap::decode(self.header.geometry, word.map_or(0, u64::from_be_bytes))? {
            BitmapRunKind::Zeros => return Ok(None),
            BitmapRunKind::Ones => bytes.fill(0xff),
            BitmapRunKind::Data(host) => self.main.read(host.0, &mut bytes)?,
        }
        keep_bits(&mut bytes, kept);
        Ok(Some(bytes))
    }

    /// Stores the bitmaps. Those of a disk whose size has changed are made longer or shorter.
    ///
    /// # Errors
    /// What the file reports.
    pub fn store_bitmaps(&mut self, bitmaps: &mut Bitmaps) -> Result<()> {
        // Who has loaded them answers for them.
        self.record = None;
        let mut old = Vec::new();
        if bitmaps.list.iter().all(Bitmap::is_inconsistent) {
            return match self.extensions.bitmaps == bitmaps.directory {
                true => Ok(()),
                false => self.replace_directory(bitmaps),
            };
        }
        for bitmap in bitmaps.list.iter_mut().filter(|bitmap| !bitmap.is_inconsistent()) {
            let table = self.store_bitmap(bitmap)?;
            old.extend(bitmap.table.replace(table));
            bitmap.kept_bits = bitmap.bit_count(self.header.virtual_size);
            bitmap.changed.clear();
        }
        self.replace_directory(bitmaps)?;
        old.into_iter().try_for_each(|table| self.free_table(table))?;
        Ok(self.sync()?)
    }

    /// Writes a bitmap's bits and table into new clusters.
    fn store_bitmap(&mut self, bitmap: &Bitmap) -> Result<(HostOffset, u32)> {
        let cluster_size = self.header.geometry.cluster_size();
        let bits = bitmap.bit_count(self.header.virtual_size);
        let clusters = bits.div_ceil(8).div_ceil(cluster_size);
        let mut table = zeroed(clusters as usize * 8)?;
        for (cluster, place) in (0u64..).zip(table.as_chunks_mut::<8>().0) {
            let Some(mut bytes) = self.bits(bitmap, cluster)? else { continue };
            keep_bits(&mut bytes, bits - cluster * cluster_size * 8);
            if bytes.iter().any(|&byte| byte != 0) {
                *place = self.store_clusters(&bytes)?.to_be_bytes();
            }
        }
        Ok((HostOffset(self.store_clusters(&table)?), clusters as u32))
    }

    /// Writes the directory into new clusters and the header that names it, and frees the old directory.
    fn replace_directory(&mut self, bitmaps: &mut Bitmaps) -> Result<()> {
        let bytes = bitmaps.emit()?;
        let new = match bitmaps.list.len() {
            0 => None,
            count => Some(BitmapDirectory {
                offset: HostOffset(self.store_clusters(&bytes)?),
                len: bytes.len() as u64,
                count: count as u32,
            }),
        };
        self.sync()?;
        self.extensions.bitmaps = new;
        self.extensions.stale_bitmaps = false;
        self.header.autoclear.set(Autoclear::BITMAPS, new.is_some());
        self.rewrite_header()?;
        if let Some(old) = core::mem::replace(&mut bitmaps.directory, new) {
            self.retire_directory(old)?;
        }
        Ok(())
    }

    /// Frees a directory that the header names no more. Its bitmaps are marked in use, so that nobody who comes upon it takes
    /// them for valid.
    fn retire_directory(&mut self, old: BitmapDirectory) -> Result<()> {
        let len = usize::try_from(old.len).map_err(|_| Error::OutOfMemory)?;
        let mut bytes = zeroed(len)?;
        self.main.read(old.offset.0, &mut bytes)?;
        let mut at = 0;
        const HEAD: usize = size_of::<RawBitmap>();
        const FLAGS: usize = core::mem::offset_of!(RawBitmap, flags) + 3;
        const NAME_SIZE: usize = core::mem::offset_of!(RawBitmap, name_size);
        while let Some(entry) = bytes.get_mut(at..).filter(|entry| entry.len() >= HEAD) {
            entry[FLAGS] |= BitmapFlags::IN_USE.bits() as u8;
            let name_len = u16::from_be_bytes([entry[NAME_SIZE], entry[NAME_SIZE + 1]]);
            at += entry_len(name_len.into()) as usize;
        }
        self.main.write(old.offset.0, &bytes)?;
        Ok(self.alloc.free(&mut self.main, self.alloc.touched(old.offset.0, old.len))?)
    }

    /// Frees a bitmap table and the clusters that it names, whose space is given back. The header names it no more.
    fn free_table(&mut self, (table, entries): (HostOffset, u32)) -> Result<()> {
        let mut bytes = zeroed(entries as usize * 8)?;
        self.main.read(table.0, &mut bytes)?;
        let mut freed = Vec::new();
        for entry in bytes.as_chunks::<8>().0 {
            // What can't be decoded or is free already belongs to a bitmap that was never valid.
            if let Ok(BitmapRunKind::Data(host)) = bitmap::decode(self.header.geometry, u64::from_be_bytes(*entry)) {
                let span = self.alloc.touched(host.0, 1);
                match self.alloc.lower(&mut self.main, span.first) {
                    Ok(0) => freed.push(span),
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::Corrupt => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        self.give_back(&freed)?;
        Ok(self.alloc.free(&mut self.main, self.alloc.touched(table.0, bytes.len() as u64))?)
    }
}

/// Clears all but the first `count` bits.
fn keep_bits(bytes: &mut [u8], count: u64) {
    let whole = usize::try_from(count / 8).unwrap_or(usize::MAX);
    if let Some(rest) = bytes.get_mut(whole..)
        && let Some((first, others)) = rest.split_first_mut()
    {
        *first &= (1 << (count % 8)) - 1;
        others.fill(0);
    }
}
