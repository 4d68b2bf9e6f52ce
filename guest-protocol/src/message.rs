//! Messages, as Protocol Buffers. `proto/instar.proto` is the same contract for other languages; a test holds the two
//! together.
//!
//! One [`Request`] starts a run. The guest then makes [`Call`]s; the last is [`call::Kind::Done`]. Only
//! [`call::Kind::Open`] (an [`OpenAnswer`]) and [`call::Kind::Pace`] (an empty one) have an answer.

use alloc::vec::Vec;
use core::fmt;

/// What a run is to do.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// The operation.
    #[prost(oneof = "request::Operation", tags = "1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 20, 21, 22, 23")]
    pub operation: Option<request::Operation>,
}

/// Parts of [`Request`].
pub mod request {
    /// The operations.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Operation {
        /// Describe an image or a chain.
        #[prost(message, tag = "1")]
        Info(super::InfoRequest),
        /// Copy images into a new or existing one.
        #[prost(message, tag = "2")]
        Convert(super::ConvertRequest),
        /// Make an empty image.
        #[prost(message, tag = "3")]
        Create(super::CreateRequest),
        /// Tell where the contents of a disk lie.
        #[prost(message, tag = "4")]
        Map(super::MapRequest),
        /// Compare two disks.
        #[prost(message, tag = "5")]
        Compare(super::CompareRequest),
        /// Count what of a disk has to be stored.
        #[prost(message, tag = "6")]
        Measure(super::MeasureRequest),
        /// Check an image, and repair it.
        #[prost(message, tag = "7")]
        Check(super::CheckRequest),
        /// Make, apply or delete an internal snapshot.
        #[prost(message, tag = "10")]
        Snapshot(super::SnapshotRequest),
        /// Change a persistent dirty bitmap.
        #[prost(message, tag = "11")]
        Bitmap(super::BitmapRequest),
        /// Change options of an image.
        #[prost(message, tag = "12")]
        Amend(super::AmendRequest),
        /// Give a disk another size.
        #[prost(message, tag = "20")]
        Resize(super::ResizeRequest),
        /// Put an image on another backing image.
        #[prost(message, tag = "21")]
        Rebase(super::RebaseRequest),
        /// Move the contents of an image into one below it.
        #[prost(message, tag = "22")]
        Commit(super::CommitRequest),
        /// Make requests and measure the time.
        #[prost(message, tag = "23")]
        Bench(super::BenchRequest),
    }
}

/// An image that the user named.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Source {
    /// Granted device that holds its main file.
    #[prost(uint32, tag = "1")]
    pub device: u32,
    /// Its format; [`Format::Unknown`]: look at the first bytes.
    #[prost(enumeration = "Format", tag = "2")]
    pub format: i32,
    /// Read this internal snapshot instead of the active state.
    #[prost(message, optional, tag = "3")]
    pub snapshot: Option<SnapshotSelector>,
    /// Tables and data behind the end of a file are an error, in the image and in its chain; otherwise they read as zero.
    #[prost(bool, tag = "4")]
    pub strict: bool,
    /// If the format is to be found out: bytes without any known mark (format, partition table, file system) are an error instead
    /// of raw.
    #[prost(bool, tag = "5")]
    pub known_only: bool,
    /// A backing file without a recorded format is followed even if it refers to further files.
    #[prost(bool, tag = "6")]
    pub follow_probed: bool,
    /// If the format is to be found out: the file's name makes it an Apple disk image, unless its bytes say otherwise.
    #[prost(bool, tag = "20")]
    pub named_dmg: bool,
    /// Of a VHD.
    #[prost(enumeration = "VhdSize", tag = "40")]
    pub vhd_size: i32,
    /// Opens it if it is encrypted.
    #[prost(message, optional, tag = "70")]
    pub key: Option<Key>,
    /// The user named its external data file: it is to have one.
    #[prost(bool, tag = "71")]
    pub data_file_named: bool,
    /// Its LUKS header lies in a file of its own, for which the guest asks.
    #[prost(bool, tag = "73")]
    pub detached_header: bool,
    /// What the user says of the images below it, its backing image first.
    #[prost(message, repeated, tag = "74")]
    pub below: Vec<Below>,
}

/// What the user says of an image below another. The fields are those of [`Source`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Below {
    /// Which image it is.
    #[prost(enumeration = "BackingChoice", tag = "1")]
    pub choice: i32,
    /// [`Format::Unknown`]: as recorded.
    #[prost(enumeration = "Format", tag = "2")]
    pub format: i32,
    /// Opens it if it is encrypted.
    #[prost(message, optional, tag = "3")]
    pub key: Option<Key>,
    /// Of a VHD.
    #[prost(enumeration = "VhdSize", tag = "4")]
    pub vhd_size: i32,
    /// Bytes without any known mark are an error.
    #[prost(bool, tag = "5")]
    pub known_only: bool,
    /// It may refer to further files even if nobody says what format it has.
    #[prost(bool, tag = "6")]
    pub follow_probed: bool,
    /// The file's name makes it an Apple disk image.
    #[prost(bool, tag = "7")]
    pub named_dmg: bool,
    /// The user named its external data file.
    #[prost(bool, tag = "8")]
    pub data_file_named: bool,
    /// Its LUKS header lies in a file of its own.
    #[prost(bool, tag = "9")]
    pub detached_header: bool,
}

/// Which image lies below another. Which file that is, is the host's decision, whatever the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum BackingChoice {
    /// The one that the image records, if any.
    Recorded = 0,
    /// None, whatever the image records.
    Hidden = 1,
    /// The one that the image records, opened as said here; if it records none, one without a name is asked for.
    Adjusted = 2,
    /// One that the user named, asked for in the same way.
    Named = 3,
}

/// What opens an encrypted image, and what that may cost.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct Key {
    /// The passphrase.
    #[prost(bytes = "vec", tag = "1")]
    pub passphrase: Vec<u8>,
    /// Iterations of the key derivation, of all key slots together.
    #[prost(uint64, tag = "2")]
    pub max_iterations: u64,
    /// Memory of the key derivation, bytes.
    #[prost(uint64, tag = "3")]
    pub max_memory: u64,
}

impl fmt::Debug for Key {
    /// Says nothing of the passphrase.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// A new LUKS volume, by the names of its header.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct LuksOptions {
    /// The passphrase of its first key slot.
    #[prost(bytes = "vec", tag = "1")]
    pub passphrase: Vec<u8>,
    /// 48 random bytes, of which all that is random in the volume is made.
    #[prost(bytes = "vec", tag = "2")]
    pub seed: Vec<u8>,
    /// Cipher, such as `aes`.
    #[prost(bytes = "vec", tag = "3")]
    pub cipher_name: Vec<u8>,
    /// Mode, such as `xts-plain64`.
    #[prost(bytes = "vec", tag = "4")]
    pub cipher_mode: Vec<u8>,
    /// Hash of the key derivation, such as `sha256`.
    #[prost(bytes = "vec", tag = "5")]
    pub hash: Vec<u8>,
    /// Bytes of the master key.
    #[prost(uint32, tag = "6")]
    pub key_bytes: u32,
    /// PBKDF2 iterations of the key slot.
    #[prost(uint32, tag = "7")]
    pub slot_iterations: u32,
    /// PBKDF2 iterations of the master key's digest.
    #[prost(uint32, tag = "8")]
    pub digest_iterations: u32,
    /// Only the header is made: the contents lie in another file.
    #[prost(bool, tag = "9")]
    pub detached: bool,
}

impl fmt::Debug for LuksOptions {
    /// Says nothing of secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LuksOptions(..)")
    }
}

/// Which size of a VHD counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum VhdSize {
    /// By the program that made the image.
    ByCreator = 0,
    /// The geometry, unless it is the largest.
    Geometry = 1,
    /// The recorded size.
    Current = 2,
}

/// Names an internal snapshot. Empty fields do not restrict.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SnapshotSelector {
    /// Must equal the snapshot's id.
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    /// Must equal the snapshot's name.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// Equals the id, or else the name.
    #[prost(bytes = "vec", tag = "3")]
    pub id_or_name: Vec<u8>,
}

/// Formats of images (those that can be opened, then those that are only recognised).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Format {
    /// Not known, or to be found out.
    Unknown = 0,
    /// The bytes themselves.
    Raw = 1,
    /// QEMU copy on write, version 2 or 3.
    Qcow2 = 2,
    /// QEMU copy on write, version 1.
    Qcow = 3,
    /// VMware.
    Vmdk = 4,
    /// Virtual PC (VHD).
    Vpc = 5,
    /// Hyper-V.
    Vhdx = 6,
    /// VirtualBox.
    Vdi = 7,
    /// QEMU enhanced disk.
    Qed = 8,
    /// Parallels.
    Parallels = 9,
    /// LUKS volume.
    Luks = 10,
    /// Apple disk image.
    Dmg = 11,
    /// Bochs.
    Bochs = 12,
    /// Compressed loop.
    Cloop = 13,
    /// The protocol layer itself, as in `-f file`.
    File = 14,
    /// ISO 9660 or UDF file system (read as raw).
    Iso = 32,
    /// Raw disk with a GUID partition table.
    Gpt = 33,
    /// Raw disk with a DOS partition table.
    Mbr = 34,
    /// Expert witness format.
    Ewf = 35,
    /// Proxmox VMA archive.
    Vma = 36,
    /// Apple sparse image.
    Asif = 37,
    /// BitLocker volume.
    Bitlocker = 38,
    /// Tape archive, such as an OVA.
    Tar = 39,
    /// Compressed by gzip.
    Gzip = 40,
    /// Compressed by xz.
    Xz = 41,
    /// Compressed by Zstandard.
    Zstd = 42,
    /// Compressed by bzip2.
    Bzip2 = 43,
    /// ZIP archive.
    Zip = 44,
    /// SquashFS file system (read as raw).
    Squashfs = 45,
    /// Windows imaging format.
    Wim = 46,
}

impl Format {
    /// The format that a driver name of QEMU stands for; `None` for a name that is no image format's.
    pub fn of_driver(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"raw" => Self::Raw,
            b"file" | b"host_device" => Self::File,
            b"qcow2" => Self::Qcow2,
            b"qcow" => Self::Qcow,
            b"vmdk" => Self::Vmdk,
            b"vpc" => Self::Vpc,
            b"vhdx" => Self::Vhdx,
            b"vdi" => Self::Vdi,
            b"qed" => Self::Qed,
            b"parallels" => Self::Parallels,
            b"luks" => Self::Luks,
            b"dmg" => Self::Dmg,
            b"bochs" => Self::Bochs,
            b"cloop" => Self::Cloop,
            _ => return None,
        })
    }
}

/// Describe an image.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InfoRequest {
    /// The image.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// Follow backing files and describe each.
    #[prost(bool, tag = "2")]
    pub chain: bool,
    /// Fill [`ImageInfo::safety`].
    #[prost(bool, tag = "3")]
    pub safety: bool,
}

/// Tell where the contents of a disk lie.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MapRequest {
    /// The image; its chain is followed.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// Disk offset at which to begin.
    #[prost(uint64, tag = "2")]
    pub start: u64,
    /// Bytes; absent: to the end.
    #[prost(uint64, optional, tag = "3")]
    pub max_length: Option<u64>,
}

/// Runs of a disk in order.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MapRuns {
    /// The runs.
    #[prost(message, repeated, tag = "1")]
    pub runs: Vec<MapRun>,
}

/// A run of a disk.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct MapRun {
    /// Disk offset.
    #[prost(uint64, tag = "1")]
    pub start: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub length: u64,
    /// Which image of the chain answers, 0 for the image itself.
    #[prost(uint32, tag = "3")]
    pub depth: u32,
    /// That image has something to say.
    #[prost(bool, tag = "4")]
    pub present: bool,
    /// It reads as zero.
    #[prost(bool, tag = "5")]
    pub zero: bool,
    /// It is stored.
    #[prost(bool, tag = "6")]
    pub data: bool,
    /// It is stored compressed.
    #[prost(bool, tag = "7")]
    pub compressed: bool,
    /// The file that holds it as it is.
    #[prost(uint32, optional, tag = "8")]
    pub device: Option<u32>,
    /// Where in that file.
    #[prost(uint64, tag = "9")]
    pub offset: u64,
}

/// After all runs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MapReply {
    /// Bytes of the disk.
    #[prost(uint64, tag = "1")]
    pub virtual_size: u64,
}

/// Compare two disks.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CompareRequest {
    /// One.
    #[prost(message, required, tag = "1")]
    pub first: Source,
    /// The other.
    #[prost(message, required, tag = "2")]
    pub second: Source,
    /// What is allocated must agree as well.
    #[prost(bool, tag = "3")]
    pub strict: bool,
    /// vCPUs to use, at least 1.
    #[prost(uint32, tag = "4")]
    pub threads: u32,
    /// Send [`Progress`] often.
    #[prost(bool, tag = "5")]
    pub progress: bool,
}

/// How two disks compare.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CompareReply {
    /// Bytes of the first disk.
    #[prost(uint64, tag = "1")]
    pub first_size: u64,
    /// Bytes of the second.
    #[prost(uint64, tag = "2")]
    pub second_size: u64,
    /// Disk offset of the first difference, a multiple of 512 unless a run of the disk begins in between.
    #[prost(uint64, optional, tag = "3")]
    pub mismatch: Option<u64>,
    /// There it is the allocation that differs.
    #[prost(bool, tag = "4")]
    pub allocation: bool,
}

/// Count what of a disk has to be stored.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MeasureRequest {
    /// The image; its chain is followed.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// Whole units of this many bytes are counted.
    #[prost(uint64, tag = "2")]
    pub cluster_size: u64,
}

/// What of a disk has to be stored.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MeasureReply {
    /// Bytes of the disk.
    #[prost(uint64, tag = "1")]
    pub virtual_size: u64,
    /// Bytes of the units that hold data.
    #[prost(uint64, tag = "2")]
    pub required: u64,
    /// The image can have persistent dirty bitmaps.
    #[prost(bool, tag = "3")]
    pub has_bitmaps: bool,
    /// These are they.
    #[prost(message, repeated, tag = "4")]
    pub bitmaps: Vec<Bitmap>,
    /// The image's format.
    #[prost(enumeration = "Format", tag = "5")]
    pub format: i32,
}

/// Check an image, and repair it. To be repaired its file must be writable.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CheckRequest {
    /// The image.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// Give back what nothing refers to.
    #[prost(bool, tag = "2")]
    pub leaks: bool,
    /// Correct what contradicts itself.
    #[prost(bool, tag = "3")]
    pub corruptions: bool,
}

/// Faults, in order.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CheckFindings {
    /// The faults.
    #[prost(message, repeated, tag = "1")]
    pub findings: Vec<CheckFinding>,
}

/// A fault of an image.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CheckFinding {
    /// Which.
    #[prost(enumeration = "FindingKind", tag = "1")]
    pub kind: i32,
    /// It is repaired.
    #[prost(bool, tag = "2")]
    pub repaired: bool,
    /// What the kind says.
    #[prost(uint64, tag = "3")]
    pub first: u64,
    /// Likewise.
    #[prost(uint64, tag = "4")]
    pub second: u64,
    /// Likewise.
    #[prost(uint64, tag = "5")]
    pub third: u64,
}

/// Kinds of faults; 1 to 18 are of qcow2, the others of VHD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FindingKind {
    /// A fault of another format: `first` = a place or number in it.
    Other = 0,
    /// A range behind the end of the file: `first` = offset, `second` = length.
    BehindEnd = 1,
    /// Too many references: `first` = offset.
    CountOverflow = 2,
    /// `first` = L1 entry.
    L1Reserved = 3,
    /// `first` = offset of the L2 table.
    L2Unaligned = 4,
    /// `first` = L2 entry.
    L2Reserved = 5,
    /// `first` = offset of the stream.
    CompressedCopied = 6,
    /// `first` = number of the entry, `second` = entry.
    CompressedInDataFile = 7,
    /// `first` = number of the entry, `second` = entry.
    CompressedSubclusters = 8,
    /// `first` = offset, `second` = 1: reads as zero.
    ClusterUnaligned = 9,
    /// `first` = number of the entry.
    RefcountTableReserved = 10,
    /// `first` = number of the block.
    BlockUnaligned = 11,
    /// `first` = number of the block.
    BlockOutside = 12,
    /// `first` = number of the block, `second` = references.
    BlockShared = 13,
    /// `first` = cluster, `second` = count, `third` = references.
    Count = 14,
    /// `first` = number of the entry, `second` = entry, `third` = count.
    CopiedTable = 15,
    /// `first` = entry, `second` = count.
    CopiedCluster = 16,
    /// The refcount structures are made anew.
    Rebuilding = 17,
    /// They would have to be.
    RebuildNeeded = 18,
    /// One of two copies of the metadata is damaged or missing: `first` = 0 at the beginning of the file, 1 at its end.
    CopyDamaged = 19,
    /// Both copies are good and differ.
    CopiesDiffer = 20,
    /// A header has a wrong checksum.
    HeaderChecksum = 21,
    /// `first` = block, `second` = its place, which reaches behind the end of the file.
    DataOutside = 22,
    /// `first` = block, `second` = its place, which the image's tables take.
    DataOverTables = 23,
    /// `first` and `second` = two blocks that overlap, `third` = the place of the second.
    DataShared = 24,
    /// A Parallels image was not closed.
    NotClosed = 25,
    /// A Parallels header says wrongly where the data begin.
    DataOffset = 26,
    /// `first` = number of the table's entry whose cluster lies outside of the image.
    OutsideImage = 27,
    /// `first` = bytes at the end of the file that nothing refers to.
    LeakedAtEnd = 28,
    /// `first` = number of the table's entry whose cluster another one has.
    DuplicateEntry = 29,
    /// `first` = block of a VDI that two entries of the map refer to.
    BlockUsedTwice = 30,
    /// `first` = number of the map's entry, `second` = block, which can't be.
    BlockTooLarge = 31,
    /// `first` = allocated blocks, `second` = what the header says.
    AllocatedBlocks = 32,
    /// `first` = sector of the disk whose grain begins behind the end of the file.
    GrainBehindEnd = 33,
}

/// What a check came to.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CheckReply {
    /// The image's format.
    #[prost(enumeration = "Format", tag = "1")]
    pub format: i32,
    /// The format can be checked, and repaired if asked for.
    #[prost(bool, tag = "2")]
    pub supported: bool,
    /// The numbers; after a repair, of a second check.
    #[prost(message, optional, tag = "3")]
    pub numbers: Option<CheckNumbers>,
    /// What was repaired before.
    #[prost(message, optional, tag = "4")]
    pub repaired: Option<CheckNumbers>,
    /// The repair was not possible with what was allowed.
    #[prost(bool, tag = "5")]
    pub refused: bool,
}

/// Numbers of a check.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CheckNumbers {
    /// Faults not repaired.
    #[prost(uint64, tag = "1")]
    pub corruptions: u64,
    /// Faults repaired.
    #[prost(uint64, tag = "2")]
    pub corruptions_fixed: u64,
    /// Clusters that nothing refers to.
    #[prost(uint64, tag = "3")]
    pub leaks: u64,
    /// Those given back.
    #[prost(uint64, tag = "4")]
    pub leaks_fixed: u64,
    /// Parts that could not be checked.
    #[prost(uint64, tag = "5")]
    pub check_errors: u64,
    /// Where the image ends in its file, bytes.
    #[prost(uint64, optional, tag = "6")]
    pub image_end: Option<u64>,
    /// Clusters of the disk, 0 if the format does not tell.
    #[prost(uint64, tag = "7")]
    pub total_clusters: u64,
    /// Those that have a place.
    #[prost(uint64, tag = "8")]
    pub allocated_clusters: u64,
    /// Those not behind the one before.
    #[prost(uint64, tag = "9")]
    pub fragmented_clusters: u64,
    /// Those stored compressed.
    #[prost(uint64, tag = "10")]
    pub compressed_clusters: u64,
}

/// Copy images.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConvertRequest {
    /// Read one behind the other.
    #[prost(message, repeated, tag = "1")]
    pub sources: Vec<Source>,
    /// Where to.
    #[prost(message, required, tag = "2")]
    pub target: Target,
    /// Store compressed.
    #[prost(bool, tag = "3")]
    pub compress: bool,
    /// Zero runs of at least this many bytes stay unallocated; 0: allocate everything.
    #[prost(uint64, tag = "4")]
    pub sparse_bytes: u64,
    /// An existing target is known to read as zero.
    #[prost(bool, tag = "5")]
    pub target_is_zero: bool,
    /// Read errors become zeroes and a warning.
    #[prost(bool, tag = "6")]
    pub salvage: bool,
    /// Copy persistent dirty bitmaps.
    #[prost(bool, tag = "7")]
    pub bitmaps: bool,
    /// Leave out bitmaps marked inconsistent.
    #[prost(bool, tag = "8")]
    pub skip_broken_bitmaps: bool,
    /// vCPUs to use, at least 1.
    #[prost(uint32, tag = "9")]
    pub threads: u32,
    /// Send [`Progress`].
    #[prost(bool, tag = "10")]
    pub progress: bool,
    /// Upper bound of bytes per second, 0 for none.
    #[prost(uint64, tag = "11")]
    pub rate_limit: u64,
    /// Make the target durable before success is reported.
    #[prost(bool, tag = "12")]
    pub flush: bool,
    /// Copy a part of the sources, as `dd` does; absent: all.
    #[prost(message, optional, tag = "30")]
    pub blocks: Option<Blocks>,
}

/// A part of a disk in blocks.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Blocks {
    /// Bytes of a block, at least 1. Not more than so many are written at once.
    #[prost(uint64, tag = "1")]
    pub size: u64,
    /// Blocks from the beginning of the disk of which no more is read, those that are skipped included; absent: all.
    #[prost(uint64, optional, tag = "2")]
    pub count: Option<u64>,
    /// Blocks to be skipped.
    #[prost(uint64, tag = "3")]
    pub skip: u64,
}

/// Make an empty image.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateRequest {
    /// The image to make.
    #[prost(message, required, tag = "1")]
    pub target: Target,
    /// Virtual size in bytes; absent: that of the backing image.
    #[prost(uint64, optional, tag = "2")]
    pub size: Option<u64>,
}

/// Change the internal snapshots of an image, whose device is writable.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SnapshotRequest {
    /// The image.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// What to do.
    #[prost(enumeration = "SnapshotAction", tag = "2")]
    pub action: i32,
    /// The name of the snapshot; to be applied, its id or its name.
    #[prost(bytes = "vec", tag = "3")]
    pub name: Vec<u8>,
    /// The time of a new one: seconds since 1970.
    #[prost(uint32, tag = "4")]
    pub date_sec: u32,
    /// And nanoseconds.
    #[prost(uint32, tag = "5")]
    pub date_nsec: u32,
}

/// What to do with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum SnapshotAction {
    /// Not said.
    Unspecified = 0,
    /// Keep the present state under this name.
    Create = 1,
    /// Go back to its state.
    Apply = 2,
    /// Forget it.
    Delete = 3,
    /// Tell them all. The device need not be writable.
    List = 4,
}

/// Change a persistent dirty bitmap of an image, whose device is writable.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BitmapRequest {
    /// The image.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// The bitmap's name.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// What to do, one after the other. What was done before a failure stays.
    #[prost(message, repeated, tag = "3")]
    pub actions: Vec<BitmapAction>,
    /// Where the bitmaps to merge come from; absent: from the image itself.
    #[prost(message, optional, tag = "4")]
    pub source: Option<Source>,
}

/// One thing to do with a bitmap.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BitmapAction {
    /// What.
    #[prost(enumeration = "BitmapVerb", tag = "1")]
    pub verb: i32,
    /// To add: bytes of disk per bit, absent for the usual ones.
    #[prost(uint64, optional, tag = "2")]
    pub granularity: Option<u64>,
    /// To merge: the name of the other bitmap.
    #[prost(bytes = "vec", tag = "3")]
    pub source: Vec<u8>,
}

/// What to do with a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum BitmapVerb {
    /// Not said.
    Unspecified = 0,
    /// Make it.
    Add = 1,
    /// Remove it.
    Remove = 2,
    /// Clear its bits.
    Clear = 3,
    /// Let it record.
    Enable = 4,
    /// Let it not record.
    Disable = 5,
    /// Add the bits of another one.
    Merge = 6,
}

/// Change options of an image, whose device is writable.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AmendRequest {
    /// The image.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// The changes; absent: only open the image.
    #[prost(message, optional, tag = "2")]
    pub options: Option<AmendOptions>,
    /// Send [`Progress`], in steps.
    #[prost(bool, tag = "3")]
    pub progress: bool,
}

/// qcow2 options to change; absent ones stay as they are.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AmendOptions {
    /// 2 or 3.
    #[prost(uint32, optional, tag = "1")]
    pub version: Option<u32>,
    /// 1 to 64.
    #[prost(uint64, optional, tag = "2")]
    pub refcount_bits: Option<u64>,
    /// Postponed refcounts.
    #[prost(bool, optional, tag = "3")]
    pub lazy_refcounts: Option<bool>,
    /// Name of the external data file as stored; empty: none.
    #[prost(bytes = "vec", optional, tag = "4")]
    pub data_file: Option<Vec<u8>>,
    /// The data file stays a valid raw image.
    #[prost(bool, optional, tag = "5")]
    pub data_file_raw: Option<bool>,
    /// Name of the backing file, which must be the one recorded.
    #[prost(bytes = "vec", optional, tag = "6")]
    pub backing_file: Option<Vec<u8>>,
    /// Its format, which must be the one recorded.
    #[prost(bytes = "vec", optional, tag = "7")]
    pub backing_format: Option<Vec<u8>>,
    /// Virtual size, bytes.
    #[prost(uint64, optional, tag = "8")]
    pub size: Option<u64>,
    /// Encryption options were given.
    #[prost(bool, tag = "9")]
    pub encryption: bool,
    /// What becomes of the key slots; absent: not said, or nobody could know.
    #[prost(message, optional, tag = "10")]
    pub keys: Option<KeyChange>,
}

/// A change of the key slots of a LUKS volume, or of an image that is encrypted like one.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct KeyChange {
    /// Make a slot active; otherwise slots are erased.
    #[prost(bool, tag = "1")]
    pub activate: bool,
    /// Passphrase of the new slot.
    #[prost(bytes = "vec", tag = "2")]
    pub new_passphrase: Vec<u8>,
    /// Slots that this passphrase opens are erased.
    #[prost(bytes = "vec", optional, tag = "3")]
    pub old_passphrase: Option<Vec<u8>>,
    /// The slot; absent: a free one, or whichever the old passphrase opens.
    #[prost(uint32, optional, tag = "4")]
    pub slot: Option<u32>,
    /// PBKDF2 iterations of the new slot.
    #[prost(uint32, tag = "5")]
    pub iterations: u32,
    /// 48 random bytes, of which salt, stripes and what is written over erased keys are made.
    #[prost(bytes = "vec", tag = "6")]
    pub seed: Vec<u8>,
    /// Also what loses the contents of the volume.
    #[prost(bool, tag = "7")]
    pub force: bool,
}

impl fmt::Debug for KeyChange {
    /// Says nothing of secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyChange(..)")
    }
}

/// Give the disk of an image, whose device is writable, another size.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResizeRequest {
    /// The image.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// How the size is given.
    #[prost(enumeration = "SizeChange", tag = "2")]
    pub change: i32,
    /// Bytes.
    #[prost(uint64, tag = "3")]
    pub amount: u64,
    /// The disk may get shorter.
    #[prost(bool, tag = "4")]
    pub shrink: bool,
    /// What is allocated behind the old end; absent: not said.
    #[prost(enumeration = "Preallocation", tag = "5")]
    pub preallocation: i32,
}

/// How a new size is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum SizeChange {
    /// As it is to be.
    Absolute = 0,
    /// To be added.
    Grow = 1,
    /// To be taken off.
    Shrink = 2,
}

/// Put an image, whose device is writable, on another backing image.
///
/// The new backing image is asked for by [`OpenFile`] with [`FileRole::NewBacking`] once the chain is open.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RebaseRequest {
    /// The image.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// Name of the new backing image as stored; empty for none.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// Format name as stored; empty if not given.
    #[prost(bytes = "vec", tag = "3")]
    pub format_name: Vec<u8>,
    /// Format of the new backing image.
    #[prost(enumeration = "Format", tag = "4")]
    pub format: i32,
    /// Only record the name: neither backing image is opened.
    #[prost(bool, tag = "5")]
    pub only_name: bool,
    /// Store what is copied compressed.
    #[prost(bool, tag = "6")]
    pub compress: bool,
    /// Flushes reach the disk, in the order that keeps the image valid.
    #[prost(bool, tag = "7")]
    pub flush: bool,
    /// vCPUs to use, at least 1.
    #[prost(uint32, tag = "8")]
    pub threads: u32,
    /// Send [`Progress`].
    #[prost(bool, tag = "9")]
    pub progress: bool,
    /// What the user says of the images below the new backing image.
    #[prost(message, repeated, tag = "10")]
    pub new_below: Vec<Below>,
}

/// Move the contents of an image, whose device is writable, into an image below it.
///
/// The chain is asked for from the top by [`OpenFile`] with [`FileRole::CommitBase`]; the host grants the one image that is to be
/// written. Those it refuses are asked for as backing files.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CommitRequest {
    /// The image.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// Leave the image as it is afterwards, instead of emptying it.
    #[prost(bool, tag = "2")]
    pub keep: bool,
    /// Flushes reach the disk, in the order that keeps the images valid.
    #[prost(bool, tag = "3")]
    pub flush: bool,
    /// vCPUs to use, at least 1.
    #[prost(uint32, tag = "4")]
    pub threads: u32,
    /// Send [`Progress`].
    #[prost(bool, tag = "5")]
    pub progress: bool,
    /// Upper bound of bytes per second, 0 for none.
    #[prost(uint64, tag = "6")]
    pub rate_limit: u64,
    /// 16 random bytes, for what a change to the image below makes new.
    #[prost(bytes = "vec", tag = "7")]
    pub seed: Vec<u8>,
}

/// Make requests to an image. A first [`Progress`] tells that it is open and the first request is about to be made.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BenchRequest {
    /// The image; its device is writable for writes.
    #[prost(message, required, tag = "1")]
    pub image: Source,
    /// Number of requests.
    #[prost(uint64, tag = "2")]
    pub count: u64,
    /// Requests made at once.
    #[prost(uint64, tag = "3")]
    pub depth: u64,
    /// Disk offset of the first, bytes.
    #[prost(uint64, tag = "4")]
    pub offset: u64,
    /// Bytes of each.
    #[prost(uint64, tag = "5")]
    pub size: u64,
    /// Bytes from one to the next.
    #[prost(uint64, tag = "6")]
    pub step: u64,
    /// Write this byte; absent: read.
    #[prost(uint32, optional, tag = "7")]
    pub pattern: Option<u32>,
    /// Flush after so many writes, 0: never.
    #[prost(uint64, tag = "8")]
    pub flush_interval: u64,
    /// Flushes reach the disk.
    #[prost(bool, tag = "9")]
    pub flush: bool,
    /// 16 random bytes, for what a write makes new.
    #[prost(bytes = "vec", tag = "10")]
    pub seed: Vec<u8>,
}

/// The image that is written.
///
/// Its file is asked for by [`OpenFile`] with [`FileRole::Target`] once the sources are open.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Target {
    /// Its format, never [`Format::Unknown`].
    #[prost(enumeration = "Format", tag = "1")]
    pub format: i32,
    /// The image exists: open it and write into it, create nothing.
    #[prost(bool, tag = "2")]
    pub existing: bool,
    /// qcow2 creation options.
    #[prost(message, optional, tag = "3")]
    pub qcow2: Option<Qcow2Options>,
    /// Preallocation of the raw file or the qcow2 image.
    #[prost(enumeration = "Preallocation", tag = "4")]
    pub preallocation: i32,
    /// Backing image to record, already granted.
    #[prost(message, optional, tag = "5")]
    pub backing: Option<Backing>,
    /// QED creation options.
    #[prost(message, optional, tag = "20")]
    pub qed: Option<QedOptions>,
    /// VDI creation options.
    #[prost(message, optional, tag = "21")]
    pub vdi: Option<VdiOptions>,
    /// Parallels creation options.
    #[prost(message, optional, tag = "22")]
    pub parallels: Option<ParallelsOptions>,
    /// VHDX creation options.
    #[prost(message, optional, tag = "30")]
    pub vhdx: Option<VhdxOptions>,
    /// Random bytes for the identifiers of what is made or changed; the guest has no randomness of its own.
    #[prost(bytes = "vec", tag = "31")]
    pub seed: Vec<u8>,
    /// VMDK creation options.
    #[prost(message, optional, tag = "40")]
    pub vmdk: Option<VmdkOptions>,
    /// VHD creation options.
    #[prost(message, optional, tag = "50")]
    pub vhd: Option<VhdOptions>,
    /// LUKS, or encryption of a qcow2 image: creation options.
    #[prost(message, optional, tag = "70")]
    pub luks: Option<LuksOptions>,
    /// Opens an encrypted image that exists.
    #[prost(message, optional, tag = "71")]
    pub key: Option<Key>,
    /// The user named the external data file of the existing image: it is to have one.
    #[prost(bool, tag = "72")]
    pub data_file_named: bool,
    /// Its LUKS header lies in a file of its own, for which the guest asks.
    #[prost(bool, tag = "73")]
    pub detached_header: bool,
}

/// A backing image to record in a new image.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Backing {
    /// Name as stored.
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    /// Format name as stored.
    #[prost(bytes = "vec", tag = "2")]
    pub format_name: Vec<u8>,
    /// The image itself; absent: it is not opened (`create -u`).
    #[prost(message, optional, tag = "3")]
    pub image: Option<Source>,
}

/// qcow2 creation options; absent ones take qemu-img's default.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Qcow2Options {
    /// 2 or 3.
    #[prost(uint32, optional, tag = "1")]
    pub version: Option<u32>,
    /// Bytes.
    #[prost(uint64, optional, tag = "2")]
    pub cluster_size: Option<u64>,
    /// Subclusters.
    #[prost(bool, tag = "3")]
    pub extended_l2: bool,
    /// 1 to 64.
    #[prost(uint32, optional, tag = "4")]
    pub refcount_bits: Option<u32>,
    /// Postponed refcounts.
    #[prost(bool, tag = "5")]
    pub lazy_refcounts: bool,
    /// Zstandard instead of zlib.
    #[prost(bool, tag = "6")]
    pub zstd: bool,
    /// External data file: its name as stored.
    #[prost(bytes = "vec", optional, tag = "7")]
    pub data_file: Option<Vec<u8>>,
    /// The data file stays a valid raw image.
    #[prost(bool, tag = "8")]
    pub data_file_raw: bool,
    /// Encrypted by the legacy method: passphrase.
    #[prost(bytes = "vec", optional, tag = "9")]
    pub aes_passphrase: Option<Vec<u8>>,
}

/// QED creation options; absent ones take qemu-img's default.
#[derive(Clone, PartialEq, prost::Message)]
pub struct QedOptions {
    /// Bytes.
    #[prost(uint64, optional, tag = "1")]
    pub cluster_size: Option<u64>,
    /// Clusters.
    #[prost(uint64, optional, tag = "2")]
    pub table_size: Option<u64>,
}

/// VDI creation options.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VdiOptions {
    /// Everything is allocated.
    #[prost(bool, tag = "1")]
    pub is_static: bool,
    /// UUIDs of the image and of its last change, 16 bytes each; the guest has no randomness of its own.
    #[prost(bytes = "vec", tag = "2")]
    pub uuids: Vec<u8>,
}

/// VMDK creation options.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VmdkOptions {
    /// The type of image, such as `monolithicSparse`.
    #[prost(bytes = "vec", tag = "1")]
    pub subformat: Vec<u8>,
    /// The name of the image's file, which stands in its descriptor.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// A random number; the guest has no randomness of its own.
    #[prost(uint32, tag = "3")]
    pub cid: u32,
    /// Type of the adapter.
    #[prost(bytes = "vec", tag = "4")]
    pub adapter: Vec<u8>,
    /// Version of the virtual hardware.
    #[prost(bytes = "vec", tag = "5")]
    pub hardware_version: Vec<u8>,
    /// Version of VMware's tools.
    #[prost(bytes = "vec", tag = "6")]
    pub tools_version: Vec<u8>,
    /// Zeroes are stored as a table entry.
    #[prost(bool, tag = "7")]
    pub zeroed_grain: bool,
    /// The image is written as well as made.
    #[prost(bool, tag = "8")]
    pub filled: bool,
}

/// Parallels creation options; absent ones take qemu-img's default.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ParallelsOptions {
    /// Bytes.
    #[prost(uint64, optional, tag = "1")]
    pub cluster_size: Option<u64>,
}

/// VHD creation options.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VhdOptions {
    /// The disk lies in one piece.
    #[prost(bool, tag = "1")]
    pub fixed: bool,
    /// The size is kept, not rounded to a geometry.
    #[prost(bool, tag = "2")]
    pub force_size: bool,
    /// Time of creation, seconds since the year 2000.
    #[prost(uint32, tag = "3")]
    pub timestamp: u32,
}

/// VHDX creation options; absent ones take qemu-img's default.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VhdxOptions {
    /// Bytes; 0: by the size of the disk.
    #[prost(uint64, optional, tag = "1")]
    pub block_size: Option<u64>,
    /// Bytes.
    #[prost(uint64, optional, tag = "2")]
    pub log_size: Option<u64>,
    /// Space for everything from the beginning.
    #[prost(bool, tag = "3")]
    pub fixed: bool,
    /// Blocks without data are marked as zero.
    #[prost(bool, optional, tag = "4")]
    pub block_state_zero: Option<bool>,
    /// Name of the program, as it is stored.
    #[prost(bytes = "vec", tag = "5")]
    pub creator: Vec<u8>,
}

/// How much of a new image is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Preallocation {
    /// Nothing.
    Off = 0,
    /// Tables.
    Metadata = 1,
    /// Space reserved by the file system.
    Falloc = 2,
    /// Zeroes written.
    Full = 3,
}

/// A message from the guest.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Call {
    /// The message.
    #[prost(oneof = "call::Kind", tags = "1, 2, 3, 4, 5, 6, 7")]
    pub kind: Option<call::Kind>,
}

/// Parts of [`Call`].
pub mod call {
    /// The messages.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Kind {
        /// Grant another file. Has an answer.
        #[prost(message, tag = "1")]
        Open(super::OpenFile),
        /// How far the work is.
        #[prost(message, tag = "2")]
        Progress(super::Progress),
        /// Something the user should hear; the work goes on.
        #[prost(message, tag = "3")]
        Warning(super::Failure),
        /// The end.
        #[prost(message, tag = "4")]
        Done(super::Reply),
        /// As [`Progress`](Self::Progress), but has an (empty) answer, which the host delays to keep
        /// [`ConvertRequest::rate_limit`](super::ConvertRequest::rate_limit).
        #[prost(message, tag = "5")]
        Pace(super::Progress),
        /// Runs of a disk, of [`MapRequest`](super::MapRequest).
        #[prost(message, tag = "6")]
        Runs(super::MapRuns),
        /// What [`CheckRequest`](super::CheckRequest) found.
        #[prost(message, tag = "7")]
        Findings(super::CheckFindings),
    }
}

/// Asks for a file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OpenFile {
    /// Why.
    #[prost(enumeration = "FileRole", tag = "1")]
    pub role: i32,
    /// The device whose image names the file (0 for targets).
    #[prost(uint32, tag = "2")]
    pub referrer: u32,
    /// The name as it stands in the image; empty for targets, and where none is recorded.
    #[prost(bytes = "vec", tag = "3")]
    pub name: Vec<u8>,
    /// Targets: virtual size of the image to be written, bytes.
    #[prost(uint64, tag = "4")]
    pub size: u64,
    /// The file must be writable.
    #[prost(bool, tag = "5")]
    pub writable: bool,
    /// The format that the referrer records for the file, [`Format::Unknown`] if none or unknown.
    #[prost(enumeration = "Format", tag = "6")]
    pub format: i32,
}

/// Why a file is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FileRole {
    /// Not said.
    Unspecified = 0,
    /// The image's backing file or parent.
    Backing = 1,
    /// The image's external data file.
    Data = 2,
    /// A part of the image (VMDK extent).
    Extent = 3,
    /// The image that the user wants written.
    Target = 4,
    /// The external data file of the image that the user wants written.
    TargetData = 5,
    /// The new backing image that the user named.
    NewBacking = 6,
    /// A backing image, for writing if it is the one that the user wants written.
    CommitBase = 7,
    /// The next part of the image that the user wants written (VMDK extent); the host composes its name.
    TargetExtent = 8,
    /// The file that holds the LUKS header of an image; the user named it.
    LuksHeader = 9,
}

/// Answer to [`OpenFile`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct OpenAnswer {
    /// The file was opened.
    #[prost(bool, tag = "1")]
    pub granted: bool,
    /// Its device number.
    #[prost(uint32, tag = "2")]
    pub device: u32,
    /// Its length, bytes.
    #[prost(uint64, tag = "3")]
    pub len: u64,
    /// [`DeviceFlags`](crate::boot::DeviceFlags).
    #[prost(uint32, tag = "4")]
    pub flags: u32,
    /// Bytes of disk space that it takes; all ones if nobody knows.
    #[prost(uint64, tag = "5")]
    pub allocated: u64,
}

/// How far the work is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Progress {
    /// Bytes done.
    #[prost(uint64, tag = "1")]
    pub done: u64,
    /// Bytes to do.
    #[prost(uint64, tag = "2")]
    pub total: u64,
}

/// The end of a run.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reply {
    /// Result or failure.
    #[prost(oneof = "reply::Result", tags = "1, 2, 3, 4, 5, 6, 7, 8, 10")]
    pub result: Option<reply::Result>,
}

/// Parts of [`Reply`].
pub mod reply {
    /// Result or failure.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Result {
        /// It did not work.
        #[prost(message, tag = "1")]
        Failure(super::Failure),
        /// Of [`InfoRequest`](super::InfoRequest).
        #[prost(message, tag = "2")]
        Info(super::InfoReply),
        /// Of [`ConvertRequest`](super::ConvertRequest).
        #[prost(message, tag = "3")]
        Convert(super::ConvertReply),
        /// Of [`CreateRequest`](super::CreateRequest).
        #[prost(message, tag = "4")]
        Create(super::CreateReply),
        /// Of [`MapRequest`](super::MapRequest), after all runs.
        #[prost(message, tag = "5")]
        Map(super::MapReply),
        /// Of [`CompareRequest`](super::CompareRequest).
        #[prost(message, tag = "6")]
        Compare(super::CompareReply),
        /// Of [`MeasureRequest`](super::MeasureRequest).
        #[prost(message, tag = "7")]
        Measure(super::MeasureReply),
        /// Of [`CheckRequest`](super::CheckRequest), after all findings.
        #[prost(message, tag = "8")]
        Check(super::CheckReply),
        /// Of [`SnapshotRequest`](super::SnapshotRequest), [`BitmapRequest`](super::BitmapRequest) and
        /// [`AmendRequest`](super::AmendRequest).
        #[prost(message, tag = "10")]
        Edit(super::EditReply),
    }
}

/// What went wrong, and with which file. Texts are made by the host.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Failure {
    /// The cause.
    #[prost(enumeration = "Cause", tag = "1")]
    pub cause: i32,
    /// During which step.
    #[prost(enumeration = "Step", tag = "2")]
    pub step: i32,
    /// The file concerned.
    #[prost(uint32, optional, tag = "3")]
    pub device: Option<u32>,
    /// The offending value, as [`Cause`] says.
    #[prost(uint64, tag = "4")]
    pub value: u64,
    /// A second one.
    #[prost(uint64, tag = "5")]
    pub value2: u64,
    /// Bytes from the image that the message quotes.
    #[prost(bytes = "vec", tag = "6")]
    pub text: Vec<u8>,
    /// The host's `errno`, 0 if none.
    #[prost(int32, tag = "7")]
    pub os: i32,
    /// Format concerned.
    #[prost(enumeration = "Format", tag = "8")]
    pub format: i32,
}

/// The step that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Step {
    /// Opening an image.
    Open = 0,
    /// Reading its contents.
    Read = 1,
    /// Creating the target.
    Create = 2,
    /// Opening the existing target.
    OpenTarget = 3,
    /// Writing the target's contents.
    Write = 4,
    /// Finding the snapshot.
    Snapshot = 5,
    /// Copying bitmaps.
    Bitmaps = 6,
    /// Changing snapshots, bitmaps or options of an image.
    Edit = 7,
    /// Finding out what is stored where.
    Map = 8,
    /// Reading the metadata of an image to be changed.
    ReadMetadata = 20,
    /// Reading the old backing image.
    ReadOld = 21,
    /// Reading the new backing image.
    ReadNew = 22,
    /// Emptying an image.
    Empty = 23,
}

/// Why something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Cause {
    /// Not said; never sent on purpose.
    Unspecified = 0,
    /// A request to the host failed: `os`, `value` = offset.
    Io = 1,
    /// The host refused or could not open the file that was asked for; the host knows why.
    OpenRefused = 2,
    /// The first bytes are not those of `format`.
    NotInFormat = 3,
    /// The file is recognised as `format`, which this version does not open.
    FormatNotSupported = 4,
    /// The file ends inside the header.
    HeaderTooShort = 5,
    /// `value` = version.
    UnsupportedVersion = 6,
    /// `value` = unknown incompatible feature bits, `text` = their names in the image, separated by a comma and a blank,
    /// `value2` = those without a name.
    UnknownFeatures = 7,
    /// `value` = log2 of the cluster size.
    UnsupportedClusterSize = 8,
    /// The virtual size exceeds what the format's tables can hold.
    ImageTooBig = 9,
    /// A header field contradicts the specification: `value` = [`Field`], `value2` = its value.
    InvalidField = 10,
    /// Marked corrupt and to be written.
    MarkedCorrupt = 11,
    /// Encrypted, and no key was given.
    Encrypted = 12,
    /// Tables contradict themselves or the file: `value` = offset.
    CorruptMetadata = 13,
    /// A compressed unit can't be decoded: `value` = disk offset.
    CorruptData = 14,
    /// No such snapshot.
    SnapshotNotFound = 15,
    /// The chain is longer than the limit `value`, or closed in itself.
    ChainTooDeep = 16,
    /// A backing image without a recorded format that refers to further files; its format must be given.
    BackingFormatNeeded = 17,
    /// The target is smaller than the source.
    TargetTooSmall = 18,
    /// The virtual size `value` does not fit the target format with these options.
    SizeTooLarge = 19,
    /// The target's options contradict each other: `value` = [`OptionError`].
    InvalidOptions = 20,
    /// The target format or image stores nothing compressed.
    CompressionUnsupported = 21,
    /// The source or target format knows no bitmaps.
    BitmapsUnsupported = 22,
    /// Bitmap `text` is inconsistent.
    BitmapInconsistent = 23,
    /// A valid image feature that this version does not handle.
    Unsupported = 24,
    /// Guest memory is used up.
    OutOfMemory = 25,
    /// The request message can't be understood.
    BadRequest = 26,
    /// The target and a source are the same file.
    TargetIsSource = 27,
    /// Compressed and preallocated exclude each other.
    CompressedPreallocation = 28,
    /// The number of snapshots, bitmaps or header extensions exceeds what is accepted: `value`.
    TooMany = 29,
    /// The format recorded for the backing file is the name of no driver: `text`.
    UnknownBackingFormat = 30,
    /// Not closed cleanly, and to be written.
    MarkedDirty = 31,
    /// No known mark, and [`Source::known_only`].
    Unrecognised = 32,
    /// A bitmap can't be changed as wanted: `value` = [`BitmapRefusal`], `value2` = number of the action.
    BitmapRefused = 60,
    /// An option can't be changed as wanted: `value` = [`AmendRefusal`].
    AmendRefused = 61,
    /// The image, of `format`, can't have internal snapshots.
    SnapshotsUnsupported = 62,
    /// Refcounts are too narrow for one more reference.
    RefcountOverflow = 63,
    /// The image has bitmaps, which would not fit the state of a snapshot.
    BitmapsActive = 64,
    /// Options of images of `format` can't be changed.
    AmendUnsupported = 65,
    /// A header field or table that can't be: `value` = [`FormatFault`].
    FormatFault = 80,
    /// Chunks of type `value` in an Apple disk image can't be read; a warning.
    UnreadableChunks = 81,
    /// The parent is another image, or was changed since; `text` = its identity as the child has it.
    ParentMismatch = 90,
    /// The footer at the beginning of a VHD is damaged: the one at the end was used; a warning.
    FooterCopyUsed = 95,
    /// The footer at the end of a VHD is damaged or missing: the one at the beginning serves; a warning.
    EndFooterLost = 96,
    /// Disks of `format` keep their size.
    ResizeUnsupported = 120,
    /// The disk can't get the wanted size: `value` = [`ResizeRefusal`].
    ResizeRefused = 121,
    /// Images of `format` have no backing file, or none that could be changed.
    BackingUnsupported = 122,
    /// A backing file without a format.
    BackingFormatMissing = 123,
    /// The image can't have this backing file.
    BackingRefused = 124,
    /// The header has no room for the backing file's name.
    HeaderFull = 125,
    /// No image below is the one to be written.
    BaseNotFound = 126,
    /// There is no image below.
    NoBacking = 127,
    /// What would be written makes the image, of which nobody said that it is raw, look like one of `format`.
    GuessedRaw = 128,
    /// A VMDK image that can't be opened or made: `value` = [`VmdkFault`].
    VmdkFault = 100,
    /// The key opens no key slot.
    WrongPassphrase = 190,
    /// The header of an encrypted volume is not accepted: `value` = [`LuksFault`], `value2` and `text` as that says.
    LuksInvalid = 191,
    /// Deriving the key costs `value` iterations, more than [`Key::max_iterations`].
    KeyIterations = 192,
    /// Deriving the key takes `value` bytes of memory, more than [`Key::max_memory`].
    KeyMemory = 193,
}

/// Reasons of [`Cause::LuksInvalid`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum LuksFault {
    /// Not said.
    Unspecified = 0,
    /// The magic number is missing.
    NotLuks = 1,
    /// `value2` = version.
    Version = 2,
    /// A cipher name without end.
    CipherName = 3,
    /// A cipher mode without end.
    CipherMode = 4,
    /// A hash without end.
    HashSpec = 5,
    /// A cipher mode that is no `MODE-IVGEN`: `text`.
    ModeFormat = 6,
    /// An unknown cipher: `text`.
    UnknownCipher = 7,
    /// An unknown mode: `text`.
    UnknownMode = 8,
    /// An unknown generator of initialisation vectors: `text`.
    UnknownIvGen = 9,
    /// An unknown hash of initialisation vectors: `text`.
    UnknownIvHash = 10,
    /// An unknown hash: `text`.
    UnknownHash = 11,
    /// Cipher `text` has no key of `value2` bytes.
    KeySize = 12,
    /// Mode `text` does not go with the cipher.
    WideBlocks = 13,
    /// Cipher `text` has no key of `value2` bytes for ESSIV.
    Essiv = 14,
    /// The contents begin in the header.
    PayloadInHeader = 15,
    /// The digest has no iterations.
    NoIterations = 16,
    /// Key slot `value2` has no iterations.
    SlotNoIterations = 17,
    /// Key slot `value2` is in no known state.
    SlotState = 18,
    /// Key slot `value2 >> 32` has `value2 & 0xffffffff` stripes.
    SlotStripes = 19,
    /// Key slot `value2` lies in the header.
    SlotInHeader = 20,
    /// Key slot `value2` reaches into the contents.
    SlotInPayload = 21,
    /// Key slots `value2 >> 32` and `value2 & 0xffffffff` overlap.
    SlotsOverlap = 22,
    /// Both headers are damaged.
    Checksum = 23,
    /// The metadata make no sense.
    Metadata = 24,
    /// A feature that is not supported.
    Unsupported = 25,
    /// The contents begin behind the end of the file.
    PayloadPastEnd = 26,
}

/// Reasons of [`Cause::BitmapRefused`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum BitmapRefusal {
    /// Not said.
    Unspecified = 0,
    /// No bitmap has the name `text`.
    NotFound = 1,
    /// The bitmap exists.
    Exists = 2,
    /// The bitmap `text` was not saved properly.
    Inconsistent = 3,
    /// The name is empty.
    NameEmpty = 4,
    /// The name is too long.
    NameTooLong = 5,
    /// The granularity is no power of two, or out of range.
    Granularity = 6,
    /// The bits would take too much space.
    TooLarge = 7,
    /// There are too many bitmaps.
    TooMany = 8,
    /// The directory would be too large.
    DirectoryFull = 9,
    /// qcow2 version 2 has no bitmaps.
    Version = 10,
    /// The format has no bitmaps.
    Unsupported = 11,
    /// The disks differ in size: `text` = 8 bytes each, big-endian, of the image's and of the other disk's size.
    Sizes = 12,
}

/// Reasons of [`Cause::AmendRefused`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum AmendRefusal {
    /// Not said.
    Unspecified = 0,
    /// No such version.
    Version = 1,
    /// Not a refcount width.
    RefcountBits = 2,
    /// Refcount widths other than 16 need version 3.
    RefcountBitsVersion = 3,
    /// The count of the cluster at `value2` is too large: `text` = the count, 8 bytes, big-endian.
    RefcountTooLarge = 4,
    /// The refcount table would be too large.
    RefcountTable = 5,
    /// The image has no external data file.
    NoDataFile = 6,
    /// The data file can't become raw.
    DataFileRaw = 7,
    /// The backing file can't be changed in this way.
    Backing = 8,
    /// Lazy refcounts need version 3.
    LazyRefcountsVersion = 9,
    /// Version 2 has refcounts of 16 bits.
    DowngradeRefcountBits = 10,
    /// Version 2 has no external data file.
    DowngradeDataFile = 11,
    /// Version 2 can't describe the snapshots.
    DowngradeSnapshots = 12,
    /// Version 2 has no features `value2`.
    DowngradeFeatures = 13,
    /// The image is not encrypted.
    NoEncryption = 14,
    /// A size between sectors.
    SizeUnaligned = 15,
    /// A size of 2^63 bytes or more.
    SizeNegative = 16,
    /// The image is encrypted, but not as a LUKS volume.
    OnlyLuks = 17,
    /// There is no key slot `value2`.
    NoSuchSlot = 18,
    /// Key slot `value2` is active.
    SlotActive = 19,
    /// All key slots are active.
    NoFreeSlot = 20,
    /// The old passphrase does not open key slot `value2`.
    SlotNotOpened = 21,
    /// Key slot `value2` is not active.
    SlotInactive = 22,
    /// Key slot `value2` is the only active one.
    LastSlot = 23,
    /// The old passphrase opens no key slot.
    NoSlotOpened = 24,
    /// The old passphrase opens all active key slots.
    AllSlotsOpened = 25,
}

/// Reasons of [`Cause::ResizeRefused`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ResizeRefusal {
    /// Not said.
    Unspecified = 0,
    /// Nothing would be left.
    NotPositive = 1,
    /// Preallocation without growth.
    PreallocationNotGrowing = 2,
    /// The disk would get shorter, which was not allowed.
    Shrinks = 3,
    /// A size between sectors.
    Unaligned = 4,
    /// An image of version 2 with snapshots.
    SnapshotsVersion = 5,
    /// The tables would be too large.
    TooLarge = 6,
    /// Version 2 can't hide what a longer backing image holds.
    ZeroesVersion = 7,
    /// There are no tables to be allocated.
    NoMetadata = 8,
    /// The tables do not reach so far, or it is not whole sectors (QED).
    ImageSize = 9,
    /// The format can't make its disks shorter.
    NoShrinking = 10,
    /// The format allocates nothing in advance: `value2` = the mode.
    NoPreallocation = 11,
    /// The format can't hide what a longer backing image holds.
    NoZeroes = 12,
}

/// Header fields and tables named by [`Cause::InvalidField`]; of qcow2 where not said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Field {
    /// Not said.
    Unspecified = 0,
    /// Header length exceeds the cluster.
    HeaderLength = 1,
    /// Backing file name's place.
    BackingOffset = 2,
    /// Backing file name's length.
    BackingLength = 3,
    /// Refcount width.
    RefcountOrder = 4,
    /// Encryption method.
    EncryptionMethod = 5,
    /// Active L1 table: size.
    L1Size = 6,
    /// Active L1 table: offset.
    L1Offset = 7,
    /// Active L1 table: too small for the virtual size.
    L1TooSmall = 8,
    /// Reference count table: size.
    RefcountTableSize = 9,
    /// Reference count table: offset.
    RefcountTableOffset = 10,
    /// Reference count table: missing.
    RefcountTableMissing = 11,
    /// Snapshot table: size.
    SnapshotTableSize = 12,
    /// Snapshot table: offset.
    SnapshotTableOffset = 13,
    /// Snapshot table: an entry.
    SnapshotEntry = 14,
    /// A header extension's length.
    ExtensionLength = 15,
    /// Compression type.
    CompressionType = 16,
    /// Extended L2 entries with clusters that are too small.
    ExtendedL2ClusterSize = 17,
    /// Bitmap directory: `value2` = [`BitmapFault`], `text` = name of the bitmap concerned.
    BitmapDirectory = 18,
    /// Encryption header.
    EncryptionHeader = 19,
    /// External data file wanted but not named.
    DataFileMissing = 20,
    /// A header extension contradicts the header.
    Extension = 21,
    /// The compression feature bit is set although the type is zlib.
    CompressionBitSet = 22,
    /// The compression feature bit is missing although the type is not zlib.
    CompressionBitMissing = 23,
    /// Length of the backing format's name.
    BackingFormatLength = 24,
    /// Encryption header pointer of an image that is not encrypted by LUKS.
    CryptoUnexpected = 25,
    /// Length of the encryption header pointer.
    CryptoLength = 26,
    /// Offset of the encryption header.
    CryptoOffset = 27,
    /// LUKS without an encryption header pointer.
    CryptoMissing = 28,
    /// L1 table of a snapshot: size.
    SnapshotL1Size = 29,
    /// L1 table of a snapshot: offset.
    SnapshotL1Offset = 30,
    /// Bitmaps extension: length.
    BitmapsLength = 31,
    /// Bitmaps extension: reserved field.
    BitmapsReserved = 32,
    /// Bitmaps extension: too many bitmaps.
    BitmapsCount = 33,
    /// Bitmaps extension: no bitmap.
    BitmapsNone = 34,
    /// Bitmap directory: offset.
    BitmapsOffset = 35,
    /// Bitmap directory: size.
    BitmapsSize = 36,
    /// The external data file is said to be raw, but there is none.
    RawFlagWithoutDataFile = 37,
    /// The virtual size can't be rounded up to a whole table within 64 bits.
    SizeOverflow = 38,
    /// The snapshot table has too many bytes: `value2` snapshots lie behind the limit.
    SnapshotTableBytes = 39,
    /// VHDX: neither header is valid.
    VhdxHeader = 80,
    /// VHDX: neither region table is valid, or it contradicts the specification.
    VhdxRegionTable = 81,
    /// VHDX: a region, or the log, has an impossible place: `value2` = offset.
    VhdxRegion = 82,
    /// VHDX: a region or metadata item that must be understood and is not known.
    VhdxUnknownRequired = 83,
    /// VHDX: the metadata contradict the specification.
    VhdxMetadata = 84,
    /// VHDX: block size.
    VhdxBlockSize = 85,
    /// VHDX: logical sector size.
    VhdxSectorSize = 86,
    /// VHDX: virtual size.
    VhdxVirtualSize = 87,
    /// VHDX: the BAT is too small: `value2` = its entries.
    VhdxBatSize = 88,
    /// VHDX: the parent locator is broken or of another kind.
    VhdxParentLocator = 89,
    /// VHDX: the log can't be replayed.
    VhdxLog = 90,
    /// VHDX: state of a block: `value2` = BAT index.
    VhdxBlockState = 91,
    /// VHDX: a block begins behind the end of the file: `value2` = BAT index.
    VhdxBlockStart = 92,
    /// VHDX: a block ends behind the end of the file: `value2` = BAT index.
    VhdxBlockEnd = 93,
    /// VHDX: a block overlaps a region: `value2` = BAT index.
    VhdxBlockOverlap = 94,
    /// VHDX: a partially present block without sector bitmap: `value2` = BAT index.
    VhdxBlockBitmap = 95,
    /// VHDX: a differencing image is to be written.
    VhdxDifferencingWrite = 96,
    /// VHD: the file is too short for a footer: `value2` = its bytes.
    VhdTooShort = 140,
    /// VHD: a footer with a wrong checksum, and no good copy.
    VhdChecksum = 141,
    /// VHD: disk type.
    VhdDiskType = 142,
    /// VHD: no dynamic header where it should be.
    VhdHeader = 143,
    /// VHD: mark of the dynamic header.
    VhdHeaderMark = 144,
    /// VHD: block size.
    VhdBlockSize = 145,
    /// VHD: the block allocation table is too small.
    VhdTableTooSmall = 146,
    /// VHD: the block allocation table is too large: `value2` = its entries.
    VhdTableTooLarge = 147,
    /// VHD: the block allocation table ends behind the file.
    VhdTablePlace = 148,
    /// VHD: a block ends behind the end of the file: `value2` = its number.
    VhdTruncated = 149,
    /// VHD: a differencing image is to be written.
    VhdDifferencingWrite = 150,
    /// VHD: the disk is larger than 2040 GiB: `value2` = sectors.
    VhdSize = 151,
    /// An external data file is named for an image without one.
    DataFileUnexpected = 152,
}

/// What is wrong with a bitmap directory ([`Field::BitmapDirectory`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum BitmapFault {
    /// Not said.
    Unspecified = 0,
    /// The directory has no bytes.
    Empty = 1,
    /// An entry reaches behind its end.
    Broken = 2,
    /// More bitmaps than the header extension says.
    MoreThanSaid = 3,
    /// Fewer bitmaps than the header extension says.
    FewerThanSaid = 4,
    /// A bitmap has extra data.
    ExtraData = 5,
    /// The bitmap's fields contradict the specification or the disk.
    Constraints = 6,
    /// Two bitmaps have this name.
    Duplicate = 7,
    /// An entry of the bitmap's table can't be.
    Table = 8,
    /// The bitmap's table has not as many entries as the disk needs.
    TableSize = 9,
}

/// Reasons of [`Cause::InvalidOptions`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum OptionError {
    /// Not said.
    Unspecified = 0,
    /// Cluster size.
    ClusterSize = 1,
    /// Refcount width.
    RefcountBits = 2,
    /// Lazy refcounts need version 3.
    LazyRefcountsVersion = 3,
    /// Refcount width needs version 3.
    RefcountBitsVersion = 4,
    /// Extended L2 entries need version 3.
    ExtendedL2Version = 5,
    /// Extended L2 entries need larger clusters.
    ExtendedL2ClusterSize = 6,
    /// zstd needs version 3.
    CompressionVersion = 7,
    /// External data files need version 3.
    DataFileVersion = 8,
    /// `data_file_raw` needs `data_file`.
    DataFileRawAlone = 9,
    /// Backing and raw external data file exclude each other.
    BackingWithDataFileRaw = 10,
    /// Backing and preallocation exclude each other.
    BackingWithPreallocation = 11,
    /// Preallocation mode unknown to the format.
    Preallocation = 12,
    /// Version.
    Version = 13,
    /// A backing format without a backing file.
    BackingFormatAlone = 14,
    /// Length of the backing file's name.
    BackingNameLength = 15,
    /// Length of the backing format's name.
    BackingFormatLength = 16,
    /// qcow: a disk without bytes.
    QcowSizeZero = 40,
    /// qcow: more than an image can have that can be opened.
    QcowSizeTooLarge = 41,
    /// QED: cluster size.
    QedClusterSize = 42,
    /// QED: table size.
    QedTableSize = 43,
    /// QED: tables of one cluster, which can't be read.
    QedTableOfOneCluster = 44,
    /// QED: the tables hold `value2` bytes.
    QedImageSize = 45,
    /// VDI: `value2` = virtual size.
    VdiSize = 46,
    /// Parallels: cluster size.
    ParallelsClusterSize = 47,
    /// Parallels: virtual size, too large for the clusters.
    ParallelsImageSize = 48,
    /// VHDX: block size.
    VhdxBlockSize = 80,
    /// VHDX: no log.
    VhdxLogSizeZero = 81,
    /// VHDX: log size.
    VhdxLogSizeTooLarge = 82,
}

/// What is wrong with a VMDK image ([`Cause::VmdkFault`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum VmdkFault {
    /// Not said.
    Unspecified = 0,
    /// The descriptor names no type of image.
    Descriptor = 1,
    /// The type `text` of image can't be opened.
    ImageType = 2,
    /// The line `text` should tell of an extent.
    ExtentLine = 3,
    /// The type `text` of extent is none.
    ExtentType = 4,
    /// `value2` = number of extents.
    ExtentCount = 5,
    /// The extents are too large.
    Size = 6,
    /// `value2` = version.
    Version = 7,
    /// `value2` = entries of a grain table.
    TableSize = 8,
    /// `value2` = sectors of a grain.
    GrainSize = 9,
    /// `value2` = entries of the grain directory.
    DirectorySize = 10,
    /// `value2` = bytes that the file should have at least.
    Truncated = 11,
    /// The footer.
    Footer = 12,
    /// A field at byte `value2` of a seSparse header.
    SeSparse = 13,
    /// A journal was not replayed.
    SeSparseDirty = 14,
    /// An extent file begins with `value2`.
    ExtentMagic = 15,
    /// Images of this type are not written.
    ReadOnly = 16,
    /// The parent is no VMDK image.
    ParentFormat = 17,
    /// The parent has the CID `value2`, another one is recorded.
    ParentCid = 18,
    /// A sparse extent without a content id: a part of an image.
    NoContentId = 19,
}

/// What is wrong with an image of the older formats ([`Cause::FormatFault`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum FormatFault {
    /// Not said.
    Unspecified = 0,
    /// qcow: `value2` = version.
    QcowVersion = 1,
    /// qcow: a disk of less than two bytes.
    QcowSize = 2,
    /// qcow: cluster size.
    QcowClusterSize = 3,
    /// qcow: size of the L2 tables.
    QcowL2Size = 4,
    /// qcow: encryption method.
    QcowEncryption = 5,
    /// qcow: virtual size.
    QcowTooLarge = 6,
    /// qcow: length of the backing file's name.
    QcowBackingLength = 7,
    /// QED: `value2` = unknown features.
    QedFeatures = 8,
    /// QED: cluster size.
    QedClusterSize = 9,
    /// QED: table size.
    QedTableSize = 10,
    /// QED: virtual size.
    QedImageSize = 11,
    /// QED: place of the L1 table.
    QedTableOffset = 12,
    /// QED: size of the header.
    QedHeaderSize = 13,
    /// QED: place of the backing file's name.
    QedBackingOffset = 14,
    /// QED: length of the backing file's name.
    QedBackingLength = 15,
    /// QED: not closed cleanly, and beyond repair.
    QedDamaged = 16,
    /// VDI: `value2` = virtual size.
    VdiSize = 17,
    /// VDI: `value2` = signature.
    VdiSignature = 18,
    /// VDI: `value2` = version.
    VdiVersion = 19,
    /// VDI: `value2` = place of the block map.
    VdiMapOffset = 20,
    /// VDI: `value2` = place of the data.
    VdiDataOffset = 21,
    /// VDI: `value2` = bytes of a sector.
    VdiSectorSize = 22,
    /// VDI: `value2` = bytes of a block.
    VdiBlockSize = 23,
    /// VDI: `value2` = virtual size, `text` = decimal number of bytes that the block map has room for.
    VdiMapSize = 24,
    /// VDI: linked to another image.
    VdiLink = 25,
    /// VDI: a differencing image.
    VdiParent = 26,
    /// VDI: `value2` = blocks.
    VdiBlocks = 27,
    /// Parallels: clusters without sectors.
    ParallelsTracks = 28,
    /// Parallels: cluster size.
    ParallelsCluster = 29,
    /// Parallels: entries of the table.
    ParallelsCatalog = 30,
    /// Parallels: virtual size.
    ParallelsSize = 31,
    /// DMG: length of the file.
    DmgTooShort = 32,
    /// DMG: no trailer.
    DmgTrailer = 33,
    /// DMG: places or tables that can't be.
    DmgInvalid = 34,
    /// DMG: `value2` = sectors of a chunk, `text` = its decimal number.
    DmgChunkSectors = 35,
    /// DMG: `value2` = bytes of a chunk, `text` = its decimal number.
    DmgChunkLength = 36,
    /// Bochs: entries of the catalog, too many.
    BochsCatalogSize = 37,
    /// Bochs: extent size, too small.
    BochsExtentSmall = 38,
    /// Bochs: `value2` = extent size, no power of two.
    BochsExtentPower = 39,
    /// Bochs: `value2` = extent size, too large.
    BochsExtentLarge = 40,
    /// Bochs: entries of the catalog, too few.
    BochsCatalogSmall = 41,
    /// cloop: `value2` = block size, not whole sectors.
    CloopBlockSize = 42,
    /// cloop: block size of 0.
    CloopBlockZero = 43,
    /// cloop: `value2` = block size, too large.
    CloopBlockLarge = 44,
    /// cloop: `value2` = blocks.
    CloopBlocks = 45,
    /// cloop: too many offsets.
    CloopOffsets = 46,
    /// cloop: `value2` = number of an offset that lies before the one before it.
    CloopOrder = 47,
    /// cloop: `value2` = number of the offset behind a stream that is too long.
    CloopStream = 48,
}

/// Descriptions, the image first, then its chain.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InfoReply {
    /// One for each image.
    #[prost(message, repeated, tag = "1")]
    pub images: Vec<ImageInfo>,
}

/// What an image says of itself.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageInfo {
    /// Its main file.
    #[prost(uint32, tag = "1")]
    pub device: u32,
    /// Its format.
    #[prost(enumeration = "Format", tag = "2")]
    pub format: i32,
    /// Size of the disk, bytes, not rounded.
    #[prost(uint64, tag = "3")]
    pub virtual_size: u64,
    /// Cluster size in bytes, where the format has one.
    #[prost(uint64, optional, tag = "4")]
    pub cluster_size: Option<u64>,
    /// Contents are encrypted.
    #[prost(bool, tag = "5")]
    pub encrypted: bool,
    /// Not closed cleanly.
    #[prost(bool, tag = "6")]
    pub dirty: bool,
    /// Name of the backing file as stored.
    #[prost(bytes = "vec", optional, tag = "7")]
    pub backing_file: Option<Vec<u8>>,
    /// Its format as stored.
    #[prost(bytes = "vec", optional, tag = "8")]
    pub backing_format: Option<Vec<u8>>,
    /// Internal snapshots.
    #[prost(message, repeated, tag = "9")]
    pub snapshots: Vec<Snapshot>,
    /// qcow2 only.
    #[prost(message, optional, tag = "10")]
    pub qcow2: Option<Qcow2Info>,
    /// Where asked for.
    #[prost(message, optional, tag = "11")]
    pub safety: Option<Safety>,
    /// VMDK only.
    #[prost(message, optional, tag = "30")]
    pub vmdk: Option<VmdkInfo>,
    /// LUKS only.
    #[prost(message, optional, tag = "70")]
    pub luks: Option<LuksInfo>,
}

/// An internal snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Snapshot {
    /// Id.
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    /// Name.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// Bytes of saved machine state.
    #[prost(uint64, tag = "3")]
    pub vm_state_size: u64,
    /// Seconds since 1970.
    #[prost(uint32, tag = "4")]
    pub date_sec: u32,
    /// And nanoseconds.
    #[prost(uint32, tag = "5")]
    pub date_nsec: u32,
    /// Machine clock, nanoseconds.
    #[prost(uint64, tag = "6")]
    pub vm_clock_nsec: u64,
    /// Instruction count, where recorded.
    #[prost(uint64, optional, tag = "7")]
    pub icount: Option<u64>,
    /// Virtual size at the time, bytes.
    #[prost(uint64, tag = "8")]
    pub virtual_size: u64,
}

/// qcow2 specifics.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Qcow2Info {
    /// 2 or 3.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Clusters are compressed by Zstandard.
    #[prost(bool, tag = "2")]
    pub zstd: bool,
    /// Postponed refcounts.
    #[prost(bool, tag = "3")]
    pub lazy_refcounts: bool,
    /// Persistent dirty bitmaps.
    #[prost(message, repeated, tag = "4")]
    pub bitmaps: Vec<Bitmap>,
    /// Refcount width.
    #[prost(uint32, tag = "5")]
    pub refcount_bits: u32,
    /// Legacy AES encryption.
    #[prost(bool, tag = "6")]
    pub aes: bool,
    /// LUKS encryption.
    #[prost(message, optional, tag = "7")]
    pub luks: Option<LuksInfo>,
    /// Name of the external data file.
    #[prost(bytes = "vec", optional, tag = "8")]
    pub data_file: Option<Vec<u8>>,
    /// The data file is a valid raw image.
    #[prost(bool, tag = "9")]
    pub data_file_raw: bool,
    /// Marked corrupt.
    #[prost(bool, tag = "10")]
    pub corrupt: bool,
    /// Subclusters.
    #[prost(bool, tag = "11")]
    pub extended_l2: bool,
    /// The image has an external data file (its name may be missing).
    #[prost(bool, tag = "12")]
    pub has_data_file: bool,
}

/// VMDK specifics.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VmdkInfo {
    /// Changes with the contents.
    #[prost(uint32, tag = "1")]
    pub cid: u32,
    /// That of the parent.
    #[prost(uint32, tag = "2")]
    pub parent_cid: u32,
    /// The type of image.
    #[prost(bytes = "vec", tag = "3")]
    pub create_type: Vec<u8>,
    /// Its parts.
    #[prost(message, repeated, tag = "4")]
    pub extents: Vec<VmdkExtent>,
}

/// A part of a VMDK image.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VmdkExtent {
    /// Grains are compressed.
    #[prost(bool, tag = "1")]
    pub compressed: bool,
    /// Bytes of the disk.
    #[prost(uint64, tag = "2")]
    pub virtual_size: u64,
    /// Its file; absent for zeroes.
    #[prost(uint32, optional, tag = "3")]
    pub device: Option<u32>,
    /// Bytes of a grain, where there are grains.
    #[prost(uint64, optional, tag = "4")]
    pub cluster_size: Option<u64>,
    /// Its type in the descriptor; empty for the only extent of a file.
    #[prost(bytes = "vec", tag = "5")]
    pub kind: Vec<u8>,
}

/// A persistent dirty bitmap.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Bitmap {
    /// Name.
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    /// Bytes of disk per bit.
    #[prost(uint64, tag = "2")]
    pub granularity: u64,
    /// Was not saved properly.
    #[prost(bool, tag = "3")]
    pub in_use: bool,
    /// Is enabled when the image is opened.
    #[prost(bool, tag = "4")]
    pub auto: bool,
}

/// A LUKS header.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LuksInfo {
    /// 1 or 2.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Cipher name as stored, such as `aes`.
    #[prost(bytes = "vec", tag = "2")]
    pub cipher_name: Vec<u8>,
    /// Mode as stored, such as `xts-plain64`.
    #[prost(bytes = "vec", tag = "3")]
    pub cipher_mode: Vec<u8>,
    /// Hash as stored, such as `sha256`.
    #[prost(bytes = "vec", tag = "4")]
    pub hash: Vec<u8>,
    /// UUID as stored.
    #[prost(bytes = "vec", tag = "5")]
    pub uuid: Vec<u8>,
    /// Bytes of the master key.
    #[prost(uint32, tag = "6")]
    pub key_bytes: u32,
    /// Offset of the contents, bytes.
    #[prost(uint64, tag = "7")]
    pub payload_offset: u64,
    /// Iterations of the master key digest.
    #[prost(uint32, tag = "8")]
    pub digest_iterations: u32,
    /// Key slots.
    #[prost(message, repeated, tag = "9")]
    pub slots: Vec<LuksSlot>,
    /// Device of the file that holds the header, if that is a file of its own.
    #[prost(uint32, optional, tag = "10")]
    pub header_device: Option<u32>,
}

/// A LUKS key slot.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LuksSlot {
    /// In use.
    #[prost(bool, tag = "1")]
    pub active: bool,
    /// Iterations.
    #[prost(uint32, tag = "2")]
    pub iterations: u32,
    /// Offset of the key material, bytes.
    #[prost(uint64, tag = "3")]
    pub key_offset: u64,
    /// Anti-forensic stripes.
    #[prost(uint32, tag = "4")]
    pub stripes: u32,
}

/// What an operator should know before trusting an image.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Safety {
    /// What the bytes look like, whatever the format that was asked for; the most specific answer
    /// (such as [`Format::Gpt`] for a raw disk).
    #[prost(enumeration = "Format", tag = "1")]
    pub detected: i32,
    /// Other formats whose marks are also there.
    #[prost(enumeration = "Format", repeated, tag = "2")]
    pub also: Vec<i32>,
    /// Files that the image refers to.
    #[prost(message, repeated, tag = "3")]
    pub references: Vec<Reference>,
    /// Incompatible feature bits set (qcow2).
    #[prost(uint64, tag = "4")]
    pub incompatible_features: u64,
}

/// A file that an image refers to.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reference {
    /// As what.
    #[prost(enumeration = "FileRole", tag = "1")]
    pub role: i32,
    /// Name as stored.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
}

/// What a conversion did.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConvertReply {
    /// Bytes of the disk.
    #[prost(uint64, tag = "1")]
    pub virtual_size: u64,
    /// Bytes copied without passing through the guest.
    #[prost(uint64, tag = "2")]
    pub copied: u64,
    /// Bytes read, transformed and written by the guest.
    #[prost(uint64, tag = "3")]
    pub transformed: u64,
    /// [`Blocks::skip`] leads behind the end of what is to be read.
    #[prost(bool, tag = "4")]
    pub skipped_all: bool,
}

/// What was created.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateReply {
    /// Bytes of the disk.
    #[prost(uint64, tag = "1")]
    pub virtual_size: u64,
}

/// An image was changed, or its snapshots were listed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct EditReply {
    /// Its format.
    #[prost(enumeration = "Format", tag = "1")]
    pub format: i32,
    /// To list: its internal snapshots.
    #[prost(message, repeated, tag = "2")]
    pub snapshots: Vec<Snapshot>,
}
