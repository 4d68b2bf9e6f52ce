//! From granted files to disks: images, their further files and their backing chains.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::Cell;

use instar_blockio::{FileId, Layer, MemBlock, Overlay};
use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{BackingChoice, Below, Cause, Failure, FileRole, Format, OpenFile, Source, Step};

use crate::files::FileState;
use crate::formats::{OpenImage, WithHoles, can_have_backing, open_named};
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
            let how = Opening::of(source, true);
            let ends_here = Link::below(source.device, &*image, &how)?.is_none();
            if how.next().is_some_and(|said| said.choice() == BackingChoice::Named) {
                // It is not read, but the host is to know all files that the user named before it makes another one.
                open_below(platform, source.device, &*image, &how)?;
            }
            (alloc::vec![ChainLayer::new(platform, source.device, image)], ends_here)
        }
        false => (open_layers(platform, source)?, false),
    };
    let mut layers: Vec<_> = layers.into_iter().map(|layer| layer.into_disk(platform)).collect();
    if ends_here {
        layers.push(nothing());
    }
    Ok(match layers.len() {
        1 => layers.swap_remove(0),
        _ => Box::new(Overlay::new(layers)),
    })
}

/// An empty layer: behind its end, everything reads as zero.
fn nothing() -> Box<dyn Layer> {
    Box::new(MemBlock::from(Vec::new()))
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
    /// See [`has_holes_in_data`].
    pub holes_in_data: bool,
}

impl ChainLayer {
    fn new<P: Platform>(platform: &P, device: u32, image: Box<dyn OpenImage<P>>) -> Self {
        let file = FileId(device);
        let holes_in_data = has_holes_in_data(platform, file, &*image);
        let (format, status_unit) = (image.format(), image.status_unit());
        Self { format, file, status_unit, holes_in_data, disk: image.into_layer() }
    }

    /// Its disk, in which holes in data are zeroes.
    fn into_disk<P: Platform>(self, platform: &P) -> Box<dyn Layer> {
        if self.holes_in_data { Box::new(WithHoles::new(platform, self.disk, None)) } else { self.disk }
    }
}

/// Are the tables of a qcow2 image there and its data not, as with `preallocation=metadata`? QEMU finds that out by comparing the clusters in
/// use with the disk space that the file takes, and then looks for holes in the file.
fn has_holes_in_data<P: Platform>(platform: &P, file: FileId, image: &dyn OpenImage<P>) -> bool {
    let Some(image) = image.as_qcow2() else { return false };
    let Some(allocated) = platform.files().get(file).and_then(FileState::allocated) else { return false };
    let cluster = image.header().geometry.cluster_size();
    let few = allocated.saturating_add(cluster).max((allocated / 9).saturating_mul(10)) / cluster;
    image.uses_more_clusters(few).unwrap_or(false)
}

/// Opens an image that the user named and everything below it, the top first.
///
/// # Errors
/// As [`open_source`].
pub fn open_layers<P: Platform>(platform: &P, source: &Source) -> Result<Vec<ChainLayer>, Failure> {
    let how = Opening::of(source, true);
    let mut device = source.device;
    let mut image = open_top(platform, source)?;
    let mut layers = Vec::new();
    loop {
        let below = open_backing(platform, device, &*image, &how)?;
        layers.push(ChainLayer::new(platform, device, image));
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
    if how.next().is_some_and(|said| said.choice() == BackingChoice::Hidden) {
        // Who writes into an image that records another must not find that missing.
        return Ok(image.backing().map(|_| nothing()));
    }
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
    /// What the user says of the images below the first one, from the top.
    said: &'a [Below],
    /// How many of them have been opened.
    depth: Cell<usize>,
}

impl<'a> Opening<'a> {
    /// As the user wants it for this image.
    pub(crate) fn of(source: &'a Source, parts: bool) -> Self {
        Self {
            parts,
            strict: source.strict,
            follow_probed: source.follow_probed,
            said: &source.below,
            depth: Cell::new(0),
        }
    }

    /// What the user says of the next image on the way down.
    fn next(&self) -> Option<&'a Below> {
        self.said.get(self.depth.get())
    }
}

/// The way from an image to the one below it.
struct Link {
    /// Names to ask for, the best first.
    names: Vec<Vec<u8>>,
    /// How the image there is opened; its device is not known yet.
    source: Source,
}

impl Link {
    /// From the image that was opened last; `None`: nothing lies below it.
    fn below<P: Platform>(device: u32, image: &dyn OpenImage<P>, how: &Opening<'_>) -> Result<Option<Self>, Failure> {
        let said = how.next();
        let choice = said.map_or(BackingChoice::Recorded, Below::choice);
        let recorded = match (choice, image.backing()) {
            (BackingChoice::Hidden, _) | (BackingChoice::Recorded, None) => return Ok(None),
            (_, recorded) => recorded,
        };
        if choice != BackingChoice::Recorded && !can_have_backing(image.format()) {
            return Err(about(Step::Open, FileId(device), Cause::BackingUnsupported));
        }
        let mut source = said.map_or_else(Source::default, source_of);
        source.strict = how.strict;
        source.follow_probed |= how.follow_probed;
        let (mut names, driver) = recorded.map_or((Vec::new(), None), |recorded| (recorded.names, recorded.driver));
        if source.format() == Format::Unknown {
            source.format = recorded_format(device, driver)?.into();
        }
        if choice != BackingChoice::Named {
            source.named_dmg = names.iter().any(|name| name.ends_with(b".dmg"));
        }
        if names.is_empty() {
            names.push(Vec::new());
        }
        Ok(Some(Self { names, source }))
    }

    /// Opens the image in a granted file, without its further files.
    ///
    /// Without a format, recorded or given, the file is looked at; it is taken only if it refers to nothing further, unless the user named
    /// it: bytes that a guest wrote must not decide which other files are read.
    fn open<P: Platform>(
        mut self,
        platform: &P,
        device: u32,
        how: &Opening<'_>,
    ) -> Result<Box<dyn OpenImage<P>>, Failure> {
        let key = self.source.key.take();
        // Judged and used is one opening: what is probed again might look different.
        let mut found = open_named(platform, &Source { device, ..self.source.clone() })?;
        let guessed = self.source.format() == Format::Unknown && !self.source.follow_probed;
        if guessed && !found.references().is_empty() {
            return Err(about(Step::Open, FileId(device), Cause::BackingFormatNeeded));
        }
        if let Some(key) = key {
            found.unlock(platform, &key)?;
        }
        how.depth.set(how.depth.get().saturating_add(1));
        Ok(found)
    }
}

fn source_of(said: &Below) -> Source {
    Source {
        format: said.format,
        known_only: said.known_only,
        follow_probed: said.follow_probed,
        named_dmg: said.named_dmg,
        vhd_size: said.vhd_size,
        key: said.key.clone(),
        data_file_named: said.data_file_named,
        detached_header: said.detached_header,
        ..Source::default()
    }
}

/// The image below another, and its device.
type Lower<P> = (u32, Box<dyn OpenImage<P>>);

/// Opens what lies below an image, if anything.
///
/// # Errors
/// An image that can't be had or opened, or does not fit.
pub(crate) fn open_backing<P: Platform>(
    platform: &P,
    device: u32,
    image: &dyn OpenImage<P>,
    how: &Opening<'_>,
) -> Result<Option<Lower<P>>, Failure> {
    let Some(link) = Link::below(device, image, how)? else { return Ok(None) };
    let below = request_first(platform, device, &link.names, link.source.format())?;
    let mut found = link.open(platform, below, how)?;
    if how.parts {
        // To describe a chain is to show also what does not fit.
        image.check_backing(&*found)?;
        found.open_parts(platform)?;
    }
    Ok(Some((below, found)))
}

/// The image that `commit` writes.
pub(crate) struct CommitBase<P: Platform> {
    pub device: u32,
    pub image: Box<dyn OpenImage<P>>,
    /// Nobody said what format it has.
    pub guessed: bool,
}

/// Opens the image below `image` if the host says that it is the one to be written by `commit`, and grants it for that.
///
/// # Errors
/// As [`open_backing`].
pub(crate) fn open_base<P: Platform>(
    platform: &P,
    device: u32,
    image: &dyn OpenImage<P>,
    how: &Opening<'_>,
) -> Result<Option<CommitBase<P>>, Failure> {
    let Some(link) = Link::below(device, image, how)? else { return Ok(None) };
    let format = link.source.format();
    let ask =
        |name: &Vec<u8>| request_file(platform, FileId(device), FileRole::CommitBase, name.clone(), format, true).ok();
    let Some(FileId(base)) = link.names.iter().find_map(ask) else { return Ok(None) };
    let mut found = link.open(platform, base, how)?;
    found.open_parts(platform)?;
    image.check_backing(&*found)?;
    Ok(Some(CommitBase { device: base, image: found, guessed: format == Format::Unknown }))
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
