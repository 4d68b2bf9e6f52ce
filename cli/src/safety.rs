//! `info --safety`: what an operator should know before trusting an image.

use std::path::Path;

use instar_guest_protocol::message::{FileRole, Format, ImageInfo};

use crate::formats;
use crate::output::node::Node;
use crate::problem::{Problem, printable};

/// Incompatible feature bits of qcow2 that OpenStack's format inspector lets pass (dirty, corrupt, external data file,
/// compression type).
const INSPECTED_FEATURES: u64 = 0b1111;

/// What was found.
#[derive(Debug)]
pub struct Report {
    detected: Format,
    also: Vec<Format>,
    references: Vec<Reference>,
    warnings: Vec<String>,
    openstack: Vec<String>,
}

/// A file that the image refers to.
#[derive(Debug)]
struct Reference {
    role: &'static str,
    name: String,
    /// Why it would not be opened.
    refusal: Option<String>,
}

/// Says whether the policy opens a name (shown as in messages).
pub type Judge<'a> = dyn Fn(&[u8], &str) -> Result<(), Problem> + 'a;

impl Report {
    /// Looks at what the guest found in the image `name`, which the operator wants read as `read_as`
    /// ([`Format::Unknown`]: as it looks).
    pub fn of(info: &ImageInfo, name: &str, read_as: Format, judge: &Judge<'_>) -> Self {
        let safety = info.safety.clone().unwrap_or_default();
        let detected = safety.detected();
        let references: Vec<Reference> = safety
            .references
            .iter()
            .map(|reference| {
                let shown = printable(&reference.name);
                let refusal = judge(&reference.name, &shown).err().map(|problem| problem.to_string());
                Reference { role: role_name(reference.role()), name: shown, refusal }
            })
            .collect();
        let also: Vec<Format> = safety.also().collect();
        let mut report = Self { detected, also, references, warnings: Vec::new(), openstack: Vec::new() };
        report.compare_formats(info.format(), name, read_as);
        report.judge_contents(info);
        report.judge_for_openstack(info, safety.incompatible_features);
        report
    }

    fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }

    fn compare_formats(&mut self, format: Format, name: &str, read_as: Format) {
        let (is, looks) = (formats::name(format), formats::name(self.detected));
        let raw = format == Format::Raw;
        // Partition tables and file systems are what raw disks hold.
        let inside = matches!(
            self.detected,
            Format::Gpt | Format::Mbr | Format::Iso | Format::Squashfs | Format::Bitlocker | Format::Unknown
        );
        if self.detected != format && !(raw && inside) {
            self.warn(format!("read as {is}, but its contents look like {looks}"));
        }
        if raw && matches!(self.detected, Format::Raw | Format::Unknown) {
            self.warn("raw without a partition table or a known file system: its contents are unknown");
        }
        if raw && read_as == Format::Unknown {
            self.warn(
                "the format raw was guessed; a guest that writes to the disk can make it look like another format",
            );
        }
        for other in self.also.clone() {
            self.warn(format!("the contents also look like {}", formats::name(other)));
        }
        if let Some(expected) = format_of_extension(name).filter(|expected| *expected != format) {
            self.warn(format!("the file name suggests {}, but the image is {is}", formats::name(expected)));
        }
    }

    fn judge_contents(&mut self, info: &ImageInfo) {
        let refused: Vec<String> = self
            .references
            .iter()
            .filter_map(|reference| Some(format!("{} refused: {}", reference.role, reference.refusal.as_ref()?)))
            .collect();
        self.warnings.extend(refused);
        if info.backing_file.is_some() && info.backing_format.is_none() {
            self.warn("the format of the backing file is not recorded");
        }
        if info.dirty {
            self.warn("not shut down cleanly");
        }
        if info.qcow2.as_ref().is_some_and(|qcow2| qcow2.corrupt) {
            self.warn("marked corrupt");
        }
        if info.encrypted {
            self.warn("encrypted: its contents can't be judged");
        }
    }

    fn judge_for_openstack(&mut self, info: &ImageInfo, features: u64) {
        let mut refuse = |text: &str| self.openstack.push(text.to_owned());
        if info.format() == Format::Qcow2 {
            if info.backing_file.is_some() {
                refuse("backing file");
            }
            if info.qcow2.as_ref().is_some_and(|qcow2| qcow2.has_data_file) {
                refuse("external data file");
            }
            if features & !INSPECTED_FEATURES != 0 {
                refuse("feature bits that its inspector does not know");
            }
        }
        if !self.also.is_empty() {
            self.openstack.push("more than one format matches".to_owned());
        }
    }

    /// As a tree.
    pub fn node(&self) -> Node {
        let texts = |texts: &[String]| Node::List(texts.iter().map(Node::text).collect());
        let references = self.references.iter().map(|reference| {
            let mut members = vec![
                ("role", Node::text(reference.role)),
                ("name", Node::text(reference.name.as_str())),
                ("allowed", Node::Bool(reference.refusal.is_none())),
            ];
            if let Some(refusal) = &reference.refusal {
                members.push(("reason", Node::text(refusal.as_str())));
            }
            Node::Dict(members)
        });
        Node::Dict(vec![
            ("detected-format", Node::text(formats::name(self.detected))),
            ("references", Node::List(references.collect())),
            ("warnings", texts(&self.warnings)),
            ("openstack-refuses", texts(&self.openstack)),
        ])
    }
}

fn role_name(role: FileRole) -> &'static str {
    match role {
        FileRole::Backing => "backing file",
        FileRole::Data => "data file",
        FileRole::Extent => "extent",
        FileRole::Target
        | FileRole::TargetData
        | FileRole::TargetExtent
        | FileRole::NewBacking
        | FileRole::CommitBase
        | FileRole::LuksHeader
        | FileRole::Unspecified => "file",
    }
}

/// The format that a file's extension promises.
fn format_of_extension(name: &str) -> Option<Format> {
    let extension = Path::new(name).extension()?.to_str()?.to_ascii_lowercase();
    Some(match extension.as_str() {
        "raw" => Format::Raw,
        "iso" => Format::Raw,
        "qcow2" | "qcow2c" => Format::Qcow2,
        "qcow" => Format::Qcow,
        "vmdk" => Format::Vmdk,
        "vhd" | "vpc" => Format::Vpc,
        "vhdx" => Format::Vhdx,
        "vdi" => Format::Vdi,
        "qed" => Format::Qed,
        "hds" => Format::Parallels,
        "luks" => Format::Luks,
        "dmg" => Format::Dmg,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use instar_guest_protocol::message::{Qcow2Info, Safety};

    use super::*;
    use crate::output::human;

    fn refuse_all(_: &[u8], shown: &str) -> Result<(), Problem> {
        Err(Problem::new(format!("Could not open '{shown}': refused")))
    }

    fn text(report: &Report) -> String {
        human::tree(&[("safety", report.node())], 0)
    }

    #[test]
    fn a_plain_image_gives_no_warning() {
        let safety = Safety { detected: Format::Qcow2.into(), ..Safety::default() };
        let info = ImageInfo { format: Format::Qcow2.into(), safety: Some(safety), ..ImageInfo::default() };
        let report = Report::of(&info, "a.qcow2", Format::Unknown, &refuse_all);
        assert_eq!(
            text(&report),
            "safety:\n    detected format: qcow2\n    references:\n    warnings:\n    openstack refuses:\n"
        );
    }

    #[test]
    fn references_and_doubts_are_told() {
        let references = vec![instar_guest_protocol::message::Reference {
            role: FileRole::Data.into(),
            name: b"/etc/passwd\x1b".to_vec(),
        }];
        let safety = Safety {
            detected: Format::Qcow2.into(),
            also: vec![Format::Mbr.into()],
            references,
            incompatible_features: 1 << 4,
        };
        let info = ImageInfo {
            format: Format::Qcow2.into(),
            safety: Some(safety),
            qcow2: Some(Qcow2Info { has_data_file: true, corrupt: true, ..Qcow2Info::default() }),
            ..ImageInfo::default()
        };
        let report = text(&Report::of(&info, "a.vmdk", Format::Unknown, &refuse_all));
        for part in [
            "name: /etc/passwd\\x1b\n",
            "allowed: false\n",
            "the contents also look like mbr",
            "the file name suggests vmdk, but the image is qcow2",
            "marked corrupt",
            "[0]: external data file\n        [1]: feature bits that its inspector does not know\n        [2]: more than one",
        ] {
            assert!(report.contains(part), "{part}: {report}");
        }
    }

    #[test]
    fn raw_disks_are_judged_by_what_they_hold() {
        let raw = |detected: Format, read_as| {
            let safety = Safety { detected: detected.into(), ..Safety::default() };
            let info = ImageInfo { format: Format::Raw.into(), safety: Some(safety), ..ImageInfo::default() };
            Report::of(&info, "disk", read_as, &refuse_all).warnings
        };
        assert_eq!(raw(Format::Gpt, Format::Raw), Vec::<String>::new());
        assert!(raw(Format::Raw, Format::Raw)[0].contains("without a partition table"));
        assert!(raw(Format::Qcow2, Format::Raw)[0].contains("look like qcow2"));
        assert!(raw(Format::Mbr, Format::Unknown)[0].contains("guessed"));
    }
}
