//! Cylinders, heads and sectors: appendix "CHS Calculation" of the specification, and how sizes are rounded to them.

use crate::error::{Error, Result};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Sectors of the largest disk, 2040 GiB.
pub const MAX_SECTORS: u64 = 0xff00_0000;

/// A geometry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads for each cylinder.
    pub heads: u8,
    /// Sectors for each track.
    pub sectors: u8,
}

impl Geometry {
    /// The largest one, about 127.5 GiB. It says nothing of the size: any larger disk has it too.
    pub const MAX: Self = Self { cylinders: 65535, heads: 16, sectors: 255 };

    /// Sectors of the whole disk.
    pub fn total(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// The geometry that the specification computes for a disk of so many sectors; it may hold fewer of them.
    pub fn of_sectors(total: u64) -> Self {
        let total = total.min(Self::MAX.total());
        let (mut sectors, mut heads, mut tracks);
        if total > 65535 * 16 * 63 {
            (sectors, heads) = (255, 16);
            tracks = total / sectors;
        } else {
            sectors = 17;
            tracks = total / sectors;
            heads = tracks.div_ceil(1024).max(4);
            if tracks >= heads * 1024 || heads > 16 {
                (sectors, heads) = (31, 16);
                tracks = total / sectors;
            }
            if tracks >= heads * 1024 {
                (sectors, heads) = (63, 16);
                tracks = total / sectors;
            }
        }
        // At most 65535, 16 and 255, since total is bounded.
        Self { cylinders: (tracks / heads) as u16, heads: heads as u8, sectors: sectors as u8 }
    }
}

/// The disk that is made for a wanted size: its geometry and its sectors.
///
/// The size becomes one that a geometry expresses, the next larger: Virtual PC believes nothing else. `exact` keeps it (in whole
/// sectors) and writes the largest geometry, which other readers understand.
///
/// # Errors
/// [`Error::SizeTooLarge`].
pub fn disk_for(size: u64, exact: bool) -> Result<(Geometry, u64)> {
    let wanted = size.div_ceil(SECTOR);
    let mut geometry = if exact { Geometry::MAX } else { Geometry::default() };
    if !exact {
        let least = wanted.min(Geometry::MAX.total());
        let mut more = 0;
        while least > geometry.total() {
            geometry = Geometry::of_sectors(least + more);
            more += 1;
        }
    }
    let sectors = if geometry == Geometry::MAX { wanted } else { geometry.total() };
    if sectors > MAX_SECTORS { Err(Error::SizeTooLarge(sectors)) } else { Ok((geometry, sectors)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_as_qemu_img_rounds_them() {
        // Size, bytes of the disk, cylinders, heads, sectors: seen with qemu-img 10.0.
        for (size, bytes, c, h, s) in [
            (0, 0, 0, 0, 0),
            (1000, 34816, 1, 4, 17),
            (1_000_000, 1_009_664, 29, 4, 17),
            (1 << 20, 1_079_296, 31, 4, 17),
            (10 << 20, 10_514_432, 302, 4, 17),
            (100 << 20, 104_865_792, 1004, 12, 17),
            (500 << 20, 524_353_536, 1016, 16, 63),
            (1 << 30, 1_073_995_776, 2081, 16, 63),
            (2 << 30, 2_147_991_552, 4162, 16, 63),
            (8 << 30, 8_590_417_920, 16645, 16, 63),
            (127 << 30, 136_365_219_840, 65279, 16, 255),
            (128 << 30, 137_438_953_472, 65535, 16, 255),
            (2040 << 30, 2_190_433_320_960, 65535, 16, 255),
        ] {
            let geometry = Geometry { cylinders: c, heads: h, sectors: s };
            assert_eq!(disk_for(size, false), Ok((geometry, bytes / SECTOR)), "{size}");
        }
        assert_eq!(disk_for((2040 << 30) + 1, false), Err(Error::SizeTooLarge(MAX_SECTORS + 1)));
        assert_eq!(disk_for(u64::MAX, true), Err(Error::SizeTooLarge(1 << 55)));
        assert_eq!(disk_for(1_000_000, true), Ok((Geometry::MAX, 1954)));
    }
}
