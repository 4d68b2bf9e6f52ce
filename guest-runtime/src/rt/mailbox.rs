//! Messages to the host.

use alloc::vec;
use alloc::vec::Vec;

use instar_blockio::FileId;
use instar_guest_protocol::boot::{DeviceFlags, Mailbox};
use instar_guest_protocol::limits::MAX_MESSAGE_BYTES;
use instar_guest_protocol::message::{Call, Cause, Failure, OpenAnswer, OpenFile, Reply, call, reply};
use instar_guest_protocol::port;
use prost::Message;

use super::{boot, doorbell};
use crate::files::FileTable;

/// Room for an [`OpenAnswer`], which has a few numbers.
const ANSWER_BYTES: usize = 256;

/// Sends a message that has no answer, or an empty one. A reply that is too long is that of a crafted image, and its end
/// says so.
pub fn call(call: &Call) {
    let paced = matches!(call.kind, Some(call::Kind::Pace(_)));
    let mut answer = vec![0; if paced { ANSWER_BYTES } else { 0 }];
    let len = call.encoded_len();
    if len > MAX_MESSAGE_BYTES && matches!(call.kind, Some(call::Kind::Done(_))) {
        let failure = Failure { cause: Cause::TooMany.into(), value: len as u64, ..Failure::default() };
        let reply = Reply { result: Some(reply::Result::Failure(failure)) };
        exchange(&Call { kind: Some(call::Kind::Done(reply)) }, &mut answer);
    } else {
        exchange(call, &mut answer);
    }
}

/// Asks for a file and enters it.
pub fn open(files: &FileTable, request: OpenFile) -> OpenAnswer {
    let mut room = vec![0; ANSWER_BYTES];
    let len = exchange(&Call { kind: Some(call::Kind::Open(request)) }, &mut room);
    let answer = OpenAnswer::decode(&room[..len]).unwrap_or_default();
    if !answer.granted {
        return OpenAnswer::default();
    }
    let flags = DeviceFlags::from_bits_truncate(answer.flags);
    let entered = files.grant(FileId(answer.device), answer.len, answer.allocated, flags);
    assert!(entered, "device {} granted", answer.device);
    answer
}

/// Delivers a message and gives the length of the answer in `answer`.
fn exchange(message: &Call, answer: &mut [u8]) -> usize {
    let bytes: Vec<u8> = message.encode_to_vec();
    assert!(bytes.len() <= MAX_MESSAGE_BYTES, "message of {} bytes", bytes.len());
    let mailbox = boot::mailbox(boot::current()).as_ptr();
    let words = Mailbox {
        message_addr: bytes.as_ptr().expose_provenance() as u64,
        message_len: bytes.len() as u64,
        answer_addr: if answer.is_empty() { 0 } else { answer.as_mut_ptr().expose_provenance() as u64 },
        answer_capacity: answer.len() as u64,
        answer_len: 0,
        reserved: 0,
    };
    // SAFETY: this vCPU's own mailbox, which the monitor reads only while this vCPU rings.
    unsafe { mailbox.write_volatile(words) };
    doorbell::ring(port::CALL, 0);
    // SAFETY: as above.
    let len = unsafe { (&raw const (*mailbox).answer_len).read_volatile() };
    usize::try_from(len).map_or(answer.len(), |len| len.min(answer.len()))
}
