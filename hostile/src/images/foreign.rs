//! Raw disks, files of several formats at once, and files that are none.

use super::{qcow2, surround, vhdx};
use crate::bytes::Image;
use crate::case::{Case, Content, Due, Group};
use crate::names::Surroundings;
use Due::{Anything, Contents, Refusal};

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>, around: &Surroundings) {
    let mut group = Group::new(cases, "raw", "image.raw");
    let out = around.outside.display();
    // A raw disk whose guest wrote the header of another format: named raw, it is bytes.
    let backed = qcow2::backed(b"../outside/canary", b"raw");
    let case = group.add("declared/qcow2-with-backing", backed.clone(), Contents);
    surround(case);
    let descriptor = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"{out}/canary\" 0\n"
    );
    let case =
        group.add("declared/vmdk-descriptor", Image::new().put(0, descriptor.as_bytes()).with_len(65_536), Contents);
    surround(case);
    group.add("declared/8-exbibytes-of-hole", Image::new().with_len(1 << 40), Anything).without_qemu();
    group.add("declared/empty", Image::new(), Contents);
    group.add("declared/one-byte", Image::new().put(0, b"x"), Contents);
    group.add(
        "declared/gpt-damaged",
        Image::new().put(510, b"\x55\xaa").put(512, b"EFI PART").put(520, &[0xff; 400]),
        Contents,
    );
    // Guessed.
    let case = group.add("guessed/qcow2-with-backing", backed, Due::Confinement).guessed();
    surround(case);
    let case = group.add("guessed/vmdk-descriptor", Image::new().put(0, descriptor.as_bytes()), Refusal).guessed();
    surround(case);
    let iso = |image: Image| image.put(32_769, b"CD001").put(32_768, &[1]);
    let mbr =
        |image: Image| image.put(510, b"\x55\xaa").put(446, &[0x80, 0, 2, 0, 0x83, 0, 3, 0, 1, 0, 0, 0, 16, 0, 0, 0]);
    for (name, image) in [
        ("qcow2-and-iso", iso(qcow2::base())),
        ("qcow2-and-mbr", mbr(qcow2::base())),
        ("qcow2-and-vhd", qcow2::base().put(65_536, b"conectix").with_len(66_048)),
        ("qcow2-and-dmg", qcow2::base().put(65_536, b"koly").with_len(66_048)),
        ("qcow2-and-vdi", qcow2::base().put(64, &0xbeda_107f_u32.to_le_bytes())),
        ("vhdx-and-iso", iso(vhdx::base())),
        ("luks-and-iso", iso(Image::new().put(0, b"LUKS\xba\xbe\0\x01").with_len(1 << 20))),
        ("vmdk-and-mbr", mbr(Image::new().put(0, b"KDMV\x01\0\0\0").with_len(4096))),
        ("vhd-and-gpt", mbr(Image::new().put(0, b"conectix").put(512, b"EFI PART").with_len(65_536))),
        ("dmg-by-trailer-only", Image::new().put(65_024, b"koly").with_len(65_536)),
        ("vhd-by-trailer-only", Image::new().put(65_024, b"conectix").with_len(65_536)),
        (
            "all-magics",
            Image::new()
                .put(0, b"QFI\xfb")
                .put(4, b"KDMV")
                .put(64, &0xbeda_107f_u32.to_le_bytes())
                .put(65_024, b"conectix")
                .with_len(65_536),
        ),
        ("qed-cut-off", Image::new().put(0, b"QED\0")),
        ("vmdk-cut-off", Image::new().put(0, b"KDMV")),
        ("qcow2-cut-off", Image::new().put(0, b"QFI\xfb\0\0\0\x03")),
        ("vhdx-cut-off", Image::new().put(0, b"vhdxfile")),
        ("luks-cut-off", Image::new().put(0, b"LUKS\xba\xbe\0\x01")),
        ("parallels-cut-off", Image::new().put(0, b"WithoutFreeSpace")),
        ("bochs-cut-off", Image::new().put(0, b"Bochs Virtual HD Image")),
        ("descriptor-cut-off", Image::new().put(0, b"# Disk DescriptorFile")),
        ("script", Image::new().put(0, b"#!/bin/sh\nrm -rf /\n")),
    ] {
        group.add(format!("guessed/{name}"), image, Anything).guessed().without_qemu();
    }
    special(&mut group);
}

/// What is no image file at all.
fn special(group: &mut Group<'_>) {
    for (name, content) in [
        ("fifo", Content::Fifo),
        ("directory", Content::Directory),
        ("link-to-itself", Content::Link("image.raw".to_owned())),
        ("link-to-nowhere", Content::Link("nowhere".to_owned())),
        ("link-to-a-device", Content::Link("/dev/zero".to_owned())),
        ("link-to-a-terminal", Content::Link("/dev/tty".to_owned())),
    ] {
        let case = group.add(format!("file/{name}"), Image::new(), Refusal).without_qemu();
        case.files = vec![("image.raw".to_owned(), content)];
    }
}
