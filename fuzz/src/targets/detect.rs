//! Format detection: an answer that hangs together, for any head and tail.

use instar_guest::detect::{HEAD_LEN, TAIL_LEN, detect};
use instar_guest_protocol::message::Format;

/// The bytes are a file.
pub fn run(data: &[u8]) {
    let head = &data[..data.len().min(HEAD_LEN)];
    let tail = &data[data.len().saturating_sub(TAIL_LEN)..];
    let found = detect(head, tail, data.len() as u64);
    assert!(found.format == Format::Raw || found.format == found.specific, "{found:?}");
    assert!(!found.also.contains(&found.specific) && !found.also.contains(&Format::Raw), "{found:?}");
    // Probing knows the first 512 bytes and nothing else.
    assert_eq!(detect(&head[..head.len().min(512)], &[], u64::MAX).format, found.format);
}

/// A file for each kind of mark.
pub fn seeds() -> Vec<Vec<u8>> {
    let marks: [(usize, &[u8]); 14] = [
        (0, b"QFI\xfb\0\0\0\x03"),
        (0, b"KDMV\x01\0\0\0"),
        (0, b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\n"),
        (0, b"conectix\0\0\0\x02"),
        (0, b"vhdxfile"),
        (0, b"WithouFreSpacExt\x02\0\0\0"),
        (0, b"LUKS\xba\xbe\0\x01"),
        (0, b"Bochs Virtual HD Image\0\0\0\0\0\0\0\0\0\0Redolog\0\0\0\0\0\0\0\0\0Growing\0\0\0\0\0\0\0\0\0\0\0\x02\0"),
        (64, b"\x7f\x10\xda\xbe"),
        (0x8001, b"CD001\x01"),
        (0x8801, b"NSR03"),
        (69120, b"conectix"),
        (69120, b"koly\0\0\0\x04\0\0\x02\0"),
        (3, b"-FVE-FS-"),
    ];
    marks
        .map(|(at, mark)| {
            let mut file = vec![0; 69632];
            file[at..at + mark.len()].copy_from_slice(mark);
            file
        })
        .to_vec()
}
