//! `data_runs` decides as `qemu-img convert -S` does, seen in the map of what it wrote.

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use instar_blockio::file::HostFile;
use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, ExtentKind, data_runs};

const SECTOR: usize = 512;
/// The most that qemu-img copies in one request, bytes.
const REQUEST: u64 = 2 << 20;

fn qemu_img(args: &[&str], file: &[&Path]) -> Option<String> {
    let done = match Command::new("qemu-img").args(args).args(file).output() {
        Ok(done) => done,
        Err(error) => {
            eprintln!("SKIPPED: qemu-img can't be run: {error}");
            return None;
        }
    };
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    Some(String::from_utf8(done.stdout).unwrap())
}

/// The number behind `"key": ` in a line of JSON.
fn number(line: &str, key: &str) -> u64 {
    let (_, rest) = line.split_once(&format!("\"{key}\": ")).unwrap();
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap();
    rest[..end].parse().unwrap()
}

/// What qemu-img wrote, in units of 512 bytes (subclusters of a target with 16 KiB clusters).
fn written_by_qemu(dir: &Path, format: &str, source: &Path, sparse: u32) -> Option<Vec<Range<u64>>> {
    let target = dir.join("target.qcow2");
    let sparse = sparse.to_string();
    let options = "extended_l2=on,cluster_size=16k";
    qemu_img(&["convert", "-f", format, "-O", "qcow2", "-o", options, "-S", &sparse], &[source, &target])?;
    Some(join(data_extents(&target)?.into_iter()))
}

/// The runs of data in the map of an image, each in one piece of the file.
fn data_extents(image: &Path) -> Option<Vec<Range<u64>>> {
    let map = qemu_img(&["map", "--output=json"], &[image])?;
    let data = map.lines().filter(|line| line.contains("\"data\": true"));
    Some(data.map(|line| number(line, "start")..number(line, "start") + number(line, "length")).collect())
}

/// What a copy of the source's extents in requests of 2 MiB writes by our rule. A request that would end
/// inside a cluster of the source ends before that cluster, unless it begins in it.
fn written_by_us(source: &HostFile, extents: &[Range<u64>], cluster: u64, sparse: u32) -> Vec<Range<u64>> {
    let alignment = 1 << sparse.ilog2();
    let mut runs = Vec::new();
    for extent in extents {
        let mut at = extent.start;
        while at < extent.end {
            let in_cluster = extent.end % cluster;
            let end = if extent.end - at > in_cluster { extent.end - in_cluster } else { extent.end };
            let mut buf = vec![0; (end - at).min(REQUEST) as usize];
            source.read_at(at, &mut buf).unwrap();
            let place = |run: Range<usize>| at + run.start as u64..at + run.end as u64;
            runs.extend(data_runs(&buf, at, alignment, sparse).map(place));
            at += buf.len() as u64;
        }
    }
    join(runs.into_iter())
}

fn join(runs: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => joined.push(run),
        }
    }
    joined
}

struct Random(u64);

impl Random {
    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Runs of zeros and data, mostly short, a few long; sectors of one nonzero byte anywhere in them.
fn contents(seed: u64, sectors: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; sectors * SECTOR];
    let mut at = 0;
    while at < sectors {
        let scale = [3, 20, 150, 1500][random.below(4) as usize];
        let end = (at + 1 + random.below(scale) as usize).min(sectors);
        if random.below(2) == 0 {
            for sector in at..end {
                bytes[sector * SECTOR + random.below(512) as usize] = 1;
            }
        }
        at = end;
    }
    bytes
}

/// An image, and its disk as a raw file.
struct Source<'a> {
    format: &'a str,
    image: &'a Path,
    disk: HostFile,
    extents: Vec<Range<u64>>,
    cluster: u64,
}

impl Source<'_> {
    fn compare(&self, dir: &Path, name: &str) {
        for sparse in [512, 1536, 4 << 10, 8 << 10, 12 << 10, 64 << 10, 1 << 20] {
            let Some(theirs) = written_by_qemu(dir, self.format, self.image, sparse) else { return };
            let ours = written_by_us(&self.disk, &self.extents, self.cluster, sparse);
            if let Some(at) = (0..theirs.len().max(ours.len())).find(|&at| theirs.get(at) != ours.get(at)) {
                panic!("{name}, -S {sparse}: run {at} is {:?} in qemu-img, {:?} here", theirs.get(at), ours.get(at));
            }
        }
    }
}

fn compare(dir: &Path, source: &Path, name: &str) {
    let disk = HostFile::open(source, false).unwrap();
    let data = disk.extents(0..disk.size()).map(Result::unwrap);
    let data = data.filter(|extent| matches!(extent.kind, ExtentKind::Data { .. }));
    let extents = join(data.map(|extent| extent.offset..extent.end()));
    Source { format: "raw", image: source, disk, extents, cluster: SECTOR as u64 }.compare(dir, name);
}

#[test]
fn dense_files() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.raw");
    for seed in 1..=6 {
        std::fs::write(&source, contents(seed, 5 * 2048 + 7 * seed as usize)).unwrap();
        compare(dir.path(), &source, &format!("seed {seed}"));
    }
}

#[test]
fn zeros_across_the_end_of_a_request() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.raw");
    // So many zero sectors before and behind 2 MiB, data around them.
    for (before, behind) in [(1, 1), (7, 0), (0, 7), (7, 7), (8, 16), (23, 23), (127, 127), (128, 1)] {
        let mut bytes = vec![1; 3 << 20];
        bytes[(4096 - before) * SECTOR..(4096 + behind) * SECTOR].fill(0);
        std::fs::write(&source, bytes).unwrap();
        compare(dir.path(), &source, &format!("{before} and {behind} sectors"));
    }
}

#[test]
fn files_with_holes() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.raw");
    for seed in 1..=6 {
        let mut random = Random(seed + 100);
        let bytes = contents(seed, 6 * 2048);
        std::fs::write(&source, &bytes).unwrap();
        let mut file = HostFile::open(&source, true).unwrap();
        // Holes of whole pages, so that extents of the source begin and end inside blocks.
        for _ in 0..30 {
            let start = random.below(bytes.len() as u64 / 4096);
            let len = 1 + random.below(60);
            let end = ((start + len) * 4096).min(bytes.len() as u64);
            file.discard(start * 4096, end - start * 4096).unwrap();
        }
        file.flush().unwrap();
        drop(file);
        compare(dir.path(), &source, &format!("holes, seed {seed}"));
    }
}

#[test]
fn extents_that_end_inside_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let (image, disk) = (dir.path().join("source.qcow2"), dir.path().join("disk.raw"));
    for seed in 1..=4 {
        // Subclusters of 2 KiB, a part of them allocated, many of those with zeros in them.
        let mut random = Random(seed + 200);
        let create = ["create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=64k,size=4M"];
        if qemu_img(&create, &[&image]).is_none() {
            return;
        }
        let mut io = Command::new("qemu-io");
        for _ in 0..150 {
            let start = random.below(2000);
            let len = 1 + random.below(40).min(2047 - start);
            let pattern = u8::from(random.below(3) > 0);
            io.args(["-c", &format!("write -q -P {pattern} {} {}", start * 2048, len * 2048)]);
        }
        match io.arg(&image).status() {
            Ok(status) => assert!(status.success()),
            Err(error) => return eprintln!("SKIPPED: qemu-io can't be run: {error}"),
        }
        let Some(extents) = data_extents(&image) else { return };
        qemu_img(&["convert", "-O", "raw"], &[&image, &disk]).unwrap();
        let disk = HostFile::open(&disk, false).unwrap();
        let source = Source { format: "qcow2", image: &image, disk, extents, cluster: 64 << 10 };
        source.compare(dir.path(), &format!("subclusters, seed {seed}"));
    }
}
