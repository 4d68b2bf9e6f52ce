//! New images: what they consist of, and the metadata of each part.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::descriptor::{NO_PARENT, Text};
use crate::error::{Error, Result};
use crate::format::{
    DESCRIPTOR_SECTORS, FLAG_COMPRESSED, FLAG_MARKERS, FLAG_NEWLINES, FLAG_SECOND, FLAG_ZEROED, GRAIN_SECTORS,
    HostedHeader, SECTOR, TABLE_ENTRIES, TABLE_SECTORS,
};

/// Bytes of a part of a `twoGb…` image.
pub const PART: u64 = 2 << 30;
/// Grains that an extent has at most: 2^32 - 1, QEMU's counter.
const MAX_GRAINS: u64 = u32::MAX as u64;

/// The types of images that are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Subformat {
    /// Grains, in one file with the descriptor.
    #[default]
    MonolithicSparse,
    /// The bytes themselves, in one file beside the descriptor.
    MonolithicFlat,
    /// Grains, in files of 2 GiB of the disk each.
    TwoGbMaxExtentSparse,
    /// The bytes themselves, in files of 2 GiB each.
    TwoGbMaxExtentFlat,
    /// Compressed grains, in one file with the descriptor.
    StreamOptimized,
}

impl Subformat {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentSparse,
        Self::TwoGbMaxExtentFlat,
        Self::StreamOptimized,
    ];

    /// Its name in descriptors and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
        }
    }

    /// The type of that name.
    pub fn of_name(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|subformat| subformat.name().as_bytes() == name)
    }

    /// The bytes themselves are stored.
    pub fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat)
    }

    /// In files of 2 GiB.
    pub fn is_split(self) -> bool {
        matches!(self, Self::TwoGbMaxExtentSparse | Self::TwoGbMaxExtentFlat)
    }

    /// Extents lie in files of their own, beside the descriptor.
    pub fn has_extent_files(self) -> bool {
        self.is_flat() || self.is_split()
    }

    /// The name of extent file `number` (counted from 0) of an image of that name.
    pub fn extent_name(self, image: &[u8], number: usize) -> Vec<u8> {
        let dot = image.iter().rposition(|&byte| byte == b'.').unwrap_or(image.len());
        let (stem, ending) = image.split_at(dot);
        let middle = match self {
            Self::TwoGbMaxExtentSparse => alloc::format!("-s{:03}", number + 1),
            Self::TwoGbMaxExtentFlat => alloc::format!("-f{:03}", number + 1),
            _ => "-flat".to_string(),
        };
        [stem, middle.as_bytes(), ending].concat()
    }
}

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk; rounded up to sectors.
    pub size: u64,
    /// Its type.
    pub subformat: Subformat,
    /// The name of the image's file, without directories: it stands in the descriptor.
    pub name: Vec<u8>,
    /// A random number.
    pub cid: u32,
    /// Name and CID of the parent.
    pub parent: Option<(Vec<u8>, u32)>,
    /// `ide`, `lsilogic`, `buslogic` or `legacyESX`.
    pub adapter: String,
    /// Version of the virtual hardware.
    pub hardware_version: String,
    /// Version of VMware's tools.
    pub tools_version: String,
    /// Zeroes are stored as a table entry.
    pub zeroed_grain: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            subformat: Subformat::default(),
            name: Vec::new(),
            cid: 0,
            parent: None,
            adapter: "ide".to_string(),
            hardware_version: "4".to_string(),
            tools_version: "2147483647".to_string(),
            zeroed_grain: false,
        }
    }
}

impl CreateOptions {
    /// Bytes of the disk, whole sectors.
    ///
    /// # Errors
    /// [`Error::SizeTooLarge`]: more than the tables can address, or more parts than there may be.
    pub fn disk_size(&self) -> Result<u64> {
        let size = self.size.checked_next_multiple_of(SECTOR).filter(|&size| size <= i64::MAX as u64);
        let size = size.ok_or(Error::SizeTooLarge(self.size))?;
        let parts = if self.subformat.is_split() { size.div_ceil(PART) } else { 1 };
        let grains = if self.subformat.is_flat() { 0 } else { size.div_ceil(GRAIN_SECTORS * SECTOR) };
        match parts > Error::MAX_EXTENTS as u64 || grains / parts.max(1) > MAX_GRAINS {
            true => Err(Error::SizeTooLarge(self.size)),
            false => Ok(size),
        }
    }

    /// Bytes of the disk in each part, in order.
    ///
    /// # Errors
    /// As [`disk_size`](Self::disk_size).
    pub fn parts(&self) -> Result<Vec<u64>> {
        let size = self.disk_size()?;
        if !self.subformat.has_extent_files() {
            return Ok(Vec::from([size]));
        }
        let most = if self.subformat.is_split() { PART } else { u64::MAX };
        let (mut left, mut parts) = (size, Vec::new());
        while left > 0 {
            parts.push(left.min(most));
            left -= left.min(most);
        }
        Ok(parts)
    }

    /// The descriptor. `wide_cid`: as it is once something was written.
    ///
    /// # Errors
    /// As [`disk_size`](Self::disk_size).
    pub fn descriptor(&self, wide_cid: bool) -> Result<Vec<u8>> {
        let mut extents = Vec::new();
        for (number, len) in self.parts()?.into_iter().enumerate() {
            let name = match self.subformat.has_extent_files() {
                true => self.subformat.extent_name(&self.name, number),
                false => self.name.clone(),
            };
            let (kind, end) = if self.subformat.is_flat() { ("FLAT", "\" 0\n") } else { ("SPARSE", "\"\n") };
            extents.extend_from_slice(alloc::format!("RW {} {kind} \"", len / SECTOR).as_bytes());
            extents.extend_from_slice(&name);
            extents.extend_from_slice(end.as_bytes());
        }
        let text = Text {
            cid: self.cid,
            wide_cid,
            parent_cid: self.parent.as_ref().map_or(NO_PARENT, |(_, cid)| *cid),
            create_type: self.subformat.name(),
            parent_name: self.parent.as_ref().map(|(name, _)| name.as_slice()),
            extents: &extents,
            hardware_version: &self.hardware_version,
            tools_version: &self.tools_version,
            adapter: &self.adapter,
            size: self.disk_size()?,
        };
        Ok(text.render())
    }
}

/// Where the metadata of a new sparse extent lie, sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub tables: u64,
    pub directory_sectors: u64,
    pub second_directory: u64,
    pub directory: u64,
    pub overhead: u64,
}

impl Layout {
    /// For an extent of so many bytes of the disk.
    pub fn of(len: u64) -> Self {
        let grains = (len / SECTOR).div_ceil(GRAIN_SECTORS);
        let tables = grains.div_ceil(TABLE_ENTRIES);
        let directory_sectors = (tables * 4).div_ceil(SECTOR);
        let second_directory = 1 + DESCRIPTOR_SECTORS;
        let directory = second_directory + directory_sectors + TABLE_SECTORS * tables;
        let end = directory + directory_sectors + TABLE_SECTORS * tables;
        Self { tables, directory_sectors, second_directory, directory, overhead: end.next_multiple_of(GRAIN_SECTORS) }
    }

    /// Where table `number` of the directory at `directory` lies, sectors.
    pub fn table(&self, directory: u64, number: u64) -> u64 {
        directory + self.directory_sectors + number * TABLE_SECTORS
    }

    /// The header.
    pub fn header(&self, len: u64, compressed: bool, zeroed: bool) -> HostedHeader {
        let mut flags = FLAG_NEWLINES | FLAG_SECOND;
        if compressed {
            flags |= FLAG_COMPRESSED | FLAG_MARKERS;
        }
        if zeroed {
            flags |= FLAG_ZEROED;
        }
        HostedHeader {
            version: match (compressed, zeroed) {
                (true, _) => 3,
                (false, true) => 2,
                (false, false) => 1,
            },
            flags,
            capacity: len / SECTOR,
            grain: GRAIN_SECTORS,
            descriptor: 1,
            descriptor_len: DESCRIPTOR_SECTORS,
            table_entries: TABLE_ENTRIES as u32,
            second_directory: self.second_directory,
            directory: self.directory,
            overhead: self.overhead,
            compression: compressed.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_of_qemu_img() {
        // Of images that qemu-img 10.0 made.
        let places = |layout: Layout| (layout.second_directory, layout.directory, layout.overhead);
        assert_eq!(places(Layout::of(10 << 20)), (21, 26, 128));
        assert_eq!(places(Layout::of(2 << 30)), (21, 0x116, 0x280));
        assert_eq!(places(Layout::of(5 << 30)), (21, 0x297, 0x580));
        assert_eq!(places(Layout::of(0)), (21, 21, 128));
    }

    #[test]
    fn names() {
        let name = |subformat: Subformat, image: &str| subformat.extent_name(image.as_bytes(), 0);
        assert_eq!(name(Subformat::MonolithicFlat, "a.b.img"), b"a.b-flat.img");
        assert_eq!(name(Subformat::TwoGbMaxExtentSparse, "noext"), b"noext-s001");
        assert_eq!(Subformat::TwoGbMaxExtentFlat.extent_name(b"a.vmdk", 1000), b"a-f1001.vmdk");
    }

    #[test]
    fn descriptor_text() {
        let options = CreateOptions { size: 10 << 20, name: b"F".to_vec(), cid: 0x1f, ..CreateOptions::default() };
        let text = String::from_utf8(options.descriptor(false).unwrap()).unwrap();
        assert_eq!(
            text,
            "# Disk DescriptorFile\nversion=1\nCID=1f\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\n# Extent \
             description\nRW 20480 SPARSE \"F\"\n\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\n\
             ddb.geometry.cylinders = \"20\"\nddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\n\
             ddb.adapterType = \"ide\"\nddb.toolsVersion = \"2147483647\"\n"
        );
        let split = CreateOptions { subformat: Subformat::TwoGbMaxExtentFlat, size: 5 << 30, ..options.clone() };
        assert_eq!(split.parts().unwrap(), [PART, PART, 1 << 30]);
        for (size, subformat) in [
            (1 << 50, Subformat::MonolithicSparse),
            (2 << 40, Subformat::TwoGbMaxExtentSparse),
            (u64::MAX, Subformat::MonolithicFlat),
        ] {
            let options = CreateOptions { size, subformat, ..options.clone() };
            assert_eq!(options.disk_size(), Err(Error::SizeTooLarge(size)));
        }
        assert!(CreateOptions { size: 64 << 40, ..options }.disk_size().is_ok());
    }
}
