//! The codecs against other implementations: miniz_oxide, ruzstd, and the zstd and qemu-img programs where installed.

use std::fs;

use std::process::{Command, Stdio};

use instar_codec::{Codec, Decoder, Encoder, Error};
use proptest::prelude::*;
use ruzstd::io::Read;

/// Units of several characters: zeroes, text, noise, real programs.
fn units() -> Vec<Vec<u8>> {
    let mut noise = 1_u32;
    let mut units = vec![vec![0; 65536], vec![7; 512], b"the quick brown fox\n".repeat(3000)];
    units.push(
        (0..65536)
            .map(|_| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (noise >> 24) as u8
            })
            .collect(),
    );
    let program = fs::read(std::env::current_exe().unwrap()).unwrap();
    units.extend(program.chunks_exact(65536).step_by(7).take(24).map(<[u8]>::to_vec));
    units.extend(program.chunks_exact(4096).step_by(101).take(24).map(<[u8]>::to_vec));
    units.extend(program.chunks_exact(2 << 20).take(1).map(<[u8]>::to_vec));
    units
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
    for unit in units() {
        let Some(stored) = encode(Codec::Deflate, &unit) else { continue };
        let mut inflate = zlib_rs::Inflate::new(false, 12);
        let mut out = Vec::new();
        let mut part = [0; 1000];
        let mut at = 0;
        // In small pieces, so that the window is really used.
        while out.len() < unit.len() {
            let before = inflate.total_in();
            let written = inflate.total_out();
            inflate.decompress(&stored[at..], &mut part, zlib_rs::InflateFlush::NoFlush).unwrap();
            at += (inflate.total_in() - before) as usize;
            let written = (inflate.total_out() - written) as usize;
            assert!(written > 0);
            out.extend_from_slice(&part[..written]);
        }
        assert_eq!(out, unit);
    }
}

#[test]
fn what_does_not_shrink_is_refused() {
    let mut noise = 9_u64;
    let unit: Vec<u8> = (0..4096)
        .map(|_| {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            noise as u8
        })
        .collect();
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
        // A stream for less than the unit is an error; one for more fills the unit, as in QEMU.
        assert_eq!(decode(codec, &stored, unit.len() + 1), Err(Error::TooShort(unit.len())), "{codec:?}");
        assert_eq!(decode(codec, &stored, 100).as_deref(), Ok(&unit[..100]), "{codec:?}");
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

/// A frame that declares a window of 2 GiB must not size an allocation.
#[test]
fn huge_windows_are_refused() {
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00];
    assert_eq!(decode(Codec::Zstd, &frame, 4096), Err(Error::Damaged));
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
