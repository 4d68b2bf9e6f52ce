use crate::{
    BlockMap, BlockRead, BlockWrite, Error, ErrorKind, Extent, ExtentKind, Limits, ReadPart, Result, ZeroMode,
    check_range,
};

/// A part of a device as a device of its own: a partition, or a disk behind a header.
///
/// Extents keep naming the places of the whole device's files; only their disk offsets begin at
/// the window.
///
/// ```
/// use instar_blockio::{BlockRead, MemBlock, Window};
/// let window = Window::new(MemBlock::from(b"headerbody".to_vec()), 6, 4)?;
/// let mut body = [0; 4];
/// window.read_at(0, &mut body)?;
/// assert_eq!(&body, b"body");
/// # Ok::<(), instar_blockio::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Window<D> {
    inner: D,
    start: u64,
    len: u64,
}

impl<D: BlockRead> Window<D> {
    /// The bytes `start..start + len` of `inner`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`] if they do not all lie inside the device, [`ErrorKind::InvalidInput`] if `start` or
    /// `len` breaks the device's [`request_align`](Limits::request_align).
    pub fn new(inner: D, start: u64, len: u64) -> Result<Self> {
        check_range(inner.size(), start, len)?;
        let align = u64::from(inner.limits().request_align.max(1));
        if !start.is_multiple_of(align) || !len.is_multiple_of(align) {
            return Err(Error::new(ErrorKind::InvalidInput).at(start));
        }
        Ok(Self { inner, start, len })
    }

    /// The whole device.
    pub fn into_inner(self) -> D {
        self.inner
    }

    /// The place on the device of a range of the window.
    fn outer(&self, offset: u64, len: u64) -> Result<u64> {
        check_range(self.len, offset, len)?;
        // Inside the window, which lies inside the device: no overflow.
        Ok(self.start + offset)
    }

    /// An error of the device, told in offsets of the window.
    fn localise(&self, error: Error) -> Error {
        match error.offset() {
            Some(at) if at >= self.start => error.at(at - self.start),
            _ => error,
        }
    }
}

impl<D: BlockRead> BlockRead for Window<D> {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let outer = self.outer(offset, buf.len() as u64)?;
        self.inner.read_at(outer, buf).map_err(|error| self.localise(error))
    }

    fn read_many(&self, parts: &mut [ReadPart<'_>]) -> Result<()> {
        for part in parts.iter() {
            check_range(self.len, part.offset, part.buf.len() as u64)?;
        }
        // The offsets are moved for the call and put back: `ReadPart` is the caller's.
        parts.iter_mut().for_each(|part| part.offset += self.start);
        let done = self.inner.read_many(parts).map_err(|error| self.localise(error));
        parts.iter_mut().for_each(|part| part.offset -= self.start);
        done
    }

    fn limits(&self) -> Limits {
        let inner = self.inner.limits();
        let preferred = u64::from(inner.preferred_align.max(1));
        Limits {
            // The device's preferred blocks don't match the window's if it begins inside one.
            preferred_align: if self.start.is_multiple_of(preferred) {
                inner.preferred_align
            } else {
                inner.request_align
            },
            grows: false,
            ..inner
        }
    }
}

impl<D: BlockWrite> BlockWrite for Window<D> {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        let outer = self.outer(offset, buf.len() as u64)?;
        self.inner.write_at(outer, buf).map_err(|error| self.localise(error))
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let outer = self.outer(offset, len)?;
        self.inner.write_zeroes(outer, len, mode).map_err(|error| self.localise(error))
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        let outer = self.outer(offset, len)?;
        self.inner.discard(outer, len).map_err(|error| self.localise(error))
    }

    /// A window keeps its size.
    fn set_size(&mut self, size: u64) -> Result<()> {
        if size == self.len { Ok(()) } else { Err(Error::new(ErrorKind::Unsupported)) }
    }

    fn flush(&mut self) -> Result<()> {
        self.inner.flush()
    }
}

/// The device's map. A compressed unit that begins before the window can't be told in offsets of
/// the window: [`ErrorKind::Unsupported`].
impl<D: BlockMap> BlockMap for Window<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let outer = self.outer(offset, 1)?;
        let mut extent =
            self.inner.extent_at(outer, max_len.min(self.len - offset)).map_err(|error| self.localise(error))?;
        extent.offset = offset;
        if let ExtentKind::Compressed(run) = &mut extent.kind {
            run.unit_offset =
                run.unit_offset.checked_sub(self.start).ok_or(Error::new(ErrorKind::Unsupported).at(offset))?;
        }
        Ok(extent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Codec, CompressedRun, FileId, MemBlock};
    use std::vec::Vec;

    fn counted(len: usize) -> MemBlock {
        (0..len).map(|i| i as u8).collect::<Vec<_>>().into()
    }

    #[test]
    fn bounds_are_those_of_the_window() {
        let mut window = Window::new(counted(64), 16, 32).unwrap();
        assert_eq!(window.size(), 32);
        let mut buf = [0; 4];
        window.read_at(28, &mut buf).unwrap();
        assert_eq!(buf, [44, 45, 46, 47]);
        window.read_at(32, &mut []).unwrap();
        for (offset, len) in [(29, 4), (32, 1), (u64::MAX, 4), (u64::MAX - 8, 4)] {
            let mut buf = [0; 4];
            let kind = window.read_at(offset, &mut buf[..len]).unwrap_err().kind();
            assert_eq!(kind, ErrorKind::OutOfBounds, "{offset}+{len}");
        }
        // The device under it grows, the window does not.
        assert_eq!(window.write_at(30, b"abcd").unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(window.set_size(64).unwrap_err().kind(), ErrorKind::Unsupported);
        window.write_at(30, b"zz").unwrap();
        window.write_zeroes(0, 1, ZeroMode::Unmap).unwrap();
        let all = window.into_inner().into_bytes();
        assert_eq!((all[15], all[16], &all[46..49]), (15, 0, &[b'z', b'z', 48][..]));
    }

    #[test]
    fn a_window_outside_the_device_is_refused() {
        assert!(Window::new(counted(64), 64, 0).is_ok());
        for (start, len) in [(64, 1), (65, 0), (1, u64::MAX), (u64::MAX, 1)] {
            assert_eq!(Window::new(counted(64), start, len).unwrap_err().kind(), ErrorKind::OutOfBounds);
        }
    }

    #[test]
    fn read_many_gives_the_offsets_back() {
        let window = Window::new(counted(64), 10, 20).unwrap();
        let (mut a, mut b) = ([0; 2], [0; 1]);
        let mut parts = [ReadPart { offset: 0, buf: &mut a }, ReadPart { offset: 19, buf: &mut b }];
        window.read_many(&mut parts).unwrap();
        assert_eq!(parts.each_ref().map(|part| part.offset), [0, 19]);
        assert_eq!((a, b), ([10, 11], [29]));
    }

    /// 64 bytes, one compressed unit.
    struct Packed;

    impl BlockRead for Packed {
        fn size(&self) -> u64 {
            64
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<()> {
            Err(ErrorKind::Unsupported.into())
        }
    }

    impl BlockMap for Packed {
        fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
            let unit_offset = offset / 32 * 32;
            let run = CompressedRun {
                file: FileId(0),
                host: 7,
                stored_len: 3,
                unit_offset,
                unit_len: 32,
                codec: Codec::Deflate,
            };
            let len = max_len.min(unit_offset + 32 - offset);
            Ok(Extent { offset, len, depth: 0, kind: ExtentKind::Compressed(run) })
        }
    }

    #[test]
    fn extents_begin_at_the_window() {
        let window = Window::new(counted(64), 16, 32).unwrap();
        let extent = window.extent_at(4, u64::MAX).unwrap();
        assert_eq!((extent.offset, extent.len), (4, 28));
        assert_eq!(extent.kind, ExtentKind::Data { file: FileId(0), host: 20 });
        assert_eq!(window.extent_at(32, 1).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(window.extent_at(0, 0).unwrap_err().kind(), ErrorKind::InvalidInput);

        let window = Window::new(Packed, 16, 48).unwrap();
        assert_eq!(window.extent_at(0, 8).unwrap_err(), Error::new(ErrorKind::Unsupported).at(0));
        let extent = window.extent_at(20, 8).unwrap();
        assert!(matches!(extent.kind, ExtentKind::Compressed(run) if run.unit_offset == 16), "{extent:?}");
    }
}
