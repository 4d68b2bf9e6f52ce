//! Where the bytes of the disk lie, and reading built on that.

use instar_blockio::{
    BlockMap, BlockRead, Error as BlockError, ErrorKind, Extent, ExtentKind, Limits, Result as BlockResult, check_range,
};

use crate::error::Result;
use crate::geometry::SECTOR;
use crate::header::Header;
use crate::open::{Image, NO_BLOCK};
use crate::pages::{PAGE, read_padded};

impl<D: BlockRead> Image<D> {
    /// What lies between the blocks that have a place: the parent's contents, or zeroes.
    fn absent(&self) -> ExtentKind {
        if self.has_parent() { ExtentKind::Unallocated } else { ExtentKind::Zero { host: None } }
    }

    fn locate(&self, header: &Header, offset: u64, limit: u64) -> Result<Extent> {
        let block_size = u64::from(header.block_size);
        let (block, skip) = (offset / block_size, offset % block_size);
        let at = header.table_offset + block * 4;
        let extent = |len: u64, kind| Extent { offset, len: len.min(limit), depth: 0, kind };
        // An entry may lie across two pages, since the table may begin anywhere.
        let mut entry = [0; 4];
        self.pages.read(at, &mut entry)?;
        let entry = u32::from_be_bytes(entry);
        if entry == NO_BLOCK {
            let wanted = (skip + limit).div_ceil(block_size);
            let blocks = self.pages.view(at, |view| {
                let entries = view.as_chunks::<4>().0.iter().take(usize::try_from(wanted).unwrap_or(usize::MAX));
                entries.take_while(|entry| **entry == [0xff; 4]).count() as u64
            })?;
            return Ok(extent(blocks.max(1) * block_size - skip, self.absent()));
        }
        let place = u64::from(entry) * SECTOR;
        let kind = ExtentKind::Data { file: self.id, host: place + header.bitmap_len() + skip };
        if !self.has_parent() {
            return Ok(extent(block_size - skip, kind));
        }
        let wanted = ((block_size - skip).min(limit) + skip % SECTOR).div_ceil(SECTOR);
        let first = skip / SECTOR;
        let (here, sectors) = self.pages.view(place + first / 8, |view| bit_run(view, first % 8, wanted))?;
        let len = (sectors * SECTOR - skip % SECTOR).min(block_size - skip);
        Ok(extent(len, if here { kind } else { ExtentKind::Unallocated }))
    }
}

/// The value of the bit at `from` (counted from the highest of the first byte), and how many are like it: `1..=wanted`, as far as
/// the bytes go. There is one byte at least.
fn bit_run(bytes: &[u8], from: u64, wanted: u64) -> (bool, u64) {
    let bit = |at: u64| bytes.get((at / 8) as usize).map(|byte| byte & (0x80 >> (at % 8)) != 0);
    let value = bit(from).unwrap_or(false);
    let whole = if value { 0xff } else { 0 };
    let mut at = from + 1;
    let end = from + wanted;
    while at < end {
        match bytes.get((at / 8) as usize) {
            Some(byte) if at.is_multiple_of(8) && *byte == whole => at += 8,
            Some(_) if bit(at) == Some(value) => at += 1,
            _ => break,
        }
    }
    (value, at.min(end).max(from + 1) - from)
}

impl<D: BlockRead> BlockMap for Image<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> BlockResult<Extent> {
        if max_len == 0 {
            return Err(BlockError::new(ErrorKind::InvalidInput).at(offset));
        }
        check_range(self.virtual_size(), offset, 1)?;
        let limit = max_len.min(self.virtual_size() - offset);
        match &self.header {
            Some(header) => Ok(self.locate(header, offset, limit)?),
            None => {
                // A disk may be longer than its file: there is nothing to be looked for behind the end.
                let (len, kind) = match self.pages.file().size().checked_sub(offset) {
                    None | Some(0) => (limit, ExtentKind::Zero { host: Some((self.id, offset)) }),
                    Some(left) => (limit.min(left), ExtentKind::Data { file: self.id, host: offset }),
                };
                Ok(Extent { offset, len, depth: 0, kind })
            }
        }
    }
}

impl<D: BlockRead> BlockRead for Image<D> {
    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        check_range(self.virtual_size(), offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let extent = self.extent_at(at, rest.len() as u64)?;
            // At most as long as the rest.
            let (now, later) = rest.split_at_mut(extent.len as usize);
            match extent.kind {
                ExtentKind::Data { host, .. } => read_padded(self.pages.file(), host, now)?,
                _ => now.fill(0),
            }
            (at, rest) = (extent.end(), later);
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.pages.file().limits()
    }
}

/// A page holds many entries.
const _: () = assert!(PAGE >= 4096);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits_from_the_highest() {
        let bytes = [0b1110_0000, 0xff, 0xff, 0b1000_0000, 0, 0];
        assert_eq!(bit_run(&bytes, 0, 100), (true, 3));
        assert_eq!(bit_run(&bytes, 2, 100), (true, 1));
        assert_eq!(bit_run(&bytes, 3, 100), (false, 5));
        assert_eq!(bit_run(&bytes[1..], 0, 100), (true, 17));
        assert_eq!(bit_run(&bytes[1..], 0, 12), (true, 12));
        assert_eq!(bit_run(&bytes[3..], 1, 1000), (false, 23));
        assert_eq!(bit_run(&bytes[3..], 0, 1), (true, 1));
    }
}
