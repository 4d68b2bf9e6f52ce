//! The last words: a panic's text goes to the log, then the doorbell ends the run.

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::slice;
use core::sync::atomic::{AtomicBool, Ordering};

use instar_guest_protocol::port;

use super::{boot, doorbell};

/// A failed allocation that nobody expected to fail panics with this, in `alloc`.
const ALLOCATION_FAILED: &str = "memory allocation of ";

/// The log memory. Writes what fits.
struct Log<'a> {
    room: &'a mut [u8],
    used: usize,
}

impl Write for Log<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let rest = self.room.get_mut(self.used..).unwrap_or_default();
        let len = text.len().min(rest.len());
        rest[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.used += len;
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    // A second panic, on another vCPU or in here, must not touch the log.
    if !PANICKED.swap(true, Ordering::AcqRel)
        && let Some((start, len)) = boot::log()
    {
        // SAFETY: the log is mapped for the guest, and only the first panic gets here.
        let room = unsafe { slice::from_raw_parts_mut(start.as_ptr(), len) };
        let mut log = Log { room, used: 0 };
        let _ = write!(log, "vCPU {}: ", boot::current());
        if info.message().as_str().is_none() && starts_with(info, ALLOCATION_FAILED) {
            let _ = log.write_str("out of guest memory: ");
        }
        let _ = write!(log, "{}", info.message());
        if let Some(place) = info.location() {
            let _ = write!(log, " at {place}");
        }
        boot::set_log_used(log.used);
    }
    doorbell::ring_last(port::PANIC, 0)
}

/// Whether the panic's text starts with `prefix`.
fn starts_with(info: &PanicInfo<'_>, prefix: &str) -> bool {
    let mut head = [0; ALLOCATION_FAILED.len()];
    let mut log = Log { room: &mut head, used: 0 };
    let _ = write!(log, "{}", info.message());
    head.starts_with(prefix.as_bytes())
}

/// Referenced by the precompiled `core`; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    doorbell::ring_last(port::PANIC, 0)
}
