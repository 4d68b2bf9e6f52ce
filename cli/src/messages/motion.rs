//! What qemu-img says of new sizes, backing files and committed images.

use instar_guest_protocol::message::{Cause, Failure, Format, Preallocation, ResizeRefusal, Step};

use super::general;
use crate::formats;
use crate::problem::{EINVAL, Problem, os_text};

/// `errno` values.
const EIO: i32 = 5;
const EFBIG: i32 = 27;
const EOPNOTSUPP: i32 = 95;

/// Why a disk did not get another size.
pub fn resize(failure: &Failure) -> Problem {
    Problem::new(match failure.cause() {
        Cause::ResizeUnsupported => "Image format driver does not support resize".to_owned(),
        Cause::ResizeRefused => refusal(failure),
        Cause::Io if failure.format() == Format::Raw => format!("Could not resize file: {}", reason(failure)),
        _ => reason(failure),
    })
}

fn refusal(failure: &Failure) -> String {
    match ResizeRefusal::try_from(failure.value as i32).unwrap_or(ResizeRefusal::Unspecified) {
        ResizeRefusal::NotPositive => "New image size must be positive".to_owned(),
        ResizeRefusal::PreallocationNotGrowing => "Preallocation can only be used for growing images".to_owned(),
        ResizeRefusal::Shrinks => "Use the --shrink option to perform a shrink operation.".to_owned(),
        ResizeRefusal::Unaligned => "The new size must be a multiple of 512".to_owned(),
        ResizeRefusal::SnapshotsVersion => "Can't resize a v2 image which has snapshots".to_owned(),
        ResizeRefusal::TooLarge => format!("Failed to grow the L1 table: {}", os_text(EFBIG)),
        ResizeRefusal::ZeroesVersion => format!("Failed to zero out new clusters: {}", os_text(EOPNOTSUPP)),
        ResizeRefusal::NoMetadata => "Unsupported preallocation mode: metadata".to_owned(),
        ResizeRefusal::ImageSize => "Invalid image size specified".to_owned(),
        ResizeRefusal::NoShrinking => "Shrinking images is currently not supported".to_owned(),
        ResizeRefusal::NoPreallocation => {
            let mode = match Preallocation::try_from(failure.value2 as i32).unwrap_or_default() {
                Preallocation::Off => "off",
                Preallocation::Metadata => "metadata",
                Preallocation::Falloc => "falloc",
                Preallocation::Full => "full",
            };
            format!("Unsupported preallocation mode '{mode}'")
        }
        ResizeRefusal::NoZeroes => "Block driver does not support requested flags".to_owned(),
        ResizeRefusal::Unspecified => "The disk can't get this size".to_owned(),
    }
}

/// What is warned of when a disk would lose something.
pub fn resize_warning(failure: &Failure) -> Option<&'static str> {
    let shrinks = failure.cause() == Cause::ResizeRefused && failure.value == ResizeRefusal::Shrinks as u64;
    shrinks.then_some(
        "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, \
         make sure there is no important data there.",
    )
}

/// Why an image did not get the backing file `name`, or none.
pub fn rebase(name: Option<&str>, failure: &Failure) -> Problem {
    let name = name.unwrap_or("(null)");
    let within = |text: String| Problem::new(format!("Could not change the backing file to '{name}': {text}"));
    match (failure.step(), failure.cause()) {
        (_, Cause::CompressionUnsupported) => Problem::new("Compression not supported for this file format"),
        (_, Cause::BackingUnsupported) if failure.format() == Format::Parallels => {
            Problem::new("could not get block driver info")
        }
        (_, Cause::BackingUnsupported) => within(os_text(EOPNOTSUPP)),
        (_, Cause::BackingFormatMissing) => within("backing format must be specified".to_owned()),
        (_, Cause::BackingRefused) => within(os_text(EINVAL)),
        (_, Cause::HeaderFull) => within("No space left in the file header".to_owned()),
        (Step::ReadMetadata, _) => Problem::new(format!("error while reading image metadata: {}", reason(failure))),
        (Step::ReadOld, Cause::Io | Cause::CorruptData | Cause::CorruptMetadata) => {
            Problem::new("error while reading from old backing file")
        }
        (Step::ReadNew, Cause::Io | Cause::CorruptData | Cause::CorruptMetadata) => {
            Problem::new("error while reading from new backing file")
        }
        (Step::Write, _) => Problem::new(format!("Error while writing to COW image: {}", reason(failure))),
        (Step::Edit, Cause::Io) => within(reason(failure)),
        _ => Problem::new(reason(failure)),
    }
}

/// Everything was copied, and then the name of the new backing file could not be recorded.
pub fn is_of_recording(failure: &Failure) -> bool {
    match failure.cause() {
        Cause::BackingUnsupported => failure.format() != Format::Parallels,
        Cause::BackingFormatMissing | Cause::BackingRefused | Cause::HeaderFull => true,
        Cause::Io => failure.step() == Step::Edit,
        _ => false,
    }
}

/// Why the image `given` was not committed, to `base` if that was named.
pub fn commit(base: Option<&str>, given: &str, failure: &Failure) -> Problem {
    match (failure.cause(), base) {
        (Cause::BaseNotFound | Cause::NoBacking, Some(base)) => {
            Problem::new(format!("Did not find '{base}' in the backing chain of '{given}'"))
        }
        (Cause::BaseNotFound | Cause::NoBacking, None) => Problem::new("Image does not have a backing file"),
        (Cause::GuessedRaw, _) => {
            let format = Format::try_from(failure.value as i32).unwrap_or(Format::Unknown);
            Problem::new(format!(
                "The backing file, whose format is not recorded, would look like an image in {} format",
                formats::name(format)
            ))
            .with_hint("Record that it is raw in the image that names it (rebase -u -F raw).")
        }
        (Cause::ResizeRefused | Cause::ResizeUnsupported, _) => {
            Problem::new(format!("Block job failed: {}", os_text(EOPNOTSUPP)))
        }
        (Cause::Io | Cause::CorruptData | Cause::CorruptMetadata, _) if failure.step() == Step::Empty => {
            Problem::new(format!("Could not empty {given}: {}", reason(failure)))
        }
        (Cause::Io | Cause::CorruptData | Cause::CorruptMetadata, _) => {
            Problem::new(format!("Block job failed: {}", reason(failure)))
        }
        _ => Problem::new(reason(failure)),
    }
}

/// Why a request failed.
pub fn bench(failure: &Failure) -> Problem {
    Problem::new(format!("Failed request: {}", reason(failure)))
}

fn reason(failure: &Failure) -> String {
    match failure.cause() {
        Cause::Io | Cause::CorruptData | Cause::CorruptMetadata => {
            os_text(if failure.os == 0 { EIO } else { failure.os })
        }
        _ => general(failure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_a_text() {
        for value in (1..).take_while(|value| ResizeRefusal::try_from(*value).is_ok()) {
            let failure = Failure { cause: Cause::ResizeRefused.into(), value: value as u64, ..Failure::default() };
            assert_ne!(resize(&failure).to_string(), "The disk can't get this size", "{value}");
        }
    }

    #[test]
    fn numbers_that_the_guest_made_up_are_no_panic() {
        for value in [99, u64::MAX] {
            let failure = Failure { cause: 121, step: 999, value, ..Failure::default() };
            resize(&failure);
            rebase(Some("b"), &failure);
            commit(None, "t", &Failure { cause: 128, ..failure.clone() });
            bench(&failure);
        }
    }
}
