//! Inflate and deflate by miniz_oxide, for programs that give zlib-rs no allocator.

use alloc::boxed::Box;
use alloc::vec::Vec;

use miniz_oxide::DataFormat;
use miniz_oxide::deflate::core::{CompressionStrategy, CompressorOxide, TDEFLFlush, TDEFLStatus, compress};
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use crate::inflated::Inflated;
use crate::{Error, Result, params};

pub struct Inflate(Box<DecompressorOxide>);

impl Inflate {
    pub fn new() -> Self {
        Self(Box::new(DecompressorOxide::new()))
    }

    pub fn inflate(&mut self, zlib_header: bool, stored: &[u8], out: &mut [u8]) -> Result<Inflated> {
        self.0.init();
        let header = if zlib_header { inflate_flags::TINFL_FLAG_PARSE_ZLIB_HEADER } else { 0 };
        let flags = header | inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, _, len) = decompress(&mut self.0, stored, out, 0, flags);
        match status {
            TINFLStatus::Done => Ok(Inflated { len, ended: true }),
            TINFLStatus::HasMoreOutput | TINFLStatus::NeedsMoreInput | TINFLStatus::FailedCannotMakeProgress => {
                Ok(Inflated { len, ended: false })
            }
            _ => Err(Error::Damaged),
        }
    }
}

/// miniz_oxide always looks 32 KiB back (also where it is asked for less). So that no match is longer than the window, its memory
/// is cleared after each window's worth of input.
pub struct Deflate(Box<CompressorOxide>);

impl Deflate {
    pub fn new(zlib_header: bool) -> Self {
        let format = if zlib_header { DataFormat::Zlib } else { DataFormat::Raw };
        let (strategy, bits) = (CompressionStrategy::Default, 15);
        Self(Box::new(CompressorOxide::with_params(format, params::DEFLATE_LEVEL, strategy, bits)))
    }

    /// Appends the stream, if it has at most `limit` bytes, and tells its length.
    pub fn append(&mut self, input: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<Option<usize>> {
        let start = out.len();
        out.try_reserve(limit).map_err(|_| Error::OutOfMemory)?;
        out.resize(start + limit, 0);
        let len = self.deflate(input, &mut out[start..]);
        out.truncate(start + len.unwrap_or(0));
        Ok(len)
    }

    /// Length of the stream; `None` if it does not fit in `out`.
    fn deflate(&mut self, input: &[u8], out: &mut [u8]) -> Option<usize> {
        self.0.reset();
        let (mut rest, mut written) = (input, 0);
        loop {
            let (part, behind) = rest.split_at(rest.len().min(1 << params::DEFLATE_WINDOW_BITS));
            let flush = if behind.is_empty() { TDEFLFlush::Finish } else { TDEFLFlush::Full };
            let (status, read, len) = compress(&mut self.0, part, &mut out[written..], flush);
            written += len;
            match status {
                TDEFLStatus::Done => return Some(written),
                TDEFLStatus::Okay if read == part.len() && !behind.is_empty() => rest = behind,
                _ => return None,
            }
        }
    }
}
