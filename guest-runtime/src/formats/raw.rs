//! raw: the bytes themselves.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use instar_blockio::{BlockRead, FileId, Layer};
use instar_guest_protocol::message::{
    Cause, Failure, FileRole, Format, ImageInfo, Preallocation, SnapshotSelector, Step, Target,
};
use instar_raw as raw;

use super::target::{TargetFile, granted_target_file, open_target_file};
use super::{Completion, FlatImage, OpenImage, TargetImage};
use crate::ops::failure::{about, block, failure};
use crate::platform::{File, Io, Platform};

/// Sizes are whole sectors to qemu-img.
const SECTOR: u64 = 512;

struct Raw<P> {
    image: raw::Image<File<P>>,
    id: FileId,
}

/// Opens a file as the disk.
pub(super) fn open<P: Platform>(file: File<P>, id: FileId) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = raw::Image::open(file).map_err(|error| block(Step::Open, Some(id), 0, error))?;
    Ok(Box::new(Raw { image, id }))
}

impl<P: Platform> OpenImage<P> for Raw<P> {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn describe(&self, _: &P, info: &mut ImageInfo) -> Result<(), Failure> {
        info.virtual_size = self.image.size();
        Ok(())
    }

    fn select_snapshot(&mut self, _: &SnapshotSelector) -> Result<(), Failure> {
        Err(about(Step::Snapshot, self.id, Cause::SnapshotNotFound))
    }

    fn into_layer(self: Box<Self>) -> Box<dyn Layer> {
        Box::new(self.image)
    }
}

/// Makes a file of the size of the disk.
///
/// There is no header that could be written last. So a new disk is a sector too long until it is complete: what an interrupted run
/// leaves has not the size of the disk.
pub(super) fn create<P: Platform>(platform: &P, target: &Target, size: u64) -> Result<TargetImage<P>, Failure> {
    let opened = open_target_file(platform, FileRole::Target, size)?;
    let preallocation = target.preallocation();
    let completion = mark_unfinished(platform, &opened, size);
    if completion.is_none() || preallocation != Preallocation::Off {
        give_size(platform, &opened, size, preallocation)?;
    }
    Ok(flat(&opened, size, completion))
}

/// Makes the file too long; gives what sets its right length. `None`: it is empty, a device, or as long as a file can be.
fn mark_unfinished<P: Platform>(platform: &P, opened: &TargetFile<P>, size: u64) -> Option<Completion<P>> {
    let size = size.checked_next_multiple_of(SECTOR).filter(|&size| size != 0 && !opened.block_device)?;
    let (file, len) = (opened.id, size.checked_add(SECTOR)?);
    platform.submit(&mut [Io::SetLen { file, len }]).ok()?;
    Some(Box::new(move |platform: &P| {
        let failed = |(_, error): (usize, _)| block(Step::Write, Some(file), size, error);
        platform.submit(&mut [Io::SetLen { file, len: size }]).map_err(failed)
    }))
}

/// Opens an existing file.
pub(super) fn open_target<P: Platform>(platform: &P, size: u64) -> Result<TargetImage<P>, Failure> {
    let opened = open_target_file(platform, FileRole::Target, size)?;
    Ok(flat(&opened, opened.file.size(), None))
}

/// Opens a granted file.
pub(super) fn open_in_place<P: Platform>(platform: &P, device: u32) -> Result<TargetImage<P>, Failure> {
    let granted = granted_target_file(platform, device)?;
    Ok(flat(&granted, granted.file.size(), None))
}

fn flat<P: Platform>(opened: &TargetFile<P>, size: u64, completion: Option<Completion<P>>) -> TargetImage<P> {
    TargetImage::Flat(FlatImage {
        file: opened.id,
        base: 0,
        size,
        cipher: None,
        block_device: opened.block_device,
        completion,
    })
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
    sized.map_err(|(_, error)| block(Step::Create, Some(target.id), 0, error))
}

/// Writes zeroes over a range, so that the file system has given and initialised every block.
pub(crate) fn write_full<P: Platform>(
    platform: &P,
    file: FileId,
    range: Range<u64>,
) -> Result<(), (usize, instar_blockio::Error)> {
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
