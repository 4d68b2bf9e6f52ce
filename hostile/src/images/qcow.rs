//! qcow, the first version.

use miniz_oxide::deflate::compress_to_vec;

use super::names;
use crate::bytes::{Image, Order};
use crate::case::{Case, Due, Group, field};
use crate::names::Surroundings;
use Due::{Anything, Confinement, Contents, Refusal, Unreadable};

const L1: usize = 2048;
const L2: usize = 4096;
const DATA: u64 = 8192;

/// A disk of 1 MiB with its first cluster of 4 KiB.
fn base() -> Image {
    let header = Image::new().put(0, b"QFI\xfb").be32(4, 1).be64(24, 1 << 20).put(32, &[12, 9]).be64(40, L1 as u64);
    header.be64(L1, L2 as u64).be64(L2, DATA).put(DATA as usize, &[0x42; 4096])
}

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>, around: &Surroundings) {
    let mut group = Group::new(cases, "qcow", "image.qcow");
    const MAX64: u64 = u64::MAX;
    group.fields(
        &base(),
        Order::Big,
        |image| image,
        &[
            field("version", 4, 4, &[(0, Refusal), (9, Refusal)]),
            field(
                "size",
                24,
                8,
                &[(0, Refusal), (1, Refusal), (MAX64, Refusal), (1 << 63, Refusal), (1 << 62, Refusal)],
            ),
            field("cluster_bits", 32, 1, &[(0, Refusal), (8, Refusal), (17, Refusal), (63, Refusal), (255, Refusal)]),
            field("l2_bits", 33, 1, &[(0, Refusal), (5, Refusal), (14, Refusal), (64, Refusal), (255, Refusal)]),
            field("crypt_method", 36, 4, &[(1, Anything), (2, Refusal), (u32::MAX as u64, Refusal)]),
            field(
                "l1_table_offset",
                40,
                8,
                &[(0, Anything), (1, Anything), (1 << 40, Anything), (1 << 62, Anything), (1 << 61, Anything)],
            ),
            field("backing_file_size", 16, 4, &[(1, Anything), (u32::MAX as u64, Anything)]),
        ],
    );
    group.add("both/backing-too-long", base().be64(8, 512).be32(16, 1024), Refusal);
    group.add("both/backing-far", base().be64(8, 1 << 62).be32(16, 10), Anything);
    group
        .add("both/backing-wraps", base().be64(8, u64::MAX).be32(16, 10), Anything)
        .may_differ("behind the end of every file there are zeroes");
    for (name, entry, due) in [
        ("far", 1 << 62, Anything),
        ("itself", L2 as u64, Contents),
        ("all-ones", u64::MAX, Anything),
        ("odd", DATA + 1, Anything),
    ] {
        group.add(format!("l2/{name}"), base().be64(L2, entry), due);
    }
    for (name, entry) in [("far", 1 << 62), ("itself", L1 as u64), ("all-ones", u64::MAX), ("header", 1)] {
        group.add(format!("l1/{name}"), base().be64(L1, entry), Anything);
    }
    let compressed =
        |len: u64, stream: &[u8]| base().be64(L2, 1 << 63 | len << (63 - 12) | DATA).put(DATA as usize, stream);
    group.add("compressed/noise", compressed(600, &[0xff; 600]), Unreadable);
    group.add("compressed/bomb", compressed(4095, &compress_to_vec(&vec![0; 2 << 20], 9)), Anything);
    group.add("compressed/empty", compressed(0, &[]), Anything);
    group.truncations(&base(), 8, &[4, 7, 8, 40, 47, 48, 2048, 4096, 8192, 10_000]);
    names(&mut group, around, "backing", "image.qcow", 1023, Confinement, &|name| {
        base().be64(L2, 0).be64(8, 512).be32(16, name.len() as u32).put(512, name)
    });
}
