//! `bench-vs-qemu`: whole commands, sandbox start and end included, against the installed qemu-img.
//!
//! The same files, in turn (A B B A …), each pair gives one ratio; the table shows the median ratio and its extremes. Processes that a
//! command leaves behind are waited for and counted in its CPU time, not in its wall time. Memory and exits are those of a run of their own.
//!
//! `--dir` names the file system: one in memory unless told otherwise, a real disk, or one with reflinks. `--linearity` shows instead how time
//! and memory grow with the data.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_child_subreaper;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::run::{Result, release_binary, run};

/// One row of the table.
struct Workload<'a> {
    name: &'a str,
    /// Arguments, `{}` standing for the output file.
    args: &'a [&'a str],
}

const WORKLOADS: &[Workload<'_>] = &[
    Workload { name: "info", args: &["info", "plain.qcow2"] },
    Workload { name: "info --backing-chain of six", args: &["info", "--backing-chain", "chain6.qcow2"] },
    Workload { name: "measure", args: &["measure", "-O", "qcow2", "plain.qcow2"] },
    Workload { name: "qcow2 -> raw", args: &["convert", "-O", "raw", "plain.qcow2", "{}"] },
    Workload { name: "qcow2 4 KiB clusters -> raw", args: &["convert", "-O", "raw", "c4k.qcow2", "{}"] },
    Workload { name: "qcow2 extended L2 -> raw", args: &["convert", "-O", "raw", "extl2.qcow2", "{}"] },
    Workload { name: "chain of six -> raw", args: &["convert", "-O", "raw", "chain6.qcow2", "{}"] },
    Workload { name: "raw -> qcow2", args: &["convert", "-f", "raw", "-O", "qcow2", "data.raw", "{}"] },
    Workload { name: "qcow2 -> qcow2", args: &["convert", "-O", "qcow2", "plain.qcow2", "{}"] },
    Workload { name: "zlib qcow2 -> raw", args: &["convert", "-O", "raw", "zlib.qcow2", "{}"] },
    Workload { name: "zlib qcow2 -> qcow2", args: &["convert", "-O", "qcow2", "zlib.qcow2", "{}"] },
    Workload { name: "zstd qcow2 -> raw", args: &["convert", "-O", "raw", "zstd.qcow2", "{}"] },
    Workload { name: "raw -> zlib qcow2", args: &["convert", "-f", "raw", "-O", "qcow2", "-c", "data.raw", "{}"] },
    Workload {
        name: "raw -> zstd qcow2",
        args: &["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", "data.raw", "{}"],
    },
    Workload { name: "sparse VMDK -> raw", args: &["convert", "-f", "vmdk", "-O", "raw", "sparse.vmdk", "{}"] },
    Workload { name: "sparse VMDK -> qcow2", args: &["convert", "-f", "vmdk", "-O", "qcow2", "sparse.vmdk", "{}"] },
    Workload { name: "raw -> sparse VMDK", args: &["convert", "-f", "raw", "-O", "vmdk", "data.raw", "{}"] },
    Workload {
        name: "streamOptimized VMDK -> raw",
        args: &["convert", "-f", "vmdk", "-O", "raw", "stream.vmdk", "{}"],
    },
    Workload {
        name: "raw -> streamOptimized VMDK",
        args: &["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "data.raw", "{}"],
    },
    Workload { name: "dynamic VHD -> raw", args: &["convert", "-f", "vpc", "-O", "raw", "dynamic.vhd", "{}"] },
    Workload { name: "dynamic VHD -> qcow2", args: &["convert", "-f", "vpc", "-O", "qcow2", "dynamic.vhd", "{}"] },
    Workload { name: "raw -> dynamic VHD", args: &["convert", "-f", "raw", "-O", "vpc", "data.raw", "{}"] },
    Workload { name: "dynamic VHDX -> raw", args: &["convert", "-f", "vhdx", "-O", "raw", "dynamic.vhdx", "{}"] },
    Workload { name: "dynamic VHDX -> qcow2", args: &["convert", "-f", "vhdx", "-O", "qcow2", "dynamic.vhdx", "{}"] },
    Workload { name: "raw -> dynamic VHDX", args: &["convert", "-f", "raw", "-O", "vhdx", "data.raw", "{}"] },
    Workload {
        name: "LUKS aes-256-xts -> raw",
        args: &[
            "convert",
            SECRET[0],
            SECRET[1],
            "--image-opts",
            "driver=luks,file.filename=v.luks,key-secret=s",
            "-O",
            "raw",
            "{}",
        ],
    },
    // Into a volume that is there: qemu-img takes seconds to measure how fast keys are derived.
    Workload {
        name: "raw -> LUKS aes-256-xts",
        args: &[
            "convert",
            "-n",
            SECRET[0],
            SECRET[1],
            "-f",
            "raw",
            "data.raw",
            "--target-image-opts",
            "driver=luks,file.filename=target.luks,key-secret=s",
        ],
    },
    Workload {
        name: "encrypted qcow2 -> raw",
        args: &[
            "convert",
            SECRET[0],
            SECRET[1],
            "--image-opts",
            "driver=qcow2,file.filename=encrypted.qcow2,encrypt.key-secret=s",
            "-O",
            "raw",
            "{}",
        ],
    },
    Workload { name: "check, 4 KiB clusters", args: &["check", "c4k.qcow2"] },
    Workload { name: "map, 4 KiB clusters", args: &["map", "--output=json", "c4k.qcow2"] },
    Workload { name: "check, 1 TiB with 20 000 clusters", args: &["check", "scattered.qcow2"] },
    Workload { name: "map, 1 TiB with 20 000 clusters", args: &["map", "--output=json", "scattered.qcow2"] },
    Workload { name: "compare plain with itself as raw", args: &["compare", "plain.qcow2", "data.raw"] },
    Workload { name: "compare plain with zlib", args: &["compare", "plain.qcow2", "zlib.qcow2"] },
    Workload {
        name: "compare 1 TiB with 20 000 clusters",
        args: &["compare", "scattered.qcow2", "scattered-copy.qcow2"],
    },
];

/// What opens the encrypted inputs.
const SECRET: [&str; 2] = ["--object", "secret,id=s,data=passphrase"];

/// A disk of 1 TiB of which this many clusters, all over it, hold something.
const SCATTERED: u64 = 20_000;

/// Inputs that the rows about other formats need: name, format and options.
const OTHER_INPUTS: &[(&str, &str, &str)] = &[
    ("sparse.vmdk", "vmdk", "subformat=monolithicSparse"),
    ("stream.vmdk", "vmdk", "subformat=streamOptimized"),
    ("dynamic.vhd", "vpc", "subformat=dynamic,force_size=on"),
    ("dynamic.vhdx", "vhdx", "subformat=dynamic"),
];

/// Likewise encrypted, with keys that are derived at once.
const ENCRYPTED_INPUTS: &[(&str, &str, &str)] = &[
    ("v.luks", "luks", "key-secret=s,iter-time=10"),
    ("encrypted.qcow2", "qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
];

struct Options {
    mib: u64,
    runs: usize,
    dir: PathBuf,
    only: Option<String>,
    linearity: bool,
}

fn options(args: &[String]) -> Result<Options> {
    let mut options = Options { mib: 256, runs: 11, dir: PathBuf::from("/dev/shm"), only: None, linearity: false };
    let mut args = args.iter();
    while let Some(key) = args.next() {
        if key == "--linearity" {
            options.linearity = true;
            continue;
        }
        let value = args.next().ok_or_else(|| format!("{key} needs a value"))?;
        match key.as_str() {
            "--mib" => options.mib = value.parse()?,
            "--runs" => options.runs = value.parse()?,
            "--dir" => options.dir = value.into(),
            "--only" => options.only = Some(value.clone()),
            _ => return Err(format!("unknown option {key}").into()),
        }
    }
    Ok(options)
}

/// Prints the table.
pub fn bench_vs_qemu(args: &[String]) -> Result {
    let options = options(args)?;
    let instar = release_binary()?;
    let dir = tempfile::tempdir_in(&options.dir)?;
    set_child_subreaper(true)?;
    if options.linearity {
        return linearity(dir.path(), &instar, options.runs);
    }
    make_inputs(dir.path(), options.mib)?;
    println!("{} MiB of real files in {}, {} pairs\n", options.mib, options.dir.display(), options.runs);
    println!("| workload | ratio (min-max) | instar ms | qemu-img ms | CPU ratio | peak MiB | qemu-img MiB | exits |");
    println!("|---|---|---|---|---|---|---|---|");
    for workload in WORKLOADS {
        if options.only.as_ref().is_none_or(|word| workload.name.contains(word.as_str())) {
            row(dir.path(), workload, &instar, options.runs)?;
        }
    }
    Ok(())
}

fn row(dir: &Path, workload: &Workload<'_>, instar: &Path, runs: usize) -> Result {
    let qemu = Path::new("qemu-img");
    let (mut ratios, mut cpu_ratios, mut ours, mut theirs) = (vec![], vec![], vec![], vec![]);
    // One pair to warm up.
    measure(dir, instar, workload)?;
    measure(dir, qemu, workload)?;
    for round in 0..runs {
        let (a, b) = match round % 2 {
            0 => {
                let a = measure(dir, instar, workload)?;
                (a, measure(dir, qemu, workload)?)
            }
            _ => {
                let b = measure(dir, qemu, workload)?;
                (measure(dir, instar, workload)?, b)
            }
        };
        ratios.push(a.wall / b.wall);
        cpu_ratios.push(a.cpu / b.cpu.max(1e-6));
        ours.push(a.wall * 1e3);
        theirs.push(b.wall * 1e3);
    }
    let (low, high) = (ratios.iter().copied().fold(f64::MAX, f64::min), ratios.iter().copied().fold(0.0, f64::max));
    println!(
        "| {} | {:.2} ({low:.2}-{high:.2}) | {:.1} | {:.1} | {:.2} | {:.0} | {:.0} | {} |",
        workload.name,
        median(&mut ratios),
        median(&mut ours),
        median(&mut theirs),
        median(&mut cpu_ratios),
        peak_mib(dir, instar, workload)?,
        peak_mib(dir, qemu, workload)?,
        exits(dir, instar, workload)?,
    );
    Ok(())
}

/// Exits of the virtual machine in one run.
fn exits(dir: &Path, instar: &Path, workload: &Workload<'_>) -> Result<u64> {
    let mut command = Command::new(instar);
    command.arg("--stats=json").args(arguments(dir, workload)).current_dir(dir).stdin(Stdio::null());
    let output = command.output()?;
    reap_orphans();
    let text = String::from_utf8_lossy(&output.stderr);
    let number = text.split("\"exits\":").nth(1).unwrap_or_default().trim_start();
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().map_err(|_| format!("no count of exits in {text:?}").into())
}

/// Work on growing disks, whose time and memory are to grow as the data does, and not at all.
///
/// The sources are images of 1 GiB, named as often as it takes (`convert` puts them one behind the other), so that there is room for the rest in memory.
fn linearity(dir: &Path, instar: &Path, runs: usize) -> Result {
    const GIB: [usize; 3] = [1, 4, 16];
    real_files(&dir.join("piece.raw"), 1 << 30)?;
    for (options, name) in [(&["-O", "qcow2"][..], "piece.qcow2"), (&["-O", "qcow2", "-c"], "zlib.qcow2")] {
        run(Command::new(instar)
            .current_dir(dir)
            .args(["convert", "-f", "raw"])
            .args(options)
            .args(["piece.raw", name]))?;
    }
    println!("| workload | GiB | instar ms | ms per GiB | peak MiB |");
    println!("|---|---|---|---|---|");
    let conversions: [(&str, &[&'static str], &'static str); 3] = [
        ("qcow2 -> raw", &["convert", "-O", "raw"], "piece.qcow2"),
        ("zlib qcow2 -> raw", &["convert", "-O", "raw"], "zlib.qcow2"),
        ("raw -> qcow2", &["convert", "-f", "raw", "-O", "qcow2"], "piece.raw"),
    ];
    for gib in GIB {
        for (name, words, source) in conversions {
            let args = [words, &vec![source; gib], &["{}"]].concat();
            grown(dir, &Workload { name, args: &args }, instar, (runs, gib))?;
        }
        // The last conversion's output is the image that is looked at.
        fs::rename(dir.join("out"), dir.join("big.qcow2"))?;
        for (name, args) in [("check", &["check", "big.qcow2"][..]), ("map", &["map", "--output=json", "big.qcow2"])] {
            grown(dir, &Workload { name, args }, instar, (runs, gib))?;
        }
        fs::remove_file(dir.join("big.qcow2"))?;
    }
    Ok(())
}

/// A row about a disk of so many GiB.
fn grown(dir: &Path, workload: &Workload<'_>, instar: &Path, (runs, gib): (usize, usize)) -> Result {
    let peak = peak_mib(dir, instar, workload)?;
    let mut times = Vec::new();
    for _ in 0..runs {
        times.push(measure(dir, instar, workload)?.wall * 1e3);
    }
    let time = median(&mut times);
    println!("| {} | {gib} | {time:.0} | {:.1} | {peak:.0} |", workload.name, time / gib as f64);
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Measure {
    wall: f64,
    cpu: f64,
}

fn command(dir: &Path, program: &Path, workload: &Workload<'_>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null()).args(arguments(dir, workload));
    command
}

/// The arguments of a workload, whose output file is not there yet.
fn arguments(dir: &Path, workload: &Workload<'_>) -> impl Iterator<Item = OsString> {
    let output = dir.join("out");
    let _ = fs::remove_file(&output);
    workload.args.iter().map(move |arg| if *arg == "{}" { output.clone().into() } else { arg.into() })
}

fn measure(dir: &Path, program: &Path, workload: &Workload<'_>) -> Result<Measure> {
    let mut command = command(dir, program, workload);
    let before = children_cpu()?;
    let start = Instant::now();
    let status = command.status()?;
    let wall = start.elapsed().as_secs_f64();
    if !status.success() {
        return Err(format!("{command:?}: {status}").into());
    }
    reap_orphans();
    Ok(Measure { wall, cpu: children_cpu()? - before })
}

/// Waits for processes that outlive their command.
fn reap_orphans() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::empty())) {
        if status == WaitStatus::StillAlive {
            break;
        }
    }
}

fn children_cpu() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// The largest sum of resident memory over the command's processes, seen every half millisecond in a run of its own.
fn peak_mib(dir: &Path, program: &Path, workload: &Workload<'_>) -> Result<f64> {
    let mut child = command(dir, program, workload).spawn()?;
    let mut peak = 0;
    while child.try_wait()?.is_none() {
        peak = peak.max(family_rss(&child));
        std::thread::sleep(Duration::from_micros(500));
    }
    reap_orphans();
    Ok(peak as f64 / f64::from(1 << 20))
}

fn family_rss(child: &Child) -> u64 {
    let id = child.id();
    let tasks = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
    let children = tasks.split_whitespace().filter_map(|word| word.parse().ok());
    std::iter::once(id).chain(children).map(proportional_set).sum()
}

/// Memory of a process, shared pages counted by their share.
fn proportional_set(id: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{id}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|rest| rest.trim().strip_suffix(" kB")).and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0)
        << 10
}

fn make_inputs(dir: &Path, mib: u64) -> Result {
    real_files(&dir.join("data.raw"), mib << 20)?;
    let qemu = |args: &[&str]| run(Command::new("qemu-img").current_dir(dir).args(args).stdout(Stdio::null()));
    let convert = |options: &[&str], name| {
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend_from_slice(options);
        args.extend(["data.raw", name]);
        qemu(&args)
    };
    convert(&[], "plain.qcow2")?;
    convert(&["-o", "cluster_size=4k"], "c4k.qcow2")?;
    convert(&["-o", "extended_l2=on"], "extl2.qcow2")?;
    convert(&["-c", "-W", "-m", "8"], "zlib.qcow2")?;
    convert(&["-c", "-W", "-m", "8", "-o", "compression_type=zstd"], "zstd.qcow2")?;
    for (name, format, options) in OTHER_INPUTS {
        qemu(&["convert", "-f", "raw", "-O", format, "-o", options, "data.raw", name])?;
    }
    for (name, format, options) in ENCRYPTED_INPUTS {
        qemu(&["convert", SECRET[0], SECRET[1], "-f", "raw", "-O", format, "-o", options, "data.raw", name])?;
    }
    fs::copy(dir.join("v.luks"), dir.join("target.luks"))?;
    scattered(dir)?;
    // Six layers: the base, and five that each hold every sixth stretch of 2 MiB.
    let mut below = "plain.qcow2".to_owned();
    for layer in 2..=6 {
        let name = format!("chain{layer}.qcow2");
        qemu(&["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &name])?;
        let mut io = Command::new("qemu-io");
        io.current_dir(dir).stdout(Stdio::null());
        for stretch in (layer..mib / 2).step_by(6) {
            io.args(["-c", &format!("write -P {} {}M 2M", 0x10 + layer, stretch * 2)]);
        }
        run(io.arg(&name))?;
        below = name;
    }
    Ok(())
}

/// A disk of 1 TiB with a few clusters here and there, and a copy of it.
fn scattered(dir: &Path) -> Result {
    const DISK: u64 = 1 << 40;
    run(Command::new("qemu-img").current_dir(dir).args(["create", "-q", "-f", "qcow2", "scattered.qcow2", "1T"]))?;
    let mut io = Command::new("qemu-io");
    let mut io = io.current_dir(dir).arg("scattered.qcow2").stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let mut script = String::new();
    for cluster in 0..SCATTERED {
        let at = cluster * (DISK / SCATTERED) / 65536 * 65536;
        let _ = writeln!(script, "write -P {} {at} 4k", cluster % 255 + 1);
    }
    io.stdin.take().ok_or("qemu-io takes no commands")?.write_all(script.as_bytes())?;
    if !io.wait()?.success() {
        return Err("qemu-io failed".into());
    }
    fs::copy(dir.join("scattered.qcow2"), dir.join("scattered-copy.qcow2"))?;
    Ok(())
}

/// Programs, libraries and texts of this machine, one behind the other.
fn real_files(path: &Path, len: u64) -> Result {
    let mut out = File::create(path)?;
    let mut left = len;
    let mut dirs = vec![PathBuf::from("/usr/share"), PathBuf::from("/usr/lib"), PathBuf::from("/usr/bin")];
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        let mut entries: Vec<_> = entries.flatten().collect();
        entries.sort_by_key(|entry| entry.path());
        for entry in entries {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file() && left > 0 {
                let mut bytes = Vec::new();
                File::open(entry.path()).and_then(|file| file.take(left.min(8 << 20)).read_to_end(&mut bytes)).ok();
                out.write_all(&bytes)?;
                left -= bytes.len() as u64;
            }
        }
        if left == 0 {
            return Ok(());
        }
    }
    Err(format!("this machine has {left} bytes too few under /usr").into())
}
