//! Page tables: four levels, written once before the guest starts.
//!
//! Accessed and dirty bits are set from the start: no processor (and no hypervisor that shadows the tables) then has to
//! write them later, and a first write to a page is not two faults.

use crate::layout::{LARGE_PAGE, Layout, Mapped, PAGE, TABLES_END, TABLES_START, TASK_STATE};
use crate::memory::{BadAddress, GuestMemory};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Address of the top table.
pub const ROOT: u64 = TABLES_START;

/// Writes the tables of `layout`.
pub fn build(memory: &GuestMemory, layout: &Layout) -> Result<(), BadAddress> {
    let mut tables = Tables { memory, next: ROOT + PAGE };
    layout.mapped.iter().try_for_each(|range| tables.map(range))?;
    // The processor reads the task state by its linear address, with more rights than ring 3 has.
    let table = tables.table(TASK_STATE, 0)?;
    memory.write(table + index(TASK_STATE, 0) * 8, &(TASK_STATE | PRESENT | ACCESSED | NO_EXECUTE))
}

struct Tables<'m> {
    memory: &'m GuestMemory,
    next: u64,
}

impl Tables<'_> {
    fn map(&mut self, range: &Mapped) -> Result<(), BadAddress> {
        let mut flags = PRESENT | USER | ACCESSED;
        if range.write {
            flags |= WRITE | DIRTY;
        }
        if !range.execute {
            flags |= NO_EXECUTE;
        }
        let (step, level) = if range.large { (LARGE_PAGE, 1) } else { (PAGE, 0) };
        if range.large {
            flags |= LARGE;
        }
        let mut addr = range.start;
        while addr < range.end {
            // One table's worth of entries at a time.
            let table = self.table(addr, level)?;
            let first = index(addr, level);
            let count = (512 - first).min((range.end - addr) / step);
            let entries: Vec<u8> = (0..count).flat_map(|i| ((addr + i * step) | flags).to_le_bytes()).collect();
            self.memory.place(table + first * 8, &entries)?;
            addr += count * step;
        }
        Ok(())
    }

    /// The table of `level` that holds the entry of `addr`; made if it is missing.
    fn table(&mut self, addr: u64, level: u32) -> Result<u64, BadAddress> {
        let mut table = ROOT;
        for above in (level + 1..4).rev() {
            let at = table + index(addr, above) * 8;
            let entry: u64 = self.memory.read(at)?;
            table = if entry & PRESENT != 0 {
                entry & ADDRESS
            } else {
                let fresh = self.next;
                if fresh >= TABLES_END {
                    return Err(BadAddress);
                }
                self.next = fresh + PAGE;
                self.memory.write(at, &(fresh | PRESENT | WRITE | USER | ACCESSED))?;
                fresh
            };
        }
        Ok(table)
    }
}

/// Index of the entry of `addr` in a table of `level` (0: pages, 1: large pages, 2, 3: top).
fn index(addr: u64, level: u32) -> u64 {
    addr >> (12 + 9 * level) & 511
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::{Elf, Segment};
    use crate::layout::{BOOT_PAGE, DEVICES, IMAGE_START, MAX_HEAP, STACK_BYTES};

    /// What the processor would find: flags of the last entry, if all levels are present.
    fn walk(memory: &GuestMemory, addr: u64) -> Option<u64> {
        let mut table = ROOT;
        for level in (0..4).rev() {
            let entry: u64 = memory.read(table + index(addr, level) * 8).unwrap();
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 0 || entry & LARGE != 0 {
                let page = if level == 0 { PAGE } else { LARGE_PAGE };
                assert_eq!(entry & ADDRESS, addr & !(page - 1), "identity at {addr:#x}");
                return Some(entry);
            }
            table = entry & ADDRESS;
        }
        None
    }

    fn program() -> Elf {
        let segment = |start, end, write| Segment { start, end, load_at: start, file: 0..0, write, execute: !write };
        Elf {
            entry: IMAGE_START,
            segments: vec![
                segment(IMAGE_START, IMAGE_START + 0x21_0000, false),
                segment(IMAGE_START + 0x21_0000, IMAGE_START + 0x21_2000, true),
            ],
        }
    }

    #[test]
    fn every_page_has_the_rights_of_its_range() {
        let layout = Layout::new(&program(), 3, 96 << 20).unwrap();
        let memory = GuestMemory::new(&layout).unwrap();
        build(&memory, &layout).unwrap();
        let mut addr = 0;
        while addr < layout.size() + (4 << 20) {
            let range = layout.mapped.iter().find(|r| (r.start..r.end).contains(&addr));
            let expected = range.map(|r| (r.write, r.execute));
            let found = walk(&memory, addr)
                .filter(|entry| entry & USER != 0)
                .map(|entry| (entry & WRITE != 0, entry & NO_EXECUTE == 0));
            assert_eq!(found, expected, "{addr:#x}");
            addr += PAGE;
        }
    }

    #[test]
    fn landmarks() {
        let layout = Layout::new(&program(), 1, 64 << 20).unwrap();
        let memory = GuestMemory::new(&layout).unwrap();
        build(&memory, &layout).unwrap();
        let (top, heap) = (layout.stack_top(0), layout.mapped.last().unwrap().start);
        let guards = [top - STACK_BYTES - 1, top, heap - 1, layout.size()];
        for unmapped in [0, TABLES_START, TABLES_END - 1].into_iter().chain(guards) {
            assert_eq!(walk(&memory, unmapped), None, "{unmapped:#x}");
        }
        assert_eq!(walk(&memory, TASK_STATE).unwrap() & (USER | WRITE), 0);
        assert_ne!(walk(&memory, BOOT_PAGE).unwrap() & WRITE, 0);
        assert_eq!(walk(&memory, DEVICES).unwrap() & WRITE, 0);
        assert_eq!(walk(&memory, IMAGE_START).unwrap() & (WRITE | NO_EXECUTE), 0);
    }

    #[test]
    fn the_largest_heap_fits_the_tables() {
        let layout = Layout::new(&program(), 16, u64::MAX).unwrap();
        assert_eq!(layout.heap_len.next_multiple_of(LARGE_PAGE), MAX_HEAP);
        let memory = GuestMemory::new(&layout).unwrap();
        build(&memory, &layout).unwrap();
        assert!(walk(&memory, layout.size() - 1).is_some());
    }
}
