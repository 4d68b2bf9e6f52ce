//! The corpus of real images: everything as recorded from qemu-img, except the documented quirks. Where qemu-img's reading is wrong, the
//! contents must be those that another implementation found.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, str};

use crate::run::{Result, release_binary, root};

/// Images whose reading differs from qemu-img's, the commands concerned, and the quirk of `docs/quirks.md` that says why.
const QUIRKS: &[(&str, &[&str], &str)] = &[
    ("dfvfs/fat-differential.vhd", &["info", "convert"], "vhd-parent"),
    ("go-vhd/win8-child.vhd", &["info", "convert"], "vhd-parent"),
    ("dfvfs/fat-differential.vhdx", &["info", "check", "convert"], "vhdx-parents"),
    ("qemu-iotests/iotest-dirtylog-10G-4M.vhdx", &["info", "check", "convert"], "vhdx-dirty-log"),
    ("cdi/cirros-snapshot1.qcow2", &["check"], "check-opens-one"),
    ("cdi/cirros-snapshot2.qcow2", &["check"], "check-opens-one"),
    ("osv/disk.qcow2", &["check"], "check-opens-one"),
];

/// Contents that the manifest has wrong. libvhdi reads sector 186 of this disk as zero, although its bit in the sector bitmap (byte 23 is 0xcb: 184,
/// 185, 188, 190 and 191 are the child's) leaves it to the parent; there the file `WPSettings.dat`, 12 bytes in child and parent, begins with its
/// length. The sum is that of the parent with the child's sectors laid over it by a script that knows nothing of this project.
const CORRECTED: &[(&str, &str)] =
    &[("dfvfs/fat-differential.vhd", "f4b61a33ee2f7e8c19f737792a4107e46340026a9a829e4169b751901cc3ef02")];

/// Runs the corpus; an argument is a pattern of names.
pub fn corpus(args: &[String]) -> Result {
    let corpus = root().join("../shared/corpus");
    let script = corpus.join("run.py");
    if !script.exists() {
        return Err(format!("{} is not there: nothing to compare with", script.display()).into());
    }
    check_documented()?;
    let binary = release_binary()?;
    let work = tempfile::tempdir()?;
    let mut command = Command::new("python3");
    command.arg(&script).arg("--work").arg(work.path());
    if let Some(only) = args.iter().find(|arg| *arg != "--") {
        command.args(["--only", only]);
    }
    let output = command.arg(&binary).stderr(Stdio::inherit()).output()?;
    let text = str::from_utf8(&output.stdout)?;
    let (mut excused, mut failed) = (0, 0);
    for line in text.lines() {
        let Some(what) = line.strip_prefix("FAIL ") else {
            println!("{line}");
            continue;
        };
        match quirk(what) {
            Some(quirk) => {
                excused += 1;
                println!("quirk {quirk}: {what}");
            }
            None => {
                failed += 1;
                println!("{line}");
            }
        }
    }
    if !text.lines().last().is_some_and(|line| line.ends_with(" failed")) {
        return Err(format!("the runner did not come to its end: {}", output.status).into());
    }
    let (right, wrong) = true_contents(&corpus, work.path(), &binary)?;
    println!(
        "{excused} differences are documented quirks, {right} of their contents are right, {wrong} wrong, {failed} failed"
    );
    if failed + wrong == 0 { Ok(()) } else { Err("the corpus does not pass".into()) }
}

/// The quirk that excuses `GROUP/NAME COMMAND: …`.
fn quirk(what: &str) -> Option<&'static str> {
    let mut words = what.split([' ', ':']);
    let (image, command) = (words.next()?, words.next()?);
    QUIRKS.iter().find(|(name, commands, _)| *name == image && commands.contains(&command)).map(|(.., quirk)| *quirk)
}

/// The documentation tells of every quirk that excuses something.
fn check_documented() -> Result {
    let text = fs::read_to_string(root().join("docs/quirks.md"))?;
    for (_, _, quirk) in QUIRKS {
        if !text.contains(&format!("| `{quirk}` |")) {
            return Err(format!("docs/quirks.md does not tell of {quirk}").into());
        }
    }
    Ok(())
}

/// Converts the images that qemu-img reads wrongly, and compares with the contents that another implementation found.
fn true_contents(corpus: &Path, work: &Path, binary: &Path) -> Result<(u32, u32)> {
    let manifest = fs::read_to_string(corpus.join("MANIFEST.tsv"))?;
    let mut lines = manifest.lines();
    let titles: Vec<&str> = lines.next().unwrap_or_default().split('\t').collect();
    let (mut right, mut wrong) = (0, 0);
    for line in lines {
        let fields: Vec<&str> = line.split('\t').collect();
        let field = |title: &str| {
            let at = titles.iter().position(|known| *known == title);
            at.and_then(|at| fields.get(at)).copied().unwrap_or_default()
        };
        let image = format!("{}/{}", field("group"), field("name"));
        let corrected = CORRECTED.iter().find(|(name, _)| *name == image).map(|(_, sum)| *sum);
        let wanted = field("true_content").split(' ').find_map(|word| word.strip_prefix("sha256="));
        let wanted = corrected.or(wanted);
        let Some(wanted) = wanted.filter(|_| QUIRKS.iter().any(|(name, ..)| *name == image)) else { continue };
        let found = content(&work.join(field("group")), field("name"), binary)?;
        if found == wanted {
            right += 1;
        } else {
            wrong += 1;
            println!("FAIL {image} contents: {found}, not {wanted}");
        }
    }
    Ok((right, wrong))
}

/// SHA-256 of the disk of an image.
fn content(dir: &Path, name: &str, binary: &Path) -> Result<String> {
    let out: PathBuf = dir.join("true-content.raw");
    let status = Command::new(binary).current_dir(dir).args(["convert", "-O", "raw", name]).arg(&out).status()?;
    if !status.success() {
        return Err(format!("convert {name}: {status}").into());
    }
    let sum = Command::new("sha256sum").arg(&out).output()?;
    fs::remove_file(&out)?;
    Ok(str::from_utf8(&sum.stdout)?.split(' ').next().unwrap_or_default().to_owned())
}
