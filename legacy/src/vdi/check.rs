use core::fmt;

use instar_blockio::BlockRead;

use super::{Error, Image};
use crate::check::{CheckReport, ClusterSet};

/// Something wrong with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// A block of data, by its number, that two entries of the map refer to.
    Shared(u32),
    /// An entry of the map, by its number, and the block of data that it refers to and that can't be.
    OutOfRange(u32, u32),
    /// The blocks of data that the map refers to, and those that the header counts.
    Count {
        /// By the map.
        is: u32,
        /// By the header.
        should: u32,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared(block) => write!(f, "block of data {block} is referred to more than once"),
            Self::OutOfRange(index, block) => {
                write!(f, "block {index} refers to a block of data {block}, outside the image")
            }
            Self::Count { is, should } => write!(f, "{is} blocks are allocated, the header says {should}"),
        }
    }
}

impl<D: BlockRead> Image<D> {
    /// Looks through the block map for faults. Nothing can be repaired, as with QEMU.
    ///
    /// # Errors
    /// A map that can't be read.
    pub fn check(&self, found: &mut dyn FnMut(Finding)) -> Result<CheckReport, Error> {
        let header = self.header();
        let mut used = ClusterSet::default();
        let mut report = CheckReport::default();
        let mut allocated = 0;
        let stored = self.format.stored_entries(&self.store);
        let mut wrong = |finding| {
            found(finding);
            report.corruption(false);
        };
        // All entries behind the end of the file refer to the first block: one is told for all.
        let absent = header.blocks - stored;
        for index in 0..header.blocks.min(stored.saturating_add(2)) {
            match self.format.entry(&self.store, index.into())? {
                None => {}
                Some(block) if block >= header.blocks => wrong(Finding::OutOfRange(index, block)),
                Some(block) => {
                    allocated += 1;
                    if !used.insert(block.into()) {
                        wrong(Finding::Shared(block));
                    }
                }
            }
        }
        allocated += absent.saturating_sub(2);
        if allocated != header.blocks_allocated {
            wrong(Finding::Count { is: allocated, should: header.blocks_allocated });
        }
        report.corruptions += u64::from(absent.saturating_sub(2));
        Ok(report)
    }
}
