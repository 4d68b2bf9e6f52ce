//! The shared-memory transport of one vCPU, and the serving of its queue.

use instar_guest_protocol::boot::TransportWords;
use instar_guest_protocol::limits::QUEUE_SIZE;
use instar_guest_protocol::ring::RequestStatus;
use zerocopy::IntoBytes;

use super::blk::Job;
use super::copy::Scratch;
use super::device::DeviceTable;
use super::queue::{Chain, Queue};
use super::request::Request;
use crate::error::Misbehaviour;
use crate::memory::GuestMemory;
use crate::stats::Counters;

/// VIRTIO_F_VERSION_1, the only feature, and mandatory. No indirect descriptors, no event indices.
const VERSION_1: u64 = 1 << 32;
/// Device status: the driver is ready.
const DRIVER_OK: u32 = 4;
/// Device status: the driver gave up.
const FAILED: u32 = 128;

/// What the guest finds in its transport words at the start.
pub fn offered_words() -> TransportWords {
    TransportWords {
        device_features: VERSION_1,
        driver_features: 0,
        status: 0,
        queue_max: QUEUE_SIZE as u32,
        queue_size: 0,
        queue_ready: 0,
        queue_desc: 0,
        queue_driver: 0,
        queue_device: 0,
        reserved: 0,
    }
}

/// Serves the queue of one vCPU.
pub struct Server<'m> {
    memory: &'m GuestMemory,
    /// Address of the transport words.
    words: u64,
    /// Set up at the first kick, then frozen.
    queue: Option<Queue<'m>>,
    chain: Chain,
    scratch: Scratch,
}

impl<'m> Server<'m> {
    /// A server for the queue described by the words at `words`.
    pub fn new(memory: &'m GuestMemory, words: u64) -> Self {
        Self { memory, words, queue: None, chain: Chain::default(), scratch: Scratch::default() }
    }

    /// Requests that wait to be served.
    pub fn pending(&mut self) -> Result<u16, Misbehaviour> {
        self.queue()?.pending()
    }

    /// The queue, as it was when the doorbell rang first.
    fn queue(&mut self) -> Result<&mut Queue<'m>, Misbehaviour> {
        Ok(match &mut self.queue {
            Some(queue) => queue,
            unset => unset.insert(open(self.memory, self.words)?),
        })
    }

    /// Serves everything that was available when the doorbell rang. What is added meanwhile (by another vCPU) waits for the
    /// next kick, so this ends.
    pub fn kick(&mut self, devices: &DeviceTable, counters: &Counters) -> Result<(), Misbehaviour> {
        let waiting = self.pending()?;
        let Some(queue) = &mut self.queue else { return Ok(()) };
        for _ in 0..waiting {
            let head = queue.pop(&mut self.chain)?;
            let request = Request::parse(&self.chain, self.memory)?;
            let written = request.writable_bytes();
            let status = request.status;
            let job = Job { devices, scratch: &mut self.scratch };
            let outcome: RequestStatus = job.run(request, counters);
            status.copy_from(outcome.as_bytes());
            queue.push(head, written);
        }
        queue.publish();
        Ok(())
    }
}

/// Reads the words once and checks them.
fn open(memory: &GuestMemory, words: u64) -> Result<Queue<'_>, Misbehaviour> {
    let words: TransportWords = memory.read(words).map_err(|_| Misbehaviour::QueueAddress)?;
    if words.status & (DRIVER_OK | FAILED) != DRIVER_OK || words.queue_ready != 1 {
        return Err(Misbehaviour::QueueNotReady);
    }
    if words.driver_features != VERSION_1 {
        return Err(Misbehaviour::QueueFeatures);
    }
    Queue::open(memory, words.queue_size, words.queue_desc, words.queue_driver, words.queue_device)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use instar_guest_protocol::boot::DeviceFlags;
    use instar_guest_protocol::ring::{RequestHeader, RequestKind, STATUS_IO_ERROR, STATUS_OK, STATUS_REFUSED};
    use proptest::prelude::*;

    use crate::virtio::Part;

    use super::super::device::Device;
    use super::*;
    use crate::layout::{BOOT_PAGE, IMAGE_START, PAGE};
    use crate::memory::tests::{HEAP, sample};

    const DESC: u64 = HEAP;
    const AVAIL: u64 = HEAP + 0x1000;
    const USED: u64 = HEAP + 0x2000;
    const HEADERS: u64 = HEAP + 0x3000;
    const DATA: u64 = HEAP + 0x8000;

    fn addresses() -> impl Strategy<Value = u64> {
        prop_oneof![
            8 => (0u64..8).prop_map(|i| HEADERS + 64 * i),
            8 => (0u64..64).prop_map(|i| DATA + 512 * i),
            1 => Just(DESC),
            1 => Just(AVAIL),
            1 => Just(USED),
            1 => Just(IMAGE_START),
            1 => Just(BOOT_PAGE),
            1 => Just(PAGE),
            1 => any::<u64>(),
        ]
    }

    fn descriptors() -> impl Strategy<Value = (u64, u32, u16, u16)> {
        let len = prop_oneof![6 => Just(48), 6 => Just(16), 4 => 0u32..5000, 1 => any::<u32>()];
        let flags = prop_oneof![8 => 0u16..4, 1 => any::<u16>()];
        let next = prop_oneof![12 => 0u16..16, 1 => any::<u16>()];
        (addresses(), len, flags, next)
    }

    fn headers() -> impl Strategy<Value = RequestHeader> {
        let kind = prop_oneof![Just(0), Just(1), Just(4), Just(11), Just(13), 0x100u32..0x105, any::<u32>()];
        let place = || prop_oneof![8 => 0u64..20_000, 1 => any::<u64>()];
        // Not larger: zeroes may really be written.
        let len = prop_oneof![8 => 0u64..20_000, 1 => (1u64 << 63)..u64::MAX];
        let device = || prop_oneof![8 => 0u32..3, 1 => any::<u32>()];
        let granularity = prop_oneof![Just(512), Just(4096), Just(16 << 20), any::<u32>()];
        (kind, device(), place(), len, 0u32..5, device(), place(), granularity).prop_map(
            |(kind, device, offset, len, flags, target_device, target_offset, granularity)| RequestHeader {
                kind,
                device,
                // A length set by the guest could be anything; a sparse file of any length is fine.
                offset,
                len,
                flags,
                target_device,
                target_offset,
                granularity,
                reserved: 0,
            },
        )
    }

    /// The part of the third file that the guest gets.
    const PART: Part = Part { base: 3000, end: 7000, fixed: true, allocated: 4096 };

    /// A file to be read, one to be written, and one of which a part may be written.
    fn files() -> (DeviceTable, File, File, File) {
        let file = |byte| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&[byte; 10_000], 0).unwrap();
            file
        };
        let (source, target, whole) = (file(0x5a), file(0xa5), file(0x77));
        let mut table = DeviceTable::default();
        table.push(Device::new(source.try_clone().unwrap().into(), Part::whole(10_000), DeviceFlags::empty()));
        table.push(Device::new(target.try_clone().unwrap().into(), Part::whole(10_000), DeviceFlags::WRITABLE));
        table.push(Device::new(whole.try_clone().unwrap().into(), PART, DeviceFlags::WRITABLE));
        (table, source, target, whole)
    }

    /// What lies around the part is as it was.
    fn is_intact_around(whole: &File) -> bool {
        let mut bytes = vec![0; 10_001];
        let len = whole.read_at(&mut bytes, 0).unwrap();
        let around = [0..PART.base as usize, PART.end as usize..10_000];
        len == 10_000 && around.into_iter().all(|range| bytes[range].iter().all(|byte| *byte == 0x77))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        /// Whatever lies in the rings: an answer or an error, never a panic, and no byte of a read-only file changes.
        #[test]
        fn any_ring_is_survived(
            descriptors in prop::collection::vec(descriptors(), 16),
            headers in prop::collection::vec(headers(), 8),
            heads in prop::collection::vec(0u16..17, 16),
            index in prop_oneof![8 => 0u16..17, 1 => any::<u16>()],
            kicks in 1usize..3,
        ) {
            let memory = sample();
            let (table, source, _target, whole) = files();
            let words = TransportWords {
                driver_features: VERSION_1,
                status: DRIVER_OK,
                queue_size: 16,
                queue_ready: 1,
                queue_desc: DESC,
                queue_driver: AVAIL,
                queue_device: USED,
                ..offered_words()
            };
            memory.write(BOOT_PAGE, &words).unwrap();
            for (i, (addr, len, flags, next)) in (0..).zip(descriptors) {
                memory.write(DESC + 16 * i, &addr).unwrap();
                memory.write(DESC + 16 * i + 8, &len).unwrap();
                memory.write(DESC + 16 * i + 12, &flags).unwrap();
                memory.write(DESC + 16 * i + 14, &next).unwrap();
            }
            for (i, header) in (0..).zip(headers) {
                memory.write(HEADERS + 64 * i, &header).unwrap();
            }
            for (i, head) in (0..).zip(heads) {
                memory.write(AVAIL + 4 + 2 * i, &head).unwrap();
            }
            memory.write(AVAIL + 2, &index).unwrap();
            let mut server = Server::new(&memory, BOOT_PAGE);
            for _ in 0..kicks {
                if server.kick(&table, &Counters::default()).is_err() {
                    break;
                }
            }
            let mut bytes = vec![0; 10_001];
            prop_assert_eq!(source.read_at(&mut bytes, 0).unwrap(), 10_000);
            prop_assert!(bytes[..10_000].iter().all(|byte| *byte == 0x5a));
            prop_assert!(is_intact_around(&whole));
        }

        /// A well-formed chain always gets a status, whatever its header says.
        #[test]
        fn any_header_gets_a_status(header in headers(), data in prop::option::of((0u32..5000, any::<bool>()))) {
            let memory = sample();
            let (table, _source, _target, whole) = files();
            memory.write(HEADERS, &header).unwrap();
            memory.write(DATA, &u32::MAX).unwrap();
            let mut chain = vec![super::super::queue::Descriptor { addr: HEADERS, len: 48, write: false }];
            chain.extend(data.map(|(len, write)| super::super::queue::Descriptor { addr: DATA + 64, len, write }));
            chain.push(super::super::queue::Descriptor { addr: DATA, len: 16, write: true });
            let request = Request::parse(&chain, &memory).unwrap();
            let status = Job { devices: &table, scratch: &mut Scratch::default() }.run(request, &Counters::default());
            prop_assert!([STATUS_OK, STATUS_IO_ERROR, STATUS_REFUSED].contains(&status.status));
            prop_assert_eq!(status.errno != 0, status.status == STATUS_IO_ERROR);
            prop_assert!(is_intact_around(&whole));
        }
    }

    /// Serves a request on the part of a file, with `data` bytes for the guest or from it.
    fn serve_part(header: RequestHeader, data: u32) -> (u32, u64, Vec<u8>) {
        let memory = sample();
        let (table, _source, _target, whole) = files();
        whole.write_all_at(b"first", PART.base).unwrap();
        whole.write_all_at(b"last", PART.end - 4).unwrap();
        memory.write(HEADERS, &RequestHeader { device: 2, ..header }).unwrap();
        let write = header.kind != RequestKind::Write as u32;
        let mut chain = vec![super::super::queue::Descriptor { addr: HEADERS, len: 48, write: false }];
        if data > 0 {
            chain.push(super::super::queue::Descriptor { addr: DATA + 64, len: data, write });
        }
        chain.push(super::super::queue::Descriptor { addr: DATA, len: 16, write: true });
        let request = Request::parse(&chain, &memory).unwrap();
        let status = Job { devices: &table, scratch: &mut Scratch::default() }.run(request, &Counters::default());
        assert!(is_intact_around(&whole));
        (status.status, status.value, memory.read::<[u8; 8]>(DATA + 64).unwrap()[..data.min(8) as usize].to_vec())
    }

    #[test]
    fn a_part_of_a_file_is_all_there_is() {
        let request = |kind: RequestKind, offset, len| RequestHeader {
            kind: kind as u32,
            offset,
            len,
            ..RequestHeader::default()
        };
        let len = PART.end - PART.base;
        assert_eq!(serve_part(request(RequestKind::Read, 0, 5), 5), (STATUS_OK, 0, b"first".to_vec()));
        assert_eq!(serve_part(request(RequestKind::Read, len - 4, 4), 4), (STATUS_OK, 0, b"last".to_vec()));
        assert_eq!(serve_part(request(RequestKind::Write, len - 4, 4), 4).0, STATUS_OK);
        for (kind, offset, data) in [
            (RequestKind::Read, len - 3, 4),
            (RequestKind::Read, len, 1),
            (RequestKind::Read, u64::MAX - 2, 2),
            (RequestKind::Read, 0u64.wrapping_sub(PART.base), 4),
            (RequestKind::Write, len - 3, 4),
            (RequestKind::Write, len, 1),
            (RequestKind::Write, 0u64.wrapping_sub(PART.base), 4),
            (RequestKind::WriteZeroes, len - 3, 0),
            (RequestKind::WriteZeroes, 0u64.wrapping_sub(PART.base), 0),
            (RequestKind::Discard, len - 3, 0),
            (RequestKind::Allocate, len - 3, 0),
            (RequestKind::SetLen, len + 1, 0),
            (RequestKind::SetLen, 0, 0),
        ] {
            let wanted = request(kind, offset, if data > 0 { u64::from(data) } else { 4 });
            assert_eq!(serve_part(wanted, data).0, STATUS_REFUSED, "{kind:?} at {offset}");
        }
        // What lies behind the part is zero to those that may look there, and a hole.
        let to_itself = RequestHeader { target_device: 2, target_offset: 0, ..request(RequestKind::Copy, len - 4, 8) };
        assert_eq!(serve_part(to_itself, 0).0, STATUS_OK);
        let outside = RequestHeader { target_device: 2, target_offset: len - 4, ..request(RequestKind::Copy, 0, 8) };
        assert_eq!(serve_part(outside, 0).0, STATUS_REFUSED);
        let (status, runs, run) = serve_part(request(RequestKind::Holes, 0, len + 100), 32);
        assert_eq!((status, runs, run), (STATUS_OK, 2, len.to_ne_bytes().to_vec()), "data up to the end of the part");
    }
}
