//! The formats composed: detection, and one type for an image of any of them.

use alloc::boxed::Box;
use alloc::vec::Vec;

use instar_blockio::{BlockRead, FileId, Layer, ReadPart};
use instar_guest_protocol::message::{Cause, Failure, Format, Step};
use instar_qcow2 as qcow2;
use instar_raw as raw;

use crate::detect::{Detection, HEAD_LEN, TAIL_LEN, detect};
use crate::ops::failure::{about, block, qcow2_failure};
use crate::platform::{File, Platform};

/// An opened image.
pub enum Image<F: BlockRead> {
    /// The bytes themselves.
    Raw(raw::Image<F>),
    /// QEMU copy on write.
    Qcow2(Box<qcow2::Image<F>>),
}

impl<F: BlockRead + Send + 'static> Image<F> {
    /// Its format.
    pub fn format(&self) -> Format {
        match self {
            Self::Raw(_) => Format::Raw,
            Self::Qcow2(_) => Format::Qcow2,
        }
    }

    /// Name of the backing file as stored.
    pub fn backing_file(&self) -> Option<&[u8]> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(image) => image.backing_file(),
        }
    }

    /// Name of the backing file's format as stored.
    pub fn backing_format(&self) -> Option<&[u8]> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(image) => image.backing_format(),
        }
    }

    /// The image as a layer of a chain.
    pub fn into_layer(self) -> Box<dyn Layer>
    where
        raw::Image<F>: Layer,
        qcow2::Image<F>: Layer,
    {
        match self {
            Self::Raw(image) => Box::new(image),
            Self::Qcow2(image) => image,
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

/// Opens the image on a granted device, without its data file and chain. `strict`: see
/// [`Source::strict`](instar_guest_protocol::message::Source::strict).
///
/// # Errors
/// A format that the file has not or that can't be opened; the format's own reasons.
pub fn open_image<P: Platform>(
    platform: &P,
    device: u32,
    format: Format,
    strict: bool,
) -> Result<Image<File<P>>, Failure> {
    let id = FileId(device);
    let file = platform.file(device).ok_or_else(|| about(Step::Open, id, Cause::BadRequest))?;
    let format = match format {
        Format::Unknown => probe(&file, id)?.format,
        known => known,
    };
    match format {
        Format::Raw | Format::File => {
            raw::Image::open(file).map(Image::Raw).map_err(|error| block(Step::Open, Some(id), 0, error))
        }
        Format::Qcow2 => {
            let options = qcow2::OpenOptions { strict, ..qcow2::OpenOptions::default() };
            let image = qcow2::Image::open(file.clone(), id, &options);
            Ok(Image::Qcow2(Box::new(image.map_err(|error| open_failure(&file, id, error))?)))
        }
        other => Err(Failure { format: other.into(), ..about(Step::Open, id, Cause::FormatNotSupported) }),
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
