//! Messages between the guest and the process that the user started: both directions, any bytes.

use instar_guest_protocol::message::{
    Call, Cause, ConvertRequest, Failure, FileRole, Format, InfoRequest, OpenAnswer, OpenFile, Progress, Reply,
    Request, Source, call, request,
};
use prost::Message;

/// Byte 0 names the message; its bytes follow.
pub fn run(data: &[u8]) {
    let [kind, bytes @ ..] = data else { return };
    match kind % 3 {
        0 => round_trip::<Call>(bytes),
        1 => round_trip::<Request>(bytes),
        _ => round_trip::<OpenAnswer>(bytes),
    }
}

/// What can be decoded means the same after another trip.
fn round_trip<M: Message + Default + PartialEq>(bytes: &[u8]) {
    if let Ok(message) = M::decode(bytes) {
        let again = message.encode_to_vec();
        assert_eq!(again.len(), message.encoded_len());
        // Two floating point values that are not numbers would not be equal; there are none in the messages.
        assert!(M::decode(&again[..]).expect("decodes again") == message);
    }
}

/// One of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let call = |kind| tagged(0, &Call { kind: Some(kind) });
    let source = Source { device: 1, format: Format::Qcow2.into(), ..Source::default() };
    let failure = Failure { cause: Cause::TargetTooSmall.into(), ..Failure::default() };
    let open = OpenFile { role: FileRole::Backing.into(), name: b"base.qcow2".to_vec(), ..OpenFile::default() };
    let info = InfoRequest { chain: true, safety: true, image: source.clone() };
    let convert = ConvertRequest { sources: vec![source.clone(), source], ..ConvertRequest::default() };
    vec![
        call(call::Kind::Open(open)),
        call(call::Kind::Progress(Progress::default())),
        call(call::Kind::Warning(failure)),
        call(call::Kind::Done(Reply::default())),
        tagged(1, &Request { operation: Some(request::Operation::Info(info)) }),
        tagged(1, &Request { operation: Some(request::Operation::Convert(convert)) }),
        tagged(2, &OpenAnswer { granted: true, device: 3, len: 1 << 40, flags: 1, allocated: 4096 }),
    ]
}

fn tagged(kind: u8, message: &impl Message) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(message.encode_to_vec());
    bytes
}
