//! Fresh images against `qemu-img`: the same options and the same requests must give the same bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use instar_blockio::file::HostFile;
use instar_blockio::{BlockAlloc, BlockMapExt, BlockRead, BlockWrite, Codec, ExtentKind, FileId, Result};
use instar_qcow2::{CreateOptions, OptionError, Preallocation, Writer, create};

const REQUEST: usize = 2 << 20;

/// Runs `qemu-img`; `None`, said loudly, if it is not installed.
fn qemu_img(dir: &Path, args: &[&str]) -> Option<bool> {
    match Command::new("qemu-img").current_dir(dir).args(args).output() {
        Ok(output) => {
            if !output.status.success() {
                eprintln!("qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            }
            Some(output.status.success())
        }
        Err(error) => {
            eprintln!("SKIPPED: qemu-img can't be run: {error}");
            None
        }
    }
}

/// A value for `-o` that describes the options.
fn option_list(options: &CreateOptions) -> String {
    let mut list = vec![
        format!("compat={}", if options.version == 2 { "0.10" } else { "1.1" }),
        format!("cluster_size={}", options.cluster_size),
        format!("refcount_bits={}", options.refcount_bits),
        format!("lazy_refcounts={}", if options.lazy_refcounts { "on" } else { "off" }),
        format!("extended_l2={}", if options.extended_l2 { "on" } else { "off" }),
        format!("compression_type={}", if options.compression == Codec::Zstd { "zstd" } else { "zlib" }),
        format!(
            "preallocation={}",
            match options.preallocation {
                Preallocation::Off => "off",
                Preallocation::Metadata => "metadata",
                Preallocation::Falloc => "falloc",
                Preallocation::Full => "full",
            }
        ),
    ];
    if let Some(name) = &options.data_file {
        // The same name is stored by both, so the file that qemu-img made is moved out of the way afterwards.
        list.push(format!("data_file={}", String::from_utf8_lossy(name)));
        list.push(format!("data_file_raw={}", if options.data_file_raw { "on" } else { "off" }));
    }
    list.join(",")
}

fn open_new(path: PathBuf) -> HostFile {
    HostFile::create(&path).unwrap()
}

fn writer(dir: &Path, options: &CreateOptions) -> Writer<HostFile> {
    let data = options.data_file.as_ref().map(|_| (open_new(dir.join("ours.data")), FileId(1)));
    create(open_new(dir.join("ours")), FileId(0), data, options).unwrap()
}

fn assert_same(dir: &Path, ours: &str, theirs: &str, what: &dyn std::fmt::Debug) {
    let (ours, theirs) = (fs::read(dir.join(ours)).unwrap(), fs::read(dir.join(theirs)).unwrap());
    if ours != theirs {
        let at = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        panic!("{what:?}: lengths {} and {}, first difference at {at:?}", ours.len(), theirs.len());
    }
}

fn check_create(options: &CreateOptions) -> Option<()> {
    let dir = tempfile::tempdir().unwrap();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-u"];
    let list = option_list(options);
    args.extend(["-o", &list]);
    let (backing, format);
    if let Some(name) = &options.backing_file {
        backing = String::from_utf8_lossy(name).into_owned();
        args.extend(["-b", &backing]);
    }
    if let Some(name) = &options.backing_format {
        format = String::from_utf8_lossy(name).into_owned();
        args.extend(["-F", &format]);
    }
    let size = options.size.to_string();
    args.extend(["theirs", &size]);
    assert!(qemu_img(dir.path(), &args)?, "{options:?}");
    writer(dir.path(), options).finish().unwrap();
    assert_same(dir.path(), "ours", "theirs", options);
    if let Some(name) = &options.data_file {
        assert_same(dir.path(), "ours.data", &String::from_utf8_lossy(name), options);
    }
    Some(())
}

fn defaults(size: u64) -> CreateOptions {
    CreateOptions { size, ..CreateOptions::default() }
}

#[test]
fn create_sizes_and_cluster_sizes() {
    for bits in 9..=21 {
        for size in [0, 512, 1000, 1 << 20, 10 << 20, (1 << 30) + 512] {
            let options = CreateOptions { cluster_size: 1 << bits, ..defaults(size) };
            if check_create(&options).is_none() {
                return;
            }
        }
    }
}

#[test]
fn create_large_disks() {
    let tib = 1 << 40;
    for (cluster_size, refcount_bits, size) in [
        (65536, 16, tib),
        (65536, 16, 64 * tib),
        (65536, 64, 16 * tib + 512),
        (65536, 1, 60 * tib),
        (4096, 16, 2 * tib),
        (512, 16, 1 << 30),
        (512, 16, 12 << 30),
        (512, 64, 3 << 30),
        (512, 1, 16 << 30),
        (512, 8, 10 << 30),
        (1024, 32, 20 << 30),
        (2 << 20, 64, 8 << 50),
    ] {
        let options = CreateOptions { cluster_size, refcount_bits, ..defaults(size) };
        if check_create(&options).is_none() {
            return;
        }
    }
}

#[test]
fn create_option_combinations() {
    let mut all = Vec::new();
    for size in [1 << 20, 3_000_000] {
        for extended_l2 in [false, true] {
            for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
                all.push(CreateOptions { extended_l2, refcount_bits, ..defaults(size) });
            }
            for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
                for cluster_size in [16384, 65536, 1 << 20] {
                    all.push(CreateOptions { extended_l2, preallocation, cluster_size, ..defaults(size) });
                }
            }
        }
        all.push(CreateOptions { version: 2, ..defaults(size) });
        all.push(CreateOptions { lazy_refcounts: true, compression: Codec::Zstd, ..defaults(size) });
        for version in [2, 3] {
            all.push(CreateOptions {
                version,
                backing_file: Some(b"dir/base.img".to_vec()),
                backing_format: Some(b"raw".to_vec()),
                ..defaults(size)
            });
        }
        all.push(CreateOptions {
            backing_file: Some(vec![b'x'; 900]),
            backing_format: Some(b"qcow2".to_vec()),
            cluster_size: 2048,
            ..defaults(size)
        });
        all.push(CreateOptions {
            backing_file: Some(b"base".to_vec()),
            backing_format: Some(b"qcow2".to_vec()),
            extended_l2: true,
            preallocation: Preallocation::Metadata,
            ..defaults(size)
        });
        for data_file_raw in [false, true] {
            for preallocation in
                [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full]
            {
                for extended_l2 in [false, true] {
                    all.push(CreateOptions {
                        data_file: Some(b"theirs.data".to_vec()),
                        data_file_raw,
                        preallocation,
                        extended_l2,
                        ..defaults(size)
                    });
                }
            }
        }
    }
    for options in all {
        if check_create(&options).is_none() {
            return;
        }
    }
}

#[test]
fn preallocation_over_many_tables() {
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc] {
        for (cluster_size, refcount_bits, size) in [
            (512, 16, 3 << 20),
            (512, 64, 5 << 20),
            (512, 1, 9 << 20),
            (512, 64, 40 << 20),
            (4096, 64, 300 << 20),
            (4096, 32, (100 << 20) + 4096 * 3 + 512),
            (8192, 64, 1 << 30),
        ] {
            let options = CreateOptions { cluster_size, refcount_bits, preallocation, ..defaults(size) };
            if check_create(&options).is_none() {
                return;
            }
        }
    }
}

#[test]
fn contradictions() {
    let base = || Some(b"b".to_vec());
    let v2 = CreateOptions { version: 2, ..defaults(0) };
    for (options, error) in [
        (CreateOptions { version: 4, ..defaults(0) }, OptionError::Version(4)),
        (CreateOptions { cluster_size: 1000, lazy_refcounts: true, ..v2.clone() }, OptionError::ClusterSize(1000)),
        (CreateOptions { cluster_size: 4 << 20, ..defaults(0) }, OptionError::ClusterSize(4 << 20)),
        (CreateOptions { extended_l2: true, cluster_size: 4096, ..v2.clone() }, OptionError::ExtendedL2Version),
        (
            CreateOptions { extended_l2: true, cluster_size: 4096, ..defaults(0) },
            OptionError::ExtendedL2ClusterSize(4096),
        ),
        (
            CreateOptions { preallocation: Preallocation::Full, backing_file: base(), refcount_bits: 3, ..defaults(0) },
            OptionError::BackingWithPreallocation,
        ),
        (CreateOptions { backing_format: base(), ..defaults(0) }, OptionError::BackingFormatAlone),
        (CreateOptions { lazy_refcounts: true, refcount_bits: 3, ..v2.clone() }, OptionError::LazyRefcountsVersion),
        (CreateOptions { refcount_bits: 3, data_file_raw: true, ..defaults(0) }, OptionError::RefcountBits(3)),
        (CreateOptions { refcount_bits: 0, ..defaults(0) }, OptionError::RefcountBits(0)),
        (CreateOptions { refcount_bits: 8, compression: Codec::Zstd, ..v2.clone() }, OptionError::RefcountBitsVersion),
        (CreateOptions { data_file_raw: true, ..v2.clone() }, OptionError::DataFileRawAlone),
        (
            CreateOptions { data_file_raw: true, data_file: base(), backing_file: base(), ..defaults(0) },
            OptionError::BackingWithDataFileRaw,
        ),
        (CreateOptions { data_file: base(), compression: Codec::Zstd, ..v2.clone() }, OptionError::DataFileVersion),
        (CreateOptions { compression: Codec::Zstd, ..v2 }, OptionError::CompressionVersion),
        (CreateOptions { cluster_size: 512, ..defaults(129 << 30) }, OptionError::SizeTooLarge(129 << 30)),
        (defaults(u64::MAX), OptionError::SizeTooLarge(u64::MAX)),
        (CreateOptions { backing_file: Some(vec![b'x'; 1024]), ..defaults(0) }, OptionError::BackingNameTooLong(1024)),
    ] {
        assert_eq!(options.check(), Err(error), "{options:?}");
    }
    assert_eq!(defaults(128 << 30).check(), Ok(()));
}

/// Contents of a disk in pieces of 4 KiB: zero or not, by a small generator. No piece is a hole of the source file, so
/// that qemu-img looks at all of them.
fn contents(size: usize, seed: u64, density: u64) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut state = seed | 1;
    for (index, piece) in bytes.chunks_mut(4096).enumerate() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        if (state >> 33) % 100 < density {
            piece.fill(index as u8 | 1);
        }
    }
    bytes
}

/// Runs of 4 KiB pieces that are not zero, inside requests of 2 MiB: what `qemu-img convert` writes.
fn runs(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for (at, piece) in bytes.chunks(4096).enumerate().map(|(index, piece)| (index * 4096, piece)) {
        if piece.iter().any(|&byte| byte != 0) {
            match found.last_mut() {
                Some((start, len)) if *start + *len == at && at % REQUEST != 0 => *len += piece.len(),
                _ => found.push((at, piece.len())),
            }
        }
    }
    found
}

/// Writes as a converting guest does: reserves, writes the file itself, commits.
fn put(writer: &mut Writer<HostFile>, files: &mut [HostFile], offset: usize, bytes: &[u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let place = writer.reserve((offset + done) as u64, (bytes.len() - done) as u64)?;
        let part = &bytes[done..done + place.len as usize];
        files[place.file.0 as usize].write_at(place.host, part)?;
        writer.commit(place)?;
        done += part.len();
    }
    Ok(())
}

fn check_convert(options: &CreateOptions, bytes: &[u8], sparse: bool) -> Option<()> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("source"), bytes).unwrap();
    let list = option_list(options);
    let granularity = if sparse { "4k" } else { "0" };
    let args = ["convert", "-q", "-f", "raw", "-O", "qcow2", "-S", granularity, "-o", &list, "source", "theirs"];
    assert!(qemu_img(dir.path(), &args)?, "{options:?}");
    let options = CreateOptions { size: bytes.len() as u64, ..options.clone() };
    let mut writer = writer(dir.path(), &options);
    let mut files = vec![HostFile::open(&dir.path().join("ours"), true).unwrap()];
    if options.data_file.is_some() {
        files.push(HostFile::open(&dir.path().join("ours.data"), true).unwrap());
    }
    if sparse {
        for (at, len) in runs(bytes) {
            put(&mut writer, &mut files, at, &bytes[at..at + len]).unwrap();
        }
    } else {
        for (index, request) in bytes.chunks(REQUEST).enumerate() {
            put(&mut writer, &mut files, index * REQUEST, request).unwrap();
        }
    }
    writer.finish().unwrap();
    assert_same(dir.path(), "ours", "theirs", &options);
    if let Some(name) = &options.data_file {
        assert_same(dir.path(), "ours.data", &String::from_utf8_lossy(name), &options);
    }
    assert_eq!(qemu_img(dir.path(), &["check", "-q", "ours"]), Some(true));
    Some(())
}

#[test]
fn convert_cluster_sizes_and_refcount_widths() {
    let bytes = contents(9 << 20, 3, 40);
    for bits in [9, 10, 12, 14, 16, 18, 21] {
        for refcount_bits in [1, 16, 64] {
            let options = CreateOptions { cluster_size: 1 << bits, refcount_bits, ..defaults(0) };
            if check_convert(&options, &bytes, true).is_none() {
                return;
            }
        }
    }
}

#[test]
fn convert_versions_and_kinds() {
    for (seed, density) in [(1, 2), (2, 50), (3, 97), (4, 100)] {
        let bytes = contents((21 << 20) + 4096, seed, density);
        let all = [
            defaults(0),
            CreateOptions { version: 2, ..defaults(0) },
            CreateOptions { version: 2, cluster_size: 4096, ..defaults(0) },
            CreateOptions { extended_l2: true, ..defaults(0) },
            CreateOptions { extended_l2: true, cluster_size: 16384, ..defaults(0) },
            CreateOptions { extended_l2: true, cluster_size: 2 << 20, ..defaults(0) },
            CreateOptions { preallocation: Preallocation::Metadata, ..defaults(0) },
            CreateOptions { preallocation: Preallocation::Metadata, extended_l2: true, ..defaults(0) },
            CreateOptions { preallocation: Preallocation::Falloc, cluster_size: 4096, ..defaults(0) },
            CreateOptions { data_file: Some(b"theirs.data".to_vec()), ..defaults(0) },
            CreateOptions { data_file: Some(b"theirs.data".to_vec()), data_file_raw: true, ..defaults(0) },
        ];
        for options in all {
            if check_convert(&options, &bytes, true).is_none() {
                return;
            }
        }
    }
}

#[test]
fn convert_without_holes() {
    let bytes = contents((5 << 20) + 512 * 3, 9, 30);
    for options in [
        defaults(0),
        CreateOptions { cluster_size: 512, refcount_bits: 64, ..defaults(0) },
        CreateOptions { extended_l2: true, cluster_size: 1 << 20, ..defaults(0) },
    ] {
        if check_convert(&options, &bytes, false).is_none() {
            return;
        }
    }
}

/// The refcount table of one cluster is too small and moves, several times for the smallest clusters.
#[test]
fn convert_moves_the_refcount_table() {
    let bytes = contents(48 << 20, 77, 70);
    for (cluster_size, refcount_bits) in [(512, 64), (512, 32), (512, 16), (1024, 64), (2048, 64)] {
        let options = CreateOptions { cluster_size, refcount_bits, ..defaults(0) };
        if check_convert(&options, &bytes, true).is_none() {
            return;
        }
    }
}

/// Compressed streams are taken from qemu-img's own image, so that both store the same ones.
#[test]
fn compressed_clusters_are_packed_alike() {
    for (cluster_size, refcount_bits, extended_l2) in [(65536, 16, false), (4096, 8, false), (65536, 1, true)] {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = contents(6 << 20, 5, 60);
        let mut state = 1u64;
        for (index, byte) in bytes[..2 << 20].iter_mut().enumerate() {
            // Every fourth cluster is noise and stays uncompressed.
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            if index / cluster_size as usize % 4 == 1 || index % 4096 < (state >> 40) as usize % 64 {
                *byte = (state >> 33) as u8;
            }
        }
        fs::write(dir.path().join("source"), &bytes).unwrap();
        let options = CreateOptions { cluster_size, refcount_bits, extended_l2, ..defaults(bytes.len() as u64) };
        let list = option_list(&options);
        let args = ["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", &list, "source", "theirs"];
        let Some(done) = qemu_img(dir.path(), &args) else { return };
        assert!(done);

        let theirs = fs::read(dir.path().join("theirs")).unwrap();
        let map = Writer::open(HostFile::open(&dir.path().join("theirs"), true).unwrap(), FileId(0), None).unwrap();
        let extents: Vec<_> = map.extents(0..map.size()).map(|extent| extent.unwrap()).collect();
        let streams: Vec<u64> = extents
            .iter()
            .filter_map(|extent| match extent.kind {
                ExtentKind::Compressed(run) => Some(run.host),
                _ => None,
            })
            .collect();
        assert!(streams.len() > 20);
        let mut ours = writer(dir.path(), &options);
        let mut file = HostFile::open(&dir.path().join("ours"), true).unwrap();
        for extent in extents {
            match extent.kind {
                ExtentKind::Compressed(run) => {
                    // Up to the next stream, or up to the last byte that is not zero.
                    let next = streams.iter().copied().filter(|&host| host > run.host).min().unwrap_or(u64::MAX);
                    let end = next.min(run.host + u64::from(run.stored_len)).min(theirs.len() as u64) as usize;
                    let stored = &theirs[run.host as usize..end];
                    let len = stored.iter().rposition(|&byte| byte != 0).map_or(1, |last| last + 1);
                    let len = if next == end as u64 { stored.len() } else { len };
                    let place = ours.reserve_compressed(extent.offset, len as u32).unwrap();
                    file.write_at(place.host, &stored[..len]).unwrap();
                    ours.commit(place).unwrap();
                }
                ExtentKind::Data { .. } => {
                    for at in (extent.offset..extent.end()).step_by(cluster_size as usize) {
                        let part = &bytes[at as usize..(at + cluster_size) as usize];
                        let place = ours.reserve(at, cluster_size).unwrap();
                        file.write_at(place.host, part).unwrap();
                        ours.commit(place).unwrap();
                    }
                }
                _ => (),
            }
        }
        ours.align_end();
        ours.finish().unwrap();
        assert_same(dir.path(), "ours", "theirs", &options);
    }
}

#[test]
fn bitmaps() {
    let dir = tempfile::tempdir().unwrap();
    let write = |command: &str| {
        let io = Command::new("qemu-io").current_dir(dir.path()).args(["-c", command, "source"]).output();
        assert!(io.unwrap().status.success());
    };
    let run = |args: &[&str]| qemu_img(dir.path(), args).inspect(|&done| assert!(done));
    let Some(_) = run(&["create", "-q", "-f", "qcow2", "source", "300M"]) else { return };
    run(&["bitmap", "--add", "source", "b0"]);
    run(&["bitmap", "--add", "-g", "512", "--disable", "source", "second"]);
    write("write -P 7 1M 200k");
    run(&["bitmap", "--enable", "source", "second"]);
    write("write -P 8 299M 1000k");
    run(&["convert", "-q", "--bitmaps", "-O", "qcow2", "source", "theirs"]);
    let mut ours = writer(dir.path(), &defaults(300 << 20));
    let mut files = [HostFile::open(&dir.path().join("ours"), true).unwrap()];
    put(&mut ours, &mut files, 1 << 20, &[7; 200 << 10]).unwrap();
    put(&mut ours, &mut files, 299 << 20, &[8; 1000 << 10]).unwrap();
    for (name, granularity_bits, ranges) in [
        (&b"b0"[..], 16, vec![(1u64 << 20, 200u64 << 10), (299 << 20, 1000 << 10)]),
        (&b"second"[..], 9, vec![(299 << 20, 1000 << 10)]),
    ] {
        let fill = |at: u64, buf: &mut [u8]| {
            buf.fill(0);
            for (start, len) in &ranges {
                for bit in start >> granularity_bits..=(start + len - 1) >> granularity_bits {
                    if (at..at + buf.len() as u64).contains(&(bit / 8)) {
                        buf[(bit / 8 - at) as usize] |= 1 << (bit % 8);
                    }
                }
            }
            Ok(())
        };
        ours.add_bitmap(name, granularity_bits, true, fill).unwrap();
    }
    ours.finish().unwrap();
    assert_same(dir.path(), "ours", "theirs", &"bitmaps");
}
