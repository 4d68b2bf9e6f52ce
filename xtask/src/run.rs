//! Running commands, in the workspace root.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Result of a task.
pub type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// The workspace root.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// The cargo that runs this task.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command with inherited output; fails unless it succeeds.
pub fn run(command: &mut Command) -> Result {
    let shown = format!("{command:?}");
    match command.status()? {
        status if status.success() => Ok(()),
        status => Err(format!("{shown}: {status}").into()),
    }
}

/// Can this program be run?
pub fn installed(program: &str, argument: &str) -> bool {
    let mut command = Command::new(program);
    command.arg(argument).current_dir(root()).stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Builds the release binary and tells where it is.
pub fn release_binary() -> Result<PathBuf> {
    run(cargo().args(["build", "--release", "--package", "instar"]))?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join("release/instar"))
}

/// The number behind an option, if it is there.
pub fn number_option(args: &[String], name: &str) -> Result<Option<u64>> {
    let Some(at) = args.iter().position(|arg| arg == name) else { return Ok(None) };
    let value = args.get(at + 1).ok_or_else(|| format!("{name} needs a number"))?;
    Ok(Some(value.parse().map_err(|_| format!("{name} {value}: not a number"))?))
}
