//! What is wrong with an image that can be opened.

use alloc::vec::Vec;
use core::fmt;

use instar_blockio::{BlockRead, BlockWrite};

use crate::error::{Error, Result};
use crate::footer::{FOOTER, is_good};
use crate::geometry::SECTOR;
use crate::header::HEADER;
use crate::open::{Image, end_footer_at, read_footer};
use crate::write::copy_footer;

/// Blocks whose places are compared with each other, at most: 32 MiB of memory.
const MAX_COMPARED: usize = 1 << 22;

/// One thing that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// The footer at the beginning is damaged.
    FrontFooter,
    /// The footer at the end is damaged or missing.
    EndFooter,
    /// Both footers are good and differ.
    FootersDiffer,
    /// The dynamic header has a wrong checksum.
    HeaderChecksum,
    /// A block ends behind the end of the file.
    Outside {
        /// Its number.
        block: u32,
        /// Where it begins in the file, bytes.
        at: u64,
    },
    /// A block lies over the footer, the header or the table at the beginning.
    OverMetadata {
        /// Its number.
        block: u32,
        /// Where it begins in the file, bytes.
        at: u64,
    },
    /// Two blocks claim the same bytes of the file.
    SharedBlock {
        /// The one that lies further in front.
        first: u32,
        /// The other.
        second: u32,
        /// Where the other begins, bytes.
        at: u64,
    },
}

impl Finding {
    /// Data may be wrong; the other findings concern copies and sums.
    pub fn is_corruption(&self) -> bool {
        matches!(self, Self::Outside { .. } | Self::OverMetadata { .. } | Self::SharedBlock { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::FrontFooter => f.write_str("the footer at the beginning of the file is damaged"),
            Self::EndFooter => f.write_str("the footer at the end of the file is damaged or missing"),
            Self::FootersDiffer => f.write_str("the footers at the two ends of the file differ"),
            Self::HeaderChecksum => f.write_str("the dynamic header has a wrong checksum"),
            Self::Outside { block, at } => write!(f, "block {block} at offset {at} ends behind the end of the file"),
            Self::OverMetadata { block, at } => write!(f, "block {block} at offset {at} lies over the image's tables"),
            Self::SharedBlock { first, second, at } => write!(f, "blocks {first} and {second} overlap at offset {at}"),
        }
    }
}

/// The numbers of a check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Findings that are [corruptions](Finding::is_corruption).
    pub corruptions: u64,
    /// All other findings.
    pub damages: u64,
    /// Blocks of the disk.
    pub total_blocks: u64,
    /// Blocks that have a place in the file.
    pub allocated_blocks: u64,
    /// Where the last thing in the file ends, the footer excepted, bytes.
    pub image_end_offset: u64,
}

/// Looks at all of an image's metadata and tells `found` each thing that is wrong.
///
/// The image must have been opened without [`check_table`](crate::OpenOptions::check_table), which refuses what is looked for here. Takes time for
/// the whole table and memory for at most 4 million places.
///
/// # Errors
/// The device's error.
pub fn check<D: BlockRead>(image: &Image<D>, found: &mut dyn FnMut(Finding)) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let mut tell = |report: &mut CheckReport, finding: Finding| {
        *(if finding.is_corruption() { &mut report.corruptions } else { &mut report.damages }) += 1;
        found(finding);
    };
    let Some(header) = image.header() else {
        report.image_end_offset = image.virtual_size();
        return Ok(report);
    };
    let file = image.pages.file();
    let front = read_footer(file, 0)?;
    let back = read_footer(file, end_footer_at(file.size()).ok_or(Error::TooShort(file.size()))?)?;
    match (is_good(&front), is_good(&back)) {
        (false, _) => tell(&mut report, Finding::FrontFooter),
        (true, false) => tell(&mut report, Finding::EndFooter),
        (true, true) if front != back => tell(&mut report, Finding::FootersDiffer),
        (true, true) => {}
    }
    if !header.checksum_ok {
        tell(&mut report, Finding::HeaderChecksum);
    }
    let header_at = image.footer().data_offset;
    let areas = [
        (0, FOOTER as u64),
        (header_at, header_at.saturating_add(HEADER as u64)),
        (header.table_offset, header.table_offset.saturating_add(u64::from(header.entries) * 4)),
    ];
    let len = header.bitmap_len() + u64::from(header.block_size);
    report.total_blocks = image.virtual_size().div_ceil(header.block_size.into());
    report.image_end_offset = areas.iter().map(|(_, end)| *end).max().unwrap_or(0);
    let mut places: Vec<(u32, u32)> = Vec::new();
    image.entries(u32::MAX, |block, entry| {
        let at = u64::from(entry) * SECTOR;
        report.allocated_blocks += 1;
        if at + len > image.file_len() {
            tell(&mut report, Finding::Outside { block, at });
            return Ok(());
        }
        report.image_end_offset = report.image_end_offset.max(at + len);
        if areas.iter().any(|(start, end)| at < *end && *start < at + len) {
            tell(&mut report, Finding::OverMetadata { block, at });
        }
        if places.len() < MAX_COMPARED && places.try_reserve(1).is_ok() {
            places.push((entry, block));
        }
        Ok(())
    })?;
    places.sort_unstable();
    for pair in places.windows(2) {
        let [(first_entry, first), (entry, second)] = [pair[0], pair[1]];
        let at = u64::from(entry) * SECTOR;
        if u64::from(first_entry) * SECTOR + len > at {
            tell(&mut report, Finding::SharedBlock { first, second, at });
        }
    }
    Ok(report)
}

/// Writes the footer that counts over its damaged or differing copy, or behind the last block if that copy is missing; says
/// whether there was anything to do.
///
/// # Errors
/// As [`Image::open`], or the device's error.
pub fn repair<D: BlockWrite>(file: &mut D) -> Result<bool> {
    let options = crate::OpenOptions { check_table: false, ..Default::default() };
    let image = Image::open(&*file, Default::default(), &options)?;
    if image.header().is_none() {
        return Ok(false);
    }
    let end = end_footer_at(file.size()).ok_or(Error::TooShort(file.size()))?;
    let copy_used = image.is_copy_used();
    let blocks_end = check(&image, &mut |_| {})?.image_end_offset.next_multiple_of(SECTOR);
    drop(image);
    if copy_used {
        copy_footer(file, end, 0)?;
        return Ok(true);
    }
    if read_footer(file, 0)? == read_footer(file, end)? {
        return Ok(false);
    }
    // Cut off together with the footer, a block must not lose its last sector to it.
    copy_footer(file, 0, end.max(blocks_end))?;
    Ok(true)
}
