//! Random changes of images against a flat model, on fresh images and on those that `qemu-img` made.

use std::fs;
use std::path::Path;
use std::process::Command;

use instar_blockio::file::HostFile;
use instar_blockio::test::Faulty;
use instar_blockio::{
    BlockAlloc, BlockMap, BlockMapExt, BlockRead, BlockWrite, Codec, ErrorKind, ExtentKind, FileId, MemBlock, ZeroMode,
};
use instar_qcow2::{CreateOptions, Preallocation, Writer, create};

/// Runs a program of QEMU's; `None`, said loudly, if it is not installed.
fn tool(program: &str, dir: &Path, args: &[&str]) -> Option<()> {
    match Command::new(program).current_dir(dir).args(args).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{program} {args:?}: {text}");
            Some(())
        }
        Err(error) => {
            eprintln!("SKIPPED: {program} can't be run: {error}");
            None
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 24) % limit.max(1)
    }
}

/// The disk as it should read.
struct Model {
    bytes: Vec<u8>,
    random: Random,
    /// Changes must cover whole units of this many bytes.
    unit: u64,
}

impl Model {
    fn range(&mut self) -> (u64, u64) {
        let size = self.bytes.len() as u64;
        let offset = self.random.below(size);
        let long = self.random.below(4) == 0;
        let len = 1 + self.random.below(if long { 600_000 } else { 9_000 });
        let (start, end) = (offset / self.unit * self.unit, (offset + len).next_multiple_of(self.unit));
        (start, end.min(size) - start)
    }

    fn fill(&mut self, offset: u64, len: u64, value: u8) {
        self.bytes[offset as usize..(offset + len) as usize].fill(value);
    }

    fn step<D: BlockWrite>(&mut self, image: &mut Writer<D>) {
        let (offset, len) = self.range();
        let value = self.random.below(255) as u8 + 1;
        match self.random.below(10) {
            0..=4 => {
                image.write_at(offset, &vec![value; len as usize]).unwrap();
                self.fill(offset, len, value);
            }
            5 | 6 => {
                let mode = if value < 128 { ZeroMode::Unmap } else { ZeroMode::KeepAllocated };
                image.write_zeroes(offset, len, mode).unwrap();
                self.fill(offset, len, 0);
            }
            7 => self.discard(image, offset, len),
            8 => {
                let given_up = image.reserve(offset, len).unwrap();
                image.abort(given_up).unwrap();
            }
            _ => image.flush().unwrap(),
        }
    }

    /// Each byte keeps its value or becomes zero.
    fn discard<D: BlockWrite>(&mut self, image: &mut Writer<D>, offset: u64, len: u64) {
        image.discard(offset, len).unwrap();
        let mut now = vec![0; len as usize];
        image.read_at(offset, &mut now).unwrap();
        for (old, new) in self.bytes[offset as usize..].iter_mut().zip(now) {
            assert!(new == *old || new == 0);
            *old = new;
        }
    }

    fn verify<D: BlockWrite>(&self, image: &Writer<D>) {
        let mut bytes = vec![0; self.bytes.len()];
        image.read_at(0, &mut bytes).unwrap();
        let wrong = bytes.iter().zip(&self.bytes).position(|(a, b)| a != b);
        let wrong = wrong.map(|at| (at, bytes[at], self.bytes[at]));
        assert_eq!(wrong, None, "offset, read, expected");
        let covered: u64 = image.extents(0..image.size()).map(|extent| extent.unwrap().len).sum();
        assert_eq!(covered, image.size());
    }

    fn verify_by_qemu(&self, dir: &Path, image: &str) -> Option<()> {
        fs::write(dir.join("model"), &self.bytes).unwrap();
        tool("qemu-img", dir, &["check", "-q", image])?;
        tool("qemu-img", dir, &["compare", "-q", "-f", "raw", "-F", "qcow2", "model", image])
    }
}

fn all_options(size: u64) -> Vec<CreateOptions> {
    let base = CreateOptions { size, ..CreateOptions::default() };
    vec![
        base.clone(),
        CreateOptions { cluster_size: 512, refcount_bits: 64, ..base.clone() },
        CreateOptions { cluster_size: 512, refcount_bits: 1, ..base.clone() },
        CreateOptions { cluster_size: 4096, version: 2, ..base.clone() },
        CreateOptions { cluster_size: 2 << 20, ..base.clone() },
        CreateOptions { extended_l2: true, ..base.clone() },
        CreateOptions { extended_l2: true, cluster_size: 16384, ..base.clone() },
        CreateOptions { extended_l2: true, preallocation: Preallocation::Metadata, ..base.clone() },
        CreateOptions { preallocation: Preallocation::Full, ..base.clone() },
        CreateOptions { data_file: Some(b"data".to_vec()), ..base.clone() },
        CreateOptions { data_file: Some(b"data".to_vec()), data_file_raw: true, extended_l2: true, ..base },
    ]
}

fn open(dir: &Path, data: bool) -> Writer<HostFile> {
    let file = |name: &str| HostFile::open(&dir.join(name), true).unwrap();
    Writer::open(file("image"), FileId(0), data.then(|| (file("data"), FileId(1)))).unwrap()
}

#[test]
fn fresh_and_reopened() {
    for (index, options) in all_options(3_000_320).into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let file = HostFile::create(&dir.path().join("image")).unwrap();
        let has_data = options.data_file.is_some();
        let data = has_data.then(|| (HostFile::create(&dir.path().join("data")).unwrap(), FileId(1)));
        let mut image = create(file, FileId(0), data, &options).unwrap();
        let size = image.size();
        let mut model = Model { bytes: vec![0; size as usize], random: Random(index as u64), unit: 1 };
        for round in 0..3 {
            for _ in 0..40 {
                model.step(&mut image);
            }
            model.verify(&image);
            if round == 1 {
                let longer = image.size() + 700_000;
                image.set_size(longer).unwrap();
                model.bytes.resize(image.size() as usize, 0);
            }
            image.finish().unwrap();
            if model.verify_by_qemu(dir.path(), "image").is_none() {
                return;
            }
            if options.data_file_raw {
                assert!(fs::read(dir.path().join("data")).unwrap() == model.bytes, "raw data file");
            }
            image = open(dir.path(), has_data);
        }
        model.verify(&image);
    }
}

/// Compressed clusters, zero clusters, snapshots: what the writer itself does not make.
#[test]
fn images_made_by_qemu() {
    for (index, list) in [
        "cluster_size=64k",
        "cluster_size=4k,refcount_bits=32",
        "cluster_size=512",
        "compat=0.10",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k,compression_type=zstd",
        "compression_type=zstd",
    ]
    .into_iter()
    .enumerate()
    {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let mut random = Random(77 + index as u64);
        let mut bytes = vec![0; 4 << 20];
        for piece in bytes.chunks_mut(1500) {
            if random.below(3) > 0 {
                piece.fill(random.below(256) as u8);
            }
        }
        fs::write(dir.join("source"), &bytes).unwrap();
        let convert = ["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", list, "source", "image"];
        let Some(()) = tool("qemu-img", dir, &convert) else { return };
        tool("qemu-io", dir, &["-c", "write -P 9 1M 300k", "-c", "write -z 2M 128k", "image"]);
        tool("qemu-img", dir, &["snapshot", "-c", "before", "image"]);
        tool("qemu-io", dir, &["-c", "write -P 8 1100k 300k", "-c", "discard 3M 128k", "image"]);
        tool("qemu-img", dir, &["convert", "-O", "raw", "-l", "before", "image", "old"]);
        tool("qemu-img", dir, &["convert", "-O", "raw", "image", "now"]);
        let now = fs::read(dir.join("now")).unwrap();
        let mut model = Model { bytes: now, random, unit: 1 };
        for _ in 0..3 {
            let mut image = open(dir, false);
            model.verify(&image);
            for _ in 0..30 {
                model.step(&mut image);
            }
            model.verify(&image);
            image.finish().unwrap();
            model.verify_by_qemu(dir, "image");
        }
        tool("qemu-img", dir, &["convert", "-O", "raw", "-l", "before", "image", "still"]);
        assert!(fs::read(dir.join("old")).unwrap() == fs::read(dir.join("still")).unwrap(), "snapshot changed");
    }
}

#[test]
fn overlays_are_written_in_whole_units() {
    for (version, extended_l2) in [(3, false), (3, true), (2, false)] {
        let dir = tempfile::tempdir().unwrap();
        let size = (2 << 20) + 512;
        fs::write(dir.path().join("base"), vec![0x55; size]).unwrap();
        let options = CreateOptions {
            version,
            extended_l2,
            backing_file: Some(b"base".to_vec()),
            backing_format: Some(b"raw".to_vec()),
            size: size as u64,
            ..CreateOptions::default()
        };
        let file = HostFile::create(&dir.path().join("image")).unwrap();
        let mut image = create(file, FileId(0), None, &options).unwrap();
        let unit = image.alloc_unit();
        assert_eq!(image.write_at(unit + 1, &[1; 100]).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(image.write_at(unit, &vec![1; unit as usize + 1]).unwrap_err().kind(), ErrorKind::InvalidInput);
        let mut model = Model { bytes: vec![0x55; size], random: Random(5), unit };
        for round in 0..3 {
            for _ in 0..20 {
                let (offset, len) = model.range();
                if model.random.below(3) == 0 {
                    image.write_zeroes(offset, len, ZeroMode::Unmap).unwrap();
                    model.fill(offset, len, 0);
                } else {
                    image.write_at(offset, &vec![round; len as usize]).unwrap();
                    model.fill(offset, len, round);
                }
            }
            image.finish().unwrap();
            if model.verify_by_qemu(dir.path(), "image").is_none() {
                return;
            }
            image = open(dir.path(), false);
        }
    }
}

/// Several reservations of one cluster, committed and given back in any order.
#[test]
fn reservations_share_clusters() {
    for extended_l2 in [false, true] {
        for fresh in [false, true] {
            let options = CreateOptions { extended_l2, size: 1 << 20, ..CreateOptions::default() };
            let mut file = MemBlock::default();
            let mut image = create(&mut file, FileId(0), None, &options).unwrap();
            if !fresh {
                // Stale bytes for the new clusters to hide.
                image.write_at(0, &[0xee; 1 << 18]).unwrap();
                image.finish().unwrap();
                image = Writer::open(&mut file, FileId(0), None).unwrap();
                image.discard(0, 1 << 18).unwrap();
                image.flush().unwrap();
            }
            let mut other = MemBlock::default();
            let a = image.reserve(4096, 4096).unwrap();
            let b = image.reserve(16384, 60000).unwrap();
            let c = image.reserve(8192, 100).unwrap();
            assert_eq!(c.host, a.host + 4096);
            assert_eq!(b.host, a.host + 12288);
            assert_eq!(b.len, 60000);
            for (place, value) in [(a, 1), (b, 2), (c, 3)] {
                other.write_at(place.host, &vec![value; place.len as usize]).unwrap();
            }
            assert_eq!(image.write_zeroes(4096, 1, ZeroMode::Unmap).unwrap_err().kind(), ErrorKind::InvalidInput);
            image.commit(b).unwrap();
            image.abort(a).unwrap();
            assert_eq!(image.commit(a).unwrap_err().kind(), ErrorKind::InvalidInput);
            image.commit(c).unwrap();
            let unit = if extended_l2 { 2048 } else { 65536 };
            let touched =
                image.extents(0..1 << 20).filter_map(Result::ok).filter(|e| matches!(e.kind, ExtentKind::Data { .. }));
            let touched: Vec<_> = touched.map(|extent| (extent.offset, extent.len)).collect();
            if extended_l2 {
                assert_eq!(touched, [(8192, 2048), (16384, 61440)]);
            } else {
                assert_eq!(touched, [(0, 2 * unit)]);
            }
            // The writer's file has not seen the callers' bytes; what it holds around them is zero.
            let mut bytes = vec![9; 131072];
            image.read_at(0, &mut bytes).unwrap();
            assert!(bytes[..4096].iter().all(|&byte| byte == 0));
            assert!(bytes[8292..16384].iter().all(|&byte| byte == 0));
            assert!(bytes[76384..].iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn compressed_reservations() {
    let options = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
    let mut image = create(MemBlock::default(), FileId(0), None, &options).unwrap();
    let a = image.reserve_compressed(0, 100).unwrap();
    let b = image.reserve_compressed(65536, 65536).unwrap();
    assert_eq!(b.host, a.host + 100);
    image.commit(a).unwrap();
    image.abort(b).unwrap();
    assert_eq!(image.reserve_compressed(1, 100).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(image.reserve_compressed(0, 65537).unwrap_err().kind(), ErrorKind::InvalidInput);
    image.write_at(131072, &[1]).unwrap();
    assert_eq!(image.reserve_compressed(131072, 5).unwrap_err().kind(), ErrorKind::Io);
    let data = Some((MemBlock::default(), FileId(1)));
    let options = CreateOptions { data_file: Some(b"d".to_vec()), ..options };
    let mut image = create(MemBlock::default(), FileId(0), data, &options).unwrap();
    assert_eq!(image.reserve_compressed(0, 100).unwrap_err().kind(), ErrorKind::Unsupported);
}

/// Whatever bytes an image is made of, opening and changing it ends in an answer.
#[test]
fn hostile_images() {
    let mut seeds = Vec::new();
    for options in [
        CreateOptions { size: 1 << 20, cluster_size: 512, ..CreateOptions::default() },
        CreateOptions { size: 8 << 20, extended_l2: true, cluster_size: 16384, ..CreateOptions::default() },
        CreateOptions {
            size: 1 << 20,
            version: 2,
            cluster_size: 4096,
            compression: Codec::Zlib,
            ..CreateOptions::default()
        },
    ] {
        let mut file = MemBlock::default();
        let mut image = create(&mut file, FileId(0), None, &options).unwrap();
        image.write_at(1000, &[7; 100_000]).unwrap();
        let place = image.reserve_compressed(512 << 10, 300).unwrap();
        image.commit(place).unwrap();
        image.finish().unwrap();
        seeds.push(file);
    }
    let mut opened = 0;
    for round in 0..1500 {
        let mut random = Random(round as u64);
        let mut file = seeds[round % seeds.len()].clone();
        let len = file.as_bytes().len() as u64;
        for _ in 0..1 + random.below(4) {
            let area = if random.below(3) == 0 { 120 } else { len.min(80_000) };
            let at = random.below(area) as usize / 8 * 8;
            let value = match random.below(5) {
                0 => u64::MAX,
                1 => random.below(len) & !511,
                2 => (random.below(len) & !511) | 1 << 63,
                3 => 1 << random.below(64),
                _ => random.below(u64::MAX),
            };
            let end = (at + 1 + random.below(8) as usize).min(len as usize);
            file.as_bytes_mut()[at..end].copy_from_slice(&value.to_be_bytes()[8 - (end - at)..]);
        }
        if random.below(8) == 0 {
            file.set_size(random.below(len)).unwrap();
        }
        // An entry may point terabytes away, and the file is in memory.
        let (file, faults) = Faulty::new(file);
        faults.limit_space(16 << 20);
        let Ok(mut image) = Writer::open(file, FileId(0), None) else { continue };
        opened += 1;
        let size = image.size();
        let mut buf = vec![0; 30_000];
        for _ in 0..6 {
            let at = random.below(size.min(2 << 20));
            let len = (random.below(30_000) as usize).min((size - at) as usize);
            let _ = image.read_at(at, &mut buf[..len]);
            let _ = image.write_at(at, &buf[..len]);
            let _ = image.write_zeroes(at / 2, len as u64, ZeroMode::Unmap);
            let _ = image.discard(at / 3, len as u64);
            let _ = image.extent_at_all(at);
            let _ = image.flush();
        }
        let _ = image.set_size(size.saturating_add(5 << 20));
        let _ = image.finish();
    }
    assert!(opened > 100, "{opened} images could be opened");
}

trait ExtentsFrom {
    fn extent_at_all(&self, offset: u64) -> usize;
}

impl<D: BlockWrite> ExtentsFrom for Writer<D> {
    fn extent_at_all(&self, offset: u64) -> usize {
        self.extents(offset..self.size().min(offset + (1 << 22))).take(50).count()
    }
}

/// Version 2 has no marks for zeroes, so they are written; what lies below is not asked for clusters that are zeroed as a whole.
#[test]
fn zeroes_of_whole_large_clusters_need_no_backing_image() {
    let options = CreateOptions {
        size: 8 << 20,
        cluster_size: 2 << 20,
        version: 2,
        backing_file: Some(b"base".to_vec()),
        ..CreateOptions::default()
    };
    let mut image = create(MemBlock::from(Vec::new()), FileId(0), None, &options).unwrap();
    image.write_zeroes(2 << 20, 4 << 20, ZeroMode::Unmap).unwrap();
    let mut bytes = vec![1; 4 << 20];
    image.read_at(2 << 20, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    let kinds = [0, 2 << 20, 4 << 20, 6 << 20].map(|at| image.extent_at(at, 2 << 20).unwrap().kind);
    assert!(
        matches!(
            kinds,
            [ExtentKind::Unallocated, ExtentKind::Data { .. }, ExtentKind::Data { .. }, ExtentKind::Unallocated]
        ),
        "{kinds:?}"
    );
}
