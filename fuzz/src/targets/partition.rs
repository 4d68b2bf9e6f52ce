//! Raw images and their partition tables.

use instar_blockio::{BlockMapExt, BlockRead, MemBlock};
use instar_raw::{Image, SECTOR, partition};

/// The bytes are a file.
pub fn run(data: &[u8]) {
    let image = Image::open(MemBlock::from(data.to_vec())).expect("any file is a raw image");
    assert!(image.size().is_multiple_of(SECTOR) && image.size() - (data.len() as u64) < SECTOR);
    let found = partition::find(&image).expect("memory does not fail");
    // Zeros behind the end of the file change nothing.
    let mut longer = data.to_vec();
    longer.resize(image.size() as usize, 0);
    assert_eq!(partition::find_in(&longer, image.size()), found);

    let mut end = 0;
    for extent in image.extents(0..image.size()) {
        let extent = extent.expect("memory does not fail");
        assert_eq!(extent.offset, end);
        end = extent.end();
    }
    assert_eq!(end, image.size());
}

/// An MBR, and a GPT with a good checksum.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut mbr = vec![0; 8192];
    mbr[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 9, 0, 1, 0, 0, 0, 8, 0, 0, 0]);
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);

    let mut gpt = vec![0; 8192];
    gpt[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    gpt[510..512].copy_from_slice(&[0x55, 0xaa]);
    gpt[512..524].copy_from_slice(b"EFI PART\0\0\x01\0");
    for (at, number) in [(12, 92u32), (24, 1), (32, 15), (40, 4), (48, 12), (72, 2), (80, 4), (84, 128)] {
        gpt[512 + at..][..4].copy_from_slice(&number.to_le_bytes());
    }
    let sum = crc32(&gpt[512..604]);
    gpt[528..532].copy_from_slice(&sum.to_le_bytes());
    assert!(partition::find_in(&gpt, 8192).is_some(), "the seed is a GPT");
    vec![mbr, gpt, vec![0; 700]]
}

fn crc32(bytes: &[u8]) -> u32 {
    let bit = |sum: u32, _| (sum >> 1) ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 };
    !bytes.iter().fold(!0, |sum, &byte| (0..8).fold(sum ^ u32::from(byte), bit))
}
