//! What a crash leaves: a fresh file is no image before its last write; an image that is changed in place stays valid,
//! with leaked clusters at worst, and what was flushed stays readable.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};

use instar_blockio::check::Repair;
use instar_blockio::test::{CrashLog, Trace};
use instar_blockio::{BlockRead, BlockWrite, FileId, Limits, MemBlock, Overlay, Result, ZeroMode};
use instar_qcow2::{
    CreateOptions, Growth, GuestOffset, Header, Image, L1Entry, L2Entry, L2Format, OpenOptions, Preallocation, Writer,
    create,
};

const SECTOR: usize = 512;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 24) % limit
    }
}

fn word(bytes: &[u8], at: u64) -> u64 {
    bytes.get(at as usize..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u64::from_be_bytes(*word))
}

/// Counts references to clusters and holds them against the refcounts (of 16 bits): fewer counts than references, or a
/// copied flag that does not say whether the count is one, would be damage. Images without snapshots only.
fn check(bytes: &[u8]) {
    let header = Header::parse(bytes).unwrap();
    let geometry = header.geometry;
    assert_eq!(geometry.refcount_bits(), 16);
    let size = geometry.cluster_size();
    let mut references: BTreeMap<u64, u64> = BTreeMap::new();
    let mut flags = Vec::new();
    let mut refer = |at: u64, len: u64| {
        for cluster in at / size..(at + len).div_ceil(size) {
            *references.entry(cluster).or_default() += 1;
        }
    };
    refer(0, 1);
    refer(header.l1_offset.0, u64::from(header.l1_entries) * 8);
    let table = header.refcount_table_offset.0;
    refer(table, u64::from(header.refcount_table_clusters) * size);
    let blocks: Vec<u64> =
        (0..u64::from(header.refcount_table_clusters) * size / 8).map(|index| word(bytes, table + index * 8)).collect();
    blocks.iter().filter(|&&block| block != 0).for_each(|&block| refer(block, 1));
    let format = L2Format::new(&header);
    for index in 0..u64::from(header.l1_entries) {
        let entry = L1Entry::decode(word(bytes, header.l1_offset.0 + index * 8));
        let Some(l2) = entry.table else { continue };
        refer(l2.0, 1);
        flags.push((l2.0, entry.copied));
        for slot in 0..geometry.l2_entries() {
            let at = l2.0 + slot * geometry.l2_entry_size();
            let bitmap = if geometry.extended_l2() { word(bytes, at + 8) } else { 0 };
            let guest = GuestOffset(index * geometry.l2_span() + slot * size);
            match format.decode(guest, word(bytes, at), bitmap).unwrap() {
                L2Entry::Compressed { host, len } => refer(host.0, len),
                L2Entry::Cluster { host: Some(host), copied, .. } => {
                    refer(host.0, 1);
                    flags.push((host.0, copied));
                }
                L2Entry::Cluster { .. } => (),
            }
        }
    }
    let count = |cluster: u64| {
        let per_block = geometry.refcounts_per_block();
        let block = blocks.get((cluster / per_block) as usize).copied().unwrap_or(0);
        if block == 0 { 0 } else { word(bytes, block + cluster % per_block * 2) >> 48 }
    };
    for (&cluster, &references) in &references {
        assert!(count(cluster) >= references, "cluster {cluster}: count {} of {references}", count(cluster));
    }
    for (at, copied) in flags {
        assert_eq!(count(at / size) == 1, copied, "copied flag of cluster {}", at / size);
    }
}

/// A change and when it was done: the number of recorded events afterwards, and the sectors that it set.
struct Change {
    events: usize,
    sectors: Vec<usize>,
    value: u8,
    flush: bool,
}

/// Changes an image at random, with values that tell the changes apart.
fn change<D: BlockWrite>(image: &mut Writer<D>, trace: &Trace, random: &mut Random, count: usize) -> Vec<Change> {
    let sectors_in_all = image.size() / SECTOR as u64;
    (0..count)
        .map(|index| {
            let first = random.below(sectors_in_all);
            let len = 1 + random.below(60).min(sectors_in_all - first - 1);
            let (offset, bytes) = (first * SECTOR as u64, len * SECTOR as u64);
            let kind = random.below(9);
            let value = if kind < 5 { index as u8 % 250 + 2 } else { 0 };
            match kind {
                0..5 => image.write_at(offset, &vec![value; bytes as usize]).unwrap(),
                5 => image.write_zeroes(offset, bytes, ZeroMode::Unmap).unwrap(),
                6 => image.write_zeroes(offset, bytes, ZeroMode::KeepAllocated).unwrap(),
                7 => image.discard(offset, bytes).unwrap(),
                _ => image.flush().unwrap(),
            }
            let sectors = if kind < 8 { (first as usize..(first + len) as usize).collect() } else { Vec::new() };
            Change { events: trace.events().len(), sectors, value, flush: kind == 8 }
        })
        .collect()
}

/// The values that a sector may have after a crash.
fn allowed(changes: &[Change], cut: usize, sector: usize, before: u8) -> Vec<u8> {
    let durable = changes.iter().rposition(|change| change.flush && change.events <= cut);
    let mut values = vec![before];
    let mut last_cut = 0;
    for (index, change) in changes.iter().enumerate() {
        if last_cut > cut {
            break;
        }
        last_cut = change.events;
        if change.sectors.contains(&sector) {
            // A discard may leave what was there.
            if durable.is_some_and(|durable| index < durable) && change.value != 0 {
                values.clear();
            }
            values.push(change.value);
        }
    }
    values
}

fn run(options: &CreateOptions, seed: u64, count: usize) {
    let mut file = MemBlock::default();
    let mut image = create(&mut file, FileId(0), None, options).unwrap();
    image.write_at(0, &vec![1; options.size as usize / 2]).unwrap();
    image.finish().unwrap();
    let (log, trace) = CrashLog::new(file);
    let mut image = Writer::open(log, FileId(0), None).unwrap();
    let changes = change(&mut image, &trace, &mut Random(seed), count);
    image.finish().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let by_qemu = Command::new("qemu-img").arg("--version").output().is_ok();
    if !by_qemu {
        eprintln!("SKIPPED: qemu-img is not installed, its check was not asked");
    }
    let mut states = 0;
    for state in trace.states(seed, 3) {
        let bytes = state.disk.as_bytes();
        check(bytes);
        if states % 97 == 0 && by_qemu {
            fs::write(dir.path().join("state"), bytes).unwrap();
            let checked =
                Command::new("qemu-img").args(["check", "-q"]).arg(dir.path().join("state")).output().unwrap();
            assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
        }
        if states % 5 == 0 {
            let cut = state.cut;
            let image = Writer::open(state.disk, FileId(0), None).unwrap();
            let mut sector_bytes = [0; SECTOR];
            for sector in 0..options.size as usize / SECTOR {
                image.read_at((sector * SECTOR) as u64, &mut sector_bytes).unwrap();
                let before = u8::from(sector < options.size as usize / SECTOR / 2);
                let values = allowed(&changes, cut, sector, before);
                assert!(
                    sector_bytes.iter().all(|byte| *byte == sector_bytes[0]) && values.contains(&sector_bytes[0]),
                    "cut {cut} sector {sector}: {} is none of {values:?}",
                    sector_bytes[0]
                );
            }
        }
        states += 1;
    }
    assert!(states > count, "{states}");
}

#[test]
fn changes_in_place() {
    let base = CreateOptions { size: 256 << 10, ..CreateOptions::default() };
    run(&CreateOptions { cluster_size: 4096, ..base.clone() }, 1, 60);
    run(&CreateOptions { cluster_size: 512, ..base.clone() }, 2, 60);
    run(&CreateOptions { cluster_size: 16384, extended_l2: true, ..base.clone() }, 3, 60);
    run(&CreateOptions { cluster_size: 2048, version: 2, ..base }, 4, 60);
}

/// Every table has to grow: L1, refcount blocks, the refcount table.
#[test]
fn growth_in_place() {
    let options = CreateOptions { cluster_size: 512, size: 64 << 10, ..CreateOptions::default() };
    let mut file = MemBlock::default();
    let mut image = create(&mut file, FileId(0), None, &options).unwrap();
    image.write_at(0, &[1; 64 << 10]).unwrap();
    image.finish().unwrap();
    let (log, trace) = CrashLog::new(file);
    let mut image = Writer::open(log, FileId(0), None).unwrap();
    for step in 1..=3u64 {
        image.set_size((64 << 10) + step * (5 << 20)).unwrap();
        image.write_at((64 << 10) + (step - 1) * (5 << 20), &vec![2; 3 << 20]).unwrap();
        image.flush().unwrap();
    }
    assert!(image.header().l1_entries > 300);
    image.finish().unwrap();
    let events = trace.events().len();
    let mut longest = 0;
    for state in trace.states(9, 1) {
        // All states around the flushes would take minutes.
        if state.cut % 7 == 0 || state.cut > events - 40 {
            check(state.disk.as_bytes());
            let header = Header::parse(state.disk.as_bytes()).unwrap();
            longest = longest.max(header.refcount_table_clusters);
            let image = Writer::open(state.disk, FileId(0), None).unwrap();
            let mut old = [0; 64 << 10];
            image.read_at(0, &mut old).unwrap();
            assert!(old.iter().all(|&byte| byte == 1));
        }
    }
    assert!(longest > 1);
}

#[test]
fn fresh_file_is_no_image_before_the_end() {
    let options = CreateOptions {
        cluster_size: 4096,
        size: 4 << 20,
        backing_file: Some(vec![b'n'; 1000]),
        backing_format: Some(b"raw".to_vec()),
        ..CreateOptions::default()
    };
    let (log, trace) = CrashLog::new(MemBlock::default());
    let mut image = create(log, FileId(0), None, &options).unwrap();
    image.write_at(0, &vec![3; 1 << 20]).unwrap();
    image.finish().unwrap();
    let (mut whole, mut none) = (0, 0);
    for state in trace.states(5, 4) {
        let bytes = state.disk.as_bytes();
        if bytes.starts_with(b"QFI\xfb") {
            check(bytes);
            let name_at = word(bytes, 8) as usize;
            assert_eq!(&bytes[name_at..name_at + 1000], [b'n'; 1000]);
            whole += 1;
        } else {
            none += 1;
        }
    }
    assert!(whole > 0 && none > 20, "{whole} {none}");
}

/// What an image says: size of the disk, backing file, contents.
type Picture = (u64, Option<Vec<u8>>, Option<Vec<u8>>, Vec<u8>);

fn picture(disk: MemBlock) -> Picture {
    let image = Image::open(disk, FileId(0), &OpenOptions::default()).unwrap();
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read_at(0, &mut bytes).unwrap();
    (image.virtual_size(), image.backing_file().map(Vec::from), image.backing_format().map(Vec::from), bytes)
}

/// Cuts an operation at every write and flush: the picture is the old one or the new one, in that order, and no cluster has
/// fewer counts than references.
fn cut_everywhere(file: MemBlock, what: &str, operation: impl FnOnce(&mut Writer<CrashLog>)) {
    let old = picture(file.clone());
    let (log, trace) = CrashLog::new(file);
    let mut image = Writer::open(log, FileId(0), None).unwrap();
    operation(&mut image);
    image.finish().unwrap();
    let events = trace.events().len();
    let states: Vec<_> = trace.states(7, 3).collect();
    let new = picture(states.iter().rev().find(|state| state.variant == 0).unwrap().disk.clone());
    assert_ne!(old, new, "{what}");
    let stride = states.len().div_ceil(300);
    for state in states.into_iter().step_by(stride) {
        check(state.disk.as_bytes());
        let (cut, variant) = (state.cut, state.variant);
        let seen = picture(state.disk);
        assert!(seen == old || seen == new, "{what}: cut {cut} of {events}, variant {variant}");
        assert!(cut < events || seen == new, "{what}: the end is durable");
    }
}

/// An image with data all over it, some of them compressed or zero.
fn image_with_data(options: &CreateOptions) -> MemBlock {
    let mut file = MemBlock::default();
    let mut image = create(&mut file, FileId(0), None, options).unwrap();
    let mut random = Random(options.cluster_size);
    let unit = options.cluster_size.max(4096);
    for value in 1..40u64 {
        let first = random.below(options.size / unit) * unit;
        image.write_at(first, &vec![value as u8; unit as usize]).unwrap();
        image.write_zeroes(random.below(options.size / unit) * unit, unit, ZeroMode::Unmap).unwrap();
    }
    image.finish().unwrap();
    file
}

#[test]
fn another_size_in_place() {
    let base = CreateOptions { size: 1 << 20, cluster_size: 512, ..CreateOptions::default() };
    for options in [
        base.clone(),
        CreateOptions { cluster_size: 4096, ..base.clone() },
        CreateOptions { version: 2, ..base.clone() },
        CreateOptions { cluster_size: 16384, extended_l2: true, ..base },
    ] {
        let file = image_with_data(&options);
        for (size, preallocation) in [
            (0, Preallocation::Off),
            (512, Preallocation::Off),
            (700 << 10, Preallocation::Off),
            ((1 << 20) - 512, Preallocation::Off),
            ((1 << 20) + 512, Preallocation::Off),
            (40 << 20, Preallocation::Off),
            (2 << 20, Preallocation::Metadata),
            (2 << 20, Preallocation::Falloc),
            (2 << 20, Preallocation::Full),
        ] {
            let what = format!("{} to {size} {preallocation:?}", options.cluster_size);
            cut_everywhere(file.clone(), &what, |image| {
                image.resize(size, Growth { preallocation, ..Growth::default() }).unwrap();
            });
        }
    }
}

#[test]
fn another_backing_file_in_place() {
    for (cluster_size, version) in [(65536, 3), (4096, 3), (512, 3), (65536, 2), (512, 2)] {
        let long = if cluster_size > 512 { vec![b'l'; 1000] } else { vec![b'l'; 200] };
        let options = CreateOptions {
            cluster_size,
            version,
            size: 1 << 20,
            backing_file: Some(b"short".to_vec()),
            backing_format: Some(b"raw".to_vec()),
            ..CreateOptions::default()
        };
        let mut file = image_with_data(&options);
        for (name, format) in
            [(&long[..], &b"qcow2"[..]), (b"../another", b"raw"), (b"", b""), (b"s", b"qcow2"), (&long[1..], b"")]
        {
            let what = format!("{cluster_size} {}", String::from_utf8_lossy(name));
            cut_everywhere(file.clone(), &what, |image| image.set_backing(name, format).unwrap());
            let mut image = Writer::open(&mut file, FileId(0), None).unwrap();
            image.set_backing(name, format).unwrap();
            image.finish().unwrap();
        }
    }
}

#[test]
fn emptied_in_place() {
    let base = CreateOptions { size: 256 << 10, cluster_size: 512, ..CreateOptions::default() };
    for options in [
        base.clone(),
        CreateOptions { cluster_size: 65536, ..base.clone() },
        CreateOptions { cluster_size: 16384, extended_l2: true, ..base.clone() },
        CreateOptions { version: 2, ..base },
    ] {
        for name in [None, Some(b"base".to_vec())] {
            let options = CreateOptions {
                backing_format: name.as_ref().map(|_| b"raw".to_vec()),
                backing_file: name,
                ..options.clone()
            };
            let mut file = image_with_data(&options);
            let (_, _, _, contents) = picture(file.clone());
            // A second time it is empty already; and tables that have moved make it harder.
            for round in 0..3 {
                if round == 2 && options.cluster_size < 65536 {
                    continue;
                }
                let (log, trace) = CrashLog::new(file.clone());
                let mut image = Writer::open(log, FileId(0), None).unwrap();
                image.make_empty().unwrap();
                image.finish().unwrap();
                let states: Vec<_> = trace.states(3, 2).collect();
                let stride = states.len().div_ceil(200);
                for state in states.into_iter().step_by(stride) {
                    check(state.disk.as_bytes());
                    let image = Image::open(state.disk, FileId(0), &OpenOptions::default()).unwrap();
                    let backing = MemBlock::from(contents.clone());
                    let chain = Overlay::new(vec![Box::new(image), Box::new(backing)]);
                    let mut seen = vec![0; chain.size() as usize];
                    chain.read_at(0, &mut seen).unwrap();
                    assert!(seen[..contents.len()] == contents, "cut {}", state.cut);
                }
                let mut image = Writer::open(&mut file, FileId(0), None).unwrap();
                image.make_empty().unwrap();
                if round == 0 {
                    // L1 table and refcount table take other places.
                    image.set_size(1 << 20).unwrap();
                }
                image.finish().unwrap();
            }
        }
    }
}

/// A file that is read by one and written by another.
struct Shared<D>(Arc<Mutex<D>>);

impl<D> Clone for Shared<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D> Shared<D> {
    fn new(disk: D) -> Self {
        Self(Arc::new(Mutex::new(disk)))
    }

    fn disk(&self) -> MutexGuard<'_, D> {
        self.0.lock().unwrap()
    }
}

impl<D: BlockRead> BlockRead for Shared<D> {
    fn size(&self) -> u64 {
        self.disk().size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk().read_at(offset, buf)
    }

    fn limits(&self) -> Limits {
        self.disk().limits()
    }
}

impl<D: BlockWrite> BlockWrite for Shared<D> {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        self.disk().write_at(offset, buf)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.disk().write_zeroes(offset, len, mode)
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.disk().discard(offset, len)
    }

    fn set_size(&mut self, size: u64) -> Result<()> {
        self.disk().set_size(size)
    }

    fn flush(&mut self) -> Result<()> {
        self.disk().flush()
    }
}

/// Repairs all that can be.
fn repair<D: BlockWrite>(disk: &Shared<D>) {
    let image = Image::open(disk.clone(), FileId(0), &OpenOptions::default()).unwrap();
    let all = Repair { leaks: true, corruptions: true };
    image.repair(&mut disk.clone(), all, &mut |_| ()).unwrap();
}

/// Kinds of damage to the refcounts of an image, which don't change what it holds.
fn damaged(file: &MemBlock, kind: &str) -> MemBlock {
    let header = Header::parse(file.as_bytes()).unwrap();
    let mut bytes = file.as_bytes().to_vec();
    let block = word(&bytes, header.refcount_table_offset.0) as usize;
    let cluster = header.geometry.cluster_size() as usize;
    let clusters = bytes.len().div_ceil(cluster).min(cluster / 2);
    let mut change = |number: usize, by: &dyn Fn(u16) -> u16| {
        let at = block + number * 2;
        let count = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        bytes[at..at + 2].copy_from_slice(&by(count).to_be_bytes());
    };
    match kind {
        "leaks" => (0..clusters).step_by(3).for_each(|number| change(number, &|count| count + 1)),
        "too few" => (4..clusters).step_by(3).for_each(|number| change(number, &|count| count.saturating_sub(1))),
        "both" => (4..clusters).for_each(|number| change(number, &|count| count.wrapping_add(number as u16) % 3)),
        "lost block" => {
            let at = header.refcount_table_offset.0 as usize;
            bytes[at..at + 8].fill(0);
        }
        _ => {
            let l1 = header.l1_offset.0 as usize;
            (0..header.l1_entries as usize).for_each(|index| bytes[l1 + index * 8] ^= 0x80);
        }
    }
    MemBlock::from(bytes)
}

/// A repair that a crash ends at any write or flush has changed nothing of what the image holds, and can be done again.
#[test]
fn repaired_in_place() {
    let have_qemu = Command::new("qemu-img").arg("--version").output().is_ok();
    let dir = tempfile::tempdir().unwrap();
    let base = CreateOptions { size: 128 << 10, cluster_size: 512, ..CreateOptions::default() };
    for options in [base.clone(), CreateOptions { cluster_size: 16384, size: 1 << 20, extended_l2: true, ..base }] {
        let sound = image_with_data(&options);
        let contents = picture(sound.clone());
        for kind in ["leaks", "too few", "both", "lost block", "copied flags"] {
            let (log, trace) = CrashLog::new(damaged(&sound, kind));
            repair(&Shared::new(log));
            let events = trace.events().len();
            assert!(events > 1, "{kind}: nothing was repaired");
            let states: Vec<_> = trace.states(5, 3).collect();
            let stride = states.len().div_ceil(150);
            for (number, state) in states.into_iter().step_by(stride).enumerate() {
                let what = format!("{kind}: cut {} of {events}, variant {}", state.cut, state.variant);
                assert!(picture(state.disk.clone()) == contents, "{what}");
                let again = Shared::new(state.disk);
                repair(&again);
                let disk = again.disk().clone();
                check(disk.as_bytes());
                assert!(picture(disk.clone()) == contents, "{what}, repaired again");
                if have_qemu && number % 29 == 0 {
                    let path = dir.path().join("state");
                    fs::write(&path, disk.as_bytes()).unwrap();
                    let judged = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output().unwrap();
                    assert!(judged.status.success(), "{what}: {}", String::from_utf8_lossy(&judged.stdout));
                }
            }
        }
    }
}
