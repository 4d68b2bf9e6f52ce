//! Nodes that let requests fail (QEMU's driver `blkdebug`): what instar says and does over them beside qemu-img.

mod support;

use std::fs;
use std::path::Path;

use support::{Random, can_run, expect_success, instar, qemu_img, qemu_io, said, twins};

const MIB: usize = 1 << 20;
/// Files of rules, by name.
const CONFIGS: &[(&str, &str)] = &[
    ("read", "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nonce = \"off\"\n"),
    ("sector", "# one\n\n[inject-error]\nevent = \"none\"\niotype = \"read\"\nsector = \"700\"\nerrno = \"28\"\n"),
    ("write", "[inject-error]\nevent = \"write_aio\"\nerrno = \"28\"\n"),
    (
        "never",
        "[set-state]\nevent = \"none\"\nnew_state = \"2\"\n[inject-error]\nevent = \"read_aio\"\nstate = \"1\"\n",
    ),
    ("group", "[foo]\nevent = \"none\"\n"),
    ("event", "[inject-error]\nevent = \"x\"\n"),
    ("option", "[inject-error]\nevent = \"none\"\nfoo = \"1\"\n"),
    ("rubbish", "rubbish\n"),
    ("quotes", "[inject-error]\nevent = none\n"),
    ("missing", "[inject-error]\nerrno = \"5\"\n"),
    ("twice", "[inject-error \"a\"]\nevent = \"none\"\n[inject-error \"a\"]\n"),
    ("number", "[inject-error]\nevent = \"none\"\nerrno = \"x\"\n"),
];

/// A raw disk, twice, a qcow2 image, twice, and rules.
fn files(dir: &Path) {
    let disk = [Random(5).disk(3 * MIB), vec![0; MIB]].concat();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "q", "1M"]);
    qemu_io(dir, "q", &["write -P 3 64k 300k".to_owned()]);
    let image = fs::read(dir.join("q")).unwrap();
    for (name, bytes) in [("r", &disk), ("w", &disk), ("q", &image), ("v", &image)] {
        fs::write(dir.join(name), bytes).unwrap();
    }
    CONFIGS.iter().for_each(|(name, rules)| fs::write(dir.join(name), rules).unwrap());
}

/// Both do the same, each line with fresh files, and leave the same raw disks.
fn compare(lines: &[&str]) {
    let template = tempfile::tempdir().unwrap();
    files(template.path());
    for line in lines {
        let [ours, theirs] = twins(template.path());
        let args: Vec<&str> = line.split(' ').collect();
        let (us, them) = (instar(ours.path(), &args), qemu_img(theirs.path(), &args));
        assert_eq!(said(&us), said(&them), "{line}");
        for name in ["w", "o.raw"] {
            let read = |dir: &Path| fs::read(dir.join(name)).ok();
            assert!(us.status.code() != Some(0) || read(ours.path()) == read(theirs.path()), "{name} after {line}");
        }
        if line.ends_with(" o.qcow2") && us.status.success() {
            for dir in [&ours, &theirs] {
                expect_success(&qemu_img(dir.path(), &["convert", "-O", "raw", "o.qcow2", "flat"]), "convert");
            }
            assert!(
                fs::read(ours.path().join("flat")).unwrap() == fs::read(theirs.path().join("flat")).unwrap(),
                "{line}"
            );
        }
    }
}

#[test]
fn nodes_are_described_as_by_qemu_img() {
    if !can_run(true) {
        return;
    }
    compare(&[
        "info blkdebug::q",
        "info --output=json blkdebug::q",
        "info blkdebug:sector:q",
        "info -f raw blkdebug::r",
        "info blkdebug::r",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q",
        "info --image-opts file.driver=blkdebug,file.image.filename=q",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.align=4096",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.max-transfer=65536,file.node-name=n",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.config=sector",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.inject-error.0.event=none,file.inject-error.0.errno=0",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.inject-error.0.event=none,file.inject-error.0.iotype=write",
        "info --image-opts driver=raw,offset=512,file.driver=blkdebug,file.image.filename=r",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.driver=raw,file.image.file.filename=q",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.driver=raw,file.image.offset=0,file.image.file.filename=q",
        "info --output=json --image-opts driver=qcow2,file.driver=raw,file.file.driver=blkdebug,file.file.image.filename=q",
        "info json:{'driver':'qcow2','file':{'driver':'blkdebug','config':'sector','align':512,'image':{'filename':'q'}}}",
        "info json:{'driver':'qcow2','file':{'driver':'blkdebug','inject-error':[{'event':'none','iotype':'write'}],'image':{'driver':'file','filename':'q'}}}",
        "map blkdebug::q",
        "map --output=json blkdebug::q",
        "check blkdebug:sector:q",
        "snapshot -l blkdebug::q",
        "measure -f raw -O qcow2 blkdebug:never:r",
        "compare blkdebug::q q",
    ]);
}

#[test]
fn nodes_that_are_refused_as_by_qemu_img() {
    if !can_run(true) {
        return;
    }
    compare(&[
        "info blkdebug::nosuch",
        "info blkdebug:nosuch:q",
        "info blkdebug:q",
        "info blkdebug:",
        "info blkdebug:/:q",
        "info blkdebug:group:q",
        "info blkdebug:event:q",
        "info blkdebug:option:q",
        "info blkdebug:rubbish:q",
        "info blkdebug:quotes:q",
        "info blkdebug:missing:q",
        "info blkdebug:twice:q",
        "info blkdebug:number:q",
        "info --image-opts driver=qcow2,file.driver=blkdebug",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image=q",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.foo=1",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.foo=1",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.align=7",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.align=512,file.max-transfer=1000",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.config=nosuch",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.inject-error.0.event=foo",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.inject-error.0.iotype=read",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.inject-error.0.event=none,file.inject-error.0.iotype=foo",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.inject-error.0.event=none,file.inject-error.0.errno=x",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.inject-error.0.event=none,file.inject-error.0.once=x",
        "info --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.inject-error.0.event=none,file.inject-error.0.foo=1",
        "info --image-opts driver=qcow2,file.filename=blkdebug::q",
        "create -f qcow2 blkdebug::new 1M",
        "convert -O qcow2 q blkdebug::new",
    ]);
}

#[test]
fn requests_fail_as_with_qemu_img() {
    if !can_run(true) {
        return;
    }
    const W: &str = "driver=raw,file.driver=blkdebug,file.image.filename=w,file.inject-error.0.event=none,file.inject-error.0.iotype=";
    let line = |text: &str| text.replace("@W", W);
    let lines = [
        "convert -f raw -O raw blkdebug:never:r o.raw",
        "convert -f raw -O raw blkdebug:sector:r o.raw",
        "convert -f raw --salvage -O raw blkdebug:sector:r o.raw",
        "convert -f raw --salvage -O qcow2 blkdebug:sector:r o.qcow2",
        "convert -O raw blkdebug:sector:q o.raw",
        "convert --salvage -O raw blkdebug:sector:q o.raw",
        "compare -f raw -F raw blkdebug:sector:r r",
        "compare -f raw -F raw r blkdebug:sector:r",
        "dd -f raw if=blkdebug:sector:r of=o.raw",
        "bench -f raw -c 4 blkdebug:read:r",
        "convert -n -O raw r blkdebug:write:w",
        "convert -n --image-opts --target-image-opts driver=raw,file.filename=r @Wwrite",
        "convert -n --image-opts --target-image-opts driver=raw,file.filename=r @Wflush",
        "convert -n --image-opts --target-image-opts driver=raw,file.filename=r @Wdiscard",
        "bench -w -c 3 --image-opts @Wwrite",
        "resize --image-opts @Wwrite 2M",
        "convert -O raw --image-opts driver=raw,file.driver=blkdebug,file.image.filename=r,file.inject-error.0.event=none,file.inject-error.0.sector=9999999 o.raw",
        "convert -O qcow2 --salvage --image-opts driver=raw,file.driver=blkdebug,file.image.filename=r,file.inject-error.0.event=read_aio,file.inject-error.0.once=on o.qcow2",
    ]
    .map(line);
    compare(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

/// What only QEMU's own drivers could tell of is refused, not ignored.
#[test]
fn what_is_not_met_here_is_refused() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    files(dir.path());
    let node = "driver=qcow2,file.driver=blkdebug,file.image.filename=q,file.inject-error.0.event";
    for (options, told) in [
        ("=l2_load", "The event 'l2_load' of blkdebug is not provided by this version"),
        ("=read_aio", "are provided for raw disks only"),
        ("=none,file.inject-error.0.iotype=block-status", "The iotype 'block-status' of blkdebug is not provided"),
    ] {
        let done = instar(dir.path(), &["info", "--image-opts", &format!("{node}{options}")]);
        assert_eq!(done.status.code(), Some(1));
        assert!(said(&done).2.contains(told), "{:?}", said(&done));
    }
}
