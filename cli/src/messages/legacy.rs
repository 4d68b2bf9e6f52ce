//! The words of the older formats.

use instar_guest_protocol::message::{Failure, Format, FormatFault, OptionError};

use crate::problem::{EINVAL, Problem, printable};

/// Largest VDI disk, bytes.
const MAX_VDI: u64 = 0x1_ffff_f800_0000;
/// Most blocks of a VDI disk.
const MAX_VDI_BLOCKS: u32 = 0x1fff_ff80;
/// Most sectors and most bytes of a chunk of an Apple disk image.
const MAX_CHUNK_SECTORS: u32 = 131_072;
const MAX_CHUNK_BYTES: u32 = 64 << 20;
/// Bytes of a cluster of QED, and clusters of its tables.
const QED_CLUSTERS: (u32, u32) = (4096, 64 << 20);
const QED_TABLES: (u32, u32) = (1, 16);
/// Most blocks of a compressed loop image.
const MAX_CLOOP_BLOCKS: u32 = 536_870_911;

/// The bytes are not those of the format, where qemu-img has words of its own for that.
pub fn not_in_format(format: Format) -> Option<&'static str> {
    Some(match format {
        Format::Qcow => "Image not in qcow format",
        Format::Qed => "Image not in QED format",
        Format::Parallels => "Image not in Parallels format",
        Format::Bochs => "Image not in Bochs format",
        Format::Vpc => "invalid VPC image",
        _ => return None,
    })
}

/// What is wrong with an image.
pub fn format_fault(failure: &Failure) -> Problem {
    use FormatFault as F;
    let value = failure.value2;
    let second = printable(&failure.text);
    let fault = i32::try_from(failure.value).ok().and_then(|fault| F::try_from(fault).ok());
    let text = match fault.unwrap_or(F::Unspecified) {
        F::Unspecified => "The image is damaged",
        F::QcowVersion => return qcow_version(value),
        F::QcowSize => "Image size is too small (must be at least 2 bytes)",
        F::QcowClusterSize => "Cluster size must be between 512 and 64k",
        F::QcowL2Size => "L2 table size must be between 512 and 64k",
        F::QcowEncryption => "invalid encryption method in qcow header",
        F::QcowTooLarge => "Image too large",
        F::QcowBackingLength => "Backing file name too long",
        F::QedFeatures => return Problem::new(format!("Unsupported QED features: {value:x}")),
        F::QedClusterSize => "QED cluster size is invalid",
        F::QedTableSize => "QED table size is invalid",
        F::QedImageSize => "QED image size is invalid",
        F::QedTableOffset => "QED table offset is invalid",
        F::QedHeaderSize => "QED header size is too large",
        F::QedBackingOffset => "QED backing filename offset is invalid",
        F::QedBackingLength => "Failed to read backing filename: Invalid argument",
        F::QedDamaged => "Image corrupted",
        F::DmgTooShort => "dmg file must be at least 512 bytes long",
        F::DmgTrailer => "Could not locate UDIF trailer in dmg file",
        F::DmgInvalid => return Problem::unworded(EINVAL),
        F::ParallelsTracks => "Invalid image: Zero sectors per track",
        F::ParallelsCluster => "Invalid image: Too big cluster",
        F::ParallelsCatalog => "Catalog too large",
        F::ParallelsSize => "Could not refresh total sector count: File too large",
        F::BochsCatalogSize => "Catalog size is too large",
        F::BochsExtentSmall => "Extent size must be at least 512",
        F::BochsCatalogSmall => "Catalog size is too small for this disk size",
        F::CloopBlockZero => "block_size cannot be zero",
        F::CloopOffsets => "image requires too many offsets, try increasing block size",
        other => return Problem::new(with_numbers(other, value, &second)),
    };
    Problem::new(text)
}

/// Texts that quote numbers of the image.
fn with_numbers(fault: FormatFault, value: u64, second: &str) -> String {
    use FormatFault as F;
    let unsupported = |text: String| format!("unsupported VDI image ({text})");
    match fault {
        F::VdiSize => vdi_size(value),
        F::VdiSignature => format!("Image not in VDI format (bad signature {value:08x})"),
        F::VdiVersion => unsupported(format!("version {}.{}", value >> 16, value & 0xffff)),
        F::VdiMapOffset => unsupported(format!("unaligned block map offset {value:#x}")),
        F::VdiDataOffset => unsupported(format!("unaligned data offset {value:#x}")),
        F::VdiSectorSize => unsupported(format!("sector size {value} is not 512")),
        F::VdiBlockSize => unsupported(format!("block size {value} is not 1048576")),
        F::VdiMapSize => unsupported(format!("disk size {value}, image bitmap has room for {second}")),
        F::VdiLink => unsupported("non-NULL link UUID".to_owned()),
        F::VdiParent => unsupported("non-NULL parent UUID".to_owned()),
        F::VdiBlocks => unsupported(format!("too many blocks {value}, max is {MAX_VDI_BLOCKS}")),
        F::DmgChunkSectors => {
            format!("sector count {value} for chunk {second} is larger than max ({MAX_CHUNK_SECTORS})")
        }
        F::DmgChunkLength => format!("length {value} for chunk {second} is larger than max ({MAX_CHUNK_BYTES})"),
        F::BochsExtentPower => format!("Extent size {value} is not a power of two"),
        F::BochsExtentLarge => format!("Extent size {value} is too large"),
        F::CloopBlockSize => format!("block_size {value} must be a multiple of 512"),
        F::CloopBlockLarge => format!("block_size {value} must be 64 MB or less"),
        F::CloopBlocks => format!("n_blocks {value} must be {MAX_CLOOP_BLOCKS} or less"),
        F::CloopOrder => {
            format!("offsets not monotonically increasing at index {value}, image file is corrupt")
        }
        F::CloopStream => format!("invalid compressed block size at index {value}, image file is corrupt"),
        _ => "The image is damaged".to_owned(),
    }
}

fn qcow_version(version: u64) -> Problem {
    let problem = Problem::new(format!("qcow (v1) does not support qcow version {version}"));
    match version {
        2 | 3 => problem.with_hint("Try the 'qcow2' driver instead."),
        _ => problem,
    }
}

fn vdi_size(size: u64) -> String {
    format!("Unsupported VDI image size (size is {size:#x}, max supported is {MAX_VDI:#x})")
}

/// What is wrong with creation options of an older format.
pub fn option_error(error: OptionError, value: u64) -> Option<String> {
    use OptionError as E;
    Some(match error {
        E::QcowSizeZero => "Image size is too small, cannot be zero length".to_owned(),
        E::QcowSizeTooLarge => "Image too large".to_owned(),
        E::QedClusterSize => {
            let (least, most) = QED_CLUSTERS;
            format!("QED cluster size must be within range [{least}, {most}] and power of 2")
        }
        E::QedTableSize => {
            let (least, most) = QED_TABLES;
            format!("QED table size must be within range [{least}, {most}] and power of 2")
        }
        E::QedTableOfOneCluster => "QED images with tables of one cluster can't be opened".to_owned(),
        E::QedImageSize => {
            format!("QED image size must be a non-zero multiple of cluster size and less than {value} bytes")
        }
        E::VdiSize => vdi_size(value),
        E::ParallelsClusterSize => "Cluster size is too large".to_owned(),
        E::ParallelsImageSize => "Image size is too large for this cluster size".to_owned(),
        _ => return None,
    })
}

/// Chunks of an Apple disk image that can't be read.
pub fn unreadable_chunks(kind: u64) -> String {
    let module = match kind {
        0x8000_0006 => Some(("dmg-bzip2", "bzip2")),
        0x8000_0007 => Some(("dmg-lzfse", "lzfse")),
        _ => None,
    };
    match module {
        Some((module, codec)) => {
            format!("{module} module is missing, accessing {codec} compressed blocks will result in I/O errors")
        }
        None => format!("Image contains chunks of unknown type {kind:x}, accessing them will result in I/O errors"),
    }
}

#[cfg(test)]
mod tests {
    use instar_guest_protocol::message::Cause;

    use super::*;

    fn text(fault: FormatFault, value2: u64, second: &str) -> String {
        let failure = Failure {
            cause: Cause::FormatFault.into(),
            value: fault as u64,
            value2,
            text: second.as_bytes().to_vec(),
            ..Failure::default()
        };
        format_fault(&failure).to_string()
    }

    #[test]
    fn faults() {
        assert_eq!(
            text(FormatFault::QcowVersion, 2, ""),
            "qcow (v1) does not support qcow version 2\nTry the 'qcow2' driver instead."
        );
        assert_eq!(text(FormatFault::QcowVersion, 5, ""), "qcow (v1) does not support qcow version 5");
        assert_eq!(text(FormatFault::QedFeatures, 8, ""), "Unsupported QED features: 8");
        assert_eq!(
            text(FormatFault::VdiSignature, 0xbeda_1000, ""),
            "Image not in VDI format (bad signature beda1000)"
        );
        assert_eq!(text(FormatFault::VdiVersion, 0x10000, ""), "unsupported VDI image (version 1.0)");
        assert_eq!(
            text(FormatFault::VdiMapSize, 10_486_272, "10485760"),
            "unsupported VDI image (disk size 10486272, image bitmap has room for 10485760)"
        );
        assert_eq!(
            text(FormatFault::VdiSize, u64::MAX, ""),
            "Unsupported VDI image size (size is 0xffffffffffffffff, max supported is 0x1fffff8000000)"
        );
        assert_eq!(
            text(FormatFault::DmgChunkSectors, 131_073, "0"),
            "sector count 131073 for chunk 0 is larger than max (131072)"
        );
        assert_eq!(text(FormatFault::CloopBlocks, 4_278_190_083, ""), "n_blocks 4278190083 must be 536870911 or less");
    }

    #[test]
    fn chunks() {
        assert_eq!(
            unreadable_chunks(0x8000_0006),
            "dmg-bzip2 module is missing, accessing bzip2 compressed blocks will result in I/O errors"
        );
        assert_eq!(
            unreadable_chunks(0x8000_0004),
            "Image contains chunks of unknown type 80000004, accessing them will result in I/O errors"
        );
    }
}
