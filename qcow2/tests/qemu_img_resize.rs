//! Resizing, other backing files and emptying: the same steps by this crate and by qemu-img on two copies of an image give the same
//! file, byte for byte, or where the order of clusters is free the same contents.

mod common;

use std::fs;
use std::path::Path;

use common::{have_qemu, must, run};
use instar_blockio::{BlockRead, FileId, MemBlock};
use instar_qcow2::{Error, Growth, Image, OpenOptions, Preallocation, ResizeError, Writer};

fn edit(path: &Path, change: impl FnOnce(&mut Writer<&mut MemBlock>) -> Result<(), Error>) -> Result<(), Error> {
    let mut file = MemBlock::from(fs::read(path).unwrap());
    let mut writer = Writer::open(&mut file, FileId(0), None)?;
    change(&mut writer)?;
    writer.finish()?;
    fs::write(path, file.as_bytes()).unwrap();
    Ok(())
}

fn contents(path: &Path) -> Vec<u8> {
    let file = MemBlock::from(fs::read(path).unwrap());
    let image = Image::open(file, FileId(0), &OpenOptions::default()).unwrap();
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read_at(0, &mut bytes).unwrap();
    bytes
}

fn assert_clean(dir: &Path, what: &str) {
    let checked = run(dir, "qemu-img", &["check", "-f", "qcow2", "a"]);
    let text = String::from_utf8_lossy(&checked.stdout).into_owned() + &String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success(), "{what}: {text}");
}

/// `base` is 4 MiB of data; `a` and `b` are copies of an image of 3 MiB in which some of it is replaced.
fn prepare(dir: &Path, options: &str, backed: bool) {
    let make = |extra: &[&str], name: &str, size: &str| {
        must(dir, "qemu-img", &[&["create", "-q", "-f", "qcow2"], extra, &[name, size]].concat());
    };
    make(&[], "base", "4M");
    must(dir, "qemu-io", &["-c", "write -P 9 0 4M", "base"]);
    let backing: &[&str] = if backed { &["-b", "base", "-F", "qcow2"] } else { &[] };
    make(&[&["-o", options], backing].concat(), "a", "3M");
    for write in ["write -P 1 0 100k", "write -P 2 1M 300k", "write -z 2M 128k", "write -P 3 2944k 128k"] {
        must(dir, "qemu-io", &["-c", write, "a"]);
    }
    fs::copy(dir.join("a"), dir.join("b")).unwrap();
}

const VARIANTS: [&str; 6] =
    ["cluster_size=64k", "cluster_size=4k", "cluster_size=512", "extended_l2=on", "cluster_size=2M", "refcount_bits=1"];

#[test]
fn sizes() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for options in VARIANTS {
        for (size, mode, preallocation) in [
            (5 << 20, "off", Preallocation::Off),
            (9 << 30, "off", Preallocation::Off),
            (5 << 20, "metadata", Preallocation::Metadata),
            (5 << 20, "falloc", Preallocation::Falloc),
            (5 << 20, "full", Preallocation::Full),
            (1 << 20, "off", Preallocation::Off),
            (2600 << 10, "off", Preallocation::Off),
            (0x10200, "off", Preallocation::Off),
            (512, "off", Preallocation::Off),
        ] {
            prepare(dir, options, false);
            if options == "cluster_size=512" && size > 1 << 30 {
                continue;
            }
            let what = format!("{options} to {size} {mode}");
            let shrink: &[&str] = if size < 3 << 20 { &["--shrink"] } else { &["--preallocation", mode] };
            must(dir, "qemu-img", &[&["resize", "-q"], shrink, &["b", &size.to_string()]].concat());
            edit(&dir.join("a"), |image| image.resize(size, Growth { preallocation, ..Growth::default() })).unwrap();
            assert_clean(dir, &what);
            let (ours, theirs) = (fs::read(dir.join("a")).unwrap(), fs::read(dir.join("b")).unwrap());
            if options == "cluster_size=512" || options == "cluster_size=2M" && mode != "off" {
                // QEMU keeps tables behind the end, and gives a last cluster that is cut by the end a new place.
                continue;
            }
            if size < 1 << 30 {
                assert!(contents(&dir.join("a")) == contents(&dir.join("b")), "{what}: contents");
            }
            let differing = ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs);
            assert!(
                (ours.len(), differing) == (theirs.len(), None),
                "{what}: {} {} {differing:?}",
                ours.len(),
                theirs.len()
            );
        }
    }
}

#[test]
fn with_snapshots_and_bitmaps() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for options in ["cluster_size=64k", "cluster_size=512", "extended_l2=on"] {
        for sizes in [[1 << 20, 5 << 20], [0x20000, 64 << 20], [4 << 20, 1 << 20]] {
            prepare(dir, options, false);
            for copy in ["a", "b"] {
                must(dir, "qemu-img", &["snapshot", "-c", "one", copy]);
                must(dir, "qemu-img", &["bitmap", "--add", copy, "bits"]);
                must(dir, "qemu-io", &["-c", "write -P 7 900k 200k", "-c", "write -P 8 2900k 20k", copy]);
            }
            for size in sizes {
                must(dir, "qemu-img", &["resize", "-q", "--shrink", "b", &size.to_string()]);
                edit(&dir.join("a"), |image| image.resize(size, Growth::default())).unwrap();
                assert_clean(dir, options);
                assert!(contents(&dir.join("a")) == contents(&dir.join("b")), "{options} {size}");
                let bitmaps = |name: &str| {
                    let file = MemBlock::from(fs::read(dir.join(name)).unwrap());
                    let image = Image::open(file, FileId(0), &OpenOptions::default()).unwrap();
                    let all = image.bitmaps().unwrap().into_iter();
                    let bits = |info: &instar_qcow2::BitmapInfo| {
                        let mut bits = vec![0; info.len as usize];
                        image.read_bitmap(info, 0, &mut bits).unwrap();
                        bits
                    };
                    all.map(|info| (info.name.clone(), info.granularity_bits, info.flags, bits(&info)))
                        .collect::<Vec<_>>()
                };
                assert_eq!(bitmaps("a"), bitmaps("b"), "{options} {size}");
            }
            for copy in ["a", "b"] {
                must(dir, "qemu-img", &["bitmap", "--remove", copy, "bits"]);
                must(dir, "qemu-img", &["snapshot", "-a", "one", copy]);
            }
            assert!(contents(&dir.join("a")) == contents(&dir.join("b")), "{options}: snapshot");
            assert_clean(dir, options);
        }
    }
}

/// What a longer backing image holds does not show through, wherever the disk ended.
#[test]
fn a_longer_backing_image_stays_hidden() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for options in ["cluster_size=64k", "cluster_size=512", "extended_l2=on"] {
        for old in ["1000k", "1500k", "1025k"] {
            prepare(dir, options, true);
            for copy in ["a", "b"] {
                must(dir, "qemu-img", &["resize", "-q", "--shrink", copy, old]);
                must(dir, "qemu-img", &["resize", "-q", if copy == "a" { "base" } else { "b" }, "4M"]);
            }
            edit(&dir.join("a"), |image| {
                let tail = image.backed_tail()?.map_or(0, |tail| tail.end - tail.start);
                let tail = vec![9; tail as usize];
                image.resize(4 << 20, Growth { backing_size: 4 << 20, tail: &tail, ..Growth::default() })
            })
            .unwrap();
            assert_clean(dir, options);
            must(dir, "qemu-img", &["convert", "-O", "raw", "b", "b.raw"]);
            must(dir, "qemu-img", &["convert", "-O", "raw", "a", "a.raw"]);
            let (ours, mut theirs) = (fs::read(dir.join("a.raw")).unwrap(), fs::read(dir.join("b.raw")).unwrap());
            // QEMU shows again what was cut off inside the last cluster.
            let end = old.trim_end_matches('k').parse::<usize>().unwrap() << 10;
            theirs[end..].fill(0);
            assert!(ours == theirs, "{options} {old}");
        }
    }
}

#[test]
fn what_is_refused() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let refused = |options: &str, backed: bool, size: u64, growth: Growth<'_>| {
        prepare(dir, options, backed);
        if options == "compat=0.10" && !backed {
            must(dir, "qemu-img", &["snapshot", "-c", "one", "a"]);
        }
        let before = fs::read(dir.join("a")).unwrap();
        let error = edit(&dir.join("a"), |image| image.resize(size, growth)).unwrap_err();
        assert!(before == fs::read(dir.join("a")).unwrap(), "{options}");
        match error {
            Error::Resize(error) => error,
            other => panic!("{other:?}"),
        }
    };
    let none = Growth::default();
    assert_eq!(refused("compat=1.1", false, 4_000_001, none), ResizeError::Unaligned(4_000_001));
    assert_eq!(refused("compat=0.10", false, 4 << 20, none), ResizeError::SnapshotsInVersion2);
    let longer = Growth { backing_size: 4 << 20, ..none };
    assert_eq!(refused("compat=0.10", true, 4 << 20, longer), ResizeError::ZeroesInVersion2);
    assert_eq!(refused("cluster_size=512", false, 1 << 40, none), ResizeError::TooLarge(1 << 40));
    let full = Growth { preallocation: Preallocation::Full, ..none };
    assert_eq!(refused("compat=1.1", false, 512, full), ResizeError::PreallocationOnShrink);
}

#[test]
fn backing_files() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let long = "l".repeat(1023);
    for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "extended_l2=on"] {
        prepare(dir, options, true);
        for (name, format) in [("another", "qcow2"), ("", ""), ("x", "raw"), (long.as_str(), "vmdk")] {
            let mut args = vec!["rebase", "-u", "-b", name, "b"];
            if !format.is_empty() {
                args.splice(4..4, ["-F", format]);
            }
            let theirs = run(dir, "qemu-img", &args);
            let ours = edit(&dir.join("a"), |image| image.set_backing(name.as_bytes(), format.as_bytes()));
            assert_eq!(theirs.status.success(), ours.is_ok(), "{options} {name}: {ours:?} {theirs:?}");
            assert!(ours.is_ok() || matches!(ours, Err(Error::HeaderFull)));
            assert!(fs::read(dir.join("a")).unwrap() == fs::read(dir.join("b")).unwrap(), "{options} {name}");
        }
    }
}

#[test]
fn emptied() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for options in [VARIANTS.as_slice(), &["compat=0.10"]].concat() {
        for with_snapshot in [false, true] {
            prepare(dir, options, true);
            if with_snapshot && options != "refcount_bits=1" {
                ["a", "b"].iter().for_each(|copy| must(dir, "qemu-img", &["snapshot", "-c", "one", copy]));
            }
            let committed = contents(&dir.join("a"));
            must(dir, "qemu-img", &["commit", "-q", "b"]);
            edit(&dir.join("a"), |image| image.make_empty()).unwrap();
            assert_clean(dir, options);
            assert!(contents(&dir.join("a")).iter().all(|&byte| byte == 0), "{options}");
            let (ours, theirs) = (fs::read(dir.join("a")).unwrap(), fs::read(dir.join("b")).unwrap());
            if with_snapshot && options != "refcount_bits=1" {
                must(dir, "qemu-img", &["snapshot", "-a", "one", "a"]);
                assert!(contents(&dir.join("a")) == committed, "{options}");
                assert_clean(dir, options);
            } else if options != "compat=0.10" {
                assert!(ours == theirs, "{options}: {} {}", ours.len(), theirs.len());
            }
        }
    }
}
