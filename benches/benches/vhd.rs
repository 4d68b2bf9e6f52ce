//! VHD: where the bytes of the disk lie.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use instar_benches::{Sparse, offsets};
use instar_blockio::{BlockAlloc, BlockMap, BlockMapExt, BlockRead, FileId};
use instar_vhd::{BLOCK_SIZE, CreateOptions, Image, OpenOptions, create};

const GIB: u64 = 1 << 30;

/// A dynamic disk of 256 GiB: every second block is present.
fn image() -> Image<Sparse> {
    let options = CreateOptions { size: 256 * GIB, ..CreateOptions::default() };
    let mut writer = create(Sparse::default(), FileId(0), &options).expect("good options");
    let block = u64::from(BLOCK_SIZE);
    for at in (0..options.size).step_by(2 * block as usize) {
        let place = writer.reserve(at, block).expect("room");
        writer.commit(place).expect("room");
    }
    let file = writer.finish().expect("a good image");
    Image::open(file, FileId(0), &OpenOptions::default()).expect("a good image")
}

/// The whole map in order, and single places; counted in blocks and places.
fn map(c: &mut Criterion) {
    let image = image();
    let mut group = c.benchmark_group("vhd-map");
    group.throughput(Throughput::Elements(image.size().div_ceil(BLOCK_SIZE.into())));
    group.bench_function("sequential/256GiB", |b| {
        b.iter(|| image.extents(0..image.size()).map(|extent| extent.expect("a sound image").len).sum::<u64>());
    });
    let places = offsets(image.size(), 4096);
    group.throughput(Throughput::Elements(places.len() as u64));
    group.bench_function("random/256GiB", |b| {
        b.iter(|| places.iter().map(|&at| image.extent_at(at, 4096).expect("a sound image").len).sum::<u64>());
    });
}

criterion_group!(benches, map);
criterion_main!(benches);
