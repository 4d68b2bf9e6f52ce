//! `resize`.

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{Cause, Failure, Format, Preallocation, ResizeRequest, SizeChange};

use super::{CommandLine, Settings};
use crate::args::{Key, Operands, Opt};
use crate::creation;
use crate::edit::Edit;
use crate::image_opts::ImageSpec;
use crate::messages;
use crate::options::parse_size;
use crate::problem::Problem;
use crate::program::{Fail, Outcome, Program, print};

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::long_value(Key::Preallocation, "preallocation"),
    Opt::long_flag(Key::Shrink, "shrink"),
    Opt::long_value(Key::Object, "object"),
];

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    preallocation: Preallocation,
    shrink: bool,
    quiet: bool,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Quiet => self.quiet = true,
            Key::Format => self.format = Some(value),
            Key::ImageOpts => self.image_opts = true,
            Key::Preallocation => {
                let mode = creation::preallocation(&value);
                self.preallocation = mode.ok_or_else(|| format!("Invalid preallocation mode '{value}'"))?;
            }
            Key::Shrink => self.shrink = true,
            _ => {}
        }
        Ok(())
    }
}

/// What the size operand says.
fn parse_change(text: &str) -> Result<(SizeChange, u64), Problem> {
    let (change, size) = match text.split_at_checked(1) {
        Some(("+", size)) => (SizeChange::Grow, size),
        Some(("-", size)) => (SizeChange::Shrink, size),
        _ => (SizeChange::Absolute, text),
    };
    Ok((change, parse_size("size", size)?))
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse_as(program, OPTIONS, &[], args, Operands::WithNumber);
    let help = include_str!("help/resize.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    let [file, size, more @ ..] = operands.as_slice() else {
        return Err(Fail::Usage("Expecting image file name and size".to_owned()));
    };
    if !more.is_empty() {
        return Err(Fail::Usage("Extra argument(s) in command line".to_owned()));
    }
    let (change, amount) = parse_change(size)?;
    let image = ImageSpec::of_operand(file, arguments.image_opts, arguments.format.as_deref())?;
    let edit =
        Edit { settings: &settings, image: &image, writable: true, force_share: false, other: None, alone: false };
    let request = |image, _| {
        Operation::Resize(ResizeRequest {
            image,
            change: change.into(),
            amount,
            shrink: arguments.shrink,
            preallocation: arguments.preallocation.into(),
        })
    };
    let outcome = edit.run(request, &mut |_| {})?;
    let refused = |failure: &Failure| matches!(failure.cause(), Cause::ResizeRefused);
    if image.format == Format::Raw && image.has_fixed_size() && !outcome.as_ref().is_err_and(refused) {
        return Err("Cannot resize fixed-size raw disks".into());
    }
    match outcome {
        Ok(_) if arguments.quiet => Ok(()),
        Ok(_) => print("Image resized.\n"),
        Err(failure) => {
            program.report(&messages::motion::resize(&failure).into(), Some("resize"));
            if let Some(warning) = messages::motion::resize_warning(&failure) {
                program.warn(warning);
            }
            Err(Fail::Said)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_change("5M").unwrap(), (SizeChange::Absolute, 5 << 20));
        assert_eq!(parse_change("+1.5k").unwrap(), (SizeChange::Grow, 1536));
        assert_eq!(parse_change("-0x10").unwrap(), (SizeChange::Shrink, 16));
        for text in ["", "+", "-", "+-5", "x", "5Mx"] {
            assert!(parse_change(text).is_err(), "{text}");
        }
    }
}
