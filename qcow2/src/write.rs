//! Changing an image: its tables, the order in which they reach the file, and plain writes.
//!
//! ```text
//!  create() ─► Writer (no header yet) ─ reserve, commit, write ─► finish(): tables, then the header
//!  Writer::open() ─► Writer ─ reserve, commit, write ─► flush(): counts, data │ L2 │ L1 │ freed counts
//! ```
//!
//! A fresh file is no image before [`Writer::finish`] wrote its first cluster, so the tables may be written in any
//! order. In an image that existed before, each bar of the second line is a flush: a crash at any point leaves, at
//! worst, clusters that nobody uses.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::ops::Range;

use instar_blockio::{
    self as blockio, BlockAlloc, BlockMap, BlockRead, BlockWrite, Codec, CompressedRun, Error, ErrorKind, Extent,
    ExtentKind, FileId, Limits, SectorCipher, ZeroMode, check_range, zeroed,
};

use instar_codec::Decoder;

use crate::addr::{GuestOffset, HostOffset};
use crate::allocator::{Allocator, Span, State};
use crate::bitmap_store::NewBitmaps;
use crate::cache::TableCache;
use crate::crypt::ContentsCipher;
use crate::error::{Corruption, Error as ImageError};
use crate::extension::Extensions;
use crate::format::{HEADER_LEN, MAX_L1_BYTES, RawHeader};
use crate::header::{Autoclear, CompressionType, EncryptionMethod, Header, Incompatible};
use crate::l1::L1Entry;
use crate::l2::{L2Entry, L2Format, SubclusterState, Subclusters};
use crate::record::Record;
use crate::reserve::Reserved;
use crate::store::Store;

/// Memory for L2 tables, bytes: 64 GiB of disk with clusters of 64 KiB.
pub(crate) const L2_CACHE_LEN: usize = 8 << 20;
/// Runs of freed clusters that wait for a flush at most.
const MAX_WAITING: usize = 1024;
/// What a device writes as a whole, bytes; the smallest cluster has as many.
const SECTOR: usize = 512;
/// Header fields that change alone: the disk's size, the L1 table's entries and place, the autoclear bits.
pub(crate) const SIZE_FIELD: u64 = core::mem::offset_of!(RawHeader, size) as u64;
const L1_FIELDS: u64 = core::mem::offset_of!(RawHeader, l1_size) as u64;
pub(crate) const AUTOCLEAR_FIELD: u64 = core::mem::offset_of!(RawHeader, autoclear_features) as u64;

/// An image that is written: a fresh one from [`create`](crate::create), or an existing one from
/// [`open`](Self::open).
#[derive(Debug)]
pub struct Writer<D> {
    pub(crate) main: Store<D>,
    pub(crate) data: Option<Store<D>>,
    pub(crate) header: Header,
    pub(crate) extensions: Extensions,
    /// Name of the backing file; written with the header of a fresh image.
    pub(crate) backing_name: Vec<u8>,
    pub(crate) format: L2Format,
    pub(crate) state: State,
    pub(crate) alloc: Allocator,
    pub(crate) reserved: Reserved,
    pub(crate) new_bitmaps: NewBitmaps,
    pub(crate) record: Option<Record>,
    pub(crate) cipher: Option<ContentsCipher>,
    pub(crate) l1: Vec<u64>,
    l1_dirty: Option<Range<usize>>,
    pub(crate) l2: TableCache,
    /// The last table that was looked at without being in the cache.
    pub(crate) side: RefCell<Option<(u64, Vec<u8>)>>,
    /// An existing image has been changed.
    pub(crate) changed: bool,
    /// A write of tables failed: what the file holds is not known any more.
    pub(crate) failed: bool,
}

pub(crate) fn corrupt(offset: u64, cause: Corruption) -> Error {
    ImageError::Corrupt { offset, cause }.into()
}

impl<D: BlockWrite> Writer<D> {
    /// Opens an existing image for writing. `data` is its external data file, if it has one.
    ///
    /// Bitmaps that the image has become invalid with the first change. [`finish`](Self::finish) makes them valid again: those that are
    /// enabled then tell of what was written, too.
    ///
    /// # Errors
    /// A header that can't be read; an image that is marked corrupt or not cleanly closed, or that is encrypted; a
    /// missing data file; tables that lie outside the file.
    pub fn open(file: D, id: FileId, data: Option<(D, FileId)>) -> Result<Self, ImageError> {
        Self::open_encrypted(file, id, data, None)
    }

    /// The same for an image that may be encrypted, with the cipher of its contents as [`Image::set_cipher`](crate::Image::set_cipher)
    /// takes it.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`ImageError::EncryptedWrite`] for an encrypted image without its cipher.
    pub fn open_encrypted(
        file: D,
        id: FileId,
        data: Option<(D, FileId)>,
        cipher: Option<Arc<dyn SectorCipher>>,
    ) -> Result<Self, ImageError> {
        let main = Store::existing(file, id);
        let mut head = zeroed(HEADER_LEN)?;
        main.read(0, &mut head)?;
        let header = Header::parse(&head)?;
        for (bit, refusal) in
            [(Incompatible::CORRUPT, ImageError::MarkedCorrupt), (Incompatible::DIRTY, ImageError::MarkedDirty)]
        {
            if header.incompatible.contains(bit) {
                return Err(refusal);
            }
        }
        let cipher = match (header.encryption, cipher) {
            (EncryptionMethod::None, _) => None,
            (method, Some(cipher)) => Some(ContentsCipher::new(cipher, method)),
            (_, None) => return Err(ImageError::EncryptedWrite),
        };
        let mut cluster = zeroed(header.geometry.cluster_size() as usize)?;
        main.read(0, &mut cluster)?;
        let backing_name = header.backing_name()?.and_then(|range| cluster.get(range)).unwrap_or_default().to_vec();
        let area = cluster.get(header.extension_area()).unwrap_or_default();
        let extensions = Extensions::parse(&header, area)?;
        let data = match (header.incompatible.contains(Incompatible::DATA_FILE), data) {
            (true, None) => return Err(ImageError::DataFileMissing),
            (true, Some((file, id))) => Some(Store::existing(file, id)),
            (false, _) => None,
        };
        let alloc = Allocator::existing(
            header.geometry,
            &main,
            header.refcount_table_offset.0,
            header.refcount_table_clusters,
        )?;
        let l1 = read_l1(&main, &header)?;
        Ok(Self { backing_name, l1, cipher, ..Self::new(main, data, header, extensions, State::Live, alloc) })
    }

    /// A writer with an empty L1 table.
    pub(crate) fn new(
        main: Store<D>,
        data: Option<Store<D>>,
        header: Header,
        extensions: Extensions,
        state: State,
        alloc: Allocator,
    ) -> Self {
        Self {
            main,
            data,
            format: L2Format::new(&header),
            l2: TableCache::new(header.geometry.cluster_size() as usize, L2_CACHE_LEN),
            header,
            extensions,
            backing_name: Vec::new(),
            state,
            alloc,
            reserved: Reserved::default(),
            new_bitmaps: NewBitmaps::default(),
            record: None,
            cipher: None,
            l1: Vec::new(),
            l1_dirty: None,
            side: RefCell::new(None),
            changed: false,
            failed: false,
        }
    }

    /// The header as it stands.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The header extensions as they stand.
    pub fn extensions(&self) -> &Extensions {
        &self.extensions
    }

    pub(crate) fn has_backing(&self) -> bool {
        self.header.backing_offset != 0 || !self.backing_name.is_empty()
    }

    /// The file that holds guest clusters.
    pub(crate) fn clusters_file(&mut self) -> &mut Store<D> {
        self.data.as_mut().unwrap_or(&mut self.main)
    }

    /// To be called before anything changes.
    pub(crate) fn begin(&mut self) -> blockio::Result<()> {
        if self.failed {
            return Err(ErrorKind::Io.into());
        }
        if self.state == State::Live && !self.changed {
            let kept = self.header.autoclear & Autoclear::DATA_FILE_RAW;
            if self.header.version >= 3 && kept != self.header.autoclear {
                self.start_record();
                self.main.write(AUTOCLEAR_FIELD, &kept.bits().to_be_bytes())?;
                self.main.flush()?;
                self.header.autoclear = kept;
                self.extensions.bitmaps = None;
            }
            self.changed = true;
        }
        Ok(())
    }

    /// To be called before metadata changes that leave the contents of the disk alone, so that bitmaps stay valid. Autoclear bits
    /// without a meaning here go.
    pub(crate) fn begin_metadata(&mut self) -> blockio::Result<()> {
        if self.failed {
            return Err(ErrorKind::Io.into());
        }
        let kept = self.header.autoclear & Autoclear::all();
        if self.header.version >= 3 && kept != self.header.autoclear {
            self.main.write(AUTOCLEAR_FIELD, &kept.bits().to_be_bytes())?;
            self.main.flush()?;
            self.header.autoclear = kept;
        }
        Ok(())
    }

    // --- Tables

    pub(crate) fn with_table<R>(&self, at: u64, look: impl FnOnce(&[u8]) -> R) -> blockio::Result<R> {
        if let Some(table) = self.l2.peek(at) {
            return Ok(look(table));
        }
        let mut side = self.side.borrow_mut();
        match &*side {
            Some((place, table)) if *place == at => Ok(look(table)),
            _ => {
                let mut table = zeroed(self.header.geometry.cluster_size() as usize)?;
                self.main.read(at, &mut table)?;
                let answer = look(&table);
                *side = Some((at, table));
                Ok(answer)
            }
        }
    }

    /// The L1 entry for a disk offset.
    fn l1_entry(&self, guest: u64) -> blockio::Result<L1Entry> {
        let index = self.header.geometry.l1_index(GuestOffset(guest));
        let entry = usize::try_from(index).ok().and_then(|index| self.l1.get(index));
        let entry = L1Entry::decode(*entry.ok_or(Error::new(ErrorKind::OutOfBounds).at(guest))?);
        match entry.table {
            Some(at) if !self.header.geometry.is_aligned(at.0) => {
                Err(corrupt(guest, Corruption::L2Unaligned { table: at, l1_index: index }))
            }
            _ => Ok(entry),
        }
    }

    /// The place of the L2 table for a disk offset, if there is one.
    pub(crate) fn table(&self, guest: u64) -> blockio::Result<Option<u64>> {
        Ok(self.l1_entry(guest)?.table.map(|at| at.0))
    }

    /// The entry of the cluster at `guest`, in the table at `table`.
    pub(crate) fn entry_in(&self, table: u64, guest: u64) -> blockio::Result<L2Entry> {
        let geometry = self.header.geometry;
        let len = geometry.l2_entry_size() as usize;
        let start = geometry.l2_index(GuestOffset(guest)) as usize * len;
        let (word, bitmap) = self.with_table(table, |bytes| {
            let word = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_be_bytes(*word));
            (word(start), if len == 16 { word(start + 8) } else { 0 })
        })?;
        self.format.decode(GuestOffset(guest), word, bitmap).map_err(|fault| {
            let index = geometry.l2_index(GuestOffset(guest));
            corrupt(guest, Corruption::Entry { fault, table: HostOffset(table), index })
        })
    }

    /// The entry of the cluster at `guest`.
    pub(crate) fn entry(&self, guest: u64) -> blockio::Result<L2Entry> {
        match self.table(guest)? {
            Some(table) => self.entry_in(table, guest),
            None => Ok(L2Entry::UNALLOCATED),
        }
    }

    /// Changes the entry of the cluster at `guest`, in the table at `table`, which is one of our own.
    pub(crate) fn set_entry(&mut self, table: u64, guest: u64, entry: L2Entry) -> blockio::Result<()> {
        let geometry = self.header.geometry;
        let (word, bitmap) = self.format.encode(entry).ok_or(Error::new(ErrorKind::NoSpace).at(guest))?;
        let len = geometry.l2_entry_size() as usize;
        let start = geometry.l2_index(GuestOffset(guest)) as usize * len;
        self.make_room(table)?;
        let slot = self.l2.load(&self.main, table)?.change(start..start + len);
        slot[..8].copy_from_slice(&word.to_be_bytes());
        if len == 16 {
            slot[8..].copy_from_slice(&bitmap.to_be_bytes());
        }
        self.forget_side(table);
        Ok(())
    }

    pub(crate) fn forget_side(&mut self, at: u64) {
        self.side.get_mut().take_if(|(place, _)| *place == at);
    }

    /// Makes room in the cache for the table at `at`.
    pub(crate) fn make_room(&mut self, at: u64) -> blockio::Result<()> {
        if self.l2.is_full() && !self.l2.contains(at) {
            self.sync()?;
            self.l2.trim();
        }
        Ok(())
    }

    /// The place of an L2 table for `guest` that belongs to the active state alone: makes it, or copies the one that
    /// snapshots share.
    pub(crate) fn own_table(&mut self, guest: u64) -> blockio::Result<u64> {
        let entry = self.l1_entry(guest)?;
        match entry.table {
            Some(at) if entry.copied => Ok(at.0),
            shared => {
                let cluster_size = self.header.geometry.cluster_size();
                let at = self.take_clusters(1)? * cluster_size;
                self.make_room(at)?;
                let table = self.l2.create(at)?;
                if let Some(shared) = shared {
                    let len = table.bytes().len();
                    self.main.read(shared.0, table.change(0..len))?;
                }
                self.forget_side(at);
                self.main.extend(at + cluster_size);
                let entry = L1Entry { table: Some(HostOffset(at)), copied: true };
                self.set_l1(self.header.geometry.l1_index(GuestOffset(guest)) as usize, entry.encode());
                if let Some(shared) = shared {
                    self.l2.forget(shared.0);
                    self.forget_side(shared.0);
                    self.alloc.free(&mut self.main, self.alloc.touched(shared.0, cluster_size))?;
                }
                Ok(at)
            }
        }
    }

    pub(crate) fn set_l1(&mut self, index: usize, entry: u64) {
        self.l1[index] = entry;
        self.l1_dirty = Some(match &self.l1_dirty {
            Some(old) => old.start.min(index)..old.end.max(index + 1),
            None => index..index + 1,
        });
    }

    /// Takes clusters for data or tables.
    pub(crate) fn take_clusters(&mut self, count: u64) -> blockio::Result<u64> {
        let first = self.alloc.allocate(&mut self.main, count)?;
        self.main.check_room((first + count) << self.header.geometry.cluster_bits())?;
        self.check_place(Span { first, count })?;
        Ok(first)
    }

    /// Refuses a place that is known to hold metadata: the counts or an entry of the image are wrong.
    pub(crate) fn check_place(&self, place: Span) -> blockio::Result<()> {
        if self.state == State::Fresh {
            return Ok(());
        }
        let header = &self.header;
        let bits = header.geometry.cluster_bits();
        let one = |at: u64| Span { first: at >> bits, count: 1 };
        let table = |at: u64, len: u64| Span { first: at >> bits, count: header.geometry.clusters(len) };
        let hit = place.overlaps(one(0))
            || place.overlaps(table(header.l1_offset.0, self.l1.len() as u64 * 8))
            || place.overlaps(table(header.snapshots_offset.0, u64::from(header.snapshot_count)))
            || place.overlaps(Span {
                first: self.alloc.table_offset() >> bits,
                count: u64::from(self.alloc.table_clusters()),
            })
            || self.alloc.block_offsets().any(|at| place.overlaps(one(at)))
            || self.l1.iter().filter_map(|&entry| L1Entry::decode(entry).table).any(|at| place.overlaps(one(at.0)));
        if hit { Err(Error::new(ErrorKind::Corrupt).at(place.first << bits)) } else { Ok(()) }
    }

    /// Frees what an entry that was replaced referred to.
    pub(crate) fn free_entry(&mut self, entry: L2Entry) -> blockio::Result<()> {
        let span = match entry {
            L2Entry::Compressed { host, len } => self.alloc.touched(host.0, len),
            L2Entry::Cluster { host: Some(host), .. } if self.data.is_none() => self.alloc.touched(host.0, 1),
            L2Entry::Cluster { host: Some(host), .. } => {
                return self.alloc.note_used(self.alloc.touched(host.0, 1));
            }
            L2Entry::Cluster { host: None, .. } => return Ok(()),
        };
        self.alloc.free(&mut self.main, span)
    }

    /// Gives the L1 table `entries` entries, in a new place.
    pub(crate) fn grow_l1(&mut self, entries: u64) -> blockio::Result<()> {
        if entries <= self.l1.len() as u64 {
            return Ok(());
        }
        if entries > MAX_L1_BYTES / 8 {
            return Err(ErrorKind::OutOfBounds.into());
        }
        let geometry = self.header.geometry;
        let old = Span {
            first: self.header.l1_offset.0 >> geometry.cluster_bits(),
            count: geometry.clusters(self.l1.len() as u64 * 8),
        };
        let at = self.take_clusters(geometry.clusters(entries * 8))? * geometry.cluster_size();
        let more = entries as usize - self.l1.len();
        self.l1.try_reserve_exact(more).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        if self.state == State::Live {
            self.sync()?; // the old table's entries and all counts are in the file now
        }
        self.l1.resize(entries as usize, 0);
        self.header.l1_offset = HostOffset(at);
        self.header.l1_entries = entries as u32;
        self.main.extend(at + entries * 8);
        if self.state == State::Live {
            self.write_l1(0..entries as usize)?;
            self.main.flush()?;
            let mut fields = [0; 12];
            fields[..4].copy_from_slice(&self.header.l1_entries.to_be_bytes());
            fields[4..].copy_from_slice(&at.to_be_bytes());
            self.main.write(L1_FIELDS, &fields)?;
            self.main.flush()?;
        }
        self.alloc.free(&mut self.main, old)
    }

    pub(crate) fn write_l1(&mut self, entries: Range<usize>) -> blockio::Result<()> {
        self.main.write_words(self.header.l1_offset.0 + entries.start as u64 * 8, &self.l1[entries])
    }

    // --- Order of writes

    /// Writes the tables that changed; in an existing image so that it is valid at every moment.
    pub(crate) fn sync(&mut self) -> blockio::Result<()> {
        if self.failed {
            return Err(ErrorKind::Io.into());
        }
        let done = match self.state {
            State::Live if !self.alloc.is_forked() => self.sync_in_order(),
            _ => self.l2.write_dirty(&mut self.main),
        };
        self.failed = done.is_err();
        done
    }

    fn sync_in_order(&mut self) -> blockio::Result<()> {
        self.alloc.write_blocks(&mut self.main)?;
        if self.l2.is_dirty() || self.l1_dirty.is_some() {
            self.barrier()?;
            self.l2.write_dirty(&mut self.main)?;
            if let Some(entries) = self.l1_dirty.take() {
                self.main.flush()?;
                self.write_l1(entries)?;
            }
        }
        if self.alloc.waiting() > 0 {
            self.main.flush()?;
            self.alloc.release(&mut self.main)?;
            self.alloc.write_blocks(&mut self.main)?;
        }
        Ok(())
    }

    pub(crate) fn barrier(&mut self) -> blockio::Result<()> {
        if let Some(data) = &mut self.data {
            data.flush()?;
        }
        self.main.flush()
    }

    /// Keeps the list of freed clusters short.
    pub(crate) fn settle_freed(&mut self) -> blockio::Result<()> {
        if self.alloc.waiting() > MAX_WAITING { self.sync() } else { Ok(()) }
    }

    /// Lets the file end on a 512-byte boundary, as the target of a compressing `qemu-img convert` does. Such a
    /// conversion calls this after its last cluster.
    pub fn align_end(&mut self) {
        let end = self.main.end().next_multiple_of(512);
        self.main.extend(end);
    }

    /// Completes the image: writes all tables and, in a fresh file, at last the header.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] while reservations are open; what the file reports. A fresh file is no image then.
    pub fn finish(mut self) -> Result<(), ImageError> {
        if !self.reserved.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput).into());
        }
        if self.state == State::Live {
            self.finish_record()?;
            return Ok(self.flush()?);
        }
        self.store_bitmap_directory()?;
        self.sync()?;
        self.alloc.write_blocks(&mut self.main)?;
        self.alloc.write_table(&mut self.main)?;
        if !self.l1.is_empty() {
            self.write_l1(0..self.l1.len())?;
        }
        self.main.settle()?;
        if let Some(data) = &mut self.data {
            data.settle()?;
        }
        // A crash may tear a write between sectors, so all but the first one is there before it.
        let first = self.first_cluster()?;
        let (head, rest) = first.split_at(SECTOR);
        if !rest.is_empty() {
            self.main.write(SECTOR as u64, rest)?;
        }
        self.barrier()?;
        self.main.write(0, head)?;
        Ok(self.main.flush()?)
    }

    /// Header, extensions and backing file name, as they fill the first cluster of a fresh image.
    pub(crate) fn first_cluster(&mut self) -> Result<Vec<u8>, ImageError> {
        let size = self.header.geometry.cluster_size() as usize;
        let extensions = self.extensions.emit();
        let name_at = self.header.header_len as usize + extensions.len();
        let end = name_at + self.backing_name.len();
        if end > size {
            return Err(ImageError::HeaderTooLong(end as u32));
        }
        if !self.backing_name.is_empty() {
            self.header.backing_offset = name_at as u64;
            self.header.backing_len = self.backing_name.len() as u32;
        }
        self.header.refcount_table_offset = HostOffset(self.alloc.table_offset());
        self.header.refcount_table_clusters = self.alloc.table_clusters();
        let mut cluster = zeroed(size)?;
        let head = self.header.emit();
        cluster[..head.len()].copy_from_slice(&head);
        cluster[name_at - extensions.len()..name_at].copy_from_slice(&extensions);
        cluster[name_at..end].copy_from_slice(&self.backing_name);
        Ok(cluster)
    }

    // --- Contents

    /// The whole cluster that an entry of the old state describes, decompressed.
    pub(crate) fn decompressed(&self, guest: u64, host: u64, len: u64) -> blockio::Result<Vec<u8>> {
        let mut stored = zeroed(len as usize)?;
        self.main.read(host, &mut stored)?;
        let mut cluster = zeroed(self.header.geometry.cluster_size() as usize)?;
        Decoder::new()
            .decode(self.codec(), &stored, &mut cluster)
            .map_err(|_| corrupt(guest, Corruption::Compressed(HostOffset(host))))?;
        Ok(cluster)
    }

    fn codec(&self) -> Codec {
        match self.header.compression {
            CompressionType::Zlib => Codec::Deflate,
            CompressionType::Zstd => Codec::Zstd,
        }
    }

    /// What lies at `offset`, no further than its cluster.
    fn extent_in_cluster(&self, offset: u64, entry: L2Entry) -> Extent {
        let geometry = self.header.geometry;
        let start = geometry.cluster_start(offset);
        let file = self.data.as_ref().unwrap_or(&self.main).id;
        let (len, kind) = match entry {
            L2Entry::Compressed { host, len } => {
                let run = CompressedRun {
                    file: self.main.id,
                    host: host.0,
                    stored_len: len as u32,
                    unit_offset: start,
                    unit_len: geometry.cluster_size() as u32,
                    codec: self.codec(),
                };
                (geometry.cluster_size() - (offset - start), ExtentKind::Compressed(run))
            }
            L2Entry::Cluster { host, subclusters, .. } => {
                let index = geometry.subcluster_index(GuestOffset(offset));
                let end = index + subclusters.run(index, geometry.subclusters());
                let place = host.map(|host| host.0 + (offset - start));
                let kind = match (subclusters.state(index), place) {
                    (SubclusterState::Allocated, Some(host)) => self.data_kind(file, offset, host),
                    (SubclusterState::Zero, place) => ExtentKind::Zero { host: place.map(|host| (file, host)) },
                    (SubclusterState::Unallocated, _) | (SubclusterState::Allocated, None) => ExtentKind::Unallocated,
                };
                (start + u64::from(end) * geometry.subcluster_size() - offset, kind)
            }
        };
        Extent { offset, len, depth: 0, kind }
    }
}

fn read_l1<D: BlockWrite>(main: &Store<D>, header: &Header) -> blockio::Result<Vec<u64>> {
    let len = u64::from(header.l1_entries) * 8;
    let at = header.l1_offset.0;
    if header.l1_entries != 0 && at.saturating_add(len) > main.end() {
        return Err(Error::new(ErrorKind::Corrupt).at(at));
    }
    let mut bytes = zeroed(len as usize)?;
    main.read(at, &mut bytes)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

impl<D: BlockWrite> BlockRead for Writer<D> {
    fn size(&self) -> u64 {
        self.header.virtual_size
    }

    /// Reads this image alone: what it leaves to a backing image reads as zero.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> blockio::Result<()> {
        check_range(self.size(), offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let extent = self.extent_at(offset + done as u64, (buf.len() - done) as u64)?;
            let part = &mut buf[done..done + extent.len as usize];
            match extent.kind {
                ExtentKind::Data { host, .. } | ExtentKind::Encrypted { host, .. } => {
                    self.read_contents(extent.offset, host, part)?;
                }
                ExtentKind::Compressed(run) => {
                    let cluster = self.decompressed(run.unit_offset, run.host, run.stored_len.into())?;
                    let skip = (extent.offset - run.unit_offset) as usize;
                    part.copy_from_slice(&cluster[skip..skip + part.len()]);
                }
                _ => part.fill(0),
            }
            done += extent.len as usize;
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits { preferred_align: self.alloc_unit() as u32, ..Limits::BYTE }
    }
}

impl<D: BlockWrite> BlockMap for Writer<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> blockio::Result<Extent> {
        if max_len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        check_range(self.size(), offset, 1)?;
        let geometry = self.header.geometry;
        let limit = max_len.min(self.size() - offset);
        let span_end = offset - offset % geometry.l2_span() + geometry.l2_span();
        let Some(table) = self.table(offset)? else {
            let len = limit.min(span_end - offset);
            return Ok(Extent { offset, len, depth: 0, kind: ExtentKind::Unallocated });
        };
        let mut extent = self.extent_in_cluster(offset, self.entry_in(table, offset)?);
        while extent.len < limit && extent.end() < span_end {
            // A fault further on is not one of this run.
            let Ok(entry) = self.entry_in(table, extent.end()) else { break };
            if !extent.join(&self.extent_in_cluster(extent.end(), entry)) {
                break;
            }
        }
        extent.len = extent.len.min(limit);
        Ok(extent)
    }
}

impl<D: BlockWrite> BlockWrite for Writer<D> {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> blockio::Result<()> {
        check_range(self.size(), offset, buf.len() as u64)?;
        if let Some((start, whole)) = self.around(offset, buf)? {
            return self.write_at(start, &whole);
        }
        let mut done = 0;
        while done < buf.len() {
            let place = self.reserve(offset + done as u64, (buf.len() - done) as u64)?;
            let part = &buf[done..done + place.len as usize];
            if let Err(error) = self.write_contents(place.offset, place.host, part) {
                self.abort(place)?;
                return Err(error);
            }
            self.commit(place)?;
            done += part.len();
        }
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> blockio::Result<()> {
        self.check_unreserved(offset, len)?;
        self.begin()?;
        self.note_written(offset, len);
        self.zero(offset, len, mode)?;
        self.settle_freed()
    }

    /// Whole clusters only; what is less stays as it is.
    fn discard(&mut self, offset: u64, len: u64) -> blockio::Result<()> {
        self.check_unreserved(offset, len)?;
        self.begin()?;
        self.note_written(offset, len);
        self.discard_clusters(offset, len)?;
        self.settle_freed()
    }

    /// Makes the disk longer. A size between sectors (512 bytes) is rounded up.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a shorter disk; [`ErrorKind::OutOfBounds`] where the L1 table would exceed QEMU's limit.
    fn set_size(&mut self, size: u64) -> blockio::Result<()> {
        self.set_size_rounded(size)
    }

    /// A fresh image becomes valid by [`finish`](Writer::finish) only.
    fn flush(&mut self) -> blockio::Result<()> {
        self.sync()?;
        if self.state == State::Live {
            self.main.settle()?;
            if let Some(data) = &mut self.data {
                data.settle()?;
            }
        }
        self.barrier()
    }
}

/// The entry of a whole cluster that reads as zero and takes no place.
pub(crate) fn zero_entry(format: L2Format) -> L2Entry {
    if format.zero_clusters { L2Entry::zero(format.geometry, None) } else { L2Entry::UNALLOCATED }
}

/// Whether an entry says nothing at all.
pub(crate) fn is_unallocated(entry: L2Entry) -> bool {
    matches!(entry, L2Entry::Cluster { host: None, subclusters: Subclusters { allocated: 0, zero: 0 }, .. })
}
