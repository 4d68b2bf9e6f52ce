//! The metadata table and its items: spec chapter 2.6.

use alloc::vec::Vec;

use instar_blockio::{BlockRead, zeroed};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::error::{Error, Item, Result};
use crate::format::{
    FILE_PARAMETERS, HAS_PARENT, ITEM_IS_REQUIRED, ITEM_IS_USER, ITEM_IS_VIRTUAL_DISK, LEAVE_BLOCKS_ALLOCATED,
    LOGICAL_SECTOR_SIZE, MAX_ITEM_LEN, MAX_TABLE_ENTRIES, METADATA_SIGNATURE, METADATA_TABLE_LEN, PARENT_LOCATOR,
    PHYSICAL_SECTOR_SIZE, RawItem, RawMetadataTable, RawParameters, VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE,
};
use crate::geometry::Geometry;
use crate::guid::Guid;
use crate::locator::ParentLocator;
use crate::pages::Pages;
use crate::region::Area;

/// What the metadata say of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Metadata {
    pub geometry: Geometry,
    /// Blocks stay allocated.
    pub fixed: bool,
    pub disk_id: Guid,
    pub physical_sector_size: u32,
    /// Only of a differencing image.
    pub parent: Option<ParentLocator>,
}

/// Where the known items lie in the file.
#[derive(Default)]
struct Items {
    parameters: Option<Area>,
    size: Option<Area>,
    id: Option<Area>,
    logical: Option<Area>,
    physical: Option<Area>,
    locator: Option<Area>,
}

impl Items {
    fn place(&mut self, guid: &[u8; 16]) -> Option<(Item, &mut Option<Area>)> {
        Some(match *guid {
            FILE_PARAMETERS => (Item::FileParameters, &mut self.parameters),
            VIRTUAL_DISK_SIZE => (Item::VirtualDiskSize, &mut self.size),
            VIRTUAL_DISK_ID => (Item::VirtualDiskId, &mut self.id),
            LOGICAL_SECTOR_SIZE => (Item::LogicalSectorSize, &mut self.logical),
            PHYSICAL_SECTOR_SIZE => (Item::PhysicalSectorSize, &mut self.physical),
            PARENT_LOCATOR => (Item::ParentLocator, &mut self.locator),
            _ => return None,
        })
    }

    fn read<D: BlockRead>(pages: &Pages<D>, region: Area) -> Result<Self> {
        let bytes = pages.read_vec(region.at, METADATA_TABLE_LEN as usize)?;
        let (table, rest) = RawMetadataTable::ref_from_prefix(&bytes).map_err(|_| Error::NoMetadata)?;
        if table.signature != METADATA_SIGNATURE {
            return Err(Error::NoMetadata);
        }
        let count = table.entry_count.get();
        if u32::from(count) > MAX_TABLE_ENTRIES {
            return Err(Error::TooManyItems(count));
        }
        let mut items = Self::default();
        for chunk in rest.chunks_exact(size_of::<RawItem>()).take(count.into()) {
            let Ok(raw) = RawItem::ref_from_bytes(chunk) else { continue };
            let flags = raw.flags.get();
            match items.place(&raw.guid) {
                Some((item, place)) if flags & ITEM_IS_USER == 0 => {
                    let area = item_area(region, item, raw)?;
                    if place.replace(area).is_some() {
                        return Err(Error::DuplicateItem(item));
                    }
                }
                _ if flags & ITEM_IS_REQUIRED != 0 => return Err(Error::UnknownItem(Guid(raw.guid))),
                _ => {}
            }
        }
        Ok(items)
    }
}

fn item_area(region: Area, item: Item, raw: &RawItem) -> Result<Area> {
    let (at, len) = (u64::from(raw.at.get()), raw.len.get());
    let wrong = Error::ItemPlace(item, len);
    let inside = at >= METADATA_TABLE_LEN && at + u64::from(len) <= region.len && len <= MAX_ITEM_LEN;
    if inside { Ok(Area { at: region.at + at, len: len.into() }) } else { Err(wrong) }
}

/// The first `N` bytes of an item that must be there.
fn value<D: BlockRead, const N: usize>(pages: &Pages<D>, item: Item, area: Option<Area>) -> Result<[u8; N]> {
    let area = area.ok_or(Error::MissingItem(item))?;
    if area.len < N as u64 {
        return Err(Error::ItemPlace(item, area.len as u32)); // it was one
    }
    let mut bytes = [0; N];
    pages.read(area.at, &mut bytes)?;
    Ok(bytes)
}

impl Metadata {
    pub(crate) fn read<D: BlockRead>(pages: &Pages<D>, region: Area) -> Result<Self> {
        let items = Items::read(pages, region)?;
        let [b0, b1, b2, b3, f0, f1, f2, f3] = value(pages, Item::FileParameters, items.parameters)?;
        let (block_size, flags) = (u32::from_le_bytes([b0, b1, b2, b3]), u32::from_le_bytes([f0, f1, f2, f3]));
        let size = u64::from_le_bytes(value(pages, Item::VirtualDiskSize, items.size)?);
        let logical = u32::from_le_bytes(value(pages, Item::LogicalSectorSize, items.logical)?);
        let geometry = match Geometry::new(block_size.into(), logical, size) {
            Some(geometry) => geometry,
            None if !matches!(logical, 512 | 4096) => return Err(Error::SectorSize(logical)),
            None if Geometry::new(block_size.into(), logical, 0).is_none() => return Err(Error::BlockSize(block_size)),
            None => return Err(Error::VirtualSize(size)),
        };
        let parent = match flags & HAS_PARENT != 0 {
            false => None,
            true => {
                let area = items.locator.ok_or(Error::MissingItem(Item::ParentLocator))?;
                // At most a MiB.
                Some(ParentLocator::parse(&pages.read_vec(area.at, area.len as usize)?)?)
            }
        };
        Ok(Self {
            geometry,
            fixed: flags & LEAVE_BLOCKS_ALLOCATED != 0,
            disk_id: Guid(value(pages, Item::VirtualDiskId, items.id)?),
            physical_sector_size: u32::from_le_bytes(value(pages, Item::PhysicalSectorSize, items.physical)?),
            parent,
        })
    }

    /// The bytes of the region as far as they are used, in QEMU's order and places. Only for an image without parent.
    pub(crate) fn emit(&self) -> Result<Vec<u8>> {
        let flags = if self.fixed { LEAVE_BLOCKS_ALLOCATED } else { 0 };
        // At most 256 MiB.
        let parameters = RawParameters { block_size: (self.geometry.block_size() as u32).into(), flags: flags.into() };
        let size = self.geometry.virtual_size().to_le_bytes();
        let logical = (self.geometry.sector_size() as u32).to_le_bytes();
        let physical = self.physical_sector_size.to_le_bytes();
        let disk = ITEM_IS_VIRTUAL_DISK | ITEM_IS_REQUIRED;
        let items: [([u8; 16], &[u8], u32); 5] = [
            (FILE_PARAMETERS, parameters.as_bytes(), ITEM_IS_REQUIRED),
            (VIRTUAL_DISK_SIZE, &size, disk),
            (VIRTUAL_DISK_ID, &self.disk_id.0, disk),
            (LOGICAL_SECTOR_SIZE, &logical, disk),
            (PHYSICAL_SECTOR_SIZE, &physical, disk),
        ];
        let values: usize = items.iter().map(|(_, value, _)| value.len()).sum();
        let mut bytes = zeroed(METADATA_TABLE_LEN as usize + values)?;
        let (table, mut rest) = bytes.split_at_mut(METADATA_TABLE_LEN as usize);
        let mut raw = RawMetadataTable::new_zeroed();
        raw.signature = METADATA_SIGNATURE;
        raw.entry_count = (items.len() as u16).into();
        let (head, entries) = table.split_at_mut(size_of::<RawMetadataTable>());
        head.copy_from_slice(raw.as_bytes());
        let mut at = METADATA_TABLE_LEN as u32;
        for ((guid, value, flags), entry) in items.into_iter().zip(entries.chunks_exact_mut(size_of::<RawItem>())) {
            let len = value.len() as u32; // at most 16
            let raw = RawItem { guid, at: at.into(), len: len.into(), flags: flags.into(), reserved: 0.into() };
            entry.copy_from_slice(raw.as_bytes());
            let (now, later) = rest.split_at_mut(value.len());
            now.copy_from_slice(value);
            rest = later;
            at += len;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_blockio::MemBlock;

    const REGION: Area = Area { at: 0, len: 1 << 20 };

    fn sample() -> Metadata {
        Metadata {
            geometry: Geometry::new(2 << 20, 4096, 10 << 20).unwrap(),
            fixed: true,
            disk_id: Guid([9; 16]),
            physical_sector_size: 4096,
            parent: None,
        }
    }

    /// Bytes and their place.
    type Patch<'a> = (usize, &'a [u8]);

    fn with(patches: &[Patch<'_>]) -> Result<Metadata> {
        let mut bytes = sample().emit().unwrap();
        for (at, patch) in patches {
            bytes[*at..*at + patch.len()].copy_from_slice(patch);
        }
        Metadata::read(&Pages::new(MemBlock::from(bytes), 0), REGION)
    }

    #[test]
    fn there_and_back() {
        assert_eq!(with(&[]), Ok(sample()));
    }

    #[test]
    fn items_out_of_their_rules() {
        // The table: 32 bytes, then entries of 32: parameters at 32, size 64, id 96, logical 128, physical 160.
        let cases: [(&[Patch<'_>], Error); 13] = [
            (&[(0, b"M")], Error::NoMetadata),
            (&[(10, &[0, 8])], Error::TooManyItems(2048)),
            (&[(10, &[4])], Error::MissingItem(Item::PhysicalSectorSize)),
            (&[(64, &FILE_PARAMETERS)], Error::DuplicateItem(Item::FileParameters)),
            (&[(160, &[7; 16])], Error::UnknownItem(Guid([7; 16]))),
            (&[(48, &[0, 0xff, 0, 0])], Error::ItemPlace(Item::FileParameters, 8)),
            (&[(48, &[0xfc, 0xff, 0x0f, 0])], Error::ItemPlace(Item::FileParameters, 8)),
            (&[(52, &[4])], Error::ItemPlace(Item::FileParameters, 4)),
            (&[(52, &[0xff; 4])], Error::ItemPlace(Item::FileParameters, u32::MAX)),
            (&[(65536, &[1])], Error::BlockSize(0x20_0001)),
            (&[(65536 + 32, &[1])], Error::SectorSize(4097)),
            (&[(65536 + 8, &[0, 2])], Error::VirtualSize((10 << 20) + 512)),
            (&[(65536 + 4, &[3])], Error::MissingItem(Item::ParentLocator)),
        ];
        for (patches, error) in cases {
            assert_eq!(with(patches), Err(error), "{patches:?}");
        }
        // What the user has put there is not ours, even under the same name.
        assert_eq!(with(&[(56, &[ITEM_IS_USER as u8])]), Err(Error::MissingItem(Item::FileParameters)));
    }
}
