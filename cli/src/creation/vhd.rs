//! VHD, which qemu-img calls vpc.

use std::time::{SystemTime, UNIX_EPOCH};

use instar_guest_protocol::message::{Format, Target, VhdOptions};

use super::{CreatableFormat, Layout, is_negative};
use crate::commands::Objects;
use crate::messages;
use crate::options::{Kind, Options, Spec, spec};
use crate::problem::Problem;

/// Virtual PC and Hyper-V.
pub static VPC: CreatableFormat = CreatableFormat { format: Format::Vpc, options: OPTIONS, layout, compresses: false };

/// Seconds from 1970 to 2000.
const YEAR_2000: u64 = 946_684_800;

const OPTIONS: &[Spec] = &[
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec(
        "subformat",
        Kind::Text,
        None,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
    spec(
        "force_size",
        Kind::Switch,
        None,
        "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based calculation",
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
        late = Some(Problem::new(messages::size_too_large(Format::Vpc)));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    // Its lower 32 bits, as others do after the year 2136.
    let timestamp = now.saturating_sub(YEAR_2000) as u32;
    let vhd = VhdOptions { fixed, force_size: options.switch("force_size").unwrap_or(false), timestamp };
    let wire = Target { format: Format::Vpc.into(), vhd: Some(vhd), seed: super::seed(), ..Target::default() };
    Layout { wire, early: None, late, data_file: None, extent_files: None }
}
