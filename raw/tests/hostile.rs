//! Damaged partition tables and devices: an answer or an error, never a panic, and the disk is what the device holds.

use instar_blockio::{BlockMapExt, BlockRead, MemBlock};
use instar_raw::{Image, SECTOR, partition};
use proptest::prelude::*;

/// CRC-32 as in ISO 3309, bit by bit (UEFI specification 2.10, 4.2).
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 })
    })
}

/// Puts the right checksum into the header of a GUID partition table in the second sector of so many bytes.
fn seal(disk: &mut [u8], sector: usize) {
    let Some(header) = disk.get_mut(sector..sector + 92) else { return };
    header[16..20].fill(0);
    let sum = crc32(header);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
}

/// A disk with a protective MBR and a GUID partition table, as the UEFI specification draws them (5.2.3 and 5.3.2).
fn disk() -> Vec<u8> {
    let mut disk = vec![0; 64 << 10];
    let last = (disk.len() as u64 / 512) - 1;
    disk[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 127, 0, 0, 0]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[520..528].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
    for (at, value) in [(24, 1), (32, last), (40, 34), (48, last - 33), (72, 2)] {
        disk[512 + at..512 + at + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    disk[592..600].copy_from_slice(&[128, 0, 0, 0, 128, 0, 0, 0]); // entries, bytes of each
    seal(&mut disk, 512);
    disk
}

#[test]
fn the_sample_is_a_guid_table() {
    let found = partition::find(&MemBlock::from(disk())).unwrap();
    assert!(matches!(found, Some(partition::PartitionTable::Gpt(_))), "{found:?}");
}

/// Values that fields are set to.
const EXTREMES: [u64; 8] = [0, 1, 0xffff_ffff, u64::MAX, 1 << 63, 1 << 31, 511, i64::MAX as u64];

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_survived(
        edits in proptest::collection::vec((prop_oneof![400usize..700, 0usize..65_000], 0usize..8, 1usize..9), 0..6),
        flips in proptest::collection::vec((400usize..700, 0u8..8), 0..4),
        cut in proptest::option::of(0usize..66_000),
        splice in proptest::option::of((0usize..60_000, 0usize..60_000, 1usize..1024)),
        sealed in any::<bool>(),
    ) {
        let mut bytes = disk();
        for (at, value, len) in edits {
            let value = EXTREMES[value].to_le_bytes();
            let len = len.min(8);
            bytes[at..at + len].copy_from_slice(&value[..len]);
        }
        for (at, bit) in flips {
            bytes[at] ^= 1 << bit;
        }
        if let Some((from, to, len)) = splice {
            bytes.copy_within(from..from + len, to);
        }
        if sealed {
            seal(&mut bytes, 512);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        let device = MemBlock::from(bytes.clone());
        prop_assert_eq!(partition::find(&device)?, partition::find_in(&bytes, bytes.len() as u64));
        let _ = partition::find_in(&bytes, u64::MAX);

        let image = Image::open(device)?;
        prop_assert_eq!(image.size(), (bytes.len() as u64).next_multiple_of(SECTOR));
        let mut at = 0;
        for extent in image.extents(0..image.size()) {
            let extent = extent?;
            prop_assert!(extent.offset == at && extent.len > 0);
            at = extent.end();
        }
        prop_assert_eq!(at, image.size());
        let mut read = vec![0xff; at as usize];
        image.read_at(0, &mut read)?;
        bytes.resize(read.len(), 0);
        prop_assert!(read == bytes);
    }
}
