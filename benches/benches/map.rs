//! Where the bytes of a qcow2 disk lie: the whole map in order, and single places.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use instar_benches::{Layout, image, offsets};
use instar_blockio::{BlockMap, BlockMapExt, BlockRead};

const GIB: u64 = 1 << 30;
const CASES: [(&str, Layout, u64); 4] = [
    ("contiguous/16GiB", Layout::Contiguous, 16 * GIB),
    ("scattered/16GiB", Layout::Scattered, 16 * GIB),
    ("subclusters/1GiB", Layout::Subclusters, GIB),
    ("compressed/16GiB", Layout::Compressed, 16 * GIB),
];

/// The whole map, as `convert` and `map` ask for it; counted in clusters.
fn sequential(c: &mut Criterion) {
    let mut group = c.benchmark_group("map-sequential");
    for (name, layout, size) in CASES {
        let image = image(layout, size);
        group.throughput(Throughput::Elements(size / image.cluster_size()));
        group.bench_function(name, |b| {
            b.iter(|| image.extents(0..image.size()).map(|extent| extent.expect("a sound image").len).sum::<u64>());
        });
    }
}

/// Single places all over the disk: most miss the cache of tables.
fn random(c: &mut Criterion) {
    let mut group = c.benchmark_group("map-random");
    for (name, layout, size) in CASES {
        let image = image(layout, size);
        let places = offsets(size, 4096);
        group.throughput(Throughput::Elements(places.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| places.iter().map(|&at| image.extent_at(at, 4096).expect("a sound image").len).sum::<u64>());
        });
    }
}

criterion_group!(benches, sequential, random);
criterion_main!(benches);
