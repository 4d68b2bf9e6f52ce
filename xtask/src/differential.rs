//! Random sequences of commands, done by instar on one copy and by qemu-img on another, until the time is up.
//!
//! `--binary PATH` takes a ready instar. `--minutes N` (default 5), `--seed S` (default: of the clock; it is printed), `--steps N` per sequence,
//! `--once` for one sequence only.

use std::fs;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use instar_hostile::differential::differ;

use crate::run::{Result, installed, number_option, release_binary};

/// Runs sequences until the time is up.
pub fn differential(args: &[String]) -> Result {
    for tool in ["qemu-img", "qemu-io"] {
        if !installed(tool, "--version") {
            return Err(format!("{tool} is not installed: nothing to compare with").into());
        }
    }
    let minutes = number_option(args, "--minutes")?.unwrap_or(5);
    let steps = number_option(args, "--steps")?.unwrap_or(12);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    let first_seed = number_option(args, "--seed")?.unwrap_or(clock);
    let once = args.iter().any(|arg| arg == "--once");
    let given = args.iter().position(|arg| arg == "--binary").and_then(|at| args.get(at + 1));
    let binary = given.map_or_else(release_binary, |path| Ok(fs::canonicalize(path)?))?;
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    let (mut sequences, mut commands) = (0u64, 0u64);
    let mut seed = first_seed;
    while Instant::now() < end {
        let outcome = differ(&binary, seed, steps)
            .map_err(|error| format!("{error}\n(cargo xtask differential --once --steps {steps} --seed {seed})"))?;
        if let Some(note) = outcome.note {
            println!("seed {seed} ends early: {note}");
        }
        commands += outcome.commands;
        sequences += 1;
        if once {
            break;
        }
        seed = seed.wrapping_add(1);
    }
    println!("{sequences} sequences from seed {first_seed}, {commands} commands: no difference");
    Ok(())
}
