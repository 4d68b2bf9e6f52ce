use instar_blockio::{
    BlockMap, BlockRead, BlockWrite, Error, ErrorKind, Extent, ExtentKind, Limits, Result, ZeroMode, check_range,
};

/// Unit in which the size of a raw disk is counted, bytes.
pub const SECTOR: u64 = 512;

/// A raw image.
///
/// The disk is as large as the device, rounded up to whole sectors of 512 bytes; the bytes behind the
/// device's end read as zero (as in QEMU). Writing there makes a device that
/// [grows](Limits::grows) longer.
#[derive(Clone, Debug)]
pub struct Image<D> {
    device: D,
    size: u64,
}

impl<D: BlockRead> Image<D> {
    /// Any device is a raw image.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`] for a device whose size can't be rounded up.
    pub fn open(device: D) -> Result<Self> {
        let size = round_up(device.size())?;
        Ok(Self { device, size })
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Gives the device back.
    pub fn into_device(self) -> D {
        self.device
    }

    /// How much of `offset..offset + len` the device holds.
    fn held(&self, offset: u64, len: u64) -> u64 {
        len.min(self.device.size().saturating_sub(offset))
    }
}

fn round_up(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(SECTOR).ok_or(Error::new(ErrorKind::OutOfBounds).at(size))
}

impl<D: BlockRead> BlockRead for Image<D> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        // held <= buf.len(), so it fits in usize.
        let (bytes, padding) = buf.split_at_mut(self.held(offset, buf.len() as u64) as usize);
        padding.fill(0);
        if bytes.is_empty() { Ok(()) } else { self.device.read_at(offset, bytes) }
    }

    fn limits(&self) -> Limits {
        Limits { grows: false, ..self.device.limits() }
    }
}

impl<D: BlockWrite> BlockWrite for Image<D> {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        if buf.is_empty() { Ok(()) } else { self.device.write_at(offset, buf) }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        check_range(self.size, offset, len)?;
        // Behind the device's end the disk is zero as it is.
        match self.held(offset, len) {
            0 => Ok(()),
            held => self.device.write_zeroes(offset, held, mode),
        }
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        check_range(self.size, offset, len)?;
        match self.held(offset, len) {
            0 => Ok(()),
            held => self.device.discard(offset, held),
        }
    }

    /// Makes the device `size` bytes long, rounded up to whole sectors.
    fn set_size(&mut self, size: u64) -> Result<()> {
        let size = round_up(size)?;
        self.device.set_size(size)?;
        self.size = size;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.device.flush()
    }
}

/// The device's map; the filled-up end is [`ExtentKind::Zero`], placed right behind the last byte.
impl<D: BlockMap> BlockMap for Image<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        if max_len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        check_range(self.size, offset, 1)?;
        let len = max_len.min(self.size - offset);
        match self.held(offset, len) {
            // There is a last byte: an empty device has no padding.
            0 => {
                let last = self.device.extent_at(self.device.size().saturating_sub(1), 1)?;
                Ok(Extent { offset, len, depth: last.depth, kind: behind(&last, offset) })
            }
            held => self.device.extent_at(offset, held),
        }
    }
}

/// Zeros at `offset`, in the file that also holds `last`.
fn behind(last: &Extent, offset: u64) -> ExtentKind {
    let place = match last.kind {
        ExtentKind::Data { file, host } | ExtentKind::Zero { host: Some((file, host)) } => {
            offset.checked_sub(last.offset).and_then(|step| host.checked_add(step)).map(|host| (file, host))
        }
        _ => None,
    };
    ExtentKind::Zero { host: place }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_blockio::file::HostFile;
    use instar_blockio::{BlockMapExt, FileId, MemBlock};
    use std::vec;
    use std::vec::Vec;

    fn image(bytes: &[u8]) -> Image<MemBlock> {
        Image::open(MemBlock::from(bytes.to_vec()).with_id(FileId(2))).unwrap()
    }

    #[test]
    fn a_part_of_a_sector_is_filled_up() {
        let disk = image(b"hello");
        assert_eq!(disk.size(), 512);
        let mut all = [0xee; 512];
        disk.read_at(0, &mut all).unwrap();
        assert_eq!((&all[..5], &all[5..]), (&b"hello"[..], &[0; 507][..]));
        let mut tail = [0xee; 12];
        disk.read_at(500, &mut tail).unwrap();
        assert_eq!(tail, [0; 12]);
        assert_eq!(disk.read_at(511, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfBounds);
        disk.read_at(512, &mut []).unwrap();
    }

    #[test]
    fn the_map_shows_where_the_file_ends() {
        // As `qemu-img map --output=json` does: 5 bytes of data, 507 of zeros at offset 5 of the file.
        let map: Vec<_> = image(b"hello").extents(0..512).map(Result::unwrap).collect();
        let kinds: Vec<_> = map.iter().map(|run| (run.offset, run.len, run.kind)).collect();
        assert_eq!(
            kinds,
            [
                (0, 5, ExtentKind::Data { file: FileId(2), host: 0 }),
                (5, 507, ExtentKind::Zero { host: Some((FileId(2), 5)) })
            ]
        );
        let disk = image(b"hello");
        assert_eq!(disk.extent_at(100, 9).unwrap().kind, ExtentKind::Zero { host: Some((FileId(2), 100)) });
        assert_eq!(disk.extent_at(512, 1).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(disk.extent_at(0, 0).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_hole_at_the_end_and_its_padding_are_one_run() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = HostFile::create(&dir.path().join("disk")).unwrap();
        file.set_size(1000).unwrap();
        let disk = Image::open(file).unwrap();
        let map: Vec<_> = disk.extents(0..disk.size()).map(Result::unwrap).collect();
        if matches!(map[0].kind, ExtentKind::Data { .. }) {
            std::eprintln!("SKIPPED: the file system of the temporary directory keeps no holes");
            return;
        }
        assert_eq!(map.len(), 1, "{map:?}");
        assert_eq!((map[0].len, map[0].kind), (1024, ExtentKind::Zero { host: Some((FileId(0), 0)) }));
    }

    #[test]
    fn writing_into_the_padding_makes_the_file_longer() {
        let mut disk = image(b"hello");
        disk.write_zeroes(3, 100, ZeroMode::Unmap).unwrap();
        disk.discard(400, 112).unwrap();
        assert_eq!(disk.device().size(), 5);
        disk.write_at(510, b"ab").unwrap();
        assert_eq!(disk.write_at(511, b"ab").unwrap_err().kind(), ErrorKind::OutOfBounds);
        let bytes = disk.into_device().into_bytes();
        assert_eq!((bytes.len(), &bytes[..6], &bytes[510..]), (512, &b"hel\0\0\0"[..], &b"ab"[..]));
    }

    #[test]
    fn sizes_are_whole_sectors() {
        let mut disk = image(&[1; 1024]);
        disk.set_size(513).unwrap();
        assert_eq!((disk.size(), disk.device().size()), (1024, 1024));
        disk.set_size(0).unwrap();
        assert_eq!(disk.size(), 0);
        assert_eq!(disk.extent_at(0, 1).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(disk.set_size(u64::MAX).unwrap_err().kind(), ErrorKind::OutOfBounds);
    }

    #[test]
    fn a_device_too_large_to_round_is_refused() {
        #[derive(Debug)]
        struct Huge;
        impl BlockRead for Huge {
            fn size(&self) -> u64 {
                u64::MAX - 5
            }
            fn read_at(&self, _: u64, _: &mut [u8]) -> Result<()> {
                Ok(())
            }
        }
        assert_eq!(Image::open(Huge).unwrap_err().kind(), ErrorKind::OutOfBounds);
    }

    #[test]
    fn equals_the_device_byte_for_byte() {
        let bytes: Vec<u8> = (0..2048u32).map(|i| (i * 7) as u8).collect();
        let disk = image(&bytes);
        let mut all = vec![0; 2048];
        disk.read_at(0, &mut all).unwrap();
        assert_eq!(all, bytes);
    }
}
