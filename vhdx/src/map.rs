//! Where the bytes of the disk lie, and reading built on that: spec chapters 2.4 and 2.5.

use instar_blockio::{
    BlockMap, BlockRead, Error as BlockError, ErrorKind, Extent, ExtentKind, Limits, Result as BlockResult, check_range,
};

use crate::bat::{Block, bitmap_place};
use crate::error::{EntryFault, Error, LogFault, Result};
use crate::format::BAT_ENTRY;
use crate::open::Image;
use crate::pages::{PAGE, read_padded};

impl<D: BlockRead> Image<D> {
    /// As [`BlockMap::extent_at`], but with the full cause of an error.
    ///
    /// # Errors
    /// [`Error::Entry`], [`Error::Log`] or [`Error::Io`].
    pub fn locate(&self, offset: u64, max_len: u64) -> Result<Extent> {
        if max_len == 0 {
            return Err(BlockError::new(ErrorKind::InvalidInput).at(offset).into());
        }
        check_range(self.virtual_size(), offset, 1)?;
        let limit = max_len.min(self.virtual_size() - offset);
        let extent = self.run(offset, limit)?;
        let extent = match extent.kind {
            ExtentKind::Unallocated if self.is_partial(offset)? => self.sectors(offset, extent.len)?,
            _ => extent,
        };
        self.under_log(extent)
    }

    /// The run of blocks at `offset`, as far as one page of the BAT tells. A partially present block is a run of its own, which
    /// is told as unallocated.
    fn run(&self, offset: u64, limit: u64) -> Result<Extent> {
        let geometry = self.metadata.geometry;
        let first = geometry.block_of(offset);
        let start = self.regions.bat.at + geometry.entry_of(first) * BAT_ENTRY;
        let in_page = (PAGE as u64 - start % PAGE as u64) / BAT_ENTRY;
        self.pages.view(start, |view| {
            let entry_at =
                |index: u64| view.get(index as usize * 8..)?.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
            let mut run: Option<Extent> = None;
            for block in first.. {
                let from = run.map_or(offset, |run| run.end());
                let index = geometry.entry_of(block);
                let place = index - geometry.entry_of(first);
                if from - offset >= limit || place >= in_page {
                    break;
                }
                // The first entry is in the page, since the region is aligned.
                let entry = entry_at(place).unwrap_or_default();
                let len = geometry.block_start(block) + geometry.block_size() - from;
                let partial = matches!(Block::decode(entry), Block::Partial(_));
                let joined = self.kind(index, entry, geometry.in_block(from)).map(|kind| {
                    let piece = Extent { offset: from, len, depth: 0, kind };
                    match &mut run {
                        None => run = Some(piece),
                        Some(run) => return !partial && run.join(&piece),
                    }
                    !partial
                });
                match (joined, run) {
                    (Ok(true), _) => {}
                    // What lies before the fault is still good.
                    (Ok(false), _) | (Err(_), Some(_)) => break,
                    (Err(error), None) => return Err(error),
                }
            }
            let run = run.ok_or(BlockError::new(ErrorKind::Corrupt).at(offset))?;
            Ok(Extent { len: run.len.min(limit), ..run })
        })?
    }

    fn kind(&self, index: u64, entry: u64, skip: u64) -> Result<ExtentKind> {
        Ok(match self.rules().check(index, entry)?.map(|_| Block::decode(entry)) {
            Some(Block::Full(place)) => ExtentKind::Data { file: self.id, host: place + skip },
            Some(_) => ExtentKind::Unallocated,
            None => match Block::decode(entry) {
                Block::NotPresent => ExtentKind::Unallocated,
                _ => ExtentKind::Zero { host: None },
            },
        })
    }

    /// The BAT entry of an index.
    fn entry(&self, index: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.pages.read(self.regions.bat.at + index * BAT_ENTRY, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn is_partial(&self, offset: u64) -> Result<bool> {
        if !self.has_parent() {
            return Ok(false);
        }
        let geometry = self.metadata.geometry;
        Ok(matches!(Block::decode(self.entry(geometry.entry_of(geometry.block_of(offset)))?), Block::Partial(_)))
    }

    /// The run of sectors at `offset` of a partially present block that are all here or all with the parent.
    fn sectors(&self, offset: u64, limit: u64) -> Result<Extent> {
        let geometry = self.metadata.geometry;
        let block = geometry.block_of(offset);
        let index = geometry.entry_of(block);
        let entry = self.entry(index)?;
        let Block::Partial(place) = Block::decode(entry) else {
            return Err(BlockError::new(ErrorKind::Corrupt).at(offset).into());
        };
        let bitmap_index = geometry.bitmap_entry_of(block);
        let bitmap_entry = self.entry(bitmap_index)?;
        self.rules().check(bitmap_index, bitmap_entry)?;
        let fault = EntryFault::NoBitmap;
        let bitmap = bitmap_place(bitmap_entry).ok_or(Error::Entry { index, entry, fault })?;
        let bit = geometry.bit_of(offset);
        let sector = geometry.sector_size();
        let wanted = (offset % sector + limit).div_ceil(sector);
        let (here, count) = self.pages.view(bitmap + bit / 8, |view| bit_run(view, bit % 8, wanted))?;
        let len = (count * sector - offset % sector).min(limit);
        let kind = match here {
            true => ExtentKind::Data { file: self.id, host: place + geometry.in_block(offset) },
            false => ExtentKind::Unallocated,
        };
        Ok(Extent { offset, len, depth: 0, kind })
    }

    /// Cuts a run of data where the log changes the payload. Writers only log metadata; zeroes are understood all the same.
    fn under_log(&self, extent: Extent) -> Result<Extent> {
        let ExtentKind::Data { host, .. } = extent.kind else { return Ok(extent) };
        match self.pages.file().first_change(host, extent.len) {
            None => Ok(extent),
            Some((area, _)) if area.at > host => Ok(Extent { len: area.at - host, ..extent }),
            Some((area, true)) => Ok(Extent { len: area.len, kind: ExtentKind::Zero { host: None }, ..extent }),
            Some((area, false)) => Err(LogFault::Payload(area.at).into()),
        }
    }
}

/// The value of the bit `first` of the first byte, and how many bits from there on have it, at most `wanted`.
fn bit_run(bytes: &[u8], first: u64, wanted: u64) -> (bool, u64) {
    let value = bytes.first().is_some_and(|byte| byte >> first & 1 == 1);
    let differing = |byte: u8| if value { !byte } else { byte };
    let head = bytes.first().map_or(0, |byte| differing(*byte) >> first);
    if head != 0 {
        return (value, u64::from(head.trailing_zeros()).min(wanted));
    }
    let mut count = 8 - first;
    for byte in bytes.iter().skip(1).map(|byte| differing(*byte)) {
        if count >= wanted {
            break;
        }
        if byte != 0 {
            count += u64::from(byte.trailing_zeros());
            break;
        }
        count += 8;
    }
    (value, count.min(wanted))
}

impl<D: BlockRead> BlockMap for Image<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> BlockResult<Extent> {
        Ok(self.locate(offset, max_len)?)
    }
}

impl<D: BlockRead> BlockRead for Image<D> {
    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        check_range(self.size(), offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let extent = self.locate(at, rest.len() as u64)?;
            let (now, later) = rest.split_at_mut(extent.len as usize);
            match extent.kind {
                ExtentKind::Data { host, .. } => read_padded(self.pages.file().raw(), host, now)?,
                _ => now.fill(0),
            }
            (at, rest) = (at + extent.len, later);
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits::BYTE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits() {
        // Lowest bit first: 0000 1111 1111 1111 0000 0000 1…
        let bytes = [0xf0, 0xff, 0, 1];
        assert_eq!(bit_run(&bytes, 0, 99), (false, 4));
        assert_eq!(bit_run(&bytes, 3, 99), (false, 1));
        assert_eq!(bit_run(&bytes, 4, 99), (true, 12));
        assert_eq!(bit_run(&bytes, 4, 5), (true, 5));
        assert_eq!(bit_run(&bytes[1..], 7, 99), (true, 1));
        assert_eq!(bit_run(&bytes[2..], 1, 99), (false, 7));
        assert_eq!(bit_run(&bytes[3..], 0, 99), (true, 1));
        assert_eq!(bit_run(&bytes[3..], 1, 99), (false, 7));
        assert_eq!(bit_run(&[], 3, 99), (false, 5));
    }
}
