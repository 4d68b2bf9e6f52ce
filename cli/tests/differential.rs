//! Sequences of commands that once came out differently from qemu-img's; `cargo xtask differential` looks for more.

mod support;

use std::path::Path;

use instar_hostile::differential::differ;
use support::can_run;

/// Seeds that found a difference. A change of how sequences are drawn makes other sequences of them, which must come out the same, too.
const SEEDS: &[u64] = &[
    9_000_002, 9_100_006, 9_200_003, 9_300_004, 9_300_005, 9_400_005, 9_500_004, 9_600_009, 9_600_015, 9_600_067,
    9_600_123, 9_600_133, 9_065, 31_091,
];
const STEPS: u64 = 12;

#[test]
fn what_once_differed_differs_no_more() {
    if !can_run(true) {
        return;
    }
    for &seed in SEEDS {
        let outcome =
            differ(Path::new(env!("CARGO_BIN_EXE_instar")), seed, STEPS).unwrap_or_else(|error| panic!("{error}"));
        assert!(outcome.commands > STEPS / 2 || outcome.note.is_some(), "{seed}: {outcome:?}");
    }
}
