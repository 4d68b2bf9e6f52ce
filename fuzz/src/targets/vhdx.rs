//! VHDX images: opened, walked, read, checked, replayed and written.
//!
//! A VHDX file has megabytes of nothing between its tables. So the bytes are a short form: a first byte that says whether checksums are
//! made right and what is done with the file, then the parts of it that mean something, one behind the other.

use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, FileId, MemBlock};
use instar_vhdx::{CreateOptions, Image, OpenOptions, Writer, check, crc32c, create, replay_log};

use crate::Disk;

/// Places and lengths of the parts: signature, headers, region table, log, BAT, metadata table, items.
const PARTS: [(usize, usize); 8] = [
    (0, 16),
    (0x10000, 128),
    (0x20000, 128),
    (0x30000, 256),
    (0x10_0000, 8192),
    (0x20_0000, 512),
    (0x30_0000, 512),
    (0x31_0000, 512),
];
/// Places and lengths of what has a checksum, at its bytes 4 to 8.
const SEALED: [(usize, usize); 4] = [(0x10000, 4096), (0x20000, 4096), (0x30000, 65536), (0x10_0000, 8192)];
/// Bytes of the file.
const FILE: u64 = 11 << 20;
/// The file may grow to this.
const SPACE: u64 = 24 << 20;
/// Extents looked at in one walk.
const EXTENTS: usize = 100;

/// The bytes are the short form of an image file.
pub fn run(data: &[u8]) {
    let parts = expand(data);
    let mut file = file(&parts);
    match data.first().map_or(0, |first| first / 2 % 4) {
        0 => {
            if let Ok(image) = Image::open(&file, FileId(7), &OpenOptions::default()) {
                walk(&image);
            }
        }
        1 => look(&file),
        2 => {
            let _ = replay_log(&mut file);
        }
        _ => {
            if let Ok(writer) = Writer::open(file, FileId(7), [3; 16]) {
                write(writer);
            }
        }
    }
}

fn look(file: &Disk) {
    let options = OpenOptions { check_bat: false, ..OpenOptions::default() };
    if let Ok(image) = Image::open(file, FileId(7), &options) {
        walk(&image);
        if image.geometry().blocks() < 1 << 16 {
            let report = check(&image, &mut |finding| assert!(!finding.to_string().is_empty()));
            assert!(report.is_ok(), "memory does not fail: {report:?}");
        }
    }
}

fn walk(image: &Image<&Disk>) {
    let size = image.size();
    let _ = image.parent().map(|parent| (parent.names(), parent.is_parent(image.disk_id())));
    for start in [0, size / 3, size.saturating_sub(1000)] {
        let mut at = start;
        for extent in image.extents(start..size).take(EXTENTS) {
            let Ok(extent) = extent else { break };
            assert!(extent.offset == at && extent.len > 0 && extent.end() <= size, "{extent:?} at {at}");
            at = extent.end();
            let mut buf = vec![0; extent.len.min(4096) as usize];
            let _ = image.read_at(extent.offset, &mut buf);
        }
    }
    assert!(image.read_at(size, &mut [0]).is_err());
}

/// What was written and not refused reads back.
fn write(mut writer: Writer<Disk>) {
    let size = writer.size();
    for offset in [0, 511, size / 2, size.saturating_sub(600)] {
        let len = (size - offset.min(size)).min(600) as usize;
        let mut back = [0; 600];
        if writer.write_at(offset, &[0xa5; 600][..len]).is_ok() && writer.read_at(offset, &mut back[..len]).is_ok() {
            assert_eq!(back[..len], [0xa5; 600][..len]);
        }
        let _ = writer.discard(offset, len as u64 / 2);
    }
    let _ = writer.finish();
}

/// The file that a short form stands for.
fn expand(data: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let (seal, mut rest) = data.split_first().map_or((0, data), |(first, rest)| (*first, rest));
    let part = |(at, len): (usize, usize)| {
        let (part, later) = rest.split_at(len.min(rest.len()));
        rest = later;
        let mut part = part.to_vec();
        // The checksum covers more than the part that means something.
        if let Some((_, sealed)) = SEALED.iter().find(|(sealed, _)| *sealed == at && seal % 2 == 1) {
            part.resize(*sealed, 0);
            part[4..8].fill(0);
            let sum = crc32c(0, &part);
            part[4..8].copy_from_slice(&sum.to_le_bytes());
        }
        (at as u64, part)
    };
    PARTS.into_iter().map(part).collect()
}

fn file(parts: &[(u64, Vec<u8>)]) -> Disk<'_> {
    Disk::of_parts(parts.iter().map(|(at, part)| (*at, &part[..])).collect(), FILE).with_room(SPACE)
}

/// Images of each kind, one with a log that was not carried out; each for everything that is done with one.
pub fn seeds() -> Vec<Vec<u8>> {
    let with = |(image, action): (&Vec<u8>, u8)| [&[action * 2 + 1], &image[1..]].concat();
    images().iter().flat_map(|image| (0..4).map(move |action| (image, action))).map(with).collect()
}

fn images() -> Vec<Vec<u8>> {
    let base = CreateOptions { size: 9 << 20, block_size: 1 << 20, ..CreateOptions::default() };
    let kinds = [
        base.clone(),
        CreateOptions { sector_size: 4096, block_state_zero: false, ..base.clone() },
        CreateOptions { size: 2 << 20, fixed: true, ..base },
    ];
    let mut seeds: Vec<Vec<u8>> = kinds.iter().map(|options| shorten(image(options).as_bytes())).collect();
    let mut dirty = image(&kinds[0]);
    let mut writer = Writer::open(&mut dirty, FileId(0), [1; 16]).expect("a good image");
    writer.write_at(5 << 20, &[0x5a; 600]).expect("room");
    writer.finish().expect("a good image");
    let mut bytes = dirty.into_bytes();
    let guid: [u8; 16] = bytes[0x10_0020..0x10_0030].try_into().expect("16 bytes");
    for header in [0x10000, 0x20000] {
        bytes[header + 48..header + 64].copy_from_slice(&guid);
    }
    seeds.push(shorten(&bytes));
    seeds
}

fn image(options: &CreateOptions) -> MemBlock {
    let mut file = MemBlock::default();
    let mut writer = create(&mut file, FileId(0), options).expect("good options");
    writer.write_at(1 << 20, &[0x5a; 600]).expect("room");
    writer.finish().expect("a good image");
    file
}

fn shorten(file: &[u8]) -> Vec<u8> {
    let mut data = vec![1];
    for (at, len) in PARTS {
        data.extend(&file[at..at + len]);
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_what_they_claim() {
        let parts: Vec<_> = images().iter().map(|seed| expand(seed)).collect();
        let files: Vec<_> = parts.iter().map(|parts| file(parts)).collect();
        let images: Vec<_> =
            files.iter().map(|file| Image::open(file, FileId(0), &OpenOptions::default()).unwrap()).collect();
        let told: Vec<_> = images.iter().map(|image| (image.size(), image.is_fixed(), image.is_dirty())).collect();
        let expected =
            [(9 << 20, false, false), (9 << 20, false, false), (2 << 20, true, false), (9 << 20, false, true)];
        assert_eq!(told, expected);
        seeds().iter().for_each(|seed| run(seed));
    }
}
