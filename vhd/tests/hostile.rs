//! Damaged and differencing images, made here.

use instar_blockio::{BlockMap, BlockMapExt, BlockRead, BlockWrite, ExtentKind, FileId, MemBlock};
use instar_vhd::{CreateOptions, Error, Finding, Image, OpenOptions, SizeRule, Writer, check, create, repair};
use proptest::prelude::*;

const AT_SUM: usize = 64;

fn image(size: u64, pieces: &[(u64, &[u8])]) -> Vec<u8> {
    let options = CreateOptions { size, force_size: true, timestamp: 1, uuid: *b"0123456789abcdef" };
    let mut writer = create(MemBlock::default(), FileId(0), &options).unwrap();
    pieces.iter().for_each(|(at, bytes)| writer.write_at(*at, bytes).unwrap());
    writer.finish().unwrap().into_bytes()
}

fn open(bytes: &[u8]) -> Result<Image<MemBlock>, Error> {
    Image::open(MemBlock::from(bytes.to_vec()), FileId(0), &OpenOptions::default())
}

/// Puts the checksum right again.
fn sum(bytes: &mut [u8], field: usize) {
    bytes[field..field + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// A child of 4 MiB: of its first block the sectors 1 and 9 are its own.
fn differencing() -> Vec<u8> {
    let mut bytes = image(4 << 20, &[(0, &[7; 8192])]);
    let len = bytes.len();
    for footer in [0, len - 512] {
        bytes[footer + 63] = 4;
        sum(&mut bytes[footer..footer + 512], AT_SUM);
    }
    bytes[512 + 40..512 + 56].copy_from_slice(b"parent's uuid 16");
    let name: Vec<u8> = "C:\\x\\up.vhd".encode_utf16().flat_map(u16::to_be_bytes).collect();
    bytes[512 + 64..512 + 64 + name.len()].copy_from_slice(&name);
    let locator: Vec<u8> = ".\\sub\\base.vhd".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let at = 512 + 576;
    bytes[at..at + 4].copy_from_slice(b"W2ru");
    bytes[at + 8..at + 12].copy_from_slice(&(locator.len() as u32).to_be_bytes());
    bytes[at + 16..at + 24].copy_from_slice(&(len as u64).to_be_bytes());
    sum(&mut bytes[512..1536], 36);
    bytes[2048..2560].fill(0);
    bytes[2048] = 0b0100_0000;
    bytes[2049] = 0b0100_0000;
    let footer = bytes[len - 512..].to_vec();
    bytes.extend(locator);
    bytes.resize(len + 512, 0);
    bytes.extend(footer);
    bytes
}

#[test]
fn differencing_images_tell_whose_each_sector_is() {
    let image = open(&differencing()).unwrap();
    assert!(image.has_parent() && image.is_parent(*b"parent's uuid 16") && !image.is_parent([0; 16]));
    assert_eq!(image.parent_names(), ["sub/base.vhd", "base.vhd", "up.vhd"]);
    let runs: Vec<(u64, u64, bool)> = image
        .extents(0..image.size())
        .map(|extent| extent.unwrap())
        .map(|extent| (extent.offset, extent.len, matches!(extent.kind, ExtentKind::Data { .. })))
        .collect();
    let expected = [(0, 512, false), (512, 512, true), (1024, 3584, false), (4608, 512, true)];
    assert_eq!(runs[..4], expected);
    assert_eq!(runs[4..], [(5120, (4 << 20) - 5120, false)]);
    assert_eq!(image.extent_at(4700, 10).unwrap().kind, ExtentKind::Data { file: FileId(0), host: 2560 + 4700 });
    let refused = Writer::open(MemBlock::from(differencing()), FileId(0), SizeRule::ByCreator);
    assert_eq!(refused.unwrap_err(), Error::DifferencingWrite);
}

#[test]
fn either_footer_will_do() {
    let good = image(3 << 20, &[(0, b"boot")]);
    let len = good.len();
    for at in [0, 30] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        let found = open(&bytes).unwrap();
        assert!(found.is_copy_used());
        let mut seen = Vec::new();
        assert_eq!(check(&found, &mut |finding| seen.push(finding)).unwrap().damages, 1);
        assert_eq!(seen, [Finding::FrontFooter]);
        let mut file = MemBlock::from(bytes);
        assert_eq!((repair(&mut file), repair(&mut file)), (Ok(true), Ok(false)));
        assert!(file.as_bytes() == good);
    }
    let mut bytes = good.clone();
    bytes[len - 512 + 30] ^= 1;
    assert!(!open(&bytes).unwrap().is_copy_used());
    let mut file = MemBlock::from(bytes.clone());
    assert_eq!(repair(&mut file), Ok(true));
    assert!(file.as_bytes() == good);
    bytes[30] ^= 1;
    assert_eq!(open(&bytes).unwrap_err(), Error::Checksum);
    // Old Virtual PC wrote one byte less; a file cut in front of its last footer gets one.
    assert!(!open(&good[..len - 1]).unwrap().is_copy_used());
    let mut file = MemBlock::from(good[..len - 512].to_vec());
    assert_eq!(repair(&mut file), Ok(true));
    assert!(file.as_bytes() == good);
}

#[test]
fn blocks_in_impossible_places_are_found() {
    let good = image(6 << 20, &[(0, b"a"), (2 << 20, b"b"), (4 << 20, b"c")]);
    let mut bytes = good.clone();
    bytes.copy_within(1536..1540, 1540);
    bytes[1544..1548].copy_from_slice(&1u32.to_be_bytes());
    let options = OpenOptions { check_table: false, ..OpenOptions::default() };
    let mut seen = Vec::new();
    let found = Image::open(MemBlock::from(bytes.clone()), FileId(0), &options).unwrap();
    let report = check(&found, &mut |finding| seen.push(finding)).unwrap();
    assert_eq!((report.corruptions, report.damages, report.allocated_blocks), (3, 0, 3));
    assert!(seen.contains(&Finding::SharedBlock { first: 0, second: 1, at: 2048 }));
    assert!(seen.contains(&Finding::OverMetadata { block: 2, at: 512 }));
    bytes[1544..1548].copy_from_slice(&0xffff_0000u32.to_be_bytes());
    assert_eq!(open(&bytes).unwrap_err(), Error::Truncated(2));
    let clean = Image::open(MemBlock::from(good), FileId(0), &options).unwrap();
    let report = check(&clean, &mut |finding| panic!("{finding}")).unwrap();
    assert_eq!((report.total_blocks, report.allocated_blocks, report.corruptions), (3, 3, 0));
}

/// Everything that can be asked of an image, a bounded number of times.
fn exercise(bytes: Vec<u8>) {
    for check_table in [true, false] {
        let options = OpenOptions { check_table, ..OpenOptions::default() };
        let Ok(image) = Image::open(MemBlock::from(bytes.clone()), FileId(0), &options) else { continue };
        let mut buf = [0; 3000];
        for at in [0, 511, 4096, image.size() / 2, image.size().saturating_sub(3000)] {
            if image.read_at(at, &mut buf).is_ok() {
                assert!(image.size() >= 3000);
            }
        }
        let extents = image.extents(0..image.size()).take(100);
        assert!(extents.flatten().all(|extent| extent.len > 0 && extent.end() <= image.size()));
        let mut told = 0;
        if let Ok(report) = check(&image, &mut |_| told += 1) {
            assert_eq!(told, report.corruptions + report.damages);
        }
    }
    if let Ok(mut writer) = Writer::open(MemBlock::from(bytes.clone()), FileId(0), SizeRule::ByCreator) {
        let at = writer.size() / 3;
        // A place may lie where memory ends; what was written is there unless it failed.
        if writer.write_at(at, b"new").is_ok() {
            let mut word = [0; 3];
            writer.read_at(at, &mut word).unwrap();
            assert_eq!(&word, b"new");
        }
    }
    let _ = repair(&mut MemBlock::from(bytes));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn damaged_images_never_panic(
        child in any::<bool>(),
        changes in prop::collection::vec((0usize..2100, prop::sample::select(vec![0u8, 1, 0x7f, 0x80, 0xff, 4, 0x20])), 0..8),
        cut in prop::option::of(0usize..9000),
        mend in any::<bool>(),
    ) {
        let mut bytes = if child { differencing() } else { image(5 << 20, &[(3 << 20, &[9; 600])]) };
        for (at, value) in changes {
            bytes[at] = value;
        }
        if mend {
            sum(&mut bytes[..512], AT_SUM);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        exercise(bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_written_is_read(writes in prop::collection::vec((0u64..5_000_000, 1usize..70_000, any::<u8>()), 1..12)) {
        let mut disk = vec![0; 5 << 20];
        let mut writer = create(
            MemBlock::default(), FileId(0), &CreateOptions { size: 5 << 20, force_size: true, ..CreateOptions::default() },
        ).unwrap();
        for (number, (at, len, byte)) in writes.iter().enumerate() {
            writer.write_at(*at, &vec![*byte; *len]).unwrap();
            disk[*at as usize..*at as usize + len].fill(*byte);
            if number == 5 {
                writer = Writer::open(writer.finish().unwrap(), FileId(0), SizeRule::ByCreator).unwrap();
            }
        }
        let image = open(writer.finish().unwrap().as_bytes()).unwrap();
        let mut found = vec![0; 5 << 20];
        image.read_at(0, &mut found).unwrap();
        prop_assert!(found == disk);
    }
}
