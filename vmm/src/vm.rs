//! The machine: vCPU threads that run, serve the doorbell that was rung, and run again.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Instant;

use instar_guest_protocol::boot::{BootPage, DeviceInfo, MAGIC, VcpuArea};
use instar_guest_protocol::limits::{LOG_BYTES, MAX_MESSAGE_BYTES_TOTAL, MAX_VCPUS};
use instar_guest_protocol::port;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use zerocopy::{FromZeros, IntoBytes};

use crate::cpu::Cpu;
use crate::error::{KvmStep, Misbehaviour};
use crate::jail::filter::{Filter, Role};
use crate::layout::{BOOT_PAGE, DEVICES, LOG, Layout, REQUEST};
use crate::mail::Mail;
use crate::memory::GuestMemory;
use crate::stats::{Counters, DeviceTraffic, Phases, add};
use crate::virtio::{DeviceTable, Server, offered_words};
use crate::watchdog::Progress;
use crate::wire::{Cause, Failure, Reason};
use crate::workers::Workers;

/// How often the kernel may put off running a vCPU before the run fails.
const MOST_REFUSALS: u32 = 100;
/// Stack of a worker's thread: it needs little.
const WORKER_STACK: usize = 256 << 10;

/// Everything that the vCPU threads share. Lives as long as the process.
pub struct Machine {
    pub vm: VmFd,
    pub cpu: Cpu,
    pub memory: &'static GuestMemory,
    pub layout: Layout,
    pub devices: RwLock<DeviceTable>,
    pub counters: Counters,
    pub progress: &'static Progress,
    pub spawned: Instant,
    workers: Workers,
    first_exit: AtomicU64,
    host: Mutex<HostSide>,
}

/// The way to the caller's process; whoever holds the lock has the floor.
pub struct HostSide {
    port: &'static dyn HostPort,
    message_bytes: u64,
}

/// What the machine needs from the process around it.
pub trait HostPort: Send + Sync {
    /// Delivers a message. With `room > 0`, waits for the answer of at most `room` bytes.
    fn call(&self, machine: &Machine, message: &[u8], room: u64) -> Vec<u8>;
    /// Reports the failure and ends the process. Only the first caller's report counts.
    fn fail(&self, machine: &Machine, failure: &Failure) -> !;
}

/// A failure of the virtual machine monitor.
pub fn kvm_failure(step: KvmStep, errno: i32) -> Reason {
    Reason { code: step as u32, errno, ..Reason::new(Cause::Kvm) }
}

fn misbehaved(what: Misbehaviour) -> Reason {
    Reason { code: what as u32, ..Reason::new(Cause::Misbehaved) }
}

impl Machine {
    /// A machine without files whose guest has not started.
    pub fn new(
        vm: VmFd,
        cpu: Cpu,
        memory: &'static GuestMemory,
        layout: Layout,
        progress: &'static Progress,
        port: &'static dyn HostPort,
        spawned: Instant,
    ) -> Self {
        let workers = Workers::new(layout.vcpus - 1);
        Self {
            vm,
            cpu,
            memory,
            layout,
            devices: RwLock::default(),
            counters: Counters::default(),
            progress,
            spawned,
            workers,
            first_exit: AtomicU64::new(0),
            host: Mutex::new(HostSide { port, message_bytes: 0 }),
        }
    }

    /// Nanoseconds since the caller asked for the sandbox.
    pub fn now(&self) -> u64 {
        self.spawned.elapsed().as_nanos() as u64
    }

    /// Completes what was measured before the run.
    pub fn phases(&self, before: Phases) -> Phases {
        Phases { first_exit: self.first_exit.load(Ordering::Relaxed), done: self.now(), ..before }
    }

    /// Writes the boot page, the device table and the request.
    pub fn prepare(&self, request: &[u8], devices: &[DeviceInfo]) -> Result<(), crate::memory::BadAddress> {
        let mut page = BootPage::new_zeroed();
        page.magic = MAGIC;
        page.vcpu_count = self.layout.vcpus;
        page.device_count = devices.len() as u32;
        page.request_addr = REQUEST;
        page.request_len = request.len() as u64;
        page.heap_addr = self.layout.heap;
        page.heap_len = self.layout.heap_len;
        page.log_addr = LOG;
        page.log_len = LOG_BYTES as u64;
        page.cpu_features = self.cpu.features().bits();
        page.devices_addr = DEVICES;
        for area in page.vcpus.iter_mut().take(self.layout.vcpus as usize) {
            area.transport = offered_words();
        }
        self.memory.write(BOOT_PAGE, &page)?;
        self.memory.place(DEVICES, devices.as_bytes())?;
        self.memory.place(REQUEST, request)
    }

    /// Runs vCPU `index` until the guest is done; returns the guest's exit code.
    pub fn run(&'static self, index: u32, mut vcpu: VcpuFd) -> Result<u32, Box<Failure>> {
        let mut server = Server::new(self.memory, transport_words(index));
        let mut refusals = 0;
        loop {
            let exit = match vcpu.run() {
                Ok(exit) => exit,
                Err(error) if error.errno() == libc::EINTR => continue,
                // Mostly the kernel's helper thread that the limit of processes does not allow: it stays so.
                Err(error) if error.errno() == libc::EAGAIN && refusals < MOST_REFUSALS => {
                    refusals += 1;
                    std::thread::yield_now();
                    continue;
                }
                Err(error) => return Err(with_registers(&vcpu, index, kvm_failure(KvmStep::Run, error.errno()))),
            };
            if index == 0 && self.first_exit.load(Ordering::Relaxed) == 0 {
                self.first_exit.store(self.now(), Ordering::Relaxed);
            }
            let outcome = match exit {
                VcpuExit::IoOut(number, &[a, b, c, d]) => {
                    self.doorbell(index, number, u32::from_le_bytes([a, b, c, d]), &mut server)
                }
                VcpuExit::IoOut(..) => Err(misbehaved(Misbehaviour::UnknownPort)),
                VcpuExit::IoIn(..) => Err(misbehaved(Misbehaviour::PortRead)),
                VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) | VcpuExit::MemoryFault { .. } => {
                    Err(misbehaved(Misbehaviour::UnmappedMemory))
                }
                VcpuExit::Shutdown | VcpuExit::InternalError | VcpuExit::Hlt | VcpuExit::Exception => {
                    Err(Reason::new(Cause::Crashed))
                }
                VcpuExit::FailEntry(..) => Err(kvm_failure(KvmStep::Run, libc::EIO)),
                VcpuExit::Intr => continue,
                _ => Err(misbehaved(Misbehaviour::UnknownExit)),
            };
            match outcome {
                Ok(None) => {}
                Ok(Some(code)) => return Ok(code),
                Err(reason) => return Err(with_registers(&vcpu, index, reason)),
            }
        }
    }

    /// Serves one doorbell; the guest's exit code if it was the last.
    fn doorbell(
        &'static self,
        index: u32,
        number: u16,
        value: u32,
        server: &mut Server<'static>,
    ) -> Result<Option<u32>, Reason> {
        match number {
            port::KICK => {
                add(&self.counters.kicks, 1);
                if let Some(kicks) = self.counters.vcpu_kicks.get(index as usize) {
                    add(kicks, 1);
                }
                // A doorbell with nothing behind it is no progress.
                if server.pending().map_err(misbehaved)? == 0 {
                    return Ok(None);
                }
                let _work = self.progress.work();
                // Held while files are in use, so that the end of the run can wait for that.
                let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
                server.kick(&devices, &self.counters).map_err(misbehaved)?;
            }
            port::CALL => {
                add(&self.counters.calls, 1);
                let _work = self.progress.work();
                self.call(index).map_err(misbehaved)?;
            }
            port::START => {
                add(&self.counters.starts, 1);
                self.start(index, value)?;
            }
            port::PARK if index == 0 => return Err(misbehaved(Misbehaviour::WrongVcpu)),
            port::PARK => {
                add(&self.counters.parks, 1);
                self.workers.park(index);
            }
            port::WAIT => {
                add(&self.counters.waits, 1);
                let epoch = BOOT_PAGE + offset_of!(BootPage, epoch) as u64;
                self.workers.wait(|| self.memory.load_u32(epoch) == Ok(value));
            }
            port::WAKE => {
                add(&self.counters.wakes, 1);
                self.workers.wake();
            }
            port::EXIT if index != 0 => return Err(misbehaved(Misbehaviour::WrongVcpu)),
            port::EXIT => return Ok(Some(value)),
            port::PANIC => return Err(Reason::new(Cause::Panicked)),
            _ => return Err(misbehaved(Misbehaviour::UnknownPort)),
        }
        Ok(None)
    }

    /// Starts workers 1 to `count`. A worker's vCPU is made by its own thread, so that several are made side by side.
    fn start(&'static self, index: u32, count: u32) -> Result<(), Reason> {
        if index != 0 {
            return Err(misbehaved(Misbehaviour::WrongVcpu));
        }
        let fresh = self.workers.start(count).ok_or(misbehaved(Misbehaviour::WorkerCount))?;
        for worker in fresh {
            std::thread::Builder::new()
                .stack_size(WORKER_STACK)
                .spawn(move || self.run_worker(worker))
                .map_err(|error| kvm_failure(KvmStep::Thread, error.raw_os_error().unwrap_or(libc::EAGAIN)))?;
        }
        Ok(())
    }

    fn run_worker(&'static self, index: u32) {
        if let Err(failure) = self.try_worker(index) {
            self.fail(&failure);
        }
    }

    fn try_worker(&'static self, index: u32) -> Result<(), Box<Failure>> {
        let failed = |step, errno| Box::new(Failure::from(Reason { vcpu: index, ..kvm_failure(step, errno) }));
        let vcpu = self.cpu.create_vcpu(&self.vm, index, &self.layout).map_err(|(step, errno)| failed(step, errno))?;
        let filter = Filter::of(Role::Worker).and_then(|filter| filter.install());
        filter.map_err(|_| failed(KvmStep::Jail, libc::EACCES))?;
        self.run(index, vcpu).map(|_| ())
    }

    /// Delivers the message in the mailbox of vCPU `index`, and its answer.
    fn call(&self, index: u32) -> Result<(), Misbehaviour> {
        let mail = Mail::open(self.memory, area(index) + offset_of!(VcpuArea, mailbox) as u64)?;
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        host.message_bytes += mail.message_len();
        if host.message_bytes > MAX_MESSAGE_BYTES_TOTAL {
            return Err(Misbehaviour::MessageTotal);
        }
        let answer = host.port.call(self, &mail.message(), mail.room());
        drop(host);
        mail.answer(&answer)
    }

    /// Ends the run with a failure.
    pub fn fail(&self, failure: &Failure) -> ! {
        // The lock is never released: a second failure has nobody to tell.
        let host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        host.port.fail(self, failure)
    }

    /// Ends the run: takes the floor for good and closes all files, after requests that use them are done.
    pub fn close(&self) -> (std::sync::MutexGuard<'_, HostSide>, Vec<DeviceTraffic>) {
        let host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        let traffic = devices.traffic();
        devices.clear();
        (host, traffic)
    }

    /// Closes all files, after requests that use them are done.
    pub fn close_files(&self) {
        self.devices.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// What the guest has written to its log.
    pub fn log(&self) -> Vec<u8> {
        let used = self.memory.load_u32(BOOT_PAGE + offset_of!(BootPage, log_used) as u64).unwrap_or(0);
        let mut log = vec![0; (used as usize).min(LOG_BYTES)];
        if let Ok(bytes) = self.memory.readable(LOG, log.len() as u64) {
            bytes.copy_to(&mut log);
        }
        log
    }
}

/// Address of the words of a vCPU.
fn area(index: u32) -> u64 {
    debug_assert!((index as usize) < MAX_VCPUS);
    BOOT_PAGE + offset_of!(BootPage, vcpus) as u64 + u64::from(index) * size_of::<VcpuArea>() as u64
}

fn transport_words(index: u32) -> u64 {
    area(index) + offset_of!(VcpuArea, transport) as u64
}

/// Adds the registers of the vCPU, if the host gives them.
fn with_registers(vcpu: &VcpuFd, index: u32, reason: Reason) -> Box<Failure> {
    let reason = Reason { vcpu: index, ..reason };
    let regs = vcpu.get_regs().unwrap_or_default();
    let cr2 = vcpu.get_sregs().map_or(0, |special| special.cr2);
    Box::new(Failure {
        reason,
        rip: regs.rip,
        cr2,
        rflags: regs.rflags,
        general: [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp, regs.r8, regs.r9, regs.r10,
            regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
    })
}
