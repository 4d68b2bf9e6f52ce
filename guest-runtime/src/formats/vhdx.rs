//! VHDX: fixed, dynamic and differencing images.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use instar_blockio::{FileId, Layer};
use instar_guest_protocol::message::{
    Cause, Failure, Field, FileRole, Format, ImageInfo, OptionError, Reference, Step, Target,
};
use instar_vhdx::{self as vhdx, CreateOptions, Writer};

use super::target::{TargetDisk, TargetFile, open_target_file};
use super::{Backing, ImageWriter, MappedImage, OpenImage, TargetImage, invalid_options};
use crate::ops::failure::{about, block};
use crate::platform::{File, Platform};

/// Driver name of parents: they are VHDX images too.
const DRIVER: &[u8] = b"vhdx";

struct Vhdx<P: Platform> {
    image: Box<vhdx::Image<File<P>>>,
    id: FileId,
}

/// Opens an image. What its log holds is replayed in memory.
pub(super) fn open<P: Platform>(file: File<P>, id: FileId) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let image = vhdx::Image::open(file, id, &vhdx::OpenOptions::default())
        .map_err(|error| vhdx_failure(Step::Open, id, error))?;
    Ok(Box::new(Vhdx { image: Box::new(image), id }))
}

impl<P: Platform> Vhdx<P> {
    /// The names under which to look for the parent; one at least if there is a parent.
    fn parent_names(&self) -> Option<Vec<Vec<u8>>> {
        let mut names: Vec<Vec<u8>> = self.image.parent()?.names().into_iter().map(String::into_bytes).collect();
        if names.is_empty() {
            // The host refuses it, and says so.
            names.push(Vec::new());
        }
        Some(names)
    }
}

impl<P: Platform> OpenImage<P> for Vhdx<P> {
    fn format(&self) -> Format {
        Format::Vhdx
    }

    fn backing(&self) -> Option<Backing> {
        Some(Backing { names: self.parent_names()?, driver: Some(DRIVER.to_vec()) })
    }

    fn check_backing(&self, parent: &dyn OpenImage<P>) -> Result<(), Failure> {
        let Some(locator) = self.image.parent() else { return Ok(()) };
        let identity = parent.identity().map(vhdx::Guid);
        if identity.is_some_and(|guid| locator.is_parent(guid)) {
            return Ok(());
        }
        let text = alloc::format!("{}", locator.linkage.unwrap_or_default()).into_bytes();
        Err(Failure { text, format: Format::Vhdx.into(), ..about(Step::Open, self.id, Cause::ParentMismatch) })
    }

    fn identity(&self) -> Option<[u8; 16]> {
        Some(self.image.header().data_write_guid.0)
    }

    fn references(&self) -> Vec<Reference> {
        let names = self.parent_names().unwrap_or_default();
        names.into_iter().map(|name| Reference { role: FileRole::Backing.into(), name }).collect()
    }

    fn describe(&self, _: &P, info: &mut ImageInfo) -> Result<(), Failure> {
        info.virtual_size = self.image.virtual_size();
        info.cluster_size = Some(self.image.block_size());
        info.dirty = self.image.is_dirty();
        if let Some(name) = self.parent_names().and_then(|names| names.into_iter().next()) {
            info.backing_file = Some(name);
            info.backing_format = Some(DRIVER.to_vec());
        }
        Ok(())
    }

    fn into_layer(self: Box<Self>) -> Box<dyn Layer> {
        self.image
    }
}

/// An image that is written.
struct VhdxTarget<P: Platform> {
    writer: Writer<TargetDisk<P>>,
    id: FileId,
    block_device: bool,
}

/// Makes a fresh image; it is none before it is finished.
pub(super) fn create<P: Platform>(
    platform: &P,
    target: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let options = create_options(target, size);
    let main = open_target_file(platform, FileRole::Target, size)?;
    let (id, block_device) = (main.id, main.block_device);
    let failed = |error| match error {
        vhdx::Error::Options(error) => option_failure(id, error),
        other => vhdx_failure(Step::Create, id, other),
    };
    let writer = vhdx::create(main.disk(durable), id, &options).map_err(failed)?;
    Ok(TargetImage::Mapped(Box::new(VhdxTarget { writer, id, block_device })))
}

/// Opens an existing image to write into it.
pub(super) fn open_existing<P: Platform>(
    step: Step,
    main: TargetFile<P>,
    seed: &[u8],
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let (id, block_device) = (main.id, main.block_device);
    let writer = Writer::open(main.disk(durable), id, whole(seed)).map_err(|error| vhdx_failure(step, id, error))?;
    Ok(TargetImage::Mapped(Box::new(VhdxTarget { writer, id, block_device })))
}

impl<P: Platform> MappedImage<P> for VhdxTarget<P> {
    fn id(&self) -> FileId {
        self.id
    }

    fn disk(&self) -> &dyn ImageWriter {
        &self.writer
    }

    fn disk_mut(&mut self) -> &mut dyn ImageWriter {
        &mut self.writer
    }

    fn on_block_device(&self) -> bool {
        self.block_device
    }

    fn finish(self: Box<Self>) -> Result<(), Failure> {
        self.writer.finish().map_err(|error| vhdx_failure(Step::Write, self.id, error))
    }
}

fn create_options(target: &Target, size: u64) -> CreateOptions {
    let wanted = target.vhdx.clone().unwrap_or_default();
    let standard = CreateOptions::default();
    CreateOptions {
        size,
        block_size: wanted.block_size.unwrap_or(standard.block_size),
        log_size: wanted.log_size.unwrap_or(standard.log_size),
        fixed: wanted.fixed,
        block_state_zero: wanted.block_state_zero.unwrap_or(standard.block_state_zero),
        creator: String::from_utf8(wanted.creator).unwrap_or(standard.creator),
        seed: whole(&target.seed),
        ..CreateOptions::default()
    }
}

/// The host's random bytes; what it did not send is zero.
fn whole(seed: &[u8]) -> [u8; 16] {
    core::array::from_fn(|at| seed.get(at).copied().unwrap_or_default())
}

fn option_failure(id: FileId, error: vhdx::OptionError) -> Failure {
    use vhdx::OptionError as E;
    let reason = match error {
        E::SizeTooLarge(value) => {
            return Failure { value, format: Format::Vhdx.into(), ..about(Step::Create, id, Cause::SizeTooLarge) };
        }
        E::BlockSize(_) => OptionError::VhdxBlockSize,
        E::LogSizeZero => OptionError::VhdxLogSizeZero,
        E::LogSizeTooLarge(_) => OptionError::VhdxLogSizeTooLarge,
        _ => OptionError::Unspecified,
    };
    invalid_options(id, Format::Vhdx, reason)
}

/// Why a VHDX image can't be opened, read or made.
fn vhdx_failure(step: Step, id: FileId, error: vhdx::Error) -> Failure {
    use vhdx::Error as E;
    let of = |cause| Failure { format: Format::Vhdx.into(), ..about(step, id, cause) };
    let field = |field: Field, value2| Failure { value: field as u64, value2, ..of(Cause::InvalidField) };
    match error {
        E::Io(error) => block(step, Some(id), error.offset().unwrap_or(0), error),
        E::NotVhdx => of(Cause::NotInFormat),
        E::OutOfMemory => of(Cause::OutOfMemory),
        E::NoHeader => field(Field::VhdxHeader, 0),
        E::NoRegionTable | E::TooManyRegions(_) | E::DuplicateRegion(_) | E::MissingRegion(_) => {
            field(Field::VhdxRegionTable, 0)
        }
        E::RegionPlace(_, at) => field(Field::VhdxRegion, at),
        E::RegionsOverlap(..) => field(Field::VhdxRegion, 0),
        E::UnknownRegion(_) | E::UnknownItem(_) => field(Field::VhdxUnknownRequired, 0),
        E::NoMetadata | E::TooManyItems(_) | E::MissingItem(_) | E::DuplicateItem(_) | E::ItemPlace(..) => {
            field(Field::VhdxMetadata, 0)
        }
        E::BlockSize(size) => field(Field::VhdxBlockSize, size.into()),
        E::SectorSize(size) => field(Field::VhdxSectorSize, size.into()),
        E::VirtualSize(size) => field(Field::VhdxVirtualSize, size),
        E::BatTooSmall(count) => field(Field::VhdxBatSize, count),
        E::LocatorKind(_) | E::Locator(_) => field(Field::VhdxParentLocator, 0),
        E::Log(_) | E::DirtyLog => field(Field::VhdxLog, 0),
        E::Entry { index, fault, .. } => field(block_field(fault), index),
        E::DifferencingWrite => field(Field::VhdxDifferencingWrite, 0),
        _ => of(Cause::Unsupported),
    }
}

fn block_field(fault: vhdx::EntryFault) -> Field {
    use vhdx::EntryFault as F;
    match fault {
        F::StartPastEnd(_) => Field::VhdxBlockStart,
        F::EndPastEnd(_) | F::Overflow => Field::VhdxBlockEnd,
        F::Overlap(_) => Field::VhdxBlockOverlap,
        F::NoBitmap => Field::VhdxBlockBitmap,
        _ => Field::VhdxBlockState,
    }
}
