//! Commands that ask about images: the files, the run of the guest, and what is said if an image can't be opened.

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{
    Cause, CheckFinding, Failure, FileRole, MapRun, OpenFile, Progress, Request, Source, Step, reply,
};

use crate::commands::Settings;
use crate::files::{Access, Files};
use crate::guest;
use crate::image_opts::ImageSpec;
use crate::lock::Purpose;
use crate::messages;
use crate::problem::Problem;
use crate::sandbox::{self, Granted, Host, Machine, Vm, Work};

/// Why there is no answer.
#[derive(Debug)]
pub enum Unanswered {
    /// An image could not be opened. The message is complete.
    Unopened(Problem),
    /// The guest met this in its work.
    Failed(Failure),
    /// The run came to no end.
    Lost(Problem),
}

/// What a command makes of the guest's messages.
pub trait Listener {
    /// Runs of a disk, of `map`; the files tell the names of their devices.
    fn runs(&mut self, files: &Files, runs: &[MapRun]) {
        let _ = (files, runs);
    }

    /// How far the work is.
    fn progress(&mut self, progress: &Progress) {
        let _ = progress;
    }

    /// Faults of an image, of `check`.
    fn findings(&mut self, findings: &[CheckFinding]) {
        let _ = findings;
    }
}

/// Nobody listens.
pub struct Silence;

impl Listener for Silence {}

/// The images, and how they are opened.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Settings of the run.
    pub settings: &'a Settings,
    /// The images.
    pub images: &'a [&'a ImageSpec],
    /// `-U`.
    pub force_share: bool,
    /// They may be written.
    pub writable: bool,
    /// What kind of work it is.
    pub work: Work,
}

impl Query<'_> {
    /// Opens the images and runs the request made of them.
    ///
    /// # Errors
    /// See [`Unanswered`].
    pub fn ask(
        &self,
        request: impl FnOnce(&[Source]) -> Operation,
        listener: &mut dyn Listener,
    ) -> Result<reply::Result, Unanswered> {
        let Self { settings, images, force_share, writable, work } = *self;
        let spawn = if writable { Vm::spawn } else { Vm::spawn_to_read };
        let mut machine = spawn(guest::QUERY, &settings.limits, work).map_err(Unanswered::Lost)?;
        let mut files = Files::new(settings.confinement().map_err(Unanswered::Lost)?);
        let access = Access { purpose: Purpose::Read, force_share };
        let mut sources = Vec::new();
        for spec in images {
            let device = match writable {
                true if force_share => Err(Problem::new("force-share=on can only be used with read-only images")),
                true => files.open_to_change(&mut machine, spec),
                false => files.open_named(&mut machine, spec, access),
            };
            let device = device.map_err(|problem| unopened(spec, problem))?;
            sources.push(settings.readable(device, spec).map_err(|problem| unopened(spec, problem))?);
        }
        let operation = request(&sources);
        let mut host = QueryHost { files, access, listener };
        let result = sandbox::run(&mut machine, &Request { operation: Some(operation) }, &mut host);
        match result.map_err(Unanswered::Lost)? {
            reply::Result::Failure(failure) if failure.step() == Step::Open => {
                let (device, problem) = opening(&host.files, &failure);
                let spec = sources.iter().zip(images).find(|(source, _)| source.device == device);
                Err(match spec {
                    Some((_, spec)) => unopened(spec, problem),
                    None => Unanswered::Lost(problem),
                })
            }
            reply::Result::Failure(failure) => Err(Unanswered::Failed(failure)),
            result => Ok(result),
        }
    }
}

fn unopened(spec: &ImageSpec, problem: Problem) -> Unanswered {
    Unanswered::Unopened(problem.within(format!("Could not open '{}'", spec.given)))
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

struct QueryHost<'a> {
    files: Files,
    access: Access,
    listener: &'a mut dyn Listener,
}

impl Host for QueryHost<'_> {
    fn open(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted> {
        match wanted.role() {
            FileRole::Target | FileRole::TargetData => None,
            _ => self.files.open_embedded(machine, wanted, self.access),
        }
    }

    fn progress(&mut self, progress: &Progress) {
        self.listener.progress(progress);
    }

    fn pace(&mut self, _: &Progress) {}

    fn warning(&mut self, _: &Failure) {}

    fn runs(&mut self, runs: &[MapRun]) {
        self.listener.runs(&self.files, runs);
    }

    fn findings(&mut self, findings: &[CheckFinding]) {
        self.listener.findings(findings);
    }
}
