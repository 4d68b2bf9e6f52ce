//! An opened image: its descriptor and its extents.

use alloc::vec::Vec;
use core::cell::RefCell;

use instar_blockio::{
    BlockMap, BlockRead, CompressedRun, Error as BlockError, ErrorKind, Extent, ExtentKind, FileId,
    Result as BlockResult, check_range, zeroed,
};
use instar_codec::{Decoder, Error as CodecError};

use crate::descriptor::{Descriptor, ExtentLine, ExtentType, MAX_LEN, NO_PARENT};
use crate::error::{Error, Result};
use crate::format::{COWD_MAGIC, Fields, HOSTED_MAGIC, SECTOR};
use crate::pages::Pages;
use crate::sparse::{Geometry, read_geometry, read_se_sparse};

/// Bytes of tables kept for each file, at least two pages of 64 KiB.
const CACHE: usize = 1 << 20;
/// The types of images whose extents are looked at.
const TYPES: [&[u8]; 7] = [
    b"monolithicFlat",
    b"twoGbMaxExtentFlat",
    b"twoGbMaxExtentSparse",
    b"vmfs",
    b"vmfsSparse",
    b"vmfsThin",
    b"seSparse",
];

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Tables and data behind the end of a file are an error; otherwise they read as zero, or as not allocated.
    pub strict: bool,
}

/// A VMDK image.
#[derive(Debug)]
pub struct Image<D> {
    descriptor: Descriptor,
    parts: Vec<Part<D>>,
    size: u64,
    strict: bool,
    /// The image is the one sparse extent in its file.
    monolithic: bool,
    unpacker: RefCell<Unpacker>,
}

/// A part of the disk.
#[derive(Debug)]
struct Part<D> {
    start: u64,
    len: u64,
    line: Option<ExtentLine>,
    medium: Medium<D>,
}

#[derive(Debug)]
enum Medium<D> {
    /// Its file was not attached yet.
    Missing,
    Zero,
    Flat {
        file: D,
        id: FileId,
        base: u64,
    },
    Sparse {
        pages: Pages<D>,
        id: FileId,
        geometry: Geometry,
    },
}

/// An extent, as `info` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentInfo<'a> {
    /// What the descriptor says of it; `None` for the only extent of a file.
    pub line: Option<&'a ExtentLine>,
    /// Its file, if it has one that was attached.
    pub file: Option<FileId>,
    /// Bytes of the disk.
    pub len: u64,
    /// Bytes of a grain; `None` where there are no grains.
    pub grain: Option<u64>,
    /// Grains are compressed.
    pub compressed: bool,
}

impl<D: BlockRead> Image<D> {
    /// Opens the file that the user named. Extents in further files are to be [attached](Self::attach) before anything is read.
    ///
    /// # Errors
    /// Why not; see [`Error`].
    pub fn open(file: D, id: FileId, options: &OpenOptions) -> Result<Self> {
        let pages = Pages::new(file, CACHE);
        let head = pages.read_vec(0, SECTOR as usize)?;
        match Fields(&head).u32(0) {
            HOSTED_MAGIC | COWD_MAGIC => Self::open_sparse(pages, id, options),
            _ => Self::open_text(&pages, options),
        }
    }

    fn open_sparse(pages: Pages<D>, id: FileId, options: &OpenOptions) -> Result<Self> {
        let geometry = read_geometry(&pages)?;
        let mut descriptor = match geometry.descriptor {
            Some((at, len)) => {
                let text = pages.read_vec(at, len.min(MAX_LEN) as usize)?;
                // A part of a larger image: alone it is no disk.
                if !text.windows(4).any(|window| window == b"CID=") {
                    return Err(Error::NoContentId);
                }
                match Descriptor::parse(&text) {
                    // A part of a larger image has no descriptor, and only the parent's name is needed of one.
                    Err(Error::InvalidDescriptor) => unknown(),
                    Err(error @ Error::TooManyExtents(_)) => return Err(error),
                    Err(_) => Descriptor::parse(&without_extents(&text)).unwrap_or_else(|_| unknown()),
                    Ok(found) => found,
                }
            }
            None => unknown(),
        };
        if geometry.capacity == 0 && descriptor.extents.iter().any(|line| line.len > 0) {
            // The descriptor of an image in several files, hidden in a sparse file without contents.
            return Self::of_descriptor(descriptor, options);
        }
        if geometry.compressed {
            descriptor.create_type = b"streamOptimized".to_vec();
        }
        descriptor.extents = Vec::new();
        let size = geometry.capacity;
        let part = Part { start: 0, len: size, line: None, medium: Medium::Sparse { pages, id, geometry } };
        Ok(Self {
            descriptor,
            parts: Vec::from([part]),
            size,
            strict: options.strict,
            monolithic: true,
            unpacker: RefCell::default(),
        })
    }

    fn open_text(pages: &Pages<D>, options: &OpenOptions) -> Result<Self> {
        let len = pages.file().size();
        if len < 4 {
            return Err(Error::NotVmdk);
        }
        let text = pages.read_vec(0, len.min(MAX_LEN) as usize)?;
        let descriptor = Descriptor::parse(&text).map_err(|error| {
            // Images of devices have extents of their own types: what is wrong is the type of the image.
            match Descriptor::parse(&without_extents(&text)) {
                Ok(known) if !is_known(&known.create_type) => Error::UnsupportedType(known.create_type),
                _ => error,
            }
        })?;
        Self::of_descriptor(descriptor, options)
    }

    fn of_descriptor(descriptor: Descriptor, options: &OpenOptions) -> Result<Self> {
        if !is_known(&descriptor.create_type) {
            return Err(Error::UnsupportedType(descriptor.create_type));
        }
        // A disk of no bytes has none.
        if descriptor.extents.is_empty() && descriptor.cylinders != Some(0) {
            return Err(Error::InvalidDescriptor);
        }
        let mut size = 0u64;
        let mut parts = Vec::new();
        for line in &descriptor.extents {
            let medium = if line.kind == ExtentType::Zero { Medium::Zero } else { Medium::Missing };
            parts.push(Part { start: size, len: line.len, line: Some(line.clone()), medium });
            size = size.checked_add(line.len).ok_or(Error::SizeOverflow)?;
        }
        let unpacker = RefCell::default();
        Ok(Self { descriptor, parts, size, strict: options.strict, monolithic: false, unpacker })
    }

    /// What the descriptor says.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Bytes of the disk.
    pub fn virtual_size(&self) -> u64 {
        self.size
    }

    /// The name of the parent, if the image has one.
    pub fn parent_name(&self) -> Option<&[u8]> {
        self.descriptor.parent_name.as_deref()
    }

    /// Does `cid` belong to the parent that this image was made on, in the state that it had?
    pub fn is_child_of(&self, cid: u32) -> bool {
        self.descriptor.parent_cid == cid
    }

    /// Bytes of a grain of the first sparse extent.
    pub fn grain_size(&self) -> Option<u64> {
        self.extents_info().find_map(|extent| extent.grain)
    }

    /// The next extent whose file is to be attached, with its number.
    pub fn wanted(&self) -> Option<(usize, &ExtentLine)> {
        let at = self.parts.iter().position(|part| matches!(part.medium, Medium::Missing))?;
        Some((at, self.parts[at].line.as_ref()?))
    }

    /// Gives the file of an extent that is [wanted](Self::wanted).
    ///
    /// # Errors
    /// The file is no such extent.
    ///
    /// # Panics
    /// Never; a number that is not wanted is ignored.
    pub fn attach(&mut self, number: usize, file: D, id: FileId) -> Result<()> {
        let Some(part) = self.parts.get_mut(number) else { return Ok(()) };
        let Some(line) = &part.line else { return Ok(()) };
        part.medium = match line.kind {
            ExtentType::Zero => Medium::Zero,
            ExtentType::Flat | ExtentType::Vmfs => Medium::Flat { file, id, base: line.offset },
            kind => {
                let pages = Pages::new(file, CACHE / 8);
                let geometry = match kind {
                    ExtentType::SeSparse => read_se_sparse(&pages)?,
                    _ => read_geometry(&pages)?,
                };
                Medium::Sparse { pages, id, geometry }
            }
        };
        Ok(())
    }

    /// The extents, in order.
    pub fn extents_info(&self) -> impl Iterator<Item = ExtentInfo<'_>> {
        self.parts.iter().map(|part| {
            let (file, geometry) = match &part.medium {
                Medium::Flat { id, .. } => (Some(*id), None),
                Medium::Sparse { id, geometry, .. } => (Some(*id), Some(geometry)),
                _ => (None, None),
            };
            ExtentInfo {
                line: part.line.as_ref(),
                file,
                len: part.len,
                grain: geometry.map(|geometry| geometry.grain),
                compressed: geometry.is_some_and(|geometry| geometry.compressed),
            }
        })
    }

    pub(crate) fn geometries(&self) -> impl Iterator<Item = (&Pages<D>, &Geometry, u64)> {
        self.parts.iter().filter_map(|part| match &part.medium {
            Medium::Sparse { pages, geometry, .. } => Some((pages, geometry, part.len)),
            _ => None,
        })
    }

    pub(crate) fn is_monolithic(&self) -> bool {
        self.monolithic
    }

    fn locate(&self, offset: u64, max: u64) -> BlockResult<Extent> {
        if offset >= self.size {
            return Err(BlockError::new(ErrorKind::OutOfBounds).at(offset));
        }
        if max == 0 {
            return Err(ErrorKind::InvalidInput.into());
        }
        // The last part that begins there or before; empty parts begin where the next one does.
        let part = &self.parts[self.parts.partition_point(|part| part.start <= offset) - 1];
        let skip = offset - part.start;
        let left = max.min(part.len - skip);
        let (len, mut kind) = match &part.medium {
            Medium::Missing => return Err(BlockError::new(ErrorKind::InvalidInput).at(offset)),
            Medium::Zero => (left, ExtentKind::Zero { host: None }),
            Medium::Flat { file, id, base } => {
                if self.strict && base.saturating_add(part.len) > file.size() {
                    return Err(BlockError::new(ErrorKind::Corrupt).at(offset));
                }
                // An extent may be longer than its file: there is nothing to be looked for behind the end.
                let host = base.checked_add(skip).ok_or(BlockError::new(ErrorKind::Corrupt).at(offset))?;
                match file.size().checked_sub(host) {
                    None | Some(0) => (left, ExtentKind::Zero { host: None }),
                    Some(there) => (left.min(there), ExtentKind::Data { file: *id, host }),
                }
            }
            Medium::Sparse { geometry, .. } if skip >= geometry.capacity => {
                return Err(BlockError::new(ErrorKind::Corrupt).at(offset));
            }
            Medium::Sparse { pages, id, geometry } => {
                geometry.locate(pages, *id, skip, left.min(geometry.capacity - skip), self.strict)?
            }
        };
        if let ExtentKind::Compressed(run) = &mut kind {
            run.unit_offset += part.start;
        }
        Ok(Extent { offset, len, depth: 0, kind })
    }

    fn file_of(&self, wanted: FileId) -> BlockResult<&D> {
        let found = self.parts.iter().find_map(|part| match &part.medium {
            Medium::Flat { file, id, .. } if *id == wanted => Some(file),
            Medium::Sparse { pages, id, .. } if *id == wanted => Some(pages.file()),
            _ => None,
        });
        found.ok_or(ErrorKind::InvalidInput.into())
    }

    fn read_data(&self, id: FileId, host: u64, buf: &mut [u8]) -> BlockResult<()> {
        let file = self.file_of(id)?;
        let have = file.size().saturating_sub(host).min(buf.len() as u64) as usize;
        let (inside, behind) = buf.split_at_mut(have);
        behind.fill(0);
        if inside.is_empty() { Ok(()) } else { file.read_at(host, inside) }
    }

    /// Reads from `skip` inside a compressed grain.
    fn read_unit(&self, run: &CompressedRun, skip: usize, buf: &mut [u8]) -> BlockResult<()> {
        let mut unpacker = self.unpacker.borrow_mut();
        let end = skip.saturating_add(buf.len());
        if unpacker.unit_offset != Some(run.unit_offset) {
            unpacker.unit_offset = None;
            let mut stored = zeroed(run.stored_len as usize)?;
            self.file_of(run.file)?.read_at(run.host, &mut stored)?;
            let mut unit = core::mem::take(&mut unpacker.unit);
            unit.resize(run.unit_len as usize, 0);
            match unpacker.decoder.decode(run.codec, &stored, &mut unit) {
                Ok(()) => unpacker.unit_offset = Some(run.unit_offset),
                // The last grain may end where the disk does.
                Err(CodecError::TooShort(len)) if len >= end => {}
                Err(_) => return Err(BlockError::new(ErrorKind::Corrupt).at(run.host)),
            }
            unpacker.unit = unit;
        }
        let part = unpacker.unit.get(skip..end).ok_or(BlockError::new(ErrorKind::OutOfBounds).at(run.unit_offset))?;
        buf.copy_from_slice(part);
        Ok(())
    }
}

/// Is it a type of image whose extents are looked at?
fn is_known(create_type: &[u8]) -> bool {
    TYPES.contains(&create_type)
}

/// What is known of an extent without a descriptor.
fn unknown() -> Descriptor {
    Descriptor {
        cid: 0,
        parent_cid: NO_PARENT,
        create_type: b"monolithicSparse".to_vec(),
        parent_name: None,
        extents: Vec::new(),
        cylinders: None,
    }
}

/// The text with all lines that might be about extents made comments: a single file needs none of them.
fn without_extents(text: &[u8]) -> Vec<u8> {
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    let mut out = Vec::with_capacity(end);
    for line in text[..end].split(|&byte| byte == b'\n' || byte == b'\r') {
        if line.contains(&b'=') {
            out.extend_from_slice(line);
            out.push(b'\n');
        }
    }
    out
}

/// Decompresses, and keeps the last grain: a reader of small pieces needs it again.
#[derive(Debug, Default)]
struct Unpacker {
    decoder: Decoder,
    unit: Vec<u8>,
    unit_offset: Option<u64>,
}

impl<D: BlockRead> BlockRead for Image<D> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let extent = self.locate(at, rest.len() as u64)?;
            let (now, later) = rest.split_at_mut(extent.len as usize);
            match extent.kind {
                ExtentKind::Data { file, host } => self.read_data(file, host, now)?,
                ExtentKind::Compressed(run) => self.read_unit(&run, (at - run.unit_offset) as usize, now)?,
                _ => now.fill(0),
            }
            (at, rest) = (at + extent.len, later);
        }
        Ok(())
    }
}

impl<D: BlockRead> BlockMap for Image<D> {
    fn extent_at(&self, offset: u64, max_len: u64) -> BlockResult<Extent> {
        self.locate(offset, max_len)
    }
}
