//! What is wrong with the tables of an image that can be opened.

use alloc::vec::Vec;
use core::fmt;

use instar_blockio::{BlockRead, Error as BlockError, ErrorKind};

use crate::error::Result;
use crate::image::Image;
use crate::pages::Pages;
use crate::sparse::{Geometry, Grain};

/// Grains whose places are compared with each other, at most: 64 MiB of memory.
const MAX_COMPARED: usize = 1 << 22;

/// One thing that is wrong. `part`: the number of the sparse extent, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// The directory has no entry for a part of the disk, or one that can't be.
    Directory {
        /// Sparse extent.
        part: usize,
        /// Number of the entry.
        index: u64,
    },
    /// A table lies outside of the file.
    TableOutside {
        /// Sparse extent.
        part: usize,
        /// Number of the table.
        index: u64,
        /// Where it should be, bytes.
        at: u64,
    },
    /// An entry of a table that can't be.
    Entry {
        /// Sparse extent.
        part: usize,
        /// Offset of the grain in the extent's part of the disk, bytes.
        offset: u64,
    },
    /// A grain begins outside of the file.
    GrainOutside {
        /// Sparse extent.
        part: usize,
        /// Offset of the grain in the extent's part of the disk, bytes.
        offset: u64,
        /// Where it should be in the file, bytes.
        at: u64,
    },
    /// Several entries lead to one grain.
    SharedGrain {
        /// Sparse extent.
        part: usize,
        /// Where it is in the file, bytes.
        at: u64,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Directory { part, index } => {
                write!(f, "extent {part}: entry {index} of the grain directory can't be")
            }
            Self::TableOutside { part, index, at } => {
                write!(f, "extent {part}: grain table {index} lies outside of the file, at offset {at}")
            }
            Self::Entry { part, offset } => write!(f, "extent {part}: the table entry for offset {offset} can't be"),
            Self::GrainOutside { part, offset, at } => {
                write!(f, "extent {part}: the grain for offset {offset} lies outside of the file, at offset {at}")
            }
            Self::SharedGrain { part, at } => {
                write!(f, "extent {part}: several entries lead to the grain at offset {at}")
            }
        }
    }
}

/// What a check counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Findings; all of them are corruptions.
    pub corruptions: u64,
    /// Grains of the disk.
    pub grains: u64,
    /// Those of them that are stored.
    pub allocated: u64,
}

/// Checks the tables of all sparse extents, and tells `found` of each fault.
///
/// # Errors
/// A file that can't be read, or no memory for the places of the grains.
pub fn check<D: BlockRead>(image: &Image<D>, found: &mut dyn FnMut(Finding)) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    for (part, (pages, geometry, _)) in image.geometries().enumerate() {
        let mut places = Vec::new();
        let mut tell = |finding| {
            report.corruptions += 1;
            found(finding);
        };
        let allocated = check_extent(part, pages, geometry, &mut places, &mut tell)?;
        places.sort_unstable();
        let shared = places.windows(2).filter(|pair| pair[0] == pair[1]);
        shared.for_each(|pair| tell(Finding::SharedGrain { part, at: pair[0] }));
        report.grains += geometry.capacity.div_ceil(geometry.grain);
        report.allocated += allocated;
    }
    Ok(report)
}

/// Looks at each table; tells the number of grains that are stored, and the places of as many as are compared.
fn check_extent<D: BlockRead>(
    part: usize,
    pages: &Pages<D>,
    geometry: &Geometry,
    places: &mut Vec<u64>,
    tell: &mut dyn FnMut(Finding),
) -> Result<u64> {
    let tables = geometry.capacity.div_ceil(geometry.table_span());
    let file_len = pages.file().size();
    let (mut index, mut allocated) = (0, 0);
    while index < tables {
        if index >= geometry.directory_len {
            tell(Finding::Directory { part, index });
            break;
        }
        let table = match geometry.find_table(pages, index) {
            Ok(table) => table,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tell(Finding::Directory { part, index });
                index += 1;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let Some(at) = table else {
            index += geometry.missing_tables(pages, index, u64::MAX)?;
            continue;
        };
        if at >= file_len {
            tell(Finding::TableOutside { part, index, at });
            index += 1;
            continue;
        }
        for (number, entry) in geometry.read_table(pages, at)?.into_iter().enumerate() {
            let offset = index * geometry.table_span() + number as u64 * geometry.grain;
            if offset >= geometry.capacity {
                break;
            }
            match geometry.grain(entry) {
                Err(_) => tell(Finding::Entry { part, offset }),
                Ok(Grain::At(at)) => {
                    allocated += 1;
                    if at >= file_len {
                        tell(Finding::GrainOutside { part, offset, at });
                    } else if places.len() < MAX_COMPARED {
                        places.try_reserve(1).map_err(|_| BlockError::new(ErrorKind::OutOfMemory))?;
                        places.push(at);
                    }
                }
                Ok(_) => {}
            }
        }
        index += 1;
    }
    Ok(allocated)
}

#[cfg(test)]
mod tests {
    use instar_blockio::{BlockWrite, FileId, MemBlock};

    use super::*;
    use crate::{CreateOptions, OpenOptions, create};

    #[test]
    fn faults_are_found() {
        let mut file = MemBlock::default();
        let options = CreateOptions { size: 40 << 20, ..CreateOptions::default() };
        let mut writer = create(&mut file, FileId(0), Vec::new(), options).unwrap();
        writer.write_at(0, &[1; 3 << 16]).unwrap();
        writer.finish().unwrap();
        let findings = |file: &MemBlock| {
            let image = Image::open(file, FileId(0), &OpenOptions::default()).unwrap();
            let mut all = Vec::new();
            let report = check(&image, &mut |finding| all.push(finding)).unwrap();
            assert_eq!((report.corruptions, report.grains), (all.len() as u64, 640));
            (all, report.allocated)
        };
        assert_eq!(findings(&file), (Vec::new(), 3));
        // Two tables: the directories have a sector each, so the first table of the second directory is in sector 31.
        let table = 31 * 512;
        let mut first = [0; 4];
        file.read_at(table, &mut first).unwrap();
        file.write_at(table + 4, &first).unwrap();
        file.write_at(table + 8, &0x00ff_0000u32.to_le_bytes()).unwrap();
        file.write_at(30 * 512 + 4, &0x00ff_0000u32.to_le_bytes()).unwrap();
        let at = 0x00ff_0000 * 512;
        let shared = u64::from(u32::from_le_bytes(first)) * 512;
        assert_eq!(
            findings(&file),
            (
                vec![
                    Finding::GrainOutside { part: 0, offset: 2 << 16, at },
                    // The second directory still leads to the table.
                    Finding::SharedGrain { part: 0, at: shared },
                ],
                3
            )
        );
    }
}
