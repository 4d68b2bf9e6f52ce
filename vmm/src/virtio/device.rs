//! Granted files.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use instar_guest_protocol::boot::{DeviceFlags, DeviceInfo};
use rustix::fs::ftruncate;
use rustix::io::{Errno, retry_on_intr};

use super::nbd::{Nbd, NbdExport};
use super::turns::Turns;
use crate::faults::{FaultKinds, FaultRule, Faults};
use crate::stats::{DeviceCounters, DeviceTraffic};

/// All granted files; the index is the device number.
#[derive(Debug, Default)]
pub struct DeviceTable(Vec<Device>);

impl DeviceTable {
    /// Adds a file.
    pub fn push(&mut self, device: Device) {
        self.0.push(device);
    }

    /// The file with this number.
    pub fn get(&self, number: u32) -> Option<&Device> {
        self.0.get(usize::try_from(number).ok()?)
    }

    /// Lets requests on the last file fail by these rules.
    pub fn let_last_fail(&mut self, rules: Vec<FaultRule>) {
        if let Some(device) = self.0.last_mut() {
            device.faults = Some(Faults::new(rules));
        }
    }

    /// Number of files.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// What the guest is told about each.
    pub fn infos(&self) -> Vec<DeviceInfo> {
        self.0.iter().map(Device::info).collect()
    }

    /// What was done with each.
    pub fn traffic(&self) -> Vec<DeviceTraffic> {
        self.0.iter().map(|device| device.counters.sums()).collect()
    }

    /// Closes all files.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// Which bytes of a file a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The first one.
    pub base: u64,
    /// The first one behind.
    pub end: u64,
    /// It can't grow.
    pub fixed: bool,
    /// Bytes of disk space that the whole file takes; all ones if nobody knows.
    pub allocated: u64,
}

impl Part {
    /// A whole file of `len` bytes.
    pub fn whole(len: u64) -> Self {
        Self { base: 0, end: len, fixed: false, allocated: u64::MAX }
    }
}

/// A granted file, or a part of one. The guest counts from the beginning of the part; here offsets count from that of the file,
/// into which [`in_file`](Self::in_file) translates.
#[derive(Debug)]
pub struct Device {
    backend: Backend,
    flags: DeviceFlags,
    /// Where the guest's part begins.
    base: u64,
    /// The guest's part can't grow.
    fixed: bool,
    /// See [`Part::allocated`].
    allocated: u64,
    /// Where it ends; grows with writes.
    len: AtomicU64,
    /// Held exclusively while the length is set, shared while a write may extend the file.
    length_changes: RwLock<()>,
    /// Who writes bytes into it, if it is a regular file.
    turns: Turns,
    /// What the file system turned out to be unable to do.
    pub lacks: Lacks,
    /// What was done with it.
    pub counters: DeviceCounters,
    /// Requests that are to fail.
    faults: Option<Faults>,
}

/// Where the bytes are.
#[derive(Debug)]
enum Backend {
    File(OwnedFd),
    Nbd(Nbd),
}

/// Abilities found missing, so that they are tried only once.
#[derive(Debug, Default)]
pub struct Lacks {
    /// Zeroing a range in place.
    pub zero_range: AtomicBool,
    /// Punching holes.
    pub punch_hole: AtomicBool,
    /// Sharing blocks, as the target.
    pub clone_range: AtomicBool,
    /// Copying in the kernel, as the target.
    pub copy_range: AtomicBool,
    /// Telling data from holes.
    pub seek_data: AtomicBool,
}

impl Device {
    /// A part of a file.
    pub fn new(file: OwnedFd, part: Part, flags: DeviceFlags) -> Self {
        Self::over(Backend::File(file), part, flags, Lacks::default())
    }

    /// An NBD export.
    pub fn of_nbd(socket: OwnedFd, export: NbdExport, flags: DeviceFlags) -> Self {
        let nbd = Backend::Nbd(Nbd::new(socket, export));
        Self::over(nbd, Part::whole(export.len), flags | DeviceFlags::BLOCK_DEVICE, Lacks::all())
    }

    fn over(backend: Backend, part: Part, flags: DeviceFlags, lacks: Lacks) -> Self {
        let Part { base, end, fixed, allocated } = part;
        Self {
            backend,
            flags,
            base,
            fixed,
            allocated,
            len: AtomicU64::new(end.max(base)),
            length_changes: RwLock::new(()),
            turns: Turns::default(),
            lacks,
            counters: DeviceCounters::default(),
            faults: None,
        }
    }

    /// Lets a request fail that is to fail. `offset` counts from the beginning of the file.
    pub fn pass(&self, kind: FaultKinds, offset: u64, len: u64) -> rustix::io::Result<()> {
        self.faults.as_ref().map_or(Ok(()), |faults| faults.pass(kind, offset, len))
    }

    /// Requests may be made to fail.
    pub fn has_faults(&self) -> bool {
        self.faults.is_some()
    }

    /// The file. An NBD export has none: the calls that need one fail on its socket.
    pub fn file(&self) -> BorrowedFd<'_> {
        match &self.backend {
            Backend::File(file) => file.as_fd(),
            Backend::Nbd(nbd) => nbd.socket(),
        }
    }

    /// The NBD export, if it is one.
    pub fn nbd(&self) -> Option<&Nbd> {
        match &self.backend {
            Backend::File(_) => None,
            Backend::Nbd(nbd) => Some(nbd),
        }
    }

    /// What the guest is told.
    fn info(&self) -> DeviceInfo {
        let mut flags = self.flags;
        // What can't grow is to the guest as a block device is.
        flags.set(DeviceFlags::BLOCK_DEVICE, !self.grows());
        let len = self.len().saturating_sub(self.base);
        DeviceInfo { len, allocated: self.allocated, flags: flags.bits(), reserved: 0 }
    }

    /// An offset of the guest's, in the file; `None`: no file reaches that far.
    pub fn in_file(&self, offset: u64) -> Option<u64> {
        self.base.checked_add(offset)
    }

    /// Bytes from the beginning of the file to the end of the guest's part, as far as known.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Writes are allowed.
    pub fn is_writable(&self) -> bool {
        self.flags.contains(DeviceFlags::WRITABLE)
    }

    /// It is no regular file.
    pub fn is_block_device(&self) -> bool {
        self.flags.contains(DeviceFlags::BLOCK_DEVICE)
    }

    /// Its end can be moved.
    pub fn grows(&self) -> bool {
        !self.fixed && !self.is_block_device()
    }

    /// Whether `offset..offset + len` may be written: inside of what can't grow, anywhere that a file may reach.
    pub fn may_hold(&self, offset: u64, len: u64) -> bool {
        let limit = if self.grows() { i64::MAX as u64 } else { self.len() };
        offset.checked_add(len).is_some_and(|end| end <= limit)
    }

    /// Runs a write that ends at `end`, and takes note of the growth.
    pub fn growing<T, E>(&self, end: u64, write: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let _guard = self.extension(end);
        let result = write()?;
        self.has_grown_to(end);
        Ok(result)
    }

    /// Writes `len` bytes at `offset`, in parts: `write` is given where each begins, and its length.
    pub fn write_parts<E>(
        &self,
        offset: u64,
        len: usize,
        mut write: impl FnMut(u64, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        self.growing(offset + len as u64, || {
            if self.is_block_device() {
                return write(offset, len);
            }
            let mut turn = self.turns.take();
            let first = first_part(offset, len);
            write(offset, first)?;
            turn.is_nearly_over();
            if first < len { write(offset + first as u64, len - first) } else { Ok(()) }
        })
    }

    /// To be held while a write up to `end` goes on: keeps the length from being set meanwhile.
    pub fn extension(&self, end: u64) -> Option<RwLockReadGuard<'_, ()>> {
        (end > self.len()).then(|| self.length_changes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes note of a write up to `end`.
    pub fn has_grown_to(&self, end: u64) {
        self.len.fetch_max(end, Ordering::AcqRel);
    }

    /// Sets the length, or with `only_grow` extends to it. No write extends the file meanwhile.
    pub fn set_len(&self, len: u64, only_grow: bool) -> rustix::io::Result<()> {
        let _exclusive = self.length_changes.write().unwrap_or_else(PoisonError::into_inner);
        if only_grow && len <= self.len() {
            return Ok(());
        }
        retry_on_intr(|| ftruncate(self.file(), len))?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }
}

/// Three quarters of a long write, up to a page of the file; all of a short one.
fn first_part(offset: u64, len: usize) -> usize {
    const LONG: usize = 256 << 10;
    const PAGE: u64 = 4096;
    let odd = ((offset + (len - len / 4) as u64) % PAGE) as usize;
    if len >= LONG { len - len / 4 - odd } else { len }
}

impl Lacks {
    /// Nothing but reading and writing.
    fn all() -> Self {
        let lacks = || AtomicBool::new(true);
        Self { zero_range: lacks(), punch_hole: lacks(), clone_range: lacks(), copy_range: lacks(), seek_data: lacks() }
    }

    /// Runs `attempt` unless it is known to be pointless. `None`: it is, do it another way.
    pub fn try_once<T>(
        flag: &AtomicBool,
        attempt: impl FnOnce() -> rustix::io::Result<T>,
    ) -> Option<rustix::io::Result<T>> {
        if flag.load(Ordering::Relaxed) {
            return None;
        }
        match attempt() {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::XDEV | Errno::NOTTY) => {
                flag.store(true, Ordering::Relaxed);
                None
            }
            // A matter of this range's alignment, or of swap files and the like.
            Err(Errno::INVAL | Errno::TXTBSY | Errno::PERM) => None,
            result => Some(result),
        }
    }
}
