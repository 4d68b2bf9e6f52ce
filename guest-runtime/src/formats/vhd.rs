//! VHD (vpc): fixed, dynamic and differencing images.

use alloc::boxed::Box;
use alloc::vec::Vec;

use instar_blockio::{BlockRead, FileId, Layer};
use instar_guest_protocol::message::{
    Call, Cause, Failure, Field, FileRole, Format, ImageInfo, Reference, Step, Target, VhdSize, call,
};
use instar_vhd::{self as vhd, CreateOptions, DiskType, OpenOptions, SizeRule, Writer};

use super::holes::WithHoles;
use super::target::{TargetDisk, TargetFile, open_target_file};
use super::{Backing, FlatImage, ImageWriter, MappedImage, OpenImage, TargetImage};
use crate::ops::failure::{about, block};
use crate::platform::{File, Io, Platform};

/// Driver name of parents: they are VHD images too.
const DRIVER: &[u8] = b"vpc";

struct Vhd<P: Platform> {
    platform: P,
    image: Box<vhd::Image<File<P>>>,
    id: FileId,
    /// Where to look for the parent; one name at least if there is a parent.
    names: Vec<Vec<u8>>,
}

/// Opens an image, and warns if one of its footers had to stand in for the other.
pub(super) fn open<P: Platform>(
    platform: &P,
    file: File<P>,
    id: FileId,
    size_rule: VhdSize,
) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let size_rule = match size_rule {
        VhdSize::ByCreator => SizeRule::ByCreator,
        VhdSize::Geometry => SizeRule::Geometry,
        VhdSize::Current => SizeRule::CurrentSize,
    };
    let options = OpenOptions { size_rule, ..OpenOptions::default() };
    let image = vhd::Image::open(file, id, &options).map_err(|error| vhd_failure(Step::Open, id, error))?;
    let lost = match (image.is_copy_used(), image.is_end_footer_lost()) {
        (true, _) => Some(Cause::FooterCopyUsed),
        (false, true) => Some(Cause::EndFooterLost),
        (false, false) => None,
    };
    if let Some(cause) = lost {
        let warning = Failure { format: Format::Vpc.into(), ..about(Step::Open, id, cause) };
        platform.call(&Call { kind: Some(call::Kind::Warning(warning)) });
    }
    let mut names: Vec<Vec<u8>> = image.parent_names().iter().map(|name| name.clone().into_bytes()).collect();
    if image.has_parent() && names.is_empty() {
        // The host refuses it, and says so.
        names.push(Vec::new());
    }
    Ok(Box::new(Vhd { platform: platform.clone(), image: Box::new(image), id, names }))
}

impl<P: Platform> OpenImage<P> for Vhd<P> {
    fn format(&self) -> Format {
        Format::Vpc
    }

    fn backing(&self) -> Option<Backing> {
        match self.names.is_empty() {
            true => None,
            false => Some(Backing { names: self.names.clone(), driver: Some(DRIVER.to_vec()) }),
        }
    }

    fn check_backing(&self, parent: &dyn OpenImage<P>) -> Result<(), Failure> {
        if parent.identity().is_some_and(|uuid| self.image.is_parent(uuid)) {
            return Ok(());
        }
        let wanted = self.image.header().map_or([0; 16], |header| header.parent_uuid);
        let text = alloc::format!("{:032x}", u128::from_be_bytes(wanted)).into_bytes();
        Err(Failure { text, format: Format::Vpc.into(), ..about(Step::Open, self.id, Cause::ParentMismatch) })
    }

    fn identity(&self) -> Option<[u8; 16]> {
        Some(self.image.footer().uuid)
    }

    fn references(&self) -> Vec<Reference> {
        self.names.iter().map(|name| Reference { role: FileRole::Backing.into(), name: name.clone() }).collect()
    }

    fn describe(&self, _: &P, info: &mut ImageInfo) -> Result<(), Failure> {
        info.virtual_size = self.image.virtual_size();
        info.cluster_size = self.image.block_size();
        if let Some(name) = self.names.first() {
            info.backing_file = Some(name.clone());
            info.backing_format = Some(DRIVER.to_vec());
        }
        Ok(())
    }

    fn into_layer(self: Box<Self>) -> Box<dyn Layer> {
        match self.image.disk_type() {
            DiskType::Fixed => Box::new(WithHoles::new(&self.platform, *self.image, Some(alloc::vec![self.id]))),
            _ => self.image,
        }
    }
}

/// A dynamic image that is written.
struct VhdTarget<P: Platform> {
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
    let wanted = target.vhd.clone().unwrap_or_default();
    let mut uuid: [u8; 16] = core::array::from_fn(|at| target.seed.get(at).copied().unwrap_or_default());
    // Random, RFC 9562 version 4.
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    let options = CreateOptions { size, force_size: wanted.force_size, timestamp: wanted.timestamp, uuid };
    let file = open_target_file(platform, FileRole::Target, size)?;
    match wanted.fixed {
        true => create_fixed(platform, file, &options),
        false => {
            let (id, block_device) = (file.id, file.block_device);
            let writer =
                vhd::create(file.disk(durable), id, &options).map_err(|error| vhd_failure(Step::Create, id, error))?;
            Ok(TargetImage::Mapped(Box::new(VhdTarget { writer, id, block_device })))
        }
    }
}

/// The disk, then the footer, which is written last.
fn create_fixed<P: Platform>(
    platform: &P,
    target: TargetFile<P>,
    options: &CreateOptions,
) -> Result<TargetImage<P>, Failure> {
    let (file, block_device) = (target.id, target.block_device);
    let (size, footer) = vhd::fixed(options).map_err(|error| vhd_failure(Step::Create, file, error))?;
    let end = size + footer.len() as u64; // at most 2040 GiB and a footer
    let at = match block_device {
        // The last sector of the device is where readers look.
        true => match target.file.size().checked_sub(footer.len() as u64) {
            Some(at) if at >= size => at,
            _ => return Err(about(Step::Create, file, Cause::TargetTooSmall)),
        },
        false => {
            let sized = platform.submit(&mut [Io::SetLen { file, len: end }]);
            sized.map_err(|failed| block(Step::Create, Some(file), 0, failed.error))?;
            size
        }
    };
    let complete = move |platform: &P| {
        let written = platform.submit(&mut [Io::Write { file, offset: at, buf: &footer }]);
        written.map_err(|failed| block(Step::Write, Some(file), at, failed.error))
    };
    Ok(TargetImage::Flat(FlatImage {
        file,
        base: 0,
        size,
        cipher: None,
        block_device,
        held_back: 0,
        completion: Some(Box::new(complete)),
    }))
}

/// Opens an existing image to write into it.
pub(super) fn open_existing<P: Platform>(
    step: Step,
    target: TargetFile<P>,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let (id, block_device) = (target.id, target.block_device);
    let failed = |error| vhd_failure(step, id, error);
    let image = vhd::Image::open(&target.file, id, &OpenOptions::default()).map_err(failed)?;
    let (kind, size) = (image.disk_type(), image.virtual_size());
    drop(image);
    if kind == DiskType::Fixed {
        // What it holds does not read as zero.
        let flat = FlatImage { file: id, base: 0, size, cipher: None, block_device, held_back: 0, completion: None };
        return Ok(TargetImage::Flat(flat));
    }
    let writer = Writer::open(target.disk(durable), id, SizeRule::ByCreator).map_err(failed)?;
    Ok(TargetImage::Mapped(Box::new(VhdTarget { writer, id, block_device })))
}

impl<P: Platform> MappedImage<P> for VhdTarget<P> {
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
        self.writer.finish().map(|_| ()).map_err(|error| vhd_failure(Step::Write, self.id, error))
    }
}

/// Why a VHD image can't be opened, read or made.
fn vhd_failure(step: Step, id: FileId, error: vhd::Error) -> Failure {
    use vhd::Error as E;
    let of = |cause| Failure { format: Format::Vpc.into(), ..about(step, id, cause) };
    let field = |field: Field, value2| Failure { value: field as u64, value2, ..of(Cause::InvalidField) };
    match error {
        E::Io(error) => block(step, Some(id), error.offset().unwrap_or(0), error),
        E::NotVhd => of(Cause::NotInFormat),
        E::TooShort(len) => field(Field::VhdTooShort, len),
        E::Checksum => field(Field::VhdChecksum, 0),
        E::DiskType(kind) => field(Field::VhdDiskType, kind.into()),
        E::SizeTooLarge(sectors) if step == Step::Create => {
            Failure { value: sectors.saturating_mul(vhd::SECTOR), ..of(Cause::SizeTooLarge) }
        }
        E::SizeTooLarge(sectors) => field(Field::VhdSize, sectors),
        E::Header(at) => field(Field::VhdHeader, at),
        E::HeaderMark => field(Field::VhdHeaderMark, 0),
        E::BlockSize(size) => field(Field::VhdBlockSize, size.into()),
        E::TableTooSmall(count) => field(Field::VhdTableTooSmall, count.into()),
        E::TableTooLarge(count) => field(Field::VhdTableTooLarge, count.into()),
        E::TablePlace(at) => field(Field::VhdTablePlace, at),
        E::Truncated(number) => field(Field::VhdTruncated, number.into()),
        E::DifferencingWrite => field(Field::VhdDifferencingWrite, 0),
        _ => of(Cause::Unsupported),
    }
}
