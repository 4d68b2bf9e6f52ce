//! What a vCPU runs.

use instar_guest_protocol::boot::BootPage;
use instar_guest_protocol::port;

use super::{FILES, Machine, boot, doorbell, heap, smp};

/// An operation: does what the request message says, and sends the reply.
pub type Operation = fn(&Machine, &[u8]);

/// The first function: vCPU 0 runs the operation, the others work for it. Called by [`program!`](crate::program).
///
/// # Safety
/// Called once on each vCPU, with the register values of its first instruction: its number, the boot page, and the top
/// of its stack.
pub unsafe fn enter(vcpu: usize, boot: *mut BootPage, stack_top: usize, operation: Operation) -> ! {
    // SAFETY: the caller's promise.
    unsafe { boot::init(vcpu, boot, stack_top) };
    if vcpu != 0 {
        smp::work(vcpu);
    }
    // SAFETY: vCPU 0 gets here once, before it starts any other; the monitor keeps the heap region for the guest.
    unsafe { heap::init(boot::heap()) };
    boot::grant_devices(&FILES);
    operation(&Machine(()), boot::request());
    doorbell::ring_last(port::EXIT, port::EXIT_OK)
}
