//! The headers of sparse extents, little-endian ("Virtual Disk Format 5.0", Hosted and ESX Server Sparse Extents).

use alloc::vec::Vec;

/// Bytes of a sector, in which all places are counted.
pub(crate) const SECTOR: u64 = 512;
/// Sectors of a grain in new images.
pub(crate) const GRAIN_SECTORS: u64 = 128;
/// Entries of a grain table in new images, and at most.
pub(crate) const TABLE_ENTRIES: u64 = 512;
/// Sectors of a grain table in new images.
pub(crate) const TABLE_SECTORS: u64 = 4;
/// Sectors of the embedded descriptor in new images; it lies behind the header.
pub(crate) const DESCRIPTOR_SECTORS: u64 = 20;

/// `KDMV` read as a number.
pub(crate) const HOSTED_MAGIC: u32 = 0x564d_444b;
/// `COWD` read as a number.
pub(crate) const COWD_MAGIC: u32 = 0x4457_4f43;
/// First bytes of a seSparse extent.
pub(crate) const SE_MAGIC: u64 = 0xcafe_babe;
/// The only version of it.
pub(crate) const SE_VERSION: u64 = 0x2_0000_0001;
/// First bytes of its volatile header.
pub(crate) const SE_VOLATILE_MAGIC: u64 = 0xcafe_cafe;

/// The directory's place is told by the footer.
pub(crate) const DIRECTORY_AT_END: u64 = u64::MAX;
/// The marker of the footer.
pub(crate) const MARKER_FOOTER: u32 = 3;
/// Bytes before a compressed grain's stream: its first sector (8 bytes) and the length of the stream (4).
pub(crate) const MARKER_LEN: u64 = 12;

/// Line ends are valid.
pub(crate) const FLAG_NEWLINES: u32 = 1;
/// There is a second directory.
pub(crate) const FLAG_SECOND: u32 = 1 << 1;
/// The table entry 1 stands for zeroes.
pub(crate) const FLAG_ZEROED: u32 = 1 << 2;
/// Grains are compressed.
pub(crate) const FLAG_COMPRESSED: u32 = 1 << 16;
/// Grains have markers.
pub(crate) const FLAG_MARKERS: u32 = 1 << 17;
/// The table entry for zeroes.
pub(crate) const ZEROED: u32 = 1;

/// Little-endian numbers by place; 0 behind the end.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn u16(&self, at: usize) -> u16 {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u16::from_le_bytes(*bytes))
    }

    pub fn u32(&self, at: usize) -> u32 {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    pub fn u64(&self, at: usize) -> u64 {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// Header of a hosted sparse extent, after its magic number. Places and lengths in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostedHeader {
    pub version: u32,
    pub flags: u32,
    pub capacity: u64,
    pub grain: u64,
    pub descriptor: u64,
    pub descriptor_len: u64,
    pub table_entries: u32,
    pub second_directory: u64,
    pub directory: u64,
    pub overhead: u64,
    /// 1: deflate in a zlib wrapper.
    pub compression: u16,
}

impl HostedHeader {
    /// Reads the first 79 bytes of `bytes`.
    pub fn parse(bytes: &[u8]) -> Self {
        let fields = Fields(bytes);
        Self {
            version: fields.u32(4),
            flags: fields.u32(8),
            capacity: fields.u64(12),
            grain: fields.u64(20),
            descriptor: fields.u64(28),
            descriptor_len: fields.u64(36),
            table_entries: fields.u32(44),
            second_directory: fields.u64(48),
            directory: fields.u64(56),
            overhead: fields.u64(64),
            compression: fields.u16(77),
        }
    }

    /// The sector.
    pub fn emit(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SECTOR as usize);
        bytes.extend_from_slice(&HOSTED_MAGIC.to_le_bytes());
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&self.flags.to_le_bytes());
        for field in [self.capacity, self.grain, self.descriptor, self.descriptor_len] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&self.table_entries.to_le_bytes());
        for field in [self.second_directory, self.directory, self.overhead] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        // Not "not closed cleanly", then bytes that a transfer as text would change.
        bytes.extend_from_slice(b"\0\n \r\n");
        bytes.extend_from_slice(&self.compression.to_le_bytes());
        bytes.resize(SECTOR as usize, 0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_there_and_back() {
        let header = HostedHeader {
            version: 3,
            flags: 0x3_0003,
            capacity: 6144,
            grain: 128,
            descriptor: 1,
            descriptor_len: 20,
            table_entries: 512,
            second_directory: 21,
            directory: 26,
            overhead: 128,
            compression: 1,
        };
        let bytes = header.emit();
        assert_eq!(&bytes[..12], b"KDMV\x03\0\0\0\x03\0\x03\0");
        assert_eq!(&bytes[72..80], b"\0\n \r\n\x01\0\0");
        assert_eq!((bytes.len(), HostedHeader::parse(&bytes)), (512, header));
        assert_eq!(HostedHeader::parse(b"KDMV").capacity, 0);
    }
}
