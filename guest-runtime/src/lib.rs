//! The program that instar runs inside its virtual machine: one operation over granted files.
//!
//! ```text
//!   bin/<verb>.rs ──► ops/<verb> ──► chain ──► formats ──► format crates  safe, tested on the host
//!        │                └──────────── platform ───────────┘
//!        └──► rt (freestanding): entry, heap, virtqueue, workers          all the unsafe there is
//!             host (std): threads and host files, for tests
//! ```
//!
//! # Features
//! * `freestanding`: the runtime on bare vCPUs, for the guest programs only. Not to be combined with `std`.
//! * `std`: [`host`], the same platform over threads and files.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(feature = "std", test))]
extern crate std;

pub mod chain;
pub mod detect;
pub mod files;
pub mod formats;
#[cfg(any(feature = "std", test))]
pub mod host;
pub mod lock;
#[cfg(all(test, not(feature = "freestanding")))]
#[allow(unsafe_code)]
#[path = "rt/mem.rs"]
mod mem;
pub mod ops;
pub mod platform;
#[cfg(feature = "freestanding")]
pub mod rt;
