use core::fmt;

use instar_blockio::{BlockWrite, FileId, ZeroMode};
use zerocopy::FromZeros;
use zerocopy::byteorder::little_endian::{U32, U64};

use super::header::{Header, MAGIC_CLUSTERS, MAX_CLUSTER_SECTORS, MAX_ENTRIES, RawHeader, TABLE_OFFSET, VERSION};
use super::layout::Layout;
use super::{Error, Writer};
use crate::store::{SECTOR, Store};

/// Made-up geometry, as QEMU's.
const HEADS: u32 = 16;
const SECTORS_PER_TRACK: u64 = 32;

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to sectors.
    pub size: u64,
    /// Bytes of a cluster, rounded up to sectors.
    pub cluster_size: u64,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self { size: 0, cluster_size: 1 << 20 }
    }
}

/// What is wrong with the options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionError {
    /// Bytes of a cluster: too many.
    ClusterTooLarge(u64),
    /// More bytes than a table of such clusters can hold that can be read.
    SizeTooLarge(u64),
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClusterTooLarge(size) => write!(f, "clusters of {size} bytes"),
            Self::SizeTooLarge(size) => write!(f, "disk of {size} bytes is too large for the clusters"),
        }
    }
}

impl core::error::Error for OptionError {}

impl CreateOptions {
    fn header(&self) -> Result<Header, OptionError> {
        let too_large = OptionError::SizeTooLarge(self.size);
        let cluster_size = self.cluster_size.checked_next_multiple_of(SECTOR);
        let cluster_size = cluster_size.filter(|size| size / SECTOR <= MAX_CLUSTER_SECTORS.into());
        let cluster_size = cluster_size.ok_or(OptionError::ClusterTooLarge(self.cluster_size))?;
        let size = self.size.checked_next_multiple_of(SECTOR).ok_or(too_large)?;
        let entries = size.checked_next_multiple_of(cluster_size.max(1)).map(|size| size / cluster_size.max(1));
        let entries = entries.filter(|&entries| cluster_size > 0 && entries <= MAX_ENTRIES.into()).ok_or(too_large)?;
        let table_end = (TABLE_OFFSET + entries * 4).next_multiple_of(cluster_size);
        // All below the limits just checked; cylinders mean nothing and are cut off.
        let mut raw = RawHeader::new_zeroed();
        raw.magic = *MAGIC_CLUSTERS;
        raw.version = U32::new(VERSION);
        raw.heads = U32::new(HEADS);
        raw.cylinders = U32::new((size / SECTOR / u64::from(HEADS) / SECTORS_PER_TRACK) as u32);
        raw.cluster_sectors = U32::new((cluster_size / SECTOR) as u32);
        raw.entries = U32::new(entries as u32);
        raw.sectors = U64::new(size / SECTOR);
        raw.data_offset = U32::new((table_end / SECTOR) as u32);
        let mut header = Header::parse(raw).map_err(|_| too_large)?;
        header.data_start = table_end;
        Ok(header)
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
/// Options that can't be met, or the file's error.
pub fn create<D: BlockWrite>(mut file: D, id: FileId, options: &CreateOptions) -> Result<Writer<D>, Error> {
    let header = options.header()?;
    if !file.limits().grows {
        file.write_zeroes(0, header.data_start, ZeroMode::KeepAllocated)?;
    }
    Ok(Writer::new(Store::new(file, false), Layout::of(header), id, true))
}
