//! Both ways between this crate and qemu-img: contents, checks, and the very layout.

mod common;

use std::fs;
use std::path::Path;

use common::{Random, have_qemu, must, pattern, run};
use instar_blockio::file::HostFile;
use instar_blockio::{BlockRead, BlockWrite, FileId};
use instar_vhdx::{CreateOptions, Image, OpenOptions, Writer, check, create};

const MIB: u64 = 1 << 20;

fn make(path: &Path, options: &CreateOptions) -> Writer<HostFile> {
    create(HostFile::create(path).unwrap(), FileId(0), options).unwrap()
}

fn open(path: &Path) -> Image<HostFile> {
    Image::open(HostFile::open(path, false).unwrap(), FileId(0), &OpenOptions::default()).unwrap()
}

/// Without what is random: checksum, sequence number and GUIDs of both headers, the disk's identity.
fn masked(path: &Path, metadata: usize) -> Vec<u8> {
    let mut bytes = fs::read(path).unwrap();
    for range in [65540..65584, 131_076..131_120, metadata + 65552..metadata + 65568] {
        bytes[range].fill(0);
    }
    bytes
}

#[test]
fn new_images_are_laid_out_as_qemu_does() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let version = must(dir.path(), "qemu-img", &["--version"]);
    let number = version.split_whitespace().nth(2).unwrap();
    let base =
        CreateOptions { creator: format!("QEMU v{number}"), seed: *b"0123456789abcdef", ..CreateOptions::default() };
    let cases: [(&str, CreateOptions); 9] = [
        ("log_size=1M", CreateOptions { size: 10 * MIB, ..base.clone() }),
        ("log_size=3M", CreateOptions { size: 512, log_size: 3 * MIB, ..base.clone() }),
        ("block_size=1M", CreateOptions { size: 5000 * MIB + 1, block_size: MIB, ..base.clone() }),
        ("block_size=256M", CreateOptions { size: 1000 * MIB, block_size: 256 * MIB, ..base.clone() }),
        ("block_state_zero=off", CreateOptions { size: 101 << 30, block_state_zero: false, ..base.clone() }),
        ("subformat=fixed", CreateOptions { size: 10_000_000, fixed: true, ..base.clone() }),
        (
            "subformat=fixed,block_state_zero=off,block_size=2M",
            CreateOptions {
                size: 10_000_000,
                fixed: true,
                block_state_zero: false,
                block_size: 2 * MIB,
                ..base.clone()
            },
        ),
        ("log_size=1M", CreateOptions { size: 4 << 40, ..base.clone() }),
        ("log_size=1M", CreateOptions { size: 0, ..base.clone() }),
    ];
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    for (text, options) in cases {
        must(dir.path(), "qemu-img", &["create", "-q", "-f", "vhdx", "-o", text, "theirs", &options.size.to_string()]);
        make(&ours, &options).finish().unwrap();
        let file = fs::read(&theirs).unwrap();
        let metadata = u32::from_le_bytes(file[0x30040..0x30044].try_into().unwrap()) as usize;
        assert!(masked(&ours, metadata) == masked(&theirs, metadata), "{text}, {} bytes", options.size);
    }
}

#[test]
fn contents_survive_both_ways() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let sizes = [0, 512, 4096, 3 * MIB + 512, 20 * MIB, 33 * MIB + 1536];
    for (number, size) in sizes.into_iter().enumerate() {
        let mut random = Random(number as u64);
        let mut raw = vec![0; size as usize];
        let mut pieces = Vec::new();
        for _ in 0..if size > 0 { 6 } else { 0 } {
            let at = random.below(size);
            let len = (1 + random.below(MIB)).min(size - at);
            let bytes = pattern(at, len as usize);
            raw[at as usize..(at + len) as usize].copy_from_slice(&bytes);
            pieces.push((at, bytes));
        }
        fs::write(d.join("raw"), &raw).unwrap();
        for text in ["subformat=dynamic", "subformat=fixed", "block_size=1M,block_state_zero=off"] {
            must(d, "qemu-img", &["convert", "-f", "raw", "-O", "vhdx", "-o", text, "raw", "theirs.vhdx"]);
            let image = open(&d.join("theirs.vhdx"));
            let mut all = vec![1; image.size() as usize];
            image.read_at(0, &mut all).unwrap();
            assert!(all == raw, "{text} of {size} bytes");
            check(&image, &mut |finding| panic!("{text}: {finding}")).unwrap();
            let fixed = text.ends_with("fixed");
            let options = CreateOptions {
                size,
                fixed,
                block_size: if text.contains("1M") { MIB } else { 0 },
                block_state_zero: !text.ends_with("off"),
                seed: [number as u8; 16],
                ..CreateOptions::default()
            };
            let mut writer = make(&d.join("ours.vhdx"), &options);
            for (at, bytes) in &pieces {
                writer.write_at(*at, bytes).unwrap();
            }
            writer.finish().unwrap();
            same(d, "ours.vhdx", size);
            // And again, written into what qemu-img has made, and by qemu-img into what was made here.
            let theirs = HostFile::open(&d.join("theirs.vhdx"), true).unwrap();
            let mut writer = Writer::open(theirs, FileId(0), [5; 16]).unwrap();
            for (at, bytes) in &pieces {
                writer.write_at(*at, bytes).unwrap();
            }
            writer.finish().unwrap();
            same(d, "theirs.vhdx", size);
            if size > 0 {
                must(d, "qemu-img", &["convert", "-n", "-f", "raw", "-O", "vhdx", "raw", "ours.vhdx"]);
                same(d, "ours.vhdx", size);
                assert!(!open(&d.join("ours.vhdx")).is_dirty());
            }
        }
    }
}

/// qemu-img finds the image sound and of the contents of `raw`.
fn same(dir: &Path, name: &str, size: u64) {
    must(dir, "qemu-img", &["check", "-f", "vhdx", name]);
    if size > 0 {
        must(dir, "qemu-img", &["compare", "-f", "raw", "-F", "vhdx", "raw", name]);
    }
}

#[test]
fn large_disks() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for size in [(2 << 40) + 512, 64 << 40] {
        let mut writer = make(&d.join("a.vhdx"), &CreateOptions { size, ..CreateOptions::default() });
        writer.write_at(size - 512, &[0x5a; 512]).unwrap();
        writer.write_at(1 << 40, &[0xa5; 512]).unwrap();
        writer.finish().unwrap();
        must(d, "qemu-img", &["check", "a.vhdx"]);
        if run(d, "qemu-io", &["--version"]).status.success() {
            for (at, byte) in [(size - 512, "0x5a"), (1 << 40, "0xa5"), (size - 1024, "0")] {
                let read = format!("read -P {byte} {at} 512");
                let told = must(d, "qemu-io", &["-f", "vhdx", "-c", &read, "a.vhdx"]);
                assert!(told.contains("read 512/512") && !told.contains("failed"), "{told}");
            }
        }
        let image = open(&d.join("a.vhdx"));
        let mut last = [0; 512];
        image.read_at(size - 512, &mut last).unwrap();
        assert_eq!(last, [0x5a; 512]);
    }
}

/// Damage that both find, by the number of corruptions.
#[test]
fn checks_agree() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vhdx");
    let mut writer = make(&path, &CreateOptions { size: 40 * MIB, ..CreateOptions::default() });
    writer.write_at(0, &vec![1; 20 << 20]).unwrap();
    writer.finish().unwrap();
    let good = fs::read(&path).unwrap();
    // The place of the first block, and how many faults qemu-img counts.
    for entry in [0x80_0006_u64, 0x8000_0006, 0x20_0006, 6, 1 << 63 | 6, 0x1100_0006] {
        let mut bytes = good.clone();
        bytes[0x20_0000..0x20_0008].copy_from_slice(&entry.to_le_bytes());
        fs::write(&path, &bytes).unwrap();
        let told = run(dir.path(), "qemu-img", &["check", "--output=json", "a.vhdx"]);
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        let number = told.split("\"corruptions\": ").nth(1).and_then(|rest| rest.split([',', '\n']).next());
        let expected: u64 = number.map_or(0, |number| number.parse().unwrap());
        let options = OpenOptions { check_bat: false, ..OpenOptions::default() };
        let image = Image::open(HostFile::open(&path, false).unwrap(), FileId(0), &options).unwrap();
        assert_eq!(check(&image, &mut |_| ()).unwrap().corruptions, expected, "{entry:#x}: {told}");
        let opened = Image::open(HostFile::open(&path, false).unwrap(), FileId(0), &OpenOptions::default());
        assert_eq!(opened.is_ok(), expected == 0);
    }
}
