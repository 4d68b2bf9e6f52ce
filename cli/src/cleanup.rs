//! Files that this run created: they are gone again unless the run succeeds, also when a signal ends it.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::problem::printable;

static CREATED: Mutex<Vec<Created>> = Mutex::new(Vec::new());
static WATCH: Once = Once::new();

struct Created {
    path: PathBuf,
    identity: (u64, u64),
}

fn created() -> MutexGuard<'static, Vec<Created>> {
    CREATED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the files made by [`create`](Self::create) when it is dropped, unless [`keep`](Self::keep) comes first.
#[derive(Debug, Default)]
pub struct Leftovers(());

impl Leftovers {
    /// Lets `make` open the file at `path`, and notes its identity if `make` has created it. A signal meanwhile waits until it is known
    /// whether there is something to be removed.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn create<T, E>(
        &mut self,
        path: &Path,
        make: impl FnOnce() -> Result<(T, Option<(u64, u64)>), E>,
    ) -> Result<T, E> {
        WATCH.call_once(watch_signals);
        // An absolute path: it must lead to the file whatever happens.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let mut created = created();
        let (made, identity) = make()?;
        created.extend(identity.map(|identity| Created { path, identity }));
        Ok(made)
    }

    /// The run succeeded.
    pub fn keep(self) {
        created().clear();
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        remove_all(&mut created());
    }
}

/// Removes what is still the file that was created, and not one that took its name since.
fn remove_all(created: &mut Vec<Created>) {
    for file in created.drain(..) {
        let same = std::fs::symlink_metadata(&file.path).is_ok_and(|found| (found.dev(), found.ino()) == file.identity);
        if same {
            // It stays if the directory does not let it go; the error that ends the run is the one to tell.
            let _ = std::fs::remove_file(&file.path);
        }
    }
}

/// From now on, a bug of the program is an error like others: one line, exit status 1, and nothing left behind.
pub fn end_orderly_on_panic(program: &str) {
    let program = program.to_owned();
    std::panic::set_hook(Box::new(move |info| {
        let what = info.payload_as_str().unwrap_or("no message");
        let line = what.lines().next().unwrap_or_default();
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        // The stream may be closed.
        let _ = writeln!(
            std::io::stderr(),
            "{program}: Internal error, please report it: {} ({place})",
            printable(line.as_bytes())
        );
        if let Ok(mut created) = CREATED.try_lock() {
            remove_all(&mut created);
        }
        std::process::exit(1);
    }));
}

/// From now on, a signal that ends the program removes the files first. One that the caller had ignored (`nohup`, jobs in the background of a
/// script) goes on being ignored.
fn watch_signals() {
    let ignored = std::fs::read_to_string("/proc/self/status").map_or(0, |status| ignored_signals(&status));
    let watched = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
    let Ok(mut signals) = Signals::new(watched) else { return };
    let watcher = move || {
        if let Some(signal) = signals.forever().next() {
            // Nothing more is created until the program is gone.
            let mut created = created();
            remove_all(&mut created);
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    };
    // Without the thread a signal would be swallowed; better to fail than not to be stopped.
    if std::thread::Builder::new().name("signals".to_owned()).spawn(watcher).is_err() {
        std::process::abort();
    }
}

/// The mask of ignored signals, of `/proc/PID/status` (proc(5)): signal 1 is the lowest bit.
fn ignored_signals(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_of_ignored_signals() {
        let status = "Name:\tinstar\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001003\nSigCgt:\t0\n";
        assert_eq!(ignored_signals(status), 1 << (SIGHUP - 1) | 1 << (SIGINT - 1) | 1 << 12);
        assert_eq!([ignored_signals("SigIgn:\tx\n"), ignored_signals("")], [0, 0]);
    }

    const PLAYS_A_BUG: &str = "INSTAR_TEST_PLAYS_A_BUG";

    /// Not a test by itself: what the next one runs in a process of its own.
    #[test]
    fn a_bug() {
        let Some(path) = std::env::var_os(PLAYS_A_BUG) else { return };
        end_orderly_on_panic("instar");
        let mut leftovers = Leftovers::default();
        let made = leftovers.create(Path::new(&path), || {
            std::fs::write(&path, b"half")?;
            let stat = std::fs::metadata(&path)?;
            Ok::<_, std::io::Error>(((), Some((stat.dev(), stat.ino()))))
        });
        made.unwrap();
        panic!("what must not be\n\x1b[2J");
    }

    #[test]
    fn a_bug_is_an_error_like_others() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("output");
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let output =
            command.args(["--exact", "cleanup::tests::a_bug", "--nocapture"]).env(PLAYS_A_BUG, &path).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("instar: Internal error, please report it: what must not be ("), "{text}");
        assert!(!path.exists());
    }

    #[test]
    fn only_what_was_created_and_not_kept() {
        let tmp = tempfile::tempdir().unwrap();
        let [kept, dropped, swapped] = ["kept", "dropped", "swapped"].map(|name| tmp.path().join(name));
        let create = |path: &Path| {
            std::fs::write(path, b"").unwrap();
            let stat = std::fs::metadata(path).unwrap();
            (stat.dev(), stat.ino())
        };
        let note = |leftovers: &mut Leftovers, path: &Path| {
            leftovers.create(path, || Ok::<_, ()>(((), Some(create(path))))).unwrap();
        };
        let mut leftovers = Leftovers::default();
        note(&mut leftovers, &kept);
        leftovers.keep();
        let mut leftovers = Leftovers::default();
        note(&mut leftovers, &dropped);
        note(&mut leftovers, &swapped);
        std::fs::rename(&swapped, tmp.path().join("moved")).unwrap();
        std::fs::write(&swapped, b"someone else's").unwrap();
        drop(leftovers);
        assert!(kept.exists() && !dropped.exists() && swapped.exists());
    }
}
