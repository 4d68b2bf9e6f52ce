//! qcow, version 1.

use alloc::boxed::Box;

use instar_blockio::FileId;
use instar_guest_protocol::message::{Cause, Failure, Format, FormatFault, OptionError, Step, Target};
use instar_legacy::qcow::{
    CreateOptions, Error, Image, OpenOptions, OptionError as Wrong, Writer, create as create_qcow,
};

use super::legacy::{Facts, Legacy, Unlock, deflate, fault, io, not_in_format, target};
use super::target::TargetFile;
use super::{OpenImage, TargetImage, invalid_options};
use crate::ops::failure::about;
use crate::platform::{File, Platform};

/// Opens an image.
pub(super) fn open<P: Platform>(file: File<P>, id: FileId, strict: bool) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = Image::open(file, id, &OpenOptions { strict }).map_err(|error| failure(Step::Open, id, error))?;
    let facts = Facts {
        cluster_size: Some(image.cluster_size()),
        encrypted: image.is_encrypted(),
        backing_file: image.backing_file().map(<[u8]>::to_vec),
        ..Facts::default()
    };
    let unlock: Option<Unlock<Image<File<P>>>> = if facts.encrypted { Some(Image::set_cipher) } else { None };
    Ok(Box::new(Legacy { image, id, format: Format::Qcow, facts, unlock }))
}

/// Makes a fresh image; it has no valid header before it is finished.
pub(super) fn create<P: Platform>(
    file: TargetFile<P>,
    wanted: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let backing_file = wanted.backing.as_ref().map(|backing| backing.name.clone());
    let options = CreateOptions { size, backing_file };
    target(file, durable, |disk, id| {
        let writer = create_qcow(disk, id, &options).map_err(|error| failure(Step::Create, id, error))?;
        let compression = deflate(writer.cluster_size());
        Ok((writer, Some(compression)))
    })
}

/// Opens an existing image to write into it.
pub(super) fn open_existing<P: Platform>(
    step: Step,
    file: TargetFile<P>,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    target(file, durable, |disk, id| {
        let writer = Writer::open(disk, id).map_err(|error| failure(step, id, error))?;
        let compression = deflate(writer.cluster_size());
        Ok((writer, Some(compression)))
    })
}

fn failure(step: Step, id: FileId, error: Error) -> Failure {
    let fault = |which, value| fault(step, id, Format::Qcow, which, value);
    match error {
        Error::Io(error) => io(step, id, error),
        Error::NotQcow => not_in_format(step, id, Format::Qcow),
        Error::UnsupportedVersion(version) => fault(FormatFault::QcowVersion, version.into()),
        Error::SizeTooSmall(size) => fault(FormatFault::QcowSize, size),
        Error::ClusterBits(bits) => fault(FormatFault::QcowClusterSize, bits.into()),
        Error::L2Bits(bits) => fault(FormatFault::QcowL2Size, bits.into()),
        Error::EncryptionMethod(method) => fault(FormatFault::QcowEncryption, method.into()),
        Error::ImageTooLarge(size) => fault(FormatFault::QcowTooLarge, size),
        Error::BackingNameTooLong(len) => fault(FormatFault::QcowBackingLength, len.into()),
        Error::Encrypted => Failure { format: Format::Qcow.into(), ..about(step, id, Cause::Encrypted) },
        Error::Options(Wrong::SizeZero) => invalid_options(id, Format::Qcow, OptionError::QcowSizeZero),
        Error::Options(Wrong::BackingNameTooLong(_)) => {
            invalid_options(id, Format::Qcow, OptionError::BackingNameLength)
        }
        Error::Options(_) => invalid_options(id, Format::Qcow, OptionError::QcowSizeTooLarge),
        _ => about(step, id, Cause::Unsupported),
    }
}
