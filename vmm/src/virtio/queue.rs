//! The device side of a split virtqueue (virtio 1.2, 2.7), for a guest that is not trusted.
//!
//! A walker of our own, where rust-vmm's `virtio-queue` exists: that one ends a chain silently at a bad link, so a broken chain
//! looks like a short one, and it follows indirect tables, which are not offered here. This one says what is wrong with
//! the first bad number, and lets the guest only name memory that the guest itself could use that way.

use std::sync::atomic::Ordering;

use instar_guest_protocol::limits::QUEUE_SIZE;
use vm_memory::{Bytes, VolatileSlice};

use crate::error::Misbehaviour;
use crate::memory::GuestMemory;

/// The chain goes on.
const NEXT: u16 = 1;
/// The device writes.
const WRITE: u16 = 2;

const DESCRIPTOR_BYTES: u64 = 16;
/// Of the available ring, before its entries: flags, index.
const RING_HEADER: u64 = 4;
const USED_ENTRY_BYTES: u64 = 8;

/// A piece of memory of a request, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes, the guest reads.
    pub write: bool,
}

/// The descriptors of one request, reused from one to the next.
pub type Chain = Vec<Descriptor>;

/// A queue whose place and size were checked and can't change any more.
pub struct Queue<'m> {
    memory: &'m GuestMemory,
    size: u16,
    descriptors: VolatileSlice<'m>,
    available: VolatileSlice<'m>,
    used: VolatileSlice<'m>,
    next_available: u16,
    next_used: u16,
}

impl<'m> Queue<'m> {
    /// Checks size and addresses.
    pub fn open(
        memory: &'m GuestMemory,
        size: u32,
        descriptors: u64,
        available: u64,
        used: u64,
    ) -> Result<Self, Misbehaviour> {
        let entries = u64::from(size);
        let size = u16::try_from(size)
            .ok()
            .filter(|size| size.is_power_of_two() && usize::from(*size) <= QUEUE_SIZE)
            .ok_or(Misbehaviour::QueueSize)?;
        if !(descriptors.is_multiple_of(16) && available.is_multiple_of(2) && used.is_multiple_of(4)) {
            return Err(Misbehaviour::QueueAddress);
        }
        let bad = |_| Misbehaviour::QueueAddress;
        Ok(Self {
            memory,
            size,
            descriptors: memory.readable(descriptors, DESCRIPTOR_BYTES * entries).map_err(bad)?,
            available: memory.readable(available, RING_HEADER + 2 * entries).map_err(bad)?,
            used: memory.writable(used, RING_HEADER + USED_ENTRY_BYTES * entries).map_err(bad)?,
            next_available: 0,
            next_used: 0,
        })
    }

    /// Requests that the guest has made available and that were not taken yet.
    pub fn pending(&self) -> Result<u16, Misbehaviour> {
        let index: u16 = self.available.load(2, Ordering::Acquire).map_err(|_| Misbehaviour::QueueAddress)?;
        let pending = index.wrapping_sub(self.next_available);
        if pending > self.size {
            return Err(Misbehaviour::AvailableIndex);
        }
        Ok(pending)
    }

    /// Takes the next available request: its descriptors go into `chain`, its head is returned.
    ///
    /// Call it at most [`pending`](Self::pending) times. Every descriptor is read once, checked, and never read again.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<u16, Misbehaviour> {
        let slot = u64::from(self.next_available % self.size);
        let head: u16 = read(&self.available, RING_HEADER + 2 * slot);
        self.next_available = self.next_available.wrapping_add(1);
        chain.clear();
        let mut index = head;
        loop {
            if index >= self.size {
                return Err(Misbehaviour::DescriptorIndex);
            }
            if chain.len() >= usize::from(self.size) {
                return Err(Misbehaviour::DescriptorLoop);
            }
            let mut raw = [0u8; DESCRIPTOR_BYTES as usize];
            self.descriptors
                .read_slice(&mut raw, usize::from(index) * DESCRIPTOR_BYTES as usize)
                .map_err(|_| Misbehaviour::QueueAddress)?;
            let (addr, len, flags, next) = fields(raw);
            if flags & !(NEXT | WRITE) != 0 {
                return Err(Misbehaviour::DescriptorFlags);
            }
            let write = flags & WRITE != 0;
            let reachable = if write {
                self.memory.writable(addr, u64::from(len))
            } else {
                self.memory.readable(addr, u64::from(len))
            };
            reachable.map_err(|_| Misbehaviour::DescriptorAddress)?;
            chain.push(Descriptor { addr, len, write });
            if flags & NEXT == 0 {
                return Ok(head);
            }
            index = next;
        }
    }

    /// Puts a request on the used ring; the guest sees it after [`publish`](Self::publish).
    pub fn push(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used % self.size);
        let mut entry = [0u8; USED_ENTRY_BYTES as usize];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        let at = RING_HEADER as usize + USED_ENTRY_BYTES as usize * slot;
        // In bounds: the slice was cut for `size` entries.
        let _ = self.used.write_slice(&entry, at);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the guest all that was pushed.
    pub fn publish(&self) {
        // In bounds and aligned: checked when the queue was opened.
        let _ = self.used.store(self.next_used, 2, Ordering::Release);
    }
}

/// Reads a ring entry; in bounds, since the slice was cut for all of them.
fn read(slice: &VolatileSlice<'_>, at: u64) -> u16 {
    let mut raw = [0u8; 2];
    let _ = slice.read_slice(&mut raw, at as usize);
    u16::from_le_bytes(raw)
}

fn fields(raw: [u8; 16]) -> (u64, u32, u16, u16) {
    let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
    (
        u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        u32::from_le_bytes([l0, l1, l2, l3]),
        u16::from_le_bytes([f0, f1]),
        u16::from_le_bytes([n0, n1]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{BOOT_PAGE, IMAGE_START, TABLES_START};
    use crate::memory::tests::{HEAP, sample};

    const DESC: u64 = HEAP;
    const AVAIL: u64 = HEAP + 0x1000;
    const USED: u64 = HEAP + 0x2000;
    const DATA: u64 = HEAP + 0x3000;

    fn descriptor(memory: &GuestMemory, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        memory.write(DESC + 16 * index, &addr).unwrap();
        memory.write(DESC + 16 * index + 8, &len).unwrap();
        memory.write(DESC + 16 * index + 12, &flags).unwrap();
        memory.write(DESC + 16 * index + 14, &next).unwrap();
    }

    /// Makes `heads` available in a queue of 8.
    fn offer(memory: &GuestMemory, heads: &[u16]) {
        for (i, head) in heads.iter().enumerate() {
            memory.write(AVAIL + 4 + 2 * (i as u64 % 8), head).unwrap();
        }
        memory.write(AVAIL + 2, &(heads.len() as u16)).unwrap();
    }

    fn open(memory: &GuestMemory) -> Queue<'_> {
        Queue::open(memory, 8, DESC, AVAIL, USED).unwrap()
    }

    #[test]
    fn chains_come_in_order() {
        let memory = sample();
        descriptor(&memory, 3, DATA, 48, NEXT, 1);
        descriptor(&memory, 1, DATA + 64, 512, NEXT | WRITE, 7);
        descriptor(&memory, 7, IMAGE_START + 0x1000, 16, WRITE, 0);
        descriptor(&memory, 0, IMAGE_START, 0, 0, 99);
        offer(&memory, &[3, 0]);
        let mut queue = open(&memory);
        let mut chain = Chain::new();
        assert_eq!(queue.pending(), Ok(2));
        assert_eq!(queue.pop(&mut chain), Ok(3));
        assert_eq!(
            chain,
            [
                Descriptor { addr: DATA, len: 48, write: false },
                Descriptor { addr: DATA + 64, len: 512, write: true },
                Descriptor { addr: IMAGE_START + 0x1000, len: 16, write: true },
            ]
        );
        queue.push(3, 528);
        assert_eq!(queue.pop(&mut chain), Ok(0));
        assert_eq!(chain.len(), 1);
        queue.push(0, 0);
        assert_eq!(memory.read::<u16>(USED + 2).unwrap(), 0, "not yet published");
        queue.publish();
        assert_eq!(queue.pending(), Ok(0));
        assert_eq!(memory.read::<[u32; 5]>(USED).unwrap(), [2 << 16, 3, 528, 0, 0]);
    }

    #[test]
    fn indices_wrap() {
        let memory = sample();
        descriptor(&memory, 5, DATA, 1, 0, 0);
        for i in 0..8 {
            memory.write(AVAIL + 4 + 2 * i, &5u16).unwrap();
        }
        let mut queue = open(&memory);
        let mut chain = Chain::new();
        for turn in 1..=20_000u32 {
            memory.write(AVAIL + 2, &((turn * 7) as u16)).unwrap();
            assert_eq!(queue.pending(), Ok(7));
            for _ in 0..7 {
                assert_eq!(queue.pop(&mut chain), Ok(5));
                queue.push(5, 0);
            }
            queue.publish();
        }
        assert_eq!(memory.read::<u16>(USED + 2).unwrap(), (20_000u32 * 7) as u16);
    }

    #[test]
    fn bad_queues_are_refused() {
        let memory = sample();
        let open = |size, desc, avail, used| Queue::open(&memory, size, desc, avail, used).err();
        for size in [0, 3, 256, 65535, 65536, u32::MAX] {
            assert_eq!(open(size, DESC, AVAIL, USED), Some(Misbehaviour::QueueSize), "{size}");
        }
        for addr in [0, TABLES_START, IMAGE_START - 16, u64::MAX - 15, (64 << 20) + HEAP] {
            assert_eq!(open(8, addr, AVAIL, USED), Some(Misbehaviour::QueueAddress), "{addr:#x}");
            assert_eq!(open(8, DESC, addr, USED), Some(Misbehaviour::QueueAddress), "{addr:#x}");
            assert_eq!(open(8, DESC, AVAIL, addr), Some(Misbehaviour::QueueAddress), "{addr:#x}");
        }
        assert_eq!(open(8, DESC + 8, AVAIL, USED), Some(Misbehaviour::QueueAddress));
        assert_eq!(open(8, DESC, AVAIL + 1, USED), Some(Misbehaviour::QueueAddress));
        assert_eq!(open(8, DESC, AVAIL, USED + 2), Some(Misbehaviour::QueueAddress));
        assert_eq!(open(8, DESC, AVAIL, IMAGE_START), Some(Misbehaviour::QueueAddress), "used ring in code");
        assert_eq!(open(8, IMAGE_START, AVAIL, USED), None, "constant descriptors are odd, but legal");
    }

    #[test]
    fn bad_chains_are_refused() {
        let memory = sample();
        let pop = |heads: &[u16]| {
            offer(&memory, heads);
            open(&memory).pop(&mut Chain::new()).unwrap_err()
        };
        assert_eq!(pop(&[8]), Misbehaviour::DescriptorIndex);
        assert_eq!(pop(&[u16::MAX]), Misbehaviour::DescriptorIndex);
        descriptor(&memory, 0, DATA, 1, NEXT, 8);
        assert_eq!(pop(&[0]), Misbehaviour::DescriptorIndex);
        descriptor(&memory, 0, DATA, 1, NEXT, 0);
        assert_eq!(pop(&[0]), Misbehaviour::DescriptorLoop);
        descriptor(&memory, 1, DATA, 1, NEXT, 0);
        descriptor(&memory, 0, DATA, 1, NEXT, 1);
        assert_eq!(pop(&[1]), Misbehaviour::DescriptorLoop);
        for flags in [4, 8, 0x8000] {
            descriptor(&memory, 2, DATA, 16, flags, 0);
            assert_eq!(pop(&[2]), Misbehaviour::DescriptorFlags);
        }
        for (addr, len) in
            [(0, 1), (TABLES_START, 8), (u64::MAX, 1), (u64::MAX - 7, u32::MAX), (DATA, u32::MAX), (BOOT_PAGE - 1, 2)]
        {
            for flags in [0, WRITE] {
                descriptor(&memory, 3, addr, len, flags, 0);
                assert_eq!(pop(&[3]), Misbehaviour::DescriptorAddress, "{addr:#x} {len}");
            }
        }
        descriptor(&memory, 4, IMAGE_START, 16, WRITE, 0);
        assert_eq!(pop(&[4]), Misbehaviour::DescriptorAddress, "code is not writable");
    }

    #[test]
    fn the_available_index_may_not_run_ahead() {
        let memory = sample();
        let queue = open(&memory);
        memory.write(AVAIL + 2, &8u16).unwrap();
        assert_eq!(queue.pending(), Ok(8));
        for ahead in [9u16, 65535, 32768] {
            memory.write(AVAIL + 2, &ahead).unwrap();
            assert_eq!(queue.pending(), Err(Misbehaviour::AvailableIndex));
        }
    }
}
