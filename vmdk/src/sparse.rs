//! Sparse extents: which grain lies where, by grain directory and grain tables.

use alloc::vec::Vec;

use instar_blockio::{
    BlockRead, Codec, CompressedRun, Error as BlockError, ErrorKind, ExtentKind, FileId, Result as BlockResult,
};

use crate::error::{Error, Result};
use crate::format::{
    COWD_MAGIC, DIRECTORY_AT_END, FLAG_MARKERS, FLAG_SECOND, FLAG_ZEROED, Fields, HOSTED_MAGIC, HostedHeader,
    MARKER_FOOTER, MARKER_LEN, SE_MAGIC, SE_VERSION, SE_VOLATILE_MAGIC, SECTOR, TABLE_ENTRIES, ZEROED,
};
use crate::pages::Pages;

/// Sectors of a grain, at most, by QEMU.
const MAX_GRAIN: u64 = 1 << 21;
/// Sectors of a compressed grain, at most: it is decompressed in one piece.
const MAX_COMPRESSED_GRAIN: u64 = 4096;
/// Entries of a grain directory, at most, by QEMU.
const MAX_DIRECTORY: u64 = 32 << 20;
/// Entries of a COWD grain table.
const COWD_TABLE: u64 = 4096;
/// Entries of a seSparse grain table, and sectors of its grains.
const SE_TABLE: u64 = 4096;
const SE_GRAIN: u64 = 8;

/// Where things lie in a sparse extent; bytes, if nothing else is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub flavour: Flavour,
    /// Of the disk in it.
    pub capacity: u64,
    pub grain: u64,
    /// Entries of a table.
    pub table_entries: u64,
    pub directory: u64,
    /// Entries.
    pub directory_len: u64,
    pub second_directory: Option<u64>,
    pub compressed: bool,
    pub markers: bool,
    /// The entry 1 stands for zeroes.
    pub zeroed: bool,
    /// The descriptor inside, if any: place and length.
    pub descriptor: Option<(u64, u64)>,
    pub version: u32,
}

/// The three kinds of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    Hosted,
    Cowd,
    /// Where tables and grains begin, sectors.
    Se {
        tables: u64,
        grains: u64,
    },
}

/// An entry of a table: where the grain lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    Unallocated,
    Zero,
    At(u64),
}

/// Reads what the first bytes of a file are the header of.
pub(crate) fn read_geometry<D: BlockRead>(pages: &Pages<D>) -> Result<Geometry> {
    let head = pages.read_vec(0, SECTOR as usize)?;
    let magic = Fields(&head).u32(0);
    match magic {
        HOSTED_MAGIC => hosted(pages, &head),
        COWD_MAGIC => cowd(&head),
        _ => Err(Error::ExtentMagic(magic)),
    }
}

fn sectors(count: u64) -> Result<u64> {
    count.checked_mul(SECTOR).filter(|&bytes| bytes <= i64::MAX as u64).ok_or(Error::SizeOverflow)
}

fn grain_len(sectors: u64, compressed: bool) -> Result<u64> {
    let max = if compressed { MAX_COMPRESSED_GRAIN } else { MAX_GRAIN };
    if sectors == 0 || sectors > max { Err(Error::GrainSize(sectors)) } else { Ok(sectors * SECTOR) }
}

fn hosted<D: BlockRead>(pages: &Pages<D>, head: &[u8]) -> Result<Geometry> {
    let mut header = HostedHeader::parse(head);
    if header.directory == DIRECTORY_AT_END {
        header = footer(pages)?;
    }
    if header.version > 3 {
        return Err(Error::UnsupportedVersion(header.version.into()));
    }
    let table_entries = u64::from(header.table_entries);
    if table_entries > TABLE_ENTRIES || table_entries == 0 {
        return Err(Error::TableSize(table_entries));
    }
    let compressed = header.compression == 1;
    let grain = grain_len(header.grain, compressed)?;
    let capacity = sectors(header.capacity)?;
    let directory_len = capacity.div_ceil(grain * table_entries);
    if directory_len > MAX_DIRECTORY {
        return Err(Error::DirectorySize(directory_len));
    }
    let file_sectors = pages.file().size().div_ceil(SECTOR);
    if file_sectors < header.overhead {
        return Err(Error::Truncated(header.overhead.saturating_mul(SECTOR)));
    }
    let descriptor = match (header.descriptor, header.descriptor_len) {
        (0, _) | (_, 0) => None,
        (at, len) => Some((sectors(at)?, sectors(len)?)),
    };
    let second = match header.flags & FLAG_SECOND {
        0 => None,
        _ => Some(sectors(header.second_directory)?).filter(|&at| at != 0),
    };
    Ok(Geometry {
        flavour: Flavour::Hosted,
        capacity,
        grain,
        table_entries,
        directory: sectors(header.directory)?,
        directory_len,
        second_directory: second,
        compressed,
        markers: header.flags & FLAG_MARKERS != 0,
        zeroed: header.flags & FLAG_ZEROED != 0,
        descriptor,
        version: header.version,
    })
}

/// The header at the end of a stream: a marker, the header, the marker of the end.
fn footer<D: BlockRead>(pages: &Pages<D>) -> Result<HostedHeader> {
    let end = pages.file().size().next_multiple_of(SECTOR);
    let start = end.checked_sub(3 * SECTOR).ok_or(Error::Footer)?;
    let bytes = pages.read_vec(start, 3 * SECTOR as usize)?;
    let fields = Fields(&bytes);
    let (header, last) = (SECTOR as usize, 2 * SECTOR as usize);
    let sound = fields.u32(8) == 0
        && fields.u32(12) == MARKER_FOOTER
        && fields.u32(header) == HOSTED_MAGIC
        && fields.u64(last) == 0
        && fields.u64(last + 8) == 0;
    let header = HostedHeader::parse(&bytes[header..]);
    // A footer that points to a footer again would be none.
    if sound && header.directory != DIRECTORY_AT_END { Ok(header) } else { Err(Error::Footer) }
}

fn cowd(head: &[u8]) -> Result<Geometry> {
    let fields = Fields(head);
    let directory_len = u64::from(fields.u32(24));
    if directory_len > MAX_DIRECTORY {
        return Err(Error::DirectorySize(directory_len));
    }
    Ok(Geometry {
        flavour: Flavour::Cowd,
        capacity: sectors(fields.u32(12).into())?,
        grain: grain_len(fields.u32(16).into(), false)?,
        table_entries: COWD_TABLE,
        directory: sectors(fields.u32(20).into())?,
        directory_len,
        second_directory: None,
        compressed: false,
        markers: false,
        zeroed: false,
        descriptor: None,
        version: fields.u32(4),
    })
}

/// Reads the headers of a seSparse extent.
pub(crate) fn read_se_sparse<D: BlockRead>(pages: &Pages<D>) -> Result<Geometry> {
    let head = pages.read_vec(0, SECTOR as usize)?;
    let fields = Fields(&head);
    if fields.u64(0) != SE_MAGIC {
        return Err(Error::ExtentMagic(fields.u32(0)));
    }
    if fields.u64(8) != SE_VERSION {
        return Err(Error::UnsupportedVersion(fields.u64(8)));
    }
    // Grain size, table size, flags, four reserved numbers.
    let fixed = [(24, SE_GRAIN), (32, SE_TABLE * 8 / SECTOR), (40, 0), (48, 0), (56, 0), (64, 0), (72, 0)];
    if let Some((at, _)) = fixed.into_iter().find(|&(at, value)| fields.u64(at) != value) {
        return Err(Error::SeSparse(at as u64));
    }
    let volatile = pages.read_vec(sectors(fields.u64(80))?, SECTOR as usize)?;
    let volatile = Fields(&volatile);
    if volatile.u64(0) != SE_VOLATILE_MAGIC {
        return Err(Error::SeSparse(80));
    }
    if volatile.0.get(24).is_some_and(|&replay| replay != 0) {
        return Err(Error::SeSparseDirty);
    }
    let directory_len = fields.u64(136).saturating_mul(SECTOR / 8);
    if directory_len > MAX_DIRECTORY {
        return Err(Error::DirectorySize(directory_len));
    }
    Ok(Geometry {
        flavour: Flavour::Se { tables: fields.u64(144), grains: fields.u64(192) },
        capacity: sectors(fields.u64(16))?,
        grain: SE_GRAIN * SECTOR,
        table_entries: SE_TABLE,
        directory: sectors(fields.u64(128))?,
        directory_len,
        second_directory: None,
        compressed: false,
        markers: false,
        zeroed: false,
        descriptor: None,
        version: 2,
    })
}

impl Geometry {
    /// Bytes of an entry of directory and tables.
    fn entry_len(&self) -> u64 {
        if matches!(self.flavour, Flavour::Se { .. }) { 8 } else { 4 }
    }

    /// Bytes of the disk that a table describes.
    pub fn table_span(&self) -> u64 {
        self.grain * self.table_entries
    }

    fn entry(&self, bytes: &[u8]) -> u64 {
        let fields = Fields(bytes);
        if self.entry_len() == 8 { fields.u64(0) } else { fields.u32(0).into() }
    }

    /// Where the table is that an entry of the directory means; `None` for no table.
    fn table_at(&self, entry: u64) -> BlockResult<Option<u64>> {
        let Flavour::Se { tables, .. } = self.flavour else {
            return Ok(Some(entry * SECTOR).filter(|&at| at != 0));
        };
        if entry == 0 {
            return Ok(None);
        }
        let number = entry & 0xffff_ffff;
        let sector = tables.checked_add(number * (SE_TABLE * 8 / SECTOR));
        match sector.and_then(|sector| sector.checked_mul(SECTOR)) {
            Some(at) if entry >> 32 == 0x1000_0000 => Ok(Some(at)),
            _ => Err(ErrorKind::Corrupt.into()),
        }
    }

    /// What an entry of a table means.
    pub fn grain(&self, entry: u64) -> BlockResult<Grain> {
        let Flavour::Se { grains, .. } = self.flavour else {
            return Ok(match entry {
                0 => Grain::Unallocated,
                entry if self.zeroed && entry == u64::from(ZEROED) => Grain::Zero,
                entry => Grain::At(entry * SECTOR),
            });
        };
        let corrupt = BlockError::new(ErrorKind::Corrupt);
        match entry >> 60 {
            0 if entry == 0 => Ok(Grain::Unallocated),
            1 | 2 => Ok(Grain::Zero),
            3 => {
                let number = (entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12;
                let sector = number.checked_mul(SE_GRAIN).and_then(|sector| sector.checked_add(grains));
                sector.and_then(|sector| sector.checked_mul(SECTOR)).map(Grain::At).ok_or(corrupt)
            }
            _ => Err(corrupt),
        }
    }

    /// The table for an entry of the directory. A first directory that points behind the end of the file is given up for the second.
    pub fn find_table<D: BlockRead>(&self, pages: &Pages<D>, index: u64) -> BlockResult<Option<u64>> {
        let place =
            |directory: u64| directory.checked_add(index * self.entry_len()).ok_or(BlockError::new(ErrorKind::Corrupt));
        let read = |directory: u64| {
            let mut bytes = [0; 8];
            let bytes = &mut bytes[..self.entry_len() as usize];
            pages.read(place(directory)?, bytes)?;
            self.table_at(self.entry(bytes))
        };
        if index >= self.directory_len {
            return Err(BlockError::new(ErrorKind::Corrupt).at(self.directory));
        }
        match (read(self.directory)?, self.second_directory) {
            (Some(at), Some(second)) if at >= pages.file().size() => read(second),
            (found, _) => Ok(found),
        }
    }

    /// Bytes without a table from the entry `index` of the directory on, as far as a look at one page tells.
    pub fn missing_tables<D: BlockRead>(&self, pages: &Pages<D>, index: u64, max: u64) -> BlockResult<u64> {
        let (len, at) = (self.entry_len(), self.directory.saturating_add(index * self.entry_len()));
        let most = max.div_ceil(self.table_span()).min(self.directory_len - index).max(1);
        let count = pages.view(at, |bytes| {
            let entries = bytes.chunks_exact(len as usize).take(usize::try_from(most).unwrap_or(usize::MAX));
            entries.take_while(|entry| entry.iter().all(|&byte| byte == 0)).count() as u64
        })?;
        Ok(count.max(1))
    }

    /// The entries of the table at `at`; what lies behind the end of the file is zero.
    pub fn read_table<D: BlockRead>(&self, pages: &Pages<D>, at: u64) -> BlockResult<Vec<u64>> {
        let len = self.entry_len();
        let bytes = pages.read_vec(at, (len * self.table_entries) as usize)?;
        Ok(bytes.chunks_exact(len as usize).map(|entry| self.entry(entry)).collect())
    }

    /// The run at `offset` of the extent: its length (at most `max`) and what lies there. Offsets in `Compressed` count from the
    /// start of the extent.
    pub fn locate<D: BlockRead>(
        &self,
        pages: &Pages<D>,
        file: FileId,
        offset: u64,
        max: u64,
        strict: bool,
    ) -> BlockResult<(u64, ExtentKind)> {
        let index = offset / self.table_span();
        let Some(table) = self.find_table(pages, index)? else {
            let span = self.missing_tables(pages, index, max)?.saturating_mul(self.table_span());
            let skip = offset % self.table_span();
            return Ok((max.min(span - skip), ExtentKind::Unallocated));
        };
        let (file_len, entry_len) = (pages.file().size(), self.entry_len());
        if strict && table.saturating_add(entry_len * self.table_entries) > file_len {
            return Err(BlockError::new(ErrorKind::Corrupt).at(table));
        }
        let first = offset / self.grain % self.table_entries;
        let at = table.checked_add(first * entry_len).ok_or(BlockError::new(ErrorKind::Corrupt).at(table))?;
        let skip = offset % self.grain;
        let left = (self.table_entries - first) as usize;
        let run = pages.view(at, |bytes| {
            let mut entries =
                bytes.chunks_exact(entry_len as usize).take(left).map(|entry| self.grain(self.entry(entry)));
            // What lies behind the end of the file reads as zero: not allocated.
            let start = entries.next().unwrap_or(Ok(Grain::Unallocated))?;
            let mut count = 1u64;
            match start {
                Grain::At(host) if self.compressed => {
                    let next = entries.find_map(|entry| match entry {
                        Ok(Grain::At(next)) => Some(next),
                        _ => None,
                    });
                    return Ok((start, 1, next.filter(|&next| next > host)));
                }
                Grain::At(host) => {
                    let wanted = skip.saturating_add(max);
                    while count * self.grain < wanted
                        && let Some(Ok(Grain::At(next))) = entries.next()
                        && host.checked_add(count * self.grain) == Some(next)
                    {
                        count += 1;
                    }
                }
                _ => {
                    while let Some(Ok(next)) = entries.next()
                        && next == start
                    {
                        count += 1;
                    }
                }
            }
            Ok((start, count, None))
        })?;
        let (start, count, next) = run.map_err(|error: BlockError| error.at(at))?;
        let len = max.min(count * self.grain - skip);
        let kind = match start {
            Grain::Unallocated => ExtentKind::Unallocated,
            Grain::Zero => ExtentKind::Zero { host: None },
            Grain::At(host) if strict && host >= file_len => return Err(BlockError::new(ErrorKind::Corrupt).at(host)),
            Grain::At(host) if self.compressed => {
                let most = 2 * self.grain;
                let end = next.map_or(most, |next| (next - host).min(most)).saturating_add(host).min(file_len);
                let start = host + if self.markers { MARKER_LEN } else { 0 };
                if end <= start {
                    return Err(BlockError::new(ErrorKind::Corrupt).at(host));
                }
                ExtentKind::Compressed(CompressedRun {
                    file,
                    host: start,
                    // Both fit: a compressed grain has 2 MiB at most.
                    stored_len: (end - start) as u32,
                    unit_offset: offset - skip,
                    unit_len: self.grain as u32,
                    codec: Codec::Zlib,
                })
            }
            Grain::At(host) => {
                let host = host.checked_add(skip).filter(|host| host.checked_add(len).is_some());
                ExtentKind::Data { file, host: host.ok_or(BlockError::new(ErrorKind::Corrupt).at(at))? }
            }
        };
        Ok((len, kind))
    }
}
