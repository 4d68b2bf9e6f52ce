//! What is wrong with an image that can be opened.

use alloc::vec::Vec;
use core::fmt;

use instar_blockio::BlockRead;

use crate::bat::bitmap_place;
use crate::error::{EntryFault, Error, Result};
use crate::header::Header;
use crate::open::Image;
use crate::region::{self, Area};

/// Blocks whose places are compared with each other, at most: 64 MiB of memory, and 4 TiB of data in blocks of 1 MiB.
const MAX_COMPARED: usize = 1 << 22;

/// One thing that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// A BAT entry that can't be.
    Entry {
        /// BAT index.
        index: u64,
        /// The entry.
        entry: u64,
        /// What can't be.
        fault: EntryFault,
    },
    /// Two entries claim the same bytes of the file.
    SharedBlock {
        /// BAT index of the one that lies further in front.
        first: u64,
        /// BAT index of the other.
        second: u64,
        /// Where the common bytes begin in the file.
        at: u64,
    },
    /// Only one of the two headers is valid.
    DamagedHeader,
    /// One of the region tables is damaged, or they differ: which, 0 or 1.
    DamagedRegionTable(u8),
    /// The log holds changes that were not carried out.
    DirtyLog,
}

impl Finding {
    /// Data may be wrong, or further writes may damage it. The other findings are repaired by the next writer.
    pub fn is_corruption(&self) -> bool {
        matches!(self, Self::Entry { .. } | Self::SharedBlock { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Entry { index, entry, fault } => Error::Entry { index, entry, fault }.fmt(f),
            Self::SharedBlock { first, second, at } => {
                write!(f, "blocks of BAT entries {first} and {second} overlap at offset {at}")
            }
            Self::DamagedHeader => f.write_str("one of the headers is damaged"),
            Self::DamagedRegionTable(slot) => write!(f, "region table {} is damaged or differs", slot + 1),
            Self::DirtyLog => f.write_str("the log holds changes that were not carried out"),
        }
    }
}

/// The numbers of a check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Findings that are [corruptions](Finding::is_corruption).
    pub corruptions: u64,
    /// Payload blocks of the disk.
    pub total_blocks: u64,
    /// Payload blocks that have a place in the file.
    pub allocated_blocks: u64,
    /// Where the last thing in the file ends, bytes.
    pub image_end_offset: u64,
}

/// Looks at all of an image's metadata, whose file is `file`, and tells `found` each thing that is wrong.
///
/// The image must have been opened without [`check_bat`](crate::OpenOptions::check_bat), which refuses what is looked for here. Takes time for the
/// whole BAT and memory for at most 4 million places.
///
/// # Errors
/// The device's error.
pub fn check<D: BlockRead>(image: &Image<D>, found: &mut dyn FnMut(Finding)) -> Result<CheckReport> {
    let mut report = CheckReport {
        total_blocks: image.geometry().blocks(),
        image_end_offset: image.regions.end(),
        ..CheckReport::default()
    };
    let mut tell = |report: &mut CheckReport, finding: Finding| {
        report.corruptions += u64::from(finding.is_corruption());
        found(finding);
    };
    if image.is_dirty() {
        tell(&mut report, Finding::DirtyLog);
    }
    if Header::count_valid(image.pages.file())? < 2 {
        tell(&mut report, Finding::DamagedHeader);
    }
    for slot in damaged_tables(image)? {
        tell(&mut report, Finding::DamagedRegionTable(slot));
    }
    let mut places: Vec<(Area, u64)> = Vec::new();
    let rules = image.rules();
    image.entries(u64::MAX, |index, entry| {
        let mut fault = |report: &mut CheckReport, fault| tell(report, Finding::Entry { index, entry, fault });
        match rules.claim(index, entry) {
            Err(wrong) => fault(&mut report, wrong),
            Ok(None) => {}
            Ok(Some(area)) => {
                let faults = rules.faults(area, rules.used(index));
                faults.into_iter().flatten().for_each(|wrong| fault(&mut report, wrong));
                if faults.iter().all(Option::is_none) {
                    report.image_end_offset = report.image_end_offset.max(area.end());
                    if places.len() < MAX_COMPARED {
                        places.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                        places.push((area, index));
                    }
                }
                report.allocated_blocks += u64::from(image.geometry().block_of_entry(index).is_some());
            }
        }
        Ok(())
    })?;
    partial_blocks(image, &mut |finding| tell(&mut report, finding))?;
    places.sort_unstable_by_key(|(area, index)| (area.at, *index));
    for pair in places.windows(2) {
        if let [(a, first), (b, second)] = pair
            && a.overlaps(*b)
        {
            tell(&mut report, Finding::SharedBlock { first: *first, second: *second, at: b.at });
        }
    }
    Ok(report)
}

/// Which region tables are not as they should be: both valid and equal.
fn damaged_tables<D: BlockRead>(image: &Image<D>) -> Result<Vec<u8>> {
    let tables = [region::table(&image.pages, 0)?, region::table(&image.pages, 1)?];
    let mut damaged: Vec<u8> = (0..2).filter(|&slot| tables[usize::from(slot)].is_none()).collect();
    if damaged.is_empty() && tables[0] != tables[1] {
        damaged.push(1);
    }
    Ok(damaged)
}

/// Partially present blocks without a sector bitmap.
fn partial_blocks<D: BlockRead>(image: &Image<D>, found: &mut dyn FnMut(Finding)) -> Result<()> {
    if !image.has_parent() {
        return Ok(());
    }
    let geometry = image.geometry();
    // The entries of a chunk come before that of its bitmap, so the first one waits for it.
    let mut waiting: Option<(u64, u64)> = None;
    let mut finish = |waiting: Option<(u64, u64)>| {
        if let Some((index, entry)) = waiting {
            found(Finding::Entry { index, entry, fault: EntryFault::NoBitmap });
        }
    };
    image.entries(u64::MAX, |index, entry| {
        let bitmap_of = |index: u64| geometry.block_of_entry(index).map(|block| geometry.bitmap_entry_of(block));
        match bitmap_of(index) {
            Some(own) => {
                if waiting.is_some_and(|(first, _)| bitmap_of(first) != Some(own)) {
                    finish(waiting.take());
                }
                if matches!(crate::bat::Block::decode(entry), crate::bat::Block::Partial(_)) {
                    waiting.get_or_insert((index, entry));
                }
            }
            None => {
                let is_own = waiting.is_some_and(|(first, _)| bitmap_of(first) == Some(index));
                let first = waiting.take();
                if !is_own || bitmap_place(entry).is_none() {
                    finish(first);
                }
            }
        }
        Ok(())
    })?;
    finish(waiting);
    Ok(())
}
