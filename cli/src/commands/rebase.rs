//! `rebase`.

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{Format, InfoRequest, OpenFile, Progress, RebaseRequest};

use super::{CommandLine, Settings, info, is_cache_mode};
use crate::args::{Key, Opt};
use crate::edit::{Attendant, Edit, warn_of_raw};
use crate::files::{Access, Files, Record};
use crate::formats;
use crate::image_opts::ImageSpec;
use crate::lock::Purpose;
use crate::messages;
use crate::open::join_name;
use crate::output::progress::ProgressLine;
use crate::problem::Problem;
use crate::program::{Fail, Outcome, Program};
use crate::sandbox::{Granted, Machine};

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::flag(Key::Progress, b'p', "progress"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::value(Key::TargetCache, b't', "cache"),
    Opt::flag(Key::Compress, b'c', "compress"),
    Opt::value(Key::Backing, b'b', "backing"),
    Opt::value(Key::BackingFormat, b'F', "backing-format"),
    Opt::value(Key::SourceCache, b'T', "backing-cache"),
    Opt::flag(Key::BackingUnsafe, b'u', "backing-unsafe"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
    Opt::long_value(Key::Object, "object"),
];

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    cache: Option<String>,
    source_cache: Option<String>,
    backing: Option<String>,
    backing_format: Option<String>,
    only_name: bool,
    compress: bool,
    force_share: bool,
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
            Key::SourceCache => self.source_cache = Some(value),
            Key::Compress => self.compress = true,
            Key::Backing => self.backing = Some(value),
            Key::BackingFormat => self.backing_format = Some(value),
            Key::BackingUnsafe => self.only_name = true,
            Key::ForceShare => self.force_share = true,
            _ => {}
        }
        Ok(())
    }

    fn backing(&self) -> &str {
        self.backing.as_deref().unwrap_or_default()
    }
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let help = include_str!("help/rebase.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    let [file] = operands.as_slice() else { return Err(Fail::Usage("Expecting one image file name".to_owned())) };
    if !arguments.only_name && arguments.backing.is_none() {
        return Err(Fail::Usage("Must specify backing file (-b) or use unsafe mode (-u)".to_owned()));
    }
    let mut progress = ProgressLine::start(settings.progress(arguments.progress, arguments.quiet));
    if let Err(fail) = rebase(&settings, &arguments, file, &mut progress) {
        // Before the line feed that ends the progress line, as qemu-img does.
        program.report(&fail, Some("rebase"));
        return Err(Fail::Said);
    }
    progress.complete();
    Ok(())
}

fn rebase(settings: &Settings, arguments: &Arguments, file: &str, progress: &mut ProgressLine) -> Outcome {
    for (what, mode) in [("cache", &arguments.cache), ("source cache", &arguments.source_cache)] {
        if let Some(mode) = mode.as_deref().filter(|mode| !is_cache_mode(mode)) {
            return Err(format!("Invalid {what} option: {mode}").into());
        }
    }
    let image = ImageSpec::of_operand(file, arguments.image_opts, arguments.format.as_deref())?;
    let name = arguments.backing();
    let format = match arguments.backing_format.as_deref() {
        None => Format::Unknown,
        Some(text) if formats::driver(text).is_none() => {
            // Once the image is known to be good.
            let access = Access { purpose: Purpose::Read, force_share: false };
            let described = info::Run::start(settings, &image, InfoRequest::default(), access);
            warn_of_raw(&image, described.map_err(info::Unopened::complete)?.image().format());
            return Err(format!("Invalid format name: '{text}'").into());
        }
        Some(text) => Format::of_driver(text.as_bytes()).unwrap_or(Format::Unknown),
    };
    let full = join_name(&image.file, name);
    // One that can't be understood is told of when it is to be opened.
    let new = ImageSpec::of_new_backing(&full, arguments.backing_format.as_deref()).ok();
    let request = RebaseRequest {
        new_below: new.map(|new| settings.below(&new)).transpose()?.unwrap_or_default(),
        name: name.as_bytes().to_vec(),
        format_name: arguments.backing_format.clone().unwrap_or_default().into_bytes(),
        format: format.into(),
        only_name: arguments.only_name,
        compress: arguments.compress,
        flush: arguments.cache.as_deref() != Some("unsafe"),
        threads: settings.limits.vcpus(),
        progress: progress.is_visible(),
        ..RebaseRequest::default()
    };
    let mut attendant = Rebasing {
        image: &image,
        name,
        full,
        format: arguments.backing_format.as_deref(),
        access: Access { purpose: Purpose::Read, force_share: arguments.force_share },
        device: None,
        refused: None,
        progress,
    };
    // `-U` is about the backing images: the image itself is written.
    let edit =
        Edit { settings, image: &image, writable: true, force_share: false, other: None, alone: arguments.only_name };
    let threads = request.threads;
    let done =
        edit.run_attended(threads, |image, _| Operation::Rebase(RebaseRequest { image, ..request }), &mut attendant)?;
    match done {
        Ok(_) => Ok(()),
        Err(failure) => {
            if messages::motion::is_of_recording(&failure) {
                attendant.progress.complete();
            }
            Err(messages::motion::rebase(arguments.backing.as_deref(), &failure).into())
        }
    }
}

/// Opens the new backing image.
struct Rebasing<'a> {
    /// The image that gets it.
    image: &'a ImageSpec,
    /// As typed.
    name: &'a str,
    /// As seen from where the image is named.
    full: String,
    format: Option<&'a str>,
    access: Access,
    device: Option<u32>,
    /// Why it is not opened.
    refused: Option<Problem>,
    progress: &'a mut ProgressLine,
}

impl Rebasing<'_> {
    fn within(&self, problem: Problem) -> Problem {
        problem.within(format!("Could not open new backing file '{}'", self.name))
    }
}

impl Attendant for Rebasing<'_> {
    fn open(&mut self, files: &mut Files, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted> {
        let recorded = files.get(wanted.referrer).and_then(Record::recorded);
        let is_relative = join_name("/", self.name) != self.name;
        if let Some(shown) = self.image.shown_over(recorded).filter(|_| is_relative) {
            let text = format!("Cannot use relative backing file names for '{shown}'");
            self.refused = Some(Problem::new(text).within("Could not resolve backing filename"));
            return None;
        }
        // Without the name around it, which the specification of an image adds.
        let spec = ImageSpec::of_new_backing(&self.full, self.format);
        match spec.and_then(|spec| files.grant_image(machine, &spec, self.access)) {
            Ok(granted) => {
                self.device = Some(granted.device);
                Some(granted)
            }
            Err(problem) => {
                self.refused = Some(self.within(problem));
                None
            }
        }
    }

    fn unopened(&self, device: u32, problem: &Problem) -> Option<Problem> {
        let own = self.device == Some(device);
        self.refused.clone().or_else(|| own.then(|| self.within(problem.clone())))
    }

    fn progress(&mut self, progress: &Progress) {
        self.progress.update(progress.done, progress.total);
    }
}
