//! Where the bytes of disks in the older formats lie: the whole map in order, and single places.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use instar_benches::{Sparse, offsets};
use instar_blockio::{BlockAlloc, BlockMap, BlockMapExt, FileId};
use instar_legacy::{OpenOptions, parallels, qcow, qed, vdi};

const SIZE: u64 = 4 << 30;

/// Gives every unit of a disk a place.
fn fill(writer: &mut dyn BlockAlloc) {
    let mut at = 0;
    while at < SIZE {
        let place = writer.reserve(at, SIZE - at).expect("memory has room");
        at += place.len;
        writer.commit(place).expect("memory takes it");
    }
}

macro_rules! image {
    ($format:ident, $options:expr) => {{
        let mut writer = $format::create(Sparse::default(), FileId(0), &$options).expect("good options");
        fill(&mut writer);
        let file = writer.finish().expect("memory takes it");
        $format::Image::open(file, FileId(0), &OpenOptions::default()).expect("it was just made")
    }};
}

fn images() -> Vec<(&'static str, Box<dyn BlockMap>)> {
    vec![
        ("qcow", Box::new(image!(qcow, qcow::CreateOptions { size: SIZE, backing_file: None }))),
        ("qed", Box::new(image!(qed, qed::CreateOptions { size: SIZE, ..Default::default() }))),
        ("vdi", Box::new(image!(vdi, vdi::CreateOptions { size: SIZE, ..Default::default() }))),
        ("parallels", Box::new(image!(parallels, parallels::CreateOptions { size: SIZE, ..Default::default() }))),
    ]
}

/// The whole map, as `convert` and `map` ask for it; counted in bytes of the disk.
fn sequential(c: &mut Criterion) {
    let mut group = c.benchmark_group("legacy-sequential");
    for (name, image) in images() {
        group.throughput(Throughput::Bytes(SIZE));
        group.bench_function(format!("{name}/4GiB"), |b| {
            b.iter(|| image.extents(0..SIZE).map(|extent| extent.expect("a sound image").len).sum::<u64>());
        });
    }
}

/// Single places all over the disk.
fn random(c: &mut Criterion) {
    let mut group = c.benchmark_group("legacy-random");
    let places = offsets(SIZE, 4096);
    for (name, image) in images() {
        group.throughput(Throughput::Elements(places.len() as u64));
        group.bench_function(format!("{name}/4GiB"), |b| {
            b.iter(|| places.iter().map(|&at| image.extent_at(at, 512).expect("a sound image").len).sum::<u64>());
        });
    }
}

criterion_group!(benches, sequential, random);
criterion_main!(benches);
