//! The monitor process: builds the machine, waits for files and a request, runs the guest, reports.

use std::convert::Infallible;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::limits::{MAX_DEVICES, MAX_REQUEST_MESSAGE_BYTES};
use kvm_ioctls::{Kvm, VcpuFd};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::cpu::{Cpu, task_state};
use crate::elf::Elf;
use crate::error::KvmStep;
use crate::faults::{FaultRule, MAX_FAULT_RULES, RawRule};
use crate::jail::filter::{Filter, Role};
use crate::jail::process;
use crate::layout::{Layout, TASK_STATE};
use crate::memory::GuestMemory;
use crate::paging;
use crate::rawio;
use crate::stats::Phases;
use crate::virtio::{Device, DeviceTable, NbdExport, Part};
use crate::vm::{HostPort, Machine, kvm_failure};
use crate::watchdog::Progress;
use crate::wire::{Cause, Channel, Failure, Header, Kind, Reason};

/// What the caller's process prepared before the fork.
pub struct Plan {
    /// The guest program.
    pub guest: &'static [u8],
    /// Its segments.
    pub elf: Elf,
    /// Where everything lies.
    pub layout: Layout,
    /// The shared progress words.
    pub progress: Arc<Progress>,
    /// When the caller asked for the sandbox.
    pub spawned: Instant,
    /// Vector registers beyond SSE.
    pub vectors: bool,
    /// Who to become where the caller is root.
    pub user: u32,
    /// Seconds of processor time that this process may use.
    pub cpu_limit: Option<u64>,
    /// This process writes no file.
    pub read_only: bool,
    /// More to say on failures.
    pub debug: bool,
}

/// The way to the caller's process.
struct Host(Channel);

/// Exit status after a report was delivered.
const STATUS_REPORTED: i32 = 0;
/// Exit status when the caller's process is gone.
const STATUS_ALONE: i32 = 71;

/// Runs the monitor. Never returns.
pub fn run(plan: Plan, channel: Channel) -> Infallible {
    // The process ends with `exit`, so nothing is ever freed.
    let host: &'static Host = Box::leak(Box::new(Host(channel)));
    let (machine, vcpu, mut phases) = match build(plan, host) {
        Ok(built) => built,
        Err((step, errno)) => host.report(&kvm_failure(step, errno).into(), &[]),
    };
    // Translated while the caller opens files.
    let filter = Filter::of(Role::Boot);
    let request = host.await_request(machine);
    let devices = lock_devices(machine).infos();
    if machine.prepare(&request, &devices).is_err() {
        machine.fail(&kvm_failure(KvmStep::Memory, libc::EFAULT).into());
    }
    if filter.and_then(|filter| filter.install()).is_err() {
        machine.fail(&kvm_failure(KvmStep::Jail, libc::EACCES).into());
    }
    phases.entered = machine.now();
    match machine.run(0, vcpu) {
        Ok(0) => {
            let (floor, devices) = machine.close();
            let stats = machine.counters.sums(machine.phases(phases), rawio::usage());
            let body = [stats.as_bytes(), devices.as_bytes()].concat();
            host.deliver(&Header::new(Kind::Exited, body.len()), &body);
            std::mem::forget(floor);
            process::exit(STATUS_REPORTED)
        }
        Ok(code) => machine.fail(&Reason { code, ..Reason::new(Cause::ExitCode) }.into()),
        Err(failure) => machine.fail(&failure),
    }
}

type Step<T> = Result<T, (KvmStep, i32)>;

/// Builds the machine with one vCPU.
fn build(plan: Plan, host: &'static Host) -> Step<(&'static Machine, VcpuFd, Phases)> {
    let Plan { guest, elf, layout, progress, spawned, vectors, user, cpu_limit, read_only, debug } = plan;
    let progress: &'static Progress = Box::leak(Box::new(progress));
    let now = || spawned.elapsed().as_nanos() as u64;
    let mut phases = Phases { process: now(), ..Phases::default() };
    // What is said on failures may go to a file.
    process::limit(cpu_limit, read_only && !debug).map_err(|errno| (KvmStep::Jail, errno.raw_os_error()))?;
    let kvm = Kvm::new().map_err(|error| (KvmStep::Open, error.errno()))?;
    process::drop_privileges(kvm.as_raw_fd(), user, debug).map_err(|errno| (KvmStep::Jail, errno.raw_os_error()))?;
    phases.kvm = now();
    let vm = kvm.create_vm().map_err(|error| (KvmStep::CreateVm, error.errno()))?;
    // Its duplicates in place of the standard streams stay.
    drop(kvm);
    phases.vm = now();
    let memory = GuestMemory::new(&layout).map_err(|errno| (KvmStep::Memory, errno))?;
    let memory: &'static GuestMemory = Box::leak(Box::new(memory));
    load(memory, guest, &elf, &layout).map_err(|_| (KvmStep::Memory, libc::EFAULT))?;
    memory.attach(&vm).map_err(|errno| (KvmStep::MemorySlot, errno))?;
    phases.memory = now();
    let cpu = Cpu::of_host(vectors);
    let vcpu = cpu.create_vcpu(&vm, 0, &layout)?;
    let machine = Machine::new(vm, cpu, memory, layout, progress, host, spawned);
    phases.ready = now();
    Ok((Box::leak(Box::new(machine)), vcpu, phases))
}

/// Fills fresh memory with the program and its page tables.
fn load(memory: &GuestMemory, guest: &[u8], elf: &Elf, layout: &Layout) -> Result<(), crate::memory::BadAddress> {
    for segment in &elf.segments {
        memory.place(segment.load_at, guest.get(segment.file.clone()).ok_or(crate::memory::BadAddress)?)?;
    }
    memory.place(TASK_STATE, &task_state())?;
    paging::build(memory, layout)
}

fn lock_devices(machine: &Machine) -> std::sync::RwLockWriteGuard<'_, DeviceTable> {
    machine.devices.write().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// Takes granted files until the request comes.
    fn await_request(&self, machine: &Machine) -> Vec<u8> {
        self.take_until(machine, Kind::Start, MAX_REQUEST_MESSAGE_BYTES)
    }

    /// Takes granted files until a frame of `kind` with at most `limit` bytes comes.
    fn take_until(&self, machine: &Machine, kind: Kind, limit: usize) -> Vec<u8> {
        loop {
            let (header, file) = self.0.receive(at_once).unwrap_or_else(|_| process::exit(STATUS_ALONE));
            if header.kind() == Some(Kind::Grant) && header.len == 0 {
                let flags = DeviceFlags::from_bits_truncate(header.flags);
                self.take_file(machine, file, &header, flags);
            } else if header.kind() == Some(Kind::Faults)
                && header.len as usize <= MAX_FAULT_RULES * size_of::<RawRule>()
            {
                let body = self.take_body(&header);
                let rules = body.chunks(size_of::<RawRule>()).map(RawRule::read_from_bytes);
                let rules = rules.map(|raw| FaultRule::from(&raw.unwrap_or_else(|_| process::exit(STATUS_ALONE))));
                lock_devices(machine).let_last_fail(rules.collect());
            } else if header.kind() == Some(kind) && header.len as usize <= limit {
                return self.take_body(&header);
            } else {
                // The caller's process speaks another language: no way to go on.
                process::exit(STATUS_ALONE);
            }
        }
    }

    fn take_body(&self, header: &Header) -> Vec<u8> {
        let mut body = vec![0; header.len as usize];
        self.0.receive_body(&mut body, at_once).unwrap_or_else(|_| process::exit(STATUS_ALONE));
        body
    }

    fn take_file(&self, machine: &Machine, file: Option<OwnedFd>, header: &Header, flags: DeviceFlags) {
        let mut devices = lock_devices(machine);
        match file {
            Some(file) if devices.len() < MAX_DEVICES => devices.push(match header.min_block {
                0 => Device::new(file, Part::of(header), flags),
                block => {
                    let (len, flags_of_export) = (header.value, header.transmission);
                    let export = NbdExport { len, flags: flags_of_export, min_block: block.into() };
                    Device::of_nbd(file, export, flags)
                }
            }),
            // Out of descriptors: the file was lost on the way.
            _ => {
                drop(devices);
                machine.close_files();
                self.report(&kvm_failure(KvmStep::File, libc::EMFILE).into(), &[])
            }
        }
    }

    fn deliver(&self, header: &Header, body: &[u8]) {
        if self.0.send(header, body, None).is_err() {
            process::exit(STATUS_ALONE);
        }
    }

    /// Sends the report of a failure and ends the process.
    fn report(&self, failure: &Failure, log: &[u8]) -> ! {
        let body = [failure.as_bytes(), log].concat();
        self.deliver(&Header::new(Kind::Failed, body.len()), &body);
        process::exit(STATUS_REPORTED)
    }
}

impl HostPort for Host {
    fn call(&self, machine: &Machine, message: &[u8], room: u64) -> Vec<u8> {
        self.deliver(&Header { value: room, ..Header::new(Kind::Message, message.len()) }, message);
        if room == 0 { Vec::new() } else { self.take_until(machine, Kind::Answer, room as usize) }
    }

    fn fail(&self, machine: &Machine, failure: &Failure) -> ! {
        machine.close_files();
        self.report(failure, &machine.log())
    }
}

impl Part {
    fn of(header: &Header) -> Self {
        Self { base: header.base, end: header.value, fixed: header.fixed != 0, allocated: header.allocated }
    }
}

fn at_once() -> Result<(), Errno> {
    Ok(())
}
