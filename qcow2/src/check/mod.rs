//! Checking an image: what refers to each cluster of the file, and whether the reference counts agree.
//!
//! ```text
//!   tables ──► counts ──► compare ──► report
//!                            └──► repair (the counts are corrected, or made anew; entries get the right COPIED flag)
//! ```
//!
//! The tables are walked once. What is kept is one byte for each cluster of the file that something refers to.

mod compare;
mod counts;
mod repair;
mod tables;

use core::fmt;

use instar_blockio::check::{CheckReport, Repair};
use instar_blockio::{BlockRead, BlockWrite};

use crate::error::Result;
use crate::open::Image;
use compare::Checker;

/// Something wrong with an image, in the order in which QEMU tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// Something refers to a range that ends a cluster or more behind the end of the file.
    BehindEnd {
        /// Its offset in the file.
        offset: u64,
        /// Its length, bytes.
        len: u64,
    },
    /// More references to a cluster than its count can say.
    CountOverflow {
        /// The cluster's offset.
        offset: u64,
    },
    /// An L1 entry with reserved bits.
    L1Reserved {
        /// The entry.
        entry: u64,
    },
    /// An L2 table that does not begin with a cluster.
    L2Unaligned {
        /// Its offset.
        offset: u64,
    },
    /// An L2 entry with reserved bits.
    L2Reserved {
        /// The entry.
        entry: u64,
    },
    /// A compressed cluster said to be referred to once.
    CompressedCopied {
        /// Where its stream begins.
        offset: u64,
    },
    /// A compressed cluster in an image whose data lie in another file.
    CompressedInDataFile {
        /// The number of the entry in its table.
        index: u64,
        /// The entry.
        entry: u64,
    },
    /// A compressed cluster with subclusters.
    CompressedSubclusters {
        /// The number of the entry in its table.
        index: u64,
        /// The entry.
        entry: u64,
    },
    /// A cluster that does not begin where one can.
    ClusterUnaligned {
        /// Its offset.
        offset: u64,
        /// It reads as zero.
        zero: bool,
    },
    /// An entry of the refcount table with reserved bits.
    RefcountTableReserved {
        /// Its number.
        index: u64,
    },
    /// A refcount block that does not begin with a cluster.
    BlockUnaligned {
        /// The number of its entry.
        index: u64,
    },
    /// A refcount block behind the end of the file.
    BlockOutside {
        /// The number of its entry.
        index: u64,
    },
    /// A refcount block that something else refers to as well.
    BlockShared {
        /// The number of its entry.
        index: u64,
        /// How often it is referred to.
        count: u64,
    },
    /// A count that is not the number of references.
    Count {
        /// The cluster.
        cluster: u64,
        /// The count.
        stored: u64,
        /// How often it is referred to.
        referenced: u64,
        /// It is corrected.
        repaired: bool,
    },
    /// An L1 entry whose COPIED flag does not agree with the count.
    CopiedTable {
        /// The number of the entry.
        index: u64,
        /// The entry.
        entry: u64,
        /// The count.
        count: u64,
        /// It is corrected.
        repaired: bool,
    },
    /// An L2 entry whose COPIED flag does not agree with the count.
    CopiedCluster {
        /// The entry.
        entry: u64,
        /// The count.
        count: u64,
        /// It is corrected.
        repaired: bool,
    },
    /// The refcount structures are made anew.
    Rebuilding,
    /// They would have to be made anew, which was not allowed.
    RebuildNeeded,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::BehindEnd { offset, len } => write!(f, "{len} bytes at {offset:#x} lie behind the end of the file"),
            Self::CountOverflow { offset } => write!(f, "too many references to the cluster at {offset:#x}"),
            Self::L1Reserved { entry } => write!(f, "L1 entry {entry:#x} has reserved bits"),
            Self::L2Unaligned { offset } => write!(f, "the L2 table at {offset:#x} does not begin with a cluster"),
            Self::L2Reserved { entry } => write!(f, "L2 entry {entry:#x} has reserved bits"),
            Self::CompressedCopied { offset } => write!(f, "the compressed cluster at {offset:#x} is marked as copied"),
            Self::CompressedInDataFile { entry, .. } => write!(f, "entry {entry:#x} is compressed beside a data file"),
            Self::CompressedSubclusters { entry, .. } => write!(f, "compressed entry {entry:#x} has subclusters"),
            Self::ClusterUnaligned { offset, .. } => write!(f, "the cluster at {offset:#x} is not aligned"),
            Self::RefcountTableReserved { index } => write!(f, "refcount table entry {index} has reserved bits"),
            Self::BlockUnaligned { index } => write!(f, "refcount block {index} does not begin with a cluster"),
            Self::BlockOutside { index } => write!(f, "refcount block {index} lies behind the end of the file"),
            Self::BlockShared { index, count } => write!(f, "refcount block {index} is referred to {count} times"),
            Self::Count { cluster, stored, referenced, .. } => {
                write!(f, "cluster {cluster} has count {stored} and {referenced} references")
            }
            Self::CopiedTable { index, count, .. } => write!(f, "L1 entry {index} with count {count}: COPIED is wrong"),
            Self::CopiedCluster { entry, count, .. } => {
                write!(f, "L2 entry {entry:#x} with count {count}: COPIED is wrong")
            }
            Self::Rebuilding => f.write_str("making new refcount structures"),
            Self::RebuildNeeded => f.write_str("the refcount structures would have to be made anew"),
        }
    }
}

impl<D: BlockRead> Image<D> {
    /// Checks the image. Each fault is handed to `found`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io): a table that can't be read; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn check(&self, found: &mut dyn FnMut(Finding)) -> Result<CheckReport> {
        let mut checker = Checker::new(self, found);
        checker.count()?;
        let highest = checker.compare(Repair::default(), &mut |_, _| Ok(()))?;
        checker.copied(&mut |_, _| Ok(()), false)?;
        Ok(checker.finish(highest))
    }

    /// Checks the image and repairs what is allowed, through `file`, the image's own file.
    ///
    /// Written in an order that leaves, after a crash at any point, an image whose disk is what it was: counts are raised
    /// before flags are set, a new refcount table is complete before the header names it, and the old one is given
    /// back afterwards.
    ///
    /// `Ok(None)`: the refcount structures would have to be made anew, which `repair` does not allow; nothing was changed.
    ///
    /// # Errors
    /// As [`check`](Self::check); also what `file` reports.
    pub fn repair<W: BlockWrite>(
        &self,
        file: &mut W,
        repair: Repair,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Option<CheckReport>> {
        repair::run(self, file, repair, found)
    }
}
