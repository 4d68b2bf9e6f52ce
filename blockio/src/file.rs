//! A host file as a block device.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::{
    BlockMap, BlockRead, BlockWrite, Error, ErrorKind, Extent, ExtentKind, FileId, Limits, Result, ZeroMode,
    check_range,
};

/// Zeros written at a time where the file system can't make them itself.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A regular file or a block device of the host.
///
/// The size is asked for when the file is opened and followed through this handle; what other
/// processes do to the file is not seen. A file that was cut under it fails with [`ErrorKind::Io`].
///
/// ```
/// use instar_blockio::file::HostFile;
/// use instar_blockio::{BlockRead, BlockWrite};
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("disk.raw");
/// let mut file = HostFile::create(&path)?;
/// file.write_at(1 << 20, b"data")?;
/// assert_eq!(file.size(), (1 << 20) + 4);
/// # Ok::<(), instar_blockio::Error>(())
/// ```
#[derive(Debug)]
pub struct HostFile {
    fd: OwnedFd,
    file: FileId,
    size: u64,
    writable: bool,
    device: bool,
}

impl HostFile {
    /// Opens an existing file.
    ///
    /// # Errors
    /// What the system reports; [`ErrorKind::Unsupported`] for anything but a regular file or a block device.
    pub fn open(path: &Path, writable: bool) -> Result<Self> {
        let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
        // O_NONBLOCK: a FIFO must not stop us before the type test; it has no effect on files.
        Self::from_fd(open(path, access | OFlags::NONBLOCK)?, writable)
    }

    /// Creates a file, or empties an existing one.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn create(path: &Path) -> Result<Self> {
        Self::from_fd(open(path, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::NONBLOCK)?, true)
    }

    /// Takes over an open file. `writable` says whether this handle may change it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_fd(fd: OwnedFd, writable: bool) -> Result<Self> {
        let stat = rustix::fs::fstat(&fd).map_err(from_errno)?;
        let device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => return Err(ErrorKind::Unsupported.into()),
        };
        // Also right for a block device, whose st_size is 0.
        let size = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(from_errno)?;
        Ok(Self { fd, file: FileId::default(), size, writable, device })
    }

    /// The same file under another number; it is file 0 by default.
    pub fn with_id(self, file: FileId) -> Self {
        Self { file, ..self }
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable { Ok(()) } else { Err(ErrorKind::ReadOnly.into()) }
    }

    fn write_all(&self, mut offset: u64, mut buf: &[u8]) -> Result<()> {
        while !buf.is_empty() {
            match rustix::io::pwrite(&self.fd, buf, offset) {
                Ok(0) => return Err(Error::new(ErrorKind::NoSpace).at(offset)),
                Ok(done) => (offset, buf) = (offset + done as u64, &buf[done..]),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(from_errno(errno).at(offset)),
            }
        }
        Ok(())
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> Result<()> {
        while len > 0 {
            let part = len.min(ZEROS.len() as u64);
            self.write_all(offset, &ZEROS[..part as usize])?;
            (offset, len) = (offset + part, len - part);
        }
        Ok(())
    }

    /// Whether the file system did it; `false` means that it knows no such thing.
    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<bool> {
        loop {
            match rustix::fs::fallocate(&self.fd, flags, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                // EINVAL: a block device refuses ranges that are not whole sectors.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => return Ok(false),
                Err(errno) => return Err(from_errno(errno).at(offset)),
            }
        }
    }

    fn punch(&self, offset: u64, len: u64) -> Result<bool> {
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    fn zero_allocated(&self, offset: u64, len: u64) -> Result<bool> {
        if self.fallocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, len)? {
            return Ok(true);
        }
        // tmpfs: a hole, filled with fresh space.
        Ok(!self.device && self.punch(offset, len)? && self.fallocate(FallocateFlags::KEEP_SIZE, offset, len)?)
    }

    /// The run at `offset`: whether it is a hole, and where it ends (not before `offset + 1`).
    fn seek_run(&self, offset: u64) -> (bool, u64) {
        let next = |end: u64| if end > offset { end } else { self.size };
        match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => (true, data),
            Ok(_) => match rustix::fs::seek(&self.fd, SeekFrom::Hole(offset)) {
                Ok(hole) => (false, next(hole)),
                Err(_) => (false, self.size),
            },
            Err(Errno::NXIO) => (true, self.size),
            // A file system without holes, or a device: everything is data.
            Err(_) => (false, self.size),
        }
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl BlockRead for HostFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        let (mut offset, mut rest) = (offset, buf);
        while !rest.is_empty() {
            match rustix::io::pread(&self.fd, &mut *rest, offset) {
                Ok(0) => return Err(Error::new(ErrorKind::Io).at(offset)),
                Ok(done) => (offset, rest) = (offset + done as u64, &mut rest[done..]),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(from_errno(errno).at(offset)),
            }
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits { discard_zeroes: true, grows: !self.device, preferred_align: 4096, ..Limits::BYTE }
    }
}

impl BlockWrite for HostFile {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check_writable()?;
        let end = offset.checked_add(buf.len() as u64).ok_or(Error::new(ErrorKind::OutOfBounds).at(offset))?;
        if self.device || buf.is_empty() {
            check_range(self.size, offset, buf.len() as u64)?;
        }
        self.write_all(offset, buf)?;
        self.size = self.size.max(end);
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_writable()?;
        check_range(self.size, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let done = match mode {
            ZeroMode::Unmap => self.punch(offset, len)?,
            ZeroMode::KeepAllocated => self.zero_allocated(offset, len)?,
        };
        if done { Ok(()) } else { self.write_zero_bytes(offset, len) }
    }

    /// As [`write_zeroes`](BlockWrite::write_zeroes) with [`ZeroMode::Unmap`]: the promise that the range then reads
    /// as zero is kept even where no space can be given back.
    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, ZeroMode::Unmap)
    }

    /// [`ErrorKind::Unsupported`] on a block device, unless it is the size that it has.
    fn set_size(&mut self, size: u64) -> Result<()> {
        self.check_writable()?;
        if self.device {
            return if size == self.size { Ok(()) } else { Err(ErrorKind::Unsupported.into()) };
        }
        retry(|| rustix::fs::ftruncate(&self.fd, size))?;
        self.size = size;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.writable { retry(|| rustix::fs::fdatasync(&self.fd)) } else { Ok(()) }
    }
}

/// Data and holes as the file system tells them. A hole is [`ExtentKind::Zero`] with its place in the
/// file: bytes can be put there.
impl BlockMap for HostFile {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        if max_len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        check_range(self.size, offset, 1)?;
        let (hole, end) = self.seek_run(offset);
        let len = max_len.min(end.min(self.size) - offset);
        let kind = if hole {
            ExtentKind::Zero { host: Some((self.file, offset)) }
        } else {
            ExtentKind::Data { file: self.file, host: offset }
        };
        Ok(Extent { offset, len, depth: 0, kind })
    }
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
    loop {
        match rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)) {
            Err(Errno::INTR) => {}
            done => return done.map_err(from_errno),
        }
    }
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<()>) -> Result<()> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done.map_err(from_errno),
        }
    }
}

fn from_errno(errno: Errno) -> Error {
    Error::from_os(errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockMapExt;
    use std::vec;
    use std::vec::Vec;

    fn scratch() -> (tempfile::TempDir, HostFile) {
        let dir = tempfile::tempdir().unwrap();
        let file = HostFile::create(&dir.path().join("disk")).unwrap();
        (dir, file)
    }

    fn read(file: &HostFile) -> Vec<u8> {
        let mut all = vec![0xee; file.size() as usize];
        file.read_at(0, &mut all).unwrap();
        all
    }

    #[test]
    fn reads_back_and_grows() {
        let (dir, mut file) = scratch();
        file.write_at(5, b"hello").unwrap();
        assert_eq!(read(&file), b"\0\0\0\0\0hello");
        file.flush().unwrap();
        assert_eq!(std::fs::read(dir.path().join("disk")).unwrap(), b"\0\0\0\0\0hello");
        assert_eq!(file.read_at(9, &mut [0; 2]).unwrap_err(), Error::new(ErrorKind::OutOfBounds).at(9));
        assert_eq!(file.write_at(u64::MAX, b"x").unwrap_err().kind(), ErrorKind::OutOfBounds);
        file.set_size(6).unwrap();
        assert_eq!(read(&file), b"\0\0\0\0\0h");
        file.set_size(8).unwrap();
        assert_eq!(read(&file), b"\0\0\0\0\0h\0\0");
    }

    #[test]
    fn a_read_only_file_is_not_changed() {
        let (dir, mut file) = scratch();
        file.write_at(0, b"data").unwrap();
        let mut file = HostFile::open(&dir.path().join("disk"), false).unwrap();
        let refused =
            [file.write_at(0, b"x"), file.write_zeroes(0, 1, ZeroMode::Unmap), file.discard(0, 1), file.set_size(0)];
        assert!(refused.iter().all(|done| *done == Err(Error::new(ErrorKind::ReadOnly))), "{refused:?}");
        assert_eq!(read(&file), b"data");
    }

    #[test]
    fn zeroes_with_and_without_space() {
        for mode in [ZeroMode::Unmap, ZeroMode::KeepAllocated] {
            let (_dir, mut file) = scratch();
            file.write_at(0, &[7; 300_000]).unwrap();
            file.write_zeroes(100, 200_000, mode).unwrap();
            file.write_zeroes(0, 0, mode).unwrap();
            assert_eq!(file.write_zeroes(299_999, 2, mode).unwrap_err().kind(), ErrorKind::OutOfBounds);
            let mut flat = vec![7; 300_000];
            flat[100..200_100].fill(0);
            assert!(read(&file) == flat, "{mode:?}");
            if mode == ZeroMode::KeepAllocated {
                let stat = rustix::fs::fstat(&file).unwrap();
                assert!(stat.st_blocks as u64 * 512 >= 300_000, "space is kept");
            }
        }
    }

    #[test]
    fn zeros_are_written_where_the_system_makes_none() {
        let (_dir, mut file) = scratch();
        file.write_at(0, &[7; 200_000]).unwrap();
        file.write_zero_bytes(1, 199_998).unwrap();
        let all = read(&file);
        assert!(all[0] == 7 && all[199_999] == 7 && crate::is_zero(&all[1..199_999]));
    }

    #[test]
    fn the_map_shows_holes() {
        let (_dir, mut file) = scratch();
        file.write_at(1 << 20, &[1; 1 << 16]).unwrap();
        file.set_size(3 << 20).unwrap();
        let file = file.with_id(FileId(4));
        let map: Vec<_> = file.extents(0..file.size()).map(Result::unwrap).collect();
        let hole = |offset| ExtentKind::Zero { host: Some((FileId(4), offset)) };
        let runs: Vec<_> = map.iter().map(|run| (run.offset, run.len, run.kind)).collect();
        if matches!(runs[..], [(0, _, ExtentKind::Data { .. })]) {
            std::eprintln!("SKIPPED: the file system of the temporary directory keeps no holes");
            return;
        }
        let data = ExtentKind::Data { file: FileId(4), host: 1 << 20 };
        let tail = (1 << 20) + (1 << 16);
        assert_eq!(runs, [(0, 1 << 20, hole(0)), (1 << 20, 1 << 16, data), (tail, (3 << 20) - tail, hole(tail))]);
        assert_eq!(file.extent_at(100, 10).unwrap().len, 10);
        assert_eq!(file.extent_at(3 << 20, 1).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(file.extent_at(0, 0).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn errors_carry_the_system_number() {
        let dir = tempfile::tempdir().unwrap();
        let error = HostFile::open(&dir.path().join("none"), false).unwrap_err();
        assert_eq!((error.kind(), error.os()), (ErrorKind::Io, Some(2)));
        assert_eq!(HostFile::open(dir.path(), false).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(HostFile::open(Path::new("/dev/null"), true).unwrap_err().kind(), ErrorKind::Unsupported);
        match HostFile::open(Path::new("/dev/full"), true) {
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported),
            Ok(file) => panic!("a character device is no disk: {file:?}"),
        }
    }

    #[test]
    fn a_file_that_shrank_is_an_io_error() {
        let (dir, mut file) = scratch();
        file.write_at(0, &[1; 100]).unwrap();
        std::fs::write(dir.path().join("disk"), b"short").unwrap();
        assert_eq!(file.read_at(0, &mut [0; 100]).unwrap_err(), Error::new(ErrorKind::Io).at(5));
        // Map and write go on with the size that was opened.
        assert_eq!(file.extent_at(50, 10).unwrap().len, 10);
    }
}
