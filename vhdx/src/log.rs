//! The log: which of its entries count, and what they change. Spec chapter 2.3.
//!
//! The log is a ring. An entry says where the tail, the oldest entry that still counts, lies; the entries from there on to the one
//! with the highest sequence number are the active sequence. What is left over from earlier times has lower numbers,
//! another log GUID or no valid checksum.
//!
//! ```text
//!    old │ tail ── entry ── entry ── head │ old, or half overwritten
//!           7       8        9       10
//! ```

use alloc::vec::Vec;

use instar_blockio::{BlockRead, BlockWrite, Error as BlockError, ErrorKind, Result as BlockResult, zeroed};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::changes::{Changes, DataAt};
use crate::crc::{checksum, crc32c};
use crate::error::{Error, LogFault, Result};
use crate::format::{
    DATA_DESCRIPTOR_SIGNATURE, DATA_SECTOR_HEAD, DATA_SECTOR_SIGNATURE, DATA_SECTOR_TAIL, ENTRY_SIGNATURE, LOG_SECTOR,
    REGION_TABLE_AT, RawDescriptor, RawEntry, ZERO_SIGNATURE,
};
use crate::guid::Guid;
use crate::header::Header;
use crate::pages::read_padded;
use crate::region::Area;

/// Bytes of the log looked at in one request.
const PIECE: u64 = 1 << 20;
/// Checksums are made over at most this many times the length of the log. An honest log needs twice its length: once for what
/// counts, once for what is left over.
const WORK: u64 = 4;
/// Longest file, bytes: a full disk of 64 TiB with its tables is much smaller.
const MAX_FILE: u64 = 128 << 40;
/// Sectors that one entry of ours can hold: as many as its first sector has room for descriptors.
pub(crate) const MAX_ENTRY_SECTORS: usize = (LOG_SECTOR as usize - size_of::<RawEntry>()) / size_of::<RawDescriptor>();

/// A valid entry and its place in the ring.
#[derive(Clone, Copy, Debug)]
struct Entry {
    at: u64,
    len: u64,
    tail: u64,
    sequence: u64,
    descriptors: u32,
    flushed_file_offset: u64,
    last_file_offset: u64,
}

impl Entry {
    /// Bytes of the sectors that hold the header and the descriptors.
    fn descriptor_bytes(&self) -> u64 {
        let bytes = size_of::<RawEntry>() as u64 + u64::from(self.descriptors) * size_of::<RawDescriptor>() as u64;
        bytes.next_multiple_of(LOG_SECTOR)
    }
}

/// What the log changes, and how long the file then is.
#[derive(Debug)]
pub(crate) struct Replay {
    pub changes: Changes,
    pub file_len: u64,
}

/// The log as a ring of bytes.
struct Ring<'a, D> {
    file: &'a D,
    area: Area,
    guid: Guid,
}

/// What the log of a file changes; `None` if nothing.
///
/// Costs at most a few times the length of the log, and memory for the changes that really are in it.
pub(crate) fn replay<D: BlockRead>(file: &D, header: &Header) -> Result<Option<Replay>> {
    // A log behind the end of the file has no entries.
    let inside = file.size().saturating_sub(header.log_at) / LOG_SECTOR * LOG_SECTOR;
    if !header.has_log() || inside == 0 {
        return Ok(None);
    }
    let area = Area { at: header.log_at, len: header.log_len.into() };
    let ring = Ring { file, area, guid: header.log_guid };
    let entries = ring.scan(inside.min(area.len))?;
    let active = ring.active(&entries);
    let Some(head) = active.last() else { return Ok(None) };
    if head.flushed_file_offset > file.size() {
        return Err(LogFault::Truncated(head.flushed_file_offset).into());
    }
    let file_len = file.size().max(head.last_file_offset);
    if file_len > MAX_FILE && file_len > file.size() {
        return Err(LogFault::FileLength(file_len).into());
    }
    let mut changes = Changes::default();
    for entry in &active {
        ring.collect(entry, &mut changes)?;
    }
    Ok(Some(Replay { changes, file_len }))
}

impl<D: BlockRead> Ring<'_, D> {
    /// Reads `buf` from a place of the ring, going on at its beginning behind its end.
    fn read(&self, at: u64, buf: &mut [u8]) -> BlockResult<()> {
        let (mut at, mut rest) = (at % self.area.len, buf);
        while !rest.is_empty() {
            let len = (self.area.len - at).min(rest.len() as u64) as usize;
            let (now, later) = rest.split_at_mut(len);
            read_padded(self.file, self.area.at + at, now)?;
            (at, rest) = (0, later);
        }
        Ok(())
    }

    /// All valid entries that begin in the first `inside` bytes, by their place.
    fn scan(&self, inside: u64) -> Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut piece = zeroed(inside.min(PIECE) as usize)?;
        let mut budget = self.area.len.saturating_mul(WORK);
        // Behind the entry found last: entries don't lie inside of one another.
        let mut free = 0;
        let mut at = 0;
        while at < inside {
            let bytes = &mut piece[..(inside - at).min(PIECE) as usize];
            self.read(at, bytes)?;
            for (index, sector) in bytes.chunks_exact(LOG_SECTOR as usize).enumerate() {
                let place = at + index as u64 * LOG_SECTOR;
                if place < free || !sector.starts_with(&ENTRY_SIGNATURE) {
                    continue;
                }
                if let Some(entry) = self.entry(place, sector, &mut budget)? {
                    free = place + entry.len;
                    entries.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                    entries.push(entry);
                }
            }
            at += bytes.len() as u64;
        }
        Ok(entries)
    }

    /// The entry that begins with this sector, if it is valid.
    fn entry(&self, at: u64, sector: &[u8], budget: &mut u64) -> Result<Option<Entry>> {
        let Ok((raw, _)) = RawEntry::ref_from_prefix(sector) else { return Ok(None) };
        let entry = Entry {
            at,
            len: raw.len.get().into(),
            tail: raw.tail.get().into(),
            sequence: raw.sequence.get(),
            descriptors: raw.descriptor_count.get(),
            flushed_file_offset: raw.flushed_file_offset.get(),
            last_file_offset: raw.last_file_offset.get(),
        };
        let plausible = Guid(raw.log_guid) == self.guid
            && entry.sequence > 0
            && entry.len.is_multiple_of(LOG_SECTOR)
            && entry.len <= self.area.len
            && entry.descriptor_bytes() <= entry.len
            && entry.tail.is_multiple_of(LOG_SECTOR)
            && entry.tail < self.area.len;
        if !plausible {
            return Ok(None);
        }
        *budget = budget.checked_sub(entry.len).ok_or(LogFault::Work)?;
        Ok((self.checksum(&entry)? == raw.checksum.get()).then_some(entry))
    }

    fn checksum(&self, entry: &Entry) -> Result<u32> {
        let mut piece = zeroed(entry.len.min(PIECE / 16) as usize)?;
        let mut crc = 0;
        let mut done = 0;
        while done < entry.len {
            let bytes = &mut piece[..(entry.len - done).min(PIECE / 16) as usize];
            self.read(entry.at + done, bytes)?;
            if done == 0 {
                bytes[4..8].fill(0);
            }
            crc = crc32c(crc, bytes);
            done += bytes.len() as u64;
        }
        Ok(crc)
    }

    /// The entry behind another one, if it continues that.
    fn next<'e>(&self, entries: &'e [Entry], entry: &Entry) -> Option<&'e Entry> {
        let at = (entry.at + entry.len) % self.area.len;
        let next = entries.get(entries.binary_search_by_key(&at, |entry| entry.at).ok()?)?;
        (entry.sequence.checked_add(1) == Some(next.sequence)).then_some(next)
    }

    /// The active sequence, from the tail to the head; empty if there is none.
    fn active(&self, entries: &[Entry]) -> Vec<Entry> {
        let mut continued: Vec<u64> =
            entries.iter().filter_map(|entry| self.next(entries, entry)).map(|entry| entry.at).collect();
        continued.sort_unstable();
        let mut best: Vec<Entry> = Vec::new();
        for first in entries.iter().filter(|entry| continued.binary_search(&entry.at).is_err()) {
            let run: Vec<Entry> =
                core::iter::successors(Some(*first), |entry| self.next(entries, entry).copied()).collect();
            let Some(head) = run.last() else { continue };
            let newer = best.last().is_none_or(|best| head.sequence > best.sequence);
            // A run whose head counts on entries that are gone can't be replayed.
            if newer && let Some(tail) = run.iter().position(|entry| entry.at == head.tail) {
                best = run[tail..].to_vec();
            }
        }
        best
    }

    /// Adds what an entry changes.
    fn collect(&self, entry: &Entry, changes: &mut Changes) -> Result<()> {
        let broken = || Error::Log(LogFault::Descriptor(entry.at));
        let mut head = zeroed(LOG_SECTOR as usize)?;
        let first = size_of::<RawEntry>();
        let mut sectors = entry.descriptor_bytes();
        for number in 0..u64::from(entry.descriptors) {
            let at = first as u64 + number * size_of::<RawDescriptor>() as u64;
            let inside = (at % LOG_SECTOR) as usize;
            if number == 0 || inside == 0 {
                self.read(entry.at + at - inside as u64, &mut head)?;
            }
            let (raw, _) = RawDescriptor::read_from_prefix(&head[inside..]).map_err(|_| broken())?;
            let offset = raw.file_offset.get();
            if raw.sequence.get() != entry.sequence || !offset.is_multiple_of(LOG_SECTOR) {
                return Err(broken());
            }
            match raw.signature {
                ZERO_SIGNATURE => {
                    let len = u64::from_le_bytes(raw.len_or_leading);
                    if !len.is_multiple_of(LOG_SECTOR) {
                        return Err(broken());
                    }
                    changes.add(self.target(entry, offset, len)?, None)?;
                }
                DATA_DESCRIPTOR_SIGNATURE => {
                    let target = self.target(entry, offset, LOG_SECTOR)?;
                    let sector = self.data_sector(entry, sectors)?;
                    sectors += LOG_SECTOR;
                    let data = DataAt { sector, leading: raw.len_or_leading, trailing: raw.trailing };
                    changes.add(target, Some(data))?;
                }
                _ => return Err(broken()),
            }
        }
        Ok(())
    }

    /// Checks what a descriptor changes: anything but signature, headers and the log itself.
    fn target(&self, entry: &Entry, at: u64, len: u64) -> Result<Area> {
        let fits = at.checked_add(len).is_some_and(|end| end <= i64::MAX as u64);
        let area = Area { at, len };
        if !fits {
            return Err(LogFault::Descriptor(entry.at).into());
        }
        if len > 0 && (at < REGION_TABLE_AT[0] || area.overlaps(self.area)) {
            return Err(LogFault::Target(at).into());
        }
        Ok(area)
    }

    /// Where in the file the data sector lies that begins so many bytes behind the start of its entry.
    fn data_sector(&self, entry: &Entry, skip: u64) -> Result<u64> {
        let broken = Error::Log(LogFault::DataSector(entry.at));
        if skip >= entry.len {
            return Err(broken);
        }
        let at = (entry.at + skip) % self.area.len;
        let mut head = [0; DATA_SECTOR_HEAD];
        let mut tail = [0; DATA_SECTOR_TAIL];
        self.read(at, &mut head)?;
        self.read(at + LOG_SECTOR - DATA_SECTOR_TAIL as u64, &mut tail)?;
        let sequence = entry.sequence.to_le_bytes();
        let valid = head[..4] == DATA_SECTOR_SIGNATURE && head[4..] == sequence[4..] && tail == sequence[..4];
        if valid { Ok(self.area.at + at) } else { Err(broken) }
    }
}

/// Writes one entry at the start of the log that puts each of these sectors (at most [`MAX_ENTRY_SECTORS`]) to its place.
///
/// It counts once the header names `guid`.
pub(crate) fn write_entry<D: BlockWrite>(
    file: &mut D,
    log: Area,
    guid: Guid,
    sectors: &[(u64, &[u8])],
) -> BlockResult<()> {
    const SEQUENCE: u64 = 1;
    let len = (1 + sectors.len()) * LOG_SECTOR as usize;
    if sectors.len() > MAX_ENTRY_SECTORS || len as u64 > log.len {
        return Err(BlockError::new(ErrorKind::InvalidInput).at(log.at));
    }
    let mut bytes = zeroed(len)?;
    let mut raw = RawEntry::new_zeroed();
    raw.signature = ENTRY_SIGNATURE;
    raw.len = (len as u32).into();
    raw.sequence = SEQUENCE.into();
    raw.descriptor_count = (sectors.len() as u32).into();
    raw.log_guid = guid.0;
    raw.flushed_file_offset = file.size().into();
    raw.last_file_offset = file.size().into();
    let (head, data) = bytes.split_at_mut(LOG_SECTOR as usize);
    let (entry, descriptors) = head.split_at_mut(size_of::<RawEntry>());
    entry.copy_from_slice(raw.as_bytes());
    let places =
        descriptors.chunks_exact_mut(size_of::<RawDescriptor>()).zip(data.chunks_exact_mut(LOG_SECTOR as usize));
    for ((at, sector), (descriptor, place)) in sectors.iter().zip(places) {
        let wrong = || BlockError::new(ErrorKind::InvalidInput).at(*at);
        let (leading, rest) = sector.split_first_chunk().ok_or_else(wrong)?;
        let (middle, trailing) = rest.split_last_chunk().ok_or_else(wrong)?;
        let raw = RawDescriptor {
            signature: DATA_DESCRIPTOR_SIGNATURE,
            trailing: *trailing,
            len_or_leading: *leading,
            file_offset: (*at).into(),
            sequence: SEQUENCE.into(),
        };
        descriptor.copy_from_slice(raw.as_bytes());
        let sequence = SEQUENCE.to_le_bytes();
        place[..4].copy_from_slice(&DATA_SECTOR_SIGNATURE);
        place[4..8].copy_from_slice(&sequence[4..]);
        let end = LOG_SECTOR as usize - DATA_SECTOR_TAIL;
        place
            .get_mut(DATA_SECTOR_HEAD..end)
            .filter(|part| part.len() == middle.len())
            .ok_or_else(wrong)?
            .copy_from_slice(middle);
        place[end..].copy_from_slice(&sequence[..4]);
    }
    let sum = checksum(&bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    file.write_at(log.at, &bytes)
}
