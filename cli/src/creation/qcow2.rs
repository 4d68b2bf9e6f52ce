//! qcow2.

use instar_guest_protocol::message::{Format, LuksOptions, Preallocation, Qcow2Options, Target};

use super::{CreatableFormat, Layout, is_negative, luks, preallocation};
use crate::commands::Objects;
use crate::formats;
use crate::options::{Kind, Options, Spec, spec};
use crate::problem::Problem;

/// QEMU copy on write.
pub static QCOW2: CreatableFormat =
    CreatableFormat { format: Format::Qcow2, options: OPTIONS, layout, compresses: true };

/// Bytes of a backing file's name, by the specification of qcow2.
const MAX_BACKING_NAME: usize = 1023;

const OPTIONS: &[Spec] = &[
    spec(
        "encryption",
        Kind::Switch,
        None,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    spec("encrypt.format", Kind::Text, None, "Encrypt the image, format choices: 'aes', 'luks'"),
    spec("encrypt.key-secret", Kind::Text, None, "ID of secret providing qcow AES key or LUKS passphrase"),
    spec("encrypt.cipher-alg", Kind::Text, None, "Name of encryption cipher algorithm"),
    spec("encrypt.cipher-mode", Kind::Text, None, "Name of encryption cipher mode"),
    spec("encrypt.ivgen-alg", Kind::Text, None, "Name of IV generator algorithm"),
    spec("encrypt.ivgen-hash-alg", Kind::Text, None, "Name of IV generator hash algorithm"),
    spec("encrypt.hash-alg", Kind::Text, None, "Name of encryption hash algorithm"),
    spec("encrypt.iter-time", Kind::Number, None, "Time to spend in PBKDF in milliseconds"),
    spec("cluster_size", Kind::Size, Some("65536"), "qcow2 cluster size"),
    spec("extended_l2", Kind::Switch, Some("off"), "Extended L2 tables"),
    spec("preallocation", Kind::Text, None, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    spec("compression_type", Kind::Text, Some("zlib"), "Compression method used for image cluster compression"),
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec("compat", Kind::Text, None, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    spec("backing_file", Kind::Text, None, "File name of a base image"),
    spec("backing_fmt", Kind::Text, None, "Image format of the base image"),
    spec("data_file", Kind::Text, None, "File name of an external data file"),
    spec("data_file_raw", Kind::Switch, None, "The external data file must stay valid as a raw image"),
    spec("lazy_refcounts", Kind::Switch, Some("off"), "Postpone refcount updates"),
    spec("refcount_bits", Kind::Number, Some("16"), "Width of a reference count entry in bits"),
];

fn layout(options: &Options, objects: &Objects) -> Layout {
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
    let encryption = Encryption::of_options(options, objects).unwrap_or_else(|problem| {
        complain(problem.to_string());
        Encryption::None
    });
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
    let (aes_passphrase, luks) = match encryption {
        Encryption::None => (None, None),
        Encryption::Aes(passphrase) => (Some(passphrase), None),
        Encryption::Luks(luks) => (None, Some(*luks)),
    };
    let qcow2 = Qcow2Options {
        version,
        cluster_size: options.number("cluster_size"),
        extended_l2: options.switch("extended_l2").unwrap_or(false),
        refcount_bits: options.number("refcount_bits").map(|bits| u32::try_from(bits).unwrap_or(u32::MAX)),
        lazy_refcounts: options.switch("lazy_refcounts").unwrap_or(false),
        zstd,
        data_file: data_file.clone().map(String::into_bytes),
        data_file_raw: options.switch("data_file_raw").unwrap_or(false),
        aes_passphrase,
    };
    let wire = Target {
        format: Format::Qcow2.into(),
        qcow2: Some(qcow2),
        luks,
        preallocation: mode.unwrap_or(Preallocation::Off).into(),
        ..Target::default()
    };
    Layout { wire, early: None, late, data_file, extent_files: None }
}

/// How the image is encrypted.
enum Encryption {
    None,
    Aes(Vec<u8>),
    Luks(Box<LuksOptions>),
}

impl Encryption {
    fn of_options(options: &Options, objects: &Objects) -> Result<Self, Problem> {
        let alias = options.switch("encryption");
        match options.text("encrypt.format") {
            Some(_) if alias.is_some() => {
                Err(Problem::new("'encrypt.format' and its alias 'encryption' can't be used at the same time"))
            }
            Some("luks") => Ok(Self::Luks(Box::new(luks::of_options(options, "encrypt.", objects)?))),
            Some("aes") => Self::aes(options, objects),
            None if alias == Some(true) => Self::aes(options, objects),
            Some(word) => Err(Problem::new(format!("Parameter 'format' does not accept value '{word}'"))),
            None if options.any_with_prefix("encrypt.") => Err(Problem::new("Parameter 'encrypt.format' is missing")),
            None => Ok(Self::None),
        }
    }

    fn aes(options: &Options, objects: &Objects) -> Result<Self, Problem> {
        let id = options.text("encrypt.key-secret");
        let id = id.ok_or_else(|| Problem::new("Parameter 'encrypt.key-secret' is required for cipher"))?;
        let mut passphrase = objects.passphrase(id)?;
        Ok(Self::Aes(std::mem::take(&mut *passphrase)))
    }
}
