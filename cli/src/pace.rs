//! The rate that `-r` sets.

use std::thread;
use std::time::{Duration, Instant};

/// Delays work so that it keeps a rate.
#[derive(Debug)]
pub struct Pace {
    /// Bytes per second; 0: no limit.
    rate: u64,
    since: Instant,
}

impl Pace {
    /// Starts now, with a rate in bytes per second; 0 for none.
    pub fn start(rate: u64) -> Self {
        Self { rate, since: Instant::now() }
    }

    /// Waits until `done` bytes may have been done.
    pub fn keep(&self, done: u64) {
        if self.rate > 0 {
            let due = Duration::try_from_secs_f64(done as f64 / self.rate as f64).unwrap_or(Duration::MAX);
            thread::sleep(due.saturating_sub(self.since.elapsed()));
        }
    }
}
