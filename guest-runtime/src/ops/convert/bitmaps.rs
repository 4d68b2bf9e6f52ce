//! Persistent dirty bitmaps, copied from the source's top image to a fresh qcow2 target.

use alloc::boxed::Box;
use alloc::vec::Vec;

use instar_blockio::{Error, ErrorKind, FileId};
use instar_guest_protocol::message::{Call, Cause, ConvertRequest, Failure, Step, call};
use instar_qcow2::{BitmapFlags, BitmapInfo, Writer};

use crate::formats::target::TargetDisk;
use crate::formats::{OpenImage, open_named, qcow2_failure};
use crate::ops::failure::about;
use crate::platform::Platform;

/// The bitmaps to copy, and the image that has them.
pub(super) struct SourceBitmaps<P: Platform> {
    id: FileId,
    image: Box<dyn OpenImage<P>>,
    bitmaps: Vec<BitmapInfo>,
}

/// Finds the bitmaps of the first source, if they are to be copied.
///
/// # Errors
/// A source without bitmap support; an inconsistent bitmap that is not to be left out.
pub(super) fn find<P: Platform>(platform: &P, request: &ConvertRequest) -> Result<Option<SourceBitmaps<P>>, Failure> {
    let Some(source) = request.sources.first().filter(|_| request.bitmaps) else { return Ok(None) };
    let id = FileId(source.device);
    let image = open_named(platform, source)?;
    let Some(qcow2) = image.as_qcow2() else {
        return Err(about(Step::Bitmaps, id, Cause::BitmapsUnsupported));
    };
    let mut bitmaps = qcow2.bitmaps().map_err(|error| qcow2_failure(Step::Bitmaps, id, error))?;
    let broken = |bitmap: &BitmapInfo| bitmap.flags.contains(BitmapFlags::IN_USE);
    for bitmap in bitmaps.iter().filter(|bitmap| broken(bitmap)) {
        let failure = Failure { text: bitmap.name.clone(), ..about(Step::Bitmaps, id, Cause::BitmapInconsistent) };
        if !request.skip_broken_bitmaps {
            return Err(failure);
        }
        platform.call(&Call { kind: Some(call::Kind::Warning(failure)) });
    }
    bitmaps.retain(|bitmap| !broken(bitmap));
    Ok(Some(SourceBitmaps { id, image, bitmaps }))
}

impl<P: Platform> SourceBitmaps<P> {
    /// Adds each bitmap to the target.
    ///
    /// # Errors
    /// What reading or writing them reports.
    pub fn copy(&self, writer: &mut Writer<TargetDisk<P>>) -> Result<(), Failure> {
        self.bitmaps.iter().try_for_each(|bitmap| {
            let auto = bitmap.flags.contains(BitmapFlags::AUTO);
            writer
                .add_bitmap(&bitmap.name, bitmap.granularity_bits, auto, |offset, buf| self.bits(bitmap, offset, buf))
                .map_err(|error| qcow2_failure(Step::Bitmaps, self.id, error))
        })
    }

    /// Reads bits; those that the source's bitmap does not reach (the target is longer) are clear.
    fn bits(&self, bitmap: &BitmapInfo, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        let present = bitmap.len.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (head, tail) = buf.split_at_mut(present);
        tail.fill(0);
        match self.image.as_qcow2().filter(|_| !head.is_empty()) {
            None => Ok(()),
            Some(image) => image.read_bitmap(bitmap, offset, head).map_err(|_| ErrorKind::Corrupt.into()),
        }
    }
}
