//! Clusters of 64 KiB through each codec, and through the libraries that were not chosen.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use std::hint::black_box;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use instar_benches::{UNIT, contents};
use instar_codec::{Codec, Decoder, Encoder};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

/// Contents, and their streams by the encoder; those that do not shrink are left out.
struct Samples {
    units: Vec<Vec<u8>>,
    streams: Vec<Vec<u8>>,
}

impl Samples {
    fn new(codec: Codec) -> Self {
        let mut encoder = Encoder::new(codec);
        let (mut units, mut streams) = (Vec::new(), Vec::new());
        for unit in contents() {
            let mut stream = Vec::new();
            if encoder.encode(&unit, &mut stream).expect("the codec is known").is_some() {
                units.push(unit);
                streams.push(stream);
            }
        }
        Self { units, streams }
    }

    fn group<'a>(&self, c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Bytes((self.units.len() * UNIT) as u64)).sample_size(10);
        group
    }

    /// What is left of the contents, per cent.
    fn ratio(&self) -> f64 {
        let stored: usize = self.streams.iter().map(Vec::len).sum();
        100.0 * stored as f64 / (self.units.len() * UNIT) as f64
    }
}

fn decode(group: &mut BenchmarkGroup<'_, WallTime>, codec: Codec, samples: &Samples) {
    let (mut decoder, mut out) = (Decoder::new(), vec![0; UNIT]);
    group.bench_function("instar/64KiB", |b| {
        b.iter(|| {
            for stream in &samples.streams {
                decoder.decode(codec, stream, &mut out).expect("a stream of our own");
                black_box(&out);
            }
        });
    });
}

fn encode(group: &mut BenchmarkGroup<'_, WallTime>, codec: Codec, samples: &Samples) {
    let (mut encoder, mut out) = (Encoder::new(codec), Vec::new());
    group.bench_function("instar/64KiB", |b| {
        b.iter(|| {
            for unit in &samples.units {
                out.clear();
                black_box(encoder.encode(unit, &mut out)).expect("the codec is known");
            }
        });
    });
}

fn deflate(c: &mut Criterion) {
    let samples = Samples::new(Codec::Deflate);
    println!("deflate: {} clusters, {:.1} % of their size", samples.units.len(), samples.ratio());

    let mut group = samples.group(c, "decode-deflate");
    decode(&mut group, Codec::Deflate, &samples);
    let (mut inflate, mut out) = (Box::new(DecompressorOxide::new()), vec![0; UNIT]);
    group.bench_function("miniz_oxide/64KiB", |b| {
        b.iter(|| {
            for stream in &samples.streams {
                inflate.init();
                let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
                black_box(decompress(&mut inflate, stream, &mut out, 0, flags));
            }
        });
    });
    group.finish();

    let mut group = samples.group(c, "encode-deflate");
    encode(&mut group, Codec::Deflate, &samples);
    group.finish();
}

fn zstd(c: &mut Criterion) {
    let samples = Samples::new(Codec::Zstd);
    println!("zstd: {} clusters, {:.1} % of their size", samples.units.len(), samples.ratio());

    let mut group = samples.group(c, "decode-zstd");
    decode(&mut group, Codec::Zstd, &samples);
    let (mut decoder, mut out) = (ruzstd::decoding::FrameDecoder::new(), vec![0; UNIT]);
    group.bench_function("ruzstd/64KiB", |b| {
        b.iter(|| {
            for stream in &samples.streams {
                black_box(decoder.decode_all(stream, &mut out)).expect("a stream of our own");
            }
        });
    });
    group.finish();

    let mut group = samples.group(c, "encode-zstd");
    encode(&mut group, Codec::Zstd, &samples);
    group.bench_function("ruzstd/64KiB", |b| {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        b.iter(|| {
            for unit in &samples.units {
                black_box(ruzstd::encoding::compress_to_vec(unit.as_slice(), level));
            }
        });
    });
    group.finish();
}

criterion_group!(benches, deflate, zstd);
criterion_main!(benches);
