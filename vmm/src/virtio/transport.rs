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
    use instar_guest_protocol::ring::{RequestHeader, STATUS_IO_ERROR, STATUS_OK, STATUS_REFUSED};
    use proptest::prelude::*;

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
        let device = || prop_oneof![8 => 0u32..2, 1 => any::<u32>()];
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

    fn files() -> (DeviceTable, File, File) {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.write_all_at(&[0x5a; 10_000], 0).unwrap();
        target.write_all_at(&[0xa5; 10_000], 0).unwrap();
        let mut table = DeviceTable::default();
        table.push(Device::new(source.try_clone().unwrap().into(), 10_000, DeviceFlags::empty()));
        table.push(Device::new(target.try_clone().unwrap().into(), 10_000, DeviceFlags::WRITABLE));
        (table, source, target)
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
            let (table, source, _target) = files();
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
        }

        /// A well-formed chain always gets a status, whatever its header says.
        #[test]
        fn any_header_gets_a_status(header in headers(), data in prop::option::of((0u32..5000, any::<bool>()))) {
            let memory = sample();
            let (table, _source, _target) = files();
            memory.write(HEADERS, &header).unwrap();
            memory.write(DATA, &u32::MAX).unwrap();
            let mut chain = vec![super::super::queue::Descriptor { addr: HEADERS, len: 48, write: false }];
            chain.extend(data.map(|(len, write)| super::super::queue::Descriptor { addr: DATA + 64, len, write }));
            chain.push(super::super::queue::Descriptor { addr: DATA, len: 16, write: true });
            let request = Request::parse(&chain, &memory).unwrap();
            let status = Job { devices: &table, scratch: &mut Scratch::default() }.run(request, &Counters::default());
            prop_assert!([STATUS_OK, STATUS_IO_ERROR, STATUS_REFUSED].contains(&status.status));
            prop_assert_eq!(status.errno != 0, status.status == STATUS_IO_ERROR);
        }
    }
}
