use alloc::vec::Vec;

use crate::{BlockMap, BlockRead, Error, ErrorKind, Extent, ExtentKind, Limits, Result, check_range};

/// Unit to which every disk is filled up, bytes.
const SECTOR: u64 = 512;

/// Several disks one behind the other, each filled up with zeros to whole sectors of 512 bytes.
///
/// This is how `qemu-img convert a b c out` reads its inputs.
///
/// ```
/// use instar_blockio::{BlockRead, Concat, MemBlock};
/// let both = Concat::new(vec![MemBlock::from(b"one".to_vec()), MemBlock::from(b"two".to_vec())])?;
/// assert_eq!(both.size(), 1024);
/// let mut part = [0; 5];
/// both.read_at(510, &mut part)?;
/// assert_eq!(&part, b"\0\0two");
/// # Ok::<(), instar_blockio::Error>(())
/// ```
#[derive(Debug)]
pub struct Concat<D> {
    parts: Vec<Part<D>>,
    size: u64,
}

#[derive(Debug)]
struct Part<D> {
    disk: D,
    start: u64,
    /// Behind the padding.
    end: u64,
}

/// What lies at an offset: so many bytes of a disk at the disk's own offset, or so many of padding.
enum Piece<'a, D> {
    Disk { part: &'a Part<D>, within: u64, len: u64 },
    Padding { len: u64 },
}

impl<D: BlockRead> Concat<D> {
    /// The disks in their order.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`] if they have more than `u64::MAX` bytes together.
    pub fn new(disks: Vec<D>) -> Result<Self> {
        let mut parts = Vec::new();
        parts.try_reserve_exact(disks.len()).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        let mut start = 0;
        for disk in disks {
            let end = disk
                .size()
                .checked_next_multiple_of(SECTOR)
                .and_then(|len| len.checked_add(start))
                .ok_or(Error::new(ErrorKind::OutOfBounds).at(start))?;
            parts.push(Part { disk, start, end });
            start = end;
        }
        Ok(Self { parts, size: start })
    }

    /// Where each disk begins, in order.
    pub fn starts(&self) -> impl Iterator<Item = u64> + '_ {
        self.parts.iter().map(|part| part.start)
    }

    /// What lies at `offset`, clipped to `max_len`.
    fn piece(&self, offset: u64, max_len: u64) -> Result<Piece<'_, D>> {
        let index = self.parts.partition_point(|part| part.end <= offset);
        let part = self.parts.get(index).ok_or(Error::new(ErrorKind::OutOfBounds).at(offset))?;
        let within = offset - part.start;
        Ok(match part.disk.size().checked_sub(within) {
            Some(left) if left > 0 => Piece::Disk { part, within, len: max_len.min(left) },
            _ => Piece::Padding { len: max_len.min(part.end - offset) },
        })
    }
}

impl<D> Part<D> {
    /// An error of the disk, told in offsets of the whole.
    fn localise(&self, error: Error) -> Error {
        match error.offset().and_then(|at| at.checked_add(self.start)) {
            Some(at) => error.at(at),
            None => error,
        }
    }
}

impl<D: BlockRead> BlockRead for Concat<D> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        let (mut offset, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let left = rest.len() as u64;
            let len = match self.piece(offset, left)? {
                Piece::Disk { part, within, len } => {
                    // len <= rest.len(), so it fits in usize; below as well.
                    part.disk.read_at(within, &mut rest[..len as usize]).map_err(|error| part.localise(error))?;
                    len
                }
                Piece::Padding { len } => {
                    rest[..len as usize].fill(0);
                    len
                }
            };
            rest = &mut rest[len as usize..];
            offset += len;
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.parts.iter().map(|part| part.disk.limits()).fold(Limits::BYTE, |sum, one| Limits {
            request_align: sum.request_align.max(one.request_align),
            preferred_align: sum.preferred_align.max(one.preferred_align),
            ..sum
        })
    }
}

impl<D: BlockMap> BlockMap for Concat<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        if max_len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        match self.piece(offset, max_len)? {
            Piece::Padding { len } => Ok(Extent { offset, len, depth: 0, kind: ExtentKind::Zero { host: None } }),
            Piece::Disk { part, within, len } => {
                let mut extent = part.disk.extent_at(within, len).map_err(|error| part.localise(error))?;
                extent.offset = offset;
                if let ExtentKind::Compressed(run) = &mut extent.kind {
                    run.unit_offset =
                        run.unit_offset.checked_add(part.start).ok_or(Error::new(ErrorKind::OutOfBounds).at(offset))?;
                }
                Ok(extent)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockMapExt, FileId, MemBlock};
    use std::boxed::Box;
    use std::vec;

    fn filled(len: usize, byte: u8, file: u32) -> MemBlock {
        MemBlock::from(vec![byte; len]).with_id(FileId(file))
    }

    #[test]
    fn each_disk_is_padded_to_a_sector() {
        let disk = Concat::new(vec![filled(700, 1, 1), filled(0, 9, 2), filled(512, 2, 3), filled(1, 3, 4)]).unwrap();
        assert_eq!(disk.size(), 1024 + 512 + 512);
        assert_eq!(disk.starts().collect::<Vec<_>>(), [0, 1024, 1024, 1536]);
        let mut all = vec![0xee; 2048];
        disk.read_at(0, &mut all).unwrap();
        let mut flat = vec![0; 2048];
        flat[..700].fill(1);
        flat[1024..1536].fill(2);
        flat[1536] = 3;
        assert_eq!(all, flat);
        assert_eq!(disk.read_at(2047, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(disk.read_at(u64::MAX, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfBounds);
        disk.read_at(2048, &mut []).unwrap();
    }

    #[test]
    fn the_map_names_each_file_and_the_padding() {
        let disk = Concat::new(vec![filled(700, 1, 1), filled(512, 2, 2)]).unwrap();
        let map: Vec<_> = disk.extents(100..1300).map(Result::unwrap).collect();
        let data = |file, host| ExtentKind::Data { file: FileId(file), host };
        let runs: Vec<_> = map.iter().map(|extent| (extent.offset, extent.len, extent.kind)).collect();
        assert_eq!(
            runs,
            [(100, 600, data(1, 100)), (700, 324, ExtentKind::Zero { host: None }), (1024, 276, data(2, 0))]
        );
        assert_eq!(disk.extent_at(1536, 1).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(disk.extent_at(0, 0).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn an_empty_list_is_an_empty_disk_and_a_huge_one_an_error() {
        let none = Concat::<MemBlock>::new(vec![]).unwrap();
        assert_eq!(none.size(), 0);
        assert_eq!(none.extent_at(0, 1).unwrap_err().kind(), ErrorKind::OutOfBounds);

        #[derive(Debug)]
        struct Huge;
        impl BlockRead for Huge {
            fn size(&self) -> u64 {
                u64::MAX
            }
            fn read_at(&self, _: u64, _: &mut [u8]) -> Result<()> {
                Ok(())
            }
        }
        assert_eq!(Concat::new(vec![Huge]).unwrap_err().kind(), ErrorKind::OutOfBounds);
    }

    #[test]
    fn boxed_layers_can_be_joined_and_moved_to_a_thread() {
        fn layer<T: crate::Layer>(_: &T) {}
        let parts: Vec<Box<dyn crate::Layer>> = vec![Box::new(filled(10, 1, 0)), Box::new(filled(10, 2, 1))];
        layer(&Concat::new(parts).unwrap());
    }
}
