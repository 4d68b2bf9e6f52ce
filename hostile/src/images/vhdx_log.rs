//! VHDX: logs.

use super::vhdx::{BAT, BLOCK, HEADER, LOG, MIB, base, sealed};
use crate::bytes::{Image, crc32c};
use crate::case::{Case, Due, Group};
use Due::{Anything, Contents};

const SECTOR: usize = 4096;

/// One log entry.
#[derive(Clone)]
struct Entry {
    sequence: u64,
    tail: u32,
    len: u32,
    count: u32,
    flushed: u64,
    last: u64,
    descriptors: Vec<[u8; 32]>,
}

fn data(offset: u64, sequence: u64) -> [u8; 32] {
    let image = Image::new().put(0, b"desc").le64(16, offset).le64(24, sequence);
    let mut out = [0; 32];
    out.copy_from_slice(&image.bytes());
    out
}

fn zero(len: u64, offset: u64, sequence: u64) -> [u8; 32] {
    let image = Image::new().put(0, b"zero").le64(8, len).le64(16, offset).le64(24, sequence);
    let mut out = [0; 32];
    out.copy_from_slice(&image.bytes());
    out
}

fn entry(sequence: u64) -> Entry {
    let descriptors = vec![data(BAT as u64, sequence)];
    Entry { sequence, tail: 0, len: 2 * SECTOR as u32, count: 1, flushed: 5 << 20, last: 5 << 20, descriptors }
}

/// Puts an entry into the log, with its data sectors full of zeroes and its sum.
fn put(image: Image, at: usize, entry: &Entry) -> Image {
    let start = LOG + at;
    let mut one = Image::new().put(0, b"loge").le32(8, entry.len).le32(12, entry.tail).le64(16, entry.sequence);
    one = one.le32(24, entry.count).put(32, &[9; 16]).le64(48, entry.flushed).le64(56, entry.last);
    for (n, descriptor) in entry.descriptors.iter().enumerate() {
        one = one.put(64 + 32 * n, descriptor);
    }
    let len = (entry.len as usize).clamp(SECTOR, MIB - at);
    for sector in (SECTOR..len).step_by(SECTOR) {
        one = one.put(sector, b"data").le32(sector + 4, (entry.sequence >> 32) as u32);
        one = one.le32(sector + SECTOR - 4, entry.sequence as u32);
    }
    let one = one.with_len(len as u64).put(len - 1, &[0]);
    let one = if len > SECTOR { one.le32(len - 4, entry.sequence as u32) } else { one };
    let sum = crc32c(&one.bytes());
    image.put(start, &one.le32(4, sum).bytes())
}

/// An image whose header says that there is a log.
fn logged(entries: &[(usize, Entry)]) -> Image {
    let image = [64 << 10, HEADER].into_iter().fold(base(), |image, at| image.put(at + 48, &[9; 16]));
    sealed(entries.iter().fold(image, |image, (at, entry)| put(image, *at, entry)))
}

/// Adds the cases. qemu-img refuses to read an image with a log, and runs in circles on some.
pub fn add(cases: &mut Vec<Case>) {
    let mut group = Group::new(cases, "vhdx", "image.vhdx");
    let mut add = |name: &str, image: Image, due| {
        group.add(format!("log/{name}"), image, due).without_qemu();
    };
    let one = |change: &dyn Fn(&mut Entry)| {
        let mut entry = entry(7);
        change(&mut entry);
        logged(&[(0, entry)])
    };
    add("legal", one(&|_| {}), Contents);
    add("empty", logged(&[]), Anything);
    add("length-0", one(&|e| e.len = 0), Anything);
    add("length-odd", one(&|e| e.len = 5000), Anything);
    add("length-max", one(&|e| e.len = u32::MAX), Anything);
    add("length-of-the-log", one(&|e| e.len = MIB as u32), Anything);
    add("tail-far", one(&|e| e.tail = u32::MAX), Anything);
    add("tail-odd", one(&|e| e.tail = 100), Anything);
    add("tail-elsewhere", one(&|e| e.tail = 8192), Anything);
    add("count-max", one(&|e| e.count = u32::MAX), Anything);
    add("count-too-high", one(&|e| e.count = 200), Anything);
    add("count-0", one(&|e| e.count = 0), Anything);
    add("flushed-far", one(&|e| e.flushed = 1 << 62), Anything);
    add("last-far", one(&|e| e.last = u64::MAX), Anything);
    add("sequence-0", logged(&[(0, entry(0))]), Anything);
    add("sequence-max", logged(&[(0, entry(u64::MAX))]), Anything);
    add("descriptor-sequence", one(&|e| e.descriptors = vec![data(BAT as u64, 8)]), Anything);
    add("data-over-the-header", one(&|e| e.descriptors = vec![data(HEADER as u64, 7)]), Anything);
    add("data-over-the-log", one(&|e| e.descriptors = vec![data(LOG as u64, 7)]), Anything);
    add("data-over-the-payload", one(&|e| e.descriptors = vec![data(BLOCK as u64, 7)]), Anything);
    add("data-unaligned", one(&|e| e.descriptors = vec![data(BAT as u64 + 1, 7)]), Anything);
    add("data-far", one(&|e| e.descriptors = vec![data(!4095, 7)]), Anything);
    add("zero-of-2-to-the-63", one(&|e| (e.descriptors, e.len) = (vec![zero(1 << 63, BAT as u64, 7)], 4096)), Anything);
    add("zero-wraps", one(&|e| (e.descriptors, e.len) = (vec![zero(!4095, BAT as u64, 7)], 4096)), Anything);
    add("zero-unaligned", one(&|e| (e.descriptors, e.len) = (vec![zero(100, BAT as u64, 7)], 4096)), Anything);
    let many = |e: &mut Entry| {
        e.descriptors = (0..126).map(|_| zero(1 << 62, 0, 7)).collect();
        (e.count, e.len) = (126, 4096);
    };
    add("many-huge-zeroes", one(&many), Anything);
    // Each entry is the tail of the next, all around the log.
    let circle = |step: usize| {
        let count = MIB / step;
        let entries: Vec<(usize, Entry)> = (0..count)
            .map(|n| {
                let next = ((n + 1) % count * step) as u32;
                (n * step, Entry { tail: next, ..entry(7 + n as u64) })
            })
            .collect();
        logged(&entries)
    };
    add("circle", circle(8192), Anything);
    let same: Vec<(usize, Entry)> = (0..128).map(|n| (n * 8192, Entry { tail: 0, ..entry(7) })).collect();
    add("all-of-one-sequence", logged(&same), Anything);
    let falling: Vec<(usize, Entry)> =
        (0..128).map(|n| (n * 8192, Entry { tail: (n * 8192) as u32, ..entry(500 - n as u64) })).collect();
    add("each-its-own-sequence", logged(&falling), Anything);
    let around = Entry { tail: (MIB - 8192) as u32, ..entry(8) };
    add(
        "wraps-around",
        logged(&[(MIB - 8192, Entry { tail: (MIB - 8192) as u32, ..entry(7) }), (0, around)]),
        Contents,
    );
}
