//! Prints how fast copy requests move bytes between two files, in MB/s.
//!
//! ```text
//! cargo run --release -p instar-vmm --example copying -- DIRECTORY [MEBIBYTES]
//! ```

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use common::{Requests, header, statuses};
use instar_guest_protocol::ring::{RequestHeader, RequestKind};

/// Bytes of one request.
const REQUEST: u64 = 64 << 20;

fn main() {
    let directory = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let len = std::env::args().nth(2).and_then(|text| text.parse().ok()).unwrap_or(256u64) << 20;
    let source = tempfile::tempfile_in(&directory).expect("source");
    fill(&source, len);
    for (name, flags) in [("all bytes", 0), ("without zeroes", 2)] {
        let mut times: Vec<f64> = (0..5).map(|_| one_copy(&directory, &source, len, flags)).collect();
        times.sort_by(f64::total_cmp);
        println!("{name}: {:.0} MB/s", len as f64 / times[times.len() / 2] / 1e6);
    }
}

/// Half of the blocks of 64 KiB are data, half zeroes that take space.
fn fill(file: &File, len: u64) {
    let data: Vec<u8> = (0..64 << 10).map(|i| (i % 251) as u8 | 1).collect();
    let zeroes = vec![0; 64 << 10];
    for i in 0..len >> 16 {
        file.write_all_at(if i % 2 == 0 { &data } else { &zeroes }, i << 16).expect("fill");
    }
}

fn one_copy(directory: &str, source: &File, len: u64, flags: u32) -> f64 {
    let target = tempfile::tempfile_in(directory).expect("target");
    target.set_len(len).expect("length");
    let requests = (0..len.div_ceil(REQUEST)).fold(Requests::new(), |requests, i| {
        let offset = i * REQUEST;
        let copy = RequestHeader {
            target_device: 1,
            target_offset: offset,
            granularity: 4096,
            flags,
            ..header(RequestKind::Copy, 0, offset, REQUEST.min(len - offset))
        };
        requests.add(copy, &[])
    });
    let clock = Instant::now();
    let outcome = requests.guest(&[]).run(&[(source, false), (&target, true)]).expect("run");
    let seconds = clock.elapsed().as_secs_f64();
    assert!(statuses(&outcome.messages[0]).iter().all(|status| status.status == 0));
    seconds
}
