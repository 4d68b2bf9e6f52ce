//! The codecs against other implementations: miniz_oxide, ruzstd, and the zstd and qemu-img programs where installed.

use std::cell::RefCell;
use std::fs;
use std::process::{Command, Stdio};

use instar_codec::{Codec, Decoder, Encoder, Error};
use proptest::prelude::*;
use ruzstd::io::Read;

/// Units of several characters: zeroes, text, noise, real programs.
fn units() -> Vec<Vec<u8>> {
    let mut units = vec![vec![0; 65536], vec![7; 512], b"the quick brown fox\n".repeat(3000), noise(65536)];
    let program = fs::read(std::env::current_exe().unwrap()).unwrap();
    units.extend(program.chunks_exact(65536).step_by(7).take(24).map(<[u8]>::to_vec));
    units.extend(program.chunks_exact(4096).step_by(101).take(24).map(<[u8]>::to_vec));
    units.extend(program.chunks_exact(2 << 20).take(1).map(<[u8]>::to_vec));
    units
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 9_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn encode(codec: Codec, unit: &[u8]) -> Option<Vec<u8>> {
    let mut out = b"before".to_vec();
    let len = Encoder::new(codec).encode(unit, &mut out).unwrap();
    assert_eq!(&out[..6], b"before");
    assert_eq!(out.len() - 6, len.unwrap_or(0));
    len.map(|_| out.split_off(6))
}

fn decode(codec: Codec, stored: &[u8], len: usize) -> Result<Vec<u8>, Error> {
    let mut out = vec![0xaa; len];
    Decoder::new().decode(codec, stored, &mut out).map(|()| out)
}

fn miniz(stored: &[u8], len: usize, flags: u32) -> Option<Vec<u8>> {
    use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};
    let mut out = vec![0; len];
    let flags = flags | inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (_, _, written) = decompress(&mut DecompressorOxide::new(), stored, &mut out, 0, flags);
    (written == len).then_some(out)
}

fn ruzstd(stored: &[u8]) -> Option<Vec<u8>> {
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(stored).ok()?;
    let mut out = Vec::new();
    decoder.read_to_end(&mut out).ok()?;
    Some(out)
}

#[test]
fn deflate_is_read_by_miniz_oxide() {
    let mut shrunk = 0;
    for unit in units() {
        let Some(stored) = encode(Codec::Deflate, &unit) else { continue };
        shrunk += 1;
        assert_eq!(miniz(&stored, unit.len(), 0).as_deref(), Some(&unit[..]));
        assert_eq!(decode(Codec::Deflate, &stored, unit.len()).as_deref(), Ok(&unit[..]));
    }
    assert!(shrunk > 20);
}

#[test]
fn zlib_is_read_by_miniz_oxide() {
    use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_PARSE_ZLIB_HEADER;
    for unit in units() {
        let Some(stored) = encode(Codec::Zlib, &unit) else { continue };
        assert_eq!(miniz(&stored, unit.len(), TINFL_FLAG_PARSE_ZLIB_HEADER).as_deref(), Some(&unit[..]));
        assert_eq!(decode(Codec::Zlib, &stored, unit.len()).as_deref(), Ok(&unit[..]));
    }
}

#[test]
fn zstd_is_read_by_ruzstd() {
    let mut shrunk = 0;
    for unit in units() {
        let Some(stored) = encode(Codec::Zstd, &unit) else { continue };
        shrunk += 1;
        assert_eq!(ruzstd(&stored).as_deref(), Some(&unit[..]));
        assert_eq!(decode(Codec::Zstd, &stored, unit.len()).as_deref(), Ok(&unit[..]));
    }
    assert!(shrunk > 20);
}

/// The distance of every match must lie inside the 4 KiB that QEMU's readers may keep: a decoder with such a window reads it.
#[test]
fn deflate_needs_no_more_than_4_kib() {
    let read = |stored: &[u8], len| {
        use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
        let mut inflate = DecompressorOxide::new();
        // It reads ahead, and calls without input an error.
        let stored = [stored, &[0; 16]].concat();
        // All that is known of the past, overwritten in a circle.
        let mut window = [0; 4096];
        let (mut at, mut out) = (0, Vec::new());
        while out.len() < len {
            let (_, read, written) = decompress(&mut inflate, &stored[at..], &mut window, out.len() % 4096, 0);
            if written == 0 {
                return None;
            }
            out.extend_from_slice(&window[out.len() % 4096..][..written]);
            at += read;
        }
        Some(out)
    };
    for unit in units() {
        let Some(stored) = encode(Codec::Deflate, &unit) else { continue };
        assert!(read(&stored, unit.len()) == Some(unit));
    }
    // The reader does tell: noise said twice, 16 KiB apart, as one match of a 32 KiB window.
    let mut twice = noise(16384);
    twice.extend_from_within(..);
    let mut stored = vec![0; 40000];
    let mut deflate = zlib_rs::Deflate::new(6, false, 15);
    deflate.compress(&twice, &mut stored, zlib_rs::DeflateFlush::Finish).unwrap();
    assert!(deflate.total_out() < 20000);
    assert!(read(&stored, twice.len()).as_ref() != Some(&twice));
    assert!(decode(Codec::Deflate, &stored, twice.len()) == Ok(twice));
}

#[test]
fn what_does_not_shrink_is_refused() {
    let unit = noise(4096);
    for codec in [Codec::Deflate, Codec::Zlib, Codec::Zstd] {
        assert_eq!(encode(codec, &unit), None, "{codec:?}");
        assert_eq!(encode(codec, &[]), None, "{codec:?}");
    }
}

/// One encoder for many units that do not shrink, and some that do: zlib-rs must not remember the ones given up.
#[test]
fn encoders_forget_what_did_not_shrink() {
    for codec in [Codec::Deflate, Codec::Zlib, Codec::Zstd] {
        let mut encoder = Encoder::new(codec);
        let mut noise = 3_u64;
        for round in 0..400 {
            let unit: Vec<u8> = (0..1024)
                .map(|at| {
                    noise ^= noise << 13;
                    noise ^= noise >> 7;
                    noise ^= noise << 17;
                    if round % 7 == 0 { at as u8 / 64 } else { noise as u8 }
                })
                .collect();
            let mut out = Vec::new();
            let len = encoder.encode(&unit, &mut out).unwrap();
            assert_eq!(len.is_some(), round % 7 == 0, "{codec:?}");
            if len.is_some() {
                assert_eq!(decode(codec, &out, unit.len()).as_deref(), Ok(&unit[..]));
            }
        }
    }
}

#[test]
fn bytes_behind_the_stream_are_ignored_and_missing_ones_are_not() {
    let unit = b"cluster ".repeat(512);
    for codec in [Codec::Deflate, Codec::Zlib, Codec::Zstd] {
        let stored = encode(codec, &unit).unwrap();
        let mut padded = stored.clone();
        padded.resize(stored.len() + 700, 0x5a);
        assert_eq!(decode(codec, &padded, unit.len()).as_deref(), Ok(&unit[..]), "{codec:?}");
        for cut in [0, 1, stored.len() / 2] {
            assert!(decode(codec, &stored[..cut], unit.len()).is_err(), "{codec:?} {cut}");
        }
        let mut long = vec![0; unit.len() + 1];
        let ended = Decoder::new().decode(codec, &stored, &mut long);
        assert_eq!(ended, Err(Error::TooShort(unit.len())), "{codec:?}");
        assert_eq!(long[..unit.len()], unit, "{codec:?}");
        let expected = if codec == Codec::Deflate { Ok(&unit[..100]) } else { Err(&Error::TooLong) };
        assert_eq!(decode(codec, &stored, 100).as_deref(), expected, "{codec:?}");
        assert_eq!(decode(codec, b"no stream", 0), Ok(vec![]), "{codec:?}");
    }
}

#[test]
fn frames_follow_each_other_and_skippable_ones_are_skipped() {
    let (first, second) = (b"first ".repeat(100), b"second ".repeat(100));
    let mut stored = b"\x50\x2a\x4d\x18\x03\0\0\0abc".to_vec();
    stored.extend(encode(Codec::Zstd, &first).unwrap());
    stored.extend(b"\x5f\x2a\x4d\x18\0\0\0\0");
    stored.extend(encode(Codec::Zstd, &second).unwrap());
    let both = [first, second].concat();
    assert_eq!(decode(Codec::Zstd, &stored, both.len()).as_deref(), Ok(&both[..]));
    let huge = b"\x50\x2a\x4d\x18\xff\xff\xff\xffabc";
    assert_eq!(decode(Codec::Zstd, huge, 10), Err(Error::TooShort(0)));
}

/// Every level of the zstd program, with and without checksum.
#[test]
fn frames_of_libzstd_are_read() {
    if Command::new("zstd").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("SKIPPED: the zstd program is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("unit");
    for unit in units().into_iter().step_by(5) {
        fs::write(&path, &unit).unwrap();
        for level in ["--fast=5", "-1", "-3", "-9", "-15", "-19"] {
            for check in ["--check", "--no-check"] {
                let output = Command::new("zstd").args([level, check, "-q", "-c"]).arg(&path).output().unwrap();
                assert!(output.status.success());
                assert_eq!(decode(Codec::Zstd, &output.stdout, unit.len()).as_deref(), Ok(&unit[..]), "{level}");
            }
        }
        let Some(stored) = encode(Codec::Zstd, &unit) else { continue };
        fs::write(dir.path().join("ours.zst"), &stored).unwrap();
        let output = Command::new("zstd").args(["-d", "-q", "-c"]).arg(dir.path().join("ours.zst")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout, unit);
    }
}

thread_local! {
    static USED: RefCell<Decoder> = RefCell::default();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Damaged streams end, never panic, and what both implementations still read is the same.
    #[test]
    fn damage_is_found_alike(
        seed in prop::collection::vec(0_u8..8, 1..3000),
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        for codec in [Codec::Deflate, Codec::Zstd] {
            let Some(mut stored) = encode(codec, &seed) else { continue };
            for (index, byte) in &hits {
                let at = index.index(stored.len());
                stored[at] ^= byte;
            }
            if hits.len() == 1 {
                stored.truncate(cut.index(stored.len()) + 1);
            }
            let ours = decode(codec, &stored, seed.len());
            // Nothing is remembered of the streams before, good or bad.
            let mut again = vec![0x55; seed.len()];
            let ended = USED.with_borrow_mut(|used| used.decode(codec, &stored, &mut again));
            prop_assert_eq!(ended.map(|()| again), ours.clone());
            match codec {
                Codec::Deflate => prop_assert_eq!(ours.ok(), miniz(&stored, seed.len(), 0)),
                _ => {
                    // ruzstd goes to the end of the frame, which may hold more than the unit.
                    if let (Ok(ours), Some(theirs)) = (ours, ruzstd(&stored))
                        && theirs.len() == seed.len()
                    {
                        prop_assert_eq!(ours, theirs);
                    }
                }
            }
        }
    }

    #[test]
    fn noise_is_no_stream(noise in prop::collection::vec(any::<u8>(), 0..600), len in 0_usize..5000) {
        for codec in [Codec::Deflate, Codec::Zlib, Codec::Zstd] {
            let mut framed = b"\x28\xb5\x2f\xfd".to_vec();
            framed.extend(&noise);
            for bytes in [&noise, &framed] {
                let mut out = vec![0; len];
                let ended = Decoder::new().decode(codec, bytes, &mut out);
                prop_assert!(!(ended == Err(Error::Unsupported)));
            }
        }
    }

    #[test]
    fn every_unit_comes_back(unit in prop::collection::vec(0_u8..4, 1..9000)) {
        for codec in [Codec::Deflate, Codec::Zlib, Codec::Zstd] {
            if let Some(stored) = encode(codec, &unit) {
                prop_assert_eq!(decode(codec, &stored, unit.len()), Ok(unit.clone()));
            }
        }
    }
}
