//! VHD (vpc).

use super::names;
use crate::bytes::{Image, Order, utf16};
use crate::case::{Case, Content, Due, Group, field};
use crate::names::Surroundings;
use Due::{Anything, Confinement, Contents, Refusal, Strictness};

const DYNAMIC: usize = 512;
const BAT: usize = 1536;
const BLOCK: usize = 2048;
/// Behind a bitmap of one sector and a block of 512 KiB.
const END: usize = BLOCK + 512 + (512 << 10);

fn footer(kind: u32) -> Image {
    let image =
        Image::new().put(0, b"conectix").be32(8, 2).be32(12, 0x1_0000).be64(16, DYNAMIC as u64).put(28, b"qem2");
    let image = image.be32(32, 0x5_0003).put(36, b"Wi2k").be64(40, 1 << 20).be64(48, 1 << 20);
    image.put(56, &[0, 30, 4, 17]).be32(60, kind).put(68, &[7; 16]).with_len(512)
}

/// A footer with its sum, at both ends of a file.
fn both_ends(head: Image, body: Image) -> Image {
    let head = summed(head, 0, 512, 64);
    let head = head.part(0, 512);
    body.put(0, &head).put(END, &head)
}

fn summed(image: Image, at: usize, len: usize, field: usize) -> Image {
    let image = image.be32(at + field, 0);
    let sum: u32 = image.part(at, len).into_iter().map(u32::from).sum();
    image.be32(at + field, !sum)
}

/// A disk of 1 MiB with the first of its blocks of 512 KiB.
fn body() -> Image {
    let image = Image::new().put(DYNAMIC, b"cxsparse").be64(DYNAMIC + 8, u64::MAX).be64(DYNAMIC + 16, BAT as u64);
    let image = image.be32(DYNAMIC + 24, 0x1_0000).be32(DYNAMIC + 28, 2).be32(DYNAMIC + 32, 512 << 10);
    let image = image.put(BAT, &[0xff; 512]).be32(BAT, BLOCK as u32 / 512).put(BLOCK, &[0xff; 512]);
    image.put(BLOCK + 512, &[0x42; 4096]).with_len(END as u64)
}

fn summed_body(body: Image) -> Image {
    summed(body, DYNAMIC, 1024, 36)
}

fn base() -> Image {
    both_ends(footer(3), summed_body(body()))
}

/// The footer with another field, at both ends.
fn fix_footer(image: Image) -> Image {
    let head = Image::new().put(0, &image.part(0, 512));
    both_ends(head, image)
}

fn differencing(code: &[u8; 4], path: &[u8], name: &str) -> Image {
    let body = body().put(DYNAMIC + 64, &utf16(name, Order::Big)).put(DYNAMIC + 40, &[9; 16]).be32(BAT, u32::MAX);
    let at = DYNAMIC + 576;
    let place = END + 512;
    let body = body.put(at, code).be32(at + 4, 2048).be32(at + 8, path.len() as u32).be64(at + 16, place as u64);
    let body = summed_body(body).put(place, path).with_len(place as u64 + 2048);
    let tail = summed(footer(4), 0, 512, 64);
    body.put(0, &tail.bytes()).put(place + 2048, &tail.bytes())
}

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>, around: &Surroundings) {
    let mut group = Group::new(cases, "vpc", "image.vhd");
    const MAX32: u64 = u32::MAX as u64;
    const MAX64: u64 = u64::MAX;
    group.fields(
        &base(),
        Order::Big,
        fix_footer,
        &[
            field("features", 8, 4, &[(MAX32, Anything)]),
            field("version", 12, 4, &[(0, Anything), (MAX32, Anything)]),
            field(
                "data_offset",
                16,
                8,
                &[(0, Refusal), (1, Refusal), (1 << 40, Refusal), (1 << 63, Refusal), (MAX64, Refusal)],
            ),
            field("current_size", 48, 8, &[(0, Anything), (1 << 50, Anything), (1 << 63, Anything), (MAX64, Anything)]),
            field("geometry", 56, 4, &[(0, Anything), (MAX32, Anything), (0x0001_0000, Anything)]),
            field(
                "type",
                60,
                4,
                &[(0, Strictness), (1, Strictness), (4, Strictness), (9, Strictness), (MAX32, Strictness)],
            ),
        ],
    );
    group.fields(
        &base(),
        Order::Big,
        |image| fix_footer(summed_body(image)),
        &[
            field(
                "table_offset",
                DYNAMIC + 16,
                8,
                &[(0, Anything), (1 << 40, Refusal), (1 << 62, Refusal), (MAX64, Refusal)],
            ),
            field("header_version", DYNAMIC + 24, 4, &[(0, Anything), (MAX32, Anything)]),
            field(
                "max_table_entries",
                DYNAMIC + 28,
                4,
                &[(0, Refusal), (1, Refusal), (1 << 20, Anything), (1 << 31, Refusal), (MAX32, Refusal)],
            ),
            field(
                "block_size",
                DYNAMIC + 32,
                4,
                &[
                    (0, Refusal),
                    (1, Refusal),
                    (511, Refusal),
                    (512, Anything),
                    (1 << 31, Anything),
                    (MAX32, Refusal),
                    ((512 << 10) + 512, Refusal),
                ],
            ),
        ],
    );
    group.add("sum/footer", base().be32(64, 7).be32(END + 64, 7), Anything);
    group.add("sum/dynamic-header", both_ends(footer(3), summed_body(body()).be32(DYNAMIC + 36, 7)), Anything);
    group.add("cookie/dynamic-header", both_ends(footer(3), summed_body(body().put(DYNAMIC, b"cxspars\0"))), Refusal);
    group.add("cookie/first-footer-only", summed_body(body()).put(0, &summed(footer(3), 0, 512, 64).bytes()), Anything);
    for (name, entry, due) in [
        ("far", 0xffff_fffe, Anything),
        ("footer", 0, Anything),
        ("header", 1, Anything),
        ("itself", BAT as u32 / 512, Anything),
    ] {
        group.add(format!("bat/{name}"), base().be32(BAT, entry), due);
    }
    group.add("bat/two-share-a-block", base().be32(BAT + 4, BLOCK as u32 / 512), Contents);
    let huge = both_ends(
        footer(3).be64(40, 2 << 40).be64(48, 2 << 40).put(56, &[0xff, 0xff, 16, 255]),
        summed_body(body().be32(DYNAMIC + 28, 4 << 20).be64(DYNAMIC + 16, 1 << 20)),
    );
    group.add("both/two-tebibytes", huge, Anything);
    let fixed = |image: Image, len: u64| {
        let tail = summed(image, 0, 512, 64);
        Image::new().put(0, &[0x42; 4096]).put(len as usize, &tail.bytes())
    };
    group.add("fixed/longer-than-the-file", fixed(footer(2).be64(16, u64::MAX).be64(48, 1 << 40), 1 << 20), Anything);
    group.add("fixed/shorter-than-the-file", fixed(footer(2).be64(16, u64::MAX).be64(48, 512), 1 << 20), Anything);
    group.truncations(&base(), 512, &[8, 64, 511, 512, 1000, 1536, 1540, 2048, 100_000, END as u64, END as u64 + 511]);
    let wide = |name: &[u8], order| utf16(&String::from_utf8_lossy(name), order);
    names(&mut group, around, "relative", "image.vhd", 240, Confinement, &|name| {
        differencing(b"W2ru", &wide(name, Order::Little), "parent.vhd")
    });
    names(&mut group, around, "absolute", "image.vhd", 240, Confinement, &|name| {
        differencing(b"W2ku", &wide(name, Order::Little), "parent.vhd")
    });
    names(&mut group, around, "mac", "image.vhd", 240, Confinement, &|name| {
        differencing(b"MacX", &[b"file://", name].concat(), "")
    });
    names(&mut group, around, "unicode-name", "image.vhd", 240, Confinement, &|name| {
        differencing(&[0; 4], &[], &String::from_utf8_lossy(name))
    });
    for (name, len, offset) in [
        ("long", u32::MAX, END as u64 + 512),
        ("far", 100, 1 << 62),
        ("wraps", 100, u64::MAX - 10),
        ("odd", 7, END as u64 + 512),
        ("empty", 0, 0),
    ] {
        let image = differencing(b"W2ru", &wide(b"base", Order::Little), "parent.vhd");
        let image = summed_body(image.be32(DYNAMIC + 576 + 8, len).be64(DYNAMIC + 576 + 16, offset));
        group.add(format!("locator/{name}"), image, Anything).without_qemu();
    }
    let case = group.add(
        "parent/itself",
        differencing(b"W2ru", &wide(b".\\image.vhd", Order::Little), "image.vhd"),
        Confinement,
    );
    case.without_qemu();
    let case = group.add("parent/not-the-one", differencing(b"W2ru", &wide(b"b", Order::Little), "b"), Due::Unreadable);
    case.beside("b", Content::Bytes(base())).without_qemu();
}
