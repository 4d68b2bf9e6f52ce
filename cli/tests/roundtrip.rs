//! Random disks through instar and qemu-img, in both directions, in the real virtual machine.

mod support;

use std::fs;
use std::path::Path;

use support::{Random, can_run, expect_success, instar, listing, qemu_img, qemu_io};

const CLUSTERS: &[&str] = &["512", "4k", "16k", "64k", "256k", "2M"];

/// Creation options that may stand together.
fn options(random: &mut Random) -> String {
    let cluster = random.pick(CLUSTERS);
    if random.below(5) == 0 {
        return format!("cluster_size={cluster},compat=0.10");
    }
    let mut options = format!("cluster_size={cluster},refcount_bits={}", 1 << random.below(7));
    if !matches!(cluster, "512" | "4k") && random.below(2) == 0 {
        options += ",extended_l2=on";
    }
    if random.below(2) == 0 {
        options += ",compression_type=zstd";
    }
    if random.below(4) == 0 {
        options += ",lazy_refcounts=on";
    }
    options
}

#[test]
fn what_instar_writes_qemu_img_reads() {
    if !can_run(true) {
        return;
    }
    for seed in 0..24 {
        let random = &mut Random(seed);
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let sectors = 1 + random.below(12_000);
        fs::write(dir.join("disk.raw"), random.disk(sectors as usize * 512)).unwrap();
        let options = options(random);
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
        let sparse = random.pick(&["4k", "64k", "0"]);
        args.extend(["-S", sparse]);
        if random.below(3) == 0 {
            args.push("-c");
        }
        args.extend(["disk.raw", "out.qcow2"]);
        let what = format!("seed {seed}: {args:?}");
        expect_success(&instar(dir, &args), &what);
        expect_success(&qemu_img(dir, &["check", "out.qcow2"]), &what);
        expect_success(&qemu_img(dir, &["compare", "-f", "raw", "-F", "qcow2", "disk.raw", "out.qcow2"]), &what);
        expect_success(&instar(dir, &["convert", "-O", "raw", "out.qcow2", "back.raw"]), &what);
        let (disk, back) = (fs::read(dir.join("disk.raw")).unwrap(), fs::read(dir.join("back.raw")).unwrap());
        assert!(disk == back, "{what}: content differs");
    }
}

/// Random `qemu-io` commands inside `len` bytes.
fn scribble(random: &mut Random, len: u64, zeroes: bool) -> Vec<String> {
    (0..2 + random.below(12))
        .map(|_| {
            let start = random.below(len / 512) * 512;
            let run = ((1 + random.below(300)) * 512).min(len - start);
            match random.below(4) {
                0 if zeroes => format!("write -z {start} {run}"),
                1 if zeroes => format!("discard {start} {run}"),
                _ => format!("write -P {} {start} {run}", 1 + random.below(255)),
            }
        })
        .collect()
}

/// Makes a chain of up to three random layers (some compressed, some with snapshots) and tells the top's name.
fn random_chain(random: &mut Random, dir: &Path, what: &str) -> String {
    let mut below: Option<String> = None;
    for layer in 0..1 + random.below(3) {
        let name = format!("layer{layer}.qcow2");
        let len = (1 + random.below(8000)) * 512;
        let (options, size) = (options(random), len.to_string());
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some(below) = &below {
            args.extend(["-b", below, "-F", "qcow2"]);
        }
        args.extend([name.as_str(), size.as_str()]);
        expect_success(&qemu_img(dir, &args), what);
        qemu_io(dir, &name, &scribble(random, len, !options.contains("compat=0.10")));
        if random.below(3) == 0 {
            // Refused where a refcount has one bit: there is then no snapshot.
            qemu_img(dir, &["snapshot", "-c", "one", &name]);
            qemu_io(dir, &name, &scribble(random, len, !options.contains("compat=0.10")));
        }
        if random.below(3) == 0 && below.is_none() {
            let plain = format!("plain-{name}");
            fs::rename(dir.join(&name), dir.join(&plain)).unwrap();
            let args = ["convert", "-c", "-O", "qcow2", "-o", &options, &plain, &name];
            expect_success(&qemu_img(dir, &args), what);
        }
        below = Some(name);
    }
    below.unwrap()
}

#[test]
fn what_qemu_img_writes_instar_reads() {
    if !can_run(true) {
        return;
    }
    for seed in 100..124 {
        let random = &mut Random(seed);
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let what = format!("seed {seed}");
        let top = random_chain(random, dir, &what);
        expect_success(&instar(dir, &["convert", "-O", "raw", &top, "ours.raw"]), &what);
        expect_success(&qemu_img(dir, &["convert", "-O", "raw", &top, "theirs.raw"]), &what);
        let (ours, theirs) = (fs::read(dir.join("ours.raw")).unwrap(), fs::read(dir.join("theirs.raw")).unwrap());
        assert!(ours == theirs, "{what}: content differs");
        for args in [vec!["info", &top], vec!["info", "--output=json", &top], vec!["info", "--backing-chain", &top]] {
            let (ours, theirs) = (instar(dir, &args), qemu_img(dir, &args));
            assert_eq!(
                String::from_utf8_lossy(&ours.stdout),
                String::from_utf8_lossy(&theirs.stdout),
                "{what}: {args:?}: {}",
                String::from_utf8_lossy(&ours.stderr)
            );
        }
    }
}

/// Truncation, flipped bits and an image that is its own backing file: an error, one line, exit status 1, nothing left behind.
#[test]
fn damaged_images_end_in_one_error_line() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let random = &mut Random(7);
    fs::write(dir.join("disk.raw"), random.disk(3 << 20)).unwrap();
    expect_success(&qemu_img(dir, &["convert", "-c", "-O", "qcow2", "disk.raw", "good.qcow2"]), "make");
    let good = fs::read(dir.join("good.qcow2")).unwrap();
    let mut failures = 0;
    for case in 0..60 {
        let mut bad = good.clone();
        match case {
            0 => bad.truncate(40),
            1 => bad.truncate(100_000),
            2 => bad.truncate(bad.len() / 2),
            _ => {
                // Mostly in the header, where a bit changes the meaning.
                let place = if case % 3 == 0 { bad.len() } else { 0x70 };
                for _ in 0..1 + random.below(4) {
                    let at = random.below(place as u64) as usize;
                    bad[at] ^= 1 << random.below(8);
                }
            }
        }
        fs::write(dir.join("bad.qcow2"), &bad).unwrap();
        let before = listing(dir);
        let output = instar(dir, &["convert", "-f", "qcow2", "-O", "raw", "bad.qcow2", "out.raw"]);
        if output.status.success() {
            // The bit may have hit a byte without meaning, or data that no checksum protects.
            fs::remove_file(dir.join("out.raw")).unwrap();
            continue;
        }
        failures += 1;
        assert_one_line_error(&output, &format!("case {case}"));
        assert_eq!(listing(dir), before, "case {case}: something was left behind");
    }
    assert!(failures > 10, "the damage was not damaging: {failures} failures");
}

/// What lies behind the end of a cut image is zero to qemu-img, and to instar; an error where quirks are not wanted.
#[test]
fn a_cut_image_is_as_to_qemu_img_or_an_error() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("disk.raw"), Random(8).disk(3 << 20)).unwrap();
    expect_success(&qemu_img(dir, &["convert", "-S", "0", "-O", "qcow2", "disk.raw", "cut.qcow2"]), "make");
    let whole = fs::metadata(dir.join("cut.qcow2")).unwrap().len();
    for len in [whole - 700_000, 400_000, 200_000, 100_000] {
        fs::OpenOptions::new().write(true).open(dir.join("cut.qcow2")).unwrap().set_len(len).unwrap();
        expect_success(&qemu_img(dir, &["convert", "-O", "raw", "cut.qcow2", "theirs.raw"]), "qemu-img");
        expect_success(&instar(dir, &["convert", "-O", "raw", "cut.qcow2", "ours.raw"]), "instar");
        let same = fs::read(dir.join("ours.raw")).unwrap() == fs::read(dir.join("theirs.raw")).unwrap();
        assert!(same, "{len} bytes: content differs");
        fs::remove_file(dir.join("ours.raw")).unwrap();
        let before = listing(dir);
        let output = instar(dir, &["convert", "--ignore-quirks", "-O", "raw", "cut.qcow2", "ours.raw"]);
        assert_one_line_error(&output, &format!("{len} bytes"));
        assert_eq!(listing(dir), before, "{len} bytes: something was left behind");
    }
}

#[test]
fn an_image_in_itself_is_an_error() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // Under another name at first: qemu-img does not make an image that names itself.
    let create = |name: &str, backing: &str| {
        let args = ["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", "new.qcow2", "1M"];
        expect_success(&qemu_img(dir, &args), name);
        fs::rename(dir.join("new.qcow2"), dir.join(name)).unwrap();
    };
    create("self.qcow2", "self.qcow2");
    create("a.qcow2", "b.qcow2");
    create("b.qcow2", "a.qcow2");
    for name in ["self.qcow2", "a.qcow2"] {
        let before = listing(dir);
        let output = instar(dir, &["convert", "-O", "raw", name, "out.raw"]);
        assert_one_line_error(&output, name);
        assert_eq!(listing(dir), before, "{name}: something was left behind");
        assert_one_line_error(&instar(dir, &["info", "--backing-chain", name]), name);
    }
}

fn assert_one_line_error(output: &std::process::Output, what: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{what}: {text}");
    // qemu-img itself adds a line of advice to a few.
    let advice = text.contains("You can force-remove");
    assert_eq!(text.trim_end().lines().count(), 1 + usize::from(advice), "{what}: {text:?}");
    assert!(text.starts_with("instar: "), "{what}: {text:?}");
    assert!(!text.contains("panicked"), "{what}: {text:?}");
}
