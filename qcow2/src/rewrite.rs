//! Writing the header of an existing image anew: its fields, the extensions and the backing file name.
//!
//! A device writes single sectors indivisibly, and all fields lie in the first one. What reaches over several sectors
//! is first staged further back in the first cluster, where nothing is:
//!
//! ```text
//! old      header │ extensions │ name │ …
//! staged   header │ extensions │ name │ …  │ new extensions │ new name     flush
//! switched header ─────────────────────────►                               flush
//! written  …      │ new extensions │ name  │ new extensions │ new name     flush
//! done     header │ new extensions │ name  │ (zeroes)
//! ```
//!
//! The header of version 3 may be longer than its known fields, so it can point to the staged extensions.

use alloc::vec::Vec;

use instar_blockio::{self as blockio, BlockWrite, zeroed};

use crate::error::Error;
use crate::extension::FeatureName;
use crate::format::{HEADER_LEN, HEADER_LEN_V2, MAX_CLUSTER_WITHOUT_NAMES, RawHeader};
use crate::header::Header;
use crate::write::Writer;

/// What a device writes as a whole, bytes.
const SECTOR: usize = 512;
const BACKING_OFFSET_AT: usize = core::mem::offset_of!(RawHeader, backing_file_offset);
const HEADER_LENGTH_AT: usize = core::mem::offset_of!(RawHeader, header_length);

impl<D: BlockWrite> Writer<D> {
    /// Writes the first cluster of an existing image from the header, the extensions and the backing file name as they stand
    /// in memory, as QEMU does: known fields, unknown fields as they were, extensions in their order with a new feature
    /// name table, name, zeroes. A crash leaves the old header or the new one.
    pub(crate) fn rewrite_header(&mut self) -> Result<(), Error> {
        let size = self.header.geometry.cluster_size() as usize;
        let mut old = zeroed(size)?;
        self.main.read(0, &mut old)?;
        let unknown = unknown_fields(&old)?;
        let v3 = self.header.version >= 3;
        self.header.header_len = if v3 { HEADER_LEN + unknown.len() } else { HEADER_LEN_V2 } as u32;
        let names = v3 && size as u64 > MAX_CLUSTER_WITHOUT_NAMES;
        self.extensions.feature_names = if names { FeatureName::defaults() } else { Vec::new() };
        (self.header.backing_offset, self.header.backing_len) = (0, 0);
        let mut new = self.first_cluster()?;
        if v3 {
            new[HEADER_LEN..HEADER_LEN + unknown.len()].copy_from_slice(&unknown);
        }
        self.barrier()?;
        Ok(self.replace_first_cluster(&old, &new)?)
    }

    fn replace_first_cluster(&mut self, old: &[u8], new: &[u8]) -> blockio::Result<()> {
        let changed = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate().filter(|(_, (old, new))| old != new);
        let changed: Vec<usize> = changed.map(|(sector, _)| sector * SECTOR).collect();
        let staging = if changed.len() > 1 { self.stage(old, new) } else { None };
        if let Some(Staging { at, bytes, head }) = &staging {
            self.main.write(*at as u64, bytes)?;
            self.main.flush()?;
            self.main.write(0, head)?;
            self.main.flush()?;
        }
        let staged = staging.as_ref().map_or(usize::MAX, |staging| staging.at);
        for &at in changed.iter().filter(|&&at| at != 0 && at < staged) {
            self.main.write(at as u64, &new[at..at + SECTOR])?;
        }
        if changed.len() > 1 {
            self.main.flush()?;
        }
        if staging.is_some() || changed.first() == Some(&0) {
            self.main.write(0, &new[..SECTOR])?;
        }
        self.main.flush()?;
        if let Some(Staging { at, bytes, .. }) = staging {
            self.main.write(at as u64, &new[at..at + bytes.len()])?;
        }
        Ok(())
    }

    /// What to stage, if there is room behind the old and the new contents, and a way for the header to point there.
    fn stage(&self, old: &[u8], new: &[u8]) -> Option<Staging> {
        let used = |bytes: &[u8]| bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        let at = used(old).max(used(new)).max(SECTOR).next_multiple_of(SECTOR);
        let extensions_at = self.header.header_len as usize;
        let name_at = extensions_at + self.extensions.emit().len();
        let area = if self.header.version >= 3 {
            extensions_at..name_at + self.backing_name.len()
        } else if name_at <= SECTOR {
            // Version 2 can't move its extensions, but they lie in the first sector.
            name_at..name_at + self.backing_name.len()
        } else {
            return None;
        };
        let mut bytes = new.get(area.clone())?.to_vec();
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        if at + bytes.len() > new.len() {
            return None;
        }
        let mut head = new.get(..SECTOR)?.to_vec();
        if !self.backing_name.is_empty() {
            head[BACKING_OFFSET_AT..BACKING_OFFSET_AT + 8]
                .copy_from_slice(&((at + name_at - area.start) as u64).to_be_bytes());
        }
        if self.header.version >= 3 {
            head[HEADER_LENGTH_AT..HEADER_LENGTH_AT + 4].copy_from_slice(&(at as u32).to_be_bytes());
        }
        Some(Staging { at, bytes, head })
    }
}

/// A copy of extensions and name, and the first sector that points to it.
struct Staging {
    at: usize,
    bytes: Vec<u8>,
    head: Vec<u8>,
}

/// Header fields of `first` cluster behind the known ones.
fn unknown_fields(first: &[u8]) -> Result<Vec<u8>, Error> {
    let header = Header::parse(first)?;
    let end = if header.version >= 3 { header.header_len as usize } else { 0 };
    Ok(first.get(HEADER_LEN..end).unwrap_or_default().to_vec())
}
