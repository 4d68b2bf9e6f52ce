//! `convert`.

use std::path::Path;
use std::thread;

use instar_guest_protocol::message::{
    Backing, Blocks, Cause, ConvertRequest, Failure, FileRole, Format, OpenFile, Preallocation, Progress, Request,
    SnapshotSelector, Source, Step, Target, reply, request,
};

use super::{CommandLine, Objects, Settings, is_cache_mode};
use crate::args::{Key, Opt};
use crate::creation::{self, creatable, seed};
use crate::files::{Access, Files, Refusal, open_data, unnamed_to_write};
use crate::formats;
use crate::image_opts::{EXCLUSIVE, ImageSpec};
use crate::lock::Purpose;
use crate::open::{Opened, join_name, open_to_read};
use crate::options::{self, OptionList, Options, split};
use crate::output::progress::{ProgressLine, Show};
use crate::pace::Pace;
use crate::problem::{Problem, printable};
use crate::program::{Fail, Outcome, Program, print};
use crate::sandbox::{self, Granted, Host, Limits, Machine, Vm, Work};
use crate::size;
use crate::target::{NewTarget, open_existing};
use crate::{guest, messages};

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::long_value(Key::Object, "object"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::long_flag(Key::ImageOpts, "source-image-opts"),
    Opt::value(Key::Format, b'f', "source-format"),
    Opt::value(Key::SourceCache, b'T', "source-cache"),
    Opt::value(Key::Snapshot, b'l', "snapshot"),
    Opt::value(Key::SparseSize, b'S', "sparse-size"),
    Opt::value(Key::TargetFormat, b'O', "output-format"),
    Opt::value(Key::Options, b'o', "options"),
    Opt::value(Key::TargetCache, b't', "output-cache"),
    Opt::value(Key::Backing, b'B', "backing"),
    Opt::value(Key::BackingFormat, b'F', "backing-format"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
    Opt::long_flag(Key::TargetImageOpts, "target-image-opts"),
    Opt::long_flag(Key::Salvage, "salvage"),
    Opt::long_flag(Key::TargetIsZero, "target-is-zero"),
    Opt::long_flag(Key::Bitmaps, "bitmaps"),
    Opt::long_flag(Key::SkipBrokenBitmaps, "skip-broken-bitmaps"),
    Opt::value(Key::Rate, b'r', "rate"),
    Opt::value(Key::Parallel, b'm', "parallel"),
    Opt::flag(Key::OutOfOrder, b'W', "oob-writes"),
    Opt::flag(Key::CopyRange, b'C', "copy-range-offloading"),
    Opt::short_flag(Key::Progress, b'p'),
    Opt::short_flag(Key::Compress, b'c'),
    Opt::short_flag(Key::NoCreate, b'n'),
];

/// Zero runs of this many bytes stay unallocated, if `-S` does not say otherwise.
const DEFAULT_SPARSE_SIZE: u64 = 4096;
/// vCPUs, if neither `-m` nor `--threads` says otherwise and the machine has as many.
const DEFAULT_PARALLEL: u64 = 8;
/// The most that `-m` takes.
const MAX_PARALLEL: u64 = 16;

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    snapshot: Option<SnapshotSelector>,
    target_format: Option<String>,
    target_image_opts: bool,
    options: OptionList,
    backing: Option<String>,
    backing_format: Option<String>,
    source_cache: Option<String>,
    target_cache: Option<String>,
    sparse_size: Option<u64>,
    parallel: Option<u64>,
    rate: u64,
    compress: bool,
    no_create: bool,
    target_is_zero: bool,
    bitmaps: bool,
    skip_broken_bitmaps: bool,
    copy_range: bool,
    salvage: bool,
    force_share: bool,
    progress: bool,
    quiet: bool,
    /// `dd` copies a part.
    blocks: Option<Blocks>,
}

impl Arguments {
    fn take(&mut self, program: &Program, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Quiet => self.quiet = true,
            Key::ImageOpts => self.image_opts = true,
            Key::Format => self.format = Some(value),
            Key::SourceCache => self.source_cache = Some(value),
            Key::Snapshot => self.snapshot = Some(snapshot_selector(program, &value)?),
            Key::SparseSize => self.sparse_size = Some(size::parse_sparse_size(&value)?),
            Key::TargetFormat => self.target_format = Some(value),
            Key::Options => self.options.add(&value)?,
            Key::TargetCache => self.target_cache = Some(value),
            Key::Backing => self.backing = Some(value),
            Key::BackingFormat => self.backing_format = Some(value),
            Key::ForceShare => self.force_share = true,
            Key::TargetImageOpts => self.target_image_opts = true,
            Key::Salvage => self.salvage = true,
            Key::TargetIsZero => self.target_is_zero = true,
            Key::Bitmaps => self.bitmaps = true,
            Key::SkipBrokenBitmaps => self.skip_broken_bitmaps = true,
            Key::Rate => self.rate = size::parse_named("rate limit", &value, 0, i64::MAX as u64)?,
            Key::Parallel => {
                self.parallel = Some(size::parse_count("number of coroutines", &value, 1, MAX_PARALLEL)?);
            }
            Key::CopyRange => self.copy_range = true,
            Key::Progress => self.progress = true,
            Key::Compress => self.compress = true,
            Key::NoCreate => self.no_create = true,
            // Order of writes: the guest's own business here.
            _ => {}
        }
        Ok(())
    }

    /// What contradicts itself whatever the images are.
    fn check(&self) -> Result<(), Fail> {
        let complaints = [
            (self.skip_broken_bitmaps && !self.bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"),
            (self.copy_range && self.compress, "Cannot enable copy offloading when -c is used"),
            (self.copy_range && self.sparse_size.is_some(), "Cannot enable copy offloading when -S is used"),
            (self.copy_range && self.salvage, "Cannot use copy offloading in salvaging mode"),
            (self.target_image_opts && !self.no_create, "--target-image-opts requires use of -n flag"),
            (self.no_create && !self.options.is_empty(), "-o has no effect when skipping image creation"),
            (self.target_is_zero && !self.no_create, "--target-is-zero requires use of -n flag"),
        ];
        match complaints.iter().find(|(applies, _)| *applies) {
            Some((_, text)) => Err(Fail::from(*text)),
            None => Ok(()),
        }
    }

    fn target_format(&self) -> &str {
        self.target_format.as_deref().unwrap_or("raw")
    }

    fn access(&self) -> Access {
        Access { purpose: Purpose::Read, force_share: self.force_share }
    }

    fn source(&self, name: &str) -> Result<ImageSpec, Problem> {
        ImageSpec::of_operand(name, self.image_opts, self.format.as_deref())
    }

    fn threads(&self, limits: &Limits) -> u32 {
        let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
        limits.threads.unwrap_or_else(|| cpus.min(self.parallel.unwrap_or(DEFAULT_PARALLEL)) as u32)
    }

    /// Is the target to be on disk before success is reported? That's so for all cache modes but the default, `unsafe`.
    fn flushes(&self) -> bool {
        self.target_cache.as_deref().is_some_and(|mode| mode != "unsafe")
    }
}

const NO_COMPRESSION: &str = "Compression not supported for this file format";
const BACKED_CONCATENATION: &str =
    "Having a backing file for the target makes no sense when concatenating multiple input images";

/// `-l`: an id or else a name; or both, spelled out.
pub(super) fn snapshot_selector(program: &Program, text: &str) -> Result<SnapshotSelector, Fail> {
    let mut selector = SnapshotSelector::default();
    if !text.starts_with("snapshot.") {
        selector.id_or_name = text.as_bytes().to_vec();
        return Ok(selector);
    }
    for (key, value) in split(text) {
        let value = value.unwrap_or_default().into_bytes();
        match key.as_str() {
            "snapshot.id" => selector.id = value,
            "snapshot.name" => selector.name = value,
            _ => {
                program.report(&Fail::from(format!("Invalid parameter '{key}'")), None);
                return Err(format!("Failed in parsing snapshot param '{text}'").into());
            }
        }
    }
    Ok(selector)
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let help = include_str!("help/convert.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(program, key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    arguments.check()?;
    if arguments.options.wants_help() {
        let format = creatable(arguments.target_format())?;
        return print(&options::help(format, operands.len() > 1));
    }
    let Some((target, sources)) = operands.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Err("Must specify image file name".into());
    };
    if let Some(mode) = arguments.source_cache.as_deref().filter(|mode| !is_cache_mode(mode)) {
        return Err(format!("Invalid source cache option: {mode}").into());
    }
    let mut progress = ProgressLine::start(settings.progress(arguments.progress, arguments.quiet));
    let converted = convert(program, &settings, &arguments, sources, target, &mut progress);
    if let Err(fail) = converted {
        // Before the line feed that ends the progress line, as qemu-img does.
        program.report(&fail, Some("convert"));
        return Err(Fail::Said);
    }
    progress.complete();
    Ok(())
}

/// Runs `dd`: a part of an image into a new one, nothing left out.
///
/// # Errors
/// What the user is told.
pub fn copy_blocks(program: &Program, settings: &Settings, copy: BlockCopy) -> Outcome {
    let arguments = Arguments {
        format: copy.format,
        image_opts: copy.image_opts,
        target_format: copy.target_format,
        force_share: copy.force_share,
        sparse_size: Some(0),
        blocks: Some(copy.blocks),
        ..Arguments::default()
    };
    let mut progress = ProgressLine::start(Show::Nothing);
    convert(program, settings, &arguments, &[copy.source], &copy.target, &mut progress)
}

/// What `dd` is to do.
#[derive(Debug, Default)]
pub struct BlockCopy {
    /// `-f`.
    pub format: Option<String>,
    /// `--image-opts`.
    pub image_opts: bool,
    /// `-O`.
    pub target_format: Option<String>,
    /// `-U`.
    pub force_share: bool,
    /// `if=`.
    pub source: String,
    /// `of=`.
    pub target: String,
    /// Which part.
    pub blocks: Blocks,
}

fn convert(
    program: &Program,
    settings: &Settings,
    arguments: &Arguments,
    sources: &[String],
    target: &str,
    progress: &mut ProgressLine,
) -> Outcome {
    let threads = arguments.threads(&settings.limits);
    let sources = sources.iter().map(|name| arguments.source(name)).collect::<Result<Vec<ImageSpec>, Problem>>()?;
    let mut machine = Vm::spawn(guest::CONVERT, &settings.limits, Work::Data(threads))?;
    let mut files = Files::new(settings.confinement()?);
    let devices = open_sources(&mut files, &mut machine, arguments, &sources)?;
    if arguments.snapshot.is_some() && sources.len() > 1 {
        return Err("No support for concatenating multiple snapshot".into());
    }
    // What is wrong with the target is told once the sources are known to be good: when the guest asks for it.
    let plan = Plan::new(arguments, &settings.objects, sources.len(), target);
    let mut wire = plan.as_ref().map_or_else(|_| Target::default(), |plan| plan.wire.clone());
    if let Some(spec) = plan.as_ref().ok().and_then(|plan| plan.existing.as_ref()) {
        let key = settings.key(spec);
        wire.key = key.map_err(|problem| problem.within(format!("Could not open '{}'", spec.given)))?;
    }
    let mut late = None;
    if let (Some(backing), Ok(plan)) = (&mut wire.backing, &plan)
        && let Some(spec) = &plan.backing
    {
        match files.open_named(&mut machine, spec, arguments.access()) {
            Ok(device) => {
                backing.image = Some(settings.readable(device, spec)?);
            }
            Err(problem) => late = Some(problem.within("Could not open backing file")),
        }
    }
    let operation = request::Operation::Convert(ConvertRequest {
        sources: sources
            .iter()
            .zip(&devices)
            .map(|(spec, device)| {
                let readable = settings.readable(*device, spec);
                let readable =
                    readable.map_err(|problem| problem.within(format!("Could not open '{}'", spec.given)))?;
                Ok(Source { snapshot: arguments.snapshot.clone(), ..readable })
            })
            .collect::<Result<Vec<Source>, Problem>>()?,
        // VMDK: the type of the image decides.
        compress: arguments.compress && plan.as_ref().is_ok_and(|plan| plan.format != Format::Vmdk),
        target: match plan.is_ok() {
            true => wire,
            false => Target { format: Format::Raw.into(), ..Target::default() },
        },
        sparse_bytes: arguments.sparse_size.unwrap_or(DEFAULT_SPARSE_SIZE),
        target_is_zero: arguments.target_is_zero,
        salvage: arguments.salvage,
        bitmaps: arguments.bitmaps && plan.is_ok(),
        skip_broken_bitmaps: arguments.skip_broken_bitmaps,
        threads,
        progress: progress.is_visible(),
        rate_limit: arguments.rate,
        flush: arguments.flushes(),
        blocks: arguments.blocks.clone(),
    });
    let mut host = ConvertHost {
        program,
        files,
        sources: &sources,
        devices,
        access: arguments.access(),
        quiet: arguments.quiet,
        plan,
        late,
        existing: Vec::new(),
        existing_header: None,
        progress,
        pace: Pace::start(arguments.rate),
    };
    let result = sandbox::run(&mut machine, &Request { operation: Some(operation) }, &mut host);
    // The machine goes first: nothing may write a file that is removed.
    drop(machine);
    match result? {
        reply::Result::Convert(reply) => {
            if reply.skipped_all
                && let Some(spec) = sources.first()
            {
                program.report(&Fail::from(format!("{}: cannot skip to specified offset", spec.given)), None);
            }
            let format = host.plan.as_ref().ok().map(|plan| plan.format);
            if let Ok(Plan { new: Some(new), .. }) = host.plan {
                new.complete();
            }
            match format {
                // The image is right, and yet qemu-img fails without a word: at the end it writes no bytes compressed, which qcow refuses.
                Some(Format::Qcow) if arguments.compress => Err(Fail::Said),
                _ => Ok(()),
            }
        }
        reply::Result::Failure(failure) => Err(Fail::Message(host.problem(&failure))),
        _ => Err("The sandboxed parser sent something that makes no sense".into()),
    }
}

fn open_sources(
    files: &mut Files,
    machine: &mut dyn Machine,
    arguments: &Arguments,
    sources: &[ImageSpec],
) -> Result<Vec<u32>, Problem> {
    let open = |spec: &ImageSpec| {
        let device = files.open_named(machine, spec, arguments.access());
        device.map_err(|problem| problem.within(format!("Could not open '{}'", spec.given)))
    };
    sources.iter().map(open).collect()
}

/// The target, checked as far as that is possible without looking into an image.
struct Plan {
    /// Its name as typed.
    given: String,
    format: Format,
    wire: Target,
    /// It is to be created.
    new: Option<NewTarget>,
    /// Told before it is created.
    early: Option<Problem>,
    /// Told once it is open.
    after: Option<Problem>,
    /// It exists, and this is it.
    existing: Option<ImageSpec>,
    /// The backing image that it gets.
    backing: Option<ImageSpec>,
    /// It is made by `dd`.
    is_dd: bool,
}

impl Plan {
    fn new(arguments: &Arguments, objects: &Objects, source_count: usize, target: &str) -> Result<Self, Problem> {
        let mut plan = match arguments.no_create {
            true => Self::of_existing(arguments, source_count, target)?,
            false => Self::of_new(arguments, objects, source_count, target)?,
        };
        if arguments.bitmaps && source_count > 1 {
            return Err(Problem::new("Copying bitmaps only possible with single source"));
        }
        let invalid_mode = arguments.target_cache.as_deref().filter(|mode| !is_cache_mode(mode));
        let invalid_mode = invalid_mode.map(|mode| Problem::new(format!("Invalid cache option: {mode}")));
        if let (Some(problem), true) = (&invalid_mode, arguments.no_create) {
            return Err(problem.clone());
        }
        let compresses = creation::find(plan.format).is_some_and(|format| format.compresses);
        let is_flat = plan.wire.vmdk.as_ref().is_some_and(|own| own.subformat.ends_with(b"Flat"));
        plan.after = match invalid_mode {
            Some(problem) => Some(problem),
            None if arguments.compress && !compresses => Some(Problem::new(NO_COMPRESSION)),
            // Bytes in one piece have no clusters that could be compressed.
            None if arguments.compress && is_flat => Some(Problem::new("invalid cluster size")),
            None if arguments.bitmaps && plan.format != Format::Qcow2 => {
                let text = format!("Format driver '{}' does not support bitmaps", formats::name(plan.format));
                Some(Problem::new(text))
            }
            None => None,
        };
        Ok(plan)
    }

    fn of_existing(arguments: &Arguments, source_count: usize, target: &str) -> Result<Self, Problem> {
        if arguments.backing.is_some() && source_count > 1 {
            return Err(Problem::new(BACKED_CONCATENATION));
        }
        if arguments.target_image_opts && arguments.target_format.is_some() {
            return Err(Problem::new(EXCLUSIVE));
        }
        let spec = match arguments.target_image_opts {
            true => ImageSpec::of_opts(target)?,
            false => ImageSpec::of_file(target, Some(arguments.target_format()))?,
        };
        let within = |text: &str| Problem::new(text).within(format!("Could not open '{}'", spec.given));
        if spec.below.says_more_than_keys() {
            return Err(within("A backing image given by options (backing.*) is not provided for a target"));
        }
        if spec.force_share {
            return Err(within("force-share=on can only be used with read-only images"));
        }
        let format = match spec.format {
            Format::Unknown => return Err(within("The format of an image that is written must be given (driver=)")),
            Format::File => Format::Raw,
            format => format,
        };
        let wire = Target {
            format: format.into(),
            existing: true,
            seed: seed(),
            data_file_named: spec.data_file.is_some(),
            detached_header: spec.header.is_some(),
            ..Target::default()
        };
        Ok(Self {
            given: target.to_owned(),
            format,
            wire,
            new: None,
            early: None,
            after: None,
            existing: Some(spec),
            backing: None,
            is_dd: false,
        })
    }

    fn of_new(arguments: &Arguments, objects: &Objects, source_count: usize, target: &str) -> Result<Self, Problem> {
        let name = arguments.target_format();
        let is_dd = arguments.blocks.is_some();
        if is_dd && formats::driver(name).is_none() {
            return Err(Problem::new("Unknown file format"));
        }
        let kind = creatable(name)?;
        let format = kind.format;
        let mut options = Options::parse(kind, &arguments.options)?;
        for (key, value, what) in [
            ("backing_file", &arguments.backing, "Backing file"),
            ("backing_fmt", &arguments.backing_format, "Backing file format"),
        ] {
            if let Some(value) = value
                && !options.set_text(key, value)
            {
                return Err(Problem::new(format!("{what} not supported for file format '{name}'")));
            }
        }
        let backing_name = options.text("backing_file");
        if backing_name.is_some() && source_count > 1 {
            return Err(Problem::new(BACKED_CONCATENATION));
        }
        if backing_name.is_some() && options.text("backing_fmt").is_none() {
            return Err(Problem::new("Use of backing file requires explicit backing format"));
        }
        let layout = (kind.layout)(&options, objects);
        if arguments.compress {
            if !kind.compresses {
                return Err(Problem::new(NO_COMPRESSION));
            }
            if options.any_with_prefix("encrypt") {
                return Err(Problem::new("Compression and encryption not supported at the same time"));
            }
            if layout.wire.preallocation() != Preallocation::Off {
                return Err(Problem::new("Compression and preallocation not supported at the same time"));
            }
        }
        let new = NewTarget::new(target, &layout)?;
        let backing = match (backing_name, options.text("backing_fmt"), &layout.late) {
            (Some(name), Some(format), None) => {
                let full = join_name(target, name);
                let spec = ImageSpec::of_file(&full, Some(format));
                Some(spec.map_err(|problem| problem.within(format!("Could not open '{target}'")))?)
            }
            _ => None,
        };
        let recorded = backing_name.map(|name| Backing {
            name: name.as_bytes().to_vec(),
            format_name: options.text("backing_fmt").unwrap_or_default().as_bytes().to_vec(),
            image: None,
        });
        let mut wire = Target { backing: recorded, ..layout.wire };
        creation::vmdk::name_target(&mut wire, target, true);
        Ok(Self {
            given: target.to_owned(),
            format,
            wire,
            new: Some(new),
            early: layout.early,
            after: None,
            existing: None,
            backing,
            is_dd,
        })
    }

    /// Puts a problem with creating the target into words.
    fn creating(&self, problem: Problem) -> Problem {
        match self.is_dd {
            true => problem.within(format!("{}: error while creating output image", self.given)),
            false => problem.within(format!("{}: error while converting {}", self.given, formats::name(self.format))),
        }
    }
}

struct ConvertHost<'a> {
    program: &'a Program,
    files: Files,
    sources: &'a [ImageSpec],
    devices: Vec<u32>,
    access: Access,
    quiet: bool,
    plan: Result<Plan, Problem>,
    /// What is wrong with the target's backing image, told once the target is made.
    late: Option<Problem>,
    existing: Vec<Opened>,
    /// The file with the LUKS header of the existing target.
    existing_header: Option<(Opened, Granted)>,
    progress: &'a mut ProgressLine,
    pace: Pace,
}

impl ConvertHost<'_> {
    /// Opens the target. Problems are complete.
    fn open_target(&mut self, machine: &mut dyn Machine, role: FileRole) -> Result<Granted, Problem> {
        let plan = match &mut self.plan {
            Ok(plan) => plan,
            Err(problem) => return Err(problem.clone()),
        };
        if let Some(spec) = &plan.existing {
            let opened = match role {
                FileRole::Target => open_existing(machine, spec, &self.files),
                _ => Err(Problem::new("The sandbox asked for a file that is not wanted")),
            };
            let (file, granted) =
                opened.map_err(|problem| problem.within(format!("Could not open '{}'", spec.given)))?;
            if let Some(name) = &spec.header {
                let header = open_to_read(Path::new(name)).and_then(|header| {
                    let granted = header.grant(machine, false)?;
                    Ok((header, granted))
                });
                let header = header.map_err(|problem| problem.within(format!("Could not open '{}'", spec.given)))?;
                self.existing_header = Some(header);
            }
            self.existing.push(file);
            return plan.after.take().map_or(Ok(granted), Err);
        }
        if let Some(problem) = plan.early.take() {
            return Err(plan.creating(problem));
        }
        let Some(new) = plan.new.as_mut() else { return Err(Problem::new("There is no target")) };
        let opened = match role {
            FileRole::Target => new.open_main(machine, &self.files),
            FileRole::TargetExtent => new.open_extent(machine, &self.files),
            _ => new.open_data(machine, &self.files),
        };
        let granted = opened.map_err(|problem| plan.creating(problem))?;
        match self.late.take() {
            Some(problem) => Err(problem.within(format!("Could not open '{}'", plan.given))),
            None => plan.after.take().map_or(Ok(granted), Err),
        }
    }

    /// Opens the external data file of a target that exists, which the operator has to name. Problems are complete.
    fn open_target_data(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Result<Granted, Problem> {
        let spec = match &self.plan {
            Ok(Plan { existing: Some(spec), .. }) => spec,
            Ok(_) => return Err(Problem::new("The sandbox asked for a data file that is not wanted")),
            Err(problem) => return Err(problem.clone()),
        };
        let opened = match &spec.data_file {
            None => Err(unnamed_to_write(&printable(
                join_name(&spec.file, &String::from_utf8_lossy(&wanted.name)).as_bytes(),
            ))),
            Some(name) => open_data(machine, name, true, self.access),
        };
        let checked = opened.and_then(|(file, granted)| self.files.check_target(&file.stat).map(|()| (file, granted)));
        let (file, granted) = checked.map_err(|problem| problem.within(format!("Could not open '{}'", spec.given)))?;
        self.existing.push(file);
        Ok(granted)
    }

    /// A problem with an image that is read, from the place where the operator named it.
    fn reading(&self, device: u32, problem: Problem) -> Problem {
        let given = self.devices.iter().position(|known| *known == device).map(|at| self.sources[at].given.as_str());
        match (given, &self.plan) {
            (Some(given), _) => problem.within(format!("Could not open '{given}'")),
            (None, Ok(plan)) => {
                problem.within("Could not open backing file").within(format!("Could not open '{}'", plan.given))
            }
            (None, Err(_)) => problem,
        }
    }

    fn problem(&self, failure: &Failure) -> Problem {
        if failure.cause() == Cause::OpenRefused
            && let Some(refusal) = self.files.refusal()
        {
            return match self.files.refusal_from_the_top() {
                Some((device, problem)) => self.reading(device, problem),
                None => refusal.problem.clone(),
            };
        }
        if failure.cause() == Cause::Encrypted {
            return self.encrypted(failure);
        }
        match (failure.step(), failure.device, &self.plan) {
            (Step::Open, Some(device), _) => {
                let (device, problem) = self.files.seen_from_the_top(device, messages::open_failure(failure));
                self.reading(device, problem)
            }
            (_, _, Ok(_)) if is_of_work(failure) => messages::work_failure(failure),
            (Step::Create, _, Ok(plan)) => plan.creating(messages::create_failure(failure, plan.format)),
            (Step::OpenTarget, _, Ok(plan)) => {
                let file = plan.existing.as_ref().map_or(&plan.given, |spec| &spec.file);
                messages::open_failure(failure).of_image_in(file).within(format!("Could not open '{}'", plan.given))
            }
            (_, _, Ok(plan)) if plan.is_dd => messages::block_failure(failure),
            _ => messages::work_failure(failure),
        }
    }

    /// An encrypted image without a key.
    fn encrypted(&self, failure: &Failure) -> Problem {
        if let (Step::OpenTarget, Ok(plan)) = (failure.step(), &self.plan) {
            return messages::open_failure(failure).within(format!("Could not open '{}'", plan.given));
        }
        let device = failure.device.or(self.devices.first().copied()).unwrap_or_default();
        let (device, problem) = self.files.seen_from_the_top(device, messages::open_failure(failure));
        self.reading(device, problem)
    }
}

/// Causes whose message stands alone, whatever the step.
fn is_of_work(failure: &Failure) -> bool {
    let cause = failure.cause();
    matches!(cause, Cause::CompressionUnsupported | Cause::CompressedPreallocation | Cause::BitmapsUnsupported)
        || (cause == Cause::TargetTooSmall && failure.step() == Step::OpenTarget)
}

impl Host for ConvertHost<'_> {
    fn open(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted> {
        match wanted.role() {
            role @ (FileRole::Target | FileRole::TargetData | FileRole::TargetExtent) => {
                match self.open_target(machine, role) {
                    Ok(granted) => Some(granted),
                    Err(problem) => {
                        self.files.refuse(Refusal { referrer: None, role, shown: String::new(), problem });
                        None
                    }
                }
            }
            role @ FileRole::Data if wanted.writable => match self.open_target_data(machine, wanted) {
                Ok(granted) => Some(granted),
                Err(problem) => {
                    self.files.refuse(Refusal { referrer: None, role, shown: String::new(), problem });
                    None
                }
            },
            // Of a source it is among the files, which know their devices.
            FileRole::LuksHeader if self.files.get(wanted.referrer).is_none() => {
                self.existing_header.as_ref().map(|(_, granted)| *granted)
            }
            _ => self.files.open_embedded(machine, wanted, self.access),
        }
    }

    fn progress(&mut self, progress: &Progress) {
        self.progress.update(progress.done, progress.total);
    }

    fn pace(&mut self, progress: &Progress) {
        self.pace.keep(progress.done);
    }

    fn warning(&mut self, warning: &Failure) {
        // Unreadable places are what `--salvage` is about; a bitmap that is left out is told in any case.
        let always = matches!(
            warning.cause(),
            Cause::BitmapInconsistent | Cause::UnreadableChunks | Cause::FooterCopyUsed | Cause::EndFooterLost
        );
        if !self.quiet || always {
            self.program.warn(&messages::warning(warning));
        }
    }
}
