//! The commands, and what their command lines have in common.

pub mod convert;
pub mod create;
pub mod info;
mod object;

pub use object::Objects;

use std::path::PathBuf;
use std::time::Duration;

use crate::args::{self, Found, Key, Operands, Opt};
use crate::confine::Confinement;
use crate::problem::Problem;
use crate::program::{Fail, Outcome, Program, print};
use crate::sandbox::Limits;
use crate::size;

/// The environment variable beside `--allow-dir`: directories separated by colons.
const ALLOW_DIRS: &str = "INSTAR_ALLOW_DIRS";

/// Settings of instar itself; qemu-img has none of these.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Directories beneath which images may name files.
    allow_dirs: Vec<PathBuf>,
    /// Limits of the sandbox.
    pub limits: Limits,
    /// What qemu-img lets pass in a damaged image is an error (`docs/quirks.md`).
    pub strict: bool,
}

/// Options that instar adds to each command. They must be spelled out, so that no abbreviation of qemu-img's changes its
/// meaning.
pub const OWN: &[Opt] = &[
    Opt::long_value(Key::AllowDir, "allow-dir").spelled_out(),
    Opt::long_value(Key::MaxGuestMemory, "max-guest-memory").spelled_out(),
    Opt::long_value(Key::Threads, "threads").spelled_out(),
    Opt::long_value(Key::Timeout, "timeout").spelled_out(),
    Opt::long_flag(Key::DebugGuest, "debug-guest").spelled_out(),
    Opt::long_flag(Key::IgnoreQuirks, "ignore-quirks").spelled_out(),
];

impl Settings {
    /// What the environment says.
    pub fn from_environment() -> Self {
        let dirs = std::env::var_os(ALLOW_DIRS).unwrap_or_default();
        let allow_dirs = std::env::split_paths(&dirs).filter(|dir| !dir.as_os_str().is_empty()).collect();
        Self { allow_dirs, ..Self::default() }
    }

    /// Takes an option, if it is one of these.
    ///
    /// # Errors
    /// The message about its argument.
    pub fn take(&mut self, (key, value): &Found) -> Result<bool, Fail> {
        const MEBIBYTE: u64 = 1 << 20;
        let value = value.as_deref().unwrap_or_default();
        match key {
            Key::AllowDir => self.allow_dirs.push(PathBuf::from(value)),
            Key::MaxGuestMemory => {
                self.limits.memory = size::parse_named("guest memory", value, 16 * MEBIBYTE, 65536 * MEBIBYTE)?;
            }
            Key::Threads => {
                let threads = size::parse_count("number of threads", value, 1, 16)?;
                self.limits.threads = Some(threads as u32);
            }
            Key::Timeout => {
                let seconds = size::parse_count("timeout", value, 1, 31_536_000)?;
                self.limits.timeout = Some(Duration::from_secs(seconds));
            }
            Key::DebugGuest => self.limits.debug = true,
            Key::IgnoreQuirks => self.strict = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Where images may name files.
    ///
    /// # Errors
    /// A directory that can't be opened.
    pub fn confinement(&self) -> Result<Confinement, Problem> {
        Confinement::new(&self.allow_dirs)
    }
}

/// A command line: options of the command and of instar, in the order of getopt.
pub struct CommandLine {
    parsed: args::Parsed,
}

impl CommandLine {
    /// Parses by the command's table; `own` ends it with instar's options where the program goes by its own name.
    pub fn parse(program: &Program, table: &[Opt], own: &[Opt], args: &[String]) -> Self {
        let mut table = table.to_vec();
        if !program.is_qemu_img() {
            table.extend_from_slice(own);
            table.extend_from_slice(OWN);
        }
        Self { parsed: args::parse(&table, args, Operands::Anywhere) }
    }

    /// Hands each option to `take`, then says what getopt complained about.
    ///
    /// `Ok(None)`: help was printed and nothing is left to do.
    ///
    /// # Errors
    /// What `take` says of an option, or getopt's complaint.
    pub fn walk(
        self,
        settings: &mut Settings,
        help: &str,
        mut take: impl FnMut(Key, String) -> Result<(), Fail>,
    ) -> Result<Option<Vec<String>>, Fail> {
        for found in self.parsed.options {
            if found.0 == Key::Help {
                print(help)?;
                return Ok(None);
            }
            if !settings.take(&found)? {
                let (key, value) = found;
                take(key, value.unwrap_or_default())?;
            }
        }
        match self.parsed.error {
            Some(complaint) => Err(Fail::Getopt(complaint)),
            None => Ok(Some(self.parsed.operands)),
        }
    }
}

/// Runs a command by its name; `None` if there is no such command.
pub fn run(program: &Program, settings: Settings, name: &str, args: &[String]) -> Option<Outcome> {
    Some(match name {
        "info" => info::run(program, settings, args),
        "convert" => convert::run(program, settings, args),
        "create" => create::run(program, settings, args),
        "amend" | "bench" | "bitmap" | "check" | "commit" | "compare" | "dd" | "map" | "measure" | "rebase"
        | "resize" | "snapshot" => Err(Fail::from(format!("The command '{name}' is not provided by this version"))),
        _ => return None,
    })
}
