//! The log: replayed in memory and in the file, whatever a crash or a hostile hand has left.

mod common;

use std::cell::Cell;

use common::{Random, have_qemu, must, pattern, unpack};
use instar_blockio::file::HostFile;
use instar_blockio::test::CrashLog;
use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, ExtentKind, FileId, MemBlock, Result as BlockResult};
use instar_vhdx::{
    CreateOptions, Error, Finding, Image, LogFault, OpenOptions, Writer, check, crc32c, create, replay_log,
};

const MIB: usize = 1 << 20;
const LOG: usize = MIB;
const BAT: usize = 2 * MIB;
const SECTOR: usize = 4096;
const GUID: [u8; 16] = [0x11; 16];

/// An image of 16 blocks of a MiB, the first of which holds data.
fn image() -> Vec<u8> {
    let mut disk = MemBlock::default();
    let options = CreateOptions { size: 16 << 20, block_size: 1 << 20, ..CreateOptions::default() };
    let mut writer = create(&mut disk, FileId(0), &options).unwrap();
    writer.write_at(0, &pattern(1, 2 * MIB)).unwrap();
    writer.finish().unwrap();
    disk.into_bytes()
}

/// The newer header names a log.
fn set_log_guid(file: &mut [u8], guid: [u8; 16]) {
    let header = &mut file[0x20000..0x21000];
    header[48..64].copy_from_slice(&guid);
    seal(header);
}

fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let sum = crc32c(0, bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// What a descriptor says.
#[derive(Clone)]
enum Change {
    Zero(u64, u64),
    Sector(u64, Vec<u8>),
}

/// An entry as it lies in the log.
fn entry(sequence: u64, tail: usize, file_len: u64, changes: &[Change]) -> Vec<u8> {
    let head = (64 + 32 * changes.len()).next_multiple_of(SECTOR);
    let mut bytes = vec![0; head];
    for (index, change) in changes.iter().enumerate() {
        let at = 64 + 32 * index;
        let mut descriptor = Vec::new();
        match change {
            Change::Zero(offset, len) => {
                descriptor.extend(b"zero\0\0\0\0");
                descriptor.extend(len.to_le_bytes());
                descriptor.extend(offset.to_le_bytes());
            }
            Change::Sector(offset, data) => {
                descriptor.extend(b"desc");
                descriptor.extend(&data[4092..]);
                descriptor.extend(&data[..8]);
                descriptor.extend(offset.to_le_bytes());
                bytes.extend(b"data");
                bytes.extend(((sequence >> 32) as u32).to_le_bytes());
                bytes.extend(&data[8..4092]);
                bytes.extend((sequence as u32).to_le_bytes());
            }
        }
        descriptor.extend(sequence.to_le_bytes());
        bytes[at..at + 32].copy_from_slice(&descriptor);
    }
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(b"loge");
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..16].copy_from_slice(&(tail as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    bytes[24..28].copy_from_slice(&(changes.len() as u32).to_le_bytes());
    bytes[32..48].copy_from_slice(&GUID);
    bytes[48..56].copy_from_slice(&file_len.to_le_bytes());
    bytes[56..64].copy_from_slice(&file_len.to_le_bytes());
    seal(&mut bytes);
    bytes
}

/// Puts bytes into the ring of a MiB.
fn put_log(file: &mut [u8], at: usize, bytes: &[u8]) {
    for (index, byte) in bytes.iter().enumerate() {
        file[LOG + (at + index) % MIB] = *byte;
    }
}

/// The first sector of the BAT with another entry for block 5.
fn bat_sector(file: &[u8], entry: u64) -> Change {
    let mut sector = file[BAT..BAT + SECTOR].to_vec();
    sector[40..48].copy_from_slice(&entry.to_le_bytes());
    Change::Sector(BAT as u64, sector)
}

fn open(file: &[u8]) -> Result<Image<MemBlock>, Error> {
    Image::open(MemBlock::from(file.to_vec()), FileId(0), &OpenOptions::default())
}

/// The place of block 5, if it has one.
fn block_5(image: &Image<MemBlock>) -> Option<u64> {
    match image.locate(5 << 20, 1).unwrap().kind {
        ExtentKind::Data { host, .. } => Some(host),
        _ => None,
    }
}

#[test]
fn the_newest_sequence_counts_and_is_carried_out() {
    let mut file = image();
    let place = file.len() as u64;
    file.resize(file.len() + MIB, 0x77);
    let len = file.len() as u64;
    let (unmapped, full) = (3, place | 6);
    set_log_guid(&mut file, GUID);
    // Left over: an older sequence, and one that counts on an entry that is gone.
    let old = entry(3, 0x40000, len, &[bat_sector(&file, 2)]);
    put_log(&mut file, 0x40000, &old);
    let torn = entry(90, 0x60000, len, &[bat_sector(&file, 2)]);
    put_log(&mut file, 0x80000, &torn);
    // The active one: around the end of the ring, in two entries.
    let first = entry(10, MIB - SECTOR, len, &[bat_sector(&file, unmapped)]);
    let second = entry(11, MIB - SECTOR, len, &[bat_sector(&file, full)]);
    put_log(&mut file, MIB - SECTOR, &first);
    put_log(&mut file, first.len() - SECTOR, &second);
    let image = open(&file).unwrap();
    assert!(image.is_dirty());
    assert_eq!(block_5(&image), Some(place));
    let mut found = Vec::new();
    check(&image, &mut |finding| found.push(finding)).unwrap();
    assert_eq!(found, [Finding::DirtyLog]);
    let mut disk = MemBlock::from(file.clone());
    assert!(replay_log(&mut disk).unwrap());
    let bytes = disk.as_bytes();
    assert_eq!(u64::from_le_bytes(bytes[BAT + 40..BAT + 48].try_into().unwrap()), full);
    assert!(
        bytes[BAT..BAT + 40] == file[BAT..BAT + 40] && bytes[BAT + 48..BAT + SECTOR] == file[BAT + 48..BAT + SECTOR]
    );
    let after = open(bytes).unwrap();
    assert!(!after.is_dirty() && block_5(&after) == Some(place));
    assert!(!replay_log(&mut disk).unwrap());
}

#[test]
fn zeroes_and_longer_files() {
    let mut file = image();
    set_log_guid(&mut file, GUID);
    let len = file.len() as u64;
    // The last sector of the second block becomes zero, and the file longer.
    let mut bytes = entry(1, 0, len, &[Change::Zero(len - SECTOR as u64, SECTOR as u64), Change::Zero(0x30000, 0)]);
    bytes[56..64].copy_from_slice(&(len + (1 << 20)).to_le_bytes());
    seal(&mut bytes);
    put_log(&mut file, 0, &bytes);
    let image = open(&file).unwrap();
    let runs: Vec<_> = image.extents(0..2 << 20).map(|run| run.map(|run| (run.len, run.kind)).unwrap()).collect();
    assert_eq!(runs[1], (SECTOR as u64, ExtentKind::Zero { host: None }));
    let mut contents = vec![1; 2 * MIB];
    image.read_at(0, &mut contents).unwrap();
    let mut expected = pattern(1, 2 * MIB);
    expected[2 * MIB - SECTOR..].fill(0);
    assert!(contents == expected);
    let mut disk = MemBlock::from(file);
    assert!(replay_log(&mut disk).unwrap());
    assert_eq!(disk.size(), len + (1 << 20));
    Image::open(&disk, FileId(0), &OpenOptions::default()).unwrap().read_at(0, &mut contents).unwrap();
    assert!(contents == expected);
}

#[test]
fn logs_that_cannot_be_replayed() {
    let good = image();
    let len = good.len() as u64;
    let with = |entry: Vec<u8>| {
        let mut file = good.clone();
        set_log_guid(&mut file, GUID);
        put_log(&mut file, 0, &entry);
        open(&file).map(|image| image.is_dirty())
    };
    let sector = || vec![5; SECTOR];
    let fault = |fault| Err(Error::Log(fault));
    let one = |change| with(entry(1, 0, len, &[change]));
    assert_eq!(one(Change::Zero(1, 4096)), fault(LogFault::Descriptor(0)));
    assert_eq!(one(Change::Zero(1 << 63, 4096)), fault(LogFault::Descriptor(0)));
    assert_eq!(one(Change::Zero(0x30000, 1 << 63)), fault(LogFault::Descriptor(0)));
    assert_eq!(one(Change::Zero(0x30000, 1 << 62)), fault(LogFault::Target(0x30000)));
    assert_eq!(one(Change::Sector(0x20000, sector())), fault(LogFault::Target(0x20000)));
    assert_eq!(one(Change::Sector(LOG as u64, sector())), fault(LogFault::Target(LOG as u64)));
    assert_eq!(with(entry(1, 0, len + 1, &[])), fault(LogFault::Truncated(len + 1)));
    // Zeroes of 2^62 bytes behind everything are one change, and no work.
    assert_eq!(one(Change::Zero(16 << 20, 1 << 62)), Ok(true));
    let patched = |at: usize, byte: u8| {
        let mut bytes = entry(1, 0, len, &[Change::Sector(BAT as u64, good[BAT..BAT + SECTOR].to_vec())]);
        bytes[at] = byte;
        seal(&mut bytes);
        with(bytes)
    };
    assert_eq!(patched(64, b'?'), fault(LogFault::Descriptor(0)));
    assert_eq!(patched(64 + 24, 9), fault(LogFault::Descriptor(0)));
    assert_eq!(patched(SECTOR, b'?'), fault(LogFault::DataSector(0)));
    assert_eq!(patched(2 * SECTOR - 4, 9), fault(LogFault::DataSector(0)));
    assert_eq!(patched(24, 2), fault(LogFault::Descriptor(0)));
    assert_eq!(patched(63, 1), fault(LogFault::FileLength(1 << 56 | len)));
    // Entries that are none: they are left over, and nothing is to be done.
    for (at, byte) in [(8, 1), (10, 0xff), (12, 1), (16, 0), (27, 0xff), (32, 0)] {
        assert_eq!(patched(at, byte), Ok(false), "byte {at}");
    }
    // A payload block changed by way of the log: told when it is read.
    let mut file = good.clone();
    set_log_guid(&mut file, GUID);
    put_log(&mut file, 0, &entry(1, 0, len, &[Change::Sector(len - SECTOR as u64, sector())]));
    let image = open(&file).unwrap();
    let expected = Err(Error::Log(LogFault::Payload(len - 100)));
    assert_eq!(image.locate((2 << 20) - 100, 1), expected);
    assert_eq!(image.locate(0, 1 << 30).unwrap().len, (2 << 20) - SECTOR as u64);
}

/// Counts the bytes that are read.
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

#[test]
fn work_is_bounded() {
    let mut file = image();
    set_log_guid(&mut file, GUID);
    let len = file.len() as u64;
    // Each sector claims to be an entry of the whole log.
    for at in (0..MIB).step_by(SECTOR) {
        let mut bytes = entry(1 + at as u64, 0, len, &[]);
        bytes[8..12].copy_from_slice(&(MIB as u32).to_le_bytes());
        put_log(&mut file, at, &bytes);
    }
    let counted = Counted(MemBlock::from(file.clone()), Cell::new(0));
    let opened = Image::open(&counted, FileId(0), &OpenOptions::default());
    assert_eq!(opened.map(|_| ()), Err(Error::Log(LogFault::Work)));
    assert!(counted.1.get() < 6 << 20, "{} bytes read", counted.1.get());
    // A ring full of good entries, each the successor of the one before: no circle, since numbers rise.
    for at in (0..MIB).step_by(SECTOR) {
        let bytes = entry(1 + (at / SECTOR) as u64, 0, len, &[Change::Zero(0x30000, 0)]);
        put_log(&mut file, at, &bytes);
    }
    let counted = Counted(MemBlock::from(file), Cell::new(0));
    assert!(Image::open(&counted, FileId(0), &OpenOptions::default()).unwrap().is_dirty());
    assert!(counted.1.get() < 6 << 20, "{} bytes read", counted.1.get());
}

/// Whatever a crash leaves of a change in an existing image, the image opens, is sound, and each block is old or new.
#[test]
fn a_crash_leaves_the_old_or_the_new() {
    for seed in 0..4 {
        let mut random = Random(seed);
        let (mut disk, trace) = CrashLog::new(MemBlock::from(image()));
        let mut writer = Writer::open(&mut disk, FileId(0), [3; 16]).unwrap();
        let blocks: Vec<u64> = (0..3).map(|_| 3 + random.below(13)).collect();
        for &block in &blocks {
            writer.write_at(block << 20, &pattern(block, 5000)).unwrap();
            if random.below(2) == 0 {
                writer.flush().unwrap();
            }
        }
        writer.finish().unwrap();
        let old = pattern(1, 2 * MIB);
        let mut states = 0;
        for state in trace.states(seed, 3) {
            let image = Image::open(&state.disk, FileId(0), &OpenOptions::default())
                .unwrap_or_else(|error| panic!("cut {} variant {}: {error}", state.cut, state.variant));
            check(&image, &mut |finding| assert!(!finding.is_corruption(), "{finding}")).unwrap();
            let mut kept = vec![0; 2 * MIB];
            image.read_at(0, &mut kept).unwrap();
            assert!(kept == old);
            for block in 2..16 {
                let mut bytes = vec![0; 5000];
                image.read_at(block << 20, &mut bytes).unwrap();
                let new = blocks.contains(&block) && bytes == pattern(block, 5000);
                assert!(new || bytes.iter().all(|&byte| byte == 0), "cut {} block {block}", state.cut);
            }
            let mut repaired = state.disk.clone();
            let dirty = image.is_dirty();
            assert_eq!(replay_log(&mut repaired).unwrap(), dirty);
            states += 1;
        }
        assert!(states > 20, "{states} states");
    }
}

/// A new file is no image before its last write.
#[test]
fn a_crash_leaves_no_half_made_image() {
    let (mut disk, trace) = CrashLog::new(MemBlock::default());
    let options = CreateOptions { size: 4 << 20, block_size: 1 << 20, ..CreateOptions::default() };
    let mut writer = create(&mut disk, FileId(0), &options).unwrap();
    writer.write_at(0, &pattern(1, 5000)).unwrap();
    writer.finish().unwrap();
    let mut made = 0;
    for state in trace.states(5, 3) {
        if let Ok(image) = Image::open(&state.disk, FileId(0), &OpenOptions::default()) {
            let mut bytes = vec![0; 5000];
            image.read_at(0, &mut bytes).unwrap();
            assert!(bytes == pattern(1, 5000));
            made += 1;
        }
    }
    assert!(made > 0);
}

/// An image that QEMU left dirty: read as it is, it shows what QEMU makes of it.
#[test]
fn a_dirty_image_of_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = unpack("qemu-iotests/iotest-dirtylog-10G-4M.vhdx", dir.path()) else { return };
    let mut file = HostFile::open(&path, true).unwrap();
    let read = |file: &HostFile| {
        let image = Image::open(file, FileId(0), &OpenOptions::default()).unwrap();
        let mut bytes = vec![0; 8 << 20];
        image.read_at(0, &mut bytes).unwrap();
        (image.is_dirty(), bytes)
    };
    let (dirty, before) = read(&file);
    assert!(dirty && before[..4 << 20].iter().any(|&byte| byte != 0));
    if have_qemu() {
        let copy = dir.path().join("copy.vhdx");
        std::fs::copy(&path, &copy).unwrap();
        must(dir.path(), "qemu-img", &["check", "-r", "all", "copy.vhdx"]);
        let repaired = read(&HostFile::open(&copy, false).unwrap());
        assert!(repaired == (false, before.clone()));
    }
    assert!(replay_log(&mut file).unwrap());
    assert!(read(&file) == (false, before));
    if have_qemu() {
        must(dir.path(), "qemu-img", &["check", path.to_str().unwrap()]);
    }
}
