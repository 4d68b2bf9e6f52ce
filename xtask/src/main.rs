//! The task table: everything that people and CI run, by one name each.
//!
//! `cargo xtask` lists the tasks.
#![forbid(unsafe_code)]

mod audit;
mod bench;
mod corpus;
mod differential;
#[cfg(test)]
mod promises;
mod reproduce;
mod run;
mod security;
mod test;

use std::env;
use std::process::ExitCode;

use crate::run::Result;

/// A task: its name, what it does, and the function behind it.
struct Task {
    name: &'static str,
    what: &'static str,
    run: fn(&[String]) -> Result,
}

const TASKS: &[Task] = &[
    Task { name: "test", what: "all tests: nextest where installed, then the doc tests", run: test::test },
    Task { name: "golden", what: "qemu-img transcripts of ../shared/golden [-- REGEX]", run: test::golden },
    Task { name: "corpus", what: "real images of ../shared/corpus [-- REGEX]", run: corpus::corpus },
    Task {
        name: "formats",
        what: "every writable format into every other, with qemu-img as the judge",
        run: test::formats,
    },
    Task { name: "bench-smoke", what: "run each criterion bench once", run: test::bench_smoke },
    Task { name: "fuzz", what: "every fuzz target on stable: [--seconds N] [TARGET]", run: test::fuzz },
    Task {
        name: "differential",
        what: "random sequences against qemu-img: [--minutes N] [--seed S] [--steps N] [--once]",
        run: differential::differential,
    },
    Task {
        name: "security",
        what: "hostile images, kills, failing systems: [--binary P] [--only WORD] [--kills N] [images|kills|faults|calls]",
        run: security::security,
    },
    Task { name: "audit", what: "dependencies: licences, sources, versions, advisories", run: audit::audit },
    Task {
        name: "reproduce",
        what: "two clean builds in different places have the same guest programs",
        run: reproduce::reproduce,
    },
    Task {
        name: "bench-vs-qemu",
        what: "compare with qemu-img: [--mib N] [--runs N] [--dir DIR] [--only WORD] [--linearity]",
        run: bench::bench_vs_qemu,
    },
];

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let Some(task) = args.first().and_then(|name| TASKS.iter().find(|task| task.name == *name)) else {
        eprintln!("usage: cargo xtask TASK\n");
        for task in TASKS {
            eprintln!("  {:14} {}", task.name, task.what);
        }
        return ExitCode::from(2);
    };
    match (task.run)(&args[1..]) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {}: {error}", task.name);
            ExitCode::FAILURE
        }
    }
}
