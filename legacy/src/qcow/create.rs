use alloc::vec::Vec;
use core::fmt;

use instar_blockio::{BlockWrite, FileId, ZeroMode};

use super::header::{HEADER_LEN, Header, MAX_BACKING_NAME, MAX_L1_ENTRIES};
use super::layout::Layout;
use super::{Error, Writer};
use crate::store::{SECTOR, Store};

/// What a new image is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to sectors; not 0.
    pub size: u64,
    /// Name of the backing file. Clusters then have 512 bytes, so that none is ever written in part.
    pub backing_file: Option<Vec<u8>>,
}

/// What is wrong with the options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionError {
    /// A disk without bytes.
    SizeZero,
    /// More bytes than an image can have that can be opened.
    SizeTooLarge(u64),
    /// Length of a backing file name of more than 1023 bytes.
    BackingNameTooLong(usize),
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SizeZero => f.write_str("the disk has no bytes"),
            Self::SizeTooLarge(size) => write!(f, "disk of {size} bytes is too large"),
            Self::BackingNameTooLong(len) => write!(f, "backing file name of {len} bytes"),
        }
    }
}

impl core::error::Error for OptionError {}

impl CreateOptions {
    fn header(&self) -> Result<Header, OptionError> {
        let too_large = OptionError::SizeTooLarge(self.size);
        let size = self.size.checked_next_multiple_of(SECTOR).ok_or(too_large)?;
        let backing_file = self.backing_file.clone().filter(|name| !name.is_empty());
        let (cluster_bits, l2_bits) = if backing_file.is_some() { (9, 12) } else { (12, 9) };
        let name_len = backing_file.as_ref().map_or(0, Vec::len);
        let l1_offset = (HEADER_LEN + name_len as u64).next_multiple_of(8);
        let header = Header { size, cluster_bits, l2_bits, encrypted: false, l1_offset, backing_file };
        match header.l1_entries() {
            0 => Err(OptionError::SizeZero),
            _ if name_len > MAX_BACKING_NAME as usize => Err(OptionError::BackingNameTooLong(name_len)),
            entries if entries > MAX_L1_ENTRIES => Err(too_large),
            _ => Ok(header),
        }
    }

    /// Checks them.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn check(&self) -> Result<(), OptionError> {
        self.header().map(|_| ())
    }
}

/// Makes an image in `file`, which is empty (or a device).
///
/// # Errors
/// Options that contradict each other, or the file's error.
pub fn create<D: BlockWrite>(mut file: D, id: FileId, options: &CreateOptions) -> Result<Writer<D>, Error> {
    let header = options.header()?;
    // The table is written in sectors, wherever it begins.
    let end = header.l1_offset + (header.l1_entries() * 8).next_multiple_of(SECTOR);
    if !file.limits().grows {
        file.write_zeroes(0, end, ZeroMode::KeepAllocated)?;
    }
    Ok(Writer::new(Store::new(file, false), Layout::of(&header, end), id, true))
}
