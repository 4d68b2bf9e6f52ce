//! `info`: what images say of themselves. Reads headers and small tables only; opens further files only to follow a chain.

use alloc::vec::Vec;

use instar_blockio::FileId;
use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{Cause, Failure, ImageInfo, InfoReply, InfoRequest, Safety, Step};

use crate::chain::{Opening, open_backing, too_deep};
use crate::formats::{OpenImage, open_named, probe};
use crate::ops::failure::about;
use crate::platform::Platform;

/// Describes the image, and its chain if asked for.
///
/// # Errors
/// The first image that can't be opened or described.
pub fn run<P: Platform>(platform: &P, request: &InfoRequest) -> Result<InfoReply, Failure> {
    let mut images = Vec::new();
    let mut device = request.image.device;
    let how = Opening::of(&request.image, false);
    let mut image = open_named(platform, &request.image)?;
    loop {
        images.push(describe(platform, device, &*image, request.safety)?);
        let below = match request.chain {
            true => open_backing(platform, device, &*image, &how)?,
            false => None,
        };
        match below {
            None => return Ok(InfoReply { images }),
            Some(_) if images.len() >= MAX_CHAIN_DEPTH => return Err(too_deep(device)),
            Some(next) => (device, image) = next,
        }
    }
}

fn describe<P: Platform>(
    platform: &P,
    device: u32,
    image: &dyn OpenImage<P>,
    safety: bool,
) -> Result<ImageInfo, Failure> {
    let mut info = ImageInfo { device, format: image.format().into(), ..ImageInfo::default() };
    image.describe(platform, &mut info)?;
    if safety {
        info.safety = Some(describe_safety(platform, device, image)?);
    }
    Ok(info)
}

fn describe_safety<P: Platform>(platform: &P, device: u32, image: &dyn OpenImage<P>) -> Result<Safety, Failure> {
    let id = FileId(device);
    let file = platform.file(device).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    let found = probe(&file, id)?;
    Ok(Safety {
        detected: found.specific.into(),
        also: found.also.iter().map(|format| (*format).into()).collect(),
        references: image.references(),
        incompatible_features: image.as_qcow2().map_or(0, |image| image.header().incompatible.bits()),
    })
}
