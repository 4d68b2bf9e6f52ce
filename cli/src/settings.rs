//! Settings of instar itself; qemu-img has none of these. The configuration files come first, then the environment, then the
//! command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{self, BackingChoice, Format, Key, Source};
use zeroize::Zeroizing;

use crate::args::{Found, Key as ArgKey, Opt};
use crate::commands::{Objects, read_secret_file};
use crate::config::{self, Config, Output};
use crate::confine::Confinement;
use crate::image_opts::{Below, ImageSpec};
use crate::output::progress::Show;
use crate::problem::Problem;
use crate::program::{Fail, Program};
use crate::sandbox::{Limits, StatsForm};
use crate::size;
use crate::version::QemuVersion;

/// The environment variable beside `--allow-dir`: directories separated by colons.
const ALLOW_DIRS: &str = "INSTAR_ALLOW_DIRS";

const MEBIBYTE: u64 = 1 << 20;

/// The settings of a run.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Directories beneath which images may name files.
    allow_dirs: Vec<PathBuf>,
    /// Limits of the sandbox.
    pub limits: Limits,
    /// What qemu-img lets pass in a damaged image is an error (`docs/quirks.md`).
    pub strict: bool,
    /// What has led to disclosures is allowed as in qemu-img (`docs/quirks.md`).
    unsafe_quirks: bool,
    /// A file without any known mark is not taken for raw, unless its format is given.
    require_known_raw: bool,
    /// The form of the output where `--output` does not say.
    pub output: Output,
    /// The qemu-img whose outputs are given.
    pub qemu_version: QemuVersion,
    /// Progress is shown, and how.
    progress: Show,
    /// Objects of the command line, secrets among them.
    pub objects: Objects,
    /// The file with the passphrase of encrypted images that name no secret.
    passphrase_file: Option<String>,
    /// What deriving a key may cost.
    max_key_iterations: Option<u64>,
}

/// Was an option one of those that all commands have?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It was.
    Yes,
    /// The command knows it.
    No,
    /// It was, and with it all is done.
    Enough,
}

/// Options that instar adds to each command. They must be spelled out, so that no abbreviation of qemu-img's changes its
/// meaning.
pub const OWN: &[Opt] = &[
    Opt::long_value(ArgKey::AllowDir, "allow-dir").spelled_out(),
    Opt::long_value(ArgKey::MaxGuestMemory, "max-guest-memory").spelled_out(),
    Opt::long_value(ArgKey::Threads, "threads").spelled_out(),
    Opt::long_value(ArgKey::Timeout, "timeout").spelled_out(),
    Opt::long_flag(ArgKey::DebugGuest, "debug-guest").spelled_out(),
    Opt::long_flag(ArgKey::IgnoreQuirks, "ignore-quirks").spelled_out(),
    Opt::long_flag(ArgKey::UnsafeQuirks, "unsafe-quirks").spelled_out(),
    Opt::long_flag(ArgKey::RequireKnownRaw, "require-known-raw").spelled_out(),
    Opt::long_value(ArgKey::QemuVersion, "qemu-version").spelled_out(),
    Opt::long_value(ArgKey::PassphraseFile, "passphrase-file").spelled_out(),
    Opt::long_value(ArgKey::MaxKeyIterations, "max-key-iterations").spelled_out(),
    Opt::long_optional(ArgKey::Stats, "stats").spelled_out(),
    Opt::long_optional(ArgKey::ProgressForm, "progress").spelled_out(),
];

impl Settings {
    /// What the configuration files and the environment say.
    ///
    /// # Errors
    /// A configuration file that can't be read or understood.
    pub fn load(program: &Program) -> Result<Self, Problem> {
        let mut settings = Self::default();
        for path in config::paths() {
            if let Some(config) = config::read(&path)? {
                let at = |problem: Problem| problem.within(path.path().display().to_string());
                settings.configure(config, program, path.path()).map_err(at)?;
            }
        }
        let dirs = std::env::var_os(ALLOW_DIRS).unwrap_or_default();
        settings.allow_dirs.extend(std::env::split_paths(&dirs).filter(|dir| !dir.as_os_str().is_empty()));
        Ok(settings)
    }

    fn configure(&mut self, config: Config, program: &Program, path: &Path) -> Result<(), Problem> {
        let home = path.parent().unwrap_or(Path::new("/"));
        if let Some(dirs) = config.allow_dirs {
            self.allow_dirs = dirs.into_iter().map(|dir| home.join(dir)).collect();
        }
        if let Some(memory) = config.max_guest_memory {
            self.limits.memory = guest_memory(&memory)?;
        }
        if let Some(seconds) = config.timeout {
            self.limits.timeout = Some(time_limit(&seconds.to_string())?);
        }
        if let Some(threads) = config.threads {
            self.limits.threads = Some(thread_count(&threads.to_string())?);
        }
        self.limits.user = config.sandbox_user.or(self.limits.user);
        self.strict = config.ignore_quirks.unwrap_or(self.strict);
        self.unsafe_quirks = config.unsafe_quirks.unwrap_or(self.unsafe_quirks);
        self.require_known_raw = config.require_known_raw.unwrap_or(self.require_known_raw);
        if let Some(version) = config.qemu_version {
            self.qemu_version = QemuVersion::parse(&version)?;
        }
        // Who calls qemu-img reads what qemu-img prints.
        if let Some(output) = config.output.filter(|_| !program.is_qemu_img()) {
            self.output = output;
        }
        Ok(())
    }

    /// Takes an option, if it is one of these.
    ///
    /// # Errors
    /// The message about its argument.
    pub fn take(&mut self, (key, value): &Found) -> Result<Taken, Fail> {
        let text = value.as_deref().unwrap_or_default();
        match key {
            ArgKey::AllowDir => self.allow_dirs.push(PathBuf::from(text)),
            ArgKey::MaxGuestMemory => self.limits.memory = guest_memory(text)?,
            ArgKey::Threads => self.limits.threads = Some(thread_count(text)?),
            ArgKey::Timeout => self.limits.timeout = Some(time_limit(text)?),
            ArgKey::PassphraseFile => self.passphrase_file = Some(text.to_owned()),
            ArgKey::MaxKeyIterations => {
                let count = size::parse_count("number of key iterations", text, 1, u64::MAX >> 1);
                self.max_key_iterations = Some(count.map_err(Problem::new)?);
            }
            ArgKey::Object if !self.objects.add(text)? => return Ok(Taken::Enough),
            ArgKey::Object => {}
            ArgKey::DebugGuest => self.limits.debug = true,
            ArgKey::IgnoreQuirks => self.strict = true,
            ArgKey::UnsafeQuirks => self.unsafe_quirks = true,
            ArgKey::RequireKnownRaw => self.require_known_raw = true,
            ArgKey::QemuVersion => self.qemu_version = QemuVersion::parse(text)?,
            ArgKey::Stats => {
                self.limits.stats = Some(match value.as_deref() {
                    None | Some("human") => StatsForm::Human,
                    Some("json") => StatsForm::Json,
                    Some(other) => {
                        return Err(Fail::Usage(format!("--stats expects 'human' or 'json' not '{other}'")));
                    }
                });
            }
            ArgKey::ProgressForm => match text {
                "bar" => self.progress = Show::Bar,
                "" | "percent" => self.progress = Show::Percent,
                other => return Err(Fail::Usage(format!("--progress expects 'bar' or 'percent' not '{other}'"))),
            },
            _ => return Ok(Taken::No),
        }
        Ok(Taken::Yes)
    }

    /// An image that the user named, as the guest is told of it.
    pub fn source(&self, device: u32, format: Format) -> Source {
        Source {
            device,
            format: format.into(),
            snapshot: None,
            strict: self.strict,
            known_only: self.require_known_raw,
            follow_probed: self.unsafe_quirks,
            named_dmg: false,
            vhd_size: 0,
            key: None,
            data_file_named: false,
            detached_header: false,
            below: Vec::new(),
        }
    }

    /// Likewise, with what the image's name says of its format.
    pub fn source_of(&self, device: u32, spec: &ImageSpec) -> Source {
        Source {
            named_dmg: spec.is_named_dmg(),
            vhd_size: spec.vhd_size.into(),
            detached_header: spec.header.is_some(),
            ..self.source(device, spec.format)
        }
    }

    /// Likewise, with the key of an encrypted one, for those who look at its contents.
    ///
    /// # Errors
    /// As [`key`](Self::key).
    pub fn readable(&self, device: u32, spec: &ImageSpec) -> Result<Source, Problem> {
        let data_file_named = spec.data_file.is_some();
        Ok(Source { key: self.key(spec)?, data_file_named, below: self.below(spec)?, ..self.source_of(device, spec) })
    }

    /// What the guest is told of the images below one.
    ///
    /// # Errors
    /// A secret that is not there or can't be read. The message is without the image's name.
    pub fn below(&self, spec: &ImageSpec) -> Result<Vec<message::Below>, Problem> {
        let of = |choice: BackingChoice| message::Below { choice: choice.into(), ..message::Below::default() };
        let mut told = Vec::new();
        let mut said = spec.below.clone();
        while told.len() < MAX_CHAIN_DEPTH {
            let given = match said {
                Below::Recorded => break,
                Below::Hidden { .. } => {
                    told.push(of(BackingChoice::Hidden));
                    break;
                }
                Below::Given(given) => given,
            };
            let choice = if given.is_named() { BackingChoice::Named } else { BackingChoice::Adjusted };
            // What is wrong with it is told once it is asked for.
            let Some(spec) = given.likely() else {
                told.push(of(choice));
                break;
            };
            let within = |problem| {
                (0..=told.len()).fold(problem, |problem: Problem, _| problem.within("Could not open backing file"))
            };
            let key = spec.key_secret.as_ref().map(|id| self.objects.passphrase(id)).transpose().map_err(within)?;
            let source = self.source_of(0, &spec);
            told.push(message::Below {
                choice: choice.into(),
                format: source.format,
                key: key.map(|passphrase| self.key_of(passphrase)),
                vhd_size: source.vhd_size,
                known_only: source.known_only && given.is_named(),
                follow_probed: given.is_named(),
                named_dmg: source.named_dmg,
                data_file_named: spec.data_file.is_some(),
                detached_header: source.detached_header,
            });
            said = spec.below;
        }
        Ok(told)
    }

    /// What opens an encrypted image: the secret that it names, or else `--passphrase-file`.
    ///
    /// # Errors
    /// A secret that is not there or can't be read. The message is without the image's name.
    pub fn key(&self, spec: &ImageSpec) -> Result<Option<Key>, Problem> {
        let passphrase = match (&spec.key_secret, &self.passphrase_file) {
            (Some(id), _) => self.objects.passphrase(id)?,
            (None, Some(file)) => {
                let mut bytes = read_secret_file(file)?;
                // Editors end a file by a line feed that nobody means.
                if bytes.last() == Some(&b'\n') {
                    bytes.pop();
                }
                bytes
            }
            (None, None) => return Ok(None),
        };
        Ok(Some(self.key_of(passphrase)))
    }

    fn key_of(&self, mut passphrase: Zeroizing<Vec<u8>>) -> Key {
        Key {
            passphrase: std::mem::take(&mut *passphrase),
            max_iterations: self.max_key_iterations.unwrap_or(0),
            // The rest of the guest needs little beside it.
            max_memory: self.limits.memory.saturating_sub(48 * MEBIBYTE).max(MEBIBYTE),
        }
    }

    /// How progress is shown. `asked`: `-p`; `quiet`: `-q`.
    pub fn progress(&self, asked: bool, quiet: bool) -> Show {
        match self.progress {
            _ if quiet => Show::Nothing,
            Show::Nothing if asked => Show::Percent,
            show => show,
        }
    }

    /// Where images may name files.
    ///
    /// # Errors
    /// A directory that can't be opened.
    pub fn confinement(&self) -> Result<Confinement, Problem> {
        match self.unsafe_quirks {
            true => Confinement::new(&[PathBuf::from("/")]),
            false => Confinement::new(&self.allow_dirs),
        }
    }
}

fn guest_memory(text: &str) -> Result<u64, Problem> {
    size::parse_named("guest memory", text, 16 * MEBIBYTE, 65536 * MEBIBYTE).map_err(Problem::new)
}

fn thread_count(text: &str) -> Result<u32, Problem> {
    Ok(size::parse_count("number of threads", text, 1, 16).map_err(Problem::new)? as u32)
}

fn time_limit(text: &str) -> Result<Duration, Problem> {
    Ok(Duration::from_secs(size::parse_count("timeout", text, 1, 31_536_000).map_err(Problem::new)?))
}
