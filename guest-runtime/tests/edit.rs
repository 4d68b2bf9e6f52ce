//! `snapshot`, `bitmap` and `amend` on the host's platform, against the installed qemu-img.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

use instar_guest::host::Host;
use instar_guest::ops::serve_edit;
use instar_guest_protocol::boot::DeviceFlags;
use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{
    AmendOptions, AmendRefusal, AmendRequest, BitmapAction, BitmapRefusal, BitmapRequest, BitmapVerb, Call, Cause,
    EditReply, Failure, Format, Request, SnapshotAction, SnapshotRequest, Source, Step, call, reply,
};
use prost::Message;

fn qemu_is_missing() -> bool {
    let missing = Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_err();
    if missing {
        eprintln!("SKIPPED: qemu-img is not installed, so there is nothing to compare with");
    }
    missing
}

fn qemu(dir: &Path, tool: &str, args: &[&str]) -> String {
    let done = Command::new(tool).current_dir(dir).args(args).output().unwrap();
    assert!(done.status.success(), "{tool} {args:?}: {done:?}");
    String::from_utf8(done.stdout).unwrap()
}

/// Runs a request on an image of a directory, which `request` puts into it; all calls that were made.
fn serve(dir: &Path, name: &str, request: impl FnOnce(&Host, Source) -> Operation) -> Vec<Call> {
    let directory = dir.to_path_buf();
    let host = Host::with_opener(1, move |wanted| {
        assert!(!wanted.writable, "only the operator's own image is written: {wanted:?}");
        File::open(directory.join(std::str::from_utf8(&wanted.name).ok()?)).ok()
    });
    let file = OpenOptions::new().read(true).write(true).open(dir.join(name)).unwrap();
    let device = host.grant(file, DeviceFlags::WRITABLE).unwrap();
    let operation = request(&host, Source { device, ..Source::default() });
    serve_edit(&host, &Request { operation: Some(operation) }.encode_to_vec());
    host.calls()
}

fn reply(calls: &[Call]) -> Result<EditReply, Failure> {
    match calls.last() {
        Some(Call { kind: Some(call::Kind::Done(done)) }) => match done.result.clone() {
            Some(reply::Result::Edit(reply)) => Ok(reply),
            Some(reply::Result::Failure(failure)) => Err(failure),
            other => panic!("unexpected reply {other:?}"),
        },
        other => panic!("unexpected end {other:?}"),
    }
}

fn snapshot(dir: &Path, name: &str, action: SnapshotAction, snapshot: &str) -> Result<EditReply, Failure> {
    reply(&serve(dir, name, |_, image| {
        let (action, name) = (action.into(), snapshot.as_bytes().to_vec());
        Operation::Snapshot(SnapshotRequest { image, action, name, date_sec: 1, date_nsec: 2 })
    }))
}

fn bitmap(dir: &Path, actions: &[(BitmapVerb, &str)], from: Option<&str>) -> Result<EditReply, Failure> {
    reply(&serve(dir, "i", |host, image| {
        let source = from.map(|name| {
            let device = host.grant(File::open(dir.join(name)).unwrap(), DeviceFlags::empty()).unwrap();
            Source { device, ..Source::default() }
        });
        let action = |(verb, source): &(BitmapVerb, &str)| BitmapAction {
            verb: (*verb).into(),
            granularity: None,
            source: source.as_bytes().to_vec(),
        };
        let actions = actions.iter().map(action).collect();
        Operation::Bitmap(BitmapRequest { image, name: b"b".to_vec(), actions, source })
    }))
}

fn amend(dir: &Path, options: Option<AmendOptions>) -> Vec<Call> {
    serve(dir, "i", |_, image| Operation::Amend(AmendRequest { image, options, progress: true }))
}

fn cause(result: Result<EditReply, Failure>) -> (Cause, u64) {
    let failure = result.unwrap_err();
    assert_eq!(failure.step(), Step::Edit);
    (failure.cause(), failure.value)
}

#[test]
fn snapshots() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    qemu(dir, "qemu-img", &["create", "-q", "-f", "raw", "base", "1M"]);
    qemu(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "i"]);
    qemu(dir, "qemu-io", &["-c", "write -P 1 0 200k", "i"]);
    snapshot(dir, "i", SnapshotAction::Create, "one").unwrap();
    qemu(dir, "qemu-io", &["-c", "write -P 2 0 300k", "i"]);
    snapshot(dir, "i", SnapshotAction::Create, "two").unwrap();
    let listed = snapshot(dir, "i", SnapshotAction::List, "").unwrap();
    let names: Vec<&[u8]> = listed.snapshots.iter().map(|snapshot| snapshot.name.as_slice()).collect();
    assert_eq!((listed.format(), names.as_slice()), (Format::Qcow2, &[&b"one"[..], b"two"][..]));
    snapshot(dir, "i", SnapshotAction::Apply, "1").unwrap();
    snapshot(dir, "i", SnapshotAction::Delete, "two").unwrap();
    assert_eq!(cause(snapshot(dir, "i", SnapshotAction::Delete, "1")).0, Cause::SnapshotNotFound);
    assert_eq!(cause(snapshot(dir, "base", SnapshotAction::Create, "x")).0, Cause::SnapshotsUnsupported);
    qemu(dir, "qemu-io", &["-r", "-c", "read -P 1 0 200k", "-c", "read -P 0 200k 100k", "i"]);
    assert!(qemu(dir, "qemu-img", &["check", "i"]).starts_with("No errors"));
    // Its chain must be there.
    fs::remove_file(dir.join("base")).unwrap();
    let failure = snapshot(dir, "i", SnapshotAction::List, "").unwrap_err();
    assert_eq!((failure.step(), failure.cause()), (Step::Open, Cause::OpenRefused));
}

/// The bits of the only bitmap.
fn bits(dir: &Path, name: &str) -> Vec<u8> {
    let file = instar_blockio::MemBlock::from(fs::read(dir.join(name)).unwrap());
    let options = instar_qcow2::OpenOptions::default();
    let image = instar_qcow2::Image::open(file, instar_blockio::FileId(0), &options).unwrap();
    let all = image.bitmaps().unwrap();
    let mut bits = vec![0; all[0].len as usize];
    image.read_bitmap(&all[0], 0, &mut bits).unwrap();
    bits
}

#[test]
fn bitmaps() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for name in ["i", "other"] {
        qemu(dir, "qemu-img", &["create", "-q", "-f", "qcow2", name, "1M"]);
    }
    qemu(dir, "qemu-img", &["bitmap", "--add", "-g", "4k", "other", "c"]);
    qemu(dir, "qemu-io", &["-c", "write 100k 1", "-c", "write 900k 5k", "other"]);
    bitmap(dir, &[(BitmapVerb::Add, ""), (BitmapVerb::Disable, "")], None).unwrap();
    bitmap(dir, &[(BitmapVerb::Merge, "c")], Some("other")).unwrap();
    let refused = |refusal: BitmapRefusal| (Cause::BitmapRefused, refusal as u64);
    assert_eq!(cause(bitmap(dir, &[(BitmapVerb::Add, "")], None)), refused(BitmapRefusal::Exists));
    assert_eq!(cause(bitmap(dir, &[(BitmapVerb::Merge, "x")], Some("other"))), refused(BitmapRefusal::NotFound));
    assert_eq!(cause(snapshot(dir, "i", SnapshotAction::Apply, "x")).0, Cause::BitmapsActive);
    // What was done before a refusal stays.
    let two = bitmap(dir, &[(BitmapVerb::Enable, ""), (BitmapVerb::Add, "")], None).unwrap_err();
    assert_eq!((two.cause(), two.value2), (Cause::BitmapRefused, 1));
    let info = qemu(dir, "qemu-img", &["info", "i"]);
    assert!(info.contains("[0]: auto\n            name: b\n            granularity: 65536"), "{info}");
    // The bits are those that qemu-img sets: 64 KiB clusters 1 and 14.
    qemu(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "theirs", "1M"]);
    qemu(dir, "qemu-img", &["bitmap", "--add", "--merge", "c", "-b", "other", "-F", "qcow2", "theirs", "b"]);
    assert_eq!(bits(dir, "i"), [0x02, 0x40]);
    assert_eq!(bits(dir, "theirs"), [0x02, 0x40]);
    assert!(qemu(dir, "qemu-img", &["check", "i"]).starts_with("No errors"));
}

#[test]
fn amending() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    qemu(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "i", "1M"]);
    qemu(dir, "qemu-io", &["-c", "write -P 5 0 70k", "i"]);
    let calls = amend(dir, Some(AmendOptions { refcount_bits: Some(8), ..AmendOptions::default() }));
    assert!(reply(&calls).is_ok());
    let progress: Vec<f64> = calls
        .iter()
        .filter_map(|call| match &call.kind {
            Some(call::Kind::Progress(progress)) => Some(progress.done as f64 / progress.total as f64),
            _ => None,
        })
        .collect();
    assert!((50..=110).contains(&progress.len()) && progress.is_sorted(), "{progress:?}");
    assert_eq!((progress.first(), progress.last()), (Some(&0.0), Some(&1.0)));
    assert!(qemu(dir, "qemu-img", &["info", "i"]).contains("refcount bits: 8"));
    let down = amend(dir, Some(AmendOptions { version: Some(2), ..AmendOptions::default() }));
    assert_eq!(cause(reply(&down)), (Cause::AmendRefused, AmendRefusal::DowngradeRefcountBits as u64));
    // Without options, nothing is changed.
    let before = fs::read(dir.join("i")).unwrap();
    assert!(reply(&amend(dir, None)).is_ok());
    assert_eq!(fs::read(dir.join("i")).unwrap(), before);
    assert!(qemu(dir, "qemu-img", &["check", "i"]).starts_with("No errors"));
}
