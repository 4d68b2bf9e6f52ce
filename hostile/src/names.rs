//! Names that an image has no business to follow.

use std::path::PathBuf;

/// What lies around the directory of the images: absolute names and addresses come from here.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// A directory beside that of the images, with the file `canary`.
    pub outside: PathBuf,
    /// A TCP port of this machine where somebody listens.
    pub port: u16,
}

/// The name of a class, and the name in the image.
pub type Name = (&'static str, Vec<u8>);

impl Surroundings {
    /// Names that must not be followed, of at most `room` bytes. In the directory lie `link` and `linkdir`, which lead out, a FIFO,
    /// a directory `sub`, and `image` itself.
    pub fn names(&self, image: &str, room: usize) -> Vec<Name> {
        let (out, port) = (self.outside.display(), self.port);
        let text: &[(&'static str, String)] = &[
            ("up", "../outside/canary".into()),
            ("up-from-below", "sub/../../outside/canary".into()),
            ("absolute", format!("{out}/canary")),
            ("slashes", format!("//{out}//canary")),
            ("link", "link".into()),
            ("link-directory", "linkdir/canary".into()),
            ("etc-passwd", "/etc/passwd".into()),
            ("device", "/dev/zero".into()),
            ("null-device", "/dev/null".into()),
            ("proc-environ", "/proc/self/environ".into()),
            ("proc-root", format!("/proc/self/root{out}/canary")),
            ("proc-descriptor", "/proc/self/fd/0".into()),
            ("dev-descriptor", "/dev/fd/3".into()),
            ("fifo", "fifo".into()),
            ("directory", "sub".into()),
            ("directory-itself", ".".into()),
            ("parent", "..".into()),
            ("itself", image.to_owned()),
            ("itself-by-way", format!("./sub/../{image}")),
            ("missing", "missing".into()),
            (
                "json-file",
                format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{out}/canary\"}}}}"),
            ),
            ("json-nbd", format!("json:{{\"driver\":\"nbd\",\"host\":\"127.0.0.1\",\"port\":\"{port}\"}}")),
            ("json-infinite", "json:{\"driver\":\"raw\",\"size\":1e999,\"file.filename\":\"base\"}".into()),
            ("nbd", format!("nbd://127.0.0.1:{port}/x")),
            ("nbd-old", format!("nbd:127.0.0.1:{port}")),
            ("nbd-unix", format!("nbd+unix:///x?socket={out}/listener")),
            ("http", format!("http://127.0.0.1:{port}/x")),
            ("ssh", format!("ssh://127.0.0.1:{port}/etc/passwd")),
            ("fat", format!("fat:rw:{out}")),
            ("blkverify", format!("blkverify:{out}/canary:base")),
            ("file-protocol", "file:../outside/canary".into()),
            ("host-device", "host_device:/dev/zero".into()),
            ("fdset", "/dev/fdset/1".into()),
            ("newline", "base\nraw".into()),
            ("escape", "base\x1b[31m\x1b]0;title\x07".into()),
            ("backspace", "x\x08\x08\x7f\u{9b}31m".into()),
            ("long", "a".repeat(room)),
            ("deep", "../".repeat(room / 3)),
        ];
        let mut names: Vec<Name> = text.iter().map(|(class, name)| (*class, name.clone().into_bytes())).collect();
        names.push(("nul", b"base\0/../../outside/canary".to_vec()));
        names.push(("no-utf-8", b"\xff\xfe../outside/canary".to_vec()));
        names.retain(|(_, name)| name.len() <= room);
        names
    }
}
