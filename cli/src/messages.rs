//! What qemu-img says: texts made of typed causes. The guest sends no text of its own.

pub mod edit;
mod legacy;
pub mod motion;
mod vmdk;

use instar_guest_protocol::message::{BitmapFault, Cause, Failure, Field, Format, OptionError, Step};

use crate::formats;
use crate::problem::{EINVAL, Problem, os_text, printable};

/// Largest size of a bitmap directory that QEMU accepts, bytes.
const MAX_BITMAP_DIRECTORY: u64 = 65_535 * 1024;
/// Largest number of bitmaps.
const MAX_BITMAPS: u64 = 65_535;
/// Bytes of the encryption header pointer.
const CRYPTO_POINTER: u64 = 16;
/// Room for the backing format's name, bytes.
const BACKING_FORMAT_ROOM: u64 = 16;
/// `errno`: the file would exceed what the file system holds.
const EFBIG: i32 = 27;

/// Why an image can't be opened, without `Could not open 'F'` around it.
pub fn open_failure(failure: &Failure) -> Problem {
    let format = formats::name(failure.format());
    let text = match failure.cause() {
        Cause::NotInFormat if failure.format() == Format::Vhdx => return Problem::unworded(EINVAL),
        Cause::NotInFormat => match legacy::not_in_format(failure.format()) {
            Some(text) => text.to_owned(),
            None => format!("Image is not in {format} format"),
        },
        Cause::FormatFault => return legacy::format_fault(failure),
        Cause::VmdkFault => return vmdk::fault(failure),
        Cause::FormatNotSupported => not_provided(failure.format()),
        Cause::HeaderTooShort => "qcow2 header too short".to_owned(),
        Cause::UnsupportedVersion => format!("Unsupported {format} version {}", failure.value),
        Cause::UnknownFeatures => {
            let mut names = printable(&failure.text);
            if failure.value2 != 0 {
                let separator = if names.is_empty() { "" } else { ", " };
                names.push_str(&format!("{separator}Unknown incompatible feature: {:x}", failure.value2));
            }
            format!("Unsupported {format} feature(s): {names}")
        }
        Cause::UnsupportedClusterSize => format!("Unsupported cluster size: 2^{}", failure.value),
        Cause::ImageTooBig => "Image is too big".to_owned(),
        Cause::InvalidField if failure.value == Field::SnapshotEntry as u64 => {
            return Problem::new(field(failure))
                .with_hint("You can force-remove this extra metadata with qemu-img check -r all");
        }
        Cause::InvalidField => field(failure),
        Cause::Unrecognised => {
            "The file has no known header, partition table or file system, and --require-known-raw forbids to \
                                take it for raw (give the format with -f raw)"
                .to_owned()
        }
        Cause::MarkedDirty => "The image was not closed cleanly; it can't be written before it is repaired".to_owned(),
        Cause::MarkedCorrupt => "qcow2: Image is corrupt; cannot be opened read/write".to_owned(),
        Cause::Encrypted if failure.format() == Format::Luks => {
            "Parameter 'key-secret' is required for cipher".to_owned()
        }
        Cause::Encrypted => "Parameter 'encrypt.key-secret' is required for cipher".to_owned(),
        Cause::WrongPassphrase => "Invalid password, cannot unlock any keyslot".to_owned(),
        Cause::KeyIterations => {
            format!("Deriving the key takes {} iterations (--max-key-iterations allows more)", failure.value)
        }
        Cause::KeyMemory => {
            format!("Deriving the key takes {} bytes of memory (--max-guest-memory allows more)", failure.value)
        }
        Cause::LuksInvalid => luks_fault(failure),
        Cause::CorruptMetadata => format!("The image's metadata is corrupt (at offset {})", failure.value),
        Cause::ChainTooDeep => format!("The backing chain is longer than {} images", failure.value),
        Cause::BackingFormatNeeded => {
            return Problem::new("Its format is not recorded, and it refers to further files")
                .with_hint("Record the format of the backing file in the image that names it (rebase -u -F FMT).");
        }
        Cause::BackingUnsupported => "Driver doesn't support backing files".to_owned(),
        Cause::UnknownBackingFormat => format!("Unknown driver '{}'", printable(&failure.text)),
        Cause::ParentMismatch => format!(
            "The parent is not the image that this one was made on, or was changed since (wanted: {})",
            printable(&failure.text)
        ),
        Cause::TooMany => format!("The image has too many entries ({})", failure.value),
        _ => general(failure),
    };
    Problem::new(text)
}

/// What is wrong with the header of a LUKS volume.
fn luks_fault(failure: &Failure) -> String {
    use instar_guest_protocol::message::LuksFault as F;
    let text = printable(&failure.text);
    let (high, low) = (failure.value2 >> 32, failure.value2 & u64::from(u32::MAX));
    let value = failure.value2;
    let fault = i32::try_from(failure.value).ok().and_then(|value| F::try_from(value).ok()).unwrap_or_default();
    match fault {
        F::NotLuks => "Volume is not in LUKS format".to_owned(),
        F::Version => format!("LUKS version {value} is not supported"),
        F::CipherName => "LUKS header cipher name is not NUL terminated".to_owned(),
        F::CipherMode => "LUKS header cipher mode is not NUL terminated".to_owned(),
        F::HashSpec => "LUKS header hash spec is not NUL terminated".to_owned(),
        F::ModeFormat => format!("Unexpected cipher mode string format '{text}'"),
        F::UnknownCipher | F::KeySize => format!("Algorithm '{text}' with key size {value} bytes not supported"),
        F::UnknownMode => format!("Cipher mode '{text}' not supported"),
        F::UnknownIvGen => format!("IV generator '{text}' not supported"),
        F::UnknownIvHash | F::UnknownHash => format!("Hash algorithm '{text}' not supported"),
        F::WideBlocks => format!("Unsupported cipher mode {text}"),
        F::Essiv => format!("No cipher {text} with key size {value} available"),
        F::PayloadInHeader => "LUKS payload is overlapping with the header".to_owned(),
        F::NoIterations => "LUKS key iteration count is zero".to_owned(),
        F::SlotNoIterations => format!("Keyslot {value} iteration count is zero"),
        F::SlotState => format!("Keyslot {value} state (active/disable) is corrupted"),
        F::SlotStripes => format!("Keyslot {high} is corrupted (stripes {low} != 4000)"),
        F::SlotInHeader => format!("Keyslot {value} is overlapping with the LUKS header"),
        F::SlotInPayload => format!("Keyslot {value} is overlapping with the encrypted payload"),
        F::SlotsOverlap => format!("Keyslots {high} and {low} are overlapping in the header"),
        F::Checksum => "Both LUKS headers are damaged".to_owned(),
        F::Metadata => "The metadata of the LUKS header is corrupt".to_owned(),
        F::PayloadPastEnd => "Could not refresh total sector count: Input/output error".to_owned(),
        F::Unsupported | F::Unspecified => "The LUKS volume has a feature that is not supported".to_owned(),
    }
}

/// Why an image can't be created, without the target's name before it.
pub fn create_failure(failure: &Failure, target: Format) -> Problem {
    let text = match failure.cause() {
        Cause::SizeTooLarge => size_too_large(target),
        Cause::Io if failure.os == EFBIG => size_too_large(target),
        Cause::Io => format!("Could not resize file: {}", os_text(failure.os)),
        Cause::InvalidOptions => match OptionError::try_from(failure.value as i32) {
            Ok(error) => legacy::option_error(error, failure.value2).unwrap_or_else(|| option_error(error).to_owned()),
            Err(_) => general(failure),
        },
        Cause::TargetTooSmall => "The device is too small for the image".to_owned(),
        _ => return open_failure(failure),
    };
    Problem::new(text)
}

/// What went wrong once everything was open.
pub fn work_failure(failure: &Failure) -> Problem {
    let bitmap = printable(&failure.text);
    let text = match (failure.step(), failure.cause()) {
        (_, Cause::TargetTooSmall) => "output file is smaller than input file".to_owned(),
        (_, Cause::CompressionUnsupported) => "Compression not supported for this file format".to_owned(),
        (_, Cause::CompressedPreallocation) => {
            "Compression and preallocation not supported at the same time".to_owned()
        }
        (_, Cause::BitmapsUnsupported) => "Source lacks bitmap support".to_owned(),
        (_, Cause::BitmapInconsistent) => {
            return Problem::new(format!("Cannot copy inconsistent bitmap '{bitmap}'"))
                .with_hint("Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it");
        }
        (Step::Snapshot, Cause::SnapshotNotFound) if failure.format() == Format::Qcow2 => {
            "Failed to load snapshot: Can't find snapshot".to_owned()
        }
        (Step::Snapshot, Cause::SnapshotNotFound) => format!(
            "Failed to load snapshot: Block format '{}' used by device '' does not support temporarily loading internal snapshots",
            formats::name(failure.format())
        ),
        (Step::Snapshot, _) => return open_failure(failure).within("Failed to load snapshot"),
        (Step::Read, _) => format!("error while reading at byte {}: {}", failure.value, io_reason(failure)),
        (Step::Write, _) => format!("error while writing at byte {}: {}", failure.value, io_reason(failure)),
        (Step::Bitmaps, _) => format!("Failed to copy bitmap '{bitmap}': {}", general(failure)),
        _ => general(failure),
    };
    Problem::new(text)
}

/// As [`work_failure`], of `dd`.
pub fn block_failure(failure: &Failure) -> Problem {
    match failure.step() {
        Step::Read => Problem::new(format!("error while reading from input image file: {}", io_reason(failure))),
        Step::Write => Problem::new(format!("error while writing to output image file: {}", io_reason(failure))),
        _ => work_failure(failure),
    }
}

/// Something that does not end the run.
pub fn warning(failure: &Failure) -> String {
    match failure.cause() {
        Cause::FooterCopyUsed => {
            "The footer at the beginning of the VHD image is damaged, the one at its end was used".to_owned()
        }
        Cause::EndFooterLost => {
            "The footer at the end of the VHD image is damaged or missing, the one at its beginning was used".to_owned()
        }
        Cause::UnreadableChunks => legacy::unreadable_chunks(failure.value),
        Cause::BitmapInconsistent => format!("Skipping inconsistent bitmap '{}'", printable(&failure.text)),
        _ => format!("error while reading offset {}: {}", failure.value, io_reason(failure)),
    }
}

/// A format that qemu-img has and this version lacks.
pub fn not_provided(format: Format) -> String {
    format!("The format '{}' is not provided by this version", formats::name(format))
}

/// The virtual size exceeds what the format or the file system holds.
pub fn size_too_large(target: Format) -> String {
    let hint = match target {
        Format::Vhdx => return "Image size too large; max of 64TB".to_owned(),
        Format::Qcow2 => " (try using a larger cluster size)",
        _ => "",
    };
    format!("The image size is too large for file format '{}'{hint}", formats::name(target))
}

/// What an I/O error is called in the middle of the work.
pub fn io_reason(failure: &Failure) -> String {
    match failure.cause() {
        Cause::OutOfMemory | Cause::Unsupported => general(failure),
        _ if failure.os != 0 => os_text(failure.os),
        _ => os_text(5),
    }
}

/// Causes that mean the same wherever they occur.
fn general(failure: &Failure) -> String {
    match failure.cause() {
        Cause::Io => os_text(if failure.os == 0 { 5 } else { failure.os }),
        Cause::OpenRefused => "A file that the image needs could not be opened".to_owned(),
        Cause::CorruptMetadata | Cause::CorruptData => format!("The image is corrupt (at offset {})", failure.value),
        Cause::Unsupported => "The image uses a feature that this version does not provide".to_owned(),
        Cause::OutOfMemory => "The sandbox needs more memory than it is allowed (see --max-guest-memory)".to_owned(),
        Cause::TargetIsSource => "The target is one of the files to be read".to_owned(),
        Cause::SizeTooLarge => "The image is too large".to_owned(),
        Cause::SnapshotNotFound => "Can't find snapshot".to_owned(),
        cause => format!("The sandbox gave up ({cause:?})"),
    }
}

fn field(failure: &Failure) -> String {
    let value = failure.value2;
    let Ok(field) = Field::try_from(failure.value as i32) else { return general(failure) };
    let text = match field {
        Field::HeaderLength => "qcow2 header exceeds cluster size",
        Field::BackingOffset => "Invalid backing file offset",
        Field::BackingLength => "Backing file name too long",
        Field::RefcountOrder => "Reference count entry width too large; may not exceed 64 bits",
        Field::EncryptionMethod => return format!("Unsupported encryption method {}", value as i32),
        Field::L1Size => "Active L1 table too large",
        Field::L1Offset => "Active L1 table offset invalid",
        Field::L1TooSmall => "L1 table is too small",
        Field::RefcountTableSize => "Reference count table too large",
        Field::RefcountTableOffset => "Reference count table offset invalid",
        Field::RefcountTableMissing => "Image does not contain a reference count table",
        Field::SnapshotTableSize => "Snapshot table too large",
        Field::SnapshotTableOffset => "Snapshot table offset invalid",
        Field::SnapshotEntry => return format!("Too much extra metadata in snapshot table entry {value}"),
        Field::SnapshotL1Size => "Snapshot L1 table too large",
        Field::SnapshotL1Offset => "Snapshot L1 table offset invalid",
        Field::ExtensionLength => "Header extension too large",
        Field::Extension => "A header extension contradicts the header",
        Field::CompressionType => return format!("qcow2: unknown compression type: {value}"),
        Field::CompressionBitSet => "qcow2: Compression type incompatible feature bit must not be set",
        Field::CompressionBitMissing => "qcow2: Compression type incompatible feature bit must be set",
        Field::ExtendedL2ClusterSize => return format!("Unsupported subcluster size: {value}"),
        Field::BitmapDirectory => return bitmap_directory(failure),
        Field::EncryptionHeader => "Volume is not in LUKS format",
        Field::DataFileUnexpected => "'data-file' can only be set for images with an external data file",
        Field::DataFileMissing => "'data-file' is required for this image",
        Field::BackingFormatLength => {
            return format!("ERROR: ext_backing_format: len={value} too large (>={BACKING_FORMAT_ROOM})");
        }
        Field::CryptoUnexpected => "CRYPTO header extension only expected with LUKS encryption method",
        Field::CryptoLength => {
            return format!("CRYPTO header extension size {value}, but expected size {CRYPTO_POINTER}");
        }
        Field::CryptoOffset => {
            return format!("Encryption header offset '{value}' is not a multiple of cluster size");
        }
        Field::CryptoMissing => "Missing CRYPTO header for crypt method 2",
        Field::BitmapsLength => "bitmaps_ext: Invalid extension length",
        Field::BitmapsReserved => "bitmaps_ext: Reserved field is not zero",
        Field::BitmapsCount => {
            return format!(
                "bitmaps_ext: Image has {value} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
            );
        }
        Field::BitmapsNone => "found bitmaps extension with zero bitmaps",
        Field::BitmapsOffset => "bitmaps_ext: invalid bitmap directory offset",
        Field::BitmapsSize => {
            return format!(
                "bitmaps_ext: bitmap directory size ({value}) exceeds the maximum supported size \
                 ({MAX_BITMAP_DIRECTORY})"
            );
        }
        Field::SizeOverflow => "Could not refresh total sector count: File too large",
        Field::SnapshotTableBytes => "Snapshot table is too large",
        Field::RawFlagWithoutDataFile => "data-file-raw requires a data file",
        Field::VhdxHeader => "No valid VHDX header found",
        Field::VhdxRegionTable => "The region table of the VHDX image is not valid",
        Field::VhdxRegion => "A region of the VHDX image has an impossible place",
        Field::VhdxUnknownRequired => "The VHDX image requires a feature that is not known",
        Field::VhdxMetadata => "The metadata of the VHDX image are not valid",
        Field::VhdxBlockSize => return format!("Unsupported VHDX block size: {value}"),
        Field::VhdxSectorSize => return format!("Unsupported VHDX sector size: {value}"),
        Field::VhdxVirtualSize => return format!("Invalid VHDX virtual disk size: {value}"),
        Field::VhdxBatSize => return format!("The VHDX BAT is too small ({value} entries)"),
        Field::VhdxParentLocator => "The parent locator of the VHDX image is not valid",
        Field::VhdxLog => "The log of the VHDX image can't be replayed",
        Field::VhdxBlockState => return format!("VHDX BAT entry {value} has an invalid state."),
        Field::VhdxBlockStart => {
            return format!(
                "VHDX BAT entry {value} start offset points after end of file. Image has probably been truncated."
            );
        }
        Field::VhdxBlockEnd => {
            return format!(
                "VHDX BAT entry {value} end offset points after end of file. Image has probably been truncated."
            );
        }
        Field::VhdxBlockOverlap => return format!("The block of VHDX BAT entry {value} overlaps with a region"),
        Field::VhdxBlockBitmap => return format!("The block of VHDX BAT entry {value} has no sector bitmap"),
        Field::VhdTooShort => "File too small for a VHD header",
        Field::VhdChecksum => "Incorrect header checksum",
        Field::VhdDiskType => return format!("Unknown VHD disk type {value}"),
        Field::VhdHeader => "Error reading dynamic VHD header",
        Field::VhdHeaderMark => "Invalid header magic",
        Field::VhdBlockSize => return format!("Invalid block size {value}"),
        Field::VhdTableTooSmall => "Page table too small",
        Field::VhdTableTooLarge => return format!("Max Table Entries too large ({value})"),
        Field::VhdTablePlace => "Error reading pagetable",
        Field::VhdTruncated => {
            "block-vpc: free_data_block_offset points after the end of file. The image has been truncated."
        }
        Field::VhdDifferencingWrite => "Differencing VHD images can't be written by this version",
        Field::VhdSize => "File too large",
        Field::VhdxDifferencingWrite => "Differencing VHDX images can't be written by this version",
        // A field that is newer than this table.
        _ => "A header field is invalid",
    };
    text.to_owned()
}

fn bitmap_directory(failure: &Failure) -> String {
    let name = printable(&failure.text);
    match BitmapFault::try_from(failure.value2 as i32).unwrap_or(BitmapFault::Unspecified) {
        BitmapFault::Empty => "Requested bitmap_directory_size is zero".to_owned(),
        BitmapFault::Broken => "Broken bitmap directory".to_owned(),
        BitmapFault::MoreThanSaid => "More bitmaps found than specified in header extension".to_owned(),
        BitmapFault::FewerThanSaid => "Less bitmaps found than specified in header extension".to_owned(),
        BitmapFault::ExtraData => "Bitmap extra data is not supported".to_owned(),
        BitmapFault::Constraints => format!("Bitmap '{name}' doesn't satisfy the constraints"),
        BitmapFault::Duplicate => format!("Bitmap already exists: {name}"),
        BitmapFault::Table | BitmapFault::TableSize => {
            format!("Could not read bitmap_table table from image for bitmap '{name}'")
        }
        BitmapFault::Unspecified => "Broken bitmap directory".to_owned(),
    }
}

fn option_error(error: OptionError) -> &'static str {
    match error {
        OptionError::ClusterSize => "Cluster size must be a power of two between 512 and 2048k",
        OptionError::RefcountBits => "Refcount width must be a power of two and may not exceed 64 bits",
        OptionError::LazyRefcountsVersion => {
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        }
        OptionError::RefcountBitsVersion => {
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"
        }
        OptionError::ExtendedL2Version => {
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        }
        OptionError::ExtendedL2ClusterSize => {
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
        }
        OptionError::CompressionVersion => {
            "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or \
             greater)"
        }
        OptionError::DataFileVersion => {
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        }
        OptionError::DataFileRawAlone => "data-file-raw requires data-file",
        OptionError::BackingWithDataFileRaw => "Backing file and data-file-raw cannot be used at the same time",
        OptionError::BackingWithPreallocation => {
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        }
        OptionError::Preallocation => "Unsupported preallocation mode: metadata",
        OptionError::Version => "The compatibility level is unknown",
        OptionError::BackingFormatAlone => "Backing format cannot be used without backing file",
        OptionError::BackingNameLength => "Backing file name too long",
        OptionError::BackingFormatLength => "Backing format name too long",
        OptionError::VhdxBlockSize => "Block size must be a power of two",
        OptionError::VhdxLogSizeZero => "Log size must be a multiple of 1 MB",
        OptionError::VhdxLogSizeTooLarge => "Log size must be smaller than 4 GB",
        _ => "The creation options contradict each other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(cause: Cause) -> Failure {
        Failure { cause: cause.into(), format: Format::Qcow2.into(), ..Failure::default() }
    }

    #[test]
    fn opening() {
        let text = |failure: Failure| open_failure(&failure).to_string();
        assert_eq!(text(failure(Cause::NotInFormat)), "Image is not in qcow2 format");
        assert_eq!(text(Failure { value: 9, ..failure(Cause::UnsupportedVersion) }), "Unsupported qcow2 version 9");
        assert_eq!(
            text(Failure { value: 3 << 62, value2: 1 << 63, text: b"a".to_vec(), ..failure(Cause::UnknownFeatures) }),
            "Unsupported qcow2 feature(s): a, Unknown incompatible feature: 8000000000000000"
        );
        assert_eq!(
            text(Failure { value: 40, ..failure(Cause::UnsupportedClusterSize) }),
            "Unsupported cluster size: 2^40"
        );
        assert_eq!(
            text(Failure { value: Field::L1Offset as u64, ..failure(Cause::InvalidField) }),
            "Active L1 table offset invalid"
        );
    }

    #[test]
    fn every_field_and_option_has_a_text() {
        for value in (1..200).filter(|value| Field::try_from(*value).is_ok()) {
            let text = open_failure(&Failure { value: value as u64, ..failure(Cause::InvalidField) }).to_string();
            assert!(!text.contains("gave up") && text != "A header field is invalid", "{value}");
        }
        for value in (1..200).filter(|value| OptionError::try_from(*value).is_ok()) {
            let failure = Failure { value: value as u64, ..failure(Cause::InvalidOptions) };
            let text = create_failure(&failure, Format::Qcow2).to_string();
            assert!(!text.contains("gave up") && !text.contains("contradict each other"), "{value}");
        }
    }

    #[test]
    fn numbers_that_the_guest_made_up_are_no_panic() {
        for value in [99, u64::MAX] {
            open_failure(&Failure { value, cause: 999, step: 999, ..failure(Cause::InvalidField) });
            create_failure(&Failure { value, ..failure(Cause::InvalidOptions) }, Format::Raw);
            work_failure(&Failure { value, cause: -1, step: -1, ..Failure::default() });
        }
    }

    #[test]
    fn working() {
        let step = |step: Step, cause| Failure { step: step.into(), ..failure(cause) };
        assert_eq!(
            work_failure(&Failure { value: 4096, os: 5, ..step(Step::Read, Cause::Io) }).to_string(),
            "error while reading at byte 4096: Input/output error"
        );
        assert_eq!(
            work_failure(&Failure { os: 28, ..step(Step::Write, Cause::Io) }).to_string(),
            "error while writing at byte 0: No space left on device"
        );
        assert_eq!(
            work_failure(&step(Step::Snapshot, Cause::SnapshotNotFound)).to_string(),
            "Failed to load snapshot: Can't find snapshot"
        );
        assert_eq!(
            create_failure(&Failure { os: EFBIG, ..step(Step::Create, Cause::Io) }, Format::Raw).to_string(),
            "The image size is too large for file format 'raw'"
        );
    }
}
