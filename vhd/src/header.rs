//! The dynamic disk header: chapter "Dynamic Disk Header Format" of the specification.

use alloc::string::String;
use alloc::vec::Vec;

use instar_blockio::{BlockRead, zeroed};

use crate::error::{Error, Result};
use crate::footer::{bytes_at, checksum};
use crate::locator::{ParentLocator, bare_name, utf16_be};
use crate::pages::read_padded;

/// Bytes of the header.
pub(crate) const HEADER: usize = 1024;
const CHECKSUM_AT: usize = 36;
const NAME_AT: usize = 64;
const NAME_LEN: usize = 512;
const LOCATORS: usize = 8;
/// Bytes of a parent locator that are looked at: no path is longer.
const MAX_LOCATOR: u32 = 64 << 10;

/// What the header says, checked for what would make the image unreadable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Offset of the block allocation table, bytes.
    pub table_offset: u64,
    /// Its entries.
    pub entries: u32,
    /// Bytes of a block, a power of two of 512 at least.
    pub block_size: u32,
    /// Its checksum is right. Readers take it either way, as QEMU does.
    pub checksum_ok: bool,
    /// Identity of the parent.
    pub parent_uuid: [u8; 16],
    /// Modification time of the parent's file in seconds since 2000, as the creator saw it.
    pub parent_timestamp: u32,
    /// Name of the parent.
    pub parent_name: String,
    raw: Vec<u8>,
}

impl Header {
    /// Reads the header at `at`.
    pub(crate) fn read<D: BlockRead>(file: &D, at: u64) -> Result<Self> {
        let end = at.checked_add(HEADER as u64).ok_or(Error::Header(at))?;
        if end > file.size() {
            return Err(Error::Header(at));
        }
        let mut raw = zeroed(HEADER)?;
        read_padded(file, at, &mut raw)?;
        if !raw.starts_with(b"cxsparse") {
            return Err(Error::HeaderMark);
        }
        let name = utf16_be(&raw[NAME_AT..NAME_AT + NAME_LEN]);
        let header = Self {
            table_offset: u64::from_be_bytes(bytes_at(&raw, 16)),
            entries: u32::from_be_bytes(bytes_at(&raw, 28)),
            block_size: u32::from_be_bytes(bytes_at(&raw, 32)),
            checksum_ok: u32::from_be_bytes(bytes_at(&raw, CHECKSUM_AT)) == checksum(&raw, CHECKSUM_AT),
            parent_uuid: bytes_at(&raw, 40),
            parent_timestamp: u32::from_be_bytes(bytes_at(&raw, 56)),
            parent_name: name,
            raw,
        };
        if !header.block_size.is_power_of_two() || header.block_size < 512 {
            return Err(Error::BlockSize(header.block_size));
        }
        Ok(header)
    }

    /// The header of a new image without parent.
    pub(crate) fn encode(table_offset: u64, entries: u32, block_size: u32) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(b"cxsparse");
        bytes[8..16].fill(0xff);
        bytes[16..24].copy_from_slice(&table_offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&0x1_0000u32.to_be_bytes());
        bytes[28..32].copy_from_slice(&entries.to_be_bytes());
        bytes[32..36].copy_from_slice(&block_size.to_be_bytes());
        let sum = checksum(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Bytes of the sector bitmap in front of a block: whole sectors.
    pub fn bitmap_len(&self) -> u64 {
        u64::from(self.block_size).div_ceil(512 * 8).next_multiple_of(512)
    }

    /// The names under which to look for the parent, best first and without repetition.
    pub(crate) fn parent_names<D: BlockRead>(&self, file: &D) -> Result<Vec<String>> {
        let mut locators = Vec::new();
        for number in 0..LOCATORS {
            let entry = 576 + 24 * number;
            let len = u32::from_be_bytes(bytes_at(&self.raw, entry + 8)).min(MAX_LOCATOR);
            let at = u64::from_be_bytes(bytes_at(&self.raw, entry + 16));
            // A locator outside of the file names nothing; another one may.
            if len == 0 || at.checked_add(len.into()).is_none_or(|end| end > file.size()) {
                continue;
            }
            let mut data = zeroed(len as usize)?;
            read_padded(file, at, &mut data)?;
            locators.extend(ParentLocator::parse(bytes_at(&self.raw, entry), &data));
        }
        let mut names: Vec<String> = Vec::new();
        let mut add = |name: String| {
            if !name.is_empty() && !names.contains(&name) {
                names.push(name);
            }
        };
        locators.iter().filter_map(ParentLocator::relative).for_each(&mut add);
        locators.iter().map(ParentLocator::file_name).for_each(&mut add);
        add(bare_name(&self.parent_name));
        Ok(names)
    }
}
