//! Damaged images: no panic, no hang, and no memory beyond what is really there.

use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, FileId, MemBlock};
use instar_vmdk::{CreateOptions, Image, OpenOptions, Subformat, create};
use proptest::prelude::*;

fn sample(subformat: Subformat) -> Vec<u8> {
    let mut file = MemBlock::default();
    let options = CreateOptions {
        size: 40 << 20,
        subformat,
        name: b"a.vmdk".to_vec(),
        cid: 7,
        zeroed_grain: true,
        ..CreateOptions::default()
    };
    let mut writer = create(&mut file, FileId(0), Vec::new(), options).unwrap();
    for at in [0u64, 3, 4, 600] {
        writer.write_at(at << 16, &vec![at as u8 + 1; 65536]).unwrap();
    }
    writer.finish().unwrap();
    let mut bytes = vec![0; file.size() as usize];
    file.read_at(0, &mut bytes).unwrap();
    bytes
}

fn walk(bytes: Vec<u8>) {
    for strict in [false, true] {
        let Ok(mut image) = Image::open(MemBlock::from(bytes.clone()), FileId(1), &OpenOptions { strict }) else {
            continue;
        };
        let mut left = 8;
        while let Some((number, _)) = image.wanted() {
            if left == 0 || image.attach(number, MemBlock::from(bytes.clone()), FileId(2)).is_err() {
                break;
            }
            left -= 1;
        }
        let size = image.size();
        for start in [0, size / 2, size.saturating_sub(70_000)] {
            let mut at = start;
            for extent in image.extents(start..size).take(100) {
                let Ok(extent) = extent else { break };
                assert!(extent.offset == at && extent.len > 0 && extent.end() <= size, "{extent:?}");
                at = extent.end();
                let mut buf = vec![0; extent.len.min(4096) as usize];
                let _ = image.read_at(extent.offset, &mut buf);
            }
        }
    }
}

/// Values that fields are set to.
const EXTREMES: [u64; 8] = [0, 1, 0xffff_ffff, u64::MAX, 1 << 63, 1 << 31, 511, (1 << 55) - 1];

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutations(
        stream in any::<bool>(),
        edits in proptest::collection::vec((0usize..20_000, 0usize..8, 1usize..9), 1..6),
        cut in proptest::option::of(0usize..200_000),
        splice in proptest::option::of((0usize..20_000, 0usize..20_000, 1usize..600)),
    ) {
        let mut bytes = sample(if stream { Subformat::StreamOptimized } else { Subformat::MonolithicSparse });
        for (at, value, len) in edits {
            // Most edits hit the header or the tables.
            let at = if at % 2 == 0 { at % 96 } else { at };
            let value = EXTREMES[value].to_le_bytes();
            bytes[at..at + len.min(8)].copy_from_slice(&value[..len.min(8)]);
        }
        if let Some((from, to, len)) = splice {
            bytes.copy_within(from..from + len, to);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        walk(bytes);
    }

    #[test]
    fn descriptors(text in "((RW|rw|RDONLY|CID=|createType=\"vmfs\"|parentCID=|#) ?[-0-9a-f]{0,20} ?(FLAT|SPARSE|ZERO|flat) ?\"?[a-z.]{0,8}\"? ?[-0-9]{0,3}\r?\n){0,12}") {
        let all = format!("# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\n{text}");
        walk(all.into_bytes());
    }
}

#[test]
fn a_descriptor_of_a_megabyte_is_quick() {
    for line in ["RW 1 ZERO\n", "RW 1 FLAT \"a\" 0\n", "x\n", "CID=", "\n"] {
        walk(format!("createType=\"vmfs\"\n{}", line.repeat((2 << 20) / line.len())).into_bytes());
    }
}
