//! QED.

use instar_guest_protocol::message::{Format, QedOptions, Target};

use super::{CreatableFormat, Layout, file_preallocation};
use crate::commands::Objects;
use crate::formats;
use crate::options::{Kind, Options, Spec, spec};
use crate::problem::Problem;

/// QEMU enhanced disk.
pub static QED: CreatableFormat = CreatableFormat { format: Format::Qed, options: OPTIONS, layout, compresses: false };

const OPTIONS: &[Spec] = &[
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec("backing_file", Kind::Text, None, "File name of a base image"),
    spec("backing_fmt", Kind::Text, None, "Image format of the base image"),
    spec("cluster_size", Kind::Size, Some("65536"), "Cluster size (in bytes)"),
    spec("table_size", Kind::Size, None, "L1/L2 table size (in clusters)"),
];

fn layout(options: &Options, _: &Objects) -> Layout {
    let own = QedOptions { cluster_size: options.number("cluster_size"), table_size: options.number("table_size") };
    let wire = Target { format: Format::Qed.into(), qed: Some(own), ..Target::default() };
    let mut layout = Layout { wire, ..Layout::default() };
    file_preallocation(&mut layout, options);
    if let Some(name) = options.text("backing_fmt").filter(|name| formats::driver(name).is_none()) {
        let text = format!("Parameter 'backing-fmt' does not accept value '{name}'");
        layout.late.get_or_insert(Problem::new(text));
    }
    layout
}
