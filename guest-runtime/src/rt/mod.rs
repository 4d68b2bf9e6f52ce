//! The runtime on bare vCPUs: what a kernel, a libc and a driver would be elsewhere.
//!
//! The program runs in ring 3 from its first instruction and nothing runs below it: no interrupts, no system calls, no
//! page tables that it could change. What it can reach is memory that the monitor mapped, and the doorbells of
//! [`port`](instar_guest_protocol::port). All the `unsafe` of this crate is here and in [`lock`](crate::lock); each module
//! makes one thing safe:
//!
//! * `entry`: the first instruction, what a vCPU runs
//! * `boot`: the boot page, and which vCPU this is
//! * `doorbell`: the `out` instruction
//! * `mem`: the functions that compiled code calls to move bytes
//! * `heap`: the allocator; `c_heap`: the same for code that calls it as in C
//! * `hal`, `transport`, `queue`: virtio over shared memory; `blk` is the driver
//! * `mailbox`: messages
//! * `smp`: workers, and sleeping until something changes
//! * `panic`: the last words
#![allow(unsafe_code)]

mod blk;
mod boot;
mod c_heap;
mod doorbell;
mod entry;
mod hal;
mod heap;
mod mailbox;
mod mem;
mod panic;
mod queue;
mod smp;
mod transport;

use instar_blockio::{FileId, Result};
use instar_guest_protocol::message::{Call, OpenAnswer, OpenFile};
use instar_guest_protocol::ring::HoleRun;

pub use entry::enter;
pub use instar_guest_protocol::boot::BootPage;

use crate::files::FileTable;
use crate::platform::{FailedIo, Io, Platform};

/// The granted files.
static FILES: FileTable = FileTable::new();

/// The virtual machine. There is one, made at the entry.
#[derive(Clone, Copy, Debug)]
pub struct Machine(());

impl Platform for Machine {
    fn files(&self) -> &FileTable {
        &FILES
    }

    fn submit(&self, batch: &mut [Io<'_>]) -> core::result::Result<(), FailedIo> {
        queue::with(|queue| blk::submit(queue, &FILES, batch))
    }

    fn hole_runs(&self, file: FileId, offset: u64, len: u64, runs: &mut [HoleRun]) -> Result<usize> {
        queue::with(|queue| blk::hole_runs(queue, file, offset, len, runs))
    }

    fn call(&self, call: &Call) {
        mailbox::call(call);
    }

    fn open(&self, request: OpenFile) -> OpenAnswer {
        mailbox::open(&FILES, request)
    }

    fn vcpus(&self) -> usize {
        boot::vcpu_count()
    }

    fn parallel(&self, n: usize, f: &(dyn Fn(usize) + Sync)) {
        smp::parallel(n, f);
    }

    fn epoch(&self) -> u32 {
        smp::epoch()
    }

    fn wait(&self, epoch: u32) {
        smp::wait(epoch);
    }

    fn wake(&self) {
        smp::wake();
    }
}

/// Makes a program of an operation, a `fn(&Machine, &[u8])` that gets the request message: the entry that the monitor
/// jumps to.
///
/// For `#![no_std] #![no_main]` binaries; link.ld names `_start`.
#[macro_export]
macro_rules! program {
    ($operation:path) => {
        extern "C" fn enter(vcpu: usize, boot: *mut $crate::rt::BootPage, stack_top: usize) -> ! {
            // SAFETY: called from `_start` only, with what the monitor passes.
            unsafe { $crate::rt::enter(vcpu, boot, stack_top, $operation) }
        }

        // rdi = vCPU, rsi = boot page, rsp = top of the stack, 16-byte aligned. The frame pointer 0 ends a backtrace.
        ::core::arch::global_asm!(
            ".section .text._start, \"ax\", @progbits",
            ".global _start",
            ".type _start, @function",
            "_start:",
            "xor ebp, ebp",
            "mov rdx, rsp",
            "call {enter}",
            "ud2",
            ".text",
            enter = sym enter,
        );
    };
}
