//! Damaged images of all formats: nothing panics, and what is answered fits the disk.

mod support;

use std::sync::LazyLock;

use instar_blockio::test::Faulty;
use instar_blockio::{BlockAlloc, BlockMap, BlockMapExt, BlockRead, BlockWrite, Codec, FileId, MemBlock, ZeroMode};
use instar_codec::Encoder;
use instar_legacy::{OpenOptions, Repair, bochs, cloop, dmg, parallels, qcow, qed, vdi};
use proptest::prelude::*;
use support::{compressed_qcow, made};

/// Files are small, and may not grow beyond this.
const SPACE: u64 = 8 << 20;

fn read<T: BlockMap>(image: &T) {
    let size = image.size();
    for start in [0, size / 3, size.saturating_sub(1000)] {
        let mut at = start;
        for extent in image.extents(start..size).take(200) {
            let Ok(extent) = extent else { break };
            assert!(extent.offset == at && extent.len > 0 && extent.end() <= size, "{extent:?} at {at}");
            at = extent.end();
            let mut buf = vec![0; extent.len.min(3000) as usize];
            let _ = image.read_at(extent.offset, &mut buf);
        }
    }
    assert!(image.read_at(size, &mut [0]).is_err() && image.extent_at(size, 1).is_err());
}

fn write<T: BlockAlloc + BlockWrite>(writer: &mut T) {
    let size = writer.size();
    for offset in [0, 511, 5000, size / 2, size.saturating_sub(700)] {
        let len = size.saturating_sub(offset).min(700);
        let bytes = vec![0xa5; len as usize];
        let mut back = vec![0; len as usize];
        // Tables of hostile images may lie where data do, so what comes back may be something else.
        let _ = writer.write_at(offset, &bytes);
        let _ = writer.read_at(offset, &mut back);
        let _ = writer.write_zeroes(offset, len / 2, ZeroMode::Unmap);
        let _ = writer.write_zeroes(offset, len / 3, ZeroMode::KeepAllocated);
        let _ = writer.discard(offset, len);
        if let Ok(place) = writer.reserve(offset, len) {
            let _ = if len % 3 == 0 { writer.abort(place) } else { writer.commit(place) };
        }
    }
    let _ = writer.flush();
}

fn look(format: &str, bytes: &[u8]) {
    macro_rules! image {
        ($format:ident) => {
            for strict in [false, true] {
                let file = MemBlock::from(bytes.to_vec());
                if let Ok(image) = $format::Image::open(file, FileId(3), &OpenOptions { strict }) {
                    read(&image);
                }
            }
        };
    }
    macro_rules! writer {
        ($format:ident) => {{
            image!($format);
            let (file, faults) = Faulty::new(MemBlock::from(bytes.to_vec()));
            faults.limit_space(SPACE);
            if let Ok(mut writer) = $format::Writer::open(file, FileId(3)) {
                write(&mut writer);
                let _ = writer.finish();
            }
        }};
    }
    macro_rules! check {
        ($format:ident) => {
            let file = MemBlock::from(bytes.to_vec());
            if let Ok(image) = $format::Image::open(file, FileId(3), &OpenOptions::default()) {
                let _ = image.check(&mut |finding| assert!(!finding.to_string().is_empty()));
            }
        };
    }
    match format {
        "qcow" => writer!(qcow),
        "qed" => {
            writer!(qed);
            check!(qed);
            let (file, faults) = Faulty::new(MemBlock::from(bytes.to_vec()));
            faults.limit_space(SPACE);
            if let Ok(mut writer) = qed::Writer::open(file, FileId(3)) {
                let _ = writer.check(Repair { leaks: true, corruptions: true }, &mut |_| {});
            }
        }
        "vdi" => {
            writer!(vdi);
            check!(vdi);
        }
        "parallels" => {
            writer!(parallels);
            check!(parallels);
            let (file, faults) = Faulty::new(MemBlock::from(bytes.to_vec()));
            faults.limit_space(SPACE);
            if let Ok(mut writer) = parallels::Writer::open(file, FileId(3)) {
                let _ = writer.check(Repair { leaks: true, corruptions: true }, &mut |_| {});
            }
        }
        "dmg" => image!(dmg),
        "bochs" => image!(bochs),
        "cloop" => image!(cloop),
        other => panic!("no format {other}"),
    }
}

/// Chunks of zlib, plain bytes and zeroes, told by a property list or a resource fork.
fn dmg_image(in_fork: bool) -> Vec<u8> {
    let plain = [0x41; 4096];
    let mut file = Vec::new();
    Encoder::new(Codec::Zlib).encode(&plain, &mut file).unwrap().unwrap();
    let packed = file.len() as u64;
    file.extend(plain);
    let mut table = b"mish\0\0\0\x01".to_vec();
    table.resize(204, 0);
    for (kind, numbers) in [
        (0x8000_0005u32, [0, 8, 0, packed]),
        (1, [8, 8, packed, 4096]),
        (0, [16, 100, 0, 0]),
        (0x8000_0006, [116, 8, 0, 9]),
        (u32::MAX, [0; 4]),
    ] {
        table.extend(kind.to_be_bytes());
        table.extend([0; 4]);
        numbers.iter().for_each(|number: &u64| table.extend(number.to_be_bytes()));
    }
    let start = file.len() as u64;
    let mut trailer = vec![0; 512];
    trailer[..4].copy_from_slice(b"koly");
    trailer[0x1ec..0x1f4].copy_from_slice(&124u64.to_be_bytes());
    let at = if in_fork {
        let len = table.len() as u32 + 4;
        for number in [16, 16 + len, len, 0, len - 4] {
            file.extend(number.to_be_bytes());
        }
        file.extend(&table);
        0x28
    } else {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        file.extend(b"<plist><data>\n");
        for three in table.chunks(3) {
            let word = three.iter().fold(0u32, |word, &byte| word << 8 | u32::from(byte)) << (8 * (3 - three.len()));
            file.extend((0..=three.len()).map(|i| DIGITS[(word >> (18 - 6 * i)) as usize & 63]));
        }
        file.extend(b"</data></plist>");
        0xd8
    };
    let len = file.len() as u64 - start;
    trailer[at..at + 8].copy_from_slice(&start.to_be_bytes());
    trailer[at + 8..at + 16].copy_from_slice(&len.to_be_bytes());
    file.extend(trailer);
    file
}

fn bochs_image() -> Vec<u8> {
    let mut bytes = vec![0; 512 + 16 + 512 + 4096];
    for (at, text) in [(0, &b"Bochs Virtual HD Image"[..]), (32, b"Redolog"), (48, b"Growing")] {
        bytes[at..at + text.len()].copy_from_slice(text);
    }
    for (at, byte) in [(66, 2), (69, 2), (72, 4), (76, 1), (81, 16), (89, 64)] {
        bytes[at] = byte;
    }
    bytes[512..528].fill(0xff);
    bytes[516..520].fill(0);
    bytes[528] = 0b110;
    bytes[1040 + 512..1040 + 1536].fill(0x5a);
    bytes
}

fn cloop_image() -> Vec<u8> {
    let mut streams = Vec::new();
    let mut ends = vec![0];
    for value in 1..4 {
        Encoder::new(Codec::Zlib).encode(&[value; 4096], &mut streams).unwrap().unwrap();
        ends.push(streams.len());
    }
    let mut bytes = vec![0; 128];
    bytes.extend([0, 0, 16, 0, 0, 0, 0, 3]);
    ends.iter().for_each(|end| bytes.extend((168 + *end as u64).to_be_bytes()));
    bytes.extend(streams);
    bytes
}

fn seeds() -> &'static [(&'static str, Vec<u8>)] {
    static SEEDS: LazyLock<Vec<(&'static str, Vec<u8>)>> = LazyLock::new(make_seeds);
    &SEEDS
}

fn make_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let small = 70_144;
    vec![
        ("qcow", made("qcow", small, true)),
        ("qcow", compressed_qcow(small)),
        ("qed", made("qed4k", small, true)),
        ("vdi", made("vdi", small, true)),
        ("vdi", made("vdi-static", small, false)),
        ("parallels", made("parallels-odd", small, true)),
        ("dmg", dmg_image(false)),
        ("dmg", dmg_image(true)),
        ("bochs", bochs_image()),
        ("cloop", cloop_image()),
    ]
}

#[test]
fn the_seeds_are_good() {
    for (format, bytes) in make_seeds() {
        look(format, &bytes);
        let size = match format {
            "dmg" => dmg::Image::open(MemBlock::from(bytes), FileId(0), &OpenOptions::default()).map(|i| i.size()).ok(),
            "bochs" => {
                bochs::Image::open(MemBlock::from(bytes), FileId(0), &OpenOptions::default()).map(|i| i.size()).ok()
            }
            "cloop" => {
                cloop::Image::open(MemBlock::from(bytes), FileId(0), &OpenOptions::default()).map(|i| i.size()).ok()
            }
            _ => continue,
        };
        assert!(size.is_some_and(|size| size > 0), "{format}");
    }
}

#[test]
fn chunks_of_all_kinds_are_read() {
    for in_fork in [false, true] {
        let file = MemBlock::from(dmg_image(in_fork));
        let image = dmg::Image::open(file, FileId(0), &OpenOptions::default()).unwrap();
        assert_eq!((image.size(), image.unreadable()), (124 * 512, &[0x8000_0006][..]));
        let mut disk = vec![1; 116 * 512];
        image.read_at(0, &mut disk).unwrap();
        assert!(disk[..8192].iter().all(|&byte| byte == 0x41) && disk[8192..].iter().all(|&byte| byte == 0));
        assert!(image.read_at(116 * 512, &mut [0]).is_err());
    }
}

/// A change of a file.
#[derive(Clone, Debug)]
enum Change {
    Flip(prop::sample::Index, u8),
    Number(prop::sample::Index, u8, u64),
    Truncate(prop::sample::Index),
    Copy(prop::sample::Index, prop::sample::Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<prop::sample::Index>;
    let numbers = prop_oneof![
        any::<u64>(),
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..64u32).prop_map(|bit| (1u64 << bit).wrapping_sub(1)),
        0..20u64
    ];
    prop_oneof![
        2 => (index(), any::<u8>()).prop_map(|(at, bits)| Change::Flip(at, bits)),
        5 => (index(), 0..8u8, numbers).prop_map(|(at, how, number)| Change::Number(at, how, number)),
        1 => index().prop_map(Change::Truncate),
        1 => (index(), index()).prop_map(|(from, to)| Change::Copy(from, to)),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change, near: bool) {
    // Headers and tables lie at the start, or in the last bytes.
    let place = |index: &prop::sample::Index, len: usize| match near {
        true if index.index(4) == 0 => len - 1 - index.index(len.min(1024)),
        true => index.index(len.min(600)),
        false => index.index(len),
    };
    let len = bytes.len();
    if len == 0 {
        return;
    }
    match change {
        Change::Flip(at, bits) => bytes[place(at, len)] ^= bits,
        Change::Number(at, how, number) => {
            let width = 1 << (how / 2);
            let at = place(at, len) / width * width;
            let number = if how % 2 == 0 { number.to_le_bytes() } else { (number << (64 - 8 * width)).to_be_bytes() };
            let end = len.min(at + width);
            bytes[at..end].copy_from_slice(&number[..end - at]);
        }
        Change::Truncate(at) => bytes.truncate(at.index(len)),
        Change::Copy(from, to) => {
            let (from, to) = (place(from, len), place(to, len));
            let count = 64.min(len - from).min(len - to);
            bytes.copy_within(from..from + count, to);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_survived(
        seed in 0..10usize,
        near in any::<bool>(),
        changes in proptest::collection::vec(change(), 1..5),
    ) {
        let (format, mut bytes) = seeds()[seed].clone();
        changes.iter().for_each(|change| apply(&mut bytes, change, near));
        look(format, &bytes);
    }
}
