//! The one way to a file that an *image* names: confined to directories that the operator trusts.
//!
//! A name in an image is untrusted. It is opened only as a path, by `openat2` beneath the directory of the image that
//! names it, of an image that the operator named, or of `--allow-dir`; the kernel resolves every component inside
//! that directory, so neither `..` nor a symbolic link leads out of it, whatever happens to the directory meanwhile.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use instar_guest_protocol::limits::MAX_NAME_BYTES;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use crate::open::{FileKind, Stat};
use crate::problem::{Problem, printable};

/// How the operator widens the policy; part of every refusal.
const HOW_TO_ALLOW: &str = "use --allow-dir DIR or INSTAR_ALLOW_DIRS=DIR to allow it";

/// A directory beneath which names from images are opened.
#[derive(Debug)]
struct Root {
    fd: OwnedFd,
    /// Its path, free of symbolic links.
    path: PathBuf,
    /// Allowed by the operator, not just the home of an image.
    by_operator: bool,
}

/// The directories beneath which names from images are opened.
#[derive(Debug, Default)]
pub struct Confinement {
    roots: Vec<Root>,
}

/// A file that an image named.
#[derive(Debug)]
pub struct Confined {
    /// The open file, read-only.
    pub fd: OwnedFd,
    /// What it is.
    pub stat: Stat,
    /// Its directory, free of symbolic links.
    pub dir: PathBuf,
}

impl Confinement {
    /// Allows what lies beneath `dirs`, at the operator's wish.
    ///
    /// # Errors
    /// A directory that can't be opened.
    pub fn new(dirs: &[PathBuf]) -> Result<Self, Problem> {
        let mut confinement = Self::default();
        for dir in dirs {
            let path = dir.canonicalize().map_err(|error| {
                Problem::new(format!("--allow-dir: Could not open '{}': {}", dir.display(), plain(&error)))
            })?;
            confinement
                .add(path, true)
                .map_err(|errno| Problem::file("open", &dir.display().to_string(), errno).within("--allow-dir"))?;
        }
        Ok(confinement)
    }

    /// Allows what lies beneath the directory of an image that the operator named, and returns that directory.
    ///
    /// # Errors
    /// The directory can't be opened.
    pub fn allow_home_of(&mut self, image: &Path) -> Result<PathBuf, Problem> {
        let parent = match image.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        // Beside a symbolic link and beside what it points to: QEMU takes names relative to the former.
        let path = parent
            .canonicalize()
            .map_err(|error| Problem::new(format!("Could not open '{}': {}", parent.display(), plain(&error))))?;
        self.add(path.clone(), false).map_err(|errno| Problem::file("open", &parent.display().to_string(), errno))?;
        Ok(path)
    }

    fn add(&mut self, path: PathBuf, by_operator: bool) -> Result<(), Errno> {
        if let Some(known) = self.roots.iter_mut().find(|root| root.path == path) {
            known.by_operator |= by_operator;
            return Ok(());
        }
        let fd = openat(CWD, &path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        self.roots.push(Root { fd, path, by_operator });
        Ok(())
    }

    /// Opens what an image in the directory `home` (free of symbolic links) calls `name`, for reading.
    ///
    /// # Errors
    /// The policy refuses the name, it leads to something else than a regular file (or an allowed block device), or it
    /// can't be opened. `shown` is what messages call the file.
    pub fn open(&self, home: &Path, name: &[u8], shown: &str) -> Result<Confined, Problem> {
        check_name(name, shown)?;
        let wanted = home.join(OsStr::from_bytes(name));
        let candidates = Candidates::of(&wanted);
        let mut outcome = Err(refused(shown, "it lies outside of the image's directory"));
        for root in &self.roots {
            for path in candidates.iter() {
                let Ok(relative) = path.strip_prefix(&root.path) else { continue };
                match open_beneath(root, relative) {
                    Ok(fd) => return accept(root, fd, relative, shown),
                    // A link or `..` that leads out of this directory: perhaps another one holds the file.
                    Err(Errno::XDEV | Errno::LOOP) => {}
                    Err(Errno::NOSYS) => {
                        return Err(Problem::new(format!(
                            "Could not open '{shown}': files named by images need the system call openat2 (Linux 5.6)"
                        )));
                    }
                    Err(errno) => outcome = Err(Problem::file("open", shown, errno)),
                }
            }
        }
        outcome
    }
}

/// The paths that may stand for a file: as written, and with the links of its directory resolved.
///
/// They only choose the directory to open beneath; what is opened there is the kernel's own resolution.
struct Candidates {
    written: PathBuf,
    resolved: Option<PathBuf>,
}

impl Candidates {
    fn of(wanted: &Path) -> Self {
        let resolved = wanted.parent().zip(wanted.file_name());
        let resolved = resolved.and_then(|(parent, name)| Some(parent.canonicalize().ok()?.join(name)));
        let written = without_dots(wanted);
        Self { resolved: resolved.filter(|path| *path != written), written }
    }

    fn iter(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.written).chain(&self.resolved)
    }
}

/// Takes `.` and `..` out of an absolute path, by its text alone.
fn without_dots(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}

/// Names that are no plain file name, whatever lies there.
fn check_name(name: &[u8], shown: &str) -> Result<(), Problem> {
    let has_scheme = name.iter().position(|byte| matches!(byte, b':' | b'/')).filter(|at| name[*at] == b':');
    let reason = if name.is_empty() {
        "the name is empty".to_owned()
    } else if name.len() > MAX_NAME_BYTES {
        "the name is too long".to_owned()
    } else if name.iter().any(|byte| byte.is_ascii_control()) {
        "the name contains control characters".to_owned()
    } else if let Some(end) = has_scheme {
        format!("an image may name files only, not '{}:'", printable(&name[..end]))
    } else {
        return Ok(());
    };
    Err(Problem::new(format!("Could not open '{shown}': refused: {reason}")))
}

fn refused(shown: &str, reason: &str) -> Problem {
    Problem::new(format!("Could not open '{shown}': refused: {reason} ({HOW_TO_ALLOW})"))
}

fn open_beneath(root: &Root, relative: &Path) -> Result<OwnedFd, Errno> {
    // Non-blocking: a FIFO must not hold the program up before it is recognised as one.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut interrupted = 0;
    loop {
        match openat2(root.fd.as_fd(), relative, flags, Mode::empty(), resolve) {
            // The kernel asks for another try when the tree moved under it.
            Err(Errno::AGAIN | Errno::INTR) if interrupted < 16 => interrupted += 1,
            done => return done,
        }
    }
}

fn accept(root: &Root, fd: OwnedFd, relative: &Path, shown: &str) -> Result<Confined, Problem> {
    let stat = Stat::of(fd.as_fd()).map_err(|errno| Problem::file("open", shown, errno))?;
    match stat.kind {
        FileKind::Regular => {}
        FileKind::Block if root.by_operator => {}
        FileKind::Block => return Err(refused(shown, "it is a device")),
        _ => return Err(Problem::new(format!("'file' driver requires '{shown}' to be a regular file"))),
    }
    let dir = root.path.join(relative.parent().unwrap_or(Path::new("")));
    Ok(Confined { fd, stat, dir: dir.canonicalize().unwrap_or(dir) })
}

/// An error of the standard library in the words of the C library.
fn plain(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), crate::problem::os_text)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Fixture {
        _tmp: tempfile::TempDir,
        home: PathBuf,
        outside: PathBuf,
        confinement: Confinement,
    }

    fn fixture(allow: bool) -> Fixture {
        let tmp = tempfile::tempdir().unwrap();
        let base = tmp.path().canonicalize().unwrap();
        let (home, outside) = (base.join("home"), base.join("outside"));
        fs::create_dir_all(home.join("sub")).unwrap();
        fs::create_dir(&outside).unwrap();
        for file in [home.join("b.raw"), home.join("sub/c.raw"), outside.join("secret")] {
            fs::write(file, b"x").unwrap();
        }
        let allowed: Vec<PathBuf> = allow.then(|| outside.clone()).into_iter().collect();
        let mut confinement = Confinement::new(&allowed).unwrap();
        confinement.allow_home_of(&home.join("top.qcow2")).unwrap();
        Fixture { _tmp: tmp, home, outside, confinement }
    }

    fn open(fixture: &Fixture, name: &str) -> Result<PathBuf, String> {
        let opened = fixture.confinement.open(&fixture.home, name.as_bytes(), name);
        opened.map(|confined| confined.dir).map_err(|problem| problem.to_string())
    }

    #[test]
    fn siblings_and_what_lies_below() {
        let f = fixture(false);
        assert_eq!(open(&f, "b.raw").unwrap(), f.home);
        assert_eq!(open(&f, "./sub/c.raw").unwrap(), f.home.join("sub"));
        assert_eq!(open(&f, "sub/../b.raw").unwrap(), f.home);
        assert_eq!(open(&f, f.home.join("b.raw").to_str().unwrap()).unwrap(), f.home);
        let up = f.confinement.open(&f.home.join("sub"), b"../b.raw", "../b.raw");
        assert_eq!(up.unwrap().dir, f.home);
    }

    #[test]
    fn everything_else_is_refused() {
        let f = fixture(false);
        let secret = f.outside.join("secret");
        for name in ["../outside/secret", secret.to_str().unwrap(), "sub/../../outside/secret", "/etc/passwd"] {
            let refusal = open(&f, name).unwrap_err();
            assert!(refusal.contains("refused") && refusal.contains("--allow-dir"), "{refusal}");
        }
        assert_eq!(open(&f, "none").unwrap_err(), "Could not open 'none': No such file or directory");
    }

    #[test]
    fn links_do_not_lead_out() {
        let f = fixture(false);
        symlink(f.outside.join("secret"), f.home.join("absolute")).unwrap();
        symlink("../outside/secret", f.home.join("relative")).unwrap();
        symlink("../outside", f.home.join("dir")).unwrap();
        symlink("b.raw", f.home.join("inside")).unwrap();
        for name in ["absolute", "relative", "dir/secret"] {
            assert!(open(&f, name).unwrap_err().contains("refused"), "{name}");
        }
        assert_eq!(open(&f, "inside").unwrap(), f.home);
    }

    #[test]
    fn the_operator_may_allow_more() {
        let f = fixture(true);
        assert_eq!(open(&f, "../outside/secret").unwrap(), f.outside);
        assert_eq!(open(&f, f.outside.join("secret").to_str().unwrap()).unwrap(), f.outside);
    }

    #[test]
    fn only_names_of_files() {
        let f = fixture(false);
        for name in ["json:{}", "nbd:localhost:1", "file:b.raw", "http://x/y", "", "a\nb", "a\x1bb"] {
            assert!(open(&f, name).unwrap_err().contains("refused"), "{name:?}");
        }
        assert!(open(&f, &"x".repeat(5000)).unwrap_err().contains("too long"));
    }

    #[test]
    fn special_files_do_not_block() {
        let f = fixture(false);
        let fifo = f.home.join("fifo");
        rustix::fs::mknodat(CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert_eq!(open(&f, "fifo").unwrap_err(), "'file' driver requires 'fifo' to be a regular file");
        assert_eq!(open(&f, "sub").unwrap_err(), "'file' driver requires 'sub' to be a regular file");
    }
}
