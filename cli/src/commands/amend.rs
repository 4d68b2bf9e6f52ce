//! `amend`.

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{AmendOptions, AmendRequest, Format, InfoRequest};

use super::info::Run;
use super::{CommandLine, Settings, is_cache_mode};
use crate::args::{Key, Opt};
use crate::creation::{self, luks};
use crate::edit::Edit;
use crate::files::Access;
use crate::formats::{self, Driver};
use crate::image_opts::{EXCLUSIVE, ImageSpec};
use crate::lock::Purpose;
use crate::messages;
use crate::messages::edit::Amended;
use crate::options::{self, Kind, OptionList, Options, Spec, spec};
use crate::output::progress::{ProgressLine, Show};
use crate::problem::Problem;
use crate::program::{Fail, Outcome, Program, print};

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::flag(Key::Progress, b'p', "progress"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::value(Key::TargetCache, b't', "cache"),
    Opt::long_flag(Key::Force, "force"),
    Opt::value(Key::Options, b'o', "options"),
    Opt::long_value(Key::Object, "object"),
];

/// What can be changed in a qcow2 image.
const CHANGES: &[Spec] = &[
    spec("encrypt.state", Kind::Text, None, "Select new state of affected keyslots (active/inactive)"),
    spec("encrypt.keyslot", Kind::Number, None, "Select a single keyslot to modify explicitly"),
    spec("encrypt.old-secret", Kind::Text, None, "Select all keyslots that match this password"),
    spec("encrypt.new-secret", Kind::Text, None, "New secret to set in the matching keyslots. Empty string to erase"),
    spec("encrypt.iter-time", Kind::Number, None, "Time to spend in PBKDF in milliseconds"),
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec("compat", Kind::Text, None, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    spec("backing_file", Kind::Text, None, "File name of a base image"),
    spec("backing_fmt", Kind::Text, None, "Image format of the base image"),
    spec("data_file", Kind::Text, None, "File name of an external data file"),
    spec("data_file_raw", Kind::Switch, None, "The external data file must stay valid as a raw image"),
    spec("lazy_refcounts", Kind::Switch, None, "Postpone refcount updates"),
    spec("refcount_bits", Kind::Number, None, "Width of a reference count entry in bits"),
];

/// What can be changed in a LUKS volume.
const LUKS_CHANGES: &[Spec] = &[
    spec("state", Kind::Text, None, "Select new state of affected keyslots (active/inactive)"),
    spec("keyslot", Kind::Number, None, "Select a single keyslot to modify explicitly"),
    spec("old-secret", Kind::Text, None, "Select all keyslots that match this password"),
    spec("new-secret", Kind::Text, None, "New secret to set in the matching keyslots. Empty string to erase"),
    spec("iter-time", Kind::Number, None, "Time to spend in PBKDF in milliseconds"),
];

/// How an image is looked at to learn what its options mean.
const LOOK: Access = Access { purpose: Purpose::Describe, force_share: true };

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    quiet: bool,
    progress: bool,
    format: Option<String>,
    image_opts: bool,
    cache: Option<String>,
    options: OptionList,
    force: bool,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Quiet => self.quiet = true,
            Key::Progress => self.progress = true,
            Key::Format => self.format = Some(value),
            Key::ImageOpts => self.image_opts = true,
            Key::TargetCache => self.cache = Some(value),
            Key::Options => self.options.add(&value)?,
            Key::Force => self.force = true,
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
    let help = include_str!("help/amend.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    if arguments.options.is_empty() {
        return Err(Fail::Usage("Must specify options (-o)".to_owned()));
    }
    let show = settings.progress(arguments.progress, arguments.quiet);
    let outcome = amend(&settings, &arguments, &operands, show);
    if let (Err(fail), Show::Percent) = (&outcome, show) {
        // The line of the progress ends after the message, as with qemu-img.
        program.report(fail, Some("amend"));
        print("\n")?;
        return Err(Fail::Said);
    }
    outcome
}

fn amend(settings: &Settings, arguments: &Arguments, operands: &[String], show: Show) -> Outcome {
    let wants_help = arguments.options.wants_help();
    if let Some(name) = arguments.format.as_deref().filter(|_| wants_help) {
        return help_on(name);
    }
    let [file] = operands else { return Err("Expecting one image file name".into()) };
    if arguments.image_opts && arguments.format.is_some() {
        return Err(EXCLUSIVE.into());
    }
    if let Some(mode) = arguments.cache.as_deref().filter(|mode| !is_cache_mode(mode)) {
        return Err(format!("Invalid cache option: {mode}").into());
    }
    let image = ImageSpec::of_operand(file, arguments.image_opts, arguments.format.as_deref())?;
    // What is wrong with the options is told once the image is known to be good.
    let changes = match wants_help {
        true => None,
        false => Some(Changes::of(settings, arguments, &image)),
    };
    let (wire, typed) = match &changes {
        Some(Ok(changes)) => (Some(changes.wire.clone()), typed(&changes.options)),
        _ => (None, Amended::default()),
    };
    let edit = Edit { settings, image: &image, writable: true, force_share: false, other: None, alone: false };
    let mut line: Option<ProgressLine> = None;
    let request = AmendRequest { options: wire, progress: show != Show::Nothing, ..AmendRequest::default() };
    let ended =
        edit.run(|image, _| Operation::Amend(AmendRequest { image, ..request }), &mut |progress| match &mut line {
            None => line = Some(ProgressLine::start(show)),
            Some(line) => line.step(progress.done, progress.total),
        })?;
    match (ended, &changes) {
        (Err(failure), _) => {
            if let Some(mut line) = line {
                line.complete();
                line.leave_open();
            }
            Err(messages::edit::amend(typed, &failure).into())
        }
        (Ok(_), Some(Err(problem))) => Err(problem.clone().into()),
        (Ok(reply), None) => print(&options::help_on_changes(formats::name(reply.format()), specs(reply.format()))),
        (Ok(_), Some(Ok(_))) => {
            if let Some(mut line) = line {
                line.complete();
            }
            Ok(())
        }
    }
}

fn help_on(name: &str) -> Outcome {
    match formats::driver(name) {
        Some(Driver::Provided(format @ (Format::Qcow2 | Format::Luks))) => {
            print(&options::help_on_changes(name, specs(format)))
        }
        Some(_) => Err(format!("Format driver '{name}' does not support option amendment").into()),
        None => Err(format!("Unknown file format '{name}'").into()),
    }
}

fn specs(format: Format) -> &'static [Spec] {
    if format == Format::Luks { LUKS_CHANGES } else { CHANGES }
}

/// What is to be changed.
struct Changes {
    options: Options,
    wire: AmendOptions,
}

impl Changes {
    /// What options about keys mean depends on the image, so that it is looked at first.
    fn of(settings: &Settings, arguments: &Arguments, image: &ImageSpec) -> Result<Self, Problem> {
        let list = &arguments.options;
        // As qcow2 has it, this is about keys; or nothing is, and the image tells the rest.
        if image.format != Format::Luks
            && let Ok(options) = changes(Format::Qcow2, list)
            && !options.any_with_prefix("encrypt.")
        {
            return Ok(Self { wire: wire(&options), options });
        }
        let run = Run::start(settings, image, InfoRequest::default(), LOOK).ok();
        let found = run.as_ref().map(Run::image);
        let format = match found.map_or(image.format, |found| found.format()) {
            Format::Luks => Format::Luks,
            _ => Format::Qcow2,
        };
        let options = changes(format, list)?;
        let mut wire = wire(&options);
        let volume = found.and_then(|found| match format {
            Format::Luks => found.luks.as_ref(),
            _ => found.qcow2.as_ref().and_then(|qcow2| qcow2.luks.as_ref()),
        });
        if let Some(volume) = volume {
            let prefix = if format == Format::Luks { "" } else { "encrypt." };
            let kind = (&volume.hash[..], volume.key_bytes as usize);
            wire.keys = Some(luks::key_change(&options, prefix, &settings.objects, kind, arguments.force)?);
        }
        Ok(Self { options, wire })
    }
}

fn changes(format: Format, list: &OptionList) -> Result<Options, Problem> {
    let creatable = creation::creatable(formats::name(format))?;
    Options::parse_changes(creatable, specs(format), list)
}

fn wire(options: &Options) -> AmendOptions {
    let bytes = |name: &str| options.text(name).map(|text| text.as_bytes().to_vec());
    AmendOptions {
        version: options.text("compat").map(|word| match word {
            "0.10" | "v2" => 2,
            "1.1" | "v3" => 3,
            _ => 0,
        }),
        refcount_bits: options.number("refcount_bits"),
        lazy_refcounts: options.switch("lazy_refcounts"),
        data_file: bytes("data_file"),
        data_file_raw: options.switch("data_file_raw"),
        backing_file: bytes("backing_file"),
        backing_format: bytes("backing_fmt"),
        size: options.number("size"),
        encryption: options.any_with_prefix("encrypt."),
        keys: None,
    }
}

fn typed(options: &Options) -> Amended<'_> {
    Amended {
        compat: options.text("compat").unwrap_or_default(),
        refcount_bits: options.number("refcount_bits").unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<AmendOptions, String> {
        let mut list = OptionList::default();
        list.add(text)?;
        changes(Format::Qcow2, &list).map(|options| wire(&options)).map_err(|problem| problem.to_string())
    }

    #[test]
    fn what_was_not_given_stays() {
        assert_eq!(parse("compat=v3"), Ok(AmendOptions { version: Some(3), ..AmendOptions::default() }));
        assert_eq!(
            parse("size=1M,nolazy_refcounts,refcount_bits=8,encrypt.keyslot=1"),
            Ok(AmendOptions {
                size: Some(1 << 20),
                lazy_refcounts: Some(false),
                refcount_bits: Some(8),
                encryption: true,
                ..AmendOptions::default()
            })
        );
        // The guest refuses it, in its turn.
        assert_eq!(parse("compat=7").map(|options| options.version), Ok(Some(0)));
    }

    #[test]
    fn creation_options_are_told_from_nonsense() {
        assert_eq!(
            parse("cluster_size=4k").unwrap_err(),
            "Invalid parameter 'cluster_size'\nThis option is only supported for image creation"
        );
        assert_eq!(parse("nosuch=1").unwrap_err(), "Invalid parameter 'nosuch'");
    }
}
