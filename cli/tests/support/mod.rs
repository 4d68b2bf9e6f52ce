//! What the end-to-end tests share: the binary, qemu-img, and disks with known contents.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A run that takes longer hangs: the longest honest one here takes a second or two, on a busy machine perhaps twenty.
const HANG: Duration = Duration::from_secs(120);

/// Says loudly why the tests of this file can't run here; `INSTAR_REQUIRE_KVM=1` makes that a failure.
pub fn can_run(needs_qemu: bool) -> bool {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = kvm {
        assert!(std::env::var_os("INSTAR_REQUIRE_KVM").is_none(), "/dev/kvm is required here: {error}");
        eprintln!("SKIPPED: /dev/kvm can't be used ({error}), so nothing was tested");
        return false;
    }
    if needs_qemu && Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("SKIPPED: qemu-img is not installed, so there is nothing to compare with");
        return false;
    }
    true
}

/// The binary under test, in `dir`.
pub fn instar(dir: &Path, args: &[&str]) -> Output {
    finish(Command::new(env!("CARGO_BIN_EXE_instar")).current_dir(dir).args(args))
}

/// The genuine article, in `dir`.
pub fn qemu_img(dir: &Path, args: &[&str]) -> Output {
    finish(Command::new("qemu-img").current_dir(dir).args(args))
}

/// `qemu-io` commands on an image.
pub fn qemu_io(dir: &Path, image: &str, commands: &[String]) {
    let mut command = Command::new("qemu-io");
    command.current_dir(dir);
    for io in commands {
        command.args(["-c", io]);
    }
    expect_success(&finish(command.arg(image)), "qemu-io");
}

/// Runs to the end; a command that hangs is killed and fails the test.
fn finish(command: &mut Command) -> Output {
    let shown = format!("{command:?}");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect(&shown);
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let out = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).map(|_| bytes)
    });
    let err = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        err.read_to_end(&mut bytes).map(|_| bytes)
    });
    let start = Instant::now();
    let status = loop {
        match child.try_wait().expect(&shown) {
            Some(status) => break status,
            None if start.elapsed() > HANG => {
                let _ = child.kill();
                panic!("{shown} hangs");
            }
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    Output { status, stdout: out.join().unwrap().unwrap(), stderr: err.join().unwrap().unwrap() }
}

/// Fails with everything that the command said.
pub fn expect_success(output: &Output, what: &str) {
    assert!(
        output.status.success(),
        "{what}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A small, fast generator whose whole state is the seed, so that a failing case can be run again.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A disk with noise, text, zeroes and holes in stretches of all sizes.
    pub fn disk(&mut self, len: usize) -> Vec<u8> {
        let mut disk = vec![0; len];
        let mut at = 0;
        while at < len {
            let run = 1 << (9 + self.below(10));
            let run = (self.below(run) as usize + 1).min(len - at);
            let part = &mut disk[at..at + run];
            match self.below(5) {
                0 => part.iter_mut().for_each(|byte| *byte = self.next() as u8),
                1 => {
                    let word = self.next().to_le_bytes();
                    part.iter_mut().zip(word.iter().cycle()).for_each(|(byte, from)| *byte = *from);
                }
                2 => part[0] = 1,
                _ => {}
            }
            at += run;
        }
        disk
    }
}

/// Files in a directory, by name.
pub fn listing(dir: &Path) -> Vec<PathBuf> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

/// What a command said, under qemu-img's name: exit status, standard output and standard error. How long it took is nobody's business.
pub fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let timeless =
        |line: &str| if line.starts_with("Run completed in") { "Run completed".to_owned() } else { line.to_owned() };
    let stdout: Vec<String> = text(&output.stdout).lines().map(timeless).collect();
    (output.status.code(), stdout.join("\n"), text(&output.stderr).replace("instar:", "qemu-img:"))
}

/// All files of a directory and its subdirectories.
pub fn all_files(dir: &Path) -> Vec<PathBuf> {
    let (dirs, files): (Vec<PathBuf>, Vec<PathBuf>) = listing(dir).into_iter().partition(|path| path.is_dir());
    files.into_iter().chain(dirs.iter().flat_map(|dir| all_files(dir))).collect()
}

/// The same files twice, without holes: what they take is told.
pub fn twins(template: &Path) -> [tempfile::TempDir; 2] {
    let twins = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for twin in &twins {
        for path in all_files(template) {
            let to = twin.path().join(path.strip_prefix(template).unwrap());
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::write(to, fs::read(&path).unwrap()).unwrap();
        }
    }
    twins
}
