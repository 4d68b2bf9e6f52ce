//! System calls that need raw pointers: vectored I/O straight into guest memory, three ioctls, and what the process used.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use rustix::ioctl::{Getter, Setter, ioctl, opcode};
use vm_memory::VolatileSlice;

use crate::stats::Usage;

/// What this process used so far.
pub fn usage() -> Usage {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to a structure of the type that the call fills in, and an all-zero one is valid if it fails.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let nanoseconds =
        |time: libc::timeval| time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_usec.unsigned_abs() * 1000;
    Usage {
        user: nanoseconds(usage.ru_utime),
        system: nanoseconds(usage.ru_stime),
        peak_memory: usage.ru_maxrss.unsigned_abs() * 1024,
        page_faults: usage.ru_minflt.unsigned_abs(),
    }
}

/// Scattered guest memory that one request reads into or writes from.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    parts: Vec<VolatileSlice<'m>>,
    /// Parts that are used up.
    first: usize,
}

impl<'m> Buffers<'m> {
    /// Adds memory behind what is there.
    pub fn push(&mut self, part: VolatileSlice<'m>) {
        if !part.is_empty() {
            self.parts.push(part);
        }
    }

    /// Nothing left.
    pub fn is_empty(&self) -> bool {
        self.first == self.parts.len()
    }

    /// Uses up the next `count` bytes.
    fn advance(&mut self, mut count: usize) {
        while let Some(part) = self.parts.get_mut(self.first) {
            match part.offset(count) {
                Ok(rest) if !rest.is_empty() => {
                    *part = rest;
                    return;
                }
                _ => {
                    count = count.saturating_sub(part.len());
                    self.first += 1;
                }
            }
        }
    }

    /// Copies `bytes` into the memory; what does not fit is left out.
    pub fn put(&mut self, mut bytes: &[u8]) {
        while let Some(part) = self.parts.get(self.first) {
            if bytes.is_empty() {
                return;
            }
            let count = part.len().min(bytes.len());
            part.copy_from(&bytes[..count]);
            bytes = &bytes[count..];
            self.advance(count);
        }
    }

    /// Fills `bytes` from the memory, as far as it goes.
    pub fn take(&mut self, mut bytes: &mut [u8]) {
        while let Some(part) = self.parts.get(self.first) {
            if bytes.is_empty() {
                return;
            }
            let count = part.len().min(bytes.len());
            part.copy_to(&mut bytes[..count]);
            bytes = &mut bytes[count..];
            self.advance(count);
        }
    }

    /// The next `limit` bytes, as the kernel wants to be told of them.
    fn vectors(&self, mut limit: usize) -> Vec<libc::iovec> {
        let mut vectors = Vec::new();
        for part in &self.parts[self.first..] {
            if limit == 0 {
                break;
            }
            let len = part.len().min(limit);
            vectors.push(libc::iovec { iov_base: part.ptr_guard_mut().as_ptr().cast(), iov_len: len });
            limit -= len;
        }
        vectors
    }

    /// Fills the memory from `offset` of the file. A file that ends early is an error.
    pub fn read_from(&mut self, file: BorrowedFd<'_>, mut offset: u64) -> Result<(), Errno> {
        while !self.is_empty() {
            let vectors = self.vectors(usize::MAX);
            let at = libc::off_t::try_from(offset).map_err(|_| Errno::OVERFLOW)?;
            // SAFETY: each vector is guest memory that lives as long as `self` ('m). Only the kernel writes it here, and no
            // reference to it exists anywhere: all other access is volatile. The count is at most the queue size.
            let got = unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int, at) };
            let count = done(got)?;
            if count == Some(0) {
                return Err(Errno::IO);
            }
            offset += self.took(count);
        }
        Ok(())
    }

    /// Writes the next `len` bytes of the memory to `offset` of the file.
    pub fn write_to(&mut self, file: BorrowedFd<'_>, mut offset: u64, mut len: usize) -> Result<(), Errno> {
        while len > 0 && !self.is_empty() {
            let vectors = self.vectors(len);
            let at = libc::off_t::try_from(offset).map_err(|_| Errno::OVERFLOW)?;
            // SAFETY: as in `read_from`; the kernel only reads.
            let put = unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int, at) };
            let count = done(put)?;
            if count == Some(0) {
                return Err(Errno::IO);
            }
            let took = self.took(count);
            offset += took;
            len = len.saturating_sub(took as usize);
        }
        Ok(())
    }

    /// Uses up what a system call moved (nothing, if it was interrupted).
    fn took(&mut self, count: Option<usize>) -> u64 {
        let count = count.unwrap_or(0);
        self.advance(count);
        count as u64
    }
}

/// The result of a system call; `None` if it was interrupted.
fn done(result: isize) -> Result<Option<usize>, Errno> {
    match usize::try_from(result) {
        Ok(count) => Ok(Some(count)),
        Err(_) => match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR) => Ok(None),
            errno => Err(Errno::from_raw_os_error(errno.unwrap_or(libc::EIO))),
        },
    }
}

/// Length of a block device in bytes.
pub fn block_device_len(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    const BLKGETSIZE64: u32 = opcode::read::<usize>(0x12, 114);
    // SAFETY: BLKGETSIZE64 writes one u64.
    unsafe { ioctl(file, Getter::<{ BLKGETSIZE64 }, u64>::new()) }
}

/// Tells a block device that a range is not needed any more.
pub fn block_device_discard(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), Errno> {
    const BLKDISCARD: u32 = opcode::none(0x12, 119);
    // SAFETY: BLKDISCARD reads two u64 and changes no memory.
    unsafe { ioctl(file, Setter::<{ BLKDISCARD }, [u64; 2]>::new([offset, len])) }
}

/// Lets `target` share the blocks of a range of `source`, where the file system can.
pub fn clone_range(
    source: BorrowedFd<'_>,
    offset: u64,
    len: u64,
    target: BorrowedFd<'_>,
    target_offset: u64,
) -> Result<(), Errno> {
    #[repr(C)]
    struct FileCloneRange {
        source: i64,
        offset: u64,
        len: u64,
        target_offset: u64,
    }
    const FICLONERANGE: u32 = opcode::write::<FileCloneRange>(0x94, 13);
    let range = FileCloneRange { source: i64::from(source.as_raw_fd()), offset, len, target_offset };
    // SAFETY: FICLONERANGE reads one `struct file_clone_range` and changes no memory.
    unsafe { ioctl(target, Setter::<{ FICLONERANGE }, FileCloneRange>::new(range)) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::tests::{HEAP, sample};

    #[test]
    fn scattered_reads_and_writes() {
        let memory = sample();
        let file = tempfile::tempfile().unwrap();
        let contents: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        file.write_all_at(&contents, 5).unwrap();
        let places = [(HEAP, 1u64), (HEAP + 100, 0), (HEAP + 4096, 6000), (HEAP + 50, 3000), (HEAP + 20_000, 999)];
        let all = || {
            let mut buffers = Buffers::default();
            places.iter().for_each(|&(at, len)| buffers.push(memory.writable(at, len).unwrap()));
            buffers
        };
        let mut buffers = all();
        buffers.read_from(file.as_fd(), 5).unwrap();
        assert!(buffers.is_empty());
        assert_eq!(memory.read::<[u8; 2]>(HEAP + 4096).unwrap(), [1, 2]);
        assert_eq!(memory.read::<u8>(HEAP + 20_998).unwrap(), contents[9_999]);

        let copy: File = tempfile::tempfile().unwrap();
        let mut buffers = all();
        buffers.write_to(copy.as_fd(), 7, 2500).unwrap();
        buffers.write_to(copy.as_fd(), 2507, 7500).unwrap();
        assert!(buffers.is_empty());
        let mut back = vec![0; 10_000];
        copy.read_exact_at(&mut back, 7).unwrap();
        assert_eq!(back, contents);
        assert_eq!(copy.metadata().unwrap().len(), 10_007);
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let memory = sample();
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let mut buffers = Buffers::default();
        buffers.push(memory.writable(HEAP, 101).unwrap());
        assert_eq!(buffers.read_from(file.as_fd(), 0), Err(Errno::IO));
    }

    #[test]
    fn bytes_go_over_the_edges_of_parts() {
        let memory = sample();
        let mut buffers = Buffers::default();
        buffers.push(memory.writable(HEAP, 3).unwrap());
        buffers.push(memory.writable(HEAP + 8, 3).unwrap());
        buffers.put(b"ab");
        buffers.put(b"cdefgh");
        assert!(buffers.is_empty());
        assert_eq!(&memory.read::<[u8; 11]>(HEAP).unwrap(), b"abc\0\0\0\0\0def");
    }
}
