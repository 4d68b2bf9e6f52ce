//! Zstandard by structured-zstd.

use alloc::boxed::Box;
use alloc::vec::Vec;

use structured_zstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use structured_zstd::decoding::{
    ContentChecksum, FrameContentSize, FrameDecoder, FrameSizeError, find_frame_compressed_size, read_frame_header_info,
};
use structured_zstd::encoding::{CompressionLevel, FrameCompressor};

use crate::{Error, Result, params};

pub struct Decompress(Box<FrameDecoder>);

impl Decompress {
    pub fn new() -> Self {
        let mut decoder = Box::new(FrameDecoder::new());
        // Left to itself it only computes them.
        decoder.set_content_checksum(ContentChecksum::Verify);
        Self(decoder)
    }

    /// Decodes whole frames until `out` is full; skippable frames yield nothing.
    ///
    /// Each frame is decoded right into `out`, so a window needs no memory and matches can't reach past it.
    pub fn decompress(&mut self, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let (mut rest, mut written) = (stored, 0);
        while written < out.len() {
            let len = frame_len(rest).ok_or(Error::TooShort(written))??;
            let (frame, behind) = rest.split_at_checked(len).ok_or(Error::Damaged)?;
            written += self.0.decode_all(frame, &mut out[written..]).map_err(|error| match error {
                FrameDecoderError::TargetTooSmall => Error::TooLong,
                _ => Error::Damaged,
            })?;
            rest = behind;
        }
        Ok(())
    }
}

/// Stored length of the frame at the start of `bytes`; `None` if they end before it does.
fn frame_len(bytes: &[u8]) -> Option<Result<usize>> {
    match read_frame_header_info(bytes, false) {
        Ok(info) if info.content_size == FrameContentSize::Unknown && info.window_size > params::ZSTD_MAX_WINDOW => {
            return Some(Err(Error::Damaged));
        }
        Ok(_) | Err(ReadFrameHeaderError::SkipFrame { .. }) => {}
        Err(_) if bytes.len() < MIN_FRAME => return None,
        Err(_) => return Some(Err(Error::Damaged)),
    }
    match find_frame_compressed_size(bytes) {
        Ok(len) => Some(Ok(len)),
        Err(FrameSizeError::Truncated) => None,
        Err(_) => Some(Err(Error::Damaged)),
    }
}

/// Bytes of the shortest frame: an empty skippable one.
const MIN_FRAME: usize = 8;

pub struct Compress {
    compressor: Box<FrameCompressor>,
    frame: Vec<u8>,
}

impl Compress {
    pub fn new() -> Self {
        let compressor = Box::new(FrameCompressor::new(CompressionLevel::Level(params::ZSTD_LEVEL)));
        Self { compressor, frame: Vec::new() }
    }

    /// The frame for `input`.
    pub fn compress(&mut self, input: &[u8]) -> &[u8] {
        self.compressor.compress_independent_frame_into(input, &mut self.frame);
        &self.frame
    }
}
