use crate::{Error, ErrorKind, Result};

/// Granularities of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Every offset and length of a request must be a multiple of this (a power of two).
    pub request_align: u32,
    /// Requests aligned to this are served without reading before writing (a power of two).
    pub preferred_align: u32,
    /// After [`discard`](crate::BlockWrite::discard) the range reads as zero.
    pub discard_zeroes: bool,
    /// A write past the end extends the device, as it does a file.
    pub grows: bool,
}

impl Limits {
    /// A device addressed byte by byte, with no promise about discarded ranges.
    pub const BYTE: Self = Self { request_align: 1, preferred_align: 1, discard_zeroes: false, grows: false };
}

/// The bounds check that every device shares: `offset..offset + len` lies inside `size` bytes.
///
/// # Errors
/// [`ErrorKind::OutOfBounds`], located at `offset`, also when the sum overflows.
pub fn check_range(size: u64, offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(ErrorKind::OutOfBounds).at(offset)),
    }
}
