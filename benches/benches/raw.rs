//! Raw disks: where their bytes lie, and the look for a partition table.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use instar_benches::offsets;
use instar_blockio::{BlockMap, MemBlock};
use instar_raw::{Image, partition};

const SIZE: u64 = 64 << 20;

/// A disk with a DOS partition table.
fn disk() -> MemBlock {
    let mut bytes = vec![0; SIZE as usize];
    bytes[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 9, 0, 1, 0, 0, 0, 8, 0, 0, 0]);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    MemBlock::from(bytes)
}

/// Single places; counted in places.
fn map(c: &mut Criterion) {
    let image = Image::open(disk()).expect("whole sectors");
    let places = offsets(SIZE, 4096);
    let mut group = c.benchmark_group("raw-map");
    group.throughput(Throughput::Elements(places.len() as u64));
    group.bench_function("random/64MiB", |b| {
        b.iter(|| places.iter().map(|&at| image.extent_at(at, 4096).expect("inside").len).sum::<u64>());
    });
}

fn tables(c: &mut Criterion) {
    let disk = disk();
    c.benchmark_group("raw-partition").bench_function("mbr", |b| {
        b.iter(|| partition::find(black_box(&disk)).expect("readable"));
    });
}

criterion_group!(benches, map, tables);
criterion_main!(benches);
