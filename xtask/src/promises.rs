//! `docs/security.md` names a test for each promise, and each test that it names is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::run::root;

/// Sections of the promises, and how many each has.
const PROMISES: [(char, usize); 6] = [('A', 5), ('B', 9), ('C', 8), ('D', 5), ('E', 6), ('F', 3)];

/// The names of all functions with `#[test]`, or in `proptest!`, below a directory.
fn tests_below(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
            tests_below(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            // Tests without a harness are plain functions.
            let plain = path.ends_with("cli/tests/sandbox.rs");
            let mut is_test = false;
            for line in text.lines().map(str::trim) {
                is_test |= line == "#[test]" || plain;
                if let Some(rest) = line.strip_prefix("fn ").filter(|_| is_test) {
                    found.extend(rest.split(['(', '<']).next().map(str::to_owned));
                    is_test = false;
                }
            }
        }
    }
}

#[test]
fn each_promise_has_a_test_that_exists() {
    let mut tests = BTreeSet::new();
    tests_below(&root(), &mut tests);
    let text = fs::read_to_string(root().join("docs/security.md")).unwrap();
    let named = |line: &str| -> Vec<String> {
        let code = line.split('`').skip(1).step_by(2);
        code.filter(|code| code.contains('_') && code.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
            .filter(|code| code.chars().any(|c| c.is_ascii_lowercase()))
            .map(str::to_owned)
            .collect()
    };
    let all: Vec<String> = text.lines().flat_map(named).collect();
    let missing: Vec<&String> = all.iter().filter(|name| !tests.contains(*name)).collect();
    assert!(missing.is_empty(), "docs/security.md names tests that are not there: {missing:?}");
    for (section, count) in PROMISES {
        for number in 1..=count {
            let row = text.lines().find(|line| line.starts_with(&format!("| {section}{number} ")));
            let row = row.unwrap_or_else(|| panic!("{section}{number} is not in docs/security.md"));
            assert!(!named(row).is_empty(), "{section}{number} names no test");
        }
    }
}
