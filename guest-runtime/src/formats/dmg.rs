//! Apple disk images.

use alloc::boxed::Box;

use instar_blockio::FileId;
use instar_guest_protocol::message::{Call, Cause, Failure, Format, FormatFault, Step, call};
use instar_legacy::dmg::{Error, Image, OpenOptions};

use super::OpenImage;
use super::legacy::{Facts, Legacy, fault, io, with_number};
use crate::ops::failure::about;
use crate::platform::{File, Platform};

/// Opens an image, and warns of parts that can't be read.
pub(super) fn open<P: Platform>(
    platform: &P,
    file: File<P>,
    id: FileId,
    strict: bool,
) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = Image::open(file, id, &OpenOptions { strict }).map_err(|error| failure(id, error))?;
    // As QEMU does: kinds that it has a module for, and the first of all others.
    let is_known = |kind: &u32| matches!(kind, 0x8000_0006 | 0x8000_0007);
    let unknown = image.unreadable().iter().find(|kind| !is_known(kind));
    for &kind in image.unreadable().iter().filter(|kind| is_known(kind) || unknown == Some(kind)) {
        let warning = Failure { value: kind.into(), ..about(Step::Open, id, Cause::UnreadableChunks) };
        platform.call(&Call { kind: Some(call::Kind::Warning(warning)) });
    }
    Ok(Box::new(Legacy { image, id, format: Format::Dmg, facts: Facts::default(), unlock: None }))
}

fn failure(id: FileId, error: Error) -> Failure {
    let fault = |which, value| fault(Step::Open, id, Format::Dmg, which, value);
    match error {
        Error::Io(error) => io(Step::Open, id, error),
        Error::TooShort(len) => fault(FormatFault::DmgTooShort, len),
        Error::NoTrailer => fault(FormatFault::DmgTrailer, 0),
        Error::ChunkSectors { chunk, count } => with_number(fault(FormatFault::DmgChunkSectors, count), chunk.into()),
        Error::ChunkLength { chunk, len } => with_number(fault(FormatFault::DmgChunkLength, len), chunk.into()),
        _ => fault(FormatFault::DmgInvalid, 0),
    }
}
