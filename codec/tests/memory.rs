//! How much memory decoding takes, at most, whatever a stream claims.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use instar_codec::{Codec, Decoder, Encoder, Error};

/// Counts the bytes that are allocated, and the most there were.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `at` is from `alloc` above, so from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Most bytes allocated during `work`, beyond those at its start.
fn peak<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let done = work();
    (PEAK.load(Ordering::Relaxed) - before, done)
}

/// A frame with this header behind the magic number, and `count` blocks that repeat a byte 128 KiB long.
fn bomb(header: &[u8], count: usize) -> Vec<u8> {
    let mut out = [b"\x28\xb5\x2f\xfd", header].concat();
    for index in 0..count {
        let last = u32::from(index + 1 == count);
        out.extend_from_slice(&(((128 << 10) << 3) | 2 | last).to_le_bytes()[..3]);
        out.push(b'A');
    }
    out
}

/// One test, since the counters are shared.
#[test]
fn claims_cost_no_memory() {
    const MIB: usize = 1 << 20;
    let cases = [
        ("window 128 MiB, 64 MiB of content", bomb(&[0, 17 << 3], 512), Error::TooLong),
        ("window 2 TiB", bomb(&[0, 31 << 3], 1), Error::Damaged),
        ("size 64 MiB", bomb(&[0xa0, 0, 0, 0, 4], 512), Error::TooLong),
        ("size 16 EiB", bomb(&[0xe0, 255, 255, 255, 255, 255, 255, 255, 255], 512), Error::Damaged),
        ("size 0, window 128 MiB, 64 MiB of content", bomb(&[0x80, 17 << 3, 0, 0, 0, 0], 512), Error::TooLong),
        ("size 0, one segment, 64 MiB of content", bomb(&[0xa0, 0, 0, 0, 0], 512), Error::Damaged),
        ("skippable frame of 4 GiB", b"\x50\x2a\x4d\x18\xff\xff\xff\xffabc".to_vec(), Error::TooShort(0)),
    ];
    let mut out = vec![0; 65536];
    for (name, stored, expected) in cases {
        let (fresh, ended) = peak(|| Decoder::new().decode(Codec::Zstd, &stored, &mut out));
        assert_eq!(ended, Err(expected), "{name}");
        assert!(fresh < 2 * MIB, "{name}: {fresh} bytes");
    }

    // A unit of 2 MiB, the largest there is.
    let mut unit = Vec::new();
    for number in 0_u32..200_000 {
        unit.extend(number.wrapping_mul(2_654_435_761).to_be_bytes().map(|byte| byte & 0x1f));
    }
    unit.resize(2 * MIB, 9);
    let mut out = vec![0; unit.len()];
    for (codec, decoding, encoding) in
        [(Codec::Deflate, MIB, MIB), (Codec::Zlib, MIB, MIB), (Codec::Zstd, MIB, 16 * MIB)]
    {
        let mut stored = Vec::new();
        let (most, len) = peak(|| Encoder::new(codec).encode(&unit, &mut stored).unwrap());
        assert!(len.is_some() && most - unit.len() < encoding, "{codec:?}: {most} bytes to encode");
        let (most, ended) = peak(|| Decoder::new().decode(codec, &stored, &mut out));
        ended.unwrap();
        assert!(out == unit && most < decoding, "{codec:?}: {most} bytes to decode");
        println!("{codec:?}: {most} bytes to decode");
    }
}
