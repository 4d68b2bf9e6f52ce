//! Bochs.

use alloc::boxed::Box;

use instar_blockio::FileId;
use instar_guest_protocol::message::{Cause, Failure, Format, FormatFault, Step};
use instar_legacy::bochs::{Error, Image, OpenOptions};

use super::OpenImage;
use super::legacy::{Facts, Legacy, fault, io, not_in_format};
use crate::ops::failure::about;
use crate::platform::{File, Platform};

/// Opens an image.
pub(super) fn open<P: Platform>(file: File<P>, id: FileId, strict: bool) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = Image::open(file, id, &OpenOptions { strict }).map_err(|error| failure(id, error))?;
    Ok(Box::new(Legacy { image, id, format: Format::Bochs, facts: Facts::default(), unlock: None }))
}

fn failure(id: FileId, error: Error) -> Failure {
    let fault = |which, value: u32| fault(Step::Open, id, Format::Bochs, which, value.into());
    match error {
        Error::Io(error) => io(Step::Open, id, error),
        Error::NotBochs => not_in_format(Step::Open, id, Format::Bochs),
        Error::CatalogTooLarge(entries) => fault(FormatFault::BochsCatalogSize, entries),
        Error::ExtentTooSmall(size) => fault(FormatFault::BochsExtentSmall, size),
        Error::ExtentNotPowerOfTwo(size) => fault(FormatFault::BochsExtentPower, size),
        Error::ExtentTooLarge(size) => fault(FormatFault::BochsExtentLarge, size),
        Error::CatalogTooSmall(entries) => fault(FormatFault::BochsCatalogSmall, entries),
        _ => about(Step::Open, id, Cause::Unsupported),
    }
}
