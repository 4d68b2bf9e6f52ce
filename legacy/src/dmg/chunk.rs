//! Tables of chunks.

use alloc::vec::Vec;

use instar_blockio::{BlockRead, zeroed};

use super::Error;
use super::trailer::Part;
use crate::store::read_padded;

/// Most bytes that a chunk may take in the file (QEMU's limit).
const MAX_LEN: u64 = 64 << 20;
/// Most sectors that a chunk may have (QEMU's limit), unless it holds only zeroes.
const MAX_SECTORS: u64 = MAX_LEN / 512;
/// Most chunks that are kept, 40 bytes each. QEMU has no limit.
const MAX_CHUNKS: usize = 1 << 20;
/// Most bytes of a resource; as for property lists.
const MAX_RESOURCE: u32 = 16 << 20;
/// Kinds of unreadable chunks that are told apart.
const MAX_KINDS: usize = 16;

const MISH: &[u8] = b"mish";
/// Bytes of a table before its chunks.
const TABLE_HEADER: usize = 204;
/// Bytes of the smallest table: of one chunk.
const MIN_TABLE: usize = 244;
const ENTRY: usize = 40;

/// A run of sectors that is stored in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub kind: Kind,
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub count: u64,
    /// Where in the file, bytes.
    pub offset: u64,
    /// Bytes in the file.
    pub len: u64,
}

/// How a chunk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Zero,
    Plain,
    Zlib,
}

/// What the type of a chunk means.
enum Meaning {
    Stored(Kind),
    /// A comment, or the end of a table.
    Nothing,
    Unreadable,
}

fn meaning(kind: u32) -> Meaning {
    match kind {
        0 | 2 => Meaning::Stored(Kind::Zero),
        1 => Meaning::Stored(Kind::Plain),
        0x8000_0005 => Meaning::Stored(Kind::Zlib),
        0x7fff_fffe | 0xffff_ffff => Meaning::Nothing,
        _ => Meaning::Unreadable,
    }
}

/// The chunks found so far.
pub(super) struct Chunks {
    data_fork: u64,
    pub chunks: Vec<Chunk>,
    pub unreadable: Vec<u32>,
}

impl Chunks {
    pub fn new(data_fork: u64) -> Self {
        Self { data_fork, chunks: Vec::new(), unreadable: Vec::new() }
    }

    /// Adds the chunks of a table; what is no table is passed over.
    pub fn add(&mut self, table: &[u8]) -> Result<(), Error> {
        let u32_at = |bytes: &[u8], at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let u64_at = |bytes: &[u8], at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        if table.len() < MIN_TABLE || !table.starts_with(MISH) {
            return Ok(());
        }
        let first_sector = u64_at(table, 8);
        let data_offset = u64_at(table, 0x18).wrapping_add(self.data_fork);
        for entry in table[TABLE_HEADER..].chunks_exact(ENTRY) {
            let stored = u32_at(entry, 0);
            let kind = match meaning(stored) {
                Meaning::Stored(kind) => kind,
                Meaning::Nothing => continue,
                Meaning::Unreadable => {
                    if !self.unreadable.contains(&stored) && self.unreadable.len() < MAX_KINDS {
                        self.unreadable.push(stored);
                    }
                    continue;
                }
            };
            // As QEMU reckons: in 64 bits, whatever comes of it. Places are checked when they are used.
            self.push(Chunk {
                kind,
                sector: u64_at(entry, 8).wrapping_add(first_sector),
                count: u64_at(entry, 0x10),
                offset: u64_at(entry, 0x18).wrapping_add(data_offset),
                len: u64_at(entry, 0x20),
            })?;
        }
        Ok(())
    }

    fn push(&mut self, chunk: Chunk) -> Result<(), Error> {
        let number = self.chunks.len() as u32;
        if chunk.kind != Kind::Zero && chunk.count > MAX_SECTORS {
            return Err(Error::ChunkSectors { chunk: number, count: chunk.count });
        }
        if chunk.len > MAX_LEN {
            return Err(Error::ChunkLength { chunk: number, len: chunk.len });
        }
        if self.chunks.len() >= MAX_CHUNKS || self.chunks.try_reserve(1).is_err() {
            return Err(Error::TooManyChunks);
        }
        self.chunks.push(chunk);
        Ok(())
    }
}

/// Finds the tables in the data of a resource fork, each behind its length.
pub(super) fn read_resource_fork<D: BlockRead>(file: &D, fork: Part, found: &mut Chunks) -> Result<(), Error> {
    let u32_at = |at: u64| -> Result<u32, Error> {
        let mut bytes = [0; 4];
        read_padded(file, at, &mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    };
    // The fork ends before the trailer, so nothing overflows.
    let data = u64::from(u32_at(fork.offset)?);
    let len = u64::from(u32_at(fork.offset + 8)?);
    if data > fork.len || len == 0 || data + len > fork.len {
        return Err(Error::Resource(fork.offset));
    }
    let mut at = fork.offset + data;
    let end = at + len;
    while at < end {
        let len = u32_at(at)?;
        if len == 0 || u64::from(len) > end - at || len > MAX_RESOURCE {
            return Err(Error::Resource(at));
        }
        let mut table = zeroed(len as usize)?;
        read_padded(file, at + 4, &mut table)?;
        found.add(&table)?;
        at += 4 + u64::from(len);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table for sectors from 100 on, with entries of type, sector, count, offset, length.
    pub(crate) fn table(entries: &[(u32, [u64; 4])]) -> Vec<u8> {
        let mut bytes = vec![0; TABLE_HEADER];
        bytes[..4].copy_from_slice(MISH);
        bytes[8..16].copy_from_slice(&100u64.to_be_bytes());
        bytes[0x18..0x20].copy_from_slice(&7u64.to_be_bytes());
        for (kind, numbers) in entries {
            bytes.extend(kind.to_be_bytes());
            bytes.extend([0; 4]);
            numbers.iter().for_each(|number| bytes.extend(number.to_be_bytes()));
        }
        bytes
    }

    #[test]
    fn entries() {
        let mut found = Chunks::new(1000);
        found
            .add(&table(&[
                (0x8000_0005, [0, 8, 10, 20]),
                (0x8000_0004, [8, 8, 30, 20]),
                (0x8000_0004, [16, 8, 30, 20]),
                (0x7fff_fffe, [0; 4]),
                (2, [24, u64::MAX, 0, 0]),
                (0xffff_ffff, [0; 4]),
            ]))
            .unwrap();
        let zlib = Chunk { kind: Kind::Zlib, sector: 100, count: 8, offset: 1017, len: 20 };
        let zero = Chunk { kind: Kind::Zero, sector: 124, count: u64::MAX, offset: 1007, len: 0 };
        assert_eq!((found.chunks.as_slice(), found.unreadable.as_slice()), (&[zlib, zero][..], &[0x8000_0004][..]));
        found.add(&table(&[])).unwrap();
        found.add(b"mosh").unwrap();
        assert_eq!(found.chunks.len(), 2);
    }

    #[test]
    fn limits() {
        let mut found = Chunks::new(0);
        let mut error = |entry| found.add(&table(&[entry])).unwrap_err();
        assert_eq!(error((1, [0, 131_073, 0, 0])), Error::ChunkSectors { chunk: 0, count: 131_073 });
        assert_eq!(error((1, [0, 131_072, 0, MAX_LEN + 1])), Error::ChunkLength { chunk: 0, len: MAX_LEN + 1 });
        found.add(&table(&[(1, [0, 131_072, 0, MAX_LEN])])).unwrap();
    }
}
