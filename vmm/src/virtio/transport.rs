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

    /// Serves everything that was available when the doorbell rang. What is added meanwhile (by another vCPU) waits for the
    /// next kick, so this ends.
    pub fn kick(&mut self, devices: &DeviceTable, counters: &Counters) -> Result<(), Misbehaviour> {
        let queue = match &mut self.queue {
            Some(queue) => queue,
            unset => unset.insert(open(self.memory, self.words)?),
        };
        for _ in 0..queue.pending()? {
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
