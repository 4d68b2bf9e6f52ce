//! The memory map of a guest.
//!
//! Guest-virtual equals guest-physical wherever a page is mapped. What is not drawn is not mapped.
//!
//! ```text
//! 0x0000_0000  page 0                  never mapped
//! 0x0000_1000  page tables             physical only: ring 3 can't reach them
//! 0x000f_f000  task state              R, not for ring 3: which ports it may write
//! 0x0010_0000  boot page, log          RW
//! 0x0010_2000  device table            R
//! 0x0011_0000  request                 R
//! 0x0020_0000  program                 as its segments say: RX, R, RW; ends below 16 MiB
//!      2 MiB   stacks                  each 2 MiB of guard, then 2 MiB RW, growing down
//!  alignment   guard                   2 MiB
//!              heap                    RW, in pages of 2 MiB, to the end; the guest is given its last 256 KiB below the first
//!                                      multiple of 2 MiB, and all behind it
//! ```
//!
//! The memory behind is one anonymous mapping; guards and gaps cost address space only (and 8 bytes of the kernel's per page,
//! which is why nothing has a fixed place far up).

use instar_guest_protocol::boot::{BootPage, DeviceInfo};
use instar_guest_protocol::limits::{LOG_BYTES, MAX_DEVICES, MAX_REQUEST_MESSAGE_BYTES, MAX_VCPUS};

use crate::elf::Elf;
use crate::error::Error;

/// A small page.
pub const PAGE: u64 = 4096;
/// A large page.
pub const LARGE_PAGE: u64 = 2 << 20;

/// Where page tables are put.
pub const TABLES_START: u64 = 0x1000;
/// End of the room for page tables.
pub const TABLES_END: u64 = TASK_STATE;
/// The task state segment: one page that the processor reads, and ring 3 can't.
pub const TASK_STATE: u64 = 0xf_f000;
/// The boot page.
pub const BOOT_PAGE: u64 = 0x10_0000;
/// The log.
pub const LOG: u64 = BOOT_PAGE + PAGE;
/// The device table.
pub const DEVICES: u64 = LOG + LOG_BYTES as u64;
/// The request that starts the run.
pub const REQUEST: u64 = 0x11_0000;
/// Where programs may lie.
pub const IMAGE_START: u64 = 0x20_0000;
/// End of the room for programs.
pub const IMAGE_END: u64 = 0x100_0000;
/// Bytes of one stack.
pub const STACK_BYTES: u64 = LARGE_PAGE;
/// From one stack to the next, a guard between them.
pub const STACK_STRIDE: u64 = 2 * LARGE_PAGE;
/// The beginning of the heap, which small jobs do with: memory for it is taken in small pages, for all behind it in large ones.
pub const SMALL_HEAP: u64 = 256 << 10;
/// Largest heap. Its page tables fit, and all addresses fit into 36 bits, which every processor has.
pub const MAX_HEAP: u64 = 32 << 30;

const _: () = {
    assert!(size_of::<BootPage>() <= PAGE as usize);
    assert!(LOG_BYTES as u64 == PAGE);
    assert!(DEVICES + (MAX_DEVICES * size_of::<DeviceInfo>()) as u64 <= REQUEST);
    assert!(REQUEST + MAX_REQUEST_MESSAGE_BYTES as u64 <= IMAGE_START);
    assert!(IMAGE_END + (MAX_VCPUS as u64 + 1) * STACK_STRIDE + MAX_HEAP < 1 << 36);
};

/// A range that the guest can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Start, a multiple of the page size.
    pub start: u64,
    /// End, a multiple of the page size.
    pub end: u64,
    /// The guest may write, and so may the monitor on its behalf.
    pub write: bool,
    /// The guest may execute.
    pub execute: bool,
    /// Mapped in large pages.
    pub large: bool,
}

/// The memory of one guest.
#[derive(Clone, Debug)]
pub struct Layout {
    /// All that the guest can reach, ascending and without overlap.
    pub mapped: Vec<Mapped>,
    /// vCPUs that have a stack.
    pub vcpus: u32,
    /// Where the guard below the first stack starts.
    stacks: u64,
    /// Start of the heap.
    pub heap: u64,
    /// Bytes of the heap.
    pub heap_len: u64,
    /// Address of the first instruction.
    pub entry: u64,
}

impl Layout {
    /// Places `program` with stacks for `vcpus` vCPUs; the heap takes the rest of `ceiling` bytes.
    pub fn new(program: &Elf, vcpus: u32, ceiling: u64) -> Result<Self, Error> {
        let vcpus = vcpus.clamp(1, MAX_VCPUS as u32);
        let small = |start, end, write, execute| Mapped { start, end, write, execute, large: false };
        let mut mapped = vec![
            small(BOOT_PAGE, DEVICES, true, false),
            small(DEVICES, DEVICES + (MAX_DEVICES * size_of::<DeviceInfo>()) as u64, false, false),
            small(REQUEST, REQUEST + MAX_REQUEST_MESSAGE_BYTES as u64, false, false),
        ];
        mapped.extend(program.segments.iter().map(|s| small(s.start, s.end, s.write, s.execute)));
        // At most IMAGE_END, a multiple of a large page.
        let stacks = program.segments.last().map_or(IMAGE_START, |last| last.end).next_multiple_of(LARGE_PAGE);
        let large = |start, end| Mapped { start, end, write: true, execute: false, large: true };
        mapped.extend((0..vcpus).map(|vcpu| {
            let end = stack_top(stacks, vcpu);
            large(end - STACK_BYTES, end)
        }));
        let first = stack_top(stacks, vcpus - 1) + LARGE_PAGE;
        let used: u64 = mapped.iter().map(|range| range.end - range.start).sum::<u64>() + BOOT_PAGE;
        let len = ceiling.saturating_sub(used).min(MAX_HEAP) / LARGE_PAGE * LARGE_PAGE;
        if len == 0 {
            return Err(Error::TooLittleMemory { needed: used + LARGE_PAGE, allowed: ceiling });
        }
        mapped.push(large(first, first + len));
        let unused = LARGE_PAGE - SMALL_HEAP;
        let (heap, heap_len) = (first + unused, len - unused);
        Ok(Self { mapped, vcpus, stacks, heap, heap_len, entry: program.entry })
    }

    /// Bytes of address space, from 0.
    pub fn size(&self) -> u64 {
        self.heap + self.heap_len
    }

    /// Initial stack pointer of a vCPU.
    pub fn stack_top(&self, vcpu: u32) -> u64 {
        stack_top(self.stacks, vcpu)
    }
}

fn stack_top(stacks: u64, vcpu: u32) -> u64 {
    stacks + (u64::from(vcpu) + 1) * STACK_STRIDE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::Segment;

    fn program() -> Elf {
        let segment = |start, end, write, execute| Segment { start, end, load_at: start, file: 0..0, write, execute };
        Elf {
            entry: IMAGE_START,
            segments: vec![
                segment(IMAGE_START, IMAGE_START + 0x5000, false, true),
                segment(IMAGE_END - 0x1000, IMAGE_END, true, false),
            ],
        }
    }

    #[test]
    fn ranges_ascend_with_guards_below_stacks() {
        let layout = Layout::new(&program(), 16, 256 << 20).unwrap();
        assert!(layout.mapped.windows(2).all(|pair| pair[0].end <= pair[1].start));
        let stacks: Vec<_> =
            layout.mapped.iter().filter(|r| r.start >= IMAGE_END && r.end <= layout.stack_top(15)).collect();
        assert_eq!(stacks.len(), 16);
        for (i, stack) in stacks.iter().enumerate() {
            assert_eq!(stack.end, layout.stack_top(i as u32));
            let below = layout.mapped.iter().filter(|r| r.end <= stack.start).map(|r| r.end).max().unwrap();
            assert!(stack.start - below >= LARGE_PAGE, "stack {i}");
        }
        let top = stacks.last().unwrap().end;
        assert_eq!(layout.mapped.last().unwrap().start - top, LARGE_PAGE);
        assert_eq!((layout.heap + SMALL_HEAP) % LARGE_PAGE, 0);
        assert!(layout.mapped.iter().all(|r| !(r.write && r.execute) && r.start >= BOOT_PAGE));
    }

    #[test]
    fn the_ceiling_holds() {
        let layout = Layout::new(&program(), 2, 64 << 20).unwrap();
        let used: u64 = layout.mapped.iter().map(|r| r.end - r.start).sum();
        assert!(used + BOOT_PAGE <= 64 << 20);
        assert_eq!(layout.heap_len % LARGE_PAGE, SMALL_HEAP);
        assert!(matches!(Layout::new(&program(), 1, 3 << 20), Err(Error::TooLittleMemory { .. })));
        assert_eq!(Layout::new(&program(), 1, u64::MAX).unwrap().heap_len.next_multiple_of(LARGE_PAGE), MAX_HEAP);
        assert_eq!(Layout::new(&program(), 0, 64 << 20).unwrap().vcpus, 1);
        assert_eq!(Layout::new(&program(), 99, 256 << 20).unwrap().vcpus, 16);
    }
}
