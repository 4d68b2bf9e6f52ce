//! Forks the monitor process and takes away what it inherited.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use instar_guest_protocol::limits::{MAX_DEVICES, MAX_VCPUS};
use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope};
use rustix::io::{Errno, fcntl_dupfd_cloexec, retry_on_intr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{
    DumpableBehavior, Gid, Pid, Resource, Rlimit, Signal, Uid, WaitOptions, geteuid, getpid, getppid, getrlimit,
    getuid, kill_process, set_dumpable_behavior, set_parent_process_death_signal, setrlimit, waitpid,
};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

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

/// The process ends when its parent does.
fn die_with(parent: Option<Pid>) -> Result<(), Errno> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != parent {
        // It died before the line above.
        exit(STATUS_LOST);
    }
    Ok(())
}

/// Gives up everything inherited but the socket.
fn lock_down(parent: Pid, socket: BorrowedFd<'_>) -> Result<(), Errno> {
    die_with(Some(parent))?;
    set_no_new_privs(true)?;
    // Nobody may attach to this process or read its memory, and it leaves no core behind.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    limit_files()?;
    close_others(socket.as_raw_fd())
}

/// Gives up privileges that were needed to open `/dev/kvm`, the standard streams, and the sight of all file systems. Where the
/// caller is root, the process goes on as `user`.
///
/// The streams are not closed: a granted file would take their place, and whatever prints would write into it. `kvm`, which
/// can be neither read nor written, takes it.
pub fn drop_privileges(kvm: RawFd, user: u32, debug: bool) -> Result<(), Errno> {
    // SAFETY: the caller passes the descriptor of `/dev/kvm`, which is open for the rest of the process's life.
    let kvm = unsafe { BorrowedFd::borrow_raw(kvm) };
    dup2_stdin(kvm)?;
    dup2_stdout(kvm)?;
    if !debug {
        dup2_stderr(kvm)?;
    }
    if geteuid().is_root() || getuid().is_root() {
        become_user(user)?;
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    leave_file_systems();
    Ok(())
}

/// Takes another user and group for good.
fn become_user(user: u32) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    // The process has one thread, so a change of the thread's identity is one of the process.
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    // The change has undone both.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    die_with(getppid())
}

/// No path leads anywhere any more, where the kernel has Landlock. Open files stay as they are. The system call filters allow
/// no call that takes a path, so this is a second wall and its absence no error.
fn leave_file_systems() {
    let abi = ABI::V6;
    let rules = Ruleset::default().handle_access(AccessFs::from_all(abi));
    let rules = rules.and_then(|rules| rules.handle_access(AccessNet::from_all(abi)));
    let rules = rules.and_then(|rules| rules.scope(Scope::from_all(abi)));
    // `no_new_privs` is set already.
    let _ = rules.and_then(|rules| rules.create()).and_then(|rules| rules.no_new_privs(false).restrict_self());
}

/// The process ends by a signal when it has used so many seconds of processor time, and when it writes a file though it is `read_only`.
pub fn limit(seconds: Option<u64>, read_only: bool) -> Result<(), Errno> {
    if read_only {
        setrlimit(Resource::Fsize, Rlimit { current: Some(0), maximum: Some(0) })?;
    }
    // The caller's limit on the size of files is an error of the write, to be told like others; ours is broken by nobody who is honest.
    let then = if read_only { libc::SIG_DFL } else { libc::SIG_IGN };
    // SAFETY: no handler is installed, so nothing runs that would have to be safe in one.
    unsafe { libc::signal(libc::SIGXFSZ, then) };
    let Some(seconds) = seconds else { return Ok(()) };
    let now = getrlimit(Resource::Cpu);
    let least = |limit: Option<u64>| Some(limit.map_or(seconds, |limit| limit.min(seconds)));
    setrlimit(Resource::Cpu, Rlimit { current: least(now.current), maximum: now.maximum })
}

/// No more descriptors than a run can need, even if the caller has more.
fn limit_files() -> Result<(), Errno> {
    /// Files granted at most, and the machine's own: socket, machine, vCPUs, and those in place of the standard streams.
    const MOST: u64 = MAX_DEVICES as u64 + MAX_VCPUS as u64 + 16;
    let now = getrlimit(Resource::Nofile);
    let least = |limit: Option<u64>| Some(limit.map_or(MOST, |limit| limit.min(MOST)));
    setrlimit(Resource::Nofile, Rlimit { current: least(now.current), maximum: least(now.maximum) })
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
