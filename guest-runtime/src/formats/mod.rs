//! The formats composed: what the operations need to know of an image, whatever its format.
//!
//! One file for each format says how it is opened ([`OpenImage`]), how it is made and filled ([`TargetImage`]) and what `info` tells
//! of it. A format is added by such a file and one line in each `match` of this one.

mod bochs;
mod cloop;
mod dmg;
mod holes;
mod legacy;
mod luks;
mod luks_keys;
mod parallels;
mod qcow;
mod qcow2;
mod qed;
mod raw;
pub mod target;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use instar_blockio::check::CheckReport;
use instar_blockio::{BlockAlloc, BlockRead, BlockWrite, Codec, FileId, Layer, ReadPart, SectorCipher};
use instar_guest_protocol::message::{
    Cause, CheckFinding, Failure, Field, FileRole, Format, ImageInfo, Key, OptionError, Reference, SnapshotSelector,
    Source, Step, Target, VhdSize,
};

use self::target::{TargetDisk, TargetFile, granted_target_file, open_target_file};
use crate::detect::{Detection, HEAD_LEN, TAIL_LEN, detect};
use crate::ops::failure::{about, block, failure};
use crate::platform::{File, Platform};

pub(crate) use self::holes::{WithHoles, run_in_file};
pub(crate) use self::luks_keys::change_keys;
pub(crate) use self::qcow2::open_data_file;
pub use self::qcow2::{bitmap_info, qcow2_failure, snapshot_info};
pub(crate) use self::qcow2::{finding_info, repair_if_dirty};
pub(crate) use self::qed::resize as resize_qed;
pub(crate) use self::raw::write_full;

/// An opened image: its main file has been looked at, further files have not.
pub trait OpenImage<P: Platform>: Send {
    /// Its format.
    fn format(&self) -> Format;

    /// What lies below it, if anything.
    fn backing(&self) -> Option<Backing> {
        None
    }

    /// Is `parent` the image that this one was made on? Formats that record an identity of their parent compare it.
    ///
    /// # Errors
    /// What the user is told of a parent that is another one or has been changed.
    fn check_backing(&self, parent: &dyn OpenImage<P>) -> Result<(), Failure> {
        let _ = parent;
        Ok(())
    }

    /// What a differencing image records of this one: changes whenever the contents change.
    fn identity(&self) -> Option<[u8; 16]> {
        None
    }

    /// Opens an encrypted image by a key, so that it can be read. Others need none, and take any.
    ///
    /// # Errors
    /// A key that opens nothing, or whose derivation costs too much.
    fn unlock(&mut self, platform: &P, key: &Key) -> Result<(), Failure> {
        let _ = (platform, key);
        Ok(())
    }

    /// Opens the further files that hold its data. Describing an image needs none of them.
    ///
    /// # Errors
    /// A file that the host refuses or that does not fit; an image whose data can't be read.
    fn open_parts(&mut self, platform: &P) -> Result<(), Failure> {
        let _ = platform;
        Ok(())
    }

    /// The files that it refers to, in the order in which they would be opened.
    fn references(&self) -> Vec<Reference> {
        Vec::new()
    }

    /// Where the disk begins in the file, bytes, for a disk in one piece; `None` if its length is recorded.
    fn payload_offset(&self) -> Option<u64> {
        Some(0)
    }

    /// Fills in what `info` tells, [`ImageInfo::safety`] excepted.
    ///
    /// # Errors
    /// Tables that can't be read.
    fn describe(&self, platform: &P, info: &mut ImageInfo) -> Result<(), Failure>;

    /// Reads an internal snapshot from now on. Most formats have none.
    ///
    /// # Errors
    /// No such snapshot, or one that can't be read.
    fn select_snapshot(&mut self, selector: &SnapshotSelector) -> Result<(), Failure> {
        let _ = selector;
        Err(Failure { format: self.format().into(), ..failure(Step::Snapshot, Cause::SnapshotNotFound) })
    }

    /// Checks the image, where that needs more than its main file; `None`: it does not, or can't be checked.
    ///
    /// # Errors
    /// Tables that can't be read.
    fn check(&self, found: &mut dyn FnMut(CheckFinding)) -> Option<Result<CheckReport, Failure>> {
        let _ = found;
        None
    }

    /// One answer of QEMU's driver about what is allocated does not reach over multiples of so many bytes of the disk.
    fn status_unit(&self) -> Option<u64> {
        None
    }

    /// The image as a layer of a chain.
    fn into_layer(self: Box<Self>) -> Box<dyn Layer>;

    /// The image itself, for what only qcow2 has.
    fn as_qcow2(&self) -> Option<&instar_qcow2::Image<File<P>>> {
        None
    }
}

/// What an image says of the image below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Names to try, the best first; never empty.
    pub names: Vec<Vec<u8>>,
    /// Driver name of its format; `None`: not recorded, it is looked at.
    pub driver: Option<Vec<u8>>,
}

/// Can images of this format have a backing image, as QEMU's drivers can? A parent of VHD and VHDX is not of that kind.
pub(crate) fn can_have_backing(format: Format) -> bool {
    matches!(format, Format::Qcow2 | Format::Qcow | Format::Qed | Format::Vmdk | Format::Parallels)
}

/// An image that is written.
pub enum TargetImage<P: Platform> {
    /// The disk is one run of a file.
    Flat(FlatImage<P>),
    /// An allocation table says where the parts of the disk lie.
    Mapped(Box<dyn MappedImage<P>>),
}

/// A disk that lies in one piece in a file.
pub struct FlatImage<P> {
    /// The file.
    pub file: FileId,
    /// Where in it the disk begins, bytes.
    pub base: u64,
    /// Bytes of the disk.
    pub size: u64,
    /// Encrypts the disk; positions are offsets of the disk.
    pub cipher: Option<Arc<dyn SectorCipher>>,
    /// The file can't grow, and does not read as zero when it is fresh.
    pub block_device: bool,
    /// Bytes at the end of the disk that must be written after all others.
    pub held_back: u64,
    /// Writes what makes the image whole, such as a footer.
    pub completion: Option<Completion<P>>,
}

/// The last step of making a [`FlatImage`].
pub type Completion<P> = Box<dyn FnOnce(&P) -> Result<(), Failure> + Send>;

/// What the writer of a format can do.
pub trait ImageWriter: BlockAlloc + BlockWrite + Send {}
impl<T: BlockAlloc + BlockWrite + Send> ImageWriter for T {}

/// An image with an allocation table, open for writing.
pub trait MappedImage<P: Platform>: Send {
    /// Its main file.
    fn id(&self) -> FileId;

    /// The disk.
    fn disk(&self) -> &dyn ImageWriter;

    /// The disk, to be written.
    fn disk_mut(&mut self) -> &mut dyn ImageWriter;

    /// Bytes of a cluster, where those are not what is allocated at once.
    fn cluster_size(&self) -> u64 {
        self.disk().alloc_unit()
    }

    /// How units of it are compressed; `None` if it stores nothing compressed.
    fn compression(&self) -> Option<Compression> {
        None
    }

    /// What encrypts the contents: who writes into a reservation does that.
    fn contents_cipher(&self) -> Option<&instar_qcow2::ContentsCipher> {
        None
    }

    /// What nobody writes does not read as zero in the file below, although the image is fresh.
    fn on_block_device(&self) -> bool;

    /// It will get another backing image, which must not show where zeroes are written, although the image has none yet.
    fn expect_backing(&mut self) {}

    /// Records another backing image, or none (an empty name); `None`: the format can't.
    fn set_backing(&mut self, name: &[u8], format_name: &[u8]) -> Option<Result<(), Failure>> {
        let _ = (name, format_name);
        None
    }

    /// Completes the file behind the last compressed unit.
    fn end_compressed(&mut self) {}

    /// Writes the rest of the metadata, the header last.
    ///
    /// # Errors
    /// The device's error; the image is then not valid.
    fn finish(self: Box<Self>) -> Result<(), Failure>;

    /// The image itself, for what only qcow2 has.
    fn as_qcow2_mut(&mut self) -> Option<&mut instar_qcow2::Writer<TargetDisk<P>>> {
        None
    }
}

/// How an image stores compressed units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    /// By which codec.
    pub codec: Codec,
    /// Bytes of a unit before compression, a power of two.
    pub unit: u64,
    /// It stores nothing else, so that also what does not shrink is compressed.
    pub always: bool,
    /// A VMDK grain marker stands before each stream, and streams end at sectors.
    pub grain_markers: bool,
}

impl<P: Platform> TargetImage<P> {
    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        match self {
            Self::Flat(image) => image.size,
            Self::Mapped(image) => image.disk().size(),
        }
    }

    /// Completes the image.
    ///
    /// # Errors
    /// The device's error; the image is then not valid.
    pub fn finish(self, platform: &P) -> Result<(), Failure> {
        match self {
            Self::Flat(image) => image.completion.map_or(Ok(()), |complete| complete(platform)),
            Self::Mapped(image) => image.finish(),
        }
    }
}

/// What the first and last bytes of a file look like.
///
/// # Errors
/// The host's error in reading them.
pub fn probe<F: BlockRead>(file: &F, id: FileId) -> Result<Detection, Failure> {
    let len = file.size();
    let mut head = alloc::vec![0; len.min(HEAD_LEN as u64) as usize];
    let mut tail = alloc::vec![0; len.min(TAIL_LEN as u64) as usize];
    let tail_at = len - tail.len() as u64;
    let mut parts = [ReadPart { offset: 0, buf: &mut head }, ReadPart { offset: tail_at, buf: &mut tail }];
    file.read_many(&mut parts).map_err(|error| block(Step::Open, Some(id), 0, error))?;
    Ok(detect(&head, &tail, len))
}

/// Opens an image that the user named, without its further files and its chain.
///
/// # Errors
/// As [`open_image`]; a file that [`Source::known_only`] forbids.
pub fn open_named<P: Platform>(platform: &P, source: &Source) -> Result<Box<dyn OpenImage<P>>, Failure> {
    if source.known_only && source.format() == Format::Unknown {
        let id = FileId(source.device);
        let file = platform.file(source.device).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
        if probe(&file, id)?.specific == Format::Raw {
            return Err(about(Step::Open, id, Cause::Unrecognised));
        }
    }
    let format = format_by_name(platform, source.device, source.format(), source.named_dmg)?;
    let mut image = match source.detached_header {
        true => luks::open_detached(platform, source.device)?,
        false => open_image(platform, source.device, format, source.strict, source.vhd_size())?,
    };
    if source.data_file_named && image.as_qcow2().is_some_and(|image| !image.needs_data_file()) {
        let id = FileId(source.device);
        let field = Field::DataFileUnexpected as u64;
        return Err(Failure { value: field, format: format.into(), ..about(Step::Open, id, Cause::InvalidField) });
    }
    if let Some(key) = &source.key {
        image.unlock(platform, key)?;
    }
    Ok(image)
}

/// The format to open a file in, whose name may make it an Apple disk image if nobody says what it is: their bytes begin like anything.
///
/// # Errors
/// The host's error in reading the file.
pub(crate) fn format_by_name<P: Platform>(
    platform: &P,
    device: u32,
    format: Format,
    named_dmg: bool,
) -> Result<Format, Failure> {
    if format != Format::Unknown || !named_dmg {
        return Ok(format);
    }
    let id = FileId(device);
    let file = platform.file(device).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    Ok(match probe(&file, id)?.format {
        Format::Raw | Format::Cloop => Format::Dmg,
        found => found,
    })
}

/// Opens the image on a granted device, without its further files and its chain. `strict`: see
/// [`Source::strict`](instar_guest_protocol::message::Source::strict). `size_rule`: of a VHD.
///
/// # Errors
/// A format that the file has not or that can't be opened; the format's own reasons.
pub fn open_image<P: Platform>(
    platform: &P,
    device: u32,
    format: Format,
    strict: bool,
    size_rule: VhdSize,
) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let id = FileId(device);
    let file = platform.file(device).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    let format = match format {
        Format::Unknown => probe(&file, id)?.format,
        known => known,
    };
    match format {
        Format::Raw | Format::File => raw::open(file, id),
        Format::Qcow2 => qcow2::open(file, id, strict),
        Format::Qcow => qcow::open(file, id, strict),
        Format::Qed => qed::open(file, id, strict),
        Format::Vdi => vdi::open(platform, file, id, strict),
        Format::Parallels => parallels::open(file, id, strict),
        Format::Dmg => dmg::open(platform, file, id, strict),
        Format::Bochs => bochs::open(file, id, strict),
        Format::Cloop => cloop::open(file, id, strict),
        Format::Vhdx => vhdx::open(file, id),
        Format::Vmdk => vmdk::open(platform, file, id, strict),
        Format::Vpc => vhd::open(platform, file, id, size_rule),
        Format::Luks => luks::open(file, id, None),
        other => Err(Failure { format: other.into(), ..about(Step::Open, id, Cause::FormatNotSupported) }),
    }
}

/// Makes the image for a disk of `size` bytes. It is not valid before it is finished. `durable`: flushes reach the disk.
///
/// # Errors
/// The host's refusal to open a file, contradicting options, or the writer's error.
pub fn create_image<P: Platform>(
    platform: &P,
    target: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let file = || open_target_file(platform, FileRole::Target, size);
    match target.format() {
        Format::Raw => raw::create(platform, target, size),
        Format::Qcow2 => qcow2::create(platform, target, size, durable),
        Format::Qcow => qcow::create(file()?, target, size, durable),
        Format::Qed => qed::create(file()?, target, size, durable),
        Format::Vdi => vdi::create(file()?, target, size, durable),
        Format::Parallels => parallels::create(file()?, target, size, durable),
        Format::Vhdx => vhdx::create(platform, target, size, durable),
        Format::Vmdk => vmdk::create(platform, target, size, durable),
        Format::Vpc => vhd::create(platform, target, size, durable),
        Format::Luks => luks::create(platform, target, size),
        format => Err(Failure { format: format.into(), ..failure(Step::Create, Cause::FormatNotSupported) }),
    }
}

/// Opens an existing image to write a disk of `size` bytes into it.
///
/// # Errors
/// The host's refusal to open a file; an image that can't be written.
pub fn open_target<P: Platform>(
    platform: &P,
    target: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    match target.format() {
        Format::Raw => raw::open_target(platform, size),
        Format::Luks => luks::open_target(platform, target, size),
        Format::Qcow2 => qcow2::open_target(platform, target, size, durable),
        format => {
            let file = open_target_file(platform, FileRole::Target, size)?;
            open_existing(Step::OpenTarget, file, format, &target.seed, durable)
        }
    }
}

/// Opens an existing image with all of it in one file. `seed`: random bytes for what a change makes new.
fn open_existing<P: Platform>(
    step: Step,
    file: TargetFile<P>,
    format: Format,
    seed: &[u8],
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    match format {
        Format::Qcow => qcow::open_existing(step, file, durable),
        Format::Qed => qed::open_existing(step, file, durable),
        Format::Vdi => vdi::open_existing(step, file, durable),
        Format::Parallels => parallels::open_existing(step, file, durable),
        Format::Vhdx => vhdx::open_existing(step, file, seed, durable),
        Format::Vmdk => vmdk::open_existing(step, file, seed, durable),
        Format::Vpc => vhd::open_existing(step, file, durable),
        format => Err(Failure { format: format.into(), ..about(step, file.id, Cause::FormatNotSupported) }),
    }
}

/// Opens the image on a granted, writable device to write into it. `seed`: 16 random bytes for what a change makes new.
///
/// # Errors
/// An image that can't be written.
pub fn open_in_place<P: Platform>(
    platform: &P,
    device: u32,
    format: Format,
    seed: &[u8],
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    match format {
        Format::Raw | Format::File => raw::open_in_place(platform, device),
        Format::Qcow2 => qcow2::open_in_place(platform, device, durable, true),
        Format::Luks => luks::open_in_place(platform, device),
        format => open_existing(Step::Open, granted_target_file(platform, device)?, format, seed, durable),
    }
}

/// Opens the qcow2 image on a granted, writable device to write its metadata. An external data file stays as it is.
///
/// # Errors
/// An image that can't be written.
pub fn open_metadata_in_place<P: Platform>(
    platform: &P,
    device: u32,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    qcow2::open_in_place(platform, device, durable, false)
}

/// Options of a new image that contradict each other.
fn invalid_options(id: FileId, format: Format, reason: OptionError) -> Failure {
    Failure { value: reason as u64, format: format.into(), ..about(Step::Create, id, Cause::InvalidOptions) }
}
