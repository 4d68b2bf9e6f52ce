//! Typed failures for the host, which alone makes texts of them.

use alloc::vec::Vec;

use instar_blockio::{Error, ErrorKind, FileId};
use instar_guest_protocol::message::{BitmapFault, Cause, Failure, Field, Format, Step};
use instar_qcow2 as qcow2;

/// `errno` values that stand in where the device gave none.
const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EROFS: i32 = 30;

/// A failure without further facts.
pub fn failure(step: Step, cause: Cause) -> Failure {
    Failure {
        cause: cause.into(),
        step: step.into(),
        device: None,
        value: 0,
        value2: 0,
        text: Vec::new(),
        os: 0,
        format: Format::Unknown.into(),
    }
}

/// The same, about one file.
pub fn about(step: Step, device: FileId, cause: Cause) -> Failure {
    Failure { device: Some(device.0), ..failure(step, cause) }
}

/// A block error met during `step` at disk or file offset `offset`.
pub fn block(step: Step, device: Option<FileId>, offset: u64, error: Error) -> Failure {
    let (cause, os) = match error.kind() {
        ErrorKind::NoSpace => (Cause::Io, ENOSPC),
        ErrorKind::ReadOnly => (Cause::Io, EROFS),
        ErrorKind::Corrupt if step == Step::Read => (Cause::CorruptData, EIO),
        ErrorKind::Corrupt => (Cause::CorruptMetadata, EIO),
        ErrorKind::Encrypted => (Cause::Encrypted, 0),
        ErrorKind::Unsupported => (Cause::Unsupported, 0),
        ErrorKind::OutOfMemory => (Cause::OutOfMemory, 0),
        ErrorKind::Refused => (Cause::OpenRefused, 0),
        _ => (Cause::Io, EIO),
    };
    Failure { device: device.map(|id| id.0), value: offset, os: error.os().unwrap_or(os), ..failure(step, cause) }
}

/// Why a qcow2 image can't be opened, read or made.
pub fn qcow2_failure(step: Step, id: FileId, error: qcow2::Error) -> Failure {
    use qcow2::Error as E;
    let of = |cause| Failure { format: Format::Qcow2.into(), ..about(step, id, cause) };
    let with = |cause, value| Failure { value, ..of(cause) };
    let field = |field: Field, value2| Failure { value: field as u64, value2, ..of(Cause::InvalidField) };
    match error {
        E::Io(error) => block(step, Some(id), error.offset().unwrap_or(0), error),
        E::NotQcow2 => of(Cause::NotInFormat),
        E::UnsupportedVersion(version) => with(Cause::UnsupportedVersion, version.into()),
        E::UnsupportedClusterBits(bits) => with(Cause::UnsupportedClusterSize, bits.into()),
        E::HeaderTooShort(len) => with(Cause::HeaderTooShort, len.into()),
        E::UnknownFeatures(bits) => with(Cause::UnknownFeatures, bits),
        E::ImageTooBig(size) => with(Cause::ImageTooBig, size),
        E::SnapshotNotFound => of(Cause::SnapshotNotFound),
        E::OutOfMemory => of(Cause::OutOfMemory),
        E::Corrupt { offset, .. } => with(Cause::CorruptMetadata, offset),
        E::BitmapEntry(entry) => with(Cause::CorruptMetadata, entry),
        E::Encrypted(_) | E::EncryptedWrite => of(Cause::Encrypted),
        E::MarkedCorrupt => of(Cause::MarkedCorrupt),
        E::MarkedDirty => of(Cause::MarkedDirty),
        E::SizeOverflow(size) => field(Field::SizeOverflow, size),
        E::RawFlagWithoutDataFile => field(Field::RawFlagWithoutDataFile, 0),
        E::HeaderTooLong(len) => field(Field::HeaderLength, len.into()),
        E::BackingOffset(at) => field(Field::BackingOffset, at),
        E::BackingNameTooLong(len) => field(Field::BackingLength, len.into()),
        E::UnknownCompression(kind) => field(Field::CompressionType, kind.into()),
        E::CompressionBitSet => field(Field::CompressionBitSet, 0),
        E::CompressionBitMissing => field(Field::CompressionBitMissing, 0),
        E::SubclusterSize(size) => field(Field::ExtendedL2ClusterSize, size.into()),
        E::RefcountOrder(order) => field(Field::RefcountOrder, order.into()),
        E::EncryptionMethod(method) => field(Field::EncryptionMethod, method.into()),
        E::NoRefcountTable => field(Field::RefcountTableMissing, 0),
        E::TableTooLarge(table, size) => field(table_size(table), size.into()),
        E::TableOffset(table, at) => field(table_offset(table), at),
        E::L1TooSmall(size) => field(Field::L1TooSmall, size.into()),
        E::ExtensionTooLarge(len) => field(Field::ExtensionLength, len.into()),
        E::BackingFormatTooLong(len) => field(Field::BackingFormatLength, len.into()),
        E::UnexpectedCryptoHeader => field(Field::CryptoUnexpected, 0),
        E::CryptoExtensionLength(len) => field(Field::CryptoLength, len.into()),
        E::CryptoHeaderOffset(at) => field(Field::CryptoOffset, at),
        E::NoCryptoHeader => field(Field::CryptoMissing, 0),
        E::BitmapsExtension(fault) => bitmaps_field(fault, field),
        E::BitmapDirectory(fault) => field(Field::BitmapDirectory, bitmap_fault(fault) as u64),
        E::SnapshotExtraData(number) => field(Field::SnapshotEntry, number.into()),
        E::SnapshotTableTooBig(rest) => field(Field::SnapshotTableBytes, rest.into()),
        E::DataFileMissing => field(Field::DataFileMissing, 0),
        _ => of(Cause::Unsupported),
    }
}

fn table_size(table: qcow2::Table) -> Field {
    match table {
        qcow2::Table::ActiveL1 => Field::L1Size,
        qcow2::Table::SnapshotL1 => Field::SnapshotL1Size,
        qcow2::Table::Refcount => Field::RefcountTableSize,
        qcow2::Table::Snapshots => Field::SnapshotTableSize,
    }
}

fn table_offset(table: qcow2::Table) -> Field {
    match table {
        qcow2::Table::ActiveL1 => Field::L1Offset,
        qcow2::Table::SnapshotL1 => Field::SnapshotL1Offset,
        qcow2::Table::Refcount => Field::RefcountTableOffset,
        qcow2::Table::Snapshots => Field::SnapshotTableOffset,
    }
}

fn bitmap_fault(fault: qcow2::DirectoryFault) -> BitmapFault {
    use qcow2::DirectoryFault as D;
    match fault {
        D::Empty => BitmapFault::Empty,
        D::Broken => BitmapFault::Broken,
        D::MoreThanSaid => BitmapFault::MoreThanSaid,
        D::FewerThanSaid => BitmapFault::FewerThanSaid,
        D::ExtraData => BitmapFault::ExtraData,
        D::Constraints(_) => BitmapFault::Constraints,
        D::Duplicate(_) => BitmapFault::Duplicate,
        D::Table(_) => BitmapFault::Table,
        D::TableSize(_) => BitmapFault::TableSize,
    }
}

fn bitmaps_field(fault: qcow2::BitmapsFault, field: impl Fn(Field, u64) -> Failure) -> Failure {
    use qcow2::BitmapsFault as B;
    match fault {
        B::Length(len) => field(Field::BitmapsLength, len.into()),
        B::Reserved => field(Field::BitmapsReserved, 0),
        B::TooMany(count) => field(Field::BitmapsCount, count.into()),
        B::None => field(Field::BitmapsNone, 0),
        B::DirectoryOffset(at) => field(Field::BitmapsOffset, at),
        B::DirectorySize(size) => field(Field::BitmapsSize, size),
    }
}
