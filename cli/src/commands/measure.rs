//! `measure`.

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{
    Bitmap, Format, MeasureReply, MeasureRequest, Preallocation, SnapshotSelector, Step, Target, reply,
};

use super::convert::snapshot_selector;
use super::{CommandLine, Objects, Settings};
use crate::args::{Key, Opt};
use crate::config::Output;
use crate::creation::{self, Creatable, creatable};
use crate::image_opts::ImageSpec;
use crate::messages;
use crate::options::{self, OptionList, Options};
use crate::output::json;
use crate::output::node::Node;
use crate::problem::Problem;
use crate::program::{Fail, Outcome, Program, print};
use crate::query::{Query, Silence, Unanswered};
use crate::sandbox::Work;
use crate::size;

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::value(Key::TargetFormat, b'O', "target-format"),
    Opt::value(Key::Options, b'o', "options"),
    Opt::value(Key::Size, b's', "size"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::value(Key::Snapshot, b'l', "snapshot"),
    Opt::long_value(Key::Output, "output"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
    Opt::long_value(Key::Object, "object"),
];

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    target_format: Option<String>,
    options: OptionList,
    size: Option<u64>,
    snapshot: Option<SnapshotSelector>,
    output: Option<Output>,
    force_share: bool,
}

impl Arguments {
    fn take(&mut self, program: &Program, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Format => self.format = Some(value),
            Key::ImageOpts => self.image_opts = true,
            Key::TargetFormat => self.target_format = Some(value),
            Key::Options => self.options.add(&value)?,
            Key::Size => self.size = Some(size::parse_image_size(&value)?),
            Key::Snapshot => self.snapshot = Some(snapshot_selector(program, &value)?),
            Key::Output => self.output = Some(Output::parse(&value)?),
            Key::ForceShare => self.force_share = true,
            _ => {}
        }
        Ok(())
    }
}

/// How large the file will be, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Measure {
    required: u64,
    fully_allocated: u64,
    bitmaps: Option<u64>,
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let help = include_str!("help/measure.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(program, key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    if operands.is_empty() && (arguments.image_opts || arguments.format.is_some() || arguments.snapshot.is_some()) {
        return Err("--image-opts, -f, and -l require a filename argument.".into());
    }
    let image = match (operands.as_slice(), arguments.size) {
        ([], Some(_)) => None,
        ([image], None) => Some(image),
        ([_], Some(_)) => return Err("--size N cannot be used together with a filename.".into()),
        ([], None) => return Err("Either --size N or one filename must be specified.".into()),
        _ => return Err("At most one filename argument is allowed.".into()),
    };
    let image = match image {
        Some(name) => Some(ImageSpec::of_operand(name, arguments.image_opts, arguments.format.as_deref())?),
        None => None,
    };
    let wanted = wanted(&settings, &arguments);
    // qemu-img opens the image first.
    if let (Some(image), Err(_) | Ok(Wanted::Help(_))) = (&image, &wanted) {
        ask(&settings, &arguments, image, &Layout::raw())?;
    }
    let layout = match wanted {
        Ok(Wanted::Layout(layout)) => layout,
        Ok(Wanted::Help(text)) => return print(&text),
        Err((detail, fail)) => {
            if let Some(detail) = detail {
                program.report(&detail.into(), None);
            }
            return Err(fail);
        }
    };
    let found = match &image {
        Some(image) => ask(&settings, &arguments, image, &layout)?,
        None => MeasureReply { virtual_size: arguments.size.unwrap_or_default(), ..MeasureReply::default() },
    };
    let measure = layout.measure(&found, image.is_some())?;
    print(&match arguments.output.unwrap_or(settings.output) {
        Output::Human => human(measure),
        Output::Json => json::print(&node(measure)),
    })
}

/// What is asked for.
enum Wanted {
    Help(String),
    Layout(Layout),
}

/// # Errors
/// What is wrong with the options, perhaps with a line before it.
fn wanted(settings: &Settings, arguments: &Arguments) -> Result<Wanted, (Option<Problem>, Fail)> {
    let target = creatable(arguments.target_format.as_deref().unwrap_or("raw"));
    let target = target.map_err(|problem| (None, problem.into()))?;
    if arguments.options.wants_help() {
        return Ok(Wanted::Help(options::help(target, true)));
    }
    let options = Options::parse(target, &arguments.options).map_err(|problem| {
        let text = format!("Invalid options for file format '{}'", target.name());
        (Some(problem), Fail::from(text))
    })?;
    let layout = Layout::of(target, &options, &settings.objects).map_err(|fail| (None, fail))?;
    Ok(Wanted::Layout(layout))
}

fn ask(settings: &Settings, arguments: &Arguments, image: &ImageSpec, layout: &Layout) -> Result<MeasureReply, Fail> {
    let images = &[image];
    let query = Query { settings, images, force_share: arguments.force_share, writable: false, work: Work::Metadata };
    let answer = query.ask(
        |sources| {
            let mut image = sources[0].clone();
            image.snapshot = arguments.snapshot.clone();
            Operation::Measure(MeasureRequest { image, cluster_size: layout.cluster_size })
        },
        &mut Silence,
    );
    match answer {
        Ok(reply::Result::Measure(reply)) => Ok(reply),
        Ok(_) => Err("The sandboxed parser sent something that makes no sense".into()),
        Err(Unanswered::Failed(failure)) if failure.step() == Step::Map => {
            Err(format!("Unable to get block status: {}", messages::io_reason(&failure)).into())
        }
        Err(Unanswered::Failed(failure)) => Err(messages::work_failure(&failure).into()),
        Err(Unanswered::Unopened(problem) | Unanswered::Lost(problem)) => Err(problem.into()),
    }
}

/// What the size of the target depends on.
struct Layout {
    qcow2: bool,
    cluster_size: u64,
    /// Bits of a reference count.
    refcount_bits: u64,
    /// Bytes of an L2 entry.
    entry: u64,
    version: u32,
    preallocated: bool,
    backing: bool,
    /// Where the contents of a LUKS volume begin, or bytes of the LUKS header of a qcow2 image.
    luks_payload: u64,
}

impl Layout {
    /// A disk in one piece.
    fn raw() -> Self {
        Self {
            qcow2: false,
            cluster_size: 65536,
            refcount_bits: 16,
            entry: 8,
            version: 3,
            preallocated: false,
            backing: false,
            luks_payload: 0,
        }
    }

    fn of(target: Creatable, options: &Options, objects: &Objects) -> Result<Self, Fail> {
        if target.format == Format::Luks {
            let payload = creation::luks::payload_offset(options, "", objects)?;
            return Ok(Self { luks_payload: payload, ..Self::raw() });
        }
        let unsupported = || format!("Block driver '{}' does not support size measurement", target.name());
        let wire = match target.format {
            Format::Raw => Target::default(),
            Format::Qcow2 => {
                let layout = (target.layout)(options, objects);
                match layout.late.or(layout.early) {
                    Some(problem) => return Err(problem.into()),
                    None => layout.wire,
                }
            }
            _ => return Err(unsupported().into()),
        };
        let preallocated = matches!(wire.preallocation(), Preallocation::Falloc | Preallocation::Full);
        let qcow2 = wire.qcow2.unwrap_or_default();
        let layout = Self {
            qcow2: target.format == Format::Qcow2,
            cluster_size: qcow2.cluster_size.unwrap_or(65536),
            refcount_bits: qcow2.refcount_bits.unwrap_or(16).into(),
            entry: if qcow2.extended_l2 { 16 } else { 8 },
            version: qcow2.version.unwrap_or(3),
            preallocated,
            backing: options.text("backing_file").is_some(),
            luks_payload: match options.text("encrypt.format") {
                Some("luks") => creation::luks::payload_offset(options, "encrypt.", objects)?,
                _ => 0,
            },
        };
        layout.check()
    }

    /// The rules of which qemu-img knows here.
    fn check(self) -> Result<Self, Fail> {
        let cluster = self.cluster_size;
        if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
            return Err("Cluster size must be a power of two between 512 and 2048k".into());
        }
        if self.entry == 16 && cluster < 16384 {
            return Err("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes".into());
        }
        if self.entry == 16 && self.version < 3 {
            let text = "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)";
            return Err(text.into());
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err("Refcount width must be a power of two and may not exceed 64 bits".into());
        }
        if self.version < 3 && self.refcount_bits != 16 {
            let text = "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)";
            return Err(text.into());
        }
        Ok(self)
    }

    fn measure(&self, found: &MeasureReply, from_image: bool) -> Result<Measure, Fail> {
        let too_large = || Fail::from("The image size is too large (try using a larger cluster size)");
        if !self.qcow2 {
            // A size that is only given is taken as it is.
            let whole = from_image || self.luks_payload == 0;
            let size = found.virtual_size.checked_next_multiple_of(if whole { 512 } else { 1 });
            let size = size.and_then(|size| size.checked_add(self.luks_payload)).ok_or_else(too_large)?;
            return Ok(Measure { required: size, fully_allocated: size, bitmaps: None });
        }
        let disk = found.virtual_size.checked_next_multiple_of(self.cluster_size).ok_or_else(too_large)?;
        let data = match from_image {
            _ if self.preallocated => disk,
            true if self.backing => disk,
            true => found.required.min(disk),
            false => 0,
        };
        let header = self.luks_payload.next_multiple_of(self.cluster_size);
        let metadata = self
            .metadata(disk)
            .and_then(|sizes| sizes.checked_add(header))
            .filter(|sizes| *sizes <= i64::MAX as u64)
            .ok_or_else(too_large)?;
        let bitmaps = (from_image && found.has_bitmaps && self.version >= 3).then(|| self.bitmaps(found));
        Ok(Measure { required: metadata + data, fully_allocated: metadata.saturating_add(disk), bitmaps })
    }

    /// Bytes of header, tables and reference counts of a disk whose clusters are all there.
    fn metadata(&self, disk: u64) -> Option<u64> {
        let cluster = self.cluster_size;
        let entries = (disk / cluster).checked_next_multiple_of(cluster / self.entry)?;
        let l2 = entries.checked_mul(self.entry)?;
        let l1 = (l2 / cluster).checked_next_multiple_of(cluster / 8)?.checked_mul(8)?;
        let tables = cluster.checked_add(l2)?.checked_add(l1)?;
        let counted = tables.checked_add(disk)? / cluster;
        tables.checked_add(self.refcounts(counted)?)
    }

    /// Bytes of the reference counts of so many clusters, which count themselves too.
    fn refcounts(&self, clusters: u64) -> Option<u64> {
        let per_block = self.cluster_size * 8 / self.refcount_bits;
        let (mut blocks, mut tables) = (0u64, 0u64);
        loop {
            let wanted = clusters.checked_add(tables)?.checked_add(blocks)?.div_ceil(per_block);
            let needed = wanted.div_ceil(self.cluster_size / 8);
            if (wanted, needed) == (blocks, tables) {
                return blocks.checked_add(tables)?.checked_mul(self.cluster_size);
            }
            (blocks, tables) = (wanted, needed);
        }
    }

    /// Bytes of the bitmaps, all of each allocated, and of their directory.
    fn bitmaps(&self, found: &MeasureReply) -> u64 {
        let cluster = self.cluster_size;
        let mut directory = 0u64;
        let mut total = 0u64;
        let whole = |bytes: u64| bytes.next_multiple_of(cluster);
        for Bitmap { name, granularity, .. } in found.bitmaps.iter().filter(|bitmap| !bitmap.in_use) {
            let bytes = found.virtual_size.div_ceil((*granularity).max(512)).div_ceil(8);
            let clusters = bytes.div_ceil(cluster);
            total += clusters * cluster + whole(clusters * 8);
            directory += (24 + name.len() as u64).next_multiple_of(8);
        }
        total + whole(directory)
    }
}

fn human(measure: Measure) -> String {
    let mut text = format!("required size: {}\nfully allocated size: {}\n", measure.required, measure.fully_allocated);
    if let Some(bitmaps) = measure.bitmaps {
        text.push_str(&format!("bitmaps size: {bitmaps}\n"));
    }
    text
}

fn node(measure: Measure) -> Node {
    let mut members = Vec::new();
    if let Some(bitmaps) = measure.bitmaps {
        members.push(("bitmaps", Node::Int(bitmaps)));
    }
    members.push(("required", Node::Int(measure.required)));
    members.push(("fully-allocated", Node::Int(measure.fully_allocated)));
    Node::Dict(members)
}
