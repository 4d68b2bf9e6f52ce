//! VMDK: where the bytes of the disk lie.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use instar_benches::{Sparse, offsets};
use instar_blockio::{BlockAlloc, BlockMap, BlockMapExt, BlockRead, FileId};
use instar_vmdk::{CreateOptions, GRAIN, Image, OpenOptions, create};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// A disk of 64 GiB: every second run of 64 MiB is present.
fn image() -> Image<Sparse> {
    let options = CreateOptions { size: 64 * GIB, ..CreateOptions::default() };
    let mut file = Sparse::default();
    let mut writer = create(&mut file, FileId(0), Vec::new(), options).expect("good options");
    for run in (0..64 * GIB).step_by(128 << 20) {
        let mut at = run;
        while at < run + 64 * MIB {
            let place = writer.reserve(at, run + 64 * MIB - at).expect("room");
            at += place.len;
            writer.commit(place).expect("room");
        }
    }
    writer.finish().expect("a good image");
    Image::open(file, FileId(0), &OpenOptions::default()).expect("a good image")
}

/// The whole map in order, and single places; counted in grains and places.
fn map(c: &mut Criterion) {
    let image = image();
    let mut group = c.benchmark_group("vmdk-map");
    group.throughput(Throughput::Elements(image.size() / GRAIN));
    group.bench_function("sequential/64GiB", |b| {
        b.iter(|| image.extents(0..image.size()).map(|extent| extent.expect("a sound image").len).sum::<u64>());
    });
    let places = offsets(image.size(), 4096);
    group.throughput(Throughput::Elements(places.len() as u64));
    group.bench_function("random/64GiB", |b| {
        b.iter(|| places.iter().map(|&at| image.extent_at(at, 4096).expect("a sound image").len).sum::<u64>());
    });
}

criterion_group!(benches, map);
criterion_main!(benches);
