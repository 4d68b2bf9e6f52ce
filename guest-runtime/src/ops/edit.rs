//! What the operations that change an image in place have in common: opening it for writing, and closing it.

use alloc::boxed::Box;
use alloc::vec::Vec;

use instar_blockio::{FileId, Layer};
use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{Cause, EditReply, Failure, Format, Source, Step};
use instar_qcow2::{self as qcow2, Bitmaps, Writer};

use crate::chain::{Opening, open_backing, open_below, too_deep};
use crate::formats::target::TargetDisk;
use crate::formats::{OpenImage, open_data_file, open_named, qcow2_failure, repair_if_dirty};
use crate::ops::failure::about;
use crate::platform::Platform;

/// An image that is changed in place.
pub(super) enum Editable<P: Platform> {
    /// One of qcow2.
    Qcow2(Box<Qcow2<P>>),
    /// One of another format, in which these operations change nothing.
    Other(Format),
}

/// A qcow2 image that is changed in place. What is written is made durable in the order that keeps the image valid.
pub(super) struct Qcow2<P: Platform> {
    pub writer: Writer<TargetDisk<P>>,
    pub bitmaps: Bitmaps,
    pub id: FileId,
    /// What lies below, if data is written.
    pub below: Option<Box<dyn Layer>>,
}

/// Opens an image that the user named, on a writable device. `chain`: its backing chain must be there, as with qemu-img; it is read only
/// with `writes_data`, where an external data file is written as well.
pub(super) fn open<P: Platform>(
    platform: &P,
    source: &Source,
    chain: bool,
    writes_data: bool,
) -> Result<Editable<P>, Failure> {
    let id = FileId(source.device);
    let mut image = open_named(platform, source)?;
    let opened = match image.as_qcow2() {
        Some(qcow2) => Editable::Qcow2(Box::new(open_qcow2(platform, id, qcow2, writes_data)?)),
        None => {
            if image.format() == Format::Luks {
                image.open_parts(platform)?;
            }
            Editable::Other(image.format())
        }
    };
    match opened {
        Editable::Qcow2(mut qcow2) if chain && writes_data => {
            qcow2.below = open_below(platform, source.device, &*image, &Opening::of(source, true))?;
            Ok(Editable::Qcow2(qcow2))
        }
        opened => {
            if chain {
                open_chain(platform, source, &*image)?;
            }
            Ok(opened)
        }
    }
}

fn open_qcow2<P: Platform>(
    platform: &P,
    id: FileId,
    image: &qcow2::Image<crate::platform::File<P>>,
    writes_data: bool,
) -> Result<Qcow2<P>, Failure> {
    let failed = |error| qcow2_failure(Step::Open, id, error);
    let data = match image.needs_data_file() {
        true => Some(open_data_file(platform, id, image.data_file_name(), writes_data)?),
        false => None,
    };
    let data = data.map(|(file, id)| (TargetDisk::new(file, true), id));
    let file = platform.file(id.0).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    repair_if_dirty(platform, id, image, Step::Open)?;
    let mut writer =
        Writer::open_encrypted(TargetDisk::new(file, true), id, data, image.cipher().cloned()).map_err(failed)?;
    let bitmaps = writer.load_bitmaps().map_err(failed)?;
    Ok(Qcow2 { writer, bitmaps, id, below: None })
}

/// Opens what lies below an image, all the way down, and forgets it.
pub(super) fn open_chain<P: Platform>(platform: &P, source: &Source, image: &dyn OpenImage<P>) -> Result<(), Failure> {
    let how = Opening::of(source, true);
    let mut below = open_backing(platform, source.device, image, &how)?;
    for _ in 1..MAX_CHAIN_DEPTH {
        let Some((device, image)) = below else { return Ok(()) };
        below = open_backing(platform, device, &*image, &how)?;
    }
    match below {
        Some((device, _)) => Err(too_deep(device)),
        None => Ok(()),
    }
}

impl<P: Platform> Qcow2<P> {
    /// Stores the bitmaps, which every writer of the image does, and makes everything durable; then says how the operation ended.
    pub fn close(mut self, done: Result<(), Failure>) -> Result<EditReply, Failure> {
        let failed = |error| qcow2_failure(Step::Edit, self.id, error);
        let stored = self.writer.store_bitmaps(&mut self.bitmaps).map_err(failed);
        let finished = self.writer.finish().map_err(failed);
        done.and(stored).and(finished).map(|()| EditReply { format: Format::Qcow2.into(), snapshots: Vec::new() })
    }

    /// Why the image can't be changed.
    pub fn failure(&self, error: qcow2::Error) -> Failure {
        qcow2_failure(Step::Edit, self.id, error)
    }
}
