//! Internal snapshots: spec chapter "Snapshots".

use alloc::vec::Vec;

use instar_blockio::{BlockRead, ErrorKind};
use zerocopy::{FromBytes, IntoBytes};

use crate::addr::HostOffset;
use crate::error::{Error, Result, Table};
use crate::extension::c_string;
use crate::format::{MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, RawSnapshot};
use crate::header::{Header, check_table};
use crate::open::{Image, L1Place};
use crate::pages::Pages;

/// Extra data with a meaning here: machine state size, virtual size, instruction count.
const KNOWN_EXTRA: usize = 24;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id, unique in the image; QEMU uses decimal numbers.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// Where its L1 table lies; not checked.
    pub l1_offset: HostOffset,
    /// Entries of that; not checked.
    pub l1_entries: u32,
    /// When it was taken: seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// Clock of the machine, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of machine state saved with it.
    pub vm_state_size: u64,
    /// Size of the disk at the time, bytes.
    pub virtual_size: u64,
    /// Instruction count of the machine, where recorded.
    pub icount: Option<u64>,
}

/// Names a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotSelector<'a> {
    /// The first whose id is this, or else the first whose name is.
    IdOrName(&'a [u8]),
    /// The first that has this id and this name, as far as given.
    Exact {
        /// Id.
        id: Option<&'a [u8]>,
        /// Name.
        name: Option<&'a [u8]>,
    },
}

/// An entry of the snapshot table, its strings not yet read.
struct Entry {
    raw: RawSnapshot,
    extra: [u8; KNOWN_EXTRA],
    id_at: u64,
    name_at: u64,
}

/// Steps through the snapshot table.
struct Entries<'a, D> {
    pages: &'a Pages<D>,
    start: u64,
    at: u64,
    index: u32,
    count: u32,
}

impl<'a, D: BlockRead> Entries<'a, D> {
    fn new(pages: &'a Pages<D>, header: &Header) -> Self {
        let start = header.snapshots_offset.0;
        Self { pages, start, at: start, index: 0, count: header.snapshot_count }
    }

    /// Reads the entry at `self.at` and moves behind it. The header was checked to keep the table's start below 2^63,
    /// and each entry adds less than 2^18 bytes before the table's length is checked, so the sums stay in range.
    fn read(&mut self) -> Result<Entry> {
        const HEAD: u64 = size_of::<RawSnapshot>() as u64;
        let at = self.at.next_multiple_of(8);
        let mut head = [0; HEAD as usize];
        self.pages.read(at, &mut head)?;
        let raw = RawSnapshot::read_from_bytes(&head).map_err(|_| Error::SnapshotExtraData(self.index))?;
        let extra_len = raw.extra_data_size.get();
        if extra_len > MAX_SNAPSHOT_EXTRA {
            return Err(Error::SnapshotExtraData(self.index));
        }
        let mut extra = [0; KNOWN_EXTRA];
        let known = KNOWN_EXTRA.min(extra_len as usize);
        self.pages.read(at + HEAD, &mut extra[..known])?;
        let id_at = at + HEAD + u64::from(extra_len);
        let name_at = id_at + u64::from(raw.id_str_size.get());
        self.at = name_at + u64::from(raw.name_size.get());
        if self.at - self.start > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::SnapshotTableTooBig(self.count - self.index));
        }
        Ok(Entry { raw, extra, id_at, name_at })
    }
}

impl<D: BlockRead> Iterator for Entries<'_, D> {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.index >= self.count {
            return None;
        }
        let entry = self.read();
        self.index = if entry.is_ok() { self.index + 1 } else { self.count };
        Some(entry)
    }
}

impl Entry {
    /// Word `index` of the extra data, if the entry has it.
    fn extra(&self, index: usize) -> Option<u64> {
        let end = (index + 1) * 8;
        if (self.raw.extra_data_size.get() as usize) < end {
            return None;
        }
        let word = self.extra.get(end - 8..end)?.first_chunk::<8>()?;
        Some(u64::from_be_bytes(*word))
    }

    fn load<D: BlockRead>(&self, pages: &Pages<D>, header: &Header) -> Result<Snapshot> {
        let string = |at: u64, len: u16| -> Result<Vec<u8>> {
            let mut bytes = pages.read_vec(at, len.into())?;
            bytes.truncate(c_string(&bytes).len());
            Ok(bytes)
        };
        Ok(Snapshot {
            id: string(self.id_at, self.raw.id_str_size.get())?,
            name: string(self.name_at, self.raw.name_size.get())?,
            l1_offset: HostOffset(self.raw.l1_table_offset.get()),
            l1_entries: self.raw.l1_size.get(),
            date_sec: self.raw.date_sec.get(),
            date_nsec: self.raw.date_nsec.get(),
            vm_clock_nsec: self.raw.vm_clock_nsec.get(),
            vm_state_size: self.extra(0).unwrap_or(self.raw.vm_state_size.get().into()),
            virtual_size: self.extra(1).unwrap_or(header.virtual_size),
            // All ones say that none was recorded.
            icount: self.extra(2).filter(|&count| count != u64::MAX),
        })
    }
}

/// A snapshot with what a table that is written anew must keep of it.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) snapshot: Snapshot,
    /// Bytes of extra data that its entry has.
    pub(crate) extra_len: u32,
    /// Those without a meaning here.
    pub(crate) unknown: Vec<u8>,
}

/// The whole table and its length in bytes.
pub(crate) fn load<D: BlockRead>(pages: &Pages<D>, header: &Header) -> Result<(Vec<Stored>, u64)> {
    let mut all = Vec::new();
    let mut entries = Entries::new(pages, header);
    for entry in entries.by_ref() {
        let entry = entry?;
        let extra_len = entry.raw.extra_data_size.get();
        let unknown_len = (extra_len as usize).saturating_sub(KNOWN_EXTRA);
        let unknown = pages.read_vec(entry.id_at - unknown_len as u64, unknown_len)?;
        all.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        all.push(Stored { snapshot: entry.load(pages, header)?, extra_len, unknown });
    }
    Ok((all, entries.at - entries.start))
}

/// The table as bytes, every entry with the extra data of version 3.
pub(crate) fn emit(all: &[Stored]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for Stored { snapshot, unknown, .. } in all {
        let (Ok(id_len), Ok(name_len)) = (u16::try_from(snapshot.id.len()), u16::try_from(snapshot.name.len())) else {
            return Err(Error::Io(ErrorKind::InvalidInput.into()));
        };
        let raw = RawSnapshot {
            l1_table_offset: snapshot.l1_offset.0.into(),
            l1_size: snapshot.l1_entries.into(),
            id_str_size: id_len.into(),
            name_size: name_len.into(),
            date_sec: snapshot.date_sec.into(),
            date_nsec: snapshot.date_nsec.into(),
            vm_clock_nsec: snapshot.vm_clock_nsec.into(),
            vm_state_size: u32::try_from(snapshot.vm_state_size).unwrap_or(0).into(),
            extra_data_size: ((KNOWN_EXTRA + unknown.len()) as u32).into(),
        };
        let extra = [snapshot.vm_state_size, snapshot.virtual_size, snapshot.icount.unwrap_or(u64::MAX)];
        let len = size_of::<RawSnapshot>() + KNOWN_EXTRA + unknown.len() + snapshot.id.len() + snapshot.name.len();
        out.try_reserve(len + 8).map_err(|_| Error::OutOfMemory)?;
        out.resize(out.len().next_multiple_of(8), 0);
        out.extend_from_slice(raw.as_bytes());
        extra.iter().for_each(|word| out.extend_from_slice(&word.to_be_bytes()));
        out.extend_from_slice(unknown);
        out.extend_from_slice(&snapshot.id);
        out.extend_from_slice(&snapshot.name);
    }
    if out.len() as u64 > MAX_SNAPSHOT_TABLE_BYTES { Err(Error::SnapshotTableTooBig(0)) } else { Ok(out) }
}

/// The place of the snapshot that a selector names.
pub(crate) fn find(all: &[Stored], selector: SnapshotSelector<'_>) -> Option<usize> {
    match selector {
        SnapshotSelector::IdOrName(text) => all
            .iter()
            .position(|stored| stored.snapshot.id == text)
            .or_else(|| all.iter().position(|stored| stored.snapshot.name == text)),
        SnapshotSelector::Exact { id, name } => all.iter().position(|Stored { snapshot, .. }| {
            id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name)
        }),
    }
}

/// Walks the table once, for its faults.
pub(crate) fn check<D: BlockRead>(pages: &Pages<D>, header: &Header) -> Result<()> {
    Entries::new(pages, header).try_for_each(|entry| entry.map(drop))
}

impl<D: BlockRead> Image<D> {
    /// The internal snapshots, in the order of their table: at most 65536, and 64 MiB in all.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::OutOfMemory`].
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let mut all = Vec::new();
        for entry in Entries::new(&self.pages, &self.header) {
            all.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
            all.push(entry?.load(&self.pages, &self.header)?);
        }
        Ok(all)
    }

    /// Shows the disk as it was when a snapshot was taken. The virtual size stays that of the image, as with QEMU;
    /// what the snapshot's L1 table does not reach is unallocated.
    ///
    /// # Errors
    /// [`Error::SnapshotNotFound`], or [`Error::TableTooLarge`] and [`Error::TableOffset`] for its L1 table.
    pub fn select_snapshot(&mut self, selector: SnapshotSelector<'_>) -> Result<()> {
        let snapshot = self.find_snapshot(selector)?.ok_or(Error::SnapshotNotFound)?;
        let (offset, entries) = (snapshot.l1_offset, snapshot.l1_entries);
        check_table(self.header.geometry, Table::SnapshotL1, offset, entries, 8, MAX_L1_BYTES)?;
        self.l1 = L1Place { offset, entries: entries.into() };
        self.forget_unit();
        Ok(())
    }

    fn find_snapshot(&self, selector: SnapshotSelector<'_>) -> Result<Option<Snapshot>> {
        let mut named = None;
        for entry in Entries::new(&self.pages, &self.header) {
            let snapshot = entry?.load(&self.pages, &self.header)?;
            match selector {
                SnapshotSelector::IdOrName(text) if snapshot.id == text => return Ok(Some(snapshot)),
                SnapshotSelector::IdOrName(text) if named.is_none() && snapshot.name == text => named = Some(snapshot),
                SnapshotSelector::Exact { id, name }
                    if id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name) =>
                {
                    return Ok(Some(snapshot));
                }
                _ => {}
            }
        }
        Ok(named)
    }
}

#[cfg(test)]
mod tests {
    use instar_blockio::{FileId, MemBlock};

    use super::*;
    use crate::open::OpenOptions;

    /// An entry with this extra data, id and name.
    fn entry(extra: &[u8], id: &[u8], name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![
            0, 0, 0, 0, 0, 0, 2, 0, // l1_table_offset
            0, 0, 0, 1, // l1_size
            0, 0, 0, 0, // id_str_size, name_size
            0, 0, 0, 7, 0, 0, 0, 8, // date_sec, date_nsec
            0, 0, 0, 0, 0, 0, 0, 9, // vm_clock_nsec
            0, 0, 0, 5, // vm_state_size
            0, 0, 0, 0, // extra_data_size
        ];
        bytes[12..14].copy_from_slice(&(id.len() as u16).to_be_bytes());
        bytes[14..16].copy_from_slice(&(name.len() as u16).to_be_bytes());
        bytes[36..40].copy_from_slice(&(extra.len() as u32).to_be_bytes());
        bytes.extend([extra, id, name].concat());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// An image of 512 bytes with these entries.
    fn image(entries: &[Vec<u8>]) -> Result<Image<MemBlock>> {
        let mut file = vec![0; 1024];
        file[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        file[23] = 9; // cluster_bits
        file[30..32].copy_from_slice(&[2, 0]); // size
        file[39] = 1; // l1_size
        file[46] = 2; // l1_table_offset
        file[59] = 1; // refcount_table_clusters
        file[60..64].copy_from_slice(&(entries.len() as u32).to_be_bytes());
        file[70] = 4; // snapshots_offset
        file[99] = 4; // refcount_order
        file[103] = 112; // header_length
        file.extend(entries.concat());
        Image::open(MemBlock::from(file), FileId(0), &OpenOptions::default())
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    #[test]
    fn extra_data_as_far_as_it_goes() {
        let extra = words(&[1 << 40, 1024, 77, 0]);
        let entries: Vec<_> = [0, 8, 12, 16, 24, 32].map(|len| entry(&extra[..len], b"1", b"a")).to_vec();
        let all = image(&entries).unwrap().snapshots().unwrap();
        let seen: Vec<_> = all.iter().map(|s| (s.vm_state_size, s.virtual_size, s.icount)).collect();
        let long = 1 << 40;
        let expected = [
            (5, 512, None),
            (long, 512, None),
            (long, 512, None),
            (long, 1024, None),
            (long, 1024, Some(77)),
            (long, 1024, Some(77)),
        ];
        assert_eq!(seen, expected);
        assert_eq!((all[0].date_sec, all[0].date_nsec, all[0].vm_clock_nsec), (7, 8, 9));
        let none = image(&[entry(&words(&[0, 0, u64::MAX]), b"1", b"a")]).unwrap().snapshots().unwrap();
        assert_eq!(none[0].icount, None);
    }

    #[test]
    fn too_much_extra_data() {
        let most = entry(&[0; 1024], b"1", b"a");
        assert_eq!(image(std::slice::from_ref(&most)).unwrap().snapshots().unwrap().len(), 1);
        assert_eq!(image(&[most, entry(&[0; 1025], b"2", b"b")]).unwrap_err(), Error::SnapshotExtraData(1));
    }

    #[test]
    fn too_long_a_table() {
        let name = vec![b'n'; 65000];
        let entries = vec![entry(&[0; 24], &name, &name); 600];
        // 130064 bytes each: entry 515 ends behind 64 MiB.
        assert_eq!(image(&entries).unwrap_err(), Error::SnapshotTableTooBig(85));
    }

    #[test]
    fn selectors() {
        let mut image = image(&[entry(&[], b"1", b"2"), entry(&[], b"2", b"b\0x"), entry(&[], b"3", b"b")]).unwrap();
        let found = |selector| image.find_snapshot(selector).unwrap().map(|s| s.id[0] - b'0');
        let exact = |id, name| SnapshotSelector::Exact { id, name };
        assert_eq!(found(SnapshotSelector::IdOrName(b"2")), Some(2)); // the id goes before the name
        assert_eq!(found(SnapshotSelector::IdOrName(b"b")), Some(2)); // the first of that name
        assert_eq!(found(SnapshotSelector::IdOrName(b"4")), None);
        assert_eq!(found(exact(None, Some(b"2"))), Some(1));
        assert_eq!(found(exact(Some(b"3"), Some(b"b"))), Some(3));
        assert_eq!(found(exact(Some(b"1"), Some(b"b"))), None);
        assert_eq!(image.select_snapshot(SnapshotSelector::IdOrName(b"4")), Err(Error::SnapshotNotFound));
    }

    #[test]
    fn the_snapshots_own_table_is_checked() {
        let mut bad = entry(&[], b"1", b"a");
        bad[7] = 1;
        let mut image = image(&[bad]).unwrap();
        let error = image.select_snapshot(SnapshotSelector::IdOrName(b"1")).unwrap_err();
        assert_eq!(error, Error::TableOffset(Table::SnapshotL1, 0x201));
    }
}
