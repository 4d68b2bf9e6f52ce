//! `bitmap`: changing persistent dirty bitmaps.

use alloc::boxed::Box;
use alloc::vec::Vec;

use instar_blockio::FileId;
use instar_guest_protocol::message::{
    BitmapAction, BitmapRefusal, BitmapRequest, BitmapVerb, Cause, EditReply, Failure, Source, Step,
};
use instar_qcow2::{self as qcow2, BitmapError, BitmapFlags, BitmapInfo, BitmapRunKind};

use crate::formats::{OpenImage, open_named, qcow2_failure};
use crate::ops::edit::{self, Editable, Qcow2};
use crate::ops::failure::failure;
use crate::platform::Platform;

/// Bytes of bits that are read at once.
const PIECE: u64 = 64 << 10;
/// Where the granularity is not given, it is the cluster size, but within these bounds, bytes.
const USUAL_GRANULARITY: core::ops::RangeInclusive<u64> = 4096..=65536;

/// Does as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &BitmapRequest) -> Result<EditReply, Failure> {
    let opened = edit::open(platform, &request.image, false, false)?;
    let source = request.source.as_ref().map(|source| Other::open(platform, source)).transpose()?;
    match opened {
        Editable::Qcow2(mut image) => {
            let done = act(&mut image, source.as_ref(), request);
            image.close(done)
        }
        Editable::Other(format) => {
            let first = request.actions.first();
            let granularity = first.and_then(|action| action.granularity);
            let (refusal, text) = match first.map_or(BitmapVerb::Unspecified, BitmapAction::verb) {
                BitmapVerb::Add if granularity.is_some_and(|bytes| bytes < 512 || !bytes.is_power_of_two()) => {
                    (BitmapRefusal::Granularity, Vec::new())
                }
                BitmapVerb::Add => (BitmapRefusal::Unsupported, Vec::new()),
                _ => (BitmapRefusal::NotFound, request.name.clone()),
            };
            Err(Failure { format: format.into(), ..refused(0, refusal, text) })
        }
    }
}

fn refused(index: usize, refusal: BitmapRefusal, text: Vec<u8>) -> Failure {
    Failure { value: refusal as u64, value2: index as u64, text, ..failure(Step::Edit, Cause::BitmapRefused) }
}

fn act<P: Platform>(image: &mut Qcow2<P>, source: Option<&Other<P>>, request: &BitmapRequest) -> Result<(), Failure> {
    for (index, action) in request.actions.iter().enumerate() {
        let done = match (action.verb(), source) {
            (BitmapVerb::Merge, Some(source)) => merge_other(image, source, &action.source, &request.name, index),
            (verb, _) => change(image, verb, action, &request.name)
                .map_err(|error| told(image, error, index, action, &request.name)),
        };
        done?;
    }
    Ok(())
}

fn change<P: Platform>(
    image: &mut Qcow2<P>,
    verb: BitmapVerb,
    action: &BitmapAction,
    name: &[u8],
) -> Result<(), qcow2::Error> {
    let Qcow2 { writer, bitmaps, .. } = image;
    match verb {
        BitmapVerb::Add => {
            let usual = writer.header().geometry.cluster_size();
            let usual = usual.clamp(*USUAL_GRANULARITY.start(), *USUAL_GRANULARITY.end());
            let granularity = action.granularity.unwrap_or(usual);
            // A width that no bitmap has stands for what is no power of two.
            let bits = if granularity.is_power_of_two() { granularity.trailing_zeros() as u8 } else { 0 };
            writer.add_new_bitmap(bitmaps, name, bits)
        }
        BitmapVerb::Remove => writer.remove_bitmap(bitmaps, name),
        BitmapVerb::Clear => bitmaps.clear(name),
        BitmapVerb::Enable => bitmaps.set_enabled(name, true),
        BitmapVerb::Disable => bitmaps.set_enabled(name, false),
        BitmapVerb::Merge => writer.merge_bitmap(bitmaps, &action.source, name),
        BitmapVerb::Unspecified => Err(qcow2::Error::Io(instar_blockio::ErrorKind::InvalidInput.into())),
    }
}

/// Why an action failed. A merge looks at its target first.
fn told<P: Platform>(
    image: &mut Qcow2<P>,
    error: qcow2::Error,
    index: usize,
    action: &BitmapAction,
    name: &[u8],
) -> Failure {
    let qcow2::Error::Bitmap(error) = error else { return image.failure(error) };
    let at_target = action.verb() != BitmapVerb::Merge || image.bitmaps.granularity_bits(name).is_err();
    let text = if at_target { name } else { action.source.as_slice() };
    refused(index, refusal(error), text.to_vec())
}

fn refusal(error: BitmapError) -> BitmapRefusal {
    match error {
        BitmapError::Version => BitmapRefusal::Version,
        BitmapError::NotFound => BitmapRefusal::NotFound,
        BitmapError::Exists => BitmapRefusal::Exists,
        BitmapError::Inconsistent => BitmapRefusal::Inconsistent,
        BitmapError::NameEmpty => BitmapRefusal::NameEmpty,
        BitmapError::NameTooLong => BitmapRefusal::NameTooLong,
        BitmapError::Granularity => BitmapRefusal::Granularity,
        BitmapError::TooLarge => BitmapRefusal::TooLarge,
        BitmapError::TooMany => BitmapRefusal::TooMany,
        BitmapError::DirectoryFull => BitmapRefusal::DirectoryFull,
        _ => BitmapRefusal::Unspecified,
    }
}

/// Another image whose bitmaps are merged into one of this.
struct Other<P: Platform> {
    image: Box<dyn OpenImage<P>>,
    id: FileId,
}

impl<P: Platform> Other<P> {
    fn open(platform: &P, source: &Source) -> Result<Self, Failure> {
        Ok(Self { image: open_named(platform, source)?, id: FileId(source.device) })
    }

    fn find(
        &self,
        name: &[u8],
        index: usize,
    ) -> Result<(&qcow2::Image<crate::platform::File<P>>, BitmapInfo), Failure> {
        let missing = || refused(index, BitmapRefusal::NotFound, name.to_vec());
        let qcow2 = self.image.as_qcow2().ok_or_else(missing)?;
        let all = qcow2.bitmaps().map_err(|error| qcow2_failure(Step::Read, self.id, error))?;
        let found = all.into_iter().find(|bitmap| bitmap.name == name).ok_or_else(missing)?;
        match found.flags.contains(BitmapFlags::IN_USE) {
            true => Err(refused(index, BitmapRefusal::Inconsistent, name.to_vec())),
            false => Ok((qcow2, found)),
        }
    }
}

fn merge_other<P: Platform>(
    image: &mut Qcow2<P>,
    source: &Other<P>,
    from: &[u8],
    into: &[u8],
    index: usize,
) -> Result<(), Failure> {
    if let Err(qcow2::Error::Bitmap(error)) = image.bitmaps.granularity_bits(into) {
        return Err(refused(index, refusal(error), into.to_vec()));
    }
    let (other, info) = source.find(from, index)?;
    let sizes = [image.writer.header().virtual_size, other.virtual_size()];
    if sizes[0] != sizes[1] {
        let text = sizes.iter().flat_map(|size| size.to_be_bytes()).collect();
        return Err(refused(index, BitmapRefusal::Sizes, text));
    }
    let reading = |error| qcow2_failure(Step::Read, source.id, error);
    let mut at = 0;
    while at < info.len {
        let run = other.bitmap_run_at(&info, at).map_err(reading)?;
        let len = run.len.min(PIECE);
        if run.kind != BitmapRunKind::Zeros {
            let mut bytes = alloc::vec![0; len as usize];
            other.read_bitmap(&info, at, &mut bytes).map_err(reading)?;
            let Qcow2 { writer, bitmaps, .. } = image;
            let merged = writer.merge_bits(bitmaps, into, info.granularity_bits, at, &bytes);
            merged.map_err(|error| image.failure(error))?;
        }
        at += len;
    }
    Ok(())
}
