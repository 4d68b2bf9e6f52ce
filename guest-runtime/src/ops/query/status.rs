//! What a disk holds at an offset, as QEMU's block status tells it.

use alloc::vec::Vec;

use instar_blockio::{BlockMap, Error, ErrorKind, Extent, ExtentKind, FileId, Result};
use instar_guest_protocol::message::{Failure, Format, Source};

use crate::chain::{ChainLayer, open_layers};
use crate::formats::run_in_file;
use crate::platform::Platform;

/// A disk with its chain.
pub(super) struct Disk<P: Platform> {
    platform: P,
    layers: Vec<ChainLayer>,
}

/// A run of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    /// Bytes.
    pub len: u64,
    /// Which image of the chain answers.
    pub depth: u32,
    /// That image has something to say.
    pub present: bool,
    /// It reads as zero.
    pub zero: bool,
    /// It is stored.
    pub data: bool,
    /// It is stored compressed.
    pub compressed: bool,
    /// Where it is stored as it is.
    pub place: Option<(FileId, u64)>,
    /// How to read it.
    pub kind: ExtentKind,
}

/// What QEMU's block status says of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flags {
    /// An image of the chain has something to say.
    pub allocated: bool,
    /// It is stored.
    pub data: bool,
    /// It reads as zero.
    pub zero: bool,
    /// It is stored compressed.
    pub compressed: bool,
    /// Its place in a file is known.
    pub placed: bool,
    /// It reaches the end of the disk.
    pub at_end: bool,
}

impl Flags {
    fn of(status: &Status) -> Self {
        let Status { present, zero, data, compressed, place, .. } = *status;
        Self { allocated: present, data, zero, compressed, placed: place.is_some(), at_end: false }
    }
}

/// One answer of QEMU's block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub flags: Flags,
    /// Bytes.
    pub len: u64,
    /// For so many bytes the same would be said, in several answers.
    pub reach: u64,
    /// Answers end at multiples of this, if not earlier.
    pub unit: u64,
}

/// Formats whose driver in QEMU does not tell what is allocated: all of it is data, at no known place.
fn tells_nothing(format: Format) -> bool {
    matches!(format, Format::Vhdx | Format::Dmg | Format::Bochs | Format::Cloop)
}

/// Formats in which what is not allocated is zero by itself, not for a backing image to answer.
fn has_no_backing(format: Format) -> bool {
    matches!(format, Format::Vpc | Format::Vdi | Format::Raw | Format::File | Format::Luks)
}

/// Formats of which some or all may lie flat in a file.
fn has_flat_parts(format: Format) -> bool {
    matches!(format, Format::Vmdk | Format::Vpc | Format::Vdi)
}

impl<P: Platform> Disk<P> {
    /// Opens an image with everything below it.
    pub fn open(platform: &P, source: &Source) -> core::result::Result<Self, Failure> {
        let layers = open_layers(platform, source)?;
        Ok(Self { platform: platform.clone(), layers })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, |top| top.disk.size())
    }

    /// Format of the image itself.
    pub fn format(&self) -> Format {
        self.layers.first().map_or(Format::Raw, |top| top.format)
    }

    /// The run at `offset`, which lies inside the disk: 1 to `max_len` bytes.
    ///
    /// # Errors
    /// Tables that can't be read.
    pub fn status_at(&self, offset: u64, max_len: u64) -> Result<Status> {
        let mut max_len = max_len.min(self.size().saturating_sub(offset));
        let nothing = |depth: u32, len: u64| Status {
            len,
            depth,
            present: false,
            zero: true,
            data: false,
            compressed: false,
            place: None,
            kind: ExtentKind::Unallocated,
        };
        let mut answer = nothing(0, max_len);
        for (depth, layer) in (0..).zip(&self.layers) {
            let left = layer.disk.size().saturating_sub(offset);
            if left == 0 {
                // Behind the end of a shorter image the one above it answers.
                return Ok(answer);
            }
            max_len = max_len.min(left);
            let extent = layer.disk.extent_at(offset, max_len)?;
            let extent = extent.clip(offset, max_len).filter(|extent| extent.offset == offset);
            let extent = extent.ok_or(Error::new(ErrorKind::Corrupt).at(offset))?;
            max_len = extent.len;
            answer = Status { len: extent.len, ..nothing(depth, max_len) };
            if let Some(status) = self.of_extent(layer, &extent, depth)? {
                return Ok(status);
            }
            let (len, place) = layer.disk.kept_at(offset, max_len)?;
            max_len = len.clamp(1, max_len);
            answer = Status { len: max_len, place, ..answer };
        }
        Ok(answer)
    }

    /// The run at `offset` as one call of QEMU's block status tells it, which does not join what its drivers answer one by one, and
    /// what is said of it if it reaches the end of the disk.
    ///
    /// # Errors
    /// As [`status_at`](Self::status_at).
    pub fn answer_at(&self, offset: u64) -> Result<Answer> {
        let size = self.size();
        let mut len = size.saturating_sub(offset);
        let (mut flags, mut reach, mut unit) = (Flags::default(), len, 1);
        for (depth, layer) in (0..).zip(&self.layers) {
            let inside = layer.disk.size().saturating_sub(offset).min(len);
            if inside == 0 {
                // Zeroes behind the end of a shorter image count as its own.
                flags = Flags { allocated: true, zero: true, ..Flags::default() };
                break;
            }
            let (first, joined) = self.answer_of(layer, depth, offset, inside)?;
            (flags, len) = (Flags::of(&first), joined);
            reach = reach.min(first.len);
            unit = unit.max(layer.status_unit.unwrap_or(1));
            if flags.allocated {
                break;
            }
        }
        let flags = Flags { at_end: offset.saturating_add(len) == size, ..flags };
        Ok(Answer { flags, len, reach, unit })
    }

    /// The run at `offset` of one layer, and for how long the driver goes on with the same answer, both at most `max_len` bytes.
    fn answer_of(&self, layer: &ChainLayer, depth: u32, offset: u64, max_len: u64) -> Result<(Status, u64)> {
        let first = self.of_layer(layer, depth, offset, max_len)?;
        if tells_nothing(layer.format) && first.present {
            return Ok((first, max_len));
        }
        let unit = layer.status_unit.unwrap_or(u64::MAX);
        let limit = max_len.min(unit - offset % unit);
        let mut len = first.len.min(limit);
        while len < limit && !first.compressed {
            let next = self.of_layer(layer, depth, offset + len, limit - len)?;
            let place = first.place.map(|(file, at)| (file, at.saturating_add(len)));
            if Flags::of(&next) != Flags::of(&first) || next.place != place {
                break;
            }
            len += next.len;
        }
        Ok((first, len))
    }

    /// What one layer says, whatever lies below.
    fn of_layer(&self, layer: &ChainLayer, depth: u32, offset: u64, max_len: u64) -> Result<Status> {
        let extent = layer.disk.extent_at(offset, max_len)?;
        let extent = extent.clip(offset, max_len).filter(|extent| extent.offset == offset);
        let extent = extent.ok_or(Error::new(ErrorKind::Corrupt).at(offset))?;
        if let Some(status) = self.of_extent(layer, &extent, depth)? {
            return Ok(status);
        }
        let (len, place) = layer.disk.kept_at(offset, extent.len)?;
        let below = self.layers.get(depth as usize + 1).map_or(0, |below| below.disk.size());
        Ok(Status {
            len: len.clamp(1, extent.len),
            depth,
            present: false,
            zero: offset >= below,
            data: false,
            compressed: false,
            place,
            kind: ExtentKind::Unallocated,
        })
    }

    /// Reads, for units that are too large to be taken apart anew for each piece of them. The range lies inside the disk.
    ///
    /// # Errors
    /// Contents that can't be read.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            let status = self.status_at(at, (buf.len() - done) as u64)?;
            let end = done + (status.len as usize).min(buf.len() - done);
            let part = &mut buf[done..end];
            match self.layers.get(status.depth as usize) {
                Some(layer)
                    if status.data && !matches!(status.kind, ExtentKind::Zero { .. } | ExtentKind::Unallocated) =>
                {
                    layer.disk.read_at(at, part)?;
                }
                _ => part.fill(0),
            }
            done = end;
        }
        Ok(())
    }

    /// What the extent of a layer says; `None` if the next layer is to be asked.
    fn of_extent(&self, layer: &ChainLayer, extent: &Extent, depth: u32) -> Result<Option<Status>> {
        let status = Status {
            len: extent.len,
            depth,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            place: None,
            kind: extent.kind,
        };
        if tells_nothing(layer.format) {
            return Ok(match extent.kind {
                ExtentKind::Unallocated if (depth as usize) + 1 < self.layers.len() => None,
                ExtentKind::Unallocated => Some(Status { kind: ExtentKind::Zero { host: None }, ..status }),
                _ => Some(status),
            });
        }
        let raw = matches!(layer.format, Format::Raw | Format::File);
        Ok(Some(match extent.kind {
            ExtentKind::Data { file, host } if layer.holes_in_data => self.in_file(status, file, host)?,
            ExtentKind::Data { file, host } => Status { place: Some((file, host)), ..status },
            ExtentKind::Zero { .. } if raw => {
                Status { zero: true, data: false, place: Some((layer.file, extent.offset)), ..status }
            }
            // Stored flat, in a hole of the file.
            ExtentKind::Zero { host: Some(place) } if has_flat_parts(layer.format) => {
                Status { zero: true, place: Some(place), ..status }
            }
            ExtentKind::Zero { host } => Status { zero: true, data: false, place: host, ..status },
            ExtentKind::Compressed(_) => Status { compressed: true, ..status },
            // The bytes of the file are not those of the disk, so no place is told.
            ExtentKind::Encrypted { .. } => status,
            ExtentKind::Unallocated if has_no_backing(layer.format) => Status { zero: true, data: false, ..status },
            ExtentKind::Unallocated => return Ok(None),
            _ => status,
        }))
    }

    /// Data of the image, which may lie in a hole of its file.
    fn in_file(&self, status: Status, file: FileId, host: u64) -> Result<Status> {
        let placed = Status { place: Some((file, host)), ..status };
        let run = run_in_file(&self.platform, file, host, status.len)?;
        let (len, zero) = run.unwrap_or((status.len, true));
        Ok(Status { len, zero, ..placed })
    }
}
