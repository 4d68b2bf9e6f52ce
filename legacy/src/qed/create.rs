use alloc::vec::Vec;
use core::fmt;

use instar_blockio::{BlockWrite, FileId, ZeroMode};

use super::header::{CLUSTER_SIZES, Features, HEADER_LEN, Header, MAX_BACKING_NAME, TABLE_SIZES};
use super::layout::Layout;
use super::{Error, Writer};
use crate::store::{SECTOR, Store};

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to sectors.
    pub size: u64,
    /// Bytes of a cluster: a power of two from 4 KiB to 64 MiB.
    pub cluster_size: u64,
    /// Clusters of a table: a power of two from 2 to 16.
    pub table_size: u64,
    /// Name of the backing file.
    pub backing_file: Option<Vec<u8>>,
    /// Format of the backing file; only that it is raw is recorded.
    pub backing_format: Option<Vec<u8>>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self { size: 0, cluster_size: 65536, table_size: 4, backing_file: None, backing_format: None }
    }
}

/// What is wrong with the options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionError {
    /// Not a size that clusters can have.
    ClusterSize(u64),
    /// Not a size that tables can have.
    TableSize(u64),
    /// Tables of one cluster, which QEMU makes and then refuses to read.
    TableOfOneCluster,
    /// More than the tables hold: that is how much.
    SizeTooLarge(u64),
    /// Length of a backing file name that does not fit the header's cluster.
    BackingNameTooLong(usize),
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClusterSize(size) => write!(f, "clusters of {size} bytes"),
            Self::TableSize(size) => write!(f, "tables of {size} clusters"),
            Self::TableOfOneCluster => f.write_str("tables of one cluster can't be read"),
            Self::SizeTooLarge(most) => write!(f, "more than the {most} bytes that the tables hold"),
            Self::BackingNameTooLong(len) => write!(f, "backing file name of {len} bytes"),
        }
    }
}

impl core::error::Error for OptionError {}

impl CreateOptions {
    fn header(&self) -> Result<Header, OptionError> {
        let sized = |size: u64, allowed: core::ops::RangeInclusive<u32>| {
            u32::try_from(size).ok().filter(|size| size.is_power_of_two() && allowed.contains(size))
        };
        let cluster_size =
            sized(self.cluster_size, CLUSTER_SIZES).ok_or(OptionError::ClusterSize(self.cluster_size))?;
        let table_size = sized(self.table_size, TABLE_SIZES).ok_or(OptionError::TableSize(self.table_size))?;
        let backing_file = self.backing_file.clone().filter(|name| !name.is_empty());
        let backing_len = backing_file.as_ref().map_or(0, Vec::len);
        let mut features = 0;
        if backing_file.is_some() {
            features |= Features::BACKING.0;
            if self.backing_format.as_deref() == Some(b"raw") {
                features |= Features::BACKING_IS_RAW.0;
            }
        }
        let mut header = Header {
            cluster_size,
            table_size,
            header_size: 1,
            features: Features(features),
            compatible: 0,
            autoclear: 0,
            l1_offset: cluster_size.into(),
            image_size: 0,
            backing_offset: if backing_file.is_some() { HEADER_LEN } else { 0 },
            backing_len: backing_len as u32,
            backing_file,
        };
        let too_large = OptionError::SizeTooLarge(u64::try_from(header.max_size()).unwrap_or(u64::MAX));
        header.image_size = self.size.checked_next_multiple_of(SECTOR).ok_or(too_large)?;
        if header.check_sizes().is_err() {
            return Err(too_large);
        }
        if table_size == 1 {
            return Err(OptionError::TableOfOneCluster);
        }
        if backing_len > MAX_BACKING_NAME.min(cluster_size - HEADER_LEN) as usize {
            return Err(OptionError::BackingNameTooLong(backing_len));
        }
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
/// Options that contradict each other, or the file's error.
pub fn create<D: BlockWrite>(mut file: D, id: FileId, options: &CreateOptions) -> Result<Writer<D>, Error> {
    let layout = Layout::fresh(options.header()?);
    if !file.limits().grows {
        file.write_zeroes(0, layout.file_end(), ZeroMode::KeepAllocated)?;
    }
    Ok(Writer::new(Store::new(file, false), layout, id, true))
}
