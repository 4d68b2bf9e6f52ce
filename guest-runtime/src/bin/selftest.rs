//! Exercises the runtime inside the virtual machine, and breaks the rules in every way that must end the machine.
//!
//! The request is an `InfoRequest` whose device number chooses the case (`cli/tests/sandbox.rs` has the other side). A case
//! that passes replies with a `CreateReply`; `fail` replies with a `Failure` that tells the line.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::{hint, ptr};

use instar_blockio::{BlockMap, BlockRead, BlockWrite, Codec, ErrorKind, ExtentKind, FileId, ReadPart, ZeroMode};
use instar_codec::{Decoder, Encoder};
use instar_guest::platform::{FailedIo, Io, Platform};
use instar_guest::rt::Machine;
use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{
    Call, CreateReply, Failure, FileRole, OpenFile, Progress, Reply, Request, call, reply,
};
use prost::Message;

instar_guest::program!(run);

/// The number that a case replies with, or the line of the check that failed.
type Outcome = Result<u64, u32>;

macro_rules! check {
    ($condition:expr) => {
        if !$condition {
            return Err(line!());
        }
    };
}

fn run(machine: &Machine, request: &[u8]) {
    let request = Request::decode(request).expect("request");
    let case = match request.operation {
        Some(Operation::Info(info)) => info.image.device,
        _ => u32::MAX,
    };
    let result = match case {
        0 => Ok(0),
        1 => files(machine),
        2 => hand_over(machine),
        3 => concurrent_reads(machine),
        4 => holes(machine),
        5 => copies(machine),
        6 => opens(machine),
        7 => memory_is_refused(),
        8 => large_and_many(machine),
        9 => failures(machine),
        10 => messages(machine),
        11 => jobs(machine),
        12 => codecs(machine),
        20 => panics(),
        21 => exhausts(),
        22 => Ok(overflows(1)),
        _ => breaks(case),
    };
    let result = match result {
        Ok(value) => reply::Result::Create(CreateReply { virtual_size: value }),
        Err(line) => reply::Result::Failure(Failure { value: line.into(), ..Failure::default() }),
    };
    machine.call(&Call { kind: Some(call::Kind::Done(Reply { result: Some(result) })) });
}

/// Device 0 holds bytes, device 1 is empty and writable: every request once, in one batch.
fn files(machine: &Machine) -> Outcome {
    let (from, to) = (FileId(0), FileId(1));
    let len = machine.file(0).ok_or(line!())?.size();
    check!(machine.file(2).is_none());
    let mut bytes = vec![0; len as usize];
    machine.file(0).ok_or(line!())?.read_at(0, &mut bytes).map_err(|_| line!())?;
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
    let mut behind = [0xff; 16];
    machine
        .submit(&mut [
            Io::Write { file: to, offset: 0, buf: &bytes },
            Io::WriteZeroes { file: to, offset: 1, len: 2, mode: ZeroMode::KeepAllocated },
            Io::SetLen { file: to, len: len + 4096 },
            Io::Discard { file: to, offset: len, len: 4096 },
            Io::Allocate { file: to, offset: len + 4096, len: 4096 },
            Io::Flush { file: to },
            Io::Read { file: from, offset: len - 8, buf: &mut behind },
        ])
        .map_err(|_| line!())?;
    check!(behind[..8] == bytes[bytes.len() - 8..].iter().map(|byte| !*byte).collect::<Vec<_>>());
    check!(behind[8..] == [0; 8]);
    check!(machine.file(1).ok_or(line!())?.size() == len + 8192);
    Ok(len)
}

/// All vCPUs take turns, each waiting for the one before.
fn hand_over(machine: &Machine) -> Outcome {
    const ROUNDS: u32 = 100;
    let n = machine.vcpus() as u32;
    let turn = AtomicU32::new(0);
    machine.parallel(n as usize, &|me| {
        for round in 0..ROUNDS {
            loop {
                let epoch = machine.epoch();
                if turn.load(Ordering::Acquire) == n * round + me as u32 {
                    break;
                }
                machine.wait(epoch);
            }
            turn.fetch_add(1, Ordering::Release);
            machine.wake();
        }
    });
    check!(turn.into_inner() == n * ROUNDS);
    Ok(n.into())
}

/// All vCPUs read device 0 through their own queues, in pieces, and sum it up.
fn concurrent_reads(machine: &Machine) -> Outcome {
    const PIECE: u64 = 64 << 10;
    let file = machine.file(0).ok_or(line!())?;
    let (next, sum) = (AtomicU64::new(0), AtomicU64::new(0));
    machine.parallel(machine.vcpus(), &|_| {
        let mut piece = vec![0; PIECE as usize];
        loop {
            let offset = next.fetch_add(PIECE, Ordering::Relaxed);
            if offset >= file.size() {
                break;
            }
            let len = PIECE.min(file.size() - offset) as usize;
            file.read_at(offset, &mut piece[..len]).expect("read");
            sum.fetch_add(piece[..len].iter().map(|&byte| u64::from(byte)).sum(), Ordering::Relaxed);
        }
    });
    Ok(sum.into_inner())
}

/// Device 0 is 8 MiB with data in its fifth MiB only (in parts that depend on the file system's blocks).
fn holes(machine: &Machine) -> Outcome {
    let file = machine.file(0).ok_or(line!())?;
    let (mut at, mut data) = (0, 0);
    while at < file.size() {
        let extent = file.extent_at(at, u64::MAX).map_err(|_| line!())?;
        check!(extent.offset == at && extent.len > 0);
        data += if matches!(extent.kind, ExtentKind::Data { .. }) { extent.len } else { 0 };
        at += extent.len;
    }
    check!(at == 8 << 20);
    Ok(data)
}

/// Device 0 into device 1 on the host, without its zeroes.
fn copies(machine: &Machine) -> Outcome {
    let len = machine.file(0).ok_or(line!())?.size();
    let (from, to) = (FileId(0), FileId(1));
    machine
        .submit(&mut [
            Io::SetLen { file: to, len: len + 8192 },
            Io::Copy { from, offset: 0, to, to_offset: 0, len: len + 4096, skip_zero: Some(4096) },
            Io::Copy { from, offset: 0, to, to_offset: len + 4096, len: 4096, skip_zero: None },
        ])
        .map_err(|_| line!())?;
    Ok(machine.file(1).ok_or(line!())?.size())
}

/// Asks for two files: one is refused, one is granted.
fn opens(machine: &Machine) -> Outcome {
    let ask = |name: &[u8]| {
        let request = OpenFile { role: FileRole::Backing.into(), name: name.to_vec(), ..OpenFile::default() };
        machine.open(request)
    };
    check!(!ask(b"refused").granted);
    let answer = ask(b"granted");
    check!(answer.granted);
    let file = machine.file(answer.device).ok_or(line!())?;
    check!(file.size() == answer.len);
    let mut bytes = vec![0; file.size() as usize];
    file.read_at(0, &mut bytes).map_err(|_| line!())?;
    check!(file.clone().write_at(0, b"x").is_err_and(|error| error.kind() == ErrorKind::ReadOnly));
    Ok(bytes.iter().map(|&byte| u64::from(byte)).sum())
}

/// A table that is too large is refused, and memory given back is used again.
fn memory_is_refused() -> Outcome {
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    for _ in 0..2 {
        let mut total = 0_u64;
        loop {
            let mut block: Vec<u8> = Vec::new();
            if block.try_reserve_exact(8 << 20).is_err() {
                break;
            }
            total += 8;
            blocks.push(block);
        }
        check!(total >= 8);
        check!(Vec::<u8>::new().try_reserve_exact(isize::MAX as usize).is_err());
        blocks.clear();
    }
    let mut grown: Vec<u64> = Vec::new();
    (0..1_000_000).for_each(|i| grown.push(i));
    check!(grown.iter().enumerate().all(|(i, &value)| i as u64 == value));
    Ok(grown.len() as u64)
}

/// More pieces than the ring holds, and one that is larger than a request may be; device 0 is filled with a pattern.
fn large_and_many(machine: &Machine) -> Outcome {
    let file = machine.file(0).ok_or(line!())?;
    let mut pieces = vec![[0_u8; 100]; 1000];
    let mut parts: Vec<_> =
        pieces.iter_mut().enumerate().map(|(i, buf)| ReadPart { offset: i as u64 * 1000, buf }).collect();
    file.read_many(&mut parts).map_err(|_| line!())?;
    // Neighbours are joined into one request with several buffers.
    let mut joined = vec![[0_u8; 100]; 50];
    let mut parts: Vec<_> =
        joined.iter_mut().enumerate().map(|(i, buf)| ReadPart { offset: i as u64 * 100, buf }).collect();
    file.read_many(&mut parts).map_err(|_| line!())?;
    let mut whole = vec![0; file.size() as usize];
    file.read_at(0, &mut whole).map_err(|_| line!())?;
    check!(pieces.iter().enumerate().all(|(i, piece)| whole[i * 1000..][..100] == *piece));
    check!(joined.concat() == whole[..5000]);
    Ok(whole.iter().map(|&byte| u64::from(byte)).sum())
}

/// Requests that the host refuses or can't do come back as errors, located in the batch.
fn failures(machine: &Machine) -> Outcome {
    let (from, to) = (FileId(0), FileId(1));
    let failed = machine.submit(&mut [
        Io::Write { file: to, offset: 0, buf: b"first" },
        Io::Write { file: from, offset: 0, buf: b"source" },
    ]);
    check!(failed.is_err_and(|failed| failed.index == 1 && failed.error.kind() == ErrorKind::ReadOnly));
    let failed = machine.submit(&mut [
        Io::Write { file: to, offset: 5, buf: b"second" },
        // Larger than any file may be: the host's own error.
        Io::SetLen { file: to, len: i64::MAX as u64 },
    ]);
    let Err(FailedIo { index: 1, error, .. }) = failed else { return Err(line!()) };
    let mut read = [0; 11];
    machine.file(1).ok_or(line!())?.read_at(0, &mut read).map_err(|_| line!())?;
    check!(&read == b"firstsecond");
    Ok(error.os().unwrap_or(0) as u64)
}

/// Messages with and without an answer.
fn messages(machine: &Machine) -> Outcome {
    for done in 0..3 {
        machine.call(&Call { kind: Some(call::Kind::Progress(Progress { done, total: 3 })) });
    }
    machine.call(&Call { kind: Some(call::Kind::Pace(Progress { done: 3, total: 3 })) });
    machine.call(&Call { kind: Some(call::Kind::Warning(Failure { value: 7, ..Failure::default() })) });
    Ok(5)
}

/// Many short jobs, on changing numbers of vCPUs.
fn jobs(machine: &Machine) -> Outcome {
    let count = AtomicU64::new(0);
    let mut wanted = 0;
    for job in 0..200 {
        let n = 1 + job % machine.vcpus();
        machine.parallel(n, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        wanted += n as u64;
        check!(count.load(Ordering::Relaxed) == wanted);
    }
    Ok(wanted)
}

/// Compresses device 0 cluster by cluster on all vCPUs, and gets it back.
fn codecs(machine: &Machine) -> Outcome {
    const CLUSTER: usize = 64 << 10;
    let file = machine.file(0).ok_or(line!())?;
    let (next, stored_len, bad) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    machine.parallel(machine.vcpus(), &|_| {
        let mut coders = [Codec::Deflate, Codec::Zlib, Codec::Zstd].map(|codec| (codec, Encoder::new(codec)));
        let mut decoder = Decoder::new();
        let (mut cluster, mut stored, mut back) = (vec![0; CLUSTER], Vec::new(), vec![0; CLUSTER]);
        loop {
            let offset = next.fetch_add(CLUSTER as u64, Ordering::Relaxed);
            if offset + CLUSTER as u64 > file.size() {
                break;
            }
            file.read_at(offset, &mut cluster).expect("read");
            for (codec, encoder) in &mut coders {
                stored.clear();
                if let Ok(Some(len)) = encoder.encode(&cluster, &mut stored) {
                    let decoded = decoder.decode(*codec, &stored[..len], &mut back);
                    bad.fetch_add((decoded.is_err() || back != cluster).into(), Ordering::Relaxed);
                    stored_len.fetch_add(len as u64, Ordering::Relaxed);
                }
            }
        }
    });
    check!(bad.into_inner() == 0);
    Ok(stored_len.into_inner())
}

fn panics() -> Outcome {
    let numbers: [u32; 3] = hint::black_box([1, 2, 3]);
    let index = hint::black_box(3);
    Ok(numbers[index].into())
}

fn exhausts() -> Outcome {
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    loop {
        blocks.push(Vec::with_capacity(8 << 20));
    }
}

#[allow(unconditional_recursion)]
fn overflows(depth: u64) -> u64 {
    let frame = hint::black_box([depth; 64]);
    overflows(depth + 1) + frame[7]
}

static CONSTANT: u64 = 7;

/// What no safe code can do. Each of these must end the machine.
fn breaks(case: u32) -> Outcome {
    let constant = (&raw const CONSTANT).cast_mut();
    let code: [u8; 16] = hint::black_box([0xc3; 16]);
    // SAFETY: none of this is sound. It is the purpose of these cases that the machine ends at once, whatever the program
    // does; the tests wait for exactly that.
    unsafe {
        match case {
            30 => constant.write_volatile(8),
            31 => core::mem::transmute::<*const u8, extern "C" fn()>(code.as_ptr())(),
            32 => core::arch::asm!("hlt"),
            33 => ptr::without_provenance_mut::<u8>(0).wrapping_add(hint::black_box(8)).write_volatile(1),
            34 => run_address().cast_mut().write_volatile(0xc3),
            35 => core::arch::asm!("mov cr3, {}", in(reg) 0_usize),
            36 => ptr::without_provenance_mut::<u8>(0x1000).write_volatile(1),
            37 => ptr::without_provenance_mut::<u8>(1 << 45).write_volatile(1),
            38 => core::arch::asm!("in eax, dx", in("dx") 0x5100_u16, out("eax") _),
            39 => core::arch::asm!("out dx, al", in("dx") 0x80_u16, in("al") 0_u8),
            40 => core::arch::asm!("syscall", out("rcx") _, out("r11") _),
            41 => core::arch::asm!("ud2"),
            42 => core::arch::asm!("int3"),
            43 => core::arch::asm!("cli"),
            _ => return Err(line!()),
        }
    }
    Ok(0)
}

fn run_address() -> *const u8 {
    (run as fn(&Machine, &[u8])) as *const u8
}
