//! What the monitor process still has while a guest runs, as the kernel tells it.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{DATA, Guest, kvm_or_skip, mailbox, no_mail, settings};
use instar_guest_protocol::boot::Mailbox;
use instar_guest_protocol::port;
use instar_vmm::{Event, Sandbox, Settings};

/// The fields of `/proc/*/status`.
fn status(path: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path.join("status")).unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()
}

/// The processes that this thread has forked.
fn children() -> Vec<PathBuf> {
    let list = fs::read_to_string("/proc/thread-self/children").unwrap();
    list.split_whitespace().map(|pid| Path::new("/proc").join(pid)).collect()
}

fn threads(process: &Path) -> Vec<PathBuf> {
    fs::read_dir(process.join("task")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// A guest with two workers that run for ever, and whose vCPU 0 waits for an answer.
fn waiting_sandbox(settings: &Settings) -> Sandbox {
    let ask = Mailbox { message_addr: DATA, message_len: 5, answer_addr: DATA + 64, answer_capacity: 100, ..no_mail() };
    let guest = Guest::new().workers(Guest::hang).out(port::START, 2).call(ask).exit();
    assert_ne!(mailbox(0), 0);
    let mut sandbox = Sandbox::spawn(guest.elf(), settings).unwrap();
    let file = tempfile::tempfile().unwrap();
    sandbox.grant(file.as_fd(), true).unwrap();
    sandbox.start(b"").unwrap();
    assert!(matches!(sandbox.next_event().unwrap(), Event::Message { expects_answer: true, .. }));
    sandbox
}

/// Waits until all three threads run under their filters.
fn settle(process: &Path) -> Vec<BTreeMap<String, String>> {
    let start = Instant::now();
    loop {
        let mut found: Vec<_> = threads(process).iter().map(|thread| status(thread)).collect();
        // The kernel's own helper of a machine: it never runs in user mode.
        found.retain(|status| !status["Name"].starts_with("kvm-"));
        let filters = |status: &BTreeMap<String, String>| status["Seccomp_filters"].parse::<u32>().unwrap();
        // The boot thread has two filters, a worker one more.
        let bound = found.iter().filter(|status| filters(status) >= 2).count();
        let workers = found.iter().filter(|status| filters(status) == 3).count();
        if bound == 3 && workers == 2 {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{found:#?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn every_thread_is_filtered_and_has_no_privileges() {
    if !kvm_or_skip() {
        return;
    }
    let settings = Settings { vcpus: 3, user: 54321, read_only: true, cpu_limit: Some(77), ..settings() };
    let sandbox = waiting_sandbox(&settings);
    let [process] = children().try_into().expect("one child");
    for status in settle(&process) {
        assert_eq!(status["Seccomp"], "2", "filter mode");
        assert_eq!(status["NoNewPrivs"], "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(u64::from_str_radix(&status[set], 16), Ok(0), "{set}");
        }
        if rustix::process::getuid().is_root() {
            assert_eq!(status["Uid"].split_whitespace().collect::<Vec<_>>(), ["54321"; 4]);
            assert_eq!(status["Gid"].split_whitespace().collect::<Vec<_>>(), ["54321"; 4]);
            assert_eq!(status["Groups"], "");
        }
    }
    let limits = fs::read_to_string(process.join("limits")).unwrap();
    let limit = |name: &str| limits.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert_eq!(limit("Max core file size").split_whitespace().nth(4), Some("0"));
    let files: u64 = limit("Max open files").split_whitespace().nth(3).unwrap().parse().unwrap();
    assert!(files <= 1100, "{files}");
    assert_eq!(limit("Max file size").split_whitespace().nth(3), Some("0"));
    assert_eq!(limit("Max cpu time").split_whitespace().nth(3), Some("77"));
    drop(sandbox);
    assert!(!process.exists(), "the process outlives its owner");
}

#[test]
fn the_process_has_only_what_it_was_granted() {
    if !kvm_or_skip() {
        return;
    }
    // Files of the caller that are not granted do not get there, whether they close on exec or not.
    let _stray = tempfile::tempfile().unwrap();
    let sandbox = waiting_sandbox(&Settings { vcpus: 3, ..settings() });
    let [process] = children().try_into().expect("one child");
    settle(&process);
    let mut files = 0;
    for entry in fs::read_dir(process.join("fd")).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap();
        let target = target.to_str().unwrap().to_owned();
        let known = ["/dev/kvm", "anon_inode:kvm-vm", "anon_inode:kvm-vcpu", "socket:["];
        if !known.iter().any(|prefix| target.starts_with(prefix)) {
            files += 1;
        }
    }
    assert_eq!(files, 1, "more than the granted file");
    drop(sandbox);
}

#[test]
fn the_process_ends_with_its_owner() {
    if !kvm_or_skip() {
        return;
    }
    // The thread that spawned the sandbox is the owner.
    let process = std::thread::spawn(|| {
        let sandbox = waiting_sandbox(&Settings { vcpus: 3, ..settings() });
        let [process] = children().try_into().expect("one child");
        settle(&process);
        std::mem::forget(sandbox);
        process
    });
    let process = process.join().unwrap();
    let start = Instant::now();
    // It stays as a zombie: nobody waits for it.
    while fs::read_to_string(process.join("stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(start.elapsed() < Duration::from_secs(20), "it lives on");
        std::thread::sleep(Duration::from_millis(2));
    }
}
