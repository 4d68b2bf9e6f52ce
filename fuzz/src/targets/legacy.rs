//! The older formats: opened, walked, read; those that are written also changed and checked.

use instar_blockio::{BlockAlloc, BlockMap, BlockMapExt, BlockRead, BlockWrite, Codec, FileId, MemBlock, ZeroMode};
use instar_codec::Encoder;
use instar_legacy::{OpenOptions, Repair, bochs, cloop, dmg, parallels, qcow, qed, vdi};

use crate::Disk;

/// Extents looked at in one walk.
const EXTENTS: usize = 300;
/// The file may grow to this.
const SPACE: u64 = 8 << 20;
/// Where the size of the blocks of a compressed loop stands, high byte first.
const CLOOP_BLOCK: usize = 128;
/// Bytes of the disks of seeds.
const DISK: u64 = 70_144;

fn walk<T: BlockMap>(image: &T) {
    let size = image.size();
    for start in [0, size / 3, size.saturating_sub(1000)] {
        let mut at = start;
        for extent in image.extents(start..size).take(EXTENTS) {
            let Ok(extent) = extent else { break };
            assert!(extent.offset == at && extent.len > 0 && extent.end() <= size, "{extent:?} at {at}");
            at = extent.end();
            let mut buf = vec![0; extent.len.min(4096) as usize];
            let _ = image.read_at(extent.offset, &mut buf);
        }
    }
    assert!(image.read_at(size, &mut [0]).is_err());
}

fn change<T: BlockAlloc + BlockWrite>(writer: &mut T) {
    let size = writer.size();
    for offset in [0, 511, 4096, size / 2, size.saturating_sub(600)] {
        let len = size.saturating_sub(offset).min(600);
        let bytes = vec![0xa5; len as usize];
        let mut back = vec![0; len as usize];
        // Tables of hostile images may lie where data do, so what comes back may be something else.
        let _ = writer.write_at(offset, &bytes);
        let _ = writer.read_at(offset, &mut back);
        let _ = writer.write_zeroes(offset, len / 2, ZeroMode::KeepAllocated);
        let _ = writer.discard(offset, len);
        if let Ok(place) = writer.reserve(offset, len) {
            let _ = if len % 2 == 0 { writer.commit(place) } else { writer.abort(place) };
        }
    }
    let _ = writer.flush();
}

fn file(data: &[u8]) -> Disk<'_> {
    Disk::of(data).with_room(SPACE)
}

macro_rules! read {
    ($format:ident, $data:expr) => {
        for strict in [false, true] {
            let Ok(image) = $format::Image::open(Disk::of($data), FileId(7), &OpenOptions { strict }) else { return };
            walk(&image);
        }
    };
}

macro_rules! write {
    ($format:ident, $data:expr) => {
        if let Ok(mut writer) = $format::Writer::open(file($data), FileId(7)) {
            change(&mut writer);
            let _ = writer.finish();
        }
    };
}

macro_rules! repair {
    ($format:ident, $data:expr) => {
        if let Ok(mut writer) = $format::Writer::open(file($data), FileId(7)) {
            let _ = writer.check(Repair { leaks: true, corruptions: true }, &mut |_| {});
        }
    };
}

/// qcow, version 1.
pub fn qcow(data: &[u8]) {
    read!(qcow, data);
    write!(qcow, data);
}

/// QED.
pub fn qed(data: &[u8]) {
    read!(qed, data);
    write!(qed, data);
    repair!(qed, data);
}

/// VDI.
pub fn vdi(data: &[u8]) {
    read!(vdi, data);
    write!(vdi, data);
    if let Ok(image) = vdi::Image::open(Disk::of(data), FileId(7), &OpenOptions::default()) {
        let _ = image.check(&mut |_| {});
    }
}

/// Parallels.
pub fn parallels(data: &[u8]) {
    read!(parallels, data);
    write!(parallels, data);
    repair!(parallels, data);
}

/// Apple disk images.
pub fn dmg(data: &[u8]) {
    read!(dmg, data);
}

/// Bochs.
pub fn bochs(data: &[u8]) {
    read!(bochs, data);
}

/// Compressed loop.
pub fn cloop(data: &[u8]) {
    // Memory for blocks of up to 64 MiB takes far longer than anything that is done with it, so most inputs have smaller ones.
    let mut data = data.to_vec();
    if data.len() % 64 != 1
        && let Some([high @ ..=4, next]) = data.get_mut(CLOOP_BLOCK..CLOOP_BLOCK + 2)
    {
        (*high, *next) = (0, *next & 3);
    }
    let data = &data[..];
    read!(cloop, data);
}

macro_rules! seed {
    ($create:expr) => {{
        let mut writer = $create.expect("good options");
        writer.write_at(0, &[0x5a; 600]).expect("room");
        writer.write_at(DISK / 2, &[0x77; 9000]).expect("room");
        writer.finish().expect("room").into_bytes()
    }};
}

/// Plain, and on a backing file.
pub fn qcow_seeds() -> Vec<Vec<u8>> {
    let plain = qcow::CreateOptions { size: DISK, backing_file: None };
    let mut seeds = vec![seed!(qcow::create(MemBlock::default(), FileId(0), &plain)), packed_qcow(&plain)];
    let overlay = qcow::CreateOptions { size: DISK, backing_file: Some(b"base".to_vec()) };
    let writer = qcow::create(MemBlock::default(), FileId(0), &overlay).expect("good options");
    seeds.push(writer.finish().expect("room").into_bytes());
    seeds
}

fn packed_qcow(options: &qcow::CreateOptions) -> Vec<u8> {
    let mut file = MemBlock::default();
    let mut writer = qcow::create(&mut file, FileId(0), options).expect("good options");
    let stream = packed(Codec::Deflate, 4096);
    let place = writer.reserve_compressed(4096, stream.len() as u32).expect("room");
    writer.commit(place).expect("room");
    writer.finish().expect("room");
    file.write_at(place.host, &stream).expect("room");
    file.into_bytes()
}

fn packed(codec: Codec, len: usize) -> Vec<u8> {
    let mut stream = Vec::new();
    let stored = Encoder::new(codec).encode(&vec![0x41; len], &mut stream).expect("memory");
    assert!(stored.is_some());
    stream
}

/// Small clusters.
pub fn qed_seeds() -> Vec<Vec<u8>> {
    let small = qed::CreateOptions { size: DISK, cluster_size: 4096, table_size: 2, ..Default::default() };
    let dirty = |mut bytes: Vec<u8>| {
        bytes[16] |= 2;
        bytes
    };
    let plain = seed!(qed::create(MemBlock::default(), FileId(0), &small));
    vec![dirty(plain.clone()), plain]
}

/// Static ones have their tables filled.
pub fn vdi_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for is_static in [false, true] {
        let options = vdi::CreateOptions { size: DISK, is_static, ..Default::default() };
        let mut bytes = seed!(vdi::create(MemBlock::default(), FileId(0), &options));
        bytes.truncate(100_000);
        seeds.push(bytes);
    }
    seeds
}

/// Clusters that are a power of two, and others.
pub fn parallels_seeds() -> Vec<Vec<u8>> {
    let options = |cluster_size| parallels::CreateOptions { size: DISK, cluster_size };
    [4096, 1536].map(|size| seed!(parallels::create(MemBlock::default(), FileId(0), &options(size)))).to_vec()
}

/// Chunks of three kinds, told by a resource fork, and an empty property list.
pub fn dmg_seeds() -> Vec<Vec<u8>> {
    let mut file = packed(Codec::Zlib, 4096);
    let stored = file.len() as u64;
    file.extend([0x41; 4096]);
    let mut table = b"mish\0\0\0\x01".to_vec();
    table.resize(204, 0);
    for (kind, numbers) in [(0x8000_0005u32, [0, 8, 0, stored]), (1, [8, 8, stored, 4096]), (0, [16, 100, 0, 0])] {
        table.extend(kind.to_be_bytes());
        table.extend([0; 4]);
        numbers.iter().for_each(|number: &u64| table.extend(number.to_be_bytes()));
    }
    let start = file.len() as u64;
    let len = table.len() as u32;
    for number in [16, 20 + len, len + 4, 0, len] {
        file.extend(number.to_be_bytes());
    }
    file.extend(&table);
    let mut trailer = vec![0; 512];
    trailer[..4].copy_from_slice(b"koly");
    let mut put = |at: usize, number: u64| trailer[at..at + 8].copy_from_slice(&number.to_be_bytes());
    put(0x28, start);
    put(0x30, u64::from(len) + 20);
    put(0x1ec, 116);
    let forked = [&file[..], &trailer].concat();
    let mut put = |at: usize, number: u64| trailer[at..at + 8].copy_from_slice(&number.to_be_bytes());
    put(0x30, 0);
    put(0xd8, file.len() as u64);
    put(0xe0, 28);
    file.extend(b"<plist><data>bWlzaA==</data>");
    vec![forked, [&file[..], &trailer].concat()]
}

/// Both versions.
pub fn bochs_seeds() -> Vec<Vec<u8>> {
    let mut bytes = vec![0; 512 + 16 + 512 + 4096];
    for (at, text) in [(0, &b"Bochs Virtual HD Image"[..]), (32, b"Redolog"), (48, b"Growing")] {
        bytes[at..at + text.len()].copy_from_slice(text);
    }
    for (at, byte) in [(66, 2), (69, 2), (72, 4), (76, 1), (81, 16), (89, 64)] {
        bytes[at] = byte;
    }
    bytes[512..528].fill(0xff);
    bytes[516..520].fill(0);
    bytes[528] = 0b110;
    let mut old = bytes.clone();
    old[66] = 1;
    old.copy_within(88..96, 84);
    vec![bytes, old]
}

/// Three blocks.
pub fn cloop_seeds() -> Vec<Vec<u8>> {
    let stream = packed(Codec::Zlib, 4096);
    let mut bytes = vec![0; 128];
    bytes.extend([0, 0, 16, 0, 0, 0, 0, 3]);
    (0..4).for_each(|index| bytes.extend((168 + index * stream.len() as u64).to_be_bytes()));
    (0..3).for_each(|_| bytes.extend(&stream));
    vec![bytes]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_read() {
        let open = |opened: bool| assert!(opened);
        let file = |bytes: &Vec<u8>| MemBlock::from(bytes.clone());
        let options = OpenOptions::default();
        dmg_seeds().iter().for_each(|seed| open(dmg::Image::open(file(seed), FileId(0), &options).is_ok()));
        bochs_seeds().iter().for_each(|seed| open(bochs::Image::open(file(seed), FileId(0), &options).is_ok()));
        cloop_seeds().iter().for_each(|seed| open(cloop::Image::open(file(seed), FileId(0), &options).is_ok()));
        qed_seeds().iter().for_each(|seed| open(qed::Image::open(file(seed), FileId(0), &options).is_ok()));
    }
}
