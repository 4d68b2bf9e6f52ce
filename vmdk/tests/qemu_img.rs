//! Both ways against the installed qemu-img: images that it makes are read, images made here are read and checked by it, and new
//! images are the same byte for byte.

use std::fs::{File, OpenOptions as FileOptions};
use std::path::Path;
use std::process::{Command, Stdio};

use instar_blockio::file::HostFile;
use instar_blockio::{BlockRead, BlockWrite, FileId};
use instar_vmdk::{CreateOptions, Image, OpenOptions, Subformat, create};

fn qemu_is_missing() -> bool {
    let missing = Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_err();
    if missing {
        eprintln!("SKIPPED: qemu-img is not installed, so there is nothing to compare with");
    }
    missing
}

fn qemu_img(dir: &Path, args: &[&str]) {
    let output = Command::new("qemu-img").current_dir(dir).args(args).output().unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Text, noise, zeroes and holes.
fn disk(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut disk = vec![0; len];
    let mut at = 0;
    while at < len {
        let run = (1 + next() as usize % (1 << (9 + next() % 10))).min(len - at);
        match next() % 4 {
            0 => disk[at..at + run].iter_mut().for_each(|byte| *byte = next() as u8),
            1 => disk[at..at + run].fill(next() as u8),
            _ => {}
        }
        at += run;
    }
    disk
}

fn open(dir: &Path, name: &str) -> Image<HostFile> {
    let file = |name: &str| HostFile::from_fd(File::open(dir.join(name)).unwrap().into(), false).unwrap();
    let mut image = Image::open(file(name), FileId(0), &OpenOptions { strict: true }).unwrap();
    let mut id = 1;
    while let Some((number, line)) = image.wanted() {
        let name = String::from_utf8(line.name.clone()).unwrap();
        image.attach(number, file(&name), FileId(id)).unwrap();
        id += 1;
    }
    image
}

fn make(dir: &Path, options: &CreateOptions, content: &[(u64, &[u8])]) {
    let file = |name: &[u8]| {
        let path = dir.join(std::str::from_utf8(name).unwrap());
        let file = FileOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        HostFile::from_fd(file.into(), true).unwrap()
    };
    let count = if options.subformat.has_extent_files() { options.parts().unwrap().len() } else { 0 };
    let extents = (0..count)
        .map(|number| (file(&options.subformat.extent_name(&options.name, number)), FileId(1 + number as u32)));
    let mut writer = create(file(&options.name), FileId(0), extents.collect(), options.clone()).unwrap();
    for (at, bytes) in content {
        writer.write_at(*at, bytes).unwrap();
    }
    writer.finish().unwrap();
}

const SIZES: [usize; 5] = [512, 65536, 65536 * 3 + 512, (34 << 20) + 1024, 3 << 20];

#[test]
fn what_qemu_img_writes_is_read() {
    if qemu_is_missing() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    for (seed, size) in SIZES.into_iter().enumerate() {
        let content = disk(seed as u64 + 77, size);
        std::fs::write(dir.join("raw"), &content).unwrap();
        for subformat in Subformat::ALL {
            let option = format!("subformat={}", subformat.name());
            qemu_img(dir, &["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "raw", "a.vmdk"]);
            let image = open(dir, "a.vmdk");
            assert_eq!(image.size(), size as u64, "{option}");
            assert_eq!(image.descriptor().create_type, subformat.name().as_bytes());
            let mut found = vec![0xee; size];
            image.read_at(0, &mut found).unwrap();
            assert!(found == content, "{option} {size}");
        }
    }
}

#[test]
fn what_is_written_qemu_img_reads() {
    if qemu_is_missing() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    for (seed, size) in SIZES.into_iter().enumerate() {
        let content = disk(seed as u64 + 99, size);
        for subformat in Subformat::ALL {
            let options = CreateOptions {
                size: size as u64,
                subformat,
                name: b"b.vmdk".to_vec(),
                cid: 5,
                ..CreateOptions::default()
            };
            make(dir, &options, &[(0, &content)]);
            qemu_img(dir, &["convert", "-f", "vmdk", "-O", "raw", "b.vmdk", "back"]);
            assert!(std::fs::read(dir.join("back")).unwrap() == content, "{subformat:?} {size}");
            if !subformat.is_flat() {
                qemu_img(dir, &["check", "-f", "vmdk", "b.vmdk"]);
            }
            let mut found = vec![0xee; size];
            open(dir, "b.vmdk").read_at(0, &mut found).unwrap();
            assert!(found == content, "{subformat:?} {size}");
        }
    }
}

#[test]
fn empty_images_are_those_of_qemu_img() {
    if qemu_is_missing() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    for size in [0u64, 512, 10 << 20, 5 << 30, 40 << 30] {
        for subformat in Subformat::ALL {
            for zeroed_grain in [false, true] {
                if subformat.is_flat() && (zeroed_grain || size > 10 << 20) {
                    continue;
                }
                let option =
                    format!("subformat={},zeroed_grain={}", subformat.name(), if zeroed_grain { "on" } else { "off" });
                let length = size.to_string();
                qemu_img(dir, &["create", "-f", "vmdk", "-o", &option, "c.vmdk", &length]);
                let read = |name: &[u8]| std::fs::read(dir.join(std::str::from_utf8(name).unwrap())).unwrap();
                let mut options = CreateOptions {
                    size,
                    subformat,
                    name: b"c.vmdk".to_vec(),
                    zeroed_grain,
                    ..CreateOptions::default()
                };
                let main = read(b"c.vmdk");
                let at = main.windows(5).position(|window| window == b"\nCID=").unwrap() + 5;
                let end = main[at..].iter().position(|&byte| byte == b'\n').unwrap() + at;
                options.cid = u32::from_str_radix(std::str::from_utf8(&main[at..end]).unwrap(), 16).unwrap();
                let count = if subformat.has_extent_files() { options.parts().unwrap().len() } else { 0 };
                let names: Vec<Vec<u8>> = (0..count).map(|number| subformat.extent_name(b"c.vmdk", number)).collect();
                let theirs: Vec<Vec<u8>> = names.iter().map(|name| read(name)).collect();
                make(dir, &options, &[]);
                assert!(read(b"c.vmdk") == main, "{option} {size}");
                for (name, theirs) in names.iter().zip(&theirs) {
                    assert!(read(name) == *theirs, "{option} {size} {}", name.escape_ascii());
                }
            }
        }
    }
}

#[test]
fn large_disks() {
    if qemu_is_missing() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    for (size, subformat) in [
        ((2u64 << 40) + 512, Subformat::MonolithicSparse),
        (8 << 40, Subformat::StreamOptimized),
        (1 << 40, Subformat::TwoGbMaxExtentSparse),
    ] {
        let options = CreateOptions { size, subformat, name: b"d.vmdk".to_vec(), cid: 5, ..CreateOptions::default() };
        let grain = [0x5a; 65536];
        let last = (size - 1) / 65536 * 65536;
        make(dir, &options, &[(1 << 30, &grain), (last, &grain[..(size - last) as usize])]);
        let image = open(dir, "d.vmdk");
        let mut end = [0; 512];
        image.read_at(size - 512, &mut end).unwrap();
        assert_eq!((image.size(), end), (size, [0x5a; 512]));
        let place = (size - 512).to_string();
        let read = |at: &str| {
            let args = ["-r", "-f", "vmdk", "-c", at, "d.vmdk"];
            let output = Command::new("qemu-io").current_dir(dir).args(args).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        for command in [format!("read -P 0x5a {place} 512"), "read -P 0x5a 1G 64k".into(), "read -P 0 2G 64k".into()] {
            let said = read(&command);
            assert!(said.contains("1 ops") && !said.contains("failed"), "{command}: {said}");
        }
    }
}
