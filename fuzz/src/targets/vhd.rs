//! VHD images: opened, walked, read, checked, repaired and written.
//!
//! The first byte says whether checksums are made right; the file follows.

use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, FileId, MemBlock};
use instar_vhd::{CreateOptions, Image, OpenOptions, SizeRule, Writer, check, create, repair};

use crate::Disk;

/// The file may grow to this.
const SPACE: u64 = 8 << 20;
/// Extents looked at in one walk.
const EXTENTS: usize = 100;
/// The footer in front and the dynamic header behind it: place, length, and where the checksum is.
const SUMMED: [(usize, usize, usize); 2] = [(0, 512, 64), (512, 1024, 36)];

/// Bytes of both.
const HEAD: usize = 1536;

/// The bytes are those of an image file, behind the first.
pub fn run(data: &[u8]) {
    let Some((seal, bytes)) = data.split_first() else { return };
    let mut head = bytes[..bytes.len().min(HEAD)].to_vec();
    if seal % 2 == 1 {
        SUMMED.iter().for_each(|(at, len, field)| sum(head.get_mut(*at..*at + *len), *field));
    }
    let parts = vec![(0, &head[..]), (head.len() as u64, &bytes[head.len()..])];
    let file = Disk::of_parts(parts, bytes.len() as u64).with_room(SPACE);
    for (check_table, size_rule) in [(true, SizeRule::ByCreator), (false, SizeRule::Geometry)] {
        let options = OpenOptions { check_table, size_rule, ..OpenOptions::default() };
        if let Ok(image) = Image::open(&file, FileId(7), &options) {
            walk(&image);
            let mut told = 0;
            if let Ok(report) = check(&image, &mut |finding| told += u64::from(!finding.to_string().is_empty())) {
                assert_eq!(told, report.corruptions + report.damages);
            }
        }
    }
    let mut repaired = file.clone();
    if repair(&mut repaired) == Ok(true) {
        assert_eq!(repair(&mut repaired), Ok(false), "one repair is enough");
    }
    if let Ok(writer) = Writer::open(file, FileId(7), SizeRule::ByCreator) {
        write(writer);
    }
}

fn sum(bytes: Option<&mut [u8]>, field: usize) {
    let Some(bytes) = bytes else { return };
    bytes[field..field + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
}

fn walk(image: &Image<&Disk>) {
    let size = image.size();
    let _ = (image.parent_names(), image.is_parent([0; 16]));
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

fn write(mut writer: Writer<Disk>) {
    let size = writer.size();
    for offset in [0, 511, size / 2, size.saturating_sub(600)] {
        let len = (size - offset.min(size)).min(600) as usize;
        let mut back = [0; 600];
        // A hostile table may put a block over the table itself, so what comes back may be something else.
        let _ = writer.write_at(offset, &[0xa5; 600][..len]);
        let _ = writer.read_at(offset, &mut back[..len]);
        let _ = writer.discard(offset, len as u64 / 2);
    }
    let _ = writer.finish();
}

/// Images of each kind; the last has a parent.
pub fn seeds() -> Vec<Vec<u8>> {
    let options = |size| CreateOptions { size, force_size: true, timestamp: 1, uuid: *b"0123456789abcdef" };
    let made = |size, at| {
        let mut writer = create(MemBlock::default(), FileId(0), &options(size)).expect("good options");
        writer.write_at(at, &[0x5a; 600]).expect("room");
        writer.finish().expect("a good image").into_bytes()
    };
    let mut child = made(3 << 20, 1 << 20);
    let len = child.len();
    child[63] = 4;
    child[len - 512 + 63] = 4;
    let images = [made(3 << 20, 1 << 20), made(64 << 20, 63 << 20), child];
    // The data of a block is of no interest: what counts is in front of it and behind it.
    let short_of =
        |image: Vec<u8>, seal| [&[seal], &image[..4096.min(image.len())], &image[image.len() - 1024..]].concat();
    let short = images.into_iter().map(|image| short_of(image, 1));
    // Another has its own checksums.
    short.chain([short_of(made(1 << 20, 4096), 0)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_images() {
        for seed in seeds() {
            let options = OpenOptions { check_table: false, ..OpenOptions::default() };
            let file = MemBlock::from(seed[1..].to_vec());
            assert!(Image::open(&file, FileId(0), &options).is_ok() || seed[0] == 1);
            run(&seed);
        }
    }
}
