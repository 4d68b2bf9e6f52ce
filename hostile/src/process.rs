//! Running a command and seeing what becomes of it.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// No honest run here takes nearly as long.
const HANG: Duration = Duration::from_secs(60);

/// The program under test.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    /// Words before the command's own: a wrapper like `prlimit`, whose last word is followed by the program.
    before: Vec<OsString>,
}

/// What became of a command.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// It did not end by itself.
    pub hung: bool,
    /// Processes of it were still there afterwards.
    pub left: bool,
    /// Processor time of all its processes; right only while no other child of this process ends.
    pub cpu: Duration,
    /// The greatest resident size of any process so far, KiB.
    pub peak: u64,
}

impl Program {
    /// A program by its path or name.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), before: Vec::new() }
    }

    /// What it calls itself in its messages.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The same behind a wrapper.
    pub fn behind(&self, wrapper: &[&str]) -> Self {
        Self { path: self.path.clone(), before: wrapper.iter().map(OsString::from).collect() }
    }

    /// The command, in a process group of its own.
    pub fn command(&self, dir: &Path, args: &[impl AsRef<std::ffi::OsStr>]) -> Command {
        let mut command = match self.before.split_first() {
            Some((wrapper, words)) => {
                let mut command = Command::new(wrapper);
                command.args(words).arg(&self.path);
                command
            }
            None => Command::new(&self.path),
        };
        command.current_dir(dir).args(args).process_group(0);
        command.env_remove("INSTAR_ALLOW_DIRS").env("INSTAR_CONFIG", "");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs to the end, or ends it when it hangs.
    pub fn run(&self, dir: &Path, args: &[impl AsRef<std::ffi::OsStr>]) -> std::io::Result<Ended> {
        finish(self.command(dir, args))
    }
}

/// As [`Program::run`], of a command that was changed further.
///
/// # Errors
/// The program can't be started.
pub fn finish(mut command: Command) -> std::io::Result<Ended> {
    // Processes whose parent is gone become children of this one, so that their end, and what they used, is seen.
    nix::sys::prctl::set_child_subreaper(true)?;
    let before = cpu_of_children();
    let mut child = command.spawn()?;
    let readers = [reader(child.stdout.take()), reader(child.stderr.take())];
    let start = Instant::now();
    let mut hung = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > HANG && !hung {
            hung = true;
            let _ = killpg(group_of(&child), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_micros(500));
    };
    let left = !is_gone(group_of(&child));
    if left {
        let _ = killpg(group_of(&child), Signal::SIGKILL);
    }
    let [stdout, stderr] = readers.map(|reader| reader.and_then(|reader| reader.join().ok()).unwrap_or_default());
    let cpu = cpu_of_children().saturating_sub(before);
    Ok(Ended {
        code: status.code(),
        signal: status.signal(),
        stdout,
        stderr,
        hung,
        left,
        cpu,
        peak: peak_of_children(),
    })
}

/// The process group of a command of [`Program::command`].
pub fn group_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX))
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> Option<std::thread::JoinHandle<Vec<u8>>> {
    let mut pipe = pipe?;
    Some(std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    }))
}

/// Waits a moment for the end of all processes of a group, those that became children of this one included.
pub fn is_gone(group: Pid) -> bool {
    let start = Instant::now();
    let members = Pid::from_raw(-group.as_raw());
    while start.elapsed() < Duration::from_secs(5) {
        match waitpid(members, Some(WaitPidFlag::WNOHANG)) {
            // A process whose first thread has ended looks like a zombie while others are still at work.
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(1)),
            Ok(_) => {}
            Err(_) if killpg(group, None).is_err() || !has_live_member(group) => return true,
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    false
}

/// Is there a process in the group that is not just waiting to be reaped?
fn has_live_member(group: Pid) -> bool {
    let Ok(processes) = fs::read_dir("/proc") else { return true };
    processes.flatten().any(|entry| {
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { return false };
        // Behind the name in parentheses: state, parent, group.
        let Some((_, after)) = stat.rsplit_once(')') else { return false };
        let mut words = after.split_whitespace();
        let (state, member) = (words.next(), words.nth(1));
        state != Some("Z") && member.and_then(|text| text.parse().ok()) == Some(group.as_raw())
    })
}

fn cpu_of_children() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) else { return Duration::ZERO };
    let micros = |time: nix::sys::time::TimeVal| time.tv_sec() as u64 * 1_000_000 + time.tv_usec() as u64;
    Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time()))
}

fn peak_of_children() -> u64 {
    getrusage(UsageWho::RUSAGE_CHILDREN).map_or(0, |usage| usage.max_rss().unsigned_abs())
}
