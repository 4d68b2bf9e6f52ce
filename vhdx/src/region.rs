//! Region tables: where BAT and metadata lie. Spec chapter 2.2.3.

use alloc::vec::Vec;

use instar_blockio::{BlockRead, zeroed};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::crc::checksum;
use crate::error::{Error, Region, Result};
use crate::format::{
    BAT_REGION, HEADER_SECTION, MAX_TABLE_ENTRIES, METADATA_REGION, MIB, REGION_REQUIRED, REGION_SIGNATURE,
    REGION_TABLE_AT, REGION_TABLE_LEN, RawRegion, RawRegionTable,
};
use crate::guid::Guid;
use crate::header::Header;
use crate::pages::Pages;

/// A run of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Area {
    pub at: u64,
    pub len: u64,
}

impl Area {
    pub(crate) fn end(self) -> u64 {
        self.at.saturating_add(self.len)
    }

    pub(crate) fn overlaps(self, other: Area) -> bool {
        self.len > 0 && other.len > 0 && self.at < other.end() && other.at < self.end()
    }
}

/// The places of everything but payload and sector bitmaps; none overlaps another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Regions {
    pub log: Area,
    pub bat: Area,
    pub metadata: Area,
}

impl Regions {
    /// Reads the first region table, or the second where the first is damaged.
    pub(crate) fn read<D: BlockRead>(pages: &Pages<D>, header: &Header) -> Result<Self> {
        let table = match table(pages, 0)? {
            Some(table) => Some(table),
            None => table(pages, 1)?,
        };
        let (bat, metadata) = parse(&table.ok_or(Error::NoRegionTable)?)?;
        let regions = Self { log: Area { at: header.log_at, len: header.log_len.into() }, bat, metadata };
        regions.check()?;
        Ok(regions)
    }

    /// Names and places of all areas.
    pub(crate) fn areas(&self) -> [(Region, Area); 4] {
        [
            (Region::HeaderSection, Area { at: 0, len: HEADER_SECTION }),
            (Region::Log, self.log),
            (Region::Bat, self.bat),
            (Region::Metadata, self.metadata),
        ]
    }

    /// The area that a run of the file overlaps, if any.
    pub(crate) fn overlapped(&self, run: Area) -> Option<Region> {
        self.areas().into_iter().find(|(_, area)| area.overlaps(run)).map(|(region, _)| region)
    }

    /// Where the last of the areas ends.
    pub(crate) fn end(&self) -> u64 {
        self.areas().iter().map(|(_, area)| area.end()).max().unwrap_or(HEADER_SECTION)
    }

    fn check(&self) -> Result<()> {
        let areas = self.areas();
        for (index, (region, area)) in areas.iter().enumerate() {
            let other = areas[..index].iter().find(|(_, other)| other.overlaps(*area));
            if let Some((other, _)) = other {
                return Err(Error::RegionsOverlap(*other, *region));
            }
        }
        Ok(())
    }

    /// The 64 KiB of a region table. As QEMU does, it leaves the bit "required" unset: every reader knows these two.
    pub(crate) fn emit(&self) -> Result<Vec<u8>> {
        let mut bytes = zeroed(REGION_TABLE_LEN)?;
        let mut table = RawRegionTable::new_zeroed();
        table.signature = REGION_SIGNATURE;
        table.entry_count = 2.into();
        let (head, rest) = bytes.split_at_mut(size_of::<RawRegionTable>());
        head.copy_from_slice(table.as_bytes());
        for (place, (guid, area)) in
            rest.chunks_mut(size_of::<RawRegion>()).zip([(BAT_REGION, self.bat), (METADATA_REGION, self.metadata)])
        {
            // New tables are below 4 GiB.
            let len = u32::try_from(area.len).map_err(|_| Error::RegionPlace(Region::Bat, area.at))?;
            let raw = RawRegion { guid, at: area.at.into(), len: len.into(), flags: 0.into() };
            place.copy_from_slice(raw.as_bytes());
        }
        let sum = checksum(&bytes);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        Ok(bytes)
    }
}

/// The bytes of a region table, if signature and checksum are right.
pub(crate) fn table<D: BlockRead>(pages: &Pages<D>, slot: usize) -> Result<Option<Vec<u8>>> {
    let bytes = pages.read_vec(REGION_TABLE_AT[slot], REGION_TABLE_LEN)?;
    let valid = RawRegionTable::ref_from_prefix(&bytes)
        .is_ok_and(|(raw, _)| raw.signature == REGION_SIGNATURE && raw.checksum.get() == checksum(&bytes));
    Ok(valid.then_some(bytes))
}

fn parse(bytes: &[u8]) -> Result<(Area, Area)> {
    let (table, rest) = RawRegionTable::ref_from_prefix(bytes).map_err(|_| Error::NoRegionTable)?;
    let count = table.entry_count.get();
    if count > MAX_TABLE_ENTRIES {
        return Err(Error::TooManyRegions(count));
    }
    let (mut bat, mut metadata) = (None, None);
    for chunk in rest.chunks_exact(size_of::<RawRegion>()).take(count as usize) {
        let Ok(raw) = RawRegion::ref_from_bytes(chunk) else { continue };
        let (region, place) = match raw.guid {
            BAT_REGION => (Region::Bat, &mut bat),
            METADATA_REGION => (Region::Metadata, &mut metadata),
            guid if raw.flags.get() & REGION_REQUIRED != 0 => return Err(Error::UnknownRegion(Guid(guid))),
            _ => continue,
        };
        if place.replace(area(region, raw)?).is_some() {
            return Err(Error::DuplicateRegion(Guid(raw.guid)));
        }
    }
    let bat = bat.ok_or(Error::MissingRegion(Region::Bat))?;
    Ok((bat, metadata.ok_or(Error::MissingRegion(Region::Metadata))?))
}

fn area(region: Region, raw: &RawRegion) -> Result<Area> {
    let (at, len) = (raw.at.get(), u64::from(raw.len.get()));
    let fits = at.checked_add(len).is_some_and(|end| end <= i64::MAX as u64);
    let placed = at >= HEADER_SECTION && at.is_multiple_of(MIB) && len > 0 && len.is_multiple_of(MIB) && fits;
    if placed { Ok(Area { at, len }) } else { Err(Error::RegionPlace(region, at)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_blockio::{BlockWrite, MemBlock};

    const GOOD: Regions = Regions {
        log: Area { at: MIB, len: MIB },
        bat: Area { at: 2 * MIB, len: 3 * MIB },
        metadata: Area { at: 5 * MIB, len: MIB },
    };

    fn read(first: &[u8], second: &[u8]) -> Result<Regions> {
        let mut file = MemBlock::zeroed(1 << 20);
        file.write_at(REGION_TABLE_AT[0], first).unwrap();
        file.write_at(REGION_TABLE_AT[1], second).unwrap();
        let header = Header::fresh(1, Guid::ZERO, Guid::ZERO, MIB, 1 << 20);
        Regions::read(&Pages::new(file, 0), &header)
    }

    /// Bytes and their place.
    type Patch<'a> = (usize, &'a [u8]);

    /// The good table with some bytes changed and its checksum right.
    fn with(patches: &[Patch<'_>]) -> Result<Regions> {
        let mut bytes = GOOD.emit().unwrap();
        for (at, patch) in patches {
            bytes[*at..*at + patch.len()].copy_from_slice(patch);
        }
        let sum = checksum(&bytes);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        read(&bytes, &[])
    }

    #[test]
    fn either_copy_will_do() {
        let good = GOOD.emit().unwrap();
        let mut bad = good.clone();
        bad[40000] = 1;
        assert_eq!(read(&good, &bad), Ok(GOOD));
        assert_eq!(read(&bad, &good), Ok(GOOD));
        assert_eq!(read(&bad, &bad), Err(Error::NoRegionTable));
    }

    #[test]
    fn fields_out_of_their_rules() {
        let unknown = [7; 16];
        let cases: [(&[Patch<'_>], Error); 9] = [
            (&[(8, &[0, 8])], Error::TooManyRegions(2048)),
            (&[(8, &[1])], Error::MissingRegion(Region::Metadata)),
            (&[(8, &[3]), (80, &unknown), (108, &[1])], Error::UnknownRegion(Guid(unknown))),
            (&[(48, &BAT_REGION)], Error::DuplicateRegion(Guid(BAT_REGION))),
            (&[(32, &[0, 0, 0, 0])], Error::RegionPlace(Region::Bat, 0)),
            (&[(33, &[0x10])], Error::RegionPlace(Region::Bat, 0x20_1000)),
            (&[(42, &[0])], Error::RegionPlace(Region::Bat, 2 * MIB)),
            (&[(42, &[0x40])], Error::RegionsOverlap(Region::Bat, Region::Metadata)),
            (&[(34, &[0x10])], Error::RegionsOverlap(Region::Log, Region::Bat)),
        ];
        for (patches, error) in cases {
            assert_eq!(with(patches), Err(error), "{patches:?}");
        }
        // One that needn't be understood.
        assert_eq!(with(&[(8, &[3]), (80, &unknown)]), Ok(GOOD));
    }
}
