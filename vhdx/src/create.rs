//! New images: the options and the layout of a fresh file, which is that of `qemu-img create`.

use alloc::string::String;

use instar_blockio::{BlockWrite, FileId, zeroed};

use crate::bat::{ZERO, full};
use crate::error::{Error, OptionError, Result};
use crate::format::{
    BAT_ENTRY, CREATOR_AT, CREATOR_UNITS, FILE_SIGNATURE, HEADER_SECTION, MAX_BLOCK_SIZE, MAX_VIRTUAL_SIZE, MIB,
    MIN_BLOCK_SIZE, REGION_TABLE_AT,
};
use crate::geometry::Geometry;
use crate::guid::GuidSource;
use crate::header::Header;
use crate::metadata::Metadata;
use crate::region::{Area, Regions};
use crate::write::{State, Writer};

/// Bytes from the start of the metadata region to the first block.
const METADATA_SPACE: u64 = 5 * MIB;
/// Bytes of the BAT written in one request.
const PIECE: u64 = 1 << 20;

/// Options of a new image. The default is that of `qemu-img create` for a disk of size 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, at most 64 TiB; rounded up to a sector.
    pub size: u64,
    /// Bytes of a payload block: rounded up to a MiB, cut to 256 MiB, then a power of two. 0: 8 MiB, or 16, 32 or 64 for disks of more than
    /// 1 GiB, 100 GiB and 32 TiB.
    pub block_size: u64,
    /// Bytes of the log, rounded up to a MiB; below 4 GiB.
    pub log_size: u64,
    /// The file has space for the whole disk from the beginning, each block in its place.
    pub fixed: bool,
    /// Mark blocks without data as zero. Otherwise they are not present in a dynamic image, and present in a fixed one.
    pub block_state_zero: bool,
    /// Bytes of a logical sector, 512 or 4096.
    pub sector_size: u32,
    /// Name of the program, at most 256 UTF-16 units of which are stored.
    pub creator: String,
    /// Random bytes, of which the GUIDs and the first sequence number are made. They must differ from image to image.
    pub seed: [u8; 16],
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            block_size: 0,
            log_size: MIB,
            fixed: false,
            block_state_zero: true,
            sector_size: 512,
            creator: String::from(concat!("instar ", env!("CARGO_PKG_VERSION"))),
            seed: [0; 16],
        }
    }
}

/// Where everything lies in a new file.
#[derive(Clone, Copy, Debug)]
struct Layout {
    geometry: Geometry,
    regions: Regions,
    /// First block.
    payload: u64,
}

impl CreateOptions {
    /// Finds what can't be met.
    ///
    /// # Errors
    /// The first of the faults.
    pub fn check(&self) -> Result<(), OptionError> {
        self.layout().map(|_| ())
    }

    fn geometry(&self) -> Result<Geometry, OptionError> {
        let too_large = OptionError::SizeTooLarge(self.size);
        let size = self.size.checked_next_multiple_of(self.sector_size.max(1).into()).ok_or(too_large)?;
        if size > MAX_VIRTUAL_SIZE {
            return Err(too_large);
        }
        let block_size = match self.block_size {
            0 if size > 32 << 40 => 64 * MIB,
            0 if size > 100 << 30 => 32 * MIB,
            0 if size > 1 << 30 => 16 * MIB,
            0 => 8 * MIB,
            wanted => wanted.checked_next_multiple_of(MIN_BLOCK_SIZE).unwrap_or(MAX_BLOCK_SIZE).min(MAX_BLOCK_SIZE),
        };
        Geometry::new(block_size, self.sector_size, size).ok_or(OptionError::BlockSize(block_size))
    }

    fn layout(&self) -> Result<Layout, OptionError> {
        let geometry = self.geometry()?;
        let log = match self.log_size.checked_next_multiple_of(MIB) {
            Some(0) => return Err(OptionError::LogSizeZero),
            Some(len) if len <= u64::from(u32::MAX) => Area { at: HEADER_SECTION, len },
            _ => return Err(OptionError::LogSizeTooLarge(self.log_size)),
        };
        let entries = match geometry.bat_entries(false) {
            // QEMU counts one chunk less than none, in 32 bits, and refuses an image with a shorter table.
            0 => u64::from(u32::MAX) / geometry.chunk_ratio(),
            entries => entries,
        };
        let bat = Area { at: log.end(), len: (entries * BAT_ENTRY).next_multiple_of(MIB) };
        let metadata = Area { at: bat.end(), len: MIB };
        Ok(Layout { geometry, regions: Regions { log, bat, metadata }, payload: metadata.at + METADATA_SPACE })
    }
}

/// Lays out a fresh image in `file`, which the caller has emptied.
///
/// The file is no image before [`Writer::finish`], which writes its first bytes last.
///
/// # Errors
/// [`Error::Options`], or what the file reports.
pub fn create<D: BlockWrite>(file: D, id: FileId, options: &CreateOptions) -> Result<Writer<D>> {
    let Layout { geometry, regions, payload } = options.layout()?;
    let mut guids = GuidSource::new(options.seed);
    let sequence = guids.number() >> 32;
    // The length was below 4 GiB.
    let header = Header::fresh(sequence, guids.guid(), guids.guid(), regions.log.at, regions.log.len as u32);
    let metadata = Metadata {
        geometry,
        fixed: options.fixed,
        disk_id: guids.guid(),
        physical_sector_size: options.sector_size,
        parent: None,
    };
    let end = if options.fixed { payload + geometry.virtual_size() } else { payload };
    let base = options.fixed.then_some(payload);
    let state = State::Fresh { creator: options.creator.clone() };
    let mut writer = Writer::new(file, id, header, regions, metadata, state, guids, end, base);
    writer.check_room(end)?;
    // On a block device, blocks that nobody has written hold what was there.
    let present = options.fixed && !options.block_state_zero && writer.is_sparse();
    match (present, options.block_state_zero || options.fixed) {
        (true, _) => writer.fill_bat(|block| full(payload + geometry.block_start(block)))?,
        (false, true) => writer.fill_bat(|_| ZERO)?,
        // A sparse file has zeroes there.
        (false, false) if writer.is_sparse() => {}
        (false, false) => writer.fill_bat(|_| 0)?,
    }
    Ok(writer)
}

impl<D: BlockWrite> Writer<D> {
    /// Writes all entries of payload blocks; those of sector bitmaps are 0.
    fn fill_bat(&mut self, entry: impl Fn(u64) -> u64) -> Result<()> {
        let geometry = self.metadata.geometry;
        let count = geometry.bat_entries(false);
        let mut piece = zeroed((count * BAT_ENTRY).min(PIECE) as usize)?;
        let mut index = 0;
        while index < count {
            let len = (count - index).min(PIECE / BAT_ENTRY);
            let bytes = &mut piece[..(len * BAT_ENTRY) as usize];
            for (place, index) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(index..) {
                *place = geometry.block_of_entry(index).map_or(0, &entry).to_le_bytes();
            }
            self.file.write_at(self.regions.bat.at + index * BAT_ENTRY, bytes)?;
            index += len;
        }
        Ok(())
    }

    /// Writes what makes the file an image, its first bytes last.
    pub(crate) fn write_header_section(&mut self, creator: &str) -> Result<()> {
        let metadata = self.metadata.emit()?;
        self.file.write_at(self.regions.metadata.at, &metadata)?;
        let table = self.regions.emit()?;
        for at in REGION_TABLE_AT {
            self.file.write_at(at, &table)?;
        }
        self.header.write_both(&mut self.file)?;
        self.file.flush()?;
        let mut identifier = zeroed(CREATOR_AT as usize + CREATOR_UNITS * 2)?;
        let (signature, name) = identifier.split_at_mut(CREATOR_AT as usize);
        signature.copy_from_slice(&FILE_SIGNATURE);
        for (place, unit) in name.as_chunks_mut::<2>().0.iter_mut().zip(creator.encode_utf16()) {
            *place = unit.to_le_bytes();
        }
        self.file.write_at(0, &identifier)?;
        self.file.flush().map_err(Error::Io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes() {
        let of = |size: u64, block_size: u64| {
            let options = CreateOptions { size, block_size, ..CreateOptions::default() };
            options.layout().map(|layout| layout.geometry.block_size() / MIB)
        };
        let gib = 1 << 30;
        let auto = [0, gib, gib + 1, 100 * gib, 101 * gib, 32 << 40, 33 << 40].map(|size| of(size, 0).unwrap());
        assert_eq!(auto, [8, 8, 16, 16, 32, 32, 64]);
        let given = [1, MIB, 1_500_000, 300 * MIB, 512 * MIB, u64::MAX].map(|size| of(0, size).unwrap());
        assert_eq!(given, [1, 1, 2, 256, 256, 256]);
        assert_eq!(of(0, 3 * MIB), Err(OptionError::BlockSize(3 * MIB)));
    }

    #[test]
    fn limits() {
        let check = |size: u64, log_size: u64| CreateOptions { size, log_size, ..CreateOptions::default() }.check();
        assert_eq!(check(64 << 40, MIB), Ok(()));
        assert_eq!(check((64 << 40) + 1, MIB), Err(OptionError::SizeTooLarge((64 << 40) + 1)));
        assert_eq!(check(u64::MAX, MIB), Err(OptionError::SizeTooLarge(u64::MAX)));
        assert_eq!(check(0, 0), Err(OptionError::LogSizeZero));
        assert_eq!(check(0, 1 << 32), Err(OptionError::LogSizeTooLarge(1 << 32)));
        assert_eq!(check(0, u64::MAX), Err(OptionError::LogSizeTooLarge(u64::MAX)));
    }
}
