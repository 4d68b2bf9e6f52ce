//! Images made byte by byte, with the disk that they must show: independent of the code under test.
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::Path;
use std::process::{Command, Output};

/// What a cluster is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    Unallocated,
    Zero,
    /// Zero, with a place of its own that holds other bytes.
    ZeroPlaced,
    Data,
    /// As one deflate stream of a stored block.
    Compressed,
    /// Extended L2 entries: a mask of allocated and one of zero subclusters.
    Mixed(u32, u32),
}

/// An image to be made.
#[derive(Clone, Debug)]
pub struct Plan {
    pub cluster_bits: u32,
    pub extended_l2: bool,
    pub clusters: Vec<Cluster>,
    /// Bytes by which the disk is shorter than its clusters.
    pub cut: u64,
    /// Adds a snapshot of the same mapping and a bitmap.
    pub extras: bool,
}

/// An image and the disk that it shows.
pub struct Made {
    pub file: Vec<u8>,
    pub disk: Vec<u8>,
    /// Places of the file that hold metadata.
    pub metadata: Vec<std::ops::Range<usize>>,
}

/// A byte of the pattern that fills cluster `index`; never 0.
fn pattern(index: usize, at: usize) -> u8 {
    ((index * 31 + at / 512 * 7 + at % 251) % 255 + 1) as u8
}

struct Builder {
    file: Vec<u8>,
    cluster: usize,
}

impl Builder {
    fn alloc(&mut self, len: usize) -> usize {
        let at = self.file.len().next_multiple_of(self.cluster);
        self.file.resize(at + len.next_multiple_of(self.cluster), 0);
        at
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.file[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_be_bytes());
    }
}

/// Makes the image.
pub fn make(plan: &Plan) -> Made {
    let cluster = 1usize << plan.cluster_bits;
    let entry = if plan.extended_l2 { 16 } else { 8 };
    let per_table = cluster / entry;
    let tables = plan.clusters.len().div_ceil(per_table);
    let mut b = Builder { file: vec![0; cluster], cluster };
    let refcounts = b.alloc(cluster);
    let l1 = b.alloc(tables * 8);
    let mut metadata = vec![0..112, l1..l1 + tables * 8];
    let mut disk = vec![0; plan.clusters.len() * cluster];
    for table in 0..tables {
        let clusters = table * per_table..((table + 1) * per_table).min(plan.clusters.len());
        if plan.clusters[clusters.clone()].iter().all(|&c| c == Cluster::Unallocated) {
            continue;
        }
        let l2 = b.alloc(cluster);
        b.put64(l1 + table * 8, l2 as u64 | 1 << 63);
        metadata.push(l2..l2 + clusters.len() * entry);
        for index in clusters {
            let shown = &mut disk[index * cluster..(index + 1) * cluster];
            let (word, bitmap) = put_cluster(&mut b, plan, index, shown);
            let at = l2 + index % per_table * entry;
            b.put64(at, word);
            if plan.extended_l2 {
                b.put64(at + 8, bitmap);
            }
        }
    }
    disk.truncate(disk.len() - plan.cut as usize);
    put_header(&mut b, plan, refcounts, l1, tables, disk.len());
    if plan.extras {
        put_extras(&mut b, l1, tables, disk.len(), &mut metadata);
    }
    Made { file: b.file, disk, metadata }
}

fn put_cluster(b: &mut Builder, plan: &Plan, index: usize, shown: &mut [u8]) -> (u64, u64) {
    let cluster = b.cluster;
    let bytes: Vec<u8> = (0..cluster).map(|at| pattern(index, at)).collect();
    let mut place = || {
        let at = b.alloc(cluster);
        b.put(at, &bytes);
        at as u64 | 1 << 63
    };
    let all = u64::from(u32::MAX);
    match plan.clusters[index] {
        Cluster::Unallocated => (0, 0),
        Cluster::Zero if plan.extended_l2 => (0, all << 32),
        Cluster::Zero => (1, 0),
        Cluster::ZeroPlaced if plan.extended_l2 => (place(), all << 32),
        Cluster::ZeroPlaced => (place() | 1, 0),
        Cluster::Data => {
            shown.copy_from_slice(&bytes);
            (place(), if plan.extended_l2 { all } else { 0 })
        }
        Cluster::Mixed(allocated, zero) => {
            assert!(plan.extended_l2 && allocated & zero == 0);
            for (k, part) in shown.chunks_mut(cluster / 32).enumerate().filter(|(k, _)| allocated >> k & 1 != 0) {
                part.copy_from_slice(&bytes[k * cluster / 32..][..cluster / 32]);
            }
            (place(), u64::from(zero) << 32 | u64::from(allocated))
        }
        Cluster::Compressed => {
            shown.copy_from_slice(&bytes);
            // RFC 1951: stored blocks; the last has its first bit set.
            let mut stream = Vec::new();
            let blocks = bytes.chunks(32768);
            let last = blocks.len() - 1;
            for (k, block) in blocks.enumerate() {
                let len = block.len() as u16;
                stream.push(u8::from(k == last));
                stream.extend(len.to_le_bytes());
                stream.extend((!len).to_le_bytes());
                stream.extend(block);
            }
            // Not aligned, to meet the sector arithmetic.
            let at = b.alloc(stream.len() + 7) + 7;
            b.put(at, &stream);
            let sectors = (at + stream.len() - 1) / 512 - at / 512;
            (1 << 62 | (sectors as u64) << (62 - (plan.cluster_bits - 8)) | at as u64, 0)
        }
    }
}

fn put_header(b: &mut Builder, plan: &Plan, refcounts: usize, l1: usize, tables: usize, size: usize) {
    b.put(0, b"QFI\xfb\0\0\0\x03");
    b.put(20, &plan.cluster_bits.to_be_bytes());
    b.put64(24, size as u64);
    b.put(36, &(tables as u32).to_be_bytes());
    b.put64(40, l1 as u64);
    b.put64(48, refcounts as u64);
    b.put(56, &1u32.to_be_bytes());
    b.put64(72, if plan.extended_l2 { 1 << 4 } else { 0 }); // incompatible
    b.put(96, &4u32.to_be_bytes());
    b.put(100, &112u32.to_be_bytes());
}

/// A snapshot "1"/"first" that has the active L1 table, and a bitmap "b" whose bits are all one.
fn put_extras(b: &mut Builder, l1: usize, tables: usize, size: usize, metadata: &mut Vec<std::ops::Range<usize>>) {
    let at = b.alloc(72);
    b.put64(at, l1 as u64);
    b.put(at + 8, &(tables as u32).to_be_bytes());
    b.put(at + 12, &[0, 1, 0, 5]);
    b.put(at + 36, &24u32.to_be_bytes());
    b.put64(at + 48, size as u64);
    b.put64(at + 56, 77);
    b.put(at + 64, b"1first");
    b.put(60, &1u32.to_be_bytes());
    b.put64(64, at as u64);
    metadata.push(at..at + 72);

    let bytes = size.div_ceil(512).div_ceil(8);
    let entries = bytes.div_ceil(b.cluster).max(1);
    let table = b.alloc(entries * 8);
    for k in 0..entries {
        b.put64(table + k * 8, 1);
    }
    let directory = b.alloc(32);
    b.put64(directory, table as u64);
    b.put(directory + 8, &(entries as u32).to_be_bytes());
    b.put(directory + 12, &2u32.to_be_bytes());
    b.put(directory + 16, &[1, 9, 0, 1]);
    b.put(directory + 24, b"b");
    b.put64(88, 1); // autoclear: bitmaps
    b.put(112, &0x2385_2875u32.to_be_bytes());
    b.put(116, &24u32.to_be_bytes());
    b.put(120, &1u32.to_be_bytes());
    b.put64(128, 32);
    b.put64(136, directory as u64);
    metadata.extend([112..160, table..table + entries * 8, directory..directory + 32]);
}

/// A small generator (SplitMix64), so that a failure can be repeated.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Whether qemu-img and qemu-io are there; says so if not.
pub fn have_qemu() -> bool {
    let there = ["qemu-img", "qemu-io"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !there {
        eprintln!("SKIPPED: qemu-img or qemu-io is not installed");
    }
    there
}

/// Runs a tool in a directory.
pub fn run(dir: &Path, tool: &str, args: &[&str]) -> Output {
    Command::new(tool).current_dir(dir).args(args).output().unwrap()
}

/// Runs a tool that must succeed.
pub fn must(dir: &Path, tool: &str, args: &[&str]) {
    let done = run(dir, tool, args);
    let text = String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{tool} {args:?}: {text}");
}
