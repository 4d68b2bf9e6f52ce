//! System call filters: what each thread of the monitor process may still do once the guest is about to run.
//!
//! There are two roles. The *boot* thread runs vCPU 0, serves its requests, speaks with the caller and starts the others. A
//! *worker* runs one more vCPU and serves its requests. Everything that is not listed ends the process at once. Files are
//! never opened, nothing is executed, no memory becomes executable, no signal is sent, no other process is looked at.
//! `cli/tests/filter.rs` records the calls that commands really make and compares them with these lists.

use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// vCPU 0, and everything that happens once.
    Boot,
    /// Another vCPU.
    Worker,
}

/// Under which condition a call is allowed.
#[derive(Clone, Copy, Debug)]
enum When {
    /// Always.
    Always,
    /// The argument with this number is one of these.
    OneOf(u8, &'static [u64]),
    /// Of these bits of the argument, exactly these are set.
    Bits { argument: u8, mask: u64, set: u64 },
}

/// An allowed system call.
type Allowed = (libc::c_long, When);

/// Memory is never executable.
const fn not_executable(call: libc::c_long) -> Allowed {
    (call, When::Bits { argument: 2, mask: libc::PROT_EXEC as u64, set: 0 })
}

/// Running, and telling the registers of a guest that crashed.
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
/// Files: sharing blocks, discarding on a device.
const FICLONERANGE: u64 = 0x4020_940d;
const BLKDISCARD: u64 = 0x1277;
/// Making a vCPU, which each worker does for itself before it takes its own filter.
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_SET_SREGS: u64 = 0x4138_ae84;
const KVM_SET_CPUID2: u64 = 0x4008_ae90;
const KVM_SET_XCRS: u64 = 0x4188_aea7;

const WORKER_IOCTLS: [u64; 5] = [KVM_RUN, KVM_GET_REGS, KVM_GET_SREGS, FICLONERANGE, BLKDISCARD];
const BOOT_IOCTLS: [u64; 10] = [
    KVM_RUN,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    FICLONERANGE,
    BLKDISCARD,
    KVM_CREATE_VCPU,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KVM_SET_CPUID2,
    KVM_SET_XCRS,
];

/// Every thread: requests on open files, messages to the caller, its own memory, waiting, the end.
const COMMON: &[Allowed] = &[
    // Requests.
    (libc::SYS_pread64, When::Always),
    (libc::SYS_preadv, When::Always),
    (libc::SYS_pwrite64, When::Always),
    (libc::SYS_pwritev, When::Always),
    (libc::SYS_lseek, When::Always),
    (libc::SYS_fallocate, When::Always),
    (libc::SYS_ftruncate, When::Always),
    (libc::SYS_fdatasync, When::Always),
    (libc::SYS_copy_file_range, When::Always),
    // The caller's process. The end of a run closes all files.
    (libc::SYS_sendmsg, When::Always),
    (libc::SYS_recvmsg, When::Always),
    (libc::SYS_recvfrom, When::Always),
    (libc::SYS_sendto, When::Always),
    (libc::SYS_close, When::Always),
    // A build with debug assertions asks before it closes.
    (libc::SYS_fcntl, When::OneOf(1, &[libc::F_GETFD as u64])),
    (libc::SYS_getrusage, When::Always),
    // Memory.
    (libc::SYS_brk, When::Always),
    not_executable(libc::SYS_mmap),
    not_executable(libc::SYS_mprotect),
    (libc::SYS_munmap, When::Always),
    (libc::SYS_mremap, When::Always),
    (libc::SYS_madvise, When::Always),
    // Threads.
    (libc::SYS_futex, When::Always),
    (libc::SYS_sched_yield, When::Always),
    (libc::SYS_clock_gettime, When::Always),
    (libc::SYS_rt_sigprocmask, When::Always),
    (libc::SYS_sigaltstack, When::Always),
    (libc::SYS_exit, When::Always),
    (libc::SYS_exit_group, When::Always),
];

/// Only the boot thread: starting workers. What a worker does before it takes its own filter counts as well.
const BOOT: &[Allowed] = &[
    (libc::SYS_ioctl, When::OneOf(1, &BOOT_IOCTLS)),
    // Threads of this process, no processes. `clone3`, whose flags a filter can't see, is answered as if it did not exist.
    (libc::SYS_clone, When::Bits { argument: 0, mask: libc::CLONE_THREAD as u64, set: libc::CLONE_THREAD as u64 }),
    (libc::SYS_clone3, When::Always),
    (libc::SYS_set_robust_list, When::Always),
    // The C library prepares its own signal for changes of identity when the first thread starts.
    (libc::SYS_rt_sigaction, When::OneOf(0, &[33])),
    (libc::SYS_rseq, When::Always),
    (libc::SYS_gettid, When::Always),
    (libc::SYS_sched_getaffinity, When::Always),
    // A further filter can only take rights away.
    (libc::SYS_prctl, When::OneOf(0, &[libc::PR_SET_NO_NEW_PRIVS as u64])),
    (libc::SYS_seccomp, When::Always),
];

/// Only workers.
const WORKER: &[Allowed] = &[(libc::SYS_ioctl, When::OneOf(1, &WORKER_IOCTLS))];

impl Role {
    fn own(self) -> &'static [Allowed] {
        match self {
            Self::Boot => BOOT,
            Self::Worker => WORKER,
        }
    }
}

/// An allowed call, for those who look whether it is needed.
#[derive(Clone, Copy, Debug)]
pub struct AllowedCall {
    /// Its number.
    pub number: i64,
    /// The argument that is judged, if `values` names some.
    pub argument: u8,
    /// The values that it may have; none: it is not judged by values.
    pub values: &'static [u64],
}

/// What the filter of a role allows.
pub fn allowed_calls(role: Role) -> Vec<AllowedCall> {
    let describe = |(number, when): &Allowed| match when {
        When::OneOf(argument, values) => AllowedCall { number: *number, argument: *argument, values },
        When::Always | When::Bits { .. } => AllowedCall { number: *number, argument: 0, values: &[] },
    };
    COMMON.iter().chain(role.own()).map(describe).collect()
}

/// The filters of a role, ready to be installed.
#[derive(Debug)]
pub struct Filter(Vec<BpfProgram>);

impl Filter {
    /// Translates the lists.
    pub fn of(role: Role) -> Result<Self, Error> {
        let mut rules = std::collections::BTreeMap::new();
        for (call, when) in COMMON.iter().chain(role.own()) {
            rules.insert(*call, conditions(*when).map_err(Error::Backend)?);
        }
        let listed = program(rules, SeccompAction::KillProcess, SeccompAction::Allow)?;
        Ok(Self(match role {
            Role::Worker => vec![listed],
            Role::Boot => {
                let only_clone3 = [(libc::SYS_clone3, Vec::new())].into();
                let absent = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
                // The one that allows less goes last: it is then no longer possible to install another but by its leave.
                vec![program(only_clone3, SeccompAction::Allow, absent)?, listed]
            }
        }))
    }

    /// Binds the calling thread, and those that it starts from now on.
    pub fn install(&self) -> Result<(), Error> {
        self.0.iter().try_for_each(|program| apply_filter(program))
    }
}

fn program(
    rules: std::collections::BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, Error> {
    let filter = SeccompFilter::new(rules, otherwise, listed, TargetArch::x86_64).map_err(Error::Backend)?;
    filter.try_into().map_err(Error::Backend)
}

/// One rule for each alternative; none: always.
fn conditions(when: When) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |argument, op, value| {
        SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)?])
    };
    match when {
        When::Always => Ok(Vec::new()),
        When::OneOf(argument, values) => values.iter().map(|value| rule(argument, SeccompCmpOp::Eq, *value)).collect(),
        When::Bits { argument, mask, set } => Ok(vec![rule(argument, SeccompCmpOp::MaskedEq(mask), set)?]),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::jail::process::{exit, fork};

    const SURVIVED: i32 = 7;

    /// Runs `attempt` in a process under the filter of `role`; gives its wait status.
    fn attempt(role: Role, attempt: impl FnOnce()) -> i32 {
        let body = |_| -> Infallible {
            Filter::of(role).unwrap().install().unwrap();
            attempt();
            exit(SURVIVED)
        };
        let (_channel, mut process) = fork(true, body).unwrap();
        process.wait().expect("a wait status")
    }

    /// Both roles, also in a thread that the process starts under the boot filter.
    fn expect_kill(what: &str, act: fn()) {
        for role in [Role::Boot, Role::Worker] {
            assert_eq!(attempt(role, act) & 0x7f, libc::SIGSYS, "{what} as {role:?}");
        }
        let in_thread = || {
            let worker = std::thread::spawn(move || {
                Filter::of(Role::Worker).unwrap().install().unwrap();
                act();
            });
            let _ = worker.join();
        };
        assert_eq!(attempt(Role::Boot, in_thread) & 0x7f, libc::SIGSYS, "{what} in a worker thread");
    }

    fn call(number: libc::c_long, arguments: [u64; 4]) {
        let [a, b, c, d] = arguments;
        // SAFETY: the calls of these tests get no pointer that they could write through: null, or text.
        unsafe { libc::syscall(number, a, b, c, d) };
    }

    #[test]
    fn the_forbidden_ends_the_process() {
        expect_kill("open", || {
            let _ = std::fs::File::open("/etc/passwd");
        });
        expect_kill("socket", || {
            let _ = std::net::TcpStream::connect("127.0.0.1:1");
        });
        expect_kill("execve", || call(libc::SYS_execve, [0; 4]));
        expect_kill("execveat", || call(libc::SYS_execveat, [0; 4]));
        expect_kill("ptrace", || call(libc::SYS_ptrace, [0; 4]));
        expect_kill("process_vm_readv", || call(libc::SYS_process_vm_readv, [1, 0, 0, 0]));
        expect_kill("kill", || call(libc::SYS_kill, [1, 0, 0, 0]));
        expect_kill("fork", || call(libc::SYS_fork, [0; 4]));
        expect_kill("clone of a process", || call(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0]));
        expect_kill("openat2", || call(libc::SYS_openat2, [0; 4]));
        expect_kill("io_uring", || call(libc::SYS_io_uring_setup, [1, 0, 0, 0]));
        expect_kill("bpf", || call(libc::SYS_bpf, [0; 4]));
        expect_kill("mount", || call(libc::SYS_mount, [0; 4]));
        expect_kill("unlink", || call(libc::SYS_unlink, [0; 4]));
        expect_kill("sendfile", || call(libc::SYS_sendfile, [0; 4]));
        expect_kill("read", || call(libc::SYS_read, [0; 4]));
        expect_kill("write", || call(libc::SYS_write, [1, 0, 0, 0]));
        expect_kill("setuid", || call(libc::SYS_setuid, [0; 4]));
        expect_kill("another ioctl", || call(libc::SYS_ioctl, [0, 0x5413, 0, 0]));
        expect_kill("executable memory", || call(libc::SYS_mmap, [0, 4096, 5, 0x22]));
        expect_kill("memory made executable", || call(libc::SYS_mprotect, [0, 4096, 5, 0]));
    }

    #[test]
    fn workers_start_nothing_and_make_no_vcpu() {
        let create_vcpu = || call(libc::SYS_ioctl, [0, KVM_CREATE_VCPU, 0, 0]);
        assert_eq!(attempt(Role::Boot, create_vcpu) & 0x7f, 0);
        assert_eq!(attempt(Role::Worker, create_vcpu) & 0x7f, libc::SIGSYS);
        assert_eq!(attempt(Role::Worker, || drop(std::thread::spawn(|| ()))) & 0x7f, libc::SIGSYS);
    }

    #[test]
    fn work_goes_on() {
        let work = || {
            // Not a file, but nothing to be killed for.
            call(libc::SYS_pread64, [u64::MAX, 0, 0, 0]);
            let large = vec![1u8; 8 << 20];
            if large.iter().map(|byte| usize::from(*byte)).sum::<usize>() != 8 << 20 {
                exit(1);
            }
        };
        for role in [Role::Boot, Role::Worker] {
            assert_eq!(attempt(role, work), SURVIVED << 8, "{role:?}");
        }
        let threads = || {
            let workers: Vec<_> =
                (0..3).map(|_| std::thread::spawn(|| Filter::of(Role::Worker).unwrap().install())).collect();
            if workers.into_iter().any(|worker| worker.join().is_err()) {
                exit(1);
            }
        };
        assert_eq!(attempt(Role::Boot, threads), SURVIVED << 8);
    }
}
