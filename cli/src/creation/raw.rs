//! raw.

use instar_guest_protocol::message::{Format, Preallocation, Target};

use super::{CreatableFormat, Layout, is_negative, preallocation};
use crate::commands::Objects;
use crate::options::{Kind, Options, Spec, spec};
use crate::problem::Problem;

/// The bytes themselves.
pub static RAW: CreatableFormat = CreatableFormat { format: Format::Raw, options: OPTIONS, layout, compresses: false };

const OPTIONS: &[Spec] = &[spec("size", Kind::Size, None, "Virtual disk size")];

fn layout(options: &Options, _: &Objects) -> Layout {
    let mut layout = Layout { wire: Target { format: Format::Raw.into(), ..Target::default() }, ..Layout::default() };
    match options.text("preallocation").map(|word| (word, preallocation(word))) {
        None => {}
        Some((_, Some(Preallocation::Metadata))) => {
            layout.late = Some(Problem::new("Unsupported preallocation mode: metadata"));
        }
        Some((_, Some(mode))) => layout.wire.preallocation = mode.into(),
        Some((word, None)) => layout.early = Some(Problem::new(format!("invalid parameter value: {word}"))),
    }
    if options.number("size").is_some_and(is_negative) {
        layout.late = Some(Problem::new("Could not resize file: Invalid argument"));
    }
    layout
}
