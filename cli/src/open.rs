//! Opening the files that the operator names, and what is kept of every open file.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use instar_vmm::{FaultRule, NbdExport, Window};
use rustix::fs::{CWD, FileType, MemfdFlags, Mode, OFlags, SeekFrom, fstat, ftruncate, memfd_create, openat, seek};
use rustix::io::Errno;

use crate::cleanup::Leftovers;
use crate::image_opts::{ImageSpec, NullDevice};
use crate::layer::{Extent, Slice};
use crate::lock::{self, Purpose};
use crate::nbd::Address;
use crate::problem::{Problem, os_text};
use crate::sandbox::{Granted, Machine};

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// A character device.
    Character,
    /// Directory, FIFO, socket.
    Other,
    /// An NBD export.
    Nbd,
    /// Nothing but zeroes, by the driver of this name.
    Null(&'static str),
}

impl FileKind {
    /// QEMU's driver answers more than the size.
    pub fn tells_details(self) -> bool {
        !matches!(self, Self::Nbd | Self::Null(_))
    }
}

/// Facts of an open file.
#[derive(Clone, Copy, Debug)]
pub struct Stat {
    /// Its kind.
    pub kind: FileKind,
    /// Device and inode: two names of one file agree in this.
    pub identity: (u64, u64),
    /// Length, bytes; 0 for devices.
    pub len: u64,
    /// Bytes of disk that it takes.
    pub allocated: u64,
}

impl Stat {
    /// Asks the system.
    ///
    /// # Errors
    /// As `fstat`.
    pub fn of(file: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = fstat(file)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => FileKind::Regular,
            FileType::BlockDevice => FileKind::Block,
            FileType::CharacterDevice => FileKind::Character,
            _ => FileKind::Other,
        };
        Ok(Self {
            kind,
            identity: (stat.st_dev, stat.st_ino),
            len: u64::try_from(stat.st_size).unwrap_or(0),
            allocated: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512),
        })
    }
}

/// An open file with its locks, which end with it.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub fd: OwnedFd,
    /// Facts of when it was opened.
    pub stat: Stat,
    /// Locks were taken.
    locked: bool,
    /// What the file descriptor is the socket of.
    export: Option<NbdExport>,
    /// What of it a guest gets.
    window: Window,
    /// Bytes of each node between the image and the file, the image's child first.
    layer_lens: Vec<u64>,
    /// How requests on it are to fail.
    rules: Vec<FaultRule>,
}

impl Opened {
    /// Keeps an open file.
    pub fn new(fd: OwnedFd, stat: Stat) -> Self {
        Self {
            fd,
            stat,
            locked: false,
            export: None,
            window: Window::default(),
            layer_lens: Vec::new(),
            rules: Vec::new(),
        }
    }

    /// Connects to an NBD export.
    ///
    /// # Errors
    /// As [`Address::connect`].
    pub fn of_nbd(address: &Address) -> Result<Self, Problem> {
        let (fd, export) = address.connect()?;
        let socket = Stat::of(fd.as_fd()).map_err(|errno| Problem::new(os_text(errno.raw_os_error())))?;
        let stat = Stat { kind: FileKind::Nbd, len: export.len, ..socket };
        let mut opened = Self::new(fd, stat);
        opened.export = Some(export);
        Ok(opened)
    }

    /// A disk that is stored nowhere.
    ///
    /// # Errors
    /// Those of the system.
    pub fn of_null(null: NullDevice) -> Result<Self, Problem> {
        let failed = |errno: Errno| Problem::new(os_text(errno.raw_os_error()));
        let fd = memfd_create("null", MemfdFlags::CLOEXEC).map_err(failed)?;
        ftruncate(&fd, null.size).map_err(failed)?;
        let memory = Stat::of(fd.as_fd()).map_err(failed)?;
        let stat = Stat { kind: FileKind::Null(null.driver), allocated: 0, ..memory };
        Ok(Self::new(fd, stat))
    }

    /// Opens what the operator named.
    ///
    /// # Errors
    /// The message, `Could not open 'F': …` where the system refused.
    pub fn of_spec(spec: &ImageSpec, writable: bool) -> Result<Self, Problem> {
        spec.below.heed(spec.format)?;
        let opened = match (&spec.nbd, spec.null) {
            (Some(address), _) => Self::of_nbd(address),
            (None, Some(null)) => Self::of_null(null),
            (None, None) if writable => open_to_write(Path::new(&spec.file)),
            (None, None) => open_to_read(Path::new(&spec.file)),
        }?;
        opened.cut_as(spec)
    }

    /// With what the image and the nodes below it show of the file.
    ///
    /// # Errors
    /// They show what the file does not have.
    pub fn cut_as(mut self, spec: &ImageSpec) -> Result<Self, Problem> {
        if !spec.layers.is_empty() || spec.slice != Slice::default() {
            self.cut(spec)?;
        }
        Ok(self)
    }

    /// Leaves of the file what the image and the nodes below it show of it.
    fn cut(&mut self, spec: &ImageSpec) -> Result<(), Problem> {
        // A block device tells its length in this way as well.
        let len = seek(&self.fd, SeekFrom::End(0)).map_err(|errno| Problem::file("open", &spec.file, errno))?;
        self.stat.len = len;
        let mut extent = Extent::whole(len);
        for layer in spec.layers.iter().rev() {
            extent = extent.cut(layer.slice)?;
            self.layer_lens.insert(0, extent.len);
            self.rules.extend(layer.rules.iter().filter_map(|rule| extent.rule(rule)));
        }
        self.window = extent.cut(spec.slice)?.window();
        Ok(())
    }

    /// The same, for writing.
    ///
    /// # Errors
    /// As `open`.
    pub fn into_writable(mut self) -> Result<Self, Errno> {
        // Sockets and memory are.
        if matches!(self.stat.kind, FileKind::Regular | FileKind::Block) {
            self.fd = reopen_to_write(&self.fd)?;
        }
        Ok(self)
    }

    /// Where the guest's part of it begins, bytes.
    pub fn base(&self) -> u64 {
        self.window.offset
    }

    /// Bytes of each node between the image and the file, the image's child first.
    pub fn layer_lens(&self) -> &[u64] {
        &self.layer_lens
    }

    /// Gives it to the guest.
    ///
    /// # Errors
    /// As [`Machine::grant`].
    pub fn grant(&self, machine: &mut dyn Machine, writable: bool) -> Result<Granted, Problem> {
        let granted = match &self.export {
            Some(export) => machine.grant_nbd(self.fd.as_fd(), export, writable),
            None => machine.grant(self.fd.as_fd(), writable, self.window),
        }?;
        if !self.rules.is_empty() {
            machine.let_fail(&self.rules)?;
        }
        Ok(granted)
    }

    /// Takes note of the length of a device, which only the grant tells.
    pub fn note_len(&mut self, granted: &Granted) {
        if self.window == Window::default() {
            self.stat.len = granted.len;
        }
    }

    /// Takes locks; `name` is what messages call the file.
    ///
    /// # Errors
    /// Another process holds a lock against it.
    pub fn lock(&mut self, purpose: Purpose, name: &str) -> Result<(), Problem> {
        if self.export.is_some() || matches!(self.stat.kind, FileKind::Null(_)) {
            // The server knows who else uses it; of the other there is only this one.
            return Ok(());
        }
        self.locked = true;
        lock::acquire(self.fd.as_fd(), purpose, name)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // The monitor process may live on for a moment with the same open file; the next command must not see its locks.
        if self.locked {
            lock::release(self.fd.as_fd());
        }
    }
}

/// The path that a file name stands for: `file:` is taken off, other protocols are refused.
///
/// # Errors
/// The message, without the file's name around it.
pub fn path_of(name: &str) -> Result<PathBuf, Problem> {
    let path = match protocol(name) {
        None => name,
        Some("file") => &name["file:".len()..],
        Some("host_device") => &name["host_device:".len()..],
        Some("blkdebug") => {
            return Err(Problem::new("Protocol driver 'blkdebug' does not support image creation"));
        }
        Some("nbd" | "nbd+tcp" | "nbd+unix") => {
            return Err(Problem::new("An NBD export can only be read, or written where it exists (convert -n)"));
        }
        Some(known) if PROTOCOLS.contains(&known) => {
            return Err(Problem::new(format!("Protocol '{known}' is not provided: images are opened as files only")));
        }
        Some(unknown) => return Err(Problem::new(format!("Unknown protocol '{unknown}'"))),
    };
    match path.is_empty() {
        true => Err(Problem::new("The 'file' block driver requires a file name")),
        false => Ok(PathBuf::from(path)),
    }
}

/// What stands before the first colon, unless a slash comes first.
fn protocol(name: &str) -> Option<&str> {
    let end = name.find([':', '/'])?;
    name[end..].starts_with(':').then(|| &name[..end])
}

/// Protocols of qemu-img that are no plain files.
const PROTOCOLS: &[&str] = &[
    "blkdebug",
    "blklogwrites",
    "blkverify",
    "fat",
    "ftp",
    "ftps",
    "gluster",
    "gluster+rdma",
    "gluster+tcp",
    "gluster+unix",
    "host_cdrom",
    "http",
    "https",
    "iscsi",
    "iser",
    "nfs",
    "nvme",
    "rbd",
    "ssh",
];

/// Opens a file for reading that the operator named.
///
/// # Errors
/// The message, `Could not open 'F': …` where the system refused.
pub fn open_to_read(path: &Path) -> Result<Opened, Problem> {
    open_existing(path, OFlags::RDONLY)
}

/// Opens an existing file for writing.
///
/// # Errors
/// As [`open_to_read`].
pub fn open_to_write(path: &Path) -> Result<Opened, Problem> {
    open_existing(path, OFlags::RDWR)
}

/// The same file as an open one, for writing.
///
/// # Errors
/// As `open`.
fn reopen_to_write(file: &OwnedFd) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    openat(CWD, path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
}

fn open_existing(path: &Path, mode: OFlags) -> Result<Opened, Problem> {
    let name = path.display().to_string();
    // Non-blocking, so that a FIFO is recognised instead of waited for. Files and block devices don't care.
    let flags = mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let not_regular = || Problem::new(format!("'file' driver requires '{name}' to be a regular file"));
    let fd = match openat(CWD, path, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::ISDIR) => return Err(not_regular()),
        Err(errno) => return Err(Problem::file("open", &name, errno)),
    };
    let stat = Stat::of(fd.as_fd()).map_err(|errno| Problem::file("open", &name, errno))?;
    match stat.kind {
        FileKind::Regular | FileKind::Block => Ok(Opened::new(fd, stat)),
        FileKind::Character | FileKind::Other | FileKind::Nbd | FileKind::Null(_) => Err(not_regular()),
    }
}

/// Creates a file, or opens and empties the one that is there; locks it first, and asks `check`. A new one is noted among the
/// `leftovers`.
///
/// # Errors
/// `Could not create 'F': …`, the lock's message, or that of `check`.
pub fn create(
    path: &Path,
    shown: &str,
    leftovers: &mut Leftovers,
    check: &dyn Fn(&Stat) -> Result<(), Problem>,
) -> Result<Opened, Problem> {
    let failed = |errno| Problem::file("create", &path.display().to_string(), errno);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mode = Mode::from_raw_mode(0o644);
    let open = || {
        let (fd, new) = match openat(CWD, path, flags | OFlags::EXCL, mode) {
            Ok(fd) => (fd, true),
            // Without EXCL a dangling link is created through, as qemu-img does; it counts as there before.
            Err(Errno::EXIST) => (openat(CWD, path, flags, mode)?, false),
            Err(errno) => return Err(errno),
        };
        let stat = Stat::of(fd.as_fd())?;
        Ok(((fd, stat), new.then_some(stat.identity)))
    };
    let (fd, stat) = leftovers.create(path, open).map_err(failed)?;
    let mut file = Opened::new(fd, stat);
    match stat.kind {
        FileKind::Regular | FileKind::Block => {}
        FileKind::Character | FileKind::Other | FileKind::Nbd | FileKind::Null(_) => {
            let name = path.display();
            return Err(Problem::new(format!("'file' driver requires '{name}' to be a regular file")));
        }
    }
    file.lock(Purpose::Write, shown)?;
    check(&stat)?;
    if stat.kind == FileKind::Regular {
        empty(file.fd.as_fd())
            .map_err(|errno| Problem::new(format!("Could not resize file: {}", os_text(errno.raw_os_error()))))?;
    }
    Ok(file)
}

/// Empties a file.
///
/// File systems (ext4, XFS) write a file out when it is closed for the first time after it was cut off, so that programs that replace a file
/// without care lose nothing. A descriptor of its own takes that upon itself while there is nothing to be written.
fn empty(file: BorrowedFd<'_>) -> Result<(), Errno> {
    let stat = fstat(file)?;
    if stat.st_size == 0 && stat.st_blocks == 0 {
        return Ok(());
    }
    let same = format!("/proc/self/fd/{}", file.as_raw_fd());
    match openat(CWD, same, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(own) => ftruncate(own, 0),
        Err(_) => ftruncate(file, 0),
    }
}

/// The name of `name` as seen from where the image `from` is named: QEMU's way of joining, which is by text.
pub fn join_name(from: &str, name: &str) -> String {
    let has_protocol = protocol(name).is_some();
    match from.rfind('/') {
        Some(end) if !has_protocol && !name.starts_with('/') => format!("{}{name}", &from[..=end]),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_joined_by_text() {
        assert_eq!(join_name("sub/rel.qcow2", "../base.qcow2"), "sub/../base.qcow2");
        assert_eq!(join_name("top.qcow2", "mid.qcow2"), "mid.qcow2");
        assert_eq!(join_name("sub/a", "/abs/b"), "/abs/b");
        assert_eq!(join_name("sub/a", "nbd:x"), "nbd:x");
        assert_eq!(join_name("/a/b", "c"), "/a/c");
    }

    #[test]
    fn protocols() {
        assert_eq!(path_of("a/b:c").unwrap(), Path::new("a/b:c"));
        assert_eq!(path_of("./nbd:foo").unwrap(), Path::new("./nbd:foo"));
        assert_eq!(path_of("file:x").unwrap(), Path::new("x"));
        assert_eq!(path_of("nosuch:thing").unwrap_err().to_string(), "Unknown protocol 'nosuch'");
        assert!(path_of("nbd:x").unwrap_err().to_string().contains("convert -n"));
        assert!(path_of("ssh://x").unwrap_err().to_string().contains("not provided"));
        assert_eq!(path_of("").unwrap_err().to_string(), "The 'file' block driver requires a file name");
    }

    #[test]
    fn existing_files() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().to_str().unwrap();
        assert_eq!(
            open_to_read(tmp.path()).unwrap_err().to_string(),
            format!("'file' driver requires '{dir}' to be a regular file")
        );
        let missing = tmp.path().join("none");
        assert_eq!(
            open_to_read(&missing).unwrap_err().to_string(),
            format!("Could not open '{dir}/none': No such file or directory")
        );
        let fifo = tmp.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(open_to_read(&fifo).unwrap_err().to_string().contains("regular file"));
    }

    #[test]
    fn a_locked_file_is_not_emptied() {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(tmp.path(), b"content").unwrap();
        let mut reader = open_to_read(tmp.path()).unwrap();
        reader.lock(Purpose::Read, "f").unwrap();
        let refused = create(tmp.path(), "f", &mut Leftovers::default(), &|_| Ok(())).unwrap_err();
        assert_eq!(refused.to_string().lines().next(), Some("Failed to get \"write\" lock"));
        assert_eq!(std::fs::read(tmp.path()).unwrap(), b"content");
        drop(reader);
        let check = |_: &Stat| Err(Problem::new("not this one"));
        assert!(create(tmp.path(), "f", &mut Leftovers::default(), &check).is_err());
        assert_eq!(std::fs::read(tmp.path()).unwrap(), b"content");
        create(tmp.path(), "f", &mut Leftovers::default(), &|_| Ok(())).unwrap();
        assert_eq!(std::fs::read(tmp.path()).unwrap(), b"");
    }
}
