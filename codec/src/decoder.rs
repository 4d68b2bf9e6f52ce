use core::fmt;

use instar_blockio::Codec;

use crate::deflate::Inflate;
use crate::zstd::Decompress;
use crate::{Error, Result};

/// Decodes units; keeps its working memory between them.
///
/// The memory is made when a codec is first used, by what is stored and not by what it claims: see the crate's table.
#[derive(Default)]
pub struct Decoder {
    inflate: Option<Inflate>,
    zstd: Option<Decompress>,
}

impl Decoder {
    /// A decoder without working memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes the stream at the start of `stored`, filling exactly `out`. Bytes behind the stream are not looked at.
    ///
    /// Streams for more or less than `out` are judged as QEMU does:
    ///
    /// | codec | stream for less | stream for more |
    /// |---|---|---|
    /// | [`Deflate`](Codec::Deflate) | [`TooShort`](Error::TooShort) | fills `out` and is left there |
    /// | [`Zlib`](Codec::Zlib) | [`TooShort`](Error::TooShort) | [`TooLong`](Error::TooLong) |
    /// | [`Zstd`](Codec::Zstd) | further frames follow, or [`TooShort`](Error::TooShort) | the frame that fills `out` must end there, else [`TooLong`](Error::TooLong); more frames are left |
    ///
    /// Checksums, where a stream has them, are checked. An empty `out` is filled by any stream.
    ///
    /// # Errors
    /// Those above; [`Error::Damaged`]; [`Error::Unsupported`] for a codec that is not handled. After
    /// [`Error::TooShort`] the bytes that it counts are in `out`; all else in `out` is then unspecified.
    pub fn decode(&mut self, codec: Codec, stored: &[u8], out: &mut [u8]) -> Result<()> {
        match codec {
            Codec::Deflate | Codec::Zlib | Codec::Zstd if out.is_empty() => Ok(()),
            Codec::Deflate => self.inflate(false, stored, out),
            Codec::Zlib => self.inflate(true, stored, out),
            Codec::Zstd => self.zstd.get_or_insert_with(Decompress::new).decompress(stored, out),
            _ => Err(Error::Unsupported),
        }
    }

    fn inflate(&mut self, zlib_header: bool, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let inflate = self.inflate.get_or_insert_with(Inflate::new);
        let done = inflate.inflate(zlib_header, stored, out)?;
        if done.len < out.len() {
            Err(Error::TooShort(done.len))
        } else if zlib_header && !done.ended {
            Err(Error::TooLong)
        } else {
            Ok(())
        }
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("inflate", &self.inflate.is_some()).field("zstd", &self.zstd.is_some()).finish()
    }
}
