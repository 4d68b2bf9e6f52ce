//! Persistent dirty bitmaps: spec chapters "Bitmaps extension" and "Bitmaps".

use alloc::vec::Vec;

use bitflags::bitflags;
use instar_blockio::BlockRead;
use zerocopy::FromBytes;

use crate::addr::{Geometry, HostOffset};
use crate::error::{DirectoryFault, Error, NameAt, Result};
use crate::extension::{BitmapDirectory, c_string};
use crate::format::{
    BITMAP_ALL_ONES, BITMAP_DIRTY_TRACKING, BITMAP_OFFSET_MASK, BITMAP_RESERVED, MAX_BITMAP_BYTES,
    MAX_BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME, MAX_BITMAP_TABLE, MIN_BITMAP_GRANULARITY_BITS, RawBitmap,
};
use crate::header::Header;
use crate::open::Image;
use crate::pages::Pages;

/// Bytes of bitmap tables that opening looks at. Tables beyond that are looked at when they are read, so that an image
/// can't make opening long.
const TABLE_CHECK_BUDGET: u64 = 16 << 20;

bitflags! {
    /// Flags of a bitmap.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct BitmapFlags: u32 {
        /// It was not saved properly: its contents mean nothing.
        const IN_USE = 1;
        /// It goes on recording when the image is opened for writing.
        const AUTO = 1 << 1;
    }
}

/// A persistent dirty bitmap.
///
/// Its bits are serialized bytewise, least significant bit first; bit n stands for the disk bytes from
/// `n << granularity_bits` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: Vec<u8>,
    /// log2 of the disk bytes that a bit stands for, 9 to 31.
    pub granularity_bits: u8,
    /// Flags.
    pub flags: BitmapFlags,
    /// Length of its bits, bytes.
    pub len: u64,
    pub(crate) table: HostOffset,
    pub(crate) table_entries: u32,
}

/// A run of a bitmap's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapRun {
    /// Length, bytes; never 0.
    pub len: u64,
    /// What they are.
    pub kind: BitmapRunKind,
}

/// What the bytes of a [`BitmapRun`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapRunKind {
    /// All bits are zero.
    Zeros,
    /// All bits are one.
    Ones,
    /// They lie here in the image file.
    Data(HostOffset),
}

/// An entry of the directory, its name not yet read.
struct Entry {
    raw: RawBitmap,
    name: NameAt,
}

/// Steps through the bitmap directory.
struct Entries<'a, D> {
    pages: &'a Pages<D>,
    header: &'a Header,
    at: u64,
    end: u64,
    left: u32,
    failed: bool,
}

impl<'a, D: BlockRead> Entries<'a, D> {
    fn new(pages: &'a Pages<D>, header: &'a Header, directory: &BitmapDirectory) -> Result<Self> {
        let at = directory.offset.0;
        // An offset near 2^64 is no place in a file.
        let end = at.checked_add(directory.len).ok_or(DirectoryFault::Broken)?;
        Ok(Self { pages, header, at, end, left: directory.count, failed: false })
    }

    fn read(&mut self) -> Result<Option<Entry>> {
        const HEAD: u64 = size_of::<RawBitmap>() as u64;
        let room = self.end - self.at;
        if room == 0 {
            return if self.left == 0 { Ok(None) } else { Err(DirectoryFault::FewerThanSaid.into()) };
        }
        if room < HEAD {
            return Err(DirectoryFault::Broken.into());
        }
        self.left = self.left.checked_sub(1).ok_or(DirectoryFault::MoreThanSaid)?;
        let mut head = [0; HEAD as usize];
        self.pages.read(self.at, &mut head)?;
        let raw = RawBitmap::read_from_bytes(&head).map_err(|_| DirectoryFault::Broken)?;
        let tail = u64::from(raw.extra_data_size.get()) + u64::from(raw.name_size.get());
        let len = (HEAD + tail).next_multiple_of(8);
        if len > room {
            return Err(DirectoryFault::Broken.into());
        }
        if raw.extra_data_size.get() != 0 {
            return Err(DirectoryFault::ExtraData.into());
        }
        let name = NameAt { offset: self.at + HEAD, len: raw.name_size.get() };
        if !is_sound(&raw, self.header) {
            return Err(DirectoryFault::Constraints(name).into());
        }
        self.at += len;
        Ok(Some(Entry { raw, name }))
    }
}

impl<D: BlockRead> Iterator for Entries<'_, D> {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let entry = self.read().transpose();
        self.failed = !matches!(entry, Some(Ok(_)));
        entry
    }
}

impl From<DirectoryFault> for Error {
    fn from(fault: DirectoryFault) -> Self {
        Self::BitmapDirectory(fault)
    }
}

/// Bytes that the bits of a disk take.
fn bitmap_len(virtual_size: u64, granularity_bits: u8) -> u64 {
    virtual_size.div_ceil(1 << granularity_bits).div_ceil(8)
}

fn is_sound(raw: &RawBitmap, header: &Header) -> bool {
    let geometry = header.geometry;
    let (table, entries) = (raw.table_offset.get(), raw.table_size.get());
    let flags = BitmapFlags::from_bits_retain(raw.flags.get());
    let bytes = u64::from(entries) * geometry.cluster_size();
    let shape = entries != 0
        && table != 0
        && geometry.is_aligned(table)
        && entries <= MAX_BITMAP_TABLE
        && bytes <= MAX_BITMAP_BYTES
        && (MIN_BITMAP_GRANULARITY_BITS..=MAX_BITMAP_GRANULARITY_BITS).contains(&raw.granularity_bits)
        && BitmapFlags::all().contains(flags)
        && raw.name_size.get() <= MAX_BITMAP_NAME
        && raw.kind == BITMAP_DIRTY_TRACKING;
    shape && (flags.contains(BitmapFlags::IN_USE) || bitmap_len(header.virtual_size, raw.granularity_bits) <= bytes)
}

/// What a bitmap table entry says, or the entry if it can't be.
pub(crate) fn decode(geometry: Geometry, entry: u64) -> Result<BitmapRunKind> {
    let offset = entry & BITMAP_OFFSET_MASK;
    let ones = entry & BITMAP_ALL_ONES != 0;
    if entry & BITMAP_RESERVED != 0 || (offset != 0 && ones) || !geometry.is_aligned(offset) {
        return Err(Error::BitmapEntry(entry));
    }
    Ok(match (offset, ones) {
        (0, false) => BitmapRunKind::Zeros,
        (0, true) => BitmapRunKind::Ones,
        _ => BitmapRunKind::Data(HostOffset(offset)),
    })
}

/// All bitmaps of a directory.
pub(crate) fn load<D: BlockRead>(
    pages: &Pages<D>,
    header: &Header,
    directory: &BitmapDirectory,
) -> Result<Vec<BitmapInfo>> {
    let mut all = Vec::new();
    for entry in Entries::new(pages, header, directory)? {
        let Entry { raw, name } = entry?;
        all.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        all.push(BitmapInfo {
            name: read_name(pages, name)?,
            granularity_bits: raw.granularity_bits,
            flags: BitmapFlags::from_bits_retain(raw.flags.get()),
            len: bitmap_len(header.virtual_size, raw.granularity_bits),
            table: HostOffset(raw.table_offset.get()),
            table_entries: raw.table_size.get(),
        });
    }
    Ok(all)
}

/// Walks the directory once, for its faults and those of the tables.
pub(crate) fn check<D: BlockRead>(pages: &Pages<D>, header: &Header, directory: &BitmapDirectory) -> Result<()> {
    if directory.len == 0 {
        return Err(DirectoryFault::Empty.into());
    }
    Entries::new(pages, header, directory)?.try_for_each(|entry| entry.map(drop))?;
    let mut budget = TABLE_CHECK_BUDGET;
    let mut names = Vec::new();
    for entry in Entries::new(pages, header, directory)? {
        let entry = entry?;
        names.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        names.push((name_hash(pages, entry.name)?, entry.name));
        if entry.raw.flags.get() & BitmapFlags::IN_USE.bits() == 0 {
            check_table(pages, header, &entry, &mut budget)?;
        }
    }
    check_names(pages, names)
}

fn check_table<D: BlockRead>(pages: &Pages<D>, header: &Header, entry: &Entry, budget: &mut u64) -> Result<()> {
    let (table, entries) = (entry.raw.table_offset.get(), u64::from(entry.raw.table_size.get()));
    let fault = DirectoryFault::Table(entry.name);
    table.checked_add(entries * 8).filter(|&end| end <= i64::MAX as u64).ok_or(fault)?;
    let Some(left) = budget.checked_sub(entries * 8) else { return Ok(()) };
    *budget = left;
    for index in 0..entries {
        let word = read_word(pages, table + index * 8)?;
        decode(header.geometry, word).map_err(|_| fault)?;
    }
    let len = bitmap_len(header.virtual_size, entry.raw.granularity_bits);
    if header.geometry.clusters(len) != entries {
        return Err(DirectoryFault::TableSize(entry.name).into());
    }
    Ok(())
}

fn read_word<D: BlockRead>(pages: &Pages<D>, at: u64) -> Result<u64> {
    let mut word = [0; 8];
    pages.read(at, &mut word)?;
    Ok(u64::from_be_bytes(word))
}

fn read_name<D: BlockRead>(pages: &Pages<D>, name: NameAt) -> Result<Vec<u8>> {
    let mut bytes = pages.read_vec(name.offset, name.len.into())?;
    bytes.truncate(c_string(&bytes).len());
    Ok(bytes)
}

/// FNV-1a. Only sorts names, so that 65535 of them needn't be kept; equal hashes are compared by name.
fn name_hash<D: BlockRead>(pages: &Pages<D>, name: NameAt) -> Result<u64> {
    let bytes = read_name(pages, name)?;
    Ok(bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)))
}

fn check_names<D: BlockRead>(pages: &Pages<D>, mut names: Vec<(u64, NameAt)>) -> Result<()> {
    names.sort_unstable_by_key(|&(hash, name)| (hash, name.offset));
    for pair in names.windows(2) {
        if let [(a, first), (b, second)] = *pair
            && a == b
            && read_name(pages, first)? == read_name(pages, second)?
        {
            return Err(DirectoryFault::Duplicate(second).into());
        }
    }
    Ok(())
}

impl<D: BlockRead> Image<D> {
    /// The persistent dirty bitmaps, in the order of their directory.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::OutOfMemory`].
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        match &self.extensions.bitmaps {
            Some(directory) => load(&self.pages, &self.header, directory),
            None => Ok(Vec::new()),
        }
    }

    /// The run of a bitmap's bytes at `offset`: to the end of a cluster of bits, at most.
    ///
    /// # Errors
    /// [`Error::BitmapEntry`], or an [`OutOfBounds`](instar_blockio::ErrorKind::OutOfBounds) error from
    /// [`BitmapInfo::len`] on.
    pub fn bitmap_run_at(&self, bitmap: &BitmapInfo, offset: u64) -> Result<BitmapRun> {
        instar_blockio::check_range(bitmap.len, offset, 1)?;
        let geometry = self.header.geometry;
        let index = offset >> geometry.cluster_bits();
        let skip = geometry.in_cluster(offset);
        let len = (geometry.cluster_size() - skip).min(bitmap.len - offset);
        if index >= u64::from(bitmap.table_entries) {
            return Ok(BitmapRun { len, kind: BitmapRunKind::Zeros });
        }
        let at = bitmap.table.0.checked_add(index * 8).ok_or(Error::BitmapEntry(bitmap.table.0))?;
        let kind = match decode(geometry, read_word(&self.pages, at)?)? {
            BitmapRunKind::Data(host) => BitmapRunKind::Data(HostOffset(host.0 + skip)),
            other => other,
        };
        Ok(BitmapRun { len, kind })
    }

    /// Fills `buf` with a bitmap's bytes from `offset`.
    ///
    /// # Errors
    /// As [`bitmap_run_at`](Self::bitmap_run_at), and [`Error::Io`].
    pub fn read_bitmap(&self, bitmap: &BitmapInfo, offset: u64, buf: &mut [u8]) -> Result<()> {
        instar_blockio::check_range(bitmap.len, offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let run = self.bitmap_run_at(bitmap, at)?;
            let len = run.len.min(rest.len() as u64) as usize;
            let (now, later) = rest.split_at_mut(len);
            match run.kind {
                BitmapRunKind::Zeros => now.fill(0),
                BitmapRunKind::Ones => now.fill(0xff),
                BitmapRunKind::Data(host) => self.pages.read(host.0, now)?,
            }
            (at, rest) = (at + len as u64, later);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use instar_blockio::{FileId, MemBlock};

    use super::*;
    use crate::open::OpenOptions;

    /// One entry: its table at 0x400 with one word.
    fn entry(name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![
            0, 0, 0, 0, 0, 0, 4, 0, // table_offset
            0, 0, 0, 1, // table_size
            0, 0, 0, 2, // flags
            1, 9, 0, 0, // type, granularity_bits, name_size
            0, 0, 0, 0, // extra_data_size
        ];
        bytes[18..20].copy_from_slice(&(name.len() as u16).to_be_bytes());
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// An image of `size` bytes with clusters of 512, a bitmap table of `table` and this directory.
    fn image(size: u64, table: u64, count: u32, directory: &[u8]) -> Result<Image<MemBlock>> {
        let mut file = vec![0; 0x600];
        file[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        file[23] = 9; // cluster_bits
        file[24..32].copy_from_slice(&size.to_be_bytes());
        file[36..40].copy_from_slice(&(size.div_ceil(32768) as u32).to_be_bytes()); // l1_size
        file[59] = 1; // refcount_table_clusters
        file[95] = 1; // autoclear: bitmaps
        file[99] = 4; // refcount_order
        file[103] = 112; // header_length
        file[112..120].copy_from_slice(&[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]);
        file[120..124].copy_from_slice(&count.to_be_bytes());
        file[128..136].copy_from_slice(&(directory.len() as u64).to_be_bytes());
        file[142] = 6; // directory_offset: 0x600
        file[0x400..0x408].copy_from_slice(&table.to_be_bytes());
        file.extend(directory);
        Image::open(MemBlock::from(file), FileId(0), &OpenOptions::default())
    }

    fn fault(size: u64, table: u64, count: u32, directory: &[u8]) -> DirectoryFault {
        match image(size, table, count, directory).unwrap_err() {
            Error::BitmapDirectory(fault) => fault,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lengths_of_the_directory() {
        let one = entry(b"b0");
        assert_eq!(image(4096, 0, 1, &one).unwrap().bitmaps().unwrap()[0].name, b"b0");
        assert_eq!(fault(4096, 0, 1, &[]), DirectoryFault::Empty);
        assert_eq!(fault(4096, 0, 2, &one), DirectoryFault::FewerThanSaid);
        assert_eq!(fault(4096, 0, 1, &[one.clone(), entry(b"b1")].concat()), DirectoryFault::MoreThanSaid);
        assert_eq!(fault(4096, 0, 1, &one[..31]), DirectoryFault::Broken);
        assert_eq!(fault(4096, 0, 1, &one[..23]), DirectoryFault::Broken);
        assert_eq!(fault(4096, 0, 1, &[&one[..], &[0; 8]].concat()), DirectoryFault::Broken);
    }

    #[test]
    fn each_field_has_its_fault() {
        let name = NameAt { offset: 0x618, len: 2 };
        let cases: &[(usize, &[u8])] = &[
            (6, &[0]),             // no table
            (7, &[1]),             // not aligned
            (11, &[0]),            // no entries
            (8, &[0, 0x10, 0, 1]), // more than 512 MiB
            (15, &[4]),            // reserved flag
            (16, &[2]),            // type
            (17, &[8]),            // granularity
            (17, &[32]),
        ];
        for &(at, patch) in cases {
            let mut one = entry(b"b0");
            one[at..at + patch.len()].copy_from_slice(patch);
            assert_eq!(fault(4096, 0, 1, &one), DirectoryFault::Constraints(name), "{at}");
        }
        let mut extra = entry(b"b0");
        extra[23] = 8;
        extra.resize(40, 0);
        assert_eq!(fault(4096, 0, 1, &extra), DirectoryFault::ExtraData);
        // A cluster of bits stands for 2 MiB.
        assert_eq!(fault((2 << 20) + 1, 0, 1, &entry(b"b0")), DirectoryFault::Constraints(name));
        assert!(image(2 << 20, 0, 1, &entry(b"b0")).is_ok());
        let long = entry(&[b'n'; 1024]);
        assert_eq!(fault(4096, 0, 1, &long), DirectoryFault::Constraints(NameAt { len: 1024, ..name }));
    }

    #[test]
    fn tables_are_looked_at_unless_in_use() {
        let name = NameAt { offset: 0x618, len: 2 };
        for word in [2, 0x201, 0x300, 1 << 56] {
            assert_eq!(fault(4096, word, 1, &entry(b"b0")), DirectoryFault::Table(name), "{word:#x}");
            let mut in_use = entry(b"b0");
            in_use[15] = 1;
            let image = image(4096, word, 1, &in_use).unwrap();
            let bitmap = &image.bitmaps().unwrap()[0];
            assert_eq!(bitmap.flags, BitmapFlags::IN_USE);
            assert_eq!(image.bitmap_run_at(bitmap, 0), Err(Error::BitmapEntry(word)));
        }
        let mut two = entry(b"b0");
        two[11] = 2;
        assert_eq!(fault(4096, 0, 1, &two), DirectoryFault::TableSize(name));
    }

    #[test]
    fn names_differ() {
        let directory = [entry(b"a"), entry(b"b"), entry(b"a\0c")].concat();
        let second = NameAt { offset: 0x600 + 2 * 32 + 24, len: 3 };
        assert_eq!(fault(4096, 0, 3, &directory), DirectoryFault::Duplicate(second));
        let bitmaps = image(4096, 0, 2, &directory[..64]).unwrap().bitmaps().unwrap();
        assert_eq!(bitmaps.iter().map(|b| &b.name[..]).collect::<Vec<_>>(), [b"a", b"b"]);
    }

    #[test]
    fn runs() {
        for (word, kind, byte) in [
            (0, BitmapRunKind::Zeros, 0),
            (1, BitmapRunKind::Ones, 0xff),
            (0x600, BitmapRunKind::Data(HostOffset(0x602)), 4),
        ] {
            let image = image(1 << 20, word, 1, &entry(b"b0")).unwrap();
            let bitmap = &image.bitmaps().unwrap()[0];
            assert_eq!(bitmap.len, 256);
            assert_eq!(image.bitmap_run_at(bitmap, 2), Ok(BitmapRun { len: 254, kind }));
            let mut bytes = [9; 2];
            image.read_bitmap(bitmap, 6, &mut bytes).unwrap();
            assert_eq!(bytes[0], byte); // of the directory itself: its table_offset
            assert!(image.read_bitmap(bitmap, 255, &mut bytes).is_err());
        }
    }
}
