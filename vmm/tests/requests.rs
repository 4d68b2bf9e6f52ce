//! Requests on granted files: what they do, and what is refused.

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use common::{PAYLOAD, Requests, header, kvm_or_skip, settings, statuses};
use instar_guest_protocol::boot::{DeviceFlags, DeviceInfo};
use instar_guest_protocol::ring::{
    HoleRun, RequestFlags, RequestHeader, RequestKind, RequestStatus, STATUS_IO_ERROR, STATUS_OK, STATUS_REFUSED,
    STATUS_TARGET_ERROR,
};
use instar_vmm::{FaultAction, FaultEvent, FaultKinds, FaultRule};
use zerocopy::FromBytes;

const OK: RequestStatus = RequestStatus { status: STATUS_OK, errno: 0, value: 0 };
const REFUSED: RequestStatus = RequestStatus { status: STATUS_REFUSED, errno: 0, value: 0 };

fn file_with(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 7 + i) as u8 | 1).collect()
}

/// Runs the requests with these files and returns their statuses and shown memory.
fn run(requests: Requests, show: &[(u64, u64)], files: &[(&File, bool)]) -> (Vec<RequestStatus>, Vec<Vec<u8>>) {
    let mut outcome = requests.guest(show).run(files).unwrap();
    assert_eq!(outcome.stats.kicks, 1);
    let shown = outcome.messages.split_off(1);
    (statuses(&outcome.messages[0]), shown)
}

#[test]
fn reads_and_writes_of_any_bytes() {
    if !kvm_or_skip() {
        return;
    }
    let source = file_with(&pattern(10_000));
    let target = file_with(b"0123456789");
    let (status, shown) = run(
        Requests::new()
            .data(PAYLOAD + 0x8000, b"hello world")
            .add(header(RequestKind::Read, 0, 123, 300), &[(PAYLOAD, 100), (PAYLOAD + 100, 150), (PAYLOAD + 500, 50)])
            .add(header(RequestKind::Read, 0, 9_999, 1), &[(PAYLOAD + 1000, 1)])
            .add(header(RequestKind::Read, 0, 10_000, 0), &[])
            .add(header(RequestKind::Write, 1, 3, 5), &[(PAYLOAD + 0x8000, 5)])
            .add(header(RequestKind::Write, 1, 20, 11), &[(PAYLOAD + 0x8000, 6), (PAYLOAD + 0x8006, 5)])
            .add(header(RequestKind::Read, 1, 18, 13), &[(PAYLOAD + 2000, 13)])
            .add(header(RequestKind::Flush, 1, 0, 0), &[]),
        &[(PAYLOAD, 1001), (PAYLOAD + 2000, 13)],
        &[(&source, false), (&target, true)],
    );
    assert_eq!(status, [OK; 7]);
    let original = pattern(10_000);
    assert_eq!(shown[0][..250], original[123..373]);
    assert_eq!(shown[0][250..500], [0; 250]);
    assert_eq!(shown[0][500..550], original[373..423]);
    assert_eq!(shown[0][1000], original[9_999]);
    assert_eq!(shown[1], b"\0\0hello world", "a file that has just grown");
    assert_eq!(contents(&target), b"012hello89\0\0\0\0\0\0\0\0\0\0hello world");
}

#[test]
fn bounds_rights_and_kinds_are_checked() {
    if !kvm_or_skip() {
        return;
    }
    let source = file_with(&pattern(1000));
    let target = file_with(&pattern(1000));
    let data = [(PAYLOAD, 16)];
    let flagged = |flags, header| RequestHeader { flags, ..header };
    let copy = |device, target_device, offset, target_offset, len| RequestHeader {
        target_device,
        target_offset,
        ..header(RequestKind::Copy, device, offset, len)
    };
    let skip = |granularity| RequestHeader { flags: 2, granularity, ..copy(0, 1, 0, 0, 512) };
    let bad: &[(RequestHeader, &[(u64, u32)])] = &[
        (header(RequestKind::Read, 0, 985, 16), &data),
        (header(RequestKind::Read, 0, u64::MAX, 16), &data),
        (header(RequestKind::Read, 0, u64::MAX - 15, 16), &data),
        (header(RequestKind::Read, 0, 0, 17), &data),
        (header(RequestKind::Read, 0, 0, 15), &data),
        (header(RequestKind::Read, 0, 0, 0), &data),
        (header(RequestKind::Read, 2, 0, 16), &data),
        (header(RequestKind::Read, u32::MAX, 0, 16), &data),
        (header(RequestKind::Write, 0, 0, 16), &data),
        (header(RequestKind::Write, 2, 0, 16), &data),
        (header(RequestKind::Write, 1, i64::MAX as u64 - 15, 16), &data),
        (header(RequestKind::Write, 1, u64::MAX, 16), &data),
        (header(RequestKind::Write, 1, 0, 4), &data),
        (flagged(1 << 3, header(RequestKind::Write, 1, 0, 16)), &data),
        (header(RequestKind::Discard, 0, 0, 16), &[]),
        (header(RequestKind::Discard, 1, 990, 16), &[]),
        (header(RequestKind::WriteZeroes, 0, 0, 16), &[]),
        (header(RequestKind::WriteZeroes, 1, u64::MAX - 3, 16), &[]),
        (header(RequestKind::WriteZeroes, 1, 0, 16), &data),
        (header(RequestKind::SetLen, 0, 10, 0), &[]),
        (header(RequestKind::SetLen, 1, 1 << 63, 0), &[]),
        (header(RequestKind::Allocate, 0, 0, 16), &[]),
        (header(RequestKind::Allocate, 1, 1 << 63, 16), &[]),
        (header(RequestKind::Holes, 0, 0, 16), &[(PAYLOAD, 15)]),
        (header(RequestKind::Holes, 0, u64::MAX, 16), &data),
        (copy(1, 0, 0, 0, 16), &[]),
        (copy(0, 2, 0, 0, 16), &[]),
        (copy(2, 1, 0, 0, 16), &[]),
        (copy(0, 1, u64::MAX, 0, 16), &[]),
        (copy(0, 1, 0, u64::MAX, 16), &[]),
        (copy(0, 1, 0, 0, (256 << 20) + 1), &[]),
        (copy(1, 1, 0, 15, 16), &[]),
        (skip(0), &[]),
        (skip(511), &[]),
        (skip(256), &[]),
        (skip(32 << 20), &[]),
        (RequestHeader { kind: 2, ..header(RequestKind::Read, 0, 0, 0) }, &[]),
        (RequestHeader { kind: u32::MAX, ..header(RequestKind::Read, 0, 0, 0) }, &[]),
    ];
    // As many as fit into one queue.
    for some in bad.chunks(40) {
        let requests = some.iter().fold(Requests::new(), |requests, (header, data)| requests.add(*header, data));
        let (status, shown) = run(requests, &[(PAYLOAD, 16)], &[(&source, false), (&target, true)]);
        for (status, (header, _)) in status.iter().zip(some) {
            assert_eq!(*status, REFUSED, "{header:?}");
        }
        assert_eq!(shown[0], [0; 16]);
    }
    assert_eq!(contents(&source), pattern(1000));
    assert_eq!(contents(&target), pattern(1000), "nothing was done");
}

#[test]
fn a_file_granted_for_reading_stays_so_even_if_it_is_open_for_writing() {
    if !kvm_or_skip() {
        return;
    }
    let file = file_with(b"precious");
    let (status, _) = run(
        Requests::new()
            .add(header(RequestKind::Write, 0, 0, 4), &[(PAYLOAD, 4)])
            .add(header(RequestKind::SetLen, 0, 0, 0), &[])
            .add(RequestHeader { target_offset: 4, ..header(RequestKind::Copy, 0, 0, 4) }, &[]),
        &[],
        &[(&file, false)],
    );
    assert_eq!(status, [REFUSED; 3]);
    assert_eq!(contents(&file), b"precious");
}

#[test]
fn a_file_that_shrinks_is_an_error_and_no_signal() {
    if !kvm_or_skip() {
        return;
    }
    use std::os::fd::AsFd;
    let file = file_with(&pattern(8192));
    let guest = Requests::new().add(header(RequestKind::Read, 0, 4096, 4096), &[(PAYLOAD, 4096)]).guest(&[]);
    let mut sandbox = instar_vmm::Sandbox::spawn(guest.elf(), &settings()).unwrap();
    sandbox.grant(file.as_fd(), false).unwrap();
    file.set_len(5000).unwrap();
    sandbox.start(b"").unwrap();
    let outcome = common::collect(&mut sandbox).unwrap();
    let status = statuses(&outcome.messages[0])[0];
    assert_eq!((status.status, status.errno), (STATUS_IO_ERROR, EIO));
}

/// EIO.
const EIO: u32 = 5;

#[test]
fn zeroes_holes_and_lengths() {
    if !kvm_or_skip() {
        return;
    }
    let unmap = RequestFlags::UNMAP.bits();
    let file = file_with(&pattern(1 << 20));
    let zeroed = file_with(&pattern(100_000));
    let (status, shown) = run(
        Requests::new()
            .add(header(RequestKind::Discard, 0, 0x1_0000, 0x2_0000), &[])
            .add(RequestHeader { flags: unmap, ..header(RequestKind::WriteZeroes, 0, 0x8_0001, 0x1_0000) }, &[])
            .add(RequestHeader { flags: unmap, ..header(RequestKind::WriteZeroes, 0, 0xf_f000, 0x11_1000) }, &[])
            .add(header(RequestKind::Holes, 0, 0x8000, 1 << 22), &[(PAYLOAD, 160)])
            .add(header(RequestKind::Holes, 0, 0x8000, 1 << 22), &[(PAYLOAD + 512, 17)])
            .add(header(RequestKind::WriteZeroes, 1, 50_000, 60_000), &[])
            .add(header(RequestKind::Allocate, 1, 105_000, 100_000), &[])
            .add(header(RequestKind::SetLen, 2, 4321, 0), &[]),
        &[(PAYLOAD, 160), (PAYLOAD + 512, 17)],
        &[(&file, true), (&zeroed, true), (&file_with(b"some"), true)],
    );
    let runs: Vec<HoleRun> =
        shown[0].as_chunks::<16>().0.iter().map(|raw| HoleRun::read_from_bytes(raw).unwrap()).collect();
    assert_eq!(status[3].status, STATUS_OK);
    let count = status[3].value as usize;
    assert_eq!(runs[..count].iter().map(|run| run.len).sum::<u64>(), 1 << 22);
    assert!(runs[..count].windows(2).all(|pair| pair[0].data != pair[1].data), "{runs:?}");
    // Every file system may keep some holes to itself, but what is behind the end is none of its business.
    assert_eq!(runs[count - 1].data, 0);
    if count > 3 {
        assert_eq!(runs[..2], [HoleRun { len: 0x8000, data: 1 }, HoleRun { len: 0x2_0000, data: 0 }]);
    }
    assert_eq!((status[4].value, &shown[1][..16]), (1, &shown[0][..16]));
    assert!([0, 1, 2, 5, 6, 7].iter().all(|i| status[*i] == OK), "{status:?}");

    let mut expected = pattern(1 << 20);
    expected[0x1_0000..0x3_0000].fill(0);
    expected[0x8_0001..0x9_0001].fill(0);
    expected.resize(0x21_0000, 0);
    expected[0xf_f000..].fill(0);
    assert!(contents(&file) == expected);
    assert!(file.metadata().unwrap().blocks() * 512 < 0x10_0000, "space was given back");

    let mut expected = pattern(100_000);
    expected[50_000..].fill(0);
    expected.resize(205_000, 0);
    assert!(contents(&zeroed) == expected);
    assert!(zeroed.metadata().unwrap().blocks() * 512 >= 200_000, "space is allocated");
}

#[test]
fn lengths_can_be_set() {
    if !kvm_or_skip() {
        return;
    }
    let (grown, cut) = (file_with(b"some"), file_with(&pattern(5000)));
    let (status, _) = run(
        Requests::new()
            .add(header(RequestKind::SetLen, 0, 4321, 0), &[])
            .add(header(RequestKind::Read, 0, 4000, 321), &[(PAYLOAD, 321)])
            .add(header(RequestKind::SetLen, 1, 77, 0), &[])
            .add(header(RequestKind::Read, 1, 77, 1), &[(PAYLOAD, 1)]),
        &[],
        &[(&grown, true), (&cut, true)],
    );
    assert_eq!(status, [OK, OK, OK, REFUSED]);
    assert_eq!(contents(&grown), [b"some".as_slice(), &[0; 4317]].concat());
    assert_eq!(contents(&cut), pattern(77));
}

/// A copy request of the first file to the second.
fn copy(offset: u64, target_offset: u64, len: u64, skip: Option<u32>) -> RequestHeader {
    RequestHeader {
        target_device: 1,
        target_offset,
        flags: if skip.is_some() { RequestFlags::SKIP_ZERO.bits() } else { 0 },
        granularity: skip.unwrap_or(0),
        ..header(RequestKind::Copy, 0, offset, len)
    }
}

/// Requests fail where they are told to, and a copy tells which of its files was at fault.
#[test]
fn requests_fail_as_told() {
    if !kvm_or_skip() {
        return;
    }
    let fail = |kinds, errno, offset| FaultRule {
        event: FaultEvent::Start,
        state: 0,
        action: FaultAction::Fail { kinds, errno, offset, once: false },
    };
    let bytes = pattern(100_000);
    let (source, target) = (file_with(&bytes), file_with(&vec![0xee; 100_000]));
    let of_source = [fail(FaultKinds::READ, 5, Some(50_000))];
    let of_target = [
        fail(FaultKinds::WRITE, 5, Some(20_000)),
        fail(FaultKinds::WRITE_ZEROES, 28, Some(70_000)),
        fail(FaultKinds::FLUSH, 5, None),
    ];
    let requests = Requests::new()
        .add(header(RequestKind::Read, 0, 0, 16), &[(PAYLOAD, 16)])
        .add(header(RequestKind::Read, 0, 49_990, 16), &[(PAYLOAD, 16)])
        .add(copy(0, 0, 20_000, None), &[])
        .add(copy(0, 10_000, 40_000, None), &[])
        .add(copy(40_000, 0, 10_001, None), &[])
        .add(copy(99_000, 69_000, 2_000, None), &[])
        .add(header(RequestKind::WriteZeroes, 1, 60_000, 10_000), &[])
        .add(header(RequestKind::WriteZeroes, 1, 60_000, 10_001), &[])
        .add(header(RequestKind::Flush, 1, 0, 0), &[]);
    let outcome =
        requests.guest(&[]).run_failing(&settings(), &[(&source, false, &of_source), (&target, true, &of_target)]);
    let status: Vec<(u32, u32)> =
        statuses(&outcome.unwrap().messages[0]).iter().map(|status| (status.status, status.errno)).collect();
    let (read, write) = ((STATUS_IO_ERROR, 5), (STATUS_TARGET_ERROR, 5));
    let full = (STATUS_TARGET_ERROR, 28);
    let good = (STATUS_OK, 0);
    assert_eq!(status, [good, read, good, write, read, full, good, (STATUS_IO_ERROR, 28), read]);
    assert_eq!(contents(&target)[..20_000], bytes[..20_000]);
}

#[test]
fn copies_move_every_byte() {
    if !kvm_or_skip() {
        return;
    }
    let mut bytes = pattern(3_000_001);
    bytes[1_000_000..2_000_000].fill(0);
    let source = file_with(&bytes);
    let target = file_with(&vec![0xee; 4_000_000]);
    let (status, _) = run(
        Requests::new()
            .add(copy(0, 0, 4096, None), &[])
            .add(copy(5, 5000, 1_500_000, None), &[])
            .add(copy(2_999_990, 2_000_000, 1000, None), &[])
            .add(copy(9_000_000, 3_000_000, 100, None), &[])
            .add(copy(0, 5_000_000, 0, None), &[]),
        &[],
        &[(&source, false), (&target, true)],
    );
    assert_eq!(
        status.iter().map(|s| (s.status, s.value)).collect::<Vec<_>>(),
        [(STATUS_OK, 4096), (STATUS_OK, 1_500_000), (STATUS_OK, 1000), (STATUS_OK, 100), (STATUS_OK, 0)]
    );
    let mut expected = vec![0xee; 4_000_000];
    expected[..4096].copy_from_slice(&bytes[..4096]);
    expected[5000..1_505_000].copy_from_slice(&bytes[5..1_500_005]);
    expected[2_000_000..2_001_000].fill(0);
    expected[2_000_000..2_000_011].copy_from_slice(&bytes[2_999_990..]);
    expected[3_000_000..3_000_100].fill(0);
    assert!(contents(&target) == expected);
}

#[test]
fn sharing_is_all_or_nothing() {
    if !kvm_or_skip() {
        return;
    }
    const EOPNOTSUPP: u32 = 95;
    let share = |offset: u64, target_offset: u64, len: u64| RequestHeader {
        flags: RequestFlags::ONLY_SHARE.bits(),
        ..copy(offset, target_offset, len, None)
    };
    let bytes = pattern(1 << 20);
    let (source, target) = (file_with(&bytes), file_with(&vec![0xee; 1 << 20]));
    let (status, _) = run(
        Requests::new()
            .add(share(4096, 65_536, 131_072), &[])
            // Places that can't be shared, and what the source has not got.
            .add(share(512, 0, 4096), &[])
            .add(share(0, 0, 4095), &[])
            .add(share((1 << 20) - 4096, 0, 8192), &[])
            .add(share(u64::MAX - 4095, 0, 4096), &[]),
        &[],
        &[(&source, false), (&target, true)],
    );
    let mut expected = vec![0xee; 1 << 20];
    match status[0].status {
        STATUS_OK => expected[65_536..196_608].copy_from_slice(&bytes[4096..135_168]),
        _ => assert_eq!((status[0].status, status[0].errno), (STATUS_IO_ERROR, EOPNOTSUPP)),
    }
    for status in &status[1..4] {
        assert_eq!((status.status, status.errno), (STATUS_IO_ERROR, EOPNOTSUPP));
    }
    assert_ne!(status[4].status, STATUS_OK);
    assert!(contents(&target) == expected);
    let (status, _) = run(Requests::new().add(share(0, 0, 4096), &[]), &[], &[(&source, false), (&target, false)]);
    assert_eq!(status, [REFUSED]);
}

#[test]
fn copies_leave_out_blocks_of_zeroes() {
    if !kvm_or_skip() {
        return;
    }
    // Blocks with data at their first byte, at their last, across, and at the ragged end of the file.
    let len = 5_000_123u64;
    for granularity in [512u32, 4096, 65536, 1 << 20] {
        for (offset, tail) in [(0, 0), (777, 100_000)] {
            let mut bytes = vec![0; len as usize];
            for at in [0, 4095, 70_000, 1_048_576 + 777, 2_000_000, 3_333_333, 5_000_122] {
                bytes[at] = 0xaa;
            }
            bytes[1_500_000..1_600_000].fill(0xbb);
            // Written in places only, so that there are holes too.
            let source = tempfile::tempfile().unwrap();
            source.set_len(len).unwrap();
            for (i, part) in bytes.chunks(3 * 4096).enumerate() {
                if part.iter().any(|byte| *byte != 0) || i % 3 == 0 {
                    source.write_all_at(part, i as u64 * 3 * 4096).unwrap();
                }
            }
            let target = tempfile::tempfile().unwrap();
            target.set_len(len + tail).unwrap();
            let count = len - offset + tail;
            let request = copy(offset, 0, count, Some(granularity));
            let (status, _) = run(Requests::new().add(request, &[]), &[], &[(&source, false), (&target, true)]);
            assert_eq!(status[0].status, STATUS_OK);
            let mut expected = bytes[offset as usize..].to_vec();
            expected.resize(count as usize, 0);
            let nonzero: u64 = expected
                .chunks(granularity as usize)
                .filter(|block| block.iter().any(|byte| *byte != 0))
                .map(|block| block.len() as u64)
                .sum();
            expected.resize((len + tail) as usize, 0);
            assert!(contents(&target) == expected, "{granularity} {offset}");
            if status[0].value != nonzero {
                // Only sharing of blocks writes more.
                assert!(status[0].value > nonzero, "{granularity} {offset}");
                eprintln!("note: this file system shares blocks");
            }
        }
    }
}

#[test]
fn traffic_is_counted() {
    if !kvm_or_skip() {
        return;
    }
    let file = file_with(&pattern(100));
    let outcome = Requests::new()
        .add(header(RequestKind::Read, 0, 0, 100), &[(PAYLOAD, 100)])
        .add(header(RequestKind::Read, 0, 50, 100), &[(PAYLOAD, 100)])
        .guest(&[])
        .run(&[(&file, false)])
        .unwrap();
    let reads = outcome.stats.requests(RequestKind::Read);
    assert_eq!((reads.count, reads.bytes), (2, 100));
    assert_eq!(outcome.stats.requests(RequestKind::Write).count, 0);
}

/// A loop device over a temporary file; detached when dropped.
struct LoopDevice {
    path: String,
    _file: tempfile::NamedTempFile,
}

impl LoopDevice {
    /// `None`, loudly, where there are none to be had.
    fn over(bytes: &[u8]) -> Option<Self> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(bytes, 0).unwrap();
        let output = std::process::Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(Self { path: String::from_utf8(output.stdout).unwrap().trim().into(), _file: file })
            }
            _ => {
                eprintln!("SKIPPED: no loop device (that needs root and losetup)");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.path]).status();
    }
}

#[test]
fn block_devices_do_not_grow() {
    if !kvm_or_skip() {
        return;
    }
    let bytes = pattern(1 << 20);
    let Some(device) = LoopDevice::over(&bytes) else { return };
    let block = File::options().read(true).write(true).open(&device.path).unwrap();
    let target = tempfile::tempfile().unwrap();
    let end = 1u64 << 20;
    let copy = RequestHeader { target_device: 1, ..header(RequestKind::Copy, 0, 100, end) };
    let (status, shown) = run(
        Requests::new()
            .data(PAYLOAD, b"block")
            .add(header(RequestKind::Write, 0, 100, 5), &[(PAYLOAD, 5)])
            .add(header(RequestKind::Write, 0, end - 4, 5), &[(PAYLOAD, 5)])
            .add(header(RequestKind::WriteZeroes, 0, 1000, 3000), &[])
            .add(header(RequestKind::WriteZeroes, 0, 65536, 65536), &[])
            .add(header(RequestKind::WriteZeroes, 0, end - 512, 513), &[])
            .add(header(RequestKind::Discard, 0, 1 << 19, 65536), &[])
            .add(header(RequestKind::SetLen, 0, end, 0), &[])
            .add(header(RequestKind::Allocate, 0, 0, end), &[])
            .add(header(RequestKind::Allocate, 0, 0, end + 1), &[])
            .add(header(RequestKind::Holes, 0, 0, end), &[(PAYLOAD + 64, 64)])
            .add(header(RequestKind::Flush, 0, 0, 0), &[])
            .add(copy, &[]),
        &[(PAYLOAD + 64, 16), (common::BOOT + 0x2000, size_of::<DeviceInfo>() as u64)],
        &[(&block, true), (&target, true)],
    );
    let refused: Vec<usize> = (0..12).filter(|i| status[*i] == REFUSED).collect();
    assert_eq!(refused, [1, 4, 6, 8], "{status:?}");
    assert!(status.iter().all(|status| *status == REFUSED || status.status == STATUS_OK), "{status:?}");
    // The host can't tell holes of a block device.
    assert_eq!(<[u64; 2]>::read_from_bytes(&shown[0]).unwrap(), [end, 1]);
    let told = DeviceInfo::read_from_bytes(&shown[1]).unwrap();
    assert_eq!((told.len, told.flags), (end, (DeviceFlags::BLOCK_DEVICE | DeviceFlags::WRITABLE).bits()));
    let mut expected = bytes;
    expected[100..105].copy_from_slice(b"block");
    expected[1000..4000].fill(0);
    expected[65536..131_072].fill(0);
    let mut found = contents(&target);
    assert_eq!(found.len() as u64, end);
    found.rotate_right(100);
    assert!(found[100..1 << 19] == expected[100..1 << 19]);
    assert!(found[(1 << 19) + 65536..] == expected[(1 << 19) + 65536..]);
    assert_eq!(found[..100], [0; 100], "past the end counts as zero");
}

#[test]
fn comparisons_count_what_agrees() {
    if !kvm_or_skip() {
        return;
    }
    // Longer than the monitor's buffer, so that the difference lies in a later part.
    let mut bytes = pattern(700_000);
    let first = file_with(&bytes);
    bytes[600_001] ^= 1;
    bytes.extend([0; 50]);
    let second = file_with(&bytes);
    let compare = |offset, target_offset, len| RequestHeader {
        target_device: 1,
        target_offset,
        ..header(RequestKind::Compare, 0, offset, len)
    };
    let unknown = RequestHeader { target_device: 2, ..compare(0, 0, 1) };
    let past_end = i64::MAX as u64;
    let (status, _) = run(
        Requests::new()
            .add(compare(0, 0, 700_000), &[])
            .add(compare(7, 7, 600_000 - 7), &[])
            .add(compare(600_002, 600_002, 100_000 + 40), &[])
            .add(compare(2, 0, 10), &[])
            .add(compare(5, 5, 0), &[])
            .add(compare(past_end - 10, 700_000, 10), &[])
            .add(compare(past_end, 0, 1), &[])
            .add(compare(0, u64::MAX, 2), &[])
            .add(compare(0, 0, u64::MAX), &[])
            .add(unknown, &[])
            .add(compare(0, 0, 16), &[(PAYLOAD, 16)]),
        &[],
        &[(&first, false), (&second, false)],
    );
    let counts: Vec<u64> = status[..6].iter().map(|status| status.value).collect();
    assert_eq!(counts, [600_001, 600_000 - 7, 100_040, 0, 0, 10]);
    assert!(status[..6].iter().all(|status| status.status == STATUS_OK));
    assert_eq!(status[6..], [REFUSED; 5]);
}
