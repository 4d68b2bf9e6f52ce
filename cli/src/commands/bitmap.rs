//! `bitmap`.

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{BitmapAction, BitmapRequest, BitmapVerb};

use super::{CommandLine, Settings};
use crate::args::{Key, Opt};
use crate::edit::Edit;
use crate::image_opts::ImageSpec;
use crate::messages;
use crate::program::{Fail, Outcome, Program};
use crate::size;

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::long_flag(Key::Add, "add"),
    Opt::value(Key::Granularity, b'g', "granularity"),
    Opt::long_flag(Key::Remove, "remove"),
    Opt::long_flag(Key::Clear, "clear"),
    Opt::long_flag(Key::Enable, "enable"),
    Opt::long_flag(Key::Disable, "disable"),
    Opt::long_value(Key::Merge, "merge"),
    Opt::value(Key::SourceFile, b'b', "source-file"),
    Opt::value(Key::SourceFormat, b'F', "source-format"),
    Opt::long_value(Key::Object, "object"),
];

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    actions: Vec<BitmapAction>,
    granularity: u64,
    source: Option<String>,
    source_format: Option<String>,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        let verb = match key {
            Key::Add => BitmapVerb::Add,
            Key::Remove => BitmapVerb::Remove,
            Key::Clear => BitmapVerb::Clear,
            Key::Enable => BitmapVerb::Enable,
            Key::Disable => BitmapVerb::Disable,
            Key::Merge => BitmapVerb::Merge,
            _ => return self.take_other(key, value),
        };
        self.actions.push(BitmapAction { verb: verb.into(), granularity: None, source: value.into_bytes() });
        Ok(())
    }

    fn take_other(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Format => self.format = Some(value),
            Key::ImageOpts => self.image_opts = true,
            Key::Granularity => self.granularity = size::parse_named("granularity", &value, 0, i64::MAX as u64)?,
            Key::SourceFile => self.source = Some(value),
            Key::SourceFormat => self.source_format = Some(value),
            _ => {}
        }
        Ok(())
    }

    /// What contradicts itself whatever the image is.
    fn check(&self) -> Result<(), Fail> {
        let has = |verb: BitmapVerb| self.actions.iter().any(|action| action.verb() == verb);
        let complaints = [
            (self.actions.is_empty(), "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"),
            (self.granularity != 0 && !has(BitmapVerb::Add), "granularity only supported with --add"),
            (self.source_format.is_some() && self.source.is_none(), "-F only supported with -b"),
            (self.source.is_some() && !has(BitmapVerb::Merge), "Merge bitmap source file only supported with --merge"),
        ];
        match complaints.iter().find(|(applies, _)| *applies) {
            Some((_, text)) => Err(Fail::from(*text)),
            None => Ok(()),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let help = include_str!("help/bitmap.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    arguments.check()?;
    let [file, name] = operands.as_slice() else { return Err("Expecting filename and bitmap name".into()) };
    let image = ImageSpec::of_operand(file, arguments.image_opts, arguments.format.as_deref())?;
    let source = arguments.source.as_ref().map(|file| ImageSpec::of_file(file, arguments.source_format.as_deref()));
    let source = source.transpose()?;
    let edit = Edit {
        settings: &settings,
        image: &image,
        writable: true,
        force_share: false,
        other: source.as_ref(),
        alone: true,
    };
    let mut actions = arguments.actions;
    for action in &mut actions {
        action.granularity = Some(arguments.granularity).filter(|&granularity| granularity != 0);
    }
    let request = |image, source| {
        let (name, actions) = (name.clone().into_bytes(), actions.clone());
        Operation::Bitmap(BitmapRequest { image, name, actions, source })
    };
    match edit.run(request, &mut |_| {})? {
        Ok(_) => Ok(()),
        Err(failure) => {
            let action = usize::try_from(failure.value2).ok().and_then(|index| actions.get(index));
            let verb = action.or(actions.last()).map_or(BitmapVerb::Unspecified, BitmapAction::verb);
            Err(messages::edit::bitmap(verb, name, &failure).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(words: &[(Key, &str)]) -> Option<Fail> {
        let mut arguments = Arguments::default();
        words.iter().for_each(|(key, value)| arguments.take(*key, (*value).to_owned()).unwrap());
        arguments.check().err()
    }

    #[test]
    fn complaints_come_in_order() {
        let add = (Key::Add, "");
        for (words, want) in [
            (&[][..], "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"),
            (&[(Key::Clear, ""), (Key::Granularity, "4k")], "granularity only supported with --add"),
            (&[add, (Key::SourceFormat, "raw")], "-F only supported with -b"),
            (&[add, (Key::SourceFile, "x")], "Merge bitmap source file only supported with --merge"),
        ] {
            assert_eq!(complaint(words), Some(Fail::from(want)));
        }
        assert_eq!(complaint(&[(Key::Merge, "b1"), (Key::SourceFile, "x"), (Key::SourceFormat, "qcow2")]), None);
        assert_eq!(complaint(&[add, (Key::Granularity, "4k")]), None);
    }

    #[test]
    fn granularities() {
        let error = |text: &str| Arguments::default().take(Key::Granularity, text.to_owned()).unwrap_err();
        assert_eq!(error("foo"), Fail::from("Invalid granularity specified: 'foo'."));
        assert_eq!(
            error("10E"),
            Fail::from("Invalid granularity specified. Must be between 0 and 9223372036854775807.")
        );
    }
}
