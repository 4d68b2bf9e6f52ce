//! The boot page, and which vCPU this is.

use core::arch::asm;
use core::ptr::{self, NonNull};
use core::slice;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use instar_blockio::FileId;
use instar_guest_protocol::boot::{BootPage, DeviceFlags, DeviceInfo, MAGIC, Mailbox, TransportWords};
use instar_guest_protocol::limits::{LOG_BYTES, MAX_DEVICES, MAX_REQUEST_MESSAGE_BYTES, MAX_VCPUS};

use crate::files::FileTable;

/// Reads a word of the boot page, which the monitor has written before the start.
macro_rules! word {
    ($field:ident) => {
        // SAFETY: `init` got the page, and it stays mapped.
        unsafe { (&raw const (*page().as_ptr()).$field).read_volatile() }
    };
}

static BOOT: AtomicPtr<BootPage> = AtomicPtr::new(ptr::null_mut());

/// Top of each started vCPU's stack; 0 before it starts.
static STACK_TOPS: [AtomicUsize; MAX_VCPUS] = [const { AtomicUsize::new(0) }; MAX_VCPUS];

/// Notes the boot page and the stack of the vCPU that runs this.
///
/// # Safety
/// `boot` is the boot page that the monitor made, mapped readable and writable for good; `stack_top` is above every frame
/// of this vCPU and belongs to it alone.
pub unsafe fn init(vcpu: usize, boot: *mut BootPage, stack_top: usize) {
    BOOT.store(boot, Ordering::Release);
    assert!(word!(magic) == MAGIC, "not a boot page");
    if let Some(top) = STACK_TOPS.get(vcpu) {
        top.store(stack_top, Ordering::Release);
    }
}

/// The vCPU that runs this.
///
/// Stacks are disjoint, so the lowest top above the stack pointer is the own one. (No segment base could hold the number:
/// ring 3 may not set one here.)
pub fn current() -> usize {
    let sp: usize;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) sp, options(nomem, nostack, preserves_flags)) };
    let tops = STACK_TOPS.iter().map(|top| top.load(Ordering::Relaxed)).enumerate();
    tops.filter(|&(_, top)| top >= sp).min_by_key(|&(_, top)| top).map_or(0, |(vcpu, _)| vcpu)
}

/// vCPUs that may run.
pub fn vcpu_count() -> usize {
    (word!(vcpu_count) as usize).clamp(1, MAX_VCPUS)
}

/// The request message.
pub fn request() -> &'static [u8] {
    let (addr, len) = (word!(request_addr), word!(request_len));
    assert!(len <= MAX_REQUEST_MESSAGE_BYTES as u64, "request of {len} bytes");
    match at::<u8>(addr) {
        // SAFETY: the monitor put a message of this length there, and neither side changes it.
        Some(start) => unsafe { slice::from_raw_parts(start.as_ptr(), len as usize) },
        None => &[],
    }
}

/// Address and length of the heap region.
pub fn heap() -> (u64, u64) {
    (word!(heap_addr), word!(heap_len))
}

/// Enters the files granted at the start.
pub fn grant_devices(files: &FileTable) {
    let count = word!(device_count).min(MAX_DEVICES as u32);
    let Some(table) = at::<DeviceInfo>(word!(devices_addr)) else { return };
    for device in 0..count {
        // SAFETY: the monitor's table has room for MAX_DEVICES entries.
        let info = unsafe { table.add(device as usize).read_volatile() };
        files.grant(FileId(device), info.len, info.allocated, DeviceFlags::from_bits_truncate(info.flags));
    }
}

/// The counter of the wait and wake doorbells.
pub fn epoch() -> &'static AtomicU32 {
    // SAFETY: the word lies in the boot page, which stays; the monitor only reads it, atomically.
    unsafe { AtomicU32::from_ptr(&raw mut (*page().as_ptr()).epoch) }
}

/// The transport words of a vCPU.
pub fn transport(vcpu: usize) -> NonNull<TransportWords> {
    assert!(vcpu < MAX_VCPUS);
    // SAFETY: inside the boot page, as checked.
    unsafe { NonNull::new_unchecked(&raw mut (*page().as_ptr()).vcpus[vcpu].transport) }
}

/// The mailbox of a vCPU.
pub fn mailbox(vcpu: usize) -> NonNull<Mailbox> {
    assert!(vcpu < MAX_VCPUS);
    // SAFETY: inside the boot page, as checked.
    unsafe { NonNull::new_unchecked(&raw mut (*page().as_ptr()).vcpus[vcpu].mailbox) }
}

/// Start and room of the log; `None` before [`init`].
pub fn log() -> Option<(NonNull<u8>, usize)> {
    NonNull::new(BOOT.load(Ordering::Acquire))?;
    let (addr, len) = (word!(log_addr), word!(log_len));
    Some((at(addr)?, len.min(LOG_BYTES as u64) as usize))
}

/// Tells the monitor how much of the log is in use.
pub fn set_log_used(used: usize) {
    // SAFETY: the word lies in the boot page; only the guest writes it.
    unsafe { (&raw mut (*page().as_ptr()).log_used).write_volatile(used as u32) }
}

fn page() -> NonNull<BootPage> {
    NonNull::new(BOOT.load(Ordering::Acquire)).expect("no boot page")
}

/// Memory that the monitor names by its address.
fn at<T>(addr: u64) -> Option<NonNull<T>> {
    NonNull::new(ptr::with_exposed_provenance_mut(usize::try_from(addr).ok()?))
}
