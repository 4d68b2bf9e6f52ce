//! The platform over threads and host files: operations run and are tested without a virtual machine.

use std::boxed::Box;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::vec::Vec;

use instar_blockio::{Error, ErrorKind, FileId, Result, ZeroMode};
use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::message::{Call, OpenAnswer, OpenFile};
use instar_guest_protocol::ring::HoleRun;
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};

use crate::files::FileTable;
use crate::platform::{FailedIo, Io, Platform};

/// Bytes moved at once by a copy, and written at once as zeroes.
const CHUNK: usize = 1 << 20;

/// Decides about a file that the operation asks for: the file, or a refusal.
pub type Opener = dyn FnMut(&OpenFile) -> Option<File> + Send;

/// Threads, files and a record of the calls.
#[derive(Clone)]
pub struct Host {
    shared: Arc<Shared>,
}

struct Shared {
    table: Box<FileTable>,
    files: Mutex<Vec<Arc<File>>>,
    opener: Mutex<Box<Opener>>,
    calls: Mutex<Vec<Call>>,
    epoch: Mutex<u32>,
    woken: Condvar,
    vcpus: usize,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("vcpus", &self.shared.vcpus).finish_non_exhaustive()
    }
}

impl Host {
    /// A platform of `vcpus` threads, without files, that refuses every file asked for.
    pub fn new(vcpus: usize) -> Self {
        Self::with_opener(vcpus, |_| None)
    }

    /// The same, with `opener` to decide about files asked for.
    pub fn with_opener(vcpus: usize, opener: impl FnMut(&OpenFile) -> Option<File> + Send + 'static) -> Self {
        Self {
            shared: Arc::new(Shared {
                table: Box::default(),
                files: Mutex::default(),
                opener: Mutex::new(Box::new(opener)),
                calls: Mutex::default(),
                epoch: Mutex::new(0),
                woken: Condvar::new(),
                vcpus: vcpus.max(1),
            }),
        }
    }

    /// Grants a file and gives its device number.
    ///
    /// # Errors
    /// Its length can't be told.
    pub fn grant(&self, file: File, flags: DeviceFlags) -> io::Result<u32> {
        let facts = file.metadata()?;
        let mut files = locked(&self.shared.files);
        let device = files.len() as u32;
        if !self.shared.table.grant(FileId(device), facts.len(), facts.blocks() * 512, flags) {
            return Err(io::Error::other("too many files"));
        }
        files.push(Arc::new(file));
        Ok(device)
    }

    /// Grants a writable file in memory with these contents.
    ///
    /// # Errors
    /// The host has no memory for it.
    pub fn grant_bytes(&self, bytes: &[u8]) -> io::Result<u32> {
        self.grant(memory_file(bytes)?, DeviceFlags::WRITABLE)
    }

    /// All bytes of a granted file.
    ///
    /// # Errors
    /// What the host reports; [`io::ErrorKind::NotFound`] for an unknown device.
    pub fn contents(&self, device: u32) -> io::Result<Vec<u8>> {
        let file = self.host_file(FileId(device)).map_err(|_| io::ErrorKind::NotFound)?;
        let mut bytes = std::vec![0; file.metadata()?.len() as usize];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// The messages sent so far, without [`open`](Platform::open)s.
    pub fn calls(&self) -> Vec<Call> {
        locked(&self.shared.calls).clone()
    }

    fn host_file(&self, file: FileId) -> Result<Arc<File>> {
        locked(&self.shared.files).get(file.0 as usize).cloned().ok_or(Error::new(ErrorKind::InvalidInput))
    }

    fn execute(&self, io: &mut Io<'_>) -> Result<()> {
        self.shared.table.check(io)?;
        match io {
            Io::Read { file, offset, buf } => self.read(*file, *offset, buf),
            Io::Write { file, offset, buf } => self.host_file(*file)?.write_all_at(buf, *offset).map_err(|e| os(&e)),
            Io::Copy { from, offset, to, to_offset, len, skip_zero } => {
                self.copy(*from, *offset, *to, *to_offset, *len, *skip_zero)
            }
            Io::Share { .. } => Err(ErrorKind::Unsupported.into()),
            Io::Compare { file, offset, other, other_offset, len, equal } => {
                **equal &= self.equal((*file, *offset), (*other, *other_offset), *len)?;
                Ok(())
            }
            Io::WriteZeroes { len: 0, .. } | Io::Discard { len: 0, .. } | Io::Allocate { len: 0, .. } => Ok(()),
            Io::WriteZeroes { file, offset, len, mode: ZeroMode::Unmap } | Io::Discard { file, offset, len } => {
                self.allocate(*file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, *offset, *len)
            }
            Io::WriteZeroes { file, offset, len, mode: ZeroMode::KeepAllocated } => {
                self.fill_zeroes(*file, *offset, *len)
            }
            Io::Allocate { file, offset, len } => self.allocate(*file, FallocateFlags::empty(), *offset, *len),
            Io::SetLen { file, len } => self.host_file(*file)?.set_len(*len).map_err(|e| os(&e)),
            Io::Flush { file } => self.host_file(*file)?.sync_data().map_err(|e| os(&e)),
        }
    }

    fn read(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<()> {
        let inside = self.shared.table.get(file).map_or(0, |state| state.inside(offset, buf.len()));
        let (inside, behind) = buf.split_at_mut(inside);
        behind.fill(0);
        self.host_file(file)?.read_exact_at(inside, offset).map_err(|e| os(&e))
    }

    fn copy(
        &self,
        from: FileId,
        offset: u64,
        to: FileId,
        to_offset: u64,
        len: u64,
        skip_zero: Option<u32>,
    ) -> Result<()> {
        let target = self.host_file(to)?;
        let chunk = skip_zero.map_or(CHUNK, |granularity| granularity as usize);
        let mut buf = std::vec![0; chunk];
        let mut done = 0;
        while done < len {
            let part = buf.len().min(usize::try_from(len - done).unwrap_or(usize::MAX));
            let part = &mut buf[..part];
            self.read(from, offset + done, part)?;
            if skip_zero.is_none() || part.iter().any(|&byte| byte != 0) {
                target.write_all_at(part, to_offset + done).map_err(|e| os(&e))?;
            }
            done += part.len() as u64;
        }
        Ok(())
    }

    fn equal(&self, first: (FileId, u64), second: (FileId, u64), len: u64) -> Result<bool> {
        let mut done = 0;
        let mut buffers = [std::vec![0; CHUNK], std::vec![0; CHUNK]];
        while done < len {
            let count = CHUNK.min(usize::try_from(len - done).unwrap_or(usize::MAX));
            for ((file, offset), buffer) in [first, second].iter().zip(&mut buffers) {
                self.read(*file, offset + done, &mut buffer[..count])?;
            }
            if buffers[0][..count] != buffers[1][..count] {
                return Ok(false);
            }
            done += count as u64;
        }
        Ok(true)
    }

    fn fill_zeroes(&self, file: FileId, offset: u64, len: u64) -> Result<()> {
        let file = self.host_file(file)?;
        let zeroes = std::vec![0; CHUNK];
        let mut done = 0;
        while done < len {
            let part = zeroes.len().min(usize::try_from(len - done).unwrap_or(usize::MAX));
            file.write_all_at(&zeroes[..part], offset + done).map_err(|e| os(&e))?;
            done += part as u64;
        }
        Ok(())
    }

    fn allocate(&self, file: FileId, flags: FallocateFlags, offset: u64, len: u64) -> Result<()> {
        let file = self.host_file(file)?;
        rustix::fs::fallocate(&*file, flags, offset, len).map_err(|e| Error::from_os(e.raw_os_error()))
    }
}

impl Platform for Host {
    fn files(&self) -> &FileTable {
        &self.shared.table
    }

    fn submit(&self, batch: &mut [Io<'_>]) -> core::result::Result<(), FailedIo> {
        for (index, io) in batch.iter_mut().enumerate() {
            self.execute(io).map_err(|error| FailedIo { index, error, on_target: false })?;
            self.shared.table.done(io);
        }
        Ok(())
    }

    fn hole_runs(&self, file: FileId, offset: u64, len: u64, runs: &mut [HoleRun]) -> Result<usize> {
        let file = self.host_file(file)?;
        let end = offset.saturating_add(len);
        let (mut at, mut count) = (offset, 0);
        while at < end && count < runs.len() {
            let data = seek(&file, SeekFrom::Data(at))?.unwrap_or(end).min(end);
            let (next, is_data) =
                if data > at { (data, 0) } else { (seek(&file, SeekFrom::Hole(at))?.unwrap_or(end).min(end), 1) };
            runs[count] = HoleRun { len: next - at, data: is_data };
            (at, count) = (next, count + 1);
        }
        Ok(count)
    }

    fn call(&self, call: &Call) {
        locked(&self.shared.calls).push(call.clone());
    }

    fn open(&self, request: OpenFile) -> OpenAnswer {
        let flags = if request.writable { DeviceFlags::WRITABLE } else { DeviceFlags::empty() };
        let file = (locked(&self.shared.opener))(&request);
        let Some(device) = file.and_then(|file| self.grant(file, flags).ok()) else { return OpenAnswer::default() };
        let Some(state) = self.shared.table.get(FileId(device)) else { return OpenAnswer::default() };
        let allocated = state.allocated().unwrap_or(u64::MAX);
        OpenAnswer { granted: true, device, len: state.len(), flags: flags.bits(), allocated }
    }

    fn vcpus(&self) -> usize {
        self.shared.vcpus
    }

    fn parallel(&self, n: usize, f: &(dyn Fn(usize) + Sync)) {
        assert!(n <= self.shared.vcpus, "{n} vCPUs wanted, {} present", self.shared.vcpus);
        thread::scope(|scope| {
            for worker in 1..n {
                scope.spawn(move || f(worker));
            }
            if n > 0 {
                f(0);
            }
        });
    }

    fn epoch(&self) -> u32 {
        *locked(&self.shared.epoch)
    }

    fn wait(&self, epoch: u32) {
        let mut now = locked(&self.shared.epoch);
        while *now == epoch {
            now = self.shared.woken.wait(now).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn wake(&self) {
        let mut epoch = locked(&self.shared.epoch);
        *epoch = epoch.wrapping_add(1);
        self.shared.woken.notify_all();
    }
}

/// A file in memory (holes included) with these contents.
///
/// # Errors
/// The host has no memory for it.
pub fn memory_file(bytes: &[u8]) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("instar", MemfdFlags::CLOEXEC)?);
    file.write_all_at(bytes, 0)?;
    Ok(file)
}

fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn os(error: &io::Error) -> Error {
    error.raw_os_error().map_or(Error::new(ErrorKind::Io), Error::from_os)
}

/// `None`: nothing of that kind up to the end of the file.
fn seek(file: &File, position: SeekFrom) -> Result<Option<u64>> {
    match rustix::fs::seek(file, position) {
        Ok(offset) => Ok(Some(offset)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(Error::from_os(error.raw_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use instar_blockio::{BlockMap, BlockRead, BlockWrite, ExtentKind, ReadPart};
    use instar_guest_protocol::message::{Progress, call};

    use super::*;

    fn host_with(bytes: &[u8]) -> (Host, FileId) {
        let host = Host::new(2);
        let device = host.grant_bytes(bytes).unwrap();
        (host, FileId(device))
    }

    #[test]
    fn batch_of_every_request() {
        let (host, from) = host_with(b"0123456789");
        let to = FileId(host.grant_bytes(b"").unwrap());
        let mut word = [0xff; 8];
        host.submit(&mut [
            Io::SetLen { file: to, len: 4096 },
            Io::Write { file: to, offset: 100, buf: b"abc" },
            Io::Copy { from, offset: 8, to, to_offset: 200, len: 4, skip_zero: None },
            Io::WriteZeroes { file: to, offset: 101, len: 1, mode: ZeroMode::KeepAllocated },
            Io::Allocate { file: to, offset: 4096, len: 4096 },
            Io::Discard { file: to, offset: 0, len: 100 },
            Io::Flush { file: to },
            Io::Read { file: from, offset: 6, buf: &mut word },
        ])
        .unwrap();
        assert_eq!(&word, b"6789\0\0\0\0");
        let bytes = host.contents(to.0).unwrap();
        assert_eq!(bytes.len(), 8192);
        assert_eq!(&bytes[100..103], b"a\0c");
        assert_eq!(&bytes[200..204], b"89\0\0");
        assert_eq!(host.file(to.0).unwrap().size(), 8192);
    }

    #[test]
    fn first_failure_is_told_by_its_index() {
        let (host, file) = host_with(b"0123456789");
        let failed = host.submit(&mut [
            Io::Write { file, offset: 0, buf: b"x" },
            Io::Discard { file, offset: 11, len: 1 },
            Io::Write { file: FileId(7), offset: 0, buf: b"x" },
        ]);
        let failed = failed.unwrap_err();
        assert_eq!((failed.index, failed.error.kind()), (1, ErrorKind::OutOfBounds));
        assert_eq!(&host.contents(file.0).unwrap()[..1], b"x");
    }

    #[test]
    fn zeroes_are_skipped_in_blocks() {
        let mut bytes = std::vec![0; 2048];
        bytes[1024] = 7;
        let (host, from) = host_with(&bytes);
        let to = FileId(host.grant_bytes(&[0xee; 2048]).unwrap());
        host.submit(&mut [Io::Copy { from, offset: 0, to, to_offset: 0, len: 2048, skip_zero: Some(512) }]).unwrap();
        let copied = host.contents(to.0).unwrap();
        assert!(copied[..1024].iter().all(|&byte| byte == 0xee));
        assert_eq!((copied[1024], copied[1025]), (7, 0));
        assert!(copied[1536..].iter().all(|&byte| byte == 0xee));
    }

    #[test]
    fn file_reads_strictly_and_grows() {
        let (host, id) = host_with(b"0123456789");
        let mut file = host.file(id.0).unwrap();
        assert_eq!(file.read_at(8, &mut [0; 3]).unwrap_err().kind(), ErrorKind::OutOfBounds);
        let (mut a, mut b) = ([0; 2], [0; 3]);
        file.read_many(&mut [ReadPart { offset: 8, buf: &mut a }, ReadPart { offset: 0, buf: &mut b }]).unwrap();
        assert_eq!((&a, &b), (b"89", b"012"));
        file.write_at(12, b"end").unwrap();
        assert_eq!(host.contents(id.0).unwrap(), b"0123456789\0\0end");
        assert!(host.file(1).is_none());
    }

    #[test]
    fn holes_become_extents() {
        let (host, id) = host_with(b"");
        let mut file = host.file(id.0).unwrap();
        file.set_size(8 << 20).unwrap();
        file.write_at(4 << 20, &[1; 4096]).unwrap();
        let hole = file.extent_at(100, u64::MAX).unwrap();
        assert_eq!((hole.kind, hole.len), (ExtentKind::Zero { host: None }, (4 << 20) - 100));
        let data = file.extent_at(4 << 20, 512).unwrap();
        assert_eq!((data.kind, data.len), (ExtentKind::Data { file: id, host: 4 << 20 }, 512));
        assert_eq!(file.extent_at(8 << 20, 1).unwrap_err().kind(), ErrorKind::OutOfBounds);
    }

    #[test]
    fn opener_decides_and_calls_are_kept() {
        let host = Host::with_opener(1, |request| (request.name == b"yes").then(|| memory_file(b"found").unwrap()));
        assert!(!host.open(OpenFile { name: b"no".to_vec(), ..OpenFile::default() }).granted);
        let answer = host.open(OpenFile { name: b"yes".to_vec(), ..OpenFile::default() });
        assert_eq!((answer.granted, answer.len, answer.flags), (true, 5, 0));
        assert_eq!(host.file(answer.device).unwrap().size(), 5);
        let call = Call { kind: Some(call::Kind::Progress(Progress { done: 1, total: 2 })) };
        host.call(&call);
        assert_eq!(host.calls(), [call]);
    }

    #[test]
    fn workers_hand_over_by_epoch() {
        let host = Host::new(2);
        let turn = AtomicU32::new(0);
        host.parallel(2, &|me| {
            for round in 0..50 {
                loop {
                    let epoch = host.epoch();
                    if turn.load(Ordering::Acquire) == 2 * round + me as u32 {
                        break;
                    }
                    host.wait(epoch);
                }
                turn.fetch_add(1, Ordering::Release);
                host.wake();
            }
        });
        assert_eq!(turn.into_inner(), 100);
    }
}
