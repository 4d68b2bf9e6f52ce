//! Random sequences of commands, done by instar on one copy and by qemu-img on another.
//!
//! Both copies begin equal: an image with random options, written by qemu-io. After each command the outputs, the exit status and
//! the guest contents must agree, and `qemu-img check` must be as content with the one copy as with the other. What may differ
//! is where in the file things lie, so sizes and offsets of host files are left out of the comparison.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::process::{Ended, Program};
use crate::random::Random;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const MIB: u64 = 1 << 20;

/// An encrypted image, and what opens it.
const ENCRYPTED: &str = "driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2";
const SECRET: &str = "secret,id=s,data=open sesame";

/// Formats that are written, beside qcow2.
const FORMATS: &[&str] = &["raw", "vmdk", "vpc", "vhdx", "vdi", "qed", "qcow", "parallels"];

/// What came of a sequence.
#[derive(Debug)]
pub struct Outcome {
    /// Commands done on both sides.
    pub commands: u64,
    /// Why it ended early, if qemu-img did what can't be compared with.
    pub note: Option<String>,
}

/// Does the commands of a seed by `binary` on one copy and by qemu-img on another. The copies stay where there is a difference.
///
/// # Errors
/// A difference, with everything that was done; or the system's errors.
pub fn differ(binary: &Path, seed: u64, steps: u64) -> Result<Outcome> {
    Sequence::new(binary, seed)?.run(steps)
}

/// Two copies of a few images, and what is done to them.
struct Sequence {
    seed: u64,
    random: Random,
    root: PathBuf,
    /// instar, called by the name of the other.
    ours: PathBuf,
    size: u64,
    base_format: &'static str,
    /// Something was committed into a raw base, or from fine clusters: where the base has holes or zero clusters is not the same.
    holes: bool,
    log: Vec<String>,
    snapshots: u64,
    bitmaps: u64,
    /// Clusters are compressed by Zstandard: qemu-img downgrades such an image to one that it can't read any more.
    zstd: bool,
    /// Clusters are smaller than 4 KiB.
    fine: bool,
    /// Clusters are smaller than those of an image with the usual ones.
    small: bool,
    /// The last command failed on both sides.
    failed: bool,
}

/// What is compared of a command.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compare {
    /// Exit status and both outputs.
    All,
    /// Not the places in host files.
    Placeless,
    /// Exit status only.
    Status,
}

/// There is nothing more to compare with: qemu-img was ended by a signal, as by a failed assertion, or damaged its own image.
#[derive(Debug)]
struct Incomparable(String);

impl std::fmt::Display for Incomparable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Incomparable {}

impl Sequence {
    fn new(binary: &Path, seed: u64) -> Result<Self> {
        // Where a disk's file system shows holes depends on what has been written back by then.
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let root = place.join(format!("instar-differential-{}-{seed}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        for copy in ["ours", "theirs", "bin"] {
            fs::create_dir_all(root.join(copy))?;
        }
        let ours = root.join("bin/qemu-img");
        std::os::unix::fs::symlink(binary, &ours)?;
        let random = Random(seed);
        Ok(Self {
            seed,
            random,
            root,
            ours,
            size: 0,
            base_format: "raw",
            holes: false,
            log: Vec::new(),
            snapshots: 0,
            bitmaps: 0,
            zstd: false,
            fine: false,
            small: false,
            failed: false,
        })
    }

    fn run(mut self, steps: u64) -> Result<Outcome> {
        let result = self.setup().and_then(|()| (0..steps).try_for_each(|_| self.step()));
        let commands = self.log.len() as u64;
        let note = match result {
            Ok(()) => None,
            Err(error) if error.is::<Incomparable>() => Some(error.to_string()),
            // The copies stay for whoever looks into it.
            Err(error) => {
                let (log, place) = (self.log.join("\n  "), self.root.display());
                return Err(format!("seed {}: {error}\n  {log}\nin {place}", self.seed).into());
            }
        };
        fs::remove_dir_all(&self.root)?;
        Ok(Outcome { commands, note })
    }

    /// A base, an overlay on it, and contents; made by qemu-img in both copies.
    fn setup(&mut self) -> Result {
        let cluster = self.random.pick(&["512", "4k", "64k", "64k", "2M"]);
        self.fine = cluster == "512";
        self.small = matches!(cluster, "512" | "4k");
        let subclusters = matches!(cluster, "64k" | "2M") && self.random.one_in(4);
        self.size = match self.random.below(4) {
            0 => self.random.below(300) * 512,
            1 => self.random.below(64) * MIB + 512,
            _ => (1 + self.random.below(24)) * MIB,
        }
        .max(512);
        let mut options = format!("cluster_size={cluster}");
        if subclusters {
            options.push_str(",extended_l2=on");
        } else if self.random.one_in(4) {
            options.push_str(",compat=0.10");
        } else if self.random.one_in(3) {
            options.push_str(&format!(",refcount_bits={}", self.random.pick(&["1", "2", "8", "32", "64"])));
        }
        if !options.contains("0.10") && self.random.one_in(4) {
            options.push_str(",compression_type=zstd");
            self.zstd = true;
        }
        let base_format = self.random.pick(&["raw", "qcow2"]);
        self.base_format = base_format;
        let base_size = if self.random.one_in(3) { self.size / 2 } else { self.size };
        let (size, base_size) = (self.size.to_string(), base_size.max(512).to_string());
        self.prepare(&["create", "-q", "-f", base_format, "base", &base_size])?;
        self.write("base", base_format)?;
        self.prepare(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base",
            "-F",
            base_format,
            "-o",
            &options,
            "a.qcow2",
            &size,
        ])?;
        let preallocation = match self.random.below(8) {
            0 | 1 => ",preallocation=metadata",
            2 => ",preallocation=falloc",
            3 => ",preallocation=full",
            _ => "",
        };
        self.prepare(&["create", "-q", "-f", "qcow2", "-o", &format!("{options}{preallocation}"), "b.qcow2", &size])?;
        self.write("a.qcow2", "qcow2")?;
        self.write("b.qcow2", "qcow2")?;
        // Those are only read.
        let mut apart = format!("{}data_file=d.data", if options.contains("0.10") { "" } else { "lazy_refcounts=on," });
        apart += self.random.pick(&["", ",data_file_raw=on", ",preallocation=metadata"]);
        self.prepare(&["create", "-q", "-f", "qcow2", "-o", &apart, "d.qcow2", &size])?;
        self.write("d.qcow2", "qcow2")?;
        let luks = format!("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,cluster_size={cluster}");
        self.prepare(&["create", "-q", "--object", SECRET, "-f", "qcow2", "-o", &luks, "l.qcow2", &size])?;
        // Salts and keys are random.
        fs::copy(self.root.join("theirs/l.qcow2"), self.root.join("ours/l.qcow2"))?;
        self.write(ENCRYPTED, "")
    }

    /// The same by qemu-img in both copies.
    fn prepare(&mut self, args: &[&str]) -> Result {
        self.log.push(format!("(both) qemu-img {}", args.join(" ")));
        for copy in ["ours", "theirs"] {
            let output = Command::new("qemu-img").current_dir(self.root.join(copy)).args(args).output()?;
            if !output.status.success() {
                return Err(format!("qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
            }
        }
        Ok(())
    }

    /// Some writes by qemu-io, the same to both copies. Without a format, `image` are options.
    fn write(&mut self, image: &str, format: &str) -> Result {
        let len = if format.is_empty() { self.size } else { self.length(image, format)? };
        let mut commands = Vec::new();
        for _ in 0..1 + self.random.below(5) {
            let offset = self.random.below(len) / 512 * 512;
            let count = (1 + self.random.below(600)) * 512;
            let count = count.min(len.saturating_sub(offset) / 512 * 512);
            if count == 0 {
                continue;
            }
            let verb = match self.random.below(6) {
                0 => "write -z".to_owned(),
                1 => "write -z -u".to_owned(),
                2 if matches!(format, "qcow2" | "") => "discard".to_owned(),
                _ => format!("write -P {}", 1 + self.random.below(255)),
            };
            commands.push(format!("{verb} {offset} {count}"));
        }
        self.log.push(format!("(both) qemu-io -f {format} {image}: {}", commands.join("; ")));
        for copy in ["ours", "theirs"] {
            let mut command = Command::new("qemu-io");
            command.current_dir(self.root.join(copy)).stdout(Stdio::null());
            commands.iter().for_each(|text| {
                command.args(["-c", text]);
            });
            match format {
                "" => command.args(["--object", SECRET, "--image-opts"]),
                _ => command.args(["-f", format]),
            };
            if !command.arg(image).status()?.success() {
                return Err(format!("qemu-io {commands:?} failed").into());
            }
        }
        Ok(())
    }

    fn length(&self, image: &str, format: &str) -> Result<u64> {
        let args = ["info", "--output=json", "-f", format, image];
        let output = Command::new("qemu-img").current_dir(self.root.join("theirs")).args(args).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let sizes = text.lines().filter_map(|line| line.trim().strip_prefix("\"virtual-size\": "));
        let last = sizes.fold(None, |_, size| Some(size)).and_then(|size| size.trim_end_matches(',').parse().ok());
        last.ok_or_else(|| format!("qemu-img {args:?}: no size").into())
    }

    /// One command on both sides, and what must agree after it.
    fn step(&mut self) -> Result {
        let image = self.random.pick(&["a.qcow2", "a.qcow2", "b.qcow2"]);
        let reading = self.random.pick(&[image, image, image, "d.qcow2"]);
        match self.random.below(34) {
            0 => self.same(Compare::Placeless, &["info", reading]),
            1 => self.same(Compare::Placeless, &["info", "--output=json", "--backing-chain", reading]),
            2 => self.same(Compare::Placeless, &["check", reading]),
            3 => self.same(Compare::Placeless, &["check", "--output=json", reading]),
            4 if self.holes => self.same(Compare::Status, &["map", "--output=json", reading]),
            4 => self.same(Compare::Placeless, &["map", "--output=json", reading]),
            5 => self.same(Compare::Status, &["map", reading]),
            6 => self.same(Compare::All, &["compare", "a.qcow2", "b.qcow2"]),
            7 if !self.holes => self.same(Compare::All, &["compare", "-s", "a.qcow2", reading]),
            8 => self.measure(reading),
            9 => self.write(image, "qcow2"),
            10 | 11 => self.snapshot(image),
            12 | 13 => self.resize(image),
            14 => self.rebase(),
            15 => self.commit(),
            16 => self.amend(image),
            17 | 18 => self.bitmap(image),
            19 => self.dd(reading),
            30 => self.copy_sparsely(image),
            31 => self.encrypted(),
            20..=25 => self.other_format(),
            26 => self.change(image, &["check", "-r", self.random.clone().pick(&["leaks", "all"]), image]),
            27 => self.create(),
            _ => self.convert(reading),
        }
    }

    /// The file gets holes wherever it is zero.
    fn copy_sparsely(&mut self, image: &str) -> Result {
        self.log.push(format!("(both) cp --sparse=always {image}"));
        for copy in ["ours", "theirs"] {
            let mut copying = Command::new("cp");
            copying.current_dir(self.root.join(copy)).args(["--sparse=always", image, "sparse"]);
            if !copying.status()?.success() {
                return Err(format!("{image} can't be copied").into());
            }
            fs::rename(self.root.join(copy).join("sparse"), self.root.join(copy).join(image))?;
        }
        Ok(())
    }

    /// What is asked of an encrypted image.
    fn encrypted(&mut self) -> Result {
        let target = self.random.pick(&["raw", "qcow2", "vmdk"]);
        match self.random.below(4) {
            0 => {
                self.same(Compare::Placeless, &["map", "--object", SECRET, "--output=json", "--image-opts", ENCRYPTED])
            }
            1 => self.same(Compare::All, &["measure", "--object", SECRET, "-O", target, "--image-opts", ENCRYPTED]),
            2 => {
                let other = "driver=qcow2,file.filename=b.qcow2";
                self.same(Compare::All, &["compare", "--object", SECRET, "--image-opts", ENCRYPTED, other])
            }
            _ => {
                self.same(
                    Compare::All,
                    &["convert", "--object", SECRET, "--image-opts", "-O", target, ENCRYPTED, "o"],
                )?;
                self.same_contents("o", target)
            }
        }
    }

    fn measure(&mut self, image: &str) -> Result {
        let target = self.random.pick(&["raw", "qcow2"]);
        match self.random.one_in(2) {
            true if self.holes => self.same(Compare::Status, &["measure", "-O", target, image]),
            true => self.same(Compare::All, &["measure", "-O", target, image]),
            false => {
                let size = (self.random.below(5000) * 4096).to_string();
                self.same(Compare::All, &["measure", "--output=json", "-O", target, "--size", &size])
            }
        }
    }

    fn snapshot(&mut self, image: &str) -> Result {
        let any = format!("s{}", self.random.below(self.snapshots + 1));
        match self.random.below(4) {
            0 | 1 => {
                let name = format!("s{}", self.snapshots);
                self.snapshots += 1;
                self.change(image, &["snapshot", "-c", &name, image])
            }
            2 => self.change(image, &["snapshot", "-a", &any, image]),
            _ => self.change(image, &["snapshot", "-d", &any, image]),
        }?;
        self.same(Compare::Placeless, &["snapshot", "-l", image])
    }

    fn resize(&mut self, image: &str) -> Result {
        let by = self.random.below(3 * MIB).to_string();
        match self.random.below(4) {
            0 => self.change(image, &["resize", "--shrink", "-f", "qcow2", image, &format!("-{by}")]),
            1 => self.change(image, &["resize", "-f", "qcow2", image, &format!("-{by}")]),
            2 => {
                let mode = self.random.pick(&["metadata", "falloc", "full", "off"]);
                let preallocation = format!("--preallocation={mode}");
                self.change(image, &["resize", "-f", "qcow2", &preallocation, image, &format!("+{by}")])
            }
            _ => self.change(image, &["resize", "-f", "qcow2", image, &format!("+{by}")]),
        }
    }

    fn rebase(&mut self) -> Result {
        match self.random.below(5) {
            3 => self.change("a.qcow2", &["rebase", "-u", "-b", "base", "-F", self.base_format, "a.qcow2"]),
            0 => self.change("a.qcow2", &["rebase", "-b", "", "a.qcow2"]),
            1 => self.change("a.qcow2", &["rebase", "-c", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2"]),
            _ => self.change("a.qcow2", &["rebase", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2"]),
        }
    }

    fn commit(&mut self) -> Result {
        self.holes |= self.base_format == "raw" || self.fine;
        match self.random.below(3) {
            0 => self.change("a.qcow2", &["commit", "-d", "a.qcow2"]),
            1 => self.change("a.qcow2", &["commit", "-b", "base", "a.qcow2"]),
            _ => self.change("a.qcow2", &["commit", "a.qcow2"]),
        }?;
        self.same_contents("base", self.base_format)
    }

    fn amend(&mut self, image: &str) -> Result {
        let option = self.random.pick(&[
            "compat=0.10",
            "compat=1.1",
            "lazy_refcounts=on",
            "lazy_refcounts=off",
            "refcount_bits=16",
            "refcount_bits=64",
            "refcount_bits=8",
            "size=70M",
        ]);
        if self.zstd && option == "compat=0.10" {
            return Ok(());
        }
        self.change(image, &["amend", "-f", "qcow2", "-o", option, image])
    }

    fn bitmap(&mut self, image: &str) -> Result {
        let any = format!("b{}", self.random.below(self.bitmaps + 1));
        let other = format!("b{}", self.random.below(self.bitmaps + 1));
        match self.random.below(7) {
            0..=2 => {
                let name = format!("b{}", self.bitmaps);
                self.bitmaps += 1;
                let granularity = self.random.pick(&["512", "4096", "64k", "1M"]);
                self.change(image, &["bitmap", "--add", "-g", granularity, image, &name])
            }
            3 => self.change(image, &["bitmap", "--remove", image, &any]),
            4 => self.change(image, &["bitmap", "--clear", image, &any]),
            5 => {
                let action = self.random.pick(&["--enable", "--disable"]);
                self.change(image, &["bitmap", action, image, &any])
            }
            _ => self.change(image, &["bitmap", "--merge", &other, image, &any]),
        }
    }

    fn dd(&mut self, image: &str) -> Result {
        let (input, target) = (format!("if={image}"), self.random.pick(&["raw", "qcow2"]));
        let (count, skip) = (format!("count={}", self.random.below(40)), format!("skip={}", self.random.below(20)));
        self.same(Compare::All, &["dd", "-O", target, "bs=64k", &count, &skip, &input, "of=o"])?;
        self.same_contents("o", target)
    }

    fn convert(&mut self, image: &str) -> Result {
        if self.random.one_in(4) {
            // Into an image that exists, which marks what is zero.
            let size = (self.size + 8 * MIB).to_string();
            self.prepare(&["create", "-q", "-f", "qcow2", "e.qcow2", &size])?;
            self.write("e.qcow2", "qcow2")?;
            self.same(Compare::All, &["convert", "-n", "-O", "qcow2", image, "e.qcow2"])?;
            // Where a run of zeroes ends inside of a cluster with data, qemu-img writes some of them out.
            let compare = if self.small { Compare::Status } else { Compare::Placeless };
            self.same(compare, &["map", "--output=json", "e.qcow2"])?;
            return self.same_contents("e.qcow2", "qcow2");
        }
        let target = self.random.pick(&["raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi", "qed", "qcow", "parallels"]);
        let mut args = vec!["convert", "-O", target];
        let sparse = self.random.pick(&["0", "4k", "64k", "1M"]);
        if self.random.one_in(3) {
            args.extend(["-S", sparse]);
        }
        let snapshot = format!("s{}", self.random.below(self.snapshots + 1));
        if self.random.one_in(4) {
            args.extend(["-l", &snapshot]);
        }
        if target == "qcow2" {
            match self.random.below(6) {
                0 | 1 => args.push("-c"),
                2 => args.extend(["-o", self.random.pick(&["cluster_size=4k", "cluster_size=2M,extended_l2=on"])]),
                3 => args.extend(["-o", self.random.pick(&["preallocation=metadata", "preallocation=full"])]),
                _ => {}
            }
        }
        let alone = self.random.one_in(6) && image == "a.qcow2" && target == "qcow2";
        if alone {
            args.extend(["-B", "base", "-F", self.base_format]);
        }
        args.extend([image, "o"]);
        let _ = fs::remove_file(self.root.join("ours/o"));
        let _ = fs::remove_file(self.root.join("theirs/o"));
        self.same(Compare::All, &args)?;
        if self.failed || !self.root.join("ours/o").exists() {
            return Ok(());
        }
        self.same_contents("o", target)?;
        // Where a new raw file has holes is its file system's affair.
        if target == "raw" || self.holes {
            return Ok(());
        }
        self.same(Compare::Placeless, &["map", "--output=json", "-f", target, "o"])?;
        self.same(Compare::Placeless, &["info", "-f", target, "o"])
    }

    /// A new image of any format; both programs must take the same options and make the same disk.
    fn create(&mut self) -> Result {
        let format = self.random.pick(FORMATS);
        let size = (self.random.below(40) * MIB + self.random.below(3) * 4096).to_string();
        let options = match format {
            "vmdk" => {
                self.random.pick(&["", "subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse", "compat6=on"])
            }
            "vpc" => self.random.pick(&["", "subformat=fixed", "force_size=on"]),
            "vhdx" => self.random.pick(&["", "subformat=fixed", "block_size=1M", "block_size=3"]),
            "vdi" => self.random.pick(&["", "static=on"]),
            "qed" => self.random.pick(&["", "cluster_size=4k", "table_size=2", "cluster_size=5"]),
            "raw" => self.random.pick(&["", "preallocation=full", "preallocation=metadata"]),
            _ => "",
        };
        let mut args = vec!["create", "-f", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend(["n", &size]);
        self.same(Compare::All, &args)?;
        // Over a file that was there, both leave an empty one. qemu-img can't open the empty VHD that it makes.
        let unopenable = format == "vpc" && size == "0";
        if self.failed || unopenable { Ok(()) } else { self.same_contents("n", format) }
    }

    /// An image of another format, made of one of the two; and what is asked of it or done to it.
    fn other_format(&mut self) -> Result {
        let format = self.random.pick(FORMATS);
        let source = self.random.pick(&["a.qcow2", "b.qcow2"]);
        self.same(Compare::All, &["convert", "-O", format, source, "x"])?;
        if !self.root.join("theirs/x").exists() || !self.root.join("ours/x").exists() {
            return Ok(());
        }
        if self.random.one_in(2) && self.length("x", format)? > 512 {
            // Both go on with the image that qemu-img made: where its data lie is told by `map`.
            fs::copy(self.root.join("theirs/x"), self.root.join("ours/x"))?;
            self.write("x", format)?;
        }
        if format == "qed" && self.random.one_in(2) {
            let (name, kind) = self.random.pick(&[&("base", ""), &("b.qcow2", "qcow2"), &("", "")]);
            let kind = if kind.is_empty() { self.base_format } else { kind };
            let format = if name.is_empty() { &[][..] } else { &["-F", kind] };
            self.same(Compare::All, &[&["rebase", "-f", "qed", "-b", name], format, &["x"]].concat())?;
            self.same_contents("x", "qed")?;
        }
        for _ in 0..3 {
            match self.random.below(9) {
                0 => self.same(Compare::Placeless, &["check", "-f", format, "x"])?,
                1 => self.same(Compare::Placeless, &["check", "--output=json", "-f", format, "x"])?,
                // Where a new raw file has holes is its file system's affair.
                2 | 5 if format == "raw" => {}
                2 => self.same(Compare::Placeless, &["map", "--output=json", "-f", format, "x"])?,
                3 => self.same(Compare::All, &["compare", "-f", format, "x", source])?,
                4 => self.same(Compare::Placeless, &["info", "-f", format, "x"])?,
                5 => self.same(Compare::All, &["measure", "-f", format, "-O", "qcow2", "x"])?,
                6 => {
                    let by = format!("{}{}", self.random.pick(&["+", "-", ""]), self.random.below(9) * 512 * 1024);
                    let shrink = self.random.pick(&["--shrink", "-q"]);
                    self.same(Compare::All, &["resize", shrink, "-f", format, "x", &by])?;
                    self.same_contents("x", format)?;
                }
                7 => {
                    let target = self.random.pick(FORMATS);
                    self.same(Compare::All, &["convert", "-f", format, "-O", target, "x", "y"])?;
                    self.same_contents("y", target)?;
                }
                _ => {
                    let (skip, bs) = (format!("skip={}", self.random.below(9)), self.random.pick(&["bs=4k", "bs=1M"]));
                    self.same(Compare::All, &["dd", "-f", format, "-O", "raw", bs, &skip, "if=x", "of=y"])?;
                    self.same_contents("y", "raw")?;
                }
            }
        }
        Ok(())
    }

    /// A command that changes an image: outputs, contents and health must agree.
    fn change(&mut self, image: &str, args: &[&str]) -> Result {
        // A repair tells where the last cluster lies.
        let compare = if args.first() == Some(&"check") { Compare::Placeless } else { Compare::All };
        self.same(compare, args)?;
        self.same_contents(image, "qcow2")?;
        for file in ["a.qcow2", "b.qcow2"] {
            let healthy = |copy: &str| -> Result<Option<i32>> {
                let mut check = Command::new("qemu-img");
                check.current_dir(self.root.join(copy)).args(["check", "-q", file]);
                Ok(check.stdout(Stdio::null()).stderr(Stdio::null()).status()?.code())
            };
            let (ours, theirs) = (healthy("ours")?, healthy("theirs")?);
            if ours == Some(0) && theirs != ours {
                let what = format!("qemu-img left {file} damaged ({theirs:?}) at {args:?}, instar did not");
                return Err(Incomparable(what).into());
            }
            if ours != theirs {
                return Err(format!("qemu-img check of {file}: {ours:?}, and of qemu-img's own: {theirs:?}").into());
            }
        }
        Ok(())
    }

    /// The contents of both copies, as qemu-img reads them.
    fn same_contents(&mut self, image: &str, format: &str) -> Result {
        let (ours, theirs) = (self.root.join("ours").join(image), self.root.join("theirs").join(image));
        // qemu-img leaves an empty file behind where a creation fails.
        if !ours.exists() && (self.failed || !theirs.exists()) {
            return Ok(());
        }
        let mut compare = Command::new("qemu-img");
        compare.current_dir(&self.root).args(["compare", "-f", format, "-F", format]).arg(ours).arg(theirs);
        let output = compare.output()?;
        match output.status.success() {
            true => Ok(()),
            false => Err(format!(
                "{image} differs: {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )
            .into()),
        }
    }

    /// A command on both sides: what it says must agree.
    fn same(&mut self, compare: Compare, args: &[&str]) -> Result {
        self.log.push(format!("qemu-img {}", args.join(" ")));
        let run = |program: &Path, copy: &str| Program::new(program).run(&self.root.join(copy), args);
        let ours = run(&self.ours, "ours")?;
        if String::from_utf8_lossy(&ours.stderr).contains("not provided by this version") {
            self.log.push("(left out)".to_owned());
            return Ok(());
        }
        if ours.hung || ours.left || ours.code.is_none() {
            return Err(format!("instar does not end, or not by itself: {ours:?}").into());
        }
        let theirs = run(Path::new("qemu-img"), "theirs")?;
        if theirs.code.is_none() {
            let what = if theirs.hung { "does not end" } else { "crashed" };
            let words = String::from_utf8_lossy(&theirs.stderr).trim_end().to_owned();
            return Err(Incomparable(format!("qemu-img {what} at {args:?}: {words}")).into());
        }
        // Of an image with a bitmap and a snapshot, qemu-img's repair loses the snapshot.
        let repaired = |output: &Ended| String::from_utf8_lossy(&output.stdout).contains("were found and repaired");
        if args.first() == Some(&"check") && ours.code == Some(0) && !repaired(&ours) && repaired(&theirs) {
            return Err(Incomparable(format!("qemu-img repairs what instar finds in order: {args:?}")).into());
        }
        let text = |bytes: &[u8]| normalised(&String::from_utf8_lossy(bytes), compare);
        let called = self.ours.display().to_string();
        let said = |output: &Ended| (text(&output.stdout), text(&output.stderr).replace(&called, "qemu-img"));
        let same = ours.code == theirs.code && (compare == Compare::Status || said(&ours) == said(&theirs));
        if same {
            self.failed = theirs.code != Some(0);
            return Ok(());
        }
        let shown = |output: &Ended| format!("{:?}\n{}\n{}", output.code, said(output).0, said(output).1);
        Err(format!("differs\n--- ours\n{}\n--- qemu-img's\n{}", shown(&ours), shown(&theirs)).into())
    }
}

/// Leaves out what may differ: moments, random numbers and, if asked for, places in host files.
fn normalised(text: &str, compare: Compare) -> String {
    let placeless = compare == Compare::Placeless;
    let places = ["disk size:", "file length:", "\"actual-size\"", "Image end offset:", "\"image-end-offset\""];
    let lines = text.lines().filter(|line| !placeless || !places.iter().any(|place| line.trim().starts_with(place)));
    let lines = lines.map(|line| {
        let line = without_node_number(&without_date(line));
        match line.find(", \"offset\": ") {
            Some(at) if placeless => format!("{}{}", &line[..at], line.find('}').map_or("", |end| &line[end..])),
            _ => line,
        }
    });
    // The size of the file below an image is listed like the size of a disk.
    let mut out: Vec<String> = Vec::new();
    for line in lines {
        let size_of_file =
            placeless && line.trim().starts_with("\"virtual-size\"") && line.starts_with("                ");
        let fragmentation = placeless && line.contains("fragmented");
        // Identifiers are random.
        let moment = placeless
            && ["\"date-", "vm-clock", "cid: ", "\"cid\"", "parent cid: "].iter().any(|word| line.contains(word));
        if size_of_file || fragmentation || moment {
            continue;
        }
        // What was left out may have been the last member.
        if placeless && line.trim_start().starts_with('}') && out.last().is_some_and(|last| last.ends_with(',')) {
            out.last_mut().map(String::pop);
        }
        match out.last_mut().filter(|_| placeless).and_then(|last| joined(last, &line)) {
            Some(both) => *out.last_mut().expect("it was there") = both,
            None => out.push(line),
        }
    }
    out.join("\n")
}

/// Two lines of `map`, from which the places were taken, as one: they are two only because of where they lie.
fn joined(first: &str, second: &str) -> Option<String> {
    let (start, len, what) = map_line(first)?;
    let (next, more, same) = map_line(second)?;
    let whole = what == same && start + len == next;
    let bracket = if first.starts_with('[') { "[" } else { "" };
    whole.then(|| {
        let end = &second[second.rfind('}').map_or(second.len(), |at| at + 1)..];
        format!("{bracket}{{ \"start\": {start}, \"length\": {}, {what}}}{end}", len + more)
    })
}

/// Start, length and the rest of a line of `map --output=json`.
fn map_line(line: &str) -> Option<(u64, u64, &str)> {
    let rest = line.trim_start_matches('[').strip_prefix("{ \"start\": ")?;
    let (start, rest) = rest.split_once(", \"length\": ")?;
    let (len, rest) = rest.split_once(", ")?;
    Some((start.parse().ok()?, len.parse().ok()?, rest.split_once('}')?.0))
}

/// `#block118` becomes `#block`: the number is QEMU's own.
fn without_node_number(line: &str) -> String {
    match line.split_once("#block") {
        Some((before, after)) => format!("{before}#block{}", after.trim_start_matches(|c: char| c.is_ascii_digit())),
        None => line.to_owned(),
    }
}

/// `2026-11-23 05:06:07` becomes `DATE`.
fn without_date(line: &str) -> String {
    let bytes = line.as_bytes();
    let pattern = b"dddd-dd-dd dd:dd:dd";
    let matches = |at: usize| {
        pattern.iter().zip(&bytes[at..]).all(|(want, found)| match want {
            b'd' => found.is_ascii_digit(),
            other => other == found,
        })
    };
    match (0..bytes.len().saturating_sub(pattern.len() - 1)).find(|at| matches(*at)) {
        Some(at) => format!("{}DATE{}", &line[..at], &line[at + pattern.len()..]),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_make_no_difference() {
        let scattered = "[{ \"start\": 0, \"length\": 512, \"data\": true, \"offset\": 7},\n\
                         { \"start\": 512, \"length\": 512, \"data\": true, \"offset\": 9},\n\
                         { \"start\": 1024, \"length\": 1, \"data\": false}]";
        let whole =
            "[{ \"start\": 0, \"length\": 1024, \"data\": true},\n{ \"start\": 1024, \"length\": 1, \"data\": false}]";
        assert_eq!(normalised(scattered, Compare::Placeless), whole);
        assert_eq!(normalised(whole, Compare::Placeless), whole);
        assert_eq!(normalised(scattered, Compare::All), scattered);
        let gap = scattered.replace("\"start\": 512", "\"start\": 600");
        assert_eq!(normalised(&gap, Compare::Placeless).lines().count(), 3);
    }
}
