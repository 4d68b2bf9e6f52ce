//! Compressed loop.

use alloc::boxed::Box;

use instar_blockio::FileId;
use instar_guest_protocol::message::{Cause, Failure, Format, FormatFault, Step};
use instar_legacy::cloop::{Error, Image, OpenOptions};

use super::OpenImage;
use super::legacy::{Facts, Legacy, fault, io};
use crate::ops::failure::about;
use crate::platform::{File, Platform};

/// Opens an image.
pub(super) fn open<P: Platform>(file: File<P>, id: FileId, strict: bool) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = Image::open(file, id, &OpenOptions { strict }).map_err(|error| failure(id, error))?;
    Ok(Box::new(Legacy { image, id, format: Format::Cloop, facts: Facts::default(), unlock: None }))
}

fn failure(id: FileId, error: Error) -> Failure {
    let fault = |which, value: u32| fault(Step::Open, id, Format::Cloop, which, value.into());
    match error {
        Error::Io(error) => io(Step::Open, id, error),
        Error::BlockSizeZero => fault(FormatFault::CloopBlockZero, 0),
        Error::BlockSize(size) => fault(FormatFault::CloopBlockSize, size),
        Error::BlockTooLarge(size) => fault(FormatFault::CloopBlockLarge, size),
        Error::TooManyBlocks(count) => fault(FormatFault::CloopBlocks, count),
        Error::TooManyOffsets(count) => fault(FormatFault::CloopOffsets, count),
        Error::OffsetOrder(index) => fault(FormatFault::CloopOrder, index),
        Error::StreamTooLong(index) => fault(FormatFault::CloopStream, index),
        _ => about(Step::Open, id, Cause::Unsupported),
    }
}
