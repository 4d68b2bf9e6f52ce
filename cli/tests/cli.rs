//! The binary as a user meets it: what it refuses to open, locks, exit statuses, and what it leaves behind.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use support::{can_run, expect_success, instar, listing, qemu_img};

const BINARY: &str = env!("CARGO_BIN_EXE_instar");

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Exit status 1, one line of error (with its explanation) and nothing else.
fn expect_refusal(output: &Output, what: &str) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{what}: {text}");
    assert!(text.starts_with("instar: "), "{what}: {text}");
    text
}

/// A directory `home` with images, and a file outside of it.
struct Place {
    tmp: tempfile::TempDir,
}

const SECRET: &[u8; 512] = &[0x5e; 512];

impl Place {
    fn new() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("home/sub")).unwrap();
        fs::write(tmp.path().join("secret.raw"), SECRET.repeat(8)).unwrap();
        fs::write(tmp.path().join("home/base.raw"), [7; 4096]).unwrap();
        Self { tmp }
    }

    fn home(&self) -> PathBuf {
        self.tmp.path().join("home")
    }

    /// An overlay in `home` whose backing file is called so.
    fn overlay(&self, name: &str, backing: &str) {
        let args = ["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", name, "4096"];
        expect_success(&instar(&self.home(), &args), backing);
    }
}

#[test]
fn names_in_images_do_not_lead_out() {
    if !can_run(false) {
        return;
    }
    let place = Place::new();
    let home = place.home();
    let outside = place.tmp.path().join("secret.raw");
    symlink(&outside, home.join("link")).unwrap();
    symlink(place.tmp.path(), home.join("dirlink")).unwrap();
    mknodat(CWD, home.join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let absolute = outside.to_str().unwrap();
    for name in [
        "../secret.raw",
        "sub/../../secret.raw",
        absolute,
        "link",
        "dirlink/secret.raw",
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"base.raw\"}}",
        "nbd://localhost/x",
        "file:base.raw",
        "fifo",
        "sub",
        "./top.qcow2",
        "base\x1b[2Jraw",
    ] {
        place.overlay("top.qcow2", name);
        let before = listing(&home);
        let refusal = expect_refusal(&instar(&home, &["convert", "top.qcow2", "out.raw"]), name);
        assert!(
            ["refused", "regular file", "refers to itself"].iter().any(|reason| refusal.contains(reason)),
            "{name}: {refusal}"
        );
        assert!(!refusal.contains('\x1b'), "{refusal:?}");
        expect_refusal(&instar(&home, &["info", "--backing-chain", "top.qcow2"]), name);
        expect_refusal(&instar(&home, &["info", "--chain", "top.qcow2"]), name);
        assert_eq!(listing(&home), before, "{name}");
        // Describing the image opens nothing else.
        expect_success(&instar(&home, &["info", "top.qcow2"]), name);
    }
}

#[test]
fn the_operator_widens_the_policy() {
    if !can_run(false) {
        return;
    }
    let place = Place::new();
    let (home, outside) = (place.home(), place.tmp.path().to_str().unwrap());
    place.overlay("top.qcow2", "../secret.raw");
    let refusal = expect_refusal(&instar(&home, &["convert", "top.qcow2", "out.raw"]), "no option");
    assert!(refusal.contains("--allow-dir") && refusal.contains("INSTAR_ALLOW_DIRS"), "{refusal}");
    for args in [
        ["--allow-dir", outside, "convert", "top.qcow2", "out.raw"],
        ["convert", "top.qcow2", "--allow-dir", outside, "out.raw"],
    ] {
        expect_success(&instar(&home, &args), "--allow-dir");
        assert_eq!(fs::read(home.join("out.raw")).unwrap(), SECRET.repeat(8));
    }
    let mut command = Command::new(BINARY);
    command.current_dir(&home).env("INSTAR_ALLOW_DIRS", outside).args(["convert", "top.qcow2", "env.raw"]);
    expect_success(&command.output().unwrap(), "INSTAR_ALLOW_DIRS");
    assert_eq!(fs::read(home.join("env.raw")).unwrap(), SECRET.repeat(8));
    // Absolute names of what lies beneath are as good as relative ones.
    place.overlay("abs.qcow2", home.join("base.raw").to_str().unwrap());
    expect_success(&instar(&home, &["convert", "abs.qcow2", "abs.raw"]), "absolute");
    assert_eq!(fs::read(home.join("abs.raw")).unwrap(), [7; 4096]);
}

#[test]
fn a_swapped_backing_file_never_leaks() {
    if !can_run(false) {
        return;
    }
    let place = Place::new();
    let home = place.home();
    place.overlay("top.qcow2", "base.raw");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            symlink("../secret.raw", home.join("evil")).unwrap();
            fs::write(home.join("good"), [7; 4096]).unwrap();
            while !stop.load(Ordering::Relaxed) {
                for from in ["evil", "good"] {
                    let _ = fs::remove_file(home.join("next"));
                    match from {
                        "evil" => symlink("../secret.raw", home.join("next")).unwrap(),
                        _ => drop(fs::hard_link(home.join("good"), home.join("next"))),
                    }
                    let _ = fs::rename(home.join("next"), home.join("base.raw"));
                }
            }
        });
        let mut succeeded = 0;
        for _ in 0..40 {
            let output = instar(&home, &["convert", "top.qcow2", "out.raw"]);
            match output.status.success() {
                true => {
                    succeeded += 1;
                    assert_eq!(fs::read(home.join("out.raw")).unwrap(), [7; 4096]);
                }
                false => {
                    expect_refusal(&output, "swap");
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        eprintln!("{succeeded} of 40 runs met the real file");
    });
}

#[test]
fn chains_are_told_as_far_as_they_go() {
    if !can_run(false) {
        return;
    }
    let place = Place::new();
    let home = place.home();
    let make = |name, backing, format| {
        let args = ["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, name, "4096"];
        expect_success(&instar(&home, &args), name);
    };
    make("mid.qcow2", "base.raw", "raw");
    make("top.qcow2", "mid.qcow2", "qcow2");
    let output = instar(&home, &["info", "--chain", "top.qcow2"]);
    expect_success(&output, "chain");
    assert_eq!(
        stdout(&output),
        "[0] top.qcow2 (qcow2, 4 KiB)\n[1] mid.qcow2 (qcow2, 4 KiB)\n[2] base.raw (raw, 4 KiB)\nchain: complete, 3 images\n"
    );
    make("mid.qcow2", "/etc/passwd", "raw");
    let output = instar(&home, &["info", "--chain", "--safety", "--output=json", "top.qcow2"]);
    let refusal = expect_refusal(&output, "chain");
    assert!(refusal.contains("Could not open '/etc/passwd'") && refusal.contains("refused"), "{refusal}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["complete"], false);
    assert_eq!(json["images"].as_array().unwrap().len(), 2);
    assert_eq!(json["images"][1]["safety"]["references"][0]["allowed"], false);
    make("mid.qcow2", "top.qcow2", "qcow2");
    for args in [["info", "--chain", "top.qcow2"], ["info", "--backing-chain", "top.qcow2"]] {
        assert!(expect_refusal(&instar(&home, &args), "cycle").contains("refers to itself"));
    }
}

#[test]
fn the_safety_report() {
    if !can_run(false) {
        return;
    }
    let place = Place::new();
    let home = place.home();
    place.overlay("top.vmdk", "/etc/passwd");
    let output = instar(&home, &["info", "--safety", "top.vmdk"]);
    expect_success(&output, "safety");
    let text = stdout(&output);
    for part in [
        "safety:\n    detected format: qcow2\n",
        "role: backing file\n            name: /etc/passwd\n            allowed: false\n",
        "the file name suggests vmdk, but the image is qcow2",
        "openstack refuses:\n        [0]: backing file\n",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let output = instar(&home, &["info", "--safety", "--output=json", "base.raw"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["safety"]["references"].as_array().unwrap().len(), 0);
    assert!(json["safety"]["warnings"].to_string().contains("without a partition table"));
}

/// `qemu-io` with an image open.
struct Holder(Child);

impl Holder {
    fn of(dir: &Path, image: &str) -> Self {
        use std::io::Read;
        let mut command = Command::new("qemu-io");
        let mut child =
            command.current_dir(dir).arg(image).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut prompt = [0; 9];
        child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn locks_keep_the_programs_apart() {
    if !can_run(true) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    for name in ["a.qcow2", "b.qcow2"] {
        expect_success(&instar(dir, &["create", "-q", "-f", "qcow2", name, "1M"]), name);
    }
    let before = fs::read(dir.join("a.qcow2")).unwrap();
    let holder = Holder::of(dir, "a.qcow2");
    let hint = "Is another process using the image [a.qcow2]?\n";
    let shared = format!("instar: Could not open 'a.qcow2': Failed to get shared \"write\" lock\n{hint}");
    assert_eq!(stderr(&instar(dir, &["info", "a.qcow2"])), shared);
    assert_eq!(stderr(&instar(dir, &["convert", "-O", "raw", "a.qcow2", "o.raw"])), shared);
    expect_success(&instar(dir, &["info", "-U", "a.qcow2"]), "-U");
    let exclusive = format!("a.qcow2: error while converting qcow2: Failed to get \"write\" lock\n{hint}");
    assert_eq!(stderr(&instar(dir, &["convert", "-O", "qcow2", "b.qcow2", "a.qcow2"])), format!("instar: {exclusive}"));
    assert_eq!(
        stderr(&instar(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "2M"])),
        format!("instar: a.qcow2: Failed to get \"write\" lock\n{hint}")
    );
    drop(holder);
    assert_eq!(fs::read(dir.join("a.qcow2")).unwrap(), before);
    assert!(!dir.join("o.raw").exists());
    // Nothing is left locked by a run that is over.
    for _ in 0..5 {
        expect_success(&instar(dir, &["convert", "-O", "qcow2", "b.qcow2", "c.qcow2"]), "convert");
        expect_success(&qemu_img(dir, &["check", "c.qcow2"]), "check");
        expect_success(&qemu_img(dir, &["resize", "-q", "c.qcow2", "+1M"]), "resize");
    }
}

#[test]
fn a_running_conversion_holds_its_locks() {
    if !can_run(true) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fs::write(dir.join("a.raw"), vec![1; 8 << 20]).unwrap();
    let mut child = slow_conversion(dir);
    let writer = Command::new("qemu-io").current_dir(dir).args(["-f", "raw", "-c", "write 0 512", "a.raw"]).output();
    assert!(stderr(&writer.unwrap()).contains("Failed to get \"write\" lock"));
    let reader = qemu_img(dir, &["convert", "-O", "raw", "o.qcow2", "p.raw"]);
    assert!(stderr(&reader).contains("Failed to get shared \"write\" lock"));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A conversion of `a.raw` to `o.qcow2` that takes minutes; returns once the target exists.
fn slow_conversion(dir: &Path) -> Child {
    slow_conversion_by(Command::new(BINARY), dir)
}

fn slow_conversion_by(mut command: Command, dir: &Path) -> Child {
    let args = ["convert", "-r", "64k", "-f", "raw", "-O", "qcow2", "a.raw", "o.qcow2"];
    let child = command.current_dir(dir).args(args).stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while fs::metadata(dir.join("o.qcow2")).map_or(0, |file| file.len()) == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "the conversion does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn a_signal_leaves_nothing_behind() {
    if !can_run(false) {
        return;
    }
    use rustix::process::{Pid, Signal, kill_process};
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fs::write(dir.join("a.raw"), vec![1; 8 << 20]).unwrap();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut child = slow_conversion(dir);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let status = child.wait().unwrap();
        assert!(!status.success());
        assert_eq!(listing(dir), [dir.join("a.raw")]);
    }
    // What the caller had ignored stays ignored.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' INT; exec \"$0\" \"$@\"", BINARY]);
    let mut child = slow_conversion_by(command, dir);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(child.try_wait().unwrap(), None, "the signal ended the program");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    assert_eq!(listing(dir), [dir.join("a.raw")]);
}

#[test]
fn a_failed_run_leaves_nothing_behind() {
    if !can_run(false) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fs::write(dir.join("a.raw"), [1; 4096]).unwrap();
    expect_success(&instar(dir, &["convert", "-O", "qcow2", "-c", "a.raw", "c.qcow2"]), "convert");
    // Four clusters of metadata, the L2 table, then the compressed data, which is no deflate stream any more.
    let mut broken = fs::read(dir.join("c.qcow2")).unwrap();
    broken[5 << 16..].fill(0xff);
    fs::write(dir.join("broken.qcow2"), &broken).unwrap();
    let before = listing(dir);
    for args in [
        vec!["convert", "-O", "qcow2", "broken.qcow2", "o.qcow2"],
        vec!["convert", "-O", "raw", "broken.qcow2", "o.raw"],
        vec!["convert", "-O", "qcow2", "-o", "cluster_size=3", "a.raw", "o.qcow2"],
        vec!["convert", "-O", "qcow2", "-o", "compat=7", "a.raw", "o.qcow2"],
        vec!["create", "-q", "-f", "qcow2", "-o", "refcount_bits=3", "n.qcow2", "1M"],
        vec!["create", "-q", "-f", "qcow2", "-o", "data_file=nodir/x", "n.qcow2", "1M"],
        vec!["create", "-q", "-f", "raw", "-o", "preallocation=metadata", "n.raw", "1M"],
    ] {
        let shown = format!("{args:?}");
        expect_refusal(&instar(dir, &args), &shown);
        assert_eq!(listing(dir), before, "{shown}");
    }
    // What was there before stays, but is no image any more.
    fs::write(dir.join("o.qcow2"), b"old").unwrap();
    expect_refusal(&instar(dir, &["convert", "-O", "qcow2", "broken.qcow2", "o.qcow2"]), "existing");
    let left = fs::read(dir.join("o.qcow2")).unwrap();
    assert!(!left.starts_with(b"QFI\xfb") && !left.starts_with(b"old"));
}

#[test]
fn the_target_is_never_a_source() {
    if !can_run(false) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fs::write(dir.join("a.raw"), [1; 4096]).unwrap();
    fs::hard_link(dir.join("a.raw"), dir.join("hard.raw")).unwrap();
    symlink("a.raw", dir.join("soft.raw")).unwrap();
    expect_success(
        &instar(dir, &["create", "-q", "-u", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "top.qcow2", "4096"]),
        "overlay",
    );
    for source in ["a.raw", "top.qcow2"] {
        for target in ["a.raw", "hard.raw", "soft.raw"] {
            for more in [&["-f", "raw"][..], &["-U", "-f", "raw"], &["-n", "-U", "-f", "raw"]] {
                let format = if source == "a.raw" { "raw" } else { "qcow2" };
                let more: Vec<&str> = more.iter().map(|arg| if *arg == "raw" { format } else { arg }).collect();
                let args = [&["convert", "-O", "raw"][..], &more, &[source, target]].concat();
                expect_refusal(&instar(dir, &args), &format!("{args:?}"));
                assert_eq!(fs::read(dir.join("a.raw")).unwrap(), [1; 4096], "{args:?}");
            }
        }
    }
}

#[test]
fn what_a_source_leaves_out_hides_the_new_backing() {
    if !can_run(true) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fs::write(dir.join("noise.raw"), vec![0xaa; 1 << 20]).unwrap();
    expect_success(&instar(dir, &["convert", "-O", "qcow2", "noise.raw", "full.qcow2"]), "full");
    expect_success(&instar(dir, &["create", "-q", "-f", "qcow2", "empty.qcow2", "1M"]), "empty");
    let args = ["convert", "-B", "full.qcow2", "-F", "qcow2", "-O", "qcow2", "empty.qcow2", "o.qcow2"];
    expect_success(&instar(dir, &args), "convert");
    expect_success(&qemu_img(dir, &["compare", "empty.qcow2", "o.qcow2"]), "compare");
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    if !can_run(false) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    fs::write(tmp.path().join("a.raw"), [0; 512]).unwrap();
    for args in [vec!["info", "a.raw"], vec!["--help"], vec!["info", "--help"], vec!["--version"]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = Command::new(BINARY).current_dir(tmp.path()).args(&args).stdout(full).output().unwrap();
        assert_eq!(
            expect_refusal(&output, "/dev/full"),
            "instar: Could not write to standard output: No space left on device\n",
            "{args:?}"
        );
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(BINARY).current_dir(tmp.path()).args(&args).stdout(writer).output().unwrap();
        assert!(expect_refusal(&output, "pipe").contains("Broken pipe"));
    }
    let full = File::options().write(true).open("/dev/full").unwrap();
    let args = ["create", "-f", "qcow2", "n.qcow2", "1M"];
    let output = Command::new(BINARY).current_dir(tmp.path()).args(args).stdout(full).output().unwrap();
    expect_refusal(&output, "create");
    assert!(!tmp.path().join("n.qcow2").exists());
}

#[test]
fn closed_standard_streams_do_no_harm() {
    if !can_run(false) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fs::write(dir.join("a.raw"), [3; 8192]).unwrap();
    let script = "exec \"$0\" convert -f raw -O raw a.raw o.raw <&- >&- 2>&-";
    let status = Command::new("sh").current_dir(dir).args(["-c", script, BINARY]).status().unwrap();
    assert!(status.success());
    assert_eq!(fs::read(dir.join("o.raw")).unwrap(), [3; 8192]);
    assert_eq!(fs::read(dir.join("a.raw")).unwrap(), [3; 8192]);
    let script = "\"$0\" info nosuch <&- >&- 2>&-";
    let status = Command::new("sh").current_dir(dir).args(["-c", script, BINARY]).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn new_files_follow_the_umask_and_old_ones_keep_their_mode() {
    if !can_run(false) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let mode = |name: &str| fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o7777;
    let script = "umask 027; exec \"$0\" create -q -f raw new.raw 1M";
    assert!(Command::new("sh").current_dir(dir).args(["-c", script, BINARY]).status().unwrap().success());
    assert_eq!(mode("new.raw"), 0o640);
    fs::set_permissions(dir.join("new.raw"), fs::Permissions::from_mode(0o600)).unwrap();
    expect_success(&instar(dir, &["create", "-q", "-f", "raw", "new.raw", "2M"]), "again");
    assert_eq!((mode("new.raw"), fs::metadata(dir.join("new.raw")).unwrap().len()), (0o600, 2 << 20));
}

#[test]
fn under_the_other_name_it_is_the_other_program() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let program = dir.join("qemu-img");
    symlink(BINARY, &program).unwrap();
    let run = |args: &[&str]| Command::new(&program).current_dir(dir).args(args).output().unwrap();
    assert!(stdout(&run(&["--version"])).starts_with("qemu-img version 10.0.2 (Debian "));
    for args in [["--allow-dir", "/", "info"], ["info", "--allow-dir", "/"], ["info", "--safety", "x"]] {
        let output = run(&args);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("unrecognized option"), "{}", stderr(&output));
    }
    assert!(stdout(&instar(dir, &["--version"])).starts_with("instar version "));
    assert!(stdout(&instar(dir, &["--help"])).contains("--allow-dir"));
    let output = instar(dir, &["nonsense", "x"]);
    assert!(stderr(&output).starts_with("instar: Command not found: nonsense\n"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn without_kvm_the_way_out_is_told() {
    let unprivileged = rustix::process::geteuid().is_root()
        && File::open("/dev/kvm").is_ok_and(|kvm| kvm.metadata().unwrap().permissions().mode() & 0o006 == 0);
    let has_setpriv = Command::new("setpriv").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !unprivileged || !has_setpriv {
        eprintln!("SKIPPED: needs root, setpriv, and a /dev/kvm that others can't open");
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.join("a.raw"), [0; 512]).unwrap();
    fs::copy(BINARY, dir.join("instar")).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(dir.join("instar"));
    let output = command.args(["info", "a.raw"]).current_dir(dir).output().unwrap();
    let refusal = expect_refusal(&output, "no kvm");
    assert!(refusal.contains("/dev/kvm") && refusal.contains("group kvm"), "{refusal}");
    assert_eq!(output.stdout, b"");
}

/// A run with a configuration file of its own.
fn configured(dir: &Path, config: &str, args: &[&str]) -> Output {
    fs::write(dir.join("config.toml"), config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_instar"));
    command.current_dir(dir).env("INSTAR_CONFIG", dir.join("config.toml")).args(args).output().unwrap()
}

#[test]
fn the_configuration_is_read_and_the_command_line_wins() {
    if !can_run(false) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("noise"), [0x5a; 4096]).unwrap();
    let json = configured(dir.path(), "output = \"json\"\n", &["info", "noise"]);
    assert!(stdout(&json).starts_with('{'), "{}", stderr(&json));
    let human = configured(dir.path(), "output = \"json\"\n", &["info", "--output=human", "noise"]);
    assert!(stdout(&human).starts_with("image: noise\n"));
    let old = configured(dir.path(), "qemu-version = \"7.2\"\n", &["info", "noise"]);
    assert!(stdout(&human).contains("Child node") && !stdout(&old).contains("Child node"));

    let refused = configured(dir.path(), "require-known-raw = true\n", &["info", "noise"]);
    assert!(expect_refusal(&refused, "noise").contains("-f raw"));
    assert!(configured(dir.path(), "require-known-raw = true\n", &["info", "-f", "raw", "noise"]).status.success());

    let wrong = configured(dir.path(), "threads = 2\nspeed = 3\n", &["info", "noise"]);
    let message = expect_refusal(&wrong, "speed");
    assert!(message.contains("config.toml, line 2"), "{message}");
    let mut missing = Command::new(env!("CARGO_BIN_EXE_instar"));
    let missing = missing.env("INSTAR_CONFIG", dir.path().join("nowhere")).arg("--version").output().unwrap();
    assert!(expect_refusal(&missing, "nowhere").contains("No such file or directory"));
}

#[test]
fn unsafe_quirks_open_what_images_name() {
    if !can_run(false) {
        return;
    }
    let place = Place::new();
    place.overlay("out.qcow2", "../secret.raw");
    let args = ["info", "--backing-chain", "out.qcow2"];
    expect_refusal(&instar(&place.home(), &args), "--allow-dir");
    let unsafe_args = ["info", "--backing-chain", "--unsafe-quirks", "out.qcow2"];
    let output = instar(&place.home(), &unsafe_args);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("image: ../secret.raw"), "{}", stdout(&output));
}

#[test]
fn statistics_are_told_on_standard_error() {
    if !can_run(false) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.raw"), vec![7; 3 << 20]).unwrap();
    let output = instar(dir.path(), &["convert", "--stats=json", "-f", "raw", "-O", "raw", "a.raw", "b.raw"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
    let stats: serde_json::Value = serde_json::from_str(&stderr(&output)).expect("one line of JSON");
    assert_eq!(stats["files"][0]["copied-from"]["bytes"], 3 << 20);
    assert_eq!(stats["files"][1]["copied-to"]["bytes"], 3 << 20);
    assert!(stats["doorbells"]["kicks"].as_u64() >= Some(1) && stats["peak-memory"].as_u64() > Some(0));
    let output = instar(dir.path(), &["info", "--stats", "a.raw"]);
    assert!(stderr(&output).contains("exits ("), "{}", stderr(&output));
    assert!(expect_refusal(&instar(dir.path(), &["info", "--stats=xml", "a.raw"]), "xml").contains("--stats"));
}

#[test]
fn progress_as_a_bar_and_on_a_signal() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.raw"), vec![7; 8 << 20]).unwrap();
    let output = instar(dir.path(), &["convert", "--progress=bar", "-f", "raw", "-O", "raw", "a.raw", "b.raw"]);
    assert!(output.status.success() && stdout(&output).is_empty());
    assert!(stderr(&output).contains("] 100 %"), "{}", stderr(&output));
    // A signal does not end the conversion; once some way is done, it makes it tell how far.
    let mut child = slow_conversion(dir.path());
    std::thread::sleep(Duration::from_millis(300));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(child.try_wait().unwrap(), None, "the signal ended the program");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Both describe the image itself, so what it stands on need not be there, and is not looked at.
#[test]
fn backing_files_stay_closed_for_info_and_check() {
    if !can_run(false) {
        return;
    }
    let place = Place::new();
    let home = place.home();
    place.overlay("top.qcow2", "gone.raw");
    for args in [&["info", "top.qcow2"][..], &["check", "top.qcow2"]] {
        let output = instar(&home, args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    }
    let text = expect_refusal(&instar(&home, &["map", "top.qcow2"]), "map");
    assert!(text.contains("No such file"), "{text}");
}
