//! Version profiles: which qemu-img's outputs are given, where they differ between its versions.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::{env, fs};

use crate::problem::Problem;

/// A version of qemu-img.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    major: u32,
    minor: u32,
}

/// The versions that are known, the newest last.
const KNOWN: [QemuVersion; 8] = [
    QemuVersion::new(6, 0),
    QemuVersion::new(6, 2),
    QemuVersion::new(7, 2),
    QemuVersion::new(8, 0),
    QemuVersion::new(8, 2),
    QemuVersion::new(9, 0),
    QemuVersion::new(9, 2),
    QemuVersion::new(10, 0),
];

impl Default for QemuVersion {
    fn default() -> Self {
        Self::new(10, 0)
    }
}

impl QemuVersion {
    const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// A version by its number, or `auto`: that of the qemu-img found in `PATH`.
    ///
    /// # Errors
    /// A version that is not known; no qemu-img to ask.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        if text == "auto" {
            return installed();
        }
        let found = KNOWN.into_iter().find(|version| version.to_string() == text);
        found.ok_or_else(|| {
            let known: Vec<String> = KNOWN.iter().map(Self::to_string).collect();
            Problem::new(format!("Unknown qemu-img version '{text}' (known: {}, auto)", known.join(", ")))
        })
    }

    /// `info` shows the file below an image as a child node.
    pub fn shows_child_nodes(self) -> bool {
        self >= Self::new(8, 0)
    }

    /// `info` tells of LUKS whether the header is detached.
    pub fn shows_detached_header(self) -> bool {
        self >= Self::new(9, 0)
    }

    /// Lists of snapshots have the columns of 9.0.
    pub fn has_wide_snapshot_columns(self) -> bool {
        self >= Self::new(9, 0)
    }
}

/// Outputs of `map`.
impl QemuVersion {
    /// JSON tells `present`.
    pub fn map_tells_present(self) -> bool {
        self >= Self::new(6, 1)
    }

    /// JSON tells `compressed`.
    pub fn map_tells_compressed(self) -> bool {
        self >= Self::new(8, 2)
    }
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The version of the qemu-img that is installed: the newest known one that is not newer.
fn installed() -> Result<QemuVersion, Problem> {
    let nobody = || Problem::new("No qemu-img is installed whose version could be taken over (--qemu-version auto)");
    let program = other_qemu_img().ok_or_else(nobody)?;
    let output = Command::new(&program).arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output();
    let output = output.map_err(|_| nobody())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = parse_banner(&text).ok_or_else(nobody)?;
    Ok(KNOWN.into_iter().rev().find(|known| *known <= version).unwrap_or(KNOWN[0]))
}

/// `qemu-img version 8.2.2 (…)`.
fn parse_banner(text: &str) -> Option<QemuVersion> {
    let mut numbers = text.strip_prefix("qemu-img version ")?.split(['.', ' ', '\n']);
    Some(QemuVersion::new(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The first qemu-img of `PATH` that is not this program itself.
fn other_qemu_img() -> Option<PathBuf> {
    let identity = |path: &PathBuf| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let own = env::current_exe().ok().as_ref().and_then(identity);
    let path = env::var_os("PATH")?;
    let mut candidates = env::split_paths(&path).map(|directory| directory.join("qemu-img"));
    candidates.find(|candidate| identity(candidate).is_some_and(|found| Some(found) != own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_versions_lead_back() {
        for version in KNOWN {
            assert_eq!(QemuVersion::parse(&version.to_string()).unwrap(), version);
        }
        assert!(QemuVersion::parse("5.2").unwrap_err().to_string().contains("known: 6.0, 6.2"));
        assert_eq!(QemuVersion::default(), KNOWN[7]);
    }

    #[test]
    fn banners() {
        let version = |text| parse_banner(text).map(|version| version.to_string());
        assert_eq!(version("qemu-img version 8.2.2 (Debian 1:8.2.2+ds)\nCopyright").as_deref(), Some("8.2"));
        assert_eq!(version("qemu-img version 10.0.2\n").as_deref(), Some("10.0"));
        assert_eq!(version("instar version 0.1.0"), None);
    }
}
