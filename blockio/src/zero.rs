//! Zeroes in buffers.

use alloc::vec::Vec;
use core::ops::Range;

use crate::error::{Error, ErrorKind, Result};

/// Bytes tested between two looks at the result: as many as fill a few vector registers.
const CHUNK: usize = 256;

/// A buffer of `len` zeroes. A length that comes from an image may be more than there is memory for.
///
/// ```
/// assert_eq!(instar_blockio::zeroed(3).unwrap(), [0, 0, 0]);
/// assert!(instar_blockio::zeroed(usize::MAX).is_err());
/// ```
///
/// # Errors
/// [`ErrorKind::OutOfMemory`].
pub fn zeroed(len: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
    bytes.resize(len, 0);
    Ok(bytes)
}

/// Whether all bytes are zero. An empty buffer is.
///
/// ```
/// assert!(instar_blockio::is_zero(&[0; 4096]));
/// assert!(!instar_blockio::is_zero(b"\0\0\x01\0"));
/// ```
pub fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<CHUNK>();
    chunks.iter().all(is_zero_chunk) && rest.iter().all(|&byte| byte == 0)
}

/// Without an early exit inside, so that the compiler makes vector instructions of it.
fn is_zero_chunk(chunk: &[u8; CHUNK]) -> bool {
    let (words, _) = chunk.as_chunks::<8>();
    words.iter().fold(0, |sum, &word| sum | u64::from_ne_bytes(word)) == 0
}

/// The ranges of `buf` that a sparse copy writes, as `qemu-img convert -S` decides; the rest is left as zeros.
///
/// `buf` is one request of the copy and lies at `offset` of the disk. The rule, in full:
///
/// 1. The disk is seen in blocks of `alignment` bytes counted from its start. The first and the last
///    block of the buffer may be parts of a block. A block is zero if every byte of it that lies in
///    the buffer is.
/// 2. A run of zero blocks at the start or at the end of the buffer is never written.
/// 3. A run of zero blocks between two blocks with data is skipped if it has at least `min_zero` bytes, and
///    written as data otherwise.
///
/// Nothing is remembered from one buffer to the next, so a short run of zeros that straddles two
/// requests is skipped. For `-S N` qemu-img takes `min_zero` = N and `alignment` = the largest power of two up
/// to N (or the target's request alignment, if that is larger), so rule 3 only ever decides something
/// where N is no power of two. `-S 0` writes everything and needs no scan.
///
/// Its requests begin at a data extent of the source (contiguous in one file) and have at most 2 MiB;
/// they end where the extent ends, but if that is inside a cluster of the source (of 512 bytes for raw), a
/// request that began before that cluster ends at the cluster's start.
///
/// An `alignment` of 0 counts as 1. Work is linear in the length of the buffer.
///
/// ```
/// use instar_blockio::data_runs;
/// let mut buf = [0; 32];
/// (buf[5], buf[14], buf[25]) = (1, 1, 1);
/// // Blocks of 4: one zero block between the first two is data, two are not.
/// assert_eq!(data_runs(&buf, 0, 4, 8).collect::<Vec<_>>(), [4..16, 24..28]);
/// ```
pub fn data_runs(buf: &[u8], offset: u64, alignment: u32, min_zero: u32) -> impl Iterator<Item = Range<usize>> {
    DataRuns {
        blocks: Blocks { buf, offset, alignment: u64::from(alignment.max(1)), at: 0 },
        min_zero: min_zero as usize,
        next: None,
    }
}

struct DataRuns<'a> {
    blocks: Blocks<'a>,
    min_zero: usize,
    /// A data block already seen behind the run that was handed out.
    next: Option<Range<usize>>,
}

impl Iterator for DataRuns<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut run = self.next.take().or_else(|| self.blocks.next_data())?;
        while let Some(block) = self.blocks.next_data() {
            let gap = block.start - run.end;
            if gap > 0 && gap >= self.min_zero {
                self.next = Some(block);
                break;
            }
            run.end = block.end;
        }
        Some(run)
    }
}

/// Cuts the buffer at the disk's block boundaries.
struct Blocks<'a> {
    buf: &'a [u8],
    offset: u64,
    alignment: u64,
    at: usize,
}

impl Blocks<'_> {
    /// The next block that is not zero.
    fn next_data(&mut self) -> Option<Range<usize>> {
        while self.at < self.buf.len() {
            let start = self.at;
            // Only the place inside the block counts, so a wrap at the end of the number space is harmless
            // for powers of two and can't happen on a real disk.
            let inside = self.offset.wrapping_add(start as u64) % self.alignment;
            let left = usize::try_from(self.alignment - inside).unwrap_or(usize::MAX);
            self.at = start.saturating_add(left).min(self.buf.len());
            if !is_zero(&self.buf[start..self.at]) {
                return Some(start..self.at);
            }
        }
        None
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are compared")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn every_single_byte_is_seen() {
        for len in [0, 1, 7, 8, 255, 256, 257, 511, 512, 700] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len} zeros");
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    /// A buffer of one byte a block (`alignment` 1), `x` for data.
    fn runs(picture: &str, min_zero: u32) -> Vec<Range<usize>> {
        let buf: Vec<u8> = picture.bytes().map(|byte| u8::from(byte == b'x')).collect();
        data_runs(&buf, 0, 1, min_zero).collect()
    }

    #[test]
    fn runs_at_the_ends_are_skipped_however_short() {
        assert_eq!(runs("-x-", 4), [1..2]);
        assert_eq!(runs("----", 9), []);
        assert_eq!(runs("", 1), []);
        assert_eq!(runs("xxx", 1), [0..3]);
    }

    #[test]
    fn runs_inside_need_the_minimum() {
        assert_eq!(runs("x--x", 3), [0..4]);
        assert_eq!(runs("x---x", 3), [0..1, 4..5]);
        assert_eq!(runs("-x--x---x--", 3), [1..5, 8..9]);
        assert_eq!(runs("x-x", 0), [0..1, 2..3]);
        assert_eq!(runs("xx", 0), [0..2]);
    }

    #[test]
    fn blocks_are_counted_from_the_start_of_the_disk() {
        let mut buf = [0; 20];
        buf[3] = 1;
        // At offset 6 the first block (of 8) has two bytes here, the second begins at index 2.
        assert_eq!(data_runs(&buf, 6, 8, 8).collect::<Vec<_>>(), [2..10]);
        buf[1] = 1;
        buf[19] = 1;
        assert_eq!(data_runs(&buf, 6, 8, 8).collect::<Vec<_>>(), [0..10, 18..20]);
        assert_eq!(data_runs(&buf, 6, 8, 9).collect::<Vec<_>>(), [0..20]);
    }

    #[test]
    fn odd_arguments_do_not_panic() {
        assert_eq!(data_runs(&[1, 0, 1], u64::MAX, 0, u32::MAX).collect::<Vec<_>>(), [0..3]);
        assert_eq!(data_runs(&[0, 1], u64::MAX, u32::MAX, 0).count(), 1);
    }

    proptest! {
        /// The three rules, said once more on a list of blocks.
        #[test]
        fn runs_follow_the_rules(
            bits in proptest::collection::vec(any::<bool>(), 0..60),
            offset in 0u64..40,
            alignment in 1u32..9,
            min_zero in 0u32..30,
        ) {
            let buf: Vec<u8> = bits.iter().map(|&bit| u8::from(bit)).collect();
            let block = |at: usize| (offset + at as u64) / u64::from(alignment);
            let is_data = |at: usize| (0..buf.len()).any(|other| block(other) == block(at) && buf[other] != 0);
            let mut written: Vec<bool> = (0..buf.len()).map(is_data).collect();
            let plain = written.clone();
            let mut at = 0;
            while at < buf.len() {
                let len = plain[at..].iter().take_while(|&&data| !data).count();
                if len > 0 && at > 0 && at + len < buf.len() && len < min_zero as usize {
                    written[at..at + len].fill(true);
                }
                at += len.max(1);
            }
            let mut seen = vec![false; buf.len()];
            let mut end = None;
            for run in data_runs(&buf, offset, alignment, min_zero) {
                prop_assert!(run.start < run.end && end.is_none_or(|end| end < run.start));
                end = Some(run.end);
                seen[run].fill(true);
            }
            prop_assert_eq!(seen, written);
        }
    }
}
