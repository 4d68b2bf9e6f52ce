//! What a run did, counted.

use std::sync::atomic::{AtomicU64, Ordering};

use instar_guest_protocol::limits::MAX_VCPUS;
use instar_guest_protocol::ring::RequestKind;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::virtio::{KINDS, kind_index};

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Stats {
    /// Times at which the start reached its steps.
    pub phases: Phases,
    /// Queue doorbells.
    pub kicks: u64,
    /// Messages.
    pub calls: u64,
    /// Times that workers were started.
    pub starts: u64,
    /// Times that a worker went to rest.
    pub parks: u64,
    /// Times that a vCPU waited for another.
    pub waits: u64,
    /// Times that a vCPU woke others.
    pub wakes: u64,
    /// Doorbells of each vCPU; 0 for those that were not there.
    pub vcpu_kicks: [u64; MAX_VCPUS],
    /// What the monitor process used.
    pub usage: Usage,
    requests: [Traffic; KINDS.len()],
}

impl Stats {
    /// Requests of one kind.
    pub fn requests(&self, kind: RequestKind) -> Traffic {
        self.requests[kind_index(kind)]
    }

    /// All exits of the machine that led to the monitor.
    pub fn exits(&self) -> u64 {
        // One more: the last.
        self.kicks + self.calls + self.starts + self.parks + self.waits + self.wakes + 1
    }
}

/// What a process used, by `getrusage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Usage {
    /// Processor time in user mode, the guest's included, in nanoseconds.
    pub user: u64,
    /// Processor time in the kernel, in nanoseconds.
    pub system: u64,
    /// The most memory that it had at a time, in bytes: the touched part of guest memory included.
    pub peak_memory: u64,
    /// Pages touched for the first time (of 4 KiB, or larger ones counted once).
    pub page_faults: u64,
}

/// A run that is over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What was done.
    pub stats: Stats,
    /// With which file, by device number.
    pub devices: Vec<DeviceTraffic>,
}

/// What was done with a granted file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceTraffic {
    /// Reads into guest memory.
    pub read: Traffic,
    /// Writes from guest memory.
    pub written: Traffic,
    /// Copies from this file, without the guest.
    pub copied_from: Traffic,
    /// Copies to this file, without the guest.
    pub copied_to: Traffic,
    /// Everything else: zeroes, discards, lengths, hole maps, flushes.
    pub other: Traffic,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Traffic {
    /// How many, failed ones included.
    pub count: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
}

/// Steps of a start, in nanoseconds since [`Sandbox::spawn`](crate::Sandbox::spawn) was called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Phases {
    /// The monitor process runs and is locked down.
    pub process: u64,
    /// `/dev/kvm` is open.
    pub kvm: u64,
    /// The machine exists.
    pub vm: u64,
    /// Guest memory holds the program.
    pub memory: u64,
    /// The machine waits for a request.
    pub ready: u64,
    /// The request has come; the guest is entered.
    pub entered: u64,
    /// The guest rang its first doorbell.
    pub first_exit: u64,
    /// The guest is done.
    pub done: u64,
}

/// Counters that all vCPU threads share.
#[derive(Debug, Default)]
pub struct Counters {
    pub kicks: AtomicU64,
    pub calls: AtomicU64,
    pub starts: AtomicU64,
    pub parks: AtomicU64,
    pub waits: AtomicU64,
    pub wakes: AtomicU64,
    pub vcpu_kicks: [AtomicU64; MAX_VCPUS],
    counts: [AtomicU64; KINDS.len()],
    bytes: [AtomicU64; KINDS.len()],
}

impl Counters {
    /// Counts a request that moved `bytes`.
    pub fn request(&self, kind: RequestKind, bytes: u64) {
        let index = kind_index(kind);
        add(&self.counts[index], 1);
        add(&self.bytes[index], bytes);
    }

    /// The sums.
    pub fn sums(&self, phases: Phases, usage: Usage) -> Stats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            phases,
            kicks: load(&self.kicks),
            calls: load(&self.calls),
            starts: load(&self.starts),
            parks: load(&self.parks),
            waits: load(&self.waits),
            wakes: load(&self.wakes),
            vcpu_kicks: std::array::from_fn(|i| load(&self.vcpu_kicks[i])),
            usage,
            requests: std::array::from_fn(|i| Traffic { count: load(&self.counts[i]), bytes: load(&self.bytes[i]) }),
        }
    }
}

/// Counters of one file, shared by all vCPU threads.
#[derive(Debug, Default)]
pub struct DeviceCounters {
    read: Counter,
    written: Counter,
    copied_from: Counter,
    copied_to: Counter,
    other: Counter,
}

#[derive(Debug, Default)]
struct Counter {
    count: AtomicU64,
    bytes: AtomicU64,
}

impl Counter {
    fn add(&self, bytes: u64) {
        add(&self.count, 1);
        add(&self.bytes, bytes);
    }

    fn sum(&self) -> Traffic {
        Traffic { count: self.count.load(Ordering::Relaxed), bytes: self.bytes.load(Ordering::Relaxed) }
    }
}

impl DeviceCounters {
    /// Counts a request on this file that moved `bytes`.
    pub fn request(&self, kind: RequestKind, bytes: u64) {
        match kind {
            RequestKind::Read => self.read.add(bytes),
            RequestKind::Write => self.written.add(bytes),
            RequestKind::Copy => self.copied_from.add(bytes),
            _ => self.other.add(bytes),
        }
    }

    /// Counts a copy to this file.
    pub fn copied_to(&self, bytes: u64) {
        self.copied_to.add(bytes);
    }

    /// The sums.
    pub fn sums(&self) -> DeviceTraffic {
        DeviceTraffic {
            read: self.read.sum(),
            written: self.written.sum(),
            copied_from: self.copied_from.sum(),
            copied_to: self.copied_to.sum(),
            other: self.other.sum(),
        }
    }
}

/// Adds to a counter that orders nothing.
pub fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}
