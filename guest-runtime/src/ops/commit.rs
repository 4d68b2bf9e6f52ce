//! `commit`: the contents of an image and of those between go into an image below.
//!
//! What is read through the chain is the same at every moment: the image below takes what its overlays hold already, and these are emptied
//! only once it is durable.

use alloc::boxed::Box;
use alloc::vec::Vec;

use instar_blockio::{BlockMapExt, BlockRead, ExtentKind, FileId, Layer, Overlay, ZeroMode};
use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{Cause, CommitRequest, EditReply, Failure, Format, Step};
use instar_qcow2::{self as qcow2, Growth, Writer};

use crate::chain::{CommitBase, Opening, open_backing, open_base, open_below, too_deep};
use crate::detect::{HEAD_LEN, detect};
use crate::formats::target::TargetDisk;
use crate::formats::{OpenImage, TargetImage, open_in_place, open_metadata_in_place, open_named, qcow2_failure};
use crate::ops::convert::fill::read_under;
use crate::ops::convert::{Pace, into_image_below};
use crate::ops::failure::{about, block, failure};
use crate::platform::{Io, Platform};

/// Disks are whole sectors.
const SECTOR: u64 = 512;

/// Does as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &CommitRequest) -> Result<EditReply, Failure> {
    let device = request.image.device;
    let mut top = open_named(platform, &request.image)?;
    top.open_parts(platform)?;
    let format = top.format();
    let of_format = |failure: Failure| Failure { format: format.into(), ..failure };
    if format == Format::Qcow2 {
        // Can it be emptied afterwards?
        drop(open_metadata_in_place(platform, device, request.flush)?);
    }
    let Chain { layers, base } = Chain::open(platform, device, top, &Opening::of(&request.image, true))?;
    let source: Box<dyn Layer> = Box::new(Overlay::new(layers));
    let (target, under) = base.prepare(platform, &*source, &request.seed, request.flush).map_err(of_format)?;
    let pace = Pace { threads: request.threads, progress: request.progress, rate_limit: request.rate_limit };
    let worked = into_image_below(platform, source, target, under, &pace);
    worked.map_err(|failure| of_format(Failure { step: Step::Edit.into(), ..failure }))?;
    if !request.keep && format == Format::Qcow2 {
        empty(platform, device, request.flush).map_err(of_format)?;
    }
    Ok(EditReply { format: format.into(), ..EditReply::default() })
}

/// Empties the image that was committed.
fn empty<P: Platform>(platform: &P, device: u32, durable: bool) -> Result<(), Failure> {
    if let TargetImage::Mapped(mut image) = open_metadata_in_place(platform, device, durable)? {
        if let Some(writer) = image.as_qcow2_mut() {
            writer.make_empty().map_err(|error| qcow2_failure(Step::Empty, FileId(device), error))?;
        }
        image.finish()?;
    }
    Ok(())
}

/// An image and what lies below it, cut in two.
struct Chain<P: Platform> {
    /// The image and those between, the top first.
    layers: Vec<Box<dyn Layer>>,
    base: Base<P>,
}

/// The image that is written.
struct Base<P: Platform> {
    device: u32,
    image: Box<dyn OpenImage<P>>,
    /// Nobody said what format it has.
    guessed: bool,
    below: Option<Box<dyn Layer>>,
}

impl<P: Platform> Chain<P> {
    fn open(platform: &P, top: u32, image: Box<dyn OpenImage<P>>, how: &Opening<'_>) -> Result<Self, Failure> {
        let missing = |cause| Failure { format: image.format().into(), ..about(Step::Edit, FileId(top), cause) };
        let (none, not_found) = (missing(Cause::NoBacking), missing(Cause::BaseNotFound));
        let (mut device, mut image) = (top, image);
        let mut layers: Vec<Box<dyn Layer>> = Vec::new();
        while layers.len() < MAX_CHAIN_DEPTH {
            if let Some(CommitBase { device: base, image: opened, guessed }) =
                open_base(platform, device, &*image, how)?
            {
                layers.push(image.into_layer());
                let below = open_below(platform, base, &*opened, how)?;
                return Ok(Self { layers, base: Base { device: base, image: opened, guessed, below } });
            }
            let Some((next, below)) = open_backing(platform, device, &*image, how)? else {
                return Err(if layers.is_empty() { none } else { not_found });
            };
            layers.push(image.into_layer());
            (device, image) = (next, below);
        }
        Err(too_deep(device))
    }
}

impl<P: Platform> Base<P> {
    /// Opens the image for writing and makes its disk at least as long as that of `source`; also gives the disk that it was before, with
    /// everything below.
    fn prepare(
        self,
        platform: &P,
        source: &dyn Layer,
        seed: &[u8],
        durable: bool,
    ) -> Result<(TargetImage<P>, Box<dyn Layer>), Failure> {
        let (id, format) = (FileId(self.device), self.image.format());
        let mut target = open_in_place(platform, self.device, format, seed, durable)?;
        let (old, size) = (self.image.into_layer(), source.size().next_multiple_of(SECTOR));
        let old_size = old.size();
        if self.guessed && format == Format::Raw {
            check_guess(source, &*old).map_err(|failure| Failure { device: Some(id.0), ..failure })?;
        }
        if size > old_size {
            match &mut target {
                // A fixed VHD has its footer behind the disk.
                TargetImage::Flat(_) if format == Format::Vpc => {
                    return Err(failure(Step::Edit, Cause::ResizeUnsupported));
                }
                TargetImage::Flat(flat) => {
                    let grown = platform.submit(&mut [Io::SetLen { file: flat.file, len: flat.base + size }]);
                    grown.map_err(|failed| block(Step::Edit, Some(id), 0, failed.error))?;
                    flat.size = size;
                }
                TargetImage::Mapped(image) => match image.as_qcow2_mut() {
                    Some(writer) => {
                        let grown = grow(writer, self.below.as_deref(), size);
                        grown.map_err(|error| qcow2_failure(Step::Edit, id, error))?;
                    }
                    None => {
                        let disk = image.disk_mut();
                        disk.set_size(size).map_err(|_| failure(Step::Edit, Cause::ResizeUnsupported))?;
                        // What a longer image below holds does not show through.
                        let shown =
                            self.below.as_ref().map_or(0, |below| below.size().min(size)).saturating_sub(old_size);
                        let cleared = disk.write_zeroes(old_size, shown, ZeroMode::Unmap);
                        cleared.map_err(|error| block(Step::Edit, Some(id), old_size, error))?;
                    }
                },
            }
        }
        let layers = core::iter::once(old).chain(self.below).collect();
        Ok((target, Box::new(Overlay::new(layers))))
    }
}

/// Makes the disk of an image longer; what a longer image below holds does not show through.
pub(super) fn grow<P: Platform>(
    writer: &mut Writer<TargetDisk<P>>,
    below: Option<&dyn Layer>,
    size: u64,
) -> Result<(), qcow2::Error> {
    let tail = read_tail(writer, below)?;
    let backing_size = below.map_or(0, |below| below.size());
    writer.resize(size, Growth { backing_size, tail: &tail, ..Growth::default() })
}

/// What the image below holds in the range of [`Writer::backed_tail`].
pub(super) fn read_tail<P: Platform>(
    writer: &Writer<TargetDisk<P>>,
    below: Option<&dyn Layer>,
) -> Result<Vec<u8>, qcow2::Error> {
    let mut tail = Vec::new();
    if let (Some(below), Some(range)) = (below, writer.backed_tail()?) {
        // Smaller than a cluster.
        tail.resize((range.end - range.start) as usize, 0);
        read_under(Some(below), range.start, &mut tail)?;
    }
    Ok(tail)
}

/// Refuses to make a file look like an image of which nobody said that it is raw: the next who opens it would follow what a guest wrote.
fn check_guess(source: &dyn Layer, old: &dyn Layer) -> Result<(), Failure> {
    let reading = |error| block(Step::Read, None, 0, error);
    let len = source.size().min(HEAD_LEN as u64);
    let mut head = alloc::vec![0; len as usize];
    read_under(Some(old), 0, &mut head).map_err(reading)?;
    for extent in source.extents(0..len) {
        let extent = extent.map_err(reading)?;
        if extent.kind != ExtentKind::Unallocated {
            let part = &mut head[extent.offset as usize..extent.end() as usize];
            source.read_at(extent.offset, part).map_err(reading)?;
        }
    }
    match detect(&head, &[], source.size().max(old.size())).format {
        Format::Raw => Ok(()),
        other => Err(Failure { value: other as u64, ..failure(Step::Edit, Cause::GuessedRaw) }),
    }
}
