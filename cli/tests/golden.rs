//! The recorded transcripts of qemu-img, where they are at hand.

mod support;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// Cases about formats that this version does not open or create, by what they are about.
const OTHER_FORMATS: &str = "^$";

/// Cases that can't pass, with the reason.
const LACKING: &[(&str, &str)] =
    &[("convert-qcow2-c-bytes", "the very deflate of zlib 1.2.13; the content is compared elsewhere")];

#[test]
fn transcripts() {
    let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden/run.py");
    if !runner.exists() {
        eprintln!("SKIPPED: {} is not there, so no transcript was compared", runner.display());
        return;
    }
    if !support::can_run(true) {
        return;
    }
    // Under this name, so that the version and the usage texts are compared as well.
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("qemu-img");
    symlink(env!("CARGO_BIN_EXE_instar"), &program).unwrap();
    let lacking: Vec<&str> = LACKING.iter().map(|(case, _)| *case).collect();
    let skip = format!("{OTHER_FORMATS}|^({})$", lacking.join("|"));
    let mut command = Command::new("python3");
    command
        .arg(&runner)
        .args(["--only", "^(cli|info|convert|create|snapshot|bitmap|amend|map|compare|measure|check|resize|rebase|commit|dd|bench)(-|$)", "--skip", &skip])
        .arg(&program);
    let output = command.output().expect("python3 runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    eprintln!("{}", text.lines().last().unwrap_or_default());
}
