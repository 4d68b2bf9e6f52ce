//! What an operation stands on: granted files, messages to the host, and vCPUs.
//!
//! Operations are generic over [`Platform`]. It is implemented twice: by the guest's own runtime (`rt`, feature
//! `freestanding`) and over threads and host files (`host`, feature `std`), so the same code runs in tests.
//!
//! ```text
//!   operation ── File (BlockRead, BlockWrite, BlockMap) ──┐
//!       └─────── Platform::submit(&mut [Io]) ─────────────┴──► one kick for the whole batch
//! ```

use alloc::vec::Vec;

use instar_blockio::{
    BlockMap, BlockRead, BlockWrite, Error, ErrorKind, Extent, ExtentKind, FileId, Limits, ReadPart, Result, WritePart,
    ZeroMode, check_range,
};
use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::message::{Call, OpenAnswer, OpenFile};
use instar_guest_protocol::ring::HoleRun;

use crate::files::FileTable;

/// One request on granted files. Offsets and lengths are bytes; a length of 0 does nothing.
#[derive(Debug)]
pub enum Io<'a> {
    /// Fills `buf`. What lies behind the end of the file reads as zero, as an [`ExtentKind::Data`] promises.
    Read {
        /// From which file.
        file: FileId,
        /// Where in it.
        offset: u64,
        /// Filled completely.
        buf: &'a mut [u8],
    },
    /// Writes `buf`. A regular file grows; on a block device the range must lie inside.
    Write {
        /// To which file.
        file: FileId,
        /// Where in it.
        offset: u64,
        /// What to write.
        buf: &'a [u8],
    },
    /// Copies on the host, without passing through the guest. What lies behind the end of `from` counts as zero.
    Copy {
        /// Source.
        from: FileId,
        /// Where in it.
        offset: u64,
        /// Target; grows as for [`Write`](Self::Write), except that skipped zeroes do not extend it.
        to: FileId,
        /// Where in it.
        to_offset: u64,
        /// How much.
        len: u64,
        /// Leave out all-zero blocks of this many bytes (a power of two, 512 to 16 MiB), counted from `offset`; the
        /// target is known to read as zero there.
        skip_zero: Option<u32>,
    },
    /// Lets two files share the space of a range (reflink), or fails: with [`ErrorKind::Unsupported`] where they can't.
    Share {
        /// Source; all of the range lies inside.
        from: FileId,
        /// Where in it.
        offset: u64,
        /// Target; grows as for [`Write`](Self::Write).
        to: FileId,
        /// Where in it.
        to_offset: u64,
        /// How much.
        len: u64,
    },
    /// Compares two ranges on the host, without passing through the guest. What lies behind the end of a file counts as zero.
    Compare {
        /// One file.
        file: FileId,
        /// Where in it.
        offset: u64,
        /// The other.
        other: FileId,
        /// Where in it.
        other_offset: u64,
        /// How much.
        len: u64,
        /// Cleared if the ranges differ.
        equal: &'a mut bool,
    },
    /// Makes a range inside the file read as zero.
    WriteZeroes {
        /// In which file.
        file: FileId,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// What happens to the space.
        mode: ZeroMode,
    },
    /// Gives the space of a range inside the file back; a regular file then reads as zero there.
    Discard {
        /// In which file.
        file: FileId,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Allocates space, extending the file; contents stay, new bytes are zero.
    Allocate {
        /// In which file.
        file: FileId,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Sets the file's length; new bytes are a hole.
    SetLen {
        /// Of which file.
        file: FileId,
        /// The new length.
        len: u64,
    },
    /// Makes the file durable.
    Flush {
        /// Which file.
        file: FileId,
    },
}

/// A request that failed.
#[derive(Clone, Copy, Debug)]
pub struct FailedIo {
    /// Its place among those that were made.
    pub index: usize,
    /// Why.
    pub error: Error,
    /// It is a copy, and the file that it writes is at fault.
    pub on_target: bool,
}

/// What an operation stands on. Cheap to clone.
pub trait Platform: Clone + Send + Sync + 'static {
    /// What is known of the granted files.
    fn files(&self) -> &FileTable;

    /// Executes the requests in order, in as few turns as possible. Any size and number is allowed.
    ///
    /// # Errors
    /// The first request that failed, and why. Those before it were executed; those behind it may have been. (Reads
    /// or writes that continue each other in one file may be joined, and then fail together: the index is the first.)
    fn submit(&self, batch: &mut [Io<'_>]) -> core::result::Result<(), FailedIo>;

    /// Fills `runs` with the data and holes of `offset..offset + len` of the file, from `offset` on, and says how many
    /// there are. [`File::extent_at`](BlockMap::extent_at) asks this and remembers the answer.
    ///
    /// # Errors
    /// What the host reports.
    fn hole_runs(&self, file: FileId, offset: u64, len: u64, runs: &mut [HoleRun]) -> Result<usize>;

    /// Sends a message that is not [`Open`](instar_guest_protocol::message::call::Kind::Open). Returns once it is
    /// delivered; for [`Pace`](instar_guest_protocol::message::call::Kind::Pace), once the host lets the work go on.
    fn call(&self, call: &Call);

    /// Asks for a file. A granted one is known to [`file`](Self::file) from then on.
    fn open(&self, request: OpenFile) -> OpenAnswer;

    /// How many vCPUs (or threads) there are, at least 1.
    fn vcpus(&self) -> usize;

    /// Runs `f(0)` here and `f(1)..f(n)` on workers; returns once all have finished.
    ///
    /// # Panics
    /// If `n` exceeds [`vcpus`](Self::vcpus), or on a worker, or inside another `parallel`.
    fn parallel(&self, n: usize, f: &(dyn Fn(usize) + Sync));

    /// The count of [`wake`](Self::wake)s so far, for [`wait`](Self::wait).
    ///
    /// To wait for a condition: read the epoch, test the condition, then wait with that epoch; who makes the condition
    /// true wakes afterwards. No wake is lost.
    fn epoch(&self) -> u32;

    /// Returns once the count differs from `epoch`: spins a little, then sleeps.
    fn wait(&self, epoch: u32);

    /// Raises the count and wakes all that sleep in [`wait`](Self::wait).
    fn wake(&self);

    /// A granted file; `None` if there is no such device.
    fn file(&self, device: u32) -> Option<File<Self>> {
        self.files().get(FileId(device)).is_some().then(|| File { platform: self.clone(), id: FileId(device) })
    }
}

/// A granted file. Clones are the same file, and share what is known of it.
#[derive(Clone, Debug)]
pub struct File<P> {
    platform: P,
    id: FileId,
}

impl<P: Platform> File<P> {
    /// Its number, by which extents name it.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// What it allows.
    pub fn flags(&self) -> DeviceFlags {
        self.platform.files().get(self.id).map_or(DeviceFlags::empty(), |state| state.flags())
    }

    fn submit_one(&self, io: Io<'_>) -> Result<()> {
        self.platform.submit(&mut [io]).map_err(|failed| failed.error)
    }
}

impl<P: Platform> BlockRead for File<P> {
    fn size(&self) -> u64 {
        self.platform.files().get(self.id).map_or(0, |state| state.len())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size(), offset, buf.len() as u64)?;
        self.submit_one(Io::Read { file: self.id, offset, buf })
    }

    fn read_many(&self, parts: &mut [ReadPart<'_>]) -> Result<()> {
        let size = self.size();
        let mut batch = Vec::new();
        batch.try_reserve_exact(parts.len()).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        for part in parts {
            check_range(size, part.offset, part.buf.len() as u64)?;
            batch.push(Io::Read { file: self.id, offset: part.offset, buf: part.buf });
        }
        self.platform.submit(&mut batch).map_err(|failed| failed.error)
    }

    fn limits(&self) -> Limits {
        let regular = !self.flags().contains(DeviceFlags::BLOCK_DEVICE);
        Limits { discard_zeroes: regular, grows: regular, ..Limits::BYTE }
    }
}

impl<P: Platform> BlockWrite for File<P> {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        self.submit_one(Io::Write { file: self.id, offset, buf })
    }

    fn write_many(&mut self, parts: &[WritePart<'_>]) -> Result<()> {
        let mut batch = Vec::new();
        batch.try_reserve_exact(parts.len()).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
        batch.extend(parts.iter().map(|part| Io::Write { file: self.id, offset: part.offset, buf: part.buf }));
        self.platform.submit(&mut batch).map_err(|failed| failed.error)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.submit_one(Io::WriteZeroes { file: self.id, offset, len, mode })
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.submit_one(Io::Discard { file: self.id, offset, len })
    }

    fn set_size(&mut self, size: u64) -> Result<()> {
        self.submit_one(Io::SetLen { file: self.id, len: size })
    }

    fn flush(&mut self) -> Result<()> {
        self.submit_one(Io::Flush { file: self.id })
    }
}

/// The file's hole map: [`Data`](ExtentKind::Data) or [`Zero`](ExtentKind::Zero) without space. A host that can't tell
/// calls everything data.
impl<P: Platform> BlockMap for File<P> {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        if max_len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        let state = self.platform.files().get(self.id).ok_or(Error::new(ErrorKind::OutOfBounds).at(offset))?;
        let size = state.len();
        check_range(size, offset, 1)?;
        let ask = |offset, len, runs: &mut [HoleRun]| self.platform.hole_runs(self.id, offset, len, runs);
        let (end, data) = state.run_at(offset, ask);
        let kind =
            if data { ExtentKind::Data { file: self.id, host: offset } } else { ExtentKind::Zero { host: None } };
        Ok(Extent { offset, len: max_len.min(end - offset), depth: 0, kind })
    }
}
