//! Hostile images, kills and failing systems: what `docs/security.md` promises, at full length.

use std::path::PathBuf;
use std::time::Duration;

use instar_hostile::{Case, Program, Report, Trial, faults, kill, suite};

use crate::run::{Result, installed, number_option, release_binary};

/// Processor time that a command on metadata may take on any image.
const BUDGET: Duration = Duration::from_secs(2);
/// Resident size that no process may exceed, KiB.
const MOST_MEMORY: u64 = 256 << 10;

/// `security [--binary PATH] [--only WORD] [--kills N] [PART…]`, where a part is `images`, `kills`, `faults` or `calls`.
pub fn security(args: &[String]) -> Result {
    let option = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
    let binary = match option("--binary") {
        Some(path) => PathBuf::from(path).canonicalize()?,
        None => release_binary()?,
    };
    let parts: Vec<&str> =
        ["images", "kills", "faults", "calls"].into_iter().filter(|part| args.iter().any(|arg| arg == part)).collect();
    let wanted = |part: &str| parts.is_empty() || parts.contains(&part);
    let program = Program::new(binary);
    let mut findings = 0;
    if wanted("images") {
        findings += images(&program, option("--only").map(String::as_str))?;
    }
    if wanted("kills") {
        let times = number_option(args, "--kills")?.unwrap_or(100);
        findings += kills(&program, u32::try_from(times)?, option("--only").map(String::as_str))?;
    }
    if wanted("faults") {
        findings += failing(&faults::run(&program, 100)?, "without what they need");
    }
    if wanted("calls") {
        findings += failing(&faults::calls(&program, 1, 1)?, "with a system call that goes wrong");
    }
    match findings {
        0 => Ok(()),
        n => Err(format!("{n} findings").into()),
    }
}

fn images(program: &Program, only: Option<&str>) -> Result<usize> {
    let qemu = installed("qemu-img", "--version").then(|| Program::new("qemu-img"));
    if qemu.is_none() {
        eprintln!("qemu-img is not installed: nothing is compared with it");
    }
    let mut trial = Trial::new(program.clone(), qemu, Some(BUDGET))?;
    let cases = suite(&trial.place().surroundings()?);
    let chosen: Vec<&Case> = cases.iter().filter(|case| only.is_none_or(|word| case.name.contains(word))).collect();
    for (ask, case) in [false, true].into_iter().flat_map(|ask| chosen.iter().map(move |case| (ask, case))) {
        let before = trial.report.findings.len();
        if ask { trial.ask_qemu(case) } else { trial.attempt(case) }?;
        for finding in &trial.report.findings[before..] {
            println!("{} [{}]: {}", finding.case, finding.command, finding.what);
        }
    }
    Ok(tell(&trial.report))
}

fn tell(report: &Report) -> usize {
    println!(
        "{} hostile images, {} runs ({} successful), {} compared with qemu-img ({} converted by both to the same bytes)",
        report.cases, report.runs, report.successes, report.asked_qemu, report.agreed
    );
    for (command, (time, case)) in &report.slowest {
        println!("  {command:14} at most {:5} ms of processor time ({case})", time.as_millis());
    }
    println!("  most memory of a process: {} MiB ({})", report.biggest.0 >> 10, report.biggest.1);
    report.findings.len() + usize::from(report.biggest.0 > MOST_MEMORY)
}

fn kills(program: &Program, times: u32, only: Option<&str>) -> Result<usize> {
    let judge = installed("qemu-img", "--version").then(|| Program::new("qemu-img"));
    let report = kill::run(program, judge, times, only)?;
    for finding in &report.findings {
        println!("{finding}");
    }
    println!(
        "{} writing commands, ended {} times ({} before their end, {} with a part of the output there)",
        report.commands, report.runs, report.met, report.parts
    );
    Ok(report.findings.len())
}

fn failing(report: &faults::Report, how: &str) -> usize {
    for finding in &report.findings {
        println!("{finding}");
    }
    println!("{} runs {how} ({} failed)", report.runs, report.failures);
    report.findings.len()
}
