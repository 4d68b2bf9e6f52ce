//! Random operations on an image against a disk in memory.

mod common;

use common::{Random, pattern};
use instar_blockio::{
    BlockAlloc, BlockMap, BlockMapExt, BlockRead, BlockWrite, ExtentKind, FileId, MemBlock, ZeroMode,
};
use instar_vhdx::{CreateOptions, Image, OpenOptions, Writer, check, create};

const MIB: u64 = 1 << 20;

/// One operation; the model follows.
fn step(writer: &mut Writer<&mut MemBlock>, model: &mut [u8], random: &mut Random) {
    let size = model.len() as u64;
    let offset = random.below(size);
    let len = (1 + random.below(random.0 % 3 * MIB + 5000)).min(size - offset);
    let range = offset as usize..(offset + len) as usize;
    match random.below(6) {
        0 => {
            writer.write_zeroes(offset, len, random.pick(&[ZeroMode::Unmap, ZeroMode::KeepAllocated])).unwrap();
            model[range].fill(0);
        }
        1 => {
            writer.discard(offset, len).unwrap();
            model[range].fill(0);
        }
        2 => {
            // A reservation that is given back changes nothing.
            let reservation = writer.reserve(offset, len).unwrap();
            writer.abort(reservation).unwrap();
        }
        3 => writer.flush().unwrap(),
        _ => {
            let bytes = pattern(random.next() % 100, len as usize);
            writer.write_at(offset, &bytes).unwrap();
            model[range].copy_from_slice(&bytes);
        }
    }
}

fn compare(disk: &dyn BlockRead, model: &[u8]) {
    let mut all = vec![0xee; model.len()];
    disk.read_at(0, &mut all).unwrap();
    if let Some(at) = all.iter().zip(model).position(|(a, b)| a != b) {
        panic!("byte {at}: {} instead of {}", all[at], model[at]);
    }
}

/// What the map says, byte by byte, against the contents.
fn compare_map(image: &Image<&MemBlock>, file: &MemBlock, model: &[u8]) {
    let mut at = 0;
    for extent in image.extents(0..image.size()) {
        let extent = extent.unwrap();
        assert_eq!(extent.offset, at);
        let part = &model[at as usize..extent.end() as usize];
        match extent.kind {
            ExtentKind::Data { file: id, host } => {
                assert_eq!(id, FileId(3));
                for (index, byte) in part.iter().enumerate() {
                    assert_eq!(file.as_bytes().get(host as usize + index).copied().unwrap_or(0), *byte);
                }
            }
            _ => assert!(part.iter().all(|&byte| byte == 0)),
        }
        at = extent.end();
    }
    assert_eq!(at, image.size());
}

fn sound(file: &MemBlock) -> Image<&MemBlock> {
    let image = Image::open(file, FileId(3), &OpenOptions::default()).unwrap();
    let mut findings = Vec::new();
    check(&image, &mut |finding| findings.push(finding)).unwrap();
    assert_eq!(findings, []);
    image
}

#[test]
fn random_operations() {
    for seed in 0..12 {
        let mut random = Random(seed);
        let sector_size = random.pick(&[512, 4096]);
        let options = CreateOptions {
            size: random.below(20) * MIB + u64::from(sector_size) * (1 + random.below(99)),
            block_size: MIB << random.below(4),
            fixed: seed % 3 == 1,
            block_state_zero: seed % 2 == 0,
            sector_size,
            seed: [seed as u8; 16],
            ..CreateOptions::default()
        };
        let mut model = vec![0; options.size as usize];
        let mut file = MemBlock::default();
        let mut writer = create(&mut file, FileId(3), &options).unwrap();
        for _ in 0..12 {
            step(&mut writer, &mut model, &mut random);
        }
        compare(&writer, &model);
        writer.finish().unwrap();
        compare(&sound(&file), &model);
        // And again, changing the image that is there now.
        let before = *sound(&file).header();
        let mut writer = Writer::open(&mut file, FileId(3), [7; 16]).unwrap();
        for _ in 0..12 {
            step(&mut writer, &mut model, &mut random);
        }
        compare(&writer, &model);
        writer.write_at(0, b"!").unwrap();
        model[0] = b'!';
        writer.finish().unwrap();
        let image = sound(&file);
        compare(&image, &model);
        compare_map(&image, &file, &model);
        assert_ne!(image.header().data_write_guid, before.data_write_guid);
        assert!(!image.is_dirty());
    }
}

#[test]
fn two_reservations_in_one_block() {
    let mut file = MemBlock::default();
    let options = CreateOptions { size: 4 * MIB, block_size: 2 * MIB, ..CreateOptions::default() };
    let mut writer = create(&mut file, FileId(0), &options).unwrap();
    let first = writer.reserve(100, 50).unwrap();
    let second = writer.reserve(1000, 3 * MIB).unwrap();
    // One place for the block of both, and the next block right behind it.
    assert_eq!((second.host - first.host, second.len), (900, 3 * MIB));
    assert_eq!(writer.extent_at(100, 1).unwrap().kind, ExtentKind::Zero { host: None });
    writer.abort(first).unwrap();
    writer.commit(second).unwrap();
    assert!(matches!(writer.extent_at(100, 1).unwrap().kind, ExtentKind::Data { host, .. } if host == first.host));
    assert!(writer.reserve(0, 0).is_err() && writer.reserve(4 * MIB - 1, 2).is_err());
}

#[test]
fn sizes_at_the_ends() {
    for size in [0, 512, 513, (2 << 40) + 512, 64 << 40] {
        let mut file = MemBlock::default();
        let options = CreateOptions { size, ..CreateOptions::default() };
        let mut writer = create(&mut file, FileId(0), &options).unwrap();
        let size = size.next_multiple_of(512);
        if size > 0 {
            writer.write_at(size - 3, b"end").unwrap();
        }
        writer.finish().unwrap();
        let image = Image::open(&file, FileId(0), &OpenOptions::default()).unwrap();
        assert_eq!(image.size(), size);
        let data: u64 = image
            .extents(0..size)
            .map(|extent| extent.unwrap())
            .filter(|extent| matches!(extent.kind, ExtentKind::Data { .. }))
            .map(|extent| extent.len)
            .sum();
        assert!(data <= image.block_size() && (data > 0) == (size > 0));
        if size > 0 {
            let mut end = [0; 3];
            image.read_at(size - 3, &mut end).unwrap();
            assert_eq!(&end, b"end");
        }
        assert!(image.extent_at(size, 1).is_err() && image.read_at(size, &mut [0]).is_err());
        image.read_at(size, &mut []).unwrap();
    }
}
