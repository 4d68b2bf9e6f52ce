//! BAT entries: spec chapter 2.5.1.

use crate::error::{EntryFault, Error, Region, Result};
use crate::format::{BAT_PLACE_MASK, BAT_STATE_MASK, BITMAP_BLOCK};
use crate::geometry::Geometry;
use crate::region::{Area, Regions};

/// What a payload block's entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// Not here: the parent answers.
    NotPresent,
    /// Zero, undefined or unmapped: nobody is asked, and it reads as zero.
    Zero,
    /// All here: where.
    Full(u64),
    /// The sector bitmap says which sectors are here: where they would lie.
    Partial(u64),
    /// A state with no meaning.
    Invalid,
}

pub(crate) const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
pub(crate) const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
pub(crate) const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;
/// The state of a sector bitmap block that exists.
const BITMAP_PRESENT: u64 = 6;

impl Block {
    pub(crate) fn decode(entry: u64) -> Self {
        let place = entry & BAT_PLACE_MASK;
        match entry & BAT_STATE_MASK {
            NOT_PRESENT => Self::NotPresent,
            UNDEFINED | ZERO | UNMAPPED => Self::Zero,
            FULLY_PRESENT => Self::Full(place),
            PARTIALLY_PRESENT => Self::Partial(place),
            _ => Self::Invalid,
        }
    }
}

/// The place of a sector bitmap block, if it exists.
pub(crate) fn bitmap_place(entry: u64) -> Option<u64> {
    (entry & BAT_STATE_MASK == BITMAP_PRESENT).then_some(entry & BAT_PLACE_MASK)
}

/// The entry of a block that is all present.
pub(crate) fn full(place: u64) -> u64 {
    place & BAT_PLACE_MASK | FULLY_PRESENT
}

/// What an entry is checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules<'a> {
    pub geometry: Geometry,
    pub regions: &'a Regions,
    pub has_parent: bool,
    /// Bytes of the file.
    pub file_len: u64,
}

impl Rules<'_> {
    /// The run of the file that an entry claims, if any.
    ///
    /// # Errors
    /// The first fault, in the order in which QEMU looks for them.
    pub(crate) fn check(&self, index: u64, entry: u64) -> Result<Option<Area>> {
        let fault = |fault| Err(Error::Entry { index, entry, fault });
        match self.claim(index, entry) {
            Ok(None) => Ok(None),
            Ok(Some(area)) => match self.faults(area, self.used(index)).into_iter().flatten().next() {
                Some(found) => fault(found),
                None => Ok(Some(area)),
            },
            Err(found) => fault(found),
        }
    }

    /// The run of the file that an entry claims, if any, wherever that lies.
    pub(crate) fn claim(&self, index: u64, entry: u64) -> Result<Option<Area>, EntryFault> {
        if self.geometry.block_of_entry(index).is_none() {
            return Ok(bitmap_place(entry).map(|at| Area { at, len: BITMAP_BLOCK }));
        }
        match Block::decode(entry) {
            Block::Full(at) => Ok(Some(Area { at, len: self.geometry.block_size() })),
            Block::Partial(at) if self.has_parent => Ok(Some(Area { at, len: self.geometry.block_size() })),
            Block::NotPresent | Block::Zero => Ok(None),
            Block::Partial(_) | Block::Invalid => Err(EntryFault::State),
        }
    }

    /// Bytes of the block that the disk uses. A file may end behind the last of them.
    pub(crate) fn used(&self, index: u64) -> u64 {
        self.geometry.block_of_entry(index).map_or(BITMAP_BLOCK, |block| self.geometry.block_len(block))
    }

    /// What is wrong with the place of a block of which `used` bytes count.
    pub(crate) fn faults(&self, area: Area, used: u64) -> [Option<EntryFault>; 3] {
        let end = area.at.checked_add(area.len).filter(|&end| end <= i64::MAX as u64);
        let past = if area.at >= self.file_len {
            Some(EntryFault::StartPastEnd(self.file_len))
        } else if area.at.saturating_add(used) > self.file_len {
            Some(EntryFault::EndPastEnd(self.file_len))
        } else {
            None
        };
        let overlap: Option<Region> = self.regions.overlapped(area);
        [end.is_none().then_some(EntryFault::Overflow), past, overlap.map(EntryFault::Overlap)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn states() {
        let states: std::vec::Vec<Block> = (0..8).map(|state| Block::decode(0xabc_0000_0000 | state)).collect();
        let place = 0xabc_0000_0000;
        let expected = [
            Block::NotPresent,
            Block::Zero,
            Block::Zero,
            Block::Zero,
            Block::Invalid,
            Block::Invalid,
            Block::Full(place),
            Block::Partial(place),
        ];
        assert_eq!(states, expected);
        // Bits 3 to 19 are reserved and not looked at, as in QEMU.
        assert_eq!(Block::decode(full(8 * MIB) | 0xf_fff8), Block::Full(8 * MIB));
        assert_eq!((bitmap_place((5 * MIB) | 6), bitmap_place(5 * MIB)), (Some(5 * MIB), None));
    }

    #[test]
    fn places() {
        let regions = Regions {
            log: Area { at: MIB, len: MIB },
            bat: Area { at: 2 * MIB, len: MIB },
            metadata: Area { at: 3 * MIB, len: MIB },
        };
        let geometry = Geometry::new(2 * MIB, 512, 3 * MIB).unwrap();
        let rules = Rules { geometry, regions: &regions, has_parent: false, file_len: 7 * MIB };
        let fault = |index, entry| match rules.check(index, entry) {
            Err(Error::Entry { fault, .. }) => Some(fault),
            other => {
                other.unwrap();
                None
            }
        };
        assert_eq!(fault(0, full(5 * MIB)), None);
        assert_eq!(fault(0, full(6 * MIB)), Some(EntryFault::EndPastEnd(7 * MIB)));
        // Only half of the second block belongs to the disk.
        assert_eq!(fault(1, full(6 * MIB)), None);
        assert_eq!(fault(1, full(7 * MIB)), Some(EntryFault::StartPastEnd(7 * MIB)));
        assert_eq!(fault(0, full(MIB)), Some(EntryFault::Overlap(Region::Log)));
        assert_eq!(fault(0, full(0)), Some(EntryFault::Overlap(Region::HeaderSection)));
        assert_eq!(fault(0, full(1 << 63)), Some(EntryFault::Overflow));
        assert_eq!([4, 5, (4 * MIB) | 7].map(|entry| fault(0, entry)), [Some(EntryFault::State); 3]);
        let child = Rules { has_parent: true, ..rules };
        assert!(child.check(0, (4 * MIB) | 7).is_ok());
        // A sector bitmap.
        assert!(child.check(geometry.bitmap_entry_of(0), full(7 * MIB)).is_err());
        assert_eq!(child.check(geometry.bitmap_entry_of(0), 0), Ok(None));
    }
}
