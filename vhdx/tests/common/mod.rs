//! What the test programs share: random numbers, a disk model, qemu-img.
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The shared corpus, if it is there; says so loudly if not.
pub fn corpus() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus/images");
    if path.exists() {
        return Some(path);
    }
    eprintln!("SKIPPED: {} is not there", path.display());
    None
}

/// Unpacks an image of the corpus.
pub fn unpack(name: &str, to: &Path) -> Option<PathBuf> {
    let source = corpus()?.join(format!("{name}.zst"));
    let target = to.join(Path::new(name).file_name().unwrap());
    let status = Command::new("zstd").args(["-dqf", "--sparse"]).arg(&source).arg("-o").arg(&target).status();
    match status {
        Ok(status) if status.success() => Some(target),
        _ => {
            eprintln!("SKIPPED: zstd can't unpack {}", source.display());
            None
        }
    }
}

/// Whether qemu-img is installed; says so loudly if not.
pub fn have_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: qemu-img is not installed");
    }
    found
}

/// Runs a program in a folder.
pub fn run(dir: &Path, program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).current_dir(dir).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// The same, and fails unless it succeeds; gives its output.
pub fn must(dir: &Path, program: &str, args: &[&str]) -> String {
    let output = run(dir, program, args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// A small generator, the same numbers each time.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 24
    }

    /// Below `limit`, which is at most 2^40.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Bytes that differ from place to place; never 0.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| ((seed * 31 + at / 512 * 7 + at % 251) % 255 + 1) as u8).collect()
}
