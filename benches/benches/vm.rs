//! The sandbox itself: start and end of a virtual machine, an exit, and a round trip on the request ring.
//!
//! The guests are a few hand-made instructions, those of the monitor's own tests. Needs KVM.
#![allow(missing_docs, reason = "criterion_group! makes a public function")]

#[path = "../../vmm/tests/common/mod.rs"]
mod common;

use std::fs::File;

use common::{AVAIL, Guest, PAYLOAD, QueueWords, Requests, header, kvm_or_skip};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use instar_guest_protocol::port;
use instar_vmm::RequestKind;

/// Exits of one run.
const EXITS: u32 = 1000;

/// `mov ecx, EXITS; again: …; dec ecx; jnz again`
fn repeated(guest: Guest, body: &[u8]) -> Guest {
    let back = -(i32::try_from(body.len()).expect("a few instructions") + 8);
    guest.raw(&[0xb9]).raw(&EXITS.to_le_bytes()).raw(body).raw(&[0xff, 0xc9, 0x0f, 0x85]).raw(&back.to_le_bytes())
}

/// `mov dx, port; xor eax, eax; out dx, eax`
fn ring(port: u16) -> Vec<u8> {
    [&[0x66, 0xba][..], &port.to_le_bytes(), &[0x31, 0xc0, 0xef]].concat()
}

fn start(c: &mut Criterion) {
    if kvm_or_skip() {
        c.bench_function("vm/start-and-end", |b| b.iter(|| Guest::new().exit().run(&[]).expect("an empty guest")));
    }
}

fn exits(c: &mut Criterion) {
    if !kvm_or_skip() {
        return;
    }
    let mut group = c.benchmark_group("vm");
    group.throughput(Throughput::Elements(EXITS.into())).sample_size(10);
    group.bench_function(format!("exit/{EXITS}"), |b| {
        b.iter(|| repeated(Guest::new(), &ring(port::WAKE)).exit().run(&[]).expect("a guest that wakes nobody"));
    });
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(1 << 20).expect("a sparse file");
    for len in [512u32, 65536] {
        group.bench_function(format!("read-{len}/{EXITS}"), |b| b.iter(|| reads(&file, len)));
    }
    group.finish();
}

/// A request that is put on the ring again and again.
fn reads(file: &File, len: u32) {
    let guest = Guest::new().queue(QueueWords::good());
    // inc word [AVAIL + 2]
    let index = u32::try_from(AVAIL + 2).expect("a low address").to_le_bytes();
    let body = [&[0x66, 0xff, 0x04, 0x25][..], &index, &ring(port::KICK)].concat();
    let request = Requests::new().add(header(RequestKind::Read, 0, 4096, len.into()), &[(PAYLOAD, len)]);
    let outcome = request.onto(repeated(guest, &body)).exit().run(&[(file, false)]).expect("a guest that reads");
    assert_eq!(outcome.stats.requests(RequestKind::Read).bytes, u64::from(len) * u64::from(EXITS));
}

criterion_group!(benches, start, exits);
criterion_main!(benches);
