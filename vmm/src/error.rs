//! Why a run failed.

use std::fmt;
use std::io;

use crate::elf::ElfError;

/// Why a run failed. Every variant but [`AnswerTooLarge`](Self::AnswerTooLarge) and [`Usage`](Self::Usage) ends the run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The virtual machine could not be set up.
    Kvm {
        /// The step that failed.
        step: KvmStep,
        /// The operating system's error number.
        errno: i32,
    },
    /// The monitor process could not be started or could not lock itself down.
    Process(io::Error),
    /// The guest program is not one that can be run.
    Guest(ElfError),
    /// The guest program and its stacks leave no heap below the memory ceiling.
    TooLittleMemory {
        /// Bytes that are needed at least.
        needed: u64,
        /// Bytes that the settings allow.
        allowed: u64,
    },
    /// The guest did something that its processor refused (a bad address, a privileged instruction, a stack overflow).
    GuestCrashed {
        /// The vCPU.
        vcpu: u32,
        /// Address of the instruction, where the host tells.
        rip: u64,
        /// Address of the last page fault, where the host tells.
        cr2: u64,
        /// All registers, under [`Settings::debug`](crate::Settings::debug).
        registers: Option<Box<Registers>>,
    },
    /// The guest gave up with a message.
    GuestPanicked {
        /// What it wrote. Untrusted bytes.
        log: Vec<u8>,
    },
    /// The guest ended without a final message.
    GuestFailed {
        /// Its code, never 0.
        code: u32,
    },
    /// The guest broke the rules of the interface.
    GuestMisbehaved(Misbehaviour),
    /// The guest completed no request and sent no message for [`Settings::stall`](crate::Settings::stall).
    Stalled,
    /// The run took longer than [`Settings::time_limit`](crate::Settings::time_limit).
    TimedOut,
    /// The run used more processor time than [`Settings::cpu_limit`](crate::Settings::cpu_limit).
    TooMuchWork,
    /// The monitor process ended without a word.
    MonitorLost {
        /// Its wait status, if it could be had.
        status: Option<i32>,
    },
    /// The request is larger than the interface allows.
    RequestTooLarge {
        /// Its length in bytes.
        len: usize,
    },
    /// The answer does not fit into the room that the guest offered; a shorter one may be given.
    AnswerTooLarge {
        /// Its length in bytes.
        len: usize,
        /// Room in bytes.
        room: usize,
    },
    /// More files than one sandbox can hold.
    TooManyFiles,
    /// Neither a regular file nor a block device.
    NotAFile,
    /// The caller's call does not fit the state of the run.
    Usage(&'static str),
    /// Another system call failed.
    Io(io::Error),
}

/// A step of setting a virtual machine up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum KvmStep {
    /// Opening `/dev/kvm`.
    Open = 0,
    /// Creating the machine.
    CreateVm = 1,
    /// Reserving guest memory.
    Memory = 2,
    /// Handing guest memory to the machine.
    MemorySlot = 3,
    /// Creating a virtual processor.
    CreateVcpu = 4,
    /// Describing the processor to the guest.
    Cpuid = 5,
    /// Setting registers.
    Registers = 6,
    /// Enabling vector registers.
    Xcrs = 7,
    /// Starting the thread of a virtual processor.
    Thread = 8,
    /// Running the guest.
    Run = 9,
    /// Locking the monitor process down.
    Jail = 10,
    /// Taking a granted file.
    File = 11,
}

/// A broken rule of the interface between guest and monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Misbehaviour {
    /// An `out` to an unknown port, or of another width than 32 bits.
    UnknownPort = 0,
    /// An `in` instruction.
    PortRead = 1,
    /// An access to memory that does not exist.
    UnmappedMemory = 2,
    /// An exit that this machine has no use for.
    UnknownExit = 3,
    /// A kick before the queue was set up.
    QueueNotReady = 4,
    /// A queue size that is zero, too large or no power of two.
    QueueSize = 5,
    /// A ring outside of memory, or misaligned.
    QueueAddress = 6,
    /// Features that were not offered, or the mandatory one missing.
    QueueFeatures = 7,
    /// The index of the available ring ran ahead by more than the queue size.
    AvailableIndex = 8,
    /// A descriptor index beyond the table.
    DescriptorIndex = 9,
    /// A descriptor chain longer than the table (a loop).
    DescriptorLoop = 10,
    /// A descriptor that points outside of the memory that the guest itself may use that way.
    DescriptorAddress = 11,
    /// Descriptor flags that are unknown or were not agreed on.
    DescriptorFlags = 12,
    /// A request without a header, data or status of the right size and direction.
    RequestShape = 13,
    /// A message outside of the memory that the guest may use.
    MessageAddress = 14,
    /// A message longer than allowed.
    MessageLength = 15,
    /// More message bytes than allowed in one run.
    MessageTotal = 16,
    /// A doorbell that this virtual processor may not ring.
    WrongVcpu = 17,
    /// More workers started than there are.
    WorkerCount = 18,
}

impl Misbehaviour {
    pub(crate) const ALL: [Self; 19] = [
        Self::UnknownPort,
        Self::PortRead,
        Self::UnmappedMemory,
        Self::UnknownExit,
        Self::QueueNotReady,
        Self::QueueSize,
        Self::QueueAddress,
        Self::QueueFeatures,
        Self::AvailableIndex,
        Self::DescriptorIndex,
        Self::DescriptorLoop,
        Self::DescriptorAddress,
        Self::DescriptorFlags,
        Self::RequestShape,
        Self::MessageAddress,
        Self::MessageLength,
        Self::MessageTotal,
        Self::WrongVcpu,
        Self::WorkerCount,
    ];
}

impl KvmStep {
    pub(crate) const ALL: [Self; 12] = [
        Self::Open,
        Self::CreateVm,
        Self::Memory,
        Self::MemorySlot,
        Self::CreateVcpu,
        Self::Cpuid,
        Self::Registers,
        Self::Xcrs,
        Self::Thread,
        Self::Run,
        Self::Jail,
        Self::File,
    ];
}

/// Registers of a crashed guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15.
    pub general: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// Address of the last page fault.
    pub cr2: u64,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm { step, errno } => kvm_text(f, *step, *errno),
            Self::Process(error) => write!(f, "the sandbox process could not be started: {error}"),
            Self::Guest(error) => write!(f, "the guest program can't be loaded: {error}"),
            Self::TooLittleMemory { needed, allowed } => {
                write!(f, "the sandbox needs {needed} bytes of memory, only {allowed} are allowed")
            }
            Self::GuestCrashed { vcpu, rip, cr2, registers } => {
                write!(
                    f,
                    "the sandboxed program crashed (vCPU {vcpu}, instruction at {rip:#x}, last fault at {cr2:#x})"
                )?;
                match registers {
                    Some(registers) => write!(f, "\n{registers}"),
                    None => Ok(()),
                }
            }
            Self::GuestPanicked { log } => {
                write!(f, "the sandboxed program gave up: {}", log.escape_ascii())
            }
            Self::GuestFailed { code } => write!(f, "the sandboxed program failed with code {code}"),
            Self::GuestMisbehaved(what) => write!(f, "the sandboxed program broke its rules: {what}"),
            Self::Stalled => f.write_str("the sandboxed program makes no progress"),
            Self::TimedOut => f.write_str("the sandboxed program takes too long"),
            Self::TooMuchWork => f.write_str("the sandboxed program takes too much processor time"),
            Self::MonitorLost { status: Some(status) } if status & 0x7f == libc::SIGSYS => {
                f.write_str("the sandbox process tried what it must not do, and was ended")
            }
            Self::MonitorLost { status: Some(status) } => {
                write!(f, "the sandbox process was lost (wait status {status:#x})")
            }
            Self::MonitorLost { status: None } => f.write_str("the sandbox process was lost"),
            Self::RequestTooLarge { len } => write!(f, "a request of {len} bytes is too large"),
            Self::AnswerTooLarge { len, room } => {
                write!(f, "an answer of {len} bytes is larger than the {room} bytes of room for it")
            }
            Self::TooManyFiles => f.write_str("too many files for one sandbox"),
            Self::NotAFile => f.write_str("neither a regular file nor a block device"),
            Self::Usage(what) => write!(f, "wrong use of the sandbox: {what}"),
            Self::Io(error) => error.fmt(f),
        }
    }
}

fn kvm_text(f: &mut fmt::Formatter<'_>, step: KvmStep, errno: i32) -> fmt::Result {
    let error = io::Error::from_raw_os_error(errno);
    match (step, errno) {
        (KvmStep::Open, libc::ENOENT | libc::ENODEV | libc::ENXIO) => write!(
            f,
            "/dev/kvm does not exist: enable virtualisation in the firmware (or nested virtualisation of this virtual \
             machine) and load the module kvm_intel or kvm_amd"
        ),
        (KvmStep::Open, libc::EACCES | libc::EPERM) => {
            write!(
                f,
                "no permission for /dev/kvm: add the user to the group kvm, or pass the device into the container"
            )
        }
        (KvmStep::Open | KvmStep::CreateVm, libc::EBUSY) => {
            write!(f, "KVM is busy: another hypervisor uses the processor's virtualisation")
        }
        (KvmStep::Run | KvmStep::Thread, libc::EAGAIN) => {
            write!(
                f,
                "KVM: {step} failed: the sandbox's user may start no more threads (limit of processes, ulimit -u)"
            )
        }
        (KvmStep::Jail | KvmStep::File | KvmStep::Thread, _) => write!(f, "sandbox: {step} failed: {error}"),
        _ => write!(f, "KVM: {step} failed: {error}"),
    }
}

impl fmt::Display for KvmStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "opening /dev/kvm",
            Self::CreateVm => "creating the virtual machine",
            Self::Memory => "reserving guest memory",
            Self::MemorySlot => "setting guest memory",
            Self::CreateVcpu => "creating a virtual processor",
            Self::Cpuid => "describing the virtual processor",
            Self::Registers => "setting registers",
            Self::Xcrs => "enabling vector registers",
            Self::Thread => "starting a thread",
            Self::Run => "running the virtual processor",
            Self::Jail => "locking the process down",
            Self::File => "taking a file",
        })
    }
}

impl fmt::Display for Misbehaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownPort => "unknown doorbell",
            Self::PortRead => "read from a port",
            Self::UnmappedMemory => "access outside of memory",
            Self::UnknownExit => "unexpected exit",
            Self::QueueNotReady => "kick before the queue is ready",
            Self::QueueSize => "bad queue size",
            Self::QueueAddress => "bad queue address",
            Self::QueueFeatures => "bad queue features",
            Self::AvailableIndex => "available ring overrun",
            Self::DescriptorIndex => "descriptor index out of range",
            Self::DescriptorLoop => "descriptor loop",
            Self::DescriptorAddress => "descriptor outside of memory",
            Self::DescriptorFlags => "bad descriptor flags",
            Self::RequestShape => "malformed request",
            Self::MessageAddress => "message outside of memory",
            Self::MessageLength => "message too long",
            Self::MessageTotal => "too many messages",
            Self::WrongVcpu => "doorbell of another virtual processor",
            Self::WorkerCount => "too many workers",
        })
    }
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 16] = [
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
            "r15",
        ];
        for (name, value) in NAMES.iter().zip(self.general) {
            writeln!(f, "{name:>6} {value:016x}")?;
        }
        write!(f, "   rip {:016x}\nrflags {:016x}\n   cr2 {:016x}", self.rip, self.rflags, self.cr2)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Process(error) | Self::Io(error) => Some(error),
            Self::Guest(error) => Some(error),
            _ => None,
        }
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_match_positions() {
        assert!(Misbehaviour::ALL.iter().enumerate().all(|(i, m)| *m as usize == i));
        assert!(KvmStep::ALL.iter().enumerate().all(|(i, s)| *s as usize == i));
    }

    #[test]
    fn kvm_errors_are_told_apart() {
        let text = |step, errno| Error::Kvm { step, errno }.to_string();
        assert!(text(KvmStep::Open, libc::ENOENT).contains("does not exist"));
        assert!(text(KvmStep::Open, libc::EACCES).contains("no permission"));
        assert!(text(KvmStep::CreateVm, libc::EBUSY).contains("busy"));
        assert!(text(KvmStep::Run, libc::EAGAIN).contains("ulimit -u"));
        assert_eq!(
            text(KvmStep::CreateVm, libc::ENOMEM),
            "KVM: creating the virtual machine failed: Cannot allocate memory (os error 12)"
        );
    }

    #[test]
    fn log_bytes_are_escaped() {
        assert_eq!(
            Error::GuestPanicked { log: b"a\x1b[31m\n".to_vec() }.to_string(),
            "the sandboxed program gave up: a\\x1b[31m\\n"
        );
    }
}
