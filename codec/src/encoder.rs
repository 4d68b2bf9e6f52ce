use alloc::vec::Vec;
use core::fmt;

use instar_blockio::Codec;

use crate::deflate::Deflate;
use crate::zstd::Compress;
use crate::{Error, Result};

/// Encodes units by one codec; keeps its working memory between them.
pub struct Encoder {
    state: State,
}

enum State {
    Deflate(Deflate),
    Zstd(Compress),
    Unsupported,
}

impl Encoder {
    /// An encoder with its working memory.
    pub fn new(codec: Codec) -> Self {
        let state = match codec {
            Codec::Deflate => State::Deflate(Deflate::new(false)),
            Codec::Zlib => State::Deflate(Deflate::new(true)),
            Codec::Zstd => State::Zstd(Compress::new()),
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
        self.encode_within(input, input.len().saturating_sub(1), out)
    }

    /// As [`encode`](Self::encode), but appends the stream also where it is longer than `input`.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_always(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<usize> {
        // More than any of the codecs adds to what does not shrink.
        let limit = input.len().saturating_add(input.len() / 16).saturating_add(1024);
        self.encode_within(input, limit, out)?.ok_or(Error::OutOfMemory)
    }

    fn encode_within(&mut self, input: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<Option<usize>> {
        match &mut self.state {
            State::Deflate(deflate) => deflate.append(input, limit, out),
            State::Zstd(compress) => {
                let frame = compress.compress(input);
                if frame.len() > limit {
                    return Ok(None);
                }
                out.try_reserve(frame.len()).map_err(|_| Error::OutOfMemory)?;
                out.extend_from_slice(frame);
                Ok(Some(frame.len()))
            }
            State::Unsupported => Err(Error::Unsupported),
        }
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let codec = match self.state {
            State::Deflate(_) => "deflate",
            State::Zstd(_) => "zstd",
            State::Unsupported => "unsupported",
        };
        f.debug_struct("Encoder").field("codec", &codec).finish_non_exhaustive()
    }
}
