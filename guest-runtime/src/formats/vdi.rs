//! VDI.

use alloc::boxed::Box;

use instar_blockio::FileId;
use instar_guest_protocol::message::{Cause, Failure, Format, FormatFault, OptionError, Step, Target};
use instar_legacy::vdi::{
    BLOCK_SIZE, CreateOptions, Error, Image, OpenOptions, OptionError as Wrong, Writer, create as create_vdi,
};

use super::holes::WithHoles;
use super::legacy::{Facts, Legacy, fault, io, target, with_number};
use super::target::TargetFile;
use super::{OpenImage, TargetImage, invalid_options};
use crate::ops::failure::about;
use crate::platform::{File, Platform};

/// Opens an image.
pub(super) fn open<P: Platform>(
    platform: &P,
    file: File<P>,
    id: FileId,
    strict: bool,
) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = Image::open(file, id, &OpenOptions { strict }).map_err(|error| failure(Step::Open, id, error))?;
    let facts = Facts { cluster_size: Some(BLOCK_SIZE), ..Facts::default() };
    if image.header().is_static {
        let image = WithHoles::new(platform, image, Some(alloc::vec![id]));
        return Ok(Box::new(Legacy { image, id, format: Format::Vdi, facts, unlock: None }));
    }
    Ok(Box::new(Legacy { image, id, format: Format::Vdi, facts, unlock: None }))
}

/// Makes a fresh image; it has no valid header before it is finished.
pub(super) fn create<P: Platform>(
    file: TargetFile<P>,
    wanted: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let own = wanted.vdi.clone().unwrap_or_default();
    let (uuids, _) = own.uuids.as_chunks::<16>();
    let uuid = |at| uuids.get(at).copied().unwrap_or_default();
    let options = CreateOptions { size, is_static: own.is_static, uuids: [uuid(0), uuid(1)] };
    target(file, durable, |disk, id| {
        let writer = create_vdi(disk, id, &options).map_err(|error| failure(Step::Create, id, error))?;
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
    let fault = |which, value| fault(step, id, Format::Vdi, which, value);
    match error {
        Error::Io(error) => io(step, id, error),
        Error::SizeTooLarge(size) => fault(FormatFault::VdiSize, size),
        Error::Signature(signature) => fault(FormatFault::VdiSignature, signature.into()),
        Error::UnsupportedVersion(version) => fault(FormatFault::VdiVersion, version.into()),
        Error::MapOffset(at) => fault(FormatFault::VdiMapOffset, at.into()),
        Error::DataOffset(at) => fault(FormatFault::VdiDataOffset, at.into()),
        Error::SectorSize(size) => fault(FormatFault::VdiSectorSize, size.into()),
        Error::BlockSize(size) => fault(FormatFault::VdiBlockSize, size.into()),
        Error::MapTooSmall { disk, room } => with_number(fault(FormatFault::VdiMapSize, disk), room),
        Error::Linked => fault(FormatFault::VdiLink, 0),
        Error::HasParent => fault(FormatFault::VdiParent, 0),
        Error::TooManyBlocks(count) => fault(FormatFault::VdiBlocks, count.into()),
        Error::Options(Wrong::SizeTooLarge(size)) => {
            Failure { value2: size, ..invalid_options(id, Format::Vdi, OptionError::VdiSize) }
        }
        _ => about(step, id, Cause::Unsupported),
    }
}
