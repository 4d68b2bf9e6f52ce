//! Doorbells: the only way out.

use core::arch::asm;

/// Rings the doorbell at `port`. Returns once the monitor has served it.
///
/// The monitor reads and writes guest memory meanwhile: what earlier descriptors and mailbox words name.
pub fn ring(port: u16, value: u32) {
    // SAFETY: an `out` has no effect on this program but through memory whose addresses were handed to the monitor before;
    // the compiler must assume that any of it changes here, since `nomem` is not given.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}

/// Rings a doorbell that does not return.
pub fn ring_last(port: u16, value: u32) -> ! {
    ring(port, value);
    // SAFETY: an undefined instruction ends the machine, in case the monitor did not.
    unsafe { asm!("ud2", options(noreturn)) }
}
