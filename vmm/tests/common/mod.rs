//! Hand-made guests: a few instructions, and rings that lie ready in the data segment.
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs::File;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::time::Duration;

use instar_guest_protocol::boot::{BootPage, Mailbox, TransportWords, VcpuArea};
use instar_guest_protocol::port;
use instar_guest_protocol::ring::{RequestHeader, RequestKind, RequestStatus, STATUS_PENDING};
use instar_vmm::{Error, Event, FaultRule, KvmStep, Sandbox, Settings, Stats};
use zerocopy::IntoBytes;

/// Where the guest finds its boot page (`rsi`).
pub const BOOT: u64 = 0x10_0000;
/// The code of every guest here.
pub const CODE: u64 = 0x20_0000;
/// Its constants: one page.
pub const CONSTANTS: u64 = 0x21_0000;
/// Its data: [`DATA_BYTES`].
pub const DATA: u64 = 0x22_0000;
pub const DATA_BYTES: u64 = 0x10_0000;

/// Whether KVM can be used. Says loudly if not; with INSTAR_REQUIRE_KVM=1 that is a failure.
#[must_use]
pub fn kvm_or_skip() -> bool {
    let usable = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &usable {
        assert!(
            std::env::var_os("INSTAR_REQUIRE_KVM").is_none_or(|value| value != "1"),
            "/dev/kvm can't be used: {error}"
        );
        eprintln!("SKIPPED: /dev/kvm can't be used ({error})");
    }
    usable.is_ok()
}

/// A guest under construction.
#[derive(Default)]
pub struct Guest {
    code: Vec<u8>,
    data: Vec<u8>,
}

impl Guest {
    pub fn new() -> Self {
        Self { code: Vec::new(), data: vec![0; DATA_BYTES as usize] }
    }

    /// Machine code as it is.
    pub fn raw(mut self, code: &[u8]) -> Self {
        self.code.extend_from_slice(code);
        self
    }

    /// `mov rax, value; mov [addr], rax`
    pub fn store64(self, addr: u64, value: u64) -> Self {
        self.raw(&[0x48, 0xb8]).raw(&value.to_le_bytes()).raw(&[0x48, 0xa3]).raw(&addr.to_le_bytes())
    }

    /// `mov eax, value; mov [addr], eax`
    pub fn store32(self, addr: u64, value: u32) -> Self {
        self.raw(&[0xb8]).raw(&value.to_le_bytes()).raw(&[0xa3]).raw(&addr.to_le_bytes())
    }

    /// `mov rax, [addr]`
    pub fn load64(self, addr: u64) -> Self {
        self.raw(&[0x48, 0xa1]).raw(&addr.to_le_bytes())
    }

    /// `mov dx, port; mov eax, value; out dx, eax`
    pub fn out(self, port: u16, value: u32) -> Self {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes()).raw(&[0xb8]).raw(&value.to_le_bytes()).raw(&[0xef])
    }

    pub fn exit(self) -> Self {
        self.out(port::EXIT, port::EXIT_OK)
    }

    /// `jmp` to itself.
    pub fn hang(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// Code for workers: `test edi, edi; jz over; ...; over:`
    pub fn workers(self, worker: impl FnOnce(Guest) -> Guest) -> Self {
        let code = worker(Guest::default()).code;
        self.raw(&[0x85, 0xff, 0x0f, 0x84]).raw(&(code.len() as u32).to_le_bytes()).raw(&code)
    }

    /// Bytes at an address of the data segment.
    pub fn data(mut self, addr: u64, bytes: &[u8]) -> Self {
        let at = (addr - DATA) as usize;
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Sends `len` bytes at `addr` as a message, without answer.
    pub fn message(self, addr: u64, len: u64) -> Self {
        self.call(Mailbox { message_addr: addr, message_len: len, ..no_mail() })
    }

    /// Rings the mailbox of vCPU 0.
    pub fn call(self, mail: Mailbox) -> Self {
        let at = mailbox(0);
        self.store64(at + offset_of!(Mailbox, message_addr) as u64, mail.message_addr)
            .store64(at + offset_of!(Mailbox, message_len) as u64, mail.message_len)
            .store64(at + offset_of!(Mailbox, answer_addr) as u64, mail.answer_addr)
            .store64(at + offset_of!(Mailbox, answer_capacity) as u64, mail.answer_capacity)
            .out(port::CALL, 0)
    }

    /// Sets the transport of vCPU 0 up.
    pub fn queue(self, queue: QueueWords) -> Self {
        let at = area(0) + offset_of!(VcpuArea, transport) as u64;
        self.store64(at + offset_of!(TransportWords, driver_features) as u64, queue.features)
            .store64(at + offset_of!(TransportWords, queue_desc) as u64, queue.desc)
            .store64(at + offset_of!(TransportWords, queue_driver) as u64, queue.driver)
            .store64(at + offset_of!(TransportWords, queue_device) as u64, queue.device)
            .store32(at + offset_of!(TransportWords, queue_size) as u64, queue.size)
            .store32(at + offset_of!(TransportWords, queue_ready) as u64, queue.ready)
            .store32(at + offset_of!(TransportWords, status) as u64, queue.status)
    }

    /// The guest as an ELF file.
    pub fn elf(self) -> &'static [u8] {
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(64, 0);
        out[16..18].copy_from_slice(&2u16.to_le_bytes());
        out[18..20].copy_from_slice(&62u16.to_le_bytes());
        out[24..32].copy_from_slice(&CODE.to_le_bytes());
        out[32..40].copy_from_slice(&64u64.to_le_bytes());
        out[54..56].copy_from_slice(&56u16.to_le_bytes());
        out[56..58].copy_from_slice(&3u16.to_le_bytes());
        let constants = [0xc5u8; 64];
        let code_at = 0x1000;
        let constants_at = code_at + self.code.len();
        let data_at = constants_at + constants.len();
        // Zeroes at the end need not be in the file.
        let data = &self.data[..self.data.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)];
        for (flags, at, addr, bytes, len) in [
            (5u32, code_at, CODE, self.code.as_slice(), self.code.len()),
            (4, constants_at, CONSTANTS, constants.as_slice(), constants.len()),
            (6, data_at, DATA, data, self.data.len()),
        ] {
            out.extend(1u32.to_le_bytes());
            out.extend(flags.to_le_bytes());
            for word in [at as u64, addr, addr, bytes.len() as u64, len as u64, 4096] {
                out.extend(word.to_le_bytes());
            }
        }
        out.resize(code_at, 0);
        out.extend([self.code.as_slice(), &constants, data].concat());
        Box::leak(out.into_boxed_slice())
    }

    /// Runs it with these files (writable where said) and collects its messages.
    pub fn run(self, files: &[(&File, bool)]) -> Result<Outcome, Error> {
        self.run_with(&settings(), files)
    }

    pub fn run_with(self, settings: &Settings, files: &[(&File, bool)]) -> Result<Outcome, Error> {
        let files: Vec<_> = files.iter().map(|(file, writable)| (*file, *writable, &[][..])).collect();
        self.run_failing(settings, &files)
    }

    /// Runs it with these files, requests on which fail by rules.
    pub fn run_failing(self, settings: &Settings, files: &[(&File, bool, &[FaultRule])]) -> Result<Outcome, Error> {
        let mut sandbox = Sandbox::spawn(self.elf(), settings)?;
        for (file, writable, rules) in files {
            sandbox.grant(file.as_fd(), *writable)?;
            sandbox.let_fail(rules)?;
        }
        sandbox.start(b"request")?;
        collect(&mut sandbox)
    }
}

/// Takes events until the end.
pub fn collect(sandbox: &mut Sandbox) -> Result<Outcome, Error> {
    let mut messages = Vec::new();
    loop {
        match sandbox.next_event()? {
            Event::Message { bytes, .. } => messages.push(bytes),
            Event::Exited(report) => return Ok(Outcome { messages, stats: report.stats }),
        }
    }
}

/// What a run said.
#[derive(Debug)]
pub struct Outcome {
    pub messages: Vec<Vec<u8>>,
    pub stats: Stats,
}

/// Short patience, so that tests of hangs are quick.
pub fn settings() -> Settings {
    Settings { memory: 128 << 20, vcpus: 3, stall: Duration::from_secs(20), ..Settings::default() }
}

pub fn no_mail() -> Mailbox {
    Mailbox { message_addr: DATA, message_len: 0, answer_addr: 0, answer_capacity: 0, answer_len: 0, reserved: 0 }
}

pub fn area(vcpu: u64) -> u64 {
    BOOT + offset_of!(BootPage, vcpus) as u64 + vcpu * size_of::<VcpuArea>() as u64
}

pub fn mailbox(vcpu: u64) -> u64 {
    area(vcpu) + offset_of!(VcpuArea, mailbox) as u64
}

/// What the guest writes into its transport words.
#[derive(Clone, Copy, Debug)]
pub struct QueueWords {
    pub features: u64,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
    pub size: u32,
    pub ready: u32,
    pub status: u32,
}

pub const DESC: u64 = DATA;
pub const AVAIL: u64 = DATA + 0x1000;
pub const USED: u64 = DATA + 0x2000;
/// Request `n` has its header at `HEADERS + 64 n`, its status at `STATUSES + 16 n`.
pub const HEADERS: u64 = DATA + 0x3000;
pub const STATUSES: u64 = DATA + 0x6000;
/// Room for payload.
pub const PAYLOAD: u64 = DATA + 0x8000;

impl QueueWords {
    pub fn good() -> Self {
        Self { features: 1 << 32, desc: DESC, driver: AVAIL, device: USED, size: 128, ready: 1, status: 15 }
    }
}

/// A descriptor in memory.
pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&addr.to_le_bytes());
    out[8..12].copy_from_slice(&len.to_le_bytes());
    out[12..14].copy_from_slice(&flags.to_le_bytes());
    out[14..].copy_from_slice(&next.to_le_bytes());
    out
}

/// Requests that lie ready in the data segment.
pub struct Requests {
    guest: Guest,
    descriptors: u16,
    heads: Vec<u16>,
}

impl Requests {
    pub fn new() -> Self {
        Self { guest: Guest::new(), descriptors: 0, heads: Vec::new() }
    }

    /// Adds a request with data at the given places.
    pub fn add(mut self, header: RequestHeader, data: &[(u64, u32)]) -> Self {
        let n = self.heads.len() as u64;
        let to_guest = matches!(RequestKind::try_from(header.kind), Ok(RequestKind::Read | RequestKind::Holes));
        let status = RequestStatus { status: STATUS_PENDING, ..RequestStatus::default() };
        self.guest = self.guest.data(HEADERS + 64 * n, header.as_bytes()).data(STATUSES + 16 * n, status.as_bytes());
        self.heads.push(self.descriptors);
        let mut parts = vec![(HEADERS + 64 * n, 48, 1)];
        parts.extend(data.iter().map(|&(addr, len)| (addr, len, if to_guest { 3 } else { 1 })));
        parts.push((STATUSES + 16 * n, 16, 2));
        for (addr, len, flags) in parts {
            let index = self.descriptors;
            self.descriptors += 1;
            self.guest = self.guest.data(DESC + 16 * u64::from(index), &descriptor(addr, len, flags, index + 1));
        }
        self
    }

    /// Data for the guest.
    pub fn data(mut self, addr: u64, bytes: &[u8]) -> Self {
        self.guest = self.guest.data(addr, bytes);
        self
    }

    /// Gives the requests to a guest of other code, which has to announce them by itself.
    pub fn onto(self, guest: Guest) -> Guest {
        Guest { code: guest.code, data: self.guest.data }
    }

    /// The guest: sets up the queue, kicks once, sends the statuses and then `show` as messages.
    pub fn guest(self, show: &[(u64, u64)]) -> Guest {
        let count = self.heads.len() as u64;
        let mut ring = vec![0u16, self.heads.len() as u16];
        ring.extend(&self.heads);
        let mut guest = self
            .guest
            .data(AVAIL, ring.as_bytes())
            .queue(QueueWords::good())
            .out(port::KICK, 0)
            .message(STATUSES, 16 * count);
        for &(addr, len) in show {
            guest = guest.message(addr, len);
        }
        guest.exit()
    }
}

/// The statuses in a message.
pub fn statuses(message: &[u8]) -> Vec<RequestStatus> {
    use zerocopy::FromBytes;
    message.as_chunks::<16>().0.iter().map(|raw| RequestStatus::read_from_bytes(raw).unwrap()).collect()
}

pub fn header(kind: RequestKind, device: u32, offset: u64, len: u64) -> RequestHeader {
    RequestHeader { kind: kind as u32, device, offset, len, ..RequestHeader::default() }
}

/// The step of a KVM error, for messages.
pub fn kvm_step(error: &Error) -> Option<KvmStep> {
    match error {
        Error::Kvm { step, .. } => Some(*step),
        _ => None,
    }
}
