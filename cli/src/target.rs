//! The image to be written: what its options ask for, and its files.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use instar_guest_protocol::message::{Format, Preallocation, Qcow2Options};

use crate::cleanup::Leftovers;
use crate::commands::Objects;
use crate::files::Files;
use crate::formats::{self, Driver};
use crate::lock::Purpose;
use crate::messages;
use crate::open::{self, Opened};
use crate::options::{Creatable, Options};
use crate::problem::Problem;
use crate::sandbox::{Granted, Machine};

/// The format that `-f` of create and `-O` of convert name.
///
/// # Errors
/// An unknown format, one that can't be created, or one that this version does not write.
pub fn creatable(name: &str) -> Result<Creatable, Problem> {
    match formats::driver(name) {
        Some(Driver::Provided(Format::Raw)) => Ok(Creatable::Raw),
        Some(Driver::Provided(Format::Qcow2)) => Ok(Creatable::Qcow2),
        Some(Driver::Known(format)) if !formats::can_be_created(format) => {
            Err(Problem::new(format!("Format driver '{name}' does not support image creation")))
        }
        Some(Driver::Known(format)) => Err(Problem::new(messages::not_provided(format))),
        Some(_) => Err(Problem::new(format!("The driver '{name}' is not provided by this version"))),
        None => Err(Problem::new(format!("Unknown file format '{name}'"))),
    }
}

/// Bytes of a backing file's name, by the specification of qcow2.
const MAX_BACKING_NAME: usize = 1023;

/// What creation options mean to the guest, and what is wrong with them.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// qcow2 only.
    pub qcow2: Option<Qcow2Options>,
    /// How much is allocated.
    pub preallocation: Preallocation,
    /// Told before the file is made.
    pub early: Option<Problem>,
    /// Told once the file is made, as qemu-img does.
    pub late: Option<Problem>,
    /// The external data file to be made.
    pub data_file: Option<String>,
}

impl Layout {
    /// Interprets options.
    pub fn of(format: Creatable, options: &Options, objects: &Objects) -> Self {
        match format {
            Creatable::Raw => Self::raw(options),
            Creatable::Qcow2 => Self::qcow2(options, objects),
        }
    }

    fn raw(options: &Options) -> Self {
        let mut layout = Self::default();
        match options.text("preallocation").map(|word| (word, preallocation(word))) {
            None => {}
            Some((_, Some(Preallocation::Metadata))) => {
                layout.late = Some(Problem::new("Unsupported preallocation mode: metadata"));
            }
            Some((_, Some(mode))) => layout.preallocation = mode,
            Some((word, None)) => layout.early = Some(Problem::new(format!("invalid parameter value: {word}"))),
        }
        if options.number("size").is_some_and(is_negative) {
            layout.late = Some(Problem::new("Could not resize file: Invalid argument"));
        }
        layout
    }

    fn qcow2(options: &Options, objects: &Objects) -> Self {
        let mut late = None;
        let mut complain = |text: String| {
            late.get_or_insert(Problem::new(text));
        };
        let mut refuse = |parameter: &str, value: &str| {
            complain(format!("Parameter '{parameter}' does not accept value '{value}'"));
        };
        let version = options.text("compat").and_then(|word| match word {
            "0.10" | "v2" => Some(2),
            "1.1" | "v3" => Some(3),
            _ => {
                refuse("version", word);
                None
            }
        });
        let backing_format = options.text("backing_fmt");
        if let Some(name) = backing_format.filter(|name| formats::driver(name).is_none()) {
            refuse("backing-fmt", name);
        }
        let mode = options.text("preallocation").map(|word| {
            preallocation(word).unwrap_or_else(|| {
                refuse("preallocation", word);
                Preallocation::Off
            })
        });
        let zstd = match options.text("compression_type") {
            None | Some("zlib") => false,
            Some("zstd") => true,
            Some(word) => {
                refuse("compression-type", word);
                false
            }
        };
        if let Some(text) = encryption_problem(options, objects) {
            complain(text);
        }
        if options.number("size").is_some_and(is_negative) {
            complain("Could not resize image: Image size cannot be negative".to_owned());
        }
        if backing_format.is_some() && options.text("backing_file").is_none() {
            complain("Backing format cannot be used without backing file".to_owned());
        }
        if let Some(name) = options.text("backing_file").filter(|name| name.len() > MAX_BACKING_NAME) {
            let format = backing_format.unwrap_or_default();
            complain(format!("Could not assign backing file '{name}' with format '{format}': Invalid argument"));
        }
        let data_file = options.text("data_file").map(str::to_owned);
        let qcow2 = Qcow2Options {
            version,
            cluster_size: options.number("cluster_size"),
            extended_l2: options.switch("extended_l2").unwrap_or(false),
            refcount_bits: options.number("refcount_bits").map(|bits| u32::try_from(bits).unwrap_or(u32::MAX)),
            lazy_refcounts: options.switch("lazy_refcounts").unwrap_or(false),
            zstd,
            data_file: data_file.clone().map(String::into_bytes),
            data_file_raw: options.switch("data_file_raw").unwrap_or(false),
        };
        Self { qcow2: Some(qcow2), preallocation: mode.unwrap_or(Preallocation::Off), early: None, late, data_file }
    }
}

fn is_negative(size: u64) -> bool {
    size > i64::MAX as u64
}

fn preallocation(word: &str) -> Option<Preallocation> {
    Some(match word {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        _ => return None,
    })
}

fn encryption_problem(options: &Options, objects: &Objects) -> Option<String> {
    match options.text("encrypt.format") {
        None if options.switch("encryption") != Some(true) => {
            return options.any_with_prefix("encrypt.").then(|| "Encryption options need encrypt.format".to_owned());
        }
        None | Some("aes" | "luks") => {}
        Some(word) => return Some(format!("Parameter 'format' does not accept value '{word}'")),
    }
    Some(match options.text("encrypt.key-secret") {
        None => "Parameter 'encrypt.key-secret' is required for cipher".to_owned(),
        Some(id) if !objects.has_secret(id) => format!("No secret with id '{id}'"),
        Some(_) => "Encrypted images can't be created by this version".to_owned(),
    })
}

/// A target to be created.
#[derive(Debug)]
pub struct NewTarget {
    /// Its name as typed.
    given: String,
    path: PathBuf,
    data_file: Option<String>,
    late: Option<Problem>,
    files: Vec<Opened>,
    leftovers: Leftovers,
}

impl NewTarget {
    /// A target of that name.
    ///
    /// # Errors
    /// A name that is no file name.
    pub fn new(given: &str, layout: &Layout) -> Result<Self, Problem> {
        // qemu-img finds out about the empty name when it creates the file.
        let path = if given.is_empty() { PathBuf::new() } else { open::path_of(given)? };
        Ok(Self {
            given: given.to_owned(),
            path,
            data_file: layout.data_file.clone(),
            late: layout.late.clone(),
            files: Vec::new(),
            leftovers: Leftovers::default(),
        })
    }

    /// Its name as typed.
    pub fn given(&self) -> &str {
        &self.given
    }

    /// Creates and grants the main file, which must be none of the `sources`.
    ///
    /// # Errors
    /// The message, without the target's name before it.
    pub fn open_main(&mut self, machine: &mut dyn Machine, sources: &Files) -> Result<Granted, Problem> {
        let (path, shown) = (self.path.clone(), self.path.display().to_string());
        self.create(&path, &shown, sources)?;
        match self.late.take() {
            Some(problem) => Err(problem),
            None => self.grant(machine),
        }
    }

    /// Creates and grants the external data file, which must be none of the `sources`.
    ///
    /// # Errors
    /// The message, without the target's name before it.
    pub fn open_data(&mut self, machine: &mut dyn Machine, sources: &Files) -> Result<Granted, Problem> {
        let name = self.data_file.take();
        let name = name.ok_or_else(|| Problem::new("The sandbox asked for a data file that is not wanted"))?;
        self.create(Path::new(&name), &name, sources)?;
        self.grant(machine)
    }

    fn create(&mut self, path: &Path, shown: &str, sources: &Files) -> Result<(), Problem> {
        let created = open::create(path, shown, &mut self.leftovers, &|stat| sources.check_target(stat))?;
        self.files.push(created);
        Ok(())
    }

    fn grant(&mut self, machine: &mut dyn Machine) -> Result<Granted, Problem> {
        match self.files.last() {
            Some(file) => machine.grant(file.fd.as_fd(), true),
            None => Err(Problem::new("The target is not open")),
        }
    }

    /// The target is complete: nothing of it is to be removed.
    pub fn complete(self) {
        self.leftovers.keep();
    }
}

/// Grants an existing file to be written, which must be none of the `sources`.
///
/// # Errors
/// The message, without the target's name around it.
pub fn open_existing(machine: &mut dyn Machine, file: &str, sources: &Files) -> Result<(Opened, Granted), Problem> {
    let mut opened = open::open_to_write(Path::new(file))?;
    opened.lock(Purpose::Write, file)?;
    sources.check_target(&opened.stat)?;
    let granted = machine.grant(opened.fd.as_fd(), true)?;
    Ok((opened, granted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::OptionList;

    fn late(format: Creatable, text: &str) -> String {
        let mut list = OptionList::default();
        list.add(text).unwrap();
        let options = Options::parse(format, &list).unwrap();
        let layout = Layout::of(format, &options, &Objects::default());
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
            assert_eq!(late(Creatable::Qcow2, text), want, "{text}");
        }
        assert_eq!(late(Creatable::Raw, "preallocation=bar"), "invalid parameter value: bar");
        assert_eq!(late(Creatable::Raw, "preallocation=metadata"), "Unsupported preallocation mode: metadata");
    }

    #[test]
    fn formats() {
        let error = |name| creatable(name).unwrap_err().to_string();
        assert_eq!(error("nosuch"), "Unknown file format 'nosuch'");
        assert_eq!(error("dmg"), "Format driver 'dmg' does not support image creation");
        assert!(error("vmdk").contains("not provided"));
    }
}
