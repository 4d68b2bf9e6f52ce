//! `bench`: requests to an image, whose time the host takes.

use alloc::boxed::Box;
use alloc::vec::Vec;

use instar_blockio::{
    BlockMapExt, BlockRead, Error, ErrorKind, ExtentKind, Layer, Reservation, Result as BlockResult, check_range,
};
use instar_guest_protocol::message::{BenchRequest, Call, Cause, EditReply, Failure, Progress, Step, call};

use crate::chain::{Opening, open_below, open_source};
use crate::formats::{MappedImage, TargetImage, open_in_place, open_named};
use crate::ops::convert::fill::read_under;
use crate::ops::failure::{block, failure};
use crate::platform::{Io, Platform};

/// Requests made in one turn at most, and bytes of them.
const MAX_REQUESTS: u64 = 1024;
const MAX_BYTES: u64 = 32 << 20;

/// Does as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &BenchRequest) -> Result<EditReply, Failure> {
    let mut image = open_named(platform, &request.image)?;
    let format = image.format();
    let mut disk = match request.pattern {
        None => {
            drop(image);
            Disk::Read(open_source(platform, &request.image, false)?)
        }
        Some(_) => {
            image.open_parts(platform)?;
            let below = open_below(platform, request.image.device, &*image, &Opening::of(&request.image, true))?;
            drop(image);
            Disk::Write(open_in_place(platform, request.image.device, format, &request.seed, request.flush)?, below)
        }
    };
    if request.size == 0 || request.depth == 0 {
        return Err(failure(Step::Edit, Cause::BadRequest));
    }
    let started = Progress { done: 0, total: request.count };
    platform.call(&Call { kind: Some(call::Kind::Progress(started)) });
    let failed = |error: Error| Failure { format: format.into(), ..block(Step::Edit, None, 0, error) };
    requests(platform, request, &mut disk).map_err(failed)?;
    if let Disk::Write(image, _) = disk {
        image.finish(platform)?;
    }
    Ok(EditReply { format: format.into(), ..EditReply::default() })
}

enum Disk<P: Platform> {
    Read(Box<dyn Layer>),
    /// An image and what lies below it.
    Write(TargetImage<P>, Option<Box<dyn Layer>>),
}

impl<P: Platform> Disk<P> {
    fn size(&self) -> u64 {
        match self {
            Self::Read(layer) => layer.size(),
            Self::Write(image, _) => image.size(),
        }
    }
}

/// All requests, as many at once as wanted.
fn requests<P: Platform>(platform: &P, request: &BenchRequest, disk: &mut Disk<P>) -> BlockResult<()> {
    let turn = request.depth.min(MAX_REQUESTS).min((MAX_BYTES / request.size).max(1));
    let len = usize::try_from(request.size.saturating_mul(turn)).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
    let mut buf = Vec::new();
    buf.try_reserve_exact(len).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
    buf.resize(len, request.pattern.unwrap_or(0) as u8);
    let size = disk.size();
    let (mut done, mut offset, mut unflushed) = (0, request.offset, 0);
    while done < request.count {
        let count = turn.min(request.count - done);
        let mut offsets = Vec::with_capacity(count as usize);
        for _ in 0..count {
            check_range(size, offset, request.size)?;
            offsets.push(offset);
            offset = offset.saturating_add(request.step).checked_rem(size).unwrap_or(0);
        }
        match disk {
            Disk::Read(layer) => read(platform, &**layer, &offsets, request.size as usize, &mut buf)?,
            Disk::Write(image, below) => {
                write(platform, image, below.as_deref(), &offsets, &buf[..request.size as usize])?;
                unflushed += count;
                if request.flush_interval != 0 && unflushed >= request.flush_interval {
                    unflushed = 0;
                    flush(platform, image)?;
                }
            }
        }
        done += count;
    }
    Ok(())
}

fn flush<P: Platform>(platform: &P, image: &mut TargetImage<P>) -> BlockResult<()> {
    match image {
        TargetImage::Flat(flat) => submit(platform, &mut [Io::Flush { file: flat.file }]),
        TargetImage::Mapped(mapped) => mapped.disk_mut().flush(),
    }
}

fn submit<P: Platform>(platform: &P, batch: &mut [Io<'_>]) -> BlockResult<()> {
    platform.submit(batch).map_err(|failed| failed.error)
}

/// Reads in one turn what lies plain in a file, and the rest one by one.
fn read<P: Platform>(platform: &P, layer: &dyn Layer, offsets: &[u64], size: usize, buf: &mut [u8]) -> BlockResult<()> {
    let mut batch = Vec::new();
    for (&offset, piece) in offsets.iter().zip(buf.chunks_exact_mut(size)) {
        let extents = layer.extents(offset..offset + size as u64).collect::<BlockResult<Vec<_>>>()?;
        if extents.iter().any(|extent| matches!(extent.kind, ExtentKind::Compressed(_) | ExtentKind::Encrypted { .. }))
        {
            layer.read_at(offset, piece)?;
            continue;
        }
        let mut rest = piece;
        for extent in extents {
            let (part, tail) = core::mem::take(&mut rest).split_at_mut(extent.len as usize);
            rest = tail;
            match extent.kind {
                ExtentKind::Data { file, host } => batch.push(Io::Read { file, offset: host, buf: part }),
                _ => part.fill(0),
            }
        }
    }
    submit(platform, &mut batch)
}

fn write<P: Platform>(
    platform: &P,
    image: &mut TargetImage<P>,
    below: Option<&dyn Layer>,
    offsets: &[u64],
    bytes: &[u8],
) -> BlockResult<()> {
    match image {
        TargetImage::Flat(flat) => {
            let base = flat.base;
            if let Some(cipher) = &flat.cipher {
                return offsets.iter().try_for_each(|&offset| {
                    let mut stored = bytes.to_vec();
                    cipher.encrypt(offset, &mut stored)?;
                    submit(platform, &mut [Io::Write { file: flat.file, offset: base + offset, buf: &stored }])
                });
            }
            let request = |&offset: &u64| Io::Write { file: flat.file, offset: base + offset, buf: bytes };
            submit(platform, &mut offsets.iter().map(request).collect::<Vec<_>>())
        }
        TargetImage::Mapped(mapped) => {
            offsets.iter().try_for_each(|&offset| write_mapped(platform, &mut **mapped, below, offset, bytes))
        }
    }
}

/// Writes to an image with an allocation table. What the image leaves to the one below, it takes over by whole units.
fn write_mapped<P: Platform>(
    platform: &P,
    image: &mut dyn MappedImage<P>,
    below: Option<&dyn Layer>,
    offset: u64,
    bytes: &[u8],
) -> BlockResult<()> {
    let encrypted = image.contents_cipher().is_some();
    let disk = image.disk_mut();
    if below.is_some() {
        let (unit, size) = (disk.alloc_unit(), disk.size());
        let end = offset + bytes.len() as u64;
        for start in [offset - offset % unit, (end - 1) - (end - 1) % unit] {
            let stop = start.saturating_add(unit).min(size);
            let partial = start < offset || end < stop;
            if partial && disk.extent_at(start, 1)?.kind == ExtentKind::Unallocated {
                let mut whole = alloc::vec![0; (stop - start) as usize];
                read_under(below.map(|below| below as &dyn BlockRead), start, &mut whole)?;
                disk.write_at(start, &whole)?;
            }
        }
    }
    if encrypted {
        return disk.write_at(offset, bytes);
    }
    let mut places: Vec<Reservation> = Vec::new();
    let mut done = 0u64;
    while done < bytes.len() as u64 {
        let place = disk.reserve(offset + done, bytes.len() as u64 - done)?;
        done += place.len;
        places.push(place);
    }
    let mut at = 0;
    let mut batch = Vec::new();
    for place in &places {
        let part = &bytes[at..at + place.len as usize];
        batch.push(Io::Write { file: place.file, offset: place.host, buf: part });
        at += place.len as usize;
    }
    submit(platform, &mut batch)?;
    places.into_iter().try_for_each(|place| disk.commit(place))
}
