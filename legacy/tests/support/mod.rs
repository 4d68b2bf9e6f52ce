//! Disks to compare, and the genuine qemu-img to compare with.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::Path;
use std::process::Command;

use instar_blockio::{BlockAlloc, BlockWrite, Codec, MemBlock};
use instar_codec::Encoder;
use instar_legacy::{parallels, qcow, qed, vdi};

/// Is qemu-img there? Says loudly if not.
pub fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: qemu-img is not installed, so nothing was compared with it");
    }
    found
}

/// Runs qemu-img, which must succeed.
pub fn qemu_img(dir: &Path, args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).current_dir(dir).output().expect("qemu-img runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A disk of sparse contents: runs of different lengths at odd places, the same for the same size.
pub fn contents(size: usize) -> Vec<(usize, Vec<u8>)> {
    let mut runs = Vec::new();
    let (mut at, mut seed) = (0usize, 0x1234_5678u32);
    while at < size {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let len = (1 + (seed >> 8) as usize % 90_000).min(size - at);
        let byte = (seed >> 24) as u8 | 1;
        runs.push((at, (0..len).map(|i| byte.wrapping_add((i / 7) as u8)).collect()));
        at += len + (seed >> 4) as usize % 3_000_000;
    }
    runs
}

/// The same as flat bytes.
pub fn flat(size: usize) -> Vec<u8> {
    let mut disk = vec![0; size];
    for (at, bytes) in contents(size) {
        disk[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    disk
}

/// An image file of the format, with a disk of `size` bytes, filled.
pub fn made(format: &str, size: usize, fill: bool) -> Vec<u8> {
    macro_rules! make {
        ($create:expr) => {{
            let mut writer = $create.expect("good options");
            if fill {
                contents(size).iter().for_each(|(at, bytes)| writer.write_at(*at as u64, bytes).expect("room"));
            }
            writer.finish().expect("room").into_bytes()
        }};
    }
    let (file, id, size64) = (MemBlock::default(), Default::default(), size as u64);
    match format {
        "qcow" => make!(qcow::create(file, id, &qcow::CreateOptions { size: size64, backing_file: None })),
        "qed" => make!(qed::create(file, id, &qed::CreateOptions { size: size64, ..Default::default() })),
        "qed4k" => {
            let options = qed::CreateOptions { size: size64, cluster_size: 4096, table_size: 2, ..Default::default() };
            make!(qed::create(file, id, &options))
        }
        "vdi" => make!(vdi::create(file, id, &vdi::CreateOptions { size: size64, ..Default::default() })),
        "vdi-static" => {
            let options = vdi::CreateOptions { size: size64, is_static: true, ..Default::default() };
            make!(vdi::create(file, id, &options))
        }
        "parallels" => {
            make!(parallels::create(file, id, &parallels::CreateOptions { size: size64, ..Default::default() }))
        }
        "parallels-odd" => {
            let options = parallels::CreateOptions { size: size64, cluster_size: 1536 * 5 };
            make!(parallels::create(file, id, &options))
        }
        other => panic!("no format {other}"),
    }
}

/// A qcow image with compressed clusters.
pub fn compressed_qcow(size: usize) -> Vec<u8> {
    let disk = flat(size);
    let mut file = MemBlock::default();
    let mut streams = Vec::new();
    let options = qcow::CreateOptions { size: size as u64, backing_file: None };
    let mut writer = qcow::create(&mut file, Default::default(), &options).expect("good options");
    let mut encoder = Encoder::new(Codec::Deflate);
    for (index, cluster) in disk.chunks(4096).enumerate() {
        let offset = index as u64 * 4096;
        let mut whole = cluster.to_vec();
        whole.resize(4096, 0);
        let mut stream = Vec::new();
        if cluster.iter().all(|&byte| byte == 0) {
            continue;
        }
        match encoder.encode(&whole, &mut stream).expect("memory") {
            Some(len) => {
                let place = writer.reserve_compressed(offset, len as u32).expect("room");
                streams.push((place.host, stream));
                writer.commit(place).expect("room");
            }
            None => writer.write_at(offset, cluster).expect("room"),
        }
    }
    writer.finish().expect("room");
    streams.iter().for_each(|(at, stream)| file.write_at(*at, stream).expect("room"));
    file.into_bytes()
}
