//! Every writable format and subformat, with qemu-img as the judge: what instar writes, qemu-img reads and finds sound, and the reverse.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;

use support::{Random, can_run, expect_success, instar, qemu_img};

/// Format and options of a target; whether `qemu-img check` knows it; its largest disk in bytes (as far as raw files reach here).
struct Kind {
    format: &'static str,
    options: &'static str,
    checked: bool,
    largest: u64,
}

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
/// A little less than the largest file of common file systems with small blocks.
const FILE: u64 = 15 * TIB;

const fn kind(format: &'static str, options: &'static str, checked: bool, largest: u64) -> Kind {
    Kind { format, options, checked, largest }
}

const KINDS: &[Kind] = &[
    kind("qcow2", "", true, FILE),
    kind("qcow2", "cluster_size=2M,extended_l2=on", true, FILE),
    kind("vmdk", "", true, 2 * TIB + 512),
    kind("vmdk", "adapter_type=lsilogic,hwversion=13,toolsversion=9", true, 3 * GIB),
    kind("vmdk", "compat6=on,zeroed_grain=on", true, 3 * GIB),
    kind("vmdk", "subformat=monolithicFlat", true, 2 * TIB + 512),
    kind("vmdk", "subformat=twoGbMaxExtentSparse", true, 9 * GIB + 512),
    kind("vmdk", "subformat=twoGbMaxExtentFlat", true, 9 * GIB + 512),
    kind("vmdk", "subformat=streamOptimized", true, 2 * TIB + 512),
    kind("vpc", "", false, 2040 * GIB),
    kind("vpc", "force_size=on", false, 2040 * GIB),
    kind("vpc", "subformat=fixed", false, 2040 * GIB),
    kind("vpc", "subformat=fixed,force_size=on", false, 2040 * GIB),
    kind("vhdx", "", true, FILE),
    kind("vhdx", "block_size=1M,log_size=2M,block_state_zero=off", true, 3 * TIB),
    kind("vhdx", "subformat=fixed,block_size=2M", true, 3 * GIB),
    kind("qcow", "", false, FILE),
    kind("qed", "", true, FILE),
    kind("qed", "cluster_size=4k,table_size=4", true, 3 * GIB),
    kind("vdi", "", true, FILE),
    kind("vdi", "static=on", true, 3 * GIB),
    kind("parallels", "", true, 3 * TIB),
];

impl Kind {
    fn arguments<'a>(&'a self, from: &'a str, to: &'a str) -> Vec<&'a str> {
        let mut args = vec!["convert", "-f", "raw", "-O", self.format];
        if !self.options.is_empty() {
            args.extend(["-o", self.options]);
        }
        args.extend([from, to]);
        args
    }
}

/// A sparse file with some bytes at its beginning, its end and in between.
fn sparse_disk(dir: &Path, random: &mut Random, len: u64) {
    let file = File::create(dir.join("disk.raw")).unwrap();
    file.set_len(len).unwrap();
    if len == 0 {
        return;
    }
    let mut put = |at: u64| {
        let sectors = 1 + random.below(400) as usize;
        let bytes = random.disk(sectors * 512);
        let room = (len - at).min(bytes.len() as u64) as usize;
        file.write_all_at(&bytes[..room], at).unwrap();
    };
    put(0);
    put((len / 2) & !511);
    put((len / 512).saturating_sub(300) * 512);
}

/// Compares a disk with an image, by the program.
fn same(program: fn(&Path, &[&str]) -> Output, dir: &Path, kind: &Kind, image: &str, what: &str) {
    let output = program(dir, &["compare", "-f", "raw", "-F", kind.format, "disk.raw", image]);
    expect_success(&output, what);
}

/// Has qemu-img compare the parts of a large disk that hold something: for all of it, it would take minutes.
fn same_windows(dir: &Path, kind: &Kind, len: u64, what: &str) {
    const WINDOW: u64 = 1 << 20;
    for at in [0, len / 2, len - WINDOW] {
        let at = at & !511;
        let window = |format: &str, file: &str| {
            let place = format!("driver=raw,offset={at},size={},file.driver={format}", WINDOW.min(len - at));
            match format {
                "file" => format!("{place},file.filename={file}"),
                _ => format!("{place},file.file.driver=file,file.file.filename={file}"),
            }
        };
        let (disk, ours) = (window("file", "disk.raw"), window(kind.format, "ours"));
        expect_success(&qemu_img(dir, &["compare", "--image-opts", &disk, &ours]), what);
    }
}

/// Both programs make an image of `disk.raw`, and find both sound.
fn convert_and_check(dir: &Path, kind: &Kind, what: &str) {
    expect_success(&instar(dir, &kind.arguments("disk.raw", "ours")), what);
    expect_success(&qemu_img(dir, &kind.arguments("disk.raw", "theirs")), what);
    for image in ["ours", "theirs"] {
        match (kind.checked, kind.format) {
            (true, format) => {
                expect_success(&qemu_img(dir, &["check", "-f", format, image]), what);
                expect_success(&instar(dir, &["check", "-f", format, image]), what);
            }
            // Not known to qemu-img.
            (false, "vpc") => expect_success(&instar(dir, &["--ignore-quirks", "check", "-f", "vpc", image]), what),
            _ => {}
        }
    }
    same(instar, dir, kind, "ours", what);
    same(instar, dir, kind, "theirs", what);
}

fn maps_agree(dir: &Path, kind: &Kind, what: &str) {
    let args = ["map", "--output=json", "-f", kind.format, "theirs"];
    let (ours, theirs) = (instar(dir, &args), qemu_img(dir, &args));
    expect_success(&theirs, what);
    let text = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text(&ours), text(&theirs), "{what}: map");
}

#[test]
fn small_disks_of_all_kinds() {
    if !can_run(true) {
        return;
    }
    for (seed, kind) in (1..).zip(KINDS) {
        for len in [512, 64 << 10, 5_000_704, 5_000_000] {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path();
            let what = format!("{} {} of {len} bytes", kind.format, kind.options);
            sparse_disk(dir, &mut Random(seed), len);
            convert_and_check(dir, kind, &what);
            same(qemu_img, dir, kind, "ours", &what);
            if !kind.options.contains("extended_l2") {
                maps_agree(dir, kind, &what);
            }
            expect_success(&instar(dir, &["convert", "-f", kind.format, "-O", "raw", "ours", "back.raw"]), &what);
            let (disk, back) = (fs::read(dir.join("disk.raw")).unwrap(), fs::read(dir.join("back.raw")).unwrap());
            // Sizes are rounded up to sectors, cylinders or blocks.
            assert!(back.len() >= disk.len() && back.starts_with(&disk), "{what}: other contents");
            assert!(back[disk.len()..].iter().all(|byte| *byte == 0), "{what}: something behind the end");
        }
    }
}

/// The formats between which disks are converted, each once as the source and once as the target.
#[test]
fn disks_go_from_each_kind_to_another() {
    // A step that has no divisor in common with the count pairs each kind with another.
    pairs(|count| (0..count).map(|at| (at, (at + 5) % count)).collect());
}

/// `cargo xtask formats`.
#[test]
#[ignore = "takes minutes"]
fn disks_go_from_each_kind_to_each() {
    pairs(|count| (0..count * count).map(|at| (at / count, at % count)).collect());
}

/// Converts one kind to another, and then over what is there already (`-n`): outputs, status and contents are qemu-img's.
fn pairs(choose: fn(usize) -> Vec<(usize, usize)>) {
    if !can_run(true) {
        return;
    }
    for (seed, (from, to)) in (1000..).zip(choose(KINDS.len())) {
        let (from, to) = (&KINDS[from], &KINDS[to]);
        let what = format!("{} {} to {} {}", from.format, from.options, to.format, to.options);
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        sparse_disk(dir, &mut Random(seed), 5_000_704);
        expect_success(&qemu_img(dir, &from.arguments("disk.raw", "from")), &what);
        let mut args = to.arguments("from", "ours");
        args[2] = from.format;
        expect_success(&instar(dir, &args), &what);
        same(qemu_img, dir, to, "ours", &what);
        // Quirk named-extents: the files of an existing image that it names are not written.
        let in_files = ["Flat", "twoGb"].iter().any(|word| to.options.contains(word));
        let once = to.options.contains("streamOptimized");
        let again = instar(dir, &["convert", "-n", "-f", from.format, "-O", to.format, "from", "ours"]);
        assert_eq!(again.status.success(), !in_files && !once, "{what}: -n: {again:?}");
        same(qemu_img, dir, to, "ours", &what);
        if to.checked {
            expect_success(&qemu_img(dir, &["check", "-f", to.format, "ours"]), &what);
        }
    }
}

/// Formats and options of images that are written in place.
const IN_PLACE: [(&str, &str); 10] = [
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "zeroed_grain=on"),
    ("vpc", "subformat=dynamic"),
    ("vpc", "subformat=fixed"),
    ("vhdx", "subformat=dynamic"),
    ("vhdx", "subformat=fixed"),
    ("qcow", "encryption=off"),
    ("qed", "cluster_size=64k"),
    ("vdi", "static=off"),
    ("vdi", "static=on"),
];

/// Two copies of an image, that both programs change in the same way: the contents and what is said are the same.
fn changed_alike(dir: &Path, image: &str, format: &str, args: &[&str], what: &str) {
    let copies = ["ours", "theirs"].map(|copy| dir.join(copy));
    for copy in &copies {
        fs::create_dir(copy).unwrap();
        for file in support::listing(dir).iter().filter(|path| path.is_file()) {
            fs::copy(file, copy.join(file.file_name().unwrap())).unwrap();
        }
    }
    let (ours, theirs) = (instar(&copies[0], args), qemu_img(&copies[1], args));
    let said = |output: &Output| {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        // Each calls itself by its name.
        (output.status.code(), text.split_once(": ").map(|(_, what)| what.to_owned()))
    };
    assert_eq!(said(&ours), said(&theirs), "{what}: {args:?}");
    let paths = copies.each_ref().map(|copy| copy.join(image).to_str().unwrap().to_owned());
    expect_success(&qemu_img(dir, &["compare", "-f", format, "-F", format, &paths[0], &paths[1]]), what);
    let check = qemu_img(dir, &["check", "-f", format, &paths[0]]);
    assert!(matches!(check.status.code(), Some(0 | 63)), "{what}: {check:?}");
    for copy in &copies {
        fs::remove_dir_all(copy).unwrap();
    }
}

#[test]
fn images_are_written_in_place() {
    if !can_run(true) {
        return;
    }
    for (format, options) in IN_PLACE {
        let what = format!("{format} {options}");
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let opened = |commands: &[&str], format: &str, image: &str| {
            let mut command = std::process::Command::new("qemu-io");
            command.current_dir(dir).args(["-f", format]);
            commands.iter().for_each(|text| {
                command.args(["-c", text]);
            });
            expect_success(&command.arg(image).output().unwrap(), &what);
        };
        expect_success(&qemu_img(dir, &["create", "-q", "-f", format, "-o", options, "base", "4M"]), &what);
        opened(&["write -P 1 0 700k", "write -P 2 2M 100k"], format, "base");
        let bench =
            ["bench", "-q", "-f", format, "-c", "20", "-s", "5k", "-S", "200k", "-o", "1k", "-w", "--pattern", "7"];
        changed_alike(
            dir,
            "base",
            format,
            &[&bench[..], &["-d", "2", "--flush-interval", "4", "base"]].concat(),
            &what,
        );
        expect_success(&qemu_img(dir, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", format, "over"]), &what);
        opened(&["write -P 3 64k 100k", "write -P 4 3M 300k", "write -z 600k 64k"], "qcow2", "over");
        changed_alike(dir, "base", format, &["commit", "over"], &what);
        changed_alike(dir, "over", "qcow2", &["commit", "-d", "over"], &what);
        // A longer overlay: only some formats can grow.
        expect_success(&qemu_img(dir, &["resize", "-q", "-f", "qcow2", "over", "9M"]), &what);
        changed_alike(dir, "base", format, &["commit", "over"], &what);
    }
}

#[test]
fn qed_images_get_another_backing_file() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut random = Random(77);
    fs::write(dir.join("base"), random.disk(4 << 20)).unwrap();
    fs::write(dir.join("other"), random.disk(3 << 20)).unwrap();
    expect_success(&qemu_img(dir, &["create", "-q", "-f", "qed", "-b", "base", "-F", "raw", "over"]), "create");
    support::qemu_io(dir, "over", &["write -P 3 64k 128k".to_owned(), "write -z 1M 128k".to_owned()]);
    let long = "x".repeat(4000);
    for args in [
        &["rebase", "-b", "other", "-F", "raw", "over"][..],
        &["rebase", "-b", "", "over"],
        // What is not allocated is zero, and must stay so.
        &["rebase", "-b", "base", "-F", "raw", "over"],
        &["rebase", "-b", "", "over"],
        &["rebase", "-u", "-b", "other", "-F", "raw", "over"],
        &["rebase", "-u", "-b", "", "over"],
        &["rebase", "-c", "-b", "other", "-F", "raw", "over"],
        &["rebase", "-u", "-b", &long, "-F", "raw", "over"],
    ] {
        // With a name that leads nowhere only the outputs can be compared.
        if args[3] == long {
            let (ours, theirs) = (instar(dir, args), qemu_img(dir, args));
            assert_eq!(ours.status.code(), theirs.status.code(), "{ours:?} {theirs:?}");
            continue;
        }
        changed_alike(dir, "over", "qed", args, &format!("{args:?}"));
    }
}

/// The only cipher of qcow, whose key is the passphrase itself.
#[test]
fn encrypted_qcow_images_are_read() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let secret = ["--object", "secret,id=s,data=abc"];
    let create = ["create", "-q", "-f", "qcow", "-o", "encrypt.format=aes,encrypt.key-secret=s", "q", "2M"];
    expect_success(&qemu_img(dir, &[&create[..1], &secret, &create[1..]].concat()), "create");
    let opts = "driver=qcow,encrypt.format=aes,encrypt.key-secret=s,file.filename=q";
    let mut write = std::process::Command::new("qemu-io");
    write.current_dir(dir).args(secret).args([
        "--image-opts",
        opts,
        "-c",
        "write -P 7 3k 200k",
        "-c",
        "write -P 9 1M 1k",
    ]);
    expect_success(&write.output().unwrap(), "write");
    let convert = |name| [&["convert"], &secret[..], &["--image-opts", opts, "-O", "raw", name]].concat();
    expect_success(&instar(dir, &convert("ours.raw")), "instar");
    expect_success(&qemu_img(dir, &convert("theirs.raw")), "qemu-img");
    let (ours, theirs) = (fs::read(dir.join("ours.raw")).unwrap(), fs::read(dir.join("theirs.raw")).unwrap());
    assert!(ours == theirs && ours[3 << 10..][..1024] == [7; 1024]);
    let without = ["convert", "-f", "qcow", "-O", "raw", "q", "x.raw"];
    let (ours, theirs) = (instar(dir, &without), qemu_img(dir, &without));
    let told = "Could not open 'q': Parameter 'encrypt.key-secret' is required for cipher";
    for output in [ours, theirs] {
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains(told), "{output:?}");
    }
}

#[test]
fn empty_disks_of_all_kinds() {
    if !can_run(true) {
        return;
    }
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let what = format!("{} {} of no bytes", kind.format, kind.options);
        sparse_disk(dir, &mut Random(0), 0);
        let (ours, theirs) =
            (instar(dir, &kind.arguments("disk.raw", "ours")), qemu_img(dir, &kind.arguments("disk.raw", "theirs")));
        // Quirks vmdk-empty and vhd-fixed-empty: what can be made can be read.
        let quirk = kind.format == "vmdk" || kind.options.starts_with("subformat=fixed") && kind.format == "vpc";
        assert_eq!(ours.status.success(), theirs.status.success() || quirk, "{what}");
        if !ours.status.success() {
            continue;
        }
        same(instar, dir, kind, "ours", &what);
        if !quirk {
            same(instar, dir, kind, "theirs", &what);
        }
    }
}

#[test]
fn large_disks_of_all_kinds() {
    if !can_run(true) {
        return;
    }
    for (seed, kind) in (100..).zip(KINDS) {
        let dir = tempfile::tempdir().unwrap();
        let what = format!("{} {} of {} bytes", kind.format, kind.options, kind.largest);
        sparse_disk(dir.path(), &mut Random(seed), kind.largest);
        convert_and_check(dir.path(), kind, &what);
        same_windows(dir.path(), kind, kind.largest, &what);
    }
}
