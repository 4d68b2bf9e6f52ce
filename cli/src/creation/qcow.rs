//! qcow, version 1.

use instar_guest_protocol::message::{Format, Target};

use super::{CreatableFormat, Layout, file_preallocation};
use crate::commands::Objects;
use crate::formats;
use crate::options::{Kind, Options, Spec, spec};
use crate::problem::Problem;

/// QEMU copy on write, version 1.
pub static QCOW: CreatableFormat = CreatableFormat { format: Format::Qcow, options: OPTIONS, layout, compresses: true };

const OPTIONS: &[Spec] = &[
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec("backing_file", Kind::Text, None, "File name of a base image"),
    spec("backing_fmt", Kind::Text, None, "Format of the backing image"),
    spec(
        "encryption",
        Kind::Switch,
        None,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    spec("encrypt.format", Kind::Text, None, "Encrypt the image, format choices: 'aes'"),
    spec("encrypt.key-secret", Kind::Text, None, "ID of the secret that provides the AES encryption key"),
];

fn layout(options: &Options, objects: &Objects) -> Layout {
    let mut layout = Layout { wire: Target { format: Format::Qcow.into(), ..Target::default() }, ..Layout::default() };
    file_preallocation(&mut layout, options);
    let unknown = options.text("backing_fmt").filter(|name| formats::driver(name).is_none());
    let text = unknown.map(|name| format!("unrecognized backing format '{name}'"));
    if let Some(text) = text.or_else(|| encryption_problem(options, objects)) {
        layout.late.get_or_insert(Problem::new(text));
    }
    layout
}

fn encryption_problem(options: &Options, objects: &Objects) -> Option<String> {
    match options.text("encrypt.format") {
        None if options.switch("encryption") != Some(true) => {
            return options.text("encrypt.key-secret").map(|_| "Parameter 'encrypt.format' is missing".to_owned());
        }
        None | Some("aes") => {}
        Some("luks") => return Some("Unsupported encryption format".to_owned()),
        Some(word) => return Some(format!("Parameter 'format' does not accept value '{word}'")),
    }
    Some(match options.text("encrypt.key-secret") {
        None => "Parameter 'encrypt.key-secret' is required for cipher".to_owned(),
        Some(id) if !objects.has_secret(id) => format!("No secret with id '{id}'"),
        Some(_) => "Encrypted images can't be created by this version".to_owned(),
    })
}
