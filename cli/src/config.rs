//! Configuration files.
//!
//! Read one after the other, a later one wins: `/etc/instar/config.toml`, `$XDG_CONFIG_HOME/instar/config.toml` (by default below
//! `~/.config`) and the file that `INSTAR_CONFIG` names. An empty `INSTAR_CONFIG` reads none of them.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::problem::{Problem, os_text};
use crate::program::Fail;

/// What a file may say.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Directories beneath which images may name files; relative ones begin at the file's own directory.
    pub allow_dirs: Option<Vec<PathBuf>>,
    /// Memory that the virtual machine may use at most, such as `"256M"`.
    pub max_guest_memory: Option<String>,
    /// Give up after so many seconds.
    pub timeout: Option<u64>,
    /// Virtual processors.
    pub threads: Option<u64>,
    /// The user and group that the sandbox's process becomes where the program is run by root (default: 65534, nobody).
    pub sandbox_user: Option<u32>,
    /// As `--ignore-quirks`.
    pub ignore_quirks: Option<bool>,
    /// As `--unsafe-quirks`.
    pub unsafe_quirks: Option<bool>,
    /// As `--require-known-raw`.
    pub require_known_raw: Option<bool>,
    /// As `--qemu-version`.
    pub qemu_version: Option<String>,
    /// Form of the output where `--output` does not say.
    pub output: Option<Output>,
}

/// Form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// For people.
    #[default]
    Human,
    /// JSON.
    Json,
}

impl Output {
    /// What `--output` says.
    ///
    /// # Errors
    /// The message.
    pub fn parse(text: &str) -> Result<Self, Fail> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(Fail::Usage(format!("--output expects 'human' or 'json' not '{text}'"))),
        }
    }
}

/// A file that is looked for.
#[derive(Debug, PartialEq, Eq)]
pub enum ConfigPath {
    /// It need not be there.
    Usual(PathBuf),
    /// The user named it.
    Named(PathBuf),
}

impl ConfigPath {
    /// Its place.
    pub fn path(&self) -> &Path {
        match self {
            Self::Usual(path) | Self::Named(path) => path,
        }
    }
}

/// The files that are looked for.
pub fn paths() -> Vec<ConfigPath> {
    let named = env::var_os("INSTAR_CONFIG");
    if named.as_ref().is_some_and(|name| name.is_empty()) {
        return Vec::new();
    }
    let mut paths = vec![ConfigPath::Usual(PathBuf::from("/etc/instar/config.toml"))];
    // By the specification of base directories a relative one is not valid.
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let user = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")));
    paths.extend(user.map(|directory| ConfigPath::Usual(directory.join("instar/config.toml"))));
    paths.extend(named.map(|name| ConfigPath::Named(name.into())));
    paths
}

/// Reads a file; `None` if it is not there and need not be.
///
/// # Errors
/// A file that can't be read; a line that can't be understood, with its number.
pub fn read(path: &ConfigPath) -> Result<Option<Config>, Problem> {
    let shown = path.path().display();
    let text = match fs::read_to_string(path.path()) {
        Ok(text) => text,
        Err(error) if is_absent(&error) && matches!(path, ConfigPath::Usual(_)) => return Ok(None),
        Err(error) => {
            let reason = error.raw_os_error().map_or_else(|| error.to_string(), os_text);
            return Err(Problem::new(reason).within(format!("{shown}: the configuration can't be read")));
        }
    };
    parse(&text).map(Some).map_err(|(line, reason)| Problem::new(reason).within(format!("{shown}, line {line}")))
}

/// There is no file, or nobody lets us know.
fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
}

/// The configuration, or the line at fault and the reason.
pub fn parse(text: &str) -> Result<Config, (usize, String)> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1;
        (line, error.message().replace('\n', " "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_can_be_said() {
        let config = parse(
            "allow-dirs = [\"/srv/images\", \"bases\"]\nmax-guest-memory = \"64M\"\ntimeout = 30\nthreads = 2\nsandbox-user = 1234\nignore-quirks = \
             true\nunsafe-quirks = false\nrequire-known-raw = true\nqemu-version = \"8.2\"\noutput = \"json\"\n",
        )
        .unwrap();
        assert_eq!(config.allow_dirs, Some(vec![PathBuf::from("/srv/images"), PathBuf::from("bases")]));
        assert_eq!(config.max_guest_memory.as_deref(), Some("64M"));
        assert_eq!((config.timeout, config.threads), (Some(30), Some(2)));
        assert_eq!((config.ignore_quirks, config.unsafe_quirks), (Some(true), Some(false)));
        assert_eq!((config.require_known_raw, config.sandbox_user), (Some(true), Some(1234)));
        assert_eq!((config.qemu_version.as_deref(), config.output), (Some("8.2"), Some(Output::Json)));
        assert!(parse("").unwrap().output.is_none());
    }

    #[test]
    fn the_line_at_fault_is_named() {
        for (text, line, reason) in [
            ("timeout = 5\n\nnonsense = 1\n", 3, "nonsense"),
            ("# first\nthreads = \"many\"\n", 2, "invalid type"),
            ("timeout = 5\noutput = \"xml\"\n", 2, "xml"),
            ("timeout 5\n", 1, ""),
        ] {
            let (found, message) = parse(text).unwrap_err();
            assert_eq!(found, line, "{text}: {message}");
            assert!(message.contains(reason), "{message}");
        }
    }
}
