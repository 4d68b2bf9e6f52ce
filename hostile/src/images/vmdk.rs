//! VMDK: sparse extents, descriptors with extents in further files, streams.

use miniz_oxide::deflate::compress_to_vec_zlib;

use super::{names, surround};
use crate::bytes::{Image, Order};
use crate::case::{Case, Content, Due, Group, field};
use crate::names::Surroundings;
use Due::{Anything, Confinement, Contents, Refusal, Strictness, Unreadable};

const SECTOR: usize = 512;
const GD: usize = 21 * SECTOR;
const GT: usize = 22 * SECTOR;
const GRAIN: usize = 128 * SECTOR;

fn descriptor(create_type: &str, extents: &[u8], more: &[u8]) -> Vec<u8> {
    let head =
        format!("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n");
    let ddb = b"\nddb.adapterType = \"ide\"\nddb.geometry.cylinders = \"2\"\n";
    [head.as_bytes(), more, b"\n", extents, ddb].concat()
}

/// A sparse extent with this descriptor inside.
fn with_descriptor(text: &[u8]) -> Image {
    let header =
        Image::new().put(0, b"KDMV").le32(4, 1).le32(8, 1).le64(12, 2048).le64(20, 128).le64(28, 1).le64(36, 20);
    let header = header.le32(44, 512).le64(56, 21).le64(64, 128).put(73, b"\n \r\n").put(SECTOR, text);
    header.le32(GD, 22).le32(GT, 128).put(GRAIN, &[0x42; 128 * SECTOR])
}

/// A disk of 1 MiB with its first grain.
fn base() -> Image {
    with_descriptor(&descriptor("monolithicSparse", b"RW 2048 SPARSE \"image.vmdk\"", b""))
}

fn text(create_type: &str, extents: &[u8]) -> Image {
    Image::new().put(0, &descriptor(create_type, extents, b""))
}

fn quoted(before: &str, name: &[u8], after: &str) -> Vec<u8> {
    [before.as_bytes(), b"\"", name, b"\"", after.as_bytes()].concat()
}

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>, around: &Surroundings) {
    let mut group = Group::new(cases, "vmdk", "image.vmdk");
    header(&mut group);
    tables(&mut group);
    descriptors(&mut group);
    streams(&mut group);
    group.truncations(&base(), 64, &[4, 63, 64, 511, 512, 600, 1024, 10_752, 10_756, 11_264, 12_000, 65_536, 70_000]);
    let flat: &dyn Fn(&[u8]) -> Image = &|name| text("monolithicFlat", &quoted("RW 8 FLAT ", name, " 0"));
    names(&mut group, around, "flat", "image.vmdk", 500, Refusal, flat);
    names(&mut group, around, "sparse", "image.vmdk", 500, Refusal, &|name| {
        text("twoGbMaxExtentSparse", &quoted("RW 8 SPARSE ", name, ""))
    });
    names(&mut group, around, "vmfs", "image.vmdk", 500, Refusal, &|name| {
        text("vmfs", &quoted("RW 8 VMFS ", name, ""))
    });
    names(&mut group, around, "flat-in-sparse", "image.vmdk", 500, Anything, &|name| {
        with_descriptor(&descriptor("monolithicFlat", &quoted("RW 8 FLAT ", name, " 0"), b""))
    });
    names(&mut group, around, "parent", "image.vmdk", 500, Confinement, &|name| {
        let parent = quoted("parentFileNameHint=", name, "");
        let mut text = descriptor("monolithicSparse", b"RW 2048 SPARSE \"image.vmdk\"", &parent);
        let at = text.windows(18).position(|part| part == b"parentCID=ffffffff").unwrap_or(0);
        text[at + 10..at + 18].copy_from_slice(b"12345678");
        with_descriptor(&text).le32(GT, 0)
    });
}

fn header(group: &mut Group<'_>) {
    const MAX32: u64 = u32::MAX as u64;
    const MAX64: u64 = u64::MAX;
    group.fields(
        &base(),
        Order::Little,
        |image| image,
        &[
            field("version", 4, 4, &[(0, Anything), (4, Refusal), (MAX32, Refusal)]),
            field(
                "flags",
                8,
                4,
                &[(0, Anything), (2, Anything), (1 << 16, Anything), (1 << 17, Anything), (MAX32, Anything)],
            ),
            field(
                "capacity",
                12,
                8,
                &[
                    (0, Anything),
                    (1, Anything),
                    (1 << 40, Anything),
                    (1 << 55, Refusal),
                    (1 << 63, Refusal),
                    (MAX64, Refusal),
                ],
            ),
            field(
                "grain_size",
                20,
                8,
                &[
                    (0, Refusal),
                    (1, Anything),
                    (7, Anything),
                    (1 << 18, Anything),
                    (1 << 32, Refusal),
                    (1 << 63, Refusal),
                    (MAX64, Refusal),
                ],
            ),
            field(
                "descriptor_offset",
                28,
                8,
                &[(0, Anything), (1 << 40, Strictness), (1 << 55, Strictness), (MAX64, Strictness)],
            ),
            field("descriptor_size", 36, 8, &[(0, Anything), (1, Anything), (1 << 30, Anything), (MAX64, Strictness)]),
            field(
                "entries_per_table",
                44,
                4,
                &[(0, Refusal), (1, Anything), (513, Refusal), (1 << 20, Refusal), (MAX32, Refusal)],
            ),
            field("rgd_offset", 48, 8, &[(MAX64, Anything)]),
            field(
                "gd_offset",
                56,
                8,
                &[(0, Anything), (1 << 40, Anything), (1 << 55, Strictness), (1 << 63, Strictness), (MAX64, Anything)],
            ),
            field("overhead", 64, 8, &[(0, Anything), (1 << 55, Anything), (MAX64, Anything)]),
            field("unclean", 72, 1, &[(1, Anything)]),
            field("compression", 77, 2, &[(1, Anything), (2, Anything), (0xffff, Anything)]),
        ],
    );
    group.add("both/newlines-damaged", base().put(73, b"\n\n\r\r").le32(8, 1), Anything);
    group.add("both/all-ones", Image::new().put(0, b"KDMV\x01\0\0\0").put(8, &[0xff; 504]), Refusal);
    let one_table = base().le64(12, 1 << 34).le64(20, 1 << 17).le32(44, 512);
    group.add("both/8-tebibytes", one_table, Anything);
    let esx = Image::new()
        .put(0, b"COWD")
        .le32(4, 1)
        .le32(8, 3)
        .le32(12, 2048)
        .le32(16, 1)
        .le32(20, 4)
        .le32(24, 1)
        .le32(28, 8);
    group.add("cowd/legal", esx.clone().with_len(65_536), Anything).may_differ("it needs no descriptor inside");
    group.add("cowd/grain-0", esx.clone().le32(16, 0).with_len(65_536), Refusal);
    group.add("cowd/grain-max", esx.clone().le32(16, u32::MAX).with_len(65_536), Anything);
    group.add("cowd/directory-max", esx.le32(20, u32::MAX).le32(24, u32::MAX).with_len(65_536), Anything);
}

fn tables(group: &mut Group<'_>) {
    for (name, entry, due) in
        [("far", u32::MAX, Anything), ("itself", 21, Anything), ("header", 0, Anything), ("grain", 128, Anything)]
    {
        group.add(format!("directory/{name}"), base().le32(GD, entry), due);
    }
    for (name, entry, due) in
        [("far", u32::MAX, Anything), ("itself", 22, Contents), ("directory", 21, Contents), ("zero-mark", 1, Anything)]
    {
        group.add(format!("table/{name}"), base().le32(GT, entry), due);
    }
    let shared = (0..16).fold(base(), |image, n| image.le32(GT + 4 * n, 128));
    group.add("table/all-share-a-grain", shared, Contents);
}

fn descriptors(group: &mut Group<'_>) {
    let data = || Content::Bytes(Image::new().put(0, &[0x42; 4096]));
    let case = |group: &mut Group<'_>, name: &str, create_type: &str, extents: &[u8], due| {
        // qemu-img 10.0.2 aborts on several of these, so it is no judge.
        group.add(format!("descriptor/{name}"), text(create_type, extents), due).beside("x", data()).without_qemu();
    };
    for (name, extents) in [
        ("no-extents", &b""[..]),
        ("lower-case", b"rw 8 flat \"x\" 0"),
        ("negative-length", b"RW -8 FLAT \"x\" 0"),
        ("huge-length", b"RW 9223372036854775807 FLAT \"x\" 0"),
        ("length-wraps", b"RW 36028797018963968 FLAT \"x\" 0"),
        ("length-no-number", b"RW eight FLAT \"x\" 0"),
        ("offset-missing", b"RW 8 FLAT \"x\""),
        ("offset-negative", b"RW 8 FLAT \"x\" -1"),
        ("offset-huge", b"RW 8 FLAT \"x\" 9223372036854775807"),
        ("unknown-kind", b"RW 8 NONESUCH \"x\" 0"),
        ("quote-missing", b"RW 8 FLAT \"x 0"),
        ("name-missing", b"RW 8 FLAT"),
        ("no-access", b"NOACCESS 8 FLAT \"x\" 0"),
        ("missing-file", b"RW 8 FLAT \"y\" 0"),
        ("sum-wraps", b"RW 4611686018427387904 ZERO\nRW 4611686018427387904 ZERO\nRW 8 FLAT \"x\" 0"),
    ] {
        case(group, name, "monolithicFlat", extents, Refusal);
    }
    for (name, extents) in [
        ("read-only", &b"RDONLY 8 FLAT \"x\" 0"[..]),
        ("only-zero", b"RW 8 ZERO"),
        ("zero-length", b"RW 0 FLAT \"x\" 0"),
        ("one-tebibyte-past-the-end", b"RW 2147483648 FLAT \"x\" 0"),
        ("nul-before-the-extent", b"\0RW 8 FLAT \"x\" 0"),
        ("past-the-end", b"RW 1000 FLAT \"x\" 0"),
        ("offset-past-the-end", b"RW 8 FLAT \"x\" 1000"),
        ("itself-as-flat", b"RW 1 FLAT \"image.vmdk\" 0"),
        ("twice-the-same", b"RW 8 FLAT \"x\" 0\nRW 8 FLAT \"x\" 0"),
    ] {
        case(group, name, "monolithicFlat", extents, Anything);
    }
    case(group, "itself-as-sparse", "twoGbMaxExtentSparse", b"RW 8 SPARSE \"image.vmdk\"", Refusal);
    case(group, "unknown-type", "nonesuch", b"RW 8 FLAT \"x\" 0", Refusal);
    case(group, "type-with-escape", "\x1b[31mmonolithicFlat", b"RW 8 FLAT \"x\" 0", Refusal);
    let many: String = (0..40_000).map(|_| "RW 8 FLAT \"x\" 0\n").collect();
    case(group, "40000-extents", "twoGbMaxExtentFlat", many.as_bytes(), Anything);
    let zeroes: String = (0..40_000).map(|_| "RW 8 ZERO\n").collect();
    case(group, "40000-zero-extents", "twoGbMaxExtentFlat", zeroes.as_bytes(), Anything);
    let long =
        [&b"# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\n#"[..], &vec![b'x'; 4 << 20]].concat();
    group.add("descriptor/line-of-4-mebibytes", Image::new().put(0, &long), Refusal).without_qemu();
    let sparse = Image::new().put(0, b"# Disk DescriptorFile\nversion=1\n").with_len(1 << 40);
    group.add("descriptor/file-of-1-tebibyte", sparse, Refusal).without_qemu();
    for (name, more) in [
        ("cid-no-number", &b"CID=xyz\nparentCID=xyz"[..]),
        ("cid-long", b"CID=ffffffffffffffffffffffff"),
        ("parent-empty", b"parentFileNameHint=\"\"\nparentCID=12345678"),
        ("parent-without-quotes", b"parentFileNameHint=../outside/canary\nparentCID=12345678"),
        ("version-99", b"version=99"),
    ] {
        let text = descriptor("monolithicSparse", b"RW 2048 SPARSE \"image.vmdk\"", more);
        let case = group.add(format!("descriptor/{name}"), with_descriptor(&text), Anything).without_qemu();
        surround(case);
    }
    let cut = with_descriptor(b"# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicSp");
    group.add("descriptor/cut-off", cut, Refusal).without_qemu();
    group.add("descriptor/in-itself-all-text", with_descriptor(&[b'x'; 20 * SECTOR]), Refusal).without_qemu();
    let case =
        group.add("descriptor/extent-is-damaged", text("twoGbMaxExtentSparse", b"RW 2048 SPARSE \"x\""), Refusal);
    case.beside("x", Content::Bytes(base().le64(20, 0)));
    let nested = text("twoGbMaxExtentSparse", b"RW 8 SPARSE \"x\"");
    let case = group.add("descriptor/extent-is-a-descriptor", nested, Refusal);
    case.beside("x", Content::Bytes(text("monolithicFlat", b"RW 8 FLAT \"../outside/canary\" 0"))).without_qemu();
    let case = group.add("parent/two-in-a-circle", child("b"), Confinement);
    case.beside("b", Content::Bytes(child("image.vmdk"))).without_qemu();
}

fn child(parent: &str) -> Image {
    let text = descriptor(
        "monolithicSparse",
        b"RW 2048 SPARSE \"image.vmdk\"",
        &quoted("parentFileNameHint=", parent.as_bytes(), ""),
    );
    let text = String::from_utf8_lossy(&text).replace("parentCID=ffffffff", "parentCID=fffffffe");
    with_descriptor(text.as_bytes()).le32(GT, 0)
}

/// Capacity 1 MiB, its first grain compressed at sector 128.
fn stream(marker_size: u32, compressed: &[u8]) -> Image {
    let text = descriptor("streamOptimized", b"RW 2048 SPARSE \"image.vmdk\"", b"");
    let image = with_descriptor(&text).with_len(GRAIN as u64).le32(4, 3).le32(8, 0x3_0001).put(77, &[1, 0]);
    image.le64(GRAIN, 0).le32(GRAIN + 8, marker_size).put(GRAIN + 12, compressed)
}

fn streams(group: &mut Group<'_>) {
    const ENDS: &str = "the stream itself tells where it ends, and has a sum";
    let whole = compress_to_vec_zlib(&[0x42; 128 * SECTOR], 9);
    let bomb = compress_to_vec_zlib(&vec![0; 16 << 20], 9);
    let len = whole.len() as u32;
    let padded = |image: Image| image.with_len(GRAIN as u64 + 32_768);
    group.add("stream/legal", padded(stream(len, &whole)), Contents);
    group.add("stream/bomb", padded(stream(bomb.len() as u32, &bomb)), Unreadable);
    group.add("stream/size-max", padded(stream(u32::MAX, &whole)), Anything).may_differ(ENDS);
    group.add("stream/size-0", padded(stream(0, &whole)), Anything).may_differ(ENDS);
    group.add("stream/size-1", padded(stream(1, &whole)), Anything).may_differ(ENDS);
    group.add("stream/noise", padded(stream(500, &[0xff; 500])), Unreadable);
    group.add("stream/short", padded(stream(40, &compress_to_vec_zlib(&[0x42; 100], 9))), Anything);
    group.add("stream/other-lba", padded(stream(len, &whole)).le64(GRAIN, 99), Anything);
    group.add("stream/cut-off", stream(len, &whole).with_len(GRAIN as u64 + 20), Unreadable);
    let shared = (0..16).fold(padded(stream(len, &whole)), |image, n| image.le32(GT + 4 * n, 128));
    group.add("stream/all-share-a-grain", shared, Anything);
    // With a footer: the directory's place stands there.
    let footer = |marker: u64, kind: u32, change: &dyn Fn(Image) -> Image| {
        let image = padded(stream(len, &whole)).le64(56, u64::MAX);
        let at = image.size() as usize;
        let copy = image.part(0, SECTOR);
        let image =
            image.le64(at, marker).le32(at + 8, 0).le32(at + 12, kind).put(at + 512, &copy).le64(at + 512 + 56, 21);
        change(image.put(at + 1024, &[0; 512]))
    };
    group.add("footer/legal", footer(1, 3, &|image| image), Contents);
    group.add("footer/kind", footer(1, 7, &|image| image), Anything);
    group.add("footer/count-max", footer(u64::MAX, 3, &|image| image), Anything);
    let at = GRAIN + 32_768 + 512;
    group.add("footer/points-to-a-footer", footer(1, 3, &|image| image.le64(at + 56, u64::MAX)), Anything);
    group.add("footer/other-magic", footer(1, 3, &|image| image.put(at, b"XXXX")), Anything);
    group.add("footer/other-capacity", footer(1, 3, &|image| image.le64(at + 12, 1 << 50)), Anything);
    group.add("footer/grain-0", footer(1, 3, &|image| image.le64(at + 20, 0)), Refusal);
    group.add("footer/missing", padded(stream(len, &whole)).le64(56, u64::MAX), Anything);
}
