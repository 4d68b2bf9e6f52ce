use std::collections::BTreeMap;

use instar_blockio::{BlockRead, BlockWrite, Limits, Result, ZeroMode, check_range};

/// Bytes kept at once.
const PAGE: u64 = 65536;

/// A disk in memory of which only the written pages take space, so that large images fit.
#[derive(Debug, Default)]
pub struct Sparse {
    pages: BTreeMap<u64, Box<[u8]>>,
    size: u64,
}

/// The parts of a range, page by page: number, place in the page, place in the buffer, length.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let inside = (at % PAGE) as usize;
        let piece = (PAGE as usize - inside).min(len - done);
        let start = done;
        done += piece;
        (piece > 0).then_some((at / PAGE, inside, start, piece))
    })
}

impl BlockRead for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        for (page, inside, start, len) in pieces(offset, buf.len()) {
            match self.pages.get(&page) {
                Some(bytes) => buf[start..start + len].copy_from_slice(&bytes[inside..inside + len]),
                None => buf[start..start + len].fill(0),
            }
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits { grows: true, ..Limits::BYTE }
    }
}

impl BlockWrite for Sparse {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        self.size = self.size.max(offset + buf.len() as u64);
        for (page, inside, start, len) in pieces(offset, buf.len()) {
            let bytes = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
            bytes[inside..inside + len].copy_from_slice(&buf[start..start + len]);
        }
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, _: ZeroMode) -> Result<()> {
        check_range(self.size, offset, len)?;
        for (page, inside, _, len) in pieces(offset, len as usize) {
            if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[inside..inside + len].fill(0);
            }
        }
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        check_range(self.size, offset, len)
    }

    fn set_size(&mut self, size: u64) -> Result<()> {
        self.pages.retain(|page, _| page * PAGE < size);
        if let Some(bytes) = self.pages.get_mut(&(size / PAGE)) {
            bytes[(size % PAGE) as usize..].fill(0);
        }
        self.size = size;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
