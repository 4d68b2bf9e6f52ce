//! What qemu-img makes of a compressed cluster, and what the decoder does: crafted streams, and all that the encoder writes.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use instar_codec::{Codec, Decoder, Encoder};

const CLUSTER: usize = 65536;
/// Where the streams begin in the image, behind header, L1 table and L2 table.
const DATA: usize = 3 * CLUSTER;

/// A qcow2 image (version 3) with these streams as its first clusters.
fn image(codec: Codec, streams: &[Vec<u8>]) -> Vec<u8> {
    let zstd = codec == Codec::Zstd;
    let mut image = vec![0; DATA];
    let size = (streams.len() * CLUSTER) as u64;
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &16_u32.to_be_bytes()); // cluster_bits
    put(24, &size.to_be_bytes());
    put(36, &1_u32.to_be_bytes()); // L1 entries
    put(40, &(CLUSTER as u64).to_be_bytes()); // L1 table
    put(48, &(DATA as u64).to_be_bytes()); // refcount table: never read
    put(56, &1_u32.to_be_bytes());
    put(72, &(if zstd { 8_u64 } else { 0 }).to_be_bytes()); // incompatible: compression type
    put(96, &4_u32.to_be_bytes()); // refcount_order
    put(100, &112_u32.to_be_bytes()); // header_length
    put(104, &[u8::from(zstd)]);
    put(CLUSTER, &((1 << 63) | (2 * CLUSTER as u64)).to_be_bytes());
    for (index, stream) in streams.iter().enumerate() {
        let (at, sectors) = (image.len() as u64, stream.len().div_ceil(512).max(1));
        let entry = (1 << 62) | ((sectors as u64 - 1) << 54) | at;
        image[2 * CLUSTER + 8 * index..][..8].copy_from_slice(&entry.to_be_bytes());
        image.extend(stream);
        image.resize(image.len().next_multiple_of(512), 0);
    }
    image
}

/// What qemu-img reads.
fn qemu(dir: &Path, codec: Codec, streams: &[Vec<u8>]) -> Option<Vec<u8>> {
    let (from, to) = (dir.join("image.qcow2"), dir.join("disk.raw"));
    fs::write(&from, image(codec, streams)).unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "qcow2", "-O", "raw"]).arg(from).arg(&to).stderr(Stdio::null());
    command.status().unwrap().success().then(|| fs::read(to).unwrap())
}

fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("SKIPPED: qemu-img is not installed");
    }
    found
}

/// A cluster's worth of text.
fn text() -> Vec<u8> {
    let mut text = Vec::new();
    for number in 0_u32.. {
        text.extend(format!("line {number}: {:x}\n", number.wrapping_mul(2_654_435_761)).bytes());
        if text.len() >= CLUSTER {
            break;
        }
    }
    text.truncate(CLUSTER);
    text
}

fn encode(codec: Codec, unit: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Encoder::new(codec).encode(unit, &mut out).unwrap().expect("the unit shrinks");
    out
}

/// A frame of blocks that repeat `A`, so many bytes each.
fn frame(header: &[u8], blocks: &[usize], last: bool) -> Vec<u8> {
    let mut out = b"\x28\xb5\x2f\xfd".to_vec();
    out.extend(header);
    for (index, &len) in blocks.iter().enumerate() {
        let is_last = u32::from(last && index + 1 == blocks.len());
        out.extend_from_slice(&(((len as u32) << 3) | 2 | is_last).to_le_bytes()[..3]);
        out.push(b'A');
    }
    out
}

/// A skippable frame of a length that makes `stream` end with a sector.
fn aligned(stream: &[u8]) -> Vec<u8> {
    let len = (stream.len() + 8).next_multiple_of(512) - stream.len() - 8;
    let mut out = b"\x50\x2a\x4d\x18".to_vec();
    out.extend((len as u32).to_le_bytes());
    out.resize(8 + len, 0);
    out.extend(stream);
    out
}

/// Name, codec, stream, and whether qemu-img 10.0.2 reads a cluster of 64 KiB from it.
fn cases() -> Vec<(&'static str, Codec, Vec<u8>, bool)> {
    use Codec::{Deflate, Zstd};
    const WHOLE: [usize; 2] = [60000, CLUSTER - 60000];
    let text = text();
    let twice = text.repeat(2);
    let with = |stream: Vec<u8>, more: &[u8]| [&stream[..], more].concat();
    let window = |log: u8| [0, (log - 10) << 3];
    // Single segment, content size of 4 bytes; the low bits of `flags` add to that.
    let sized = |flags: u8, extra: &[u8], len: usize| {
        let mut header = vec![0xa0 | flags];
        header.extend(extra);
        header.extend((len as u32).to_le_bytes());
        header
    };
    let windowed = |log: u8, len: u32| [&[0x80, (log - 10) << 3][..], &len.to_le_bytes()].concat();
    let zlib = |bits: i32, flush| {
        let config = zlib_rs::DeflateConfig { window_bits: bits, ..Default::default() };
        let mut out = vec![0; 2 * CLUSTER];
        let mut deflate = zlib_rs::Deflate::new_with_config(config);
        deflate.compress(&text, &mut out, flush).unwrap();
        out.truncate(deflate.total_out() as usize);
        out
    };
    let unended = zlib(-12, zlib_rs::DeflateFlush::SyncFlush);
    let halves = with(encode(Zstd, &text[..30000]), &encode(Zstd, &text[30000..]));
    vec![
        ("deflate", Deflate, encode(Deflate, &text), true),
        ("deflate, junk behind", Deflate, with(encode(Deflate, &text), &[0xff; 700]), true),
        ("deflate, window 32 KiB", Deflate, zlib(-15, zlib_rs::DeflateFlush::Finish), true),
        ("deflate, more", Deflate, encode(Deflate, &twice), true),
        ("deflate, less", Deflate, encode(Deflate, &text[1..]), false),
        ("deflate, no end", Deflate, with(unended.clone(), &[0xff; 600]), false),
        ("deflate, zlib header", Deflate, zlib(15, zlib_rs::DeflateFlush::Finish), false),
        ("deflate, nothing", Deflate, vec![], false),
        ("zstd", Zstd, encode(Zstd, &text), true),
        ("zstd, junk behind", Zstd, with(encode(Zstd, &text), &[0x55; 700]), true),
        ("zstd, more", Zstd, encode(Zstd, &twice), false),
        ("zstd, less", Zstd, encode(Zstd, &text[1..]), false),
        ("zstd, less, at the end of a sector", Zstd, aligned(&encode(Zstd, &text[1..])), false),
        ("zstd, nothing", Zstd, vec![], false),
        ("zstd, two frames", Zstd, halves.clone(), true),
        ("zstd, three frames, the third behind", Zstd, with(halves, &encode(Zstd, &text)), true),
        ("zstd, skippable before", Zstd, aligned(&encode(Zstd, &text)), true),
        ("zstd, cut", Zstd, aligned(&encode(Zstd, &text)[..1000]), false),
        ("repeated", Zstd, frame(&window(17), &WHOLE, true), true),
        ("repeated, empty last block", Zstd, frame(&window(17), &[60000, CLUSTER - 60000, 0], true), true),
        ("repeated, no last block", Zstd, aligned(&frame(&window(17), &WHOLE, false)), false),
        ("repeated, one byte more", Zstd, frame(&window(17), &[60000, CLUSTER - 60000, 1], true), false),
        ("window below the block", Zstd, frame(&window(10), &WHOLE, true), false),
        ("window 128 MiB", Zstd, frame(&window(27), &WHOLE, true), true),
        ("window 144 MiB", Zstd, frame(&[0, (17 << 3) | 1], &WHOLE, true), false),
        ("window 2 TiB", Zstd, frame(&window(41), &WHOLE, true), false),
        ("window 1 GiB, size known", Zstd, frame(&windowed(30, CLUSTER as u32), &WHOLE, true), true),
        ("window 2 TiB, size known", Zstd, frame(&windowed(41, CLUSTER as u32), &WHOLE, true), false),
        ("size", Zstd, frame(&sized(0, &[], CLUSTER), &WHOLE, true), true),
        ("size, too small", Zstd, frame(&sized(0, &[], CLUSTER - 1), &WHOLE, true), false),
        ("size, too large", Zstd, frame(&sized(0, &[], CLUSTER + 1), &WHOLE, true), false),
        ("size, 100 MiB", Zstd, frame(&sized(0, &[], 100 << 20), &WHOLE, true), false),
        ("empty frame first", Zstd, with(frame(&sized(0, &[], 0), &[0], true), &encode(Zstd, &text)), true),
        ("dictionary 0", Zstd, frame(&sized(1, &[0], CLUSTER), &WHOLE, true), true),
        ("dictionary 5", Zstd, frame(&sized(1, &[5], CLUSTER), &WHOLE, true), false),
        ("reserved bit", Zstd, frame(&sized(8, &[], CLUSTER), &WHOLE, true), false),
        ("unused bit", Zstd, frame(&sized(16, &[], CLUSTER), &WHOLE, true), true),
        // The low half of XXH64 of 65536 times `A`, and one that isn't.
        ("checksum", Zstd, with(frame(&sized(4, &[], CLUSTER), &WHOLE, true), &A_CHECKSUM), true),
        ("checksum, wrong", Zstd, with(frame(&sized(4, &[], CLUSTER), &WHOLE, true), &[1, 2, 3, 4]), false),
        ("checksum, missing", Zstd, aligned(&frame(&sized(4, &[], CLUSTER), &WHOLE, true)), false),
    ]
}

/// As the zstd program writes it.
const A_CHECKSUM: [u8; 4] = [0xcf, 0x99, 0xe9, 0x54];

#[test]
fn streams_are_judged_as_by_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let qemu_img = has_qemu_img();
    let mut decoder = Decoder::new();
    for (name, codec, stream, good) in cases() {
        // As a reader of qcow2 does, with the sector filled up.
        let mut stored = stream.clone();
        stored.resize(stored.len().next_multiple_of(512).max(512), 0);
        let mut out = vec![0xaa; CLUSTER];
        let ended = decoder.decode(codec, &stored, &mut out);
        assert_eq!(ended.is_ok(), good, "{name}: {ended:?}");
        if qemu_img {
            let theirs = qemu(dir.path(), codec, &[stream]);
            assert_eq!(theirs.is_some(), good, "{name}: qemu-img");
            if let Some(theirs) = theirs {
                assert!(theirs == out, "{name}: other content than qemu-img");
            }
        }
    }
}

#[test]
fn qemu_img_reads_what_the_encoder_writes() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut disk = text();
    let program = fs::read(std::env::current_exe().unwrap()).unwrap();
    disk.extend(program.as_chunks::<CLUSTER>().0.iter().step_by(3).take(100).flatten());
    for codec in [Codec::Deflate, Codec::Zstd] {
        let mut encoder = Encoder::new(codec);
        let (mut units, mut streams) = (Vec::new(), Vec::new());
        for unit in disk.chunks(CLUSTER) {
            let mut stream = Vec::new();
            if encoder.encode(unit, &mut stream).unwrap().is_some() {
                units.extend(unit);
                streams.push(stream);
            }
        }
        assert!(streams.len() > 20, "{codec:?}");
        assert!(qemu(dir.path(), codec, &streams).unwrap() == units, "{codec:?}");
    }
}
