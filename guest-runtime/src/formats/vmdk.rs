//! VMDK: the image, its extents in further files, its parent.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use instar_blockio::check::CheckReport;
use instar_blockio::{Codec, FileId, Layer};
use instar_guest_protocol::message::{
    Cause, CheckFinding, Failure, FileRole, FindingKind, Format, ImageInfo, Reference, Step, Target, VmdkExtent,
    VmdkFault, VmdkInfo,
};
use instar_vmdk::{
    CreateOptions, Error, ExtentType, GRAIN, Image, OpenOptions, Subformat, Writer, create as create_vmdk,
};

use super::holes::WithHoles;
use super::target::{TargetDisk, TargetFile, open_target_file};
use super::{Backing, Compression, FlatImage, ImageWriter, MappedImage, OpenImage, TargetImage, open_image};
use crate::chain::request_file;
use crate::ops::failure::{about, block};
use crate::platform::{File, Platform};

struct Vmdk<P: Platform> {
    platform: P,
    image: Image<File<P>>,
    id: FileId,
}

/// Opens an image with its extents: already its description needs them.
pub(super) fn open<P: Platform>(
    platform: &P,
    file: File<P>,
    id: FileId,
    strict: bool,
) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let failed = |error| failure(Step::Open, id, error);
    let mut image = Image::open(file, id, &OpenOptions { strict }).map_err(failed)?;
    while let Some((number, line)) = image.wanted() {
        let format = match line.kind {
            ExtentType::Flat | ExtentType::Vmfs => Format::Raw,
            _ => Format::Vmdk,
        };
        let part = request_file(platform, id, FileRole::Extent, line.name.clone(), format, false)?;
        let file = platform.file(part.0).ok_or_else(|| about(Step::Open, id, Cause::OpenRefused))?;
        image.attach(number, file, part).map_err(failed)?;
    }
    Ok(Box::new(Vmdk { platform: platform.clone(), image, id }))
}

impl<P: Platform> OpenImage<P> for Vmdk<P> {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn backing(&self) -> Option<Backing> {
        let name = self.image.parent_name()?.to_vec();
        // Only such an image can be a parent.
        Some(Backing { names: alloc::vec![name], driver: Some(b"vmdk".to_vec()) })
    }

    fn check(&self, found: &mut dyn FnMut(CheckFinding)) -> Option<Result<CheckReport, Failure>> {
        let report = instar_vmdk::check(&self.image, &mut |finding| {
            found(match finding {
                instar_vmdk::Finding::GrainOutside { offset, .. } => CheckFinding {
                    kind: FindingKind::GrainBehindEnd.into(),
                    first: offset / 512,
                    ..CheckFinding::default()
                },
                _ => CheckFinding::default(),
            });
        });
        let report = report.map_err(|error| failure(Step::Map, self.id, error));
        Some(report.map(|report| CheckReport { corruptions: report.corruptions, ..CheckReport::default() }))
    }

    fn check_backing(&self, parent: &dyn OpenImage<P>) -> Result<(), Failure> {
        match parent.identity() {
            Some([a, b, c, d, ..]) if parent.format() == Format::Vmdk => {
                let cid = u32::from_le_bytes([a, b, c, d]);
                match self.image.is_child_of(cid) {
                    true => Ok(()),
                    false => Err(fault(Step::Open, self.id, VmdkFault::ParentCid, cid.into(), Vec::new())),
                }
            }
            _ => Err(fault(Step::Open, self.id, VmdkFault::ParentFormat, 0, Vec::new())),
        }
    }

    fn identity(&self) -> Option<[u8; 16]> {
        let mut identity = [0; 16];
        identity[..4].copy_from_slice(&self.image.descriptor().cid.to_le_bytes());
        Some(identity)
    }

    fn references(&self) -> Vec<Reference> {
        let reference = |role: FileRole, name: &[u8]| Reference { role: role.into(), name: name.to_vec() };
        let lines = self.image.extents_info().filter_map(|extent| extent.line);
        let extents = lines.filter(|line| !line.name.is_empty()).map(|line| reference(FileRole::Extent, &line.name));
        extents.chain(self.image.parent_name().map(|name| reference(FileRole::Backing, name))).collect()
    }

    fn describe(&self, _: &P, info: &mut ImageInfo) -> Result<(), Failure> {
        let descriptor = self.image.descriptor();
        let grains: Vec<Option<u64>> = self.image.extents_info().map(|extent| extent.grain).collect();
        info.virtual_size = self.image.virtual_size();
        // Of extents that differ none is told.
        info.cluster_size =
            grains.first().copied().flatten().filter(|first| grains.iter().all(|other| *other == Some(*first)));
        info.backing_file = self.image.parent_name().map(<[u8]>::to_vec);
        info.backing_format = info.backing_file.as_ref().map(|_| b"vmdk".to_vec());
        info.vmdk = Some(VmdkInfo {
            cid: descriptor.cid,
            parent_cid: descriptor.parent_cid,
            create_type: descriptor.create_type.clone(),
            extents: self
                .image
                .extents_info()
                .map(|extent| VmdkExtent {
                    compressed: extent.compressed,
                    virtual_size: extent.len,
                    device: extent.file.map(|id| id.0),
                    cluster_size: extent.grain,
                    kind: extent.line.map_or(Vec::new(), |line| line.kind.name().as_bytes().to_vec()),
                })
                .collect(),
        });
        Ok(())
    }

    fn into_layer(self: Box<Self>) -> Box<dyn Layer> {
        let flat = self.image.extents_info().filter(|extent| extent.grain.is_none()).filter_map(|extent| extent.file);
        let flat: Vec<FileId> = flat.collect();
        match flat.is_empty() {
            true => Box::new(self.image),
            false => Box::new(WithHoles::new(&self.platform, self.image, Some(flat))),
        }
    }
}

/// An image that is written.
struct VmdkTarget<P: Platform> {
    writer: Writer<TargetDisk<P>>,
    id: FileId,
    block_device: bool,
}

/// Makes a fresh image; its sparse extents have no valid headers before it is finished.
pub(super) fn create<P: Platform>(
    platform: &P,
    target: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let wanted = target.vmdk.clone().unwrap_or_default();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let options = CreateOptions {
        size,
        subformat: Subformat::of_name(&wanted.subformat).unwrap_or_default(),
        name: wanted.name,
        cid: wanted.cid,
        parent: None,
        adapter: text(&wanted.adapter),
        hardware_version: text(&wanted.hardware_version),
        tools_version: text(&wanted.tools_version),
        zeroed_grain: wanted.zeroed_grain,
    };
    let main = open_target_file(platform, FileRole::Target, size)?;
    let (id, block_device) = (main.id, main.block_device);
    let failed = |error| failure(Step::Create, id, error);
    let parent = find_parent(platform, target, id)?;
    let options = CreateOptions { parent, ..options };
    let subformat = options.subformat;
    let lens = options.parts().map_err(failed)?;
    let mut files = Vec::new();
    if subformat.has_extent_files() {
        for len in &lens {
            let file = open_target_file(platform, FileRole::TargetExtent, *len)?;
            let id = file.id;
            files.push((file.disk(durable), id));
        }
    }
    let mut writer = create_vmdk(main.disk(durable), id, files, options).map_err(failed)?;
    match writer.only_flat() {
        Some(file) => {
            if wanted.filled {
                writer.mark_changed();
            }
            let completion = move |_: &P| writer.finish().map_err(|error| failure(Step::Write, id, error));
            let size = lens.iter().sum();
            let completion = Some(Box::new(completion) as _);
            Ok(TargetImage::Flat(FlatImage {
                file,
                base: 0,
                size,
                cipher: None,
                block_device: false,
                held_back: 0,
                completion,
            }))
        }
        None => Ok(TargetImage::Mapped(Box::new(VmdkTarget { writer, id, block_device }))),
    }
}

/// Name and CID of the image that the new one is made on.
fn find_parent<P: Platform>(platform: &P, target: &Target, id: FileId) -> Result<Option<(Vec<u8>, u32)>, Failure> {
    let Some(backing) = &target.backing else { return Ok(None) };
    let none = || fault(Step::Create, id, VmdkFault::ParentFormat, 0, Vec::new());
    // A child that does not know the CID could not be read.
    let source = backing.image.as_ref().ok_or_else(none)?;
    let image = open_image(platform, source.device, source.format(), source.strict, source.vhd_size())?;
    match image.identity() {
        Some([a, b, c, d, ..]) if image.format() == Format::Vmdk => {
            Ok(Some((backing.name.clone(), u32::from_le_bytes([a, b, c, d]))))
        }
        _ => Err(none()),
    }
}

/// Opens an existing image to write into it.
pub(super) fn open_existing<P: Platform>(
    step: Step,
    main: TargetFile<P>,
    seed: &[u8],
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let (id, block_device) = (main.id, main.block_device);
    // Never a number that means something.
    let cid = seed.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)).clamp(1, u32::MAX - 1);
    let writer = Writer::open(main.disk(durable), id, cid).map_err(|error| failure(step, id, error))?;
    Ok(TargetImage::Mapped(Box::new(VmdkTarget { writer, id, block_device })))
}

impl<P: Platform> MappedImage<P> for VmdkTarget<P> {
    fn id(&self) -> FileId {
        self.id
    }

    fn disk(&self) -> &dyn ImageWriter {
        &self.writer
    }

    fn disk_mut(&mut self) -> &mut dyn ImageWriter {
        &mut self.writer
    }

    fn compression(&self) -> Option<Compression> {
        let how = Compression { codec: Codec::Zlib, unit: GRAIN, always: true, grain_markers: true };
        self.writer.is_compressed().then_some(how)
    }

    fn on_block_device(&self) -> bool {
        self.block_device
    }

    fn finish(self: Box<Self>) -> Result<(), Failure> {
        self.writer.finish().map_err(|error| failure(Step::Write, self.id, error))
    }
}

fn fault(step: Step, id: FileId, fault: VmdkFault, value2: u64, text: Vec<u8>) -> Failure {
    Failure { value: fault as u64, value2, text, format: Format::Vmdk.into(), ..about(step, id, Cause::VmdkFault) }
}

/// Why an image can't be opened, made or completed.
fn failure(step: Step, id: FileId, error: Error) -> Failure {
    use VmdkFault as F;
    let with = |which, value| fault(step, id, which, value, Vec::new());
    let quoting = |which, text| fault(step, id, which, 0, text);
    match error {
        Error::Io(error) => block(step, Some(id), error.offset().unwrap_or(0), error),
        Error::NotVmdk | Error::InvalidDescriptor => with(F::Descriptor, 0),
        Error::NoContentId => with(F::NoContentId, 0),
        Error::UnsupportedType(text) => quoting(F::ImageType, text),
        Error::InvalidExtentLine(text) => quoting(F::ExtentLine, text),
        Error::UnsupportedExtent(text) => quoting(F::ExtentType, text),
        Error::TooManyExtents(count) => with(F::ExtentCount, count as u64),
        Error::SizeOverflow => with(F::Size, 0),
        Error::UnsupportedVersion(version) => with(F::Version, version),
        Error::TableSize(count) => with(F::TableSize, count),
        Error::GrainSize(sectors) => with(F::GrainSize, sectors),
        Error::DirectorySize(count) => with(F::DirectorySize, count),
        Error::Truncated(bytes) => with(F::Truncated, bytes),
        Error::Footer => with(F::Footer, 0),
        Error::SeSparse(at) => with(F::SeSparse, at),
        Error::SeSparseDirty => with(F::SeSparseDirty, 0),
        Error::ExtentMagic(magic) => with(F::ExtentMagic, magic.into()),
        Error::ReadOnlyType => with(F::ReadOnly, 0),
        Error::SizeTooLarge(value) => {
            Failure { value, format: Format::Vmdk.into(), ..about(step, id, Cause::SizeTooLarge) }
        }
        _ => about(step, id, Cause::Unsupported),
    }
}
