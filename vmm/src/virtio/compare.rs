//! Comparison of granted files, without the guest's memory.

use instar_guest_protocol::limits::MAX_COPY_BYTES;
use instar_guest_protocol::ring::RequestHeader;

use super::blk::{Fault, read_padded};
use super::copy::Scratch;
use super::device::Device;

/// Compares as `header` says; returns how many bytes agree before the first that does not.
pub fn compare(first: &Device, second: &Device, header: &RequestHeader, scratch: &mut Scratch) -> Result<u64, Fault> {
    let &RequestHeader { offset, len, target_offset, .. } = header;
    let inside = |start: u64| start.checked_add(len).is_some_and(|end| end <= i64::MAX as u64);
    if len > MAX_COPY_BYTES || !inside(offset) || !inside(target_offset) {
        return Err(Fault::Refused);
    }
    // Half of the buffer each: both stay in the processor's cache between reading and comparing.
    let chunk = scratch.chunk();
    let (left, right) = chunk.split_at_mut(chunk.len() / 2);
    let mut done = 0;
    while done < len {
        let count = (len - done).min(left.len() as u64) as usize;
        let (left, right) = (&mut left[..count], &mut right[..count]);
        read_padded(first, offset + done, left)?;
        read_padded(second, target_offset + done, right)?;
        if left != right {
            let equal = left.iter().zip(right.iter()).take_while(|(a, b)| a == b).count();
            return Ok(done + equal as u64);
        }
        done += count as u64;
    }
    Ok(len)
}
