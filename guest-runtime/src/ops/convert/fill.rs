//! From the runs of a chunk to its bytes: reads in one batch, then decompression.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use instar_blockio::{
    BlockRead, CompressedRun, Error, ErrorKind, Extent, ExtentKind, FileId, SectorCipher, read_encrypted,
};
use instar_codec::Decoder;
use instar_guest_protocol::message::Step;

use super::plan::Chunk;
use crate::platform::{Io, Platform};

/// Streams that lie this close together are read in one request.
const MAX_GAP: u64 = 4096;

/// The unit in which unreadable data is given up, as in qemu-img.
const SECTOR: usize = 512;

/// Units longer than this are not decoded by each vCPU for itself: a chunk is a small part of such a unit.
const LARGE_UNIT: u32 = 4 << 20;
/// Nor are streams by this much longer than twice their unit.
const STREAM_SLACK: u32 = 4096;

/// Reads the source itself.
pub(in crate::ops) type ReadSource<'a> = dyn Fn(u64, &mut [u8]) -> Result<(), Error> + 'a;

/// What a vCPU keeps from chunk to chunk.
#[derive(Default)]
pub(in crate::ops) struct Scratch<'a> {
    /// Takes large units apart, once for all vCPUs.
    source: Option<&'a ReadSource<'a>>,
    decoder: Decoder,
    streams: Vec<u8>,
    unit: Vec<u8>,
}

impl<'a> Scratch<'a> {
    /// With a way to read the source itself.
    pub fn with_source(source: &'a ReadSource<'a>) -> Self {
        Self { source: Some(source), ..Self::default() }
    }
}

/// An error, what was being done, and at which disk offset.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Fault {
    pub step: Step,
    pub offset: u64,
    pub error: Error,
}

impl Fault {
    /// Met while the source was read at this disk offset; for use with `map_err`.
    pub fn read(offset: u64) -> impl Fn(Error) -> Fault {
        move |error| Fault { step: Step::Read, offset, error }
    }

    /// Met while the target was written at this disk offset; for use with `map_err`.
    pub fn write(offset: u64) -> impl Fn(Error) -> Fault {
        move |error| Fault { step: Step::Write, offset, error }
    }
}

/// Result of a step of the conversion.
pub(in crate::ops) type Outcome<T> = Result<T, Fault>;

/// Several neighbouring streams of one file, read in one go.
struct StreamRead {
    file: FileId,
    host: u64,
    len: u64,
    at: usize,
    disk_offset: u64,
}

/// One compressed run and where its bytes go.
struct Decode<'b> {
    run: CompressedRun,
    disk_offset: u64,
    out: &'b mut [u8],
}

/// Requests for one turn on the queue, each with the disk offset that an error of it is told by.
#[derive(Default)]
pub(in crate::ops) struct Batch<'b> {
    requests: Vec<Io<'b>>,
    disk_offsets: Vec<u64>,
}

impl<'b> Batch<'b> {
    pub fn push(&mut self, disk_offset: u64, request: Io<'b>) {
        self.requests.push(request);
        self.disk_offsets.push(disk_offset);
    }

    pub fn submit<P: Platform>(mut self, platform: &P) -> Outcome<()> {
        if self.requests.is_empty() {
            return Ok(());
        }
        platform.submit(&mut self.requests).map_err(|failed| Fault {
            step: self.requests.get(failed.index).map_or(Step::Read, |request| step_of(request, failed.on_target)),
            offset: self.disk_offsets.get(failed.index).copied().unwrap_or_default(),
            error: failed.error,
        })
    }
}

/// Which side of the conversion a failed request belongs to.
fn step_of(request: &Io<'_>, on_target: bool) -> Step {
    match request {
        Io::Read { .. } | Io::Compare { .. } => Step::Read,
        Io::Copy { .. } | Io::Share { .. } if !on_target => Step::Read,
        _ => Step::Write,
    }
}

/// Fills `buf` (one byte for each of the chunk) with what the `wanted` runs hold, and serves `batch` in the same turn.
///
/// Runs that are not wanted leave their part of `buf` as it is. Zero runs are cleared; unallocated ones are read from `under`
/// as far as it reaches.
pub(in crate::ops) fn fill<P: Platform>(
    platform: &P,
    chunk: &Chunk,
    buf: &mut [u8],
    scratch: &mut Scratch<'_>,
    under: Option<&dyn BlockRead>,
    wanted: impl Fn(&Extent) -> bool,
    batch: Batch<'_>,
) -> Outcome<()> {
    load(platform, chunk, buf, scratch, under, &wanted, batch)?;
    let mut rest = buf;
    for extent in &chunk.extents {
        let (part, tail) = core::mem::take(&mut rest).split_at_mut(extent.len as usize);
        rest = tail;
        if let ExtentKind::Encrypted { file, position, .. } = extent.kind
            && wanted(extent)
        {
            let located = Fault::read(extent.offset);
            let cipher = cipher_of(platform, file).map_err(&located)?;
            if whole_sectors(&*cipher, position, part.len()) {
                cipher.decrypt(position, part).map_err(&located)?;
            }
        }
    }
    Ok(())
}

/// The cipher of what lies in a file.
fn cipher_of<P: Platform>(platform: &P, file: FileId) -> Result<Arc<dyn SectorCipher>, Error> {
    platform.files().get(file).ok_or(ErrorKind::InvalidInput)?.cipher()
}

fn whole_sectors(cipher: &dyn SectorCipher, position: u64, len: usize) -> bool {
    let sector = u64::from(cipher.sector_size());
    position.is_multiple_of(sector) && (len as u64).is_multiple_of(sector)
}

/// The same, but whole encrypted sectors stay encrypted.
fn load<'b, P: Platform>(
    platform: &P,
    chunk: &Chunk,
    buf: &'b mut [u8],
    scratch: &mut Scratch<'_>,
    under: Option<&dyn BlockRead>,
    wanted: &impl Fn(&Extent) -> bool,
    mut batch: Batch<'b>,
) -> Outcome<()> {
    let mut decodes = Vec::new();
    let mut large = Vec::new();
    let mut rest = buf;
    for extent in &chunk.extents {
        let (part, tail) = core::mem::take(&mut rest).split_at_mut(extent.len as usize);
        rest = tail;
        if !wanted(extent) {
            continue;
        }
        match extent.kind {
            ExtentKind::Data { file, host } => {
                batch.push(extent.offset, Io::Read { file, offset: host, buf: part });
            }
            ExtentKind::Compressed(run) if is_large(&run) => large.push((extent.offset, part)),
            ExtentKind::Encrypted { file, host, position } => {
                let located = Fault::read(extent.offset);
                let cipher = cipher_of(platform, file).map_err(&located)?;
                if whole_sectors(&*cipher, position, part.len()) {
                    batch.push(extent.offset, Io::Read { file, offset: host, buf: part });
                } else {
                    let read = |offset: u64, buf: &mut [u8]| {
                        platform.submit(&mut [Io::Read { file, offset, buf }]).map_err(|failed| failed.error)
                    };
                    read_encrypted(&*cipher, host, position, part, read).map_err(&located)?;
                }
            }
            ExtentKind::Compressed(run) => decodes.push(Decode { run, disk_offset: extent.offset, out: part }),
            ExtentKind::Unallocated => {
                read_under(under, extent.offset, part).map_err(Fault::read(extent.offset))?;
            }
            ExtentKind::Zero { .. } => part.fill(0),
            _ => return Err(Fault::read(extent.offset)(ErrorKind::Unsupported.into())),
        }
    }
    let (reads, places) = plan_streams(platform, &decodes);
    let Scratch { source, decoder, streams, unit } = scratch;
    streams.resize(reads.last().map_or(0, |last| last.at + last.len as usize), 0);
    with_stream_reads(batch, &reads, streams).submit(platform)?;
    for (decode, place) in decodes.into_iter().zip(places) {
        let at = decode.disk_offset;
        decode_part(decoder, unit, decode, &streams[place]).map_err(Fault::read(at))?;
    }
    for (at, part) in large {
        let read = source.map_or(Err(ErrorKind::Unsupported.into()), |read| read(at, part));
        read.map_err(Fault::read(at))?;
    }
    Ok(())
}

fn is_large(run: &CompressedRun) -> bool {
    run.unit_len > LARGE_UNIT || run.stored_len > run.unit_len.saturating_mul(2).saturating_add(STREAM_SLACK)
}

/// Reads what `under` holds; zero behind its end.
pub(in crate::ops) fn read_under(under: Option<&dyn BlockRead>, offset: u64, part: &mut [u8]) -> Result<(), Error> {
    let present = under.map_or(0, |disk| disk.size().saturating_sub(offset)).min(part.len() as u64) as usize;
    let (head, past_end) = part.split_at_mut(present);
    past_end.fill(0);
    match under {
        Some(disk) if !head.is_empty() => disk.read_at(offset, head),
        _ => Ok(()),
    }
}

/// Joins neighbouring streams to few reads; also tells where in the read bytes each stream lies.
fn plan_streams<P: Platform>(platform: &P, decodes: &[Decode<'_>]) -> (Vec<StreamRead>, Vec<Range<usize>>) {
    let mut reads: Vec<StreamRead> = Vec::new();
    let mut places = Vec::with_capacity(decodes.len());
    for decode in decodes {
        let CompressedRun { file, host, stored_len, .. } = decode.run;
        let size = platform.files().get(file).map_or(0, |state| state.len());
        let len = u64::from(stored_len).min(size.saturating_sub(host));
        let joins = reads.last().is_some_and(|last| {
            last.file == file && host >= last.host && host <= last.host.saturating_add(last.len + MAX_GAP)
        });
        if !joins {
            let at = reads.last().map_or(0, |last| last.at + last.len as usize);
            reads.push(StreamRead { file, host, len: 0, at, disk_offset: decode.disk_offset });
        }
        if let Some(last) = reads.last_mut() {
            let skip = host - last.host;
            last.len = last.len.max(skip + len);
            let start = last.at + skip as usize;
            places.push(start..start + len as usize);
        }
    }
    (reads, places)
}

/// Adds one request for each joined read.
fn with_stream_reads<'s>(mut batch: Batch<'s>, reads: &[StreamRead], streams: &'s mut [u8]) -> Batch<'s> {
    let mut rest = streams;
    for read in reads.iter().filter(|read| read.len > 0) {
        let (part, tail) = core::mem::take(&mut rest).split_at_mut(read.len as usize);
        rest = tail;
        batch.push(read.disk_offset, Io::Read { file: read.file, offset: read.host, buf: part });
    }
    batch
}

/// Decodes a unit, straight to its place if the run covers it.
fn decode_part(decoder: &mut Decoder, unit: &mut Vec<u8>, decode: Decode<'_>, stored: &[u8]) -> Result<(), Error> {
    let Decode { run, disk_offset, out } = decode;
    let corrupt = |_| Error::new(ErrorKind::Corrupt).at(run.host);
    if disk_offset == run.unit_offset && out.len() == run.unit_len as usize {
        return decoder.decode(run.codec, stored, out).map_err(corrupt);
    }
    unit.resize(run.unit_len as usize, 0);
    let skip = disk_offset.wrapping_sub(run.unit_offset) as usize;
    match decoder.decode(run.codec, stored, unit) {
        // The last unit may end where the disk does.
        Err(instar_codec::Error::TooShort(len)) if len >= skip.saturating_add(out.len()) => {}
        other => other.map_err(corrupt)?,
    }
    let part = unit.get(skip..).and_then(|rest| rest.get(..out.len()));
    out.copy_from_slice(part.ok_or(Error::new(ErrorKind::Corrupt).at(run.host))?);
    Ok(())
}

/// Reads a chunk sector by sector; what can't be read becomes zero and is told to `lost` by its disk offset.
pub(in crate::ops) fn salvage(
    chunk: &Chunk,
    buf: &mut [u8],
    source: &dyn BlockRead,
    under: Option<&dyn BlockRead>,
    mut lost: impl FnMut(u64, Error),
) {
    let mut rest = buf;
    for extent in &chunk.extents {
        let (part, tail) = core::mem::take(&mut rest).split_at_mut(extent.len as usize);
        rest = tail;
        let mut at = extent.offset;
        for sector in part.chunks_mut(SECTOR) {
            let done = match extent.kind {
                ExtentKind::Zero { .. } => {
                    sector.fill(0);
                    Ok(())
                }
                ExtentKind::Unallocated => read_under(under, at, sector),
                _ => source.read_at(at, sector),
            };
            if let Err(error) = done {
                sector.fill(0);
                lost(at, error);
            }
            at += sector.len() as u64;
        }
    }
}
