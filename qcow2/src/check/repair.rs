//! Repairs: counts one by one where that is enough, the whole refcount structure otherwise.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use instar_blockio::check::{CheckReport, Repair};
use instar_blockio::{BlockRead, BlockWrite, zeroed};

use super::Finding;
use super::compare::Checker;
use super::counts::REACH;
use crate::addr::Geometry;
use crate::error::Result;
use crate::header::Incompatible;
use crate::open::Image;
use crate::refcount::{count_at, set_count};

/// Places of header fields: the refcount table's offset and length in clusters, and the incompatible features.
const REFCOUNT_TABLE_FIELD: u64 = 48;
const INCOMPATIBLE_FIELD: u64 = 72;
/// Entries of a refcount table are limited as QEMU limits them: 8 MiB.
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// Checks and repairs.
pub(super) fn run<D: BlockRead, W: BlockWrite>(
    image: &Image<D>,
    file: &mut W,
    repair: Repair,
    found: &mut dyn FnMut(Finding),
) -> Result<Option<CheckReport>> {
    let mut checker = Checker::new(image, found);
    checker.count()?;
    let mut highest = checker.compare(Repair::default(), &mut |_, _| Ok(()))?;
    if checker.rebuild && repair.corruptions {
        checker.tell(Finding::Rebuilding);
        highest = rebuild(&mut checker, file)?;
        let report = checker.report;
        checker.report =
            CheckReport { corruptions_fixed: report.corruptions, leaks_fixed: report.leaks, ..CheckReport::default() };
    } else if checker.rebuild {
        checker.tell(Finding::RebuildNeeded);
        return Ok(None);
    } else if checker.report.leaks > 0 || checker.report.corruptions > 0 {
        let (before, blocks) = (checker.report, checker.blocks.clone());
        let geometry = image.header.geometry;
        checker.report = CheckReport::default();
        checker.compare(repair, &mut |cluster, count| put_count(file, geometry, &blocks, cluster, count))?;
        // What was found in the tables themselves is not repaired by counts.
        let counts = checker.report.corruptions + checker.report.corruptions_fixed;
        checker.report.corruptions += before.corruptions.saturating_sub(counts);
        file.flush()?;
    }
    let clean = checker.report.corruptions == 0 && checker.report.leaks == 0;
    let flags = repair.corruptions || (repair.leaks && clean);
    checker.copied(&mut |at, entry| Ok(file.write_at(at, &entry.to_be_bytes())?), flags)?;
    file.flush()?;
    if checker.report.corruptions == 0 && checker.report.check_errors == 0 && image.header.version >= 3 {
        clear_marks(image, file)?;
    }
    Ok(Some(checker.finish(highest)))
}

/// The image is neither dirty nor corrupt any more.
fn clear_marks<D: BlockRead, W: BlockWrite>(image: &Image<D>, file: &mut W) -> Result<()> {
    let marks = Incompatible::DIRTY | Incompatible::CORRUPT;
    let features = image.header.incompatible;
    if features.intersects(marks) {
        file.write_at(INCOMPATIBLE_FIELD, &features.difference(marks).bits().to_be_bytes())?;
        file.flush()?;
    }
    Ok(())
}

/// Changes a count in its block.
fn put_count<W: BlockWrite>(file: &mut W, geometry: Geometry, blocks: &[u64], cluster: u64, count: u64) -> Result<()> {
    let (per_block, order) = (geometry.refcounts_per_block(), geometry.refcount_order());
    let number = usize::try_from(cluster / per_block).ok();
    let Some(&block) = number.and_then(|number| blocks.get(number)).filter(|at| **at != 0) else { return Ok(()) };
    let index = cluster % per_block;
    let (skip, len, first) = match order {
        0..3 => ((index << order) / 8, 1, ((index << order) % 8) >> order),
        _ => (index << (order - 3), 1 << (order - 3), 0),
    };
    let mut bytes = [0; 8];
    file.read_at(block + skip, &mut bytes[..len])?;
    if count_at(&bytes, order, first as usize) != count {
        set_count(&mut bytes, order, first as usize, count);
        file.write_at(block + skip, &bytes[..len])?;
    }
    Ok(())
}

/// Makes a new refcount table with new blocks, and gives the old ones back. Gives the highest cluster in use.
fn rebuild<D: BlockRead, W: BlockWrite>(checker: &mut Checker<'_, D>, file: &mut W) -> Result<u64> {
    let header = checker.header();
    let geometry = header.geometry;
    let cluster = geometry.cluster_size();
    let per_block = geometry.refcounts_per_block();
    let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
    let mut next = 0;
    // Blocks for all that is in use; they take clusters themselves.
    assign_blocks(checker, &mut blocks, &mut next);
    // The table in one piece. Its own clusters may need further blocks, and these a longer table: a few rounds settle that.
    let (table, table_clusters) = loop {
        let entries = blocks.keys().next_back().map_or(1, |last| last + 1);
        // One more than needed, for blocks that the table itself makes necessary.
        let wanted = ((entries + 1) * 8).div_ceil(cluster);
        if wanted * cluster > MAX_TABLE_BYTES.max(cluster) {
            return Err(crate::Error::ImageTooBig(header.virtual_size));
        }
        let place = free_run(checker, next, wanted);
        for number in place..place + wanted {
            checker.counts.add(number, 1);
        }
        assign_blocks(checker, &mut blocks, &mut next);
        let entries = blocks.keys().next_back().map_or(1, |last| last + 1);
        if entries * 8 <= wanted * cluster {
            break (place, wanted);
        }
    };
    for (&number, &place) in &blocks {
        let mut block = zeroed(cluster as usize)?;
        for index in 0..per_block {
            let count = checker.counts.get(number * per_block + index);
            if count > 0 {
                set_count(&mut block, geometry.refcount_order(), index as usize, count);
            }
        }
        file.write_at(place << geometry.cluster_bits(), &block)?;
    }
    let mut bytes = zeroed((table_clusters * cluster) as usize)?;
    for (&number, &place) in &blocks {
        let at = (number * 8) as usize;
        bytes[at..at + 8].copy_from_slice(&(place << geometry.cluster_bits()).to_be_bytes());
    }
    file.write_at(table << geometry.cluster_bits(), &bytes)?;
    file.flush()?;
    let mut field = [0; 12];
    field[..8].copy_from_slice(&(table << geometry.cluster_bits()).to_be_bytes());
    field[8..].copy_from_slice(&(table_clusters as u32).to_be_bytes());
    file.write_at(REFCOUNT_TABLE_FIELD, &field)?;
    file.flush()?;
    give_back(checker, file, &blocks)?;
    let used = checker.counts.pages().flat_map(|page| page..page + REACH);
    Ok(used.filter(|&number| checker.counts.get(number) > 0).last().unwrap_or(0))
}

/// Finds a place for each block that is needed and has none.
fn assign_blocks<D: BlockRead>(checker: &mut Checker<'_, D>, blocks: &mut BTreeMap<u64, u64>, next: &mut u64) {
    let per_block = checker.header().geometry.refcounts_per_block();
    loop {
        let pages: Vec<u64> = checker.counts.pages().collect();
        let numbers = pages.iter().flat_map(|page| page / per_block..=(page + REACH - 1) / per_block);
        let missing: BTreeSet<u64> = numbers
            .filter(|number| !blocks.contains_key(number))
            .filter(|number| is_used(checker, number * per_block, per_block))
            .collect();
        if missing.is_empty() {
            return;
        }
        for number in missing {
            let place = checker.counts.first_free(*next);
            checker.counts.add(place, 1);
            blocks.insert(number, place);
            *next = place + 1;
        }
    }
}

/// Is any of these clusters in use?
fn is_used<D: BlockRead>(checker: &Checker<'_, D>, first: u64, count: u64) -> bool {
    checker.counts.first_free(first) > first
        || checker
            .counts
            .pages()
            .filter(|page| page + REACH > first && *page < first + count)
            .any(|page| (page.max(first)..(page + REACH).min(first + count)).any(|at| checker.counts.get(at) > 0))
}

/// The first of `count` free clusters in a row, from `from` on.
fn free_run<D: BlockRead>(checker: &Checker<'_, D>, from: u64, count: u64) -> u64 {
    let mut start = checker.counts.first_free(from);
    let mut at = start;
    while at < start + count {
        if checker.counts.get(at) > 0 {
            start = checker.counts.first_free(at);
            at = start;
        } else {
            at += 1;
        }
    }
    start
}

/// The clusters of the old table and its blocks, which nothing refers to now.
fn give_back<D: BlockRead, W: BlockWrite>(
    checker: &mut Checker<'_, D>,
    file: &mut W,
    blocks: &BTreeMap<u64, u64>,
) -> Result<()> {
    let header = checker.header();
    let geometry = header.geometry;
    let last = blocks.keys().next_back().map_or(0, |last| *last as usize);
    let mut places = alloc::vec![0; last + 1];
    for (&number, &place) in blocks {
        places[number as usize] = place << geometry.cluster_bits();
    }
    let table = header.refcount_table_offset.0 >> geometry.cluster_bits();
    let old_table = table..table + u64::from(header.refcount_table_clusters);
    let mut old: Vec<u64> = old_table.collect();
    old.extend(checker.blocks.iter().filter(|at| **at != 0).map(|at| at >> geometry.cluster_bits()));
    old.sort_unstable();
    old.dedup();
    for cluster in old {
        // More references: something else lies there, by mistake.
        if checker.counts.get(cluster) == 1 {
            checker.tell(Finding::Count { cluster, stored: 1, referenced: 0, repaired: true });
            put_count(file, geometry, &places, cluster, 0)?;
            checker.counts.remove(cluster);
        }
    }
    file.flush()?;
    Ok(())
}
