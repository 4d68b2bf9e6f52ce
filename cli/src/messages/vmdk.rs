//! The words of VMDK.

use instar_guest_protocol::message::{Failure, VmdkFault};

use crate::problem::{EINVAL, Problem, printable};

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// What is wrong with an image.
pub fn fault(failure: &Failure) -> Problem {
    use VmdkFault as F;
    let (value, quoted) = (failure.value2, printable(&failure.text));
    let fault = i32::try_from(failure.value).ok().and_then(|fault| F::try_from(fault).ok());
    if fault == Some(F::NoContentId) {
        return Problem::unworded(EINVAL);
    }
    Problem::new(match fault.unwrap_or(F::Unspecified) {
        F::Unspecified | F::NoContentId => "The image is damaged".to_owned(),
        F::Descriptor => "invalid VMDK image descriptor".to_owned(),
        F::ImageType => format!("Unsupported image type '{quoted}'"),
        F::ExtentLine => format!("Invalid extent line: {quoted}"),
        F::ExtentType => format!("Unsupported extent type '{quoted}'"),
        F::ExtentCount => format!("The image has too many extents ({value} or more)"),
        F::Size => "The extents are too large".to_owned(),
        F::Version => format!("Unsupported VMDK version {value}"),
        F::TableSize if value == 0 => "L1 entry size is invalid".to_owned(),
        F::TableSize => "L2 table size too big".to_owned(),
        F::GrainSize => format!("Invalid granularity, image may be corrupt ({value} sectors)"),
        F::DirectorySize => "L1 size too big".to_owned(),
        F::Truncated => format!("File truncated, expecting at least {} bytes", value / SECTOR * SECTOR),
        F::Footer => "The footer of the image is damaged".to_owned(),
        F::SeSparse => format!("The seSparse header has an unsupported value at byte {value}"),
        F::SeSparseDirty => "Image is dirty, Replaying journal not supported".to_owned(),
        F::ExtentMagic => format!("An extent is not in VMDK format (it begins with {value:#010x})"),
        F::ReadOnly => "Images of this type can't be written into".to_owned(),
        F::ParentFormat => "backing_file must be a vmdk image".to_owned(),
        F::ParentCid => {
            format!("The parent was changed since the image was made, or is another one (its CID is {value:08x})")
        }
    })
}
