//! Opening: headers alone, and whole images.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use instar_blockio::{BlockMap, BlockRead, FileId, MemBlock};
use instar_qcow2::{CreateOptions, Header, Image, OpenOptions, create};

fn qcow2(c: &mut Criterion) {
    let mut file = MemBlock::default();
    let options = CreateOptions { size: 1 << 30, ..CreateOptions::default() };
    create(&mut file, FileId(0), None, &options).and_then(|writer| writer.finish()).expect("memory takes it");
    let mut group = c.benchmark_group("open-qcow2");
    let bytes = file.as_bytes();
    group.bench_function("header", |b| b.iter(|| Header::parse(black_box(bytes))));
    group.bench_function("image/1GiB", |b| {
        b.iter(|| Image::open(black_box(&file), FileId(0), &OpenOptions::default()));
    });
    group.bench_function("first-look-up/1GiB", |b| {
        b.iter(|| {
            let image = Image::open(black_box(&file), FileId(0), &OpenOptions::default()).expect("a sound image");
            image.extent_at(0, image.size())
        });
    });
}

fn luks(c: &mut Criterion) {
    let mut bytes = [0; instar_luks::HEADER_LEN];
    bytes[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
    for slot in 0..instar_luks::SLOT_COUNT {
        bytes[208 + 48 * slot..][..4].copy_from_slice(&0xdead_u32.to_be_bytes());
    }
    assert!(instar_luks::Header::parse(&bytes).is_ok());
    c.benchmark_group("open-luks")
        .bench_function("header", |b| b.iter(|| instar_luks::Header::parse(black_box(&bytes)).is_ok()));
}

criterion_group!(benches, qcow2, luks);
criterion_main!(benches);
