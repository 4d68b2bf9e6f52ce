//! Parallels, Bochs and compressed loops.

use miniz_oxide::deflate::compress_to_vec_zlib;

use crate::bytes::{Image, Order};
use crate::case::{Case, Due, Group, field};
use Due::{Anything, Contents, Liberty, Refusal, Unreadable};

const MAX32: u64 = u32::MAX as u64;
const MAX64: u64 = u64::MAX;

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>) {
    parallels(&mut Group::new(cases, "parallels", "image.hds"));
    bochs(&mut Group::new(cases, "bochs", "image.bochs"));
    cloop(&mut Group::new(cases, "cloop", "image.cloop"));
}

fn parallels(group: &mut Group<'_>) {
    // A disk of 1 MiB in clusters of 64 KiB, the first of which is there.
    let base = Image::new().put(0, b"WithouFreSpacExt").le32(16, 2).le32(20, 16).le32(24, 2).le32(28, 128).le32(32, 16);
    let base = base.le64(36, 2048).le32(48, 128).le32(64, 1).put(65_536, &[0x42; 65_536]);
    group.fields(
        &base,
        Order::Little,
        |image| image,
        &[
            field("version", 16, 4, &[(0, Refusal), (3, Refusal), (MAX32, Refusal)]),
            field("heads", 20, 4, &[(0, Anything), (MAX32, Anything)]),
            field("cylinders", 24, 4, &[(0, Anything), (MAX32, Anything)]),
            field(
                "tracks",
                28,
                4,
                &[(0, Refusal), (1, Anything), (3, Anything), (1 << 22, Refusal), (1 << 31, Refusal), (MAX32, Refusal)],
            ),
            field(
                "bat_entries",
                32,
                4,
                &[(0, Anything), (1, Anything), (1 << 28, Anything), (1 << 30, Refusal), (MAX32, Refusal)],
            ),
            field(
                "nb_sectors",
                36,
                8,
                &[(0, Anything), (1, Anything), (1 << 55, Anything), (1 << 63, Anything), (MAX64, Anything)],
            ),
            field("in_use", 44, 4, &[(0x746F_6E59, Anything), (0x312e_3276, Anything), (MAX32, Anything)]),
            field(
                "data_off",
                48,
                4,
                &[(0, Anything), (1, Anything), (129, Anything), (1 << 31, Anything), (MAX32, Anything)],
            ),
            field("flags", 52, 4, &[(1, Anything), (MAX32, Anything)]),
            field("ext_off", 56, 8, &[(1, Liberty), (128, Liberty), (1 << 55, Liberty), (MAX64, Liberty)]),
        ],
    );
    for (name, entry) in [("far", u32::MAX), ("header", 0xffff_0000), ("past-the-end", 2), ("half", 1 << 31)] {
        group.add(format!("bat/{name}"), base.clone().le32(64, entry), Anything);
    }
    group.add("bat/two-share-a-cluster", base.clone().le32(68, 1), Anything);
    let old = base.clone().put(0, b"WithoutFreeSpace").le32(64, 1);
    group.add("old/odd-place", old.clone(), Anything);
    group.add("old/negative-size", old.le64(36, 0xffff_ffff_0000_0800), Anything);
    let extension = base.clone().le64(56, 256).put(131_072, &0xab23_4cef_23df_ea87_u64.to_le_bytes()).with_len(196_608);
    group.add("extension/sum", extension.clone(), Liberty);
    group.add("extension/past-the-end", base.clone().le64(56, 1 << 40), Liberty);
    group.truncations(&base, 48, &[16, 48, 63, 64, 68, 128, 65_536, 70_000]);
}

fn bochs(group: &mut Group<'_>) {
    // Two extents of 4 KiB, the second of which is there.
    let base =
        Image::new().put(0, b"Bochs Virtual HD Image").put(32, b"Redolog").put(48, b"Growing").le32(64, 0x2_0000);
    let base =
        base.le32(68, 512).le32(72, 2).le32(76, 1).le32(80, 4096).le64(88, 8192).le32(512, u32::MAX).le32(516, 0);
    let base = base.put(520, &[0xff; 1]).put(520 + 512, &[0x42; 4096]).with_len(8192);
    group.fields(
        &base,
        Order::Little,
        |image| image,
        &[
            field("version", 64, 4, &[(0, Refusal), (0x1_0000, Anything), (MAX32, Refusal)]),
            field("header", 68, 4, &[(0, Anything), (1, Anything), (1 << 31, Anything)]),
            field(
                "catalog",
                72,
                4,
                &[
                    (0, Refusal),
                    (1, Refusal),
                    (1 << 20, Anything),
                    (1 << 30, Refusal),
                    (1 << 31, Refusal),
                    (MAX32, Refusal),
                ],
            ),
            field("bitmap", 76, 4, &[(0, Anything), (1 << 31, Anything), (MAX32, Anything)]),
            field(
                "extent",
                80,
                4,
                &[
                    (0, Refusal),
                    (1, Refusal),
                    (511, Refusal),
                    (768, Refusal),
                    (1 << 24, Anything),
                    (1 << 31, Refusal),
                    (MAX32, Refusal),
                ],
            ),
            field(
                "disk",
                88,
                8,
                &[(0, Anything), (1, Anything), (1 << 40, Refusal), (1 << 63, Refusal), (MAX64, Refusal)],
            ),
        ],
    );
    let wraps = base.clone().le32(68, u32::MAX);
    group.add("field/header=0xffffffff", wraps, Anything).may_differ("qemu-img computes modulo 2^32");
    group.add("catalog/far", base.clone().le32(516, 0xffff_fffe), Anything);
    group.add("catalog/shared", base.clone().le32(512, 0), Anything);
    group.add("type/other", base.clone().put(32, b"Growing\0"), Refusal);
    group.truncations(&base, 84, &[32, 64, 84, 95, 512, 515, 520, 1000]);
}

fn cloop(group: &mut Group<'_>) {
    let script = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
    let stream = compress_to_vec_zlib(&[0x42; 65_536], 9);
    let end = 152 + stream.len() as u64;
    let base =
        Image::new().put(0, script).be32(128, 65_536).be32(132, 1).be64(136, 152).be64(144, end).put(152, &stream);
    group.fields(
        &base,
        Order::Big,
        |image| image,
        &[
            field(
                "block_size",
                128,
                4,
                &[
                    (0, Refusal),
                    (1, Refusal),
                    (513, Refusal),
                    (1 << 16, Contents),
                    (1 << 27, Refusal),
                    (1 << 31, Refusal),
                    (MAX32, Refusal),
                ],
            ),
            field(
                "n_blocks",
                132,
                4,
                &[(0, Anything), (2, Anything), (1 << 25, Anything), (1 << 29, Refusal), (MAX32, Refusal)],
            ),
            field("offset_0", 136, 8, &[(0, Anything), (1 << 40, Refusal), (1 << 63, Refusal), (MAX64, Refusal)]),
            field(
                "offset_1",
                144,
                8,
                &[(0, Anything), (151, Refusal), (1 << 40, Refusal), (1 << 63, Refusal), (MAX64, Refusal)],
            ),
        ],
    );
    group.add("stream/noise", base.clone().put(152, &[0xff; 16]), Unreadable);
    let bomb = compress_to_vec_zlib(&vec![0; 16 << 20], 9);
    group.add("stream/bomb", base.clone().put(152, &bomb).be64(144, 152 + bomb.len() as u64), Anything);
    let short = compress_to_vec_zlib(&[0x42; 512], 9);
    group.add("stream/short", base.clone().put(152, &short).be64(144, 152 + short.len() as u64), Unreadable);
    group.truncations(&base, 132, &[128, 132, 136, 144, 151, 152, 160]);
}
