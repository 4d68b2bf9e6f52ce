//! Every writable format and subformat, with qemu-img as the judge: what instar writes, qemu-img reads and finds sound, and the reverse.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;

use support::{Random, can_run, expect_success, instar, qemu_img};

/// Format and options of a target; whether `qemu-img check` knows it; its largest disk in bytes (as far as raw files reach here).
struct Kind {
    format: &'static str,
    options: &'static str,
    checked: bool,
    largest: u64,
}

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
/// A little less than the largest file of common file systems with small blocks.
const FILE: u64 = 15 * TIB;

const fn kind(format: &'static str, options: &'static str, checked: bool, largest: u64) -> Kind {
    Kind { format, options, checked, largest }
}

const KINDS: &[Kind] = &[
    kind("qcow2", "", true, FILE),
    kind("qcow2", "cluster_size=2M,extended_l2=on", true, FILE),
    kind("vmdk", "", true, 2 * TIB + 512),
    kind("vmdk", "adapter_type=lsilogic,hwversion=13,toolsversion=9", true, 3 * GIB),
    kind("vmdk", "compat6=on,zeroed_grain=on", true, 3 * GIB),
    kind("vmdk", "subformat=monolithicFlat", true, 2 * TIB + 512),
    kind("vmdk", "subformat=twoGbMaxExtentSparse", true, 9 * GIB + 512),
    kind("vmdk", "subformat=twoGbMaxExtentFlat", true, 9 * GIB + 512),
    kind("vmdk", "subformat=streamOptimized", true, 2 * TIB + 512),
    kind("vpc", "", false, 2040 * GIB),
    kind("vpc", "force_size=on", false, 2040 * GIB),
    kind("vpc", "subformat=fixed", false, 2040 * GIB),
    kind("vpc", "subformat=fixed,force_size=on", false, 2040 * GIB),
    kind("vhdx", "", true, FILE),
    kind("vhdx", "block_size=1M,log_size=2M,block_state_zero=off", true, 3 * TIB),
    kind("vhdx", "subformat=fixed,block_size=2M", true, 3 * GIB),
    kind("qcow", "", false, FILE),
    kind("qed", "", true, FILE),
    kind("qed", "cluster_size=4k,table_size=4", true, 3 * GIB),
    kind("vdi", "", true, FILE),
    kind("vdi", "static=on", true, 3 * GIB),
    kind("parallels", "", true, 3 * TIB),
];

impl Kind {
    fn arguments<'a>(&'a self, from: &'a str, to: &'a str) -> Vec<&'a str> {
        let mut args = vec!["convert", "-f", "raw", "-O", self.format];
        if !self.options.is_empty() {
            args.extend(["-o", self.options]);
        }
        args.extend([from, to]);
        args
    }
}

/// A sparse file with some bytes at its beginning, its end and in between.
fn sparse_disk(dir: &Path, random: &mut Random, len: u64) {
    let file = File::create(dir.join("disk.raw")).unwrap();
    file.set_len(len).unwrap();
    if len == 0 {
        return;
    }
    let mut put = |at: u64| {
        let sectors = 1 + random.below(400) as usize;
        let bytes = random.disk(sectors * 512);
        let room = (len - at).min(bytes.len() as u64) as usize;
        file.write_all_at(&bytes[..room], at).unwrap();
    };
    put(0);
    put((len / 2) & !511);
    put((len / 512).saturating_sub(300) * 512);
}

/// Compares a disk with an image, by the program.
fn same(program: fn(&Path, &[&str]) -> Output, dir: &Path, kind: &Kind, image: &str, what: &str) {
    let output = program(dir, &["compare", "-f", "raw", "-F", kind.format, "disk.raw", image]);
    expect_success(&output, what);
}

/// Has qemu-img compare the parts of a large disk that hold something: for all of it, it would take minutes.
fn same_windows(dir: &Path, kind: &Kind, len: u64, what: &str) {
    const WINDOW: u64 = 1 << 20;
    for at in [0, len / 2, len - WINDOW] {
        let at = at & !511;
        let window = |format: &str, file: &str| {
            let place = format!("driver=raw,offset={at},size={},file.driver={format}", WINDOW.min(len - at));
            match format {
                "file" => format!("{place},file.filename={file}"),
                _ => format!("{place},file.file.driver=file,file.file.filename={file}"),
            }
        };
        let (disk, ours) = (window("file", "disk.raw"), window(kind.format, "ours"));
        expect_success(&qemu_img(dir, &["compare", "--image-opts", &disk, &ours]), what);
    }
}

/// Both programs make an image of `disk.raw`, and find both sound.
fn convert_and_check(dir: &Path, kind: &Kind, what: &str) {
    expect_success(&instar(dir, &kind.arguments("disk.raw", "ours")), what);
    expect_success(&qemu_img(dir, &kind.arguments("disk.raw", "theirs")), what);
    for image in ["ours", "theirs"] {
        match (kind.checked, kind.format) {
            (true, format) => {
                expect_success(&qemu_img(dir, &["check", "-f", format, image]), what);
                expect_success(&instar(dir, &["check", "-f", format, image]), what);
            }
            // Not known to qemu-img.
            (false, "vpc") => expect_success(&instar(dir, &["--ignore-quirks", "check", "-f", "vpc", image]), what),
            _ => {}
        }
    }
    same(instar, dir, kind, "ours", what);
    same(instar, dir, kind, "theirs", what);
}

fn maps_agree(dir: &Path, kind: &Kind, what: &str) {
    let args = ["map", "--output=json", "-f", kind.format, "theirs"];
    let (ours, theirs) = (instar(dir, &args), qemu_img(dir, &args));
    expect_success(&theirs, what);
    let text = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text(&ours), text(&theirs), "{what}: map");
}

#[test]
fn small_disks_of_all_kinds() {
    if !can_run(true) {
        return;
    }
    for (seed, kind) in (1..).zip(KINDS) {
        for len in [512, 64 << 10, 5_000_704, 5_000_000] {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path();
            let what = format!("{} {} of {len} bytes", kind.format, kind.options);
            sparse_disk(dir, &mut Random(seed), len);
            convert_and_check(dir, kind, &what);
            same(qemu_img, dir, kind, "ours", &what);
            if !kind.options.contains("extended_l2") {
                maps_agree(dir, kind, &what);
            }
            expect_success(&instar(dir, &["convert", "-f", kind.format, "-O", "raw", "ours", "back.raw"]), &what);
            let (disk, back) = (fs::read(dir.join("disk.raw")).unwrap(), fs::read(dir.join("back.raw")).unwrap());
            // Sizes are rounded up to sectors, cylinders or blocks.
            assert!(back.len() >= disk.len() && back.starts_with(&disk), "{what}: other contents");
            assert!(back[disk.len()..].iter().all(|byte| *byte == 0), "{what}: something behind the end");
        }
    }
}

#[test]
fn empty_disks_of_all_kinds() {
    if !can_run(true) {
        return;
    }
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let what = format!("{} {} of no bytes", kind.format, kind.options);
        sparse_disk(dir, &mut Random(0), 0);
        let (ours, theirs) =
            (instar(dir, &kind.arguments("disk.raw", "ours")), qemu_img(dir, &kind.arguments("disk.raw", "theirs")));
        // Quirks vmdk-empty and vhd-fixed-empty: what can be made can be read.
        let quirk = kind.format == "vmdk" || kind.options.starts_with("subformat=fixed") && kind.format == "vpc";
        assert_eq!(ours.status.success(), theirs.status.success() || quirk, "{what}");
        if !ours.status.success() {
            continue;
        }
        same(instar, dir, kind, "ours", &what);
        if !quirk {
            same(instar, dir, kind, "theirs", &what);
        }
    }
}

#[test]
fn large_disks_of_all_kinds() {
    if !can_run(true) {
        return;
    }
    for (seed, kind) in (100..).zip(KINDS) {
        let dir = tempfile::tempdir().unwrap();
        let what = format!("{} {} of {} bytes", kind.format, kind.options, kind.largest);
        sparse_disk(dir.path(), &mut Random(seed), kind.largest);
        convert_and_check(dir.path(), kind, &what);
        same_windows(dir.path(), kind, kind.largest, &what);
    }
}
