//! The guest programs are the same wherever they are built.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run::{Result, cargo, root};

/// Two clean builds in different directories tell the same hashes.
pub fn reproduce(_args: &[String]) -> Result {
    let places = [tempfile::tempdir()?, tempfile::Builder::new().prefix("another-place-").tempdir()?];
    let mut hashes = Vec::new();
    for place in &places {
        hashes.push(build(place.path())?);
    }
    let [first, second] = &hashes[..] else { return Err("two builds".into()) };
    print!("{first}");
    match first == second && first.contains("sha256") {
        true => Ok(()),
        false => Err(format!("the builds differ:\n{second}").into()),
    }
}

/// Builds a copy of the sources in `place`, and asks the program for the hashes of its guests.
fn build(place: &Path) -> Result<String> {
    let files = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output()?;
    for name in String::from_utf8(files.stdout)?.split_terminator('\0') {
        let to = place.join(name);
        fs::create_dir_all(to.parent().unwrap_or(place))?;
        fs::copy(root().join(name), to)?;
    }
    let mut command = cargo();
    command.current_dir(place).env_remove("INSTAR_GUEST_DIR").env("CARGO_TARGET_DIR", place.join("target"));
    // The outer program is the same in any profile; its guests have one of their own.
    command.args(["build", "--quiet", "--locked", "--package", "instar"]);
    if env::var_os("INSTAR_GUEST_FAST").is_some() {
        eprintln!("INSTAR_GUEST_FAST is set: the programs are not those of a release");
    }
    if !command.status()?.success() {
        return Err("the build failed".into());
    }
    let told = Command::new(place.join("target/debug/instar")).args(["--version", "--verbose"]).output()?;
    let text = String::from_utf8(told.stdout)?;
    Ok(text.lines().filter(|line| line.contains("sha256")).map(|line| format!("{line}\n")).collect())
}
