//! The seeded runner.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::{Target, mutate};

/// The longest that one input may take. Far above what any takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long to go on.
#[derive(Clone, Copy, Debug)]
pub enum Budget {
    /// So many inputs.
    Inputs(u64),
    /// So long, and all seeds in any case.
    Time(Duration),
}

/// An input that made its target panic.
#[derive(Clone, Debug)]
pub struct Crash {
    /// The number of the input, for [`mutate`].
    pub number: u64,
    /// The input.
    pub input: Vec<u8>,
}

/// Feeds a target from `first` on; says how many inputs it took. The panic's message is on stderr.
///
/// An input that takes far too long ends the process, after telling its number.
///
/// # Errors
/// The first input that makes it panic.
pub fn run(target: &Target, seed: u64, first: u64, budget: Budget) -> Result<u64, Crash> {
    let seeds = (target.seeds)();
    let start = Instant::now();
    let at = AtomicU64::new(first);
    std::thread::scope(|scope| {
        // Dropped, and so closed, when the work is done.
        let (_done, waiting) = mpsc::channel::<()>();
        scope.spawn(|| watch(target.name, seed, &at, waiting));
        for number in first.. {
            let over = match budget {
                Budget::Inputs(count) => number - first >= count,
                Budget::Time(limit) => number >= seeds.len() as u64 && start.elapsed() >= limit,
            };
            if over {
                return Ok(number - first);
            }
            at.store(number, Ordering::Relaxed);
            let input = mutate(&seeds, seed, number);
            if catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err() {
                return Err(Crash { number, input });
            }
        }
        Ok(u64::MAX)
    })
}

/// Ends the process when one input takes longer than [`PATIENCE`].
fn watch(name: &str, seed: u64, at: &AtomicU64, done: mpsc::Receiver<()>) {
    let mut last = (at.load(Ordering::Relaxed), Instant::now());
    while done.recv_timeout(Duration::from_millis(200)) == Err(RecvTimeoutError::Timeout) {
        let number = at.load(Ordering::Relaxed);
        if number != last.0 {
            last = (number, Instant::now());
        } else if last.1.elapsed() > PATIENCE {
            eprintln!("{name}: seed {seed}, input {number} takes longer than {PATIENCE:?}");
            std::process::abort();
        }
    }
}
