//! LUKS: sectors through the ciphers, and the derivation of keys.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use instar_luks::{CipherMode, CipherSpec, Hash};

/// Bytes of a piece, as a conversion works on them.
const PIECE: usize = 256 << 10;
/// Iterations of one key derivation.
const ITERATIONS: u32 = 1000;

/// Cipher, mode and bytes of the key.
const CIPHERS: &[(&str, &str, u32)] = &[
    ("aes", "xts-plain64", 64),
    ("aes", "xts-plain64", 32),
    ("aes", "cbc-essiv:sha256", 32),
    ("aes", "ctr-plain64", 32),
    ("serpent", "xts-plain64", 64),
    ("twofish", "xts-plain64", 64),
    ("cast5", "cbc-plain64", 16),
];

fn sectors(c: &mut Criterion) {
    let key: Vec<u8> = (0..64).collect();
    let mut piece = vec![0x5a; PIECE];
    for (algorithm, mode, key_len) in CIPHERS {
        let spec = CipherSpec::named(algorithm.as_bytes(), CipherMode::split(mode.as_bytes()), *key_len);
        let spec = spec.expect("parts that fit");
        let mut group = c.benchmark_group(format!("luks-{algorithm}-{mode}-{}", key_len * 8));
        group.throughput(Throughput::Bytes(PIECE as u64)).sample_size(10);
        for sector in [512, 4096] {
            let cipher = spec.with_key(&key[..*key_len as usize], sector).expect("a key that fits");
            group.bench_function(format!("decrypt/{sector}B"), |b| {
                b.iter(|| cipher.decrypt(0, &mut piece).expect("whole sectors"));
            });
            group.bench_function(format!("encrypt/{sector}B"), |b| {
                b.iter(|| cipher.encrypt(0, &mut piece).expect("whole sectors"));
            });
        }
    }
}

fn keys(c: &mut Criterion) {
    let mut group = c.benchmark_group("luks-pbkdf2");
    group.throughput(Throughput::Elements(ITERATIONS.into())).sample_size(10);
    for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
        let mut key = vec![0; hash.digest_len()];
        group.bench_function(format!("{hash}/{ITERATIONS}"), |b| {
            b.iter(|| hash.pbkdf2(b"passphrase", b"salt", ITERATIONS, &mut key).expect("iterations"));
        });
    }
}

criterion_group!(benches, sectors, keys);
criterion_main!(benches);
