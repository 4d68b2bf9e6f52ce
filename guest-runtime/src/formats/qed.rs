//! QED.

use alloc::boxed::Box;

use instar_blockio::{FileId, Result as BlockResult};
use instar_guest_protocol::message::{Cause, Failure, Format, FormatFault, OptionError, ResizeRefusal, Step, Target};
use instar_legacy::qed::{
    CreateOptions, Error, Image, OpenOptions, OptionError as Wrong, Writer, create as create_qed,
};

use super::legacy::{Facts, Finish, Legacy, fault, io, not_in_format, target};
use super::target::{TargetDisk, TargetFile};
use super::{OpenImage, TargetImage, invalid_options};
use crate::ops::failure::about;
use crate::platform::{File, Platform};

/// Opens an image.
pub(super) fn open<P: Platform>(file: File<P>, id: FileId, strict: bool) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = Image::open(file, id, &OpenOptions { strict }).map_err(|error| failure(Step::Open, id, error))?;
    let facts = Facts {
        cluster_size: Some(image.cluster_size()),
        backing_file: image.backing_file().map(<[u8]>::to_vec),
        backing_format: image.backing_format().map(<[u8]>::to_vec),
        ..Facts::default()
    };
    Ok(Box::new(Legacy { image, id, format: Format::Qed, facts, unlock: None }))
}

/// Makes a fresh image; it has no valid header before it is finished.
pub(super) fn create<P: Platform>(
    file: TargetFile<P>,
    wanted: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let own = wanted.qed.clone().unwrap_or_default();
    let standard = CreateOptions::default();
    let options = CreateOptions {
        size,
        cluster_size: own.cluster_size.unwrap_or(standard.cluster_size),
        table_size: own.table_size.unwrap_or(standard.table_size),
        backing_file: wanted.backing.as_ref().map(|backing| backing.name.clone()),
        backing_format: wanted.backing.as_ref().map(|backing| backing.format_name.clone()),
    };
    target(file, durable, |disk, id| {
        let writer = create_qed(disk, id, &options).map_err(|error| failure(Step::Create, id, error))?;
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

impl<P: Platform> Finish for Writer<TargetDisk<P>> {
    fn finish_image(self) -> BlockResult<()> {
        self.finish().map(|_| ())
    }

    fn expect_new_backing(&mut self) {
        self.expect_backing();
    }

    fn record_backing(&mut self, id: FileId, name: &[u8], format_name: &[u8]) -> Option<Result<(), Failure>> {
        Some(self.set_backing(name, format_name == b"raw").map_err(|error| match error {
            Error::BackingNameTooLong(_) => about(Step::Edit, id, Cause::HeaderFull),
            other => failure(Step::Edit, id, other),
        }))
    }
}

/// Gives the disk of an image another size, which takes one write of its header. An image that was not closed is repaired before.
///
/// # Errors
/// A size that can't be; an image that can't be repaired.
pub(crate) fn resize<P: Platform>(platform: &P, id: FileId, size: u64) -> Result<(), Failure> {
    let file = platform.file(id.0).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    let mut writer = Writer::open(TargetDisk::new(file, true), id).map_err(|error| failure(Step::Open, id, error))?;
    let resized = writer.resize(size);
    resized.map_err(|error| match error {
        Error::ImageSize(_) => {
            Failure { value: ResizeRefusal::ImageSize as u64, ..about(Step::Edit, id, Cause::ResizeRefused) }
        }
        error => failure(Step::Edit, id, error),
    })
}

fn failure(step: Step, id: FileId, error: Error) -> Failure {
    let fault = |which, value| fault(step, id, Format::Qed, which, value);
    match error {
        Error::Io(error) => io(step, id, error),
        Error::NotQed => not_in_format(step, id, Format::Qed),
        Error::UnknownFeatures(bits) => fault(FormatFault::QedFeatures, bits),
        Error::ClusterSize(size) => fault(FormatFault::QedClusterSize, size.into()),
        Error::TableSize(size) => fault(FormatFault::QedTableSize, size.into()),
        Error::ImageSize(size) => fault(FormatFault::QedImageSize, size),
        Error::TableOffset(at) => fault(FormatFault::QedTableOffset, at),
        Error::HeaderSize(size) => fault(FormatFault::QedHeaderSize, size.into()),
        Error::BackingOffset(at) => fault(FormatFault::QedBackingOffset, at.into()),
        Error::BackingNameTooLong(len) => fault(FormatFault::QedBackingLength, len.into()),
        Error::Damaged => fault(FormatFault::QedDamaged, 0),
        Error::Options(wrong) => {
            let (reason, value2) = match wrong {
                Wrong::ClusterSize(size) => (OptionError::QedClusterSize, size),
                Wrong::TableSize(size) => (OptionError::QedTableSize, size),
                Wrong::TableOfOneCluster => (OptionError::QedTableOfOneCluster, 1),
                Wrong::SizeTooLarge(most) => (OptionError::QedImageSize, most),
                _ => (OptionError::BackingNameLength, 0),
            };
            Failure { value2, ..invalid_options(id, Format::Qed, reason) }
        }
        _ => about(step, id, Cause::Unsupported),
    }
}
