//! `measure`: how much of a disk has to be stored, for the host to reckon with.

use instar_blockio::FileId;
use instar_guest_protocol::message::{Failure, Format, MeasureReply, MeasureRequest, Step};

use super::status::Disk;
use crate::formats::{bitmap_info, open_named, qcow2_failure};
use crate::ops::failure::block;
use crate::platform::Platform;

/// Counts the bytes of clusters in which the disk holds data.
///
/// # Errors
/// An image that can't be opened, tables that can't be read.
pub fn run<P: Platform>(platform: &P, request: &MeasureRequest) -> Result<MeasureReply, Failure> {
    let source = &request.image;
    let id = FileId(source.device);
    let image = open_named(platform, source)?;
    let bitmaps = match image.as_qcow2() {
        Some(image) => image.bitmaps().map_err(|error| qcow2_failure(Step::Open, id, error))?,
        None => alloc::vec::Vec::new(),
    };
    // QEMU counts those of Parallels among the formats with bitmaps.
    let has_bitmaps =
        image.format() == Format::Parallels || image.as_qcow2().is_some_and(|image| image.header().version >= 3);
    let disk = Disk::open(platform, source)?;
    let (size, cluster) = (disk.size(), request.cluster_size.max(512));
    let (mut at, mut required) = (0u64, 0u64);
    while at < size {
        let status = disk.status_at(at, size - at).map_err(|error| block(Step::Map, None, at, error))?;
        let end = at.saturating_add(status.len);
        if status.zero || !status.present || !status.data {
            at = end;
            continue;
        }
        // Whole clusters; what is left of the last one is not looked at again.
        let whole = end.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        required = required.saturating_add(whole - (at - at % cluster));
        at = whole;
    }
    Ok(MeasureReply {
        virtual_size: size,
        required,
        has_bitmaps,
        bitmaps: bitmaps.into_iter().map(bitmap_info).collect(),
        format: disk.format().into(),
    })
}
