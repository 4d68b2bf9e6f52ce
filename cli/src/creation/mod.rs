//! Formats that can be created: their options, and what these mean to the guest. One file for each format.

pub mod luks;
pub mod parallels;
pub mod qcow;
pub mod qcow2;
pub mod qed;
pub mod raw;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

use std::fs::File;
use std::io::Read;
use std::time::{SystemTime, UNIX_EPOCH};

use instar_guest_protocol::message::{Format, Preallocation, Target};

use crate::commands::Objects;
use crate::formats::{self, Driver};
use crate::messages;
use crate::options::{Options, Spec};
use crate::problem::Problem;

/// All of them.
pub static FORMATS: [Creatable; 10] = [
    &luks::LUKS,
    &raw::RAW,
    &qcow2::QCOW2,
    &vhdx::VHDX,
    &vhd::VPC,
    &qcow::QCOW,
    &qed::QED,
    &vdi::VDI,
    &parallels::PARALLELS,
    &vmdk::VMDK,
];

/// A format that can be created, and how.
#[derive(Debug)]
pub struct CreatableFormat {
    /// The format.
    pub format: Format,
    /// Its own `-o` options, in the order in which the `Formatting` line has them.
    pub options: &'static [Spec],
    /// Interprets options.
    pub layout: fn(&Options, &Objects) -> Layout,
    /// `convert -c` stores it compressed.
    pub compresses: bool,
}

/// One of the [`FORMATS`].
pub type Creatable = &'static CreatableFormat;

impl CreatableFormat {
    /// Its driver name.
    pub fn name(&self) -> &'static str {
        formats::name(self.format)
    }
}

/// The format that `-f` of create and `-O` of convert name.
///
/// # Errors
/// An unknown format, one that can't be created, or one that this version does not write.
pub fn creatable(name: &str) -> Result<Creatable, Problem> {
    match formats::driver(name) {
        Some(Driver::Provided(format) | Driver::Known(format)) => match find(format) {
            Some(found) => Ok(found),
            None if format == Format::File => {
                Err(Problem::new(format!("The driver '{name}' is not provided by this version")))
            }
            None if formats::can_be_created(format) => Err(Problem::new(messages::not_provided(format))),
            None => Err(Problem::new(format!("Format driver '{name}' does not support image creation"))),
        },
        Some(_) => Err(Problem::new(format!("The driver '{name}' is not provided by this version"))),
        None => Err(Problem::new(format!("Unknown file format '{name}'"))),
    }
}

/// The format, if it can be created.
pub fn find(format: Format) -> Option<Creatable> {
    FORMATS.into_iter().find(|creatable| creatable.format == format)
}

/// What creation options mean to the guest, and what is wrong with them.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// What the guest is told, [`Target::backing`] excepted.
    pub wire: Target,
    /// Told before the file is made.
    pub early: Option<Problem>,
    /// Told once the file is made, as qemu-img does.
    pub late: Option<Problem>,
    /// The external data file to be made.
    pub data_file: Option<String>,
    /// The image consists of further files.
    pub extent_files: Option<vmdk::ExtentFiles>,
}

/// What the file below makes of `preallocation`, which formats without such an option of their own leave to it. The format then cuts the
/// file to nothing, so that no mode has an effect.
fn file_preallocation(layout: &mut Layout, options: &Options) {
    match options.text("preallocation").map(|word| (word, preallocation(word))) {
        Some((_, Some(Preallocation::Metadata))) => {
            layout.late = Some(Problem::new("Unsupported preallocation mode: metadata"));
        }
        Some((word, None)) => layout.early = Some(Problem::new(format!("invalid parameter value: {word}"))),
        _ => {}
    }
}

/// Random bytes for the identifiers of a new or changed image. They are to differ, not to be secret: without the system's
/// generator, the time and the process will do.
pub fn seed() -> Vec<u8> {
    let mut bytes = [0; 16];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    if read.is_err() {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        bytes = (since ^ u128::from(std::process::id()) << 96).to_le_bytes();
    }
    bytes.to_vec()
}

/// Is it negative, as qemu-img takes it?
fn is_negative(size: u64) -> bool {
    size > i64::MAX as u64
}

/// The mode of that name.
pub fn preallocation(word: &str) -> Option<Preallocation> {
    Some(match word {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::OptionList;

    fn late(format: Creatable, text: &str) -> String {
        let mut list = OptionList::default();
        list.add(text).unwrap();
        let options = Options::parse(format, &list).unwrap();
        let layout = (format.layout)(&options, &Objects::default());
        layout.late.or(layout.early).map(|problem| problem.to_string()).unwrap_or_default()
    }

    #[test]
    fn complaints_about_values() {
        for (text, want) in [
            ("compat=7", "Parameter 'version' does not accept value '7'"),
            ("preallocation=foo", "Parameter 'preallocation' does not accept value 'foo'"),
            ("compression_type=foo", "Parameter 'compression-type' does not accept value 'foo'"),
            ("backing_fmt=foo", "Parameter 'backing-fmt' does not accept value 'foo'"),
            ("backing_fmt=raw", "Backing format cannot be used without backing file"),
            ("encrypt.format=foo", "Parameter 'format' does not accept value 'foo'"),
            ("encryption=on", "Parameter 'encrypt.key-secret' is required for cipher"),
            ("encrypt.format=luks,encrypt.key-secret=s", "No secret with id 's'"),
            ("size=10E", "Could not resize image: Image size cannot be negative"),
            ("compat=v2,compression_type=zlib,preallocation=full", ""),
        ] {
            assert_eq!(late(&qcow2::QCOW2, text), want, "{text}");
        }
        assert_eq!(late(&raw::RAW, "preallocation=bar"), "invalid parameter value: bar");
        assert_eq!(late(&raw::RAW, "preallocation=metadata"), "Unsupported preallocation mode: metadata");
    }

    #[test]
    fn formats() {
        let error = |name| creatable(name).unwrap_err().to_string();
        assert_eq!(error("nosuch"), "Unknown file format 'nosuch'");
        assert_eq!(error("dmg"), "Format driver 'dmg' does not support image creation");
    }
}
