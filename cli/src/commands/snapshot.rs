//! `snapshot`.

use std::time::{SystemTime, UNIX_EPOCH};

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{SnapshotAction, SnapshotRequest};

use super::{CommandLine, Settings};
use crate::args::{Key, Opt};
use crate::edit::Edit;
use crate::image_opts::ImageSpec;
use crate::messages;
use crate::output::human;
use crate::output::report::local_time;
use crate::program::{Fail, Outcome, Program, print};

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::flag(Key::Quiet, b'q', "quiet"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
    Opt::long_value(Key::Object, "object"),
    Opt::flag(Key::List, b'l', "list"),
    Opt::value(Key::CreateSnapshot, b'c', "create"),
    Opt::value(Key::ApplySnapshot, b'a', "apply"),
    Opt::value(Key::DeleteSnapshot, b'd', "delete"),
];

/// Bytes that QEMU keeps of a new snapshot's name.
const MAX_NAME: usize = 255;

/// The command line.
#[derive(Debug, Default)]
struct Arguments {
    format: Option<String>,
    image_opts: bool,
    force_share: bool,
    action: Option<(SnapshotAction, String)>,
}

impl Arguments {
    fn take(&mut self, key: Key, value: String) -> Result<(), Fail> {
        let action = match key {
            Key::List => SnapshotAction::List,
            Key::CreateSnapshot => SnapshotAction::Create,
            Key::ApplySnapshot => SnapshotAction::Apply,
            Key::DeleteSnapshot => SnapshotAction::Delete,
            Key::Format => {
                self.format = Some(value);
                return Ok(());
            }
            Key::ImageOpts => {
                self.image_opts = true;
                return Ok(());
            }
            Key::ForceShare => {
                self.force_share = true;
                return Ok(());
            }
            _ => return Ok(()),
        };
        match self.action.replace((action, value)) {
            None => Ok(()),
            Some(_) => Err(Fail::Usage("Cannot mix '-l', '-a', '-c', '-d'".to_owned())),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut arguments = Arguments::default();
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let help = include_str!("help/snapshot.txt");
    let operands = line.walk(&mut settings, help, |key, value| arguments.take(key, value))?;
    let Some(operands) = operands else { return Ok(()) };
    let [file] = operands.as_slice() else { return Err(Fail::Usage("Expecting one image file name".to_owned())) };
    let image = ImageSpec::of_operand(file, arguments.image_opts, arguments.format.as_deref())?;
    let (action, name) = arguments.action.unwrap_or((SnapshotAction::List, String::new()));
    let edit = Edit {
        settings: &settings,
        image: &image,
        writable: action != SnapshotAction::List,
        force_share: arguments.force_share,
        other: None,
        alone: false,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let kept = if action == SnapshotAction::Create { MAX_NAME.min(name.len()) } else { name.len() };
    let request = SnapshotRequest {
        action: action.into(),
        name: name.as_bytes()[..kept].to_vec(),
        date_sec: now.as_secs() as u32,
        date_nsec: now.subsec_nanos(),
        ..SnapshotRequest::default()
    };
    match edit.run(|image, _| Operation::Snapshot(SnapshotRequest { image, ..request }), &mut |_| {})? {
        Err(failure) => {
            if action == SnapshotAction::Apply {
                // qemu-img looks for snapshots in the file below, and warns again when it comes back.
                edit.warn_of_raw(failure.format());
            }
            Err(messages::edit::snapshot(action, &name, &failure).into())
        }
        Ok(reply) if reply.snapshots.is_empty() => Ok(()),
        Ok(reply) => {
            let table = human::snapshots(&reply.snapshots, settings.qemu_version, &local_time);
            print(&format!("Snapshot list:\n{table}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_action_only() {
        let mut arguments = Arguments::default();
        arguments.take(Key::CreateSnapshot, "x".to_owned()).unwrap();
        assert_eq!(arguments.action, Some((SnapshotAction::Create, "x".to_owned())));
        let mixed = arguments.take(Key::List, String::new()).unwrap_err();
        assert_eq!(mixed, Fail::Usage("Cannot mix '-l', '-a', '-c', '-d'".to_owned()));
    }
}
