//! Reads the guest program: a static ELF file whose load segments become pages.
//!
//! The program comes with the caller's own binary, so this is no trust boundary; a broken build must still end in an
//! error and not in a strange machine.

use std::fmt;
use std::ops::Range;

use crate::layout::{IMAGE_END, IMAGE_START, PAGE};

/// Most load segments of a program.
pub const MAX_SEGMENTS: usize = 8;

/// A checked guest program.
#[derive(Clone, Debug)]
pub struct Elf {
    /// Address of the first instruction, in an executable segment.
    pub entry: u64,
    /// Load segments by ascending address, no two on one page.
    pub segments: Vec<Segment>,
}

/// A load segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Start, a multiple of the page size.
    pub start: u64,
    /// End, a multiple of the page size.
    pub end: u64,
    /// Where the file's bytes go.
    pub load_at: u64,
    /// Which bytes of the file; what follows up to `end` is zero.
    pub file: Range<usize>,
    /// The guest may write.
    pub write: bool,
    /// The guest may execute.
    pub execute: bool,
}

/// Why a guest program can't be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ElfError {
    /// Shorter than its headers say.
    Truncated,
    /// Not a 64-bit little-endian x86-64 executable at fixed addresses.
    NotAGuest,
    /// It needs a loader, or thread-local storage.
    NotStatic,
    /// No load segment, or more than eight.
    SegmentCount(usize),
    /// A segment outside of the place for programs, or on a page of another one.
    SegmentAddress(u64),
    /// A segment that is writable and executable.
    WritableCode(u64),
    /// The first instruction is not in an executable segment.
    Entry(u64),
}

impl fmt::Display for ElfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => f.write_str("it is truncated"),
            Self::NotAGuest => f.write_str("it is no x86-64 executable at fixed addresses"),
            Self::NotStatic => f.write_str("it is not static"),
            Self::SegmentCount(count) => write!(f, "it has {count} segments"),
            Self::SegmentAddress(addr) => write!(f, "its segment at {addr:#x} does not fit"),
            Self::WritableCode(addr) => write!(f, "its segment at {addr:#x} is writable code"),
            Self::Entry(addr) => write!(f, "its entry {addr:#x} is not code"),
        }
    }
}

impl std::error::Error for ElfError {}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const PT_TLS: u32 = 7;
const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
const FLAG_EXECUTE: u32 = 1;
const FLAG_WRITE: u32 = 2;
const PROGRAM_HEADER_BYTES: usize = 56;

impl Elf {
    /// Checks `bytes` and finds the segments.
    pub fn parse(bytes: &[u8]) -> Result<Self, ElfError> {
        // Magic, 64 bits, little-endian, version 1.
        if bytes.get(..7) != Some(b"\x7fELF\x02\x01\x01")
            || u16_at(bytes, 16)? != ET_EXEC
            || u16_at(bytes, 18)? != EM_X86_64
            || usize::from(u16_at(bytes, 54)?) != PROGRAM_HEADER_BYTES
        {
            return Err(ElfError::NotAGuest);
        }
        let table = to_usize(u64_at(bytes, 32)?)?;
        let mut segments = Vec::with_capacity(4);
        for i in 0..usize::from(u16_at(bytes, 56)?) {
            let at = i
                .checked_mul(PROGRAM_HEADER_BYTES)
                .and_then(|offset| offset.checked_add(table))
                .ok_or(ElfError::Truncated)?;
            match u32_at(bytes, at)? {
                PT_LOAD => segments.extend(Segment::parse(bytes, at)?),
                PT_DYNAMIC | PT_INTERP | PT_TLS => return Err(ElfError::NotStatic),
                _ => {}
            }
        }
        segments.sort_by_key(|segment| segment.start);
        if segments.is_empty() || segments.len() > MAX_SEGMENTS {
            return Err(ElfError::SegmentCount(segments.len()));
        }
        if let Some(pair) = segments.windows(2).find(|pair| pair[1].start < pair[0].end) {
            return Err(ElfError::SegmentAddress(pair[1].start));
        }
        let entry = u64_at(bytes, 24)?;
        if !segments.iter().any(|s| s.execute && (s.start..s.end).contains(&entry)) {
            return Err(ElfError::Entry(entry));
        }
        Ok(Self { entry, segments })
    }
}

impl Segment {
    /// Reads the program header at `at`; a segment without memory is none.
    fn parse(bytes: &[u8], at: usize) -> Result<Option<Self>, ElfError> {
        let flags = u32_at(bytes, at.saturating_add(4))?;
        let offset = to_usize(u64_at(bytes, at.saturating_add(8))?)?;
        let addr = u64_at(bytes, at.saturating_add(16))?;
        let file_len = u64_at(bytes, at.saturating_add(32))?;
        let mem_len = u64_at(bytes, at.saturating_add(40))?;
        if mem_len == 0 {
            return Ok(None);
        }
        let end = addr
            .checked_add(mem_len)
            .filter(|end| addr >= IMAGE_START && *end <= IMAGE_END && file_len <= mem_len)
            .ok_or(ElfError::SegmentAddress(addr))?;
        let file_end = offset.checked_add(to_usize(file_len)?).ok_or(ElfError::Truncated)?;
        if file_end > bytes.len() {
            return Err(ElfError::Truncated);
        }
        let (write, execute) = (flags & FLAG_WRITE != 0, flags & FLAG_EXECUTE != 0);
        if write && execute {
            return Err(ElfError::WritableCode(addr));
        }
        Ok(Some(Self {
            start: addr & !(PAGE - 1),
            // No overflow: `end` is at most IMAGE_END, a multiple of the page size.
            end: end.next_multiple_of(PAGE),
            load_at: addr,
            file: offset..file_end,
            write,
            execute,
        }))
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], ElfError> {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(ElfError::Truncated)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, ElfError> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, ElfError> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, ElfError> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}

fn to_usize(value: u64) -> Result<usize, ElfError> {
    usize::try_from(value).map_err(|_| ElfError::Truncated)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with the given program headers: type, flags, offset, address, bytes in file, bytes in memory.
    fn elf(entry: u64, headers: &[(u32, u32, u64, u64, u64, u64)]) -> Vec<u8> {
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(64, 0);
        out[16..18].copy_from_slice(&2u16.to_le_bytes());
        out[18..20].copy_from_slice(&62u16.to_le_bytes());
        out[24..32].copy_from_slice(&entry.to_le_bytes());
        out[32..40].copy_from_slice(&64u64.to_le_bytes());
        out[54..56].copy_from_slice(&56u16.to_le_bytes());
        out[56..58].copy_from_slice(&(headers.len() as u16).to_le_bytes());
        for &(kind, flags, offset, addr, file_len, mem_len) in headers {
            out.extend(kind.to_le_bytes());
            out.extend(flags.to_le_bytes());
            for word in [offset, addr, addr, file_len, mem_len, 4096] {
                out.extend(word.to_le_bytes());
            }
        }
        out.resize(0x1000, 0);
        out
    }

    const CODE: (u32, u32, u64, u64, u64, u64) = (1, 5, 0x100, IMAGE_START + 0x100, 0x20, 0x20);

    #[test]
    fn segments_become_pages() {
        let data = (1, 6, 0x200, IMAGE_START + 0x1ff8, 8, 0x1010);
        let elf = Elf::parse(&elf(IMAGE_START + 0x100, &[data, CODE])).unwrap();
        assert_eq!(elf.entry, IMAGE_START + 0x100);
        assert_eq!(elf.segments.len(), 2);
        assert_eq!(
            elf.segments[1],
            Segment {
                start: IMAGE_START + 0x1000,
                end: IMAGE_START + 0x4000,
                load_at: IMAGE_START + 0x1ff8,
                file: 0x200..0x208,
                write: true,
                execute: false,
            }
        );
    }

    #[test]
    fn broken_programs_are_refused() {
        let entry = IMAGE_START + 0x100;
        let parse = |headers: &[_]| Elf::parse(&elf(entry, headers)).unwrap_err();
        assert_eq!(parse(&[]), ElfError::SegmentCount(0));
        assert_eq!(parse(&[(1, 7, 0, IMAGE_START, 16, 16)]), ElfError::WritableCode(IMAGE_START));
        assert_eq!(parse(&[(1, 5, 0, 0x1000, 16, 16)]), ElfError::SegmentAddress(0x1000));
        assert_eq!(parse(&[(1, 5, 0, u64::MAX - 7, 16, 16)]), ElfError::SegmentAddress(u64::MAX - 7));
        assert_eq!(parse(&[(1, 5, 0, IMAGE_END - 8, 16, 16)]), ElfError::SegmentAddress(IMAGE_END - 8));
        assert_eq!(parse(&[(1, 5, 0, IMAGE_START, 32, 16)]), ElfError::SegmentAddress(IMAGE_START));
        assert_eq!(parse(&[(1, 5, 0xff8, IMAGE_START, 16, 16)]), ElfError::Truncated);
        assert_eq!(parse(&[(1, 5, u64::MAX, IMAGE_START, 16, 16)]), ElfError::Truncated);
        assert_eq!(parse(&[(1, 4, 0, IMAGE_START, 0x200, 0x200)]), ElfError::Entry(entry));
        assert_eq!(parse(&[CODE, (1, 6, 0, IMAGE_START + 0x800, 8, 8)]), ElfError::SegmentAddress(IMAGE_START));
        assert_eq!(parse(&[CODE, (3, 4, 0, 0, 8, 8)]), ElfError::NotStatic);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = elf(IMAGE_START + 0x100, &[CODE]);
        for len in 0..0x120 {
            assert!(Elf::parse(&whole[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn other_files_are_refused() {
        let mut shared = elf(IMAGE_START + 0x100, &[CODE]);
        shared[16] = 3;
        assert_eq!(Elf::parse(&shared).unwrap_err(), ElfError::NotAGuest);
        assert_eq!(Elf::parse(b"#!/bin/sh").unwrap_err(), ElfError::NotAGuest);
    }
}
