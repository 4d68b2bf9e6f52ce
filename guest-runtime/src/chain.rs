//! From granted files to disks: images, their data files and their backing chains.

use alloc::boxed::Box;
use alloc::vec::Vec;

use instar_blockio::{BlockRead, FileId, Layer, MemBlock, Overlay};
use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{
    Cause, Failure, Field, FileRole, Format, OpenFile, SnapshotSelector, Source, Step,
};
use instar_qcow2 as qcow2;

use crate::image::{Image, open_image};
use crate::ops::failure::{about, qcow2_failure};
use crate::platform::{File, Platform};

/// Opens an image that the user named, with everything below it, as one disk.
///
/// `top_only` leaves the backing chain closed: what the image does not allocate stays
/// [`Unallocated`](instar_blockio::ExtentKind::Unallocated) for its backing file to answer, and is zero if it has none.
///
/// # Errors
/// The first image of the chain that can't be opened; a chain longer than [`MAX_CHAIN_DEPTH`].
pub fn open_source<P: Platform>(platform: &P, source: &Source, top_only: bool) -> Result<Box<dyn Layer>, Failure> {
    let mut device = source.device;
    let how = Opening { data_file: true, strict: source.strict };
    let image = open_image(platform, device, source.format(), how.strict)?;
    let mut image = with_data_file(platform, device, image, how)?;
    if let Some(selector) = &source.snapshot {
        select_snapshot(&mut image, FileId(device), selector)?;
    }
    let mut layers: Vec<Box<dyn Layer>> = Vec::new();
    let ends_here = top_only && image.backing_file().is_none();
    loop {
        let below = match top_only {
            true => None,
            false => open_backing(platform, device, &image, how)?,
        };
        layers.push(image.into_layer());
        match below {
            None => break,
            Some(_) if layers.len() >= MAX_CHAIN_DEPTH => {
                let value = MAX_CHAIN_DEPTH as u64;
                return Err(Failure { value, ..about(Step::Open, FileId(device), Cause::ChainTooDeep) });
            }
            Some(next) => (device, image) = next,
        }
    }
    if ends_here {
        // An empty layer below: behind its end, everything reads as zero.
        layers.push(Box::new(MemBlock::from(Vec::new())));
    }
    Ok(match layers.len() {
        1 => layers.swap_remove(0),
        _ => Box::new(Overlay::new(layers)),
    })
}

/// How the images of a chain are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opening {
    /// An external data file is opened with its image. Describing needs no data.
    pub data_file: bool,
    /// See [`Source::strict`].
    pub strict: bool,
}

/// The image, with its data file if it keeps its data elsewhere and the data is wanted.
fn with_data_file<P: Platform>(
    platform: &P,
    device: u32,
    mut image: Image<File<P>>,
    how: Opening,
) -> Result<Image<File<P>>, Failure> {
    if how.data_file
        && let Image::Qcow2(qcow2) = &mut image
    {
        let image = FileId(device);
        qcow2.check_readable().map_err(|error| qcow2_failure(Step::Open, image, error))?;
        if qcow2.needs_data_file() {
            let (file, id) = open_data_file(platform, image, qcow2.data_file_name(), false)?;
            qcow2.attach_data_file(file, id);
        }
    }
    Ok(image)
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

/// The image below another, and its device.
type Below<P> = (u32, Image<File<P>>);

/// Opens what lies below an image, if anything.
///
/// A backing file whose format is not recorded is looked at; it is taken only if it refers to nothing further, since bytes that a
/// guest wrote must not decide which other files are read.
pub(crate) fn open_backing<P: Platform>(
    platform: &P,
    device: u32,
    image: &Image<File<P>>,
    how: Opening,
) -> Result<Option<Below<P>>, Failure> {
    let Some(name) = image.backing_file() else { return Ok(None) };
    let recorded = recorded_format(device, image)?;
    let below = request_file(platform, FileId(device), FileRole::Backing, name.to_vec(), recorded, false)?.0;
    // Judged and used is one opening: what is probed again might look different.
    let image = open_image(platform, below, recorded, how.strict)?;
    if recorded == Format::Unknown
        && let Image::Qcow2(found) = &image
        && (found.backing_file().is_some() || found.needs_data_file())
    {
        return Err(about(Step::Open, FileId(below), Cause::BackingFormatNeeded));
    }
    Ok(Some((below, with_data_file(platform, below, image, how)?)))
}

/// The format that the image records for its backing file; [`Format::Unknown`] if none.
fn recorded_format<F: BlockRead + Send + 'static>(device: u32, image: &Image<F>) -> Result<Format, Failure> {
    let Some(name) = image.backing_format() else { return Ok(Format::Unknown) };
    Format::of_driver(name).ok_or_else(|| Failure {
        text: name.to_vec(),
        ..about(Step::Open, FileId(device), Cause::UnknownBackingFormat)
    })
}

fn request_file<P: Platform>(
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

fn select_snapshot<'a, F: BlockRead>(
    image: &mut Image<F>,
    id: FileId,
    selector: &'a SnapshotSelector,
) -> Result<(), Failure> {
    match image {
        Image::Raw(_) => Err(about(Step::Snapshot, id, Cause::SnapshotNotFound)),
        Image::Qcow2(image) => {
            let given = |text: &'a [u8]| Some(text).filter(|text| !text.is_empty());
            let wanted = match given(&selector.id_or_name) {
                Some(text) => qcow2::SnapshotSelector::IdOrName(text),
                None => qcow2::SnapshotSelector::Exact { id: given(&selector.id), name: given(&selector.name) },
            };
            image.select_snapshot(wanted).map_err(|error| qcow2_failure(Step::Snapshot, id, error))
        }
    }
}
