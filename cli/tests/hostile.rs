//! A part of the hostile images and of the kills; all of them run in `cargo xtask security`.

mod support;

use std::collections::BTreeSet;

use instar_hostile::{Program, Trial, faults, kill, suite};
use support::can_run;

/// Every so-many-th image is tried here.
const STEP: usize = 17;

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_instar"))
}

#[test]
fn hostile_images_do_no_harm() {
    if !can_run(false) {
        return;
    }
    let mut trial = Trial::new(program(), None, None).unwrap();
    let cases = suite(&trial.place().surroundings().unwrap());
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "every image has a name of its own");
    assert!(cases.len() >= 500, "{}", cases.len());
    for case in cases.iter().step_by(STEP) {
        trial.attempt(case).unwrap();
    }
    assert!(trial.report.findings.is_empty(), "{:#?}", trial.report.findings);
    // The oracle would be of no use if nothing ever succeeded.
    assert!(trial.report.successes > trial.report.cases);
}

/// Of some commands and some of their calls; all of them in `cargo xtask security calls`.
#[test]
fn failing_calls_leave_the_old_or_the_new() {
    if !can_run(false) {
        return;
    }
    let report = faults::calls(&program(), 9, 20).unwrap();
    assert!(report.findings.is_empty(), "{:#?}", report.findings);
    assert!(report.runs == 0 || (report.runs > 8 && report.failures > 2), "{report:?}");
}

#[test]
fn killed_commands_leave_the_old_or_the_new() {
    if !can_run(false) {
        return;
    }
    let report = kill::run(&program(), None, 2, None).unwrap();
    assert!(report.findings.is_empty(), "{:#?}", report.findings);
    assert!(report.runs >= 90 && report.met > 0, "{report:?}");
}
