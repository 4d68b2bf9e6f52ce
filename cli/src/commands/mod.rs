//! The commands, and what their command lines have in common.

pub mod amend;
pub mod bench;
pub mod bitmap;
pub mod check;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod create;
pub mod dd;
pub mod info;
pub mod map;
pub mod measure;
mod object;
pub mod rebase;
pub mod resize;
pub mod snapshot;

pub use object::{Objects, read_secret_file};

pub use crate::settings::{OWN, Settings, Taken};

use crate::args::{self, Key, Operands, Opt};
use crate::program::{Fail, Outcome, Program, print};

/// A command line: options of the command and of instar, in the order of getopt.
pub struct CommandLine {
    parsed: args::Parsed,
}

impl CommandLine {
    /// Parses by the command's table; `own` ends it with instar's options where the program goes by its own name.
    pub fn parse(program: &Program, table: &[Opt], own: &[Opt], args: &[String]) -> Self {
        Self::parse_as(program, table, own, args, Operands::Anywhere)
    }

    /// The same, with operands as said.
    pub fn parse_as(program: &Program, table: &[Opt], own: &[Opt], args: &[String], operands: Operands) -> Self {
        let mut table = table.to_vec();
        if !program.is_qemu_img() {
            table.extend_from_slice(own);
            table.extend_from_slice(OWN);
        }
        Self { parsed: args::parse(&table, args, operands) }
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
            match settings.take(&found)? {
                Taken::Yes => {}
                Taken::No => take(found.0, found.1.unwrap_or_default())?,
                Taken::Enough => return Ok(None),
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
        "bench" => bench::run(program, settings, args),
        "commit" => commit::run(program, settings, args),
        "dd" => dd::run(program, settings, args),
        "rebase" => rebase::run(program, settings, args),
        "resize" => resize::run(program, settings, args),
        "amend" => amend::run(program, settings, args),
        "check" => check::run(program, settings, args),
        "compare" => compare::run(program, settings, args),
        "map" => map::run(program, settings, args),
        "measure" => measure::run(program, settings, args),
        "bitmap" => bitmap::run(program, settings, args),
        "snapshot" => snapshot::run(program, settings, args),
        _ => return None,
    })
}

/// Is it one of the words that `-t` and `-T` take?
pub fn is_cache_mode(mode: &str) -> bool {
    matches!(mode, "none" | "off" | "writeback" | "writethrough" | "directsync" | "unsafe")
}
