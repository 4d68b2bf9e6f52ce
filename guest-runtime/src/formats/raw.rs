//! raw: the bytes themselves.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use instar_blockio::{BlockRead, FileId, Layer};
use instar_guest_protocol::message::{Cause, Failure, FileRole, Format, ImageInfo, Preallocation, Step, Target};
use instar_raw as raw;

use super::target::{TargetFile, granted_target_file, open_target_file};
use super::{Completion, FlatImage, OpenImage, TargetImage};
use crate::ops::failure::{about, block, failure};
use crate::platform::{FailedIo, File, Io, Platform};

/// Sizes are whole sectors to qemu-img.
const SECTOR: u64 = 512;

struct Raw<P> {
    image: raw::Image<File<P>>,
}

/// Opens a file as the disk.
pub(super) fn open<P: Platform>(file: File<P>, id: FileId) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = raw::Image::open(file).map_err(|error| block(Step::Open, Some(id), 0, error))?;
    Ok(Box::new(Raw { image }))
}

impl<P: Platform> OpenImage<P> for Raw<P> {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn describe(&self, _: &P, info: &mut ImageInfo) -> Result<(), Failure> {
        info.virtual_size = self.image.size();
        Ok(())
    }

    fn into_layer(self: Box<Self>) -> Box<dyn Layer> {
        Box::new(self.image)
    }
}

/// Makes a file of the size of the disk.
///
/// There is no header that could be written last. So a new disk is a sector too short until it is complete: what an interrupted run
/// leaves has not the size of the disk. (A file that was cut off is written out by XFS as soon as it is closed: too long would be slower.)
pub(super) fn create<P: Platform>(platform: &P, target: &Target, size: u64) -> Result<TargetImage<P>, Failure> {
    let opened = open_target_file(platform, FileRole::Target, size)?;
    give_size(platform, &opened, size, target.preallocation())?;
    let Some(last) = size.checked_next_multiple_of(SECTOR).and_then(|size| size.checked_sub(SECTOR)) else {
        return Ok(flat(&opened, size));
    };
    if opened.block_device {
        return Ok(flat(&opened, size));
    }
    let file = opened.id;
    let set_len = move |platform: &P, len: u64| {
        let failed = |FailedIo { error, .. }| block(Step::Write, Some(file), len, error);
        platform.submit(&mut [Io::SetLen { file, len }]).map_err(failed)
    };
    set_len(platform, last)?;
    let completion: Completion<P> = Box::new(move |platform: &P| set_len(platform, last + SECTOR));
    let image = flat_image(&opened, last + SECTOR);
    Ok(TargetImage::Flat(FlatImage { held_back: SECTOR, completion: Some(completion), ..image }))
}

/// Opens an existing file.
pub(super) fn open_target<P: Platform>(platform: &P, size: u64) -> Result<TargetImage<P>, Failure> {
    let opened = open_target_file(platform, FileRole::Target, size)?;
    Ok(flat(&opened, opened.file.size()))
}

/// Opens a granted file.
pub(super) fn open_in_place<P: Platform>(platform: &P, device: u32) -> Result<TargetImage<P>, Failure> {
    let granted = granted_target_file(platform, device)?;
    Ok(flat(&granted, granted.file.size()))
}

fn flat<P: Platform>(opened: &TargetFile<P>, size: u64) -> TargetImage<P> {
    TargetImage::Flat(flat_image(opened, size))
}

fn flat_image<P: Platform>(opened: &TargetFile<P>, size: u64) -> FlatImage<P> {
    FlatImage {
        file: opened.id,
        base: 0,
        size,
        cipher: None,
        block_device: opened.block_device,
        held_back: 0,
        completion: None,
    }
}

pub(super) fn give_size<P: Platform>(
    platform: &P,
    target: &TargetFile<P>,
    size: u64,
    preallocation: Preallocation,
) -> Result<(), Failure> {
    let size = size.checked_next_multiple_of(SECTOR).ok_or_else(|| failure(Step::Create, Cause::SizeTooLarge))?;
    if target.block_device {
        return match target.file.size() >= size {
            true => Ok(()),
            false => Err(about(Step::Create, target.id, Cause::TargetTooSmall)),
        };
    }
    let file = target.id;
    let sized = match preallocation {
        _ if size == 0 => platform.submit(&mut [Io::SetLen { file, len: 0 }]),
        Preallocation::Off => platform.submit(&mut [Io::SetLen { file, len: size }]),
        Preallocation::Falloc => platform.submit(&mut [Io::Allocate { file, offset: 0, len: size }]),
        Preallocation::Full => write_full(platform, file, 0..size),
        Preallocation::Metadata => return Err(failure(Step::Create, Cause::InvalidOptions)),
    };
    sized.map_err(|failed| block(Step::Create, Some(target.id), 0, failed.error))
}

/// Writes zeroes over a range, so that the file system has given and initialised every block.
pub(crate) fn write_full<P: Platform>(platform: &P, file: FileId, range: Range<u64>) -> Result<(), FailedIo> {
    const PIECE: usize = 1 << 20;
    const PIECES: usize = 16;
    let zeroes = alloc::vec![0; PIECE];
    let (mut at, size) = (range.start, range.end);
    while at < size {
        let mut batch = Vec::with_capacity(PIECES);
        while at < size && batch.len() < PIECES {
            let len = (size - at).min(PIECE as u64) as usize;
            batch.push(Io::Write { file, offset: at, buf: &zeroes[..len] });
            at += len as u64;
        }
        platform.submit(&mut batch)?;
    }
    Ok(())
}
