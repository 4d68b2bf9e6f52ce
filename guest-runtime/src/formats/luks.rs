//! LUKS: volumes of version 1 and 2, and what encrypted qcow2 images share with them.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use instar_blockio::{
    BlockMap, BlockRead, BlockWrite, Error, ErrorKind, Extent, ExtentKind, FileId, Layer, Result as BlockResult,
    SectorCipher, check_range, read_encrypted,
};
use instar_guest_protocol::message as wire;
use instar_guest_protocol::message::{
    Cause, Failure, FileRole, Format, ImageInfo, Key, LuksFault, LuksOptions, Step, Target,
};
use instar_luks::{self as luks, CipherMode, CipherSpec, CreateOptions, Fresh, Hash, Limits, Payload, Random, Volume};

use super::target::{TargetDisk, TargetFile, granted_target_file, open_target_file};
use super::{FlatImage, OpenImage, TargetImage};
use crate::chain::request_file;
use crate::ops::failure::{about, block, failure};
use crate::platform::{File, Platform};

/// Sizes are whole sectors.
const SECTOR: u64 = 512;

struct Luks<P> {
    file: File<P>,
    id: FileId,
    /// Where the header lies, if that is not `file`.
    header: Option<(File<P>, FileId)>,
    volume: Volume,
    payload: Payload,
    size: u64,
    cipher: Option<Arc<dyn SectorCipher>>,
}

/// Opens a volume whose header lies in a file of its own.
pub(super) fn open_detached<P: Platform>(platform: &P, device: u32) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let file = platform.file(device).ok_or_else(|| about(Step::Open, FileId(device), Cause::BadRequest))?;
    open(file, FileId(device), Some(request_header(platform, FileId(device), false)?))
}

/// The file that the user named as that of the header.
pub(super) fn request_header<P: Platform>(
    platform: &P,
    id: FileId,
    writable: bool,
) -> Result<(File<P>, FileId), Failure> {
    let header = request_file(platform, id, FileRole::LuksHeader, Vec::new(), Format::Raw, writable)?;
    let file = platform.file(header.0).ok_or_else(|| about(Step::Open, header, Cause::BadRequest))?;
    Ok((file, header))
}

/// Opens a volume, without its key. `header`: where it lies, if not in `file`.
pub(super) fn open<P: Platform>(
    file: File<P>,
    id: FileId,
    header: Option<(File<P>, FileId)>,
) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let failed = |error| luks_failure(Step::Open, id, &[], error);
    let holder = header.as_ref().map_or(&file, |(file, _)| file);
    let volume = Volume::read(holder, 0, header.is_some()).map_err(|error| volume_failure(holder, id, 0, error))?;
    let payload = volume.payload().map_err(failed)?;
    let past_end = || fault(Step::Open, id, LuksFault::PayloadPastEnd, 0, &[]);
    let left = file.size().checked_sub(payload.offset).ok_or_else(past_end)?;
    // Positions that don't fit the sectors are those of a part of another volume.
    if !payload.position.is_multiple_of(payload.sector_size.into()) {
        return Err(failed(luks::Error::Unsupported));
    }
    let size = match payload.len {
        Some(len) if len > left => return Err(past_end()),
        Some(len) => len,
        None => left,
    };
    let size = size - size % SECTOR;
    Ok(Box::new(Luks { file, id, header, volume, payload, size, cipher: None }))
}

impl<P: Platform> OpenImage<P> for Luks<P> {
    fn format(&self) -> Format {
        Format::Luks
    }

    fn unlock(&mut self, platform: &P, key: &Key) -> Result<(), Failure> {
        let holder = self.header.as_ref().map_or(&self.file, |(file, _)| file);
        let cipher = unlock(&self.volume, holder, self.id, 0, key)?;
        if let Some(state) = platform.files().get(self.id) {
            state.set_cipher(cipher.clone());
        }
        self.cipher = Some(cipher);
        Ok(())
    }

    fn open_parts(&mut self, _: &P) -> Result<(), Failure> {
        match self.cipher {
            Some(_) => Ok(()),
            None => Err(Failure { format: Format::Luks.into(), ..about(Step::Open, self.id, Cause::Encrypted) }),
        }
    }

    fn payload_offset(&self) -> Option<u64> {
        matches!(self.volume, Volume::V1(_)).then_some(self.payload.offset)
    }

    fn describe(&self, _: &P, info: &mut ImageInfo) -> Result<(), Failure> {
        info.virtual_size = self.size;
        info.encrypted = true;
        let header_device = self.header.as_ref().map(|(_, id)| id.0);
        info.luks = Some(wire::LuksInfo { header_device, ..luks_info(&self.volume) });
        Ok(())
    }

    fn into_layer(self: Box<Self>) -> Box<dyn Layer> {
        self
    }
}

impl<P: Platform> BlockRead for Luks<P> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        let cipher = self.cipher.as_deref().ok_or(Error::new(ErrorKind::Encrypted).at(offset))?;
        let (host, position) = (self.payload.offset + offset, self.payload.position.saturating_add(offset));
        read_encrypted(cipher, host, position, buf, |host, part| {
            // The last sector of a file may be cut short.
            let inside = self.file.size().saturating_sub(host).min(part.len() as u64) as usize;
            let (head, behind) = part.split_at_mut(inside);
            behind.fill(0);
            self.file.read_at(host, head)
        })
    }
}

impl<P: Platform> BlockMap for Luks<P> {
    fn extent_at(&self, offset: u64, max_len: u64) -> BlockResult<Extent> {
        if max_len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        check_range(self.size, offset, 1)?;
        let kind = ExtentKind::Encrypted {
            file: self.id,
            host: self.payload.offset + offset,
            position: self.payload.position.saturating_add(offset),
        };
        Ok(Extent { offset, len: max_len.min(self.size - offset), depth: 0, kind })
    }
}

/// The cipher of a volume whose header lies at `at`.
///
/// # Errors
/// [`Cause::WrongPassphrase`], or what the header has against it.
pub(super) fn unlock<D: BlockRead>(
    volume: &Volume,
    file: &D,
    id: FileId,
    at: u64,
    key: &Key,
) -> Result<Arc<dyn SectorCipher>, Failure> {
    volume.unlock(file, at, &key.passphrase, &limits(key)).map_err(|error| luks_failure(Step::Open, id, &[], error))
}

/// What deriving the key may cost.
pub(super) fn limits(key: &Key) -> Limits {
    let usual = Limits::default();
    let limit = |value: u64, usual: u64| if value == 0 { usual } else { value };
    Limits { iterations: limit(key.max_iterations, usual.iterations), memory: limit(key.max_memory, usual.memory) }
}

/// What `info` tells of a volume.
pub(super) fn luks_info(volume: &Volume) -> wire::LuksInfo {
    match volume {
        Volume::V1(header) => wire::LuksInfo {
            version: 1,
            cipher_name: header.cipher_name().to_vec(),
            cipher_mode: header.cipher_mode().to_vec(),
            hash: header.hash_spec().to_vec(),
            uuid: header.uuid().to_vec(),
            key_bytes: header.key_bytes(),
            payload_offset: header.payload_offset(),
            digest_iterations: header.digest_iterations(),
            slots: header
                .slots()
                .iter()
                .map(|slot| wire::LuksSlot {
                    active: slot.active,
                    iterations: slot.iterations,
                    key_offset: slot.key_offset,
                    stripes: slot.stripes,
                })
                .collect(),
            header_device: None,
        },
        Volume::V2(header) => {
            let text = header.metadata().encryption();
            let dash = text.iter().position(|byte| *byte == b'-').unwrap_or(text.len());
            let payload = volume.payload().map_or(0, |payload| payload.offset);
            wire::LuksInfo {
                version: 2,
                cipher_name: text[..dash].to_vec(),
                cipher_mode: text.get(dash + 1..).unwrap_or_default().to_vec(),
                uuid: header.uuid().to_vec(),
                key_bytes: header.metadata().key_len(),
                payload_offset: payload,
                ..wire::LuksInfo::default()
            }
        }
    }
}

/// Why the volume at `at` can't be opened, with the names from its header that the message quotes.
pub(super) fn volume_failure<D: BlockRead>(file: &D, id: FileId, at: u64, error: luks::Error) -> Failure {
    let mut bytes = [0; luks::HEADER_LEN];
    let header = file.read_at(at, &mut bytes).ok().and_then(|()| luks::Header::parse(&bytes).ok());
    let text = header.map(|header| {
        let mode = header.mode();
        let part = match error {
            luks::Error::CipherMode => header.cipher_mode(),
            luks::Error::UnknownName(luks::TextField::Mode) | luks::Error::ModeNeedsWideBlocks => mode.mode,
            luks::Error::UnknownName(luks::TextField::IvGen) => mode.ivgen,
            luks::Error::UnknownName(luks::TextField::IvHash) => mode.ivgen_hash,
            luks::Error::UnknownName(luks::TextField::Hash) => header.hash_spec(),
            _ => header.cipher_name(),
        };
        part.to_vec()
    });
    luks_failure(Step::Open, id, &text.unwrap_or_default(), error)
}

fn fault(step: Step, id: FileId, fault: LuksFault, value2: u64, text: &[u8]) -> Failure {
    Failure {
        value: fault as u64,
        value2,
        text: text.to_vec(),
        format: Format::Luks.into(),
        ..about(step, id, Cause::LuksInvalid)
    }
}

/// A failure of a volume for the host.
pub(crate) fn luks_failure(step: Step, id: FileId, text: &[u8], error: luks::Error) -> Failure {
    use luks::Error as E;
    use luks::TextField as T;
    let of = |cause, value| Failure { value, format: Format::Luks.into(), ..about(step, id, cause) };
    let pair = |a: usize, b: u64| (a as u64) << 32 | b;
    let (reason, value2) = match error {
        E::Io(error) => return block(step, Some(id), error.offset().unwrap_or(0), error),
        E::WrongPassphrase => return of(Cause::WrongPassphrase, 0),
        E::TooManyIterations(cost) => return of(Cause::KeyIterations, cost),
        E::TooMuchMemory(bytes) => return of(Cause::KeyMemory, bytes),
        E::OutOfMemory => return of(Cause::OutOfMemory, 0),
        E::TooShort(_) | E::NotLuks => (LuksFault::NotLuks, 0),
        E::UnsupportedVersion(version) => (LuksFault::Version, version.into()),
        E::UnterminatedText(T::Cipher) => (LuksFault::CipherName, 0),
        E::UnterminatedText(T::Hash) => (LuksFault::HashSpec, 0),
        E::UnterminatedText(_) => (LuksFault::CipherMode, 0),
        E::CipherMode => (LuksFault::ModeFormat, 0),
        E::UnknownName(T::Cipher) => (LuksFault::UnknownCipher, 0),
        E::UnknownName(T::Mode) => (LuksFault::UnknownMode, 0),
        E::UnknownName(T::IvGen) => (LuksFault::UnknownIvGen, 0),
        E::UnknownName(T::IvHash) => (LuksFault::UnknownIvHash, 0),
        E::UnknownName(_) => (LuksFault::UnknownHash, 0),
        E::KeySize(len) | E::KeyTooLong(len) => (LuksFault::KeySize, len.into()),
        E::ModeNeedsWideBlocks => (LuksFault::WideBlocks, 0),
        E::EssivKeySize(len) => (LuksFault::Essiv, len as u64),
        E::PayloadInHeader(_) => (LuksFault::PayloadInHeader, 0),
        E::NoIterations => (LuksFault::NoIterations, 0),
        E::SlotNoIterations(slot) => (LuksFault::SlotNoIterations, slot as u64),
        E::SlotState(slot, _) => (LuksFault::SlotState, slot as u64),
        E::SlotStripes(slot, stripes) => (LuksFault::SlotStripes, pair(slot, stripes.into())),
        E::SlotInHeader(slot) => (LuksFault::SlotInHeader, slot as u64),
        E::SlotInPayload(slot) => (LuksFault::SlotInPayload, slot as u64),
        E::SlotsOverlap(a, b) => (LuksFault::SlotsOverlap, pair(a, b as u64)),
        E::Checksum => (LuksFault::Checksum, 0),
        E::Metadata => (LuksFault::Metadata, 0),
        _ => (LuksFault::Unsupported, 0),
    };
    fault(step, id, reason, value2, text)
}

/// Makes the header of a new volume from what the host says.
///
/// # Errors
/// Parts of the cipher that don't fit together, a request without randomness.
pub(super) fn fresh(options: &LuksOptions) -> Result<(CipherSpec, Fresh), Failure> {
    let bad = || failure(Step::Create, Cause::BadRequest);
    let mode = CipherMode::split(&options.cipher_mode);
    let failed = |error| luks_failure(Step::Create, FileId(0), &options.cipher_name, error);
    let cipher = CipherSpec::named(&options.cipher_name, mode, options.key_bytes).map_err(failed)?;
    let create = CreateOptions {
        cipher,
        iv_hash: Hash::named(mode.ivgen_hash),
        hash: Hash::named(&options.hash).ok_or_else(bad)?,
        slot_iterations: options.slot_iterations,
        digest_iterations: options.digest_iterations,
        detached: options.detached,
    };
    let seed = options.seed.first_chunk().filter(|_| options.seed.len() == Random::SEED).ok_or_else(bad)?;
    let fresh = luks::create(&create, &options.passphrase, &mut Random::new(seed)).map_err(failed)?;
    Ok((cipher, fresh))
}

/// Makes a volume for a disk of `size` bytes. Its header is written last.
pub(super) fn create<P: Platform>(platform: &P, target: &Target, size: u64) -> Result<TargetImage<P>, Failure> {
    let too_large = || Failure { value: size, ..failure(Step::Create, Cause::SizeTooLarge) };
    // Asked for first: the host may know better why there is nothing to make.
    let opened = open_target_file(platform, FileRole::Target, size)?;
    let options = target.luks.as_ref().ok_or_else(|| failure(Step::Create, Cause::BadRequest))?;
    let (spec, fresh) = fresh(options)?;
    let base = fresh.header.payload_offset();
    let size = size.checked_next_multiple_of(SECTOR).ok_or_else(too_large)?;
    let end = if options.detached { material_end(&fresh) } else { base.checked_add(size).ok_or_else(too_large)? };
    super::raw::give_size(platform, &opened, end, target.preallocation())?;
    let failed = |error| luks_failure(Step::Create, opened.id, &[], error);
    let cipher = fresh.key.cipher(&spec, SECTOR as u32).map_err(failed)?;
    let completion = complete(opened.file.clone(), opened.id, fresh);
    Ok(flat(&opened, base, size, cipher, Some(completion)))
}

fn material_end(fresh: &Fresh) -> u64 {
    let area = fresh.header.slots()[1].key_offset - fresh.header.slots()[0].key_offset;
    fresh.header.slots()[luks::SLOT_COUNT - 1].key_offset + area
}

fn complete<P: Platform>(file: File<P>, id: FileId, fresh: Fresh) -> super::Completion<P> {
    Box::new(move |_| {
        let mut disk = TargetDisk::new(file, true);
        let header = fresh.header.to_bytes();
        let parts: [(u64, &[u8]); 2] = [(fresh.material.offset, &fresh.material.bytes), (0, &header)];
        for (offset, bytes) in parts {
            disk.write_at(offset, bytes).map_err(|error| block(Step::Write, Some(id), offset, error))?;
        }
        Ok(())
    })
}

/// Opens an existing volume to write into it.
pub(super) fn open_target<P: Platform>(platform: &P, target: &Target, size: u64) -> Result<TargetImage<P>, Failure> {
    let opened = open_target_file(platform, FileRole::Target, size)?;
    let id = opened.id;
    let to_target = |failure: Failure| Failure { step: Step::OpenTarget.into(), ..failure };
    let header = match target.detached_header {
        true => Some(request_header(platform, id, false).map_err(to_target)?.0),
        false => None,
    };
    let holder = header.as_ref().unwrap_or(&opened.file);
    let volume =
        Volume::read(holder, 0, header.is_some()).map_err(|error| to_target(volume_failure(holder, id, 0, error)))?;
    let key = target.key.as_ref();
    let locked = || Failure { format: Format::Luks.into(), ..about(Step::OpenTarget, id, Cause::Encrypted) };
    let cipher = unlock(&volume, holder, id, 0, key.ok_or_else(locked)?).map_err(to_target)?;
    let payload = volume.payload().map_err(|error| luks_failure(Step::OpenTarget, id, &[], error))?;
    // Version 2 is only read.
    if matches!(volume, Volume::V2(_)) {
        return Err(luks_failure(Step::OpenTarget, id, &[], luks::Error::Unsupported));
    }
    let left = opened.file.size().saturating_sub(payload.offset);
    Ok(flat(&opened, payload.offset, left - left % SECTOR, cipher, None))
}

/// Opens the volume on a granted device to write into it. Who opened it for reading has unlocked it.
pub(super) fn open_in_place<P: Platform>(platform: &P, device: u32) -> Result<TargetImage<P>, Failure> {
    let opened = granted_target_file(platform, device)?;
    let id = opened.id;
    let failed = |error| luks_failure(Step::Open, id, &[], error);
    let volume = Volume::read(&opened.file, 0, false).map_err(|error| volume_failure(&opened.file, id, 0, error))?;
    // Version 2 is only read.
    if matches!(volume, Volume::V2(_)) {
        return Err(failed(luks::Error::Unsupported));
    }
    let base = volume.payload().map_err(failed)?.offset;
    let locked = |_| Failure { format: Format::Luks.into(), ..about(Step::Open, id, Cause::Encrypted) };
    let state = platform.files().get(id).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    let cipher = state.cipher().map_err(locked)?;
    let left = opened.file.size().saturating_sub(base);
    Ok(flat(&opened, base, left - left % SECTOR, cipher, None))
}

fn flat<P: Platform>(
    opened: &TargetFile<P>,
    base: u64,
    size: u64,
    cipher: Arc<dyn SectorCipher>,
    completion: Option<super::Completion<P>>,
) -> TargetImage<P> {
    TargetImage::Flat(FlatImage {
        file: opened.id,
        base,
        size,
        cipher: Some(cipher),
        block_device: opened.block_device,
        held_back: 0,
        completion,
    })
}
