//! Parts of files that the operator names (`offset` and `size` of the driver `raw`): what instar says and does of them beside
//! qemu-img.

mod support;

use std::fs;
use std::path::Path;

use support::{Random, can_run, expect_success, instar, qemu_img, qemu_io, said, twins};

const MIB: usize = 1 << 20;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A file of noise, and one with a qcow2 image between two stretches of other bytes.
fn files(dir: &Path) {
    fs::write(dir.join("r.raw"), Random(7).disk(4 * MIB)).unwrap();
    expect_success(&qemu_img(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]), "create");
    qemu_io(dir, "a.qcow2", &["write -P 3 64k 100k".to_owned()]);
    let image = fs::read(dir.join("a.qcow2")).unwrap();
    fs::write(dir.join("inside.img"), [vec![0xee; MIB], image, vec![0xdd; 300 << 10]].concat()).unwrap();
    expect_success(&qemu_img(dir, &["create", "-q", "-f", "vmdk", "a.vmdk", "1M"]), "create");
    fs::write(dir.join("odd.raw"), vec![5; 1000]).unwrap();
}

/// Both do the same, with the same files, and leave the same bytes.
fn compare(lines: &[&str]) {
    let template = tempfile::tempdir().unwrap();
    files(template.path());
    let [ours, theirs] = twins(template.path());
    for line in lines {
        let args: Vec<&str> = line.split(' ').collect();
        let (us, them) = (instar(ours.path(), &args), qemu_img(theirs.path(), &args));
        assert_eq!(said(&us), said(&them), "{line}");
        for name in ["r.raw", "o.raw"] {
            let read = |dir: &Path| fs::read(dir.join(name)).ok();
            assert!(read(ours.path()) == read(theirs.path()), "{name} after {line}");
        }
    }
}

#[test]
fn parts_are_described_as_by_qemu_img() {
    if !can_run(true) {
        return;
    }
    compare(&[
        "info --image-opts driver=raw,offset=1M,size=512k,file.filename=r.raw",
        "info --output=json --image-opts driver=raw,offset=1M,file.filename=r.raw",
        "info --output=json --image-opts driver=raw,size=1M,file.filename=r.raw",
        "info --image-opts driver=raw,offset=4M,file.filename=r.raw",
        "info --image-opts driver=raw,offset=1000,size=1024,file.filename=r.raw",
        "info --image-opts driver=raw,offset=100,file.filename=odd.raw",
        "info --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img",
        "info --output=json --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img",
        "info --image-opts driver=qcow2,file.driver=raw,file.file.filename=a.qcow2",
        "info --image-opts file.driver=raw,file.offset=1M,file.file.filename=inside.img",
        "info --image-opts file.driver=raw,file.file.driver=raw,file.file.file.filename=a.qcow2",
        "info --image-opts driver=raw,offset=1M,file.driver=raw,file.offset=512k,file.file.filename=r.raw",
        "info --image-opts driver=raw,offset=1k,file.driver=null-co,file.size=1M",
        "info --image-opts driver=vmdk,file.driver=raw,file.offset=0,file.file.filename=a.vmdk",
        "info json:{'driver':'raw','offset':1024,'size':'512','file':{'filename':'r.raw'}}",
        "info json:{'driver':'qcow2','file':{'driver':'raw','offset':1048576,'file':{'filename':'inside.img'}}}",
        "info -f raw json:{'offset':1024,'file':{'filename':'r.raw'}}",
    ]);
}

#[test]
fn parts_that_are_refused_as_by_qemu_img() {
    if !can_run(true) {
        return;
    }
    compare(&[
        "info --image-opts driver=raw,file.filename=r.raw,offset=5M",
        "info --image-opts driver=raw,file.filename=r.raw,offset=4M,size=512",
        "info --image-opts driver=raw,file.filename=r.raw,offset=3M,size=1025k",
        "info --image-opts driver=raw,file.filename=r.raw,offset=512k,size=1000",
        "info --image-opts driver=raw,file.filename=r.raw,offset=x",
        "info --image-opts driver=raw,file.filename=r.raw,size=",
        "info --image-opts driver=raw,file.filename=r.raw,offset=-1",
        "info --image-opts driver=raw,file.filename=r.raw,offset=8E",
        "info --image-opts driver=raw,file.filename=r.raw,offset=7E,size=7E",
        "info --image-opts driver=file,filename=r.raw,offset=1k",
        "info --image-opts driver=qcow2,file.filename=a.qcow2,offset=1k",
        "info --image-opts driver=qcow2,file.driver=raw,file.offset=9M,file.file.filename=r.raw",
        "info --image-opts driver=qcow2,file.driver=raw,file.offset=2k,file.filename=r.raw",
        "info --image-opts driver=qcow2,file.driver=raw,file.foo=2k,file.file.filename=r.raw",
        "info --image-opts driver=qcow2,file.driver=raw,file.file.foo=2k,file.file.filename=r.raw",
        "info --image-opts driver=qcow2,file.driver=raw,file.offset=1k,file.file.filename=nosuch",
        "info --image-opts driver=qcow2,file.driver=raw,file.file=x",
        "info --image-opts driver=qcow2,file.file.filename=a.qcow2",
    ]);
}

#[test]
fn parts_are_read_and_written_as_by_qemu_img() {
    if !can_run(true) {
        return;
    }
    compare(&[
        "check --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img",
        "check --output=json --image-opts file.driver=raw,file.offset=1M,file.file.filename=inside.img",
        "map --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img",
        "map --output=json --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img",
        "map --image-opts driver=raw,offset=1M,file.driver=raw,file.offset=512k,file.file.filename=inside.img",
        "map --output=json --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw",
        "map --image-opts file.driver=raw,file.offset=1M,file.file.filename=r.raw",
        "measure --output=json --image-opts -O qcow2 driver=raw,offset=1M,size=1M,file.filename=r.raw",
        "dd --image-opts if=driver=raw,offset=1M,size=1M,file.filename=r.raw of=o.raw bs=64k",
        "convert -O raw --image-opts driver=raw,offset=1M,size=512k,file.filename=r.raw o.raw",
        "convert -O raw --image-opts driver=raw,offset=1000,size=51200,file.filename=r.raw o.raw",
        "convert -O raw --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img o.raw",
        "compare --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw driver=raw,file.filename=o.raw",
        "compare --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img driver=raw,file.filename=o.raw",
        "resize --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw 512k",
        "resize --shrink --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw 512k",
        "resize --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw 2M",
        "resize --shrink --image-opts driver=raw,offset=1M,file.filename=r.raw 2560k",
        "resize --image-opts driver=raw,offset=1M,file.filename=r.raw 3M",
        "convert -n -f raw --target-image-opts o.raw driver=raw,offset=2M,size=1M,file.filename=r.raw",
        "convert -n -f raw --target-image-opts odd.raw driver=raw,offset=1000,size=1M,file.filename=r.raw",
        "convert -n -f raw --target-image-opts o.raw driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img",
        "check --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img",
        "convert -O raw --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=inside.img o.raw",
    ]);
}

/// Growing is an error where the part ends, and no byte around it changes.
#[test]
fn what_lies_around_a_part_stays() {
    if !can_run(true) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    files(dir);
    let before = fs::read(dir.join("inside.img")).unwrap();
    let end = before.len() - (300 << 10);
    let part =
        format!("driver=qcow2,file.driver=raw,file.offset=1M,file.size={},file.file.filename=inside.img", end - MIB);
    for args in [
        vec!["snapshot", "-c", "s", "--image-opts", &part],
        vec!["convert", "-n", "-f", "raw", "--target-image-opts", "r.raw", &part],
        vec!["bench", "-w", "-c", "100", "-s", "64k", "--image-opts", &part],
    ] {
        let output = instar(dir, &args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output.stderr));
        let after = fs::read(dir.join("inside.img")).unwrap();
        assert!(
            after.len() == before.len() && after[..MIB] == before[..MIB] && after[end..] == before[end..],
            "{args:?}"
        );
    }
}

/// Only the operator names parts: an image that does is refused.
#[test]
fn images_name_no_parts() {
    if !can_run(true) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    files(dir);
    let inner = "json:{\"driver\":\"raw\",\"offset\":1024,\"file\":{\"driver\":\"file\",\"filename\":\"r.raw\"}}";
    expect_success(&qemu_img(dir, &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", inner, "top.qcow2"]), "create");
    let output = instar(dir, &["convert", "-O", "raw", "top.qcow2", "o.raw"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("refused"), "{}", text(&output.stderr));
}
