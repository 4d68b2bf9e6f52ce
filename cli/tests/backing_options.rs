//! Backing images that the operator gives by options (`backing`, `backing.*`), with `--image-opts` and `json:` names: what instar says and
//! does beside qemu-img.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use support::{all_files, can_run, expect_success, instar, qemu_img, qemu_io, said, twins};

const TOP: &str = "driver=qcow2,file.filename=top.qcow2";
const ALONE: &str = "driver=qcow2,file.filename=alone.qcow2";
/// Another backing image.
const OTHER: &str = "backing.driver=qcow2,backing.file.filename=other.qcow2";
/// The image without the one below.
const BARE: &str = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"},"backing":null}"#;

fn create(dir: &Path, args: &str) {
    let args: Vec<&str> = ["create", "-q"].into_iter().chain(args.split(' ')).collect();
    expect_success(&qemu_img(dir, &args), "create");
}

/// A chain of three, images that are not of it, and images of formats with and without backing images.
fn files(dir: &Path) {
    fs::create_dir(dir.join("sub")).unwrap();
    for line in [
        "-f qcow2 base.qcow2 1M",
        "-f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
        "-f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
        "-f qcow2 alone.qcow2 1M",
        "-f qcow2 other.qcow2 1M",
        "-f qcow2 inner.qcow2 1M",
        "-f qcow2 -b base.qcow2 -F qcow2 wide.qcow2 2M",
        "-f raw other.raw 1M",
        "-f qcow2 sub/low.qcow2 1M",
        "-f qcow2 -b low.qcow2 -F qcow2 sub/up.qcow2",
        "-f vmdk base.vmdk 1M",
        "-f vmdk -b base.vmdk -F vmdk top.vmdk",
        "-f qed -b base.qcow2 -F qcow2 top.qed",
        "-f qcow -b base.qcow2 -F qcow2 top.qcow",
        "-f parallels x.parallels 1M",
        "-f vdi x.vdi 1M",
        "-f vpc x.vpc 1M",
        "-f vhdx x.vhdx 1M",
    ] {
        create(dir, line);
    }
    create(
        dir,
        "--object secret,id=s,data=abc -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 enc.qcow2 1M",
    );
    for (image, writes) in [
        ("base.qcow2", ["write -P 1 0 128k", "write -P 9 704k 64k"]),
        ("mid.qcow2", ["write -P 2 192k 64k", "write -z 704k 64k"]),
        ("top.qcow2", ["write -P 3 128k 64k", "write -P 3 512k 4k"]),
        ("alone.qcow2", ["write -P 4 256k 64k", "write -P 4 768k 128k"]),
        ("other.qcow2", ["write -P 5 64k 128k", "write -P 5 512k 64k"]),
        ("inner.qcow2", ["write -P 6 0 192k", "write -P 6 1000k 24k"]),
        ("sub/low.qcow2", ["write -P 7 0 64k", "write -P 7 448k 64k"]),
    ] {
        qemu_io(dir, image, &writes.map(str::to_owned));
    }
    fs::write(dir.join("other.raw"), [vec![8; 300 << 10], vec![0; 724 << 10]].concat()).unwrap();
    let inner = fs::read(dir.join("inner.qcow2")).unwrap();
    fs::write(dir.join("inside.img"), [vec![0xee; 1 << 20], inner].concat()).unwrap();
}

/// The files to begin with.
fn template() -> tempfile::TempDir {
    let template = tempfile::tempdir().unwrap();
    files(template.path());
    template
}

/// A line with the placeholders filled in.
fn words(line: &str) -> Vec<String> {
    let fill = |word: &str| {
        word.replace("{TOP}", TOP).replace("{ALONE}", ALONE).replace("{OTHER}", OTHER).replace("{BARE}", BARE)
    };
    line.split(' ').map(fill).collect()
}

/// How the two differ in what they say and do.
fn difference(dirs: &[tempfile::TempDir; 2], line: &str) -> Option<String> {
    let words = words(line);
    let args: Vec<&str> = words.iter().map(String::as_str).collect();
    let [ours, theirs] = dirs.each_ref().map(tempfile::TempDir::path);
    let (us, them) = (said(&instar(ours, &args)), said(&qemu_img(theirs, &args)));
    if us != them {
        return Some(format!("{line}\n  ours: {us:?}\n  theirs: {them:?}"));
    }
    let bytes = |dir: &Path| all_files(dir).into_iter().map(|path| fs::read(path).unwrap()).collect::<Vec<_>>();
    let names = |dir: &Path| {
        all_files(dir).into_iter().map(|path| path.strip_prefix(dir).unwrap().to_owned()).collect::<Vec<_>>()
    };
    if names(ours) != names(theirs) {
        return Some(format!("{line}: other files"));
    }
    let differing = names(ours).into_iter().zip(bytes(ours).into_iter().zip(bytes(theirs)));
    // Where qemu-img puts clusters may depend on chance, and snapshots tell the time.
    let differing = differing.filter(|(_, (us, them))| us != them).map(|(name, _)| name);
    let differing: Vec<PathBuf> =
        differing.filter(|name| !same_contents(&ours.join(name), &theirs.join(name))).collect();
    (!differing.is_empty()).then(|| format!("{line}: other bytes in {differing:?}"))
}

fn same_contents(us: &Path, them: &Path) -> bool {
    let node = |path: &Path| match path.ends_with("inside.img") {
        true => format!("driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename={}", path.display()),
        false => format!("driver=qcow2,file.filename={}", path.display()),
    };
    qemu_img(Path::new("/"), &["compare", "-s", "--image-opts", &node(us), &node(them)]).status.success()
}

/// Lines that change nothing that others read.
fn compare_all(lines: &[&str]) {
    compare_each(&[lines]);
}

/// Each sequence of lines with fresh files.
fn compare_each(sequences: &[&[&str]]) {
    if !can_run(true) {
        return;
    }
    let template = template();
    let mut differences = Vec::new();
    for lines in sequences {
        let dirs = twins(template.path());
        differences.extend(lines.iter().filter_map(|line| difference(&dirs, line)));
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn an_image_is_shown_without_the_one_below() {
    compare_all(&[
        "info {BARE}",
        "info --output=json {BARE}",
        "info --backing-chain {BARE}",
        "info --image-opts {TOP},backing=",
        "check {BARE}",
        "check --output=json {BARE}",
        "check --image-opts {TOP},backing=",
        "map {BARE}",
        "map --output=json {BARE}",
        "map --output=json --image-opts {TOP},backing=",
        r#"map --output=json json:{"file":{"filename":"top.qcow2"},"backing":null}"#,
        r#"map -f qcow2 json:{"file":{"filename":"top.qcow2"},"backing":null}"#,
        r#"map --output=json json:{"driver":"qcow2","file.filename":"top.qcow2","backing":""}"#,
        "map --output=json --image-opts {ALONE},backing=",
        "map --output=json --image-opts driver=vmdk,file.filename=top.vmdk,backing=",
        "map --output=json --image-opts driver=qed,file.filename=top.qed,backing=",
        "map --output=json --image-opts driver=qcow,file.filename=top.qcow,backing=",
        "map --output=json --image-opts driver=raw,file.filename=other.raw,backing=",
        "map --output=json --image-opts driver=vdi,file.filename=x.vdi,backing=",
        "map --output=json --image-opts driver=parallels,file.filename=x.parallels,backing=",
        "measure -O qcow2 {BARE}",
        "measure -O qcow2 --output=json --image-opts {TOP},backing=",
        "measure -O raw {BARE}",
        "compare {BARE} top.qcow2",
        "compare -s {BARE} alone.qcow2",
        "compare --image-opts {TOP},backing= {TOP},backing=",
        "snapshot -l {BARE}",
        "snapshot -l --image-opts {TOP},backing=",
        "bench -c 3 -s 4096 -f qcow2 {BARE}",
        "dd -f qcow2 if={BARE} of=o.raw bs=64k",
        "convert -O raw {BARE} o1.raw",
        "convert -O qcow2 {BARE} o1.qcow2",
        "convert -O raw --image-opts {TOP},backing= o2.raw",
        "map --output=json --image-opts {TOP},backing.backing=",
        "map --output=json --image-opts {TOP},backing.driver=qcow2,backing.backing=",
        r#"map --output=json json:{"driver":"qcow2","file":{"filename":"top.qcow2"},"backing":{"backing":null}}"#,
        r#"map --output=json json:{"driver":"qcow2","file":{"filename":"top.qcow2"},"backing":{"file":{"filename":"mid.qcow2"},"backing":""}}"#,
        // The name of a node.
        "map --image-opts {TOP},backing=x",
        "map --image-opts {TOP},backing=null",
        "map --image-opts {TOP},backing=x,backing.driver=raw",
        "map --image-opts {TOP},backing.backing=x",
        r#"map json:{"driver":"qcow2","file":{"filename":"top.qcow2"},"backing":"x"}"#,
        "map --image-opts driver=raw,file.filename=other.raw,backing=x",
        "map --image-opts {TOP},backing=,backing.driver=raw",
        r#"map json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":5}"#,
        r#"map json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":true}"#,
        r#"map json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":{}}"#,
        r#"map json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":[]}"#,
        r#"map json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":[1]}"#,
        r#"map json:{"driver":"qcow2","file":{"filename":"top.qcow2"},"backing":[1]}"#,
        r#"info json:{"driver":"qcow2","file":{"filename":"top.qcow2"},"backing":5}"#,
    ]);
}

#[test]
fn another_backing_image_is_read() {
    compare_all(&[
        "map --image-opts {TOP},{OTHER}",
        "map --output=json --image-opts {TOP},{OTHER}",
        "map --output=json --image-opts file.filename=top.qcow2,backing.file.filename=other.qcow2",
        "map --output=json --image-opts {ALONE},{OTHER}",
        "map --image-opts {ALONE},backing.driver=raw,backing.file.filename=other.raw",
        "map --output=json --image-opts {ALONE},backing.driver=raw,backing.file.filename=other.raw",
        "map --output=json --image-opts {ALONE},backing.driver=file,backing.filename=other.raw",
        "map --output=json --image-opts {ALONE},backing.file.filename=other.raw",
        "map --output=json --image-opts {ALONE},backing.file.filename=top.qcow2",
        "map --output=json --image-opts {ALONE},backing.driver=qcow2,backing.file.filename=wide.qcow2",
        "map --output=json --image-opts driver=qcow2,file.filename=wide.qcow2,{OTHER}",
        r#"map --output=json json:{"driver":"qcow2","file":{"filename":"top.qcow2"},"backing":{"driver":"qcow2","file":{"driver":"file","filename":"other.qcow2"}}}"#,
        // Names inside of it are relative to it.
        "map --image-opts {ALONE},backing.driver=qcow2,backing.file.filename=sub/up.qcow2",
        "map --image-opts {ALONE},backing.driver=qcow2,backing.file.filename=sub/up.qcow2,backing.backing.driver=qcow2",
        "map --image-opts driver=qcow2,file.filename=sub/up.qcow2,{OTHER}",
        // Nested.
        "map --image-opts {TOP},{OTHER},backing.backing.driver=qcow2,backing.backing.file.filename=inner.qcow2",
        "map --output=json --image-opts {TOP},{OTHER},backing.backing.driver=qcow2,backing.backing.file.filename=inner.qcow2,backing.backing.backing.driver=raw,backing.backing.backing.file.filename=other.raw",
        "map --output=json --image-opts {TOP},backing.backing.driver=qcow2,backing.backing.file.filename=other.qcow2",
        r#"map --output=json json:{"driver":"qcow2","file":{"filename":"top.qcow2"},"backing":{"driver":"qcow2","file":{"filename":"other.qcow2"},"backing":{"driver":"raw","file":{"filename":"other.raw"}}}}"#,
        // As it is recorded, but otherwise.
        "map --output=json --image-opts {TOP},backing.driver=qcow2",
        "map --output=json --image-opts {TOP},backing.driver=raw",
        "map --output=json --image-opts {TOP},backing.driver=raw,backing.offset=64k,backing.size=128k",
        "map --image-opts {TOP},backing.driver=raw,backing.offset=64k",
        "map --image-opts {TOP},backing.driver=raw,backing.file.driver=raw,backing.file.offset=64k",
        "map --output=json --image-opts {TOP},backing.file.locking=off",
        "map --output=json --image-opts {TOP},backing.file.driver=file",
        "map --output=json --image-opts {TOP},backing.read-only=on,backing.l2-cache-size=1M",
        "map --output=json --image-opts {TOP},backing.driver=file",
        // Parts of files, and nothing.
        "map --output=json --image-opts {ALONE},backing.driver=raw,backing.offset=64k,backing.size=512k,backing.file.filename=other.raw",
        "map --image-opts {ALONE},backing.driver=raw,backing.offset=64k,backing.file.filename=other.raw",
        "map --output=json --image-opts {ALONE},backing.driver=qcow2,backing.file.driver=raw,backing.file.offset=1M,backing.file.file.filename=inside.img",
        "map --image-opts {ALONE},backing.driver=qcow2,backing.file.driver=raw,backing.file.offset=1M,backing.file.file.filename=inside.img",
        "map --output=json --image-opts {ALONE},backing.driver=null-co,backing.size=1M,backing.read-zeroes=on",
        // The same file twice.
        "map --image-opts {TOP},backing.driver=qcow2,backing.file.filename=top.qcow2",
        "map --image-opts {TOP},backing.driver=qcow2,backing.file.filename=mid.qcow2",
        // Other formats.
        "map --image-opts driver=qed,file.filename=top.qed,{OTHER}",
        "map --image-opts driver=qcow,file.filename=top.qcow,{OTHER}",
        "map --image-opts driver=parallels,file.filename=x.parallels,{OTHER}",
        "map --image-opts {ALONE},backing.driver=qed,backing.file.filename=top.qed",
        "map --image-opts {ALONE},backing.driver=vdi,backing.file.filename=x.vdi",
        "map --image-opts driver=vmdk,file.filename=top.vmdk,backing.driver=vmdk,backing.file.filename=base.vmdk",
        // Commands that read.
        "check --image-opts {TOP},{OTHER}",
        "snapshot -l --image-opts {TOP},{OTHER}",
        "measure -O qcow2 --image-opts {TOP},{OTHER}",
        "measure -O raw --output=json --image-opts {ALONE},{OTHER}",
        "compare --image-opts {TOP},{OTHER} {TOP}",
        "compare -s --image-opts {TOP},{OTHER} {TOP},backing.driver=qcow2",
        "compare --image-opts {ALONE},{OTHER} {ALONE},backing.file.filename=other.qcow2",
        "bench -c 3 -s 4096 --image-opts {TOP},{OTHER}",
        "dd --image-opts if={TOP},{OTHER} of=o.raw bs=64k",
        "dd --image-opts if={ALONE},backing.driver=raw,backing.file.filename=other.raw of=o.raw bs=32k skip=2",
        "convert -O raw --image-opts {TOP},{OTHER} o1.raw",
        "convert -O qcow2 --image-opts {TOP},{OTHER} o1.qcow2",
        "convert -c -O qcow2 --image-opts {ALONE},{OTHER} o2.qcow2",
        "convert -O raw --image-opts {ALONE},{OTHER},backing.backing.driver=raw,backing.backing.file.filename=other.raw o2.raw",
        "convert -O raw --image-opts {ALONE},{OTHER} {TOP},backing= o3.raw",
        "convert -O qcow2 -B mid.qcow2 -F qcow2 --image-opts {TOP},{OTHER} o3.qcow2",
        "convert -O qcow2 -B mid.qcow2 -F qcow2 --image-opts {TOP},backing= o4.qcow2",
        r#"convert -O qcow2 -B json:{"driver":"qcow2","file":{"filename":"mid.qcow2"},"backing":null} -F qcow2 top.qcow2 o5.qcow2"#,
        r#"convert -O qcow2 -B json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":{"file":{"filename":"other.qcow2"}}} -F qcow2 top.qcow2 o6.qcow2"#,
        "convert -U -O raw --image-opts {TOP},{OTHER} o5.raw",
        "map -U --image-opts {TOP},{OTHER},backing.force-share=on",
        r#"convert -O raw json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":{"driver":"qcow2","file":{"filename":"other.qcow2"}}} o4.raw"#,
    ]);
}

#[test]
fn what_does_not_fit_is_told_as_by_qemu_img() {
    compare_all(&[
        "map --image-opts {TOP},backing.driver=qcow2,backing.file.filename=nosuch",
        "map --image-opts driver=qcow2,file.filename=nosuch,{OTHER}",
        "map --image-opts {TOP},backing.file.filename=",
        "map --image-opts {TOP},{OTHER},backing.backing.driver=raw,backing.backing.file.filename=nosuch",
        "map --image-opts {TOP},backing.driver=nosuch",
        "map --image-opts {TOP},backing.driver=nosuch,backing.file.filename=other.qcow2",
        "map --image-opts {TOP},backing.driver=vmdk",
        "map --image-opts {TOP},backing.driver=vmdk,backing.file.filename=other.qcow2",
        "map --image-opts {TOP},backing.driver=raw,backing.backing.driver=raw",
        "map --image-opts {TOP},backing.foo=1",
        "map --image-opts {TOP},{OTHER},backing.foo=1",
        "map --image-opts {TOP},{OTHER},backing.file.foo=1",
        "map --image-opts {TOP},{OTHER},backing.read-only=x",
        "map --image-opts {TOP},backing.file.filename=sub",
        "map --image-opts {TOP},backing.driver=file,backing.filename=other.raw",
        "map --image-opts {TOP},backing.file.driver=raw,backing.file.file.filename=other.raw",
        "map --image-opts {TOP},backing.driver=null-co",
        "map --image-opts {TOP},backing.file.driver=null-co",
        "map --image-opts {TOP},backing.driver=raw,backing.offset=9M,backing.file.filename=other.raw",
        "map --image-opts {ALONE},backing.driver=raw",
        "map --image-opts {ALONE},backing.driver=qcow2",
        "map --image-opts {ALONE},backing.driver=nosuch",
        "map --image-opts {ALONE},backing.file.locking=off",
        "map --image-opts {ALONE},backing.read-only=on",
        "map --image-opts {ALONE},backing.backing.driver=raw",
        "map --image-opts driver=raw,file.filename=other.raw,{OTHER}",
        "map --image-opts driver=vdi,file.filename=x.vdi,{OTHER}",
        "map --image-opts driver=vpc,file.filename=x.vpc,{OTHER}",
        "map --image-opts driver=vhdx,file.filename=x.vhdx,{OTHER}",
        "map --image-opts driver=vdi,file.filename=x.vdi,backing.driver=raw",
        "convert -O raw --image-opts {TOP},backing.driver=raw,backing.file.filename=nosuch o.raw",
        "compare --image-opts {TOP},backing.driver=raw,backing.file.filename=nosuch {TOP}",
        "compare --image-opts {TOP} {TOP},backing.driver=raw,backing.file.filename=nosuch",
        "measure -O raw --image-opts {TOP},backing.driver=raw,backing.file.filename=nosuch",
        "check --image-opts {TOP},backing.driver=qcow2,backing.file.filename=nosuch",
        "check --image-opts driver=vdi,file.filename=x.vdi,{OTHER}",
        "snapshot -l --image-opts {TOP},backing.driver=qcow2,backing.file.filename=nosuch",
        "dd --image-opts if={TOP},backing.driver=raw,backing.file.filename=nosuch of=o.raw",
        "bench --image-opts {TOP},backing.driver=raw,backing.file.filename=nosuch",
        "commit --image-opts {TOP},backing.driver=raw,backing.file.filename=nosuch",
        "resize --image-opts {TOP},backing.driver=raw,backing.file.filename=nosuch 2M",
        "amend -o lazy_refcounts=on --image-opts {TOP},backing.driver=raw,backing.file.filename=nosuch",
        // Commands that look at an image alone.
        "info --image-opts {TOP},{OTHER}",
        "info --backing-chain --image-opts {TOP},{OTHER}",
        "info --image-opts {TOP},backing=x",
        "info --image-opts {TOP},backing.backing=",
        "info --image-opts {TOP},backing.file.filename=other.qcow2",
        "info --image-opts {TOP},backing.file.driver=file,backing.file.filename=other.qcow2",
        "info --image-opts driver=raw,file.filename=other.raw,{OTHER}",
        "info --image-opts file.filename=x.vdi,{OTHER}",
        "info --image-opts driver=qcow2,file.filename=nosuch,{OTHER}",
        "bitmap --add --image-opts {TOP},{OTHER} b",
        "bitmap --add --image-opts {TOP},backing=x b",
        r#"bitmap --merge b -b json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":{"driver":"raw","file":{"filename":"other.raw"}}} top.qcow2 b"#,
        "rebase -u -b base.qcow2 -F qcow2 --image-opts {TOP},{OTHER}",
        "rebase -u -b base.qcow2 -F qcow2 --image-opts {TOP},backing.driver=raw",
        // What is written is read.
        "convert -O raw --image-opts {TOP},{OTHER} other.qcow2",
        "convert -O qcow2 -B mid.qcow2 -F qcow2 --image-opts {TOP},{OTHER} other.qcow2",
        "convert -n -O raw --image-opts {ALONE},backing.driver=raw,backing.file.filename=other.raw other.raw",
    ]);
}

#[test]
fn images_are_changed_over_another_backing_image() {
    compare_each(&[
        &["commit --image-opts {TOP},{OTHER}", "map top.qcow2"],
        &["commit --image-opts {ALONE},{OTHER}", "map --output=json alone.qcow2"],
        &["commit -d --image-opts {ALONE},{OTHER}", "map --output=json alone.qcow2"],
        &["commit --image-opts {TOP},{OTHER},backing.backing=", "map top.qcow2"],
        &["commit --image-opts {TOP},{OTHER},backing.read-only=on"],
        &["commit -b other.qcow2 --image-opts {TOP},{OTHER}"],
        &["commit -b ./other.qcow2 --image-opts {TOP},{OTHER}"],
        &["commit -b base.qcow2 --image-opts {TOP},{OTHER}"],
        &["commit -b base.qcow2 --image-opts {TOP},backing.driver=qcow2", "map top.qcow2"],
        &["commit -b mid.qcow2 --image-opts {TOP},backing.driver=qcow2", "map top.qcow2"],
        &[
            "commit -b other.qcow2 --image-opts {TOP},backing.driver=qcow2,backing.file.filename=mid.qcow2,backing.backing.driver=qcow2,backing.backing.file.filename=other.qcow2",
        ],
        &["commit --image-opts {TOP},backing=", "commit {BARE}", "commit -b mid.qcow2 {BARE}"],
        &["commit --image-opts {TOP},backing.driver=qcow2,backing.file.filename=top.qcow2"],
        &[
            "create -q -f qcow2 -o data_file=d.raw data.qcow2 1M",
            "commit --image-opts {TOP},backing.driver=qcow2,backing.file.filename=data.qcow2,backing.data-file.driver=file,backing.data-file.filename=d.raw",
        ],
        &[
            "commit --image-opts {ALONE},backing.driver=qcow2,backing.file.driver=raw,backing.file.offset=1M,backing.file.file.filename=inside.img",
        ],
        &["commit --image-opts driver=qed,file.filename=top.qed,{OTHER}", "map top.qed"],
        &["commit --image-opts {ALONE},{OTHER},backing.force-share=on"],
        &["resize --image-opts {TOP},{OTHER} 2M", "map --output=json top.qcow2"],
        &["resize --image-opts {TOP},backing= 2M", "map --output=json top.qcow2"],
        &["resize {BARE} 2M", "map --output=json top.qcow2"],
        &["amend -o lazy_refcounts=on --image-opts {TOP},{OTHER}", "amend -o compat=0.10 {BARE}", "info top.qcow2"],
        &[
            "bitmap --add alone.qcow2 b",
            "bitmap --add top.qcow2 b",
            r#"bitmap --merge b -b json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":null} -F qcow2 top.qcow2 b"#,
        ],
        &["bitmap --add {BARE} b", "bitmap --add --image-opts {TOP},backing= c", "info top.qcow2"],
        &["rebase -u -b base.qcow2 -F qcow2 {BARE}", "info top.qcow2"],
        &["rebase -b  --image-opts {TOP},{OTHER}", "map top.qcow2"],
        &["rebase -b  --image-opts {TOP},backing=", "map top.qcow2"],
        &["rebase -b  {BARE}", "map top.qcow2"],
        &["rebase -b base.qcow2 -F qcow2 --image-opts {TOP},{OTHER}"],
        &["rebase -b base.qcow2 -F qcow2 {BARE}"],
        &["rebase -b base.qcow2 -F qcow2 --image-opts {TOP},backing.driver=qcow2", "map top.qcow2"],
        &[
            "rebase -b base.qcow2 -F qcow2 --image-opts {TOP},backing.driver=qcow2,backing.file.filename=mid.qcow2",
            "map top.qcow2",
        ],
        &["bench -w -c 2 -s 4096 --image-opts {TOP},{OTHER}", "map top.qcow2"],
        &["bench -w -c 2 -s 4096 -f qcow2 {BARE}", "map top.qcow2"],
        &[
            "snapshot -c s --image-opts {TOP},backing=",
            "snapshot -a s --image-opts {TOP},{OTHER}",
            "snapshot -d s {BARE}",
        ],
        &["convert -n --image-opts --target-image-opts {ALONE} {TOP},backing=", "compare alone.qcow2 top.qcow2"],
    ]);
}

#[test]
fn new_images_over_a_backing_image_of_options() {
    const OVER: &str = r#"-b json:{"driver":"qcow2","file":{"filename":"mid.qcow2"},"backing":null}"#;
    const MORE: &str = r#"-b json:{"driver":"qcow2","file":{"filename":"alone.qcow2"},"backing":{"driver":"qcow2","file":{"filename":"other.qcow2"}}}"#;
    let create = [OVER, MORE].map(|over| format!("create -f qcow2 -F qcow2 {over} n.qcow2"));
    let rebase = [OVER, MORE].map(|over| format!("rebase -f qcow2 -F qcow2 {over} top.qcow2"));
    for line in create.iter().chain(&rebase) {
        compare_each(&[&[line, "info top.qcow2"]]);
    }
    compare_each(&[&[
        r#"create -f qcow2 -F qcow2 -b json:{"file":{"filename":"mid.qcow2"},"backing":""} n.qcow2"#,
        "info n.qcow2",
    ]]);
}

#[test]
fn keys_go_with_the_image_that_they_open() {
    compare_all(&[
        "map --object secret,id=s,data=abc --image-opts {ALONE},backing.driver=qcow2,backing.file.filename=enc.qcow2,backing.encrypt.key-secret=s",
        "map --object secret,id=s,data=abd --image-opts {ALONE},backing.driver=qcow2,backing.file.filename=enc.qcow2,backing.encrypt.key-secret=s",
        "map --image-opts {ALONE},backing.driver=qcow2,backing.file.filename=enc.qcow2",
        "map --image-opts {ALONE},backing.driver=qcow2,backing.file.filename=enc.qcow2,backing.encrypt.key-secret=s",
        "convert -O raw --object secret,id=s,data=abc --image-opts {ALONE},backing.driver=qcow2,backing.file.filename=enc.qcow2,backing.encrypt.key-secret=s o.raw",
        "map --object secret,id=s,data=abc --image-opts {ALONE},backing.encrypt.key-secret=s",
        "compare --object secret,id=s,data=abc --image-opts {ALONE},{OTHER},backing.backing.driver=qcow2,backing.backing.file.filename=enc.qcow2,backing.backing.encrypt.key-secret=s {ALONE},{OTHER}",
    ]);
}

/// What an operator types may lie anywhere; what the images there name may not.
#[test]
fn names_in_named_images_stay_confined() {
    if !can_run(true) {
        return;
    }
    let (home, away) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::write(secret.path(), [b'x'; 512]).unwrap();
    let secret = secret.path().display();
    let away_dir = away.path().display();
    create(home.path(), "-f qcow2 top.qcow2 1M");
    create(away.path(), "-f qcow2 fine.qcow2 1M");
    create(away.path(), &format!("-f qcow2 -u -b {secret} -F raw evil.qcow2 1M"));
    create(away.path(), "-f qcow2 -b fine.qcow2 -F qcow2 near.qcow2");
    let map = |name: &str, more: &str| {
        let opts = format!(
            "driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename={away_dir}/{name}{more}"
        );
        instar(home.path(), &["map", "--image-opts", &opts])
    };
    expect_success(&map("fine.qcow2", ""), "an image elsewhere");
    expect_success(&map("near.qcow2", ""), "an image elsewhere, with one beside it");
    for more in ["", ",backing.backing.driver=raw", ",backing.backing.read-only=on"] {
        let refused = map("evil.qcow2", more);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("refused: it lies outside"), "{more}: {said}");
    }
    expect_success(
        &map("evil.qcow2", &format!(",backing.backing.driver=raw,backing.backing.file.filename={secret}")),
        "named itself",
    );
    expect_success(&map("evil.qcow2", ",backing.backing="), "not asked for");
}

/// Images that refer to each other.
#[test]
fn what_is_named_does_not_hide_a_circle() {
    if !can_run(true) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    create(tmp.path(), "-f qcow2 -u -b b.qcow2 -F qcow2 a.qcow2 1M");
    create(tmp.path(), "-f qcow2 -u -b a.qcow2 -F qcow2 b.qcow2 1M");
    let map = |opts: &str| {
        let output = instar(tmp.path(), &["map", "--image-opts", opts]);
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let named = "driver=qcow2,file.filename=a.qcow2,backing.driver=qcow2,backing.file.filename=a.qcow2";
    let (done, said) = map(named);
    assert!(!done && said.contains("refers to itself"), "{said}");
    assert!(map(&format!("{named},backing.backing=")).0);
}

/// Also where no lock stands in the way.
#[test]
fn what_is_read_is_not_written() {
    if !can_run(true) {
        return;
    }
    let template = template();
    let dir = template.path();
    let before = fs::read(dir.join("other.qcow2")).unwrap();
    let source = format!("{TOP},{OTHER}");
    for more in [&["-O", "raw"][..], &["-O", "qcow2"], &["-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2"]] {
        let args = [&["convert", "-U", "--image-opts", &source, "other.qcow2"], more].concat();
        let output = instar(dir, &args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("one of the files to be read"), "{more:?}: {said}");
        assert!(fs::read(dir.join("other.qcow2")).unwrap() == before, "{more:?}");
    }
}

#[test]
fn a_target_takes_no_backing_image() {
    if !can_run(true) {
        return;
    }
    let template = template();
    let target = format!("{TOP},{OTHER}");
    let output = instar(template.path(), &["convert", "-n", "--target-image-opts", "alone.qcow2", &target]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("is not provided for a target"), "{said}");
}
