//! `info`: what images say of themselves. Reads headers and small tables only; opens further files only to follow a chain.

use alloc::vec::Vec;

use instar_blockio::{BlockRead, FileId};
use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message as wire;
use instar_guest_protocol::message::{
    Cause, Failure, FileRole, ImageInfo, InfoReply, InfoRequest, Qcow2Info, Reference, Safety, Step,
};
use instar_luks as luks;
use instar_qcow2 as qcow2;

use crate::chain::{Opening, open_backing};
use crate::image::{Image, open_image, probe};
use crate::ops::failure::{about, block, qcow2_failure};
use crate::platform::{File, Platform};

/// Describes the image, and its chain if asked for.
///
/// # Errors
/// The first image that can't be opened or described.
pub fn run<P: Platform>(platform: &P, request: &InfoRequest) -> Result<InfoReply, Failure> {
    let mut images = Vec::new();
    let mut device = request.image.device;
    let how = Opening { data_file: false, strict: request.image.strict };
    let mut image = open_image(platform, device, request.image.format(), how.strict)?;
    loop {
        images.push(describe(platform, device, &image, request.safety)?);
        let below = match request.chain {
            true => open_backing(platform, device, &image, how)?,
            false => None,
        };
        match below {
            None => return Ok(InfoReply { images }),
            Some(_) if images.len() >= MAX_CHAIN_DEPTH => {
                let value = MAX_CHAIN_DEPTH as u64;
                return Err(Failure { value, ..about(Step::Open, FileId(device), Cause::ChainTooDeep) });
            }
            Some(next) => (device, image) = next,
        }
    }
}

fn describe<P: Platform>(
    platform: &P,
    device: u32,
    image: &Image<File<P>>,
    safety: bool,
) -> Result<ImageInfo, Failure> {
    let mut info = ImageInfo { device, format: image.format().into(), ..ImageInfo::default() };
    match image {
        Image::Raw(raw) => info.virtual_size = raw.size(),
        Image::Qcow2(qcow2) => describe_qcow2(platform, FileId(device), qcow2, &mut info)?,
    }
    if safety {
        info.safety = Some(describe_safety(platform, device, image)?);
    }
    Ok(info)
}

fn describe_qcow2<P: Platform>(
    platform: &P,
    id: FileId,
    image: &qcow2::Image<File<P>>,
    info: &mut ImageInfo,
) -> Result<(), Failure> {
    let failed = |error| qcow2_failure(Step::Open, id, error);
    let encryption = image.encryption();
    info.virtual_size = image.virtual_size();
    info.cluster_size = Some(image.cluster_size());
    info.encrypted = encryption != qcow2::Encryption::None;
    info.dirty = image.is_dirty();
    info.backing_file = image.backing_file().map(<[u8]>::to_vec);
    info.backing_format = image.backing_format().map(<[u8]>::to_vec);
    info.snapshots = image.snapshots().map_err(failed)?.into_iter().map(snapshot).collect();
    info.qcow2 = Some(Qcow2Info {
        version: image.header().version,
        zstd: image.compression() == qcow2::CompressionType::Zstd,
        lazy_refcounts: image.header().compatible.contains(qcow2::Compatible::LAZY_REFCOUNTS),
        bitmaps: image.bitmaps().map_err(failed)?.into_iter().map(bitmap).collect(),
        refcount_bits: image.header().geometry.refcount_bits(),
        aes: encryption == qcow2::Encryption::Aes,
        luks: match encryption {
            qcow2::Encryption::Luks { offset, .. } => Some(luks_header(platform, id, offset.0)?),
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

fn luks_header<P: Platform>(platform: &P, id: FileId, offset: u64) -> Result<wire::LuksInfo, Failure> {
    let field = |value2| Failure {
        value: wire::Field::EncryptionHeader as u64,
        value2,
        ..about(Step::Open, id, Cause::InvalidField)
    };
    let file = platform.file(id.0).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    let mut bytes = [0; luks::HEADER_LEN];
    file.read_at(offset, &mut bytes).map_err(|error| block(Step::Open, Some(id), offset, error))?;
    let header = luks::Header::parse(&bytes).map_err(|_| field(offset))?;
    Ok(wire::LuksInfo {
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
    })
}

fn snapshot(found: qcow2::Snapshot) -> wire::Snapshot {
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

fn bitmap(found: qcow2::BitmapInfo) -> wire::Bitmap {
    wire::Bitmap {
        name: found.name,
        granularity: 1 << found.granularity_bits,
        in_use: found.flags.contains(qcow2::BitmapFlags::IN_USE),
        auto: found.flags.contains(qcow2::BitmapFlags::AUTO),
    }
}

fn describe_safety<P: Platform>(platform: &P, device: u32, image: &Image<File<P>>) -> Result<Safety, Failure> {
    let id = FileId(device);
    let file = platform.file(device).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    let found = probe(&file, id)?;
    let mut safety = Safety { detected: found.specific.into(), ..Safety::default() };
    safety.also = found.also.iter().map(|format| (*format).into()).collect();
    if let Some(name) = image.backing_file() {
        safety.references.push(Reference { role: FileRole::Backing.into(), name: name.to_vec() });
    }
    if let Image::Qcow2(qcow2) = image {
        safety.incompatible_features = qcow2.header().incompatible.bits();
        if qcow2.needs_data_file() {
            let name = qcow2.data_file_name().unwrap_or_default().to_vec();
            safety.references.push(Reference { role: FileRole::Data.into(), name });
        }
    }
    Ok(safety)
}
