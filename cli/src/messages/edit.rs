//! What qemu-img says of snapshots, bitmaps and amended options.

use instar_guest_protocol::message::{AmendRefusal, BitmapRefusal, BitmapVerb, Cause, Failure, Format, SnapshotAction};

use super::{general, open_failure};
use crate::formats;
use crate::problem::{EINVAL, Problem, os_text, printable};

/// `errno` values.
const ENOENT: i32 = 2;
const EIO: i32 = 5;
const EFBIG: i32 = 27;
const EOPNOTSUPP: i32 = 95;

/// QEMU names the open image by a number that is never the same; here it is always this.
const NODE: &str = "#block100";

/// A raw image of which nobody said that it is raw.
pub fn raw_guessed(name: &str) -> String {
    format!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         Automatically detecting \
         the format is dangerous for raw images, write operations on block 0 will be restricted.\n         Specify the \
         'raw' format explicitly to remove the restrictions.\n"
    )
}

/// Why a snapshot was not made, applied or deleted.
pub fn snapshot(action: SnapshotAction, name: &str, failure: &Failure) -> Problem {
    let verb = match action {
        SnapshotAction::Apply => "apply",
        SnapshotAction::Delete => "delete",
        _ => "create",
    };
    let within = |problem: Problem| problem.within(format!("Could not {verb} snapshot '{name}'"));
    let loading = |problem: Problem| within(problem.within("Failed to load snapshot"));
    match (action, failure.cause()) {
        (SnapshotAction::Delete, Cause::SnapshotNotFound | Cause::SnapshotsUnsupported) => {
            within(Problem::new("snapshot not found"))
        }
        (SnapshotAction::Apply, Cause::BitmapsActive) => within(Problem::new("Device has active dirty bitmaps")),
        (SnapshotAction::Apply, Cause::SnapshotsUnsupported) if failure.format() != Format::Qcow2 => {
            within(Problem::new("Block driver does not support snapshots"))
        }
        (SnapshotAction::Apply, _) => loading(reason(failure)),
        _ => within(reason(failure)),
    }
}

/// Why a bitmap was not changed.
pub fn bitmap(verb: BitmapVerb, name: &str, failure: &Failure) -> Problem {
    let verb = match verb {
        BitmapVerb::Add => "add",
        BitmapVerb::Remove => "remove",
        BitmapVerb::Clear => "clear",
        BitmapVerb::Enable => "enable",
        BitmapVerb::Disable => "disable",
        BitmapVerb::Merge => "merge",
        BitmapVerb::Unspecified => "change",
    };
    let problem = match failure.cause() {
        Cause::BitmapRefused => bitmap_refusal(name, failure),
        _ => reason(failure),
    };
    problem.within(format!("Operation {verb} on bitmap {name} failed"))
}

fn bitmap_refusal(name: &str, failure: &Failure) -> Problem {
    let persistent = |text: &str| Problem::new(format!("Can't make bitmap '{name}' persistent in '{NODE}': {text}"));
    let text = printable(&failure.text);
    match BitmapRefusal::try_from(failure.value as i32).unwrap_or(BitmapRefusal::Unspecified) {
        BitmapRefusal::NotFound => Problem::new(format!("Dirty bitmap '{text}' not found")),
        BitmapRefusal::Exists => Problem::new(format!("Bitmap already exists: {name}")),
        BitmapRefusal::Inconsistent => Problem::new(format!("Bitmap '{text}' is inconsistent and cannot be used"))
            .with_hint("Try block-dirty-bitmap-remove to delete this bitmap from disk"),
        BitmapRefusal::NameEmpty => Problem::new("Bitmap name cannot be empty"),
        BitmapRefusal::NameTooLong => persistent("Name length exceeds maximum (1023 characters)"),
        BitmapRefusal::Granularity => Problem::new("Granularity must be power of 2 and at least 512"),
        BitmapRefusal::TooLarge => persistent("Too much space will be occupied by the bitmap. Use larger granularity"),
        BitmapRefusal::TooMany => persistent("Maximum number of persistent bitmaps is already reached"),
        BitmapRefusal::DirectoryFull => persistent("Not enough space in the bitmap directory"),
        BitmapRefusal::Version => persistent("Cannot store dirty bitmaps in qcow2 v2 files"),
        BitmapRefusal::Unsupported => {
            Problem::new(format!("Can't store persistent bitmaps to {NODE}: {}", os_text(EOPNOTSUPP)))
        }
        BitmapRefusal::Sizes => Problem::new(format!(
            "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged",
            word(&failure.text, 0),
            word(&failure.text, 8)
        )),
        BitmapRefusal::Unspecified => Problem::new(general(failure)),
    }
}

/// What was typed that messages quote.
#[derive(Clone, Copy, Debug, Default)]
pub struct Amended<'a> {
    /// The word behind `compat=`.
    pub compat: &'a str,
    /// The number behind `refcount_bits=`.
    pub refcount_bits: u64,
}

/// Why options were not changed.
pub fn amend(typed: Amended<'_>, failure: &Failure) -> Problem {
    match failure.cause() {
        Cause::AmendUnsupported => Problem::new(no_amendment(failure.format())),
        Cause::AmendRefused => amend_refusal(typed, failure),
        Cause::ResizeRefused => super::motion::resize(failure),
        _ => reason(failure),
    }
}

/// A format whose options can't be changed.
pub fn no_amendment(format: Format) -> String {
    format!("Format driver '{}' does not support option amendment", formats::name(format))
}

fn amend_refusal(typed: Amended<'_>, failure: &Failure) -> Problem {
    let slot = |before: &str, after: &str| Problem::new(format!("{before}{}{after}", failure.value2));
    let text = match AmendRefusal::try_from(failure.value as i32).unwrap_or(AmendRefusal::Unspecified) {
        AmendRefusal::Version => return Problem::new(format!("Unknown compatibility level {}", typed.compat)),
        AmendRefusal::RefcountBits => "Refcount width must be a power of two and may not exceed 64 bits",
        AmendRefusal::RefcountBitsVersion => {
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        }
        AmendRefusal::RefcountTooLarge => {
            return Problem::new(format!(
                "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of {}",
                typed.refcount_bits,
                failure.value2,
                word(&failure.text, 0)
            ));
        }
        AmendRefusal::RefcountTable => {
            "This operation would make the refcount table grow beyond the maximum size supported by QEMU, aborting"
        }
        AmendRefusal::NoDataFile => "data-file can only be set for images that use an external data file",
        AmendRefusal::DataFileRaw => "data-file-raw cannot be set on existing images",
        AmendRefusal::Backing => {
            return Problem::new("Cannot amend the backing file").with_hint("You can use 'qemu-img rebase' instead.");
        }
        AmendRefusal::LazyRefcountsVersion => {
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        }
        AmendRefusal::DowngradeRefcountBits => "compat=0.10 requires refcount_bits=16",
        AmendRefusal::DowngradeDataFile => "Cannot downgrade an image with a data file",
        AmendRefusal::DowngradeSnapshots => "Internal snapshots prevent downgrade of image",
        AmendRefusal::DowngradeFeatures => {
            return Problem::new(format!(
                "Cannot downgrade an image with incompatible features {:#x} set",
                failure.value2
            ));
        }
        AmendRefusal::NoEncryption => "Can't amend encryption options - encryption not present",
        AmendRefusal::OnlyLuks => "Only LUKS encryption options can be amended",
        AmendRefusal::NoSuchSlot => {
            return slot("Invalid keyslot ", " specified, must be between 0 and 7");
        }
        AmendRefusal::SlotActive => {
            return slot("Refusing to overwrite active keyslot ", " - please erase it first");
        }
        AmendRefusal::NoFreeSlot => "Can't add a keyslot - all keyslots are in use",
        AmendRefusal::SlotNotOpened => {
            return slot("Given keyslot ", " doesn't contain the given old password for erase operation");
        }
        // With the blank that qemu-img's message ends with.
        AmendRefusal::SlotInactive => return slot("Given keyslot ", " is already erased (inactive) "),
        AmendRefusal::LastSlot => {
            return slot(
                "Attempt to erase the only active keyslot ",
                " which will erase all the data in the image irreversibly - refusing operation",
            );
        }
        AmendRefusal::NoSlotOpened => "No keyslots match given (old) password for erase operation",
        AmendRefusal::AllSlotsOpened => {
            "All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image irreversibly - refusing operation"
        }
        AmendRefusal::SizeUnaligned => "The new size must be a multiple of 512",
        AmendRefusal::SizeNegative => "Image size cannot be negative",
        AmendRefusal::Unspecified => return Problem::new(general(failure)),
    };
    Problem::new(text)
}

/// The eight bytes at `at`, big-endian; the guest may have sent fewer.
fn word(text: &[u8], at: usize) -> u64 {
    text.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// What went wrong in the middle of the work.
fn reason(failure: &Failure) -> Problem {
    let os = match failure.cause() {
        Cause::Io if failure.os != 0 => failure.os,
        Cause::Io | Cause::CorruptMetadata | Cause::CorruptData => EIO,
        Cause::SnapshotNotFound => ENOENT,
        Cause::SnapshotsUnsupported => EOPNOTSUPP,
        Cause::RefcountOverflow => EINVAL,
        Cause::TooMany => EFBIG,
        Cause::InvalidField => return open_failure(failure),
        _ => return Problem::new(general(failure)),
    };
    Problem::new(os_text(os))
}

#[cfg(test)]
mod tests {
    use instar_guest_protocol::message::Step;

    use super::*;

    fn failure(cause: Cause, value: u64) -> Failure {
        Failure { cause: cause.into(), step: Step::Edit.into(), value, ..Failure::default() }
    }

    #[test]
    fn snapshots() {
        let text = |action, failure: Failure| snapshot(action, "x", &failure).to_string();
        let of_qcow2 = |cause| Failure { format: Format::Qcow2.into(), ..failure(cause, 0) };
        for (action, failure, want) in [
            (
                SnapshotAction::Apply,
                of_qcow2(Cause::SnapshotNotFound),
                "Could not apply snapshot 'x': Failed to load snapshot: No such file or directory",
            ),
            (
                SnapshotAction::Apply,
                of_qcow2(Cause::SnapshotsUnsupported),
                "Could not apply snapshot 'x': Failed to load snapshot: Operation not supported",
            ),
            (
                SnapshotAction::Apply,
                failure(Cause::SnapshotsUnsupported, 0),
                "Could not apply snapshot 'x': Block driver does not support snapshots",
            ),
            (
                SnapshotAction::Delete,
                failure(Cause::SnapshotsUnsupported, 0),
                "Could not delete snapshot 'x': snapshot not found",
            ),
            (
                SnapshotAction::Create,
                of_qcow2(Cause::RefcountOverflow),
                "Could not create snapshot 'x': Invalid argument",
            ),
        ] {
            assert_eq!(text(action, failure), want);
        }
    }

    #[test]
    fn every_refusal_has_a_text() {
        for value in (1..).take_while(|value| BitmapRefusal::try_from(*value).is_ok()) {
            let text = bitmap(BitmapVerb::Add, "b", &failure(Cause::BitmapRefused, value as u64)).to_string();
            assert!(text.starts_with("Operation add on bitmap b failed: ") && !text.contains("gave up"), "{text}");
        }
        for value in (1..).take_while(|value| AmendRefusal::try_from(*value).is_ok()) {
            let text = amend(Amended::default(), &failure(Cause::AmendRefused, value as u64)).to_string();
            assert!(!text.contains("gave up"), "{text}");
        }
        // Numbers that the guest made up.
        bitmap(BitmapVerb::Merge, "b", &failure(Cause::BitmapRefused, u64::MAX));
        amend(Amended::default(), &failure(Cause::AmendRefused, u64::MAX));
    }

    #[test]
    fn numbers_come_as_bytes() {
        let text = [7u64.to_be_bytes(), 9u64.to_be_bytes()].concat();
        let sizes = Failure { text, ..failure(Cause::BitmapRefused, BitmapRefusal::Sizes as u64) };
        assert_eq!(
            bitmap(BitmapVerb::Merge, "b", &sizes).to_string(),
            "Operation merge on bitmap b failed: Bitmaps are of different sizes (destination size is 7, source size is 9) \
             and can't be merged"
        );
    }
}
