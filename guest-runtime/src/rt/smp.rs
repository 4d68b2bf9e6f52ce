//! Workers, and sleeping until something changes.
//!
//! vCPU 0 runs the operation. Workers are started by the first [`parallel`] that needs them and from then on sleep in
//! [`wait`] between jobs, so no start can be lost.

use core::hint::spin_loop;
use core::mem;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use instar_guest_protocol::port;

use super::{boot, doorbell};
use crate::lock::Lock;

/// Turns of looking at the epoch before sleeping; about as long as a doorbell takes.
const SPINS: u32 = 1000;

/// vCPUs that sleep, or are about to.
static SLEEPERS: AtomicU32 = AtomicU32::new(0);

/// The job that runs, or ran last.
static JOB: Lock<Job> = Lock::new(Job { number: 0, workers: 0, run: None });
/// Workers that have not finished the job.
static BUSY: AtomicUsize = AtomicUsize::new(0);
/// Workers that were started.
static STARTED: AtomicUsize = AtomicUsize::new(0);

type Run = &'static (dyn Fn(usize) + Sync);

#[derive(Clone, Copy)]
struct Job {
    number: u64,
    /// vCPU 1..=`workers` take part.
    workers: usize,
    run: Option<Run>,
}

/// See [`Platform::parallel`](crate::platform::Platform::parallel).
pub fn parallel(n: usize, f: &(dyn Fn(usize) + Sync)) {
    assert!(boot::current() == 0, "parallel on a worker");
    assert!(n <= boot::vcpu_count(), "{n} vCPUs wanted, {} present", boot::vcpu_count());
    assert!(BUSY.load(Ordering::Acquire) == 0, "parallel inside parallel");
    let workers = n.saturating_sub(1);
    if workers > 0 {
        // SAFETY: only the lifetime is changed. Each worker that takes `f` counts in BUSY until it has returned from it,
        // and this function does not return before BUSY is 0 (a panic ends the machine).
        let run = unsafe { mem::transmute::<&(dyn Fn(usize) + Sync), Run>(f) };
        BUSY.store(workers, Ordering::Release);
        {
            let mut job = JOB.lock();
            *job = Job { number: job.number + 1, workers, run: Some(run) };
        }
        wake();
        if STARTED.swap(workers.max(STARTED.load(Ordering::Relaxed)), Ordering::Relaxed) < workers {
            doorbell::ring(port::START, workers as u32);
        }
    }
    if n > 0 {
        f(0);
    }
    loop {
        let epoch = epoch();
        if BUSY.load(Ordering::Acquire) == 0 {
            break;
        }
        wait(epoch);
    }
    JOB.lock().run = None;
}

/// What a worker does from its first instruction on.
pub fn work(me: usize) -> ! {
    let mut last = 0;
    loop {
        let epoch = epoch();
        let job = *JOB.lock();
        if job.number == last {
            wait(epoch);
            continue;
        }
        last = job.number;
        // Not taking part, one must not touch `run`: it may end at any time.
        if me <= job.workers
            && let Some(run) = job.run
        {
            run(me);
            if BUSY.fetch_sub(1, Ordering::AcqRel) == 1 {
                wake();
            }
        }
    }
}

/// See [`Platform::epoch`](crate::platform::Platform::epoch).
pub fn epoch() -> u32 {
    boot::epoch().load(Ordering::SeqCst)
}

/// See [`Platform::wait`](crate::platform::Platform::wait).
pub fn wait(seen: u32) {
    for _ in 0..SPINS {
        if epoch() != seen {
            return;
        }
        spin_loop();
    }
    // Counted first, then looked: whoever raises the epoch after the look sees the count and rings. The monitor compares
    // once more, under its own lock.
    SLEEPERS.fetch_add(1, Ordering::SeqCst);
    while epoch() == seen {
        doorbell::ring(port::WAIT, seen);
    }
    SLEEPERS.fetch_sub(1, Ordering::SeqCst);
}

/// See [`Platform::wake`](crate::platform::Platform::wake).
pub fn wake() {
    boot::epoch().fetch_add(1, Ordering::SeqCst);
    if SLEEPERS.load(Ordering::SeqCst) != 0 {
        doorbell::ring(port::WAKE, 0);
    }
}
