//! Where the bytes of the disk lie: spec chapter "Cluster mapping".

use alloc::vec::Vec;

use instar_blockio::{
    BlockMap, BlockRead, Codec, CompressedRun, ErrorKind, Extent, ExtentKind, FileId, Result as BlockResult,
    check_range,
};

use crate::addr::{GuestOffset, HostOffset};
use crate::error::{Corruption, Error, Result};
use crate::format::{L2_COMPRESSED, L2_OFFSET_MASK, L2_ZERO};
use crate::header::{CompressionType, EncryptionMethod};
use crate::l1::L1Entry;
use crate::l2::{L2Entry, SubclusterState};
use crate::open::Image;

/// How far the L2 tables are read ahead.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ahead {
    /// The L1 entry whose table was read last.
    last: u64,
    /// Pages that were read with it.
    pages: usize,
}

/// What the L1 table says about a place.
enum L1Run {
    /// The L2 table lies here.
    Table(HostOffset),
    /// So many entries in a row have none.
    Empty(u64),
}

/// The big-endian word at `at` of a view that ends where the file does.
fn word(view: &[u8], at: usize) -> u64 {
    match view.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        Some(bytes) => u64::from_be_bytes(*bytes),
        // The file ends inside the word or before it.
        None => {
            let mut bytes = [0; 8];
            let rest = view.get(at..).unwrap_or_default();
            bytes[..rest.len()].copy_from_slice(rest);
            u64::from_be_bytes(bytes)
        }
    }
}

/// How many bytes at the beginning are zero, in whole words.
fn leading_zeroes(bytes: &[u8]) -> usize {
    let (blocks, _) = bytes.as_chunks::<128>();
    let zero = |block: &[u8]| block.as_chunks::<8>().0.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0;
    let blocks = blocks.iter().take_while(|block| zero(*block)).count() * 128;
    let words = bytes[blocks..].as_chunks::<8>().0.iter().take_while(|word| **word == [0; 8]).count();
    blocks + words * 8
}

impl<D: BlockRead> Image<D> {
    /// As [`BlockMap::extent_at`], but with the full cause of an error.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Encrypted`], [`Error::DataFileMissing`] or [`Error::Io`].
    pub fn locate(&self, offset: u64, max_len: u64) -> Result<Extent> {
        if max_len == 0 {
            return Err(instar_blockio::Error::new(ErrorKind::InvalidInput).at(offset).into());
        }
        check_range(self.virtual_size(), offset, 1)?;
        let limit = max_len.min(self.virtual_size() - offset);
        let geometry = self.header.geometry;
        let l1_index = geometry.l1_index(GuestOffset(offset));
        match self.l1_run(offset, l1_index, limit)? {
            L1Run::Empty(count) => {
                let end = l1_index.saturating_add(count).saturating_mul(geometry.l2_span());
                let len = (end - offset).min(limit);
                Ok(Extent { offset, len, depth: 0, kind: ExtentKind::Unallocated })
            }
            L1Run::Table(table) if !geometry.is_aligned(table.0) => {
                Err(Error::Corrupt { offset, cause: Corruption::L2Unaligned { table, l1_index } })
            }
            L1Run::Table(table) => self.l2_run(offset, l1_index, table, limit),
        }
    }

    /// Looks at L1 entries from `index` on: those of one page, and no more than `limit` bytes of the disk need.
    fn l1_run(&self, offset: u64, index: u64, limit: u64) -> Result<L1Run> {
        if index >= self.l1.entries {
            return Ok(L1Run::Empty(u64::MAX));
        }
        let span = self.header.geometry.l2_span();
        let at = self.l1.offset.0 + index * 8; // a table's end was checked
        let wanted = (limit / span).saturating_add(2);
        let count = (self.pages.rest(at) / 8).min(self.l1.entries - index).min(wanted);
        self.check_table_inside(offset, HostOffset(at))?;
        let run = self.pages.view(at, |view| {
            if let Some(table) = L1Entry::decode(word(view, 0)).table {
                return L1Run::Table(table);
            }
            let more = (1..count).take_while(|&k| L1Entry::decode(word(view, k as usize * 8)).table.is_none());
            L1Run::Empty(1 + more.count() as u64)
        })?;
        Ok(run)
    }

    /// Looks at the entries of an L2 table from the cluster of `offset` on: those of one page, as far as they make one
    /// run.
    fn l2_run(&self, offset: u64, l1_index: u64, table: HostOffset, limit: u64) -> Result<Extent> {
        let geometry = self.header.geometry;
        let (index, size) = (geometry.l2_index(GuestOffset(offset)), geometry.l2_entry_size());
        let at = table.0 + index * size; // below 2^57
        let count = (self.pages.rest(at) / size).min(geometry.l2_entries() - index);
        self.check_table_inside(offset, HostOffset(at))?;
        self.read_ahead(l1_index, at, table)?;
        self.pages.view(at, |view| {
            if let Some(run) = self.uniform_run(offset, view, count)? {
                return Ok(Extent { len: run.len.min(limit), ..run });
            }
            let mut run: Option<Extent> = None;
            for k in 0..count {
                let from = run.map_or(offset, |run| run.end());
                if from - offset >= limit {
                    break;
                }
                let place = k as usize * size as usize;
                let bitmap = if geometry.extended_l2() { word(view, place + 8) } else { 0 };
                let entry = self.l2.decode(GuestOffset(from), word(view, place), bitmap).map_err(|fault| {
                    let cause = Corruption::Entry { fault, table, index: index + k };
                    Error::Corrupt { offset: from, cause }
                });
                match (entry.and_then(|entry| self.join_cluster(&mut run, from, entry)), run) {
                    (Ok(true), _) => {}
                    (Ok(false), _) => break,
                    // What lies before the fault is still good.
                    (Err(_), Some(_)) => break,
                    (Err(error), None) => return Err(error),
                }
            }
            // The loop runs at least once, and its first turn makes a run or fails.
            let run = run.ok_or(instar_blockio::Error::new(ErrorKind::Corrupt).at(offset))?;
            Ok(Extent { len: run.len.min(limit), ..run })
        })?
    }

    /// As [`BlockMap::kept_at`], but with the full cause of an error: subclusters of an allocated cluster may be left to the backing image.
    fn kept(&self, offset: u64, max_len: u64) -> Result<(u64, Option<(FileId, u64)>)> {
        let geometry = self.header.geometry;
        if !geometry.extended_l2() || self.header.encryption != EncryptionMethod::None {
            return Ok((max_len, None));
        }
        let l1_index = geometry.l1_index(GuestOffset(offset));
        let table = match self.l1_run(offset, l1_index, max_len)? {
            L1Run::Empty(count) => {
                let end = l1_index.saturating_add(count).saturating_mul(geometry.l2_span());
                return Ok(((end - offset).min(max_len), None));
            }
            L1Run::Table(table) => table,
        };
        let (index, size) = (geometry.l2_index(GuestOffset(offset)), geometry.l2_entry_size());
        let at = table.0 + index * size; // below 2^57
        let count = (self.pages.rest(at) / size).min(geometry.l2_entries() - index);
        self.pages.view(at, |view| {
            let entries = view.get(..(count * size) as usize).unwrap_or(view);
            let rest = geometry.cluster_start(offset).saturating_add(geometry.cluster_size()) - offset;
            let empty = leading_zeroes(entries) as u64 / size;
            if empty > 0 {
                let len = rest.saturating_add((empty - 1).saturating_mul(geometry.cluster_size()));
                return Ok((len.min(max_len), None));
            }
            let entry = self
                .l2
                .decode(GuestOffset(offset), word(view, 0), word(view, 8))
                .map_err(|fault| Error::Corrupt { offset, cause: Corruption::Entry { fault, table, index } })?;
            let L2Entry::Cluster { host: Some(host), subclusters, .. } = entry else {
                return Ok((rest.min(max_len), None));
            };
            let first = geometry.subcluster_index(GuestOffset(offset));
            let run = u64::from(first) + u64::from(subclusters.run(first, geometry.subclusters()));
            let len = geometry.cluster_start(offset) + run * geometry.subcluster_size() - offset;
            let place = match subclusters.state(first) {
                SubclusterState::Unallocated => Some((self.guest_file()?, host.0 + geometry.in_cluster(offset))),
                _ => None,
            };
            Ok((len.min(max_len), place))
        })?
    }

    /// The long runs of common images, without a look at each part of each entry: nothing allocated, or clusters one behind the
    /// other. `None` if the entries do not begin with one.
    fn uniform_run(&self, offset: u64, view: &[u8], count: u64) -> Result<Option<Extent>> {
        let geometry = self.header.geometry;
        let size = geometry.l2_entry_size() as usize;
        let entries = view.get(..(count as usize * size).min(view.len())).unwrap_or_default();
        let first = word(entries, 0);
        let rest = geometry.cluster_start(offset).saturating_add(geometry.cluster_size()) - offset;
        let run = |kind, entries: u64| {
            let len = rest.saturating_add((entries - 1).saturating_mul(geometry.cluster_size()));
            Extent { offset, len, depth: 0, kind }
        };
        if first == 0 {
            let empty = leading_zeroes(entries) / size;
            return Ok((empty > 0).then(|| run(ExtentKind::Unallocated, empty as u64)));
        }
        if geometry.extended_l2() || first & (L2_COMPRESSED | L2_ZERO) != 0 || first & L2_OFFSET_MASK == 0 {
            return Ok(None);
        }
        let words = entries.as_chunks::<8>().0.iter().map(|bytes| u64::from_be_bytes(*bytes));
        let expected = core::iter::successors(Some(first), |word| word.checked_add(geometry.cluster_size()));
        let same = words.zip(expected).take_while(|(word, expected)| word == expected).count() as u64;
        let last = first.wrapping_add(same.saturating_sub(1) * geometry.cluster_size());
        // Otherwise reserved bits were reached, or the place of the last cluster is to be looked at.
        let plain = same > 1 && (first ^ last) & !L2_OFFSET_MASK == 0 && !self.strict && !self.l2.data_file;
        let mut extent = None;
        if plain
            && let Ok(entry) = self.l2.decode(GuestOffset(offset), first, 0)
            && self.join_cluster(&mut extent, offset, entry)?
        {
            return Ok(extent.map(|extent| run(extent.kind, same)));
        }
        Ok(None)
    }

    /// Before the page at `at`, of the L2 table of an L1 entry, is read: where the disk is walked in order, the pages that will be
    /// wanted next come in the same turn.
    fn read_ahead(&self, l1_index: u64, at: u64, table: HostOffset) -> Result<()> {
        if self.pages.holds(at) {
            return Ok(());
        }
        let Ahead { last, pages } = self.ahead.get();
        let most = self.pages.room_ahead();
        let pages = if l1_index >= last { (pages * 2).clamp(1, most) } else { 1 };
        self.ahead.set(Ahead { last: l1_index, pages });
        if pages < 2 {
            return Ok(());
        }
        let geometry = self.header.geometry;
        let table_len = geometry.l2_entries() * geometry.l2_entry_size();
        let pages_of = |table: HostOffset| self.pages.starts(table.0, table_len);
        let mut wanted: Vec<u64> = pages_of(table).filter(|page| page + self.pages.rest(*page) > at).collect();
        let l1_at = self.l1.offset.0 + l1_index * 8;
        let entries = (self.pages.rest(l1_at) / 8).min(self.l1.entries - l1_index);
        self.pages.view(l1_at, |view| {
            let next = (1..entries).filter_map(|k| L1Entry::decode(word(view, k as usize * 8)).table);
            let next = next.filter(|table| geometry.is_aligned(table.0));
            wanted.extend(next.flat_map(pages_of).take(pages.saturating_sub(wanted.len())));
        })?;
        wanted.truncate(pages);
        // An error of a page that may never be asked for is not told. That of the wanted one comes when it is read alone.
        let _ = self.pages.read_ahead(&wanted);
        Ok(())
    }

    /// Adds the cluster of `from` to the run, from there to the cluster's end; says whether the run may go on.
    fn join_cluster(&self, run: &mut Option<Extent>, from: u64, entry: L2Entry) -> Result<bool> {
        let geometry = self.header.geometry;
        let end = geometry.cluster_start(from).saturating_add(geometry.cluster_size());
        let (host, subclusters) = match entry {
            L2Entry::Compressed { host, len } => {
                if run.is_none() {
                    let kind = ExtentKind::Compressed(self.compressed(from, host, len)?);
                    *run = Some(Extent { offset: from, len: end - from, depth: 0, kind });
                }
                return Ok(false);
            }
            L2Entry::Cluster { host, subclusters, .. } => (host, subclusters),
        };
        let mut at = from;
        while at < end {
            let index = geometry.subcluster_index(GuestOffset(at));
            let count = u64::from(subclusters.run(index, geometry.subclusters()));
            let piece_end = geometry.cluster_start(at) + (u64::from(index) + count) * geometry.subcluster_size();
            let kind = self.kind_of(at, subclusters.state(index), host)?;
            let piece = Extent { offset: at, len: piece_end - at, depth: 0, kind };
            match run {
                None => *run = Some(piece),
                Some(run) => {
                    if !run.join(&piece) {
                        return Ok(false);
                    }
                }
            }
            at = piece_end;
        }
        Ok(true)
    }

    fn kind_of(&self, at: u64, state: SubclusterState, host: Option<HostOffset>) -> Result<ExtentKind> {
        let skip = self.header.geometry.in_cluster(at);
        let place = host.map(|host| HostOffset(host.0 + skip)); // below 2^57
        Ok(match (state, place) {
            (SubclusterState::Allocated, Some(place)) => {
                let file = self.guest_file()?;
                self.check_data(at, place)?;
                match self.header.encryption {
                    EncryptionMethod::None => ExtentKind::Data { file, host: place.0 },
                    // The sectors of the file are counted, in the legacy method those of the disk.
                    EncryptionMethod::Luks => ExtentKind::Encrypted { file, host: place.0, position: place.0 },
                    EncryptionMethod::Aes => ExtentKind::Encrypted { file, host: place.0, position: at },
                }
            }
            (SubclusterState::Zero, Some(place)) => match self.guest_file() {
                Ok(file) => ExtentKind::Zero { host: Some((file, place.0)) },
                Err(_) => ExtentKind::Zero { host: None },
            },
            (SubclusterState::Zero, None) => ExtentKind::Zero { host: None },
            // Allocated without a place was refused when the entry was decoded.
            (SubclusterState::Unallocated | SubclusterState::Allocated, _) => ExtentKind::Unallocated,
        })
    }

    /// The file that holds guest clusters.
    fn guest_file(&self) -> Result<FileId> {
        match &self.data_file {
            Some((_, id)) if self.needs_data_file() => Ok(*id),
            _ if self.needs_data_file() => Err(Error::DataFileMissing),
            _ => Ok(self.id),
        }
    }

    fn check_data(&self, offset: u64, place: HostOffset) -> Result<()> {
        if self.header.encryption != EncryptionMethod::None && self.cipher.is_none() {
            return Err(Error::Encrypted(offset));
        }
        if self.strict && !self.needs_data_file() && place.0 >= self.pages.file().size() {
            return Err(Error::Corrupt { offset, cause: Corruption::DataPastEnd(place) });
        }
        Ok(())
    }

    fn check_table_inside(&self, offset: u64, place: HostOffset) -> Result<()> {
        if self.strict && place.0 >= self.pages.file().size() {
            return Err(Error::Corrupt { offset, cause: Corruption::TablePastEnd(place) });
        }
        Ok(())
    }

    fn compressed(&self, from: u64, host: HostOffset, len: u64) -> Result<CompressedRun> {
        if self.header.encryption != EncryptionMethod::None {
            return Err(Error::Encrypted(from));
        }
        let geometry = self.header.geometry;
        let unit_offset = geometry.cluster_start(from);
        // The last stream of a file needn't fill its last sector.
        let stored = len.min(self.pages.file().size().saturating_sub(host.0));
        if stored == 0 {
            return Err(Error::Corrupt { offset: unit_offset, cause: Corruption::Compressed(host) });
        }
        Ok(CompressedRun {
            file: self.id,
            host: host.0,
            stored_len: stored as u32, // at most 4 MiB
            unit_offset,
            unit_len: geometry.cluster_size() as u32,
            codec: match self.header.compression {
                CompressionType::Zlib => Codec::Deflate,
                CompressionType::Zstd => Codec::Zstd,
            },
        })
    }
}

impl<D: BlockRead> BlockMap for Image<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> BlockResult<Extent> {
        Ok(self.locate(offset, max_len)?)
    }

    fn kept_at(&self, offset: u64, max_len: u64) -> BlockResult<(u64, Option<(FileId, u64)>)> {
        Ok(self.kept(offset, max_len)?)
    }
}
