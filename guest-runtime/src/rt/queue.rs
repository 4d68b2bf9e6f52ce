//! The request queue of each vCPU: one turn hands over many requests with one doorbell.

use alloc::boxed::Box;
use core::marker::PhantomData;
use core::ops::Range;
use core::{array, ptr, slice};

use bitflags::bitflags;
use instar_guest_protocol::limits::{MAX_REQUEST_BYTES, MAX_VCPUS, QUEUE_SIZE};
use instar_guest_protocol::ring::{RequestHeader, RequestKind, RequestStatus, STATUS_PENDING};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;
use zerocopy::IntoBytes;

use super::boot;
use super::hal::Identity;
use super::transport::SharedTransport;
use crate::lock::Lock;

/// Requests of one turn: each needs two descriptors at least.
const MAX_REQUESTS: usize = QUEUE_SIZE / 2;
/// Data descriptors of one request.
const MAX_SEGMENTS: usize = 16;

bitflags! {
    #[derive(Debug)]
    struct Features: u64 {
        /// Modern virtio. (Event indices stay off: the monitor never sleeps.)
        const VERSION_1 = 1 << 32;
    }
}

/// Each vCPU locks its own only, so the locks never wait.
static QUEUES: [Lock<Option<Box<Queue>>>; MAX_VCPUS] = [const { Lock::new(None) }; MAX_VCPUS];

/// Uses the queue of this vCPU, which is set up at the first use.
pub fn with<R>(f: impl FnOnce(&mut Queue) -> R) -> R {
    let vcpu = boot::current();
    let mut queue = QUEUES[vcpu].lock();
    f(queue.get_or_insert_with(|| Box::new(Queue::new(vcpu))))
}

/// A virtqueue, and memory for one turn.
#[derive(Debug)]
pub struct Queue {
    ring: VirtQueue<Identity, QUEUE_SIZE>,
    transport: SharedTransport,
    headers: [RequestHeader; MAX_REQUESTS],
    statuses: [RequestStatus; MAX_REQUESTS],
    entries: [Entry; MAX_REQUESTS],
    segments: [Segment; QUEUE_SIZE],
}

impl Queue {
    fn new(vcpu: usize) -> Self {
        // SAFETY: `QUEUES` holds one queue per vCPU, made once.
        let mut transport = unsafe { SharedTransport::new(boot::transport(vcpu)) };
        transport.begin_init(Features::VERSION_1);
        let ring = VirtQueue::new(&mut transport, 0, false, false).expect("request queue");
        transport.finish_init();
        Self {
            ring,
            transport,
            headers: [RequestHeader::default(); MAX_REQUESTS],
            statuses: [RequestStatus::default(); MAX_REQUESTS],
            entries: [Entry::default(); MAX_REQUESTS],
            segments: [Segment::default(); QUEUE_SIZE],
        }
    }

    /// Begins a turn.
    pub fn turn<'b>(&mut self) -> Turn<'_, 'b> {
        Turn { queue: self, entry_count: 0, segment_count: 0, buffers: PhantomData }
    }
}

/// What a request carries.
#[derive(Debug)]
pub enum Data<'b> {
    /// To be filled by the monitor; may be empty.
    Read(&'b mut [u8]),
    /// To be read by the monitor; may be empty.
    Write(&'b [u8]),
}

impl Data<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Read(buf) => buf.len(),
            Self::Write(buf) => buf.len(),
        }
    }
}

/// Requests that go together. Nothing reaches the ring before [`run`](Self::run), so the buffers are in the monitor's
/// hands only during that call.
#[derive(Debug)]
pub struct Turn<'q, 'b> {
    queue: &'q mut Queue,
    entry_count: usize,
    segment_count: usize,
    buffers: PhantomData<&'b mut [u8]>,
}

/// One request of a turn.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// The caller's numbers of what was joined into this request: the first, and the one behind the last.
    tags: (usize, usize),
    first_segment: usize,
    segment_count: usize,
    /// The monitor writes the data.
    reads: bool,
}

/// A data buffer.
#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    addr: usize,
    len: usize,
}

/// How a request ended.
#[derive(Debug)]
pub struct Outcome {
    /// The caller's numbers of what the request did.
    pub tags: Range<usize>,
    /// Where it began, bytes.
    pub offset: u64,
    /// Its length, bytes.
    pub len: u64,
    /// What the monitor says.
    pub status: RequestStatus,
}

impl<'q, 'b> Turn<'q, 'b> {
    /// No request yet.
    pub fn is_empty(&self) -> bool {
        self.entry_count == 0
    }

    /// Another request fits.
    pub fn has_room(&self) -> bool {
        self.entry_count < MAX_REQUESTS && self.descriptor_count() + 3 <= QUEUE_SIZE
    }

    fn descriptor_count(&self) -> usize {
        2 * self.entry_count + self.segment_count
    }

    /// Adds a request, or lengthens the last one if this continues it. `tag` is the caller's number; it never falls.
    pub fn push(&mut self, header: RequestHeader, data: Data<'b>, tag: usize) {
        assert!(self.has_room(), "request queue is full");
        let len = data.len();
        if self.joins(&header) {
            let last = self.entry_count - 1;
            self.queue.headers[last].len += header.len;
            self.queue.entries[last].tags.1 = tag + 1;
            self.queue.entries[last].segment_count += 1;
        } else {
            self.queue.headers[self.entry_count] = header;
            self.queue.entries[self.entry_count] = Entry {
                tags: (tag, tag + 1),
                first_segment: self.segment_count,
                segment_count: usize::from(len != 0),
                reads: matches!(data, Data::Read(_)),
            };
            self.entry_count += 1;
        }
        if len != 0 {
            let addr = match data {
                Data::Read(buf) => buf.as_mut_ptr().expose_provenance(),
                Data::Write(buf) => buf.as_ptr().expose_provenance(),
            };
            self.queue.segments[self.segment_count] = Segment { addr, len };
            self.segment_count += 1;
        }
    }

    /// Whether a read or write continues where the last one ends, in its file.
    fn joins(&self, next: &RequestHeader) -> bool {
        let Some(i) = self.entry_count.checked_sub(1) else { return false };
        let last = &self.queue.headers[i];
        (next.kind == RequestKind::Read as u32 || next.kind == RequestKind::Write as u32)
            && (last.kind, last.device) == (next.kind, next.device)
            && last.offset.checked_add(last.len) == Some(next.offset)
            && last.len.checked_add(next.len).is_some_and(|len| len <= MAX_REQUEST_BYTES)
            && self.queue.entries[i].segment_count < MAX_SEGMENTS
    }

    /// Hands everything over, and returns when it is done: how each request ended, in order.
    pub fn run(self) -> impl Iterator<Item = Outcome> + use<'q> {
        let Self { queue, entry_count, .. } = self;
        if entry_count != 0 {
            queue.exchange(entry_count);
        }
        (0..entry_count).map(|i| {
            let (first, end) = queue.entries[i].tags;
            let RequestHeader { offset, len, .. } = queue.headers[i];
            Outcome { tags: first..end, offset, len, status: queue.statuses[i] }
        })
    }
}

impl Queue {
    /// Puts the requests on the ring, rings, and takes them off. Their buffers are borrowed by the [`Turn`].
    #[inline(never)]
    fn exchange(&mut self, entry_count: usize) {
        let mut tokens = [0; MAX_REQUESTS];
        for (i, token) in tokens.iter_mut().enumerate().take(entry_count) {
            self.statuses[i] = RequestStatus { status: STATUS_PENDING, errno: 0, value: 0 };
            *token = self.with_chain(i, |ring, inputs, outputs| {
                // SAFETY: the buffers stay borrowed until the token was popped, below, in this function; a failure in
                // between ends the machine.
                unsafe { ring.add(inputs, outputs) }.expect("request queue is full")
            });
        }
        // Always: the monitor sleeps in no other way than by not being called.
        self.transport.notify(0);
        for (i, token) in tokens.into_iter().enumerate().take(entry_count) {
            self.with_chain(i, |ring, inputs, outputs| {
                // SAFETY: the same buffers as were added under this token.
                unsafe { ring.pop_used(token, inputs, outputs) }.expect("requests are answered in order")
            });
        }
    }

    /// Calls `f` with the descriptor chain of request `i`: header, data, status.
    fn with_chain<R>(
        &mut self,
        i: usize,
        f: impl for<'a> FnOnce(&mut VirtQueue<Identity, QUEUE_SIZE>, &'a [&'a [u8]], &'a mut [&'a mut [u8]]) -> R,
    ) -> R {
        let entry = self.entries[i];
        let mut inputs: [&[u8]; MAX_SEGMENTS + 1] = [&[]; MAX_SEGMENTS + 1];
        let mut outputs: [&mut [u8]; MAX_SEGMENTS + 1] = array::from_fn(|_| Default::default());
        let (mut input_count, mut output_count) = (1, 0);
        inputs[0] = self.headers[i].as_bytes();
        for segment in &self.segments[entry.first_segment..][..entry.segment_count] {
            // SAFETY: `push` got these as a slice that is borrowed for longer than the turn: mutably for a read. Nobody
            // else looks at it while this one exists.
            unsafe {
                if entry.reads {
                    let start = ptr::with_exposed_provenance_mut(segment.addr);
                    outputs[output_count] = slice::from_raw_parts_mut(start, segment.len);
                    output_count += 1;
                } else {
                    let start = ptr::with_exposed_provenance(segment.addr);
                    inputs[input_count] = slice::from_raw_parts(start, segment.len);
                    input_count += 1;
                }
            }
        }
        outputs[output_count] = self.statuses[i].as_mut_bytes();
        f(&mut self.ring, &inputs[..input_count], &mut outputs[..=output_count])
    }
}
