//! What the images of all formats have in common: reading by way of the map.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;

use instar_blockio::{
    BlockMap, BlockRead, Codec, CompressedRun, Error, ErrorKind, Extent, ExtentKind, FileId, Result, SectorCipher,
    check_range, read_encrypted, zeroed,
};
use instar_codec::Decoder;

use crate::store::{Store, read_padded};

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Tables and data behind the end of the file are an error; otherwise they read as zero, as in QEMU.
    pub strict: bool,
}

/// How a format finds the bytes of a disk.
pub trait Map {
    /// Bytes of the disk, a multiple of 512.
    fn size(&self) -> u64;

    /// The run at `offset`, which lies inside the disk: its length, `1..=max_len`, and what it is.
    ///
    /// # Errors
    /// An entry that can't be, or the file's error.
    fn run<D: BlockRead>(&self, store: &Store<D>, offset: u64, max_len: u64) -> Result<(u64, Run)>;
}

/// What a run of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Bytes at this offset of the file.
    Data(u64),
    /// Zero, whatever a backing image holds.
    Zero,
    /// Left to the backing image; zero without one.
    Unallocated,
    /// A part of a compressed unit.
    Packed(Packed),
}

/// A compressed unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Offset of the stream in the file.
    pub host: u64,
    /// Bytes of the stream.
    pub stored_len: u32,
    /// Disk offset of the unit.
    pub unit_offset: u64,
    /// Bytes of the unit.
    pub unit_len: u32,
    /// How it is compressed.
    pub codec: Codec,
}

/// An opened image of the format that `F` describes. See the module of each format for how to open one.
///
/// It reads through [`BlockRead`], unallocated parts as zero, and says through [`BlockMap`] where the bytes lie.
pub struct Image<D, F> {
    pub(crate) store: Store<D>,
    pub(crate) format: F,
    pub(crate) id: FileId,
    /// Decrypts what lies plain in the file; positions are offsets of the disk.
    pub(crate) cipher: Option<Arc<dyn SectorCipher>>,
    unpacked: RefCell<Unpacked>,
}

/// The unit that was decoded last.
#[derive(Default)]
pub struct Unpacked {
    decoder: Decoder,
    unit: Option<Packed>,
    bytes: Vec<u8>,
}

impl<D, F> Image<D, F> {
    pub(crate) fn new(store: Store<D>, format: F, id: FileId) -> Self {
        Self { store, format, id, cipher: None, unpacked: RefCell::default() }
    }

    /// Gives the file back.
    pub fn into_file(self) -> D {
        self.store.into_file()
    }
}

impl<D, F: fmt::Debug> fmt::Debug for Image<D, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("format", &self.format).field("id", &self.id).finish_non_exhaustive()
    }
}

impl<D: BlockRead, F: Map> BlockRead for Image<D, F> {
    fn size(&self) -> u64 {
        self.format.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let cipher = self.cipher.as_deref();
        read(&self.store, &self.format, cipher, &mut self.unpacked.borrow_mut(), offset, buf)
    }
}

impl<D: BlockRead, F: Map> BlockMap for Image<D, F> {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let found = extent(&self.store, &self.format, self.id, offset, max_len)?;
        let kind = match (found.kind, &self.cipher) {
            (ExtentKind::Data { file, host }, Some(_)) => ExtentKind::Encrypted { file, host, position: offset },
            (kind, _) => kind,
        };
        Ok(Extent { kind, ..found })
    }
}

/// [`BlockMap::extent_at`] for images and writers.
pub fn extent<D: BlockRead, F: Map>(
    store: &Store<D>,
    format: &F,
    file: FileId,
    offset: u64,
    max_len: u64,
) -> Result<Extent> {
    if max_len == 0 {
        return Err(Error::new(ErrorKind::InvalidInput).at(offset));
    }
    check_range(format.size(), offset, 1)?;
    let (len, run) = checked_run(store, format, offset, max_len.min(format.size() - offset))?;
    let kind = match run {
        Run::Data(host) => ExtentKind::Data { file, host },
        Run::Zero => ExtentKind::Zero { host: None },
        Run::Unallocated => ExtentKind::Unallocated,
        Run::Packed(Packed { host, stored_len, unit_offset, unit_len, codec }) => {
            ExtentKind::Compressed(CompressedRun { file, host, stored_len, unit_offset, unit_len, codec })
        }
    };
    Ok(Extent { offset, len, depth: 0, kind })
}

/// A run whose place in the file is one.
fn checked_run<D: BlockRead, F: Map>(store: &Store<D>, format: &F, offset: u64, max_len: u64) -> Result<(u64, Run)> {
    let (len, run) = format.run(store, offset, max_len)?;
    let place = match run {
        Run::Data(host) => Some((host, len)),
        Run::Packed(packed) => Some((packed.host, packed.stored_len.into())),
        Run::Zero | Run::Unallocated => None,
    };
    if let Some((host, len)) = place {
        let end = host.checked_add(len).filter(|&end| i64::try_from(end).is_ok());
        let limit = if store.is_strict() { store.file().size() } else { u64::MAX };
        if end.is_none_or(|end| end > limit) {
            return Err(Error::new(ErrorKind::Corrupt).at(offset));
        }
    }
    Ok((len, run))
}

/// [`BlockRead::read_at`] for images and writers.
pub fn read<D: BlockRead, F: Map>(
    store: &Store<D>,
    format: &F,
    cipher: Option<&dyn SectorCipher>,
    unpacked: &mut Unpacked,
    offset: u64,
    buf: &mut [u8],
) -> Result<()> {
    check_range(format.size(), offset, buf.len() as u64)?;
    let (mut at, mut rest) = (offset, buf);
    while !rest.is_empty() {
        let (len, run) = checked_run(store, format, at, rest.len() as u64)?;
        let (now, later) = rest.split_at_mut(usize::try_from(len).unwrap_or(usize::MAX).min(rest.len()));
        match run {
            Run::Data(host) => match cipher {
                Some(cipher) => {
                    read_encrypted(cipher, host, at, now, |host, buf| read_padded(store.file(), host, buf))?
                }
                None => read_padded(store.file(), host, now)?,
            },
            Run::Zero | Run::Unallocated => now.fill(0),
            Run::Packed(packed) => {
                let unit = unpacked.unpack(store.file(), &packed)?;
                let skip = usize::try_from(at.saturating_sub(packed.unit_offset)).unwrap_or(usize::MAX);
                let part = unit.get(skip..).and_then(|rest| rest.get(..now.len()));
                now.copy_from_slice(part.ok_or(Error::new(ErrorKind::Corrupt).at(at))?);
            }
        }
        at += now.len() as u64;
        rest = later;
    }
    Ok(())
}

impl Unpacked {
    /// The contents of a unit.
    pub fn unpack<D: BlockRead>(&mut self, file: &D, packed: &Packed) -> Result<&[u8]> {
        if self.unit.as_ref() != Some(packed) {
            self.unit = None;
            // The old unit goes before the new one comes: units may be large.
            self.bytes = Vec::new();
            let inside = file.size().saturating_sub(packed.host).min(packed.stored_len.into()) as usize;
            let mut stream = zeroed(inside)?;
            if inside > 0 {
                file.read_at(packed.host, &mut stream)?;
            }
            self.bytes = zeroed(packed.unit_len as usize)?;
            let decoded = self.decoder.decode(packed.codec, &stream, &mut self.bytes);
            decoded.map_err(|_| Error::new(ErrorKind::Corrupt).at(packed.unit_offset))?;
            self.unit = Some(*packed);
        }
        Ok(&self.bytes)
    }

    /// Forgets the unit: it may have been written.
    pub fn forget(&mut self) {
        self.unit = None;
    }
}

/// How many units of a table of places lie one behind the other in the file: `next(i)` is the place of unit `i` behind the first.
///
/// # Errors
/// Those of `next`.
pub fn consecutive(first: u64, unit: u64, count: u64, mut next: impl FnMut(u64) -> Result<Option<u64>>) -> Result<u64> {
    /// More are not looked at in one go.
    const MOST: u64 = 8192;
    let mut run = 1;
    while run < count.min(MOST) && next(run)? == unit.checked_mul(run).and_then(|skip| first.checked_add(skip)) {
        run += 1;
    }
    Ok(run)
}

/// The part of a run of `units` whole units that begins `skip` bytes into the first, at most `max_len` bytes.
pub fn run_len(units: u64, unit: u64, skip: u64, max_len: u64) -> u64 {
    units.saturating_mul(unit).saturating_sub(skip).min(max_len)
}
