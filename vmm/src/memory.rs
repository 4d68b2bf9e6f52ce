//! Guest memory: one lazily populated mapping, and the rules for reaching into it on the guest's behalf.
//!
//! The monitor reads and writes for the guest only what the guest itself may read and write. So a ring that points at page
//! tables, at code or at a guard is refused, although there is memory behind.

use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::layout::{BOOT_PAGE, IMAGE_START, LARGE_PAGE, Layout, Mapped, PAGE, SMALL_HEAP, TABLES_START, TASK_STATE};

/// Page tables of a small guest: top, 512 GiB, 1 GiB, one each for boot page and program.
const USUAL_TABLES: u64 = 5;
/// Boot page, log, first page of the device table.
const USUAL_BOOT_PAGES: u64 = 3;
/// Stack that any program uses, bytes.
const USUAL_STACK: u64 = 4 * PAGE;

/// The memory of one guest, from guest-physical address 0.
pub struct GuestMemory {
    region: MmapRegion,
    mapped: Vec<Mapped>,
}

/// An address range that the guest may not use that way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadAddress;

impl GuestMemory {
    /// Reserves the memory of `layout`. Nothing is populated.
    pub fn new(layout: &Layout) -> Result<Self, i32> {
        let size = usize::try_from(layout.size()).map_err(|_| libc::ENOMEM)?;
        let region = MmapRegion::build(
            None,
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
        .map_err(|_| std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOMEM))?;
        let memory = Self { region, mapped: joined(&layout.mapped) };
        memory.populate(layout);
        Ok(memory)
    }

    /// Decides where pages come from: large ones for the bulk of the heap, small ones at once for what every run touches.
    fn populate(&self, layout: &Layout) {
        // One fault for 2 MiB instead of 512. But zeroing 2 MiB takes as long as 30 faults, so what a small job needs is in small pages.
        self.advise(layout.heap + SMALL_HEAP, layout.heap_len - SMALL_HEAP, libc::MADV_HUGEPAGE);
        // A program of some size is copied to its place as a whole.
        let image_end = layout.mapped.iter().filter(|r| !r.large).map(|r| r.end).max().unwrap_or(IMAGE_START);
        let large_image = (image_end - IMAGE_START).next_multiple_of(LARGE_PAGE);
        self.advise(IMAGE_START, large_image, libc::MADV_HUGEPAGE);
        // What every run touches is populated at once: a fault costs several times what its page does, and twice that when
        // it's the guest that takes it.
        for (start, end) in [
            (TABLES_START, TABLES_START + USUAL_TABLES * PAGE),
            (TASK_STATE, BOOT_PAGE + USUAL_BOOT_PAGES * PAGE),
            (IMAGE_START, IMAGE_START + PAGE),
            (layout.stack_top(0) - USUAL_STACK, layout.stack_top(0)),
            (layout.heap, layout.heap + SMALL_HEAP),
        ] {
            self.advise(start, end - start, libc::MADV_POPULATE_WRITE);
        }
    }

    /// Gives the kernel a hint about whole pages. Whether it's taken makes no difference but time.
    fn advise(&self, addr: u64, len: u64, advice: libc::c_int) {
        if len == 0 {
            return;
        }
        if let Ok(slice) = self.slice(addr, len) {
            // SAFETY: the range lies within our own private anonymous mapping, and the advice changes no contents.
            unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), advice) };
        }
    }

    /// Makes the memory that of `vm`.
    pub fn attach(&'static self, vm: &VmFd) -> Result<(), i32> {
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: self.region.size() as u64,
            userspace_addr: self.region.as_ptr() as u64,
        };
        // SAFETY: the mapping lives as long as the process (`'static`), it is the only slot, and all access from this
        // process is volatile or atomic, or by the kernel.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|error| error.errno())
    }

    /// What the guest may read, at `addr` and for `len` bytes.
    pub fn readable(&self, addr: u64, len: u64) -> Result<VolatileSlice<'_>, BadAddress> {
        self.reachable(addr, len, false)
    }

    /// What the guest may write, at `addr` and for `len` bytes.
    pub fn writable(&self, addr: u64, len: u64) -> Result<VolatileSlice<'_>, BadAddress> {
        self.reachable(addr, len, true)
    }

    fn reachable(&self, addr: u64, len: u64, write: bool) -> Result<VolatileSlice<'_>, BadAddress> {
        let end = addr.checked_add(len).ok_or(BadAddress)?;
        // The last range that starts at or below `addr`.
        let at = self.mapped.partition_point(|range| range.start <= addr).checked_sub(1).ok_or(BadAddress)?;
        let range = &self.mapped[at];
        if end > range.end || (write && !range.write) {
            return Err(BadAddress);
        }
        self.slice(addr, len)
    }

    /// Any memory, mapped for the guest or not: for the monitor's own structures.
    fn slice(&self, addr: u64, len: u64) -> Result<VolatileSlice<'_>, BadAddress> {
        let addr = usize::try_from(addr).map_err(|_| BadAddress)?;
        let len = usize::try_from(len).map_err(|_| BadAddress)?;
        self.region.get_slice(addr, len).map_err(|_| BadAddress)
    }

    /// Writes the monitor's own `bytes` at `addr`, whatever the guest may do there.
    pub fn place(&self, addr: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        self.slice(addr, bytes.len() as u64)?.copy_from(bytes);
        Ok(())
    }

    /// Reads a structure once, as it is at this moment.
    pub fn read<T: FromBytes + IntoBytes>(&self, addr: u64) -> Result<T, BadAddress> {
        let mut value = T::new_zeroed();
        self.slice(addr, size_of::<T>() as u64)?.copy_to(value.as_mut_bytes());
        Ok(value)
    }

    /// Writes a structure at a place of the monitor's choice.
    pub fn write<T: IntoBytes + Immutable>(&self, addr: u64, value: &T) -> Result<(), BadAddress> {
        self.place(addr, value.as_bytes())
    }

    /// Loads a word that the guest changes with atomic instructions.
    pub fn load_u32(&self, addr: u64) -> Result<u32, BadAddress> {
        let addr = usize::try_from(addr).map_err(|_| BadAddress)?;
        let word: &AtomicU32 = self.region.get_atomic_ref(addr).map_err(|_| BadAddress)?;
        Ok(word.load(Ordering::SeqCst))
    }
}

/// Joins neighbours with equal rights, so that a buffer may cross from one to the next.
fn joined(ranges: &[Mapped]) -> Vec<Mapped> {
    let mut out: Vec<Mapped> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end == range.start && last.write == range.write => last.end = range.end,
            _ => out.push(*range),
        }
    }
    out
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::elf::{Elf, Segment};
    use crate::layout::DEVICES;

    /// Start of the heap in [`sample`].
    pub const HEAP: u64 = 0xfc_0000;

    /// Memory of a guest with one page of code and one of data.
    pub fn sample() -> GuestMemory {
        let segment =
            |start, write| Segment { start, end: start + PAGE, load_at: start, file: 0..0, write, execute: !write };
        let program =
            Elf { entry: IMAGE_START, segments: vec![segment(IMAGE_START, false), segment(IMAGE_START + PAGE, true)] };
        let layout = Layout::new(&program, 2, 64 << 20).unwrap();
        assert_eq!((layout.heap, layout.stack_top(1)), (HEAP, STACK_1));
        GuestMemory::new(&layout).unwrap()
    }

    const STACK_0: u64 = 0x80_0000;
    const STACK_1: u64 = 0xc0_0000;

    #[test]
    fn rights_are_those_of_the_guest() {
        let memory = sample();
        let end = memory.mapped.last().unwrap().end;
        assert!(memory.readable(IMAGE_START, 2 * PAGE).is_err(), "code and data are two ranges");
        assert!(memory.readable(IMAGE_START, PAGE).is_ok());
        assert_eq!(memory.writable(IMAGE_START, 1).unwrap_err(), BadAddress);
        assert!(memory.writable(IMAGE_START + PAGE, PAGE).is_ok());
        assert!(memory.writable(DEVICES, 1).is_err());
        assert!(memory.writable(BOOT_PAGE, PAGE).is_ok());
        for unmapped in [0, TABLES_START, BOOT_PAGE - 1, 0x40_0000, STACK_0, STACK_1, 0xdf_ffff, end, u64::MAX] {
            assert!(memory.readable(unmapped, 1).is_err(), "{unmapped:#x}");
        }
        assert!(memory.writable(STACK_1 - 8, 8).is_ok());
        assert!(memory.writable(STACK_1 - 8, 9).is_err());
        assert!(memory.writable(HEAP, end - HEAP).is_ok());
        assert!(memory.writable(HEAP, end - HEAP + 1).is_err());
        assert!(memory.writable(HEAP + 1, u64::MAX).is_err());
    }

    #[test]
    fn structures_are_read_as_written() {
        let memory = sample();
        memory.write(HEAP, &0x0123_4567_89ab_cdefu64).unwrap();
        assert_eq!(memory.read::<[u8; 2]>(HEAP).unwrap(), [0xef, 0xcd]);
        assert_eq!(memory.load_u32(HEAP + 4).unwrap(), 0x0123_4567);
        assert!(memory.load_u32(HEAP + 2).is_err(), "misaligned");
        assert!(memory.read::<u64>(u64::MAX - 3).is_err());
    }
}
