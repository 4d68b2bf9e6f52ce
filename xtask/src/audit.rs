//! What the project depends on: licences, sources, versions, and what is linked where. Needs no network.
//!
//! cargo-deny and cargo-audit run too where they are installed; advisories need their data base on this machine.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::run::{Result, cargo, installed, root, run};

/// Crates that parse images. Neither the monitor nor the command line links any but those listed in [`LINKED`].
const PARSERS: [&str; 8] = [
    "instar-qcow2",
    "instar-vmdk",
    "instar-vhd",
    "instar-vhdx",
    "instar-legacy",
    "instar-raw",
    "instar-luks",
    "instar-guest",
];
/// What is linked all the same: the command line names ciphers as the LUKS crate does, and measures how long a derivation takes.
const LINKED: [(&str, &str); 1] = [("instar", "instar-luks")];
/// Where all foreign crates come from.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// `audit`.
pub fn audit(_args: &[String]) -> Result {
    let findings = findings()?;
    for finding in &findings {
        println!("{finding}");
    }
    tools()?;
    match findings.len() {
        0 => Ok(()),
        n => Err(format!("{n} findings").into()),
    }
}

/// All that should not be.
fn findings() -> Result<Vec<String>> {
    let policy = fs::read_to_string(root().join("deny.toml"))?;
    let metadata = metadata()?;
    let packages: Vec<Package> = list(&metadata["packages"]).iter().map(Package::of).collect();
    let mut findings = Vec::new();
    licences(&packages, &strings_of(&policy, "allow"), &mut findings);
    sources(&packages, &mut findings)?;
    duplicates(&packages, &strings_of(&policy, "skip"), &mut findings);
    linked(&metadata, &packages, &mut findings);
    println!("{} packages: licences, sources, versions and what is linked where are looked at", packages.len());
    Ok(findings)
}

/// What cargo knows of the packages that are used on our platform.
fn metadata() -> Result<Value> {
    let mut command = cargo();
    command.args(["metadata", "--format-version", "1", "--locked"]);
    let output = command.args(["--filter-platform", "x86_64-unknown-linux-gnu"]).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

struct Package {
    id: String,
    name: String,
    version: String,
    licence: String,
    source: Option<String>,
}

impl Package {
    fn of(package: &Value) -> Self {
        let text = |key: &str| package[key].as_str().unwrap_or_default().to_owned();
        Self {
            id: text("id"),
            name: text("name"),
            version: text("version"),
            licence: text("license"),
            source: package["source"].as_str().map(str::to_owned),
        }
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The texts in quotes of the array that a line `key = [...]` holds.
fn strings_of(policy: &str, key: &str) -> BTreeSet<String> {
    let line = policy.lines().find(|line| line.starts_with(key) && line[key.len()..].trim_start().starts_with('='));
    line.unwrap_or_default().split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Each package may be used under a licence of the list.
fn licences(packages: &[Package], allowed: &BTreeSet<String>, findings: &mut Vec<String>) {
    for package in packages {
        if !is_allowed(&package.licence, allowed) {
            findings.push(format!("{} {}: licence '{}'", package.name, package.version, package.licence));
        }
    }
}

/// An SPDX expression: alternatives of what is needed together. The older `/` separates alternatives, too.
fn is_allowed(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let expression = expression.replace('/', " OR ");
    // Only one expression in use has parentheses, and there they group alternatives among what is needed together.
    if let Some((inner, rest)) = expression.strip_prefix('(').and_then(|text| text.split_once(") AND ")) {
        return is_allowed(inner, allowed) && is_allowed(rest, allowed);
    }
    let together = |part: &str| part.split(" AND ").all(|licence| allowed.contains(licence.trim()));
    expression.split(" OR ").any(together)
}

/// Everything is ours or from crates.io, with a checksum in the lock file.
fn sources(packages: &[Package], findings: &mut Vec<String>) -> Result {
    let lock = fs::read_to_string(root().join("Cargo.lock"))?;
    for entry in lock.split("[[package]]").skip(1) {
        if entry.contains("\nsource = ") && !entry.contains("\nchecksum = ") {
            findings.push(format!("no checksum in Cargo.lock: {}", entry.lines().nth(1).unwrap_or_default()));
        }
    }
    for package in packages {
        let known = match &package.source {
            None => package.name.starts_with("instar") || package.name == "xtask",
            Some(source) => source == REGISTRY,
        };
        if !known {
            findings.push(format!("{}: from {:?}", package.name, package.source));
        }
    }
    Ok(())
}

fn duplicates(packages: &[Package], skipped: &BTreeSet<String>, findings: &mut Vec<String>) {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        versions.entry(&package.name).or_default().push(&package.version);
    }
    for (name, versions) in &versions {
        match (versions.len() > 1, skipped.contains(*name)) {
            (true, false) => findings.push(format!("{name}: several versions: {versions:?}")),
            (false, true) => findings.push(format!("{name}: is in deny.toml as a duplicate and is none")),
            _ => {}
        }
    }
}

/// The host links no parser.
fn linked(metadata: &Value, packages: &[Package], findings: &mut Vec<String>) {
    let names: BTreeMap<&str, &str> =
        packages.iter().map(|package| (package.id.as_str(), package.name.as_str())).collect();
    let mut needs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in list(&metadata["resolve"]["nodes"]) {
        let normal = list(&node["deps"]).iter().filter(|dep| {
            // Neither tests nor build scripts.
            list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null())
        });
        let normal = normal.filter_map(|dep| names.get(dep["pkg"].as_str()?).copied());
        if let Some(name) = node["id"].as_str().and_then(|id| names.get(id)) {
            needs.insert(name, normal.collect());
        }
    }
    for program in ["instar-vmm", "instar"] {
        let (mut found, mut next) = (BTreeSet::new(), vec![program]);
        while let Some(name) = next.pop() {
            if found.insert(name) {
                next.extend(needs.get(name).into_iter().flatten());
            }
        }
        if found.len() < 5 {
            findings.push(format!("{program}: its dependencies are not told"));
        }
        for parser in PARSERS.iter().filter(|parser| found.contains(**parser)) {
            if !LINKED.contains(&(program, parser)) {
                findings.push(format!("{program} links {parser}"));
            }
        }
    }
}

/// The tools that know more, where they are.
fn tools() -> Result {
    let data_base = env::var_os("CARGO_HOME").map(PathBuf::from);
    let data_base = data_base.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let advisories =
        data_base.is_some_and(|home| ["advisory-db", "advisory-dbs"].iter().any(|name| home.join(name).exists()));
    if installed("cargo", "deny") || installed("cargo-deny", "--version") {
        run(cargo().args(["deny", "--offline", "check", "bans", "licenses", "sources"]))?;
        if advisories {
            run(cargo().args(["deny", "--offline", "check", "advisories"]))?;
        }
    } else {
        println!("cargo-deny is not installed: yanked versions are not looked for");
    }
    match advisories && installed("cargo-audit", "--version") {
        true => run(cargo().args(["audit", "--no-fetch"])),
        false if !advisories => {
            println!(
                "there is no data base of advisories here (cargo audit fetches one): known holes are not looked for"
            );
            Ok(())
        }
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_links_no_parser() {
        assert_eq!(findings().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn licence_expressions() {
        let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"].map(str::to_owned).into();
        for (expression, expected) in [
            ("MIT", true),
            ("GPL-2.0", false),
            ("GPL-2.0 OR MIT", true),
            ("GPL-2.0/MIT", true),
            ("MIT AND GPL-2.0", false),
            ("(MIT OR GPL-2.0) AND Unicode-3.0", true),
            ("(MIT OR Apache-2.0) AND GPL-2.0", false),
            ("", false),
        ] {
            assert_eq!(is_allowed(expression, &allowed), expected, "{expression}");
        }
    }
}
