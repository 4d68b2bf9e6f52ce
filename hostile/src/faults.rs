//! Commands that lack what they need: room, descriptors, memory, a directory to write to, a file that stays as it is.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use tempfile::TempDir;

use crate::place::tells_secrets;
use crate::process::{Ended, Program, finish};
use crate::trace::{self, Fault};

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Runs.
    pub runs: u64,
    /// Runs that failed, as most must.
    pub failures: u64,
    /// All that must not happen.
    pub findings: Vec<String>,
}

/// Bytes of the source.
const DISK: usize = 6 << 20;

struct Scene {
    root: TempDir,
    program: Program,
    report: Report,
}

/// What a run owes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owed {
    /// It fails.
    Failure,
    /// It may succeed, and is then right.
    Either,
}

/// Commands whose calls are made to fail, one after the other; each makes `out` or changes `image.qcow2`.
const CALLERS: &[&[&str]] = &[
    &["convert", "-O", "raw", "small.qcow2", "out"],
    &["convert", "-O", "qcow2", "small.raw", "out"],
    &["convert", "-c", "-O", "qcow2", "small.raw", "out"],
    &["convert", "-O", "vmdk", "small.raw", "out"],
    &["convert", "-O", "vpc", "small.raw", "out"],
    &["convert", "-O", "vhdx", "small.raw", "out"],
    &["convert", "-O", "vdi", "small.raw", "out"],
    &["dd", "-O", "qcow2", "bs=64k", "if=small.raw", "of=out"],
    &["create", "-q", "-f", "qcow2", "-o", "preallocation=full", "out", "1M"],
    &["snapshot", "-c", "new", "image.qcow2"],
    &["snapshot", "-a", "old", "image.qcow2"],
    &["snapshot", "-d", "old", "image.qcow2"],
    &["resize", "-f", "qcow2", "image.qcow2", "20M"],
    &["amend", "-f", "qcow2", "-o", "refcount_bits=64", "image.qcow2"],
    &["bitmap", "--add", "image.qcow2", "new"],
    &["rebase", "-f", "qcow2", "-b", "", "image.qcow2"],
    &["check", "-r", "all", "image.qcow2"],
    &["info", "image.qcow2"],
    &["check", "image.qcow2"],
    &["map", "image.qcow2"],
];

/// Failing calls alone: of every `others`th command, and of that every `step`th call.
///
/// # Errors
/// Of the system.
pub fn calls(program: &Program, others: usize, step: usize) -> io::Result<Report> {
    let mut scene = Scene { root: tempfile::tempdir()?, program: program.clone(), report: Report::default() };
    scene.failing_calls(others, step)?;
    Ok(scene.report)
}

/// Targets, with options.
const TARGETS: &[&[&str]] = &[
    &["-O", "raw"],
    &["-O", "qcow2"],
    &["-c", "-O", "qcow2"],
    &["-O", "vmdk"],
    &["-O", "vmdk", "-o", "subformat=streamOptimized"],
    &["-O", "vpc"],
    &["-O", "vhdx"],
    &["-O", "vdi"],
    &["-O", "qed"],
    &["-O", "qcow"],
    &["-O", "parallels"],
];

/// Runs all of it; `swaps` is how often a backing file is swapped for a link during a run.
///
/// # Errors
/// Of the system.
pub fn run(program: &Program, swaps: u32) -> io::Result<Report> {
    let root = tempfile::tempdir()?;
    let mut scene = Scene { root, program: program.clone(), report: Report::default() };
    // Nothing that could be compressed.
    let next =
        |state: &u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
    let noise: Vec<u8> =
        std::iter::successors(Some(1), next).map(|state: u64| (state >> 56) as u8).take(DISK).collect();
    fs::write(scene.dir().join("source.raw"), &noise)?;
    scene.run(&["convert", "-O", "qcow2", "source.raw", "source.qcow2"], &[], Owed::Either)?;
    scene.full_outputs()?;
    scene.changes_without_room()?;
    scene.limits()?;
    scene.environment()?;
    scene.two_writers()?;
    scene.shrinking_source()?;
    scene.swapped_backing(swaps)?;
    scene.outputs_that_are_inputs()?;
    scene.own_limits()?;
    Ok(scene.report)
}

impl Scene {
    fn dir(&self) -> PathBuf {
        self.root.path().to_owned()
    }

    fn find(&mut self, what: String) {
        self.report.findings.push(what);
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(self.dir())?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let mut names = names.collect::<io::Result<Vec<String>>>()?;
        names.sort();
        Ok(names)
    }

    /// Runs behind a wrapper, and looks at what holds for all.
    fn run(&mut self, args: &[&str], wrapper: &[&str], owed: Owed) -> io::Result<Ended> {
        let ended = self.program.behind(wrapper).run(&self.dir(), args)?;
        self.judge(&format!("{wrapper:?} {args:?}"), &ended, owed);
        Ok(ended)
    }

    fn judge(&mut self, what: &str, ended: &Ended, owed: Owed) {
        self.report.runs += 1;
        self.report.failures += u64::from(ended.code != Some(0));
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        let problem = match ended.code {
            _ if ended.hung => "hangs",
            _ if ended.left => "leaves a process",
            None => "ended by a signal",
            Some(0) if owed == Owed::Failure => "succeeds",
            Some(0) => return,
            Some(1) if text.contains("panicked") || text.contains("RUST_BACKTRACE") => "panics",
            Some(1) if text.contains("sandbox process was lost") => "loses its sandbox process",
            // A hint may follow in further lines, but the error is one.
            Some(1) if self.errors_in(&text) == 1 => return,
            Some(1) => "does not say one line",
            Some(_) => "has an odd exit status",
        };
        self.find(format!("{what} {problem}: {:?} {:?} {text}", ended.code, ended.signal));
    }

    /// Lines of the program's own on standard error.
    fn errors_in(&self, stderr: &str) -> usize {
        let start = format!("{}: ", self.program.name());
        stderr.lines().filter(|line| line.starts_with(&start)).count()
    }

    /// After a failed run: is something new there that was not there before?
    fn expect_names(&mut self, what: &str, before: &[String]) -> io::Result<()> {
        let now = self.names()?;
        if now != before {
            self.find(format!("{what} leaves {now:?}"));
        }
        Ok(())
    }

    /// The output may not grow beyond a limit; `/dev/full` takes nothing.
    fn full_outputs(&mut self) -> io::Result<()> {
        let before = self.names()?;
        for target in TARGETS {
            for limit in ["--fsize=0", "--fsize=4096", "--fsize=70000", "--fsize=1000000", "--fsize=5000000"] {
                let args = [&["convert"], *target, &["source.raw", "out"]].concat();
                let ended = self.run(&args, &["prlimit", limit], Owed::Either)?;
                let what = format!("{limit} {args:?}");
                match ended.code {
                    Some(0) => {
                        let len = fs::metadata(self.dir().join("out"))?.len();
                        if len > 6 << 20 {
                            self.find(format!("{what}: the limit has no effect, {len} bytes"));
                        }
                        fs::remove_file(self.dir().join("out"))?;
                    }
                    _ => self.expect_names(&what, &before)?,
                }
            }
            let args = [&["convert"], *target, &["source.raw", "/dev/full"]].concat();
            self.run(&args, &[], Owed::Failure)?;
        }
        for (args, limit) in [
            (&["create", "-q", "-f", "raw", "-o", "preallocation=full", "out", "8M"][..], "--fsize=1000000"),
            (&["create", "-q", "-f", "qcow2", "-o", "preallocation=full", "out", "8M"], "--fsize=1000000"),
            (&["create", "-q", "-f", "vhdx", "out", "8M"], "--fsize=100000"),
            (&["dd", "-O", "raw", "bs=64k", "if=source.raw", "of=out"], "--fsize=1000000"),
            (&["dd", "-O", "qcow2", "bs=64k", "if=source.raw", "of=out"], "--fsize=1000000"),
        ] {
            self.run(args, &["prlimit", limit], Owed::Failure)?;
            self.expect_names(&format!("{args:?}"), &before)?;
        }
        self.full_file_system(&before)
    }

    /// A real file system of one mebibyte, where the system lets us make one.
    fn full_file_system(&mut self, before: &[String]) -> io::Result<()> {
        for target in TARGETS {
            for size in ["64k", "300k", "1m", "3m"] {
                let script = format!(
                    "mkdir small && mount -t tmpfs -o size={size} none small || exit 77; \"$0\" convert {} source.raw small/out; \
                     status=$?; test -e small/out && status=99; exit $status",
                    target.join(" ")
                );
                let shell = ["unshare", "-m", "sh", "-c", &script];
                let ended = self.program.behind(&shell).run(&self.dir(), &[] as &[&str])?;
                let _ = fs::remove_dir(self.dir().join("small"));
                if ended.code == Some(77) || String::from_utf8_lossy(&ended.stderr).contains("unshare") {
                    eprintln!("SKIPPED: no file system can be mounted here, so ENOSPC comes from limits only");
                    return Ok(());
                }
                self.judge(&format!("{size} {target:?}"), &ended, Owed::Failure);
                self.expect_names(&format!("{size} {target:?}"), before)?;
            }
        }
        Ok(())
    }

    /// Changes in place that run out of room leave a sound image with the old contents.
    fn changes_without_room(&mut self) -> io::Result<()> {
        let changes: &[&[&str]] = &[
            &["resize", "-f", "qcow2", "--preallocation=full", "image.qcow2", "20M"],
            &["amend", "-f", "qcow2", "-o", "refcount_bits=64", "image.qcow2"],
            &["snapshot", "-c", "new", "image.qcow2"],
            &["bitmap", "--add", "-g", "512", "image.qcow2", "b"],
            &["rebase", "-b", "", "overlay.qcow2"],
            &["commit", "overlay.qcow2"],
        ];
        for change in changes {
            for extra in [0, 4096, 65_536, 200_000, 1 << 20] {
                fs::copy(self.dir().join("source.qcow2"), self.dir().join("image.qcow2"))?;
                let overlay = ["create", "-q", "-f", "qcow2", "-b", "image.qcow2", "-F", "qcow2", "overlay.qcow2"];
                self.run(&overlay, &[], Owed::Either)?;
                let image = if change.contains(&"overlay.qcow2") { "overlay.qcow2" } else { "image.qcow2" };
                let limit = format!("--fsize={}", fs::metadata(self.dir().join(image))?.len() + extra);
                self.run(change, &["prlimit", &limit], Owed::Either)?;
                for image in ["image.qcow2", "overlay.qcow2"] {
                    let check = self.program.run(&self.dir(), &["check", "-f", "qcow2", image])?;
                    if !matches!(check.code, Some(0 | 3)) {
                        let text = String::from_utf8_lossy(&check.stderr).into_owned();
                        self.find(format!("{change:?} with {limit}: {image} is damaged: {text}"));
                    }
                }
                let image = if change.contains(&"overlay.qcow2") { "overlay.qcow2" } else { "image.qcow2" };
                let compare =
                    self.program.run(&self.dir(), &["compare", "-f", "qcow2", "-F", "raw", image, "source.raw"])?;
                if compare.code != Some(0) {
                    self.find(format!("{change:?} with {limit}: other contents, {:?}", compare.code));
                }
            }
        }
        for name in ["image.qcow2", "overlay.qcow2"] {
            fs::remove_file(self.dir().join(name))?;
        }
        Ok(())
    }

    /// Few descriptors, little memory, no processes, little time.
    fn limits(&mut self) -> io::Result<()> {
        let before = self.names()?;
        let commands: &[&[&str]] = &[
            &["info", "source.qcow2"],
            &["check", "source.qcow2"],
            &["map", "source.qcow2"],
            &["convert", "-O", "qcow2", "source.qcow2", "out"],
        ];
        let descriptors = (5..=32).map(|n| (format!("--nofile={n}"), n >= 32));
        let memory = [64, 128, 256, 512, 1024].map(|mib: u64| (format!("--as={}", mib << 20), mib == 1024));
        let more = [("--nproc=0".to_owned(), false), ("--cpu=2".to_owned(), true), ("--core=0".to_owned(), true)];
        for (limit, enough) in descriptors.chain(memory).chain(more) {
            for command in commands {
                let ended = self.run(command, &["prlimit", &limit], Owed::Either)?;
                if enough && command[0] == "info" && ended.code != Some(0) {
                    let text = String::from_utf8_lossy(&ended.stderr).into_owned();
                    self.find(format!("{limit} {command:?}: should be enough: {text}"));
                }
                let _ = fs::remove_file(self.dir().join("out")).is_ok_and(|()| ended.code != Some(0)).then(|| {
                    self.report.findings.push(format!("{limit} {command:?} leaves its output"));
                });
                self.expect_names(&limit, &before)?;
            }
        }
        Ok(())
    }

    /// A directory that can't be written, odd variables, closed and full streams.
    fn environment(&mut self) -> io::Result<()> {
        let before = self.names()?;
        for (name, value) in [
            ("HOME", None),
            ("LANG", Some("xx_YY.nonsense")),
            ("LC_ALL", Some("\u{1b}[31m")),
            ("PATH", None),
            ("TZ", Some("Nowhere/Else")),
            ("TMPDIR", Some("/nonexistent")),
        ] {
            for command in [&["info", "source.qcow2"][..], &["snapshot", "-l", "source.qcow2"]] {
                let mut started = self.program.command(&self.dir(), command);
                match value {
                    Some(value) => started.env(name, value),
                    None => started.env_remove(name),
                };
                let ended = finish(started)?;
                self.judge(&format!("{name}={value:?} {command:?}"), &ended, Owed::Either);
                if ended.code != Some(0) {
                    self.find(format!("{name}={value:?} {command:?}: {}", String::from_utf8_lossy(&ended.stderr)));
                }
            }
        }
        for closed in ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"] {
            let script = format!("exec \"$0\" \"$@\" {closed}");
            for command in [&["info", "source.qcow2"][..], &["convert", "-O", "qcow2", "source.qcow2", "out"]] {
                let ended = self.program.behind(&["sh", "-c", &script]).run(&self.dir(), command)?;
                self.report.runs += 1;
                if ended.hung
                    || ended.left
                    || !matches!(ended.code, Some(0 | 1))
                    || (closed == ">/dev/full" && command[0] == "info" && ended.code == Some(0))
                {
                    self.find(format!("{closed} {command:?}: {:?}", ended.code));
                }
                if ended.code == Some(0) && command[0] == "convert" {
                    let compare = ["compare", "-f", "raw", "-F", "qcow2", "source.raw", "out"];
                    self.run(&compare, &[], Owed::Either)?;
                }
                let _ = fs::remove_file(self.dir().join("out"));
            }
        }
        let closed = self.dir().join("closed");
        fs::create_dir(&closed)?;
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o555))?;
        for target in ["closed/missing/out", "missing/out", "closed", "source.raw/out"] {
            let args = ["convert", "-O", "qcow2", "source.raw", target];
            self.run(&args, &[], Owed::Failure)?;
        }
        fs::remove_dir(&closed)?;
        self.expect_names("closed directory", &before)
    }

    /// Each system call on a file fails once: EIO, ENOSPC, an interruption, a transfer of one byte.
    fn failing_calls(&mut self, others: usize, step: usize) -> io::Result<()> {
        let dir = self.dir().join("calls");
        fs::create_dir(&dir)?;
        let mut disk = vec![0; 700_000];
        disk[..300_000].iter_mut().enumerate().for_each(|(at, byte)| *byte = ((at * at) >> 9) as u8);
        fs::write(dir.join("small.raw"), &disk)?;
        fs::write(dir.join("base.raw"), vec![0x33; 1 << 20])?;
        let prepare: [&[&str]; 4] = [
            &["convert", "-O", "qcow2", "small.raw", "small.qcow2"],
            &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "original.qcow2"],
            &["bench", "-w", "-c", "3", "original.qcow2"],
            &["snapshot", "-c", "old", "original.qcow2"],
        ];
        for args in prepare {
            let ended = self.program.run(&dir, args)?;
            self.judge(&format!("{args:?}"), &ended, Owed::Either);
        }
        fs::copy(dir.join("original.qcow2"), dir.join("image.qcow2"))?;
        let plain = |program: &Program| program.run(&dir, &["convert", "-O", "raw", "image.qcow2", "plain"]);
        plain(&self.program)?;
        let contents = fs::read(dir.join("plain"))?;
        for args in CALLERS.iter().step_by(others) {
            for fault in
                [Fault::Errno(Errno::EIO), Fault::Errno(Errno::ENOSPC), Fault::Errno(Errno::EINTR), Fault::Short]
            {
                for nth in (0..).step_by(step) {
                    fs::copy(dir.join("original.qcow2"), dir.join("image.qcow2"))?;
                    let Some(ended) = trace::fail(&self.program, &dir, args, nth, fault)? else {
                        eprintln!("SKIPPED: no process may be traced here, so no call was made to fail");
                        return fs::remove_dir_all(&dir);
                    };
                    self.report.runs += 1;
                    self.report.failures += u64::from(ended.code != Some(0));
                    let what = format!("call {nth} of {args:?} with {fault:?}");
                    self.judge_call(&what, &dir, args, fault, &ended, &contents)?;
                    if ended.calls <= nth {
                        break;
                    }
                }
            }
        }
        fs::remove_dir_all(&dir)
    }

    fn judge_call(
        &mut self,
        what: &str,
        dir: &Path,
        args: &[&str],
        fault: Fault,
        ended: &trace::Ended,
        contents: &[u8],
    ) -> io::Result<()> {
        let told = self.errors_in(&ended.stderr);
        // `check` has an exit status of its own for images that are not in order.
        let known = matches!(ended.code, Some(0 | 1)) || (args[0] == "check" && matches!(ended.code, Some(2 | 3)));
        if !known || ended.stderr.contains("panicked") || (ended.code == Some(1) && told != 1) {
            self.find(format!("{what}: {:?} {}", ended.code, ended.stderr));
        }
        let passes = matches!(fault, Fault::Short | Fault::Errno(Errno::EINTR));
        if passes && ended.code != Some(0) {
            self.find(format!("{what} is no reason to fail: {:?} {}", ended.code, ended.stderr));
        }
        let out = dir.join("out");
        if out.exists() {
            if ended.code != Some(0) {
                self.find(format!("{what} leaves an output"));
            } else if args[0] != "create" {
                let format = args.iter().skip_while(|arg| **arg != "-O").nth(1).copied().unwrap_or("raw");
                let same = self.program.run(dir, &["compare", "-f", "raw", "-F", format, "small.raw", "out"])?;
                if same.code != Some(0) {
                    self.find(format!("{what} spoils the output: {}", String::from_utf8_lossy(&same.stdout)));
                }
            }
            fs::remove_file(out)?;
        }
        if !args.contains(&"image.qcow2") {
            return Ok(());
        }
        // What was changed in place has the old contents or, where more were added, begins with them, and lacks nothing.
        let checked = self.program.run(dir, &["check", "image.qcow2"])?;
        if !matches!(checked.code, Some(0 | 3)) {
            self.find(format!("{what} damages the image: {}", String::from_utf8_lossy(&checked.stdout)));
        }
        let plain = self.program.run(dir, &["convert", "-O", "raw", "image.qcow2", "plain"])?;
        if plain.code != Some(0) || !fs::read(dir.join("plain"))?.starts_with(contents) {
            self.find(format!("{what} changes the contents: {}", String::from_utf8_lossy(&plain.stderr)));
        }
        Ok(())
    }

    /// Two conversions to one output: one of them may win, and what is there is whole.
    fn two_writers(&mut self) -> io::Result<()> {
        for _ in 0..10 {
            let args = ["convert", "-O", "qcow2", "source.raw", "out"];
            let spawn = || self.program.command(&self.dir(), &args).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
            let (mut one, mut other) = (spawn()?, spawn()?);
            let codes = [one.wait()?.code(), other.wait()?.code()];
            self.report.runs += 2;
            let whole = self.program.run(&self.dir(), &["compare", "-f", "raw", "-F", "qcow2", "source.raw", "out"])?;
            if !codes.contains(&Some(0))
                || whole.code != Some(0)
                || codes.iter().any(|code| !matches!(code, Some(0 | 1)))
            {
                let text = String::from_utf8_lossy(&whole.stderr).into_owned();
                self.find(format!("two writers: {codes:?}, {:?} {text}", whole.code));
            }
            let _ = fs::remove_file(self.dir().join("out"));
        }
        Ok(())
    }

    /// The source is cut off during the run: an error, or what was there in time.
    fn shrinking_source(&mut self) -> io::Result<()> {
        for n in 0..20u64 {
            for name in ["source.raw", "source.qcow2"] {
                fs::copy(self.dir().join(name), self.dir().join("victim"))?;
                let format = name.strip_prefix("source.").unwrap_or("raw");
                let args = ["convert", "-f", format, "-O", "qcow2", "victim", "out"];
                let started = self.program.command(&self.dir(), &args);
                let path = self.dir().join("victim");
                let cutter = std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_micros(500 * n));
                    File::options().write(true).open(path)?.set_len(300_000)
                });
                let ended = finish(started)?;
                cutter.join().map_err(|_| io::Error::other("the thread"))??;
                self.judge(&format!("cut off {args:?}"), &ended, Owed::Either);
                let there = self.dir().join("out").exists();
                if there != (ended.code == Some(0)) {
                    self.find(format!("cut off {args:?}: {:?}, output there: {there}", ended.code));
                }
                let _ = fs::remove_file(self.dir().join("out"));
            }
        }
        fs::remove_file(self.dir().join("victim"))
    }

    /// The backing file becomes a link to a file outside, and back, all the time.
    fn swapped_backing(&mut self, swaps: u32) -> io::Result<()> {
        let home = self.dir().join("home");
        fs::create_dir(&home)?;
        fs::write(self.dir().join("secret"), b"canary-5e1fb2a7-must-never-be-seen\n".repeat(200))?;
        fs::write(home.join("good"), [7; 8192])?;
        fs::copy(home.join("good"), home.join("base"))?;
        let create = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "8192"];
        let made = self.program.run(&home, &create)?;
        self.judge("create", &made, Owed::Either);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| -> io::Result<()> {
            scope.spawn(|| swap(&home, &stop));
            for _ in 0..swaps {
                let ended = self.program.run(&home, &["convert", "-O", "raw", "top", "out"]);
                let Ok(ended) = ended else { break };
                self.judge("swapped backing file", &ended, Owed::Either);
                let leaked = fs::read(home.join("out")).is_ok_and(|bytes| tells_secrets(&bytes) || bytes != [7; 8192]);
                if leaked || tells_secrets(&ended.stderr) {
                    self.find("a swapped backing file leads out".to_owned());
                }
                let _ = fs::remove_file(home.join("out"));
            }
            stop.store(true, Ordering::Relaxed);
            Ok(())
        })?;
        fs::remove_file(self.dir().join("secret"))?;
        fs::remove_dir_all(&home)
    }

    /// The output is an input, a member of its chain, its extent or its data file, under any name.
    fn outputs_that_are_inputs(&mut self) -> io::Result<()> {
        let dir = self.dir().join("same");
        fs::create_dir(&dir)?;
        fs::copy(self.dir().join("source.raw"), dir.join("base.raw"))?;
        let prepare: &[&[&str]] = &[
            &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2"],
            &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"],
            &["convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", "base.raw", "flat.vmdk"],
            &["convert", "-O", "qcow2", "-o", "data_file=data", "base.raw", "thin.qcow2"],
        ];
        for args in prepare {
            let ended = self.program.run(&dir, args)?;
            self.judge(&format!("{args:?}"), &ended, Owed::Either);
        }
        for (source, format, part) in [
            ("base.raw", "raw", "base.raw"),
            ("top.qcow2", "qcow2", "top.qcow2"),
            ("top.qcow2", "qcow2", "mid.qcow2"),
            ("top.qcow2", "qcow2", "base.raw"),
            ("flat.vmdk", "vmdk", "flat.vmdk"),
            ("flat.vmdk", "vmdk", "flat-flat.vmdk"),
            ("thin.qcow2", "qcow2", "thin.qcow2"),
            ("thin.qcow2", "qcow2", "data"),
        ] {
            fs::hard_link(dir.join(part), dir.join("hard"))?;
            symlink(part, dir.join("soft"))?;
            let contents = fs::read(dir.join(part))?;
            for target in [part, "hard", "soft"] {
                for more in [&["-O", "raw"][..], &["-O", "qcow2"], &["-U", "-O", "qcow2"], &["-n", "-U", "-O", "raw"]] {
                    let args = [&["convert", "-f", format], more, &[source, target]].concat();
                    let ended = self.program.run(&dir, &args)?;
                    self.judge(&format!("{args:?}"), &ended, Owed::Failure);
                    if fs::read(dir.join(part))? != contents {
                        self.find(format!("{args:?} has changed {part}"));
                        fs::write(dir.join(part), &contents)?;
                    }
                }
            }
            fs::remove_file(dir.join("hard"))?;
            fs::remove_file(dir.join("soft"))?;
        }
        fs::remove_dir_all(&dir)
    }

    /// `--max-guest-memory` and `--timeout`.
    fn own_limits(&mut self) -> io::Result<()> {
        let before = self.names()?;
        for memory in ["0", "1", "4k", "1M", "8M"] {
            let args = ["--max-guest-memory", memory, "convert", "-O", "qcow2", "source.raw", "out"];
            self.run(&args, &[], Owed::Failure)?;
            self.expect_names(memory, &before)?;
        }
        for memory in ["64M", "1G"] {
            let args = ["--max-guest-memory", memory, "info", "source.qcow2"];
            let ended = self.run(&args, &[], Owed::Either)?;
            if ended.code != Some(0) {
                self.find(format!("{args:?}: {}", String::from_utf8_lossy(&ended.stderr)));
            }
        }
        // Held back to a few kilobytes a second, it would take minutes.
        let args = ["--timeout", "1", "convert", "-r", "64k", "-O", "qcow2", "source.raw", "out"];
        let ended = self.run(&args, &[], Owed::Failure)?;
        if !String::from_utf8_lossy(&ended.stderr).contains("--timeout") {
            self.find(format!("{args:?}: {}", String::from_utf8_lossy(&ended.stderr)));
        }
        self.expect_names("--timeout", &before)
    }
}

/// Makes `base` a link out of the directory and a good file by turns.
fn swap(home: &Path, stop: &AtomicBool) {
    let next = home.join("next");
    while !stop.load(Ordering::Relaxed) {
        for evil in [true, false] {
            let _ = fs::remove_file(&next);
            let _ = if evil { symlink("../secret", &next) } else { fs::hard_link(home.join("good"), &next) };
            let _ = fs::rename(&next, home.join("base"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_swapper_leaves_one_or_the_other() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("good"), b"x").unwrap();
        fs::write(tmp.path().join("base"), b"x").unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| swap(tmp.path(), &stop));
            std::thread::sleep(Duration::from_millis(5));
            stop.store(true, Ordering::Relaxed);
        });
        assert!(fs::symlink_metadata(tmp.path().join("base")).is_ok());
        assert_eq!(fs::read(tmp.path().join("good")).unwrap(), b"x");
    }
}
