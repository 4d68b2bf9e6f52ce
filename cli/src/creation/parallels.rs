//! Parallels.

use instar_guest_protocol::message::{Format, ParallelsOptions, Target};

use super::{CreatableFormat, Layout, file_preallocation};
use crate::commands::Objects;
use crate::options::{Kind, Options, Spec, spec};

/// Parallels.
pub static PARALLELS: CreatableFormat =
    CreatableFormat { format: Format::Parallels, options: OPTIONS, layout, compresses: false };

const OPTIONS: &[Spec] = &[
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec("cluster_size", Kind::Size, Some("1048576"), "Parallels image cluster size"),
];

fn layout(options: &Options, _: &Objects) -> Layout {
    let own = ParallelsOptions { cluster_size: options.number("cluster_size") };
    let wire = Target { format: Format::Parallels.into(), parallels: Some(own), ..Target::default() };
    let mut layout = Layout { wire, ..Layout::default() };
    file_preallocation(&mut layout, options);
    layout
}
