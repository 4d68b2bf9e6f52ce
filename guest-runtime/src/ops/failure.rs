//! Typed failures for the host, which alone makes texts of them.

use alloc::vec::Vec;

use instar_blockio::{Error, ErrorKind, FileId};
use instar_guest_protocol::message::{Cause, Failure, Format, Step};

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
