//! VHDX: where the bytes of the disk lie, and the checksum of its tables.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use instar_benches::{Sparse, offsets};
use instar_blockio::{BlockAlloc, BlockMap, BlockMapExt, BlockRead, FileId};
use instar_vhdx::{CreateOptions, Image, OpenOptions, crc32c, create};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// A disk of 256 GiB in blocks of a MiB: every second run of 64 blocks is present.
fn image() -> Image<Sparse> {
    let options = CreateOptions { size: 256 * GIB, block_size: MIB, ..CreateOptions::default() };
    let mut file = Sparse::default();
    let mut writer = create(&mut file, FileId(0), &options).expect("good options");
    for run in (0..options.size).step_by(128 << 20) {
        let place = writer.reserve(run, 64 * MIB).expect("room");
        writer.commit(place).expect("room");
    }
    writer.finish().expect("a good image");
    Image::open(file, FileId(0), &OpenOptions::default()).expect("a good image")
}

/// The whole map in order, and single places; counted in blocks and places.
fn map(c: &mut Criterion) {
    let image = image();
    let mut group = c.benchmark_group("vhdx-map");
    group.throughput(Throughput::Elements(image.geometry().blocks()));
    group.bench_function("sequential/256GiB", |b| {
        b.iter(|| image.extents(0..image.size()).map(|extent| extent.expect("a sound image").len).sum::<u64>());
    });
    let places = offsets(image.size(), 4096);
    group.throughput(Throughput::Elements(places.len() as u64));
    group.bench_function("random/256GiB", |b| {
        b.iter(|| places.iter().map(|&at| image.extent_at(at, 4096).expect("a sound image").len).sum::<u64>());
    });
}

/// The checksum without the processor's instruction, as the guest computes it.
fn checksum(c: &mut Criterion) {
    let mut group = c.benchmark_group("crc32c");
    for (name, len) in [("4KiB", 4 << 10), ("64KiB", 64 << 10)] {
        let bytes: Vec<u8> = (0..len).map(|at| (at * 31 + at / 251) as u8).collect();
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(name, |b| b.iter(|| crc32c(0, black_box(&bytes))));
    }
}

criterion_group!(benches, map, checksum);
criterion_main!(benches);
