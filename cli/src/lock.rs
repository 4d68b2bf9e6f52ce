//! The byte-range locks by which QEMU's programs keep out of each other's way.
//!
//! Byte `100 + n` is locked (shared) by who uses permission *n*, byte `200 + n` by who does not share it. Locks belong to the
//! open file, so they reach the monitor process with it and end when it is closed everywhere.

use std::os::fd::BorrowedFd;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::io::Errno;

use crate::problem::{Problem, os_text};

/// First byte of the permissions in use.
const USED: i64 = 100;
/// First byte of the permissions not shared.
const UNSHARED: i64 = 200;
/// Bytes from the first to the last lock.
const SPAN: i64 = 104;

/// A permission; the value is its place among the lock bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permission {
    Read = 0,
    Write = 1,
    Resize = 3,
}

impl Permission {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "consistent read",
            Self::Write => "write",
            Self::Resize => "resize",
        }
    }
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Describing an image: nobody may be writing it.
    Describe,
    /// Reading its contents.
    Read,
    /// Writing it: nobody else may write it, or read it as something that does not change.
    Write,
}

impl Purpose {
    fn used(self) -> &'static [Permission] {
        match self {
            Self::Describe => &[],
            Self::Read => &[Permission::Read],
            Self::Write => &[Permission::Read, Permission::Write, Permission::Resize],
        }
    }

    fn unshared(self) -> &'static [Permission] {
        &[Permission::Write, Permission::Resize]
    }
}

/// Takes the locks of `purpose` on a file that messages call `name`.
///
/// # Errors
/// Another process holds a lock against it; or the file system has no such locks.
pub fn acquire(file: BorrowedFd<'_>, purpose: Purpose, name: &str) -> Result<(), Problem> {
    for used in purpose.used() {
        share(file, USED + *used as i64)?;
    }
    for unshared in purpose.unshared() {
        share(file, UNSHARED + *unshared as i64)?;
    }
    let contested =
        |what: String| Err(Problem::new(what).with_hint(format!("Is another process using the image [{name}]?")));
    for used in purpose.used() {
        if is_taken(file, UNSHARED + *used as i64)? {
            return contested(format!("Failed to get \"{}\" lock", used.name()));
        }
    }
    for unshared in purpose.unshared() {
        if is_taken(file, USED + *unshared as i64)? {
            return contested(format!("Failed to get shared \"{}\" lock", unshared.name()));
        }
    }
    Ok(())
}

/// Gives all locks back at once, although another process may hold the same open file.
pub fn release(file: BorrowedFd<'_>) {
    let lock = range(libc::F_UNLCK, USED, SPAN);
    // A failure leaves the locks to the last close.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&lock));
}

fn share(file: BorrowedFd<'_>, byte: i64) -> Result<(), Problem> {
    let lock = range(libc::F_RDLCK, byte, 1);
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(errno) => Err(Problem::new(format!("Failed to lock byte {byte}: {}", os_text(errno as i32)))),
    }
}

/// Does someone else hold a lock on the byte?
fn is_taken(file: BorrowedFd<'_>, byte: i64) -> Result<bool, Problem> {
    let mut lock = range(libc::F_WRLCK, byte, 1);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
        Ok(_) => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        Err(errno) => {
            let errno = Errno::from_raw_os_error(errno as i32);
            Err(Problem::new(format!("Failed to test byte {byte} for locks: {}", os_text(errno.raw_os_error()))))
        }
    }
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: len, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn two() -> (tempfile::NamedTempFile, std::fs::File) {
        let one = tempfile::NamedTempFile::new().unwrap();
        let other = one.reopen().unwrap();
        (one, other)
    }

    #[test]
    fn readers_share() {
        let (one, other) = two();
        acquire(one.as_file().as_fd(), Purpose::Read, "f").unwrap();
        acquire(other.as_fd(), Purpose::Read, "f").unwrap();
        acquire(other.as_fd(), Purpose::Describe, "f").unwrap();
    }

    #[test]
    fn a_reader_keeps_writers_out() {
        let (one, other) = two();
        acquire(one.as_file().as_fd(), Purpose::Read, "f").unwrap();
        assert_eq!(
            acquire(other.as_fd(), Purpose::Write, "f").unwrap_err().to_string(),
            "Failed to get \"write\" lock\nIs another process using the image [f]?"
        );
    }

    #[test]
    fn a_writer_keeps_readers_out_until_release() {
        let (one, other) = two();
        acquire(one.as_file().as_fd(), Purpose::Write, "f").unwrap();
        for purpose in [Purpose::Describe, Purpose::Read] {
            assert_eq!(
                acquire(other.as_fd(), purpose, "f").unwrap_err().to_string(),
                "Failed to get shared \"write\" lock\nIs another process using the image [f]?"
            );
        }
        release(one.as_file().as_fd());
        acquire(other.as_fd(), Purpose::Read, "f").unwrap();
    }
}
