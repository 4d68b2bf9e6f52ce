//! qcow2: header, extensions and names.

use super::names;
use crate::bytes::{Image, Order};
use crate::case::{Case, Content, Due, Group, field};
use crate::names::Surroundings;
use Due::{Anything, Confinement, Contents, Refusal, Unreadable};

/// Bytes of a cluster of the images made here.
pub const CLUSTER: u64 = 4096;
/// Clusters: header, refcount table, refcount block, L1 table, L2 table, data.
pub const REFCOUNTS: u64 = 2 * CLUSTER;
/// The L1 table.
pub const L1: u64 = 3 * CLUSTER;
/// The L2 table.
pub const L2: u64 = 4 * CLUSTER;
/// A cluster of data, the first of the disk.
pub const DATA: u64 = 5 * CLUSTER;
/// The first free cluster.
pub const FREE: u64 = 6 * CLUSTER;
/// The entry's cluster is used once.
pub const COPIED: u64 = 1 << 63;

/// A disk of 2 MiB of which the first cluster is allocated.
pub fn base() -> Image {
    let header = Image::new()
        .put(0, b"QFI\xfb")
        .be32(4, 3)
        .be32(20, 12)
        .be64(24, 2 << 20)
        .be32(36, 1)
        .be64(40, L1)
        .be64(48, CLUSTER)
        .be32(56, 1)
        .be32(96, 4)
        .be32(100, 112);
    let tables =
        header.be64(CLUSTER as usize, REFCOUNTS).be64(L1 as usize, COPIED | L2).be64(L2 as usize, COPIED | DATA);
    used(tables.put(DATA as usize, &[0x42; CLUSTER as usize]), FREE / CLUSTER)
}

/// With refcount 1 for the first `clusters`.
pub fn used(image: Image, clusters: u64) -> Image {
    (0..clusters as usize).fold(image, |image, n| image.int(Order::Big, REFCOUNTS as usize + 2 * n, 2, 1))
}

/// With header extensions.
pub fn extended(image: Image, extensions: &[(u32, &[u8])]) -> Image {
    let mut at = 112;
    let mut image = image;
    for (kind, bytes) in extensions {
        image = image.be32(at, *kind).be32(at + 4, bytes.len() as u32).put(at + 8, bytes);
        at += 8 + bytes.len().next_multiple_of(8);
    }
    image
}

/// With a backing file.
pub fn backed(name: &[u8], format: &[u8]) -> Image {
    let extensions: &[(u32, &[u8])] = if format.is_empty() { &[] } else { &[(0xe279_2aca, format)] };
    // Nothing is allocated: whoever reads, reads the backing file.
    extended(base(), extensions).be64(L2 as usize, 0).be64(8, 1024).be32(16, name.len() as u32).put(1024, name)
}

fn data_file(name: &[u8]) -> Image {
    extended(base(), &[(0x4441_5441, name)]).be64(72, 4).be64(L2 as usize, COPIED | DATA)
}

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>, around: &Surroundings) {
    let mut group = Group::new(cases, "qcow2", "image.qcow2");
    header(&mut group);
    extensions(&mut group);
    group.truncations(
        &base(),
        104,
        &[4, 8, 71, 72, 103, 104, 111, 112, 4095, 4096, 8192, 12288, 12296, 16384, 20479, 20480, 24000],
    );
    names(&mut group, around, "backing", "image.qcow2", 1023, Confinement, &|name| backed(name, b"raw"));
    names(&mut group, around, "data-file", "image.qcow2", 1023, Anything, &data_file);
    chains(&mut group);
    names(&mut group, around, "backing-unknown-format", "image.qcow2", 60, Confinement, &|name| backed(name, b""));
}

fn header(group: &mut Group<'_>) {
    const MAX32: u64 = u32::MAX as u64;
    const MAX64: u64 = u64::MAX;
    group.fields(
        &base(),
        Order::Big,
        |image| image,
        &[
            field("version", 4, 4, &[(0, Refusal), (1, Refusal), (4, Refusal), (MAX32, Refusal)]),
            field("backing_file_offset", 8, 8, &[(1, Anything), (4097, Refusal), (MAX64, Refusal), (1 << 63, Refusal)]),
            field(
                "cluster_bits",
                20,
                4,
                &[
                    (0, Refusal),
                    (8, Refusal),
                    (22, Refusal),
                    (31, Refusal),
                    (32, Refusal),
                    (63, Refusal),
                    (64, Refusal),
                    (MAX32, Refusal),
                ],
            ),
            field(
                "size",
                24,
                8,
                &[(0, Contents), (MAX64, Refusal), (1 << 63, Refusal), (1 << 62, Refusal), (3 << 20, Refusal)],
            ),
            field("crypt_method", 32, 4, &[(1, Anything), (2, Refusal), (3, Refusal), (MAX32, Refusal)]),
            field(
                "l1_size",
                36,
                4,
                &[
                    (0, Refusal),
                    (2, Contents),
                    (512, Anything),
                    (1 << 22, Anything),
                    ((1 << 22) + 1, Refusal),
                    (1 << 31, Refusal),
                    (MAX32, Refusal),
                ],
            ),
            field(
                "l1_table_offset",
                40,
                8,
                &[
                    (0, Anything),
                    (1, Refusal),
                    (L1 + 8, Refusal),
                    (1 << 40, Anything),
                    (1 << 56, Anything),
                    (1 << 63, Refusal),
                    (!4095, Refusal),
                    (MAX64, Refusal),
                ],
            ),
            field(
                "refcount_table_offset",
                48,
                8,
                &[
                    (0, Anything),
                    (1, Refusal),
                    (L1, Anything),
                    (1 << 40, Anything),
                    (1 << 63, Refusal),
                    (!4095, Refusal),
                    (MAX64, Refusal),
                ],
            ),
            field(
                "refcount_table_clusters",
                56,
                4,
                &[(0, Anything), (2048, Anything), (2049, Refusal), (1 << 31, Refusal), (MAX32, Refusal)],
            ),
            field("nb_snapshots", 60, 4, &[(1, Anything), (65_536, Anything), (65_537, Refusal), (MAX32, Refusal)]),
            field("snapshots_offset", 64, 8, &[(1, Anything), (MAX64, Anything)]),
            field(
                "incompatible_features",
                72,
                8,
                &[
                    (1, Anything),
                    (2, Contents),
                    (4, Anything),
                    (8, Anything),
                    (16, Anything),
                    (32, Refusal),
                    (1 << 63, Refusal),
                    (MAX64, Refusal),
                ],
            ),
            field("compatible_features", 80, 8, &[(1, Contents), (MAX64, Contents)]),
            field("autoclear_features", 88, 8, &[(1, Anything), (2, Anything), (MAX64, Anything)]),
            field(
                "refcount_order",
                96,
                4,
                &[(7, Refusal), (31, Refusal), (32, Refusal), (64, Refusal), (MAX32, Refusal)],
            ),
            field(
                "header_length",
                100,
                4,
                &[(0, Refusal), (96, Refusal), (103, Refusal), (4097, Refusal), (MAX32, Refusal), (MAX32 - 7, Refusal)],
            ),
            field("compression_type", 104, 1, &[(1, Refusal), (2, Refusal), (255, Refusal)]),
        ],
    );
    for size in [1, 1000] {
        let case = group.add(format!("both/size-{size}"), base().be64(24, size), Contents);
        case.may_differ("qemu-img rounds the size down to sectors");
    }
    group.add("both/backing-len", base().be64(8, 512).be32(16, 1024), Refusal);
    group.add("both/backing-len-max", base().be64(8, 512).be32(16, u32::MAX), Refusal);
    group.add("both/backing-past-cluster", base().be64(8, 4090).be32(16, 100), Refusal);
    group.add("both/backing-inside-header", base().be64(8, 20).be32(16, 8), Anything).without_qemu();
    group.add("both/huge-empty", base().be64(24, 1 << 53).be32(20, 21).be32(36, 1 << 14), Anything).without_qemu();
    let exbi =
        Image::new().put(0, b"QFI\xfb").be32(4, 3).be32(20, 21).be64(24, 1 << 60).be32(36, 1 << 21).be64(40, 3 << 21);
    let exbi = exbi
        .be64(48, 1 << 21)
        .be32(56, 1)
        .be32(96, 4)
        .be32(100, 104)
        .be64(1 << 21, 2 << 21)
        .with_len((3 << 21) + (16 << 20));
    group.add("both/one-exbibyte", exbi, Due::Description).without_qemu();
    group.add("both/l1-size-too-small", base().be64(24, 1 << 40), Refusal);
    group.add("both/version-2-feature-bytes", base().be32(4, 2).be64(72, u64::MAX), Anything);
    group.add("both/snapshot-table-at-header", base().be32(60, 3).be64(64, 0), Anything);
    group.add("both/snapshot-offset-wraps", base().be32(60, 2).be64(64, !7), Refusal);
    group.add("both/l1-at-refcounts", base().be64(40, REFCOUNTS), Anything);
    group.add("both/all-ones", Image::new().put(0, b"QFI\xfb\0\0\0\x03").put(8, &[0xff; 504]), Refusal);
    group.add("both/zeroes", Image::new().put(0, b"QFI\xfb\0\0\0\x03").with_len(4096), Refusal);
}

fn extensions(group: &mut Group<'_>) {
    let crypt = |offset: u64, len: u64| [offset.to_be_bytes(), len.to_be_bytes()].concat();
    group.add("extension/length-max", base().be32(112, 0x1234_5678).be32(116, u32::MAX), Refusal);
    group.add("extension/past-cluster", base().be32(112, 0x1234_5678).be32(116, 4000), Refusal);
    group.add("extension/negative", base().be32(112, 0x1234_5678).be32(116, 0xffff_fff8), Refusal);
    group.add("extension/format-too-long", extended(base(), &[(0xe279_2aca, &[b'a'; 20])]), Refusal);
    group.add("extension/names-odd", extended(base(), &[(0x6803_f857, &[0xff; 47])]), Anything);
    group.add(
        "extension/names-escape",
        extended(base(), &[(0x6803_f857, b"\0\x05\x1b[31mred\x1b[0m")]).be64(72, 32),
        Refusal,
    );
    group.add("extension/crypto-without-method", extended(base(), &[(0x0537_be77, &crypt(4096, 4096))]), Anything);
    for (name, offset, len) in [
        ("zero", 0, 0),
        ("unaligned", 4097, 512),
        ("far", 1 << 62, 4096),
        ("wraps", u64::MAX - 4095, 8192),
        ("long", 8192, u64::MAX),
    ] {
        let image = extended(base(), &[(0x0537_be77, &crypt(offset, len))]).be32(32, 2);
        group.add(format!("extension/crypto-{name}"), image, Unreadable);
    }
    group.add("extension/crypto-short", extended(base(), &[(0x0537_be77, &[0; 8])]).be32(32, 2), Refusal);
    // A quarter of a million empty extensions in one cluster of 2 MiB.
    let mut many =
        Image::new().put(0, b"QFI\xfb").be32(4, 3).be32(20, 21).be64(24, 1 << 20).be32(36, 1).be64(40, 3 << 21);
    many = many.be64(48, 1 << 21).be32(56, 1).be32(96, 4).be32(100, 104).be64(1 << 21, 2 << 21).with_len(4 << 21);
    let empty: Vec<u8> = (0..250_000u32).flat_map(|_| [0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0]).collect();
    group.add("extension/quarter-million", many.put(104, &empty).with_len(4 << 21), Anything).without_qemu();
    group
        .add("extension/data-file-empty", extended(base(), &[(0x4441_5441, b"")]).be64(72, 4), Anything)
        .without_qemu();
    group.add("extension/data-file-missing", base().be64(72, 4), Unreadable);
}

fn chains(group: &mut Group<'_>) {
    let qcow2 = |name: &[u8]| backed(name, b"qcow2");
    let case = group.add("chain/two-in-a-circle", qcow2(b"b"), Confinement);
    case.beside("b", Content::Bytes(qcow2(b"image.qcow2"))).without_qemu();
    let case = group.add("chain/circle-by-hard-link", qcow2(b"b"), Confinement);
    case.beside("b", Content::Hard("image.qcow2".to_owned())).without_qemu();
    let case = group.add("chain/circle-by-link", qcow2(b"b"), Confinement);
    case.beside("b", Content::Link("image.qcow2".to_owned())).without_qemu();
    let case = group.add("chain/300-images", qcow2(b"0"), Confinement);
    for n in 0..300 {
        case.beside(n.to_string(), Content::Bytes(qcow2((n + 1).to_string().as_bytes()).with_len(DATA)));
    }
    case.beside("300", Content::Bytes(base())).without_qemu();
    let case = group.add("chain/guessed-with-a-reference", backed(b"b", b""), Confinement);
    case.beside("b", Content::Bytes(backed(b"c", b"raw"))).beside("c", Content::Bytes(base())).without_qemu();
    let case = group.add("chain/second-hop-outside", qcow2(b"b"), Confinement);
    case.beside("b", Content::Bytes(backed(b"../outside/canary", b"raw"))).without_qemu();
    let case = group.add("chain/hop-recorded-raw", backed(b"b", b"raw"), Contents);
    case.beside("b", Content::Bytes(backed(b"../outside/canary", b"raw"))).without_qemu();
    let case = group.add("chain/unknown-recorded-format", backed(b"b", b"nonesuch"), Unreadable);
    case.beside("b", Content::Bytes(base()));
    let case = group.add("chain/base-damaged", qcow2(b"b"), Unreadable);
    case.beside("b", Content::Bytes(base().be32(20, 63)));
    let case = group.add("chain/data-file-is-the-image", data_file(b"image.qcow2"), Unreadable);
    case.without_qemu();
}
