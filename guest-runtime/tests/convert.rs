//! The operations on the host's platform, against the installed qemu-img: same images, byte for byte.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use instar_guest::host::Host;
use instar_guest::ops::serve_convert;
use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{
    Backing, BackingChoice, Below, Call, Cause, ConvertReply, ConvertRequest, Failure, FileRole, Format, OpenFile,
    Preallocation, Qcow2Options, Request, Source, Target, call, reply,
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

/// Text, noise, zeroes and holes, in runs of all sizes.
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
        let run = (1 + next() as usize % (1 << (9 + next() % 10))).min(len - at);
        match next() % 4 {
            0 => disk[at..at + run].iter_mut().for_each(|byte| *byte = next() as u8),
            1 => disk[at..at + run].fill(next() as u8),
            _ => {}
        }
        at += run;
    }
    disk
}

/// Opens what images name, in one directory, and makes the target there.
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

fn convert(host: &Host, request: ConvertRequest) -> Result<ConvertReply, Failure> {
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

fn request(source: Source, format: Format, qcow2: Qcow2Options) -> ConvertRequest {
    ConvertRequest {
        sources: vec![source],
        target: Target {
            format: format.into(),
            existing: false,
            qcow2: Some(qcow2),
            preallocation: Preallocation::Off.into(),
            backing: None,
            ..Target::default()
        },
        sparse_bytes: 4096,
        threads: 4,
        ..ConvertRequest::default()
    }
}

/// Name of qemu-img's options, and ours.
fn variants() -> Vec<(&'static str, Qcow2Options)> {
    let plain = Qcow2Options::default;
    vec![
        ("cluster_size=64k", plain()),
        ("cluster_size=4k,compat=0.10", Qcow2Options { version: Some(2), cluster_size: Some(4096), ..plain() }),
        ("cluster_size=512", Qcow2Options { cluster_size: Some(512), ..plain() }),
        ("cluster_size=2M", Qcow2Options { cluster_size: Some(2 << 20), ..plain() }),
        ("extended_l2=on", Qcow2Options { extended_l2: true, ..plain() }),
        (
            "refcount_bits=64,cluster_size=1k",
            Qcow2Options { refcount_bits: Some(64), cluster_size: Some(1024), ..plain() },
        ),
        ("refcount_bits=1,lazy_refcounts=on", Qcow2Options { refcount_bits: Some(1), lazy_refcounts: true, ..plain() }),
    ]
}

#[test]
fn raw_to_qcow2_is_byte_identical() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (seed, len) in [(1, 8 << 20), (2, 512 * 12_345), (3, 512), (4, 0)] {
        fs::write(dir.join("disk.raw"), disk(seed, len)).unwrap();
        for (options, ours) in variants() {
            for (sparse, bytes) in [("4k", 4096), ("64k", 65536), ("0", 0)] {
                let args =
                    ["convert", "-f", "raw", "-O", "qcow2", "-S", sparse, "-o", options, "disk.raw", "theirs.qcow2"];
                qemu_img(dir, &args);
                for vcpus in [1, 3] {
                    let host = Host::with_opener(vcpus, opener(dir, "ours.qcow2"));
                    let source = source(&host, dir, "disk.raw", Format::Raw);
                    let request =
                        ConvertRequest { sparse_bytes: bytes, ..request(source, Format::Qcow2, ours.clone()) };
                    let reply = convert(&host, request).unwrap();
                    assert_eq!(reply.virtual_size, len as u64);
                    let same = fs::read(dir.join("ours.qcow2")).unwrap() == fs::read(dir.join("theirs.qcow2")).unwrap();
                    assert!(same, "{options} -S {sparse}, {len} bytes, {vcpus} vCPUs");
                }
            }
        }
    }
}

#[test]
fn qcow2_to_raw_gives_the_disk_back() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let disk = disk(5, 512 * 20_001);
    fs::write(dir.join("disk.raw"), &disk).unwrap();
    for (options, _) in variants() {
        for extra in [&[][..], &["-c"], &["-c", "-o", "compression_type=zstd"]] {
            if extra.len() > 1 && options.contains("0.10") {
                continue;
            }
            let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
            args.extend_from_slice(extra);
            args.extend(["disk.raw", "in.qcow2"]);
            qemu_img(dir, &args);
            for vcpus in [1, 2] {
                let host = Host::with_opener(vcpus, opener(dir, "out.raw"));
                let source = source(&host, dir, "in.qcow2", Format::Unknown);
                convert(&host, request(source, Format::Raw, Qcow2Options::default())).unwrap();
                assert!(fs::read(dir.join("out.raw")).unwrap() == disk, "{options} {extra:?}, {vcpus} vCPUs");
            }
        }
    }
}

#[test]
fn compressed_targets_pass_check_and_compare() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("disk.raw"), disk(6, 512 * 9_999)).unwrap();
    for (options, ours) in variants() {
        for zstd in [false, true] {
            if zstd && ours.version == Some(2) {
                continue;
            }
            let host = Host::with_opener(3, opener(dir, "out.qcow2"));
            let source = source(&host, dir, "disk.raw", Format::Raw);
            let request = request(source, Format::Qcow2, Qcow2Options { zstd, ..ours.clone() });
            convert(&host, ConvertRequest { compress: true, ..request }).unwrap();
            qemu_img(dir, &["check", "-q", "out.qcow2"]);
            qemu_img(dir, &["compare", "-q", "-f", "raw", "-F", "qcow2", "disk.raw", "out.qcow2"]);
            // The count is left out of the report where it is 0.
            let check = ["check", "--output=json", "out.qcow2"];
            let report = Command::new("qemu-img").current_dir(dir).args(check).output().unwrap().stdout;
            assert!(String::from_utf8_lossy(&report).contains("compressed-clusters"), "{options}");
        }
    }
}

/// A chain, and the same chain copied onto its own base.
#[test]
fn chains_are_flattened_and_rebuilt() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "base.qcow2", "9M"]);
    let write = |name: &str, commands: &[&str]| {
        let mut io = Command::new("qemu-io");
        commands.iter().for_each(|command| {
            io.args(["-c", command]);
        });
        assert!(io.current_dir(dir).arg(name).stdout(Stdio::null()).status().unwrap().success());
    };
    write("base.qcow2", &["write -P 1 0 1M", "write -P 2 5M 64k", "write -P 3 8M 4k"]);
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "11M"]);
    write("top.qcow2", &["write -P 5 0 512", "write -z 512k 64k", "write -P 6 10M 70k", "write -P 0 5M 64k"]);
    for (format, name) in [(Format::Raw, "raw"), (Format::Qcow2, "qcow2")] {
        qemu_img(dir, &["convert", "-O", name, "top.qcow2", "theirs"]);
        let host = Host::with_opener(2, opener(dir, "ours"));
        let source = source(&host, dir, "top.qcow2", Format::Qcow2);
        convert(&host, request(source, format, Qcow2Options::default())).unwrap();
        assert!(fs::read(dir.join("ours")).unwrap() == fs::read(dir.join("theirs")).unwrap(), "{name}");
    }
    qemu_img(dir, &["convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2", "theirs"]);
    let host = Host::with_opener(2, opener(dir, "ours"));
    let mut request = request(source(&host, dir, "top.qcow2", Format::Qcow2), Format::Qcow2, Qcow2Options::default());
    request.target.backing = Some(Backing {
        name: b"base.qcow2".to_vec(),
        format_name: b"qcow2".to_vec(),
        image: Some(source(&host, dir, "base.qcow2", Format::Qcow2)),
    });
    convert(&host, request).unwrap();
    assert!(fs::read(dir.join("ours")).unwrap() == fs::read(dir.join("theirs")).unwrap(), "-B");
}

/// What the user says of the image below decides what the host is asked for.
#[test]
fn images_below_are_asked_for_as_the_user_says() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "alone.qcow2", "1M"]);
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-u", "-b", "nowhere", "-F", "vmdk", "top.qcow2", "1M"]);
    fs::write(dir.join("disk.raw"), [7; 1 << 20]).unwrap();
    for (image, choice, format, wanted) in [
        ("top.qcow2", BackingChoice::Recorded, Format::Unknown, Some(("nowhere", Format::Vmdk))),
        ("top.qcow2", BackingChoice::Adjusted, Format::Raw, Some(("nowhere", Format::Raw))),
        ("top.qcow2", BackingChoice::Named, Format::Unknown, Some(("nowhere", Format::Vmdk))),
        ("top.qcow2", BackingChoice::Hidden, Format::Unknown, None),
        ("alone.qcow2", BackingChoice::Recorded, Format::Unknown, None),
        ("alone.qcow2", BackingChoice::Adjusted, Format::Raw, Some(("", Format::Raw))),
        ("alone.qcow2", BackingChoice::Named, Format::Raw, Some(("", Format::Raw))),
        ("alone.qcow2", BackingChoice::Hidden, Format::Unknown, None),
    ] {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, disk, mut target) = (asked.clone(), dir.join("disk.raw"), opener(dir, "ours.raw"));
        let host = Host::with_opener(1, move |wanted| match wanted.role() {
            FileRole::Target => target(wanted),
            _ => {
                let name = String::from_utf8(wanted.name.clone()).unwrap();
                log.lock().unwrap().push((wanted.role(), name, wanted.format()));
                File::open(&disk).ok()
            }
        });
        let below = vec![Below { choice: choice.into(), format: format.into(), ..Below::default() }];
        let source = Source { below, ..source(&host, dir, image, Format::Qcow2) };
        let done = convert(&host, request(source, Format::Raw, Qcow2Options::default()));
        let wanted: Vec<_> =
            wanted.into_iter().map(|(name, format)| (FileRole::Backing, name.to_owned(), format)).collect();
        assert_eq!(*asked.lock().unwrap(), wanted, "{image} {choice:?}");
        let byte = match wanted.first() {
            Some((_, _, Format::Vmdk)) => {
                assert_eq!(done.unwrap_err().cause(), Cause::VmdkFault);
                continue;
            }
            wanted => u8::from(wanted.is_some()) * 7,
        };
        done.unwrap();
        assert!(fs::read(dir.join("ours.raw")).unwrap().iter().all(|found| *found == byte), "{image} {choice:?}");
    }
    let host = Host::with_opener(1, opener(dir, "ours.raw"));
    let below = vec![Below { choice: BackingChoice::Named.into(), ..Below::default() }];
    let raw = Source { below, ..source(&host, dir, "disk.raw", Format::Raw) };
    let failure = convert(&host, request(raw, Format::Raw, Qcow2Options::default())).unwrap_err();
    assert_eq!(failure.cause(), Cause::BackingUnsupported);
}
