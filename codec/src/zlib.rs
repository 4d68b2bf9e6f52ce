//! Inflate and deflate by zlib-rs.

use alloc::vec::Vec;

use zlib_rs::{DeflateConfig, DeflateFlush, InflateError, InflateFlush, Status};

use crate::inflated::Inflated;
use crate::{Error, Result, params};

pub struct Inflate(zlib_rs::Inflate);

impl Inflate {
    pub fn new() -> Self {
        Self(zlib_rs::Inflate::new(false, params::INFLATE_WINDOW_BITS))
    }

    pub fn inflate(&mut self, zlib_header: bool, stored: &[u8], out: &mut [u8]) -> Result<Inflated> {
        self.0.reset(zlib_header);
        let status = self.0.decompress(stored, out, InflateFlush::Finish);
        let len = usize::try_from(self.0.total_out()).map_err(|_| Error::Damaged)?;
        match status {
            Ok(Status::StreamEnd) => Ok(Inflated { len, ended: true }),
            Ok(Status::Ok | Status::BufError) => Ok(Inflated { len, ended: false }),
            Err(InflateError::MemError) => Err(Error::OutOfMemory),
            Err(_) => Err(Error::Damaged),
        }
    }
}

pub struct Deflate(zlib_rs::Deflate);

impl Deflate {
    pub fn new(zlib_header: bool) -> Self {
        let bits = i32::from(params::DEFLATE_WINDOW_BITS);
        Self(zlib_rs::Deflate::new_with_config(DeflateConfig {
            level: i32::from(params::DEFLATE_LEVEL),
            // By zlib's convention a negative number asks for a raw stream.
            window_bits: if zlib_header { params::ZLIB_WINDOW_BITS } else { -bits },
            mem_level: params::DEFLATE_MEM_LEVEL,
            ..DeflateConfig::default()
        }))
    }

    /// Appends the stream, if it has at most `limit` bytes, and tells its length.
    ///
    /// The stream is always made to its end: zlib-rs 0.6.8 keeps a wrong position in its buffer when one that did not fit is given
    /// up by `reset`, and panics some streams later.
    pub fn append(&mut self, input: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<Option<usize>> {
        let (start, bound) = (out.len(), bound(input.len()));
        out.try_reserve(bound).map_err(|_| Error::OutOfMemory)?;
        out.resize(start + bound, 0);
        self.0.reset();
        let len = match self.0.compress(input, &mut out[start..], DeflateFlush::Finish) {
            Ok(Status::StreamEnd) => usize::try_from(self.0.total_out()).ok().filter(|&len| len <= limit),
            _ => None,
        };
        out.truncate(start + len.unwrap_or(0));
        Ok(len)
    }
}

/// Bytes that the stream for `len` bytes never exceeds: the library's bound for its default window, and something for the shorter
/// blocks of a smaller one.
fn bound(len: usize) -> usize {
    zlib_rs::compress_bound(len).saturating_add(len / 32)
}
