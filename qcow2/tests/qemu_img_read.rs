//! What qemu-img and qemu-io write reads back as qemu-img reads it, and what qemu-img refuses is refused.

mod common;

use std::path::{Path, PathBuf};

use common::{Cluster, Plan, Random, have_qemu, make, must, run};
use instar_blockio::file::HostFile;
use instar_blockio::{BlockMapExt, BlockRead, ErrorKind, ExtentKind, FileId, Layer, MemBlock, Overlay};
use instar_qcow2::{Error, Image, OpenOptions, SnapshotSelector, feature_names};

fn open(path: &Path) -> Image<HostFile> {
    open_as(path, true)
}

fn open_as(path: &Path, strict: bool) -> Image<HostFile> {
    let file = HostFile::open(path, false).unwrap();
    Image::open(file, FileId(0), &OpenOptions { strict, ..OpenOptions::default() }).unwrap()
}

/// The image with its data file and its chain below, whose names are relative to `dir`.
fn chain(dir: &Path, image: Image<HostFile>) -> Overlay {
    let mut layers: Vec<Box<dyn Layer>> = Vec::new();
    let mut next = Some(image);
    while let Some(mut image) = next.take() {
        if image.needs_data_file() {
            let name = String::from_utf8(image.data_file_name().unwrap().to_vec()).unwrap();
            image.attach_data_file(HostFile::open(&dir.join(name), false).unwrap(), FileId(1));
        }
        let backing = image.backing_file().map(|name| dir.join(String::from_utf8(name.to_vec()).unwrap()));
        let format = image.backing_format().map(<[u8]>::to_vec);
        layers.push(Box::new(image));
        match (backing, format.as_deref()) {
            (Some(path), Some(b"raw")) => layers.push(Box::new(HostFile::open(&path, false).unwrap())),
            (Some(path), _) => next = Some(open(&path)),
            (None, _) => {}
        }
    }
    Overlay::new(layers)
}

/// The disk; `None` if it can't be read.
fn read_all(disk: &impl BlockRead) -> Option<Vec<u8>> {
    let mut bytes = vec![0xee; disk.size() as usize];
    let mut pieces = bytes.chunks_mut(300_000).enumerate();
    pieces.all(|(k, piece)| disk.read_at(k as u64 * 300_000, piece).is_ok()).then_some(bytes)
}

/// What qemu-img makes of the image; `None` if it can't read it. (Now and then qemu-io overwrites the place of a
/// compressed cluster that a snapshot still has.)
fn by_qemu(dir: &Path, args: &[&str], name: &str) -> Option<Vec<u8>> {
    let mut all = vec!["convert", "-O", "raw"];
    all.extend(args);
    all.extend([name, "out.raw"]);
    let done = run(dir, "qemu-img", &all);
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() || text.contains("error while reading at byte"), "{text}");
    done.status.success().then(|| std::fs::read(dir.join("out.raw")).unwrap())
}

/// Random writes, zero writes and discards for one run of qemu-io.
fn random_commands(random: &mut Random, size: u64, unit: u64, compressed: bool) -> Vec<String> {
    let mut commands = Vec::new();
    for _ in 0..10 + random.below(20) {
        let grain = if random.below(2) == 0 { 512 } else { unit };
        let len = (1 + random.below(40)) * grain.min(size);
        let len = len.min(size);
        let at = random.below((size - len) / grain + 1) * grain;
        let pattern = 1 + random.below(255);
        commands.push(match random.below(8) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            3 | 4 if compressed => {
                let at = at / unit * unit;
                format!("write -c -P {pattern} {at} {}", unit.min(size - at))
            }
            _ => format!("write -P {pattern} {at} {len}"),
        });
    }
    commands
}

fn io(dir: &Path, name: &str, commands: &[String]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(name);
    // A compressed write over an allocated cluster fails, and leaves that as it was.
    run(dir, "qemu-io", &args);
}

struct Shape {
    options: String,
    unit: u64,
    compressed: bool,
    snapshots: bool,
}

fn random_shape(random: &mut Random) -> Shape {
    let bits = random.pick(&[9, 10, 12, 14, 16, 16, 17, 21]);
    let unit = 1u64 << bits;
    let mut options = format!("cluster_size={unit}");
    let v2 = random.below(5) == 0;
    let refcount_order = if v2 { 4 } else { random.below(7) };
    let data_file = !v2 && random.below(5) == 0;
    if v2 {
        options += ",compat=0.10";
    } else {
        options += &format!(",refcount_bits={}", 1 << refcount_order);
        if bits >= 14 && random.below(2) == 0 {
            options += ",extended_l2=on";
        }
        if random.below(2) == 0 {
            options += ",compression_type=zstd";
        }
        if data_file {
            options += ",data_file=data.raw";
        }
    }
    // Compressed clusters share places, so small refcounts have no room for a snapshot's.
    let snapshots = !data_file && refcount_order >= 4;
    Shape { options, unit, compressed: !data_file, snapshots }
}

fn random_image(seed: u64) {
    let random = &mut Random(seed);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let shape = random_shape(random);
    let size = 512 * (1 + random.below(if shape.unit < 4096 { 4000 } else { 40_000 }));
    let size_text = size.to_string();
    let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &shape.options];
    let backing = random.below(4);
    let backing_size = (512 * (1 + random.below(30_000))).to_string();
    if backing == 0 {
        must(dir, "qemu-img", &["create", "-q", "-f", "raw", "back.raw", &backing_size]);
        must(dir, "qemu-io", &["-f", "raw", "-c", &format!("write -P 99 0 {backing_size}"), "back.raw"]);
        create.extend(["-b", "back.raw", "-F", "raw"]);
    } else if backing == 1 {
        must(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "back.qcow2", &backing_size]);
        let size = backing_size.parse().unwrap();
        io(dir, "back.qcow2", &random_commands(random, size, 65536, true));
        create.extend(["-b", "back.qcow2", "-F", "qcow2"]);
    }
    create.extend(["image.qcow2", &size_text]);
    must(dir, "qemu-img", &create);
    let path = dir.join("image.qcow2");
    io(dir, "image.qcow2", &random_commands(random, size, shape.unit, shape.compressed));
    let taken = shape.snapshots && random.below(2) == 0;
    if taken {
        must(dir, "qemu-img", &["snapshot", "-c", "before", "image.qcow2"]);
        io(dir, "image.qcow2", &random_commands(random, size, shape.unit, shape.compressed));
    }

    let context = format!("seed {seed}, size {size}, {}", shape.options);
    assert!(read_all(&chain(dir, open(&path))) == by_qemu(dir, &["-f", "qcow2"], "image.qcow2"), "{context}");
    let mut image = open(&path);
    assert_eq!(image.snapshots().unwrap().len(), usize::from(taken), "{context}");
    if taken {
        for selector in [SnapshotSelector::IdOrName(b"1"), SnapshotSelector::Exact { id: None, name: Some(b"before") }]
        {
            image.select_snapshot(selector).unwrap();
            let old = by_qemu(dir, &["-f", "qcow2", "-l", "before"], "image.qcow2");
            assert!(read_all(&chain(dir, image)) == old, "snapshot of {context}");
            image = open(&path);
        }
        assert_eq!(image.select_snapshot(SnapshotSelector::IdOrName(b"after")), Err(Error::SnapshotNotFound));
    }
}

#[test]
fn random_images() {
    if !have_qemu() {
        return;
    }
    for seed in 0..24 {
        random_image(seed);
    }
}

#[test]
fn whole_image_compressed() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut random = Random(5);
    let words: Vec<u64> = (0..997).map(|_| random.next()).collect();
    let disk: Vec<u8> = (0..1_500_160u64).map(|i| (words[(i / 64 % 997) as usize] >> (i % 8 * 8)) as u8).collect();
    std::fs::write(dir.join("disk.raw"), &disk).unwrap();
    for options in ["cluster_size=512", "cluster_size=64k", "cluster_size=2M", "cluster_size=64k,extended_l2=on"] {
        for kind in ["zlib", "zstd"] {
            let options = format!("{options},compression_type={kind}");
            must(dir, "qemu-img", &["convert", "-c", "-O", "qcow2", "-o", &options, "disk.raw", "image.qcow2"]);
            let image = open(&dir.join("image.qcow2"));
            let compressed = image
                .extents(0..image.size())
                .filter(|e| matches!(e, Ok(e) if matches!(e.kind, ExtentKind::Compressed(_))));
            assert!(compressed.count() > 0, "{options}");
            assert!(read_all(&image).as_ref() == Some(&disk), "{options}");
        }
    }
}

#[test]
fn bitmaps() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    must(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "image.qcow2", "40M"]);
    must(dir, "qemu-img", &["bitmap", "--add", "-g", "512", "image.qcow2", "fine"]);
    must(dir, "qemu-img", &["bitmap", "--add", "--disable", "-g", "64k", "image.qcow2", "coarse"]);
    io(dir, "image.qcow2", &["write 1M 3584".into(), "write 20M 512".into(), "write 41942528 512".into()]);
    let image = open(&dir.join("image.qcow2"));
    let bitmaps = image.bitmaps().unwrap();
    assert_eq!(bitmaps.iter().map(|b| b.name.as_slice()).collect::<Vec<_>>(), [&b"fine"[..], b"coarse"]);
    assert_eq!(bitmaps.iter().map(|b| (b.granularity_bits, b.flags.bits())).collect::<Vec<_>>(), [(9, 2), (16, 0)]);
    assert_eq!(bitmaps.iter().map(|b| b.len).collect::<Vec<_>>(), [10240, 80]);
    let mut bits = vec![0; 10240];
    image.read_bitmap(&bitmaps[0], 0, &mut bits).unwrap();
    let set: Vec<usize> = (0..81920).filter(|i| bits[i / 8] >> (i % 8) & 1 == 1).collect();
    assert_eq!(set, [2048, 2049, 2050, 2051, 2052, 2053, 2054, 40960, 81919]);
    image.read_bitmap(&bitmaps[1], 0, &mut bits[..80]).unwrap();
    assert_eq!(bits[..80], [0; 80]);
}

#[test]
fn encrypted_images_are_described() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let secret = "secret,id=s,data=abc";
    must(dir, "qemu-img", &["create", "-q", "--object", secret, "-f", "qcow2", "-o", options, "luks.qcow2", "1M"]);
    let spec = "driver=qcow2,file.filename=luks.qcow2,encrypt.key-secret=s";
    must(dir, "qemu-io", &["--object", secret, "-c", "write 64k 64k", "--image-opts", spec]);
    let image = open(&dir.join("luks.qcow2"));
    assert!(matches!(image.encryption(), instar_qcow2::Encryption::Luks { len, .. } if len > 4096));
    assert_eq!(image.check_readable(), Err(Error::Encrypted(0)));
    image.read_at(0, &mut [0; 512]).unwrap();
    let error = image.read_at(100_000, &mut [0; 512]).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Encrypted, Some(100_000)));
}

#[test]
fn unknown_features_have_names() {
    let plan = Plan { cluster_bits: 9, extended_l2: false, clusters: vec![Cluster::Data], cut: 0, extras: false };
    let mut file = make(&plan).file;
    file[72..80].copy_from_slice(&0x8000_0000_0000_0120u64.to_be_bytes());
    file[112..120].copy_from_slice(&[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 96]);
    file[120..134].copy_from_slice(b"\0\x05new mapping\0");
    file[168..183].copy_from_slice(b"\x01\x08only allowed\0");
    let disk = MemBlock::from(file);
    let Err(Error::UnknownFeatures(bits)) = Image::open(&disk, FileId(0), &OpenOptions::default()) else { panic!() };
    assert_eq!(bits, 0x8000_0000_0000_0120);
    let names = feature_names(&disk, bits).unwrap();
    assert_eq!((names.names, names.unnamed), (vec![b"new mapping".to_vec()], 0x8000_0000_0000_0100));
}

/// What became of an image.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Refused,
    Unreadable,
    Contents(Vec<u8>),
}

fn fate_here(file: &[u8]) -> Fate {
    let image = match Image::open(MemBlock::from(file.to_vec()), FileId(0), &OpenOptions::default()) {
        Ok(image) if image.check_readable().is_ok() => image,
        _ => return Fate::Refused,
    };
    let mut bytes = vec![0; image.size() as usize];
    match image.read_at(0, &mut bytes) {
        Ok(()) => Fate::Contents(bytes),
        Err(_) => Fate::Unreadable,
    }
}

fn fate_there(dir: &Path, file: &[u8]) -> Option<Fate> {
    std::fs::write(dir.join("damaged.qcow2"), file).unwrap();
    let done = run(dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "damaged.qcow2", "out.raw"]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    if done.status.success() {
        return Some(Fate::Contents(std::fs::read(dir.join("out.raw")).unwrap()));
    }
    // A backing file or LUKS header that the damage made up is not this crate's concern.
    let foreign = said.contains("backing file: ") || said.contains("LUKS");
    (!foreign).then(|| if said.contains("while reading") { Fate::Unreadable } else { Fate::Refused })
}

/// Damages metadata in the ways that checks look for.
fn damage(random: &mut Random, file: &mut [u8], metadata: &[std::ops::Range<usize>]) {
    for _ in 0..=random.below(2) {
        let range = metadata[random.below(metadata.len() as u64) as usize].clone();
        let width = random.pick(&[1, 4, 8]);
        let at = range.start + random.below((range.len() as u64 / width).max(1)) as usize * width as usize;
        let word = match random.below(4) {
            0 => 0,
            1 => 1u64 << random.below(64),
            2 => random.below(4096),
            _ => random.next(),
        };
        // The virtual size would make the comparison long.
        if (24..32).contains(&at) || at + width as usize > file.len() {
            continue;
        }
        let bytes = &word.to_be_bytes()[8 - width as usize..];
        file[at..at + width as usize].copy_from_slice(bytes);
    }
}

#[test]
fn damaged_images_meet_the_same_fate() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut fates = [0; 3];
    for seed in 0..400 {
        let random = &mut Random(seed);
        let extended_l2 = seed % 2 == 1;
        let mixed = if extended_l2 { Cluster::Mixed(0xf0f0, 0x0f0f) } else { Cluster::ZeroPlaced };
        let clusters = [Cluster::Data, mixed, Cluster::Zero, Cluster::Unallocated, Cluster::Compressed, Cluster::Data];
        let cluster_bits = if extended_l2 { 14 } else { random.pick(&[9, 12]) };
        let plan = Plan { cluster_bits, extended_l2, clusters: clusters.repeat(4), cut: 512, extras: seed % 3 == 0 };
        let mut made = make(&plan);
        damage(random, &mut made.file, &made.metadata);
        let Some(there) = fate_there(dir.path(), &made.file) else { continue };
        let here = fate_here(&made.file);
        if here != there {
            let kept = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("damaged-{seed}.qcow2"));
            std::fs::write(&kept, &made.file).unwrap();
            let short = |fate: &Fate| match fate {
                Fate::Contents(bytes) => format!("{} bytes", bytes.len()),
                other => format!("{other:?}"),
            };
            panic!("seed {seed}: {} here, {} there; see {}", short(&here), short(&there), kept.display());
        }
        fates[match here {
            Fate::Refused => 0,
            Fate::Unreadable => 1,
            Fate::Contents(_) => 2,
        }] += 1;
    }
    assert!(fates.iter().all(|&count| count > 10), "the damage is one-sided: {fates:?}");
}

/// The images of the shared corpus, if it is there.
#[test]
fn corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus");
    let Ok(manifest) = std::fs::read_to_string(corpus.join("MANIFEST.tsv")) else {
        eprintln!("SKIPPED: there is no corpus at {}", corpus.display());
        return;
    };
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut lines = manifest.lines();
    let names: Vec<&str> = lines.next().unwrap().split('\t').collect();
    let column = |name: &str| names.iter().position(|&n| n == name).unwrap();
    let (format, stored, size, sum) =
        (column("probed_format"), column("stored_as"), column("content_size"), column("content_sha256"));
    let mut seen = 0;
    for line in lines {
        let fields: Vec<&str> = line.split('\t').collect();
        if fields[format] != "qcow2" || fields[sum].len() != 64 {
            continue;
        }
        let path = corpus.join(fields[stored]);
        let mut local = path.clone();
        if path.extension().is_some_and(|end| end == "zst") {
            local = dir.path().join("image.qcow2");
            let (from, to) = (path.to_str().unwrap(), local.to_str().unwrap());
            must(dir.path(), "zstd", &["-d", "-q", "-f", from, "-o", to]);
        }
        // One of them ends behind its header.
        let image = open_as(&local, false);
        assert_eq!(image.size().to_string(), fields[size], "{}", path.display());
        // Empty stretches of large disks need not be compared: qemu-img fills them from the same map.
        if image.size() > 64 << 20 {
            continue;
        }
        let disk = read_all(&image).unwrap();
        std::fs::write(dir.path().join("disk.raw"), &disk).unwrap();
        let done = run(dir.path(), "sha256sum", &["disk.raw"]);
        assert!(String::from_utf8_lossy(&done.stdout).starts_with(fields[sum]), "{}", path.display());
        seen += 1;
    }
    assert!(seen > 5, "only {seen} images of the corpus were read");
}
