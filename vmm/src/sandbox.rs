//! The caller's side of a run.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::limits::{LOG_BYTES, MAX_DEVICES, MAX_MESSAGE_BYTES, MAX_REQUEST_MESSAGE_BYTES};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::process::Signal;
use zerocopy::{FromBytes, IntoBytes};

use crate::config::Settings;
use crate::elf::Elf;
use crate::error::{Error, KvmStep, Misbehaviour, Registers};
use crate::faults::{FaultRule, MAX_FAULT_RULES, RawRule};
use crate::jail::process::{self, Process};
use crate::layout::Layout;
use crate::monitor::{self, Plan};
use crate::rawio;
use crate::stats::{DeviceTraffic, Report, Stats};
use crate::virtio::NbdExport;
use crate::watchdog::{Progress, Watchdog};
use crate::wire::{Cause, Channel, Failure, Header, Kind, Reason};

/// One run of one guest, in a process of its own.
///
/// [`spawn`](Self::spawn), then [`grant`](Self::grant) files, [`start`](Self::start) with a request, and take
/// [`next_event`](Self::next_event)s until [`Event::Exited`]. When that has come, the monitor process has closed all granted
/// files, so no lock on them is left behind.
///
/// Dropping a sandbox that has not exited kills its process and waits for its end. After [`Event::Exited`] the process ends by
/// itself, without being waited for.
#[derive(Debug)]
pub struct Sandbox {
    channel: Channel,
    process: Process,
    progress: Arc<Progress>,
    watchdog: Watchdog,
    settings: Settings,
    state: State,
    granted: u32,
}

/// What the caller may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Grant files, start.
    Fresh,
    /// Wait for events.
    Running,
    /// Grant files, give an answer of at most so many bytes.
    Asked(usize),
    /// Nothing more.
    Ended,
}

/// What a run has to tell.
#[derive(Debug)]
pub enum Event {
    /// A message of the guest: untrusted bytes, at most 1 MiB.
    Message {
        /// The bytes.
        bytes: Vec<u8>,
        /// The guest waits for an [`answer`](Sandbox::answer).
        expects_answer: bool,
    },
    /// The run is over. Whether it did what it should is in the messages.
    Exited(Box<Report>),
}

/// A part of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Where it begins, bytes.
    pub offset: u64,
    /// Its length in bytes, which stays; `None`: to the end of the file, and with it.
    pub len: Option<u64>,
}

/// A granted file, as the guest knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    /// Its number.
    pub device: u32,
    /// Its length in bytes.
    pub len: u64,
    /// Its properties.
    pub flags: DeviceFlags,
    /// Bytes of disk space that it takes; all ones if nobody knows.
    pub allocated: u64,
}

impl Sandbox {
    /// Starts the monitor process, which builds the machine for the ELF program `guest` while the caller goes on.
    ///
    /// The calling process is forked and should have one thread. What goes wrong in the new process (no `/dev/kvm`) is
    /// reported by the first call that hears of it. The process ends when the calling thread ends.
    pub fn spawn(guest: &'static [u8], settings: &Settings) -> Result<Self, Error> {
        let spawned = Instant::now();
        let elf = Elf::parse(guest).map_err(Error::Guest)?;
        let layout = Layout::new(&elf, settings.vcpus, settings.memory)?;
        let progress = Arc::new(Progress::new()?);
        let debug = settings.debug;
        let &Settings { vectors, user, cpu_limit, read_only, .. } = settings;
        let plan = Plan {
            guest,
            elf,
            layout,
            progress: progress.clone(),
            spawned,
            vectors,
            user,
            cpu_limit,
            read_only,
            debug,
        };
        let (channel, process) = process::fork(debug, |channel| monitor::run(plan, channel)).map_err(Error::Process)?;
        Ok(Self {
            channel,
            process,
            progress,
            watchdog: Watchdog::new(settings),
            settings: settings.clone(),
            state: State::Fresh,
            granted: 0,
        })
    }

    /// Gives the guest an open file: before the start, or before the answer to a message that expects one.
    ///
    /// `file` must be open for reading, and for writing if `writable`. Without `writable` the guest can't write it even if
    /// it's open for writing.
    pub fn grant(&mut self, file: BorrowedFd<'_>, writable: bool) -> Result<Granted, Error> {
        self.grant_part(file, writable, Window::default())
    }

    /// The same for a part of a file: the guest reaches nothing else of it.
    pub fn grant_part(&mut self, file: BorrowedFd<'_>, writable: bool, window: Window) -> Result<Granted, Error> {
        self.may_grant()?;
        let stat = fstat(file)?;
        let mut flags = if writable { DeviceFlags::WRITABLE } else { DeviceFlags::empty() };
        let len = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
            FileType::BlockDevice => {
                flags |= DeviceFlags::BLOCK_DEVICE;
                rawio::block_device_len(file)?
            }
            _ => return Err(Error::NotAFile),
        };
        let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        let header = Header { value: len, allocated, flags: flags.bits(), ..Header::new(Kind::Grant, 0) };
        self.hand_over(header, file, window, flags)
    }

    fn may_grant(&self) -> Result<(), Error> {
        match self.state {
            State::Fresh | State::Asked(_) if (self.granted as usize) < MAX_DEVICES => Ok(()),
            State::Fresh | State::Asked(_) => Err(Error::TooManyFiles),
            _ => Err(Error::Usage("a file can't be granted now")),
        }
    }

    fn hand_over(
        &mut self,
        header: Header,
        file: BorrowedFd<'_>,
        window: Window,
        mut flags: DeviceFlags,
    ) -> Result<Granted, Error> {
        let outside = Error::Usage("a part outside of what a file may hold");
        let base = window.offset;
        let reach =
            base.checked_add(window.len.unwrap_or(0)).filter(|end| i64::try_from(*end).is_ok()).ok_or(outside)?;
        // A file that ends inside of its last sector is as long as its window says, but has no more bytes.
        let end = if window.len.is_some() { header.value.min(reach) } else { header.value };
        let fixed = window.len.is_some();
        self.send(&Header { base, value: end.max(base), fixed: fixed.into(), ..header }, &[], Some(file))?;
        let device = self.granted;
        self.granted += 1;
        flags.set(DeviceFlags::BLOCK_DEVICE, fixed || flags.contains(DeviceFlags::BLOCK_DEVICE));
        Ok(Granted { device, len: end.saturating_sub(base), flags, allocated: header.allocated })
    }

    /// Gives the guest an NBD export, as a device that can't grow: before the start, or before the answer to a message that
    /// expects one. `socket` has left negotiation (simple replies, no structured ones), and nobody else uses it any more.
    pub fn grant_nbd(&mut self, socket: BorrowedFd<'_>, export: &NbdExport, writable: bool) -> Result<Granted, Error> {
        self.may_grant()?;
        let block = u16::try_from(export.min_block).ok().filter(|block| block.is_power_of_two() && *block <= 4096);
        let min_block = block.ok_or(Error::Usage("an NBD export with blocks of such a size"))?;
        let flags = DeviceFlags::BLOCK_DEVICE | if writable { DeviceFlags::WRITABLE } else { DeviceFlags::empty() };
        let (value, transmission) = (export.len, export.flags);
        let header = Header {
            value,
            allocated: u64::MAX,
            flags: flags.bits(),
            transmission,
            min_block,
            ..Header::new(Kind::Grant, 0)
        };
        self.hand_over(header, socket, Window::default(), flags)
    }

    /// Lets requests on the file that was granted last fail.
    pub fn let_fail(&mut self, rules: &[FaultRule]) -> Result<(), Error> {
        if rules.len() > MAX_FAULT_RULES || self.granted == 0 {
            return Err(Error::Usage("more rules for faults than a file may have"));
        }
        let rules: Vec<RawRule> = rules.iter().map(RawRule::from).collect();
        self.send(&Header::new(Kind::Faults, size_of_val(&rules[..])), rules.as_bytes(), None)
    }

    /// Starts the guest with `request`, of at most 256 KiB.
    pub fn start(&mut self, request: &[u8]) -> Result<(), Error> {
        if self.state != State::Fresh {
            return Err(Error::Usage("already started"));
        }
        if request.len() > MAX_REQUEST_MESSAGE_BYTES {
            return Err(Error::RequestTooLarge { len: request.len() });
        }
        self.send(&Header::new(Kind::Start, request.len()), request, None)?;
        self.state = State::Running;
        Ok(())
    }

    /// Waits for what the run has to tell next.
    pub fn next_event(&mut self) -> Result<Event, Error> {
        match self.state {
            State::Running => {}
            State::Fresh => return Err(Error::Usage("not started")),
            State::Asked(_) => return Err(Error::Usage("the guest waits for an answer")),
            State::Ended => return Err(Error::Usage("the run is over")),
        }
        let event = self.receive();
        match &event {
            Ok(Event::Message { .. }) => {}
            Ok(Event::Exited(_)) => self.state = State::Ended,
            Err(_) => {
                self.state = State::Ended;
                self.process.kill();
            }
        }
        event
    }

    /// Answers the last message, which expects it.
    pub fn answer(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let State::Asked(room) = self.state else { return Err(Error::Usage("no answer is expected")) };
        if bytes.len() > room {
            return Err(Error::AnswerTooLarge { len: bytes.len(), room });
        }
        self.send(&Header::new(Kind::Answer, bytes.len()), bytes, None)?;
        self.state = State::Running;
        Ok(())
    }

    /// Sends a frame. If the monitor is gone, its last words are the error.
    fn send(&mut self, header: &Header, body: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let Err(errno) = self.channel.send(header, body, file) else { return Ok(()) };
        let error = match self.receive() {
            Err(error) => error,
            Ok(_) => errno.into(),
        };
        self.state = State::Ended;
        self.process.kill();
        Err(error)
    }

    /// Receives a frame.
    fn receive(&mut self) -> Result<Event, Error> {
        let Self { channel, watchdog, progress, process, .. } = self;
        let patience = || watchdog.wait(channel.socket(), progress);
        let lost = |error: Error, process: &mut Process| match error {
            Error::Io(error) if error.raw_os_error() == Some(Errno::CONNRESET.raw_os_error()) => match process.wait() {
                Some(status) if status & 0x7f == Signal::XCPU.as_raw() => Error::TooMuchWork,
                status => Error::MonitorLost { status },
            },
            error => error,
        };
        let (header, _) = channel.receive(patience).map_err(|error| lost(error, process))?;
        let limit = match header.kind() {
            Some(Kind::Message) => MAX_MESSAGE_BYTES,
            Some(Kind::Exited) => size_of::<Stats>() + MAX_DEVICES * size_of::<DeviceTraffic>(),
            Some(Kind::Failed) => size_of::<Failure>() + LOG_BYTES,
            _ => 0,
        };
        // The monitor might be taken over: what it says is checked as well.
        if header.len as usize > limit {
            return Err(Error::MonitorLost { status: None });
        }
        let mut body = vec![0; header.len as usize];
        channel.receive_body(&mut body, patience).map_err(|error| lost(error, process))?;
        match header.kind() {
            Some(Kind::Message) => {
                let room = usize::try_from(header.value).unwrap_or(0).min(MAX_REQUEST_MESSAGE_BYTES);
                self.state = if room > 0 { State::Asked(room) } else { State::Running };
                Ok(Event::Message { bytes: body, expects_answer: room > 0 })
            }
            Some(Kind::Exited) => {
                let lost = Error::MonitorLost { status: None };
                let Ok((stats, devices)) = Stats::read_from_prefix(&body) else { return Err(lost) };
                let Ok(devices) = <[DeviceTraffic]>::ref_from_bytes(devices) else { return Err(lost) };
                Ok(Event::Exited(Box::new(Report { stats, devices: devices.to_vec() })))
            }
            Some(Kind::Failed) => {
                let (failure, log) =
                    Failure::read_from_prefix(&body).map_err(|_| Error::MonitorLost { status: None })?;
                Err(self.failure(&failure, log))
            }
            _ => Err(Error::MonitorLost { status: None }),
        }
    }

    /// The error behind a report.
    fn failure(&self, failure: &Failure, log: &[u8]) -> Error {
        let &Failure { reason: Reason { cause, vcpu, code, errno }, rip, cr2, rflags, general } = failure;
        let lost = Error::MonitorLost { status: None };
        if cause == Cause::Kvm as u32 {
            KvmStep::ALL.get(code as usize).map_or(lost, |&step| Error::Kvm { step, errno })
        } else if cause == Cause::Crashed as u32 {
            let registers = Registers { general, rip, rflags, cr2 };
            Error::GuestCrashed { vcpu, rip, cr2, registers: self.settings.debug.then(|| Box::new(registers)) }
        } else if cause == Cause::Panicked as u32 {
            Error::GuestPanicked { log: log.to_vec() }
        } else if cause == Cause::Misbehaved as u32 {
            Misbehaviour::ALL.get(code as usize).map_or(lost, |&what| Error::GuestMisbehaved(what))
        } else if cause == Cause::ExitCode as u32 {
            Error::GuestFailed { code }
        } else {
            lost
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        match self.state {
            State::Ended => self.process.reap(),
            _ => {
                self.process.kill();
            }
        }
    }
}
