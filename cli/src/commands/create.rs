//! `create`.

use instar_guest_protocol::message::{
    Backing, Cause, CreateRequest, Failure, FileRole, Format, InfoRequest, OpenFile, Progress, Request, Source, Step,
    Target, reply, request,
};

use super::info::Run;
use super::{CommandLine, Settings};
use crate::args::{Key, Opt};
use crate::creation::{self, Creatable, Layout, creatable};
use crate::files::{Access, Files, Refusal};
use crate::formats;
use crate::image_opts::{ImageSpec, driver_format};
use crate::lock::Purpose;
use crate::open::{join_name, path_of};
use crate::options::{self, OptionList, Options};
use crate::problem::Problem;
use crate::program::{Fail, Outcome, Program, print};
use crate::sandbox::{self, Granted, Host, Machine, Vm, Work};
use crate::size;
use crate::target::NewTarget;
use crate::{guest, messages};

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::long_value(Key::Object, "object"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::value(Key::Backing, b'b', "backing"),
    Opt::value(Key::BackingFormat, b'F', "backing-format"),
    Opt::flag(Key::BackingUnsafe, b'u', "backing-unsafe"),
    Opt::value(Key::Options, b'o', "options"),
];

/// The backing image is only looked at: it may be in use, as with qemu-img.
const LOOK: Access = Access { purpose: Purpose::Describe, force_share: true };

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    quiet: bool,
    format: Option<String>,
    backing: Option<String>,
    backing_format: Option<String>,
    backing_unsafe: bool,
    options: OptionList,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Quiet => self.quiet = true,
            Key::Format => self.format = Some(value),
            Key::Backing => self.backing = Some(value),
            Key::BackingFormat => self.backing_format = Some(value),
            Key::BackingUnsafe => self.backing_unsafe = true,
            Key::Options => self.options.add(&value)?,
            _ => {}
        }
        Ok(())
    }

    fn format(&self) -> &str {
        self.format.as_deref().unwrap_or("raw")
    }
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let operands =
        line.walk(&mut settings, include_str!("help/create.txt"), |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    if arguments.options.wants_help() {
        let format = creatable(arguments.format())?;
        return print(&options::help(format, !operands.is_empty()));
    }
    let Some((name, rest)) = operands.split_first() else {
        return Err(Fail::Usage("Expecting image file name".to_owned()));
    };
    let size = rest.first().map(|size| size::parse_image_size(size)).transpose()?;
    if let Some(extra) = rest.get(1) {
        return Err(Fail::Usage(format!("Unexpected argument: {extra}")));
    }
    create(&settings, &arguments, name, size).map_err(|problem| Fail::Message(problem.within(name)))
}

/// Creates the image. Problems come without the image's name before them.
fn create(settings: &Settings, arguments: &Arguments, name: &str, size: Option<u64>) -> Result<(), Problem> {
    let creation = Creation::new(settings, arguments, name, size)?;
    let mut machine = Vm::spawn(guest::CREATE, &settings.limits, Work::Metadata)?;
    let mut files = Files::new(settings.confinement()?);
    let backing = creation.backing.as_ref().map(|backing| backing.grant(&mut files, &mut machine)).transpose()?;
    let mut target = Target { backing, ..creation.layout.wire.clone() };
    creation::vmdk::name_target(&mut target, name, false);
    let operation = request::Operation::Create(CreateRequest { target, size: creation.size });
    let format = creation.format();
    let mut host = CreateHost { files, target: NewTarget::new(name, &creation.layout)?, creation };
    let result = sandbox::run(&mut machine, &Request { operation: Some(operation) }, &mut host);
    // The machine goes first: nothing may write a file that is removed.
    drop(machine);
    match result? {
        reply::Result::Create(_) => {
            host.target.complete();
            Ok(())
        }
        reply::Result::Failure(failure) => Err(host.problem(&failure, format)),
        _ => Err(Problem::new("The sandboxed parser sent something that makes no sense")),
    }
}

/// What is to be created, checked as far as that is possible without looking into an image.
struct Creation {
    kind: Creatable,
    options: Options,
    layout: Layout,
    size: Option<u64>,
    backing: Option<NewBacking>,
    quiet: bool,
}

/// The backing image of a new image.
struct NewBacking {
    /// Name as it is stored.
    name: String,
    format: String,
    /// The image, unless it is not to be looked at.
    image: Option<ImageSpec>,
}

impl Creation {
    fn new(settings: &Settings, arguments: &Arguments, name: &str, size: Option<u64>) -> Result<Self, Problem> {
        let kind = creatable(arguments.format())?;
        if !name.is_empty() {
            path_of(name)?;
        }
        let mut options = Options::parse(kind, &arguments.options)?;
        if size.is_some() && options.number("size").is_some() {
            return Err(Problem::new("The image size must be specified only once"));
        }
        if let Some(size) = size {
            options.set_size(size);
        }
        if let Some(backing) = &arguments.backing
            && !options.set_text("backing_file", backing)
        {
            return Err(Problem::new(format!("Backing file not supported for file format '{}'", arguments.format())));
        }
        if let Some(format) = &arguments.backing_format
            && !options.set_text("backing_fmt", format)
        {
            let text = format!("Backing file format not supported for file format '{}'", arguments.format());
            return Err(Problem::new(text));
        }
        let backing = NewBacking::of(settings, &options, name, arguments.backing_unsafe)?;
        let size = options.number("size");
        if size.is_none() && backing.as_ref().is_none_or(|backing| backing.image.is_none()) {
            return Err(Problem::new("Image creation needs a size parameter"));
        }
        let layout = (kind.layout)(&options, &settings.objects);
        Ok(Self { kind, options, layout, size, backing, quiet: arguments.quiet })
    }

    fn format(&self) -> Format {
        self.kind.format
    }

    /// `Formatting …`, now that the size is known.
    fn announce(&mut self, name: &str, size: u64) -> Outcome {
        if self.size.is_none() {
            self.options.set_size(size);
        }
        match self.quiet {
            true => Ok(()),
            false => print(&self.options.formatting_line(name)),
        }
    }
}

impl NewBacking {
    fn of(settings: &Settings, options: &Options, target: &str, unseen: bool) -> Result<Option<Self>, Problem> {
        let Some(name) = options.text("backing_file") else { return Ok(None) };
        if name.is_empty() {
            return Err(Problem::new("Expected backing file name, got empty string"));
        }
        if name == target {
            return Err(Problem::new("Error: Trying to create an image with the same filename as the backing file"));
        }
        let format = options.text("backing_fmt");
        let image = match unseen {
            true => None,
            false => {
                let full = join_name(target, name);
                let known = format.map(driver_format).transpose();
                let image = known.and_then(|_| ImageSpec::of_file(&full, format));
                Some(image.map_err(|problem| problem.with_hint(NO_BACKING))?)
            }
        };
        match (format, image) {
            (Some(format), image) => Ok(Some(Self { name: name.to_owned(), format: format.to_owned(), image })),
            (None, image) => Err(format_missing(settings, image)),
        }
    }

    fn grant(&self, files: &mut Files, machine: &mut dyn Machine) -> Result<Backing, Problem> {
        let image = match &self.image {
            None => None,
            Some(image) => {
                let opened = files.open_named(machine, image, LOOK);
                let device = opened.map_err(|problem| problem.with_hint(NO_BACKING))?;
                let named_dmg = image.is_named_dmg();
                Some(Source { device, format: image.format.into(), named_dmg, ..Source::default() })
            }
        };
        Ok(Backing { name: self.name.clone().into_bytes(), format_name: self.format.clone().into_bytes(), image })
    }
}

/// What qemu-img adds when the backing image is at fault.
const NO_BACKING: &str = "Could not open backing image.";

/// A backing image must be recorded with its format; its detected one is told.
fn format_missing(settings: &Settings, image: Option<ImageSpec>) -> Problem {
    let missing = Problem::new("Backing file specified without backing format");
    let Some(image) = image else { return missing };
    match Run::start(settings, &image, InfoRequest::default(), LOOK) {
        Ok(run) => missing.with_hint(format!("Detected format of {}.", formats::name(run.image().format()))),
        Err(failed) => failed.problem.with_hint(NO_BACKING),
    }
}

struct CreateHost {
    files: Files,
    target: NewTarget,
    creation: Creation,
}

impl CreateHost {
    fn open_target(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Result<Granted, Problem> {
        match wanted.role() {
            FileRole::Target => {
                if self.creation.announce(self.target.given(), wanted.size).is_err() {
                    return Err(Problem::new("Could not write to standard output"));
                }
                match self.creation.layout.early.take() {
                    Some(problem) => Err(problem),
                    None => self.target.open_main(machine, &self.files),
                }
            }
            FileRole::TargetExtent => self.target.open_extent(machine, &self.files),
            _ => self.target.open_data(machine, &self.files),
        }
    }

    fn problem(&self, failure: &Failure, format: Format) -> Problem {
        if failure.cause() == Cause::OpenRefused
            && let Some(refusal) = self.files.refusal()
        {
            return match self.files.refusal_from_the_top() {
                Some((_, problem)) => problem.with_hint(NO_BACKING),
                None => refusal.problem.clone(),
            };
        }
        match (failure.step(), failure.device) {
            (Step::Open, Some(device)) => {
                let (_, problem) = self.files.seen_from_the_top(device, messages::open_failure(failure));
                problem.with_hint(NO_BACKING)
            }
            (Step::Create, _) => messages::create_failure(failure, format),
            _ => messages::work_failure(failure),
        }
    }
}

impl Host for CreateHost {
    fn open(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted> {
        match wanted.role() {
            FileRole::Target | FileRole::TargetData | FileRole::TargetExtent => match self.open_target(machine, wanted)
            {
                Ok(granted) => Some(granted),
                Err(problem) => {
                    let (shown, role) = (self.target.given().to_owned(), wanted.role());
                    self.files.refuse(Refusal { referrer: None, role, shown, problem });
                    None
                }
            },
            _ => self.files.open_embedded(machine, wanted, LOOK),
        }
    }

    fn progress(&mut self, _: &Progress) {}

    fn pace(&mut self, _: &Progress) {}

    fn warning(&mut self, _: &Failure) {}
}
