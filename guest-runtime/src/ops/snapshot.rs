//! `snapshot`: making, applying and deleting internal snapshots. Listing is [`info`](super::info)'s work.

use instar_guest_protocol::message::{Cause, EditReply, Failure, SnapshotAction, SnapshotRequest, Step};
use instar_qcow2::{NewSnapshot, SnapshotSelector};

use crate::ops::edit::{self, Editable, Qcow2};
use crate::ops::failure::failure;
use crate::platform::Platform;

/// Does as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &SnapshotRequest) -> Result<EditReply, Failure> {
    match edit::open(platform, &request.image)? {
        Editable::Qcow2(mut image) => {
            let done = act(&mut image, request);
            image.close(done)
        }
        Editable::Other(format) => {
            Err(Failure { format: format.into(), ..failure(Step::Edit, Cause::SnapshotsUnsupported) })
        }
    }
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
        SnapshotAction::Unspecified => return Err(failure(Step::Edit, Cause::BadRequest)),
    };
    done.map_err(|error| image.failure(error))
}
