//! qcow2: tables, refcounts, snapshots, bitmaps and compressed clusters.

use miniz_oxide::deflate::compress_to_vec;

use super::qcow2::{CLUSTER, COPIED, DATA, FREE, L1, L2, REFCOUNTS, base, extended, used};
use crate::bytes::{Image, Order};
use crate::case::{Case, Due, Group};
use Due::{Anything, Contents, Refusal, Unreadable};

/// The L2 entry says where and how long a compressed cluster is: 62 - (cluster_bits - 8) bits of place.
const COMPRESSED: u64 = 1 << 62;
const SECTORS_SHIFT: u32 = 62 - 4;

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>) {
    let mut group = Group::new(cases, "qcow2", "image.qcow2");
    entries(&mut group);
    refcounts(&mut group);
    snapshots(&mut group);
    bitmaps(&mut group);
    compressed(&mut group);
}

fn entries(group: &mut Group<'_>) {
    let l1 = |entry: u64| base().be64(L1 as usize, entry);
    let l2 = |entry: u64| base().be64(L2 as usize, entry);
    let far = 0x00ff_ffff_ffff_f000;
    for (name, entry, due) in [
        ("unaligned", COPIED | L2 | 512, Unreadable),
        ("far", COPIED | far, Anything),
        ("reserved-bits", COPIED | L2 | 0x7f00_0000_0000_0000, Anything),
        ("header", COPIED, Anything),
        ("itself", COPIED | L1, Anything),
        ("data", COPIED | DATA, Anything),
        ("all-ones", u64::MAX, Unreadable),
    ] {
        group.add(format!("l1/{name}"), l1(entry), due);
    }
    for (name, entry, due) in [
        ("unaligned", COPIED | DATA | 512, Unreadable),
        ("far", COPIED | far, Anything),
        ("reserved-bits", COPIED | DATA | 0x3f00_0000_0000_0ffe, Unreadable),
        ("header", COPIED | 1, Anything),
        ("itself", COPIED | L2, Contents),
        ("l1", COPIED | L1, Contents),
        ("refcounts", COPIED | REFCOUNTS, Contents),
        ("all-ones", u64::MAX, Unreadable),
        ("past-the-end", COPIED | FREE, Anything),
        ("zero-with-place", COPIED | DATA | 1, Contents),
    ] {
        group.add(format!("l2/{name}"), l2(entry), due);
    }
    let shared = (0..512).fold(base(), |image, n| image.be64(L2 as usize + 8 * n, DATA));
    group.add("l2/all-share-a-cluster", shared.clone(), Contents);
    let tables = (0..32).fold(shared.be64(24, 64 << 20).be32(36, 32), |image, n| image.be64(L1 as usize + 8 * n, L2));
    group.add("l1/all-share-a-table", tables, Contents);
    let circle = (0..512).fold(base(), |image, n| image.be64(L2 as usize + 8 * n, L2));
    group.add("l2/all-are-the-table", circle, Contents);
    // Extended entries: cluster_bits 14 at least, 16 bytes each.
    let wide = base().be64(72, 16);
    group.add("l2/extended-small-clusters", wide, Refusal);
    let at = |cluster: u64| (cluster << 14) as usize;
    let wide = Image::new().put(0, b"QFI\xfb").be32(4, 3).be32(20, 14).be64(24, 1 << 20).be32(36, 1).be64(40, 3 << 14);
    let wide = wide.be64(48, 1 << 14).be32(56, 1).be64(72, 16).be32(96, 4).be32(100, 112).be64(at(1), 2 << 14);
    let wide = wide.be64(at(3), COPIED | 4 << 14).be64(at(4), COPIED | 5 << 14).put(at(5), &[0x42; 1 << 14]);
    let wide = (0..6).fold(wide, |image, n| image.int(Order::Big, at(2) + 2 * n, 2, 1));
    group.add("l2/extended-both-bits", wide.clone().be64(at(4) + 8, u64::MAX), Unreadable);
    group.add("l2/extended-allocated-without-place", wide.clone().be64(at(4), 0).be64(at(4) + 8, 1), Unreadable);
    group.add("l2/extended-compressed-with-bits", wide.be64(at(4), COMPRESSED | 5 << 14).be64(at(4) + 8, 1), Anything);
}

fn refcounts(group: &mut Group<'_>) {
    let table = |entry: u64| base().be64(CLUSTER as usize, entry);
    for (name, entry) in [
        ("none", 0),
        ("unaligned", REFCOUNTS | 512),
        ("far", 0x00ff_ffff_ffff_f000),
        ("itself", CLUSTER),
        ("header", 1),
        ("data", DATA),
        ("all-ones", u64::MAX),
    ] {
        group.add(format!("refcounts/table-{name}"), table(entry), Anything);
    }
    group.add("refcounts/all-zero", base().put(REFCOUNTS as usize, &[0; 12]), Anything);
    group.add("refcounts/all-max", base().put(REFCOUNTS as usize, &[0xff; 4096]), Anything);
    group.add("refcounts/two-blocks-in-one", base().be64(CLUSTER as usize + 8, REFCOUNTS), Anything);
    for order in 0..=6 {
        group.add(format!("refcounts/order-{order}"), base().be32(96, order), Anything);
    }
    // 1-bit refcounts where two entries share a cluster.
    let bits = base().be32(96, 0).put(REFCOUNTS as usize, &[0x3f]).be64(L2 as usize + 8, DATA);
    group.add("refcounts/one-bit-overflow", bits, Contents);
    let far = base().with_len(1 << 43);
    group.add("refcounts/file-of-8-tebibytes", far, Contents).without_qemu();
}

/// A snapshot's header.
struct Snapshot<'a> {
    l1: u64,
    l1_size: u32,
    extra: u32,
    id: &'a [u8],
    name: &'a [u8],
}

fn with_snapshot(snapshot: &Snapshot<'_>) -> Image {
    let at = FREE as usize;
    let image = base().be32(60, 1).be64(64, FREE).be64(at, snapshot.l1).be32(at + 8, snapshot.l1_size);
    let (id, name) = (snapshot.id, snapshot.name);
    let image = image.int(Order::Big, at + 12, 2, id.len() as u64).int(Order::Big, at + 14, 2, name.len() as u64);
    let text = at + 40 + if snapshot.extra <= 1024 { snapshot.extra as usize } else { 0 };
    let image = image.be32(at + 36, snapshot.extra).put(text, id).put(text + id.len(), name);
    used(image, 7).with_len(FREE + CLUSTER)
}

fn snapshots(group: &mut Group<'_>) {
    let plain = Snapshot { l1: L1, l1_size: 1, extra: 0, id: b"1", name: b"s" };
    let with = |change: &dyn Fn(&mut Snapshot<'static>)| {
        let mut snapshot = Snapshot { ..plain };
        change(&mut snapshot);
        with_snapshot(&snapshot)
    };
    group.add("snapshot/l1-size-0", with(&|s| s.l1_size = 0), Anything).without_qemu();
    group.add("snapshot/l1-size-max", with(&|s| s.l1_size = u32::MAX), Anything);
    group.add("snapshot/l1-size-other", with(&|s| s.l1_size = 400), Anything);
    group.add("snapshot/l1-far", with(&|s| s.l1 = 1 << 60), Anything);
    group.add("snapshot/l1-unaligned", with(&|s| s.l1 = L1 + 8), Anything);
    group.add("snapshot/l1-wraps", with(&|s| s.l1 = !4095), Anything);
    group.add("snapshot/extra-max", with(&|s| s.extra = u32::MAX), Anything);
    group.add("snapshot/extra-1025", with(&|s| s.extra = 1025), Anything);
    group.add("snapshot/extra-odd", with(&|s| s.extra = 3), Anything);
    group.add("snapshot/escape", with(&|s| s.name = b"\x1b[31m\x1b]0;x\x07\r\nfake line"), Anything);
    group.add("snapshot/nul", with(&|s| s.name = b"a\0b\0"), Anything);
    group.add("snapshot/no-utf-8", with(&|s| s.name = b"\xff\xfe\x80"), Anything);
    group.add("snapshot/empty-names", with(&|s| (s.id, s.name) = (b"", b"")), Anything);
    group.add("snapshot/long-name", with(&|s| s.name = &[b'n'; 3000]), Anything);
    group.add("snapshot/name-past-the-end", with(&|s| s.name = &[b'n'; 4000]).with_len(FREE + 600), Anything);
    // All 65 536 that the specification's readers allow, of 40 bytes each, with the same names.
    let mut table = Vec::with_capacity(65_536 * 40);
    for _ in 0..65_536 {
        table.extend_from_slice(&L1.to_be_bytes());
        table.extend_from_slice(&1u32.to_be_bytes());
        table.extend_from_slice(&[0; 28]);
    }
    group
        .add("snapshot/65536", base().be32(60, 65_536).be64(64, FREE).put(FREE as usize, &table), Anything)
        .without_qemu();
}

fn bitmaps(group: &mut Group<'_>) {
    let extension = |count: u32, size: u64, offset: u64| {
        [&count.to_be_bytes()[..], &[0; 4], &size.to_be_bytes(), &offset.to_be_bytes()].concat()
    };
    let with = |count, size, offset| extended(base().be64(88, 1), &[(0x2385_2875, &extension(count, size, offset))]);
    // The directory lies in the first free cluster, its table in the next.
    let entry = |table: u64, table_size: u32, flags: u32, kind: u8, granularity: u8, name: &[u8]| {
        let at = FREE as usize;
        let image = with(1, (24 + name.len() as u64).next_multiple_of(8), FREE);
        let image =
            image.be64(at, table).be32(at + 8, table_size).be32(at + 12, flags).put(at + 16, &[kind, granularity]);
        let image = image.int(Order::Big, at + 18, 2, name.len() as u64).put(at + 24, name);
        used(image, 8).with_len(FREE + 2 * CLUSTER)
    };
    let table = FREE + CLUSTER;
    group.add("bitmap/none", with(0, 0, 0), Anything);
    group.add("bitmap/count-max", with(u32::MAX, 32, FREE), Refusal);
    group.add("bitmap/65536", with(65_536, 1 << 20, FREE), Refusal);
    group.add("bitmap/directory-size-max", with(1, u64::MAX, FREE), Refusal);
    group.add("bitmap/directory-far", with(1, 32, 1 << 62), Refusal);
    group.add("bitmap/directory-unaligned", with(1, 32, FREE + 1), Refusal);
    group.add("bitmap/directory-past-the-end", with(1, 32, 1 << 30), Anything);
    group.add("bitmap/directory-in-header", with(1, 32, 0), Anything);
    group.add("bitmap/short-extension", extended(base().be64(88, 1), &[(0x2385_2875, &[0; 23])]), Refusal);
    for (name, image) in [
        ("table-far", entry(1 << 62, 1, 2, 1, 16, b"b")),
        ("table-unaligned", entry(table + 8, 1, 2, 1, 16, b"b")),
        ("table-size-0", entry(table, 0, 2, 1, 16, b"b")),
        ("table-size-max", entry(table, u32::MAX, 2, 1, 16, b"b")),
        ("unknown-flags", entry(table, 1, 0xffff_fffc, 1, 16, b"b")),
        ("unknown-kind", entry(table, 1, 2, 9, 16, b"b")),
        ("granularity-0", entry(table, 1, 2, 1, 0, b"b")),
        ("granularity-63", entry(table, 1, 2, 1, 63, b"b")),
        ("granularity-255", entry(table, 1, 2, 1, 255, b"b")),
        ("name-empty", entry(table, 1, 2, 1, 16, b"")),
        ("name-escape", entry(table, 1, 2, 1, 16, b"\x1b[31m\x07\r\n")),
        ("name-nul", entry(table, 1, 2, 1, 16, b"a\0b")),
        ("name-long", entry(table, 1, 2, 1, 16, &[b'n'; 1024])),
        ("entry-all-ones", entry(table, 1, 2, 1, 16, b"b").be64(table as usize, u64::MAX)),
        ("entry-far", entry(table, 1, 2, 1, 16, b"b").be64(table as usize, 0x00ff_ffff_ffff_f000)),
        ("entry-is-the-table", entry(table, 1, 2, 1, 16, b"b").be64(table as usize, table)),
        ("in-use", entry(table, 1, 1, 1, 16, b"b")),
    ] {
        group.add(format!("bitmap/{name}"), image, Anything);
    }
}

fn compressed(group: &mut Group<'_>) {
    let with = |stream: &[u8], sectors: u64| {
        let entry = COMPRESSED | (sectors << SECTORS_SHIFT) | FREE;
        used(base().be64(L2 as usize, entry).put(FREE as usize, stream), 7).with_len(FREE + CLUSTER)
    };
    let whole = compress_to_vec(&[0x42; CLUSTER as usize], 9);
    let bomb = compress_to_vec(&vec![0; 2 << 20], 9);
    group.add("compressed/legal", with(&whole, 1), Contents);
    group.add("compressed/bomb", with(&bomb, 7), Anything);
    group.add("compressed/short", with(&compress_to_vec(&[0x42; 100], 9), 1), Anything);
    group.add("compressed/empty", with(&[], 0), Anything);
    group.add("compressed/noise", with(&[0xff; 512], 1), Unreadable);
    group.add(
        "compressed/cut-off",
        with(&whole[..whole.len() / 2], 0).with_len(FREE + whole.len() as u64 / 2),
        Anything,
    );
    group.add("compressed/distance-before-the-start", with(&[0x4b, 0x04, 0x82, 0xff, 0xff], 1), Unreadable);
    let far = COMPRESSED | 7 << SECTORS_SHIFT | 0x03ff_ffff_ffff_fe00;
    group.add("compressed/far", base().be64(L2 as usize, far), Anything);
    group.add("compressed/in-the-header", base().be64(L2 as usize, COMPRESSED), Anything);
    group.add("compressed/copied-too", with(&whole, 1).be64(L2 as usize, COPIED | COMPRESSED | FREE), Anything);
    let zstd = with(&[0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0], 1);
    group.add("compressed/zstd-window-max", zstd.be64(72, 8).put(104, &[1]), Unreadable);
    let window = with(&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff, 0x01, 0x00, 0x00], 1);
    group.add("compressed/zstd-window-log-41", window.be64(72, 8).put(104, &[1]), Unreadable);
    let shared = (0..512)
        .fold(with(&whole, 1), |image, n| image.be64(L2 as usize + 8 * n, COMPRESSED | 1 << SECTORS_SHIFT | FREE));
    group.add("compressed/512-share-a-stream", shared, Contents);
}
