//! Writing commands that are ended at random moments: what is left must be the old, the new, or nothing that passes for an image.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use tempfile::TempDir;

use crate::process::{Ended, Program, group_of, is_gone};
use crate::random::Random;

/// Bytes of the disk that is converted and changed.
const DISK: usize = 12 << 20;

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Commands that were ended.
    pub commands: u64,
    /// Runs.
    pub runs: u64,
    /// Runs that the signal met before their end.
    pub met: u64,
    /// After which a part of a new image was there.
    pub parts: u64,
    /// All that must not happen.
    pub findings: Vec<String>,
}

/// A writing command.
struct Command {
    name: &'static str,
    args: &'static [&'static str],
    writes: Writes,
}

/// What a command writes.
enum Writes {
    /// A new image `out` of this format, with the contents of the source, or empty.
    New { format: &'static str, contents: bool },
    /// `top.qcow2` and perhaps `base.qcow2`, whose disk stays what it is.
    Same,
    /// The disk becomes this long.
    Length(usize),
    /// The disk becomes that of the snapshot.
    Snapshot,
}

const fn convert(name: &'static str, format: &'static str, args: &'static [&'static str]) -> Command {
    Command { name, args, writes: Writes::New { format, contents: true } }
}

const fn change(name: &'static str, args: &'static [&'static str], writes: Writes) -> Command {
    Command { name, args, writes }
}

const COMMANDS: &[Command] = &[
    convert("convert to raw", "raw", &["convert", "-O", "raw", "source.qcow2", "out"]),
    convert("convert to qcow2", "qcow2", &["convert", "-O", "qcow2", "source.raw", "out"]),
    convert("convert to qcow2, compressed", "qcow2", &["convert", "-c", "-O", "qcow2", "source.raw", "out"]),
    convert(
        "convert to qcow2, data file",
        "qcow2",
        &["convert", "-O", "qcow2", "-o", "data_file=data", "source.raw", "out"],
    ),
    convert("convert to vmdk", "vmdk", &["convert", "-O", "vmdk", "source.raw", "out"]),
    convert(
        "convert to vmdk, stream",
        "vmdk",
        &["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "source.raw", "out"],
    ),
    convert("convert to vpc", "vpc", &["convert", "-O", "vpc", "-o", "force_size=on", "source.raw", "out"]),
    convert(
        "convert to vpc, fixed",
        "vpc",
        &["convert", "-O", "vpc", "-o", "subformat=fixed,force_size=on", "source.raw", "out"],
    ),
    convert("convert to vhdx", "vhdx", &["convert", "-O", "vhdx", "source.raw", "out"]),
    convert("convert to vdi", "vdi", &["convert", "-O", "vdi", "source.raw", "out"]),
    convert("convert to qed", "qed", &["convert", "-O", "qed", "source.raw", "out"]),
    convert("convert to qcow", "qcow", &["convert", "-O", "qcow", "source.raw", "out"]),
    convert("convert to parallels", "parallels", &["convert", "-O", "parallels", "source.raw", "out"]),
    convert("dd to raw", "raw", &["dd", "-O", "raw", "bs=64k", "if=source.qcow2", "of=out"]),
    convert("dd to qcow2", "qcow2", &["dd", "-O", "qcow2", "bs=64k", "if=source.qcow2", "of=out"]),
    change(
        "create, preallocated",
        &["create", "-q", "-f", "qcow2", "-o", "preallocation=full", "out", "32M"],
        Writes::New { format: "qcow2", contents: false },
    ),
    change(
        "create raw, preallocated",
        &["create", "-q", "-f", "raw", "-o", "preallocation=full", "out", "32M"],
        Writes::New { format: "raw", contents: false },
    ),
    change(
        "resize, longer",
        &["resize", "-f", "qcow2", "--preallocation=full", "top.qcow2", "24M"],
        Writes::Length(24 << 20),
    ),
    change("resize, shorter", &["resize", "--shrink", "-f", "qcow2", "single.qcow2", "5M"], Writes::Length(5 << 20)),
    change("commit", &["commit", "top.qcow2"], Writes::Same),
    change("commit, keeping the overlay", &["commit", "-d", "top.qcow2"], Writes::Same),
    change("rebase", &["rebase", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2"], Writes::Same),
    change("rebase onto nothing", &["rebase", "-b", "", "top.qcow2"], Writes::Same),
    change("amend", &["amend", "-f", "qcow2", "-o", "refcount_bits=64", "top.qcow2"], Writes::Same),
    change("amend, older version", &["amend", "-f", "qcow2", "-o", "compat=0.10", "plain.qcow2"], Writes::Same),
    change("snapshot -c", &["snapshot", "-c", "new", "single.qcow2"], Writes::Same),
    change("snapshot -a", &["snapshot", "-a", "s", "single.qcow2"], Writes::Snapshot),
    change("snapshot -d", &["snapshot", "-d", "s", "single.qcow2"], Writes::Same),
    change("bitmap --add", &["bitmap", "--add", "-g", "512", "marked.qcow2", "new"], Writes::Same),
    change("bitmap --remove", &["bitmap", "--remove", "marked.qcow2", "b"], Writes::Same),
    change("bitmap --clear", &["bitmap", "--clear", "marked.qcow2", "b"], Writes::Same),
    change("bitmap --merge", &["bitmap", "--merge", "b", "marked.qcow2", "c"], Writes::Same),
    change("check -r", &["check", "-r", "all", "-f", "qcow2", "leaky.qcow2"], Writes::Same),
];

/// Where the commands are ended.
struct Scene {
    root: TempDir,
    program: Program,
    /// qemu-img, where it is installed.
    judge: Option<Program>,
    /// The disk of the source, and of the snapshot.
    disk: Vec<u8>,
    older: Vec<u8>,
}

/// Ends every writing command `kills` times by SIGKILL, and a quarter of that by SIGTERM and by SIGINT.
///
/// # Errors
/// Of the system.
pub fn run(program: &Program, judge: Option<Program>, kills: u32, only: Option<&str>) -> io::Result<Report> {
    let scene = Scene::new(program.clone(), judge)?;
    let mut report = Report::default();
    let mut random = Random(0x5eed);
    for command in COMMANDS.iter().filter(|command| only.is_none_or(|word| command.name.contains(word))) {
        report.commands += 1;
        let usual = scene.duration(command)?;
        for n in 0..kills + kills.div_ceil(2) {
            let signal = match n.checked_sub(kills) {
                None => Signal::SIGKILL,
                Some(n) if n % 2 == 0 => Signal::SIGTERM,
                Some(_) => Signal::SIGINT,
            };
            // Some a little late, so that the very end is met, too.
            let after = usual.mul_f64((random.next() >> 11) as f64 / (1u64 << 53) as f64 * 1.15);
            scene.attempt(command, signal, after, &mut report)?;
        }
    }
    Ok(report)
}

/// Noise with holes.
fn disk(seed: u64) -> Vec<u8> {
    let mut disk = vec![0; DISK];
    let mut random = Random(seed);
    for (n, piece) in disk.chunks_mut(64 << 10).enumerate() {
        if n % 5 != 0 {
            for word in piece.chunks_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
            }
        }
    }
    disk
}

impl Scene {
    fn new(program: Program, judge: Option<Program>) -> io::Result<Self> {
        let (disk, older) = (disk(1), disk(2));
        let scene = Self { root: tempfile::tempdir()?, program, judge, disk, older };
        let dir = scene.images();
        fs::create_dir(&dir)?;
        fs::create_dir(scene.work())?;
        fs::write(dir.join("source.raw"), &scene.disk)?;
        fs::write(dir.join("older.raw"), &scene.older)?;
        let run = |args: &[&str]| scene.must(&dir, args);
        run(&["convert", "-O", "qcow2", "source.raw", "source.qcow2"])?;
        run(&["convert", "-O", "qcow2", "older.raw", "base.qcow2"])?;
        fs::copy(dir.join("base.qcow2"), dir.join("other.qcow2"))?;
        run(&["resize", "-q", "-f", "qcow2", "--shrink", "other.qcow2", "6M"])?;
        // Half of its clusters come from the base.
        let args = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"];
        run(&args)?;
        let mixed: Vec<u8> = scene.older[..DISK / 2].iter().chain(&scene.disk[DISK / 2..]).copied().collect();
        fs::write(dir.join("mixed.raw"), &mixed)?;
        let args = ["convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "-n", "mixed.raw", "top.qcow2"];
        run(&args)?;
        fs::remove_file(dir.join("mixed.raw"))?;
        run(&["convert", "-O", "qcow2", "older.raw", "single.qcow2"])?;
        run(&["snapshot", "-c", "s", "single.qcow2"])?;
        run(&["convert", "-n", "-O", "qcow2", "source.raw", "single.qcow2"])?;
        run(&["convert", "-O", "qcow2", "source.raw", "plain.qcow2"])?;
        fs::copy(dir.join("plain.qcow2"), dir.join("marked.qcow2"))?;
        for name in ["b", "c"] {
            run(&["bitmap", "--add", "-g", "512", "marked.qcow2", name])?;
        }
        // Clusters behind the end of what is used, marked as used: leaks.
        run(&["convert", "-O", "qcow2", "source.raw", "leaky.qcow2"])?;
        leak(&dir.join("leaky.qcow2"))?;
        Ok(scene)
    }

    fn images(&self) -> PathBuf {
        self.root.path().join("images")
    }

    fn work(&self) -> PathBuf {
        self.root.path().join("work")
    }

    fn must(&self, dir: &Path, args: &[&str]) -> io::Result<()> {
        let ended = self.program.run(dir, args)?;
        match ended.code {
            Some(0) => Ok(()),
            _ => Err(io::Error::other(format!("{args:?}: {}", String::from_utf8_lossy(&ended.stderr)))),
        }
    }

    /// Fresh copies of the images that a command names, and of the bases.
    fn prepare(&self, command: &Command) -> io::Result<Vec<String>> {
        let work = self.work();
        fs::remove_dir_all(&work)?;
        fs::create_dir(&work)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(self.images())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let named = command.args.iter().any(|arg| arg.ends_with(&name));
            let below = name == "base.qcow2" && command.args.contains(&"top.qcow2");
            if named || below {
                fs::copy(self.images().join(&name), work.join(&name))?;
                names.push(name);
            }
        }
        Ok(names)
    }

    /// How long the command takes if nothing happens.
    fn duration(&self, command: &Command) -> io::Result<Duration> {
        let mut longest = Duration::ZERO;
        for _ in 0..3 {
            self.prepare(command)?;
            let start = Instant::now();
            self.must(&self.work(), command.args)?;
            longest = longest.max(start.elapsed());
        }
        Ok(longest)
    }

    fn attempt(&self, command: &Command, signal: Signal, after: Duration, report: &mut Report) -> io::Result<()> {
        let names = self.prepare(command)?;
        let work = self.work();
        let mut started = self.program.command(&work, command.args);
        let mut child = started.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(after);
        let group = group_of(&child);
        let _ = kill(group, signal);
        let status = child.wait()?;
        report.runs += 1;
        report.met += u64::from(!status.success());
        let mut find = |what: String| {
            report.findings.push(format!("{} [{signal} after {} us]: {what}", command.name, after.as_micros()));
        };
        if !is_gone(group) {
            find("a process is left".to_owned());
        }
        for entry in fs::read_dir(&work)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let output = matches!(command.writes, Writes::New { .. }) && ["out", "data"].contains(&name.as_str());
            if !output && !names.contains(&name) {
                find(format!("{name} is left over"));
            }
        }
        let problem = match &command.writes {
            Writes::New { format, contents } => {
                for name in &names {
                    if fs::read(work.join(name))? != fs::read(self.images().join(name))? {
                        find(format!("{name} has changed"));
                    }
                }
                let there = work.join("out").exists();
                if there && !status.success() && signal != Signal::SIGKILL && !self.is_whole(format, *contents)? {
                    find("the output is left over".to_owned());
                }
                report.parts += u64::from(there && !status.success());
                if there { self.judge_new(format, *contents)? } else { None }
            }
            other => self.judge_changed(command, other, status.success())?,
        };
        if let Some(problem) = problem {
            report.findings.push(format!("{} [{signal} after {} us]: {problem}", command.name, after.as_micros()));
        }
        Ok(())
    }

    /// Is `out` complete?
    fn is_whole(&self, format: &str, contents: bool) -> io::Result<bool> {
        let work = self.work();
        let args = ["convert", "-f", format, "-O", "raw", "out", "whole"];
        let read = self.program.run(&work, &args)?.code == Some(0);
        let whole = read && {
            let bytes = fs::read(work.join("whole"))?;
            match contents {
                // Some formats hold whole tracks or clusters only.
                true => {
                    bytes.len() >= DISK && bytes[..DISK] == self.disk && bytes[DISK..].iter().all(|byte| *byte == 0)
                }
                false => bytes.len() == 32 << 20,
            }
        };
        let _ = fs::remove_file(work.join("whole"));
        Ok(whole)
    }

    /// What is there of a new image must be all of it, or be refused.
    fn judge_new(&self, format: &str, contents: bool) -> io::Result<Option<String>> {
        if self.is_whole(format, contents)? {
            return Ok(None);
        }
        let work = self.work();
        if format == "raw" {
            // A raw disk has no header; but a part of one has another length.
            let expected = if contents { DISK as u64 } else { 32 << 20 };
            let len = fs::metadata(work.join("out"))?.len();
            return Ok((len == expected).then(|| "a part of a raw disk has the length of the disk".to_owned()));
        }
        for program in std::iter::once(&self.program).chain(&self.judge) {
            let info = program.run(&work, &["info", "-f", format, "out"])?;
            let check = program.run(&work, &["check", "-f", format, "out"])?;
            if info.code == Some(0) && matches!(check.code, Some(0 | 3 | 63)) {
                return Ok(Some(format!("a part passes for an image: {:?}", text(&info))));
            }
        }
        Ok(None)
    }

    /// An image that is changed in place has the old or the new contents, and at most leaks.
    fn judge_changed(&self, command: &Command, writes: &Writes, finished: bool) -> io::Result<Option<String>> {
        let work = self.work();
        let Some(image) = command.args.iter().rev().find(|arg| arg.ends_with(".qcow2") && !arg.starts_with("other"))
        else {
            return Ok(Some("no image".to_owned()));
        };
        let base = if *image == "top.qcow2" { &["base.qcow2"][..] } else { &[] };
        for image in std::iter::once(image).chain(base) {
            for program in std::iter::once(&self.program).chain(&self.judge) {
                let check = program.run(&work, &["check", "-f", "qcow2", image])?;
                if !matches!(check.code, Some(0 | 3)) {
                    return Ok(Some(format!("{image} is damaged: {:?} {:?}", check.code, text(&check))));
                }
            }
        }
        let read = self.program.run(&work, &["convert", "-f", "qcow2", "-O", "raw", image, "whole"])?;
        if read.code != Some(0) {
            return Ok(Some(format!("{image} can't be read: {}", text(&read))));
        }
        let now = fs::read(work.join("whole"))?;
        let old: Vec<u8> = match *image {
            "top.qcow2" => self.older[..DISK / 2].iter().chain(&self.disk[DISK / 2..]).copied().collect(),
            _ => self.disk.clone(),
        };
        let new = match writes {
            Writes::Length(len) => {
                let mut new = old.clone();
                new.resize(*len, 0);
                new
            }
            Writes::Snapshot => self.older.clone(),
            _ => old.clone(),
        };
        let right = now == new || (now == old && !finished);
        Ok((!right).then(|| format!("{image} has other contents, {} bytes", now.len())))
    }
}

/// Marks free clusters as used.
fn leak(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().read(true).write(true).open(path)?;
    let mut place = [0; 8];
    // The refcount table's place, then the first block's.
    file.read_exact_at(&mut place, 48)?;
    let table = u64::from_be_bytes(place);
    file.read_exact_at(&mut place, table)?;
    let block = u64::from_be_bytes(place);
    let clusters = file.metadata()?.len() >> 16;
    for n in 0..600 {
        file.write_all_at(&[0, 1], block + 2 * (clusters + n))?;
    }
    file.set_len((clusters + 600) << 16)
}

fn text(ended: &Ended) -> String {
    let text = [&ended.stderr[..], &ended.stdout].concat();
    String::from_utf8_lossy(&text).chars().take(200).collect()
}
