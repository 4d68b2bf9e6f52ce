//! What a crash leaves in the middle of changing snapshots, bitmaps or options: the old state or the new one, and at worst
//! clusters that nobody uses.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::{have_qemu, run};
use instar_blockio::test::{CrashLog, CrashState, Faults, Faulty, Op};
use instar_blockio::{BlockRead, BlockWrite, ErrorKind, FileId, MemBlock, ZeroMode};
use instar_qcow2::{
    AmendOptions, Bitmaps, CreateOptions, Error, GuestOffset, Header, Image, L1Entry, L2Entry, L2Format, NewSnapshot,
    OpenOptions, Result, SnapshotSelector, Writer, create,
};

fn word(bytes: &[u8], at: u64) -> u64 {
    bytes.get(at as usize..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u64::from_be_bytes(*word))
}

/// How often each cluster is referred to, and the places that the active state names, with their copied flags.
struct References {
    cluster: u64,
    counts: BTreeMap<u64, u64>,
    flags: Vec<(u64, bool)>,
}

impl References {
    fn add(&mut self, at: u64, len: u64) {
        for cluster in at / self.cluster..(at + len).div_ceil(self.cluster) {
            *self.counts.entry(cluster).or_default() += 1;
        }
    }

    fn tree(&mut self, bytes: &[u8], header: &Header, l1: u64, entries: u64, active: bool) {
        let (geometry, format) = (header.geometry, L2Format::new(header));
        self.add(l1, entries * 8);
        for index in 0..entries {
            let entry = L1Entry::decode(word(bytes, l1 + index * 8));
            let Some(l2) = entry.table else { continue };
            self.add(l2.0, 1);
            if active {
                self.flags.push((l2.0, entry.copied));
            }
            for slot in 0..geometry.l2_entries() {
                let at = l2.0 + slot * geometry.l2_entry_size();
                let bitmap = if geometry.extended_l2() { word(bytes, at + 8) } else { 0 };
                let guest = GuestOffset(index * geometry.l2_span() + slot * self.cluster);
                match format.decode(guest, word(bytes, at), bitmap).unwrap() {
                    L2Entry::Compressed { host, len } => self.add(host.0, len),
                    L2Entry::Cluster { host: Some(host), copied, .. } => {
                        self.add(host.0, 1);
                        if active {
                            self.flags.push((host.0, copied));
                        }
                    }
                    L2Entry::Cluster { .. } => (),
                }
            }
        }
    }
}

/// The count of a cluster, of any width.
fn count(bytes: &[u8], header: &Header, cluster: u64) -> u64 {
    let geometry = header.geometry;
    let (bits, per_block) = (u64::from(geometry.refcount_bits()), geometry.refcounts_per_block());
    let block = word(bytes, header.refcount_table_offset.0 + cluster / per_block * 8);
    let bit = cluster % per_block * bits;
    let inside = (cluster / per_block) < u64::from(header.refcount_table_clusters) * geometry.cluster_size() / 8;
    match block {
        _ if !inside => 0,
        0 => 0,
        block if bits < 8 => {
            let byte = bytes.get((block + bit / 8) as usize).copied().unwrap_or(0);
            u64::from(byte) >> (bit % 8) & ((1 << bits) - 1)
        }
        block => word(bytes, block + bit / 8) >> (64 - bits),
    }
}

fn check(bytes: &[u8], what: &str) {
    let header = Header::parse(bytes).unwrap();
    let cluster = header.geometry.cluster_size();
    let mut references = References { cluster, counts: BTreeMap::new(), flags: Vec::new() };
    references.add(0, 1);
    references.tree(bytes, &header, header.l1_offset.0, header.l1_entries.into(), true);
    let table = header.refcount_table_offset.0;
    let table_len = u64::from(header.refcount_table_clusters) * cluster;
    references.add(table, table_len);
    (0..table_len / 8).map(|index| word(bytes, table + index * 8)).filter(|&at| at != 0).for_each(|at| {
        references.add(at, 1);
    });
    let image = open(bytes);
    let snapshots = image.snapshots().unwrap();
    for snapshot in &snapshots {
        references.tree(bytes, &header, snapshot.l1_offset.0, snapshot.l1_entries.into(), false);
    }
    let names = snapshots.iter().map(|snapshot| (72 + snapshot.id.len() + snapshot.name.len()) as u64);
    references.add(header.snapshots_offset.0, names.sum::<u64>().min(cluster));
    if let Some(directory) = image.extensions().bitmaps {
        references.add(directory.offset.0, directory.len);
        let mut at = directory.offset.0;
        while at < directory.offset.0 + directory.len {
            let (table, entries) = (word(bytes, at), word(bytes, at + 8) >> 32);
            references.add(table, entries * 8);
            for index in 0..entries {
                let place = word(bytes, table + index * 8) & !0x1ff;
                if place != 0 {
                    references.add(place, 1);
                }
            }
            let name_len = word(bytes, at + 16) >> 32 & 0xffff;
            at += (24 + name_len).next_multiple_of(8);
        }
    }
    for (&cluster, &wanted) in &references.counts {
        let found = count(bytes, &header, cluster);
        assert!(found >= wanted, "{what}: cluster {cluster} has a count of {found} and {wanted} references");
    }
    for (at, copied) in references.flags {
        assert_eq!(count(bytes, &header, at / cluster) == 1, copied, "{what}: copied flag of cluster {}", at / cluster);
    }
}

fn open(bytes: &[u8]) -> Image<MemBlock> {
    Image::open(MemBlock::from(bytes.to_vec()), FileId(0), &OpenOptions::default()).unwrap()
}

/// All that must be old or new as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    contents: Vec<u8>,
    /// Names and contents.
    snapshots: Vec<(Vec<u8>, Vec<u8>)>,
    /// Names, granularities, flags, bits.
    bitmaps: Vec<(Vec<u8>, u8, u32, Vec<u8>)>,
    backing: Option<Vec<u8>>,
    format: Option<Vec<u8>>,
    unknown: Vec<Vec<u8>>,
}

fn see(bytes: &[u8]) -> Seen {
    let image = open(bytes);
    let contents = |image: &Image<MemBlock>| {
        let mut contents = vec![0; image.virtual_size() as usize];
        image.read_at(0, &mut contents).unwrap();
        contents
    };
    let snapshots = image.snapshots().unwrap().into_iter().map(|snapshot| {
        let mut image = open(bytes);
        image.select_snapshot(SnapshotSelector::IdOrName(&snapshot.id)).unwrap();
        let mut shown = contents(&image);
        shown.truncate(snapshot.virtual_size as usize);
        (snapshot.name, shown)
    });
    let bitmaps = image.bitmaps().unwrap().into_iter().map(|info| {
        let mut bits = vec![0; info.len as usize];
        image.read_bitmap(&info, 0, &mut bits).unwrap();
        (info.name.clone(), info.granularity_bits, info.flags.bits(), bits)
    });
    Seen {
        contents: contents(&image),
        snapshots: snapshots.collect(),
        bitmaps: bitmaps.collect(),
        backing: image.backing_file().map(<[u8]>::to_vec),
        format: image.backing_format().map(<[u8]>::to_vec),
        unknown: image.extensions().unknown.iter().map(|extension| extension.data.clone()).collect(),
    }
}

/// Makes an image, lets `prepare` work on it, and judges every state in which a crash could leave it during `change`.
fn crash(
    options: &CreateOptions,
    prepare: impl FnOnce(&mut Writer<&mut MemBlock>),
    change: impl FnOnce(&mut Writer<CrashLog>, &mut Bitmaps) -> Result<()>,
) {
    let mut file = MemBlock::default();
    create(&mut file, FileId(0), None, options).unwrap().finish().unwrap();
    let mut image = Writer::open(&mut file, FileId(0), None).unwrap();
    prepare(&mut image);
    image.finish().unwrap();
    check(file.as_bytes(), "before");
    let before = see(file.as_bytes());
    let (log, trace) = CrashLog::new(file);
    let mut image = Writer::open(log, FileId(0), None).unwrap();
    let mut bitmaps = image.load_bitmaps().unwrap();
    change(&mut image, &mut bitmaps).unwrap();
    image.store_bitmaps(&mut bitmaps).unwrap();
    image.finish().unwrap();
    let states: Vec<CrashState> = trace.states(7, 4).collect();
    let after = see(states.iter().rfind(|state| state.variant == 0).unwrap().disk.as_bytes());
    let dir = tempfile::tempdir().unwrap();
    let by_qemu = have_qemu() && options.backing_file.is_none();
    let (mut old, mut new) = (0, 0);
    for (number, state) in states.iter().enumerate() {
        let bytes = state.disk.as_bytes();
        let what = format!("cut {} variant {}", state.cut, state.variant);
        check(bytes, &what);
        let seen = see(bytes);
        // Each part is as it was or as it is to be.
        assert!([&before.contents, &after.contents].contains(&&seen.contents), "{what}: contents");
        assert!([&before.snapshots, &after.snapshots].contains(&&seen.snapshots), "{what}: snapshots");
        assert!(
            [&before.bitmaps, &after.bitmaps].contains(&&seen.bitmaps) || seen.bitmaps.is_empty(),
            "{what}: bitmaps"
        );
        assert_eq!((&seen.backing, &seen.format), (&before.backing, &before.format), "{what}");
        assert_eq!(seen.unknown, before.unknown, "{what}");
        old += usize::from(seen == before);
        new += usize::from(seen == after);
        // qemu-img 10.0.2 loses the snapshots of an image with bitmaps when it repairs it.
        if by_qemu && number % 61 == 0 && seen.bitmaps.is_empty() {
            repair(dir.path(), bytes, &seen, &what);
        }
    }
    assert!(states.len() > 5 && old > 0 && new > 0, "{} {old} {new}", states.len());
}

/// What qemu-img finds is leaked clusters at worst; nothing is lost by their repair.
fn repair(dir: &Path, bytes: &[u8], seen: &Seen, what: &str) {
    fs::write(dir.join("state"), bytes).unwrap();
    let found = run(dir, "qemu-img", &["check", "state"]);
    let text = String::from_utf8_lossy(&found.stdout).into_owned() + &String::from_utf8_lossy(&found.stderr);
    assert!(matches!(found.status.code(), Some(0 | 3)), "{what}: {text}");
    let done = run(dir, "qemu-img", &["check", "-r", "leaks", "state"]);
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(0), "{what}: {text}");
    let repaired = Seen { bitmaps: Vec::new(), ..see(&fs::read(dir.join("state")).unwrap()) };
    assert!(repaired == *seen, "{what}: after the repair");
}

fn base(cluster_size: u64) -> CreateOptions {
    CreateOptions { cluster_size, size: 256 << 10, ..CreateOptions::default() }
}

fn snapshot(image: &mut Writer<&mut MemBlock>, name: &str) {
    image.create_snapshot(&NewSnapshot { name: name.as_bytes().to_vec(), date_sec: 1, date_nsec: 2 }).unwrap();
}

/// Data, zeroes that keep their place, zeroes without one, a gap; then a snapshot, and other data.
fn history(image: &mut Writer<&mut MemBlock>) {
    image.write_at(0, &[1; 100 << 10]).unwrap();
    image.write_zeroes(16 << 10, 8 << 10, ZeroMode::KeepAllocated).unwrap();
    image.write_zeroes(32 << 10, 8 << 10, ZeroMode::Unmap).unwrap();
    snapshot(image, "first");
    image.write_at(8 << 10, &[2; 30 << 10]).unwrap();
    image.write_at(200 << 10, &[3; 20 << 10]).unwrap();
    image.flush().unwrap();
}

fn named(name: &str) -> SnapshotSelector<'_> {
    SnapshotSelector::Exact { id: None, name: Some(name.as_bytes()) }
}

#[test]
fn making_a_snapshot() {
    let new = || NewSnapshot { name: b"second".to_vec(), date_sec: 5, date_nsec: 6 };
    for options in [base(4096), base(512), CreateOptions { extended_l2: true, ..base(16384) }] {
        crash(&options, history, |image, _| image.create_snapshot(&new()));
    }
    crash(&CreateOptions { refcount_bits: 2, ..base(4096) }, history, |image, _| image.create_snapshot(&new()));
}

#[test]
fn applying_a_snapshot() {
    for options in [base(4096), base(512), CreateOptions { version: 2, ..base(4096) }] {
        crash(&options, history, |image, _| image.apply_snapshot(named("first")));
    }
}

#[test]
fn applying_a_snapshot_with_a_large_table() {
    // 128 entries of 32 KiB each: the table has more than one sector.
    let options = CreateOptions { size: 4 << 20, ..base(512) };
    let prepare = |image: &mut Writer<&mut MemBlock>| {
        image.write_at(0, &[1; 5000]).unwrap();
        image.write_at(4 << 19, &[2; 5000]).unwrap();
        snapshot(image, "first");
        image.write_at(0, &[3; 1000]).unwrap();
        image.write_at(4 << 19, &[4; 1000]).unwrap();
        image.write_at(3 << 20, &[5; 1000]).unwrap();
        image.flush().unwrap();
    };
    crash(&options, prepare, |image, _| image.apply_snapshot(named("first")));
}

#[test]
fn applying_a_snapshot_of_another_size() {
    let prepare = |image: &mut Writer<&mut MemBlock>| {
        history(image);
        image.set_size(400 << 10).unwrap();
        image.write_at(300 << 10, &[9; 100 << 10]).unwrap();
        image.flush().unwrap();
    };
    crash(&base(4096), prepare, |image, _| image.apply_snapshot(named("first")));
}

#[test]
fn deleting_a_snapshot() {
    for options in [base(4096), base(512), CreateOptions { extended_l2: true, ..base(16384) }] {
        let prepare = |image: &mut Writer<&mut MemBlock>| {
            history(image);
            snapshot(image, "second");
            image.write_at(0, &[7; 4096]).unwrap();
            image.flush().unwrap();
        };
        crash(&options, prepare, |image, _| image.delete_snapshot(named("first")));
    }
    crash(&base(4096), history, |image, _| image.delete_snapshot(named("first")));
}

/// A change that fails leaves what was there, with at most a request or two before the failure to tell of it: whatever fails, and
/// however often.
#[test]
fn changes_of_snapshots_that_fail() {
    let mut file = MemBlock::default();
    create(&mut file, FileId(0), None, &base(4096)).unwrap().finish().unwrap();
    let mut image = Writer::open(&mut file, FileId(0), None).unwrap();
    history(&mut image);
    image.finish().unwrap();
    let before = see(file.as_bytes());
    type Change = fn(&mut Writer<Faulty<&mut MemBlock>>) -> Result<()>;
    let changes: [Change; 3] = [
        |image| image.create_snapshot(&NewSnapshot { name: b"second".to_vec(), date_sec: 5, date_nsec: 6 }),
        |image| image.apply_snapshot(named("first")),
        |image| image.delete_snapshot(named("first")),
    ];
    for change in changes {
        let attempt = |plan: &dyn Fn(&Faults)| {
            let mut file = file.clone();
            let (faulty, faults) = Faulty::new(&mut file);
            let mut image = Writer::open(faulty, FileId(0), None).unwrap();
            plan(&faults);
            let done = change(&mut image);
            let counts = [Op::Read, Op::Write, Op::Flush].map(|op| (op, faults.count(op)));
            faults.clear();
            // After a failure, too, the image can be used, unless its header could not be written.
            let used = image.write_at(64 << 10, &[1; 512]).and_then(|()| image.flush());
            assert!(used.is_ok() || done.is_err());
            drop(image);
            (done, counts, file)
        };
        let (done, counts, after) = attempt(&|_| ());
        done.unwrap();
        check(after.as_bytes(), "without a fault");
        let after = see(after.as_bytes());
        for (op, count) in counts {
            for n in 0..count {
                for lasting in [false, true] {
                    let (done, _, file) = attempt(&|faults| match lasting {
                        true => faults.fail_from(op, n, ErrorKind::Io),
                        false => faults.fail_nth(op, n, ErrorKind::Io),
                    });
                    let what = format!("{op:?} {n} {lasting}: {done:?}");
                    check(file.as_bytes(), &what);
                    let seen = see(file.as_bytes());
                    assert!([&before.contents, &after.contents].contains(&&seen.contents), "{what}: contents");
                    assert!([&before.snapshots, &after.snapshots].contains(&&seen.snapshots), "{what}: snapshots");
                    assert!(done.is_err() || seen.snapshots == after.snapshots, "{what}");
                }
            }
        }
        // No room for what is written anew.
        let (done, _, full) = attempt(&|faults| faults.limit_space(file.as_bytes().len() as u64));
        check(full.as_bytes(), "no room");
        assert_eq!(
            see(full.as_bytes()).snapshots,
            if done.is_ok() { after.snapshots } else { before.snapshots.clone() }
        );
    }
}

/// Counts of one bit can't tell of two owners.
#[test]
fn a_snapshot_that_can_not_be_counted() {
    let mut file = MemBlock::default();
    let options = CreateOptions { refcount_bits: 1, ..base(4096) };
    create(&mut file, FileId(0), None, &options).unwrap().finish().unwrap();
    let mut image = Writer::open(&mut file, FileId(0), None).unwrap();
    image.write_at(0, &[1; 100 << 10]).unwrap();
    image.finish().unwrap();
    let before = file.as_bytes().to_vec();
    let mut image = Writer::open(&mut file, FileId(0), None).unwrap();
    let done = image.create_snapshot(&NewSnapshot { name: b"s".to_vec(), date_sec: 5, date_nsec: 6 });
    assert!(matches!(done, Err(Error::RefcountOverflow(_))), "{done:?}");
    image.finish().unwrap();
    assert!(file.as_bytes() == before);
}

/// More runs of clusters than are remembered become free: all their space is given back.
#[test]
fn deleting_a_snapshot_in_many_pieces() {
    const CLUSTERS: u64 = 140_000;
    let mut file = MemBlock::default();
    let options = CreateOptions { size: CLUSTERS * 512, ..base(512) };
    create(&mut file, FileId(0), None, &options).unwrap().finish().unwrap();
    let mut image = Writer::open(&mut file, FileId(0), None).unwrap();
    image.write_at(0, &vec![1; CLUSTERS as usize * 512]).unwrap();
    snapshot(&mut image, "first");
    // Every other cluster is the snapshot's alone from now on.
    for cluster in (0..CLUSTERS).step_by(2) {
        image.write_at(cluster * 512, &[2; 512]).unwrap();
    }
    image.finish().unwrap();
    let mut image = Writer::open(&mut file, FileId(0), None).unwrap();
    image.delete_snapshot(named("first")).unwrap();
    image.finish().unwrap();
    check(file.as_bytes(), "afterwards");
    let held = file.as_bytes().chunks(512).filter(|sector| sector.iter().all(|&byte| byte == 1)).count();
    assert_eq!(held as u64, CLUSTERS / 2, "what the snapshot alone used is zero now");
    assert!(see(file.as_bytes()).contents.chunks(1024).all(|pair| pair[..512] == [2; 512] && pair[512..] == [1; 512]));
}

/// Two bitmaps, one with bits.
fn with_bitmaps(image: &mut Writer<&mut MemBlock>) {
    history(image);
    let mut all = image.load_bitmaps().unwrap();
    image.add_new_bitmap(&mut all, b"one", 12).unwrap();
    image.add_new_bitmap(&mut all, b"two", 9).unwrap();
    image.merge_bits(&mut all, b"one", 12, 2, &[0x81]).unwrap();
    image.store_bitmaps(&mut all).unwrap();
}

#[test]
fn changing_bitmaps() {
    crash(&base(4096), history, |image, all| image.add_new_bitmap(all, b"one", 12));
    crash(&base(4096), with_bitmaps, |image, all| image.merge_bitmap(all, b"one", b"two"));
    crash(&base(512), with_bitmaps, |_, all| all.clear(b"one"));
    crash(&base(4096), with_bitmaps, |_, all| all.set_enabled(b"two", false));
    crash(&base(8192), with_bitmaps, |image, _| {
        image.create_snapshot(&NewSnapshot { name: b"second".to_vec(), date_sec: 5, date_nsec: 6 })
    });
}

#[test]
fn removing_a_bitmap() {
    // The bitmap is gone before the others are stored anew, so its absence alone is a state as well.
    crash(
        &base(4096),
        |image| {
            let mut all = image.load_bitmaps().unwrap();
            image.add_new_bitmap(&mut all, b"one", 12).unwrap();
            image.merge_bits(&mut all, b"one", 12, 2, &[0x81]).unwrap();
            image.store_bitmaps(&mut all).unwrap();
        },
        |image, all| image.remove_bitmap(all, b"one"),
    );
}

fn amend(options: &AmendOptions) -> impl FnOnce(&mut Writer<CrashLog>, &mut Bitmaps) -> Result<()> + '_ {
    |image, all| image.amend(options, all, &mut |_, _| {})
}

#[test]
fn changing_the_refcount_width() {
    for bits in [64, 8, 4] {
        let options = AmendOptions { refcount_bits: Some(bits), ..AmendOptions::default() };
        crash(&base(4096), history, amend(&options));
        crash(&base(512), history, amend(&options));
    }
    let options = AmendOptions { refcount_bits: Some(1), ..AmendOptions::default() };
    crash(&base(4096), |image| image.write_at(0, &[1; 99 << 10]).unwrap(), amend(&options));
}

#[test]
fn changing_the_version() {
    let (down, up) = ((2, 3), (3, 2));
    for (from, to) in [down, up].map(|(to, from)| (from, to)) {
        let options = AmendOptions { version: Some(to), ..AmendOptions::default() };
        crash(&CreateOptions { version: from, ..base(4096) }, history, amend(&options));
        // The feature names and a long name fill several sectors.
        let backed = CreateOptions {
            version: from,
            backing_file: Some(vec![b'n'; 900]),
            backing_format: Some(b"raw".to_vec()),
            ..base(8192)
        };
        crash(&backed, |image| image.write_at(0, &[1; 64 << 10]).unwrap(), amend(&options));
    }
    // Bitmaps go with the version that vouches for them.
    let options = AmendOptions { version: Some(2), ..AmendOptions::default() };
    crash(
        &base(4096),
        |image| {
            history(image);
            let mut all = image.load_bitmaps().unwrap();
            image.add_new_bitmap(&mut all, b"one", 12).unwrap();
            image.store_bitmaps(&mut all).unwrap();
        },
        amend(&options),
    );
}

#[test]
fn lazy_refcounts() {
    let options = AmendOptions { lazy_refcounts: Some(true), ..AmendOptions::default() };
    crash_header(&options, |header| header.compatible.bits(), 0, 1);
}

/// An amendment that shows in the header alone.
fn crash_header(options: &AmendOptions, field: impl Fn(&Header) -> u64, old: u64, new: u64) {
    let mut file = MemBlock::default();
    create(&mut file, FileId(0), None, &base(65536)).unwrap().finish().unwrap();
    let (log, trace) = CrashLog::new(file);
    let mut image = Writer::open(log, FileId(0), None).unwrap();
    image.amend(options, &mut Bitmaps::default(), &mut |_, _| {}).unwrap();
    image.finish().unwrap();
    let seen: Vec<u64> = trace
        .states(3, 4)
        .map(|state| {
            check(state.disk.as_bytes(), "header");
            field(&Header::parse(state.disk.as_bytes()).unwrap())
        })
        .collect();
    assert!(seen.iter().all(|value| [old, new].contains(value)) && seen.last() == Some(&new), "{seen:?}");
}
