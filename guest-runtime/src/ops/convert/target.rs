//! The target of a conversion: made or opened once the sources are open.

use alloc::boxed::Box;
use core::sync::atomic::AtomicBool;

use instar_blockio::{FileId, Layer};
use instar_codec::Encoder;
use instar_guest_protocol::message::{Cause, ConvertRequest, Failure, Preallocation, Step};

use super::bitmaps::SourceBitmaps;
use super::mapped::MappedTarget;
use super::plan::Rules;
use super::raw::RawTarget;
use crate::chain::open_source;
use crate::formats::{Completion, FlatImage, MappedImage, TargetImage, create_image, open_target};
use crate::lock::Lock;
use crate::ops::failure::{about, block, failure};
use crate::platform::{FailedIo, Io, Platform};

/// Bytes of a chunk that is read into guest memory: the size of qemu-img's requests, so that the same data gives the same image.
const CHUNK: u64 = 2 << 20;
/// Bytes of a chunk that goes to a flat file, mostly by copy requests.
const RAW_CHUNK: u64 = 4 << 20;

/// Clusters of a new image up to this many bytes are written as a whole, as QEMU does; not those with subclusters.
const MAX_FILLED: u64 = 64 << 10;
/// Bytes of the granules of QEMU's dirty bitmaps.
const GRANULES: core::ops::RangeInclusive<u64> = 4 << 10..=64 << 10;

/// Where the data goes.
pub(in crate::ops) enum Target<P: Platform> {
    /// A disk in one piece.
    Raw(RawTarget, Option<Lock<Completion<P>>>),
    /// An image with an allocation table.
    Mapped(Box<MappedTarget<P>>),
}

impl<P: Platform> Target<P> {
    /// Creates the target for a disk of `size` bytes, or opens it.
    ///
    /// # Errors
    /// The host's refusal to open the file, contradicting options, or the writer's error.
    pub fn prepare(platform: &P, request: &ConvertRequest, size: u64) -> Result<Self, Failure> {
        let existing = request.target.existing;
        let image = match existing {
            true => open_target(platform, &request.target, size, request.flush)?,
            false => create_image(platform, &request.target, size, request.flush)?,
        };
        match image {
            TargetImage::Flat(_) if request.compress => Err(failure(Step::Create, Cause::CompressionUnsupported)),
            TargetImage::Flat(image) if existing && image.size < size => {
                Err(about(Step::OpenTarget, image.file, Cause::TargetTooSmall))
            }
            TargetImage::Flat(image) => Ok(Self::flat(request, image)),
            TargetImage::Mapped(image) if image.disk().size() < size => {
                Err(failure(Step::OpenTarget, Cause::TargetTooSmall))
            }
            TargetImage::Mapped(image) => Self::mapped(platform, request, image),
        }
    }

    fn flat(request: &ConvertRequest, image: FlatImage<P>) -> Self {
        let fresh = !request.target.existing && !image.block_device;
        // What nobody writes into an encrypted disk is noise.
        let zero_init = (fresh || request.target_is_zero) && image.cipher.is_none();
        Self::Raw(
            RawTarget {
                file: image.file,
                base: image.base,
                cipher: image.cipher,
                zero_init,
                keeps_unallocated: false,
                size: image.size,
                held_back: image.held_back,
            },
            image.completion.map(Lock::new),
        )
    }

    fn mapped(platform: &P, request: &ConvertRequest, image: Box<dyn MappedImage<P>>) -> Result<Self, Failure> {
        let existing = request.target.existing;
        let backing = match request.target.backing.as_ref().and_then(|backing| backing.image.as_ref()) {
            Some(source) => Some(Lock::new(open_source(platform, source, false)?)),
            None => None,
        };
        let compression = image.compression();
        let compress = compression.filter(|compression| request.compress || compression.always);
        if request.compress && compress.is_none() {
            return Err(about(Step::Create, image.id(), Cause::CompressionUnsupported));
        }
        let cipher = image.contents_cipher().cloned();
        // Places that were given out in advance hold noise.
        let noise = cipher.is_some() && request.target.preallocation() != Preallocation::Off;
        let zero_init = (!existing && backing.is_none() && !noise) || request.target_is_zero;
        let whole_units = existing || backing.is_some() || image.on_block_device() || noise;
        let unit = match compress {
            Some(compression) => compression.unit,
            None if whole_units => image.disk().alloc_unit(),
            None => 1,
        };
        let grain = match image.cluster_size() {
            cluster if unit == 1 && cluster <= MAX_FILLED && cluster == image.disk().alloc_unit() => cluster,
            _ => 1,
        };
        Ok(Self::Mapped(Box::new(MappedTarget {
            image: Lock::new(image),
            backing,
            existing,
            zero_init,
            unit,
            grain,
            zero_by_tables: false,
            compress,
            cipher,
            order: Lock::default(),
            shares: AtomicBool::new(true),
        })))
    }

    /// An existing image that takes what a layer above it allocates. `under` is its disk as it was before, with everything below.
    pub fn below(image: TargetImage<P>, under: Box<dyn Layer>) -> Self {
        match image {
            TargetImage::Flat(image) => {
                let raw = RawTarget {
                    file: image.file,
                    base: image.base,
                    cipher: image.cipher,
                    zero_init: false,
                    keeps_unallocated: true,
                    size: image.size,
                    held_back: 0,
                };
                Self::Raw(raw, image.completion.map(Lock::new))
            }
            TargetImage::Mapped(image) => Self::Mapped(Box::new(MappedTarget {
                // QEMU's commit works by the granules of a dirty bitmap, and looks into none of them.
                unit: image.disk().alloc_unit().max(image.cluster_size().clamp(*GRANULES.start(), *GRANULES.end())),
                grain: 1,
                zero_by_tables: true,
                cipher: image.contents_cipher().cloned(),
                image: Lock::new(image),
                backing: Some(Lock::new(under)),
                existing: true,
                zero_init: false,
                compress: None,
                order: Lock::default(),
                shares: AtomicBool::new(true),
            })),
        }
    }

    /// How the disk is cut for this target.
    pub fn rules(&self) -> Rules {
        match self {
            Self::Raw(raw, _) => Rules {
                zero_init: raw.zero_init,
                skip_unallocated: raw.keeps_unallocated,
                allocate_all: raw.cipher.is_some(),
                unit: 1,
                chunk: RAW_CHUNK,
                held_back: raw.held_back,
            },
            Self::Mapped(mapped) => Rules {
                zero_init: mapped.zero_init,
                skip_unallocated: mapped.backing.is_some(),
                allocate_all: false,
                unit: mapped.unit.max(mapped.grain),
                chunk: CHUNK.max(mapped.unit),
                held_back: 0,
            },
        }
    }

    /// A compressor for one vCPU, if units are stored compressed.
    pub fn encoder(&self) -> Option<Encoder> {
        match self {
            Self::Mapped(mapped) => mapped.compress.map(|compression| Encoder::new(compression.codec)),
            Self::Raw(..) => None,
        }
    }

    /// Completes the target: the rest of the metadata, the header last; durable if asked for.
    ///
    /// # Errors
    /// The device's error; the image is then not valid.
    pub fn finish(self, platform: &P, bitmaps: Option<SourceBitmaps<P>>, flush: bool) -> Result<(), Failure> {
        match self {
            Self::Raw(raw, completion) => {
                if let Some(complete) = completion {
                    complete.into_inner()(platform)?;
                }
                if flush { flush_file(platform, raw.file) } else { Ok(()) }
            }
            Self::Mapped(mapped) => {
                let mut image = mapped.image.into_inner();
                if mapped.compress.is_some() && !mapped.existing {
                    image.end_compressed();
                }
                if let (Some(bitmaps), Some(writer)) = (bitmaps, image.as_qcow2_mut()) {
                    bitmaps.copy(writer)?;
                }
                image.finish()
            }
        }
    }
}

fn flush_file<P: Platform>(platform: &P, file: FileId) -> Result<(), Failure> {
    let failed = |FailedIo { error, .. }| block(Step::Write, None, error.offset().unwrap_or(0), error);
    platform.submit(&mut [Io::Flush { file }]).map_err(failed)
}
