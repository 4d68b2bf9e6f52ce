//! NBD exports as source and target, served by qemu-nbd.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::{can_run, expect_success, instar, qemu_img, qemu_io};

/// A server that ends with the test.
struct Server(Child);

impl Server {
    /// Serves `image` at `socket`; `None` if there is no qemu-nbd.
    fn start(dir: &Path, socket: &str, args: &[&str], image: &str) -> Option<Self> {
        let mut command = Command::new("qemu-nbd");
        let socket = dir.join(socket);
        command.current_dir(dir).args(["-t", "-k"]).arg(&socket).args(args).arg(image);
        let Ok(child) = command.stdout(Stdio::null()).spawn() else {
            eprintln!("SKIPPED: qemu-nbd is not installed, so there is nothing to connect to");
            return None;
        };
        let server = Self(child);
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < Duration::from_secs(60), "qemu-nbd does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn exports_are_described_and_read() {
    if !can_run(true) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    expect_success(&qemu_img(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]), "create");
    qemu_io(dir, "a.qcow2", &["write -P 3 1M 1M".to_owned(), "write -P 9 5000k 100k".to_owned()]);
    // Once as the disk, once as the image that it is in.
    let Some(_disk) = Server::start(dir, "disk.sock", &["-r", "-f", "qcow2", "-x", "the disk"], "a.qcow2") else {
        return;
    };
    let Some(_image) = Server::start(dir, "image.sock", &["-r", "-f", "raw"], "a.qcow2") else { return };
    let disk = format!("nbd+unix:///the%20disk?socket={}/disk.sock", dir.display());
    let image = format!("nbd:unix:{}/image.sock", dir.display());
    for args in [
        vec!["info", &image],
        vec!["info", "-f", "raw", &disk],
        vec!["info", "--output=json", "-f", "raw", &disk],
        vec!["info", &format!("nbd:unix:{}/none.sock", dir.display())],
        vec!["info", "--image-opts", &format!("driver=qcow2,file.driver=nbd,file.path={}/image.sock", dir.display())],
        vec!["info", "--image-opts", &format!("driver=nbd,server.type=unix,server.path={}/image.sock", dir.display())],
        vec!["info", "nbd:nowhere"],
    ] {
        let (ours, theirs) = (instar(dir, &args), qemu_img(dir, &args));
        assert_eq!(text(&ours.stdout), text(&theirs.stdout), "{args:?}: {}", text(&ours.stderr));
        assert_eq!(text(&ours.stderr).replace("instar:", "qemu-img:"), text(&theirs.stderr), "{args:?}");
        assert_eq!(ours.status.code(), theirs.status.code(), "{args:?}");
    }
    let missing = format!("nbd:unix:{}/disk.sock:exportname=other", dir.display());
    let refused = instar(dir, &["info", &missing]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("Requested export not available"));
    for (source, format) in [(&disk, "raw"), (&image, "qcow2")] {
        expect_success(&instar(dir, &["convert", "-f", format, "-O", "raw", source, "o.raw"]), source);
        expect_success(&qemu_img(dir, &["compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "o.raw"]), source);
        fs::remove_file(dir.join("o.raw")).unwrap();
    }
    // A name in an image does not lead to a server.
    expect_success(
        &instar(dir, &["create", "-q", "-u", "-f", "qcow2", "-b", &image, "-F", "qcow2", "o.qcow2", "8M"]),
        "u",
    );
    let refused = instar(dir, &["info", "--backing-chain", "--unsafe-quirks", "o.qcow2"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("an image may name files only"), "{}", text(&refused.stderr));
}

#[test]
fn exports_are_written_where_they_exist() {
    if !can_run(true) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let pattern: Vec<u8> = (0..3_000_000u32).map(|i| (i / 997 % 7) as u8).collect();
    fs::write(dir.join("a.raw"), &pattern).unwrap();
    fs::write(dir.join("t.raw"), vec![0xee; 4 << 20]).unwrap();
    let target = format!("nbd+unix://?socket={}/t.sock", dir.display());
    let Some(server) = Server::start(dir, "t.sock", &["-f", "raw"], "t.raw") else { return };
    expect_success(&instar(dir, &["convert", "-n", "-f", "raw", "-O", "raw", "a.raw", &target]), "convert -n");
    drop(server);
    let written = fs::read(dir.join("t.raw")).unwrap();
    assert!(written[..pattern.len()] == pattern, "the export holds something else");
    assert!(written[pattern.len().next_multiple_of(512)..].iter().all(|byte| *byte == 0xee));
    // An image in an export that is large enough, and one whose export is read-only.
    expect_success(
        &qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "q.qcow2", "4M"]),
        "q",
    );
    fs::OpenOptions::new().write(true).open(dir.join("q.qcow2")).unwrap().set_len(16 << 20).unwrap();
    let target = format!("nbd:unix:{}/q.sock", dir.display());
    let server = Server::start(dir, "q.sock", &["-f", "raw"], "q.qcow2");
    expect_success(
        &instar(dir, &["convert", "-n", "-f", "raw", "-O", "qcow2", "a.raw", &target]),
        "qcow2 in an export",
    );
    drop(server);
    expect_success(&qemu_img(dir, &["compare", "-f", "raw", "-F", "qcow2", "a.raw", "q.qcow2"]), "compare");
    let before = fs::read(dir.join("t.raw")).unwrap();
    fs::remove_file(dir.join("t.sock")).ok();
    let target = format!("nbd+unix://?socket={}/t.sock", dir.display());
    let server = Server::start(dir, "t.sock", &["-r", "-f", "raw"], "t.raw");
    let refused = instar(dir, &["convert", "-n", "-f", "raw", "-O", "raw", "a.raw", &target]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused.stderr));
    drop(server);
    assert!(fs::read(dir.join("t.raw")).unwrap() == before);
}
