//! The system call filters allow what is used, and nothing else.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use instar_hostile::{Program, trace};
use instar_vmm::{AllowedCall, FilterRole, allowed_calls};
use support::can_run;

/// What no command here calls, and why it is allowed all the same.
const EXCEPTIONS: &[(&str, i64, Option<u64>)] = &[
    ("the registers of a guest that crashed", libc_number::IOCTL, Some(0x8090_ae81)),
    ("the registers of a guest that crashed", libc_number::IOCTL, Some(0x8138_ae83)),
    ("discarding on a block device", libc_number::IOCTL, Some(0x1277)),
    ("NBD exports", libc_number::SENDTO, None),
    ("the C library's allocator: heaps that grow", libc_number::BRK, None),
    ("the C library's allocator: large blocks that grow", libc_number::MREMAP, None),
    ("the C library's allocator: memory that is given back", libc_number::MADVISE, None),
    ("the end of a thread: today they end with the process", libc_number::EXIT, None),
    ("a vCPU that the kernel refuses to run for a moment", libc_number::SCHED_YIELD, None),
    ("clocks that the kernel does not keep in the program's memory", libc_number::CLOCK_GETTIME, None),
];

/// Numbers of x86-64.
mod libc_number {
    pub const IOCTL: i64 = 16;
    pub const SENDTO: i64 = 44;
    pub const BRK: i64 = 12;
    pub const MREMAP: i64 = 25;
    pub const MADVISE: i64 = 28;
    pub const EXIT: i64 = 60;
    pub const SCHED_YIELD: i64 = 24;
    pub const CLOCK_GETTIME: i64 = 228;
}

/// Commands that together do everything that is done with files. Each must succeed.
const COMMANDS: &[&[&str]] = &[
    &["convert", "-O", "qcow2", "a.raw", "a.qcow2"],
    &["info", "--stats", "a.qcow2"],
    &["check", "a.qcow2"],
    &["map", "a.qcow2"],
    &["convert", "-O", "raw", "a.qcow2", "b.raw"],
    &["convert", "-c", "-O", "qcow2", "a.raw", "c.qcow2"],
    &["convert", "-O", "raw", "c.qcow2", "c.raw"],
    &["compare", "a.qcow2", "c.qcow2"],
    &["convert", "-O", "raw", "a.raw", "d.raw"],
    &["convert", "-n", "-O", "raw", "a.raw", "d.raw"],
    &["convert", "-S", "0", "-O", "raw", "a.raw", "e.raw"],
    &["create", "-f", "qcow2", "-o", "preallocation=falloc", "f.qcow2", "4M"],
    &["create", "-f", "qcow2", "-o", "preallocation=full", "g.qcow2", "4M"],
    &["create", "-f", "qcow2", "-F", "qcow2", "-b", "a.qcow2", "h.qcow2"],
    &["snapshot", "-c", "one", "a.qcow2"],
    &["resize", "a.qcow2", "5M"],
    &["dd", "bs=64k", "if=a.raw", "of=i.raw"],
    &["commit", "h.qcow2"],
    &["bench", "-c", "100", "a.qcow2"],
];

#[test]
fn the_filters_allow_nothing_unused() {
    if !can_run(false) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let calls = match recorded(dir.path()) {
        Some(calls) => calls,
        None => {
            eprintln!("SKIPPED: no process may be traced here");
            return;
        }
    };
    // The boot thread has two filters; a worker adds its own.
    let [boot, worker] = [2, 3].map(|filters| calls.get(&filters).cloned().unwrap_or_default());
    assert!(boot.len() > 20 && worker.len() > 1, "{boot:?} {worker:?}");
    let all: BTreeSet<trace::Call> = boot.union(&worker).copied().collect();
    for (role, other, own) in
        [(FilterRole::Boot, FilterRole::Worker, boot), (FilterRole::Worker, FilterRole::Boot, worker)]
    {
        // Who serves a request is a matter of chance, so what both may do is looked for with both.
        let shared: BTreeSet<Rule> = allowed_calls(other).iter().flat_map(rules).collect();
        let used = |rule: &Rule| if shared.contains(rule) { &all } else { &own };
        let unused: Vec<Rule> = allowed_calls(role)
            .iter()
            .flat_map(rules)
            .filter(|rule| {
                !is_used(rule, used(rule))
                    && !EXCEPTIONS.iter().any(|(_, number, value)| (*number, *value) == (rule.0, rule.2))
            })
            .collect();
        assert!(unused.is_empty(), "allowed for {role:?} and never used: {unused:x?}\nused: {own:x?}");
    }
}

/// A call, and if one of its arguments is judged: which, and a value that it may have.
type Rule = (i64, usize, Option<u64>);

fn rules(call: &AllowedCall) -> Vec<Rule> {
    match call.values {
        [] => vec![(call.number, 0, None)],
        values => values.iter().map(|value| (call.number, usize::from(call.argument.min(1)), Some(*value))).collect(),
    }
}

fn is_used(rule: &Rule, used: &BTreeSet<trace::Call>) -> bool {
    let (allowed, argument, value) = *rule;
    used.iter().any(|(number, arguments)| {
        *number == allowed.cast_unsigned() && value.is_none_or(|value| arguments[argument] == value)
    })
}

fn recorded(dir: &Path) -> Option<trace::Calls> {
    let mut disk = vec![0x5a; 3 << 20];
    disk[1 << 20..2 << 20].fill(0);
    (0..1 << 20).for_each(|at| disk[(2 << 20) + at] = ((at * at) >> 7) as u8);
    fs::write(dir.join("a.raw"), disk).unwrap();
    let program = Program::new(env!("CARGO_BIN_EXE_instar"));
    let judged: Vec<u64> = [FilterRole::Boot, FilterRole::Worker]
        .into_iter()
        .flat_map(allowed_calls)
        .filter(|call| !call.values.is_empty())
        .map(|call| call.number.cast_unsigned())
        .collect();
    let mut calls = trace::Calls::new();
    for args in COMMANDS {
        let status = trace::record(&program, dir, args, &judged, &mut calls).unwrap()?;
        assert_eq!(status, 0, "{args:?}");
    }
    Some(calls)
}
