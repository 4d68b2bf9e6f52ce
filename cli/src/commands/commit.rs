//! `commit`.

use std::fs::canonicalize;

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{Cause, CommitRequest, OpenFile, Progress};

use super::{CommandLine, Settings, is_cache_mode};
use crate::args::{Key, Opt};
use crate::creation::seed;
use crate::edit::{Attendant, Edit};
use crate::files::{Files, Origin};
use crate::image_opts::ImageSpec;
use crate::messages;
use crate::open::join_name;
use crate::output::progress::ProgressLine;
use crate::pace::Pace;
use crate::problem::Problem;
use crate::program::{Fail, Outcome, Program, print};
use crate::sandbox::{Granted, Machine};
use crate::size;

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::flag(Key::Progress, b'p', "progress"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::value(Key::TargetCache, b't', "cache"),
    Opt::flag(Key::Drop, b'd', "drop"),
    Opt::value(Key::Base, b'b', "base"),
    Opt::value(Key::Rate, b'r', "rate"),
    Opt::long_value(Key::Object, "object"),
];

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    cache: Option<String>,
    base: Option<String>,
    keep: bool,
    rate: u64,
    progress: bool,
    quiet: bool,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Quiet => self.quiet = true,
            Key::Progress => self.progress = true,
            Key::Format => self.format = Some(value),
            Key::ImageOpts => self.image_opts = true,
            Key::TargetCache => self.cache = Some(value),
            Key::Drop => self.keep = true,
            Key::Base => {
                self.base = Some(value);
                self.keep = true;
            }
            Key::Rate => self.rate = size::parse_named("rate limit", &value, 0, i64::MAX as u64)?,
            _ => {}
        }
        Ok(())
    }
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let help = include_str!("help/commit.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    let [file] = operands.as_slice() else { return Err(Fail::Usage("Expecting one image file name".to_owned())) };
    if let Some(mode) = arguments.cache.as_deref().filter(|mode| !is_cache_mode(mode)) {
        return Err(format!("Invalid cache option: {mode}").into());
    }
    let image = ImageSpec::of_operand(file, arguments.image_opts, arguments.format.as_deref())?;
    let edit =
        Edit { settings: &settings, image: &image, writable: true, force_share: false, other: None, alone: false };
    let show = settings.progress(arguments.progress, arguments.quiet);
    let threads = settings.limits.vcpus();
    let mut attendant = Committing {
        base: arguments.base.as_deref(),
        problem: None,
        asked: false,
        line: ProgressLine::prepare(show),
        pace: Pace::start(arguments.rate),
    };
    let request = CommitRequest {
        keep: arguments.keep,
        flush: arguments.cache.as_deref() != Some("unsafe"),
        seed: seed(),
        threads,
        progress: attendant.line.is_visible(),
        rate_limit: arguments.rate,
        ..CommitRequest::default()
    };
    let done =
        edit.run_attended(threads, |image, _| Operation::Commit(CommitRequest { image, ..request }), &mut attendant);
    if done.is_ok() {
        attendant.line.begin();
    }
    let fail = match done {
        Ok(Ok(_)) => {
            attendant.line.complete();
            drop(attendant);
            return if arguments.quiet { Ok(()) } else { print("Image committed.\n") };
        }
        Ok(Err(failure)) if matches!(failure.cause(), Cause::BaseNotFound | Cause::NoBacking) => {
            let not_found = || messages::motion::commit(arguments.base.as_deref(), &image.given, &failure);
            attendant.problem.take().unwrap_or_else(not_found)
        }
        Ok(Err(failure)) => messages::motion::commit(arguments.base.as_deref(), &image.given, &failure),
        Err(problem) => problem,
    };
    drop(attendant);
    Err(fail.into())
}

/// Decides which image of the chain is written.
struct Committing<'a> {
    /// `-b`; otherwise it is the one right below.
    base: Option<&'a str>,
    /// Why it is not.
    problem: Option<Problem>,
    asked: bool,
    line: ProgressLine,
    pace: Pace,
}

impl Committing<'_> {
    /// Is this the image that is meant?
    fn is_base(&self, files: &Files, wanted: &OpenFile) -> bool {
        let Some(referrer) = files.get(wanted.referrer) else { return false };
        match self.base {
            None => referrer.origin == Origin::Operator,
            Some(base) if let Some(name) = referrer.named_below() => base == name,
            Some(base) => {
                let name = join_name(&referrer.name, &String::from_utf8_lossy(&wanted.name));
                let path = |name: &str| canonicalize(name).ok();
                name == base || path(&name).is_some_and(|found| path(&join_name(&referrer.name, base)) == Some(found))
            }
        }
    }
}

impl Attendant for Committing<'_> {
    fn open(&mut self, files: &mut Files, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted> {
        if self.asked || !self.is_base(files, wanted) {
            return None;
        }
        match files.open_base(machine, wanted)? {
            Ok(granted) => {
                self.asked = true;
                Some(granted)
            }
            Err(problem) => {
                self.asked = true;
                self.problem = Some(problem);
                None
            }
        }
    }

    fn progress(&mut self, progress: &Progress) {
        self.line.update(progress.done, progress.total);
    }

    fn pace(&mut self, progress: &Progress) {
        self.pace.keep(progress.done);
    }
}
