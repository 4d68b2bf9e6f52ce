//! What a run did, counted.

use std::sync::atomic::{AtomicU64, Ordering};

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
    pub fn sums(&self, phases: Phases) -> Stats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            phases,
            kicks: load(&self.kicks),
            calls: load(&self.calls),
            starts: load(&self.starts),
            parks: load(&self.parks),
            waits: load(&self.waits),
            wakes: load(&self.wakes),
            requests: std::array::from_fn(|i| Traffic { count: load(&self.counts[i]), bytes: load(&self.bytes[i]) }),
        }
    }
}

/// Adds to a counter that orders nothing.
pub fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}
