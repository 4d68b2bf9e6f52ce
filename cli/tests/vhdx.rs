//! VHDX from end to end: what qemu-img reads and writes too, and what it refuses (`docs/quirks.md`).

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{can_run, expect_success, instar, qemu_img};

/// Unpacks an image of the corpus.
fn unpack(name: &str, dir: &Path) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus/images").join(format!("{name}.zst"));
    let target = dir.join(Path::new(name).file_name()?);
    let status = Command::new("zstd").args(["-dqf", "--sparse"]).arg(&source).arg("-o").arg(&target).status();
    if !status.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: {} can't be unpacked", source.display());
        return None;
    }
    Some(target)
}

fn told(output: &std::process::Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A checkpoint of Hyper-V and its parent: the contents are those that libvhdi gives.
#[test]
fn differencing_images_are_read_through_their_parent() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (Some(_), Some(parent)) = (unpack("dfvfs/fat-differential.vhdx", d), unpack("dfvfs/fat-parent.vhdx", d)) else {
        return;
    };
    expect_success(&instar(d, &["convert", "-O", "raw", "fat-differential.vhdx", "raw"]), "convert");
    let sum = Command::new("sha256sum").arg(d.join("raw")).output().unwrap();
    let expected = "a538161f34bc44c12bf9a542ce9218741c62728723ea18d0e4f6ea92e9f32e93";
    assert!(told(&sum).starts_with(expected), "{}", told(&sum));
    expect_success(&instar(d, &["compare", "-F", "raw", "fat-differential.vhdx", "raw"]), "compare");
    let info = instar(d, &["info", "--backing-chain", "fat-differential.vhdx"]);
    expect_success(&info, "info");
    let text = told(&info);
    assert!(text.contains("backing file: ./fat-parent.vhdx") && text.contains("image: ./fat-parent.vhdx"), "{text}");
    // Another image under the parent's name is not the parent, and one that is gone is missed.
    expect_success(&qemu_img(d, &["create", "-q", "-f", "vhdx", "fat-parent.vhdx", "4M"]), "create");
    let refused = instar(d, &["convert", "-O", "raw", "fat-differential.vhdx", "raw"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(told(&refused).contains("wanted: f88d4d92-6fcc-408d-9bef-9b7c89f15c89"), "{}", told(&refused));
    fs::remove_file(parent).unwrap();
    let refused = instar(d, &["convert", "-O", "raw", "fat-differential.vhdx", "raw"]);
    assert!(!refused.status.success() && told(&refused).contains("No such file"), "{}", told(&refused));
}

/// What QEMU left in its log is read without being carried out.
#[test]
fn dirty_logs_are_replayed_in_memory() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let Some(image) = unpack("qemu-iotests/iotest-dirtylog-10G-4M.vhdx", d) else { return };
    let before = fs::read(&image).unwrap();
    fs::rename(&image, d.join("dirty.vhdx")).unwrap();
    let info = told(&instar(d, &["info", "dirty.vhdx"]));
    assert!(info.contains("cleanly shut down: no"), "{info}");
    expect_success(&instar(d, &["convert", "-O", "qcow2", "dirty.vhdx", "ours.qcow2"]), "convert");
    assert!(fs::read(d.join("dirty.vhdx")).unwrap() == before);
    assert!(!qemu_img(d, &["info", "dirty.vhdx"]).status.success());
    fs::copy(d.join("dirty.vhdx"), d.join("again.vhdx")).unwrap();
    let ours = instar(d, &["check", "-r", "all", "again.vhdx"]);
    let theirs = qemu_img(d, &["check", "-r", "all", "dirty.vhdx"]);
    expect_success(&theirs, "check");
    assert_eq!((ours.status.code(), told(&ours)), (theirs.status.code(), told(&theirs)));
    expect_success(&qemu_img(d, &["compare", "again.vhdx", "dirty.vhdx"]), "compare");
    expect_success(&instar(d, &["check", "-r", "all", "again.vhdx"]), "a clean image");
    expect_success(&qemu_img(d, &["compare", "-f", "qcow2", "-F", "vhdx", "ours.qcow2", "dirty.vhdx"]), "compare");
}

/// Into new images of each kind and into an existing one, and back.
#[test]
fn round_trips() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut raw = vec![0; (19 << 20) + 512];
    for (at, byte) in raw.iter_mut().enumerate().filter(|(at, _)| at >> 18 & 5 == 1 || at >> 20 == 19) {
        *byte = (at / 512 * 7 + at % 251) as u8;
    }
    fs::write(d.join("raw"), &raw).unwrap();
    for options in ["subformat=dynamic", "subformat=fixed", "block_size=1M,log_size=2M", "block_state_zero=off"] {
        let args = ["convert", "-f", "raw", "-O", "vhdx", "-o", options, "raw", "a.vhdx"];
        expect_success(&instar(d, &args), options);
        expect_success(&qemu_img(d, &["check", "a.vhdx"]), options);
        expect_success(&qemu_img(d, &["compare", "-f", "raw", "-F", "vhdx", "raw", "a.vhdx"]), options);
        expect_success(&instar(d, &["convert", "-f", "vhdx", "-O", "raw", "a.vhdx", "back"]), options);
        assert!(fs::read(d.join("back")).unwrap() == raw, "{options}");
    }
    expect_success(&qemu_img(d, &["create", "-q", "-f", "vhdx", "b.vhdx", "24M"]), "create");
    expect_success(&instar(d, &["convert", "-n", "-f", "raw", "-O", "vhdx", "raw", "b.vhdx"]), "convert -n");
    expect_success(&qemu_img(d, &["check", "b.vhdx"]), "check");
    expect_success(&qemu_img(d, &["compare", "-f", "raw", "-F", "vhdx", "raw", "b.vhdx"]), "compare");
}

/// Refusals and the line before them are qemu-img's.
#[test]
fn refusals_of_create() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("block_size=3M", "1M"),
        ("subformat=foo", "1M"),
        ("log_size=0", "1M"),
        ("log_size=4G", "1M"),
        ("log_size=1M", "65T"),
        ("block_size=512M", "1M"),
    ];
    for (options, size) in cases {
        let args = ["create", "-f", "vhdx", "-o", options, "a.vhdx", size];
        let (ours, theirs) = (instar(dir.path(), &args), qemu_img(dir.path(), &args));
        assert_eq!(ours.status.code(), theirs.status.code(), "{options}");
        assert_eq!(told(&ours).replace("instar: ", ""), told(&theirs).replace("qemu-img: ", ""), "{options}");
    }
}
