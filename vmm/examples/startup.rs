//! Prints what the start of a sandbox costs: lowest and median times of its phases, in microseconds.
//!
//! ```text
//! cargo run --release -p instar-vmm --example startup [-- RUNS [GUEST REQUEST]]
//! ```
//!
//! Without GUEST (an ELF file) and REQUEST (hexadecimal) the guest does nothing but exit, so what a real one touches and reads
//! comes on top.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{Guest, collect};
use instar_vmm::{Phases, Sandbox, Settings};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let runs = arguments.get(1).and_then(|text| text.parse().ok()).unwrap_or(200);
    let (elf, request) = match (arguments.get(2), arguments.get(3)) {
        (Some(path), Some(hex)) => (&*std::fs::read(path).expect("guest").leak(), bytes_of(hex)),
        _ => (Guest::new().exit().elf(), Vec::new()),
    };
    let mut rows: Vec<[f64; 11]> = (0..runs).map(|_| one_run(elf, &request)).collect();
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
    println!("{runs} runs, us since spawn was called:\n    lowest    median");
    for (column, name) in names.iter().enumerate() {
        rows.sort_by(|a, b| a[column].total_cmp(&b[column]));
        println!("{:>10.1}{:>10.1}  {name}", rows[0][column], rows[rows.len() / 2][column]);
    }
}

fn bytes_of(hex: &str) -> Vec<u8> {
    hex.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).expect("ASCII"), 16).expect("hexadecimal"))
        .collect()
}

fn one_run(elf: &'static [u8], request: &[u8]) -> [f64; 11] {
    let clock = Instant::now();
    let us = || clock.elapsed().as_nanos() as f64 / 1000.0;
    let mut sandbox = Sandbox::spawn(elf, &Settings { memory: 64 << 20, ..Settings::default() }).expect("sandbox");
    let spawned = us();
    sandbox.start(request).expect("start");
    let outcome = collect(&mut sandbox).expect("run");
    let received = us();
    drop(sandbox);
    let dropped = us();
    // Let the other process finish its end, which is not waited for, before the next start is measured.
    std::thread::sleep(Duration::from_millis(3));
    let Phases { process, kvm, vm, memory, ready, entered, first_exit, done } = outcome.stats.phases;
    let [process, kvm, vm, memory, ready, entered, first_exit, done] =
        [process, kvm, vm, memory, ready, entered, first_exit, done].map(|ns| ns as f64 / 1000.0);
    [spawned, process, kvm, vm, memory, ready, entered, first_exit, done, received, dropped]
}
