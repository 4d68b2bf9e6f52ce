//! `map`: the runs of a disk, and where they lie.

use alloc::vec::Vec;

use instar_blockio::ExtentKind;
use instar_guest_protocol::message::{Call, Failure, MapReply, MapRequest, MapRun, MapRuns, Step, call};

use super::status::{Disk, Status};
use crate::ops::failure::block;
use crate::platform::Platform;

/// Runs of one message.
const RUNS: usize = 1024;

/// Sends the runs of the disk, neighbours of one kind joined.
///
/// # Errors
/// An image that can't be opened, tables that can't be read. The runs before them have been sent.
pub fn run<P: Platform>(platform: &P, request: &MapRequest) -> Result<MapReply, Failure> {
    let source = &request.image;
    let disk = Disk::open(platform, source)?;
    let size = disk.size();
    let end = request.max_length.map_or(size, |len| request.start.saturating_add(len).min(size));
    let mut runs = Runs { platform, pending: Vec::new(), last: None };
    let mut at = request.start;
    while at < end {
        let status = match disk.status_at(at, end - at) {
            Ok(status) => status,
            Err(error) => {
                runs.finish();
                return Err(block(Step::Map, None, at, error));
            }
        };
        runs.add(at, status);
        at += status.len;
    }
    runs.finish();
    Ok(MapReply { virtual_size: size })
}

struct Runs<'p, P> {
    platform: &'p P,
    pending: Vec<MapRun>,
    last: Option<(u64, Status)>,
}

impl<P: Platform> Runs<'_, P> {
    fn add(&mut self, start: u64, status: Status) {
        if let Some((_, last)) = &mut self.last
            && joins(last, &status)
        {
            last.len += status.len;
            return;
        }
        self.push_last();
        self.last = Some((start, status));
    }

    fn push_last(&mut self) {
        let Some((start, status)) = self.last.take() else { return };
        self.pending.push(MapRun {
            start,
            length: status.len,
            depth: status.depth,
            present: status.present,
            zero: status.zero,
            data: status.data,
            compressed: status.compressed,
            device: status.place.map(|(file, _)| file.0),
            offset: status.place.map_or(0, |(_, offset)| offset),
        });
        if self.pending.len() >= RUNS {
            self.send();
        }
    }

    fn send(&mut self) {
        let runs = core::mem::take(&mut self.pending);
        self.platform.call(&Call { kind: Some(call::Kind::Runs(MapRuns { runs })) });
    }

    fn finish(&mut self) {
        self.push_last();
        if !self.pending.is_empty() {
            self.send();
        }
    }
}

/// Does the second run continue the first?
fn joins(first: &Status, second: &Status) -> bool {
    let continued = first.place.map(|(file, at)| (file, at.saturating_add(first.len)));
    let flags = |status: &Status| Status { len: 0, place: None, kind: ExtentKind::Unallocated, ..*status };
    flags(first) == flags(second) && continued == second.place
}
