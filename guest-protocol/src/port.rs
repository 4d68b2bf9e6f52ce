//! Doorbells: the I/O ports that a guest may write. Any other port, width or direction ends the guest.
//!
//! All are 32-bit `out` instructions.

/// Serve the request queue of this vCPU. The value is ignored.
pub const KICK: u16 = 0x5100;
/// Deliver the message in this vCPU's mailbox ([`boot::Mailbox`](crate::boot::Mailbox)).
pub const CALL: u16 = 0x5104;
/// Only vCPU 0: let `value` parked workers (vCPU 1..=value) run.
pub const START: u16 = 0x5108;
/// Only workers: wait for the next [`START`].
pub const PARK: u16 = 0x510c;
/// Sleep while the epoch word of the boot page equals `value`.
pub const WAIT: u16 = 0x5110;
/// Wake every vCPU that sleeps in [`WAIT`]. The guest has increased the epoch word before.
pub const WAKE: u16 = 0x5114;
/// The run is over; the value is [`EXIT_OK`] or anything else for a failure without a message.
pub const EXIT: u16 = 0x5118;
/// The guest panicked; the log ring holds the message.
pub const PANIC: u16 = 0x511c;

/// Value of [`EXIT`] after the final message was delivered.
pub const EXIT_OK: u32 = 0;
