//! Stores for tests: one that fails chosen requests, one that remembers the order of writes.
//!
//! Both are handed to an image by value, so each has a handle ([`Faults`], [`Trace`]) that stays with
//! the test.

mod crash;
mod faulty;

pub use crash::{CrashLog, CrashState, Event, Trace};
pub use faulty::{Faults, Faulty, Op};
