//! Differencing images, made byte by byte, and one that Hyper-V made.

mod common;

use std::fs;
use std::process::Command;

use common::{Random, pattern, unpack};
use instar_blockio::file::HostFile;
use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, ExtentKind, FileId, Layer, MemBlock, Overlay};
use instar_vhdx::{CreateOptions, EntryFault, Error, Finding, Guid, Image, OpenOptions, check, crc32c, create};

const MIB: usize = 1 << 20;
const BAT: usize = 2 * MIB;
const METADATA: usize = 3 * MIB;
/// {A8D35F2D-B30B-454D-ABF7-D3D84834AB0C}
const LOCATOR_ITEM: [u8; 16] =
    [0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c];
/// {B04AEFB7-D19E-4A81-B789-25B8E9445913}
const LOCATOR_KIND: [u8; 16] =
    [0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13];

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An empty image, made differencing: flag, parent locator, a BAT with sector bitmaps.
fn child(size: u64, block_size: u64, sector_size: u32, linkage: &str) -> Vec<u8> {
    let mut disk = MemBlock::default();
    let options = CreateOptions { size, block_size, sector_size, block_state_zero: false, ..CreateOptions::default() };
    create(&mut disk, FileId(0), &options).unwrap().finish().unwrap();
    let mut file = disk.into_bytes();
    put(&mut file, METADATA + 10, &[6]);
    put(&mut file, METADATA + 65536 + 4, &[2]);
    put(&mut file, METADATA + 32 + 5 * 32, &LOCATOR_ITEM);
    let item = METADATA + 65536 + 4096;
    let mut texts = Vec::new();
    let mut entries = Vec::new();
    for (key, value) in [("parent_linkage", linkage), ("relative_path", ".\\parent.vhdx")] {
        let [key, value] = [key, value].map(|text| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>());
        let at = (20 + 24 + texts.len()) as u32;
        entries.extend(at.to_le_bytes());
        entries.extend((at + key.len() as u32).to_le_bytes());
        entries.extend((key.len() as u16).to_le_bytes());
        entries.extend((value.len() as u16).to_le_bytes());
        texts.extend(key.into_iter().chain(value));
    }
    let locator = [&LOCATOR_KIND[..], &[0, 0, 2, 0], &entries, &texts].concat();
    put(&mut file, METADATA + 32 + 5 * 32 + 16, &(65536u32 + 4096).to_le_bytes());
    put(&mut file, METADATA + 32 + 5 * 32 + 20, &(locator.len() as u32).to_le_bytes());
    put(&mut file, METADATA + 32 + 5 * 32 + 24, &[4]);
    put(&mut file, item, &locator);
    file
}

fn set_entry(file: &mut [u8], index: u64, entry: u64) {
    put(file, BAT + index as usize * 8, &entry.to_le_bytes());
}

/// Adds a block of some MiB at the end.
fn append(file: &mut Vec<u8>, bytes: &[u8], len: usize) -> u64 {
    let at = file.len();
    file.resize(at + len, 0);
    put(file, at, bytes);
    at as u64
}

const LINKAGE: &str = "{f88d4d92-6fcc-408d-9bef-9b7c89f15c89}";

/// Sectors of each block here or with the parent, at random, against a model.
#[test]
fn sector_bitmaps_say_who_answers() {
    for (seed, sector) in [(1, 512), (2, 4096), (3, 512)] {
        let mut random = Random(seed);
        let (size, block) = (6 * MIB, 2 * MIB);
        let mut file = child(size as u64, block as u64, sector as u32, LINKAGE);
        let parent = pattern(9, size);
        let mut model = parent.clone();
        let mut bitmap = vec![0xff; MIB];
        // The second block is partial, the first is the parent's, the third all here.
        let own = pattern(5, block);
        for index in 0..block / sector {
            let at = block + index * sector;
            let bit = at / sector;
            if random.below(64) < 40 && (index / 100).is_multiple_of(2) || index == 7 {
                put(&mut model, at, &own[index * sector..][..sector]);
            } else {
                bitmap[bit / 8] &= !(1 << (bit % 8));
            }
        }
        let third = pattern(6, block);
        put(&mut model, 2 * block, &third);
        let places =
            [append(&mut file, &own, block), append(&mut file, &third, block), append(&mut file, &bitmap, MIB)];
        let ratio = (8 * MIB * sector / block) as u64;
        set_entry(&mut file, 1, places[0] | 7);
        set_entry(&mut file, 2, places[1] | 6);
        set_entry(&mut file, ratio, places[2] | 6);
        let image = Image::open(MemBlock::from(file), FileId(0), &OpenOptions::default()).unwrap();
        let locator = image.parent().unwrap();
        assert_eq!(locator.names(), ["./parent.vhdx", "parent.vhdx"]);
        assert!(locator.is_parent(Guid::parse(LINKAGE).unwrap()));
        assert_eq!(check(&image, &mut |finding| panic!("{finding}")).unwrap().allocated_blocks, 2);
        let runs: Vec<_> = image.extents(0..size as u64).map(Result::unwrap).collect();
        assert_eq!((runs[0].kind, runs[0].offset), (ExtentKind::Unallocated, 0));
        assert!(runs.len() > 50, "{} runs", runs.len());
        let layers: Vec<Box<dyn Layer>> = vec![Box::new(image), Box::new(MemBlock::from(parent))];
        let overlay = Overlay::new(layers);
        let mut all = vec![0; size];
        overlay.read_at(0, &mut all).unwrap();
        assert!(all == model, "seed {seed}");
        for _ in 0..300 {
            let offset = random.below(size as u64) as usize;
            let len = (1 + random.below(3000) as usize).min(size - offset);
            overlay.read_at(offset as u64, &mut all[..len]).unwrap();
            assert!(all[..len] == model[offset..offset + len], "{len} bytes at {offset}");
        }
    }
}

/// Zero, undefined and unmapped blocks hide the parent; what is not present shows it.
#[test]
fn states_that_hide_the_parent() {
    let mut file = child(8 << 20, 1 << 20, 512, LINKAGE);
    for (index, state) in [0, 1, 2, 3].into_iter().enumerate() {
        set_entry(&mut file, index as u64, state);
    }
    let image = Image::open(MemBlock::from(file), FileId(0), &OpenOptions::default()).unwrap();
    let runs: Vec<_> = image.extents(0..8 << 20).map(|run| run.map(|run| (run.len >> 20, run.kind)).unwrap()).collect();
    assert_eq!(
        runs,
        [(1, ExtentKind::Unallocated), (3, ExtentKind::Zero { host: None }), (4, ExtentKind::Unallocated)]
    );
}

#[test]
fn a_partial_block_needs_its_bitmap() {
    let mut file = child(8 << 20, 1 << 20, 512, LINKAGE);
    let place = append(&mut file, &[], MIB);
    set_entry(&mut file, 3, place | 7);
    let image = Image::open(MemBlock::from(file), FileId(0), &OpenOptions::default()).unwrap();
    let expected = Error::Entry { index: 3, entry: place | 7, fault: EntryFault::NoBitmap };
    assert_eq!(image.locate(3 << 20, 1), Err(expected));
    let mut found = Vec::new();
    check(&image, &mut |finding| found.push(finding)).unwrap();
    assert_eq!(found, [Finding::Entry { index: 3, entry: place | 7, fault: EntryFault::NoBitmap }]);
    // In an image without parent the state itself is wrong.
    let mut file = child(8 << 20, 1 << 20, 512, LINKAGE);
    set_entry(&mut file, 3, place | 7);
    put(&mut file, METADATA + 65536 + 4, &[0]);
    let opened = Image::open(MemBlock::from(file), FileId(0), &OpenOptions::default());
    let expected = Error::Entry { index: 3, entry: place | 7, fault: EntryFault::State };
    assert_eq!(opened.map(|_| ()), Err(expected));
}

/// Made by Hyper-V; the contents are those that another implementation, libvhdi, gives.
#[test]
fn a_chain_of_hyper_v() {
    let dir = tempfile::tempdir().unwrap();
    let Some(top) = unpack("dfvfs/fat-differential.vhdx", dir.path()) else { return };
    let Some(base) = unpack("dfvfs/fat-parent.vhdx", dir.path()) else { return };
    let open =
        |path, id| Image::open(HostFile::open(path, false).unwrap(), FileId(id), &OpenOptions::default()).unwrap();
    let (top, base) = (open(&top, 0), open(&base, 1));
    let locator = top.parent().unwrap();
    assert_eq!(locator.names().first().map(String::as_str), Some("./fat-parent.vhdx"));
    assert!(locator.is_parent(base.header().data_write_guid));
    assert_eq!((top.virtual_size(), top.physical_sector_size(), base.is_fixed()), (4 << 20, 4096, true));
    let layers: Vec<Box<dyn Layer>> = vec![Box::new(top), Box::new(base)];
    let mut all = vec![0; 4 << 20];
    Overlay::new(layers).read_at(0, &mut all).unwrap();
    let raw = dir.path().join("raw");
    fs::write(&raw, all).unwrap();
    let sum = Command::new("sha256sum").arg(&raw).output().unwrap();
    let expected = "a538161f34bc44c12bf9a542ce9218741c62728723ea18d0e4f6ea92e9f32e93";
    assert!(String::from_utf8_lossy(&sum.stdout).starts_with(expected));
}

/// So that the helper above is not the only one who believes in the checksum.
#[test]
fn headers_carry_crc_32c() {
    let file = child(1 << 20, 1 << 20, 512, LINKAGE);
    let mut header = file[0x10000..0x11000].to_vec();
    let sum = u32::from_le_bytes(header[4..8].try_into().unwrap());
    header[4..8].fill(0);
    assert_eq!(crc32c(0, &header), sum);
    let mut disk = MemBlock::from(file);
    disk.write_at(0x10008, &[0xff; 8]).unwrap();
    assert!(Image::open(disk, FileId(0), &OpenOptions::default()).is_ok());
}
