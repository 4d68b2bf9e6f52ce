//! `map`.

use std::io::{self, Write};

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{Format, InfoRequest, MapRequest, MapRun};

use super::{CommandLine, Settings, info};
use crate::args::{Key, Opt};
use crate::config::Output;
use crate::files::{Access, Files};
use crate::image_opts::ImageSpec;
use crate::lock::Purpose;
use crate::messages;
use crate::problem::{Problem, os_text, printable};
use crate::program::{Fail, Outcome, Program};
use crate::query::{Listener, Query, Unanswered};
use crate::sandbox::Work;
use crate::size;
use crate::version::QemuVersion;

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::value(Key::StartOffset, b's', "start-offset"),
    Opt::value(Key::MaxLength, b'l', "max-length"),
    Opt::long_value(Key::Output, "output"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
    Opt::long_value(Key::Object, "object"),
];

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    start: u64,
    max_length: Option<u64>,
    output: Option<Output>,
    force_share: bool,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Format => self.format = Some(value),
            Key::ImageOpts => self.image_opts = true,
            Key::StartOffset => self.start = size::parse_named("start offset", &value, 0, i64::MAX as u64)?,
            Key::MaxLength => self.max_length = Some(size::parse_named("max length", &value, 0, i64::MAX as u64)?),
            Key::Output => self.output = Some(Output::parse(&value)?),
            Key::ForceShare => self.force_share = true,
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
    let operands = line.walk(&mut settings, include_str!("help/map.txt"), |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    let [file] = operands.as_slice() else { return Err(Fail::Usage("Expecting one image file name".to_owned())) };
    let mut image = ImageSpec::of_operand(file, arguments.image_opts, arguments.format.as_deref())?;
    if image.format == Format::Unknown && !image.layers.is_empty() {
        // In which node the runs lie depends on it.
        let access = Access { purpose: Purpose::Read, force_share: arguments.force_share };
        let described = info::Run::start(&settings, &image, InfoRequest::default(), access);
        image.format = described.map_err(info::Unopened::complete)?.image().format();
    }
    let output = arguments.output.unwrap_or(settings.output);
    let mut listing = Listing::new(output, settings.qemu_version);
    let (start, max_length) = (arguments.start, arguments.max_length);
    let images = &[&image];
    let query = Query {
        settings: &settings,
        images,
        force_share: arguments.force_share,
        writable: false,
        work: Work::Metadata,
    };
    let answer =
        query.ask(|sources| Operation::Map(MapRequest { image: sources[0].clone(), start, max_length }), &mut listing);
    match answer {
        Ok(_) => listing.finish(start),
        Err(Unanswered::Failed(failure)) => {
            listing.flush()?;
            let reason = messages::io_reason(&failure);
            Err(format!("Failed to read image metadata: {reason}").into())
        }
        Err(Unanswered::Unopened(problem) | Unanswered::Lost(problem)) => Err(problem.into()),
    }
}

/// The list as it is printed.
struct Listing {
    json: bool,
    version: QemuVersion,
    out: io::BufWriter<io::Stdout>,
    /// The run before, with the name of its file.
    runs: u64,
    failed: Option<Fail>,
}

impl Listing {
    fn new(output: Output, version: QemuVersion) -> Self {
        let out = io::BufWriter::with_capacity(64 << 10, io::stdout());
        Self { json: output == Output::Json, version, out, runs: 0, failed: None }
    }

    fn write(&mut self, text: &str) {
        if self.failed.is_none()
            && let Err(error) = self.out.write_all(text.as_bytes())
        {
            self.failed = Some(lost_output(&error));
        }
    }

    fn header(&mut self) {
        if self.runs == 0 {
            match self.json {
                true => self.write("["),
                false => self.write(&format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File")),
            }
        }
        self.runs += 1;
    }

    fn json_run(&mut self, base: u64, run: &MapRun) {
        if self.runs > 1 {
            self.write(",\n");
        }
        let mut text = format!("{{ \"start\": {}, \"length\": {}, \"depth\": {}", run.start, run.length, run.depth);
        if self.version.map_tells_present() {
            text.push_str(&format!(", \"present\": {}", run.present));
        }
        text.push_str(&format!(", \"zero\": {}, \"data\": {}", run.zero, run.data));
        if self.version.map_tells_compressed() {
            text.push_str(&format!(", \"compressed\": {}", run.compressed));
        }
        if run.device.is_some() {
            text.push_str(&format!(", \"offset\": {}", run.offset.saturating_add(base)));
        }
        text.push('}');
        self.write(&text);
    }

    fn human_run(&mut self, files: &Files, run: &MapRun) {
        if !run.data || run.zero {
            if run.data && run.device.is_none() {
                self.unmappable();
            }
            return;
        }
        let Some(record) = run.device.and_then(|device| files.get(device)) else { return self.unmappable() };
        let hex = |number: u64| if number == 0 { "0".to_owned() } else { format!("{number:#x}") };
        let (name, base) = record.node_of_data();
        let (name, offset) = (printable(name.as_bytes()), run.offset.saturating_add(base));
        let line = format!("{:<16}{:<16}{:<16}{name}\n", hex(run.start), hex(run.length), hex(offset));
        self.write(&line);
    }

    fn unmappable(&mut self) {
        self.failed.get_or_insert("File contains external, encrypted or compressed clusters.".into());
    }

    /// The end of the list; an empty disk is one run of nothing.
    fn finish(mut self, start: u64) -> Outcome {
        if self.runs == 0 {
            self.header();
            if self.json {
                self.json_run(0, &MapRun { start, ..MapRun::default() });
            }
        }
        if self.json {
            self.write("]\n");
        }
        self.flush()
    }

    fn flush(&mut self) -> Outcome {
        let flushed = self.out.flush();
        match (self.failed.take(), flushed) {
            (Some(fail), _) => Err(fail),
            (None, Err(error)) => Err(lost_output(&error)),
            (None, Ok(())) => Ok(()),
        }
    }
}

fn lost_output(error: &io::Error) -> Fail {
    let reason = error.raw_os_error().map_or_else(|| error.to_string(), os_text);
    Fail::Message(Problem::new(format!("Could not write to standard output: {reason}")))
}

impl Listener for Listing {
    fn runs(&mut self, files: &Files, runs: &[MapRun]) {
        for run in runs {
            self.header();
            match self.json {
                _ if self.failed.is_some() => return,
                true => {
                    let record = run.device.and_then(|device| files.get(device));
                    self.json_run(record.map_or(0, |record| record.node_of_data().1), run);
                }
                false => self.human_run(files, run),
            }
        }
    }
}
