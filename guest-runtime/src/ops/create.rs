//! `create`: an empty image; also the first step of `convert`.

use alloc::vec::Vec;

use instar_blockio::{BlockRead, BlockWrite, Codec, FileId, Limits, ReadPart, Result as BlockResult, ZeroMode};
use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::message::{
    Cause, CreateReply, CreateRequest, Failure, FileRole, Format, OpenFile, OptionError, Preallocation, Step, Target,
};
use instar_qcow2::{self as qcow2, CreateOptions, Writer};

use crate::chain::{open_data_file, open_source};
use crate::ops::failure::{about, block, failure, qcow2_failure};
use crate::platform::{File, Io, Platform};

/// Sizes are whole sectors to qemu-img.
const SECTOR: u64 = 512;

/// Creates as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &CreateRequest) -> Result<CreateReply, Failure> {
    let backing = request.target.backing.as_ref().and_then(|backing| backing.image.as_ref());
    // Opened even if the size is given: a backing image that can't be read must not be recorded.
    let backing_size = match backing {
        Some(image) => Some(open_source(platform, image, true)?.size()),
        None => None,
    };
    let size = request.size.or(backing_size).ok_or_else(|| failure(Step::Create, Cause::BadRequest))?;
    match request.target.format() {
        Format::Raw => {
            let target = open_target_file(platform, FileRole::Target, size)?;
            create_raw(platform, &target, size, request.target.preallocation())?;
        }
        Format::Qcow2 => {
            let target = create_qcow2(platform, &request.target, size, false)?;
            let id = target.id;
            target.writer.finish().map_err(|error| qcow2_failure(Step::Create, id, error))?;
        }
        format => return Err(Failure { format: format.into(), ..failure(Step::Create, Cause::FormatNotSupported) }),
    }
    Ok(CreateReply { virtual_size: size })
}

/// A file of the target, opened by the host.
pub(super) struct TargetFile<P> {
    pub file: File<P>,
    pub id: FileId,
    /// It can't grow, and a fresh one does not read as zero.
    pub block_device: bool,
}

/// A file of the target. It flushes only if the user asked for a durable target: otherwise the order in which the host's page cache
/// reaches the disk is left to the host, as qemu-img does.
#[derive(Clone, Debug)]
pub(super) struct TargetDisk<P> {
    file: File<P>,
    durable: bool,
}

impl<P: Platform> BlockRead for TargetDisk<P> {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        self.file.read_at(offset, buf)
    }

    fn read_many(&self, parts: &mut [ReadPart<'_>]) -> BlockResult<()> {
        self.file.read_many(parts)
    }

    fn limits(&self) -> Limits {
        self.file.limits()
    }
}

impl<P: Platform> BlockWrite for TargetDisk<P> {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> BlockResult<()> {
        self.file.write_at(offset, buf)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> BlockResult<()> {
        self.file.write_zeroes(offset, len, mode)
    }

    fn discard(&mut self, offset: u64, len: u64) -> BlockResult<()> {
        self.file.discard(offset, len)
    }

    fn set_size(&mut self, size: u64) -> BlockResult<()> {
        self.file.set_size(size)
    }

    fn flush(&mut self) -> BlockResult<()> {
        if self.durable { self.file.flush() } else { Ok(()) }
    }
}

/// A qcow2 image ready for data.
pub(super) struct Qcow2Target<P: Platform> {
    pub id: FileId,
    pub writer: Writer<TargetDisk<P>>,
    /// What nobody writes does not read as zero in the file below.
    pub block_device: bool,
}

/// Makes a fresh qcow2 image; it has no valid header before it is finished.
pub(super) fn create_qcow2<P: Platform>(
    platform: &P,
    target: &Target,
    size: u64,
    durable: bool,
) -> Result<Qcow2Target<P>, Failure> {
    let options = create_options(target, size);
    let main = open_target_file(platform, FileRole::Target, size)?;
    options.check().map_err(|error| option_failure(main.id, error))?;
    let data = match &options.data_file {
        Some(_) => Some(open_target_file(platform, FileRole::TargetData, size)?),
        None => None,
    };
    let block_device = data.as_ref().map_or(main.block_device, |data| data.block_device);
    let data = data.map(|data| (TargetDisk { file: data.file, durable }, data.id));
    let writer = qcow2::create(TargetDisk { file: main.file, durable }, main.id, data, &options)
        .map_err(|error| creation_failure(main.id, error))?;
    Ok(Qcow2Target { id: main.id, writer, block_device })
}

/// Opens an existing qcow2 image to write into it.
pub(super) fn open_qcow2<P: Platform>(platform: &P, size: u64, durable: bool) -> Result<Qcow2Target<P>, Failure> {
    let main = open_target_file(platform, FileRole::Target, size)?;
    let failed = |error| qcow2_failure(Step::OpenTarget, main.id, error);
    let image = qcow2::Image::open(main.file.clone(), main.id, &qcow2::OpenOptions::default()).map_err(failed)?;
    let data = match image.needs_data_file() {
        true => Some(open_data_file(platform, main.id, image.data_file_name(), true)?),
        false => None,
    };
    let data = data.map(|(file, id)| (TargetDisk { file, durable }, id));
    let writer = Writer::open(TargetDisk { file: main.file, durable }, main.id, data).map_err(failed)?;
    Ok(Qcow2Target { id: main.id, writer, block_device: main.block_device })
}

fn create_options(target: &Target, size: u64) -> CreateOptions {
    let wanted = target.qcow2.clone().unwrap_or_default();
    let standard = CreateOptions::default();
    CreateOptions {
        version: wanted.version.unwrap_or(standard.version),
        cluster_size: wanted.cluster_size.unwrap_or(standard.cluster_size),
        extended_l2: wanted.extended_l2,
        refcount_bits: wanted.refcount_bits.unwrap_or(standard.refcount_bits),
        lazy_refcounts: wanted.lazy_refcounts,
        compression: if wanted.zstd { Codec::Zstd } else { Codec::Deflate },
        data_file: wanted.data_file,
        data_file_raw: wanted.data_file_raw,
        backing_file: target.backing.as_ref().map(|backing| backing.name.clone()),
        backing_format: target
            .backing
            .as_ref()
            .map(|backing| backing.format_name.clone())
            .filter(|name| !name.is_empty()),
        preallocation: match target.preallocation() {
            Preallocation::Off => qcow2::Preallocation::Off,
            Preallocation::Metadata => qcow2::Preallocation::Metadata,
            Preallocation::Falloc => qcow2::Preallocation::Falloc,
            Preallocation::Full => qcow2::Preallocation::Full,
        },
        size,
    }
}

fn creation_failure(id: FileId, error: qcow2::Error) -> Failure {
    match error {
        qcow2::Error::Options(error) => option_failure(id, error),
        other => qcow2_failure(Step::Create, id, other),
    }
}

fn option_failure(id: FileId, error: qcow2::OptionError) -> Failure {
    use qcow2::OptionError as E;
    let reason = match error {
        E::SizeTooLarge(value) => {
            return Failure { value, format: Format::Qcow2.into(), ..about(Step::Create, id, Cause::SizeTooLarge) };
        }
        E::Version(_) => OptionError::Version,
        E::ClusterSize(_) => OptionError::ClusterSize,
        E::ExtendedL2Version => OptionError::ExtendedL2Version,
        E::ExtendedL2ClusterSize(_) => OptionError::ExtendedL2ClusterSize,
        E::BackingWithPreallocation => OptionError::BackingWithPreallocation,
        E::BackingFormatAlone => OptionError::BackingFormatAlone,
        E::LazyRefcountsVersion => OptionError::LazyRefcountsVersion,
        E::RefcountBits(_) => OptionError::RefcountBits,
        E::RefcountBitsVersion => OptionError::RefcountBitsVersion,
        E::DataFileRawAlone => OptionError::DataFileRawAlone,
        E::BackingWithDataFileRaw => OptionError::BackingWithDataFileRaw,
        E::DataFileVersion => OptionError::DataFileVersion,
        E::CompressionVersion => OptionError::CompressionVersion,
        E::BackingNameTooLong(_) => OptionError::BackingNameLength,
        E::BackingFormatTooLong(_) => OptionError::BackingFormatLength,
        _ => OptionError::Unspecified,
    };
    Failure { value: reason as u64, format: Format::Qcow2.into(), ..about(Step::Create, id, Cause::InvalidOptions) }
}

/// Asks the host for a file of the target.
pub(super) fn open_target_file<P: Platform>(platform: &P, role: FileRole, size: u64) -> Result<TargetFile<P>, Failure> {
    let answer = platform.open(OpenFile {
        role: role.into(),
        referrer: 0,
        name: Vec::new(),
        size,
        writable: true,
        format: Format::Unknown.into(),
    });
    let file = answer.granted.then(|| platform.file(answer.device)).flatten();
    let file = file.ok_or_else(|| failure(Step::Create, Cause::OpenRefused))?;
    let flags = DeviceFlags::from_bits_truncate(answer.flags);
    Ok(TargetFile { file, id: FileId(answer.device), block_device: flags.contains(DeviceFlags::BLOCK_DEVICE) })
}

/// Gives a raw file its size.
pub(super) fn create_raw<P: Platform>(
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
        Preallocation::Full => write_full(platform, file, size),
        Preallocation::Metadata => return Err(failure(Step::Create, Cause::InvalidOptions)),
    };
    sized.map_err(|(_, error)| block(Step::Create, Some(target.id), 0, error))
}

/// Writes zeroes over the whole length, so that the file system has given and initialised every block.
fn write_full<P: Platform>(platform: &P, file: FileId, size: u64) -> Result<(), (usize, instar_blockio::Error)> {
    const PIECE: usize = 1 << 20;
    const PIECES: usize = 16;
    let zeroes = alloc::vec![0; PIECE];
    let mut at = 0;
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
