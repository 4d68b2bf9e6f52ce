//! A file that a writer changes, with the length that it must have in the end.

use alloc::vec::Vec;

use instar_blockio::{BlockWrite, ErrorKind, FileId, Result, WritePart, zeroed};

/// A file below the image: the image file itself or its external data file.
///
/// `end` is where the last byte lies that belongs to the image. Places that were never written read as zero, and a
/// file that grows is set to this length at last, as if they had been written.
#[derive(Debug)]
pub(crate) struct Store<D> {
    file: D,
    pub(crate) id: FileId,
    end: u64,
}

impl<D: BlockWrite> Store<D> {
    /// A file to be filled from its beginning.
    pub(crate) fn fresh(file: D, id: FileId) -> Self {
        Self { file, id, end: 0 }
    }

    /// A file whose contents count.
    pub(crate) fn existing(file: D, id: FileId) -> Self {
        let end = file.size();
        Self { file, id, end }
    }

    /// Where the image ends in this file, bytes.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// A place of a fresh file that was never written reads as zero. A block device keeps what it held.
    pub(crate) fn is_sparse(&self) -> bool {
        self.file.limits().grows
    }

    /// Whether the file can hold bytes up to `end`.
    pub(crate) fn check_room(&self, end: u64) -> Result<()> {
        if self.is_sparse() || end <= self.file.size() { Ok(()) } else { Err(ErrorKind::NoSpace.into()) }
    }

    /// Lets the image reach to `end` at least.
    pub(crate) fn extend(&mut self, end: u64) {
        self.end = self.end.max(end);
    }

    /// Fills `buf`; what lies behind the end of the file reads as zero.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let have = usize::try_from(self.file.size().saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let (inside, behind) = buf.split_at_mut(have);
        behind.fill(0);
        if inside.is_empty() { Ok(()) } else { self.file.read_at(offset, inside) }
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.file.write_at(offset, bytes)?;
        self.extend(offset.saturating_add(bytes.len() as u64));
        Ok(())
    }

    /// Writes big-endian words, as tables have them.
    pub(crate) fn write_words(&mut self, offset: u64, words: &[u64]) -> Result<()> {
        /// Words of one request.
        const WORDS: usize = 1 << 17;
        let mut at = offset;
        for part in words.chunks(WORDS) {
            let bytes = be_bytes(part)?;
            self.write(at, &bytes)?;
            at = at.saturating_add(bytes.len() as u64);
        }
        Ok(())
    }

    /// Whether these words lie there already.
    pub(crate) fn holds_words(&self, offset: u64, words: &[u64]) -> Result<bool> {
        let mut there = zeroed(words.len() * 8)?;
        self.read(offset, &mut there)?;
        Ok(there.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).eq(words.iter().copied()))
    }

    /// Writes several pieces, in any order.
    pub(crate) fn write_many(&mut self, parts: &[WritePart<'_>]) -> Result<()> {
        self.file.write_many(parts)?;
        for part in parts {
            self.extend(part.offset.saturating_add(part.buf.len() as u64));
        }
        Ok(())
    }

    /// Writes zeroes, byte for byte.
    pub(crate) fn fill(&mut self, offset: u64, len: u64) -> Result<()> {
        let zeroes = zeroed(len.min(1 << 20) as usize)?;
        let mut done = 0;
        while done < len {
            let step = (len - done).min(zeroes.len() as u64);
            self.write(offset + done, &zeroes[..step as usize])?;
            done += step;
        }
        Ok(())
    }

    /// Gives the file the length that the image needs.
    pub(crate) fn settle(&mut self) -> Result<()> {
        if self.is_sparse() && self.file.size() < self.end {
            self.file.set_size(self.end)?;
        }
        Ok(())
    }

    /// Gives the file exactly this length, where that is possible.
    pub(crate) fn set_end(&mut self, end: u64) -> Result<()> {
        self.end = end;
        if self.is_sparse() && self.file.size() != end { self.file.set_size(end) } else { Ok(()) }
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        self.file.flush()
    }

    /// The file as it is read.
    pub(crate) fn file(&self) -> &D {
        &self.file
    }

    /// Gives the space of a range back that the image doesn't use any more. If that fails, the space stays taken.
    pub(crate) fn discard(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.file.size());
        if offset < end {
            let _ = self.file.discard(offset, end - offset);
        }
    }

    /// The file itself, for requests that don't change where the image ends.
    pub(crate) fn file_mut(&mut self) -> &mut D {
        &mut self.file
    }
}

fn be_bytes(words: &[u64]) -> Result<Vec<u8>> {
    let mut bytes = zeroed(words.len() * 8)?;
    for (to, from) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *to = from.to_be_bytes();
    }
    Ok(bytes)
}
