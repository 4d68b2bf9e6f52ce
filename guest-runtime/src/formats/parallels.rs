//! Parallels.

use alloc::boxed::Box;

use instar_blockio::FileId;
use instar_guest_protocol::message::{Cause, Failure, Field, Format, FormatFault, OptionError, Step, Target};
use instar_legacy::parallels::{
    CreateOptions, Error, Image, OpenOptions, OptionError as Wrong, Writer, create as create_parallels,
};

use super::legacy::{Facts, Legacy, fault, io, not_in_format, target};
use super::target::TargetFile;
use super::{OpenImage, TargetImage, invalid_options};
use crate::ops::failure::about;
use crate::platform::{File, Platform};

/// Opens an image.
pub(super) fn open<P: Platform>(file: File<P>, id: FileId, strict: bool) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = Image::open(file, id, &OpenOptions { strict }).map_err(|error| failure(Step::Open, id, error))?;
    Ok(Box::new(Legacy { image, id, format: Format::Parallels, facts: Facts::default(), unlock: None }))
}

/// Makes a fresh image; it has no valid header before it is finished.
pub(super) fn create<P: Platform>(
    file: TargetFile<P>,
    wanted: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let standard = CreateOptions::default();
    let cluster_size = wanted.parallels.as_ref().and_then(|own| own.cluster_size).unwrap_or(standard.cluster_size);
    target(file, durable, |disk, id| {
        let options = CreateOptions { size, cluster_size };
        let writer = create_parallels(disk, id, &options).map_err(|error| failure(Step::Create, id, error))?;
        Ok((writer, None))
    })
}

/// Opens an existing image to write into it.
pub(super) fn open_existing<P: Platform>(
    step: Step,
    file: TargetFile<P>,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    target(file, durable, |disk, id| Ok((Writer::open(disk, id).map_err(|error| failure(step, id, error))?, None)))
}

fn failure(step: Step, id: FileId, error: Error) -> Failure {
    let fault = |which, value| fault(step, id, Format::Parallels, which, value);
    match error {
        Error::Io(error) => io(step, id, error),
        Error::NotParallels => not_in_format(step, id, Format::Parallels),
        Error::NoSectors => fault(FormatFault::ParallelsTracks, 0),
        Error::ClusterTooBig(sectors) => fault(FormatFault::ParallelsCluster, sectors.into()),
        Error::TableTooLarge(entries) => fault(FormatFault::ParallelsCatalog, entries.into()),
        Error::SizeTooLarge(value2) => {
            Failure { value: Field::SizeOverflow as u64, value2, ..about(step, id, Cause::InvalidField) }
        }
        Error::Options(Wrong::ClusterTooLarge(_)) => {
            invalid_options(id, Format::Parallels, OptionError::ParallelsClusterSize)
        }
        Error::Options(_) => invalid_options(id, Format::Parallels, OptionError::ParallelsImageSize),
        _ => about(step, id, Cause::Unsupported),
    }
}
