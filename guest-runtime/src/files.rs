//! What the guest knows of its granted files: length, rights, and the last part of each hole map.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use instar_blockio::{Error, ErrorKind, FileId, Result, SectorCipher, check_range};
use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::limits::MAX_DEVICES;
use instar_guest_protocol::ring::HoleRun;

use crate::lock::Lock;
use crate::platform::Io;

/// Set in [`FileState::flags`] of a granted file, beside its [`DeviceFlags`].
const GRANTED: u32 = 1 << 31;
/// Runs asked for at once (8 KiB).
const HOLE_RUNS: usize = 512;

/// All granted files, by device number.
#[derive(Debug)]
pub struct FileTable {
    slots: [FileState; MAX_DEVICES],
}

impl FileTable {
    /// No file.
    pub const fn new() -> Self {
        Self { slots: [const { FileState::new() }; MAX_DEVICES] }
    }

    /// Enters a file of `len` bytes that takes `allocated` bytes of disk space (all ones: nobody knows); says whether there is room for
    /// its number.
    pub fn grant(&self, file: FileId, len: u64, allocated: u64, flags: DeviceFlags) -> bool {
        let Some(state) = self.slots.get(file.0 as usize) else { return false };
        state.len.store(len, Ordering::Relaxed);
        state.allocated.store(allocated, Ordering::Relaxed);
        state.flags.store(flags.bits() | GRANTED, Ordering::Release);
        true
    }

    /// A granted file.
    pub fn get(&self, file: FileId) -> Option<&FileState> {
        self.slots.get(file.0 as usize).filter(|state| state.flags.load(Ordering::Acquire) & GRANTED != 0)
    }

    /// Refuses what breaks the rules of [`Io`], before it reaches the host.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] (no such file), [`ErrorKind::OutOfBounds`] or [`ErrorKind::ReadOnly`].
    pub fn check(&self, io: &Io<'_>) -> Result<()> {
        match *io {
            Io::Read { file, offset, ref buf } => {
                self.known(file, offset)?;
                in_address_space(offset, buf.len() as u64)
            }
            Io::Write { file, offset, buf } => self.known(file, offset)?.writable_range(offset, buf.len() as u64, true),
            Io::Copy { from, offset, to, to_offset, len, .. } | Io::Share { from, offset, to, to_offset, len } => {
                self.known(from, offset)?;
                in_address_space(offset, len)?;
                self.known(to, to_offset)?.writable_range(to_offset, len, true)
            }
            Io::Compare { file, offset, other, other_offset, len, .. } => {
                self.known(file, offset)?;
                self.known(other, other_offset)?;
                in_address_space(offset, len)?;
                in_address_space(other_offset, len)
            }
            Io::WriteZeroes { file, offset, len, .. } | Io::Discard { file, offset, len } => {
                self.known(file, offset)?.writable_range(offset, len, false)
            }
            Io::Allocate { file, offset, len } => self.known(file, offset)?.writable_range(offset, len, true),
            Io::SetLen { file, len } => self.known(file, len)?.writable_range(0, len, true),
            Io::Flush { file } => self.known(file, 0).map(|_| ()),
        }
    }

    /// Notes what a request that succeeded has changed.
    pub fn done(&self, io: &Io<'_>) {
        match *io {
            Io::Read { .. } | Io::Compare { .. } | Io::Flush { .. } => {}
            Io::Write { file, offset, buf } => self.changed(file, offset.saturating_add(buf.len() as u64)),
            Io::Copy { to, to_offset, len, skip_zero: None, .. } | Io::Share { to, to_offset, len, .. } => {
                self.changed(to, to_offset.saturating_add(len));
            }
            Io::Copy { to, .. } => self.changed(to, 0),
            Io::WriteZeroes { file, .. } | Io::Discard { file, .. } => self.changed(file, 0),
            Io::Allocate { file, offset, len } => self.changed(file, offset.saturating_add(len)),
            Io::SetLen { file, len } => {
                if let Some(state) = self.get(file) {
                    state.len.store(len, Ordering::Release);
                }
                self.changed(file, 0);
            }
        }
    }

    fn known(&self, file: FileId, offset: u64) -> Result<&FileState> {
        self.get(file).ok_or(Error::new(ErrorKind::InvalidInput).at(offset))
    }

    fn changed(&self, file: FileId, end: u64) {
        if let Some(state) = self.get(file) {
            if state.grows() {
                state.len.fetch_max(end, Ordering::AcqRel);
            }
            state.generation.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Default for FileTable {
    fn default() -> Self {
        Self::new()
    }
}

/// File offsets end where the host's signed ones do.
fn in_address_space(offset: u64, len: u64) -> Result<()> {
    check_range(i64::MAX as u64, offset, len)
}

/// What is known of one file.
#[derive(Debug)]
pub struct FileState {
    len: AtomicU64,
    allocated: AtomicU64,
    flags: AtomicU32,
    /// Raised by each change, so that an older hole map is not believed.
    generation: AtomicU32,
    /// Decrypts what lies in the file.
    cipher: Lock<Option<Arc<dyn SectorCipher>>>,
    /// Absent until asked for, so that the table of a fresh guest is zero bytes.
    holes: Lock<Option<Box<HoleMap>>>,
}

/// A part of a hole map: runs from `start` on, each with its end.
#[derive(Debug, Default)]
struct HoleMap {
    generation: u32,
    start: u64,
    runs: Vec<Run>,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    end: u64,
    data: bool,
}

impl FileState {
    const fn new() -> Self {
        Self {
            len: AtomicU64::new(0),
            allocated: AtomicU64::new(0),
            flags: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            cipher: Lock::new(None),
            holes: Lock::new(None),
        }
    }

    /// Keeps the cipher of what lies encrypted in the file, for any vCPU to use.
    pub fn set_cipher(&self, cipher: Arc<dyn SectorCipher>) {
        *self.cipher.lock() = Some(cipher);
    }

    /// The cipher that goes with [`Encrypted`](instar_blockio::ExtentKind::Encrypted) runs of the file.
    ///
    /// # Errors
    /// [`ErrorKind::Encrypted`] if none was set.
    pub fn cipher(&self) -> Result<Arc<dyn SectorCipher>> {
        self.cipher.lock().clone().ok_or(ErrorKind::Encrypted.into())
    }

    /// Length, bytes.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Bytes of disk space that it took when it was granted; `None` if nobody knows.
    pub fn allocated(&self) -> Option<u64> {
        Some(self.allocated.load(Ordering::Acquire)).filter(|&bytes| bytes != u64::MAX)
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it allows.
    pub fn flags(&self) -> DeviceFlags {
        DeviceFlags::from_bits_truncate(self.flags.load(Ordering::Acquire))
    }

    fn grows(&self) -> bool {
        !self.flags().contains(DeviceFlags::BLOCK_DEVICE)
    }

    fn writable_range(&self, offset: u64, len: u64, may_grow: bool) -> Result<()> {
        if !self.flags().contains(DeviceFlags::WRITABLE) {
            return Err(Error::new(ErrorKind::ReadOnly).at(offset));
        }
        if may_grow && self.grows() { in_address_space(offset, len) } else { check_range(self.len(), offset, len) }
    }

    /// How many of `len` bytes at `offset` lie inside the file.
    pub fn inside(&self, offset: u64, len: usize) -> usize {
        let rest = self.len().saturating_sub(offset);
        usize::try_from(rest).map_or(len, |rest| rest.min(len))
    }

    /// End (after `offset`, at most the file's) and kind of the run at `offset`, which lies inside the file. `ask` fills
    /// a part of the hole map from an offset on.
    pub(crate) fn run_at(
        &self,
        offset: u64,
        ask: impl FnOnce(u64, u64, &mut [HoleRun]) -> Result<usize>,
    ) -> (u64, bool) {
        let generation = self.generation.load(Ordering::Acquire);
        let len = self.len().max(offset.saturating_add(1));
        let mut map = self.holes.lock();
        let map = map.get_or_insert_default();
        if let Some(run) = map.find(generation, offset) {
            return (run.end.min(len), run.data);
        }
        let mut raw = [HoleRun::default(); HOLE_RUNS];
        let count = ask(offset, len - offset, &mut raw).unwrap_or(0);
        map.fill(generation, offset, len, raw.get(..count).unwrap_or_default());
        // A host that gave no usable answer leaves it unknown: data, which is always right.
        map.find(generation, offset).map_or((len, true), |run| (run.end.min(len), run.data))
    }
}

impl HoleMap {
    fn find(&self, generation: u32, offset: u64) -> Option<Run> {
        if self.generation != generation || offset < self.start {
            return None;
        }
        self.runs.get(self.runs.partition_point(|run| run.end <= offset)).copied()
    }

    /// Takes the host's runs over, as far as they make sense: nothing of length 0, nothing past `len`.
    fn fill(&mut self, generation: u32, start: u64, len: u64, raw: &[HoleRun]) {
        self.generation = generation;
        self.start = start;
        self.runs.clear();
        if self.runs.try_reserve(raw.len()).is_err() {
            return;
        }
        let mut end = start;
        for run in raw {
            let next = end.saturating_add(run.len).min(len);
            if next > end {
                self.runs.push(Run { end: next, data: run.data != 0 });
            }
            end = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn table(len: u64, flags: DeviceFlags) -> FileTable {
        let table = FileTable::new();
        assert!(table.grant(FileId(3), len, len, flags));
        table
    }

    fn kind(result: Result<()>) -> Option<ErrorKind> {
        result.err().map(|error| error.kind())
    }

    #[test]
    fn requests_are_checked_before_they_leave() {
        let table = table(4 * KIB, DeviceFlags::WRITABLE);
        let (file, other) = (FileId(3), FileId(4));
        let check = |io: Io<'_>| kind(table.check(&io));
        assert_eq!(check(Io::Flush { file: other }), Some(ErrorKind::InvalidInput));
        assert_eq!(check(Io::Flush { file: FileId(u32::MAX) }), Some(ErrorKind::InvalidInput));
        assert_eq!(check(Io::Write { file, offset: u64::MAX, buf: b"xy" }), Some(ErrorKind::OutOfBounds));
        assert_eq!(check(Io::Read { file, offset: u64::MAX, buf: &mut [0; 2] }), Some(ErrorKind::OutOfBounds));
        assert_eq!(check(Io::Write { file, offset: 1 << 40, buf: b"grows" }), None);
        assert_eq!(check(Io::Discard { file, offset: 4095, len: 2 }), Some(ErrorKind::OutOfBounds));
        assert_eq!(check(Io::SetLen { file, len: u64::MAX }), Some(ErrorKind::OutOfBounds));
    }

    #[test]
    fn rights_and_device_size_are_kept() {
        let read_only = table(KIB, DeviceFlags::empty());
        let file = FileId(3);
        assert_eq!(kind(read_only.check(&Io::Write { file, offset: 0, buf: b"x" })), Some(ErrorKind::ReadOnly));
        let device = table(KIB, DeviceFlags::WRITABLE | DeviceFlags::BLOCK_DEVICE);
        assert_eq!(kind(device.check(&Io::Write { file, offset: KIB, buf: b"x" })), Some(ErrorKind::OutOfBounds));
        device.done(&Io::Write { file, offset: KIB, buf: b"x" });
        assert_eq!(device.get(file).unwrap().len(), KIB);
    }

    #[test]
    fn lengths_follow_the_requests() {
        let table = table(10, DeviceFlags::WRITABLE);
        let file = FileId(3);
        let len = || table.get(file).unwrap().len();
        table.done(&Io::Write { file, offset: 4, buf: b"abc" });
        assert_eq!(len(), 10);
        table.done(&Io::Write { file, offset: 9, buf: b"abc" });
        assert_eq!(len(), 12);
        table.done(&Io::Copy { from: file, offset: 0, to: file, to_offset: 20, len: 5, skip_zero: Some(512) });
        assert_eq!(len(), 12);
        table.done(&Io::SetLen { file, len: 3 });
        assert_eq!(len(), 3);
        assert_eq!(table.get(file).unwrap().inside(2, 8), 1);
        assert_eq!(table.get(file).unwrap().inside(u64::MAX, 8), 0);
    }

    #[test]
    fn hole_map_is_asked_once_until_the_file_changes() {
        let table = table(8 * KIB, DeviceFlags::WRITABLE);
        let state = table.get(FileId(3)).unwrap();
        let mut asked = 0;
        let mut at = |offset| {
            state.run_at(offset, |start, len, runs| {
                asked += 1;
                assert_eq!(start + len, 8 * KIB);
                runs[0] = HoleRun { len: 4 * KIB - start, data: 1 };
                runs[1] = HoleRun { len: 4 * KIB, data: 0 };
                Ok(2)
            })
        };
        assert_eq!(at(100), (4 * KIB, true));
        assert_eq!(at(4 * KIB), (8 * KIB, false));
        assert_eq!(at(4 * KIB - 1), (4 * KIB, true));
        table.done(&Io::Write { file: FileId(3), offset: 5 * KIB, buf: b"x" });
        assert_eq!(at(200), (4 * KIB, true));
        assert_eq!(asked, 2);
    }

    #[test]
    fn nonsense_in_a_hole_map_means_data() {
        let table = table(8 * KIB, DeviceFlags::empty());
        let state = table.get(FileId(3)).unwrap();
        assert_eq!(state.run_at(0, |_, _, _| Err(Error::from_os(22))), (8 * KIB, true));
        assert_eq!(state.run_at(1, |_, _, _| Ok(usize::MAX)), (8 * KIB, true));
        let huge = |_, _, runs: &mut [HoleRun]| {
            runs[0] = HoleRun { len: 0, data: 0 };
            runs[1] = HoleRun { len: u64::MAX, data: 0 };
            runs[2] = HoleRun { len: u64::MAX, data: 1 };
            Ok(3)
        };
        assert_eq!(state.run_at(2, huge), (8 * KIB, false));
    }
}
