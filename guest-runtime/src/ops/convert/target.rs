//! The target of a conversion: made or opened once the sources are open.

use alloc::boxed::Box;

use instar_blockio::{BlockAlloc, BlockRead, Codec, Error};
use instar_codec::Encoder;
use instar_guest_protocol::message::{Cause, ConvertRequest, Failure, FileRole, Format, Step};
use instar_qcow2::CompressionType;

use super::bitmaps::SourceBitmaps;
use super::mapped::MappedTarget;
use super::plan::Rules;
use super::raw::RawTarget;
use crate::chain::open_source;
use crate::lock::Lock;
use crate::ops::create::{Qcow2Target, create_qcow2, create_raw, open_qcow2, open_target_file};
use crate::ops::failure::{about, block, failure, qcow2_failure};
use crate::platform::{Io, Platform};

/// Bytes of a chunk that is read into guest memory: the size of qemu-img's requests, so that the same data gives the same image.
const CHUNK: u64 = 2 << 20;
/// Bytes of a chunk that goes to a raw file, mostly by copy requests.
const RAW_CHUNK: u64 = 4 << 20;

/// Where the data goes.
pub(super) enum Target<P: Platform> {
    /// A raw file.
    Raw(RawTarget),
    /// An image with an allocation table.
    Mapped(Box<MappedTarget<P>>),
}

impl<P: Platform> Target<P> {
    /// Creates the target for a disk of `size` bytes, or opens it.
    ///
    /// # Errors
    /// The host's refusal to open the file, contradicting options, or the writer's error.
    pub fn prepare(platform: &P, request: &ConvertRequest, size: u64) -> Result<Self, Failure> {
        let format = request.target.format();
        match format {
            Format::Raw if request.compress => Err(failure(Step::Create, Cause::CompressionUnsupported)),
            Format::Raw => Self::prepare_raw(platform, request, size),
            Format::Qcow2 => Self::prepare_qcow2(platform, request, size),
            _ => Err(Failure { format: format.into(), ..failure(Step::Create, Cause::FormatNotSupported) }),
        }
    }

    fn prepare_raw(platform: &P, request: &ConvertRequest, size: u64) -> Result<Self, Failure> {
        let opened = open_target_file(platform, FileRole::Target, size)?;
        if request.target.existing {
            if opened.file.size() < size {
                return Err(about(Step::OpenTarget, opened.id, Cause::TargetTooSmall));
            }
            return Ok(Self::Raw(RawTarget { file: opened.id, zero_init: request.target_is_zero }));
        }
        create_raw(platform, &opened, size, request.target.preallocation())?;
        let zero_init = !opened.block_device || request.target_is_zero;
        Ok(Self::Raw(RawTarget { file: opened.id, zero_init }))
    }

    fn prepare_qcow2(platform: &P, request: &ConvertRequest, size: u64) -> Result<Self, Failure> {
        let Qcow2Target { id, writer, block_device } = match request.target.existing {
            true => open_qcow2(platform, size, request.flush)?,
            false => create_qcow2(platform, &request.target, size, request.flush)?,
        };
        if writer.size() < size {
            return Err(failure(Step::OpenTarget, Cause::TargetTooSmall));
        }
        let backing = match request.target.backing.as_ref().and_then(|backing| backing.image.as_ref()) {
            Some(image) => Some(Lock::new(open_source(platform, image, false)?)),
            None => None,
        };
        let codec = match writer.header().compression {
            CompressionType::Zstd => Codec::Zstd,
            CompressionType::Zlib => Codec::Deflate,
        };
        let compress = request.compress.then_some(codec);
        let whole_units = request.target.existing || backing.is_some() || block_device;
        let unit = match compress {
            Some(_) => writer.header().geometry.cluster_size(),
            None if whole_units => writer.alloc_unit(),
            None => 1,
        };
        let zero_init = (!request.target.existing && backing.is_none()) || request.target_is_zero;
        Ok(Self::Mapped(Box::new(MappedTarget {
            id,
            writer: Lock::new(writer),
            backing,
            existing: request.target.existing,
            zero_init,
            unit,
            compress,
            order: Lock::default(),
        })))
    }

    /// How the disk is cut for this target.
    pub fn rules(&self) -> Rules {
        match self {
            Self::Raw(raw) => Rules {
                zero_init: raw.zero_init,
                skip_unallocated: false,
                allocate_all: false,
                unit: 1,
                chunk: RAW_CHUNK,
            },
            Self::Mapped(mapped) => Rules {
                zero_init: mapped.zero_init,
                skip_unallocated: mapped.backing.is_some(),
                allocate_all: false,
                unit: mapped.unit,
                chunk: CHUNK,
            },
        }
    }

    /// A compressor for one vCPU, if units are stored compressed.
    pub fn encoder(&self) -> Option<Encoder> {
        match self {
            Self::Mapped(mapped) => mapped.compress.map(Encoder::new),
            Self::Raw(_) => None,
        }
    }

    /// Completes the target: the rest of the metadata, the header last; durable if asked for.
    ///
    /// # Errors
    /// The device's error; the image is then not valid.
    pub fn finish(self, platform: &P, bitmaps: Option<SourceBitmaps<P>>, flush: bool) -> Result<(), Failure> {
        let write_error = |error: Error| block(Step::Write, None, error.offset().unwrap_or(0), error);
        match self {
            Self::Raw(raw) => match flush {
                true => platform.submit(&mut [Io::Flush { file: raw.file }]).map_err(|(_, error)| write_error(error)),
                false => Ok(()),
            },
            Self::Mapped(mapped) => {
                let id = mapped.id;
                let mut writer = mapped.writer.into_inner();
                if mapped.compress.is_some() && !mapped.existing {
                    writer.align_end();
                }
                if let Some(bitmaps) = bitmaps {
                    bitmaps.copy(&mut writer)?;
                }
                writer.finish().map_err(|error| qcow2_failure(Step::Write, id, error))
            }
        }
    }
}
