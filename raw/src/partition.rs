//! Partition tables: MBR (UEFI 2.10, chapter 5.2) and GPT (chapter 5.3).
//!
//! ```text
//!   LBA 0   446 bytes boot code, 4 entries of 16 bytes, 55 aa      MBR; protective with a GPT
//!   LBA 1   "EFI PART" header, CRC-32 over itself                  GPT
//! ```
//!
//! The tests are those that tell a table from chance: marks, flags, checksum and plain sanity.
//! Partitions are not read, and neither is the copy of the GPT at the end.

use instar_blockio::{BlockRead, Result};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::crc32::crc32;

/// Bytes at the start of a disk in which a table shows: LBA 0 and 1 of the largest sectors (4096).
pub const HEAD_LEN: usize = 8192;

const SECTOR_SIZES: [u32; 2] = [512, 4096];
const BOOT_MARK: [u8; 2] = [0x55, 0xaa];
/// Partition type of the protective entry.
const TYPE_GPT: u8 = 0xee;
const GPT_MARK: [u8; 8] = *b"EFI PART";
const GPT_REVISION: u32 = 0x0001_0000;

/// A partition table that was recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PartitionTable {
    /// DOS partition table.
    Mbr(Mbr),
    /// GUID partition table.
    Gpt(Gpt),
}

/// A DOS partition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mbr {
    /// Entries in use, 1 to 4; logical partitions are not counted.
    pub partition_count: u8,
}

/// A GUID partition table with a good header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpt {
    /// Logical sector size, bytes: 512 or 4096.
    pub sector_size: u32,
    /// The MBR is protective as the specification has it: one entry, for the whole disk. Otherwise other
    /// entries stand beside it (a hybrid MBR), and two readers may see two different disks.
    pub protective: bool,
}

/// One of the four entries of an MBR.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct MbrEntry {
    boot_flag: u8,
    start_chs: [u8; 3],
    kind: u8,
    end_chs: [u8; 3],
    start_lba: U32,
    sector_count: U32,
}

/// LBA 0.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MbrSector {
    boot_code: [u8; 446],
    entries: [MbrEntry; 4],
    mark: [u8; 2],
}

/// The beginning of LBA 1; the header's length field says how much more there is.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GptHeader {
    mark: [u8; 8],
    revision: U32,
    header_len: U32,
    header_crc: U32,
    reserved: U32,
    own_lba: U64,
    copy_lba: U64,
    first_usable_lba: U64,
    last_usable_lba: U64,
    disk_guid: [u8; 16],
    entries_lba: U64,
    entry_count: U32,
    entry_len: U32,
    entries_crc: U32,
}

const _: () = assert!(size_of::<MbrSector>() == 512 && size_of::<GptHeader>() == 92);

/// Looks for a partition table on a disk.
///
/// Reads at most [`HEAD_LEN`] bytes. Whatever they hold, the answer is a table or `None`.
///
/// # Errors
/// The disk's error.
pub fn find(disk: &impl BlockRead) -> Result<Option<PartitionTable>> {
    let mut head = [0; HEAD_LEN];
    let len = disk.size().min(HEAD_LEN as u64) as usize;
    disk.read_at(0, &mut head[..len])?;
    Ok(find_in(&head[..len], disk.size()))
}

/// Looks for a partition table in the first bytes of a disk of `disk_len` bytes; [`HEAD_LEN`] of them are
/// enough, and with fewer a table may be missed.
pub fn find_in(head: &[u8], disk_len: u64) -> Option<PartitionTable> {
    let (mbr, _) = MbrSector::ref_from_prefix(head).ok()?;
    if mbr.mark != BOOT_MARK || mbr.entries.iter().any(|entry| !matches!(entry.boot_flag, 0 | 0x80)) {
        return None;
    }
    if mbr.used().any(|entry| entry.kind == TYPE_GPT) {
        let sector_size = SECTOR_SIZES.into_iter().find(|&size| is_gpt(head, size))?;
        return Some(PartitionTable::Gpt(Gpt { sector_size, protective: mbr.is_protective() }));
    }
    let partition_count = mbr.used().count() as u8;
    let plausible = partition_count > 0 && mbr.used().all(|entry| entry.is_plausible(disk_len));
    plausible.then_some(PartitionTable::Mbr(Mbr { partition_count }))
}

impl MbrSector {
    fn used(&self) -> impl Iterator<Item = &MbrEntry> {
        self.entries.iter().filter(|entry| entry.kind != 0)
    }

    /// UEFI 5.2.3: one entry, from LBA 1, not bootable. (The end is told in several ways by real tools.)
    fn is_protective(&self) -> bool {
        let [first, rest @ ..] = &self.entries;
        first.kind == TYPE_GPT
            && first.boot_flag == 0
            && first.start_chs == [0, 2, 0]
            && first.start_lba.get() == 1
            && rest.iter().all(|entry| entry.as_bytes().iter().all(|&byte| byte == 0))
    }
}

impl MbrEntry {
    /// Sectors counted as 512 bytes, the smallest there are: no good entry is refused.
    fn is_plausible(&self, disk_len: u64) -> bool {
        let start = u64::from(self.start_lba.get());
        self.sector_count.get() > 0 && start > 0 && start * 512 < disk_len
    }
}

fn is_gpt(head: &[u8], sector_size: u32) -> bool {
    let at = sector_size as usize;
    let Some(sector) = head.get(at..at.saturating_mul(2)) else { return false };
    let Ok((header, _)) = GptHeader::ref_from_prefix(sector) else { return false };
    header.mark == GPT_MARK && header.is_sane() && header.crc_is_good(sector)
}

impl GptHeader {
    fn is_sane(&self) -> bool {
        // Entries of 128, 256, 512, … bytes.
        let entry_len = self.entry_len.get();
        self.revision.get() == GPT_REVISION
            && self.reserved.get() == 0
            && self.own_lba.get() == 1
            && self.entries_lba.get() >= 2
            && self.first_usable_lba.get() <= self.last_usable_lba.get()
            && self.entry_count.get() > 0
            && entry_len >= 128
            && entry_len.is_power_of_two()
    }

    /// The checksum covers `header_len` bytes, its own field taken as zero.
    fn crc_is_good(&self, sector: &[u8]) -> bool {
        let len = self.header_len.get() as usize;
        let Some(rest) = sector.get(20..len) else { return false };
        len >= size_of::<Self>() && crc32([&sector[..16], &[0; 4], rest]) == self.header_crc.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_blockio::test::{Faulty, Op};
    use instar_blockio::{ErrorKind, MemBlock};
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    const DISK_LEN: u64 = 10 << 20;

    fn disk() -> Vec<u8> {
        let mut head = vec![0; HEAD_LEN];
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        head
    }

    fn put_entry(head: &mut [u8], index: usize, boot_flag: u8, kind: u8, start: u32, count: u32) {
        let entry = &mut head[446 + 16 * index..][..16];
        entry[0] = boot_flag;
        entry[1..4].copy_from_slice(&[0, 2, 0]); // CHS of LBA 1
        entry[4] = kind;
        entry[5..8].copy_from_slice(&[0xff; 3]);
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..].copy_from_slice(&count.to_le_bytes());
    }

    fn put_gpt(head: &mut [u8], sector_size: usize) {
        put_entry(head, 0, 0, 0xee, 1, u32::MAX);
        let header = &mut head[sector_size..][..92];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&[0, 0, 1, 0]); // revision 1.0
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        header[24..32].copy_from_slice(&1u64.to_le_bytes()); // own LBA
        header[32..40].copy_from_slice(&20479u64.to_le_bytes()); // LBA of the copy
        header[40..48].copy_from_slice(&34u64.to_le_bytes()); // first usable
        header[48..56].copy_from_slice(&20446u64.to_le_bytes()); // last usable
        header[72..80].copy_from_slice(&2u64.to_le_bytes()); // entries
        header[80..84].copy_from_slice(&128u32.to_le_bytes()); // their number
        header[84..88].copy_from_slice(&128u32.to_le_bytes()); // their length
        seal(head, sector_size);
    }

    /// Bit by bit, unlike the code under test.
    fn seal(head: &mut [u8], sector_size: usize) {
        let len = u32::from_le_bytes(head[sector_size + 12..][..4].try_into().unwrap()) as usize;
        head[sector_size + 16..][..4].fill(0);
        let mut sum = u32::MAX;
        for &byte in &head[sector_size..][..len] {
            sum ^= u32::from(byte);
            for _ in 0..8 {
                sum = if sum & 1 == 1 { (sum >> 1) ^ 0xedb8_8320 } else { sum >> 1 };
            }
        }
        head[sector_size + 16..][..4].copy_from_slice(&(!sum).to_le_bytes());
    }

    fn mbr(partition_count: u8) -> Option<PartitionTable> {
        Some(PartitionTable::Mbr(Mbr { partition_count }))
    }

    fn gpt(sector_size: u32, protective: bool) -> Option<PartitionTable> {
        Some(PartitionTable::Gpt(Gpt { sector_size, protective }))
    }

    #[test]
    fn a_dos_table_needs_mark_flags_and_one_entry() {
        let mut head = disk();
        assert_eq!(find_in(&head, DISK_LEN), None, "no entry");
        put_entry(&mut head, 0, 0x80, 0x83, 2048, 100);
        put_entry(&mut head, 2, 0, 0x82, 4096, 100);
        assert_eq!(find_in(&head, DISK_LEN), mbr(2));
        assert_eq!(find_in(&head[..512], DISK_LEN), mbr(2));
        assert_eq!(find_in(&head[..511], DISK_LEN), None);

        let without = |at: usize, byte: u8| {
            let mut head = head.clone();
            head[at] = byte;
            find_in(&head, DISK_LEN)
        };
        assert_eq!(without(510, 0), None, "mark");
        assert_eq!(without(446, 0x7f), None, "flag of a used entry");
        assert_eq!(without(446 + 16, 1), None, "flag of an unused entry");
        assert_eq!(without(446 + 4, 0), mbr(1));
        assert_eq!(without(446 + 12, 0), None, "no sectors");
        assert_eq!(without(446 + 11, 1), None, "begins behind the disk");
        assert_eq!(without(446 + 9, 0), None, "begins at sector 0");
    }

    #[test]
    fn a_guid_table_for_both_sector_sizes() {
        for size in [512, 4096] {
            let mut head = disk();
            put_gpt(&mut head, size);
            assert_eq!(find_in(&head, DISK_LEN), gpt(size as u32, true));
            assert_eq!(find_in(&head[..2 * size], DISK_LEN), gpt(size as u32, true));
            assert_eq!(find_in(&head[..2 * size - 1], DISK_LEN), None);
            let table = find(&MemBlock::from(head)).unwrap();
            assert_eq!(table, gpt(size as u32, true));
        }
    }

    #[test]
    fn every_bit_of_the_header_counts() {
        let mut head = disk();
        put_gpt(&mut head, 512);
        for bit in 0..92 * 8 {
            let mut head = head.clone();
            head[512 + bit / 8] ^= 1 << (bit % 8);
            assert_eq!(find_in(&head, DISK_LEN), None, "bit {bit}");
        }
    }

    #[test]
    fn a_good_checksum_does_not_excuse_bad_fields() {
        let bad = |at: usize, bytes: &[u8]| {
            let mut head = disk();
            put_gpt(&mut head, 512);
            head[512 + at..][..bytes.len()].copy_from_slice(bytes);
            seal(&mut head, 512);
            assert_eq!(find_in(&head, DISK_LEN), None, "field at {at}");
        };
        bad(8, &[1]); // revision
        bad(12, &91u32.to_le_bytes()); // header length below
        bad(20, &[1]); // reserved
        bad(24, &[2]); // own LBA
        bad(40, &u64::MAX.to_le_bytes()); // first usable above the last
        bad(72, &[1]); // entries in the header
        bad(80, &[0; 4]); // no entries
        bad(84, &129u32.to_le_bytes()); // entry length
        bad(84, &64u32.to_le_bytes());
    }

    #[test]
    fn a_header_may_be_as_long_as_the_sector_and_no_longer() {
        let mut head = disk();
        put_gpt(&mut head, 512);
        head[1023] = 9;
        head[512 + 12..][..4].copy_from_slice(&512u32.to_le_bytes());
        seal(&mut head, 512);
        assert_eq!(find_in(&head, DISK_LEN), gpt(512, true));
        for len in [513, u32::MAX] {
            head[512 + 12..][..4].copy_from_slice(&len.to_le_bytes());
            assert_eq!(find_in(&head, DISK_LEN), None);
        }
    }

    #[test]
    fn a_hybrid_or_lonely_protective_entry() {
        let mut head = disk();
        put_gpt(&mut head, 512);
        put_entry(&mut head, 1, 0x80, 0x0c, 2048, 10);
        assert_eq!(find_in(&head, DISK_LEN), gpt(512, false));
        head[512] = 0;
        assert_eq!(find_in(&head, DISK_LEN), None, "a protective entry that protects nothing");
        let mut head = disk();
        put_gpt(&mut head, 512);
        head[446..510].fill(0);
        put_entry(&mut head, 0, 0, 0x83, 2048, 10);
        assert_eq!(find_in(&head, DISK_LEN), mbr(1), "without a protective entry the MBR is what counts");
    }

    #[test]
    fn short_disks_and_failing_ones() {
        for len in [0, 1, 511, 512, 600] {
            assert_eq!(find(&MemBlock::zeroed(len)).unwrap(), None);
        }
        let (disk, faults) = Faulty::new(MemBlock::zeroed(9000));
        faults.fail_nth(Op::Read, 0, ErrorKind::Io);
        assert_eq!(find(&disk).unwrap_err().kind(), ErrorKind::Io);
    }

    proptest! {
        #[test]
        fn any_bytes_get_an_answer(
            mut head in proptest::collection::vec(any::<u8>(), 0..HEAD_LEN),
            mark in any::<bool>(),
            disk_len in any::<u64>(),
        ) {
            if mark && head.len() > 600 {
                head[446..510].fill(0);
                head[450] = 0xee;
                head[510..520].copy_from_slice(b"\x55\xaaEFI PART");
            }
            let table = find_in(&head, disk_len);
            prop_assert!(!matches!(table, Some(PartitionTable::Gpt(_))), "by chance: {table:?}");
        }
    }
}
