//! `snapshot`: making, applying, deleting and listing internal snapshots.

use alloc::vec::Vec;

use instar_blockio::FileId;
use instar_guest_protocol::message::{Cause, EditReply, Failure, SnapshotAction, SnapshotRequest, Source, Step};
use instar_qcow2::{self as qcow2, Encryption, NewSnapshot, SnapshotSelector};

use crate::formats::{open_named, qcow2_failure, snapshot_info};
use crate::ops::edit::{self, Editable, Qcow2};
use crate::ops::failure::failure;
use crate::platform::Platform;

/// Does as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &SnapshotRequest) -> Result<EditReply, Failure> {
    if request.action() == SnapshotAction::List {
        return list(platform, &request.image);
    }
    match edit::open(platform, &request.image, true, false)? {
        Editable::Qcow2(mut image) => {
            let done = act(&mut image, request);
            image.close(done)
        }
        Editable::Other(format) => {
            Err(Failure { format: format.into(), ..failure(Step::Edit, Cause::SnapshotsUnsupported) })
        }
    }
}

fn list<P: Platform>(platform: &P, source: &Source) -> Result<EditReply, Failure> {
    let image = open_named(platform, source)?;
    if let Some(opened) = image.as_qcow2()
        && opened.encryption() != Encryption::None
        && opened.cipher().is_none()
    {
        return Err(qcow2_failure(Step::Open, FileId(source.device), qcow2::Error::Encrypted(0)));
    }
    edit::open_chain(platform, source, &*image)?;
    let found = match image.as_qcow2() {
        Some(qcow2) => qcow2.snapshots().map_err(|error| qcow2_failure(Step::Open, FileId(source.device), error))?,
        None => Vec::new(),
    };
    Ok(EditReply { format: image.format().into(), snapshots: found.into_iter().map(snapshot_info).collect() })
}

fn act<P: Platform>(image: &mut Qcow2<P>, request: &SnapshotRequest) -> Result<(), Failure> {
    let name = request.name.as_slice();
    let done = match request.action() {
        SnapshotAction::Create => {
            let new = NewSnapshot { name: name.to_vec(), date_sec: request.date_sec, date_nsec: request.date_nsec };
            image.writer.create_snapshot(&new)
        }
        SnapshotAction::Apply if image.bitmaps.names().next().is_some() => {
            return Err(failure(Step::Edit, Cause::BitmapsActive));
        }
        SnapshotAction::Apply => image.writer.apply_snapshot(SnapshotSelector::IdOrName(name)),
        SnapshotAction::Delete => image.writer.delete_snapshot(SnapshotSelector::Exact { id: None, name: Some(name) }),
        SnapshotAction::List | SnapshotAction::Unspecified => return Err(failure(Step::Edit, Cause::BadRequest)),
    };
    done.map_err(|error| image.failure(error))
}
