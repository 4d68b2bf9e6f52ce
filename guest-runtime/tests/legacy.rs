//! Conversions from and to the older formats on the host's platform, against the installed qemu-img.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

use instar_blockio::Codec;
use instar_codec::Encoder;
use instar_guest::host::Host;
use instar_guest::ops::serve_convert;
use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{
    Backing, Call, Cause, ConvertReply, ConvertRequest, Failure, FileRole, Format, OpenFile, ParallelsOptions,
    QedOptions, Request, Source, Target, VdiOptions, call, reply,
};
use prost::Message;

fn qemu_is_missing() -> bool {
    let missing = Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_err();
    if missing {
        eprintln!("SKIPPED: qemu-img is not installed, so there is nothing to compare with");
    }
    missing
}

fn qemu_img(dir: &Path, args: &[&str]) {
    let status = Command::new("qemu-img").current_dir(dir).args(args).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "qemu-img {args:?}: {status}");
}

/// Data and zeroes in runs of all sizes.
fn disk(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut disk = vec![0; len];
    let mut at = 0;
    while at < len {
        let run = (1 + next() as usize % (1 << (9 + next() % 12))).min(len - at);
        if next() % 3 == 0 {
            disk[at..at + run].iter_mut().for_each(|byte| *byte = next() as u8);
        }
        at += run;
    }
    disk
}

fn opener(dir: &Path, target: &str) -> impl FnMut(&OpenFile) -> Option<File> + Send + 'static {
    let (dir, target) = (dir.to_path_buf(), dir.join(target));
    move |wanted| match wanted.role() {
        FileRole::Target => OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&target).ok(),
        _ => File::open(dir.join(std::str::from_utf8(&wanted.name).ok()?)).ok(),
    }
}

fn source(host: &Host, dir: &Path, name: &str, format: Format) -> Source {
    let device = host.grant(File::open(dir.join(name)).unwrap(), DeviceFlags::empty()).unwrap();
    Source { device, format: format.into(), ..Source::default() }
}

fn run(host: &Host, request: ConvertRequest) -> Result<ConvertReply, Failure> {
    serve_convert(host, &Request { operation: Some(Operation::Convert(request)) }.encode_to_vec());
    match host.calls().pop() {
        Some(Call { kind: Some(call::Kind::Done(done)) }) => match done.result {
            Some(reply::Result::Convert(reply)) => Ok(reply),
            Some(reply::Result::Failure(failure)) => Err(failure),
            other => panic!("unexpected reply {other:?}"),
        },
        other => panic!("unexpected end {other:?}"),
    }
}

/// Converts a file of `dir` into another.
fn convert(dir: &Path, from: (&str, Format), to: &str, target: Target, vcpus: usize) -> Result<ConvertReply, Failure> {
    let host = Host::with_opener(vcpus, opener(dir, to));
    let sources = vec![source(&host, dir, from.0, from.1)];
    run(&host, ConvertRequest { sources, target, sparse_bytes: 4096, threads: 4, ..ConvertRequest::default() })
}

fn target(format: Format) -> Target {
    Target { format: format.into(), ..Target::default() }
}

fn variants() -> Vec<(&'static str, &'static str, Target)> {
    let qed =
        |cluster_size, table_size| Some(QedOptions { cluster_size: Some(cluster_size), table_size: Some(table_size) });
    let parallels = |cluster_size| Some(ParallelsOptions { cluster_size: Some(cluster_size) });
    vec![
        ("qcow", "encryption=off", target(Format::Qcow)),
        ("qed", "cluster_size=64k", target(Format::Qed)),
        ("qed", "cluster_size=4k,table_size=2", Target { qed: qed(4096, 2), ..target(Format::Qed) }),
        ("qed", "cluster_size=1M,table_size=16", Target { qed: qed(1 << 20, 16), ..target(Format::Qed) }),
        ("vdi", "static=off", target(Format::Vdi)),
        (
            "vdi",
            "static=on",
            Target { vdi: Some(VdiOptions { is_static: true, uuids: Vec::new() }), ..target(Format::Vdi) },
        ),
        ("parallels", "cluster_size=1M", target(Format::Parallels)),
        ("parallels", "cluster_size=4k", Target { parallels: parallels(4096), ..target(Format::Parallels) }),
    ]
}

fn format_of(driver: &str) -> Format {
    Format::of_driver(driver.as_bytes()).unwrap()
}

#[test]
fn images_are_those_of_qemu_img_and_read_back() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (seed, len) in [(1, 20 << 20), (2, 512 * 12_345), (3, 512), (4, 0)] {
        let disk = disk(seed, len);
        fs::write(dir.join("raw"), &disk).unwrap();
        for (driver, options, wanted) in variants() {
            if (driver, len) == ("qcow", 0) {
                let failure = convert(dir, ("raw", Format::Raw), "ours", wanted, 1).unwrap_err();
                assert_eq!(failure.cause(), Cause::InvalidOptions);
                continue;
            }
            qemu_img(dir, &["convert", "-f", "raw", "-O", driver, "-o", options, "raw", "theirs"]);
            let mut theirs = fs::read(dir.join("theirs")).unwrap();
            if driver == "vdi" {
                // Its UUIDs are random.
                theirs[392..424].fill(0);
            }
            for vcpus in [1, 3] {
                convert(dir, ("raw", Format::Raw), "ours", wanted.clone(), vcpus).unwrap();
                let ours = fs::read(dir.join("ours")).unwrap();
                assert!(
                    ours == theirs,
                    "{driver} {options}, {len} bytes, {vcpus} vCPUs: {} {}",
                    ours.len(),
                    theirs.len()
                );
                convert(dir, ("theirs", format_of(driver)), "back", target(Format::Raw), vcpus).unwrap();
                assert!(fs::read(dir.join("back")).unwrap() == disk, "{driver} {options} read, {len} bytes");
            }
        }
    }
}

#[test]
fn compressed_qcow_is_written_and_read() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let text: Vec<u8> = disk(7, 5 << 20).iter().map(|byte| byte & 3).collect();
    fs::write(dir.join("raw"), &text).unwrap();
    let host = Host::with_opener(3, opener(dir, "ours"));
    let sources = vec![source(&host, dir, "raw", Format::Raw)];
    let request = ConvertRequest {
        sources,
        target: target(Format::Qcow),
        compress: true,
        sparse_bytes: 4096,
        threads: 4,
        ..ConvertRequest::default()
    };
    run(&host, request).unwrap();
    assert!(fs::metadata(dir.join("ours")).unwrap().len() < (text.len() / 2) as u64);
    qemu_img(dir, &["compare", "-q", "-f", "raw", "-F", "qcow", "raw", "ours"]);
    convert(dir, ("ours", Format::Unknown), "back", target(Format::Raw), 2).unwrap();
    assert!(fs::read(dir.join("back")).unwrap() == text);
}

/// Chains of qcow and QED, made by qemu-img and here.
#[test]
fn chains_are_followed_and_made() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (base, mut top) = (disk(11, 3 << 20), disk(11, 3 << 20));
    for (at, len) in [(0, 100), (70_000, 300_000), ((3 << 20) - 5, 5)] {
        top[at..at + len].iter_mut().for_each(|byte| *byte = !*byte);
    }
    top[1_000_000..1_500_000].fill(0);
    fs::write(dir.join("base"), &base).unwrap();
    fs::write(dir.join("top"), &top).unwrap();
    for driver in ["qcow", "qed"] {
        qemu_img(dir, &["convert", "-f", "raw", "-O", driver, "-B", "base", "-F", "raw", "top", "theirs"]);
        convert(dir, ("theirs", Format::Unknown), "back", target(Format::Raw), 2).unwrap();
        assert!(fs::read(dir.join("back")).unwrap() == top, "{driver}: chain of qemu-img");

        let host = Host::with_opener(2, opener(dir, "ours"));
        let below = source(&host, dir, "base", Format::Raw);
        let backing = Backing { name: b"base".to_vec(), format_name: b"raw".to_vec(), image: Some(below) };
        let sources = vec![source(&host, dir, "top", Format::Raw)];
        let target = Target { backing: Some(backing), ..target(format_of(driver)) };
        run(&host, ConvertRequest { sources, target, sparse_bytes: 4096, threads: 2, ..ConvertRequest::default() })
            .unwrap();
        qemu_img(dir, &["compare", "-q", "-f", "raw", "-F", driver, "top", "ours"]);
        // qemu-img writes parts of QED's clusters, which are then allocated one by one.
        let same = fs::read(dir.join("ours")).unwrap() == fs::read(dir.join("theirs")).unwrap();
        assert!(same || driver == "qed", "{driver}: overlay");
    }
}

/// Blocks of 16 MiB, more than a vCPU decodes by itself.
#[test]
fn large_units_are_decoded() {
    const BLOCK: usize = 16 << 20;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let disk: Vec<u8> = (0..2 * BLOCK).map(|at| (at / 100_000) as u8).collect();
    let mut streams = Vec::new();
    let mut ends = vec![0];
    let mut encoder = Encoder::new(Codec::Zlib);
    for block in disk.chunks(BLOCK) {
        encoder.encode(block, &mut streams).unwrap().unwrap();
        ends.push(streams.len());
    }
    let mut image = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n".to_vec();
    image.resize(128, 0);
    image.extend((BLOCK as u32).to_be_bytes());
    image.extend(2u32.to_be_bytes());
    ends.iter().for_each(|end| image.extend((160 + *end as u64).to_be_bytes()));
    image.extend(streams);
    fs::write(dir.join("image"), image).unwrap();
    for target in [target(Format::Raw), target(Format::Vdi)] {
        let format = target.format();
        convert(dir, ("image", Format::Unknown), "out", target, 3).unwrap();
        convert(dir, ("out", format), "back", self::target(Format::Raw), 2).unwrap();
        assert!(fs::read(dir.join("back")).unwrap() == disk);
    }
}

#[test]
fn existing_images_are_written_into() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (old, new) = (disk(21, 5 << 20), disk(22, 512 * 6001));
    let mut expected = new.clone();
    expected.extend_from_slice(&old[new.len()..]);
    fs::write(dir.join("old"), &old).unwrap();
    fs::write(dir.join("new"), &new).unwrap();
    fs::write(dir.join("expected"), &expected).unwrap();
    for driver in ["qcow", "qed", "vdi", "parallels"] {
        qemu_img(dir, &["convert", "-f", "raw", "-O", driver, "old", "image"]);
        let path = dir.join("image");
        let open = move |wanted: &OpenFile| match wanted.role() {
            FileRole::Target => OpenOptions::new().read(true).write(true).open(&path).ok(),
            _ => None,
        };
        let host = Host::with_opener(2, open);
        let sources = vec![source(&host, dir, "new", Format::Raw)];
        let target = Target { existing: true, ..target(format_of(driver)) };
        run(&host, ConvertRequest { sources, target, sparse_bytes: 4096, threads: 2, ..ConvertRequest::default() })
            .unwrap();
        qemu_img(dir, &["compare", "-q", "-f", "raw", "-F", driver, "expected", "image"]);
        if driver != "qcow" {
            qemu_img(dir, &["check", "-q", "-f", driver, "image"]);
        }
    }
}
