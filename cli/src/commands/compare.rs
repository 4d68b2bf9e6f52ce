//! `compare`.

use std::thread;

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{CompareReply, CompareRequest, Failure, Progress, Step, reply};

use super::{CommandLine, Settings, is_cache_mode};
use crate::args::{Key, Opt};
use crate::config::Output;
use crate::image_opts::ImageSpec;
use crate::messages;
use crate::output::json;
use crate::output::node::Node;
use crate::output::progress::{ProgressLine, Show};
use crate::program::{Fail, Outcome, Program, print};
use crate::query::{Listener, Query, Unanswered};
use crate::sandbox::Work;

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::flag(Key::Progress, b'p', "progress"),
    Opt::value(Key::Format, b'f', "a-format"),
    Opt::value(Key::SecondFormat, b'F', "b-format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::flag(Key::Strict, b's', "strict"),
    Opt::value(Key::SourceCache, b'T', "cache"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
    Opt::long_value(Key::Object, "object"),
];

/// What instar adds.
const OWN: &[Opt] = &[Opt::long_value(Key::Output, "output").spelled_out()];

/// Exit statuses beside 0, for equal disks.
const DIFFERENT: u8 = 1;
const UNOPENED: u8 = 2;
const UNMAPPED: u8 = 3;
const UNREAD: u8 = 4;

/// vCPUs, if `--threads` does not say otherwise and the machine has as many.
const THREADS: usize = 8;

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    formats: [Option<String>; 2],
    image_opts: bool,
    strict: bool,
    cache: Option<String>,
    quiet: bool,
    progress: bool,
    force_share: bool,
    output: Option<Output>,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Quiet => self.quiet = true,
            Key::Progress => self.progress = true,
            Key::Format => self.formats[0] = Some(value),
            Key::SecondFormat => self.formats[1] = Some(value),
            Key::ImageOpts => self.image_opts = true,
            Key::Strict => self.strict = true,
            Key::SourceCache => self.cache = Some(value),
            Key::ForceShare => self.force_share = true,
            Key::Output => self.output = Some(Output::parse(&value)?),
            _ => {}
        }
        Ok(())
    }
}

/// Runs the command.
///
/// # Errors
/// What the user is told, with the exit status.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, OWN, args);
    let help = include_str!("help/compare.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    let [first, second] = operands.as_slice() else {
        return Err(Fail::Usage("Expecting two image file names".to_owned()));
    };
    let mut progress = Shown(ProgressLine::prepare(settings.progress(arguments.progress, arguments.quiet)));
    let told = match compare_named(&settings, &arguments, [first, second], &mut progress) {
        Ok(reply) => tell(&settings, &arguments, &reply),
        Err(fail) => Err(fail),
    };
    progress.0.give_up();
    if let Err(fail) = told {
        // Before the line feed that ends the progress line, as qemu-img does.
        program.report(&fail, Some("compare"));
        return Err(Fail::Said.with_status(fail.status()));
    }
    Ok(())
}

/// Opens and compares the images of these names.
fn compare_named(
    settings: &Settings,
    arguments: &Arguments,
    [first, second]: [&str; 2],
    progress: &mut Shown,
) -> Result<CompareReply, Fail> {
    if let Some(mode) = arguments.cache.as_deref().filter(|mode| !is_cache_mode(mode)) {
        return Err(Fail::from(format!("Invalid source cache option: {mode}")).with_status(UNOPENED));
    }
    let spec = |name: &str, format: &Option<String>| {
        let spec = ImageSpec::of_operand(name, arguments.image_opts, format.as_deref());
        spec.map_err(|problem| Fail::from(problem).with_status(UNOPENED))
    };
    let first = spec(first, &arguments.formats[0])?;
    let second = match spec(second, &arguments.formats[1]) {
        Ok(second) => second,
        // Once the first one is known to be good.
        Err(fail) => return compare(settings, arguments, &first, &first, &mut Shown::nothing()).and(Err(fail)),
    };
    compare(settings, arguments, &first, &second, progress)
}

struct Shown(ProgressLine);

impl Shown {
    fn nothing() -> Self {
        Self(ProgressLine::prepare(Show::Nothing))
    }
}

impl Listener for Shown {
    fn progress(&mut self, progress: &Progress) {
        self.0.update(progress.done, progress.total);
    }
}

fn compare(
    settings: &Settings,
    arguments: &Arguments,
    first: &ImageSpec,
    second: &ImageSpec,
    progress: &mut Shown,
) -> Result<CompareReply, Fail> {
    let cpus = thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    let threads = settings.limits.threads.unwrap_or(cpus as u32);
    let visible = progress.0.is_visible();
    let images = &[first, second];
    let query =
        Query { settings, images, force_share: arguments.force_share, writable: false, work: Work::Data(threads) };
    let answer = query.ask(
        |sources| {
            let [first, second] = [sources[0].clone(), sources[1].clone()];
            Operation::Compare(CompareRequest { first, second, strict: arguments.strict, threads, progress: visible })
        },
        progress,
    );
    if !matches!(answer, Err(Unanswered::Unopened(_))) {
        progress.0.begin();
    }
    match answer {
        Ok(reply::Result::Compare(reply)) => {
            if reply.mismatch.is_none() && reply.first_size > 0 && reply.first_size == reply.second_size {
                progress.0.complete_once();
            }
            Ok(reply)
        }
        Ok(_) => Err("The sandboxed parser sent something that makes no sense".into()),
        Err(Unanswered::Unopened(problem)) => Err(Fail::from(problem).with_status(UNOPENED)),
        Err(Unanswered::Lost(problem)) => Err(Fail::from(problem).with_status(UNREAD)),
        Err(Unanswered::Failed(failure)) => Err(unread(&failure, [&first.given, &second.given])),
    }
}

/// What is told of an image that can't be read.
fn unread(failure: &Failure, names: [&String; 2]) -> Fail {
    let name = names[usize::from(failure.value2 != 0)];
    match failure.step() {
        Step::Map => Fail::from(format!("Sector allocation test failed for {name}")).with_status(UNMAPPED),
        _ => {
            let reason = messages::io_reason(failure);
            let text = format!("Error while reading offset {} of {name}: {reason}", failure.value);
            Fail::from(text).with_status(UNREAD)
        }
    }
}

/// Prints the result, which is an exit status as well.
fn tell(settings: &Settings, arguments: &Arguments, reply: &CompareReply) -> Outcome {
    let sizes_differ = reply.first_size != reply.second_size;
    let common = reply.first_size.min(reply.second_size);
    let strict_size = arguments.strict && sizes_differ;
    let different = reply.mismatch.is_some() || strict_size;
    if arguments.output.unwrap_or(settings.output) == Output::Json {
        let mut members = vec![
            ("identical", Node::Bool(!different)),
            ("virtual-sizes", Node::List(vec![Node::Int(reply.first_size), Node::Int(reply.second_size)])),
        ];
        if let Some(offset) = reply.mismatch {
            members.push(("mismatch-offset", Node::Int(offset)));
            members.push(("mismatch", Node::text(if reply.allocation { "allocation" } else { "content" })));
        }
        print(&json::print(&Node::Dict(members)))?;
    } else if !arguments.quiet {
        let mut text = String::new();
        if !strict_size && sizes_differ && reply.mismatch.is_none_or(|offset| offset >= common) {
            text.push_str("Warning: Image size mismatch!\n");
        }
        text.push_str(&match reply.mismatch {
            _ if strict_size => "Strict mode: Image size mismatch!\n".to_owned(),
            Some(offset) if reply.allocation => format!("Strict mode: Offset {offset} block status mismatch!\n"),
            Some(offset) => format!("Content mismatch at offset {offset}!\n"),
            None => "Images are identical.\n".to_owned(),
        });
        print(&text)?;
    }
    if different { Err(Fail::Said.with_status(DIFFERENT)) } else { Ok(()) }
}
