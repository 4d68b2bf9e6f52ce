//! Apple disk images.

use miniz_oxide::deflate::compress_to_vec_zlib;

use crate::bytes::{Image, Order, base64};
use crate::case::{Case, Due, Group, field};
use Due::{Anything, Refusal, Unreadable};

const MAX32: u64 = u32::MAX as u64;
const MAX64: u64 = u64::MAX;
const TRAILER: usize = 65_536;

/// A chunk of the block list: kind, sector, sectors, place, length.
type Chunk = (u32, u64, u64, u64, u64);

fn blocks(chunks: &[Chunk], count: u32) -> Vec<u8> {
    let mut table = Image::new().put(0, b"mish").be32(4, 1).be64(16, 8).be32(200, count);
    for (n, (kind, sector, sectors, place, len)) in chunks.iter().enumerate() {
        let at = 204 + 40 * n;
        table = table
            .be32(at, *kind)
            .be64(at + 8, *sector)
            .be64(at + 16, *sectors)
            .be64(at + 24, *place)
            .be64(at + 32, *len);
    }
    table.bytes()
}

fn plist(data: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?><plist version=\"1.0\"><dict><key>resource-fork</key><dict><key>blkx</key><array><dict>\
         <key>Attributes</key><string>0x0050</string><key>Data</key><data>{data}</data></dict></array></dict></dict></plist>"
    )
}

/// Data at 0, the list of blocks at 32 KiB, the trailer at 64 KiB.
fn image(data: &[u8], text: &[u8]) -> Image {
    let image =
        Image::new().put(0, data).put(32_768, text).put(TRAILER, b"koly").be32(TRAILER + 4, 4).be32(TRAILER + 8, 512);
    let image = image.be64(TRAILER + 32, 32_768).be32(TRAILER + 56, 1).be32(TRAILER + 60, 1);
    image
        .be64(TRAILER + 216, 32_768)
        .be64(TRAILER + 224, text.len() as u64)
        .be64(TRAILER + 492, 8)
        .with_len(TRAILER as u64 + 512)
}

fn with_chunks(data: &[u8], chunks: &[Chunk], count: u32) -> Image {
    image(data, plist(&base64(&blocks(chunks, count))).as_bytes())
}

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>) {
    let mut group = Group::new(cases, "dmg", "image.dmg");
    let stream = compress_to_vec_zlib(&[0x42; 4096], 9);
    let end: Chunk = (0xffff_ffff, 8, 0, 0, 0);
    let zlib = |place, len| [(0x8000_0005, 0, 8, place, len), end];
    let base = with_chunks(&stream, &zlib(0, stream.len() as u64), 2);
    group.fields(
        &base,
        Order::Big,
        |image| image,
        &[
            field("version", TRAILER + 4, 4, &[(0, Anything), (MAX32, Anything)]),
            field("data_fork_offset", TRAILER + 24, 8, &[(1 << 40, Anything), (1 << 63, Refusal), (MAX64, Refusal)]),
            field("data_fork_length", TRAILER + 32, 8, &[(0, Anything), (1 << 63, Anything), (MAX64, Anything)]),
            field("resource_offset", TRAILER + 40, 8, &[(1, Anything), (1 << 62, Anything), (MAX64, Anything)]),
            field("resource_length", TRAILER + 48, 8, &[(1, Anything), (1 << 62, Refusal), (MAX64, Refusal)]),
            field(
                "xml_offset",
                TRAILER + 216,
                8,
                &[(0, Anything), (1 << 40, Refusal), (1 << 63, Refusal), (MAX64, Refusal)],
            ),
            field(
                "xml_length",
                TRAILER + 224,
                8,
                &[(0, Refusal), (1, Unreadable), (1 << 25, Refusal), (1 << 63, Refusal), (MAX64, Refusal)],
            ),
            field(
                "sectors",
                TRAILER + 492,
                8,
                &[(0, Anything), (1, Anything), (1 << 55, Anything), (1 << 63, Anything), (MAX64, Anything)],
            ),
        ],
    );
    let len = stream.len() as u64;
    for (name, chunks, count) in [
        ("count-max", zlib(0, len).to_vec(), u32::MAX),
        ("count-0", zlib(0, len).to_vec(), 0),
        ("count-too-high", zlib(0, len).to_vec(), 100_000),
        ("place-far", zlib(1 << 62, len).to_vec(), 2),
        ("length-max", zlib(0, u64::MAX).to_vec(), 2),
        ("length-2-gib", zlib(0, 2 << 30).to_vec(), 2),
        ("sectors-max", vec![(0x8000_0005, 0, u64::MAX, 0, len), end], 2),
        ("sectors-1-gib", vec![(0x8000_0005, 0, 1 << 21, 0, len), end], 2),
        ("sector-far", vec![(0x8000_0005, 1 << 62, 8, 0, len), end], 2),
        ("overlap", vec![(0x8000_0005, 0, 8, 0, len), (1, 4, 8, 0, 4096), end], 3),
        ("backwards", vec![(1, 4, 4, 0, 2048), (1, 0, 4, 0, 2048), end], 3),
        ("gap", vec![(1, 0, 1, 0, 512), (1, 7, 1, 0, 512), end], 3),
        ("zero-max", vec![(0, 0, u64::MAX, 0, 0), end], 2),
        ("ignored-huge", vec![(2, 0, 1 << 50, 0, 0), end], 2),
        ("unknown-kind", vec![(0x1234, 0, 8, 0, len), end], 2),
        ("no-end", vec![(0x8000_0005, 0, 8, 0, len)], 1),
        ("noise-as-bzip2", vec![(0x8000_0006, 0, 8, 0, len), end], 2),
        ("noise-as-lzfse", vec![(0x8000_0007, 0, 8, 0, len), end], 2),
        ("noise-as-adc", vec![(0x8000_0004, 0, 8, 0, len), end], 2),
        ("noise-as-xz", vec![(0x8000_0008, 0, 8, 0, len), end], 2),
    ] {
        group.add(format!("chunk/{name}"), with_chunks(&stream, &chunks, count), Anything).without_qemu();
    }
    let bomb = compress_to_vec_zlib(&vec![0; 16 << 20], 9);
    group.add("chunk/bomb", with_chunks(&bomb, &zlib(0, bomb.len() as u64), 2), Anything);
    group.add("xml/no-base64", image(&stream, plist("!!!!\x1b[31m").as_bytes()), Unreadable);
    group.add("xml/empty-data", image(&stream, plist("").as_bytes()), Anything);
    group.add("xml/open-tag", image(&stream, b"<?xml version=\"1.0\"?><plist><dict><key>blkx</key><data>"), Refusal);
    group.add("xml/nested", image(&stream, "<dict>".repeat(5000).as_bytes()), Unreadable);
    let many = format!("<data>{}</data>", base64(&blocks(&zlib(0, len), 2))).repeat(30);
    group.add("xml/thirty-tables", image(&stream, many.as_bytes()), Anything);
    group.truncations(&base, TRAILER as u64, &[512, 32_768, 65_535, 65_536, 66_047]);
}
