//! Forwarding for references and owners, all in one place.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::sync::Arc;

use crate::{BlockMap, BlockRead, BlockWrite, Extent, FileId, Limits, ReadPart, Result, WritePart, ZeroMode};

macro_rules! forward_read {
    ($($owner:ty),*) => {$(
        impl<T: BlockRead + ?Sized> BlockRead for $owner {
            fn size(&self) -> u64 { (**self).size() }
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> { (**self).read_at(offset, buf) }
            fn read_many(&self, parts: &mut [ReadPart<'_>]) -> Result<()> { (**self).read_many(parts) }
            fn limits(&self) -> Limits { (**self).limits() }
        }
        impl<T: BlockMap + ?Sized> BlockMap for $owner {
            fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> { (**self).extent_at(offset, max_len) }
            fn kept_at(&self, offset: u64, max_len: u64) -> Result<(u64, Option<(FileId, u64)>)> {
                (**self).kept_at(offset, max_len)
            }
        }
    )*};
}

macro_rules! forward_write {
    ($($owner:ty),*) => {$(
        impl<T: BlockWrite + ?Sized> BlockWrite for $owner {
            fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> { (**self).write_at(offset, buf) }
            fn write_many(&mut self, parts: &[WritePart<'_>]) -> Result<()> { (**self).write_many(parts) }
            fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
                (**self).write_zeroes(offset, len, mode)
            }
            fn discard(&mut self, offset: u64, len: u64) -> Result<()> { (**self).discard(offset, len) }
            fn set_size(&mut self, size: u64) -> Result<()> { (**self).set_size(size) }
            fn flush(&mut self) -> Result<()> { (**self).flush() }
        }
    )*};
}

forward_read!(&T, &mut T, Box<T>, Rc<T>, Arc<T>);
forward_write!(&mut T, Box<T>);
