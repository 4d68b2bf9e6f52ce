//! `--stats`: what a run of the sandbox did, on standard error.

use std::io::{self, Write};

use instar_vmm::{DeviceTraffic, Report, RequestKind, Traffic};

use super::human;
use super::json;
use super::node::Node;
use crate::sandbox::StatsForm;

/// Prints the statistics of a run.
pub fn print(report: &Report, form: StatsForm) {
    let text = match form {
        StatsForm::Human => human(report),
        StatsForm::Json => json::line(&node(report)),
    };
    // A standard error that is closed is no reason to fail.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Kinds of requests, by the name under which they are shown.
const KINDS: [(&str, RequestKind); 10] = [
    ("read", RequestKind::Read),
    ("write", RequestKind::Write),
    ("copy", RequestKind::Copy),
    ("compare", RequestKind::Compare),
    ("write-zeroes", RequestKind::WriteZeroes),
    ("discard", RequestKind::Discard),
    ("allocate", RequestKind::Allocate),
    ("set-length", RequestKind::SetLen),
    ("holes", RequestKind::Holes),
    ("flush", RequestKind::Flush),
];

/// Doorbells, by the name under which they are shown.
fn doorbells(report: &Report) -> [(&'static str, u64); 6] {
    let stats = &report.stats;
    [
        ("kicks", stats.kicks),
        ("calls", stats.calls),
        ("starts", stats.starts),
        ("parks", stats.parks),
        ("waits", stats.waits),
        ("wakes", stats.wakes),
    ]
}

/// Steps of the start and the end, in nanoseconds since the start, by the name under which they are shown.
fn phases(report: &Report) -> [(&'static str, u64); 8] {
    let phases = &report.stats.phases;
    [
        ("process", phases.process),
        ("kvm", phases.kvm),
        ("vm", phases.vm),
        ("memory", phases.memory),
        ("ready", phases.ready),
        ("entered", phases.entered),
        ("first-exit", phases.first_exit),
        ("done", phases.done),
    ]
}

fn uses(device: &DeviceTraffic) -> [(&'static str, Traffic); 5] {
    [
        ("read", device.read),
        ("written", device.written),
        ("copied-from", device.copied_from),
        ("copied-to", device.copied_to),
        ("other", device.other),
    ]
}

fn human(report: &Report) -> String {
    let stats = &report.stats;
    let milliseconds = |nanoseconds: u64| format!("{:.2} ms", nanoseconds as f64 / 1e6);
    let traffic = |traffic: Traffic| match traffic.bytes {
        0 => format!("{}", traffic.count),
        bytes => format!("{} ({})", traffic.count, human::size(bytes)),
    };
    let mut text = String::from("Sandbox:\n");
    let mut line = |key: &str, values: Vec<String>| text.push_str(&format!("    {key}: {}\n", values.join(", ")));
    line("reached after", phases(report).map(|(name, at)| format!("{name} {}", milliseconds(at))).to_vec());
    let usage = stats.usage;
    line(
        "processor time",
        vec![format!("user {}", milliseconds(usage.user)), format!("system {}", milliseconds(usage.system))],
    );
    line("memory touched", vec![human::size(usage.peak_memory), format!("{} page faults", usage.page_faults)]);
    let exits = doorbells(report).map(|(name, count)| format!("{name} {count}")).to_vec();
    line(&format!("exits ({})", stats.exits()), exits);
    let kicks = stats.vcpu_kicks.iter().enumerate().filter(|(_, kicks)| **kicks > 0);
    line("kicks of each vCPU", kicks.map(|(vcpu, kicks)| format!("{vcpu}: {kicks}")).collect());
    let requests = KINDS.map(|(name, kind)| (name, stats.requests(kind)));
    let requests = requests.iter().filter(|(_, done)| done.count > 0);
    line("requests", requests.map(|(name, done)| format!("{name} {}", traffic(*done))).collect());
    for (number, device) in report.devices.iter().enumerate() {
        let uses = uses(device);
        let uses = uses.iter().filter(|(_, done)| done.count > 0);
        line(&format!("file {number}"), uses.map(|(name, done)| format!("{name} {}", traffic(*done))).collect());
    }
    text
}

fn node(report: &Report) -> Node {
    let stats = &report.stats;
    let counts =
        |list: &[(&'static str, u64)]| Node::Dict(list.iter().map(|(name, n)| (*name, Node::Int(*n))).collect());
    let traffic = |done: Traffic| counts(&[("count", done.count), ("bytes", done.bytes)]);
    let requests = KINDS.map(|(name, kind)| (name, traffic(stats.requests(kind))));
    let device = |device: &DeviceTraffic| Node::Dict(uses(device).map(|(name, done)| (name, traffic(done))).to_vec());
    let usage = stats.usage;
    Node::Dict(vec![
        ("phases-ns", counts(&phases(report))),
        ("cpu-user-ns", Node::Int(usage.user)),
        ("cpu-system-ns", Node::Int(usage.system)),
        ("peak-memory", Node::Int(usage.peak_memory)),
        ("page-faults", Node::Int(usage.page_faults)),
        ("exits", Node::Int(stats.exits())),
        ("doorbells", counts(&doorbells(report))),
        ("vcpu-kicks", Node::List(stats.vcpu_kicks.iter().map(|kicks| Node::Int(*kicks)).collect())),
        ("requests", Node::Dict(requests.to_vec())),
        ("files", Node::List(report.devices.iter().map(device).collect())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        report.stats.kicks = 3;
        report.stats.vcpu_kicks[1] = 3;
        report.stats.phases.done = 2_500_000;
        report.stats.usage.peak_memory = 4 << 20;
        let copied_to = Traffic { count: 2, bytes: 8 << 20 };
        report.devices = vec![DeviceTraffic { copied_to, ..DeviceTraffic::default() }];
        report
    }

    #[test]
    fn for_people() {
        let text = human(&report());
        for part in
            ["done 2.50 ms", "memory touched: 4 MiB", "exits (4): kicks 3", "1: 3", "file 0: copied-to 2 (8 MiB)"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn for_programs() {
        let text = json::line(&node(&report()));
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["exits"], 4);
        assert_eq!(value["vcpu-kicks"][1], 3);
        assert_eq!(value["files"][0]["copied-to"]["bytes"], 8 << 20);
        assert_eq!(text.lines().count(), 1);
    }
}
