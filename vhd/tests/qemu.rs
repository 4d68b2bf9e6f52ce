//! Compared with the installed qemu-img: what it makes is read, and it reads what is made here.

use std::path::Path;
use std::process::Command;

use instar_blockio::file::HostFile;
use instar_blockio::{BlockRead, BlockWrite, FileId, MemBlock};
use instar_vhd::{CreateOptions, Image, OpenOptions, SizeRule, Writer, create, fixed};

fn qemu_img(args: &[&str]) -> bool {
    Command::new("qemu-img").args(args).output().is_ok_and(|output| output.status.success())
}

fn is_installed() -> bool {
    let found = qemu_img(&["--version"]);
    if !found {
        eprintln!("SKIPPED: qemu-img is not installed, so nothing was compared with it");
    }
    found
}

/// Bytes that look like nothing, with holes.
fn contents(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (number, piece) in bytes.chunks_mut(300_000).enumerate() {
        if number % 5 != 3 && number % 11 < 6 {
            piece.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at * 7 + at / 253 + number) as u8);
        }
    }
    bytes
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn read_all<D: BlockRead>(image: &Image<D>) -> Vec<u8> {
    let mut bytes = vec![0; image.size() as usize];
    image.read_at(0, &mut bytes).unwrap();
    bytes
}

const SIZES: [usize; 7] = [0, 512, 1000, 34_816, (2 << 20) + 512, 5_000_000, 17 << 20];

#[test]
fn reads_what_qemu_img_writes() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, made) = (dir.path().join("raw"), dir.path().join("vhd"));
    for size in SIZES {
        let bytes = contents(size);
        std::fs::write(&raw, &bytes).unwrap();
        for options in ["subformat=dynamic", "subformat=fixed", "force_size=on", "subformat=fixed,force_size=on"] {
            if size == 0 && options.contains("fixed") {
                // qemu-img can't open what it has just made.
                continue;
            }
            assert!(qemu_img(&["convert", "-f", "raw", "-O", "vpc", "-o", options, path(&raw), path(&made)]));
            let file = MemBlock::from(std::fs::read(&made).unwrap());
            let image = Image::open(file, FileId(0), &OpenOptions::default()).unwrap();
            let found = read_all(&image);
            assert!(found.len() >= size && found[..size] == bytes, "{size} {options}");
            assert!(found[size..].iter().all(|byte| *byte == 0));
            if options.contains("force") {
                assert_eq!(found.len(), size.next_multiple_of(512));
            }
        }
    }
}

#[test]
fn qemu_img_reads_what_is_written() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, made) = (dir.path().join("raw"), dir.path().join("vhd"));
    for size in SIZES {
        let bytes = contents(size);
        for (force_size, in_one_piece) in [(false, false), (true, false), (false, true), (true, true)] {
            let options = CreateOptions { size: size as u64, force_size, timestamp: 9, uuid: [3; 16] };
            let image = match in_one_piece {
                true => {
                    let (disk, footer) = fixed(&options).unwrap();
                    let mut image = bytes.clone();
                    image.resize(disk as usize, 0);
                    image.extend(footer);
                    image
                }
                false => {
                    let mut writer = create(MemBlock::default(), FileId(0), &options).unwrap();
                    for (number, piece) in bytes.chunks(70_000).enumerate() {
                        if piece.iter().any(|byte| *byte != 0) {
                            writer.write_at(number as u64 * 70_000, piece).unwrap();
                        }
                    }
                    writer.finish().unwrap().into_bytes()
                }
            };
            std::fs::write(&made, &image).unwrap();
            let read = qemu_img(&["convert", "-f", "vpc", "-O", "raw", path(&made), path(&raw)]);
            // qemu-img can't read its own fixed images of size 0 either: it takes their footer for a dynamic disk's.
            assert_eq!(read, size > 0 || !in_one_piece, "{size} {options:?}");
            if read {
                let found = std::fs::read(&raw).unwrap();
                assert!(found.len() >= size && found[..size] == bytes && found[size..].iter().all(|byte| *byte == 0));
            }
        }
    }
}

#[test]
fn layout_is_that_of_qemu_img() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, made) = (dir.path().join("raw"), dir.path().join("vhd"));
    let bytes = contents(9 << 20);
    std::fs::write(&raw, &bytes).unwrap();
    assert!(qemu_img(&["convert", "-f", "raw", "-O", "vpc", path(&raw), path(&made)]));
    let theirs = std::fs::read(&made).unwrap();
    let footer = *Image::open(MemBlock::from(theirs.clone()), FileId(0), &OpenOptions::default()).unwrap().footer();
    let options =
        CreateOptions { size: 9 << 20, timestamp: footer.timestamp, uuid: footer.uuid, ..CreateOptions::default() };
    let mut writer = create(MemBlock::default(), FileId(0), &options).unwrap();
    for (number, piece) in bytes.chunks(2 << 20).enumerate() {
        writer.write_at(number as u64 * (2 << 20), piece).unwrap();
    }
    assert!(writer.finish().unwrap().into_bytes() == theirs);
}

#[test]
fn sizes_are_those_of_qemu_img_up_to_the_largest() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (theirs, ours) = (dir.path().join("theirs"), dir.path().join("ours"));
    for size in [1u64 << 40, (127 << 30) + 512, 2 << 40, 2040 << 30, (2040 << 30) + 512] {
        let asked = size.to_string();
        for force_size in [false, true] {
            let option = if force_size { "force_size=on" } else { "force_size=off" };
            let made = qemu_img(&["create", "-f", "vpc", "-o", option, path(&theirs), &asked]);
            let file = HostFile::create(&ours).unwrap();
            let writer = create(file, FileId(0), &CreateOptions { size, force_size, ..CreateOptions::default() });
            assert_eq!(writer.is_ok(), made, "{size}");
            let Ok(writer) = writer else { continue };
            writer.finish().unwrap();
            let read = |path: &Path| {
                let file = MemBlock::from(std::fs::read(path).unwrap());
                let image = Image::open(file, FileId(0), &OpenOptions::default()).unwrap();
                (image.virtual_size(), *image.header().map(|header| &header.entries).unwrap())
            };
            assert_eq!(read(&theirs), read(&ours), "{size}");
        }
    }
}

#[test]
fn existing_images_are_changed_and_stay_readable() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, made) = (dir.path().join("raw"), dir.path().join("vhd"));
    let mut bytes = contents(9 << 20);
    std::fs::write(&raw, &bytes).unwrap();
    assert!(qemu_img(&["convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", path(&raw), path(&made)]));
    let file = MemBlock::from(std::fs::read(&made).unwrap());
    let mut writer = Writer::open(file, FileId(0), SizeRule::ByCreator).unwrap();
    for at in [0usize, 1_000_000, 3 << 20, (9 << 20) - 700] {
        writer.write_at(at as u64, &[0x5a; 700]).unwrap();
        bytes[at..at + 700].fill(0x5a);
    }
    std::fs::write(&made, writer.finish().unwrap().as_bytes()).unwrap();
    assert!(qemu_img(&["convert", "-f", "vpc", "-O", "raw", path(&made), path(&raw)]));
    assert!(std::fs::read(&raw).unwrap() == bytes);
}
