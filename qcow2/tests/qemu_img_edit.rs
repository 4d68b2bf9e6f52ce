//! Snapshots, bitmaps and amended options: the same steps by this crate and by qemu-img on two copies of an image give the
//! same guest contents, snapshots and bitmaps, and `qemu-img check` finds nothing.

mod common;

use std::fs;
use std::path::Path;

use common::{Random, have_qemu, must, run};
use instar_blockio::{BlockRead, BlockWrite, FileId, MemBlock, ZeroMode};
use instar_qcow2::{AmendOptions, Bitmaps, Error, Image, NewSnapshot, OpenOptions, SnapshotSelector, Writer};

type Change = Box<dyn FnOnce(&mut Writer<&mut MemBlock>, &mut Bitmaps) -> Result<(), Error>>;

/// Changes the image in a file; stores its bitmaps anew as QEMU does when it closes an image.
fn edit(path: &Path, change: Change) -> Result<(), Error> {
    let mut file = MemBlock::from(fs::read(path).unwrap());
    let mut writer = Writer::open(&mut file, FileId(0), None)?;
    let mut bitmaps = writer.load_bitmaps()?;
    let done = change(&mut writer, &mut bitmaps);
    writer.store_bitmaps(&mut bitmaps)?;
    writer.finish()?;
    fs::write(path, file.as_bytes()).unwrap();
    done
}

fn open(bytes: Vec<u8>) -> Image<MemBlock> {
    Image::open(MemBlock::from(bytes), FileId(0), &OpenOptions::default()).unwrap()
}

/// Id, name, disk size, instruction count.
type Listed = (Vec<u8>, Vec<u8>, u64, Option<u64>);

/// Snapshots without their places and times.
fn snapshots(image: &Image<MemBlock>) -> Vec<Listed> {
    let all = image.snapshots().unwrap();
    all.into_iter().map(|one| (one.id, one.name, one.virtual_size, one.icount)).collect()
}

type Bits = (Vec<u8>, u8, u32, Vec<u8>);

fn bitmaps(image: &Image<MemBlock>) -> Vec<Bits> {
    let all = image.bitmaps().unwrap();
    all.into_iter()
        .map(|info| {
            let mut bits = vec![0; info.len as usize];
            image.read_bitmap(&info, 0, &mut bits).unwrap();
            (info.name.clone(), info.granularity_bits, info.flags.bits(), bits)
        })
        .collect()
}

fn contents(image: &Image<MemBlock>) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Compares the two copies; whether it makes sense to go on.
fn compare(dir: &Path, what: &str) -> bool {
    let (ours, theirs) = (open(fs::read(dir.join("a")).unwrap()), open(fs::read(dir.join("b")).unwrap()));
    assert_eq!(ours.virtual_size(), theirs.virtual_size(), "{what}");
    assert!(contents(&ours) == contents(&theirs), "{what}: contents");
    assert_eq!(snapshots(&ours), snapshots(&theirs), "{what}");
    assert_eq!(bitmaps(&ours), bitmaps(&theirs), "{what}");
    let fields = |image: &Image<MemBlock>| {
        let header = image.header();
        (header.version, header.geometry, header.incompatible, header.compatible, header.autoclear)
    };
    assert_eq!(fields(&ours), fields(&theirs), "{what}");
    for snapshot in ours.snapshots().unwrap() {
        let select = |file: &str| {
            let mut image = open(fs::read(dir.join(file)).unwrap());
            image.select_snapshot(SnapshotSelector::IdOrName(&snapshot.id)).unwrap();
            contents(&image)
        };
        assert!(select("a") == select("b"), "{what}: contents of snapshot");
    }
    let checked = run(dir, "qemu-img", &["check", "-f", "qcow2", "a"]);
    let text = String::from_utf8_lossy(&checked.stdout).into_owned() + &String::from_utf8_lossy(&checked.stderr);
    let theirs = run(dir, "qemu-img", &["check", "-f", "qcow2", "b"]);
    let expected = String::from_utf8_lossy(&theirs.stdout).into_owned() + &String::from_utf8_lossy(&theirs.stderr);
    if expected.contains("leaked") {
        // A snapshot that qemu-img gave up half-way, as some count could not rise.
        assert!(text.starts_with("No errors"), "{what}: {text}");
        return false;
    }
    assert_eq!(text, expected, "{what}");
    true
}

fn has_bitmaps(dir: &Path) -> bool {
    !open(fs::read(dir.join("a")).unwrap()).bitmaps().unwrap().is_empty()
}

/// One step on both copies.
fn step(dir: &Path, random: &mut Random, number: u64) -> String {
    let name = format!("s{}", random.below(5));
    let bitmap = format!("b{}", random.below(3));
    let other = format!("b{}", random.below(3));
    let size = 1 << 20;
    let pairs: (Vec<String>, Change) = match random.below(12) {
        0..=2 => {
            let at = random.below(size / 4096) * 4096;
            let len = (1 + random.below(40)) * 4096;
            let len = len.min(size - at);
            let command = match random.below(4) {
                0 => format!("write -z {at} {len}"),
                1 => format!("discard {at} {len}"),
                _ => format!("write -P {} {at} {len}", number % 250 + 1),
            };
            // The same program on both: only what this test is about may differ.
            for file in ["a", "b"] {
                run(dir, "qemu-io", &["-f", "qcow2", "-c", &command, file]);
            }
            return command;
        }
        3 | 4 => (
            vec!["snapshot".into(), "-c".into(), name.clone()],
            Box::new(move |writer, _| {
                let new = NewSnapshot { name: name.into_bytes(), date_sec: 7, date_nsec: 8 };
                writer.create_snapshot(&new)
            }),
        ),
        5 | 6 => (
            vec!["snapshot".into(), "-d".into(), name.clone()],
            Box::new(move |writer, _| {
                writer.delete_snapshot(SnapshotSelector::Exact { id: None, name: Some(name.as_bytes()) })
            }),
        ),
        7 => (
            vec!["snapshot".into(), "-a".into(), name.clone()],
            Box::new(move |writer, _| {
                match writer.extensions().bitmaps {
                    None => writer.apply_snapshot(SnapshotSelector::IdOrName(name.as_bytes())),
                    // qemu-img does not go back under bitmaps.
                    Some(_) => Err(Error::SnapshotNotFound),
                }
            }),
        ),
        8 => {
            // qemu-img leaks the bitmaps that a downgrade takes away.
            let compat = ["v3", "v2"][random.below(if has_bitmaps(dir) { 1 } else { 2 }) as usize];
            let bits = random.pick(&[16, 16, 16, 8, 32, 64, 4]);
            (
                vec!["amend".into(), "-o".into(), format!("compat={compat},refcount_bits={bits}")],
                Box::new(move |writer, all| {
                    let version = Some(if compat == "v2" { 2 } else { 3 });
                    let options = AmendOptions { version, refcount_bits: Some(bits), ..AmendOptions::default() };
                    writer.amend(&options, all, &mut |done, total| assert!(done <= total, "{done} of {total}"))
                }),
            )
        }
        9 => (
            vec!["bitmap".into(), "--add".into(), "-g".into(), "4k".into(), bitmap.clone()],
            Box::new(move |writer, all| writer.add_new_bitmap(all, bitmap.as_bytes(), 12)),
        ),
        10 => (
            vec!["bitmap".into(), "--remove".into(), bitmap.clone()],
            Box::new(move |writer, all| writer.remove_bitmap(all, bitmap.as_bytes())),
        ),
        _ => (
            vec!["bitmap".into(), "--merge".into(), other.clone(), bitmap.clone()],
            Box::new(move |writer, all| writer.merge_bitmap(all, other.as_bytes(), bitmap.as_bytes())),
        ),
    };
    let (words, change) = pairs;
    let mut args: Vec<&str> = words.iter().map(String::as_str).collect();
    let place = if args[0] == "bitmap" { args.len() - 1 } else { args.len() };
    args.splice(place..place, ["-f", "qcow2", "b"]);
    let theirs = run(dir, "qemu-img", &args);
    let ours = edit(&dir.join("a"), change);
    let text = String::from_utf8_lossy(&theirs.stderr);
    assert_eq!(ours.is_ok(), theirs.status.success(), "{args:?}: {ours:?} against {text}");
    args.join(" ")
}

/// How the image begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    Empty,
    /// Compressed clusters.
    Compressed,
    /// On a backing image.
    Backed,
}

fn sequence(seed: u64, create: &str, start: Start, steps: u64) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let mut random = Random(seed);
    must(dir, "qemu-img", &["create", "-q", "-f", "raw", "base", "1M"]);
    must(dir, "qemu-io", &["-f", "raw", "-c", "write -P 9 0 500k", "base"]);
    match start {
        Start::Empty => must(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", create, "a", "1M"]),
        Start::Compressed => {
            must(dir, "qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", create, "base", "a"]);
        }
        Start::Backed => {
            let on = ["-b", "base", "-F", "raw", "a"];
            must(dir, "qemu-img", &[&["create", "-q", "-f", "qcow2", "-o", create][..], &on].concat());
        }
    }
    fs::copy(dir.join("a"), dir.join("b")).unwrap();
    let mut done = Vec::new();
    for number in 0..steps {
        done.push(step(dir, &mut random, number));
        if !compare(dir, &format!("seed {seed} {create}: {}", done.join("; "))) {
            break;
        }
    }
}

/// `EDIT_SEEDS` sequences from seed `EDIT_FIRST` on, for a longer search.
fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let (first, count): (u64, u64) = (number("EDIT_FIRST").unwrap_or(0), number("EDIT_SEEDS").unwrap_or(1));
    first..first + count
}

#[test]
fn random_sequences() {
    if !have_qemu() {
        return;
    }
    for seed in seeds() {
        for create in ["cluster_size=4k", "cluster_size=64k", "cluster_size=512,refcount_bits=4"] {
            sequence(seed, create, Start::Empty, 25);
        }
        sequence(seed, "cluster_size=16k,extended_l2=on", Start::Empty, 20);
    }
}

#[test]
fn random_sequences_from_compressed_clusters_and_on_a_backing_image() {
    if !have_qemu() {
        return;
    }
    for seed in seeds() {
        sequence(seed, "cluster_size=16k", Start::Compressed, 20);
        sequence(seed, "cluster_size=4k,compression_type=zstd", Start::Compressed, 20);
        sequence(seed, "cluster_size=4k", Start::Backed, 20);
        sequence(seed, "cluster_size=32k,extended_l2=on", Start::Backed, 20);
        sequence(seed, "cluster_size=4k,compat=0.10", Start::Backed, 20);
    }
}

/// The file with zeroes instead of what lies in free clusters and behind short tables, and of the times of snapshots; all counts are
/// in the first block. Copied flags are left out, too: in tables that only snapshots have they mean nothing, and `check` sees to the others.
fn comparable(path: &Path) -> Vec<u8> {
    let mut bytes = fs::read(path).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let half = |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let short = |bytes: &[u8], at: usize| u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap()) as usize;
    let cluster = 1 << half(&bytes, 20);
    let block = word(&bytes, word(&bytes, 48));
    assert_eq!(word(&bytes, word(&bytes, 48) + 8), 0, "one block of counts");
    let counts: Vec<usize> = (0..bytes.len().div_ceil(cluster)).map(|at| short(&bytes, block + at * 2)).collect();
    for (chunk, _) in bytes.chunks_mut(cluster).zip(counts).filter(|(_, count)| *count == 0) {
        chunk.fill(0);
    }
    let mut at = word(&bytes, 64);
    let mut ends = vec![word(&bytes, 40) + half(&bytes, 36) * 8];
    for _ in 0..half(&bytes, 60) {
        bytes[at + 16..at + 24].fill(0);
        ends.push(word(&bytes, at) + half(&bytes, at + 8) * 8);
        let len = 40 + half(&bytes, at + 36) + short(&bytes, at + 12) + short(&bytes, at + 14);
        at += len.next_multiple_of(8);
    }
    for end in ends.into_iter().chain([at]) {
        let behind = end.next_multiple_of(cluster).min(bytes.len());
        bytes.get_mut(end..behind).unwrap_or_default().fill(0);
    }
    bytes.as_chunks_mut::<8>().0.iter_mut().for_each(|word| word[0] &= 0x7f);
    bytes
}

/// Snapshots leave the file that qemu-img leaves, byte for byte.
#[test]
fn snapshots_leave_the_same_bytes() {
    if !have_qemu() {
        return;
    }
    for (seed, create) in
        seeds().flat_map(|seed| ["cluster_size=4k", "cluster_size=64k", "compat=0.10"].map(|create| (seed, create)))
    {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        let mut random = Random(seed);
        must(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", create, "a", "1M"]);
        fs::copy(dir.join("a"), dir.join("b")).unwrap();
        let mut done = Vec::new();
        for number in 0..24 {
            let name = format!("s{}", random.below(4));
            let (letter, change): (&str, Change) = match random.below(5) {
                0 => {
                    let at = random.below(200) * 4096;
                    let command = format!("write -P {} {at} {}", number + 1, (1 + random.below(50)) * 4096);
                    ["a", "b"].iter().for_each(|file| must(dir, "qemu-io", &["-f", "qcow2", "-c", &command, file]));
                    done.push(command);
                    continue;
                }
                1 | 2 => {
                    let new = NewSnapshot { name: name.clone().into_bytes(), date_sec: 7, date_nsec: 8 };
                    ("-c", Box::new(move |writer, _| writer.create_snapshot(&new)))
                }
                3 => {
                    let name = name.clone().into_bytes();
                    ("-a", Box::new(move |writer, _| writer.apply_snapshot(SnapshotSelector::IdOrName(&name))))
                }
                _ => {
                    let name = name.clone().into_bytes();
                    let change: Change = Box::new(move |writer, _| {
                        writer.delete_snapshot(SnapshotSelector::Exact { id: None, name: Some(&name) })
                    });
                    ("-d", change)
                }
            };
            let theirs = run(dir, "qemu-img", &["snapshot", letter, &name, "b"]).status.success();
            let ours = edit(&dir.join("a"), change).is_ok();
            done.push(format!("snapshot {letter} {name} ({ours})"));
            assert_eq!(ours, theirs, "seed {seed} {create}: {}", done.join("; "));
            let (ours, theirs) = (comparable(&dir.join("a")), comparable(&dir.join("b")));
            let differs = ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs);
            let what = || format!("seed {seed} {create}: {}", done.join("; "));
            assert_eq!((differs, ours.len()), (None, theirs.len()), "{}", what());
            must(dir, "qemu-img", &["check", "-q", "-f", "qcow2", "a"]);
        }
    }
}

/// A new size by way of `amend`: the bitmaps follow, and the snapshots stay as they are.
#[test]
fn sizes() {
    if !have_qemu() {
        return;
    }
    for sizes in [&["3M", "40M"][..], &["1028k", "1900k", "5M"], &["700k", "300k", "2M"]] {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        must(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a", "1M"]);
        must(dir, "qemu-img", &["bitmap", "--add", "-g", "4k", "a", "b"]);
        must(dir, "qemu-io", &["-c", "write -P 1 0 90k", "-c", "write -P 2 600k 90k", "a"]);
        must(dir, "qemu-img", &["snapshot", "-c", "s", "a"]);
        must(dir, "qemu-io", &["-c", "write -P 3 40k 90k", "-c", "write -P 4 900k 124k", "a"]);
        fs::copy(dir.join("a"), dir.join("b")).unwrap();
        for size in sizes {
            must(dir, "qemu-img", &["amend", "-f", "qcow2", "-o", &format!("size={size}"), "b"]);
            let (number, unit) = size.split_at(size.len() - 1);
            let bytes = number.parse::<u64>().unwrap() << if unit == "k" { 10 } else { 20 };
            let options = AmendOptions { size: Some(bytes), ..AmendOptions::default() };
            let change: Change = Box::new(move |writer, all| writer.amend(&options, all, &mut |_, _| {}));
            edit(&dir.join("a"), change).unwrap();
            assert!(compare(dir, &format!("{size} of {sizes:?}")));
        }
    }
}

/// Bitmaps record what is written between opening and closing, as those of qemu-io do; disabled ones don't.
#[test]
fn bitmaps_record_writes() {
    if !have_qemu() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    must(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "ours", "2M"]);
    must(dir, "qemu-img", &["bitmap", "--add", "ours", "fine", "-g", "512"]);
    must(dir, "qemu-img", &["bitmap", "--add", "ours", "coarse", "-g", "64k"]);
    must(dir, "qemu-img", &["bitmap", "--add", "--disable", "ours", "off"]);
    must(dir, "qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 4k", "ours"]);
    fs::copy(dir.join("ours"), dir.join("theirs")).unwrap();
    let writes = ["write -P 7 98304 300k", "write -z 1M 64k", "write -P 8 2093056 4k"];
    writes.iter().for_each(|text| must(dir, "qemu-io", &["-f", "qcow2", "-c", text, "theirs"]));
    let mut file = MemBlock::from(fs::read(dir.join("ours")).unwrap());
    let mut writer = Writer::open(&mut file, FileId(0), None).unwrap();
    writer.write_at(98304, &vec![7; 300 << 10]).unwrap();
    writer.write_zeroes(1 << 20, 64 << 10, ZeroMode::Unmap).unwrap();
    writer.write_at(2_093_056, &[8; 4096]).unwrap();
    writer.finish().unwrap();
    fs::write(dir.join("ours"), file.as_bytes()).unwrap();
    let (ours, theirs) = (open(fs::read(dir.join("ours")).unwrap()), open(fs::read(dir.join("theirs")).unwrap()));
    assert_eq!(bitmaps(&ours).len(), 3);
    assert!(bitmaps(&ours) == bitmaps(&theirs) && contents(&ours) == contents(&theirs));
    must(dir, "qemu-img", &["check", "-q", "ours"]);
}
