//! What a guest leaves in its memory for the monitor: a ring with descriptors and requests, and a mailbox.

use std::cell::RefCell;

use instar_guest_protocol::ring::{RequestFlags, RequestKind};
use instar_vmm::fuzz::Stage;

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new(Stage::new());
}

/// Bytes of the words that describe the queue.
const WORDS: usize = 64;
/// Where things lie in the heap: descriptors, available ring, used ring, headers.
const DESC: u64 = 0;
const AVAIL: u64 = 256;
const HEADERS: u64 = 320;
const HEADER: u64 = 64;
const USED: u64 = 1024;
const STATUSES: u64 = 2048;
const PAYLOAD: u64 = 4096;
const UNMAP: u32 = RequestFlags::UNMAP.bits();
const SKIP_ZERO: u32 = RequestFlags::SKIP_ZERO.bits();
/// Bytes of the mailbox.
const MAILBOX: usize = 48;

/// The first byte is the number of kicks; the words of the queue and the start of the heap follow.
pub fn ring(data: &[u8]) {
    let Some((kicks, rest)) = data.split_first() else { return };
    let (words, heap) = rest.split_at(WORDS.min(rest.len()));
    let heap = &heap[..heap.len().min(4096)];
    STAGE.with_borrow_mut(|stage| stage.ring(words, heap, 1 + usize::from(kicks % 2)));
}

/// The mailbox, and what lies at the start of the heap.
pub fn mailbox(data: &[u8]) {
    let (mailbox, heap) = data.split_at(MAILBOX.min(data.len()));
    STAGE.with_borrow_mut(|stage| stage.mailbox(mailbox, &heap[..heap.len().min(4096)]));
}

/// A request of each kind, one to three to a ring.
pub fn ring_seeds() -> Vec<Vec<u8>> {
    use RequestKind::{Allocate, Copy, Discard, Flush, Holes, Read, SetLen, Write, WriteZeroes};
    // Kind, device, offset, length, target, its offset, flags, granularity; bytes of data, and whether they go to the guest.
    type Seed = (RequestKind, u32, u64, u64, u32, u64, u32, u32, Option<(u32, bool)>);
    let read = (Read, 0, 512, 1000, 0, 0, 0, 0, Some((1000, true)));
    let write = (Write, 1, 100, 600, 0, 0, 0, 0, Some((600, false)));
    let rings: [&[Seed]; 9] = [
        &[read],
        &[write, read],
        &[(Flush, 1, 0, 0, 0, 0, 0, 0, None), (Discard, 1, 4096, 4096, 0, 0, 0, 0, None)],
        &[(WriteZeroes, 1, 50, 3000, 0, 0, UNMAP, 0, None), (WriteZeroes, 2, 9000, 1000, 0, 0, 0, 0, None)],
        &[(Holes, 1, 0, 20_000, 0, 0, 0, 0, Some((64, true)))],
        &[(Copy, 0, 0, 9000, 1, 500, 0, 0, None), (Copy, 0, 0, 4096, 2, 4096, SKIP_ZERO, 512, None)],
        &[(SetLen, 1, 10_000, 0, 0, 0, 0, 0, None), (Allocate, 1, 0, 9000, 0, 0, 0, 0, None)],
        &[write, (Copy, 1, 0, 9000, 2, 0, 0, 0, None), read],
        &[(Discard, 2, 0, 512, 0, 0, 0, 0, None), (Write, 2, 9400, 600, 0, 0, 0, 0, Some((600, false)))],
    ];
    let heap = STAGE.with_borrow(|stage| stage.heap);
    rings
        .iter()
        .enumerate()
        .map(|(number, requests)| {
            let mut bytes = vec![0; 1 + WORDS + (HEADERS + 8 * HEADER) as usize];
            bytes[0] = number as u8;
            let words = &mut bytes[1..];
            // Features offered and taken: version 1. Status: driver ready. Sizes; ready. Places.
            words[4] = 1;
            words[12] = 1;
            words[16] = 4;
            words[20] = 128;
            words[24] = 16;
            words[28] = 1;
            for (at, place) in [(32, DESC), (40, AVAIL), (48, USED)] {
                words[at..at + 8].copy_from_slice(&(heap + place).to_le_bytes());
            }
            let memory = &mut words[WORDS..];
            let mut next = 0u16;
            for (slot, request) in (0u64..).zip(requests.iter()) {
                let &(kind, device, offset, len, target, target_offset, flags, granularity, data) = request;
                let header = (HEADERS + slot * HEADER) as usize;
                for (at, word) in [(0, kind as u32), (4, device), (24, flags), (28, target), (40, granularity)] {
                    memory[header + at..header + at + 4].copy_from_slice(&word.to_le_bytes());
                }
                for (at, word) in [(8, offset), (16, len), (32, target_offset)] {
                    memory[header + at..header + at + 8].copy_from_slice(&word.to_le_bytes());
                }
                let entry = (AVAIL + 4 + 2 * slot) as usize;
                memory[entry..entry + 2].copy_from_slice(&next.to_le_bytes());
                let status = (heap + STATUSES + 16 * slot, 16, 2);
                let payload = data.map(|(len, to_guest)| (heap + PAYLOAD, len, if to_guest { 3 } else { 1 }));
                let chain = [Some((heap + header as u64, 48, 1)), payload, Some(status)];
                for (addr, len, flags) in chain.into_iter().flatten() {
                    let at = (DESC + 16 * u64::from(next)) as usize;
                    memory[at..at + 8].copy_from_slice(&addr.to_le_bytes());
                    memory[at + 8..at + 12].copy_from_slice(&len.to_le_bytes());
                    memory[at + 12..at + 14].copy_from_slice(&u16::to_le_bytes(flags));
                    next += 1;
                    memory[at + 14..at + 16].copy_from_slice(&next.to_le_bytes());
                }
            }
            memory[AVAIL as usize + 2] = requests.len() as u8;
            bytes
        })
        .collect()
}

/// Messages with and without an answer, in several places.
pub fn mailbox_seeds() -> Vec<Vec<u8>> {
    let heap = STAGE.with_borrow(|stage| stage.heap);
    [(heap, 100, heap + 4096, 300), (heap, 3000, 0, 0), (heap + 8, 0, heap, 1 << 12), (0x20_0000, 4096, heap, 8)]
        .map(|(message, len, answer, room)| [message, len, answer, room, 0, 0].map(u64::to_le_bytes).concat())
        .map(|mailbox: Vec<u8>| [&mailbox[..], b"a message"].concat())
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each seed gets all of its answers, so that changes begin from requests that are carried out.
    #[test]
    fn the_seeds_are_served() {
        for (seed, requests) in ring_seeds().iter().zip([1, 2, 2, 2, 1, 2, 2, 3, 2]) {
            ring(seed);
            let (used, statuses) =
                STAGE.with_borrow(|stage| (stage.read(USED + 2, 2), stage.read(STATUSES, 16 * requests)));
            assert_eq!(used, [requests as u8, 0]);
            // Growing is refused by the file, and a part of it can't be discarded as on a device; all else is done.
            let codes: Vec<_> = statuses.chunks(16).map(|status| status[0]).collect();
            assert!(codes.iter().all(|code| *code <= 1), "{codes:?}");
            assert!(codes.contains(&0), "{codes:?}");
        }
    }
}
