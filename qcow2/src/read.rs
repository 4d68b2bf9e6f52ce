//! Reading the disk: built on the map.

use alloc::vec::Vec;

use instar_blockio::{
    BlockRead, CompressedRun, Error as BlockError, ErrorKind, ExtentKind, FileId, Result as BlockResult, check_range,
    read_encrypted, zeroed,
};
use instar_codec::Decoder;

use crate::addr::HostOffset;
use crate::error::{Corruption, Error, Result};
use crate::open::Image;

/// Decompresses, and keeps the last cluster: a reader of small pieces needs it again.
#[derive(Default)]
pub(crate) struct Unpacker {
    decoder: Option<Decoder>,
    unit: Option<(u64, Vec<u8>)>,
}

impl core::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Unpacker").field("unit", &self.unit.as_ref().map(|(offset, _)| offset)).finish()
    }
}

impl Unpacker {
    fn decode(&mut self, run: &CompressedRun, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let decoder = self.decoder.get_or_insert_with(Decoder::new);
        decoder.decode(run.codec, stored, out).map_err(|_| Error::Corrupt {
            offset: run.unit_offset,
            cause: Corruption::Compressed(HostOffset(run.host)),
        })
    }
}

impl<D: BlockRead> Image<D> {
    /// Forgets the cluster that was decompressed last.
    pub(crate) fn forget_unit(&mut self) {
        self.unpacker.get_mut().unit = None;
    }

    fn file_of(&self, id: FileId) -> BlockResult<&D> {
        match &self.data_file {
            Some((file, data_id)) if self.needs_data_file() && *data_id == id => Ok(file),
            _ if id == self.id => Ok(self.pages.file()),
            _ => Err(ErrorKind::InvalidInput.into()),
        }
    }

    fn read_data(&self, id: FileId, host: u64, buf: &mut [u8]) -> BlockResult<()> {
        let file = self.file_of(id)?;
        let have = file.size().saturating_sub(host).min(buf.len() as u64) as usize;
        let (inside, behind) = buf.split_at_mut(have);
        behind.fill(0);
        if inside.is_empty() { Ok(()) } else { file.read_at(host, inside) }
    }

    /// Reads from `skip` inside a compressed unit.
    fn read_unit(&self, run: &CompressedRun, skip: usize, buf: &mut [u8]) -> Result<()> {
        let mut unpacker = self.unpacker.borrow_mut();
        let kept = unpacker.unit.as_ref().filter(|(offset, _)| *offset == run.unit_offset);
        if let Some(part) = kept.and_then(|(_, bytes)| bytes.get(skip..)?.get(..buf.len())) {
            buf.copy_from_slice(part);
            return Ok(());
        }
        let mut stored = zeroed(run.stored_len as usize)?;
        self.pages.file().read_at(run.host, &mut stored)?;
        if skip == 0 && buf.len() == run.unit_len as usize {
            return unpacker.decode(run, &stored, buf);
        }
        let mut unit = match unpacker.unit.take() {
            Some((_, unit)) => unit,
            None => zeroed(run.unit_len as usize)?,
        };
        unpacker.decode(run, &stored, &mut unit)?;
        let end = skip.saturating_add(buf.len());
        let part = unit.get(skip..end).ok_or(BlockError::new(ErrorKind::OutOfBounds).at(run.unit_offset))?;
        buf.copy_from_slice(part);
        unpacker.unit = Some((run.unit_offset, unit));
        Ok(())
    }
}

impl<D: BlockRead> BlockRead for Image<D> {
    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        check_range(self.size(), offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let extent = self.locate(at, rest.len() as u64)?;
            let (now, later) = rest.split_at_mut(extent.len as usize);
            match extent.kind {
                ExtentKind::Data { file, host } => self.read_data(file, host, now)?,
                ExtentKind::Encrypted { file, host, position } => {
                    let cipher = self.cipher.as_deref().ok_or(Error::Encrypted(at))?;
                    read_encrypted(cipher, host, position, now, |host, buf| self.read_data(file, host, buf))?;
                }
                ExtentKind::Compressed(run) => self.read_unit(&run, (at - run.unit_offset) as usize, now)?,
                _ => now.fill(0),
            }
            (at, rest) = (at + extent.len, later);
        }
        Ok(())
    }
}
