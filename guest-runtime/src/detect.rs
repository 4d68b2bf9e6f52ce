//! Which format the bytes of a file look like.
//!
//! Two questions are answered apart, because mixing them has opened many holes: what `qemu-img` takes a
//! file for when nobody says ([`Detection::format`]), and what a careful reader sees in it
//! ([`Detection::specific`], [`Detection::also`]). The second never decides how a file is read.
//!
//! Facts about probing, seen with qemu-img 10.0:
//! * It looks at the first 512 bytes, filled up with zeros, and at nothing else. So a fixed VHD, whose
//!   footer is at the end, is raw, and so is LUKS version 2.
//! * Where several formats match, the first of [`PROBES`] wins.
//! * A file whose *name* ends in `.dmg` is dmg without a look at it, unless its bytes say one of [`PROBES`]
//!   other than cloop. File names are not known here: that case is the caller's.

use alloc::vec::Vec;

use instar_guest_protocol::message::Format;
use instar_raw::partition::{self, PartitionTable};

/// Bytes from the start of a file that show every mark known here (UDF lies farthest).
pub const HEAD_LEN: usize = 64 << 10;

/// Bytes from the end of a file that show every mark known here.
pub const TAIL_LEN: usize = 512;

/// Bytes that probing looks at.
const PROBE_LEN: usize = 512;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detection {
    /// What probing says; [`Format::Raw`] if nothing else.
    pub format: Format,
    /// The most that can be said: for a raw file, what else it looks like (such as [`Format::Gpt`], or
    /// [`Format::Vpc`] for a fixed VHD); for all others the same as `format`.
    pub specific: Format,
    /// Further formats whose marks are there. Some disks carry two by design (an ISO 9660 file system
    /// with an MBR); any other pair is a reason to distrust the file.
    pub also: Vec<Format>,
}

/// What all tests look at.
struct Sample<'a> {
    /// The first bytes, filled up with zeros.
    probe: &'a [u8; PROBE_LEN],
    head: &'a [u8],
    tail: &'a [u8],
    file_len: u64,
}

type Test = fn(&Sample<'_>) -> bool;

/// The formats that probing knows, the stronger first.
const PROBES: [(Format, Test); 11] = [
    (Format::Vmdk, |s| s.starts(b"KDMV") || s.starts(b"COWD") || is_descriptor(s.probe)),
    (Format::Vpc, |s| s.starts(b"conectix")),
    (Format::Vhdx, |s| s.starts(b"vhdxfile")),
    (Format::Qed, |s| s.starts(b"QED\0")),
    (Format::Parallels, |s| is_parallels(s) && s.u32_le(16) == 2),
    (Format::Bochs, is_bochs),
    (Format::Vdi, |s| s.u32_le(64) == 0xbeda_107f),
    (Format::Qcow2, |s| s.starts(b"QFI\xfb") && s.u32_be(4) >= 2),
    (Format::Qcow, |s| s.starts(b"QFI\xfb") && s.u32_be(4) == 1),
    (Format::Luks, |s| s.starts(b"LUKS\xba\xbe\0\x01")),
    (Format::Cloop, |s| s.starts(CLOOP_SCRIPT)),
];

/// What only a careful reader sees, the more telling first: a file system or partition table often lies
/// inside of something else.
const MARKS: [(Format, Test); 21] = [
    (Format::Vpc, is_vhd_footer),
    (Format::Dmg, |s| s.tail_holds(512, b"koly")),
    (Format::Luks, |s| s.starts(b"LUKS\xba\xbe")),
    (Format::Ewf, |s| EWF.iter().any(|mark| s.starts(mark))),
    (Format::Vma, |s| s.starts(b"VMA\0")),
    (Format::Asif, |s| s.starts(b"shdw")),
    (Format::Bitlocker, |s| s.holds(3, b"-FVE-FS-") || s.holds(424, &BITLOCKER_TO_GO)),
    (Format::Vmdk, |s| s.probe[..21].eq_ignore_ascii_case(b"# Disk DescriptorFile")),
    (Format::Parallels, is_parallels),
    (Format::Qcow, |s| s.starts(b"QFI\xfb")),
    (Format::Wim, |s| s.starts(b"MSWIM\0\0\0")),
    // What images travel in. (POSIX and GNU archives; the streams of RFC 1952, the .xz format, RFC 8878, bzip2; ZIP.)
    (Format::Tar, |s| s.holds(257, b"ustar\x0000") || s.holds(257, b"ustar  \0")),
    (Format::Gzip, |s| s.starts(b"\x1f\x8b\x08")),
    (Format::Xz, |s| s.starts(b"\xfd7zXZ\0")),
    (Format::Zstd, |s| s.starts(b"\x28\xb5\x2f\xfd")),
    (Format::Bzip2, |s| s.starts(b"BZh") && s.holds(4, b"1AY&SY")),
    (Format::Zip, |s| s.starts(b"PK\x03\x04")),
    (Format::Squashfs, |s| s.starts(b"hsqs")),
    (Format::Iso, is_iso),
    (Format::Gpt, |s| matches!(s.partitions(), Some(PartitionTable::Gpt(_)))),
    (Format::Mbr, |s| matches!(s.partitions(), Some(PartitionTable::Mbr(_)))),
];

const CLOOP_SCRIPT: &[u8] = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";

/// Expert witness: version 1 (disks and logical), version 2 (the same).
const EWF: [&[u8]; 4] =
    [b"EVF\x09\x0d\x0a\xff\0", b"LVF\x09\x0d\x0a\xff\0", b"EVF2\x0d\x0a\x81\0", b"LEF2\x0d\x0a\x81\0"];

/// GUID 4967d63b-2e29-4ad8-8399-f6a339e3d001, as it is stored.
const BITLOCKER_TO_GO: [u8; 16] =
    [0x3b, 0xd6, 0x67, 0x49, 0x29, 0x2e, 0xd8, 0x4a, 0x83, 0x99, 0xf6, 0xa3, 0x39, 0xe3, 0xd0, 0x01];

/// Looks at a file: its first bytes ([`HEAD_LEN`], or all), its last ([`TAIL_LEN`], or all) and its length.
///
/// With less than that, marks that lie elsewhere are not seen; 512 bytes of `head` are enough for
/// [`Detection::format`]. No bytes make it fail.
pub fn detect(head: &[u8], tail: &[u8], file_len: u64) -> Detection {
    let mut probe = [0; PROBE_LEN];
    let known = head.len().min(PROBE_LEN);
    probe[..known].copy_from_slice(&head[..known]);
    let sample = Sample { probe: &probe, head, tail, file_len };

    let mut found: Vec<Format> = Vec::new();
    let mut matches = |tests: &[(Format, Test)]| {
        for (format, test) in tests {
            if !found.iter().any(|&known| is_same(known, *format)) && test(&sample) {
                found.push(*format);
            }
        }
        found.first().copied()
    };
    let format = matches(&PROBES).unwrap_or(Format::Raw);
    let specific = matches(&MARKS).unwrap_or(Format::Raw);
    let also = found.into_iter().skip(1).collect();
    Detection { format, specific, also }
}

/// The two versions of qcow share their mark, so that one is not evidence of the other.
fn is_same(a: Format, b: Format) -> bool {
    let is_qcow = |format| matches!(format, Format::Qcow | Format::Qcow2);
    a == b || is_qcow(a) && is_qcow(b)
}

impl Sample<'_> {
    fn starts(&self, mark: &[u8]) -> bool {
        self.probe.starts_with(mark)
    }

    fn holds(&self, at: usize, mark: &[u8]) -> bool {
        self.head.get(at..).is_some_and(|rest| rest.starts_with(mark))
    }

    /// Whether `mark` lies so many bytes before the end of the file.
    fn tail_holds(&self, from_end: usize, mark: &[u8]) -> bool {
        let start = self.tail.len().checked_sub(from_end);
        start.is_some_and(|start| self.tail[start..].starts_with(mark))
    }

    fn bytes4(&self, at: usize) -> [u8; 4] {
        self.probe[at..].first_chunk().copied().unwrap_or_default()
    }

    fn u32_le(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes4(at))
    }

    fn u32_be(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes4(at))
    }

    fn partitions(&self) -> Option<PartitionTable> {
        partition::find_in(self.head, self.file_len)
    }
}

/// The text of a VMDK descriptor as far as probing understands it: comment lines and lines of
/// nothing but spaces (at least one), then the version.
fn is_descriptor(probe: &[u8]) -> bool {
    let mut rest = probe;
    loop {
        let after = match rest.first() {
            Some(b'#') => rest.iter().position(|&byte| byte == b'\n').map(|at| &rest[at + 1..]),
            Some(b' ') => {
                let spaces = rest.iter().take_while(|&&byte| byte == b' ').count();
                let text = &rest[spaces..];
                text.strip_prefix(b"\n").or_else(|| text.strip_prefix(b"\r\n"))
            }
            _ => break,
        };
        match after {
            Some(after) => rest = after,
            None => return false,
        }
    }
    let Some([version, end @ ..]) = rest.strip_prefix(b"version=") else { return false };
    matches!(version, b'1'..=b'3') && (end.starts_with(b"\n") || end.starts_with(b"\r\n"))
}

fn is_parallels(s: &Sample<'_>) -> bool {
    s.starts(b"WithoutFreeSpace") || s.starts(b"WithouFreSpacExt")
}

/// Three texts, each ended by a zero byte in its field, and a version.
fn is_bochs(s: &Sample<'_>) -> bool {
    s.starts(b"Bochs Virtual HD Image\0")
        && s.probe[32..].starts_with(b"Redolog\0")
        && s.probe[48..].starts_with(b"Growing\0")
        && matches!(s.u32_le(64), 0x1_0000 | 0x2_0000)
}

/// The footer of a fixed (or any) VHD. Old Virtual PC wrote 511 bytes.
fn is_vhd_footer(s: &Sample<'_>) -> bool {
    s.tail_holds(512, b"conectix") || s.tail_holds(511, b"conectix")
}

/// A volume descriptor of ISO 9660, or the recognition sequence of UDF, in sectors of 2048 bytes from the 16th.
fn is_iso(s: &Sample<'_>) -> bool {
    let marks: [&[u8]; 3] = [b"CD001", b"NSR02", b"NSR03"];
    (16..24).any(|sector| marks.iter().any(|mark| s.holds(sector * 2048 + 1, mark)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    fn of(bytes: &[u8]) -> Detection {
        let head = &bytes[..bytes.len().min(HEAD_LEN)];
        let tail = &bytes[bytes.len().saturating_sub(TAIL_LEN)..];
        detect(head, tail, bytes.len() as u64)
    }

    /// A file of 128 KiB with these bytes put in.
    fn file(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 128 << 10];
        for (at, part) in parts {
            bytes[*at..at + part.len()].copy_from_slice(part);
        }
        bytes
    }

    fn check(parts: &[(usize, &[u8])], format: Format, specific: Format, also: &[Format]) {
        let expected = Detection { format, specific, also: also.to_vec() };
        assert_eq!(of(&file(parts)), expected, "{parts:x?}");
    }

    const VDI: (usize, &[u8]) = (64, &[0x7f, 0x10, 0xda, 0xbe]);
    const MBR: (usize, &[u8]) = (446, &[0x80, 0, 2, 0, 0x83, 0, 9, 0, 1, 0, 0, 0, 8, 0, 0, 0]);
    const BOOT_MARK: (usize, &[u8]) = (510, &[0x55, 0xaa]);

    #[test]
    fn each_probed_format_by_its_mark() {
        let bochs: [(usize, &[u8]); 4] =
            [(0, b"Bochs Virtual HD Image"), (32, b"Redolog"), (48, b"Growing"), (64, &[0, 0, 2, 0])];
        check(&bochs, Format::Bochs, Format::Bochs, &[]);
        check(&[(0, CLOOP_SCRIPT)], Format::Cloop, Format::Cloop, &[]);
        check(&[VDI], Format::Vdi, Format::Vdi, &[]);
        check(&[(0, b"QFI\xfb\xff\xff\xff\xff")], Format::Qcow2, Format::Qcow2, &[]);
        let marks: [(&[u8], Format); 12] = [
            (b"QFI\xfb\0\0\0\x01", Format::Qcow),
            (b"QFI\xfb\0\0\0\x02", Format::Qcow2),
            (b"QFI\xfb\0\0\0\x03", Format::Qcow2),
            (b"KDMV", Format::Vmdk),
            (b"COWD", Format::Vmdk),
            (b"# x\r\n  \n#\nversion=3\r\n", Format::Vmdk),
            (b"conectix", Format::Vpc),
            (b"vhdxfile", Format::Vhdx),
            (b"QED\0", Format::Qed),
            (b"WithoutFreeSpace\x02\0\0\0", Format::Parallels),
            (b"WithouFreSpacExt\x02\0\0\0", Format::Parallels),
            (b"LUKS\xba\xbe\0\x01", Format::Luks),
        ];
        for (mark, format) in marks {
            check(&[(0, mark)], format, format, &[]);
            // Probing fills up with zeros, so the mark alone is enough.
            assert_eq!(of(mark).format, format);
            let mut other = mark.to_vec();
            *other.last_mut().unwrap() ^= 0x10;
            // Every version of qcow from 2 on is taken for qcow2.
            let expected = if mark.starts_with(b"QFI") { Format::Qcow2 } else { Format::Raw };
            assert_eq!(of(&other).format, expected, "{other:x?}");
        }
    }

    #[test]
    fn marks_that_probing_does_not_take() {
        check(&[], Format::Raw, Format::Raw, &[]);
        check(&[(0, b"QFI\xfb\0\0\0\0")], Format::Raw, Format::Qcow, &[]);
        check(&[(0, b"LUKS\xba\xbe\0\x02")], Format::Raw, Format::Luks, &[]);
        check(&[(0, b"WithouFreSpacExt\x03")], Format::Raw, Format::Parallels, &[]);
        check(&[(0, b"# Disk DescriptorFile\n\nversion=1\n")], Format::Raw, Format::Vmdk, &[]);
        check(&[((128 << 10) - 512, b"conectix")], Format::Raw, Format::Vpc, &[]);
        check(&[((128 << 10) - 511, b"conectix")], Format::Raw, Format::Vpc, &[]);
        check(&[((128 << 10) - 512, b"koly")], Format::Raw, Format::Dmg, &[]);
        check(&[(0, b"EVF\x09\x0d\x0a\xff\0")], Format::Raw, Format::Ewf, &[]);
        check(&[(0, b"VMA\0")], Format::Raw, Format::Vma, &[]);
        check(&[(0, b"shdw")], Format::Raw, Format::Asif, &[]);
        check(&[(3, b"-FVE-FS-")], Format::Raw, Format::Bitlocker, &[]);
        check(&[(424, &BITLOCKER_TO_GO)], Format::Raw, Format::Bitlocker, &[]);
        check(&[(0, b"MSWIM\0\0\0\xd0\0\0\0")], Format::Raw, Format::Wim, &[]);
        check(&[(0, b"disk.ovf\0"), (257, b"ustar\x0000")], Format::Raw, Format::Tar, &[]);
        check(&[(0, b"disk.ovf\0"), (257, b"ustar  \0")], Format::Raw, Format::Tar, &[]);
        check(&[(0, &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3])], Format::Raw, Format::Gzip, &[]);
        check(&[(0, &[0xfd, 0x37, 0x7a, 0x58, 0x5a, 0, 0, 4])], Format::Raw, Format::Xz, &[]);
        check(&[(0, &[0x28, 0xb5, 0x2f, 0xfd, 0x24])], Format::Raw, Format::Zstd, &[]);
        check(&[(0, &[0x42, 0x5a, 0x68, 0x39, 0x31, 0x41, 0x59, 0x26, 0x53, 0x59])], Format::Raw, Format::Bzip2, &[]);
        check(&[(0, &[0x50, 0x4b, 3, 4, 20])], Format::Raw, Format::Zip, &[]);
        check(&[(0, b"hsqs")], Format::Raw, Format::Squashfs, &[]);
        check(&[(0, b"BZh9"), (0x8001, b"CD001")], Format::Raw, Format::Iso, &[]);
        check(&[(0x8001, b"CD001")], Format::Raw, Format::Iso, &[]);
        check(&[(0x8801, b"NSR03")], Format::Raw, Format::Iso, &[]);
        check(&[MBR, BOOT_MARK], Format::Raw, Format::Mbr, &[]);
    }

    #[test]
    fn two_formats_in_one_file_are_told() {
        let qcow2: (usize, &[u8]) = (0, b"QFI\xfb\0\0\0\x03");
        check(&[qcow2, VDI], Format::Vdi, Format::Vdi, &[Format::Qcow2]);
        check(&[(0, b"KDMV"), VDI], Format::Vmdk, Format::Vmdk, &[Format::Vdi]);
        check(&[(0, b"LUKS\xba\xbe\0\x01"), VDI], Format::Vdi, Format::Vdi, &[Format::Luks]);
        check(&[qcow2, MBR, BOOT_MARK, (0x8001, b"CD001")], Format::Qcow2, Format::Qcow2, &[Format::Iso, Format::Mbr]);
        check(&[MBR, BOOT_MARK, (0x8001, b"CD001")], Format::Raw, Format::Iso, &[Format::Mbr]);
        // A dynamic VHD has its footer at both ends: one format.
        check(&[(0, b"conectix"), ((128 << 10) - 512, b"conectix")], Format::Vpc, Format::Vpc, &[]);
        check(&[(0, b"conectix"), ((128 << 10) - 512, b"koly")], Format::Vpc, Format::Vpc, &[Format::Dmg]);
    }

    #[test]
    fn descriptor_text_is_read_as_probing_reads_it() {
        let good: [&[u8]; 6] = [
            b"version=1\n",
            b"version=2\r\n",
            b"#\nversion=1\n",
            b" \nversion=1\n",
            b"  \r\n#\0\n \nversion=2\n",
            b"#c\r\nversion=3\n",
        ];
        let bad: [&[u8]; 13] = [
            b"version=4\n",
            b"version=1",
            b"version=1 \n",
            b"version=12\n",
            b"version=1\r",
            b"version=\n",
            b"Version=1\n",
            b" version=1\n",
            b"\nversion=1\n",
            b"\r\nversion=1\n",
            b"# c\n\nversion=1\n",
            b"  \rversion=1\n",
            b"CID=1\nversion=1\n",
        ];
        assert!(good.iter().all(|text| is_descriptor(text)));
        assert!(!bad.iter().any(|text| is_descriptor(text)));
        for (len, format) in [(502, Format::Vmdk), (503, Format::Raw)] {
            let mut text = vec![b'#'; len];
            text[len - 1] = b'\n';
            text.extend(b"version=1\n");
            assert_eq!(of(&text).format, format, "text of {} bytes", len + 10);
        }
    }

    #[test]
    fn any_length_of_head_and_tail_will_do() {
        let bytes = file(&[VDI, (0, b"QFI\xfb\0\0\0\x03"), BOOT_MARK, MBR, (0x8001, b"CD001")]);
        for len in (0..600).chain([0x8005, 0x8006, HEAD_LEN, bytes.len()]) {
            let found = detect(&bytes[..len], &bytes[bytes.len() - len..], u64::MAX);
            assert_eq!(found.also.contains(&Format::Iso), len >= 0x8006, "{len}");
        }
    }
}
