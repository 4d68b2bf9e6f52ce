use alloc::boxed::Box;
use core::fmt;

use instar_blockio::Codec;
use structured_zstd::decoding::FrameDecoder;
use structured_zstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use zlib_rs::{Inflate, InflateError, InflateFlush};

use crate::{Error, Result};

/// log2 of the largest deflate window. Smaller windows are part of it.
const WINDOW_BITS: u8 = 15;
/// Largest window accepted: that of the levels up to 19, whatever the size of the unit. A frame for a unit of 2 MiB
/// needs no more, and the memory behind it is only used as far as the unit reaches.
const MAX_ZSTD_WINDOW: u64 = 8 << 20;

/// Decodes units; keeps its working memory (at most about 9 MiB) between them.
#[derive(Default)]
pub struct Decoder {
    inflate: Option<Inflate>,
    zstd: Option<Box<FrameDecoder>>,
}

impl Decoder {
    /// A decoder without working memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes the stream at the start of `stored`, filling exactly `out`.
    ///
    /// As in QEMU, what the stream holds beyond `out` is left undecoded.
    ///
    /// # Errors
    /// [`Error::Damaged`], or [`Error::TooShort`] for a stream that ends before `out` is full; `out` is then unspecified.
    pub fn decode(&mut self, codec: Codec, stored: &[u8], out: &mut [u8]) -> Result<()> {
        match codec {
            _ if out.is_empty() => Ok(()),
            Codec::Deflate => self.inflate(false, stored, out),
            Codec::Zlib => self.inflate(true, stored, out),
            Codec::Zstd => self.zstd(stored, out),
            _ => Err(Error::Unsupported),
        }
    }

    fn inflate(&mut self, zlib_header: bool, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let inflate = self.inflate.get_or_insert_with(|| Inflate::new(zlib_header, WINDOW_BITS));
        inflate.reset(zlib_header);
        let ended = inflate.decompress(stored, out, InflateFlush::Finish);
        let written = usize::try_from(inflate.total_out()).unwrap_or(usize::MAX);
        match ended {
            Ok(_) if written == out.len() => Ok(()),
            Ok(_) => Err(Error::TooShort(written)),
            Err(InflateError::MemError) => Err(Error::OutOfMemory),
            Err(_) => Err(Error::Damaged),
        }
    }

    /// Decodes frame after frame until the unit is full; skippable frames are skipped.
    fn zstd(&mut self, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let decoder = self.zstd.get_or_insert_with(|| Box::new(FrameDecoder::new()));
        decoder.set_max_window_size(MAX_ZSTD_WINDOW).map_err(|_| Error::Damaged)?;
        let mut rest = stored;
        let mut written = 0;
        while written < out.len() {
            if rest.is_empty() {
                return Err(Error::TooShort(written));
            }
            match decoder.reset(&mut rest) {
                Ok(()) => written += decode_frame(decoder, &mut rest, &mut out[written..])?,
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    rest = rest.get(length as usize..).ok_or(Error::TooShort(written))?;
                }
                Err(_) => return Err(Error::Damaged),
            }
        }
        Ok(())
    }
}

/// Decodes one frame, as far as `out` has room, and tells how far it came.
fn decode_frame(decoder: &mut FrameDecoder, rest: &mut &[u8], out: &mut [u8]) -> Result<usize> {
    let mut written = 0;
    while written < out.len() {
        let (read, wrote) = decoder.decode_from_to(rest, &mut out[written..]).map_err(|_| Error::Damaged)?;
        *rest = rest.get(read..).ok_or(Error::Damaged)?;
        written += wrote;
        if decoder.is_finished() && decoder.can_collect() == 0 {
            return Ok(written);
        }
        if read == 0 && wrote == 0 {
            return Err(Error::TooShort(written));
        }
    }
    Ok(written)
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("inflate", &self.inflate.is_some()).field("zstd", &self.zstd.is_some()).finish()
    }
}
