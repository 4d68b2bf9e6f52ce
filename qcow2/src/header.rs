//! The header, checked: spec chapter "Header".

use alloc::vec::Vec;
use core::ops::Range;

use bitflags::bitflags;
use zerocopy::{FromBytes, IntoBytes};

use crate::addr::{Geometry, HostOffset};
use crate::error::{Error, Result, Table};
use crate::format::{
    HEADER_LEN, HEADER_LEN_V2, HEADER_LEN_V3, MAGIC, MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_FILE_LEN, MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS, MIN_CLUSTER_BITS, RawHeader, RawSnapshot, SUBCLUSTERS, V2_REFCOUNT_ORDER,
};

bitflags! {
    /// Features without which an image must not be opened.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong: the image was not closed (lazy refcounts).
        const DIRTY = 1;
        /// Some structure is known to be wrong.
        const CORRUPT = 1 << 1;
        /// Guest clusters lie in an external data file.
        const DATA_FILE = 1 << 2;
        /// The compression type is not zlib.
        const COMPRESSION = 1 << 3;
        /// L2 entries have 16 bytes and describe subclusters.
        const EXTENDED_L2 = 1 << 4;
    }

    /// Features that may be ignored.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Compatible: u64 {
        /// Refcounts may be written late.
        const LAZY_REFCOUNTS = 1;
    }

    /// Features that a writer which doesn't know them must clear.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent with the image.
        const BITMAPS = 1;
        /// The external data file is a valid raw image.
        const DATA_FILE_RAW = 1 << 1;
    }
}

/// How guest clusters are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EncryptionMethod {
    /// Not at all.
    #[default]
    None,
    /// AES-128 in CBC mode, legacy.
    Aes,
    /// As a LUKS volume, whose header the encryption header extension points to.
    Luks,
}

/// How compressed clusters are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompressionType {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// A header whose fields don't contradict each other.
///
/// The fields are public for those who make a header; [`parse`](Self::parse) and the crate's own writers keep the
/// promises told at each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size, L2 entry kind, refcount width.
    pub geometry: Geometry,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Where the backing file name lies; 0 for none.
    pub backing_offset: u64,
    /// Its length, bytes.
    pub backing_len: u32,
    /// Encryption of guest clusters.
    pub encryption: EncryptionMethod,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where it lies.
    pub l1_offset: HostOffset,
    /// Where the refcount table lies.
    pub refcount_table_offset: HostOffset,
    /// Clusters that it takes.
    pub refcount_table_clusters: u32,
    /// Entries of the snapshot table.
    pub snapshot_count: u32,
    /// Where it lies.
    pub snapshots_offset: HostOffset,
    /// Incompatible features; all known.
    pub incompatible: Incompatible,
    /// Compatible features, unknown ones too.
    pub compatible: Compatible,
    /// Autoclear features, unknown ones too.
    pub autoclear: Autoclear,
    /// Length of the header, bytes: 72 in version 2, at least 104 in version 3. The extensions begin there.
    pub header_len: u32,
    /// How compressed clusters are stored.
    pub compression: CompressionType,
}

impl Header {
    /// Reads and checks the header at the start of `bytes`; what is missing at their end counts as zero, as it does for
    /// QEMU.
    ///
    /// # Errors
    /// The first fault in QEMU's order of checks, so that both name the same one.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut head = [0; HEADER_LEN];
        let have = bytes.len().min(HEADER_LEN);
        head[..have].copy_from_slice(&bytes[..have]);
        let raw = RawHeader::read_from_bytes(&head).map_err(|_| Error::NotQcow2)?;
        Self::check(&raw)
    }

    fn check(raw: &RawHeader) -> Result<Self> {
        if raw.magic.get() != MAGIC {
            return Err(Error::NotQcow2);
        }
        let version = raw.version.get();
        if !(2..=3).contains(&version) {
            return Err(Error::UnsupportedVersion(version));
        }
        let cluster_bits = raw.cluster_bits.get();
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(Error::UnsupportedClusterBits(cluster_bits));
        }
        let cluster_size = 1u64 << cluster_bits;
        let tail = Tail::of(version, raw, cluster_size)?;
        if raw.backing_file_offset.get() > cluster_size {
            return Err(Error::BackingOffset(raw.backing_file_offset.get()));
        }
        let compression = tail.compression()?;
        let unknown = tail.incompatible & !Incompatible::all().bits();
        if unknown != 0 {
            return Err(Error::UnknownFeatures(unknown));
        }
        let incompatible = Incompatible::from_bits_retain(tail.incompatible);
        let extended_l2 = incompatible.contains(Incompatible::EXTENDED_L2);
        let subclusters_fit = Geometry::new(cluster_bits, extended_l2, 0).is_some();
        if !subclusters_fit {
            return Err(Error::SubclusterSize((1 << cluster_bits) / SUBCLUSTERS));
        }
        let geometry = Geometry::new(cluster_bits, extended_l2, tail.refcount_order)
            .ok_or(Error::RefcountOrder(tail.refcount_order))?;
        if raw.refcount_table_clusters.get() == 0 {
            return Err(Error::NoRefcountTable);
        }
        let header = Self {
            version,
            geometry,
            virtual_size: raw.size.get(),
            backing_offset: raw.backing_file_offset.get(),
            backing_len: raw.backing_file_size.get(),
            encryption: encryption_method(raw.crypt_method.get())?,
            l1_entries: raw.l1_size.get(),
            l1_offset: HostOffset(raw.l1_table_offset.get()),
            refcount_table_offset: HostOffset(raw.refcount_table_offset.get()),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            snapshot_count: raw.nb_snapshots.get(),
            snapshots_offset: HostOffset(raw.snapshots_offset.get()),
            incompatible,
            compatible: Compatible::from_bits_retain(tail.compatible),
            autoclear: Autoclear::from_bits_retain(tail.autoclear),
            header_len: tail.header_len,
            compression,
        };
        header.check_tables()?;
        Ok(header)
    }

    fn check_tables(&self) -> Result<()> {
        let geometry = self.geometry;
        let (clusters, cluster_size) = (self.refcount_table_clusters, geometry.cluster_size());
        check_table(
            geometry,
            Table::Refcount,
            self.refcount_table_offset,
            clusters,
            cluster_size,
            MAX_REFCOUNT_TABLE_BYTES,
        )?;
        let entry = size_of::<RawSnapshot>() as u64;
        let limit = entry * u64::from(MAX_SNAPSHOTS);
        check_table(geometry, Table::Snapshots, self.snapshots_offset, self.snapshot_count, entry, limit)?;
        check_table(geometry, Table::ActiveL1, self.l1_offset, self.l1_entries, 8, MAX_L1_BYTES)?;
        if self.virtual_size > u64::MAX - (geometry.l2_span() - 1) {
            return Err(Error::SizeOverflow(self.virtual_size));
        }
        let needed = geometry.l1_entries(self.virtual_size);
        if needed > i32::MAX as u64 {
            return Err(Error::ImageTooBig(self.virtual_size));
        }
        if u64::from(self.l1_entries) < needed {
            return Err(Error::L1TooSmall(self.l1_entries));
        }
        Ok(())
    }

    /// The place of the backing file name, if there is one.
    ///
    /// # Errors
    /// [`Error::BackingNameTooLong`].
    pub(crate) fn backing_name(&self) -> Result<Option<Range<usize>>> {
        if self.backing_offset == 0 {
            return Ok(None);
        }
        let room = self.geometry.cluster_size().saturating_sub(self.backing_offset);
        if u64::from(self.backing_len) > room.min(u64::from(MAX_BACKING_NAME)) {
            return Err(Error::BackingNameTooLong(self.backing_len));
        }
        // At most a cluster, hence a usize.
        let start = self.backing_offset as usize;
        Ok(Some(start..start + self.backing_len as usize))
    }

    /// The area of the header extensions: to the backing file name or the end of the first cluster.
    pub(crate) fn extension_area(&self) -> Range<usize> {
        let end = if self.backing_offset == 0 { self.geometry.cluster_size() } else { self.backing_offset };
        let start = self.header_len as usize;
        // At most a cluster, hence a usize.
        start..(end as usize).max(start)
    }

    /// The same for a header whose features are not known, at the start of `bytes`.
    pub(crate) fn extension_area_of(bytes: &[u8]) -> Option<Range<usize>> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).ok()?;
        let cluster_bits = raw.cluster_bits.get();
        if raw.magic.get() != MAGIC || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return None;
        }
        let cluster_size = 1u64 << cluster_bits;
        let tail = Tail::of(raw.version.get(), &raw, cluster_size).ok()?;
        let end = match raw.backing_file_offset.get() {
            0 => cluster_size,
            offset => offset.min(cluster_size),
        };
        let start = tail.header_len as usize;
        Some(start..(end as usize).max(start))
    }

    /// The header as bytes: 72 in version 2, in version 3 as many as [`header_len`](Self::header_len) says, but not more
    /// than 112 (what may follow them has no meaning here).
    pub fn emit(&self) -> Vec<u8> {
        let v3 = self.version >= 3;
        let raw = RawHeader {
            magic: MAGIC.into(),
            version: self.version.into(),
            backing_file_offset: self.backing_offset.into(),
            backing_file_size: self.backing_len.into(),
            cluster_bits: self.geometry.cluster_bits().into(),
            size: self.virtual_size.into(),
            crypt_method: match self.encryption {
                EncryptionMethod::None => 0,
                EncryptionMethod::Aes => 1,
                EncryptionMethod::Luks => 2,
            }
            .into(),
            l1_size: self.l1_entries.into(),
            l1_table_offset: self.l1_offset.0.into(),
            refcount_table_offset: self.refcount_table_offset.0.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.snapshot_count.into(),
            snapshots_offset: self.snapshots_offset.0.into(),
            incompatible_features: self.incompatible.bits().into(),
            compatible_features: self.compatible.bits().into(),
            autoclear_features: self.autoclear.bits().into(),
            refcount_order: self.geometry.refcount_order().into(),
            header_length: self.header_len.into(),
            compression_type: match self.compression {
                CompressionType::Zlib => 0,
                CompressionType::Zstd => 1,
            },
            padding: [0; 7],
        };
        let len = if v3 { (self.header_len as usize).clamp(HEADER_LEN_V3, HEADER_LEN) } else { HEADER_LEN_V2 };
        raw.as_bytes()[..len].to_vec()
    }
}

/// What version 3 adds to the header, with version 2's fixed values in its place.
struct Tail {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_len: u32,
    compression_type: u8,
}

impl Tail {
    fn of(version: u32, raw: &RawHeader, cluster_size: u64) -> Result<Self> {
        if version == 2 {
            return Ok(Self {
                incompatible: 0,
                compatible: 0,
                autoclear: 0,
                refcount_order: V2_REFCOUNT_ORDER,
                header_len: HEADER_LEN_V2 as u32,
                compression_type: 0,
            });
        }
        let header_len = raw.header_length.get();
        if header_len < HEADER_LEN_V3 as u32 {
            return Err(Error::HeaderTooShort(header_len));
        }
        if u64::from(header_len) > cluster_size {
            return Err(Error::HeaderTooLong(header_len));
        }
        Ok(Self {
            incompatible: raw.incompatible_features.get(),
            compatible: raw.compatible_features.get(),
            autoclear: raw.autoclear_features.get(),
            refcount_order: raw.refcount_order.get(),
            header_len,
            compression_type: if header_len > HEADER_LEN_V3 as u32 { raw.compression_type } else { 0 },
        })
    }

    fn compression(&self) -> Result<CompressionType> {
        let bit = self.incompatible & Incompatible::COMPRESSION.bits() != 0;
        match (self.compression_type, bit) {
            (0, false) => Ok(CompressionType::Zlib),
            (0, true) => Err(Error::CompressionBitSet),
            (1, true) => Ok(CompressionType::Zstd),
            (1, false) => Err(Error::CompressionBitMissing),
            (other, _) => Err(Error::UnknownCompression(other)),
        }
    }
}

fn encryption_method(method: u32) -> Result<EncryptionMethod> {
    match method {
        0 => Ok(EncryptionMethod::None),
        1 => Ok(EncryptionMethod::Aes),
        2 => Ok(EncryptionMethod::Luks),
        other => Err(Error::EncryptionMethod(other)),
    }
}

/// The check that every table shares: `count` entries of `entry` bytes at `offset`, in all at most `limit` bytes,
/// aligned to a cluster and inside the longest file that can be.
pub(crate) fn check_table(
    geometry: Geometry,
    table: Table,
    offset: HostOffset,
    count: u32,
    entry: u64,
    limit: u64,
) -> Result<()> {
    if u64::from(count) > limit / entry {
        return Err(Error::TableTooLarge(table, count));
    }
    let len = u64::from(count) * entry;
    let limit = if len == 0 { i64::MAX as u64 } else { MAX_FILE_LEN };
    let fits = offset.0.checked_add(len).is_some_and(|end| end <= limit);
    if !fits || !geometry.is_aligned(offset.0) {
        return Err(Error::TableOffset(table, offset.0));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `qemu-img create -f qcow2 x 64M` writes.
    const V3: [u8; HEADER_LEN] = {
        let mut h = [0; HEADER_LEN];
        let parts: [(usize, &[u8]); 9] = [
            (0, b"QFI\xfb\0\0\0\x03"),       // magic, version
            (20, &[0, 0, 0, 16]),            // cluster_bits
            (24, &[0, 0, 0, 0, 4, 0, 0, 0]), // size: 64 MiB
            (36, &[0, 0, 0, 1]),             // l1_size
            (40, &[0, 0, 0, 0, 0, 3, 0, 0]), // l1_table_offset
            (48, &[0, 0, 0, 0, 0, 1, 0, 0]), // refcount_table_offset
            (56, &[0, 0, 0, 1]),             // refcount_table_clusters
            (96, &[0, 0, 0, 4]),             // refcount_order
            (100, &[0, 0, 0, 112]),          // header_length
        ];
        let mut i = 0;
        while i < parts.len() {
            let (at, bytes) = parts[i];
            let mut k = 0;
            while k < bytes.len() {
                h[at + k] = bytes[k];
                k += 1;
            }
            i += 1;
        }
        h
    };

    fn with(patches: &[(usize, &[u8])]) -> Result<Header> {
        let mut bytes = V3;
        for &(at, patch) in patches {
            bytes[at..at + patch.len()].copy_from_slice(patch);
        }
        Header::parse(&bytes)
    }

    #[test]
    fn version_3() {
        let header = Header::parse(&V3).unwrap();
        assert_eq!((header.version, header.virtual_size, header.header_len), (3, 64 << 20, 112));
        assert_eq!((header.l1_entries, header.l1_offset), (1, HostOffset(0x3_0000)));
        assert_eq!(header.geometry, Geometry::new(16, false, 4).unwrap());
        assert_eq!(header.extension_area(), 112..65536);
        assert_eq!(header.backing_name(), Ok(None));
        assert_eq!(header.emit(), V3);
    }

    #[test]
    fn version_2_has_no_tail() {
        // What lies behind 72 bytes belongs to the extensions.
        let header = with(&[(7, &[2]), (72, &[0xff; 40])]).unwrap();
        assert_eq!((header.version, header.header_len, header.incompatible.bits()), (2, 72, 0));
        assert_eq!(header.geometry.refcount_bits(), 16);
        assert_eq!(header.emit().len(), HEADER_LEN_V2);
        assert_eq!(Header::parse(&header.emit()), Ok(header));
    }

    #[test]
    fn short_header_of_version_3() {
        // The compression type is not part of it.
        let header = with(&[(103, &[104]), (104, &[9])]).unwrap();
        assert_eq!((header.compression, header.emit().len()), (CompressionType::Zlib, 104));
        let longer = with(&[(102, &[2, 0])]).unwrap();
        assert_eq!((longer.header_len, longer.emit().len()), (512, 112));
    }

    #[test]
    fn a_file_that_ends_early_goes_on_as_zeroes() {
        assert_eq!(Header::parse(b""), Err(Error::NotQcow2));
        assert_eq!(Header::parse(&V3[..4]), Err(Error::UnsupportedVersion(0)));
        assert_eq!(Header::parse(&V3[..20]), Err(Error::UnsupportedClusterBits(0)));
        assert_eq!(Header::parse(&V3[..100]), Err(Error::HeaderTooShort(0)));
        assert!(Header::parse(&V3[..104]).is_ok());
    }

    #[test]
    fn each_field_has_its_fault() {
        const BIG: [u8; 8] = 0x7fff_ffff_ffff_0000u64.to_be_bytes();
        type Patches = &'static [(usize, &'static [u8])];
        let cases: [(Patches, Error); 25] = [
            (&[(0, b"X")], Error::NotQcow2),
            (&[(7, &[9])], Error::UnsupportedVersion(9)),
            (&[(23, &[8])], Error::UnsupportedClusterBits(8)),
            (&[(23, &[22])], Error::UnsupportedClusterBits(22)),
            (&[(103, &[103])], Error::HeaderTooShort(103)),
            (&[(101, &[1, 0, 8])], Error::HeaderTooLong(0x1_0008)),
            (&[(13, &[1, 0, 1])], Error::BackingOffset(0x1_0001)),
            (&[(104, &[2])], Error::UnknownCompression(2)),
            (&[(104, &[1])], Error::CompressionBitMissing),
            (&[(79, &[8])], Error::CompressionBitSet),
            (&[(72, &[0x80]), (79, &[0x20])], Error::UnknownFeatures(0x8000_0000_0000_0020)),
            (&[(23, &[9]), (79, &[16]), (99, &[7])], Error::SubclusterSize(16)),
            (&[(99, &[7])], Error::RefcountOrder(7)),
            (&[(59, &[0]), (35, &[3])], Error::NoRefcountTable),
            (&[(35, &[3])], Error::EncryptionMethod(3)),
            (&[(59, &[129])], Error::TableTooLarge(Table::Refcount, 129)),
            (&[(55, &[1])], Error::TableOffset(Table::Refcount, 0x1_0001)),
            (&[(48, &BIG)], Error::TableOffset(Table::Refcount, u64::from_be_bytes(BIG))),
            (&[(61, &[1, 0, 1])], Error::TableTooLarge(Table::Snapshots, 65537)),
            (&[(71, &[8])], Error::TableOffset(Table::Snapshots, 8)),
            (&[(36, &[0, 0x40, 0, 1])], Error::TableTooLarge(Table::ActiveL1, (4 << 20) + 1)),
            (&[(46, &[2])], Error::TableOffset(Table::ActiveL1, 0x3_0200)),
            (&[(24, &[0x40])], Error::ImageTooBig(0x4000_0000_0400_0000)),
            (&[(24, &[0xff; 8])], Error::SizeOverflow(u64::MAX)),
            (&[(28, &[0x20, 0, 0, 1])], Error::L1TooSmall(1)),
        ];
        for (patches, error) in cases {
            assert_eq!(with(patches), Err(error), "{patches:?}");
        }
        // Just inside: an empty table may lie anywhere, 2^31 - 1 L1 entries are not asked for.
        assert!(with(&[(64, &BIG)]).is_ok());
        assert!(with(&[(59, &[128])]).is_ok());
        assert!(with(&[(28, &[0x20, 0, 0, 0])]).is_ok());
        assert!(with(&[(88, &[0xff; 8]), (80, &[0xff; 8])]).is_ok());
    }

    #[test]
    fn backing_name_lies_in_the_first_cluster() {
        let name = |offset: u16, len: u16| {
            with(&[(14, &offset.to_be_bytes()), (18, &len.to_be_bytes())]).unwrap().backing_name()
        };
        assert_eq!(name(0xff00, 256), Ok(Some(0xff00..0x1_0000)));
        assert_eq!(name(0xff00, 257), Err(Error::BackingNameTooLong(257)));
        assert_eq!(name(0x8000, 1024), Err(Error::BackingNameTooLong(1024)));
        assert_eq!(name(0x8000, 0), Ok(Some(0x8000..0x8000)));
        assert_eq!(name(0, 9), Ok(None));
    }
}
