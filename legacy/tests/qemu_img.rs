//! Images that qemu-img reads and checks, and images that it made.

mod support;

use std::fs;
use std::path::Path;

use instar_blockio::{BlockAlloc, BlockMapExt, BlockRead, BlockWrite, ExtentKind, FileId, MemBlock, ZeroMode};
use instar_legacy::{OpenOptions, Repair, parallels, qcow, qed, vdi};
use support::{compressed_qcow, flat, has_qemu_img, made, qemu_img};

/// Nothing, a sector, parts of clusters, more than an L2 table of qcow, and of QED with small clusters.
const SIZES: [usize; 6] = [0, 512, 70_144, 1_048_576, 2_097_664, 9_000_448];
const FORMATS: [(&str, &str); 7] = [
    ("qcow", "qcow"),
    ("qed", "qed"),
    ("qed4k", "qed"),
    ("vdi", "vdi"),
    ("vdi-static", "vdi"),
    ("parallels", "parallels"),
    ("parallels-odd", "parallels"),
];

/// All bytes of an image's disk.
fn read(format: &str, file: Vec<u8>) -> Vec<u8> {
    macro_rules! all {
        ($format:ident) => {{
            let image = $format::Image::open(MemBlock::from(file), FileId(0), &OpenOptions { strict: true }).unwrap();
            let mut disk = vec![0xee; image.size() as usize];
            image.read_at(0, &mut disk).unwrap();
            disk
        }};
    }
    match format {
        "qcow" => all!(qcow),
        "qed" => all!(qed),
        "vdi" => all!(vdi),
        "parallels" => all!(parallels),
        other => panic!("no format {other}"),
    }
}

fn qemu_reads(dir: &Path, driver: &str, file: &[u8]) -> Vec<u8> {
    fs::write(dir.join("image"), file).unwrap();
    qemu_img(dir, &["convert", "-f", driver, "-O", "raw", "image", "raw"]);
    fs::read(dir.join("raw")).unwrap()
}

#[test]
fn qemu_img_reads_and_checks_what_is_written() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (format, driver) in FORMATS {
        for size in SIZES.into_iter().filter(|size| (format, *size) != ("qcow", 0)) {
            let file = made(format, size, true);
            assert!(qemu_reads(dir.path(), driver, &file) == flat(size), "{format} of {size} bytes");
            assert!(read(driver, file) == flat(size), "{format} of {size} bytes, read here");
            // QEMU takes clusters that are no power of two for damage.
            if driver != "qcow" && format != "parallels-odd" {
                let text = qemu_img(dir.path(), &["check", "-f", driver, "image"]);
                assert!(text.starts_with("No errors"), "{format} of {size} bytes: {text}");
            }
        }
    }
    for size in [512, 70_144, 9_000_448] {
        let file = compressed_qcow(size);
        assert!(qemu_reads(dir.path(), "qcow", &file) == flat(size), "compressed, {size} bytes");
        assert!(read("qcow", file) == flat(size), "compressed, {size} bytes, read here");
    }
}

#[test]
fn what_qemu_img_writes_is_read() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for size in SIZES {
        fs::write(dir.path().join("raw"), flat(size)).unwrap();
        for (driver, options) in [
            ("qcow", "size=0"),
            ("qed", "cluster_size=64k"),
            ("qed", "cluster_size=4k,table_size=2"),
            ("vdi", "static=off"),
            ("vdi", "static=on"),
            ("parallels", "cluster_size=1M"),
            ("parallels", "cluster_size=8192"),
        ] {
            if (driver, size) == ("qcow", 0) {
                continue;
            }
            qemu_img(dir.path(), &["convert", "-f", "raw", "-O", driver, "-o", options, "raw", "image"]);
            let file = fs::read(dir.path().join("image")).unwrap();
            assert!(read(driver, file) == flat(size), "{driver} with {options} of {size} bytes");
        }
    }
}

#[test]
fn fresh_images_are_those_of_qemu_img() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for size in SIZES {
        let text = size.to_string();
        for (format, driver, options) in [
            ("qcow", "qcow", "size=0"),
            ("qed", "qed", "cluster_size=64k"),
            ("qed4k", "qed", "cluster_size=4k,table_size=2"),
            ("vdi", "vdi", "static=off"),
            ("vdi-static", "vdi", "static=on"),
            ("parallels", "parallels", "cluster_size=1M"),
            ("parallels-odd", "parallels", "cluster_size=7680"),
        ] {
            if (driver, size) == ("qcow", 0) {
                continue;
            }
            let options = options.replace("size=0", "");
            let mut args = vec!["create", "-q", "-f", driver];
            if !options.is_empty() {
                args.extend(["-o", &options]);
            }
            args.extend(["image", &text]);
            qemu_img(dir.path(), &args);
            let mut theirs = fs::read(dir.path().join("image")).unwrap();
            if driver == "vdi" {
                theirs[392..424].fill(0);
            }
            assert!(made(format, size, false) == theirs, "{format} of {size} bytes");
        }
    }
}

#[test]
fn images_of_qemu_img_are_written_on() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let size = 9_000_448;
    for driver in ["qcow", "qed", "vdi", "parallels"] {
        let mut disk = flat(size);
        fs::write(dir.path().join("raw"), &disk).unwrap();
        let compress: &[&str] = if driver == "qcow" { &["-c"] } else { &[] };
        let args = [&["convert", "-f", "raw", "-O", driver], compress, &["raw", "image"]].concat();
        // Compressing qcow fails at its very end, with a good image.
        let status = std::process::Command::new("qemu-img").args(&args).current_dir(dir.path()).status().unwrap();
        assert!(status.success() || driver == "qcow");
        let file = MemBlock::from(fs::read(dir.path().join("image")).unwrap());
        macro_rules! change {
            ($format:ident) => {{
                let mut writer = $format::Writer::open(file, FileId(0)).unwrap();
                for (at, len) in [(0, 100), (4000, 9000), (1_048_570, 12), (3_000_000, 700_000), (size - 5, 5)] {
                    let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
                    writer.write_at(at as u64, &bytes).unwrap();
                    disk[at..at + len].copy_from_slice(&bytes);
                }
                for (at, len, mode) in [
                    (10, 5000, ZeroMode::Unmap),
                    (2_000_000, 3_000_000, ZeroMode::Unmap),
                    (8_000_000, 100_000, ZeroMode::KeepAllocated),
                ] {
                    writer.write_zeroes(at as u64, len as u64, mode).unwrap();
                    disk[at..at + len].fill(0);
                }
                let place = writer.reserve(6_000_000, 1000).unwrap();
                writer.abort(place).unwrap();
                disk[6_000_000..6_001_000].fill(0);
                writer.write_zeroes(6_000_000, 1000, ZeroMode::Unmap).unwrap();
                writer.flush().unwrap();
                let mut back = vec![0; size];
                writer.read_at(0, &mut back).unwrap();
                assert!(back == disk, "{driver} read by its writer");
                writer.finish().unwrap().into_bytes()
            }};
        }
        let file = match driver {
            "qcow" => change!(qcow),
            "qed" => change!(qed),
            "vdi" => change!(vdi),
            _ => change!(parallels),
        };
        assert!(read(driver, file.clone()) == disk, "{driver} read here");
        assert!(qemu_reads(dir.path(), driver, &file) == disk, "{driver} read by qemu-img");
        if driver == "qed" || driver == "vdi" || driver == "parallels" {
            let text = qemu_img(dir.path(), &["check", "-f", driver, "image"]);
            assert!(text.starts_with("No errors"), "{driver}: {text}");
        }
    }
}

#[test]
fn overlays_keep_what_lies_below() {
    let options = qed::CreateOptions {
        size: 1 << 20,
        backing_file: Some(b"base".to_vec()),
        backing_format: Some(b"raw".to_vec()),
        ..Default::default()
    };
    let mut writer = qed::create(MemBlock::default(), FileId(0), &options).unwrap();
    assert!(writer.write_at(100, b"part").is_err());
    writer.write_at(65536, &[7; 65536]).unwrap();
    writer.write_zeroes(2 * 65536, 65536, ZeroMode::Unmap).unwrap();
    let image = qed::Image::open(writer.finish().unwrap(), FileId(0), &OpenOptions::default()).unwrap();
    assert_eq!((image.backing_file(), image.backing_format()), (Some(&b"base"[..]), Some(&b"raw"[..])));
    let kinds: Vec<_> = image.extents(0..1 << 20).map(|extent| extent.unwrap().kind).collect();
    let zero = ExtentKind::Zero { host: None };
    assert!(
        matches!(kinds[..], [ExtentKind::Unallocated, ExtentKind::Data { .. }, z, ExtentKind::Unallocated] if z == zero)
    );

    let options = qcow::CreateOptions { size: 1 << 20, backing_file: Some(b"../base".to_vec()) };
    let mut writer = qcow::create(MemBlock::default(), FileId(0), &options).unwrap();
    assert!(writer.write_at(100, b"part").is_err());
    writer.write_at(512, &[7; 512]).unwrap();
    writer.write_zeroes(1024, 512, ZeroMode::Unmap).unwrap();
    let image = qcow::Image::open(writer.finish().unwrap(), FileId(0), &OpenOptions::default()).unwrap();
    assert_eq!((image.backing_file(), image.cluster_size()), (Some(&b"../base"[..]), 512));
    let runs: Vec<_> = image.extents(0..1 << 20).map(|extent| extent.unwrap()).map(|e| (e.offset, e.len)).collect();
    assert_eq!(runs, [(0, 512), (512, 1024), (1536, (1 << 20) - 1536)]);
}

/// The largest disks: nothing is read or written but what is used.
#[test]
fn the_largest_disks() {
    let far = |size: u64| size - 4096;
    macro_rules! try_it {
        ($format:ident, $size:expr, $options:expr) => {{
            let size: u64 = $size;
            let dir = tempfile::tempdir().unwrap();
            let file = instar_blockio::file::HostFile::create(&dir.path().join("image")).unwrap();
            let mut writer = $format::create(file, FileId(0), &$options).unwrap();
            writer.write_at(far(size), &[0x5a; 4096]).unwrap();
            let file = writer.finish().unwrap();
            let image = $format::Image::open(file, FileId(0), &OpenOptions::default()).unwrap();
            assert_eq!(image.size(), size);
            let last = image.extents(far(size)..size).next().unwrap().unwrap();
            assert!(matches!(last.kind, ExtentKind::Data { .. }), "{last:?}");
            let mut back = [0; 4096];
            image.read_at(far(size), &mut back).unwrap();
            assert_eq!(back, [0x5a; 4096]);
        }};
    }
    let qed_options = |size| qed::CreateOptions { size, ..Default::default() };
    try_it!(qed, 1 << 46, qed_options(1 << 46));
    assert!(qed_options((1 << 46) + 1).check().is_err());
    try_it!(qcow, 4 << 40, qcow::CreateOptions { size: 4 << 40, backing_file: None });
    let largest = ((1 << 28) - 1) << 21;
    assert!(qcow::CreateOptions { size: largest, backing_file: None }.check().is_ok());
    assert!(qcow::CreateOptions { size: largest + 1, backing_file: None }.check().is_err());
    try_it!(parallels, 4 << 40, parallels::CreateOptions { size: 4 << 40, ..Default::default() });
    let largest = ((1 << 29) - 1) << 20;
    assert!(parallels::CreateOptions { size: largest, ..Default::default() }.check().is_ok());
    assert!(parallels::CreateOptions { size: largest + 1, ..Default::default() }.check().is_err());
    try_it!(vdi, 4 << 40, vdi::CreateOptions { size: 4 << 40, ..Default::default() });
    assert!(vdi::CreateOptions { size: 0x1_ffff_f800_0000, ..Default::default() }.check().is_ok());
    assert!(vdi::CreateOptions { size: 0x1_ffff_f800_0001, ..Default::default() }.check().is_err());
}

/// Exit status, text and repaired file of qemu-img's check.
fn qemu_check(dir: &Path, driver: &str, file: &[u8], args: &[&str]) -> (i32, Vec<u8>) {
    fs::write(dir.join("image"), file).unwrap();
    let args = [&["check", "-q", "-f", driver], args, &["image"]].concat();
    let output = std::process::Command::new("qemu-img").args(args).current_dir(dir).output().unwrap();
    (output.status.code().unwrap_or(-1), fs::read(dir.join("image")).unwrap())
}

/// A name, and what it does to a file.
type Damage<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>));

#[test]
fn damage_is_found_and_repaired_as_by_qemu_img() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let all = Repair { leaks: true, corruptions: true };
    let put = |file: &mut Vec<u8>, at: usize, number: u32| file[at..at + 4].copy_from_slice(&number.to_le_bytes());

    let good = made("parallels", 9_000_448, true);
    // The second cluster that is there.
    let entry = |i: usize| u32::from_le_bytes(good[64 + 4 * i..][..4].try_into().unwrap());
    let second = 64 + 4 * (1..9).find(|&i| entry(i) != 0).unwrap();
    assert_eq!(entry(0), 1);
    let damages: [Damage<'_>; 5] = [
        ("in use", &|file| put(file, 44, 0x746f_6e59)),
        ("start of the data", &|file| put(file, 48, 1)),
        ("shared", &|file| put(file, second, 1)),
        ("leaked", &|file| file.resize(file.len() + 1_500_000, 0)),
        ("outside", &|file| put(file, 64, 0x7000_0000)),
    ];
    for (name, damage) in damages {
        let mut file = good.clone();
        damage(&mut file);
        let image = parallels::Image::open(MemBlock::from(file.clone()), FileId(0), &OpenOptions::default()).unwrap();
        let found = image.check(&mut |_| {}).unwrap();
        assert!((found.corruptions, found.leaks) != (0, 0), "{name}");
        // qemu-img aborts over clusters outside the file.
        if name != "outside" {
            let status = if found.corruptions > 0 { 2 } else { 3 };
            assert_eq!(qemu_check(dir.path(), "parallels", &file, &[]).0, status, "{name}");
        }
        let mut writer = parallels::Writer::open(MemBlock::from(file.clone()), FileId(0)).unwrap();
        let rest = writer.check(all, &mut |finding| panic!("{name}: {finding}")).unwrap();
        assert_eq!((rest.corruptions, rest.leaks), (0, 0), "{name}");
        let repaired = writer.finish().unwrap().into_bytes();
        let (status, theirs) = qemu_check(dir.path(), "parallels", &file, &["-r", "all"]);
        assert_eq!(status, 0, "{name}");
        assert!(repaired == theirs, "{name}: {} and {} bytes", repaired.len(), theirs.len());
    }

    let good = made("qed4k", 9_000_448, true);
    let l2 = u64::from_le_bytes(good[4096..4104].try_into().unwrap()) as usize;
    let damages: [Damage<'_>; 5] = [
        ("needs a check", &|file| file[16] |= 2),
        ("table outside", &|file| put(file, 4096 + 4, 9)),
        ("cluster outside", &|file| put(file, l2, 0x7fff_f000)),
        ("shared", &|file| file.copy_within(l2..l2 + 8, l2 + 8)),
        ("leaked", &|file| file.extend([0; 9000])),
    ];
    for (name, damage) in damages {
        let mut file = good.clone();
        damage(&mut file);
        let image = qed::Image::open(MemBlock::from(file.clone()), FileId(0), &OpenOptions::default()).unwrap();
        let found = image.check(&mut |_| {}).unwrap();
        let status = match (found.corruptions, found.leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => 2,
        };
        assert_eq!(qemu_check(dir.path(), "qed", &file, &[]).0, status, "{name}");
        let layout = qed::Image::open(MemBlock::from(file.clone()), FileId(0), &OpenOptions::default()).unwrap();
        drop(layout);
        let mut clean = file.clone();
        clean[16] &= !2;
        let mut writer = qed::Writer::open(MemBlock::from(clean), FileId(0)).unwrap();
        writer.check(all, &mut |_| {}).unwrap();
        let repaired = writer.finish().unwrap().into_bytes();
        let (_, theirs) = qemu_check(dir.path(), "qed", &file, &["-r", "all"]);
        assert!(repaired == theirs, "{name}");
    }
    let mut dirty = good.clone();
    dirty[16] |= 2;
    let repaired = qed::Writer::open(MemBlock::from(dirty), FileId(0)).unwrap().finish().unwrap().into_bytes();
    assert!(repaired == good);

    let good = made("vdi", 9_000_448, true);
    for (name, at, number) in [("shared", 516, 0), ("out of range", 516, 77), ("count", 388, 1)] {
        let mut file = good.clone();
        put(&mut file, at, number);
        let image = vdi::Image::open(MemBlock::from(file.clone()), FileId(0), &OpenOptions::default()).unwrap();
        assert!(image.check(&mut |_| {}).unwrap().corruptions > 0, "{name}");
        assert_eq!(qemu_check(dir.path(), "vdi", &file, &[]).0, 2, "{name}");
    }
    let image = vdi::Image::open(MemBlock::from(good), FileId(0), &OpenOptions::default()).unwrap();
    assert_eq!(image.check(&mut |finding| panic!("{finding}")).unwrap().corruptions, 0);
}
