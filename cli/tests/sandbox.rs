//! The guest runtime inside the virtual machine: what must work, and what must end the machine cleanly.
//!
//! The other side is `guest-runtime/src/bin/selftest.rs`. Each case is a run of its own, forked by a process with one thread,
//! so this program is its own test harness. Without a usable KVM it says so and passes, unless `INSTAR_REQUIRE_KVM=1`.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use std::{env, io};

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{Call, InfoRequest, OpenAnswer, OpenFile, Request, Source, call, reply};
use instar_vmm::{Error, Event, Granted, Sandbox, Settings, Stats};
use prost::Message;

static SELFTEST: &[u8] = include_bytes!(env!("INSTAR_GUEST_SELFTEST"));

/// A case: its name, and what it checks.
type Case = (&'static str, fn());

const CASES: &[Case] = &[
    ("replies", replies),
    ("every_request_works", every_request_works),
    ("vcpus_wait_for_each_other", vcpus_wait_for_each_other),
    ("vcpus_read_at_once", vcpus_read_at_once),
    ("holes_are_seen", holes_are_seen),
    ("copies_leave_zeroes_out", copies_leave_zeroes_out),
    ("files_are_asked_for", files_are_asked_for),
    ("memory_is_refused_and_reused", memory_is_refused_and_reused),
    ("batches_are_split_and_joined", batches_are_split_and_joined),
    ("failures_come_back", failures_come_back),
    ("messages_arrive", messages_arrive),
    ("jobs_follow_each_other", jobs_follow_each_other),
    ("clusters_are_compressed", clusters_are_compressed),
    ("panic_tells_its_place", panic_tells_its_place),
    ("exhausted_memory_is_told", exhausted_memory_is_told),
    ("stack_overflow_crashes", stack_overflow_crashes),
    ("broken_rules_end_the_machine", broken_rules_end_the_machine),
    ("other_doorbells_end_the_machine", other_doorbells_end_the_machine),
];

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let names: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let chosen = |name: &str| match flag("--exact") {
        true => names.iter().any(|wanted| *wanted == name),
        false => names.is_empty() || names.iter().any(|wanted| name.contains(*wanted)),
    };
    let cases = CASES.iter().filter(|(name, _)| chosen(name) && !flag("--ignored"));
    if flag("--list") {
        cases.for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    if let Some(reason) = kvm_is_missing() {
        assert!(env::var_os("INSTAR_REQUIRE_KVM").is_none_or(|value| value != "1"), "KVM is required: {reason}");
        eprintln!("SKIPPED: no sandbox test ran, since KVM can't be used here: {reason}");
        return;
    }
    for (name, run) in cases {
        run();
        println!("test {name} ... ok");
    }
}

fn kvm_is_missing() -> Option<String> {
    match run(&Setup::new(0)).result {
        Err(error @ Error::Kvm { .. }) => Some(error.to_string()),
        _ => None,
    }
}

/// How a case is run.
struct Setup<'a> {
    case: u32,
    vcpus: u32,
    files: Vec<(&'a File, bool)>,
    /// Answers what the guest asks for: the file of this name.
    granted: Option<(&'a [u8], &'a File)>,
}

impl<'a> Setup<'a> {
    fn new(case: u32) -> Self {
        Self { case, vcpus: 2, files: Vec::new(), granted: None }
    }

    fn vcpus(self, vcpus: u32) -> Self {
        Self { vcpus, ..self }
    }

    fn file(mut self, file: &'a File, writable: bool) -> Self {
        self.files.push((file, writable));
        self
    }
}

/// What a run gave.
struct Ended {
    /// All calls but the last.
    calls: Vec<call::Kind>,
    /// What the last said.
    reply: Option<reply::Result>,
    result: Result<Stats, Error>,
}

impl Ended {
    /// The number that a case replies with if all its checks hold.
    #[track_caller]
    fn value(&self) -> u64 {
        match (&self.reply, &self.result) {
            (Some(reply::Result::Create(created)), Ok(_)) => created.virtual_size,
            (Some(reply::Result::Failure(failure)), _) => panic!("check in line {} of selftest.rs", failure.value),
            (reply, result) => panic!("reply {reply:?}, result {result:?}"),
        }
    }

    #[track_caller]
    fn stats(&self) -> Stats {
        *self.result.as_ref().expect("the run ended well")
    }

    #[track_caller]
    fn error(self) -> Error {
        assert!(self.reply.is_none(), "reply {:?}", self.reply);
        self.result.expect_err("the run failed")
    }
}

fn run(setup: &Setup<'_>) -> Ended {
    let mut ended = Ended { calls: Vec::new(), reply: None, result: Err(Error::Usage("not run")) };
    ended.result = serve(setup, &mut ended.calls, &mut ended.reply);
    ended
}

fn serve(setup: &Setup<'_>, calls: &mut Vec<call::Kind>, reply: &mut Option<reply::Result>) -> Result<Stats, Error> {
    let settings = Settings {
        vcpus: setup.vcpus,
        memory: 128 << 20,
        time_limit: Some(Duration::from_secs(60)),
        ..Settings::default()
    };
    let mut sandbox = Sandbox::spawn(SELFTEST, &settings)?;
    for (file, writable) in &setup.files {
        sandbox.grant(file.as_fd(), *writable)?;
    }
    let image = Source { device: setup.case, ..Source::default() };
    let info = InfoRequest { image, ..InfoRequest::default() };
    sandbox.start(&Request { operation: Some(Operation::Info(info)) }.encode_to_vec())?;
    loop {
        let (bytes, expects_answer) = match sandbox.next_event()? {
            Event::Message { bytes, expects_answer } => (bytes, expects_answer),
            Event::Exited(report) => return Ok(report.stats),
        };
        let call = Call::decode(&bytes[..]).expect("a call").kind.expect("a kind of call");
        let answer = match &call {
            call::Kind::Open(request) => Some(open(&mut sandbox, setup, request)?.encode_to_vec()),
            call::Kind::Pace(_) => Some(Vec::new()),
            _ => None,
        };
        assert_eq!(expects_answer, answer.is_some(), "{call:?}");
        if let Some(answer) = answer {
            sandbox.answer(&answer)?;
        }
        match call {
            call::Kind::Done(done) => *reply = done.result,
            other => calls.push(other),
        }
    }
}

fn open(sandbox: &mut Sandbox, setup: &Setup<'_>, request: &OpenFile) -> Result<OpenAnswer, Error> {
    match setup.granted {
        Some((name, file)) if name == request.name => {
            let granted = sandbox.grant(file.as_fd(), false)?;
            let Granted { device, len, flags, allocated } = granted;
            Ok(OpenAnswer { granted: true, device, len, flags: flags.bits(), allocated })
        }
        _ => Ok(OpenAnswer::default()),
    }
}

fn file_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().expect("a temporary file");
    file.write_all_at(bytes, 0).expect("room for it");
    file
}

fn contents(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 253) as u8).collect()
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().map(|&byte| u64::from(byte)).sum()
}

fn replies() {
    let ended = run(&Setup::new(0).vcpus(1));
    assert_eq!(ended.value(), 0);
    // The reply and the end: whatever else costs an exit is a mistake of the runtime.
    assert_eq!(ended.stats().exits(), 2);
}

fn every_request_works() {
    let bytes = pattern(100_000);
    let (from, to) = (file_of(&bytes), file_of(b""));
    let ended = run(&Setup::new(1).vcpus(1).file(&from, false).file(&to, true));
    assert_eq!(ended.value(), 100_000);
    assert_eq!(contents(&from).unwrap(), bytes);
    let written = contents(&to).unwrap();
    let mut wanted: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
    wanted[1..3].fill(0);
    wanted.resize(108_192, 0);
    assert!(written == wanted);
    // The first read; the write; what lies inside the file only after it; likewise after its growth; the read past the end.
    assert_eq!(ended.stats().kicks, 5);
}

fn vcpus_wait_for_each_other() {
    for vcpus in [1, 2, 3, 4] {
        assert_eq!(run(&Setup::new(2).vcpus(vcpus)).value(), u64::from(vcpus));
    }
}

fn vcpus_read_at_once() {
    let bytes = pattern(5_000_001);
    let file = file_of(&bytes);
    for vcpus in [1, 2, 4] {
        let ended = run(&Setup::new(3).vcpus(vcpus).file(&file, false));
        assert_eq!(ended.value(), sum(&bytes), "{vcpus} vCPUs");
    }
}

fn holes_are_seen() {
    let file = file_of(b"");
    file.set_len(8 << 20).unwrap();
    file.write_all_at(&[1; 4096], 4 << 20).unwrap();
    let ended = run(&Setup::new(4).vcpus(1).file(&file, false));
    // A file system allocates in blocks of its own size.
    assert!((4096..=1 << 20).contains(&ended.value()), "{} bytes of data", ended.value());
    assert_eq!(ended.stats().kicks, 1);
}

fn copies_leave_zeroes_out() {
    let mut bytes = vec![0; 40_960];
    bytes[8192..8200].fill(7);
    let (from, to) = (file_of(&bytes), file_of(&[0xee; 4096]));
    let ended = run(&Setup::new(5).vcpus(1).file(&from, false).file(&to, true));
    assert_eq!(ended.value(), 49_152);
    let written = contents(&to).unwrap();
    assert!(written[..4096].iter().all(|&byte| byte == 0xee), "zeroes are left out");
    assert_eq!(written[8192..12_288], bytes[8192..12_288]);
    assert!(written[12_288..45_056].iter().all(|&byte| byte == 0));
    assert_eq!(written[45_056..], bytes[..4096]);
}

fn files_are_asked_for() {
    let bytes = pattern(5000);
    let file = file_of(&bytes);
    let ended = run(&Setup { granted: Some((b"granted", &file)), ..Setup::new(6).vcpus(1) });
    assert_eq!(ended.value(), sum(&bytes));
    assert_eq!(ended.calls.len(), 2);
}

fn memory_is_refused_and_reused() {
    assert_eq!(run(&Setup::new(7).vcpus(1)).value(), 1_000_000);
}

fn batches_are_split_and_joined() {
    let bytes = pattern(40 << 20);
    let file = file_of(&bytes);
    let ended = run(&Setup::new(8).vcpus(1).file(&file, false));
    assert_eq!(ended.value(), sum(&bytes));
    // 1000 pieces at 42 a turn; 50 neighbours; 40 MiB in one turn.
    assert_eq!(ended.stats().kicks, 24 + 1 + 1);
}

fn failures_come_back() {
    let (from, to) = (file_of(b"source"), file_of(b""));
    let ended = run(&Setup::new(9).vcpus(1).file(&from, false).file(&to, true));
    assert_ne!(ended.value(), 0, "the host's error number");
    assert_eq!(contents(&from).unwrap(), b"source");
    assert_eq!(contents(&to).unwrap(), b"firstsecond");
}

fn messages_arrive() {
    let ended = run(&Setup::new(10).vcpus(1));
    assert_eq!(ended.value(), 5);
    let done = |call: &call::Kind| match call {
        call::Kind::Progress(progress) => progress.done,
        call::Kind::Pace(progress) => 100 + progress.done,
        call::Kind::Warning(failure) => 1000 + failure.value,
        other => panic!("{other:?}"),
    };
    assert_eq!(ended.calls.iter().map(done).collect::<Vec<_>>(), [0, 1, 2, 103, 1007]);
}

fn jobs_follow_each_other() {
    assert_eq!(run(&Setup::new(11).vcpus(1)).value(), 200);
    assert_eq!(run(&Setup::new(11).vcpus(2)).value(), 300);
    assert_eq!(run(&Setup::new(11).vcpus(4)).value(), 500);
}

fn clusters_are_compressed() {
    let text: Vec<u8> = (0..200_000).flat_map(|i: u32| format!("{} ", i / 3).into_bytes()).collect();
    let file = file_of(&text);
    let ended = run(&Setup::new(12).file(&file, false));
    // Three times the text, by three codecs, is a fraction of it.
    assert!((1000..text.len() as u64).contains(&ended.value()), "{} of {}", ended.value(), text.len());
}

fn panic_tells_its_place() {
    let Error::GuestPanicked { log } = run(&Setup::new(20)).error() else { panic!("another error") };
    let text = String::from_utf8(log).unwrap();
    assert!(text.contains("index out of bounds: the len is 3 but the index is 3"), "{text}");
    assert!(text.contains("src/bin/selftest.rs:"), "{text}");
    // The same on every machine that builds it.
    let home = env::var("HOME").unwrap_or_default();
    assert!(home.len() < 2 || !text.contains(&home), "{text}");
}

fn exhausted_memory_is_told() {
    let Error::GuestPanicked { log } = run(&Setup::new(21)).error() else { panic!("another error") };
    let text = String::from_utf8(log).unwrap();
    assert!(text.contains("out of guest memory"), "{text}");
}

fn stack_overflow_crashes() {
    assert_crash(22);
}

fn broken_rules_end_the_machine() {
    for case in (30..=37).chain(40..=43) {
        assert_crash(case);
    }
}

fn assert_crash(case: u32) {
    match run(&Setup::new(case)).error() {
        Error::GuestCrashed { vcpu: 0, .. } => {}
        other => panic!("case {case}: {other:?}"),
    }
}

fn other_doorbells_end_the_machine() {
    for case in [38, 39] {
        match run(&Setup::new(case)).error() {
            Error::GuestMisbehaved(_) | Error::GuestCrashed { .. } => {}
            other => panic!("case {case}: {other:?}"),
        }
    }
}
