//! Prints what the start of a sandbox costs: medians of its phases, in microseconds.
//!
//! ```text
//! cargo run --release -p instar-vmm --example startup [-- RUNS]
//! ```
//!
//! The guest does nothing but exit, so what a real one touches and reads comes on top.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{Guest, collect, settings};
use instar_vmm::{Phases, Sandbox};

fn main() {
    let runs = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(200);
    let elf = Guest::new().exit().elf();
    let mut rows: Vec<[f64; 11]> = (0..runs).map(|_| one_run(elf)).collect();
    let names = [
        "spawn returns",
        "process locked down",
        "kvm open",
        "vm created",
        "memory loaded",
        "vcpu ready",
        "guest entered",
        "first exit",
        "run done",
        "event received",
        "dropped",
    ];
    println!("medians of {runs} runs, us since spawn was called:");
    for (column, name) in names.iter().enumerate() {
        rows.sort_by(|a, b| a[column].total_cmp(&b[column]));
        println!("{:>10.1}  {name}", rows[rows.len() / 2][column]);
    }
}

fn one_run(elf: &'static [u8]) -> [f64; 11] {
    let clock = Instant::now();
    let us = || clock.elapsed().as_nanos() as f64 / 1000.0;
    let mut sandbox = Sandbox::spawn(elf, &settings()).expect("sandbox");
    let spawned = us();
    sandbox.start(b"").expect("start");
    let outcome = collect(&mut sandbox).expect("run");
    let received = us();
    drop(sandbox);
    let dropped = us();
    let Phases { process, kvm, vm, memory, ready, entered, first_exit, done } = outcome.stats.phases;
    let [process, kvm, vm, memory, ready, entered, first_exit, done] =
        [process, kvm, vm, memory, ready, entered, first_exit, done].map(|ns| ns as f64 / 1000.0);
    [spawned, process, kvm, vm, memory, ready, entered, first_exit, done, received, dropped]
}
