//! `check`: are the tables of an image sound? And their repair.

use alloc::vec::Vec;

use instar_blockio::FileId;
use instar_blockio::check::{CheckReport, Repair};
use instar_guest_protocol::message::{
    Call, Cause, CheckFinding, CheckFindings, CheckNumbers, CheckReply, CheckRequest, Failure, Format, Step, call,
};
use instar_legacy::{parallels, qed, vdi};
use instar_qcow2 as qcow2;
use instar_vhdx as vhdx;

use crate::formats::target::TargetDisk;
use crate::formats::{finding_info, open_named, qcow2_failure};
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
    let mut image = open_named(platform, source)?;
    let format = image.format();
    if format == Format::Luks {
        // It can't be checked; without the key it can't even be opened.
        image.open_parts(platform)?;
    }
    let repair = Repair { leaks: request.leaks, corruptions: request.corruptions };
    let repairs = repair != Repair::default();
    let mut listener = Listener { platform, pending: Vec::new(), told: 0 };
    let reply = CheckReply { format: format.into(), supported: true, ..CheckReply::default() };
    let check = Check { platform, id };
    let first = match format {
        Format::Qcow2 => check.qcow2(repair, &mut listener)?,
        Format::Qed => check.qed(repair, &mut listener)?,
        Format::Parallels => check.parallels(repair, &mut listener)?,
        Format::Vdi if !repairs => Some(check.vdi(&mut listener)?),
        Format::Vhdx if !repairs => Some(check.vhdx(&mut listener)?),
        _ => match image.check(&mut |finding| listener.tell(finding)).filter(|_| !repairs) {
            Some(report) => Some(report?),
            None => return Ok(CheckReply { supported: false, ..reply }),
        },
    };
    listener.send();
    let Some(first) = first else { return Ok(CheckReply { refused: true, ..reply }) };
    if first.corruptions_fixed == 0 && first.leaks_fixed == 0 {
        return Ok(CheckReply { numbers: Some(numbers(&first)), ..reply });
    }
    let second = match format {
        Format::Qcow2 => check.qcow2(Repair::default(), &mut listener)?,
        Format::Qed => check.qed(Repair::default(), &mut listener)?,
        _ => check.parallels(Repair::default(), &mut listener)?,
    };
    listener.send();
    Ok(CheckReply { numbers: second.as_ref().map(numbers), repaired: Some(numbers(&first)), ..reply })
}

struct Check<'p, P> {
    platform: &'p P,
    id: FileId,
}

impl<P: Platform> Check<'_, P> {
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

    fn qed(&self, repair: Repair, to: &mut Listener<'_, P>) -> Result<Option<CheckReport>, Failure> {
        let other = |first: u64| CheckFinding { first, ..CheckFinding::default() };
        let mut found = |finding| {
            to.tell(match finding {
                qed::Finding::Table(_, at) | qed::Finding::Cluster(_, at) | qed::Finding::Shared(at) => other(at),
                qed::Finding::Leaked(count) => other(count),
                _ => other(0),
            });
        };
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
        let mut found = |_| to.tell(CheckFinding::default());
        let failed = |error| self.failed(Format::Parallels, matches!(error, parallels::Error::Io(_)));
        let report = match repair == Repair::default() {
            true => {
                let image = parallels::Image::open(self.file()?, self.id, &parallels::OpenOptions { strict: false });
                image.map_err(failed)?.check(&mut found).map_err(failed)?
            }
            false => {
                let mut writer = parallels::Writer::open(self.disk()?, self.id).map_err(failed)?;
                writer.check(repair, &mut found).map_err(failed)?
            }
        };
        Ok(Some(report))
    }

    fn vdi(&self, to: &mut Listener<'_, P>) -> Result<CheckReport, Failure> {
        let failed = |error| self.failed(Format::Vdi, matches!(error, vdi::Error::Io(_)));
        let image = vdi::Image::open(self.file()?, self.id, &vdi::OpenOptions { strict: false }).map_err(failed)?;
        image.check(&mut |_| to.tell(CheckFinding::default())).map_err(failed)
    }

    fn vhdx(&self, to: &mut Listener<'_, P>) -> Result<CheckReport, Failure> {
        let failed = |error| self.failed(Format::Vhdx, matches!(error, vhdx::Error::Io(_)));
        let image = vhdx::Image::open(self.file()?, self.id, &vhdx::OpenOptions::default()).map_err(failed)?;
        let mut found = |finding: vhdx::Finding| {
            if finding.is_corruption() {
                to.tell(CheckFinding::default());
            }
        };
        let report = vhdx::check(&image, &mut found).map_err(failed)?;
        Ok(CheckReport { corruptions: report.corruptions, ..CheckReport::default() })
    }

    fn failed(&self, format: Format, io: bool) -> Failure {
        let cause = if io { Cause::Io } else { Cause::CorruptMetadata };
        Failure { format: format.into(), os: EIO, ..about(Step::Map, self.id, cause) }
    }
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
