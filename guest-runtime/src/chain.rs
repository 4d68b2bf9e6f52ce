//! From granted files to disks: images, their further files and their backing chains.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::Cell;

use instar_blockio::{FileId, Layer, MemBlock, Overlay};
use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{BackingKey, Cause, Failure, FileRole, Format, OpenFile, Source, Step, VhdSize};

use crate::formats::{OpenImage, format_by_name, open_image, open_named};
use crate::ops::failure::about;
use crate::platform::Platform;

/// Opens an image that the user named, with everything below it, as one disk.
///
/// `top_only` leaves the backing chain closed: what the image does not allocate stays
/// [`Unallocated`](instar_blockio::ExtentKind::Unallocated) for its backing file to answer, and is zero if it has none.
///
/// # Errors
/// The first image of the chain that can't be opened; a chain longer than [`MAX_CHAIN_DEPTH`].
pub fn open_source<P: Platform>(platform: &P, source: &Source, top_only: bool) -> Result<Box<dyn Layer>, Failure> {
    let (layers, ends_here) = match top_only {
        true => {
            let image = open_top(platform, source)?;
            let ends_here = image.backing().is_none();
            (alloc::vec![image.into_layer()], ends_here)
        }
        false => (open_layers(platform, source, None)?.into_iter().map(|layer| layer.disk).collect(), false),
    };
    let mut layers: Vec<Box<dyn Layer>> = layers;
    if ends_here {
        // An empty layer below: behind its end, everything reads as zero.
        layers.push(Box::new(MemBlock::from(Vec::new())));
    }
    Ok(match layers.len() {
        1 => layers.swap_remove(0),
        _ => Box::new(Overlay::new(layers)),
    })
}

/// One image of a chain.
pub struct ChainLayer {
    /// Its disk, without what lies below.
    pub disk: Box<dyn Layer>,
    /// Its format.
    pub format: Format,
    /// Its main file.
    pub file: FileId,
    /// See [`OpenImage::status_unit`].
    pub status_unit: Option<u64>,
    /// See [`has_holes_in_data`]; of the image itself only.
    pub holes_in_data: bool,
}

/// Are the tables of a qcow2 image there and its data not, as with `preallocation=metadata`? QEMU finds that out by comparing the clusters in
/// use with the `allocated` bytes that the file system holds, and then looks for holes in the file.
fn has_holes_in_data<P: Platform>(image: &dyn OpenImage<P>, allocated: u64) -> bool {
    let Some(image) = image.as_qcow2() else { return false };
    let cluster = image.header().geometry.cluster_size();
    let few = allocated.saturating_add(cluster).max((allocated / 9).saturating_mul(10)) / cluster;
    image.uses_more_clusters(few).unwrap_or(false)
}

/// Opens an image that the user named and everything below it, the top first. `allocated`: bytes that the file system holds of its file, if
/// that is wanted and known.
///
/// # Errors
/// As [`open_source`].
pub fn open_layers<P: Platform>(
    platform: &P,
    source: &Source,
    allocated: Option<u64>,
) -> Result<Vec<ChainLayer>, Failure> {
    let how = Opening::of(source, true);
    let mut device = source.device;
    let mut image = open_top(platform, source)?;
    let mut layers = Vec::new();
    loop {
        let below = open_backing(platform, device, &*image, &how)?;
        let (format, status_unit) = (image.format(), image.status_unit());
        let allocated = allocated.filter(|_| layers.is_empty());
        let holes_in_data = allocated.is_some_and(|allocated| has_holes_in_data(&*image, allocated));
        layers.push(ChainLayer { format, file: FileId(device), status_unit, holes_in_data, disk: image.into_layer() });
        match below {
            None => return Ok(layers),
            Some(_) if layers.len() >= MAX_CHAIN_DEPTH => return Err(too_deep(device)),
            Some(next) => (device, image) = next,
        }
    }
}

/// The image itself, with its further files and at the wanted snapshot.
fn open_top<P: Platform>(platform: &P, source: &Source) -> Result<Box<dyn OpenImage<P>>, Failure> {
    let mut image = open_named(platform, source)?;
    image.open_parts(platform)?;
    if let Some(selector) = &source.snapshot {
        image.select_snapshot(selector)?;
    }
    Ok(image)
}

/// Opens what lies below an image, all the way down, as one disk; `None` if nothing does.
pub(crate) fn open_below<P: Platform>(
    platform: &P,
    device: u32,
    image: &dyn OpenImage<P>,
    how: &Opening<'_>,
) -> Result<Option<Box<dyn Layer>>, Failure> {
    let mut below = open_backing(platform, device, image, how)?;
    let mut layers: Vec<Box<dyn Layer>> = Vec::new();
    while let Some((device, image)) = below {
        if layers.len() + 1 >= MAX_CHAIN_DEPTH {
            return Err(too_deep(device));
        }
        below = open_backing(platform, device, &*image, how)?;
        layers.push(image.into_layer());
    }
    Ok(match layers.len() {
        0 => None,
        1 => Some(layers.swap_remove(0)),
        _ => Some(Box::new(Overlay::new(layers))),
    })
}

/// The image that is to be written by `commit`, if the host says that it is the one below `image`: granted for writing, with its format
/// as far as it is recorded.
///
/// # Errors
/// A format that nobody knows.
pub(crate) fn request_base<P: Platform>(
    platform: &P,
    device: u32,
    image: &dyn OpenImage<P>,
) -> Result<Option<(u32, Format)>, Failure> {
    let Some(backing) = image.backing() else { return Ok(None) };
    let recorded = recorded_format(device, backing.driver)?;
    let mut granted = backing
        .names
        .into_iter()
        .filter_map(|name| request_file(platform, FileId(device), FileRole::CommitBase, name, recorded, true).ok());
    Ok(granted.next().map(|id| (id.0, recorded)))
}

/// A chain that is longer than what is accepted.
pub(crate) fn too_deep(device: u32) -> Failure {
    Failure { value: MAX_CHAIN_DEPTH as u64, ..about(Step::Open, FileId(device), Cause::ChainTooDeep) }
}

/// How the images of a chain are opened.
#[derive(Clone, Debug)]
pub(crate) struct Opening<'a> {
    /// The further files of each image are opened. Describing needs no data.
    pub parts: bool,
    /// See [`Source::strict`].
    pub strict: bool,
    /// See [`Source::follow_probed`].
    pub follow_probed: bool,
    /// Keys of encrypted images.
    keys: &'a [BackingKey],
    /// Images that have been opened below the first one.
    depth: Cell<u32>,
}

impl<'a> Opening<'a> {
    /// As the user wants it for this image.
    pub(crate) fn of(source: &'a Source, parts: bool) -> Self {
        Self {
            parts,
            strict: source.strict,
            follow_probed: source.follow_probed,
            keys: &source.backing_keys,
            depth: Cell::new(0),
        }
    }

    /// Unlocks the next image on the way down, if the user named a key for it.
    ///
    /// # Errors
    /// A key that does not open it.
    pub(crate) fn unlock_next<P: Platform>(&self, platform: &P, image: &mut dyn OpenImage<P>) -> Result<(), Failure> {
        let depth = self.depth.get().saturating_add(1);
        self.depth.set(depth);
        let found = self.keys.iter().find(|found| found.depth == depth).and_then(|found| found.key.as_ref());
        found.map_or(Ok(()), |key| image.unlock(platform, key))
    }
}

/// The image below another, and its device.
type Below<P> = (u32, Box<dyn OpenImage<P>>);

/// Opens what lies below an image, if anything.
///
/// A backing file whose format is not recorded is looked at; it is taken only if it refers to nothing further, since bytes that a
/// guest wrote must not decide which other files are read.
pub(crate) fn open_backing<P: Platform>(
    platform: &P,
    device: u32,
    image: &dyn OpenImage<P>,
    how: &Opening<'_>,
) -> Result<Option<Below<P>>, Failure> {
    let Some(backing) = image.backing() else { return Ok(None) };
    let recorded = recorded_format(device, backing.driver)?;
    let below = request_first(platform, device, &backing.names, recorded)?;
    // Judged and used is one opening: what is probed again might look different.
    let named_dmg = backing.names.iter().any(|name| name.ends_with(b".dmg"));
    let format = format_by_name(platform, below, recorded, named_dmg)?;
    let mut found = open_image(platform, below, format, how.strict, VhdSize::ByCreator)?;
    if recorded == Format::Unknown && !how.follow_probed && !found.references().is_empty() {
        return Err(about(Step::Open, FileId(below), Cause::BackingFormatNeeded));
    }
    how.unlock_next(platform, &mut *found)?;
    if how.parts {
        // To describe a chain is to show also what does not fit.
        image.check_backing(&*found)?;
        found.open_parts(platform)?;
    }
    Ok(Some((below, found)))
}

/// The format that an image records for its backing file; [`Format::Unknown`] if none.
fn recorded_format(device: u32, driver: Option<Vec<u8>>) -> Result<Format, Failure> {
    let Some(name) = driver else { return Ok(Format::Unknown) };
    Format::of_driver(&name)
        .ok_or_else(|| Failure { text: name, ..about(Step::Open, FileId(device), Cause::UnknownBackingFormat) })
}

/// The first of several names that the host grants.
fn request_first<P: Platform>(platform: &P, device: u32, names: &[Vec<u8>], format: Format) -> Result<u32, Failure> {
    let mut refused = about(Step::Open, FileId(device), Cause::OpenRefused);
    for name in names {
        match request_file(platform, FileId(device), FileRole::Backing, name.clone(), format, false) {
            Ok(id) => return Ok(id.0),
            Err(failure) => refused = failure,
        }
    }
    Err(refused)
}

/// Asks the host for a file that an image names.
///
/// # Errors
/// The host's refusal; the host knows why.
pub(crate) fn request_file<P: Platform>(
    platform: &P,
    referrer: FileId,
    role: FileRole,
    name: Vec<u8>,
    format: Format,
    writable: bool,
) -> Result<FileId, Failure> {
    let request = OpenFile { role: role.into(), referrer: referrer.0, name, size: 0, writable, format: format.into() };
    let answer = platform.open(request);
    match answer.granted {
        true => Ok(FileId(answer.device)),
        false => Err(about(Step::Open, referrer, Cause::OpenRefused)),
    }
}
