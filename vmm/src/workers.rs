//! Worker vCPUs: who runs, who rests, who waits.

use std::sync::{Condvar, Mutex, PoisonError};

/// What each worker may do, and where they rest.
#[derive(Debug)]
pub struct Workers {
    state: Mutex<Vec<Worker>>,
    started: Condvar,
    epoch: Mutex<()>,
    epoch_changed: Condvar,
}

/// One worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Worker {
    /// It has no thread yet.
    Absent,
    /// It runs, or rests without permission to go on.
    Known,
    /// It was started; if it still runs, its next rest ends at once.
    Started,
}

impl Workers {
    /// For `count` workers, vCPU 1 to `count`.
    pub fn new(count: u32) -> Self {
        Self {
            state: Mutex::new(vec![Worker::Absent; count as usize]),
            started: Condvar::new(),
            epoch: Mutex::new(()),
            epoch_changed: Condvar::new(),
        }
    }

    /// Lets workers 1 to `count` go on; returns those that need a thread. `None`: there are not that many.
    pub fn start(&self, count: u32) -> Option<Vec<u32>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut fresh = Vec::new();
        for (number, worker) in (1..).zip(state.get_mut(..count as usize)?) {
            if *worker == Worker::Absent {
                *worker = Worker::Known;
                fresh.push(number);
            } else {
                *worker = Worker::Started;
            }
        }
        self.started.notify_all();
        Some(fresh)
    }

    /// Rests until worker `number` is started.
    pub fn park(&self, number: u32) {
        let index = number as usize - 1;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let resting = |state: &mut Vec<Worker>| state[index] != Worker::Started;
        let mut state = self.started.wait_while(state, resting).unwrap_or_else(PoisonError::into_inner);
        state[index] = Worker::Known;
    }

    /// Sleeps while `unchanged` says that the epoch word is what the guest saw. The word is looked at under the lock that
    /// [`wake`](Self::wake) takes after the guest has increased it, so no wake-up is lost.
    pub fn wait(&self, unchanged: impl Fn() -> bool) {
        let guard = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.epoch_changed.wait_while(guard, |()| unchanged()));
    }

    /// Wakes all that sleep in [`wait`](Self::wait).
    pub fn wake(&self) {
        drop(self.epoch.lock());
        self.epoch_changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_start_is_not_lost_on_a_running_worker() {
        let workers = Workers::new(2);
        assert_eq!(workers.start(2), Some(vec![1, 2]));
        assert_eq!(workers.start(1), Some(vec![]));
        workers.park(1);
        std::thread::scope(|scope| {
            let parked = scope.spawn(|| workers.park(2));
            assert_eq!(workers.start(2), Some(vec![]));
            parked.join().unwrap();
        });
        assert_eq!(workers.start(3), None);
    }

    #[test]
    fn wake_ups_are_not_lost() {
        let workers = Workers::new(0);
        let epoch = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for seen in 0..2000 {
                        workers.wait(|| epoch.load(Ordering::SeqCst) == seen);
                    }
                });
            }
            for _ in 0..2000 {
                epoch.fetch_add(1, Ordering::SeqCst);
                workers.wake();
            }
        });
        assert_eq!(epoch.load(Ordering::SeqCst), 2000);
    }
}
