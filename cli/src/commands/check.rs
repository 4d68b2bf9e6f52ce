//! `check`.

use std::io::Write;

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{
    CheckFinding, CheckNumbers, CheckReply, CheckRequest, FindingKind, Source, Step, reply,
};

use super::{CommandLine, Settings, is_cache_mode};
use crate::args::{Key, Opt};
use crate::config::Output;
use crate::edit::warn_of_raw;
use crate::formats;
use crate::image_opts::ImageSpec;
use crate::messages;
use crate::output::json;
use crate::output::node::Node;
use crate::program::{Fail, Outcome, Program, print};
use crate::query::{Listener, Query, Unanswered};
use crate::sandbox::Work;

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::value(Key::SourceCache, b'T', "cache"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
    Opt::long_value(Key::Output, "output"),
    Opt::value(Key::Repair, b'r', "repair"),
    Opt::long_value(Key::Object, "object"),
];

/// Exit statuses beside 0 and 1.
const CORRUPT: u8 = 2;
const LEAKING: u8 = 3;
const NOT_CHECKED: u8 = 63;

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    cache: Option<String>,
    quiet: bool,
    force_share: bool,
    output: Option<Output>,
    leaks: bool,
    corruptions: bool,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        match key {
            Key::Quiet => self.quiet = true,
            Key::Format => self.format = Some(value),
            Key::ImageOpts => self.image_opts = true,
            Key::SourceCache => self.cache = Some(value),
            Key::ForceShare => self.force_share = true,
            Key::Output => self.output = Some(Output::parse(&value)?),
            Key::Repair => match value.as_str() {
                "leaks" => self.leaks = true,
                "all" => (self.leaks, self.corruptions) = (true, true),
                _ => {
                    let text = format!("--repair (-r) expects 'leaks' or 'all' not '{value}'");
                    return Err(Fail::Usage(text));
                }
            },
            _ => {}
        }
        Ok(())
    }
}

/// Runs the command.
///
/// # Errors
/// What the user is told, with the exit status.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let help = include_str!("help/check.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    let [file] = operands.as_slice() else { return Err(Fail::Usage("Expecting one image file name".to_owned())) };
    if let Some(mode) = arguments.cache.as_deref().filter(|mode| !is_cache_mode(mode)) {
        return Err(format!("Invalid source cache option: {mode}").into());
    }
    let image = ImageSpec::of_operand(file, arguments.image_opts, arguments.format.as_deref())?;
    let reply = check(&settings, &arguments, &image)?;
    if arguments.leaks || arguments.corruptions {
        warn_of_raw(&image, reply.format());
    }
    if !reply.supported {
        return Err(Fail::from("This image format does not support checks").with_status(NOT_CHECKED));
    }
    if reply.refused {
        return Err("Check failed: Input/output error".into());
    }
    if !arguments.quiet {
        print(&match arguments.output.unwrap_or(settings.output) {
            Output::Human => human(&reply),
            Output::Json => json::print(&node(&image.given, &reply)),
        })?;
    }
    match reply.numbers.unwrap_or_default() {
        CheckNumbers { check_errors: 1.., .. } => Err(Fail::Said),
        CheckNumbers { corruptions: 1.., .. } => Err(Fail::Said.with_status(CORRUPT)),
        CheckNumbers { leaks: 1.., .. } => Err(Fail::Said.with_status(LEAKING)),
        _ => Ok(()),
    }
}

fn check(settings: &Settings, arguments: &Arguments, image: &ImageSpec) -> Result<CheckReply, Fail> {
    let (leaks, corruptions) = (arguments.leaks, arguments.corruptions);
    let query = Query {
        settings,
        images: &[image],
        force_share: arguments.force_share,
        writable: leaks || corruptions,
        work: Work::Metadata,
    };
    let request = |sources: &[Source]| Operation::Check(CheckRequest { image: sources[0].clone(), leaks, corruptions });
    match query.ask(request, &mut Told) {
        Ok(reply::Result::Check(reply)) => Ok(reply),
        Ok(_) => Err("The sandboxed parser sent something that makes no sense".into()),
        Err(Unanswered::Failed(failure)) if failure.step() == Step::Map => {
            Err(format!("Check failed: {}", messages::io_reason(&failure)).into())
        }
        Err(Unanswered::Failed(failure)) => Err(messages::work_failure(&failure).into()),
        Err(Unanswered::Unopened(problem) | Unanswered::Lost(problem)) => Err(problem.into()),
    }
}

/// Tells findings as they come.
struct Told;

impl Listener for Told {
    fn findings(&mut self, findings: &[CheckFinding]) {
        tell(findings);
    }
}

/// Prints findings on standard error.
pub fn tell(findings: &[CheckFinding]) {
    let text: String = findings.iter().map(finding).collect();
    // Nothing can be done about a standard error that is closed.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// A finding in qemu-img's words.
fn finding(found: &CheckFinding) -> String {
    let &CheckFinding { repaired, first, second, third, .. } = found;
    let verb = if repaired { "Repairing" } else { "ERROR" };
    let text = match found.kind() {
        FindingKind::Other => format!("{verb} the image contradicts itself (at {first:#x})"),
        FindingKind::BehindEnd => format!(
            "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset {first:#x} size \
             {second:#x}"
        ),
        FindingKind::CountOverflow => format!(
            "ERROR: overflow cluster offset={first:#x}\nUse qemu-img amend to increase the refcount entry width or qemu-img \
             convert to create a clean copy if the image cannot be opened for writing"
        ),
        FindingKind::L1Reserved => format!("ERROR found L1 entry with reserved bits set: {first:x}"),
        FindingKind::L2Unaligned => {
            format!("ERROR l2_offset={first:x}: Table is not cluster aligned; L1 entry corrupted")
        }
        FindingKind::L2Reserved => format!("ERROR found l2 entry with reserved bits set: {first:x}"),
        FindingKind::CompressedCopied => {
            format!("ERROR: coffset={first:#x}: copied flag must never be set for compressed clusters")
        }
        FindingKind::CompressedInDataFile => {
            format!("ERROR compressed cluster {first} with data file, entry={second:#x}")
        }
        FindingKind::CompressedSubclusters => {
            format!("ERROR compressed cluster {first} with non-zero subcluster allocation bitmap, entry={second:#x}")
        }
        FindingKind::ClusterUnaligned if second != 0 => {
            format!("ERROR offset={first:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.")
        }
        FindingKind::ClusterUnaligned => {
            format!("ERROR offset={first:x}: Cluster is not properly aligned; L2 entry corrupted.")
        }
        FindingKind::RefcountTableReserved => format!("ERROR refcount table entry {first} has reserved bits set"),
        FindingKind::BlockUnaligned => {
            format!("ERROR refcount block {first} is not cluster aligned; refcount table entry corrupted")
        }
        FindingKind::BlockOutside => format!("ERROR refcount block {first} is outside image"),
        FindingKind::BlockShared => format!("ERROR refcount block {first} refcount={second}"),
        FindingKind::Count => {
            let verb = if !repaired && second > third { "Leaked" } else { verb };
            format!("{verb} cluster {first} refcount={second} reference={third}")
        }
        FindingKind::CopiedTable => {
            format!("{verb} OFLAG_COPIED L2 cluster: l1_index={first} l1_entry={second:x} refcount={third}")
        }
        FindingKind::CopiedCluster => format!("{verb} OFLAG_COPIED data cluster: l2_entry={first:x} refcount={second}"),
        FindingKind::Rebuilding => "Rebuilding refcount structure".to_owned(),
        FindingKind::RebuildNeeded => "ERROR need to rebuild refcount structures".to_owned(),
        FindingKind::NotClosed => format!("{verb} image was not closed correctly"),
        FindingKind::DataOffset => format!("{verb} data_off field has incorrect value"),
        FindingKind::OutsideImage => format!("{verb} cluster {first} is outside image"),
        FindingKind::LeakedAtEnd => format!("{verb} space leaked at the end of the image {first}"),
        FindingKind::DuplicateEntry => format!("{verb} duplicate offset in BAT entry {first}"),
        FindingKind::BlockUsedTwice => format!("ERROR: block index {first} also used by {second}"),
        FindingKind::BlockTooLarge => format!("ERROR: block index {first} too large, is {second}"),
        FindingKind::AllocatedBlocks => format!("ERROR: allocated blocks mismatch, is {first}, should be {second}"),
        FindingKind::GrainBehindEnd => format!("ERROR: cluster offset for sector {first} points after EOF"),
        FindingKind::CopyDamaged if first == 0 => "ERROR the footer at the beginning of the file is damaged".to_owned(),
        FindingKind::CopyDamaged => "ERROR the footer at the end of the file is damaged or missing".to_owned(),
        FindingKind::CopiesDiffer => "ERROR the footers at the two ends of the file differ".to_owned(),
        FindingKind::HeaderChecksum => "ERROR the dynamic header has a wrong checksum".to_owned(),
        FindingKind::DataOutside => {
            format!("ERROR block {first} at offset {second:#x} ends behind the end of the file")
        }
        FindingKind::DataOverTables => {
            format!("ERROR block {first} at offset {second:#x} lies over the image's tables")
        }
        FindingKind::DataShared => format!("ERROR blocks {first} and {second} overlap at offset {third:#x}"),
    };
    text + "\n"
}

fn human(reply: &CheckReply) -> String {
    let numbers = reply.numbers.clone().unwrap_or_default();
    let mut text = String::new();
    if let Some(repaired) = &reply.repaired {
        text.push_str(&format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             Double checking the fixed image now...\n",
            repaired.leaks_fixed, repaired.corruptions_fixed
        ));
    }
    text.push_str(&verdict(&numbers));
    let CheckNumbers { total_clusters: total, allocated_clusters: allocated, .. } = numbers;
    if total > 0 && allocated > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        text.push_str(&format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            percent(allocated, total),
            percent(numbers.fragmented_clusters, allocated),
            percent(numbers.compressed_clusters, allocated)
        ));
    }
    if let Some(end) = numbers.image_end.filter(|end| *end > 0) {
        text.push_str(&format!("Image end offset: {end}\n"));
    }
    text
}

/// What the numbers mean.
fn verdict(numbers: &CheckNumbers) -> String {
    let mut text = String::new();
    if numbers.corruptions > 0 {
        text.push_str(&format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            numbers.corruptions
        ));
    }
    if numbers.leaks > 0 {
        text.push_str(&format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            numbers.leaks
        ));
    }
    if numbers.check_errors > 0 {
        text.push_str(&format!("\n{} internal errors have occurred during the check.\n", numbers.check_errors));
    }
    if text.is_empty() { "No errors were found on the image.\n".to_owned() } else { text }
}

fn node(file: &str, reply: &CheckReply) -> Node {
    let numbers = reply.numbers.clone().unwrap_or_default();
    let fixed = reply.repaired.clone().unwrap_or_default();
    // What is zero is left out, but for the errors of the check.
    let some = |key, number: u64| (number > 0).then_some((key, Node::Int(number)));
    let members = [
        some("image-end-offset", numbers.image_end.unwrap_or(0)),
        some("compressed-clusters", numbers.compressed_clusters),
        some("total-clusters", numbers.total_clusters),
        some("corruptions", numbers.corruptions),
        some("corruptions-fixed", fixed.corruptions_fixed),
        Some(("check-errors", Node::Int(numbers.check_errors))),
        some("leaks", numbers.leaks),
        some("leaks-fixed", fixed.leaks_fixed),
        some("allocated-clusters", numbers.allocated_clusters),
        Some(("filename", Node::text(file))),
        Some(("format", Node::text(formats::name(reply.format())))),
        some("fragmented-clusters", numbers.fragmented_clusters),
    ];
    Node::Dict(members.into_iter().flatten().collect())
}
