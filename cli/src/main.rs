//! instar: a drop-in replacement for `qemu-img` that never parses an image on the host.
//!
//! ```text
//!  args ─► commands ─► files, confine, lock (what may be opened)
//!             │    └─► sandbox ─► instar-vmm ─► the guest, which parses
//!             └─► output, messages (what the user sees)
//! ```
#![forbid(unsafe_code)]

mod args;
mod blkdebug;
mod chain;
mod cleanup;
mod commands;
mod config;
mod confine;
mod creation;
mod edit;
mod files;
mod formats;
mod guest;
#[cfg(test)]
mod hostile_input;
mod image_opts;
mod layer;
mod lock;
mod messages;
mod nbd;
mod open;
mod options;
mod output;
mod pace;
mod problem;
mod program;
mod qdict;
mod query;
mod safety;
mod sandbox;
mod settings;
mod size;
mod target;
mod version;

use std::process::ExitCode;

use args::{Key, Operands, Opt};
use commands::Settings;
use program::{Fail, Outcome, Program, print};
use version::QemuVersion;

/// Options before the command.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Version, b'V', "version"),
    Opt::value(Key::Trace, b'T', "trace"),
];

/// What `qemu-img --version` says; callers parse it.
const QEMU_IMG_VERSION: &str = "qemu-img version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright (c) 2003-2025 \
                                Fabrice Bellard and the QEMU Project developers\n";

fn main() -> ExitCode {
    let mut args = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    let program = Program::new(args.next().unwrap_or_default());
    let args: Vec<String> = args.collect();
    cleanup::end_orderly_on_panic(program.name());
    let (outcome, command) = run(&program, &args);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(fail) => {
            program.report(&fail, command.as_deref());
            ExitCode::from(fail.status())
        }
    }
}

/// Runs the program; also tells the command, once it is known to be one.
fn run(program: &Program, args: &[String]) -> (Outcome, Option<String>) {
    let mut settings = match Settings::load(program) {
        Ok(settings) => settings,
        Err(problem) => return (Err(problem.into()), None),
    };
    let mut table = OPTIONS.to_vec();
    if !program.is_qemu_img() {
        table.push(Opt::long_flag(Key::Verbose, "verbose").spelled_out());
        table.extend_from_slice(commands::OWN);
    }
    let parsed = args::parse(&table, args, Operands::EndOptions);
    for found in &parsed.options {
        match found {
            (Key::Help, _) => return (print(&help(program)), None),
            (Key::Version, _) => {
                let verbose = parsed.options.iter().any(|(key, _)| *key == Key::Verbose);
                return (print(&version(program, settings.qemu_version, verbose)), None);
            }
            (Key::Verbose, _) => {}
            (Key::Trace, pattern) => {
                let options = pattern.as_deref().unwrap_or_default();
                let pattern = options.split(',').next().unwrap_or_default();
                let pattern = pattern.strip_prefix("enable=").unwrap_or(pattern);
                program.warn(&format!("trace event '{pattern}' does not exist"));
            }
            _ => {
                if let Err(fail) = settings.take(found) {
                    return (Err(fail), None);
                }
            }
        }
    }
    if let Some(complaint) = parsed.error {
        return (Err(Fail::Getopt(complaint)), None);
    }
    let Some((name, rest)) = parsed.operands.split_first() else {
        return (Err(Fail::Usage("Not enough arguments".to_owned())), None);
    };
    match commands::run(program, settings, name, rest) {
        Some(outcome) => (outcome, Some(name.clone())),
        None => (Err(Fail::Usage(format!("Command not found: {name}"))), None),
    }
}

/// What callers read to know what to expect; `verbose`: also of what the program itself is, with the sums of the embedded programs.
fn version(program: &Program, qemu: QemuVersion, verbose: bool) -> String {
    let mut text = match qemu == QemuVersion::default() {
        true => QEMU_IMG_VERSION.to_owned(),
        false => format!("qemu-img version {qemu}.0\n"),
    };
    if !program.is_qemu_img() {
        text = text.replacen("qemu-img", "instar", 1);
    }
    if verbose {
        text.push_str(&own_version());
        text.extend(guest::hashes().map(|(name, hash)| format!("guest {name}: sha256 {hash}\n")));
    }
    text
}

fn own_version() -> String {
    format!("instar {}, Copyright (c) the instar developers\n", env!("CARGO_PKG_VERSION"))
}

fn help(program: &Program) -> String {
    match program.is_qemu_img() {
        true => include_str!("commands/help/qemu-img.txt").to_owned(),
        false => format!("{}{}", own_version(), include_str!("commands/help/instar.txt")),
    }
}
