//! Damaged images end in an error or in some contents, and in bounded work.

use std::cell::Cell;

use instar_blockio::test::Faulty;
use instar_blockio::{BlockMap, BlockMapExt, BlockRead, BlockWrite, FileId, MemBlock, Result as BlockResult};
use instar_vhdx::{CreateOptions, Image, OpenOptions, Writer, check, crc32c, create, replay_log};
use proptest::prelude::*;

/// Counts bytes that are read.
struct Counted(MemBlock, Cell<u64>);

impl BlockRead for Counted {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        self.1.set(self.1.get() + buf.len() as u64);
        self.0.read_at(offset, buf)
    }
}

/// Where the interesting bytes lie: headers, region tables, log, BAT, metadata table and items.
const AREAS: [(usize, usize); 8] = [
    (0, 16),
    (0x10000, 80),
    (0x20000, 80),
    (0x30000, 80),
    (0x10_0000, 256),
    (0x20_0000, 128),
    (0x30_0000, 192),
    (0x31_0000, 40),
];

/// A small image with data, and a log that holds an entry.
fn sample() -> Vec<u8> {
    let mut disk = MemBlock::default();
    let options = CreateOptions { size: 9 << 20, block_size: 1 << 20, ..CreateOptions::default() };
    let mut writer = create(&mut disk, FileId(0), &options).unwrap();
    writer.write_at(1 << 20, &[0x5a; 3000]).unwrap();
    writer.finish().unwrap();
    let mut writer = Writer::open(&mut disk, FileId(0), [1; 16]).unwrap();
    writer.write_at(5 << 20, &[0xa5; 3000]).unwrap();
    writer.finish().unwrap();
    let mut file = disk.into_bytes();
    // As if the crash had come before the log was emptied.
    let guid: [u8; 16] = file[0x10_0020..0x10_0030].try_into().unwrap();
    for header in [0x10000, 0x20000] {
        file[header + 48..header + 64].copy_from_slice(&guid);
    }
    seal(&mut file);
    file
}

/// Makes all checksums right, so that what lies behind them is reached.
fn seal(file: &mut [u8]) {
    let log_len = file.get(0x10_0008..0x10_000c).map_or(0, |bytes| u32::from_le_bytes(bytes.try_into().unwrap()));
    let log_len = if (4096..=1 << 20).contains(&log_len) { log_len as usize } else { 4096 };
    let areas = [(0x10000, 4096), (0x20000, 4096), (0x30000, 65536), (0x40000, 65536), (0x10_0000, log_len)];
    for (at, len) in areas {
        if let Some(bytes) = file.get_mut(at..at + len) {
            bytes[4..8].fill(0);
            let sum = crc32c(0, bytes);
            bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

/// Does all that can be done with an image, up to bounds of its own; the answers don't matter.
fn exercise(file: &[u8]) {
    for check_bat in [true, false] {
        let disk = Counted(MemBlock::from(file.to_vec()), Cell::new(0));
        let options = OpenOptions { check_bat, ..OpenOptions::default() };
        let image = match Image::open(&disk, FileId(0), &options) {
            Ok(image) => image,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                continue;
            }
        };
        // The log at most six times, tables once, and a BAT whose size is in no relation to the file only up to 16 MiB.
        assert!(disk.1.get() <= 8 * file.len() as u64 + (20 << 20), "{} bytes read", disk.1.get());
        let size = image.size();
        assert!(size <= 64 << 40);
        let _ = image.parent().map(|parent| (parent.names(), parent.is_parent(image.disk_id())));
        for start in [0, size / 3, size.saturating_sub(700)] {
            let mut at = start;
            for extent in image.extents(start..size).take(100) {
                let Ok(extent) = extent else { break };
                assert!(extent.offset == at && extent.len > 0 && extent.end() <= size);
                at = extent.end();
                let mut buf = vec![0; extent.len.min(3000) as usize];
                let _ = image.read_at(extent.offset, &mut buf);
            }
        }
        assert!(image.extent_at(size, 1).is_err());
        if image.geometry().blocks() < 1 << 16 {
            check(&image, &mut |finding| assert!(!finding.to_string().is_empty())).unwrap();
        }
    }
    let (mut disk, faults) = Faulty::new(MemBlock::from(file.to_vec()));
    faults.limit_space(32 << 20);
    let _ = replay_log(&mut disk);
    let (disk, faults) = Faulty::new(MemBlock::from(file.to_vec()));
    faults.limit_space(32 << 20);
    if let Ok(mut writer) = Writer::open(disk, FileId(0), [9; 16]) {
        let size = writer.size();
        for offset in [0, size / 2, size.saturating_sub(600)] {
            let _ = writer.write_at(offset, &[1; 600][..(size - offset).min(600) as usize]);
        }
        let _ = writer.finish();
    }
}

#[derive(Clone, Debug)]
enum Mutation {
    Flip { area: usize, at: usize, bit: u8 },
    Extreme { area: usize, at: usize, value: u64, len: usize },
    Splice { from: usize, to: usize },
    Cut(usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let extremes = [0, 1, 2, 7, 511, 4096, 1 << 20, (1 << 20) - 1, 1 << 31, 1 << 32, 1 << 62, 1 << 63, u64::MAX];
    prop_oneof![
        (0..AREAS.len(), any::<usize>(), 0u8..8).prop_map(|(area, at, bit)| Mutation::Flip { area, at, bit }),
        (0..AREAS.len(), any::<usize>(), proptest::sample::select(extremes.to_vec()), 1usize..9)
            .prop_map(|(area, at, value, len)| Mutation::Extreme { area, at, value, len }),
        (0..AREAS.len(), 0..AREAS.len()).prop_map(|(from, to)| Mutation::Splice { from, to }),
        any::<usize>().prop_map(Mutation::Cut),
    ]
}

fn apply(file: &mut Vec<u8>, mutation: &Mutation) {
    let place = |area: usize, at: usize| AREAS[area].0 + at % AREAS[area].1;
    match *mutation {
        Mutation::Flip { area, at, bit } => {
            if let Some(byte) = file.get_mut(place(area, at)) {
                *byte ^= 1 << bit;
            }
        }
        Mutation::Extreme { area, at, value, len } => {
            let at = place(area, at / 4 * 4);
            if let Some(bytes) = file.get_mut(at..at + len) {
                bytes.copy_from_slice(&value.to_le_bytes()[..len]);
            }
        }
        Mutation::Splice { from, to } => {
            let bytes = file.get(AREAS[from].0..AREAS[from].0 + 32).map(<[u8]>::to_vec);
            if let (Some(bytes), Some(target)) = (bytes, file.get_mut(AREAS[to].0..AREAS[to].0 + 32)) {
                target.copy_from_slice(&bytes);
            }
        }
        Mutation::Cut(at) => file.truncate(at % (file.len() + 1)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn mutations(mutations in proptest::collection::vec(mutation(), 1..5), sealed in any::<bool>()) {
        let mut file = sample();
        for mutation in &mutations {
            apply(&mut file, mutation);
        }
        if sealed {
            seal(&mut file);
        }
        exercise(&file);
    }
}

#[test]
fn the_sample_is_good() {
    let file = sample();
    let image = Image::open(MemBlock::from(file.clone()), FileId(0), &OpenOptions::default()).unwrap();
    assert!(image.is_dirty());
    let mut bytes = [0; 3000];
    image.read_at(5 << 20, &mut bytes).unwrap();
    assert_eq!(bytes, [0xa5; 3000]);
    exercise(&file);
}
