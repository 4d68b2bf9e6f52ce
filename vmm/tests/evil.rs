//! Guests that were taken over: each must end in a clean error, soon, with no file touched.

mod common;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::{
    AVAIL, BOOT, CODE, CONSTANTS, DATA, DESC, Guest, HEADERS, Outcome, PAYLOAD, QueueWords, Requests, STATUSES, USED,
    descriptor, header, kvm_or_skip, no_mail, settings,
};
use instar_guest_protocol::boot::Mailbox;
use instar_guest_protocol::port;
use instar_guest_protocol::ring::RequestKind;
use instar_vmm::{Error, Misbehaviour, Sandbox, Settings};
use zerocopy::IntoBytes;

fn error(guest: Guest) -> Error {
    guest.run(&[]).map(|outcome: Outcome| outcome.stats).expect_err("must not end well")
}

fn misbehaviour(guest: Guest) -> Misbehaviour {
    match error(guest) {
        Error::GuestMisbehaved(what) => what,
        other => panic!("another error: {other:?}"),
    }
}

/// Crashes of the guest, at an instruction that is known.
fn crash_at(guest: Guest) -> u64 {
    match error(guest) {
        Error::GuestCrashed { vcpu: 0, rip, .. } => rip,
        other => panic!("another error: {other:?}"),
    }
}

#[test]
fn endless_loops_are_ended() {
    if !kvm_or_skip() {
        return;
    }
    let short = Settings { stall: Duration::from_millis(200), ..settings() };
    let result = Guest::new().hang().run_with(&short, &[]);
    assert!(matches!(result, Err(Error::Stalled)), "{result:?}");
    // A loop of doorbells that do nothing is no progress either.
    let wake_for_ever = Guest::new().raw(&[0x66, 0xba]).raw(&port::WAKE.to_le_bytes()).raw(&[0xef, 0xeb, 0xfd]);
    let result = wake_for_ever.run_with(&short, &[]);
    assert!(matches!(result, Err(Error::Stalled)), "{result:?}");
    // Nor is a doorbell that announces requests, with none there.
    let empty_kicks = Guest::new()
        .queue(QueueWords::good())
        .raw(&[0x66, 0xba])
        .raw(&port::KICK.to_le_bytes())
        .raw(&[0xef, 0xeb, 0xfd]);
    let result = empty_kicks.run_with(&short, &[]);
    assert!(matches!(result, Err(Error::Stalled)), "{result:?}");
    // All asleep.
    let result = Guest::new().out(port::WAIT, 0).exit().run_with(&short, &[]);
    assert!(matches!(result, Err(Error::Stalled)), "{result:?}");
    // A worker may loop, but not alone.
    let result = Guest::new().workers(Guest::hang).out(port::START, 2).out(port::WAIT, 0).exit().run_with(&short, &[]);
    assert!(matches!(result, Err(Error::Stalled)), "{result:?}");
}

#[test]
fn the_time_limit_holds_for_busy_guests() {
    if !kvm_or_skip() {
        return;
    }
    let limited = Settings { time_limit: Some(Duration::from_millis(300)), ..settings() };
    // Kicks of an empty queue, for ever.
    let guest = Guest::new()
        .queue(QueueWords::good())
        .raw(&[0x66, 0xba])
        .raw(&port::KICK.to_le_bytes())
        .raw(&[0xef, 0xeb, 0xfd]);
    let result = guest.run_with(&limited, &[]);
    assert!(matches!(result, Err(Error::TimedOut)), "{result:?}");
}

/// `again: add word [AVAIL + 2], step; out KICK; jmp again`, or so many times and then an end.
fn requests_for_ever(requests: Requests, step: u16, turns: Option<u32>) -> Guest {
    let start = Guest::new().queue(QueueWords::good());
    // mov r8, AVAIL + 2; mov ecx, turns; mov dx, KICK
    let start = start.raw(&[0x49, 0xb8]).raw(&(AVAIL + 2).to_le_bytes());
    let start = start.raw(&[0xb9]).raw(&turns.unwrap_or(1).to_le_bytes());
    let start = start.raw(&[0x66, 0xba]).raw(&port::KICK.to_le_bytes());
    // add word [r8], step; out dx, eax; (dec ecx; jnz) or jmp
    let turn = start.raw(&[0x66, 0x41, 0x81, 0x00]).raw(&step.to_le_bytes()).raw(&[0xef]);
    let guest = match turns {
        Some(_) => turn.raw(&[0xff, 0xc9, 0x75, 0xf5]).exit(),
        None => turn.raw(&[0xeb, 0xf7]),
    };
    requests.onto(guest)
}

#[test]
fn floods_of_requests_take_no_memory() {
    if !kvm_or_skip() {
        return;
    }
    let file = tempfile::tempfile().unwrap();
    // All 128 entries of the available ring name the same request.
    let tiny = || Requests::new().add(header(RequestKind::Read, 0, 0, 0), &[]);
    let outcome = requests_for_ever(tiny(), 128, Some(8000)).run(&[(&file, false)]).unwrap();
    let few = requests_for_ever(tiny(), 128, Some(1)).run(&[(&file, false)]).unwrap();
    assert_eq!((few.stats.kicks, outcome.stats.kicks), (1, 8000));
    assert_eq!(outcome.stats.requests(RequestKind::Read).count, 1_024_000);
    let grown = outcome.stats.usage.peak_memory.saturating_sub(few.stats.usage.peak_memory);
    assert!(grown < 4 << 20, "{grown} bytes more for a million requests");
    // A flood of flushes is work; only limits of time end it.
    let flush = Requests::new().add(header(RequestKind::Flush, 0, 0, 0), &[]);
    let limited = Settings { time_limit: Some(Duration::from_millis(300)), ..settings() };
    let result = requests_for_ever(flush, 128, None).run_with(&limited, &[(&file, true)]);
    assert!(matches!(result, Err(Error::TimedOut)), "{result:?}");
}

#[test]
fn processor_time_has_a_limit() {
    if !kvm_or_skip() {
        return;
    }
    let file = tempfile::tempfile().unwrap();
    // On a busy machine a second of processor time may take long.
    let limited = Settings { cpu_limit: Some(1), stall: Duration::from_secs(300), ..settings() };
    // What looks like progress uses up the processor's time, too; and so does what does not.
    let tiny = Requests::new().add(header(RequestKind::Read, 0, 0, 0), &[]);
    for guest in [requests_for_ever(tiny, 1, None), Guest::new().hang()] {
        let result = guest.run_with(&limited, &[(&file, false)]);
        assert!(matches!(result, Err(Error::TooMuchWork)), "{result:?}");
    }
}

/// Even a monitor that was taken over could not write in a run that writes nothing: the file is granted here as it never is.
#[test]
fn runs_that_read_can_write_no_file() {
    if !kvm_or_skip() {
        return;
    }
    let file = tempfile::tempfile().unwrap();
    let write = || Requests::new().add(header(RequestKind::Write, 0, 0, 512), &[(PAYLOAD, 512)]).guest(&[]);
    write().run(&[(&file, true)]).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 512);
    file.set_len(0).unwrap();
    let result = write().run_with(&Settings { read_only: true, ..settings() }, &[(&file, true)]);
    assert!(matches!(result, Err(Error::MonitorLost { status: Some(_) })), "{result:?}");
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn messages_are_bounded_in_sum() {
    if !kvm_or_skip() {
        return;
    }
    // A message of 1 MiB, for ever.
    let guest =
        Guest::new().call(Mailbox { message_addr: DATA, message_len: 1 << 20, ..no_mail() }).raw(&[0xef, 0xeb, 0xfd]);
    assert_eq!(misbehaviour(guest), Misbehaviour::MessageTotal);
}

#[test]
fn forbidden_instructions_are_crashes() {
    if !kvm_or_skip() {
        return;
    }
    for (name, code) in [
        ("hlt", &[0xf4][..]),
        ("cli", &[0xfa]),
        ("ud2", &[0x0f, 0x0b]),
        ("int3", &[0xcc]),
        ("int 0x80", &[0xcd, 0x80]),
        ("syscall", &[0x0f, 0x05]),
        ("mov cr3, rax", &[0x0f, 0x22, 0xd8]),
        ("wrmsr", &[0x0f, 0x30]),
        ("lgdt [rsi]", &[0x0f, 0x01, 0x16]),
        ("invd", &[0x0f, 0x08]),
        ("in eax, dx", &[0x66, 0xba, 0x00, 0x51, 0xed]),
    ] {
        match error(Guest::new().raw(code).exit()) {
            Error::GuestCrashed { .. } => {}
            Error::GuestMisbehaved(Misbehaviour::PortRead) if name == "in eax, dx" => {}
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn unmapped_memory_is_a_crash() {
    if !kvm_or_skip() {
        return;
    }
    for addr in [0, 0x1000, 0x2000, 0xf_f000, CODE - 8, 0x40_0000, 0x5f_fff8, 0x80_0000, 1 << 33, 1 << 47, u64::MAX - 7]
    {
        assert_eq!(crash_at(Guest::new().store64(addr, 1).exit()), CODE + 10, "store to {addr:#x}");
        assert_eq!(crash_at(Guest::new().load64(addr).exit()), CODE, "load from {addr:#x}");
    }
    for addr in [CODE, CONSTANTS, BOOT + 0x2000, BOOT + 0x1_0000] {
        assert_eq!(crash_at(Guest::new().store64(addr, 1).exit()), CODE + 10, "store to constant {addr:#x}");
    }
    // mov rax, DATA; jmp rax: data is not code.
    let jump = Guest::new().data(DATA, &[0x90; 64]).raw(&[0x48, 0xb8]).raw(&DATA.to_le_bytes()).raw(&[0xff, 0xe0]);
    assert_eq!(crash_at(jump), DATA);
    // push rax; jmp to it: the stack has an end.
    assert_eq!(crash_at(Guest::new().raw(&[0x50, 0xeb, 0xfd])), CODE);
}

#[test]
fn registers_are_kept_for_debugging() {
    if !kvm_or_skip() {
        return;
    }
    let debug = Settings { debug: true, ..settings() };
    // mov rbx, 0x1234; ud2
    let result = Guest::new().raw(&[0x48, 0xc7, 0xc3, 0x34, 0x12, 0, 0, 0x0f, 0x0b]).run_with(&debug, &[]);
    let Err(Error::GuestCrashed { rip, registers: Some(registers), .. }) = result else { panic!("{result:?}") };
    assert_eq!((rip, registers.rip, registers.general[1]), (CODE + 7, CODE + 7, 0x1234));
}

#[test]
fn unknown_doorbells_are_the_end() {
    if !kvm_or_skip() {
        return;
    }
    for number in [0, 0x60, 0x3f8, 0x50fc, 0x5120, 0xcf8, 0xffff] {
        let found = error(Guest::new().out(number, 0).exit());
        assert!(matches!(found, Error::GuestCrashed { .. }), "{number:#x}: {found:?}");
    }
    // Between two doorbells.
    assert_eq!(misbehaviour(Guest::new().out(port::KICK + 1, 0).exit()), Misbehaviour::UnknownPort);
    // out dx, al; out dx, ax; rep outsd
    let narrow = |code: &[u8]| Guest::new().raw(&[0x66, 0xba]).raw(&port::WAKE.to_le_bytes()).raw(code).exit();
    assert_eq!(misbehaviour(narrow(&[0xee])), Misbehaviour::UnknownPort);
    assert_eq!(misbehaviour(narrow(&[0x66, 0xef])), Misbehaviour::UnknownPort);
    let string = [&[0x48, 0xbe][..], &DATA.to_le_bytes(), &[0xb9, 4, 0, 0, 0, 0xf3, 0x6f]].concat();
    // Some hosts deliver this as four doorbells, others as one exit with all the data.
    match narrow(&string).run(&[]) {
        Ok(outcome) => assert_eq!(outcome.stats.wakes, 4),
        Err(Error::GuestMisbehaved(Misbehaviour::UnknownPort) | Error::GuestCrashed { .. }) => {}
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn doorbells_of_others_are_refused() {
    if !kvm_or_skip() {
        return;
    }
    assert_eq!(misbehaviour(Guest::new().out(port::PARK, 0).exit()), Misbehaviour::WrongVcpu);
    assert_eq!(misbehaviour(Guest::new().out(port::START, 3).exit()), Misbehaviour::WorkerCount);
    assert_eq!(misbehaviour(Guest::new().out(port::START, u32::MAX).exit()), Misbehaviour::WorkerCount);
    for number in [port::START, port::EXIT] {
        let guest = Guest::new().workers(|worker| worker.out(number, 0).hang()).out(port::START, 2).hang();
        assert_eq!(misbehaviour(guest), Misbehaviour::WrongVcpu);
    }
}

#[test]
fn a_worker_can_crash_too() {
    if !kvm_or_skip() {
        return;
    }
    let guest = Guest::new().workers(|worker| worker.raw(&[0x0f, 0x0b])).out(port::START, 1).hang();
    assert!(matches!(error(guest), Error::GuestCrashed { vcpu: 1, .. }));
}

#[test]
fn exit_codes_and_panics_are_reported() {
    if !kvm_or_skip() {
        return;
    }
    assert!(matches!(error(Guest::new().out(port::EXIT, 7)), Error::GuestFailed { code: 7 }));
    let log_used = BOOT + std::mem::offset_of!(instar_guest_protocol::boot::BootPage, log_used) as u64;
    let panic = |used| Guest::new().store64(BOOT + 0x1000, u64::from_le_bytes(*b"it broke")).store32(log_used, used);
    let Error::GuestPanicked { log } = error(panic(8).out(port::PANIC, 0)) else { panic!() };
    assert_eq!(log, b"it broke");
    let Error::GuestPanicked { log } = error(panic(u32::MAX).out(port::PANIC, 0)) else { panic!() };
    assert_eq!(log.len(), 4096);
    assert!(log.starts_with(b"it broke\0"));
}

#[test]
fn queues_must_be_in_order() {
    if !kvm_or_skip() {
        return;
    }
    let good = QueueWords::good();
    for (words, expected) in [
        (QueueWords { status: 11, ..good }, Misbehaviour::QueueNotReady),
        (QueueWords { status: 15 | 128, ..good }, Misbehaviour::QueueNotReady),
        (QueueWords { ready: 0, ..good }, Misbehaviour::QueueNotReady),
        (QueueWords { features: 0, ..good }, Misbehaviour::QueueFeatures),
        (QueueWords { features: u64::MAX, ..good }, Misbehaviour::QueueFeatures),
        (QueueWords { features: 1 << 32 | 1 << 28, ..good }, Misbehaviour::QueueFeatures),
        (QueueWords { size: 0, ..good }, Misbehaviour::QueueSize),
        (QueueWords { size: 256, ..good }, Misbehaviour::QueueSize),
        (QueueWords { size: u32::MAX, ..good }, Misbehaviour::QueueSize),
        (QueueWords { desc: 0x1000, ..good }, Misbehaviour::QueueAddress),
        (QueueWords { driver: u64::MAX - 1, ..good }, Misbehaviour::QueueAddress),
        (QueueWords { device: CODE, ..good }, Misbehaviour::QueueAddress),
        (QueueWords { device: 1 << 40, ..good }, Misbehaviour::QueueAddress),
    ] {
        let guest = Guest::new().queue(words).out(port::KICK, 0).exit();
        assert_eq!(misbehaviour(guest), expected, "{words:?}");
    }
    assert_eq!(misbehaviour(Guest::new().out(port::KICK, 0).exit()), Misbehaviour::QueueNotReady);
}

#[test]
fn a_queue_is_frozen_at_the_first_kick() {
    if !kvm_or_skip() {
        return;
    }
    // What is written into the words later has no effect.
    let late =
        QueueWords { desc: 0x1000, driver: u64::MAX, device: CODE, size: 12345, ready: 0, status: 128, features: 0 };
    let outcome =
        Guest::new().queue(QueueWords::good()).out(port::KICK, 0).queue(late).out(port::KICK, 0).exit().run(&[]);
    assert_eq!(outcome.unwrap().stats.kicks, 2);
}

/// Index, address, length, flags, next.
type RawDescriptor = (u64, u64, u32, u16, u16);

/// Name, descriptors, heads, available index, and what it's called.
type RingCase<'a> = (&'a str, &'a [RawDescriptor], &'a [u16], u16, Misbehaviour);

/// A guest that kicks with these descriptors and heads.
fn ring(descriptors: &[RawDescriptor], heads: &[u16], index: u16) -> Guest {
    let mut avail = vec![0u16, index];
    avail.extend(heads);
    let guest = descriptors.iter().fold(Guest::new(), |guest, &(i, addr, len, flags, next)| {
        guest.data(DESC + 16 * i, &descriptor(addr, len, flags, next))
    });
    guest.data(AVAIL, avail.as_bytes()).queue(QueueWords::good()).out(port::KICK, 0).exit()
}

#[test]
fn descriptors_are_not_trusted() {
    if !kvm_or_skip() {
        return;
    }
    let header = (0, HEADERS, 48, 1, 1);
    let status = |i| (i, STATUSES, 16, 2, 0);
    use Misbehaviour as M;
    let cases: &[RingCase] = &[
        ("loop of one", &[(0, HEADERS, 48, 1, 0)], &[0], 1, M::DescriptorLoop),
        ("loop of two", &[header, (1, PAYLOAD, 16, 3, 0)], &[0], 1, M::DescriptorLoop),
        ("head out of table", &[], &[128], 1, M::DescriptorIndex),
        ("next out of table", &[(0, HEADERS, 48, 1, 0xffff)], &[0], 1, M::DescriptorIndex),
        ("indirect", &[(0, HEADERS, 48, 4, 0)], &[0], 1, M::DescriptorFlags),
        ("address above memory", &[header, (1, 1 << 40, 16, 3, 2), status(2)], &[0], 1, M::DescriptorAddress),
        ("address wraps", &[header, (1, u64::MAX - 7, 16, 3, 2), status(2)], &[0], 1, M::DescriptorAddress),
        ("length beyond memory", &[header, (1, PAYLOAD, u32::MAX, 3, 2), status(2)], &[0], 1, M::DescriptorAddress),
        ("page tables", &[header, (1, 0x1000, 4096, 3, 2), status(2)], &[0], 1, M::DescriptorAddress),
        ("page tables, to read", &[(0, 0x1000, 48, 1, 1), status(1)], &[0], 1, M::DescriptorAddress),
        ("task state", &[header, (1, 0xf_f000, 16, 3, 2), status(2)], &[0], 1, M::DescriptorAddress),
        ("code", &[header, (1, CODE, 16, 3, 2), status(2)], &[0], 1, M::DescriptorAddress),
        ("guard", &[header, (1, 0x40_0000, 16, 3, 2), status(2)], &[0], 1, M::DescriptorAddress),
        ("status in constants", &[header, (1, CONSTANTS, 16, 2, 0)], &[0], 1, M::DescriptorAddress),
        ("status too short", &[header, (1, STATUSES, 15, 2, 0)], &[0], 1, M::RequestShape),
        ("no status", &[(0, HEADERS, 48, 0, 0)], &[0], 1, M::RequestShape),
        ("short header", &[(0, HEADERS, 47, 1, 1), status(1)], &[0], 1, M::RequestShape),
        ("header to be written", &[(0, HEADERS, 48, 3, 1), status(1)], &[0], 1, M::RequestShape),
        ("index ahead", &[], &[0], 129, M::AvailableIndex),
        ("index far ahead", &[], &[0], 65535, M::AvailableIndex),
    ];
    for &(name, descriptors, heads, index, expected) in cases {
        assert_eq!(misbehaviour(ring(descriptors, heads, index)), expected, "{name}");
    }
}

#[test]
fn overlapping_buffers_hurt_only_the_guest() {
    if !kvm_or_skip() {
        return;
    }
    // A read over its own ring, header, descriptors and statuses: everything was read once before.
    let file: File = tempfile::tempfile().unwrap();
    file.write_all_at(&[0xff; 0x8000], 0).unwrap();
    let requests = (0..3)
        .fold(Requests::new(), |requests, _| requests.add(header(RequestKind::Read, 0, 0, 0x8000), &[(DATA, 0x8000)]));
    let outcome = requests.guest(&[(USED, 4)]).run(&[(&file, false)]);
    // The second request finds descriptors of 0xff bytes.
    assert!(matches!(outcome, Err(Error::GuestMisbehaved(_))), "{outcome:?}");
}

#[test]
fn mailboxes_are_checked() {
    if !kvm_or_skip() {
        return;
    }
    let mail = |message_addr, message_len, answer_addr, answer_capacity| Mailbox {
        message_addr,
        message_len,
        answer_addr,
        answer_capacity,
        ..no_mail()
    };
    for (mail, expected) in [
        (mail(DATA, (1 << 20) + 1, 0, 0), Misbehaviour::MessageLength),
        (mail(DATA, u64::MAX, 0, 0), Misbehaviour::MessageLength),
        (mail(DATA + 8, 1 << 20, 0, 0), Misbehaviour::MessageAddress),
        (mail(0x1000, 8, 0, 0), Misbehaviour::MessageAddress),
        (mail(u64::MAX - 3, 8, 0, 0), Misbehaviour::MessageAddress),
        (mail(1 << 40, 8, 0, 0), Misbehaviour::MessageAddress),
        (mail(DATA, 8, CODE, 8), Misbehaviour::MessageAddress),
        (mail(DATA, 8, 0x1000, 8), Misbehaviour::MessageAddress),
        (mail(DATA, 8, u64::MAX, 8), Misbehaviour::MessageAddress),
        (mail(DATA, 8, DATA + (1 << 20) - 8, 9), Misbehaviour::MessageAddress),
    ] {
        assert_eq!(misbehaviour(Guest::new().call(mail).exit()), expected, "{mail:?}");
    }
}

/// The one child of this thread.
fn child() -> Option<rustix::process::Pid> {
    let children = format!("/proc/self/task/{}/children", rustix::thread::gettid().as_raw_nonzero());
    let children = std::fs::read_to_string(children).expect("a kernel with CONFIG_PROC_CHILDREN");
    children.split_whitespace().next().and_then(|pid| rustix::process::Pid::from_raw(pid.parse().unwrap()))
}

#[test]
fn a_sandbox_that_is_dropped_leaves_no_process() {
    if !kvm_or_skip() {
        return;
    }
    let mut sandbox = Sandbox::spawn(Guest::new().hang().elf(), &settings()).unwrap();
    sandbox.start(b"").unwrap();
    assert!(child().is_some());
    drop(sandbox);
    assert_eq!(child(), None);
}

#[test]
fn a_killed_monitor_is_noticed() {
    if !kvm_or_skip() {
        return;
    }
    let mut sandbox = Sandbox::spawn(Guest::new().hang().elf(), &settings()).unwrap();
    sandbox.start(b"").unwrap();
    rustix::process::kill_process(child().unwrap(), rustix::process::Signal::KILL).unwrap();
    let result = sandbox.next_event();
    assert!(matches!(result, Err(Error::MonitorLost { status: Some(9) })), "{result:?}");
    assert_eq!(child(), None);
}

#[test]
fn the_monitor_holds_nothing_but_what_it_needs() {
    if !kvm_or_skip() {
        return;
    }
    let inherited = tempfile::tempfile().unwrap();
    let granted = tempfile::tempfile().unwrap();
    let mut sandbox = Sandbox::spawn(Guest::new().message(DATA, 1).hang().elf(), &settings()).unwrap();
    sandbox.grant(granted.as_fd(), false).unwrap();
    sandbox.start(b"").unwrap();
    // Now the guest runs.
    sandbox.next_event().unwrap();
    let of_child = format!("/proc/{}", child().unwrap().as_raw_nonzero());
    let Ok(files) = std::fs::read_dir(format!("{of_child}/fd")) else {
        eprintln!("SKIPPED: only root may look into a process that is not dumpable");
        return;
    };
    let mut targets: Vec<String> = files
        .map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap().to_string_lossy().into_owned())
        .map(|name| if name.starts_with("socket:") { "socket".into() } else { name })
        .collect();
    targets.sort();
    let name = |file: &File| {
        std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap().to_string_lossy().into_owned()
    };
    assert_ne!(name(&inherited), name(&granted));
    let mut expected = ["/dev/kvm", "/dev/kvm", "/dev/kvm", "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vm", "socket"]
        .map(String::from)
        .to_vec();
    expected.push(name(&granted));
    expected.sort();
    assert_eq!(targets, expected);
    let status = std::fs::read_to_string(format!("{of_child}/status")).unwrap();
    for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(status.contains(line), "{line}");
    }
}
