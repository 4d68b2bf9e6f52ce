//! VHDX.

use instar_guest_protocol::message::{Format, Target, VhdxOptions};

use super::{CreatableFormat, Layout, is_negative};
use crate::commands::Objects;
use crate::options::{Kind, Options, Spec, spec};
use crate::problem::Problem;

/// Hyper-V.
pub static VHDX: CreatableFormat =
    CreatableFormat { format: Format::Vhdx, options: OPTIONS, layout, compresses: false };

/// What QEMU calls itself in the files that it makes.
const CREATOR: &str = "QEMU v10.0.2";

const OPTIONS: &[Spec] = &[
    spec("size", Kind::Size, None, "Virtual disk size; max of 64TB."),
    spec("log_size", Kind::Size, Some("1048576"), "Log size; min 1MB."),
    spec(
        "block_size",
        Kind::Size,
        Some("0"),
        "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
    ),
    spec("subformat", Kind::Text, None, "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'."),
    spec(
        "block_state_zero",
        Kind::Switch,
        None,
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using \
         'qemu-img convert' with subformat=dynamic.",
    ),
];

fn layout(options: &Options, _: &Objects) -> Layout {
    let mut late = None;
    let fixed = match options.text("subformat") {
        None | Some("dynamic") => false,
        Some("fixed") => true,
        Some(word) => {
            late = Some(Problem::new(format!("Parameter 'subformat' does not accept value '{word}'")));
            false
        }
    };
    if options.number("size").is_some_and(is_negative) && late.is_none() {
        late = Some(Problem::new("Image size too large; max of 64TB"));
    }
    let vhdx = VhdxOptions {
        block_size: options.number("block_size"),
        log_size: options.number("log_size"),
        fixed,
        block_state_zero: options.switch("block_state_zero"),
        creator: CREATOR.into(),
    };
    let wire = Target { format: Format::Vhdx.into(), vhdx: Some(vhdx), seed: super::seed(), ..Target::default() };
    Layout { wire, early: None, late, data_file: None, extent_files: None }
}
