//! The system calls that the threads of a command really make under their filters.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
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
    // It stops before it becomes the program, so that nothing is missed.
    let shell = program.behind(&["sh", "-c", "kill -STOP $$; exec \"$0\" \"$@\""]);
    let mut child = shell.command(dir, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
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
    let mut filters = BTreeMap::new();
    let mut code = None;
    loop {
        let (thread, signal) = match waitpid(members, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceSyscall(thread)) => {
                note(thread, judged, &mut filters, calls);
                (thread, None)
            }
            Ok(WaitStatus::PtraceEvent(thread, ..)) => (thread, None),
            Ok(WaitStatus::Stopped(thread, signal)) => (thread, Some(signal)),
            Ok(WaitStatus::Exited(process, status)) => {
                if process == group {
                    code = Some(status);
                }
                continue;
            }
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(_) => return Ok(Some(code.unwrap_or(-1))),
        };
        // It may have been killed meanwhile.
        let _ = ptrace::syscall(thread, signal);
    }
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
