//! The commands on the images, and what must hold whatever the image.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use crate::case::{Case, Due};
use crate::place::{Place, file_tells_secrets, tells_secrets};
use crate::process::{Ended, Program};

/// Something that must not happen.
#[derive(Clone, Debug)]
pub struct Finding {
    /// On which image.
    pub case: String,
    /// By which command.
    pub command: String,
    /// What.
    pub what: String,
}

/// What a trial gave.
#[derive(Debug, Default)]
pub struct Report {
    /// Images tried.
    pub cases: u64,
    /// Commands run.
    pub runs: u64,
    /// Runs that exit status 0 ended.
    pub successes: u64,
    /// Images that qemu-img was asked about, too.
    pub asked_qemu: u64,
    /// Images that both convert, to the same bytes.
    pub agreed: u64,
    /// All that must not happen.
    pub findings: Vec<Finding>,
    /// For each command the greatest processor time, and on which image.
    pub slowest: BTreeMap<&'static str, (Duration, String)>,
    /// The greatest resident size of a process, KiB, and by what.
    pub biggest: (u64, String),
}

/// Tries images.
#[derive(Debug)]
pub struct Trial {
    program: Program,
    qemu: Option<Program>,
    place: Place,
    /// Processor time that a command on metadata may take.
    budget: Option<Duration>,
    /// What came out.
    pub report: Report,
}

/// A command as it is tried.
struct Step {
    name: &'static str,
    words: &'static [&'static str],
    /// Options in front of the image: twice the format for `compare`.
    formats: &'static [&'static str],
    /// Words behind the image.
    after: &'static [&'static str],
    kind: Kind,
    outputs: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Describes the image alone.
    Describe,
    /// Looks at the tables of the chain.
    Map,
    /// Reads the disk.
    Read,
    /// Changes the image.
    Change,
}

const fn step(name: &'static str, words: &'static [&'static str], after: &'static [&'static str], kind: Kind) -> Step {
    Step { name, words, formats: &["-f"], after, kind, outputs: &[] }
}

const OUT: &str = "out";

const STEPS: &[Step] = &[
    step("info", &["info"], &[], Kind::Describe),
    step("info --chain", &["info", "--backing-chain", "--output=json"], &[], Kind::Map),
    step("info --safety", &["info", "--safety"], &[], Kind::Describe),
    step("snapshot -l", &["snapshot", "-l"], &[], Kind::Describe),
    step("check", &["check"], &[], Kind::Describe),
    step("map", &["map", "--output=json"], &[], Kind::Map),
    step("measure", &["measure", "-O", "qcow2"], &[], Kind::Map),
    Step { outputs: &[OUT], ..step("convert", &["convert", "-O", "raw"], &[OUT], Kind::Read) },
    Step { outputs: &[OUT], ..step("convert -c", &["convert", "-c", "-O", "qcow2"], &[OUT], Kind::Read) },
    Step { formats: &["-f", "-F"], ..step("compare", &["compare"], &["image"], Kind::Read) },
    step("resize", &["resize"], &["+1M"], Kind::Change),
    step("commit", &["commit"], &[], Kind::Change),
    step("check -r", &["check", "-r", "all"], &[], Kind::Change),
];

impl Trial {
    /// Of a program, compared with qemu-img if it is given.
    ///
    /// # Errors
    /// Of the system.
    pub fn new(program: Program, qemu: Option<Program>, budget: Option<Duration>) -> io::Result<Self> {
        let limits = ["prlimit", "--as=4294967296", "--fsize=1073741824", "--cpu=20", "--core=0"];
        let qemu = qemu.map(|qemu| qemu.behind(&limits));
        Ok(Self { program, qemu, place: Place::new()?, budget, report: Report::default() })
    }

    /// The place it uses.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Runs all commands on an image, each on a fresh copy.
    ///
    /// # Errors
    /// Of the system.
    pub fn attempt(&mut self, case: &Case) -> io::Result<()> {
        self.report.cases += 1;
        let mut filled = false;
        for step in STEPS.iter().filter(|step| !case.describe_only || step.kind == Kind::Describe) {
            // A big image is no slower to read than to write again.
            if !filled || step.kind == Kind::Change {
                self.place.fill(case)?;
                fs::write(self.place.home().join("passphrase"), "no such passphrase")?;
            }
            filled = step.kind != Kind::Change;
            let ended = self.program.run(&self.place.home(), &arguments(case, step))?;
            self.report.runs += 1;
            self.report.successes += u64::from(ended.code == Some(0));
            self.account(case, step, &ended);
            for what in self.judge(case, step, &ended)? {
                self.report.findings.push(Finding { case: case.name.clone(), command: step.name.to_owned(), what });
            }
            if step.outputs == [OUT] {
                let _ = fs::remove_file(self.place.home().join(OUT));
            }
        }
        if !self.place.canary_is_whole()? {
            let what = "the canary has changed".to_owned();
            self.report.findings.push(Finding { case: case.name.clone(), command: String::new(), what });
        }
        Ok(())
    }

    fn account(&mut self, case: &Case, step: &Step, ended: &Ended) {
        let slowest = self.report.slowest.entry(step.name).or_default();
        if ended.cpu > slowest.0 {
            *slowest = (ended.cpu, case.name.clone());
        }
        if ended.peak > self.report.biggest.0 {
            self.report.biggest = (ended.peak, format!("{} {}", step.name, case.name));
        }
    }

    fn judge(&self, case: &Case, step: &Step, ended: &Ended) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        let mut find = |bad: bool, what: &str| {
            if bad {
                found.push(format!("{what} ({})", shown(ended)));
            }
        };
        find(ended.hung, "hangs");
        find(ended.signal.is_some(), "ended by a signal");
        find(ended.left, "left a process behind");
        let statuses: &[i32] = match step.name {
            "check" | "check -r" => &[0, 1, 2, 3, 63],
            "compare" => &[0, 1, 2, 3, 4],
            _ => &[0, 1],
        };
        find(ended.code.is_some_and(|code| !statuses.contains(&code)), "odd exit status");
        let said = [&ended.stdout[..], &ended.stderr].concat();
        find(ended.code != Some(0) && said.is_empty(), "failed without a word");
        let text = String::from_utf8_lossy(&said);
        for bad in ["panicked", "parser crashed", "parser gave up", "no progress", "Sandbox:", "RUST_BACKTRACE"] {
            find(text.contains(bad), "crashed inside");
        }
        let control = |character: char| character.is_control() && !matches!(character, '\n' | '\t');
        find(text.contains(control), "control characters in the output");
        find(tells_secrets(&said), "tells what it must not read");
        find(is_due_to_fail(case, step) && ended.code == Some(0), "succeeded where an error is due");
        find(is_due_to_succeed(case, step) && ended.code != Some(0), "failed on a legal image");
        let over = self.budget.is_some_and(|budget| ended.cpu > budget);
        find(over && matches!(step.kind, Kind::Describe | Kind::Map), "takes too long");
        drop(text);
        if let Some(touched) = self.place.outside()? {
            found.push(touched);
        }
        let mut ignore = vec!["passphrase"];
        if ended.code == Some(0) {
            ignore.extend(step.outputs);
        }
        if step.kind == Kind::Change {
            // Of a chain, commit may change the base, and what is changed grows by what it needs.
            ignore.extend(case.files.iter().map(|(name, _)| name.as_str()));
        }
        found.extend(self.place.difference(case, &ignore)?);
        for output in step.outputs {
            let path = self.place.home().join(output);
            if path.exists() && file_tells_secrets(&path)? {
                found.push("the output holds what it must not read".to_owned());
            }
        }
        Ok(found)
    }

    /// Where qemu-img may be asked: do both convert, and to the same bytes? To be called after all [attempts](Self::attempt), whose
    /// memory is measured.
    ///
    /// # Errors
    /// Of the system.
    pub fn ask_qemu(&mut self, case: &Case) -> io::Result<()> {
        let Some(qemu) = self.qemu.as_ref().filter(|_| case.ask_qemu && case.format != Some("luks")) else {
            return Ok(());
        };
        let convert =
            STEPS.iter().find(|step| step.name == "convert").map(|step| arguments(case, step)).unwrap_or_default();
        let args: Vec<String> = convert
            .iter()
            .map(|word| word.as_str())
            .map(|word| if word == OUT { "qemu" } else { word }.to_owned())
            .collect();
        self.place.fill(case)?;
        let ours = self.program.run(&self.place.home(), &convert)?;
        let theirs = qemu.run(&self.place.home(), &args)?;
        self.report.asked_qemu += 1;
        let home = self.place.home();
        let problem = match (ours.code, theirs.code) {
            (Some(0), Some(0)) => match same_contents(&home.join(OUT), &home.join("qemu"))? {
                true => {
                    self.report.agreed += 1;
                    None
                }
                false => Some("reads other bytes than qemu-img".to_owned()),
            },
            (Some(0), Some(1)) if !too_big(&theirs) && case.due != Due::Liberty => {
                Some(format!("reads what qemu-img refuses: {}", shown(&theirs)))
            }
            (Some(1), Some(0)) if !matches!(case.due, Due::Refusal | Due::Unreadable | Due::Strictness) => {
                Some(format!("refuses what qemu-img reads: {}", shown(&ours)))
            }
            // qemu-img was stopped by its limits, or crashed.
            _ => None,
        };
        let _ = fs::remove_file(home.join("qemu"));
        if let Some(what) = problem.filter(|_| case.differs.is_none()) {
            self.report.findings.push(Finding { case: case.name.clone(), command: "convert".to_owned(), what });
        }
        // Looking at the outside is what qemu-img may do.
        let _ = self.place.canary_is_whole()?;
        Ok(())
    }
}

fn arguments(case: &Case, step: &Step) -> Vec<String> {
    let mut words: Vec<String> = step.words.iter().map(|word| (*word).to_owned()).collect();
    if let Some(format) = case.format {
        words.extend(step.formats.iter().flat_map(|option| [(*option).to_owned(), format.to_owned()]));
    }
    if case.format == Some("luks") {
        words.extend(["--passphrase-file".to_owned(), "passphrase".to_owned()]);
    }
    words.push(case.image.to_owned());
    words.extend(step.after.iter().map(|word| if *word == "image" { case.image } else { word }.to_owned()));
    words
}

fn is_due_to_fail(case: &Case, step: &Step) -> bool {
    match case.due {
        // The list of snapshots is shown without a look at the rest.
        Due::Refusal => step.name != "snapshot -l",
        Due::Unreadable => step.kind == Kind::Read,
        // Writing to an image opens what is below it only where it must.
        Due::Confinement => matches!(step.kind, Kind::Map | Kind::Read) || step.name == "commit",
        Due::Contents | Due::Description | Due::Anything | Due::Strictness | Due::Liberty => false,
    }
}

fn is_due_to_succeed(case: &Case, step: &Step) -> bool {
    match case.due {
        Due::Contents => matches!(step.name, "info" | "convert" | "compare"),
        Due::Description | Due::Confinement => step.name == "info",
        Due::Unreadable | Due::Refusal | Due::Anything | Due::Strictness | Due::Liberty => false,
    }
}

/// qemu-img failed since the output would become too big for the limits that it runs under.
fn too_big(ended: &Ended) -> bool {
    String::from_utf8_lossy(&ended.stderr).contains("File too large")
}

/// Exit status and first words, fit for a line.
fn shown(ended: &Ended) -> String {
    let text = [&ended.stderr[..], &ended.stdout].concat();
    let text: String = String::from_utf8_lossy(&text).chars().take(300).collect();
    let status = ended.code.map_or_else(|| format!("signal {:?}", ended.signal), |code| code.to_string());
    format!("{status}, {} ms, {:?}", ended.cpu.as_millis(), text.trim_end())
}

/// Have two files the same bytes? Of holes beyond the first bytes, only their length is compared.
fn same_contents(ours: &Path, theirs: &Path) -> io::Result<bool> {
    const MOST: u64 = 256 << 20;
    let (ours, theirs) = (File::open(ours)?, File::open(theirs)?);
    if ours.metadata()?.len() != theirs.metadata()?.len() {
        return Ok(false);
    }
    let (mut ours, mut theirs) = (ours.take(MOST), theirs.take(MOST));
    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let len = ours.read(&mut one)?;
        if len == 0 {
            return Ok(true);
        }
        theirs.read_exact(&mut other[..len])?;
        if one[..len] != other[..len] {
            return Ok(false);
        }
    }
}
