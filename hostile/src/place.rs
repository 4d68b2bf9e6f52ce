//! A directory for images, and what lies around it: things that no command may touch.

use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tempfile::TempDir;

use crate::bytes::PAGE;
use crate::case::{Case, Content};
use crate::names::Surroundings;

/// What the canary file holds, over and over; nothing else does.
const CANARY: &[u8] = b"canary-5e1fb2a7-must-never-be-seen\n";
/// More than this is not read of a file to look for the canary.
const LOOK: u64 = 32 << 20;

/// A place to try images at.
#[derive(Debug)]
pub struct Place {
    root: TempDir,
    tcp: TcpListener,
    unix: UnixListener,
    watch: Inotify,
}

fn errno(error: nix::Error) -> io::Error {
    io::Error::from_raw_os_error(error as i32)
}

impl Place {
    /// Makes it.
    ///
    /// # Errors
    /// Of the system.
    pub fn new() -> io::Result<Self> {
        let root = tempfile::tempdir()?;
        let outside = root.path().join("outside");
        fs::create_dir(&outside)?;
        fs::create_dir(root.path().join("home"))?;
        fs::write(outside.join("canary"), CANARY.repeat(256))?;
        let tcp = TcpListener::bind("127.0.0.1:0")?;
        let unix = UnixListener::bind(outside.join("listener"))?;
        tcp.set_nonblocking(true)?;
        unix.set_nonblocking(true)?;
        let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(errno)?;
        watch.add_watch(&outside.join("canary"), AddWatchFlags::IN_ALL_EVENTS).map_err(errno)?;
        let _ = watch.add_watch(&outside, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVE);
        Ok(Self { root, tcp, unix, watch })
    }

    /// The directory of the images.
    pub fn home(&self) -> PathBuf {
        self.root.path().join("home")
    }

    /// What lies around it.
    ///
    /// # Errors
    /// Of the system.
    pub fn surroundings(&self) -> io::Result<Surroundings> {
        Ok(Surroundings { outside: self.root.path().join("outside"), port: self.tcp.local_addr()?.port() })
    }

    /// Puts the files of a case into the directory, and nothing else.
    ///
    /// # Errors
    /// Of the system.
    pub fn fill(&self, case: &Case) -> io::Result<()> {
        let home = self.home();
        fs::remove_dir_all(&home)?;
        fs::create_dir(&home)?;
        for (name, content) in &case.files {
            let path = home.join(name);
            match content {
                Content::Bytes(image) => {
                    let file = File::create_new(&path)?;
                    file.set_len(image.size())?;
                    for (at, piece) in image.pieces() {
                        file.write_all_at(piece, at)?;
                    }
                }
                Content::Link(to) => symlink(to, &path)?,
                Content::Hard(of) => fs::hard_link(home.join(of), &path)?,
                Content::Directory => fs::create_dir(&path)?,
                Content::Fifo => nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).map_err(errno)?,
            }
        }
        Ok(())
    }

    /// Which file of the case is not what it was, or which one is there besides?
    ///
    /// # Errors
    /// Of the system.
    pub fn difference(&self, case: &Case, ignore: &[&str]) -> io::Result<Option<String>> {
        for (name, content) in case.files.iter().filter(|(name, _)| !ignore.contains(&name.as_str())) {
            let path = self.home().join(name);
            let Ok(stat) = fs::symlink_metadata(&path) else { return Ok(Some(format!("{name} is gone"))) };
            if let Content::Bytes(image) = content {
                let file = File::open(&path)?;
                let mut page = [0; PAGE];
                let mut is_same = |(at, piece): (u64, &[u8])| {
                    let there = &mut page[..piece.len()];
                    file.read_exact_at(there, at).is_ok() && there == piece
                };
                if stat.len() != image.size() || !image.pieces().all(&mut is_same) {
                    return Ok(Some(format!("{name} has changed")));
                }
            }
        }
        for entry in fs::read_dir(self.home())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !ignore.contains(&name.as_str()) && !case.files.iter().any(|(known, _)| *known == name) {
                return Ok(Some(format!("{name} is left over")));
            }
        }
        Ok(None)
    }

    /// Was anything outside touched since the last call?
    ///
    /// # Errors
    /// Of the system.
    pub fn outside(&self) -> io::Result<Option<String>> {
        match self.watch.read_events() {
            Ok(events) if !events.is_empty() => return Ok(Some(format!("outside was touched: {:?}", events[0].mask))),
            _ => {}
        }
        let called = self.tcp.accept().is_ok() || self.unix.accept().is_ok();
        Ok(called.then(|| "a network listener was called".to_owned()))
    }

    /// Is the canary what it was? Looking counts as no touch.
    ///
    /// # Errors
    /// Of the system.
    pub fn canary_is_whole(&self) -> io::Result<bool> {
        let path = self.root.path().join("outside/canary");
        let whole = fs::read(&path)? == CANARY.repeat(256) && fs::metadata(&path)?.nlink() == 1;
        let _ = self.watch.read_events();
        Ok(whole)
    }
}

/// Does this come from the canary, or from the system's own files?
pub fn tells_secrets(bytes: &[u8]) -> bool {
    [&CANARY[..24], b"root:x:0:0:"].iter().any(|secret| bytes.windows(secret.len()).any(|part| part == *secret))
}

/// The same of a file, of which only the start is looked at.
///
/// # Errors
/// Of the system.
pub fn file_tells_secrets(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let len = file.metadata()?.len().min(LOOK);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(tells_secrets(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_touches_the_outside_is_seen() {
        let place = Place::new().unwrap();
        assert_eq!(place.outside().unwrap(), None);
        let around = place.surroundings().unwrap();
        assert!(tells_secrets(&fs::read(around.outside.join("canary")).unwrap()));
        assert!(place.outside().unwrap().is_some());
        assert!(place.canary_is_whole().unwrap());
        assert_eq!(place.outside().unwrap(), None);
        let _call = std::net::TcpStream::connect(("127.0.0.1", around.port)).unwrap();
        assert!(place.outside().unwrap().unwrap().contains("listener"));
        fs::write(around.outside.join("new"), b"").unwrap();
        assert!(place.outside().unwrap().is_some());
    }

    #[test]
    fn changes_of_the_files_are_seen() {
        let place = Place::new().unwrap();
        let cases = crate::suite(&place.surroundings().unwrap());
        let case = cases.iter().find(|case| case.name == "qcow2/backing/up").unwrap();
        place.fill(case).unwrap();
        assert_eq!(place.difference(case, &[]).unwrap(), None);
        fs::write(place.home().join("out"), b"").unwrap();
        assert!(place.difference(case, &[]).unwrap().unwrap().contains("left over"));
        assert_eq!(place.difference(case, &["out"]).unwrap(), None);
        File::options().write(true).open(place.home().join("base")).unwrap().write_all_at(b"x", 9).unwrap();
        assert!(place.difference(case, &["out"]).unwrap().unwrap().contains("base has changed"));
    }
}
