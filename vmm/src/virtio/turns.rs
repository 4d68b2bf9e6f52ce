//! Who writes into a file next.
//!
//! A file system lets one writer at a time into a file, and those that wait there keep a processor busy. Here they sleep; and since waking up
//! takes as long as writing some hundred KiB, the next one is woken when the one before is nearly done, and only then waits awake.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{hint, thread};

/// Looks at the file before the processor is offered to others: some 10 µs.
const LOOKS: u32 = 1000;

/// The turns of one file.
#[derive(Debug, Default)]
pub struct Turns {
    /// Held from the moment one is the next until one is nearly done.
    next: Mutex<()>,
    /// Somebody writes.
    busy: AtomicBool,
}

/// A turn; it ends when it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    next: Option<MutexGuard<'a, ()>>,
}

impl Turns {
    /// Waits for a turn.
    pub fn take(&self) -> Turn<'_> {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut looks = 0;
        while self.busy.swap(true, Ordering::Acquire) {
            looks += 1;
            match looks % LOOKS {
                0 => thread::yield_now(),
                _ => hint::spin_loop(),
            }
        }
        Turn { turns: self, next: Some(next) }
    }
}

impl Turn<'_> {
    /// Wakes the next, who then waits for the end of this turn.
    pub fn is_nearly_over(&mut self) {
        self.next = None;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.busy.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn turns_exclude_each_other() {
        let (turns, inside, done) = (Turns::default(), AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for thread in 0..4 {
                let (turns, inside, done) = (&turns, &inside, &done);
                scope.spawn(move || {
                    for round in 0..500 {
                        let mut turn = turns.take();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        if (round + thread) % 3 > 0 {
                            turn.is_nearly_over();
                            thread::yield_now();
                        }
                        assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), 2000);
    }
}
