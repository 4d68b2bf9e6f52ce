//! VDI.

use crate::bytes::{Image, Order};
use crate::case::{Case, Due, Group, field};
use Due::{Anything, Contents, Refusal};

const MAP: usize = 512;
const DATA: usize = 1024;

/// A disk of 2 MiB with the first of its blocks of 1 MiB.
fn base() -> Image {
    let image =
        Image::new().put(0, b"<<< Oracle VM VirtualBox Disk Image >>>\n").le32(64, 0xbeda_107f).le32(68, 0x1_0001);
    let image = image.le32(72, 400).le32(76, 1).le32(340, MAP as u32).le32(344, DATA as u32).le32(360, 512);
    let image =
        image.le64(368, 2 << 20).le32(376, 1 << 20).le32(384, 2).le32(388, 1).put(392, &[1; 16]).put(408, &[2; 16]);
    image.le32(MAP, 0).le32(MAP + 4, u32::MAX).put(DATA, &[0x42; 4096]).with_len(DATA as u64 + (1 << 20))
}

/// Adds the cases.
pub fn add(cases: &mut Vec<Case>) {
    let mut group = Group::new(cases, "vdi", "image.vdi");
    const MAX32: u64 = u32::MAX as u64;
    const MAX64: u64 = u64::MAX;
    group.fields(
        &base(),
        Order::Little,
        |image| image,
        &[
            field("signature", 64, 4, &[(0, Refusal)]),
            field("version", 68, 4, &[(0, Refusal), (MAX32, Refusal)]),
            field("header_size", 72, 4, &[(0, Anything), (MAX32, Anything)]),
            field(
                "image_type",
                76,
                4,
                &[(0, Anything), (2, Contents), (3, Anything), (4, Anything), (MAX32, Anything)],
            ),
            field(
                "offset_bmap",
                340,
                4,
                &[
                    (0, Anything),
                    (1, Refusal),
                    (513, Refusal),
                    (1 << 31, Anything),
                    (MAX32 & !511, Anything),
                    (MAX32, Refusal),
                ],
            ),
            field("offset_data", 344, 4, &[(0, Anything), (1, Refusal), (MAX32 & !511, Anything), (MAX32, Refusal)]),
            field("sector_size", 360, 4, &[(0, Refusal), (511, Refusal), (4096, Refusal), (MAX32, Refusal)]),
            field(
                "disk_size",
                368,
                8,
                &[
                    (0, Anything),
                    (1, Anything),
                    (3 << 20, Refusal),
                    (1 << 60, Refusal),
                    (1 << 63, Refusal),
                    (MAX64, Refusal),
                ],
            ),
            field(
                "block_size",
                376,
                4,
                &[(0, Refusal), (1, Refusal), (512, Refusal), (2 << 20, Refusal), (MAX32, Refusal)],
            ),
            field("block_extra", 380, 4, &[(1, Anything), (MAX32, Anything)]),
            field(
                "blocks_in_image",
                384,
                4,
                &[
                    (0, Refusal),
                    (1, Refusal),
                    (1 << 28, Anything),
                    (0x1fff_ff80, Anything),
                    (0x2000_0000, Refusal),
                    (MAX32, Refusal),
                ],
            ),
            field("blocks_allocated", 388, 4, &[(0, Anything), (3, Anything), (MAX32, Anything)]),
            field("uuid_link", 424, 8, &[(1, Refusal)]),
            field("uuid_parent", 440, 8, &[(1, Refusal)]),
        ],
    );
    for (name, entry) in [("far", 0x7fff_ffff), ("just-past", 1), ("reserved", 0xffff_fffd), ("zero-mark", 0xffff_fffe)]
    {
        group.add(format!("map/{name}"), base().le32(MAP, entry), Anything);
    }
    group.add("map/two-share-a-block", base().le32(MAP + 4, 0), Contents);
    let huge = base().le64(368, 64 << 40).le32(384, 64 << 20);
    group.add("both/64-tebibytes", huge.with_len(4 << 30), Anything).endless();
    group.add("both/escape-in-description", base().put(84, b"\x1b[31m\x07").put(0, b"<<< \x1b[31m >>>\n"), Anything);
    group.truncations(&base(), 100, &[40, 64, 72, 400, 511, 512, 516, 1024, 5000]);
}
