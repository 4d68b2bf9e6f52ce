//! Guests that behave: ring 3, messages, answers, workers.

mod common;

use common::{BOOT, CODE, DATA, Guest, kvm_or_skip, no_mail, settings};
use instar_guest_protocol::boot::{BootPage, CpuFeatures, DeviceFlags, DeviceInfo, MAGIC, Mailbox};
use instar_guest_protocol::port;
use instar_vmm::{Error, Event, Sandbox, Settings};
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use zerocopy::FromBytes;

#[test]
fn starts_in_ring_3() {
    if !kvm_or_skip() {
        return;
    }
    // xor eax, eax; mov ax, cs; store; pushfq; pop rax; store
    let outcome = Guest::new()
        .raw(&[0x31, 0xc0, 0x66, 0x8c, 0xc8, 0x48, 0xa3])
        .raw(&DATA.to_le_bytes())
        .raw(&[0x9c, 0x58, 0x48, 0xa3])
        .raw(&(DATA + 8).to_le_bytes())
        // mov rax, rsp
        .raw(&[0x48, 0x89, 0xe0, 0x48, 0xa3])
        .raw(&(DATA + 16).to_le_bytes())
        .message(DATA, 24)
        .exit()
        .run(&[])
        .unwrap();
    let words = <[u64; 3]>::read_from_bytes(&outcome.messages[0]).unwrap();
    assert_eq!(words[0] & 3, 3, "privilege level");
    assert_eq!(words[1] & 0x3000, 0, "no I/O privilege");
    assert_eq!(words[2] % 16, 0, "stack alignment");
    assert_eq!((outcome.stats.calls, outcome.stats.exits()), (1, 2));
    let phases = outcome.stats.phases;
    assert!(phases.process < phases.ready && phases.entered < phases.first_exit && phases.first_exit <= phases.done);
}

#[test]
fn vector_registers_work_where_the_boot_page_says_so() {
    if !kvm_or_skip() {
        return;
    }
    let settings = Settings { vectors: true, ..settings() };
    let outcome = Guest::new().message(BOOT, size_of::<BootPage>() as u64).exit().run_with(&settings, &[]).unwrap();
    let page = BootPage::read_from_bytes(&outcome.messages[0]).unwrap();
    if !CpuFeatures::from_bits_retain(page.cpu_features).contains(CpuFeatures::V3) {
        eprintln!("SKIPPED: this host has no AVX2");
        return;
    }
    let outcome = Guest::new()
        .data(DATA, &[7; 32])
        // mov rbx, DATA; vmovdqu ymm0, [rbx]; vpaddb ymm0, ymm0, ymm0; vmovdqu [rbx], ymm0
        .raw(&[0x48, 0xbb])
        .raw(&DATA.to_le_bytes())
        .raw(&[0xc5, 0xfe, 0x6f, 0x03, 0xc5, 0xfd, 0xfc, 0xc0, 0xc5, 0xfe, 0x7f, 0x03])
        .message(DATA, 32)
        .exit()
        .run_with(&settings, &[])
        .unwrap();
    assert_eq!(outcome.messages[0], [14; 32]);
}

#[test]
fn the_boot_page_says_what_there_is() {
    if !kvm_or_skip() {
        return;
    }
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[1; 5000], 0).unwrap();
    file.set_len(12_345).unwrap();
    let guest = Guest::new()
        .message(BOOT, size_of::<BootPage>() as u64)
        .message(BOOT + 0x2000, 2 * size_of::<DeviceInfo>() as u64)
        .message(BOOT + 0x1_0000, 7)
        .exit();
    let outcome = guest.run(&[(&file, false), (&file, true)]).unwrap();
    let page = BootPage::read_from_bytes(&outcome.messages[0]).unwrap();
    assert_eq!((page.magic, page.vcpu_count, page.device_count), (MAGIC, 3, 2));
    assert_eq!((page.request_addr, page.request_len), (BOOT + 0x1_0000, 7));
    assert_eq!(page.heap_addr % (2 << 20), (2 << 20) - (256 << 10));
    assert!(page.heap_len >= 64 << 20 && page.heap_len <= 128 << 20);
    assert_eq!(page.devices_addr, BOOT + 0x2000);
    assert_eq!(page.vcpus[2].transport.device_features, 1 << 32);
    assert_eq!(page.vcpus[2].transport.queue_max, 128);
    let devices = <[DeviceInfo; 2]>::read_from_bytes(&outcome.messages[1]).unwrap();
    assert_eq!(devices.map(|d| (d.len, d.flags)), [(12_345, 0), (12_345, DeviceFlags::WRITABLE.bits())]);
    let allocated = file.metadata().unwrap().blocks() * 512;
    assert!(allocated >= 5000 && devices.iter().all(|device| device.allocated == allocated));
    assert_eq!(outcome.messages[2], b"request");
}

#[test]
fn the_whole_heap_and_stack_can_be_used() {
    if !kvm_or_skip() {
        return;
    }
    let page = Guest::new().message(BOOT, size_of::<BootPage>() as u64).exit().run(&[]).unwrap();
    let page = BootPage::read_from_bytes(&page.messages[0]).unwrap();
    let last = page.heap_addr + page.heap_len - 8;
    let outcome = Guest::new()
        .store64(page.heap_addr, 1)
        .store64(last, 2)
        // sub rsp, 2 MiB - 8; push rax: the lowest word of the stack
        .raw(&[0x48, 0x81, 0xec, 0xf8, 0xff, 0x1f, 0x00, 0x50])
        .message(last, 8)
        .exit()
        .run(&[])
        .unwrap();
    assert_eq!(outcome.messages[0], 2u64.to_le_bytes());
}

#[test]
fn answers_come_back_and_files_may_come_with_them() {
    if !kvm_or_skip() {
        return;
    }
    let ask = Mailbox { message_addr: DATA, message_len: 5, answer_addr: DATA + 64, answer_capacity: 100, ..no_mail() };
    let guest = Guest::new()
        .data(DATA, b"hello")
        .call(ask)
        .message(DATA + 64, 12)
        .message(common::mailbox(0) + offset_of!(Mailbox, answer_len) as u64, 8)
        .call(ask)
        .message(common::mailbox(0) + offset_of!(Mailbox, answer_len) as u64, 8)
        .exit();
    let file = tempfile::tempfile().unwrap();
    let mut sandbox = Sandbox::spawn(guest.elf(), &settings()).unwrap();
    assert_eq!(sandbox.grant(file.as_fd(), false).unwrap().device, 0);
    sandbox.start(b"").unwrap();
    let event = sandbox.next_event().unwrap();
    assert!(matches!(&event, Event::Message { bytes, expects_answer: true } if bytes == b"hello"));
    assert!(matches!(sandbox.next_event(), Err(Error::Usage(_))));
    assert!(matches!(sandbox.answer(&[0; 101]), Err(Error::AnswerTooLarge { len: 101, room: 100 })));
    file.set_len(77).unwrap();
    let granted = sandbox.grant(file.as_fd(), true).unwrap();
    assert_eq!((granted.device, granted.len, granted.flags), (1, 77, DeviceFlags::WRITABLE));
    sandbox.answer(b"good morning").unwrap();
    assert!(matches!(sandbox.answer(b""), Err(Error::Usage(_))));
    let mut messages = Vec::new();
    loop {
        match sandbox.next_event().unwrap() {
            Event::Message { expects_answer: true, .. } => sandbox.answer(b"").unwrap(),
            Event::Message { bytes, .. } => messages.push(bytes),
            Event::Exited(report) => {
                assert_eq!(report.stats.calls, 5);
                break;
            }
        }
    }
    assert_eq!(messages, [b"good morning".to_vec(), 12u64.to_le_bytes().to_vec(), vec![0; 8]]);
    assert!(matches!(sandbox.next_event(), Err(Error::Usage(_))));
}

#[test]
fn large_messages_arrive_whole() {
    if !kvm_or_skip() {
        return;
    }
    let outcome = Guest::new().message(DATA, common::DATA_BYTES).message(CODE, 16).exit().run(&[]).unwrap();
    assert_eq!(outcome.messages[0].len(), 1 << 20);
    assert_eq!(outcome.messages[1].len(), 16, "code may be sent");
}

#[test]
fn workers_start_park_wait_and_wake() {
    if !kvm_or_skip() {
        return;
    }
    let epoch = BOOT + offset_of!(BootPage, epoch) as u64;
    // Each worker: lock inc dword [DATA]; if both are there, raise the epoch and wake; park; once more.
    // vCPU 0 sleeps until the count is reached.
    let lock_inc = |guest: Guest, addr: u64| {
        // mov rbx, addr; lock inc dword [rbx]
        guest.raw(&[0x48, 0xbb]).raw(&addr.to_le_bytes()).raw(&[0xf0, 0xff, 0x03])
    };
    let round = |guest: Guest| {
        let guest = lock_inc(guest, DATA);
        lock_inc(guest, epoch).out(port::WAKE, 0).out(port::PARK, 0)
    };
    // Waits until [DATA] is `count`: mov ecx, [epoch]; cmp dword [DATA], count; je done; out WAIT, ecx; jmp again
    let await_count = |guest: Guest, count: u8| {
        guest
            .raw(&[0x48, 0xbb])
            .raw(&epoch.to_le_bytes())
            .raw(&[0x49, 0xb8])
            .raw(&DATA.to_le_bytes())
            .raw(&[0x8b, 0x03]) // mov eax, [rbx]
            .raw(&[0x41, 0x83, 0x38, count]) // cmp dword [r8], count
            .raw(&[0x74, 0x07]) // je +7
            .raw(&[0x66, 0xba]) // mov dx, WAIT
            .raw(&port::WAIT.to_le_bytes())
            .raw(&[0xef]) // out dx, eax
            .raw(&[0xeb, 0xf1]) // jmp to mov eax
    };
    let guest = Guest::new().workers(|worker| round(round(worker)).hang()).out(port::START, 2);
    let guest = await_count(guest, 2).out(port::START, 2);
    let outcome = await_count(guest, 4).message(DATA, 4).exit().run(&[]).unwrap();
    assert_eq!(outcome.messages[0], 4u32.to_le_bytes());
    assert_eq!(outcome.stats.starts, 2);
    // vCPU 0 may see the count, and end the run, before the last two have rung.
    assert!((2..=4).contains(&outcome.stats.wakes), "{}", outcome.stats.wakes);
}

#[test]
fn a_worker_that_still_runs_is_no_obstacle_to_the_end() {
    if !kvm_or_skip() {
        return;
    }
    let outcome = Guest::new().workers(Guest::hang).out(port::START, 2).exit().run(&[]).unwrap();
    assert_eq!(outcome.stats.starts, 1);
}

#[test]
fn locks_on_granted_files_are_gone_when_the_run_is_over() {
    if !kvm_or_skip() {
        return;
    }
    use rustix::fs::{FlockOperation, flock};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, b"x").unwrap();
    for _ in 0..5 {
        let file = std::fs::File::open(&path).unwrap();
        // A flock belongs to the open file description, as OFD locks do.
        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        Guest::new().exit().run(&[(&file, false)]).unwrap();
        drop(file);
    }
}
