//! Forks the monitor process and takes away what it inherited.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::{Errno, fcntl_dupfd_cloexec, retry_on_intr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{
    DumpableBehavior, Pid, Resource, Rlimit, Signal, WaitOptions, getpid, getppid, kill_process, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit, waitpid,
};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};

use crate::wire::Channel;

/// Exit status of a monitor that failed without being able to say why.
const STATUS_LOST: i32 = 70;

/// A child process that is not left behind.
#[derive(Debug)]
pub struct Process {
    pid: Option<Pid>,
}

impl Process {
    /// Ends it at once; afterwards all its files are closed. The wait status, if it had one.
    pub fn kill(&mut self) -> Option<i32> {
        let pid = self.pid.take()?;
        // It is not reaped yet, so the number is still its own.
        let _ = kill_process(pid, Signal::KILL);
        retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty())).ok().flatten().map(|(_, status)| status.as_raw())
    }

    /// Waits for a process that has closed its socket: it is about to end, or has ended.
    pub fn wait(&mut self) -> Option<i32> {
        let pid = self.pid.take()?;
        retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty())).ok().flatten().map(|(_, status)| status.as_raw())
    }

    /// Takes note if it has ended, without waiting.
    pub fn reap(&mut self) {
        if let Some(pid) = self.pid.take() {
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

/// Forks a process that runs `body` with one end of a socket pair, and returns the other end.
///
/// The process should have one thread: the child has only the calling one, so a lock that another thread holds at this
/// moment stays locked for ever in the child. (The C library's own locks are taken care of.)
pub fn fork(debug: bool, body: impl FnOnce(Channel) -> Infallible) -> io::Result<(Channel, Process)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let theirs = above_stdio(theirs)?;
    let parent = getpid();
    // SAFETY: the child runs only `child`, which never returns, so nothing that this process owns is dropped twice; it uses
    // the allocator, which the C library keeps usable after a fork.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => child(parent, theirs, debug, body),
        pid => Ok((Channel::new(ours), Process { pid: Pid::from_raw(pid) })),
    }
}

/// The child: from here on nothing of the caller's program runs.
fn child(parent: Pid, socket: OwnedFd, debug: bool, body: impl FnOnce(Channel) -> Infallible) -> ! {
    // A panic ends this process and unwinds nothing. What it says is for developers only.
    std::panic::set_hook(Box::new(move |info| {
        if debug {
            eprintln!("sandbox process: {info}");
        }
        exit(STATUS_LOST);
    }));
    if lock_down(parent, socket.as_fd()).is_err() {
        exit(STATUS_LOST);
    }
    match body(Channel::new(socket)) {}
}

/// Ends this process without running anything that the caller's program registered.
pub fn exit(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Gives up everything inherited but the socket.
fn lock_down(parent: Pid, socket: BorrowedFd<'_>) -> Result<(), Errno> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != Some(parent) {
        // It died before the line above.
        exit(STATUS_LOST);
    }
    set_no_new_privs(true)?;
    // Nobody may attach to this process or read its memory, and it leaves no core behind.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    close_others(socket.as_raw_fd())
}

/// Gives up privileges that were needed to open `/dev/kvm`, and the standard streams.
///
/// The streams are not closed: a granted file would take their place, and whatever prints would write into it. `kvm`, which
/// can be neither read nor written, takes it.
pub fn drop_privileges(kvm: RawFd, debug: bool) -> Result<(), Errno> {
    // SAFETY: the caller passes the descriptor of `/dev/kvm`, which is open for the rest of the process's life.
    let kvm = unsafe { BorrowedFd::borrow_raw(kvm) };
    dup2_stdin(kvm)?;
    dup2_stdout(kvm)?;
    if !debug {
        dup2_stderr(kvm)?;
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// Closes all descriptors but the standard streams and `keep`, which lies above them.
fn close_others(keep: RawFd) -> Result<(), Errno> {
    let keep = keep.unsigned_abs();
    close_range(3, keep.saturating_sub(1))?;
    close_range(keep.saturating_add(1), u32::MAX)
}

fn close_range(first: u32, last: u32) -> Result<(), Errno> {
    if first > last {
        return Ok(());
    }
    // SAFETY: the descriptors belong to objects of the caller's program, none of which runs or is dropped in this process.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

/// A descriptor that is none of the standard streams', should these be closed.
fn above_stdio(socket: OwnedFd) -> io::Result<OwnedFd> {
    if socket.as_raw_fd() > 2 { Ok(socket) } else { Ok(fcntl_dupfd_cloexec(socket, 3)?) }
}
