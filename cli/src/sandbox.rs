//! A run of a guest program: requests in, calls out.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{
    Call, CheckFinding, Failure, MapRun, OpenAnswer, OpenFile, Progress, Reply, Request, call, reply,
};
use instar_vmm::{Error, Event, FaultRule, NbdExport, Sandbox, Settings, Window};
use prost::Message;
use prost::encoding::decode_varint;
use zeroize::Zeroizing;

use crate::guest::Guest;
use crate::output::stats;
use crate::problem::{Problem, printable};

pub use instar_vmm::Granted;

/// The limits that the operator sets.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Ceiling of guest memory, bytes.
    pub memory: u64,
    /// The run may take no longer.
    pub timeout: Option<Duration>,
    /// vCPUs, if the operator wants a certain number.
    pub threads: Option<u32>,
    /// Tell about the inside of a crash.
    pub debug: bool,
    /// The user and group that the sandbox's process becomes where the program is run by root.
    pub user: Option<u32>,
    /// Print what each run did.
    pub stats: Option<StatsForm>,
}

/// In which form the statistics of a run are printed, on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatsForm {
    /// Lines for people.
    Human,
    /// One line of JSON.
    Json,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory: 256 << 20, timeout: None, threads: None, debug: false, user: None, stats: None }
    }
}

/// A metadata operation that makes no step for this long has met an image made to keep it busy.
const STALL: Duration = Duration::from_secs(10);
/// Seconds of processor time for a description. No image, however made, needs a fifth of that.
const MOST_CPU_OF_HEADERS: u64 = 10;
/// Moving data waits for storage, which may be slow.
const STALL_OF_DATA: Duration = Duration::from_secs(120);

/// What kind of work it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// What describes an image; its cost does not grow with the disk.
    Headers,
    /// Headers and tables.
    Metadata,
    /// The contents of disks, by so many vCPUs.
    Data(u32),
}

impl Limits {
    /// vCPUs for work on data: as many as wanted, or as the machine has, but not more than qemu-img has requests under way.
    pub fn vcpus(&self) -> u32 {
        const MOST: usize = 8;
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MOST));
        self.threads.unwrap_or(cpus as u32)
    }

    fn settings(&self, work: Work) -> Settings {
        let (vcpus, stall, vectors) = match work {
            Work::Headers | Work::Metadata => (1, STALL, false),
            Work::Data(vcpus) => (vcpus, STALL_OF_DATA, true),
        };
        let usual = Settings::default();
        Settings {
            vcpus,
            memory: self.memory,
            stall,
            time_limit: self.timeout,
            cpu_limit: (work == Work::Headers).then_some(MOST_CPU_OF_HEADERS),
            vectors,
            user: self.user.unwrap_or(usual.user),
            debug: self.debug,
            ..usual
        }
    }
}

/// The machine that a guest runs in.
pub trait Machine {
    /// Gives the guest a part of a file.
    ///
    /// # Errors
    /// The machine could not be made, or is gone.
    fn grant(&mut self, file: BorrowedFd<'_>, writable: bool, window: Window) -> Result<Granted, Problem>;

    /// Gives the guest an NBD export.
    ///
    /// # Errors
    /// As [`grant`](Self::grant).
    fn grant_nbd(&mut self, socket: BorrowedFd<'_>, export: &NbdExport, writable: bool) -> Result<Granted, Problem>;

    /// Lets requests on the file that was granted last fail.
    ///
    /// # Errors
    /// As [`grant`](Self::grant).
    fn let_fail(&mut self, rules: &[FaultRule]) -> Result<(), Problem>;

    /// Starts the guest.
    ///
    /// # Errors
    /// As [`grant`](Self::grant).
    fn start(&mut self, request: &[u8]) -> Result<(), Problem>;

    /// The next message; `None` at the end of the run.
    ///
    /// # Errors
    /// The guest crashed, stalled or broke a rule.
    fn next_message(&mut self) -> Result<Option<Incoming>, Problem>;

    /// Answers the last message.
    ///
    /// # Errors
    /// As [`grant`](Self::grant).
    fn answer(&mut self, answer: &[u8]) -> Result<(), Problem>;
}

/// A message of the guest: untrusted bytes.
#[derive(Debug)]
pub struct Incoming {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// It waits for an answer.
    pub expects_answer: bool,
}

/// The virtual machine, in its own process.
#[derive(Debug)]
pub struct Vm {
    sandbox: Sandbox,
    guest: Guest,
    stats: Option<StatsForm>,
}

impl Vm {
    /// Starts the process that makes the machine. The program must not have started threads yet.
    ///
    /// # Errors
    /// The process could not be started.
    pub fn spawn(guest: Guest, limits: &Limits, work: Work) -> Result<Self, Problem> {
        Self::with(guest, limits, &limits.settings(work))
    }

    /// The same for a run that writes no file.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub fn spawn_to_read(guest: Guest, limits: &Limits, work: Work) -> Result<Self, Problem> {
        Self::with(guest, limits, &Settings { read_only: true, ..limits.settings(work) })
    }

    fn with(guest: Guest, limits: &Limits, settings: &Settings) -> Result<Self, Problem> {
        let sandbox = Sandbox::spawn(guest.program, settings).map_err(|error| problem(&error, guest))?;
        Ok(Self { sandbox, guest, stats: limits.stats })
    }

    fn problem(&self, error: &Error) -> Problem {
        problem(error, self.guest)
    }
}

impl Machine for Vm {
    fn grant(&mut self, file: BorrowedFd<'_>, writable: bool, window: Window) -> Result<Granted, Problem> {
        self.sandbox.grant_part(file, writable, window).map_err(|error| self.problem(&error))
    }

    fn grant_nbd(&mut self, socket: BorrowedFd<'_>, export: &NbdExport, writable: bool) -> Result<Granted, Problem> {
        self.sandbox.grant_nbd(socket, export, writable).map_err(|error| self.problem(&error))
    }

    fn let_fail(&mut self, rules: &[FaultRule]) -> Result<(), Problem> {
        self.sandbox.let_fail(rules).map_err(|error| self.problem(&error))
    }

    fn start(&mut self, request: &[u8]) -> Result<(), Problem> {
        self.sandbox.start(request).map_err(|error| self.problem(&error))
    }

    fn next_message(&mut self) -> Result<Option<Incoming>, Problem> {
        match self.sandbox.next_event() {
            Ok(Event::Message { bytes, expects_answer }) => Ok(Some(Incoming { bytes, expects_answer })),
            Ok(Event::Exited(report)) => {
                if let Some(form) = self.stats {
                    stats::print(&report, form);
                }
                Ok(None)
            }
            Err(error) => Err(self.problem(&error)),
        }
    }

    fn answer(&mut self, answer: &[u8]) -> Result<(), Problem> {
        self.sandbox.answer(answer).map_err(|error| self.problem(&error))
    }
}

/// An error of the machine, in one line; more lines for those who asked for them.
fn problem(error: &Error, guest: Guest) -> Problem {
    match error {
        Error::GuestCrashed { registers: None, .. } => {
            Problem::new("The sandboxed parser crashed on this image (--debug-guest tells more)")
        }
        Error::GuestCrashed { rip, .. } => {
            let place = guest.function_at(*rip).map(|(name, offset)| format!("in {name} + {offset:#x}"));
            Problem::new("The sandboxed parser crashed on this image")
                .with_hint(format!("{error}\n{}", place.unwrap_or_default()))
        }
        Error::GuestPanicked { log } => {
            Problem::new(format!("The sandboxed parser gave up on this image: {}", printable(log.trim_ascii())))
        }
        Error::Stalled => Problem::new("The image takes too long: the sandbox makes no progress"),
        Error::TooMuchWork => Problem::new("The image takes too long: the sandbox used up its processor time"),
        Error::TimedOut => Problem::new("The operation takes longer than --timeout allows"),
        Error::TooLittleMemory { needed, .. } => {
            Problem::new(format!("--max-guest-memory is too low: the sandbox needs {needed} bytes"))
        }
        Error::TooManyFiles => Problem::new("Too many files for one operation"),
        other => Problem::new(format!("Sandbox: {other}")),
    }
}

/// What the host does for a guest.
pub trait Host {
    /// Opens and grants a file, if the policy allows.
    fn open(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted>;

    /// Takes note of progress.
    fn progress(&mut self, progress: &Progress);

    /// Takes note of progress, and delays the work to keep a rate.
    fn pace(&mut self, progress: &Progress);

    /// Tells the user something.
    fn warning(&mut self, warning: &Failure);

    /// Takes faults of an image.
    fn findings(&mut self, findings: &[CheckFinding]) {
        let _ = findings;
    }

    /// Takes runs of a disk.
    fn runs(&mut self, runs: &[MapRun]) {
        let _ = runs;
    }
}

/// Files that a guest may ask for in vain.
const MAX_REFUSALS: usize = 1024;
/// Warnings that it may give.
const MAX_WARNINGS: usize = 1 << 16;

/// Runs a request to its end.
///
/// # Errors
/// The guest ended without a result, or said something that is no message.
pub fn run(machine: &mut dyn Machine, request: &Request, host: &mut dyn Host) -> Result<reply::Result, Problem> {
    // Passphrases may be in it.
    let encoded = Zeroizing::new(request.encode_to_vec());
    machine.start(&encoded)?;
    drop(encoded);
    let (mut refusals, mut warnings) = (0, 0);
    let mut result = None;
    while let Some(incoming) = machine.next_message()? {
        if images_told(&incoming.bytes) > MAX_CHAIN_DEPTH {
            return Err(garbled());
        }
        let call = Call::decode(incoming.bytes.as_slice()).ok().and_then(|call| call.kind);
        let Some(call) = call.filter(|_| result.is_none()) else { return Err(garbled()) };
        let answer = match call {
            call::Kind::Open(wanted) => {
                let granted = host.open(machine, &wanted);
                refusals += usize::from(granted.is_none());
                if refusals > MAX_REFUSALS {
                    return Err(garbled());
                }
                open_answer(granted).encode_to_vec()
            }
            call::Kind::Pace(progress) => {
                host.pace(&progress);
                Vec::new()
            }
            call::Kind::Progress(progress) => {
                host.progress(&progress);
                Vec::new()
            }
            call::Kind::Warning(warning) => {
                warnings += 1;
                if warnings > MAX_WARNINGS {
                    return Err(garbled());
                }
                host.warning(&warning);
                Vec::new()
            }
            call::Kind::Runs(runs) => {
                host.runs(&runs.runs);
                Vec::new()
            }
            call::Kind::Findings(findings) => {
                host.findings(&findings.findings);
                Vec::new()
            }
            call::Kind::Done(Reply { result: done }) => {
                result = done;
                Vec::new()
            }
        };
        if incoming.expects_answer {
            machine.answer(&answer)?;
        }
    }
    result.ok_or_else(garbled)
}

/// How many images an answer tells of. Two bytes of a message become half a kilobyte of memory by that, so it is counted before
/// the message is decoded; nothing else in messages grows so much.
fn images_told(message: &[u8]) -> usize {
    const DONE: u64 = 4;
    const INFO: u64 = 2;
    const IMAGES: u64 = 1;
    let infos = parts(message, DONE).flat_map(|reply| parts(reply, INFO));
    infos.map(|info| parts(info, IMAGES).take(MAX_CHAIN_DEPTH + 1).count()).sum()
}

/// The parts of a message that stand under a number, up to the first thing that is no field.
fn parts(mut message: &[u8], wanted: u64) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        loop {
            let key = decode_varint(&mut message).ok()?;
            let len = match key & 7 {
                0 => decode_varint(&mut message).map(|_| 0).ok()?,
                1 => 8,
                2 => decode_varint(&mut message).ok()?,
                5 => 4,
                _ => return None,
            };
            let (part, rest) = message.split_at_checked(usize::try_from(len).ok()?)?;
            message = rest;
            if key == wanted << 3 | 2 {
                return Some(part);
            }
        }
    })
}

fn open_answer(granted: Option<Granted>) -> OpenAnswer {
    match granted {
        Some(Granted { device, len, flags, allocated }) => {
            OpenAnswer { granted: true, device, len, flags: flags.bits(), allocated }
        }
        None => OpenAnswer::default(),
    }
}

fn garbled() -> Problem {
    Problem::new("The sandboxed parser sent something that makes no sense")
}

#[cfg(test)]
pub mod fake {
    //! A machine that plays a script.

    use std::collections::VecDeque;

    use super::*;

    /// Gives out device numbers and prepared messages.
    #[derive(Default)]
    pub struct Script {
        /// How many files it was given.
        pub granted: u32,
        /// What the guest says.
        pub calls: VecDeque<Vec<u8>>,
        /// What it was answered.
        pub answers: Vec<Vec<u8>>,
    }

    impl Machine for Script {
        fn grant(&mut self, _: BorrowedFd<'_>, writable: bool, _: Window) -> Result<Granted, Problem> {
            let device = self.granted;
            self.granted += 1;
            let flags = if writable { instar_vmm::DeviceFlags::WRITABLE } else { instar_vmm::DeviceFlags::empty() };
            Ok(Granted { device, len: 0, flags, allocated: 0 })
        }

        fn grant_nbd(&mut self, socket: BorrowedFd<'_>, _: &NbdExport, writable: bool) -> Result<Granted, Problem> {
            self.grant(socket, writable, Window::default())
        }

        fn let_fail(&mut self, _: &[FaultRule]) -> Result<(), Problem> {
            Ok(())
        }

        fn start(&mut self, _: &[u8]) -> Result<(), Problem> {
            Ok(())
        }

        fn next_message(&mut self) -> Result<Option<Incoming>, Problem> {
            let bytes = self.calls.pop_front();
            Ok(bytes.map(|bytes| {
                let open =
                    Call::decode(bytes.as_slice()).is_ok_and(|call| matches!(call.kind, Some(call::Kind::Open(_))));
                Incoming { bytes, expects_answer: open }
            }))
        }

        fn answer(&mut self, answer: &[u8]) -> Result<(), Problem> {
            self.answers.push(answer.to_vec());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use instar_guest_protocol::message::{ImageInfo, InfoReply};

    use super::fake::Script;
    use super::*;

    #[derive(Default)]
    struct Deaf {
        asked: usize,
        warned: usize,
    }

    impl Host for Deaf {
        fn open(&mut self, _: &mut dyn Machine, _: &OpenFile) -> Option<Granted> {
            self.asked += 1;
            None
        }
        fn progress(&mut self, _: &Progress) {}
        fn pace(&mut self, _: &Progress) {}
        fn warning(&mut self, _: &Failure) {
            self.warned += 1;
        }
    }

    fn script(calls: &[call::Kind]) -> Script {
        let encode = |kind: &call::Kind| Call { kind: Some(kind.clone()) }.encode_to_vec();
        Script { calls: calls.iter().map(encode).collect(), ..Script::default() }
    }

    fn done() -> call::Kind {
        call::Kind::Done(Reply { result: Some(reply::Result::Info(InfoReply { images: Vec::new() })) })
    }

    #[test]
    fn a_run() {
        let mut machine =
            script(&[call::Kind::Open(OpenFile::default()), call::Kind::Warning(Failure::default()), done()]);
        let mut host = Deaf::default();
        let result = run(&mut machine, &Request::default(), &mut host).unwrap();
        assert!(matches!(result, reply::Result::Info(_)));
        assert_eq!((host.asked, host.warned), (1, 1));
        assert_eq!(machine.answers, [OpenAnswer::default().encode_to_vec()]);
    }

    #[test]
    fn answers_do_not_swell() {
        let told = |count| {
            let images = vec![ImageInfo { virtual_size: 7, ..ImageInfo::default() }; count];
            script(&[call::Kind::Done(Reply { result: Some(reply::Result::Info(InfoReply { images })) })])
        };
        for (count, good) in
            [(0, true), (1, true), (MAX_CHAIN_DEPTH, true), (MAX_CHAIN_DEPTH + 1, false), (400_000, false)]
        {
            let mut machine = told(count);
            assert_eq!(images_told(&machine.calls[0]), count.min(MAX_CHAIN_DEPTH + 1));
            assert_eq!(run(&mut machine, &Request::default(), &mut Deaf::default()).is_ok(), good, "{count}");
        }
        // Other messages have fields of the same numbers.
        let open = Call { kind: Some(call::Kind::Open(OpenFile { name: vec![10; 4000], ..OpenFile::default() })) };
        assert_eq!(images_told(&open.encode_to_vec()), 0);
        assert_eq!(images_told(&[0xff; 40]), 0);
    }

    #[test]
    fn nonsense_ends_the_run() {
        for mut machine in [
            script(&[]),
            script(&[done(), done()]),
            script(&[call::Kind::Done(Reply { result: None })]),
            Script { calls: [vec![0xff; 40]].into(), ..Script::default() },
            script(&vec![call::Kind::Open(OpenFile::default()); MAX_REFUSALS + 1]),
            script(&vec![call::Kind::Warning(Failure::default()); MAX_WARNINGS + 1]),
            script(&[call::Kind::Warning(Failure::default()), call::Kind::Progress(Progress { done: 1, total: 0 })]),
        ] {
            assert!(run(&mut machine, &Request::default(), &mut Deaf::default()).is_err());
        }
    }
}
