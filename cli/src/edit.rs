//! Commands that change an image in place: the files, the run of the guest, and what is said if the image can't be opened.

use std::io::Write;

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{
    Cause, EditReply, Failure, FileRole, Format, OpenFile, Progress, Request, Source, Step, reply,
};

use crate::commands::Settings;
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
        // Flushes wait for storage, which may be slow.
        let mut machine = Vm::spawn(guest::EDIT, &self.settings.limits, Work::Data(1))?;
        let mut files = Files::new(self.settings.confinement()?);
        let device = self.open(&mut files, &mut machine).map_err(|problem| unopened(self.image, problem))?;
        let read = Access { purpose: Purpose::Read, force_share: self.force_share };
        let other = self.other.map(|spec| match files.open_named(&mut machine, spec, read) {
            Ok(device) => Ok((device, spec)),
            Err(problem) => Err(unopened(spec, problem)),
        });
        let other = other.transpose()?;
        let source = self.settings.source(device, self.image.format);
        let operation = request(source, other.map(|(device, spec)| self.settings.source(device, spec.format)));
        let mut host = EditHost { files, access: read, progress };
        let result = sandbox::run(&mut machine, &Request { operation: Some(operation) }, &mut host)?;
        let files = host.files;
        match result {
            reply::Result::Edit(reply) => {
                self.warn_of_raw(reply.format());
                Ok(Ok(reply))
            }
            reply::Result::Failure(failure) if failure.step() == Step::Edit => {
                self.warn_of_raw(failure.format());
                Ok(Err(failure))
            }
            reply::Result::Failure(failure) => {
                let (device, problem) = opening(&files, &failure);
                let spec = other.filter(|(other, _)| *other == device).map_or(self.image, |(_, spec)| spec);
                Err(unopened(spec, problem))
            }
            _ => Err(Problem::new("The sandboxed parser sent something that makes no sense")),
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

    /// Warns of an image that is changed, that turned out to be raw, and that nobody called raw: what a guest writes into it may
    /// make it look like another format.
    pub fn warn_of_raw(&self, format: Format) {
        if self.writable && self.image.format == Format::Unknown && format == Format::Raw {
            // Nothing can be done about a standard error that is closed.
            let _ = std::io::stderr().write_all(messages::edit::raw_guessed(&self.image.shown).as_bytes());
        }
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

struct EditHost<'a> {
    files: Files,
    access: Access,
    progress: &'a mut dyn FnMut(&Progress),
}

impl Host for EditHost<'_> {
    fn open(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted> {
        match wanted.role() {
            FileRole::Target | FileRole::TargetData => None,
            _ => self.files.open_embedded(machine, wanted, self.access),
        }
    }

    fn progress(&mut self, progress: &Progress) {
        (self.progress)(progress);
    }

    fn pace(&mut self, _: &Progress) {}

    fn warning(&mut self, _: &Failure) {}
}
