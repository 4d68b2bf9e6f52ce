//! VMDK.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use instar_guest_protocol::message::{Format, Target, VmdkOptions};

use super::{CreatableFormat, Layout, file_preallocation};
use crate::commands::Objects;
use crate::options::{Kind, Options, Spec, spec};
use crate::problem::Problem;

/// VMware. With `-c` nothing changes: the type of image says whether it is compressed.
pub static VMDK: CreatableFormat = CreatableFormat { format: Format::Vmdk, options: OPTIONS, layout, compresses: true };

const OPTIONS: &[Spec] = &[
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec(
        "adapter_type",
        Kind::Text,
        None,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    ),
    spec("backing_file", Kind::Text, None, "File name of a base image"),
    spec("backing_fmt", Kind::Text, None, "Must be 'vmdk' if present"),
    spec("compat6", Kind::Switch, Some("off"), "VMDK version 6 image"),
    spec("hwversion", Kind::Text, Some("undefined"), "VMDK hardware version"),
    spec("toolsversion", Kind::Text, None, "VMware guest tools version"),
    spec(
        "subformat",
        Kind::Text,
        None,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | twoGbMaxExtentSparse | \
         twoGbMaxExtentFlat | streamOptimized} ",
    ),
    spec("zeroed_grain", Kind::Switch, None, "Enable efficient zero writes using the zeroed-grain GTE feature"),
];

const SUBFORMATS: [(&str, Option<ExtentFiles>); 5] = [
    ("monolithicSparse", None),
    ("monolithicFlat", Some(ExtentFiles::One)),
    ("twoGbMaxExtentSparse", Some(ExtentFiles::Many('s'))),
    ("twoGbMaxExtentFlat", Some(ExtentFiles::Many('f'))),
    ("streamOptimized", None),
];
const ADAPTERS: [&str; 4] = ["ide", "lsilogic", "buslogic", "legacyESX"];

/// How the files of extents are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentFiles {
    /// `F-flat.vmdk`.
    One,
    /// `F-s001.vmdk` and so on.
    Many(char),
}

impl ExtentFiles {
    /// The name of file `number`, counted from 0, beside the image `name`; `None` if there is no such file.
    pub fn name(self, name: &str, number: usize) -> Option<String> {
        let base = name.rfind('/').map_or(0, |slash| slash + 1);
        let dot = name[base..].rfind('.').map_or(name.len(), |dot| base + dot);
        let (stem, ending) = name.split_at(dot);
        match self {
            Self::One if number == 0 => Some(format!("{stem}-flat{ending}")),
            Self::One => None,
            Self::Many(letter) => Some(format!("{stem}-{letter}{:03}{ending}", number + 1)),
        }
    }
}

fn layout(options: &Options, _: &Objects) -> Layout {
    let mut layout = Layout::default();
    file_preallocation(&mut layout, options);
    let text = |name: &str, default: &str| options.text(name).unwrap_or(default).to_owned();
    let (subformat, adapter) = (text("subformat", "monolithicSparse"), text("adapter_type", "ide"));
    let compat6 = options.switch("compat6").unwrap_or(false);
    let zeroed_grain = options.switch("zeroed_grain").unwrap_or(false);
    let hardware = options.text("hwversion").filter(|version| *version != "undefined");
    let extent_files = SUBFORMATS.iter().find(|(name, _)| *name == subformat).map(|(_, files)| *files);
    let flat = subformat.ends_with("Flat");
    let early = if options.text("backing_fmt").is_some_and(|name| name != "vmdk") {
        Some("backing_file must be a vmdk image".to_owned())
    } else if !ADAPTERS.contains(&adapter.as_str()) {
        Some(format!("invalid parameter value: {adapter}"))
    } else if extent_files.is_none() {
        Some(format!("invalid parameter value: {subformat}"))
    } else if compat6 && hardware.is_some() {
        Some("compat6 cannot be enabled with hwversion set".to_owned())
    } else if flat && options.text("backing_file").is_some() {
        Some("Flat image can't have backing file".to_owned())
    } else if flat && zeroed_grain {
        Some("Flat image can't enable zeroed grain".to_owned())
    } else {
        None
    };
    if let Some(text) = early {
        layout.early = Some(Problem::new(text));
    }
    let cid = random_number().unwrap_or_else(|error| {
        layout.early.get_or_insert(Problem::new(format!("Could not make a CID: {error}")));
        0
    });
    layout.extent_files = extent_files.flatten();
    let own = VmdkOptions {
        subformat: subformat.into_bytes(),
        cid,
        adapter: adapter.into_bytes(),
        hardware_version: hardware.unwrap_or(if compat6 { "6" } else { "4" }).as_bytes().to_vec(),
        tools_version: text("toolsversion", "2147483647").into_bytes(),
        zeroed_grain,
        // See `name_target`.
        ..VmdkOptions::default()
    };
    layout.wire = Target { format: Format::Vmdk.into(), vmdk: Some(own), ..Target::default() };
    layout
}

/// Tells the guest the name of the target, which stands in descriptors, and whether it will also be filled.
pub fn name_target(wire: &mut Target, target: &str, filled: bool) {
    if let Some(own) = &mut wire.vmdk {
        own.name = Path::new(target).file_name().map(|name| name.as_encoded_bytes().to_vec()).unwrap_or_default();
        own.filled = filled;
    }
}

/// A random number, never one that means something.
fn random_number() -> std::io::Result<u32> {
    let mut bytes = [0; 4];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes).clamp(1, u32::MAX - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_extents() {
        assert_eq!(ExtentFiles::One.name("a.b/x.c.vmdk", 0).unwrap(), "a.b/x.c-flat.vmdk");
        assert_eq!(ExtentFiles::One.name("x", 1), None);
        assert_eq!(ExtentFiles::Many('s').name("a.b/noext", 11).unwrap(), "a.b/noext-s012");
    }
}
