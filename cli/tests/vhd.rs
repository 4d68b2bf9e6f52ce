//! VHD from end to end: what `check` says beyond qemu-img, and repairs.

mod support;

use std::fs;
use std::path::Path;
use std::process::Output;

use support::{can_run, expect_success, instar, qemu_img, qemu_io};

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Writes `bytes` at `at` of the image.
fn damage(dir: &Path, at: usize, bytes: &[u8]) {
    let path = dir.join("a.vhd");
    let mut image = fs::read(&path).unwrap();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(path, image).unwrap();
}

#[test]
fn images_are_checked_and_footers_repaired() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    expect_success(&qemu_img(d, &["create", "-q", "-f", "vpc", "-o", "force_size=on", "a.vhd", "20M"]), "create");
    qemu_io(d, "a.vhd", &["write -P 1 0 64k".to_owned(), "write -P 2 9M 3M".to_owned()]);
    let sound = fs::read(d.join("a.vhd")).unwrap();
    let check = |more: &[&str]| instar(d, &[&["--ignore-quirks", "check"], more, &["a.vhd"]].concat());

    // Without the option as qemu-img, which can't.
    let (ours, theirs) = (instar(d, &["check", "a.vhd"]), qemu_img(d, &["check", "a.vhd"]));
    assert_eq!(ours.status.code(), Some(63));
    assert_eq!(theirs.status.code(), Some(63));
    assert_eq!(told(&ours).replace("instar:", "qemu-img:"), told(&theirs));

    let clean = check(&[]);
    expect_success(&clean, "a sound image");
    assert!(
        told(&clean).starts_with("No errors were found on the image.\n3/10 = 30.00% allocated"),
        "{}",
        told(&clean)
    );

    for (at, what) in [(70, "the footer at the beginning"), (sound.len() - 400, "the footer at the end")] {
        damage(d, at, b"damaged");
        let found = check(&[]);
        assert_eq!(found.status.code(), Some(2), "{}", told(&found));
        assert!(told(&found).contains(what) && told(&found).contains("1 errors were found"), "{}", told(&found));
        let read = instar(d, &["convert", "-f", "vpc", "-O", "raw", "a.vhd", "a.raw"]);
        expect_success(&read, "an image with one good footer");
        let warning = String::from_utf8_lossy(&read.stderr).to_lowercase();
        assert!(warning.contains(what) && warning.contains("was used"), "{warning}");
        let raw = fs::read(d.join("a.raw")).unwrap();
        assert!(raw[..64 << 10] == [1; 64 << 10] && raw[9 << 20..12 << 20].iter().all(|byte| *byte == 2));
        let repaired = check(&["-r", "all"]);
        expect_success(&repaired, "the repair");
        assert!(told(&repaired).contains("1 corruptions"), "{}", told(&repaired));
        assert!(fs::read(d.join("a.vhd")).unwrap() == sound, "{what} is as it was");
    }

    // The table's first entry leads behind the end; then two blocks share a place. Neither can be repaired.
    let entry = sound[1536..1540].to_vec();
    damage(d, 1536, &0x00ff_0000u32.to_be_bytes());
    let found = check(&["-r", "all"]);
    assert_eq!(found.status.code(), Some(2));
    assert!(told(&found).contains("block 0 at offset 0x1fe000000 ends behind the end"), "{}", told(&found));
    damage(d, 1536, &entry);
    damage(d, 1540, &entry);
    let found = check(&[]);
    assert_eq!(found.status.code(), Some(2));
    assert!(told(&found).contains("blocks 0 and 1 overlap"), "{}", told(&found));
}
