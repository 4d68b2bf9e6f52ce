use core::ops::Range;

use crate::{Error, ErrorKind, Extent, Extents, FileId, Limits, Result};

/// One piece of a batch for [`BlockRead::read_many`].
#[derive(Debug)]
pub struct ReadPart<'a> {
    /// Byte offset on the device.
    pub offset: u64,
    /// Filled completely.
    pub buf: &'a mut [u8],
}

/// One piece of a batch for [`BlockWrite::write_many`].
#[derive(Clone, Copy, Debug)]
pub struct WritePart<'a> {
    /// Byte offset on the device.
    pub offset: u64,
    /// Written completely.
    pub buf: &'a [u8],
}

/// Positioned reading.
///
/// # Contract
/// * The implementation checks bounds ([`check_range`](crate::check_range)); a range past [`size`](Self::size) is
///   [`ErrorKind::OutOfBounds`], never a short read.
/// * Arithmetic on `offset` and length does not overflow whatever the arguments.
/// * A read of length 0 inside `0..=size` succeeds.
pub trait BlockRead {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`, or fails.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`] past the end; what the device reports otherwise. After an error the
    /// contents of `buf` are unspecified.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Reads several pieces, in one turn where the device can.
    ///
    /// # Errors
    /// The first failing piece's error.
    fn read_many(&self, parts: &mut [ReadPart<'_>]) -> Result<()> {
        parts.iter_mut().try_for_each(|part| self.read_at(part.offset, part.buf))
    }

    /// Granularities.
    fn limits(&self) -> Limits {
        Limits::BYTE
    }
}

/// What [`BlockWrite::write_zeroes`] does with the space of the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Give the space back where possible.
    Unmap,
    /// Keep or allocate the space.
    KeepAllocated,
}

/// Positioned writing.
pub trait BlockWrite: BlockRead {
    /// Writes all of `buf` at `offset`.
    ///
    /// A device that [grows](Limits::grows) is extended by a write past its end (a gap reads as zero); any
    /// other answers [`ErrorKind::OutOfBounds`].
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`], [`ErrorKind::ReadOnly`], [`ErrorKind::NoSpace`] or what the device reports.
    /// After an error any part of the range may be old or new.
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Writes several pieces in any order, in one turn where the device can.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at), of one piece; the others may be written or not.
    fn write_many(&mut self, parts: &[WritePart<'_>]) -> Result<()> {
        parts.iter().try_for_each(|part| self.write_at(part.offset, part.buf))
    }

    /// Makes the range read as zero. It must lie inside the device, even on one that grows.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()>;

    /// Gives the range's space back. What it reads as afterwards is told by [`Limits::discard_zeroes`].
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn discard(&mut self, offset: u64, len: u64) -> Result<()>;

    /// Sets the size; new bytes read as zero.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the device can't.
    fn set_size(&mut self, size: u64) -> Result<()>;

    /// Returns once data and metadata written before are durable.
    ///
    /// # Errors
    /// What the device reports; data may then be lost.
    fn flush(&mut self) -> Result<()>;
}

/// Knows where the bytes of the disk lie.
pub trait BlockMap: BlockRead {
    /// The run at `offset`, clipped to `max_len`: `1..=max_len` bytes, starting exactly at `offset`.
    ///
    /// Looks no further than the table that describes `offset`, so the answer may be followed by a
    /// run of the same kind; [`BlockMapExt::extents`] joins them.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`] if `offset` is not inside the disk, [`ErrorKind::InvalidInput`] if `max_len` is 0,
    /// [`ErrorKind::Corrupt`] for an entry that can't be, or the device's error.
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent>;

    /// Where space is kept for bytes that this layer leaves to its backing image: how many of the `max_len` bytes from `offset` on
    /// have one answer, and the place of the first of them, if there is one.
    ///
    /// # Errors
    /// As [`extent_at`](Self::extent_at).
    fn kept_at(&self, offset: u64, max_len: u64) -> Result<(u64, Option<(FileId, u64)>)> {
        let _ = offset;
        Ok((max_len, None))
    }
}

/// Bulk writing: the image decides where bytes go, the caller puts them there.
///
/// Between [`reserve`](Self::reserve) and [`commit`](Self::commit) no reader of the image sees the new place, so a failure in
/// between leaves the old contents (and at worst leaked space).
pub trait BlockAlloc: BlockMap {
    /// Finds a place for plain data at `offset..offset + len`.
    ///
    /// The answer starts at `offset` and may be shorter than asked (the caller asks again for the
    /// rest); it is contiguous in one file. Bytes of a newly allocated unit that the reservation
    /// does not cover read as zero, unless the image has a backing: then the caller reserves whole
    /// units (see [`alloc_unit`](Self::alloc_unit)).
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`], [`ErrorKind::NoSpace`], [`ErrorKind::Corrupt`] or the device's error.
    fn reserve(&mut self, offset: u64, len: u64) -> Result<Reservation>;

    /// Finds a place for `stored_len` bytes of the compressed unit at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the format or image stores nothing compressed; else as [`reserve`](Self::reserve).
    fn reserve_compressed(&mut self, offset: u64, stored_len: u32) -> Result<Reservation> {
        let _ = (offset, stored_len);
        Err(Error::new(ErrorKind::Unsupported))
    }

    /// Makes the reserved place visible, once its bytes are written.
    ///
    /// # Errors
    /// The device's error.
    fn commit(&mut self, done: Reservation) -> Result<()>;

    /// Gives a reservation back.
    ///
    /// # Errors
    /// The device's error.
    fn abort(&mut self, undone: Reservation) -> Result<()>;

    /// Bytes in which space is allocated (cluster, subcluster, block, grain); a power of two.
    fn alloc_unit(&self) -> u64;
}

/// A place for data that no reader sees yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "commit or abort it"]
pub struct Reservation {
    /// Disk offset.
    pub offset: u64,
    /// Length on the disk, bytes.
    pub len: u64,
    /// File that takes the bytes.
    pub file: FileId,
    /// Where in that file.
    pub host: u64,
    /// Bytes to write there: `len` for plain data, the stream's length for a compressed unit.
    pub stored_len: u64,
    /// The unit is stored compressed.
    pub compressed: bool,
}

/// A disk that can be read, written and mapped.
pub trait BlockIo: BlockWrite + BlockMap {}
impl<T: BlockWrite + BlockMap + ?Sized> BlockIo for T {}

/// A layer of a chain: any mapped disk that can move to another thread.
pub trait Layer: BlockMap + Send {}
impl<T: BlockMap + Send + ?Sized> Layer for T {}

/// Convenience over [`BlockMap`].
pub trait BlockMapExt: BlockMap {
    /// The runs of `range`, neighbours joined, in order.
    fn extents(&self, range: Range<u64>) -> Extents<'_, Self> {
        Extents::new(self, range)
    }
}
impl<T: BlockMap + ?Sized> BlockMapExt for T {}
