//! `bench`.

use std::time::Instant;

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{BenchRequest, Progress};

use super::{CommandLine, Settings, is_cache_mode};
use crate::args::{Key, Opt};
use crate::creation::seed;
use crate::edit::{Attendant, Edit};
use crate::image_opts::ImageSpec;
use crate::messages;
use crate::program::{Fail, Outcome, Program, print};
use crate::size;

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::value(Key::TargetCache, b't', "cache"),
    Opt::value(Key::Count, b'c', "count"),
    Opt::value(Key::BufferSize, b's', "buffer-size"),
    Opt::value(Key::Depth, b'd', "depth"),
    Opt::value(Key::Offset, b'o', "offset"),
    Opt::value(Key::StepSize, b'S', "step-size"),
    Opt::value(Key::Aio, b'i', "aio"),
    Opt::flag(Key::Native, b'n', "native"),
    Opt::flag(Key::Write, b'w', "write"),
    Opt::long_value(Key::Pattern, "pattern"),
    Opt::long_value(Key::FlushInterval, "flush-interval"),
    Opt::long_flag(Key::NoDrain, "no-drain"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
];

/// Numbers are 31 bits wide.
const MAX: u64 = i32::MAX as u64;

/// The command line.
#[derive(Debug)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    cache: Option<String>,
    count: u64,
    size: u64,
    depth: u64,
    offset: u64,
    step: u64,
    native: bool,
    write: bool,
    pattern: u64,
    flush_interval: u64,
    force_share: bool,
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            format: None,
            image_opts: false,
            cache: None,
            count: 75_000,
            size: 4096,
            depth: 64,
            offset: 0,
            step: 0,
            native: false,
            write: false,
            pattern: 0,
            flush_interval: 0,
            force_share: false,
        }
    }
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Format => self.format = Some(value),
            Key::ImageOpts => self.image_opts = true,
            Key::TargetCache if !is_cache_mode(&value) => return Err("Invalid cache mode".into()),
            Key::TargetCache => self.cache = Some(value),
            Key::Count => self.count = size::parse_count("request count", &value, 1, MAX)?,
            Key::BufferSize => self.size = size::parse_named("buffer size", &value, 1, MAX)?,
            Key::Depth => self.depth = size::parse_count("queue depth", &value, 1, MAX)?,
            Key::Offset => self.offset = size::parse_named("offset", &value, 0, i64::MAX as u64)?,
            Key::StepSize => self.step = size::parse_named("step size", &value, 0, MAX)?,
            Key::Aio => match value.as_str() {
                "threads" | "io_uring" => self.native = false,
                "native" => self.native = true,
                _ => return Err(format!("Invalid aio option: {value}").into()),
            },
            Key::Native => self.native = true,
            Key::Write => self.write = true,
            Key::Pattern => self.pattern = size::parse_count("pattern byte", &value, 0, 0xff)?,
            Key::FlushInterval => self.flush_interval = size::parse_count("flush interval", &value, 0, MAX)?,
            Key::ForceShare => self.force_share = true,
            // Requests of one turn are always finished before a flush.
            _ => {}
        }
        Ok(())
    }

    fn check(&self, given: &str) -> Result<(), Fail> {
        if self.flush_interval != 0 && !self.write {
            return Err("--flush-interval is only available in write tests".into());
        }
        if self.flush_interval != 0 && self.flush_interval < self.depth {
            return Err("Flush interval can't be smaller than depth".into());
        }
        if self.native && !matches!(self.cache.as_deref(), Some("none" | "off" | "directsync")) {
            return Err(format!(
                "Could not open '{given}': aio=native was specified, but it requires cache.direct=on, which was not \
                 specified."
            )
            .into());
        }
        Ok(())
    }

    /// What is said before the first request.
    fn announcement(&self) -> String {
        let verb = if self.write { "write" } else { "read" };
        let mut text = format!(
            "Sending {} {verb} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
            self.count,
            self.size,
            self.depth,
            self.offset,
            self.step(),
        );
        if self.flush_interval != 0 {
            text.push_str(&format!("Sending flush every {} requests\n", self.flush_interval));
        }
        text
    }

    fn step(&self) -> u64 {
        if self.step == 0 { self.size } else { self.step }
    }
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let help = include_str!("help/bench.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    let [file] = operands.as_slice() else { return Err(Fail::Usage("Expecting one image file name".to_owned())) };
    arguments.check(file)?;
    let image = ImageSpec::of_operand(file, arguments.image_opts, arguments.format.as_deref())?;
    let (writable, force_share) = (arguments.write, arguments.force_share);
    let edit = Edit { settings: &settings, image: &image, writable, force_share, other: None, alone: false };
    let request = BenchRequest {
        count: arguments.count,
        depth: arguments.depth,
        offset: arguments.offset,
        size: arguments.size,
        step: arguments.step(),
        pattern: arguments.write.then_some(arguments.pattern as u32),
        flush_interval: arguments.flush_interval,
        flush: arguments.cache.as_deref() != Some("unsafe"),
        seed: seed(),
        ..BenchRequest::default()
    };
    let mut stopwatch = Stopwatch { text: arguments.announcement(), started: None, printed: Ok(()) };
    let done = edit.run_attended(1, |image, _| Operation::Bench(BenchRequest { image, ..request }), &mut stopwatch)?;
    let seconds = stopwatch.started.map_or(0.0, |started| started.elapsed().as_secs_f64());
    stopwatch.printed?;
    match done {
        Ok(_) => print(&format!("Run completed in {seconds:3.3} seconds.\n")),
        Err(failure) => Err(messages::motion::bench(&failure).into()),
    }
}

/// Takes the time from the moment in which the guest begins.
struct Stopwatch {
    text: String,
    started: Option<Instant>,
    printed: Outcome,
}

impl Attendant for Stopwatch {
    fn progress(&mut self, _: &Progress) {
        if self.started.is_none() {
            self.printed = print(&self.text);
            self.started = Some(Instant::now());
        }
    }
}
