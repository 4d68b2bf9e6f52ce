//! `check`: are the tables of an image sound? And their repair.

use alloc::vec::Vec;

use instar_blockio::FileId;
use instar_blockio::check::{CheckReport, Clusters, Repair};
use instar_guest_protocol::message::{
    BackingChoice, Call, Cause, CheckFinding, CheckFindings, CheckNumbers, CheckReply, CheckRequest, Failure, Field,
    FindingKind, Format, Step, call,
};
use instar_legacy::{parallels, qed, vdi};
use instar_qcow2 as qcow2;
use instar_vhd as vhd;
use instar_vhdx as vhdx;

use crate::chain::{Opening, open_below};
use crate::formats::target::TargetDisk;
use crate::formats::{OpenImage, finding_info, open_named, qcow2_failure};
use crate::ops::failure::about;
use crate::platform::{File, Platform};

/// `errno` where the format tells none.
const EIO: i32 = 5;
/// Findings of one message, and in all: who has more knows enough.
const FINDINGS: usize = 512;
const MOST: usize = 200_000;

/// Checks the image, and repairs it if asked to; then it is checked once more.
///
/// # Errors
/// An image that can't be opened ([`Step::Open`]), tables that can't be read or written ([`Step::Map`]).
pub fn run<P: Platform>(platform: &P, request: &CheckRequest) -> Result<CheckReply, Failure> {
    let source = &request.image;
    let id = FileId(source.device);
    let mut image = match open_named(platform, source) {
        // What is not there is told by the check.
        Err(failure) if source.strict && is_vhd_cut_off(&failure) => None,
        opened => Some(opened?),
    };
    let format = image.as_ref().map_or(Format::Vpc, |image| image.format());
    if let Some(image) = &mut image
        && format == Format::Luks
    {
        // It can't be checked; without the key it can't even be opened.
        image.open_parts(platform)?;
    }
    if let Some(image) = &image
        && source.below.iter().any(|below| below.choice() == BackingChoice::Named)
    {
        // What the user names must be there.
        open_below(platform, source.device, &**image, &Opening::of(source, true))?;
    }
    let repair = Repair { leaks: request.leaks, corruptions: request.corruptions };
    let mut listener = Listener { platform, pending: Vec::new(), told: 0 };
    let reply = CheckReply { format: format.into(), supported: true, ..CheckReply::default() };
    let check = Check { platform, id, strict: source.strict };
    let Some(first) = check.image(image.as_deref(), repair, &mut listener) else {
        return Ok(CheckReply { supported: false, ..reply });
    };
    let first = first?;
    listener.send();
    let Some(first) = first else { return Ok(CheckReply { refused: true, ..reply }) };
    if first.corruptions_fixed == 0 && first.leaks_fixed == 0 {
        return Ok(CheckReply { numbers: Some(numbers(&first)), ..reply });
    }
    let second = check.image(image.as_deref(), Repair::default(), &mut listener).transpose()?.flatten();
    listener.send();
    Ok(CheckReply { numbers: second.as_ref().map(numbers), repaired: Some(numbers(&first)), ..reply })
}

/// A VHD whose last blocks are missing, which keeps it from being opened.
fn is_vhd_cut_off(failure: &Failure) -> bool {
    failure.cause() == Cause::InvalidField && failure.value == Field::VhdTruncated as u64
}

struct Check<'p, P> {
    platform: &'p P,
    id: FileId,
    strict: bool,
}

impl<P: Platform> Check<'_, P> {
    /// Checks or repairs an image (that is VHD if it can't be opened); `None` where its format can't be checked, or not be repaired, `Some(Ok(None))` where what would be needed
    /// was not asked for.
    fn image(
        &self,
        image: Option<&dyn OpenImage<P>>,
        repair: Repair,
        to: &mut Listener<'_, P>,
    ) -> Option<Result<Option<CheckReport>, Failure>> {
        let repairs = repair != Repair::default();
        let Some(image) = image else { return Some(self.vhd(repairs, to)) };
        match image.format() {
            Format::Qcow2 => Some(self.qcow2(repair, to)),
            Format::Qed => Some(self.qed(repair)),
            Format::Parallels => Some(self.parallels(repair, to)),
            Format::Vhdx => Some(self.vhdx(repairs, to)),
            // Not known to qemu-img: see the quirk vhd-unchecked.
            Format::Vpc if self.strict => Some(self.vhd(repairs, to)),
            _ if repairs => None,
            Format::Vdi => Some(self.vdi(to).map(Some)),
            _ => image.check(&mut |finding| to.tell(finding)).map(|report| report.map(Some)),
        }
    }

    fn file(&self) -> Result<File<P>, Failure> {
        self.platform.file(self.id.0).ok_or_else(|| about(Step::Open, self.id, Cause::BadRequest))
    }

    fn disk(&self) -> Result<TargetDisk<P>, Failure> {
        Ok(TargetDisk::new(self.file()?, true))
    }

    fn qcow2(&self, repair: Repair, to: &mut Listener<'_, P>) -> Result<Option<CheckReport>, Failure> {
        let failed = |error| qcow2_failure(Step::Map, self.id, error);
        let options = qcow2::OpenOptions::default();
        let image = qcow2::Image::open(self.file()?, self.id, &options).map_err(failed)?;
        let mut found = |finding| to.tell(finding_info(finding));
        match repair == Repair::default() {
            true => image.check(&mut found).map(Some).map_err(failed),
            false => image.repair(&mut self.disk()?, repair, &mut found).map_err(failed),
        }
    }

    fn qed(&self, repair: Repair) -> Result<Option<CheckReport>, Failure> {
        // Nothing is said of the faults themselves, as with qemu-img.
        let mut found = |_| {};
        let failed = |error| self.failed(Format::Qed, matches!(error, qed::Error::Io(_)));
        let report = match repair == Repair::default() {
            true => {
                let image = qed::Image::open(self.file()?, self.id, &qed::OpenOptions { strict: false });
                image.map_err(failed)?.check(&mut found).map_err(failed)?
            }
            false => {
                let mut writer = qed::Writer::open(self.disk()?, self.id).map_err(failed)?;
                writer.check(repair, &mut found).map_err(failed)?
            }
        };
        Ok(Some(report))
    }

    fn parallels(&self, repair: Repair, to: &mut Listener<'_, P>) -> Result<Option<CheckReport>, Failure> {
        let mut found = |finding| to.tell(parallels_finding(finding, repair));
        let failed = |error| self.failed(Format::Parallels, matches!(error, parallels::Error::Io(_)));
        let report = match repair == Repair::default() {
            true => {
                let image = parallels::Image::open(self.file()?, self.id, &parallels::OpenOptions { strict: false });
                image.map_err(failed)?.check(&mut found).map_err(failed)?
            }
            false => {
                let mut writer = parallels::Writer::open_to_check(self.disk()?, self.id).map_err(failed)?;
                writer.check(repair, &mut found).map_err(failed)?
            }
        };
        Ok(Some(report))
    }

    fn vdi(&self, to: &mut Listener<'_, P>) -> Result<CheckReport, Failure> {
        let failed = |error| self.failed(Format::Vdi, matches!(error, vdi::Error::Io(_)));
        let image = vdi::Image::open(self.file()?, self.id, &vdi::OpenOptions { strict: false }).map_err(failed)?;
        image.check(&mut |finding| to.tell(vdi_finding(finding))).map_err(failed)
    }

    /// Opening for a repair carries out the log.
    fn vhdx(&self, repairs: bool, to: &mut Listener<'_, P>) -> Result<Option<CheckReport>, Failure> {
        let failed = |error| self.failed(Format::Vhdx, matches!(error, vhdx::Error::Io(_)));
        let replayed = repairs && vhdx::replay_log(&mut self.disk()?).map_err(failed)?;
        let image = vhdx::Image::open(self.file()?, self.id, &vhdx::OpenOptions::default()).map_err(failed)?;
        let mut found = |finding: vhdx::Finding| {
            if finding.is_corruption() {
                to.tell(CheckFinding::default());
            }
        };
        let report = vhdx::check(&image, &mut found).map_err(failed)?;
        let fixed = u64::from(replayed);
        Ok(Some(CheckReport { corruptions: report.corruptions, corruptions_fixed: fixed, ..CheckReport::default() }))
    }

    fn vhd(&self, repairs: bool, to: &mut Listener<'_, P>) -> Result<Option<CheckReport>, Failure> {
        let failed = |error| self.failed(Format::Vpc, matches!(error, vhd::Error::Io(_)));
        let repaired = repairs && vhd::repair(&mut self.disk()?).map_err(failed)?;
        let options = vhd::OpenOptions { check_table: false, ..vhd::OpenOptions::default() };
        let image = vhd::Image::open(self.file()?, self.id, &options).map_err(failed)?;
        let report = vhd::check(&image, &mut |finding| to.tell(vhd_finding(finding))).map_err(failed)?;
        let clusters =
            Clusters { total: report.total_blocks, allocated: report.allocated_blocks, ..Clusters::default() };
        Ok(Some(CheckReport {
            corruptions: report.corruptions + report.damages,
            corruptions_fixed: u64::from(repaired),
            image_end_offset: Some(report.image_end_offset),
            clusters: Some(clusters),
            ..CheckReport::default()
        }))
    }

    fn failed(&self, format: Format, io: bool) -> Failure {
        let cause = if io { Cause::Io } else { Cause::CorruptMetadata };
        Failure { format: format.into(), os: EIO, ..about(Step::Map, self.id, cause) }
    }
}

fn parallels_finding(finding: parallels::Finding, repair: Repair) -> CheckFinding {
    use parallels::Finding as F;
    let (kind, first, repaired) = match finding {
        F::InUse => (FindingKind::NotClosed, 0, repair.corruptions),
        F::DataOffset => (FindingKind::DataOffset, 0, repair.corruptions),
        F::Outside(entry) => (FindingKind::OutsideImage, entry.into(), repair.corruptions),
        F::Leaked(bytes) => (FindingKind::LeakedAtEnd, bytes, repair.leaks),
        F::Shared(entry) => (FindingKind::DuplicateEntry, entry.into(), repair.corruptions),
        _ => (FindingKind::Other, 0, false),
    };
    CheckFinding { kind: kind.into(), first, repaired, ..CheckFinding::default() }
}

fn vdi_finding(finding: vdi::Finding) -> CheckFinding {
    use vdi::Finding as F;
    let (kind, first, second) = match finding {
        F::Shared(block) => (FindingKind::BlockUsedTwice, block, block),
        F::OutOfRange(entry, block) => (FindingKind::BlockTooLarge, entry, block),
        F::Count { is, should } => (FindingKind::AllocatedBlocks, is, should),
        _ => (FindingKind::Other, 0, 0),
    };
    CheckFinding { kind: kind.into(), first: first.into(), second: second.into(), ..CheckFinding::default() }
}

fn vhd_finding(finding: vhd::Finding) -> CheckFinding {
    use vhd::Finding as F;
    let (kind, first, second, third) = match finding {
        F::FrontFooter => (FindingKind::CopyDamaged, 0, 0, 0),
        F::EndFooter => (FindingKind::CopyDamaged, 1, 0, 0),
        F::FootersDiffer => (FindingKind::CopiesDiffer, 0, 0, 0),
        F::HeaderChecksum => (FindingKind::HeaderChecksum, 0, 0, 0),
        F::Outside { block, at } => (FindingKind::DataOutside, block.into(), at, 0),
        F::OverMetadata { block, at } => (FindingKind::DataOverTables, block.into(), at, 0),
        F::SharedBlock { first, second, at } => (FindingKind::DataShared, first.into(), second.into(), at),
        _ => (FindingKind::Other, 0, 0, 0),
    };
    CheckFinding { kind: kind.into(), first, second, third, ..CheckFinding::default() }
}

fn numbers(report: &CheckReport) -> CheckNumbers {
    let clusters = report.clusters.unwrap_or_default();
    CheckNumbers {
        corruptions: report.corruptions,
        corruptions_fixed: report.corruptions_fixed,
        leaks: report.leaks,
        leaks_fixed: report.leaks_fixed,
        check_errors: report.check_errors,
        image_end: report.image_end_offset,
        total_clusters: clusters.total,
        allocated_clusters: clusters.allocated,
        fragmented_clusters: clusters.fragmented,
        compressed_clusters: clusters.compressed,
    }
}

/// Sends findings in bundles.
struct Listener<'p, P> {
    platform: &'p P,
    pending: Vec<CheckFinding>,
    told: usize,
}

impl<P: Platform> Listener<'_, P> {
    fn tell(&mut self, finding: CheckFinding) {
        self.told += 1;
        if self.told > MOST {
            return;
        }
        self.pending.push(finding);
        if self.pending.len() >= FINDINGS {
            self.send();
        }
    }

    fn send(&mut self) {
        if !self.pending.is_empty() {
            let findings = core::mem::take(&mut self.pending);
            self.platform.call(&Call { kind: Some(call::Kind::Findings(CheckFindings { findings })) });
        }
    }
}
