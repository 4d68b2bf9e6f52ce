//! The mailbox of a vCPU: one message, and room for the answer.

use std::mem::offset_of;

use instar_guest_protocol::boot::Mailbox;
use instar_guest_protocol::limits::{MAX_MESSAGE_BYTES, MAX_REQUEST_MESSAGE_BYTES};
use vm_memory::VolatileSlice;

use crate::error::Misbehaviour;
use crate::memory::GuestMemory;

/// The contents of a mailbox, checked.
pub struct Mail<'m> {
    memory: &'m GuestMemory,
    /// Address of the mailbox.
    at: u64,
    message: VolatileSlice<'m>,
    answer: Option<VolatileSlice<'m>>,
}

impl<'m> Mail<'m> {
    /// Reads the mailbox at `at` once; later changes have no effect.
    pub fn open(memory: &'m GuestMemory, at: u64) -> Result<Self, Misbehaviour> {
        let bad = |_| Misbehaviour::MessageAddress;
        let mailbox: Mailbox = memory.read(at).map_err(bad)?;
        if mailbox.message_len > MAX_MESSAGE_BYTES as u64 {
            return Err(Misbehaviour::MessageLength);
        }
        let message = memory.readable(mailbox.message_addr, mailbox.message_len).map_err(bad)?;
        // Nobody has use for a longer answer.
        let answer = match mailbox.answer_capacity.min(MAX_REQUEST_MESSAGE_BYTES as u64) {
            0 => None,
            room => Some(memory.writable(mailbox.answer_addr, room).map_err(bad)?),
        };
        Ok(Self { memory, at, message, answer })
    }

    /// Bytes of the message, at most [`MAX_MESSAGE_BYTES`].
    pub fn message_len(&self) -> u64 {
        self.message.len() as u64
    }

    /// A copy of the message.
    pub fn message(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.message.len()];
        self.message.copy_to(&mut bytes);
        bytes
    }

    /// Bytes that an answer may have; 0: none is expected.
    pub fn room(&self) -> u64 {
        self.answer.as_ref().map_or(0, |place| place.len() as u64)
    }

    /// Delivers an answer of at most [`room`](Self::room) bytes, if one is expected.
    pub fn answer(&self, answer: &[u8]) -> Result<(), Misbehaviour> {
        let Some(place) = &self.answer else { return Ok(()) };
        place.copy_from(answer);
        let answer_len = self.at + offset_of!(Mailbox, answer_len) as u64;
        self.memory.write(answer_len, &(answer.len() as u64)).map_err(|_| Misbehaviour::MessageAddress)
    }
}
