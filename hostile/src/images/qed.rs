//! QED.

use super::names;
use crate::bytes::{Image, Order};
use crate::case::{Case, Due, Group, field};
use crate::names::Surroundings;
use Due::{Anything, Confinement, Contents, Refusal, Unreadable};

const L1: usize = 4096;
const L2: usize = 12_288;
const DATA: usize = 20_480;

/// A disk of 1 MiB with its first cluster of 4 KiB.
fn base() -> Image {
    let header =
        Image::new().put(0, b"QED\0").le32(4, 4096).le32(8, 2).le32(12, 1).le64(40, L1 as u64).le64(48, 1 << 20);
    header.le64(L1, L2 as u64).le64(L2, DATA as u64).put(DATA, &[0x42; 4096])
}

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>, around: &Surroundings) {
    let mut group = Group::new(cases, "qed", "image.qed");
    const MAX32: u64 = u32::MAX as u64;
    const MAX64: u64 = u64::MAX;
    group.fields(
        &base(),
        Order::Little,
        |image| image,
        &[
            field(
                "cluster_size",
                4,
                4,
                &[
                    (0, Refusal),
                    (1, Refusal),
                    (2048, Refusal),
                    (5000, Refusal),
                    (1 << 27, Refusal),
                    (1 << 31, Refusal),
                    (MAX32, Refusal),
                ],
            ),
            field(
                "table_size",
                8,
                4,
                &[(0, Refusal), (3, Refusal), (16, Anything), (32, Refusal), (1 << 31, Refusal), (MAX32, Refusal)],
            ),
            field("header_size", 12, 4, &[(0, Anything), (2, Anything), (MAX32, Anything)]),
            field(
                "features",
                16,
                8,
                &[(2, Anything), (4, Anything), (8, Refusal), (1 << 63, Refusal), (MAX64, Refusal)],
            ),
            field("compat_features", 24, 8, &[(MAX64, Contents)]),
            field("autoclear_features", 32, 8, &[(MAX64, Contents)]),
            field(
                "l1_table_offset",
                40,
                8,
                &[
                    (0, Refusal),
                    (1, Refusal),
                    (L1 as u64 + 8, Refusal),
                    (1 << 40, Anything),
                    (1 << 63, Refusal),
                    (!4095, Anything),
                    (MAX64, Refusal),
                ],
            ),
            field(
                "image_size",
                48,
                8,
                &[(0, Anything), (1, Refusal), (1 << 40, Refusal), (1 << 63, Refusal), (MAX64, Refusal)],
            ),
        ],
    );
    let backed = |offset: u32, len: u32| base().le64(16, 1).le32(56, offset).le32(60, len);
    for (name, offset, len, due) in [
        ("far", u32::MAX, 10, Refusal),
        ("long", 1000, 5000, Refusal),
        ("long-max", 64, u32::MAX, Refusal),
        ("wraps", u32::MAX - 4, 10, Refusal),
        ("in-the-header", 0, 4, Anything),
    ] {
        group.add(format!("both/backing-{name}"), backed(offset, len), due).without_qemu();
    }
    for (name, entry, due) in [
        ("unaligned", L2 as u64 + 1, Anything),
        ("far", 1 << 62, Anything),
        ("itself", L1 as u64, Anything),
        ("header", 4095, Anything),
        ("all-ones", u64::MAX, Anything),
        ("one", 1, Anything),
    ] {
        group.add(format!("l1/{name}"), base().le64(L1, entry), due);
    }
    for (name, entry, due) in [
        ("unaligned", DATA as u64 + 512, Unreadable),
        ("far", 1 << 62, Unreadable),
        ("itself", L2 as u64, Contents),
        ("all-ones", u64::MAX, Unreadable),
        ("one", 1, Contents),
    ] {
        group.add(format!("l2/{name}"), base().le64(L2, entry), due);
    }
    group.add("l2/dirty-and-damaged", base().le64(16, 2).le64(L2, 1 << 62), Anything);
    group.truncations(&base(), 64, &[4, 48, 63, 64, 4096, 8192, 12_288, 20_480, 21_000]);
    names(&mut group, around, "backing", "image.qed", 1023, Confinement, &|name| {
        base().le64(L2, 0).le64(16, 5).le32(56, 512).le32(60, name.len() as u32).put(512, name)
    });
}
