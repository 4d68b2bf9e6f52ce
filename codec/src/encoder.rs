use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use instar_blockio::Codec;
use structured_zstd::encoding::{CompressionLevel, FrameCompressor};
use zlib_rs::{Deflate, DeflateFlush, Status, compress_bound};

use crate::{Error, Result};

/// log2 of the deflate window: 4 KiB, which QEMU and other readers of qcow2 provide.
const WINDOW_BITS: u8 = 12;
/// The level that QEMU's default corresponds to.
const DEFLATE_LEVEL: i32 = 6;
/// Zstandard's default level, as in QEMU.
const ZSTD_LEVEL: i32 = 3;

/// Encodes units by one codec; keeps its working memory (at most about 2 MiB) between them.
pub struct Encoder {
    state: State,
}

enum State {
    Deflate(Deflate),
    Zstd { compressor: Box<FrameCompressor>, frame: Vec<u8> },
    Unsupported,
}

impl Encoder {
    /// An encoder with its working memory.
    pub fn new(codec: Codec) -> Self {
        let state = match codec {
            Codec::Deflate => State::Deflate(Deflate::new(DEFLATE_LEVEL, false, WINDOW_BITS)),
            Codec::Zlib => State::Deflate(Deflate::new(DEFLATE_LEVEL, true, WINDOW_BITS)),
            Codec::Zstd => {
                let compressor = Box::new(FrameCompressor::new(CompressionLevel::Level(ZSTD_LEVEL)));
                State::Zstd { compressor, frame: Vec::new() }
            }
            _ => State::Unsupported,
        };
        Self { state }
    }

    /// Appends the stream for `input` to `out` and tells its length; `None`, with `out` as it was, if the stream would not
    /// be shorter than `input`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Unsupported`] for a codec that is not handled.
    pub fn encode(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Option<usize>> {
        let limit = input.len().saturating_sub(1);
        out.try_reserve(bound(input.len())).map_err(|_| Error::OutOfMemory)?;
        match &mut self.state {
            State::Deflate(deflate) => Ok(encode_deflate(deflate, input, limit, out)),
            State::Zstd { compressor, frame } => {
                compressor.compress_independent_frame_into(input, frame);
                if frame.len() > limit {
                    return Ok(None);
                }
                out.extend_from_slice(frame);
                Ok(Some(frame.len()))
            }
            State::Unsupported => Err(Error::Unsupported),
        }
    }
}

/// Bytes that a deflate stream of `len` bytes never exceeds: the library's bound for its default window, and something for
/// the shorter blocks of a smaller one.
fn bound(len: usize) -> usize {
    compress_bound(len).saturating_add(len / 32)
}

/// Always to the end of the stream: zlib-rs 0.6.8 keeps a wrong position in its buffer when a stream that did not fit is
/// given up by `reset`, and panics some streams later.
fn encode_deflate(deflate: &mut Deflate, input: &[u8], limit: usize, out: &mut Vec<u8>) -> Option<usize> {
    let start = out.len();
    out.resize(start + bound(input.len()), 0);
    deflate.reset();
    let ended = deflate.compress(input, &mut out[start..], DeflateFlush::Finish);
    let len = match ended {
        Ok(Status::StreamEnd) => usize::try_from(deflate.total_out()).ok().filter(|len| *len <= limit),
        _ => None,
    };
    out.truncate(start + len.unwrap_or(0));
    len
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let codec = match self.state {
            State::Deflate(_) => "deflate",
            State::Zstd { .. } => "zstd",
            State::Unsupported => "unsupported",
        };
        f.debug_struct("Encoder").field("codec", &codec).finish_non_exhaustive()
    }
}
