//! `compare -s`: where do two disks of one size first differ in what is allocated?
//!
//! qemu-img asks both for their block status and goes on by the shorter answer. What counts as a difference depends on that: an answer that
//! reaches the end of the disk is another than one that does not. Where contents are compared it goes by smaller steps, at which the
//! answers are the same until the shorter one ends.

use instar_blockio::Error;

use super::status::{Answer, Disk};
use crate::platform::Platform;

/// The offset at which qemu-img tells of a difference; or which disk can't be asked, where, and why.
pub(super) fn first_difference<P: Platform>(disks: &[Disk<P>; 2]) -> Option<Result<u64, (usize, u64, Error)>> {
    let size = disks[0].size().min(disks[1].size());
    let mut at = 0;
    while at < size {
        let ask = |side: usize| disks[side].answer_at(at).map_err(|error| (side, at, error));
        let (first, second) = match ask(0).and_then(|first| Ok((first, ask(1)?))) {
            Ok(answers) => answers,
            Err(fault) => return Some(Err(fault)),
        };
        if first.flags != second.flags {
            return Some(Ok(at));
        }
        at = next(at, &first, &second, size);
    }
    None
}

/// Where qemu-img asks again.
fn next(at: u64, first: &Answer, second: &Answer, size: u64) -> u64 {
    let len = first.len.min(second.len).max(1);
    if !first.flags.zero {
        return at + len;
    }
    // Long runs of zeroes: all answers on the way are the same, and one ends at each multiple of the larger unit.
    let unit = first.unit.max(second.unit);
    let reach = first.reach.min(second.reach).min(size - at).max(1);
    let far = (at + reach - 1) / unit * unit;
    (at + len).max(if unit > 1 { far } else { 0 })
}
