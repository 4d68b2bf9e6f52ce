//! Tests, the same for people and for CI.

use std::path::PathBuf;
use std::process::Command;

use crate::run::{Result, cargo, installed, release_binary, root, run};

/// All tests of the workspace. The doc tests come first, so that the last line printed is the runner's summary of the tests proper.
pub fn test(args: &[String]) -> Result {
    run(cargo().args(["test", "--workspace", "--doc", "--quiet"]))?;
    match installed("cargo-nextest", "--version") {
        true => run(cargo().args(["nextest", "run", "--workspace", "--no-fail-fast"]).args(args)),
        false => {
            eprintln!("cargo-nextest is not installed: using cargo test");
            run(cargo().args(["test", "--workspace", "--all-targets", "--no-fail-fast"]).args(args))
        }
    }
}

/// Runs every criterion bench once, to see that it works: without optimisation, since that would take minutes to compile.
pub fn bench_smoke(_args: &[String]) -> Result {
    run(cargo().args(["bench", "--profile", "dev", "--package", "instar-benches", "--", "--test"]))
}

/// The fuzz targets, by the seeded runner that needs no nightly compiler.
pub fn fuzz(args: &[String]) -> Result {
    let mut command = cargo();
    // The C library gives memory back to the kernel and takes it again for each input otherwise: four fifths of the time of some targets.
    command.envs([("MALLOC_TRIM_THRESHOLD_", "2000000000"), ("MALLOC_MMAP_THRESHOLD_", "1000000000")]);
    run(command.args(["run", "--quiet", "--release", "--manifest-path", "fuzz/Cargo.toml", "--"]).args(args))
}

/// Each writable format and subformat into each.
pub fn formats(args: &[String]) -> Result {
    let test = ["test", "--release", "--package", "instar", "--test", "formats", "--", "--ignored", "--nocapture"];
    run(cargo().args(test).args(args))
}

/// The golden transcripts.
pub fn golden(args: &[String]) -> Result {
    shared_runner("golden/run.py", args)
}

fn shared_runner(script: &str, args: &[String]) -> Result {
    let script: PathBuf = root().join("../shared").join(script);
    if !script.exists() {
        return Err(format!("{} is not there: nothing to compare with", script.display()).into());
    }
    let binary = release_binary()?;
    let mut command = Command::new("python3");
    command.arg(script);
    if let Some(only) = args.iter().find(|arg| *arg != "--") {
        command.args(["--only", only]);
    }
    run(command.arg(binary))
}
