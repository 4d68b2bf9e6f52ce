use alloc::vec::Vec;

use crate::{
    BlockMap, BlockRead, BlockWrite, Error, ErrorKind, Extent, ExtentKind, FileId, Limits, Result, ZeroMode,
    check_range,
};

/// A disk in memory, for tests, examples and small images. It [grows](Limits::grows) as a file does.
///
/// ```
/// use instar_blockio::{BlockRead, BlockWrite, MemBlock};
/// let mut disk = MemBlock::zeroed(1024);
/// disk.write_at(512, b"boot")?;
/// let mut word = [0; 4];
/// disk.read_at(512, &mut word)?;
/// assert_eq!(&word, b"boot");
/// # Ok::<(), instar_blockio::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemBlock {
    bytes: Vec<u8>,
    file: FileId,
}

impl MemBlock {
    /// A disk of `size` zero bytes.
    pub fn zeroed(size: usize) -> Self {
        alloc::vec![0; size].into()
    }

    /// The same disk under another number; it is file 0 by default.
    pub fn with_id(self, file: FileId) -> Self {
        Self { file, ..self }
    }

    /// The contents.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The contents, to change in place.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Gives the contents back.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn range(&self, offset: u64, len: u64) -> Result<core::ops::Range<usize>> {
        check_range(self.bytes.len() as u64, offset, len)?;
        // Inside the vector's length, so both fit in usize.
        Ok(offset as usize..(offset + len) as usize)
    }
}

impl From<Vec<u8>> for MemBlock {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, file: FileId::default() }
    }
}

impl BlockRead for MemBlock {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = self.range(offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.bytes[range]);
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits { discard_zeroes: true, grows: true, ..Limits::BYTE }
    }
}

impl BlockWrite for MemBlock {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64).ok_or(Error::new(ErrorKind::OutOfBounds).at(offset))?;
        if end > self.size() && !buf.is_empty() {
            self.set_size(end)?;
        }
        let range = self.range(offset, buf.len() as u64)?;
        self.bytes[range].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, _mode: ZeroMode) -> Result<()> {
        let range = self.range(offset, len)?;
        self.bytes[range].fill(0);
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, ZeroMode::Unmap)
    }

    fn set_size(&mut self, size: u64) -> Result<()> {
        let size = usize::try_from(size).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        if let Some(more) = size.checked_sub(self.bytes.len()) {
            self.bytes.try_reserve_exact(more).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        }
        self.bytes.resize(size, 0);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// One run of data: memory has no holes.
impl BlockMap for MemBlock {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        if max_len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        check_range(self.size(), offset, 1)?;
        let len = max_len.min(self.size() - offset);
        Ok(Extent { offset, len, depth: 0, kind: ExtentKind::Data { file: self.file, host: offset } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_by_writes_but_not_by_zeroes() {
        let mut disk = MemBlock::zeroed(4);
        disk.write_at(6, b"ab").unwrap();
        assert_eq!(disk.as_bytes(), b"\0\0\0\0\0\0ab");
        let past = Error::new(ErrorKind::OutOfBounds).at(7);
        assert_eq!(disk.write_zeroes(7, 2, ZeroMode::Unmap).unwrap_err(), past);
        disk.write_at(100, b"").unwrap_err();
        assert_eq!(disk.write_at(u64::MAX, b"a").unwrap_err().kind(), ErrorKind::OutOfBounds);
        disk.discard(6, 1).unwrap();
        disk.set_size(7).unwrap();
        assert_eq!(disk.into_bytes(), [0; 7]);
    }

    #[test]
    fn reads_are_checked() {
        let disk = MemBlock::from(b"abc".to_vec());
        disk.read_at(3, &mut []).unwrap();
        for offset in [3, 4, u64::MAX] {
            assert_eq!(disk.read_at(offset, &mut [0]).unwrap_err(), Error::new(ErrorKind::OutOfBounds).at(offset));
        }
    }

    #[test]
    fn an_absurd_size_is_an_error() {
        let mut disk = MemBlock::zeroed(1);
        assert_eq!(disk.set_size(u64::MAX).unwrap_err().kind(), ErrorKind::OutOfMemory);
        assert_eq!(disk.size(), 1);
    }
}
