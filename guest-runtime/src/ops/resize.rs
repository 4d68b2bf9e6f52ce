//! `resize`: another size for the disk of an image.

use alloc::boxed::Box;

use instar_blockio::{BlockRead, FileId, Layer};
use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::message::{
    Cause, EditReply, Failure, Format, Preallocation, ResizeRefusal, ResizeRequest, SizeChange, Step,
};
use instar_qcow2::{self as qcow2, Growth, Writer};

use crate::chain::{Opening, open_below};
use crate::formats::target::TargetDisk;
use crate::formats::{TargetImage, open_in_place, open_named, qcow2_failure, resize_qed, write_full};
use crate::ops::commit::read_tail;
use crate::ops::failure::{block, failure};
use crate::platform::{Io, Platform};

/// Does as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &ResizeRequest) -> Result<EditReply, Failure> {
    let device = request.image.device;
    let mut image = open_named(platform, &request.image)?;
    let format = image.format();
    image.open_parts(platform)?;
    let below = open_below(platform, device, &*image, &Opening::of(&request.image, true))?;
    let of_format = |failure: Failure| Failure { format: format.into(), ..failure };
    let writer = match image.as_qcow2().is_some() {
        true => Some(open_in_place(platform, device, format, &[], true)?),
        false => None,
    };
    let base = image.payload_offset();
    let old = image.into_layer().size();
    let size = new_size(request, old).map_err(|refusal| of_format(refused(refusal)))?;
    match (format, writer) {
        (Format::Raw | Format::File | Format::Luks, _) => {
            let unsupported = || of_format(failure(Step::Edit, Cause::ResizeUnsupported));
            let base = base.ok_or_else(unsupported)?;
            let end = base.checked_add(size).filter(|end| *end <= i64::MAX as u64);
            let end = end.ok_or_else(|| of_format(refused(ResizeRefusal::NotPositive)))?;
            resize_raw(platform, request, base + old, end).map_err(of_format)?;
        }
        (Format::Qed, _) => {
            if let Some(refusal) = qed_refusal(request, old, size, below.as_deref()) {
                return Err(of_format(Failure { value2: request.preallocation as u64, ..refused(refusal) }));
            }
            if size != old {
                resize_qed(platform, FileId(device), size).map_err(of_format)?;
            }
        }
        (_, Some(TargetImage::Mapped(mut image))) => match image.as_qcow2_mut() {
            Some(writer) => {
                let id = FileId(device);
                let done = resize_qcow2(writer, below, size, request.preallocation());
                done.map_err(|error| qcow2_failure(Step::Edit, id, error)).map_err(of_format)?;
                image.finish()?;
            }
            None => return Err(of_format(failure(Step::Edit, Cause::ResizeUnsupported))),
        },
        _ => return Err(of_format(failure(Step::Edit, Cause::ResizeUnsupported))),
    }
    Ok(EditReply { format: format.into(), ..EditReply::default() })
}

fn refused(refusal: ResizeRefusal) -> Failure {
    Failure { value: refusal as u64, ..failure(Step::Edit, Cause::ResizeRefused) }
}

/// The wanted size. Sums are those of signed 64-bit numbers, as in qemu-img.
fn new_size(request: &ResizeRequest, old: u64) -> Result<u64, ResizeRefusal> {
    let size = match request.change() {
        SizeChange::Absolute => request.amount,
        SizeChange::Grow => old.wrapping_add(request.amount),
        SizeChange::Shrink => old.wrapping_sub(request.amount),
    };
    if !(1..=i64::MAX as u64).contains(&size) {
        return Err(ResizeRefusal::NotPositive);
    }
    if size <= old && request.preallocation() != Preallocation::Off {
        return Err(ResizeRefusal::PreallocationNotGrowing);
    }
    if size < old && !request.shrink { Err(ResizeRefusal::Shrinks) } else { Ok(size) }
}

/// What QEMU's driver does not do.
fn qed_refusal(request: &ResizeRequest, old: u64, size: u64, below: Option<&dyn Layer>) -> Option<ResizeRefusal> {
    if size > old && below.is_some_and(|below| below.size() > old) {
        return Some(ResizeRefusal::NoZeroes);
    }
    if request.preallocation() != Preallocation::Off {
        return Some(ResizeRefusal::NoPreallocation);
    }
    match size < old {
        true if !size.is_multiple_of(512) => Some(ResizeRefusal::ImageSize),
        true => Some(ResizeRefusal::NoShrinking),
        false => None,
    }
}

fn resize_qcow2<P: Platform>(
    writer: &mut Writer<TargetDisk<P>>,
    below: Option<Box<dyn Layer>>,
    size: u64,
    preallocation: Preallocation,
) -> Result<(), qcow2::Error> {
    let backing_size = below.as_ref().map_or(0, |below| below.size());
    let tail = read_tail(writer, below.as_deref())?;
    let preallocation = match preallocation {
        Preallocation::Off => qcow2::Preallocation::Off,
        Preallocation::Metadata => qcow2::Preallocation::Metadata,
        Preallocation::Falloc => qcow2::Preallocation::Falloc,
        Preallocation::Full => qcow2::Preallocation::Full,
    };
    writer.resize(size, Growth { preallocation, backing_size, tail: &tail })
}

fn resize_raw<P: Platform>(platform: &P, request: &ResizeRequest, old: u64, size: u64) -> Result<(), Failure> {
    /// `errno`: what was asked for makes no sense.
    const EINVAL: i32 = 22;
    let id = FileId(request.image.device);
    let failed = |error| Failure { value: 0, ..block(Step::Edit, Some(id), 0, error) };
    let regular = platform.files().get(id).is_some_and(|file| !file.flags().contains(DeviceFlags::BLOCK_DEVICE));
    let done = match request.preallocation() {
        Preallocation::Metadata => return Err(refused(ResizeRefusal::NoMetadata)),
        _ if !regular && size > old => return Err(failed(instar_blockio::Error::from_os(EINVAL))),
        _ if !regular => Ok(()),
        Preallocation::Off => platform.submit(&mut [Io::SetLen { file: id, len: size }]),
        Preallocation::Falloc => {
            platform.submit(&mut [Io::Allocate { file: id, offset: old, len: size.saturating_sub(old) }])
        }
        Preallocation::Full => write_full(platform, id, old..size),
    };
    done.and_then(|()| platform.submit(&mut [Io::Flush { file: id }])).map_err(|io| failed(io.error))
}
