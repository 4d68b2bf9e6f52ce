//! `amend`: changing the options of an image.

use instar_guest_protocol::message::{
    AmendOptions as WireOptions, AmendRefusal, AmendRequest, Call, Cause, EditReply, Failure, Format, Progress, Source,
    Step, call,
};
use instar_qcow2::{AmendError, AmendOptions, EncryptionMethod, Error};

use crate::formats::change_keys;
use crate::ops::commit::read_tail;
use crate::ops::edit::{self, Editable, Qcow2};
use crate::ops::failure::failure;
use crate::platform::Platform;

/// Does as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &AmendRequest) -> Result<EditReply, Failure> {
    let resizes = request.options.as_ref().is_some_and(|options| options.size.is_some());
    match edit::open(platform, &request.image, true, resizes)? {
        Editable::Qcow2(mut image) => match &request.options {
            Some(options) => {
                let done = amend(platform, &request.image, &mut image, options, request.progress);
                image.close(done)
            }
            None => Ok(EditReply { format: Format::Qcow2.into(), ..EditReply::default() }),
        },
        Editable::Other(Format::Luks) => {
            if let Some(options) = &request.options {
                if request.progress {
                    platform.call(&Call { kind: Some(call::Kind::Progress(Progress { done: 0, total: 1 })) });
                }
                change_keys(platform, &request.image, options.keys.as_ref(), 0..u64::MAX)?;
            }
            Ok(EditReply { format: Format::Luks.into(), ..EditReply::default() })
        }
        Editable::Other(format) => {
            Err(Failure { format: format.into(), ..failure(Step::Edit, Cause::AmendUnsupported) })
        }
    }
}

fn amend<P: Platform>(
    platform: &P,
    source: &Source,
    image: &mut Qcow2<P>,
    wanted: &WireOptions,
    progress: bool,
) -> Result<(), Failure> {
    let header = match (image.writer.header().encryption, image.writer.extensions().crypto) {
        _ if !wanted.encryption => None,
        (EncryptionMethod::None, _) => return Err(refused(AmendRefusal::NoEncryption)),
        (EncryptionMethod::Luks, Some(header)) => Some(header.offset.0..header.offset.0.saturating_add(header.len)),
        _ => return Err(refused(AmendRefusal::OnlyLuks)),
    };
    let tail = read_tail(&image.writer, image.below.as_deref()).map_err(|error| image.failure(error))?;
    let options = AmendOptions {
        version: wanted.version,
        refcount_bits: wanted.refcount_bits,
        lazy_refcounts: wanted.lazy_refcounts,
        data_file: wanted.data_file.clone(),
        data_file_raw: wanted.data_file_raw,
        backing_file: wanted.backing_file.clone(),
        backing_format: wanted.backing_format.clone(),
        size: wanted.size,
        backing_size: image.below.as_ref().map(|below| below.size()),
        tail,
    };
    let tell = |done: u64, total: u64| {
        if progress {
            platform.call(&Call { kind: Some(call::Kind::Progress(Progress { done, total })) });
        }
    };
    tell(0, 1);
    // Every message costs an exit, so only what can be seen is told, by qemu-img's rule.
    let mut told = 0.0;
    let mut report = |done: u64, total: u64| {
        let percent = done as f64 * 100.0 / total.max(1) as f64;
        if percent - told >= 1.0 || percent < told || percent == 0.0 || percent >= 100.0 {
            told = percent;
            tell(done, total);
        }
    };
    if let Some(area) = header {
        change_keys(platform, source, wanted.keys.as_ref(), area)?;
    }
    let Qcow2 { writer, bitmaps, .. } = image;
    let done = writer.amend(&options, bitmaps, &mut report);
    done.map_err(|error| match error {
        Error::Amend(error) => of(error),
        other => image.failure(other),
    })
}

fn refused(refusal: AmendRefusal) -> Failure {
    Failure { value: refusal as u64, format: Format::Qcow2.into(), ..failure(Step::Edit, Cause::AmendRefused) }
}

fn of(error: AmendError) -> Failure {
    let refusal = match error {
        AmendError::Version(_) => AmendRefusal::Version,
        AmendError::RefcountBits(_) => AmendRefusal::RefcountBits,
        AmendError::RefcountBitsVersion => AmendRefusal::RefcountBitsVersion,
        AmendError::RefcountTooLarge { offset, count, .. } => {
            let text = count.to_be_bytes().to_vec();
            return Failure { value2: offset, text, ..refused(AmendRefusal::RefcountTooLarge) };
        }
        AmendError::RefcountTable => AmendRefusal::RefcountTable,
        AmendError::NoDataFile => AmendRefusal::NoDataFile,
        AmendError::DataFileRaw => AmendRefusal::DataFileRaw,
        AmendError::Backing => AmendRefusal::Backing,
        AmendError::LazyRefcountsVersion => AmendRefusal::LazyRefcountsVersion,
        AmendError::DowngradeRefcountBits => AmendRefusal::DowngradeRefcountBits,
        AmendError::DowngradeDataFile => AmendRefusal::DowngradeDataFile,
        AmendError::DowngradeSnapshots => AmendRefusal::DowngradeSnapshots,
        AmendError::DowngradeFeatures(bits) => {
            return Failure { value2: bits, ..refused(AmendRefusal::DowngradeFeatures) };
        }
        AmendError::SizeUnaligned => AmendRefusal::SizeUnaligned,
        AmendError::SizeNegative => AmendRefusal::SizeNegative,
        _ => AmendRefusal::Unspecified,
    };
    refused(refusal)
}
