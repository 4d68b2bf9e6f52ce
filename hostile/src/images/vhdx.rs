//! VHDX: headers, regions, metadata, block table, parents.

use super::names;
use crate::bytes::{Image, Order, crc32c, utf16};
use crate::case::{Case, Due, Group, field};
use crate::names::Surroundings;
use Due::{Anything, Confinement, Contents, Refusal, Strictness};

/// One mebibyte: the unit of the format.
pub const MIB: usize = 1 << 20;
/// The newer of the two headers.
pub const HEADER: usize = 128 << 10;
/// The log, 1 MiB.
pub const LOG: usize = MIB;
const REGIONS: usize = 192 << 10;
/// The block table.
pub const BAT: usize = 2 * MIB;
const METADATA: usize = 3 * MIB;
const ITEMS: usize = METADATA + (64 << 10);
/// The first block.
pub const BLOCK: usize = 4 * MIB;

const BAT_GUID: &str = "2DC27766F62342009D64115E9BFD4A08";
const METADATA_GUID: &str = "8B7CA20647904B9AB8FE575F050F886E";
const FILE_PARAMETERS: &str = "CAA16737FA364D43B3B633F0AA44E76B";
const DISK_SIZE: &str = "2FA54224CD1B4876B2115DBED83BF4B8";
const PAGE_83: &str = "BECA12ABB2E64523 93EFC309E000C746";
const LOGICAL: &str = "8141BF1DA96F4709BA47F233A8FAAB5F";
const PHYSICAL: &str = "CDA348C7445D44719CC9E9885251C556";
const PARENT: &str = "A8D35F2DB30B454DABF7D3D84834AB0C";
const VHDX_PARENT: &str = "B04AEFB7D19E4A81B78925B8E9445913";

/// The bytes of a GUID as the format stores it: the first three groups reversed.
fn guid(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap_or("0"), 16).unwrap_or(0);
    let bytes: Vec<u8> = digits.chunks(2).map(byte).collect();
    [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15].map(|n: usize| bytes[n]).to_vec()
}

/// With the sums of the headers and of the region table.
pub fn sealed(image: Image) -> Image {
    [(64 << 10, 4096), (HEADER, 4096), (REGIONS, 64 << 10), (256 << 10, 64 << 10)].into_iter().fold(
        image,
        |image, (at, len)| {
            let image = image.le32(at + 4, 0);
            let sum = crc32c(&image.part(at, len));
            image.le32(at + 4, sum)
        },
    )
}

fn header(image: Image, at: usize, sequence: u64) -> Image {
    let image = image.put(at, b"head").le64(at + 8, sequence).put(at + 16, &[1; 16]).put(at + 32, &[2; 16]);
    image.int(Order::Little, at + 66, 2, 1).le32(at + 68, MIB as u32).le64(at + 72, LOG as u64)
}

fn regions(image: Image, at: usize) -> Image {
    let image = image.put(at, b"regi").le32(at + 8, 2);
    let image =
        image.put(at + 16, &guid(BAT_GUID)).le64(at + 32, BAT as u64).le32(at + 40, MIB as u32).le32(at + 44, 1);
    image.put(at + 48, &guid(METADATA_GUID)).le64(at + 64, METADATA as u64).le32(at + 72, MIB as u32).le32(at + 76, 1)
}

fn item(image: Image, index: usize, id: &str, offset: u32, len: u32, flags: u32) -> Image {
    let at = METADATA + 32 + 32 * index;
    image.put(at, &guid(id)).le32(at + 16, (64 << 10) + offset).le32(at + 20, len).le32(at + 24, flags)
}

/// A disk of 2 MiB with the first of its blocks of 1 MiB.
pub fn base() -> Image {
    let image = Image::new().put(0, b"vhdxfile");
    let image = regions(regions(header(header(image, 64 << 10, 1), HEADER, 2), REGIONS), 256 << 10);
    let image = image.put(METADATA, b"metadata").int(Order::Little, METADATA + 10, 2, 5);
    let image = item(image, 0, FILE_PARAMETERS, 0, 8, 4).le32(ITEMS, MIB as u32);
    let image = item(image, 1, DISK_SIZE, 8, 8, 6).le64(ITEMS + 8, 2 * MIB as u64);
    let image = item(image, 2, PAGE_83, 16, 16, 6).put(ITEMS + 16, &[3; 16]);
    let image = item(image, 3, LOGICAL, 32, 4, 6).le32(ITEMS + 32, 512);
    let image = item(image, 4, PHYSICAL, 36, 4, 6).le32(ITEMS + 36, 4096);
    let image = image.le64(BAT, (BLOCK as u64) | 6).put(BLOCK, &[0x42; 4096]).with_len(BLOCK as u64 + MIB as u64);
    sealed(image)
}

fn with_parent(key: &str, name: &[u8]) -> Image {
    let linkage = utf16("{02020202-0202-0202-0202-020202020202}", Order::Little);
    let name = utf16(&String::from_utf8_lossy(name), Order::Little);
    let (link_key, key) = (utf16("parent_linkage", Order::Little), utf16(key, Order::Little));
    let image = item(base(), 5, PARENT, 4096, 8192, 4).int(Order::Little, METADATA + 10, 2, 6).le32(ITEMS + 4, 2);
    let at = ITEMS + 4096;
    let mut image = image.put(at, &guid(VHDX_PARENT)).int(Order::Little, at + 18, 2, 2);
    let mut place = 20 + 24;
    for (n, (key, value)) in [(link_key, linkage), (key, name)].into_iter().enumerate() {
        let entry = at + 20 + 12 * n;
        image = image.le32(entry, place as u32).le32(entry + 4, (place + key.len()) as u32);
        image = image.int(Order::Little, entry + 8, 2, key.len() as u64).int(
            Order::Little,
            entry + 10,
            2,
            value.len() as u64,
        );
        image = image.put(at + place, &key).put(at + place + key.len(), &value);
        place += key.len() + value.len();
    }
    sealed(image.le64(BAT, 0))
}

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>, around: &Surroundings) {
    let mut group = Group::new(cases, "vhdx", "image.vhdx");
    fields(&mut group);
    for (name, entry, due) in [
        ("state-max", BLOCK as u64 | 7, Anything),
        ("state-reserved", BLOCK as u64 | 4, Anything),
        ("undefined", 1, Anything),
        ("partial-without-parent", BLOCK as u64 | 7, Anything),
        ("far", 0x0fff_ffff_fff0_0006, Anything),
        ("header", 6, Strictness),
        ("itself", BAT as u64 | 6, Strictness),
        ("log", LOG as u64 | 6, Strictness),
        ("reserved-bits", BLOCK as u64 | 0xffff8 | 6, Anything),
        ("all-ones", u64::MAX, Anything),
    ] {
        group.add(format!("bat/{name}"), base().le64(BAT, entry), due);
    }
    group.add("bat/two-share-a-block", base().le64(BAT + 8, BLOCK as u64 | 6), Anything);
    group.truncations(
        &base(),
        METADATA as u64,
        &[
            8,
            65_536,
            65_540,
            131_072,
            196_608,
            200_000,
            1 << 20,
            2 << 20,
            3 << 20,
            (3 << 20) + 65_536,
            4 << 20,
            (4 << 20) + 4096,
        ],
    );
    names(&mut group, around, "parent-relative", "image.vhdx", 200, Confinement, &|name| {
        with_parent("relative_path", name)
    });
    names(&mut group, around, "parent-absolute", "image.vhdx", 200, Confinement, &|name| {
        with_parent("absolute_win32_path", name)
    });
    names(&mut group, around, "parent-volume", "image.vhdx", 200, Confinement, &|name| {
        with_parent("volume_path", name)
    });
    group.add("parent/itself", with_parent("relative_path", b".\\image.vhdx"), Confinement).without_qemu();
    for (name, at, width, value) in [
        ("count-max", 18, 2, 0xffff),
        ("key-far", 20, 4, 0xffff_ffff),
        ("value-far", 24, 4, 0xffff_fff0),
        ("key-length-0", 28, 2, 0),
        ("key-length-odd", 28, 2, 3),
        ("value-length-max", 30, 2, 0xffff),
        ("kind", 0, 4, 0),
    ] {
        let image = with_parent("relative_path", b"base").int(Order::Little, ITEMS + 4096 + at, width, value);
        group.add(format!("locator/{name}"), image, Anything).without_qemu();
    }
}

fn fields(group: &mut Group<'_>) {
    const MAX16: u64 = 0xffff;
    const MAX32: u64 = u32::MAX as u64;
    const MAX64: u64 = u64::MAX;
    const ENTRY: usize = METADATA + 32;
    let sole = base().put(64 << 10, &[0; 4096]);
    group.fields(
        &sole,
        Order::Little,
        |image| sealed(image).put(64 << 10, &[0; 4096]),
        &[
            field("header_sequence", HEADER + 8, 8, &[(0, Contents), (1, Contents), (MAX64, Contents)]),
            field("log_version", HEADER + 64, 2, &[(1, Refusal), (MAX16, Refusal)]),
            field("version", HEADER + 66, 2, &[(0, Refusal), (2, Refusal), (MAX16, Refusal)]),
            field(
                "log_length",
                HEADER + 68,
                4,
                &[(0, Anything), (1, Refusal), (4096, Refusal), (0xfff0_0000, Anything), (MAX32, Refusal)],
            ),
            field(
                "log_offset",
                HEADER + 72,
                8,
                &[(0, Refusal), (1, Refusal), (1 << 62, Anything), (MAX64, Refusal), (BAT as u64, Refusal)],
            ),
            field("log_guid", HEADER + 48, 8, &[(1, Anything)]),
            field(
                "region_count",
                REGIONS + 8,
                4,
                &[(0, Refusal), (1, Refusal), (3, Anything), (2047, Anything), (2048, Refusal), (MAX32, Refusal)],
            ),
            field(
                "bat_offset",
                REGIONS + 32,
                8,
                &[
                    (0, Refusal),
                    (1, Refusal),
                    (METADATA as u64, Refusal),
                    (1 << 62, Anything),
                    (MAX64, Refusal),
                    (!0xf_ffff, Refusal),
                ],
            ),
            field(
                "bat_length",
                REGIONS + 40,
                4,
                &[(0, Refusal), (1, Refusal), (0xfff0_0000, Refusal), (MAX32, Refusal)],
            ),
            field(
                "metadata_offset",
                REGIONS + 64,
                8,
                &[(0, Refusal), (BAT as u64, Refusal), (1 << 62, Refusal), (!0xf_ffff, Refusal)],
            ),
            field("metadata_length", REGIONS + 72, 4, &[(0, Refusal), (MAX32, Refusal)]),
            field("bat_guid", REGIONS + 16, 8, &[(0, Refusal)]),
            field(
                "metadata_count",
                METADATA + 10,
                2,
                &[(0, Refusal), (1, Refusal), (6, Anything), (2047, Anything), (2048, Refusal), (MAX16, Refusal)],
            ),
            field("item_offset", ENTRY + 16, 4, &[(0, Refusal), (1, Refusal), (1 << 20, Refusal), (MAX32, Refusal)]),
            field(
                "item_length",
                ENTRY + 20,
                4,
                &[(0, Strictness), (1, Strictness), (1 << 21, Refusal), (MAX32, Refusal)],
            ),
            field("item_guid_unknown_required", ENTRY, 8, &[(MAX64, Refusal)]),
            field(
                "block_size",
                ITEMS,
                4,
                &[
                    (0, Refusal),
                    (1, Refusal),
                    (512, Refusal),
                    (3 << 20, Refusal),
                    (512 << 20, Refusal),
                    (1 << 31, Refusal),
                    (MAX32, Refusal),
                ],
            ),
            field("parameters", ITEMS + 4, 4, &[(1, Contents), (2, Refusal), (MAX32, Refusal)]),
            field(
                "disk_size",
                ITEMS + 8,
                8,
                &[
                    (1, Refusal),
                    (511, Refusal),
                    (1 << 46, Anything),
                    ((1 << 46) + 512, Refusal),
                    (1 << 63, Refusal),
                    (MAX64, Refusal),
                ],
            ),
            field(
                "logical_sector",
                ITEMS + 32,
                4,
                &[(0, Refusal), (1, Refusal), (513, Refusal), (1 << 31, Refusal), (MAX32, Refusal)],
            ),
            field("physical_sector", ITEMS + 36, 4, &[(0, Anything), (1, Anything), (MAX32, Anything)]),
        ],
    );
    group.add("both/disk-of-nothing", sealed(base().le64(ITEMS + 8, 0)), Anything).may_differ("an empty disk is one");
    group
        .add("both/sectors-of-4096", sealed(base().le32(ITEMS + 32, 4096)), Anything)
        .may_differ("the specification has them");
    group.add("sum/both-headers", base().le32((64 << 10) + 4, 7).le32(HEADER + 4, 7), Refusal);
    group.add("sum/one-header", base().le32(HEADER + 4, 7), Contents);
    group.add("sum/both-region-tables", base().le32(REGIONS + 4, 7).le32((256 << 10) + 4, 7), Refusal);
    let twice = base().put(REGIONS + 48, &guid(BAT_GUID));
    group.add("region/twice-the-same", sealed(twice), Refusal);
    let unknown = base()
        .le32(REGIONS + 8, 3)
        .put(REGIONS + 80, &[5; 16])
        .le64(REGIONS + 96, 5 << 20)
        .le32(REGIONS + 104, MIB as u32);
    group.add("region/unknown-required", sealed(unknown.clone().le32(REGIONS + 108, 1)), Refusal);
    group.add("region/unknown-optional", sealed(unknown), Anything);
    let twice = base().put(ENTRY + 32, &guid(FILE_PARAMETERS));
    group.add("metadata/twice-the-same", sealed(twice), Refusal);
    group.add("metadata/not-aligned-table", sealed(base().put(METADATA, b"metadatA")), Refusal);
    // 64 TiB in blocks of 256 MiB: the table needs 2 MiB, the region has one.
    let huge = base().le64(ITEMS + 8, 64 << 40).le32(ITEMS, 256 << 20);
    group.add("both/table-too-small", sealed(huge), Refusal);
}
