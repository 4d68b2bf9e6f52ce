//! Fuzz targets: what every parser of instar must survive.
//!
//! A target takes any bytes and must neither panic nor work without end. Two programs run them:
//!
//! * the seeded runner (`cargo run --release`, stable): mutates seeds that code made, the same from the same
//!   `--seed` on every machine, so a finding is named by its number;
//! * cargo-fuzz (`cargo +nightly fuzz run --features libfuzzer qcow2_write`): guided by coverage. `cargo run
//!   --release -- --write-seeds corpus` makes its first corpus.
#![forbid(unsafe_code)]

mod disk;
mod mutate;
pub mod runner;
pub mod targets;

pub use disk::Disk;
pub use mutate::{Random, mutate};

/// Something to feed bytes to.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, as cargo-fuzz has it.
    pub name: &'static str,
    /// Takes any bytes; panics where something is wrong.
    pub run: fn(&[u8]),
    /// Good inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}
