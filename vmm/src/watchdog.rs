//! Ends a run that does not get on.
//!
//! The monitor process counts in a shared page what it did for the guest: one addition per doorbell. The caller's process,
//! which waits for messages anyway, looks at it when none came for a while. So a short run pays for one page, and no thread
//! is needed that could itself be stopped by what it watches.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vm_memory::{MmapRegion, VolatileMemory};

use crate::config::Settings;
use crate::error::Error;

/// The shared page.
#[derive(Debug)]
pub struct Progress {
    page: MmapRegion,
}

/// Offsets in the page.
const DONE: usize = 0;
const BUSY: usize = 64;

impl Progress {
    /// A page that processes forked from here on share.
    pub fn new() -> Result<Self, Error> {
        let page =
            MmapRegion::build(None, 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS)
                .map_err(|_| Error::Io(std::io::Error::last_os_error()))?;
        Ok(Self { page })
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // Inside of the page and aligned.
        self.page.get_atomic_ref(offset).unwrap_or_else(|_| unreachable!())
    }

    /// The monitor works for the guest until the returned guard is dropped; that counts as progress.
    pub fn work(&self) -> Work<'_> {
        self.word(BUSY).fetch_add(1, Ordering::Relaxed);
        Work(self)
    }

    /// Changes with every piece of work done; `None` while one is going on.
    fn state(&self) -> Option<u64> {
        (self.word(BUSY).load(Ordering::Relaxed) == 0).then(|| self.word(DONE).load(Ordering::Relaxed))
    }
}

/// A piece of work of the monitor.
pub struct Work<'p>(&'p Progress);

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.0.word(DONE).fetch_add(1, Ordering::Relaxed);
        self.0.word(BUSY).fetch_sub(1, Ordering::Relaxed);
    }
}

/// Waits for the monitor, with patience.
#[derive(Debug)]
pub struct Watchdog {
    stall: Duration,
    deadline: Option<Instant>,
}

impl Watchdog {
    /// A watchdog; a time limit runs from now on.
    pub fn new(settings: &Settings) -> Self {
        let deadline = settings.time_limit.and_then(|limit| Instant::now().checked_add(limit));
        Self { stall: settings.stall, deadline }
    }

    /// Waits until `socket` has something to read.
    pub fn wait(&self, socket: BorrowedFd<'_>, progress: &Progress) -> Result<(), Error> {
        let mut since = Instant::now();
        let mut last = progress.state();
        loop {
            let now = Instant::now();
            let patience = self.stall.saturating_sub(now - since);
            if patience.is_zero() {
                return Err(Error::Stalled);
            }
            // Looking four times as often as needed keeps the moment of the last progress close to the truth.
            let mut slice = patience.min(self.stall / 4).max(Duration::from_millis(1));
            if let Some(deadline) = self.deadline {
                let left = deadline.saturating_duration_since(now);
                if left.is_zero() {
                    return Err(Error::TimedOut);
                }
                slice = slice.min(left);
            }
            if readable(socket, slice)? {
                return Ok(());
            }
            let state = progress.state();
            if state.is_none() || state != last {
                since = Instant::now();
                last = state;
            }
        }
    }
}

fn readable(socket: BorrowedFd<'_>, patience: Duration) -> Result<bool, Error> {
    let timeout = Timespec::try_from(patience.min(Duration::from_secs(3600))).map_err(|_| Errno::INVAL)?;
    match poll(&mut [PollFd::from_borrowed_fd(socket, PollFlags::IN)], Some(&timeout)) {
        Ok(count) => Ok(count > 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn settings(stall: u64, limit: Option<u64>) -> Settings {
        Settings {
            stall: Duration::from_millis(stall),
            time_limit: limit.map(Duration::from_millis),
            ..Settings::default()
        }
    }

    #[test]
    fn silence_is_a_stall() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let progress = Progress::new().unwrap();
        let result = Watchdog::new(&settings(40, None)).wait(reader.as_fd(), &progress);
        assert!(matches!(result, Err(Error::Stalled)));
    }

    #[test]
    fn work_is_progress_and_the_time_limit_holds_anyway() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let progress = Progress::new().unwrap();
        let work = progress.work();
        let dog = Watchdog::new(&settings(20, Some(200)));
        assert!(matches!(dog.wait(reader.as_fd(), &progress), Err(Error::TimedOut)));
        drop(work);
    }

    #[test]
    fn something_to_read_ends_the_wait() {
        use std::io::Write;
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"x").unwrap();
        let progress = Progress::new().unwrap();
        Watchdog::new(&settings(20, Some(20))).wait(reader.as_fd(), &progress).unwrap();
    }
}
