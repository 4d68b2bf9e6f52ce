//! Finding zeros: buffers that are all zero, that end with data, and that are half of each.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use instar_blockio::{data_runs, is_zero};

fn scan(c: &mut Criterion) {
    let mut group = c.benchmark_group("is-zero");
    for (name, len) in [("4KiB", 4096), ("64KiB", 65536), ("2MiB", 2 << 20)] {
        let mut buf = vec![0; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("zeros/{name}"), |b| b.iter(|| is_zero(black_box(&buf))));
        buf[len - 1] = 1;
        group.bench_function(format!("last-byte/{name}"), |b| b.iter(|| is_zero(black_box(&buf))));
    }
}

fn runs(c: &mut Criterion) {
    let mut group = c.benchmark_group("data-runs");
    const LEN: usize = 2 << 20;
    let mixed: Vec<u8> = (0..LEN).map(|at| u8::from(at / 8192 % 2 == 0)).collect();
    group.throughput(Throughput::Bytes(LEN as u64));
    for (name, buf) in [("zeros", vec![0; LEN]), ("data", vec![1; LEN]), ("mixed", mixed)] {
        group.bench_function(format!("{name}/2MiB"), |b| {
            b.iter(|| data_runs(black_box(&buf), 0, 4096, 4096).count());
        });
    }
}

criterion_group!(benches, scan, runs);
criterion_main!(benches);
