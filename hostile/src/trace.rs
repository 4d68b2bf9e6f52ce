//! The system calls that the threads of a command make under their filters: which they are, and what comes of it when one fails.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::Path;
use std::process::Stdio;

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::process::{Program, group_of};

/// A call: its number and its first two arguments.
pub type Call = (u64, [u64; 2]);

/// The calls of all threads that are bound by so many filters.
pub type Calls = BTreeMap<u32, BTreeSet<Call>>;

/// Number of `seccomp` on x86-64.
const SECCOMP: u64 = 317;

/// Runs a command under the eyes of this process, and adds what its filtered threads call. Arguments are kept for the calls in
/// `judged` only. Gives the exit status; nothing if no process may be traced here.
///
/// # Errors
/// The program can't be started.
pub fn record(
    program: &Program,
    dir: &Path,
    args: &[&str],
    judged: &[u64],
    calls: &mut Calls,
) -> io::Result<Option<i32>> {
    let mut filters = BTreeMap::new();
    let ended = watch(program, dir, args, |thread| note(thread, judged, &mut filters, calls))?;
    Ok(ended.map(|ended| ended.code.unwrap_or(-1)))
}

/// What a system call on a file is made to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails, and nothing is done.
    Errno(Errno),
    /// A read or write moves one byte only.
    Short,
}

/// What becomes of a command one of whose calls goes wrong.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status, unless a signal ended it.
    pub code: Option<i32>,
    /// Standard error.
    pub stderr: String,
    /// Calls on files that its filtered threads made.
    pub calls: u64,
}

/// Runs a command whose call on a file with number `nth` (all threads together, counted from 0) goes wrong. Nothing if no process
/// may be traced here.
///
/// # Errors
/// The program can't be started.
pub fn fail(program: &Program, dir: &Path, args: &[&str], nth: u64, fault: Fault) -> io::Result<Option<Ended>> {
    let (mut filters, mut hit, mut calls) = (BTreeMap::new(), None, 0);
    let ended = watch(program, dir, args, |thread| {
        let Ok(mut registers) = ptrace::getregs(thread) else { return };
        let enters = registers.rax == (-(Errno::ENOSYS as i64)).cast_unsigned();
        if !enters && let Some((_, len)) = hit.take_if(|(hit, _)| *hit == thread) {
            match fault {
                Fault::Errno(errno) => registers.rax = (-(errno as i64)).cast_unsigned(),
                // A call leaves its arguments alone, and programs rely on that.
                Fault::Short => registers.rdx = len,
            }
            let _ = ptrace::setregs(thread, registers);
        }
        let number = registers.orig_rax;
        if !enters && number == SECCOMP {
            filters.remove(&thread);
        }
        let on_file = ON_FILES.contains(&number) || (number == IOCTL && registers.rsi == FICLONERANGE);
        if !enters || !on_file || *filters.entry(thread).or_insert_with(|| filters_of(thread)) < 2 {
            return;
        }
        if calls == nth {
            match fault {
                // It never waits, so nothing interrupts it.
                Fault::Errno(Errno::EINTR) if number == LSEEK => {}
                // Another call, which is allowed and does nothing, is made in its place.
                Fault::Errno(_) => (registers.orig_rax, hit) = (SCHED_YIELD, Some((thread, registers.rdx))),
                Fault::Short if [PREAD, PWRITE].contains(&number) => {
                    (registers.rdx, hit) = (registers.rdx.min(1), Some((thread, registers.rdx)));
                }
                Fault::Short => {}
            }
            let _ = ptrace::setregs(thread, registers);
        }
        calls += 1;
    })?;
    Ok(ended.map(|ended| Ended { calls, ..ended }))
}

/// The requests of a guest end in these: reads and writes, their vectored kin, `lseek`, `fdatasync`, `ftruncate`, `fallocate` and
/// `copy_file_range`.
const ON_FILES: [u64; 9] = [PREAD, PWRITE, LSEEK, 75, 77, 285, 295, 296, 326];
const PREAD: u64 = 17;
const PWRITE: u64 = 18;
const LSEEK: u64 = 8;
const IOCTL: u64 = 16;
const FICLONERANGE: u64 = 0x4020_940d;
const SCHED_YIELD: u64 = 24;

/// Runs a command and calls `look` with each thread that enters or leaves a system call.
fn watch(program: &Program, dir: &Path, args: &[&str], mut look: impl FnMut(Pid)) -> io::Result<Option<Ended>> {
    // It stops before it becomes the program, so that nothing is missed.
    let shell = program.behind(&["sh", "-c", "kill -STOP $$; exec \"$0\" \"$@\""]);
    let mut child = shell.command(dir, args).stdout(Stdio::null()).spawn()?;
    let group = group_of(&child);
    let members = Pid::from_raw(-group.as_raw());
    waitpid(group, Some(WaitPidFlag::WUNTRACED))?;
    let all = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    if ptrace::seize(group, all).is_err() {
        killpg(group, Signal::SIGKILL)?;
        child.wait()?;
        return Ok(None);
    }
    ptrace::interrupt(group)?;
    kill(group, Signal::SIGCONT)?;
    // One line; it fits into the pipe.
    let mut ended = Ended { code: None, stderr: String::new(), calls: 0 };
    loop {
        let (thread, signal) = match waitpid(members, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceSyscall(thread)) => {
                look(thread);
                (thread, None)
            }
            Ok(WaitStatus::PtraceEvent(thread, ..)) => (thread, None),
            Ok(WaitStatus::Stopped(thread, signal)) => (thread, Some(signal)),
            Ok(WaitStatus::Exited(process, status)) => {
                if process == group {
                    ended.code = Some(status);
                }
                continue;
            }
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(_) => break,
        };
        // It may have been killed meanwhile.
        let _ = ptrace::syscall(thread, signal);
    }
    if let Some(mut stderr) = child.stderr.take() {
        let mut bytes = Vec::new();
        stderr.read_to_end(&mut bytes)?;
        ended.stderr = String::from_utf8_lossy(&bytes).into_owned();
    }
    Ok(Some(ended))
}

/// Takes note of the call that `thread` is about to make.
fn note(thread: Pid, judged: &[u64], filters: &mut BTreeMap<Pid, u32>, calls: &mut Calls) {
    let Ok(registers) = ptrace::getregs(thread) else { return };
    let number = registers.orig_rax;
    let enters = registers.rax == (-(Errno::ENOSYS as i64)).cast_unsigned();
    if !enters {
        if number == SECCOMP {
            filters.remove(&thread);
        }
        return;
    }
    let bound = *filters.entry(thread).or_insert_with(|| filters_of(thread));
    let arguments = if judged.contains(&number) { [registers.rdi, registers.rsi] } else { [0; 2] };
    calls.entry(bound).or_default().insert((number, arguments));
}

/// How many filters bind a thread, as the kernel tells it.
fn filters_of(thread: Pid) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let field = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
    field.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
