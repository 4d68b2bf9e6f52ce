//! qcow2: the image, its snapshots and bitmaps, its external data file.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use instar_blockio::check::Repair;
use instar_blockio::{BlockRead, Codec, FileId, Layer, SectorCipher};
use instar_guest_protocol::message as wire;
use instar_guest_protocol::message::{
    BitmapFault, Call, Cause, CheckFinding, CheckFindings, Failure, Field, FileRole, FindingKind, Format, ImageInfo,
    Key, OptionError, Preallocation, Qcow2Info, Reference, ResizeRefusal, SnapshotSelector, Step, Target, call,
};
use instar_luks as luks;
use instar_qcow2::{self as qcow2, CompressionType, CreateOptions, Writer};

use super::target::{TargetDisk, TargetFile, granted_target_file, open_target_file};
use super::{Backing, Compression, ImageWriter, MappedImage, OpenImage, TargetImage, invalid_options};
use crate::chain::request_file;
use crate::ops::failure::{about, block};
use crate::platform::{File, Platform};

struct Qcow2<P: Platform> {
    image: Box<qcow2::Image<File<P>>>,
    id: FileId,
}

/// Opens an image, without its data file.
pub(super) fn open<P: Platform>(file: File<P>, id: FileId, strict: bool) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let options = qcow2::OpenOptions { strict, ..qcow2::OpenOptions::default() };
    let image = qcow2::Image::open(file.clone(), id, &options).map_err(|error| open_failure(&file, id, error))?;
    Ok(Box::new(Qcow2 { image: Box::new(image), id }))
}

impl<P: Platform> Qcow2<P> {
    /// Encrypted clusters in this file are decrypted by any vCPU.
    fn keep_cipher(&self, platform: &P, file: FileId, cipher: &Arc<dyn SectorCipher>) {
        if let Some(state) = platform.files().get(file) {
            state.set_cipher(cipher.clone());
        }
    }
}

impl<P: Platform> OpenImage<P> for Qcow2<P> {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn backing(&self) -> Option<Backing> {
        let name = self.image.backing_file()?.to_vec();
        Some(Backing { names: alloc::vec![name], driver: self.image.backing_format().map(<[u8]>::to_vec) })
    }

    fn unlock(&mut self, platform: &P, key: &Key) -> Result<(), Failure> {
        if self.image.encryption() == qcow2::Encryption::None {
            return Ok(());
        }
        let cipher = cipher(platform, self.id, &self.image, key)?;
        self.keep_cipher(platform, self.id, &cipher);
        self.image.set_cipher(cipher);
        Ok(())
    }

    fn open_parts(&mut self, platform: &P) -> Result<(), Failure> {
        self.image.check_readable().map_err(|error| qcow2_failure(Step::Open, self.id, error))?;
        if self.image.needs_data_file() {
            let (file, id) = open_data_file(platform, self.id, self.image.data_file_name(), false)?;
            if let Some(cipher) = self.image.cipher() {
                self.keep_cipher(platform, id, cipher);
            }
            self.image.attach_data_file(file, id);
        }
        Ok(())
    }

    fn references(&self) -> Vec<Reference> {
        let reference = |role: FileRole, name: &[u8]| Reference { role: role.into(), name: name.to_vec() };
        let backing = self.image.backing_file().map(|name| reference(FileRole::Backing, name));
        let data_file = self.image.needs_data_file();
        let data = data_file.then(|| reference(FileRole::Data, self.image.data_file_name().unwrap_or_default()));
        backing.into_iter().chain(data).collect()
    }

    fn describe(&self, platform: &P, info: &mut ImageInfo) -> Result<(), Failure> {
        let image = &self.image;
        let failed = |error| qcow2_failure(Step::Open, self.id, error);
        let encryption = image.encryption();
        info.virtual_size = image.virtual_size();
        info.cluster_size = Some(image.cluster_size());
        info.encrypted = encryption != qcow2::Encryption::None;
        info.dirty = image.is_dirty();
        info.backing_file = image.backing_file().map(<[u8]>::to_vec);
        info.backing_format = image.backing_format().map(<[u8]>::to_vec);
        info.snapshots = image.snapshots().map_err(failed)?.into_iter().map(snapshot_info).collect();
        info.qcow2 = Some(Qcow2Info {
            version: image.header().version,
            zstd: image.compression() == CompressionType::Zstd,
            lazy_refcounts: image.header().compatible.contains(qcow2::Compatible::LAZY_REFCOUNTS),
            bitmaps: image.bitmaps().map_err(failed)?.into_iter().map(bitmap_info).collect(),
            refcount_bits: image.header().geometry.refcount_bits(),
            aes: encryption == qcow2::Encryption::Aes,
            luks: match encryption {
                qcow2::Encryption::Luks { offset, .. } => {
                    Some(super::luks::luks_info(&luks_volume(platform, self.id, offset.0)?))
                }
                _ => None,
            },
            data_file: image.data_file_name().map(<[u8]>::to_vec),
            data_file_raw: image.data_file_raw(),
            corrupt: image.is_corrupt(),
            extended_l2: image.header().geometry.extended_l2(),
            has_data_file: image.needs_data_file(),
        });
        Ok(())
    }

    fn select_snapshot(&mut self, selector: &SnapshotSelector) -> Result<(), Failure> {
        fn given(text: &[u8]) -> Option<&[u8]> {
            Some(text).filter(|text| !text.is_empty())
        }
        let wanted = match given(&selector.id_or_name) {
            Some(text) => qcow2::SnapshotSelector::IdOrName(text),
            None => qcow2::SnapshotSelector::Exact { id: given(&selector.id), name: given(&selector.name) },
        };
        self.image.select_snapshot(wanted).map_err(|error| qcow2_failure(Step::Snapshot, self.id, error))
    }

    fn status_unit(&self) -> Option<u64> {
        Some(self.image.header().geometry.l2_span())
    }

    fn into_layer(self: Box<Self>) -> Box<dyn Layer> {
        self.image
    }

    fn as_qcow2(&self) -> Option<&qcow2::Image<File<P>>> {
        Some(&self.image)
    }
}

/// Why a qcow2 image can't be opened, with the names from the image that the message quotes.
fn open_failure<F: BlockRead>(file: &F, id: FileId, error: qcow2::Error) -> Failure {
    let failure = qcow2_failure(Step::Open, id, error);
    match error {
        qcow2::Error::UnknownFeatures(bits) => match qcow2::feature_names(file, bits) {
            Ok(found) => Failure { text: found.names.join(&b", "[..]), value2: found.unnamed, ..failure },
            Err(_) => Failure { value2: bits, ..failure },
        },
        qcow2::Error::BitmapDirectory(fault) => match fault.name() {
            Some(place) => Failure { text: read_name(file, place), ..failure },
            None => failure,
        },
        _ => failure,
    }
}

fn read_name<F: BlockRead>(file: &F, place: qcow2::NameAt) -> Vec<u8> {
    let mut name = alloc::vec![0; place.len.into()];
    match file.read_at(place.offset, &mut name) {
        Ok(()) => name,
        Err(_) => Vec::new(),
    }
}

/// The cipher of an encrypted image.
fn cipher<P: Platform>(
    platform: &P,
    id: FileId,
    image: &qcow2::Image<File<P>>,
    key: &Key,
) -> Result<Arc<dyn SectorCipher>, Failure> {
    match image.encryption() {
        qcow2::Encryption::Luks { offset, .. } => {
            let file = platform.file(id.0).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
            let volume = luks_volume(platform, id, offset.0)?;
            super::luks::unlock(&volume, &file, id, offset.0, key)
        }
        _ => legacy_cipher(id, key),
    }
}

fn failure_at(step: Step, failure: Failure) -> Failure {
    Failure { step: step.into(), ..failure }
}

/// The LUKS header inside an image. Its places are counted from its start.
fn luks_volume<P: Platform>(platform: &P, id: FileId, offset: u64) -> Result<luks::Volume, Failure> {
    let file = platform.file(id.0).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    // The contents are the image's clusters.
    luks::Volume::read(&file, offset, true).map_err(|error| super::luks::volume_failure(&file, id, offset, error))
}

/// The legacy cipher: the passphrase itself, cut or filled up to 16 bytes, is the key.
pub(super) fn legacy_cipher(id: FileId, key: &Key) -> Result<Arc<dyn SectorCipher>, Failure> {
    let spec = luks::CipherSpec {
        algorithm: luks::Algorithm::Aes,
        key_len: 16,
        mode: luks::Mode::Cbc,
        ivgen: luks::IvGen::Plain64,
    };
    let mut bytes = [0; 16];
    bytes.iter_mut().zip(&key.passphrase).for_each(|(byte, given)| *byte = *given);
    spec.with_key(&bytes, 512).map_err(|error| super::luks::luks_failure(Step::Open, id, &[], error))
}

/// A snapshot as the host is told of it.
pub fn snapshot_info(found: qcow2::Snapshot) -> wire::Snapshot {
    wire::Snapshot {
        id: found.id,
        name: found.name,
        vm_state_size: found.vm_state_size,
        date_sec: found.date_sec,
        date_nsec: found.date_nsec,
        vm_clock_nsec: found.vm_clock_nsec,
        icount: found.icount,
        virtual_size: found.virtual_size,
    }
}

/// A bitmap as the host is told of it.
pub fn bitmap_info(found: qcow2::BitmapInfo) -> wire::Bitmap {
    wire::Bitmap {
        name: found.name,
        granularity: 1 << found.granularity_bits,
        in_use: found.flags.contains(qcow2::BitmapFlags::IN_USE),
        auto: found.flags.contains(qcow2::BitmapFlags::AUTO),
    }
}

/// Opens the external data file that an image names.
pub(crate) fn open_data_file<P: Platform>(
    platform: &P,
    image: FileId,
    name: Option<&[u8]>,
    writable: bool,
) -> Result<(File<P>, FileId), Failure> {
    let missing = || Failure { value: Field::DataFileMissing as u64, ..about(Step::Open, image, Cause::InvalidField) };
    let name = name.ok_or_else(missing)?.to_vec();
    let id = request_file(platform, image, FileRole::Data, name, Format::Raw, writable)?;
    let file = platform.file(id.0).ok_or_else(|| about(Step::Open, image, Cause::OpenRefused))?;
    Ok((file, id))
}

/// An image that is written.
struct Qcow2Target<P: Platform> {
    writer: Writer<TargetDisk<P>>,
    id: FileId,
    block_device: bool,
}

/// Makes a fresh image; it has no valid header before it is finished.
pub(super) fn create<P: Platform>(
    platform: &P,
    target: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let main = open_target_file(platform, FileRole::Target, size)?;
    let id = main.id;
    let secret = NewSecret::of(id, target)?;
    let options = CreateOptions { encryption: secret.encryption(), ..create_options(target, size) };
    options.check().map_err(|error| option_failure(id, error))?;
    let data = match &options.data_file {
        Some(_) => Some(open_target_file(platform, FileRole::TargetData, size)?),
        None => None,
    };
    let block_device = data.as_ref().map_or(main.block_device, |data| data.block_device);
    let data = data.map(|data| {
        let id = data.id;
        (data.disk(durable), id)
    });
    let mut writer = qcow2::create_encrypted(main.disk(durable), id, data, &options, secret.cipher(id)?)
        .map_err(|error| creation_failure(id, error))?;
    if let NewSecret::Luks(_, fresh) = &secret {
        for (at, bytes) in [(fresh.material.offset, &fresh.material.bytes[..]), (0, &fresh.header.to_bytes())] {
            writer.write_crypto_header(at, bytes).map_err(|error| creation_failure(id, error))?;
        }
    }
    Ok(TargetImage::Mapped(Box::new(Qcow2Target { writer, id, block_device })))
}

/// How a new image is encrypted.
enum NewSecret {
    None,
    Aes(Arc<dyn SectorCipher>),
    Luks(luks::CipherSpec, Box<luks::Fresh>),
}

impl NewSecret {
    fn of(id: FileId, target: &Target) -> Result<Self, Failure> {
        let legacy = target.qcow2.as_ref().and_then(|options| options.aes_passphrase.as_ref());
        Ok(match (&target.luks, legacy) {
            (Some(options), _) => {
                let (spec, fresh) = super::luks::fresh(options)?;
                Self::Luks(spec, Box::new(fresh))
            }
            (None, Some(passphrase)) => {
                Self::Aes(legacy_cipher(id, &Key { passphrase: passphrase.clone(), ..Key::default() })?)
            }
            (None, None) => Self::None,
        })
    }

    fn encryption(&self) -> qcow2::NewEncryption {
        match self {
            Self::None => qcow2::NewEncryption::None,
            Self::Aes(_) => qcow2::NewEncryption::Aes,
            Self::Luks(_, fresh) => qcow2::NewEncryption::Luks(fresh.header.payload_offset()),
        }
    }

    fn cipher(&self, id: FileId) -> Result<Option<Arc<dyn SectorCipher>>, Failure> {
        let failed = |error| super::luks::luks_failure(Step::Create, id, &[], error);
        Ok(match self {
            Self::None => None,
            Self::Aes(cipher) => Some(cipher.clone()),
            Self::Luks(spec, fresh) => Some(fresh.key.cipher(spec, 512).map_err(failed)?),
        })
    }
}

/// Opens an existing image to write into it.
pub(super) fn open_target<P: Platform>(
    platform: &P,
    target: &Target,
    size: u64,
    durable: bool,
) -> Result<TargetImage<P>, Failure> {
    let file = open_target_file(platform, FileRole::Target, size)?;
    let how = Opening { step: Step::OpenTarget, durable, writes_data: true, data_file_named: target.data_file_named };
    open_writer(platform, file, target.key.as_ref(), how)
}

/// Opens the image on a granted device to write into it; `writes_data`: also into its external data file.
pub(super) fn open_in_place<P: Platform>(
    platform: &P,
    device: u32,
    durable: bool,
    writes_data: bool,
) -> Result<TargetImage<P>, Failure> {
    let how = Opening { step: Step::Open, durable, writes_data, data_file_named: false };
    open_writer(platform, granted_target_file(platform, device)?, None, how)
}

/// How an image is opened to be written.
struct Opening {
    /// At which errors are told.
    step: Step,
    durable: bool,
    writes_data: bool,
    data_file_named: bool,
}

fn open_writer<P: Platform>(
    platform: &P,
    main: TargetFile<P>,
    key: Option<&Key>,
    Opening { step, durable, writes_data, data_file_named }: Opening,
) -> Result<TargetImage<P>, Failure> {
    let (id, block_device) = (main.id, main.block_device);
    let failed = |error| qcow2_failure(step, id, error);
    let image = qcow2::Image::open(main.file.clone(), id, &qcow2::OpenOptions::default()).map_err(failed)?;
    let data = match image.needs_data_file() {
        true => Some(open_data_file(platform, id, image.data_file_name(), writes_data)?),
        false if data_file_named => {
            let field = Field::DataFileUnexpected as u64;
            return Err(Failure { value: field, ..about(step, id, Cause::InvalidField) });
        }
        false => None,
    };
    let data = data.map(|(file, id)| (TargetDisk::new(file, durable), id));
    repair_if_dirty(platform, id, &image, Step::OpenTarget)?;
    let cipher = match (image.encryption(), key) {
        (qcow2::Encryption::None, _) => None,
        (_, Some(key)) => Some(cipher(platform, id, &image, key).map_err(|failure| failure_at(step, failure))?),
        // Who opened it for reading has unlocked it.
        (_, None) => platform.files().get(id).and_then(|state| state.cipher().ok()),
    };
    let writer = Writer::open_encrypted(main.disk(durable), id, data, cipher).map_err(failed)?;
    Ok(TargetImage::Mapped(Box::new(Qcow2Target { writer, id, block_device })))
}

impl<P: Platform> MappedImage<P> for Qcow2Target<P> {
    fn id(&self) -> FileId {
        self.id
    }

    fn disk(&self) -> &dyn ImageWriter {
        &self.writer
    }

    fn disk_mut(&mut self) -> &mut dyn ImageWriter {
        &mut self.writer
    }

    fn cluster_size(&self) -> u64 {
        self.writer.header().geometry.cluster_size()
    }

    fn compression(&self) -> Option<Compression> {
        if self.writer.contents_cipher().is_some() {
            return None; // compressed clusters are never encrypted
        }
        let codec = match self.writer.header().compression {
            CompressionType::Zstd => Codec::Zstd,
            CompressionType::Zlib => Codec::Deflate,
        };
        Some(Compression {
            codec,
            unit: self.writer.header().geometry.cluster_size(),
            always: false,
            grain_markers: false,
        })
    }

    fn contents_cipher(&self) -> Option<&qcow2::ContentsCipher> {
        self.writer.contents_cipher()
    }

    fn on_block_device(&self) -> bool {
        self.block_device
    }

    fn end_compressed(&mut self) {
        self.writer.align_end();
    }

    fn finish(self: Box<Self>) -> Result<(), Failure> {
        self.writer.finish().map_err(|error| qcow2_failure(Step::Write, self.id, error))
    }

    fn set_backing(&mut self, name: &[u8], format_name: &[u8]) -> Option<Result<(), Failure>> {
        let id = self.id();
        let recorded = self.writer.set_backing(name, format_name);
        Some(recorded.map_err(|error| qcow2_failure(Step::Edit, id, error)))
    }

    fn as_qcow2_mut(&mut self) -> Option<&mut Writer<TargetDisk<P>>> {
        Some(&mut self.writer)
    }
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
        encryption: qcow2::NewEncryption::None,
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
    invalid_options(id, Format::Qcow2, reason)
}

/// Why a qcow2 image can't be opened, read or made.
pub fn qcow2_failure(step: Step, id: FileId, error: qcow2::Error) -> Failure {
    use qcow2::Error as E;
    let of = |cause| Failure { format: Format::Qcow2.into(), ..about(step, id, cause) };
    let with = |cause, value| Failure { value, ..of(cause) };
    let field = |field: Field, value2| Failure { value: field as u64, value2, ..of(Cause::InvalidField) };
    match error {
        E::Io(error) => block(step, Some(id), error.offset().unwrap_or(0), error),
        E::NotQcow2 => of(Cause::NotInFormat),
        E::UnsupportedVersion(version) => with(Cause::UnsupportedVersion, version.into()),
        E::UnsupportedClusterBits(bits) => with(Cause::UnsupportedClusterSize, bits.into()),
        E::HeaderTooShort(len) => with(Cause::HeaderTooShort, len.into()),
        E::UnknownFeatures(bits) => with(Cause::UnknownFeatures, bits),
        E::ImageTooBig(size) => with(Cause::ImageTooBig, size),
        E::SnapshotNotFound => of(Cause::SnapshotNotFound),
        E::OutOfMemory => of(Cause::OutOfMemory),
        E::Corrupt { offset, .. } => with(Cause::CorruptMetadata, offset),
        E::BitmapEntry(entry) => with(Cause::CorruptMetadata, entry),
        E::Encrypted(_) | E::EncryptedWrite => of(Cause::Encrypted),
        E::MarkedCorrupt => of(Cause::MarkedCorrupt),
        E::MarkedDirty => of(Cause::MarkedDirty),
        E::Resize(error) => with(Cause::ResizeRefused, resize_refusal(error) as u64),
        E::BackingRefused => of(Cause::BackingRefused),
        E::HeaderFull => of(Cause::HeaderFull),
        E::SnapshotsWithDataFile => of(Cause::SnapshotsUnsupported),
        E::TooManySnapshots => with(Cause::TooMany, 0),
        E::RefcountOverflow(at) => with(Cause::RefcountOverflow, at),
        E::SizeOverflow(size) => field(Field::SizeOverflow, size),
        E::RawFlagWithoutDataFile => field(Field::RawFlagWithoutDataFile, 0),
        E::HeaderTooLong(len) => field(Field::HeaderLength, len.into()),
        E::BackingOffset(at) => field(Field::BackingOffset, at),
        E::BackingNameTooLong(len) => field(Field::BackingLength, len.into()),
        E::UnknownCompression(kind) => field(Field::CompressionType, kind.into()),
        E::CompressionBitSet => field(Field::CompressionBitSet, 0),
        E::CompressionBitMissing => field(Field::CompressionBitMissing, 0),
        E::SubclusterSize(size) => field(Field::ExtendedL2ClusterSize, size.into()),
        E::RefcountOrder(order) => field(Field::RefcountOrder, order.into()),
        E::EncryptionMethod(method) => field(Field::EncryptionMethod, method.into()),
        E::NoRefcountTable => field(Field::RefcountTableMissing, 0),
        E::TableTooLarge(table, size) => field(table_size(table), size.into()),
        E::TableOffset(table, at) => field(table_offset(table), at),
        E::L1TooSmall(size) => field(Field::L1TooSmall, size.into()),
        E::ExtensionTooLarge(len) => field(Field::ExtensionLength, len.into()),
        E::BackingFormatTooLong(len) => field(Field::BackingFormatLength, len.into()),
        E::UnexpectedCryptoHeader => field(Field::CryptoUnexpected, 0),
        E::CryptoExtensionLength(len) => field(Field::CryptoLength, len.into()),
        E::CryptoHeaderOffset(at) => field(Field::CryptoOffset, at),
        E::NoCryptoHeader => field(Field::CryptoMissing, 0),
        E::BitmapsExtension(fault) => bitmaps_field(fault, field),
        E::BitmapDirectory(fault) => field(Field::BitmapDirectory, bitmap_fault(fault) as u64),
        E::SnapshotExtraData(number) => field(Field::SnapshotEntry, number.into()),
        E::SnapshotTableTooBig(rest) => field(Field::SnapshotTableBytes, rest.into()),
        E::DataFileMissing => field(Field::DataFileMissing, 0),
        _ => of(Cause::Unsupported),
    }
}

fn resize_refusal(error: qcow2::ResizeError) -> ResizeRefusal {
    use qcow2::ResizeError as R;
    match error {
        R::Unaligned(_) => ResizeRefusal::Unaligned,
        R::SnapshotsInVersion2 => ResizeRefusal::SnapshotsVersion,
        R::TooLarge(_) => ResizeRefusal::TooLarge,
        R::ZeroesInVersion2 => ResizeRefusal::ZeroesVersion,
        R::PreallocationOnShrink => ResizeRefusal::PreallocationNotGrowing,
        _ => ResizeRefusal::Unspecified,
    }
}

fn table_size(table: qcow2::Table) -> Field {
    match table {
        qcow2::Table::ActiveL1 => Field::L1Size,
        qcow2::Table::SnapshotL1 => Field::SnapshotL1Size,
        qcow2::Table::Refcount => Field::RefcountTableSize,
        qcow2::Table::Snapshots => Field::SnapshotTableSize,
    }
}

fn table_offset(table: qcow2::Table) -> Field {
    match table {
        qcow2::Table::ActiveL1 => Field::L1Offset,
        qcow2::Table::SnapshotL1 => Field::SnapshotL1Offset,
        qcow2::Table::Refcount => Field::RefcountTableOffset,
        qcow2::Table::Snapshots => Field::SnapshotTableOffset,
    }
}

fn bitmap_fault(fault: qcow2::DirectoryFault) -> BitmapFault {
    use qcow2::DirectoryFault as D;
    match fault {
        D::Empty => BitmapFault::Empty,
        D::Broken => BitmapFault::Broken,
        D::MoreThanSaid => BitmapFault::MoreThanSaid,
        D::FewerThanSaid => BitmapFault::FewerThanSaid,
        D::ExtraData => BitmapFault::ExtraData,
        D::Constraints(_) => BitmapFault::Constraints,
        D::Duplicate(_) => BitmapFault::Duplicate,
        D::Table(_) => BitmapFault::Table,
        D::TableSize(_) => BitmapFault::TableSize,
    }
}

fn bitmaps_field(fault: qcow2::BitmapsFault, field: impl Fn(Field, u64) -> Failure) -> Failure {
    use qcow2::BitmapsFault as B;
    match fault {
        B::Length(len) => field(Field::BitmapsLength, len.into()),
        B::Reserved => field(Field::BitmapsReserved, 0),
        B::TooMany(count) => field(Field::BitmapsCount, count.into()),
        B::None => field(Field::BitmapsNone, 0),
        B::DirectoryOffset(at) => field(Field::BitmapsOffset, at),
        B::DirectorySize(size) => field(Field::BitmapsSize, size),
    }
}

/// Repairs an image that was not closed cleanly, as far as it is one: what may be written has to have the right counts. What is
/// found is told to the user.
///
/// # Errors
/// Tables that can't be read or written. An image that stays dirty is refused by whoever writes it.
pub(crate) fn repair_if_dirty<P: Platform>(
    platform: &P,
    id: FileId,
    image: &qcow2::Image<File<P>>,
    step: Step,
) -> Result<(), Failure> {
    /// More than these say nothing new.
    const FINDINGS: usize = 4096;
    if !image.is_dirty() {
        return Ok(());
    }
    let file = platform.file(id.0).ok_or_else(|| about(step, id, Cause::BadRequest))?;
    let everything = Repair { leaks: true, corruptions: true };
    let mut findings = Vec::new();
    let repaired = image.repair(&mut TargetDisk::new(file, true), everything, &mut |finding| {
        if findings.len() < FINDINGS {
            findings.push(finding_info(finding));
        }
    });
    platform.call(&Call { kind: Some(call::Kind::Findings(CheckFindings { findings })) });
    repaired.map(drop).map_err(|error| qcow2_failure(step, id, error))
}

/// A fault as the host is told of it.
pub(crate) fn finding_info(finding: qcow2::Finding) -> CheckFinding {
    use FindingKind as K;
    use qcow2::Finding as F;
    let plain =
        |kind: K, first, second, third| CheckFinding { kind: kind.into(), repaired: false, first, second, third };
    match finding {
        F::BehindEnd { offset, len } => plain(K::BehindEnd, offset, len, 0),
        F::CountOverflow { offset } => plain(K::CountOverflow, offset, 0, 0),
        F::L1Reserved { entry } => plain(K::L1Reserved, entry, 0, 0),
        F::L2Unaligned { offset } => plain(K::L2Unaligned, offset, 0, 0),
        F::L2Reserved { entry } => plain(K::L2Reserved, entry, 0, 0),
        F::CompressedCopied { offset } => plain(K::CompressedCopied, offset, 0, 0),
        F::CompressedInDataFile { index, entry } => plain(K::CompressedInDataFile, index, entry, 0),
        F::CompressedSubclusters { index, entry } => plain(K::CompressedSubclusters, index, entry, 0),
        F::ClusterUnaligned { offset, zero } => plain(K::ClusterUnaligned, offset, zero.into(), 0),
        F::RefcountTableReserved { index } => plain(K::RefcountTableReserved, index, 0, 0),
        F::BlockUnaligned { index } => plain(K::BlockUnaligned, index, 0, 0),
        F::BlockOutside { index } => plain(K::BlockOutside, index, 0, 0),
        F::BlockShared { index, count } => plain(K::BlockShared, index, count, 0),
        F::Count { cluster, stored, referenced, repaired } => {
            CheckFinding { repaired, ..plain(K::Count, cluster, stored, referenced) }
        }
        F::CopiedTable { index, entry, count, repaired } => {
            CheckFinding { repaired, ..plain(K::CopiedTable, index, entry, count) }
        }
        F::CopiedCluster { entry, count, repaired } => {
            CheckFinding { repaired, ..plain(K::CopiedCluster, entry, count, 0) }
        }
        F::Rebuilding => plain(K::Rebuilding, 0, 0, 0),
        F::RebuildNeeded => plain(K::RebuildNeeded, 0, 0, 0),
        _ => plain(K::Other, 0, 0, 0),
    }
}
