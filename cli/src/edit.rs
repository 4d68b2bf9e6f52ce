//! Commands that change an image in place: the files, the run of the guest, and what is said if the image can't be opened.

use std::io::Write;

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{
    Cause, CheckFinding, EditReply, Failure, FileRole, Format, OpenFile, Progress, Request, Source, Step, reply,
};

use crate::commands::Settings;
use crate::commands::check::tell;
use crate::files::{Access, Files};
use crate::image_opts::ImageSpec;
use crate::lock::Purpose;
use crate::problem::Problem;
use crate::sandbox::{self, Granted, Host, Machine, Vm, Work};
use crate::{guest, messages};

/// The image and how it is opened.
#[derive(Clone, Copy, Debug)]
pub struct Edit<'a> {
    /// Settings of the run.
    pub settings: &'a Settings,
    /// The image.
    pub image: &'a ImageSpec,
    /// It is changed; otherwise it is only read.
    pub writable: bool,
    /// `-U`.
    pub force_share: bool,
    /// Another image, which is read.
    pub other: Option<&'a ImageSpec>,
    /// The images below it are not opened.
    pub alone: bool,
}

impl Edit<'_> {
    /// Runs a request, made of the opened images. Inside is what the guest did or why it could not; a raw image that nobody
    /// called raw is warned of, as qemu-img does.
    ///
    /// # Errors
    /// An image that can't be opened, or a run that came to no end. The message is complete.
    pub fn run(
        &self,
        request: impl FnOnce(Source, Option<Source>) -> Operation,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Result<EditReply, Failure>, Problem> {
        struct Told<'a>(&'a mut dyn FnMut(&Progress));
        impl Attendant for Told<'_> {
            fn progress(&mut self, progress: &Progress) {
                (self.0)(progress);
            }
        }
        // Flushes wait for storage, which may be slow.
        self.run_attended(1, request, &mut Told(progress))
    }

    /// The same by so many vCPUs, with `attendant` to serve the guest beside.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_attended(
        &self,
        vcpus: u32,
        request: impl FnOnce(Source, Option<Source>) -> Operation,
        attendant: &mut dyn Attendant,
    ) -> Result<Result<EditReply, Failure>, Problem> {
        let mut machine = Vm::spawn(guest::EDIT, &self.settings.limits, Work::Data(vcpus))?;
        let mut files = Files::new(self.settings.confinement()?);
        let device = self.open(&mut files, &mut machine).map_err(|problem| unopened(self.image, problem))?;
        self.check_alone(self.image)?;
        let read = Access { purpose: Purpose::Read, force_share: self.force_share };
        let other = self.other.map(|spec| match files.open_named(&mut machine, spec, read) {
            Ok(device) => self.check_alone(spec).map(|()| (device, spec)),
            Err(problem) => Err(unopened(spec, problem)),
        });
        let other = other.transpose()?;
        let readable = |device, spec| self.settings.readable(device, spec).map_err(|problem| unopened(spec, problem));
        let operation =
            request(readable(device, self.image)?, other.map(|(device, spec)| readable(device, spec)).transpose()?);
        let mut host = EditHost { files, access: read, attendant };
        let result = sandbox::run(&mut machine, &Request { operation: Some(operation) }, &mut host)?;
        let files = &host.files;
        match result {
            reply::Result::Edit(reply) => {
                self.warn_of_raw(reply.format());
                Ok(Ok(reply))
            }
            reply::Result::Failure(failure) if is_of_work(failure.step()) => {
                self.warn_of_raw(failure.format());
                Ok(Err(failure))
            }
            reply::Result::Failure(failure) => {
                self.warn_of_raw(failure.format());
                let (device, problem) = opening(files, &failure);
                let spec = other.filter(|(other, _)| *other == device).map_or(self.image, |(_, spec)| spec);
                Err(host.attendant.unopened(device, &problem).unwrap_or_else(|| unopened(spec, problem)))
            }
            _ => Err(Problem::new("The sandboxed parser sent something that makes no sense")),
        }
    }

    /// If an image is looked at alone, nothing is said of others.
    fn check_alone(&self, spec: &ImageSpec) -> Result<(), Problem> {
        match self.alone {
            true => spec.below.check_unused(spec.format).map_err(|problem| unopened(spec, problem)),
            false => Ok(()),
        }
    }

    fn open(&self, files: &mut Files, machine: &mut dyn Machine) -> Result<u32, Problem> {
        if !self.writable {
            let access = Access { purpose: Purpose::Read, force_share: self.force_share };
            return files.open_named(machine, self.image, access);
        }
        if self.force_share {
            return Err(Problem::new("force-share=on can only be used with read-only images"));
        }
        files.open_to_change(machine, self.image)
    }

    /// See [`warn_of_raw`].
    pub fn warn_of_raw(&self, format: Format) {
        if self.writable {
            warn_of_raw(self.image, format);
        }
    }
}

/// Warns of an image that is changed, that turned out to be raw, and that nobody called raw: what a guest writes into it may make it look
/// like another format.
pub fn warn_of_raw(image: &ImageSpec, format: Format) {
    if image.format == Format::Unknown && format == Format::Raw {
        // Nothing can be done about a standard error that is closed.
        let _ = std::io::stderr().write_all(messages::edit::raw_guessed(&image.shown).as_bytes());
    }
}

fn unopened(spec: &ImageSpec, problem: Problem) -> Problem {
    problem.within(format!("Could not open '{}'", spec.given))
}

/// The image that the operator named, and what is wrong with it or with one that it needs.
fn opening(files: &Files, failure: &Failure) -> (u32, Problem) {
    if failure.cause() == Cause::OpenRefused
        && let Some(refused) = files.refusal_from_the_top()
    {
        return refused;
    }
    files.seen_from_the_top(failure.device.unwrap_or_default(), messages::open_failure(failure))
}

/// Steps at which everything is open.
fn is_of_work(step: Step) -> bool {
    matches!(step, Step::Edit | Step::ReadMetadata | Step::ReadOld | Step::ReadNew | Step::Write | Step::Empty)
}

/// What a command does for the guest, beside opening what images name.
pub trait Attendant {
    /// Opens a file that the operator named, in a role of its own; `None` if it is not granted.
    fn open(&mut self, files: &mut Files, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted> {
        let _ = (files, machine, wanted);
        None
    }

    /// What is said if an image of the operator's can't be opened; `None`: as usual.
    fn unopened(&self, device: u32, problem: &Problem) -> Option<Problem> {
        let _ = (device, problem);
        None
    }

    /// Takes note of progress.
    fn progress(&mut self, progress: &Progress);

    /// Takes note of progress, and delays the work to keep a rate.
    fn pace(&mut self, progress: &Progress) {
        let _ = progress;
    }
}

struct EditHost<'a> {
    files: Files,
    access: Access,
    attendant: &'a mut dyn Attendant,
}

impl Host for EditHost<'_> {
    fn open(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted> {
        match wanted.role() {
            FileRole::Target | FileRole::TargetData | FileRole::TargetExtent => None,
            FileRole::NewBacking | FileRole::CommitBase => self.attendant.open(&mut self.files, machine, wanted),
            _ => self.files.open_embedded(machine, wanted, self.access),
        }
    }

    fn progress(&mut self, progress: &Progress) {
        self.attendant.progress(progress);
    }

    fn pace(&mut self, progress: &Progress) {
        self.attendant.pace(progress);
    }

    fn warning(&mut self, _: &Failure) {}

    fn findings(&mut self, findings: &[CheckFinding]) {
        tell(findings);
    }
}
