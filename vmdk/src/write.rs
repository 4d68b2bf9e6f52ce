//! Writing: grains are allocated at the end of the file, tables are kept in memory and written in groups.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use instar_blockio::{
    BlockAlloc, BlockMap, BlockRead, BlockWrite, Codec, Error as BlockError, ErrorKind, Extent, ExtentKind, FileId,
    Reservation, Result as BlockResult, ZeroMode, check_range, zeroed,
};
use instar_codec::Encoder;

use crate::create::{CreateOptions, Layout};
use crate::error::{Error, Result};
use crate::format::{GRAIN_SECTORS, MARKER_LEN, SECTOR, TABLE_ENTRIES, TABLE_SECTORS, ZEROED};
use crate::image::{Image, OpenOptions};

/// Bytes of a grain of the images that are written.
pub const GRAIN: u64 = GRAIN_SECTORS * SECTOR;
/// Bytes of a grain table.
const TABLE: usize = (TABLE_SECTORS * SECTOR) as usize;
/// Tables kept in memory before all are written.
const MAX_TABLES: usize = 4096;

/// An image that is written: one that [`create`] makes, or an existing one with a single sparse extent.
#[derive(Debug)]
pub struct Writer<D> {
    /// Holds the descriptor, and the only extent if that is not in a file of its own.
    main: D,
    main_id: FileId,
    parts: Vec<Part<D>>,
    size: u64,
    compressed: bool,
    zeroed_grain: bool,
    has_parent: bool,
    /// Something was written.
    changed: bool,
    origin: Origin,
}

#[derive(Debug)]
enum Origin {
    New(CreateOptions),
    /// The descriptor as it was, its place, and the CID to come.
    Existing {
        text: Vec<u8>,
        at: u64,
        cid: u32,
    },
}

#[derive(Debug)]
struct Part<D> {
    start: u64,
    len: u64,
    /// `None`: the main file.
    file: Option<D>,
    id: FileId,
    /// `None`: the bytes themselves.
    tables: Option<Tables>,
}

/// The grain tables of an extent.
#[derive(Debug)]
struct Tables {
    /// Where each table and its copy lie, sectors.
    places: Places,
    kept: BTreeMap<u64, Table>,
    /// Where the next grain goes, sectors.
    next: u64,
    /// Where the file ends at least, bytes.
    end: u64,
    /// What the file does not hold yet reads as zero.
    fresh: bool,
}

#[derive(Debug)]
enum Places {
    New(Layout),
    Existing(Vec<[u32; 2]>),
}

#[derive(Debug)]
struct Table {
    entries: Vec<u32>,
    dirty: bool,
}

/// Makes an image. `files` are those of the extents, as many as [`CreateOptions::parts`] has, unless they lie in `main`.
///
/// The image is valid once it is [finished](Writer::finish).
///
/// # Errors
/// [`Error::SizeTooLarge`], a wrong number of files, or the device's error.
pub fn create<D: BlockWrite>(
    main: D,
    main_id: FileId,
    files: Vec<(D, FileId)>,
    options: CreateOptions,
) -> Result<Writer<D>> {
    let lens = options.parts()?;
    let own_files = options.subformat.has_extent_files();
    if files.len() != if own_files { lens.len() } else { 0 } {
        return Err(Error::Io(ErrorKind::InvalidInput.into()));
    }
    let mut files = files.into_iter();
    let (mut parts, mut start) = (Vec::new(), 0);
    for len in lens {
        let (mut file, id) = match files.next() {
            Some((file, id)) => (Some(file), id),
            None => (None, main_id),
        };
        let tables = match options.subformat.is_flat() {
            true => {
                if let Some(file) = &mut file
                    && file.size() < len
                {
                    file.set_size(len)?;
                }
                None
            }
            false => Some(Tables::new(len)),
        };
        parts.push(Part { start, len, file, id, tables });
        start += len;
    }
    let mut writer = Writer {
        main,
        main_id,
        parts,
        size: start,
        compressed: options.subformat == crate::Subformat::StreamOptimized,
        zeroed_grain: options.zeroed_grain,
        has_parent: options.parent.is_some(),
        changed: false,
        origin: Origin::New(options),
    };
    writer.prepare_devices()?;
    Ok(writer)
}

impl<D: BlockWrite> Writer<D> {
    /// Opens an existing image, with one sparse extent in its only file, to write into it; `cid` is a random number.
    ///
    /// # Errors
    /// As [`Image::open`]; [`Error::ReadOnlyType`] for any other image.
    pub fn open(main: D, main_id: FileId, cid: u32) -> Result<Self> {
        let image = Image::open(&main, main_id, &OpenOptions::default())?;
        let Some((pages, geometry, _)) = image.geometries().next().filter(|_| image.is_monolithic()) else {
            return Err(Error::ReadOnlyType);
        };
        let plain = geometry.grain == GRAIN && geometry.table_entries == TABLE_ENTRIES && geometry.version > 0;
        // A stream was written in one go, with its directory at its end.
        if !plain || geometry.compressed || geometry.flavour != crate::sparse::Flavour::Hosted {
            return Err(Error::ReadOnlyType);
        }
        let mut places = Vec::new();
        for index in 0..geometry.directory_len {
            let entry = |directory: Option<u64>| -> Result<u32> {
                let Some(directory) = directory else { return Ok(0) };
                let mut bytes = [0; 4];
                pages.read(directory + index * 4, &mut bytes)?;
                Ok(u32::from_le_bytes(bytes))
            };
            let first = entry(Some(geometry.directory))?;
            if first == 0 || u64::from(first) * SECTOR >= main.size() {
                return Err(Error::ReadOnlyType);
            }
            places.try_reserve(1).map_err(|_| BlockError::new(ErrorKind::OutOfMemory))?;
            places.push([first, entry(geometry.second_directory)?]);
        }
        let (at, text) = match geometry.descriptor {
            Some((at, len)) => (at, pages.read_vec(at, len.min(crate::descriptor::MAX_LEN) as usize)?),
            None => (0, Vec::new()),
        };
        let next = main.size().div_ceil(SECTOR).next_multiple_of(GRAIN_SECTORS);
        let tables =
            Tables { places: Places::Existing(places), kept: BTreeMap::new(), next, end: main.size(), fresh: false };
        let size = geometry.capacity;
        let (zeroed_grain, has_parent) = (geometry.zeroed, image.parent_name().is_some());
        drop(image);
        let part = Part { start: 0, len: size, file: None, id: main_id, tables: Some(tables) };
        Ok(Self {
            main,
            main_id,
            parts: Vec::from([part]),
            size,
            compressed: false,
            zeroed_grain,
            has_parent,
            changed: false,
            origin: Origin::Existing { text, at, cid },
        })
    }

    /// Grains are stored compressed, and nothing else is.
    pub fn is_compressed(&self) -> bool {
        self.compressed
    }

    /// Zeroes can be told by a table entry, or need not be told.
    pub fn zeroes_are_cheap(&self) -> bool {
        self.zeroed_grain || !self.has_parent
    }

    /// The only flat extent, if there is one in all: its file, whose bytes are the disk.
    pub fn only_flat(&self) -> Option<FileId> {
        match self.parts.as_slice() {
            [Part { tables: None, id, .. }] => Some(*id),
            _ => None,
        }
    }

    /// The disk was written behind the writer's back.
    pub fn mark_changed(&mut self) {
        self.changed = true;
    }

    /// What lies in a device that does not grow is not zero: tables are cleared.
    fn prepare_devices(&mut self) -> Result<()> {
        for part in &mut self.parts {
            let file = part.file.as_mut().unwrap_or(&mut self.main);
            if let Some(tables) = &part.tables
                && !file.limits().grows
            {
                let len = tables.next * SECTOR;
                if file.size() < len {
                    return Err(Error::Io(ErrorKind::NoSpace.into()));
                }
                file.write_zeroes(0, len, ZeroMode::KeepAllocated)?;
            }
        }
        Ok(())
    }

    fn part_at(&self, offset: u64) -> BlockResult<usize> {
        if offset >= self.size {
            return Err(BlockError::new(ErrorKind::OutOfBounds).at(offset));
        }
        Ok(self.parts.partition_point(|part| part.start <= offset) - 1)
    }

    /// The entry of the grain at `offset`.
    fn entry(&mut self, offset: u64) -> BlockResult<&mut u32> {
        let at = self.part_at(offset)?;
        let part = &mut self.parts[at];
        let file = part.file.as_mut().unwrap_or(&mut self.main);
        let grain = (offset - part.start) / GRAIN;
        let tables = part.tables.as_mut().ok_or(BlockError::new(ErrorKind::InvalidInput))?;
        tables.entry(file, grain, true)
    }

    fn peek(&self, part: &Part<D>, skip: u64) -> BlockResult<u32> {
        let file = part.file.as_ref().unwrap_or(&self.main);
        match &part.tables {
            Some(tables) => tables.peek(file, skip / GRAIN),
            None => Err(ErrorKind::InvalidInput.into()),
        }
    }

    /// Completes the image: tables, directories, descriptors, headers last.
    ///
    /// # Errors
    /// The device's error; the image is then not valid.
    pub fn finish(mut self) -> Result<()> {
        for part in &mut self.parts {
            let file = part.file.as_mut().unwrap_or(&mut self.main);
            let Some(tables) = &mut part.tables else { continue };
            tables.write(file)?;
            if let Places::New(layout) = &tables.places {
                write_directories(file, layout)?;
            }
            if file.limits().grows && file.size() < tables.end {
                file.set_size(tables.end)?;
            }
            file.flush()?;
        }
        self.write_descriptor()?;
        if let Origin::New(options) = &self.origin {
            for part in &mut self.parts {
                let file = part.file.as_mut().unwrap_or(&mut self.main);
                if let Some(Tables { places: Places::New(layout), .. }) = &part.tables {
                    file.write_at(0, &layout.header(part.len, self.compressed, options.zeroed_grain).emit())?;
                }
                file.flush()?;
            }
        }
        self.main.flush()?;
        Ok(())
    }

    fn write_descriptor(&mut self) -> Result<()> {
        match &self.origin {
            Origin::New(options) => {
                let mut text = options.descriptor(self.changed)?;
                if !options.subformat.has_extent_files() {
                    // The room behind it reads as zero.
                    text.truncate((crate::format::DESCRIPTOR_SECTORS * SECTOR) as usize);
                    return Ok(self.main.write_at(SECTOR, &text)?);
                }
                if self.changed {
                    // The change of the CID rounds the file up.
                    text.resize(text.len().next_multiple_of(SECTOR as usize), 0);
                }
                Ok(self.main.write_at(0, &text)?)
            }
            Origin::Existing { text, at, cid } if self.changed && !text.is_empty() => {
                let Some(text) = with_cid(text, *cid) else { return Ok(()) };
                Ok(self.main.write_at(*at, &text)?)
            }
            Origin::Existing { .. } => Ok(()),
        }
    }

    /// Stores a whole grain of bytes compressed.
    fn write_compressed(&mut self, offset: u64, bytes: &[u8]) -> BlockResult<()> {
        let mut out = marker(offset, 0).to_vec();
        let encoded = Encoder::new(Codec::Zlib).encode_always(bytes, &mut out);
        let len = encoded.map_err(|_| BlockError::new(ErrorKind::OutOfMemory))?;
        out[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        let place = self.reserve_compressed(offset, out.len() as u32)?;
        self.file_mut(place.file)?.write_at(place.host, &out)?;
        self.commit(place)
    }

    fn file_mut(&mut self, id: FileId) -> BlockResult<&mut D> {
        if id == self.main_id {
            return Ok(&mut self.main);
        }
        let found = self.parts.iter_mut().find(|part| part.id == id).and_then(|part| part.file.as_mut());
        found.ok_or(ErrorKind::InvalidInput.into())
    }
}

/// What stands before the stream of a grain.
pub fn marker(offset: u64, stream_len: u32) -> [u8; MARKER_LEN as usize] {
    let mut bytes = [0; MARKER_LEN as usize];
    bytes[..8].copy_from_slice(&(offset / SECTOR).to_le_bytes());
    bytes[8..].copy_from_slice(&stream_len.to_le_bytes());
    bytes
}

/// The text with another CID, in the same room; `None` if it has none or is full.
fn with_cid(text: &[u8], cid: u32) -> Option<Vec<u8>> {
    let at = text.windows(5).position(|window| window == b"\nCID=")? + 5;
    let digits = text[at..].iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let used = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    let tail = text.get(at + digits..used)?;
    let mut out = [&text[..at], alloc::format!("{cid:08x}").as_bytes(), tail].concat();
    if out.len() > text.len() {
        return None;
    }
    out.resize(text.len(), 0);
    Some(out)
}

fn write_directories<D: BlockWrite>(file: &mut D, layout: &Layout) -> BlockResult<()> {
    const PIECE: u64 = 16 << 10;
    for directory in [layout.second_directory, layout.directory] {
        let mut number = 0;
        while number < layout.tables {
            let end = layout.tables.min(number + PIECE);
            let entries = (number..end).flat_map(|table| (layout.table(directory, table) as u32).to_le_bytes());
            let bytes: Vec<u8> = entries.collect();
            file.write_at(directory * SECTOR + number * 4, &bytes)?;
            number = end;
        }
    }
    Ok(())
}

impl Tables {
    fn new(len: u64) -> Self {
        let layout = Layout::of(len);
        let end = layout.overhead * SECTOR;
        Self { places: Places::New(layout), kept: BTreeMap::new(), next: layout.overhead, end, fresh: true }
    }

    /// Where table `number` and its copy lie, bytes; 0 for no copy.
    fn places(&self, number: u64) -> BlockResult<[u64; 2]> {
        match &self.places {
            Places::New(layout) => {
                Ok([layout.directory, layout.second_directory].map(|at| layout.table(at, number) * SECTOR))
            }
            Places::Existing(places) => {
                let found = usize::try_from(number).ok().and_then(|number| places.get(number));
                Ok(found.ok_or(BlockError::new(ErrorKind::Corrupt))?.map(|at| u64::from(at) * SECTOR))
            }
        }
    }

    fn load<D: BlockRead>(&self, file: &D, number: u64) -> BlockResult<Vec<u32>> {
        let at = self.places(number)?[0];
        let mut bytes = zeroed(TABLE)?;
        let have = file.size().saturating_sub(at).min(TABLE as u64) as usize;
        // A fresh device that does not grow was cleared, one that grows holds what was written.
        if have > 0 {
            file.read_at(at, &mut bytes[..have])?;
        }
        let (words, _) = bytes.as_chunks::<4>();
        Ok(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    fn peek<D: BlockRead>(&self, file: &D, grain: u64) -> BlockResult<u32> {
        let (number, index) = (grain / TABLE_ENTRIES, (grain % TABLE_ENTRIES) as usize);
        match self.kept.get(&number) {
            Some(table) => Ok(table.entries[index]),
            None => Ok(self.load(file, number)?[index]),
        }
    }

    fn entry<D: BlockWrite>(&mut self, file: &mut D, grain: u64, change: bool) -> BlockResult<&mut u32> {
        let (number, index) = (grain / TABLE_ENTRIES, (grain % TABLE_ENTRIES) as usize);
        if !self.kept.contains_key(&number) {
            if self.kept.len() >= MAX_TABLES {
                self.write(file)?;
                self.kept.clear();
            }
            let untouched = self.fresh && file.size() <= self.places(number)?[0];
            let entries = if untouched { alloc::vec![0; TABLE_ENTRIES as usize] } else { self.load(file, number)? };
            self.kept.insert(number, Table { entries, dirty: false });
        }
        let table = self.kept.get_mut(&number).ok_or(BlockError::new(ErrorKind::InvalidInput))?;
        table.dirty |= change;
        Ok(&mut table.entries[index])
    }

    /// Writes the changed tables, neighbours in one request.
    fn write<D: BlockWrite>(&mut self, file: &mut D) -> BlockResult<()> {
        const MAX_RUN: usize = 1 << 20;
        for copy in 0..2 {
            let (mut run, mut run_at) = (Vec::new(), 0u64);
            for (&number, table) in self.kept.iter().filter(|(_, table)| table.dirty) {
                let at = self.places(number)?[copy];
                if at == 0 {
                    continue;
                }
                if !run.is_empty() && (at != run_at + run.len() as u64 || run.len() >= MAX_RUN) {
                    file.write_at(run_at, &run)?;
                    run.clear();
                }
                if run.is_empty() {
                    run_at = at;
                }
                run.extend(table.entries.iter().flat_map(|entry| entry.to_le_bytes()));
            }
            if !run.is_empty() {
                file.write_at(run_at, &run)?;
            }
        }
        self.kept.values_mut().for_each(|table| table.dirty = false);
        Ok(())
    }

    /// A place for `count` grains, or for a stream of `len` bytes.
    fn allocate(&mut self, sectors: u64, reach: u64) -> BlockResult<u32> {
        let at = u32::try_from(self.next).map_err(|_| BlockError::new(ErrorKind::NoSpace))?;
        let end = self.next + sectors;
        if u32::try_from(end).is_err() {
            return Err(ErrorKind::NoSpace.into());
        }
        self.end = self.end.max((self.next + reach) * SECTOR);
        self.next = end;
        Ok(at)
    }
}

impl<D: BlockWrite> BlockRead for Writer<D> {
    fn size(&self) -> u64 {
        self.size
    }

    /// Reads what was written; grains that are not allocated as zero. Compressed grains are [`ErrorKind::Unsupported`].
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let extent = self.extent_at(at, rest.len() as u64)?;
            let (now, later) = rest.split_at_mut(extent.len as usize);
            match extent.kind {
                ExtentKind::Data { host, .. } => {
                    let part = &self.parts[self.part_at(at)?];
                    let file = part.file.as_ref().unwrap_or(&self.main);
                    let have = file.size().saturating_sub(host).min(now.len() as u64) as usize;
                    now[have..].fill(0);
                    file.read_at(host, &mut now[..have])?;
                }
                ExtentKind::Zero { .. } | ExtentKind::Unallocated => now.fill(0),
                _ => return Err(BlockError::new(ErrorKind::Unsupported).at(at)),
            }
            (at, rest) = (at + extent.len, later);
        }
        Ok(())
    }
}

impl<D: BlockWrite> BlockMap for Writer<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> BlockResult<Extent> {
        let part = &self.parts[self.part_at(offset)?];
        if max_len == 0 {
            return Err(ErrorKind::InvalidInput.into());
        }
        let skip = offset - part.start;
        let left = max_len.min(part.len - skip);
        if part.tables.is_none() {
            let kind = ExtentKind::Data { file: part.id, host: skip };
            return Ok(Extent { offset, len: left, depth: 0, kind });
        }
        let len = left.min(GRAIN - skip % GRAIN);
        let kind = match self.peek(part, skip)? {
            0 => ExtentKind::Unallocated,
            ZEROED if self.zeroed_grain => ExtentKind::Zero { host: None },
            _ if self.compressed => return Err(BlockError::new(ErrorKind::Unsupported).at(offset)),
            sector => ExtentKind::Data { file: part.id, host: u64::from(sector) * SECTOR + skip % GRAIN },
        };
        Ok(Extent { offset, len, depth: 0, kind })
    }
}

impl<D: BlockWrite> BlockAlloc for Writer<D> {
    /// Tables in memory say at once where the grains lie; the file does not before [`Writer::finish`] (or, of very large disks, when
    /// memory for tables is used up).
    fn reserve(&mut self, offset: u64, len: u64) -> BlockResult<Reservation> {
        check_range(self.size, offset, len)?;
        let at = self.part_at(offset)?;
        let part = &mut self.parts[at];
        let file = part.file.as_mut().unwrap_or(&mut self.main);
        let skip = offset - part.start;
        let len = len.min(part.len - skip);
        let place = |len, host| Reservation { offset, len, file: part.id, host, stored_len: len, compressed: false };
        let Some(tables) = &mut part.tables else { return Ok(place(len, skip)) };
        if self.compressed {
            return Err(BlockError::new(ErrorKind::Unsupported).at(offset));
        }
        let first = skip / GRAIN;
        // Not beyond the table: it stays in memory meanwhile.
        let last = ((skip + len - 1) / GRAIN).min(first / TABLE_ENTRIES * TABLE_ENTRIES + TABLE_ENTRIES - 1);
        let old = *tables.entry(file, first, false)?;
        let is_new = |entry: u32| entry == 0 || (entry == ZEROED && self.zeroed_grain);
        let mut count = 1;
        let start = if is_new(old) {
            while first + count <= last && is_new(*tables.entry(file, first + count, false)?) {
                count += 1;
            }
            let start = tables.allocate(count * GRAIN_SECTORS, count * GRAIN_SECTORS)?;
            for grain in 0..count {
                *tables.entry(file, first + grain, true)? = start + (grain * GRAIN_SECTORS) as u32;
            }
            start
        } else {
            while first + count <= last
                && u64::from(*tables.entry(file, first + count, false)?) == u64::from(old) + count * GRAIN_SECTORS
            {
                count += 1;
            }
            old
        };
        let room = count * GRAIN - skip % GRAIN;
        Ok(place(len.min(room), u64::from(start) * SECTOR + skip % GRAIN))
    }

    /// `stored_len` counts the [marker] too, which the caller writes before the stream.
    fn reserve_compressed(&mut self, offset: u64, stored_len: u32) -> BlockResult<Reservation> {
        if !self.compressed || !offset.is_multiple_of(GRAIN) {
            return Err(BlockError::new(ErrorKind::Unsupported).at(offset));
        }
        let at = self.part_at(offset)?;
        let part = &mut self.parts[at];
        let file = part.file.as_mut().unwrap_or(&mut self.main);
        let tables = part.tables.as_mut().ok_or(BlockError::new(ErrorKind::Unsupported))?;
        let grain = (offset - part.start) / GRAIN;
        let start = tables.allocate(u64::from(stored_len).div_ceil(SECTOR), GRAIN_SECTORS)?;
        *tables.entry(file, grain, true)? = start;
        Ok(Reservation {
            offset,
            len: GRAIN.min(self.size - offset),
            file: part.id,
            host: u64::from(start) * SECTOR,
            stored_len: stored_len.into(),
            compressed: true,
        })
    }

    fn commit(&mut self, _: Reservation) -> BlockResult<()> {
        self.changed = true;
        Ok(())
    }

    /// The place stays allocated, and reads as whatever was written there.
    fn abort(&mut self, _: Reservation) -> BlockResult<()> {
        Ok(())
    }

    fn alloc_unit(&self) -> u64 {
        if self.parts.iter().any(|part| part.tables.is_some()) { GRAIN } else { SECTOR }
    }
}

impl<D: BlockWrite> BlockWrite for Writer<D> {
    /// Of a compressed image only whole grains are written, each once.
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> BlockResult<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let now = if self.compressed {
                let len = rest.len().min(GRAIN as usize);
                if !at.is_multiple_of(GRAIN) || (len < GRAIN as usize && at + len as u64 != self.size) {
                    return Err(BlockError::new(ErrorKind::Unsupported).at(at));
                }
                let mut grain = zeroed(GRAIN as usize)?;
                grain[..len].copy_from_slice(&rest[..len]);
                self.write_compressed(at, &grain)?;
                len
            } else {
                let place = self.reserve(at, rest.len() as u64)?;
                let len = place.len as usize;
                self.file_mut(place.file)?.write_at(place.host, &rest[..len])?;
                self.commit(place)?;
                len
            };
            (at, rest) = (at + now as u64, &rest[now..]);
        }
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> BlockResult<()> {
        check_range(self.size, offset, len)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let part = &self.parts[self.part_at(at)?];
            let skip = at - part.start;
            let left = (end - at).min(part.len - skip);
            if part.tables.is_none() {
                let id = part.id;
                self.file_mut(id)?.write_zeroes(skip, left, mode)?;
                self.changed = true;
                at += left;
                continue;
            }
            let step = left.min(GRAIN - skip % GRAIN);
            let whole = skip.is_multiple_of(GRAIN) && (step == GRAIN || step == part.len - skip);
            match self.peek(part, skip)? {
                0 if !self.has_parent => {}
                ZEROED if self.zeroed_grain => {}
                _ if whole && self.zeroed_grain => {
                    *self.entry(at)? = ZEROED;
                    self.changed = true;
                }
                _ => self.write_at(at, &zeroed(step as usize)?)?,
            }
            at += step;
        }
        Ok(())
    }

    fn discard(&mut self, _: u64, _: u64) -> BlockResult<()> {
        Ok(())
    }

    fn set_size(&mut self, size: u64) -> BlockResult<()> {
        if size == self.size { Ok(()) } else { Err(ErrorKind::Unsupported.into()) }
    }

    fn flush(&mut self) -> BlockResult<()> {
        for part in &mut self.parts {
            let file = part.file.as_mut().unwrap_or(&mut self.main);
            if let Some(tables) = &mut part.tables {
                tables.write(file)?;
            }
            file.flush()?;
        }
        self.main.flush()
    }
}
