//! Images whose tables are there and whose data are not (`preallocation=metadata`, or a file that was copied sparsely): what lies in
//! holes of the file is zero to `map`, `measure`, `compare -s` and `convert`, beside qemu-img.

mod support;

use std::fs;
use std::path::Path;

use support::{can_run, expect_success, instar, qemu_img, qemu_io, said};

/// A preallocated image with some data, an overlay on it, one with an external data file, and one whose clusters all hold data.
fn images(dir: &Path) {
    let make = |args: &str| {
        let args = format!("create -q -f qcow2 {args}");
        expect_success(&qemu_img(dir, &args.split(' ').collect::<Vec<_>>()), &args);
    };
    let write = |image: &str, commands: &[&str]| {
        qemu_io(dir, image, &commands.iter().map(|command| (*command).to_owned()).collect::<Vec<_>>());
    };
    let some = ["write -P 1 1M 4k", "write -P 2 1032k 12k", "write -P 3 2M 70k"];
    make("-o preallocation=metadata base.qcow2 4M");
    write("base.qcow2", &some);
    make("-o preallocation=metadata,cluster_size=4k fine.qcow2 4M");
    write("fine.qcow2", &some);
    make("-b base.qcow2 -F qcow2 over.qcow2 4M");
    write("over.qcow2", &["write -P 9 3M 4k", "write -z 0 100k"]);
    make("-o preallocation=metadata,data_file=data.raw data.qcow2 4M");
    write("data.qcow2", &some);
    make("full.qcow2 4M");
    write("full.qcow2", &["write -P 1 1M 4k", "write -P 2 1032k 12k", "write -P 3 2M 70k"]);
    make("empty.qcow2 4M");
}

#[test]
fn data_in_holes_are_zeroes() {
    if !can_run(true) {
        return;
    }
    // Where a disk's file system shows holes depends on what has been written back by then.
    let memory = Path::new("/dev/shm");
    let temp = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let dir = temp.path();
    images(dir);
    let same = |line: &str| {
        let args: Vec<&str> = line.split(' ').collect();
        assert_eq!(said(&instar(dir, &args)), said(&qemu_img(dir, &args)), "{line}");
    };
    for image in ["base.qcow2", "fine.qcow2", "over.qcow2", "data.qcow2", "full.qcow2"] {
        for command in ["map", "map --output=json", "measure -O raw", "measure -O qcow2 -o cluster_size=4k"] {
            same(&format!("{command} {image}"));
        }
        for other in ["empty.qcow2", "full.qcow2", "over.qcow2"] {
            same(&format!("compare -s {image} {other}"));
            same(&format!("compare -s {other} {image}"));
            same(&format!("compare {image} {other}"));
        }
        for options in ["", " -S 0", " -S 64k", " -S 256k", " -c"] {
            for target in ["raw", "qcow2", "qcow2 -o cluster_size=4k"] {
                if options == " -c" && target == "raw" {
                    continue;
                }
                let line = format!("convert{options} -O {target} {image}");
                let made = |program: fn(&Path, &[&str]) -> std::process::Output, to: &str| {
                    let args = format!("{line} {to}");
                    expect_success(&program(dir, &args.split(' ').collect::<Vec<_>>()), &args);
                    fs::read(dir.join(to)).unwrap()
                };
                let (ours, theirs) = (made(instar, "ours"), made(qemu_img, "theirs"));
                if options == " -c" {
                    expect_success(&qemu_img(dir, &["compare", "-s", "ours", "theirs"]), &line);
                } else {
                    assert_eq!(ours.len(), theirs.len(), "{line}");
                    assert!(ours == theirs, "{line}: bytes");
                }
            }
        }
    }
}
