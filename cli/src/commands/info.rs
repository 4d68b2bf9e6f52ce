//! `info`.

use instar_guest_protocol::message::{
    Cause, Failure, FileRole, Format, ImageInfo, InfoReply, InfoRequest, OpenFile, Progress, Request, reply, request,
};

use super::{CommandLine, Settings};
use crate::args::{Key, Opt};
use crate::chain::Chain;
use crate::config::Output;
use crate::files::{Access, Files, Origin};
use crate::image_opts::{EXCLUSIVE, ImageSpec};
use crate::lock::Purpose;
use crate::output::json;
use crate::output::node::Node;
use crate::output::report::{Below, Described, Part};
use crate::problem::Problem;
use crate::program::{Fail, Outcome, Program, print};
use crate::safety::Report;
use crate::sandbox::{self, Granted, Host, Machine, Vm, Work};
use crate::version::QemuVersion;
use crate::{guest, messages};

/// qemu-img's options, in the order in which getopt names the ones that an abbreviation may mean.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_value(Key::Output, "output"),
    Opt::flag(Key::BackingChain, b'b', "backing-chain"),
    Opt::long_value(Key::Object, "object"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
];

/// What instar adds.
const OWN: &[Opt] =
    &[Opt::long_flag(Key::Chain, "chain").spelled_out(), Opt::long_flag(Key::Safety, "safety").spelled_out()];

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    output: Option<Output>,
    image_opts: bool,
    backing_chain: bool,
    force_share: bool,
    chain: bool,
    safety: bool,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Format => self.format = Some(value),
            Key::Output => self.output = Some(Output::parse(&value)?),
            Key::BackingChain => self.backing_chain = true,
            Key::ImageOpts => self.image_opts = true,
            Key::ForceShare => self.force_share = true,
            Key::Chain => self.chain = true,
            Key::Safety => self.safety = true,
            _ => {}
        }
        Ok(())
    }

    fn image(&self, operands: &[String]) -> Result<ImageSpec, Fail> {
        let [name] = operands else { return Err(Fail::Usage("Expecting one image file name".to_owned())) };
        if self.image_opts && self.format.is_some() {
            return Err(EXCLUSIVE.into());
        }
        Ok(match self.image_opts {
            true => ImageSpec::of_opts(name)?,
            false => ImageSpec::of_file(name, self.format.as_deref())?,
        })
    }

    fn access(&self) -> Access {
        Access { purpose: Purpose::Describe, force_share: self.force_share }
    }
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, OWN, args);
    let operands = line.walk(&mut settings, include_str!("help/info.txt"), |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    let image = arguments.image(&operands)?;
    let as_json = arguments.output.unwrap_or(settings.output) == Output::Json;
    if arguments.chain {
        let unused = image.below.check_unused(image.format);
        unused.map_err(|problem| Unopened::of(&image.given, problem).complete())?;
        return describe_by_hops(&settings, &arguments, &image, as_json);
    }
    let request = InfoRequest { chain: arguments.backing_chain, safety: arguments.safety, ..InfoRequest::default() };
    let run = Run::start(&settings, &image, request, arguments.access()).map_err(Unopened::complete)?;
    run.warnings.iter().for_each(|warning| program.warn(&messages::warning(warning)));
    let found = run.images.iter().map(|info| run.describe(info, &image, arguments.safety));
    let described = found.collect::<Result<Vec<Described<'_>>, Problem>>()?;
    print(&match (as_json, arguments.backing_chain) {
        (true, true) => json::print(&Node::List(described.iter().map(Described::node).collect())),
        (true, false) => described.iter().map(|image| json::print(&image.node())).collect(),
        (false, _) => described.iter().map(Described::human).collect::<Vec<String>>().join("\n"),
    })
}

/// A finished run: what the guest found, and the files it was found in.
pub struct Run {
    images: Vec<ImageInfo>,
    files: Files,
    version: QemuVersion,
    /// What the user should hear of besides.
    warnings: Vec<Failure>,
}

/// Why there is nothing to describe.
#[derive(Debug)]
pub struct Unopened {
    /// The image at fault; none if no image is.
    pub name: Option<String>,
    /// What is wrong with it.
    pub problem: Problem,
}

impl Unopened {
    fn of(name: impl Into<String>, problem: Problem) -> Self {
        Self { name: Some(name.into()), problem }
    }

    /// The complete message.
    pub fn complete(self) -> Problem {
        match self.name {
            Some(name) => self.problem.within(format!("Could not open '{name}'")),
            None => self.problem,
        }
    }
}

impl From<Problem> for Unopened {
    fn from(problem: Problem) -> Self {
        Self { name: None, problem }
    }
}

impl Run {
    /// Describes an image, or its chain, in one run of the guest.
    ///
    /// # Errors
    /// The image at fault and the reason.
    pub fn start(
        settings: &Settings,
        image: &ImageSpec,
        request: InfoRequest,
        access: Access,
    ) -> Result<Self, Unopened> {
        let mut machine = Vm::spawn_to_read(guest::INFO, &settings.limits, Work::Headers)?;
        let mut files = Files::new(settings.confinement()?);
        let device =
            files.open_named(&mut machine, image, access).map_err(|problem| Unopened::of(&image.given, problem))?;
        files.forget_below(device);
        let source = settings.source_of(device, image);
        let operation = request::Operation::Info(InfoRequest { image: source, ..request });
        let mut host = InfoHost { files, access, warnings: Vec::new() };
        let result = sandbox::run(&mut machine, &Request { operation: Some(operation) }, &mut host);
        let InfoHost { files, warnings, .. } = host;
        let run = Self { images: Vec::new(), files, version: settings.qemu_version, warnings };
        match result {
            Ok(reply::Result::Info(reply)) if !reply.images.is_empty() => run.finish(reply, image),
            Ok(reply::Result::Failure(failure)) => Err(run.unopened(image, &failure)),
            Ok(_) => Err(garbled().into()),
            Err(problem) => Err(Unopened::of(&image.given, problem)),
        }
    }

    fn finish(mut self, reply: InfoReply, image: &ImageSpec) -> Result<Self, Unopened> {
        self.images = reply.images;
        if image.format == Format::File {
            // To the guest it is raw.
            self.images[0].format = Format::File.into();
        }
        let unused = image.below.check_unused(self.images[0].format());
        unused.map_err(|problem| Unopened::of(&image.given, problem))?;
        for info in &self.images {
            let is_raw = matches!(info.format(), Format::Raw | Format::File);
            if let Some(problem) = self.lock_problem(info.device).filter(|_| !is_raw) {
                return Err(Unopened::of(self.name_of(image, info.device), problem));
            }
        }
        Ok(self)
    }

    /// `info` blames the image that is wrong, not the one that named it.
    fn unopened(&self, image: &ImageSpec, failure: &Failure) -> Unopened {
        if failure.cause() == Cause::OpenRefused
            && let Some(refusal) = self.files.refusal()
        {
            // An image is not to be had without its parts.
            return match (refusal.role, refusal.referrer) {
                (FileRole::Extent, Some(referrer)) => {
                    Unopened::of(self.name_of(image, referrer), refusal.problem.clone())
                }
                _ => Unopened::of(&refusal.shown, refusal.problem.clone()),
            };
        }
        let device = failure.device.unwrap_or_default();
        let problem = self.lock_problem(device).unwrap_or_else(|| messages::open_failure(failure));
        Unopened::of(self.name_of(image, device), self.files.worded(device, problem))
    }

    /// A problem with the locks of an image that is not raw goes before what its contents may be blamed for.
    fn lock_problem(&self, device: u32) -> Option<Problem> {
        self.files.get(device).and_then(|record| record.lock_problem.clone())
    }

    fn name_of(&self, image: &ImageSpec, device: u32) -> String {
        match self.files.get(device) {
            Some(record) if record.origin != Origin::Operator => record.shown(),
            _ => image.given.clone(),
        }
    }

    /// The first image.
    pub fn image(&self) -> &ImageInfo {
        &self.images[0]
    }

    fn describe<'a>(
        &'a self,
        info: &'a ImageInfo,
        image: &'a ImageSpec,
        with_safety: bool,
    ) -> Result<Described<'a>, Problem> {
        let record = self.files.get(info.device).ok_or_else(garbled)?;
        let first = record.origin == Origin::Operator;
        let mut extra = Vec::new();
        if with_safety {
            let read_as = if first { image.format } else { info.format() };
            let report =
                Report::of(info, &record.name, read_as, &|name, shown| self.files.judge(info.device, name, shown));
            extra.push(("safety", report.node()));
        }
        let mut stat = record.file.stat;
        let extents = info.vmdk.iter().flat_map(|vmdk| &vmdk.extents).filter_map(|extent| extent.device);
        let parts = extents.chain(info.luks.as_ref().and_then(|luks| luks.header_device));
        let parts = parts.filter(|device| *device != info.device).filter_map(|device| self.files.get(device));
        let parts: Vec<Part<'_>> = parts.map(|part| Part { name: &part.name, stat: part.file.stat }).collect();
        let own_allocated = stat.allocated;
        stat.allocated += parts.iter().map(|part| part.stat.allocated).sum::<u64>();
        let file_len = stat.len;
        let shown = if first { image.shown_as(info.format()) } else { record.name.clone() };
        let layers = if first { image.layers.as_slice() } else { &[] };
        let layers = layers.iter().zip(record.file.layer_lens()).map(|(layer, len)| Below { layer, len: *len });
        Ok(Described {
            info,
            shown,
            file: &record.name,
            stat,
            own_allocated,
            file_len,
            parts,
            layers: layers.collect(),
            version: self.version,
            extra,
        })
    }
}

fn garbled() -> Problem {
    Problem::new("The sandboxed parser sent something that makes no sense")
}

/// What the guest of `info` may ask for: backing files.
struct InfoHost {
    files: Files,
    access: Access,
    warnings: Vec<Failure>,
}

impl Host for InfoHost {
    fn open(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Granted> {
        match wanted.role() {
            FileRole::Backing | FileRole::Extent | FileRole::LuksHeader => {
                self.files.open_embedded(machine, wanted, self.access)
            }
            _ => None,
        }
    }

    fn progress(&mut self, _: &Progress) {}

    fn pace(&mut self, _: &Progress) {}

    fn warning(&mut self, warning: &Failure) {
        self.warnings.push(warning.clone());
    }
}

/// `--chain`: each image in a sandbox of its own, each hop decided by the policy here; what is wrong with a hop is told
/// beside what was found before it.
fn describe_by_hops(settings: &Settings, arguments: &Arguments, image: &ImageSpec, as_json: bool) -> Outcome {
    let chain = Chain::walk(settings, image, arguments.access());
    print(&if as_json { json::print(&chain.node(arguments.safety)) } else { chain.human(arguments.safety) })?;
    match chain.problem {
        Some(problem) => Err(Fail::Message(problem)),
        None => Ok(()),
    }
}
