use alloc::boxed::Box;
use alloc::sync::Arc;

use instar_blockio::{BlockRead, SectorCipher};

use crate::cipher::CipherSpec;
use crate::error::{Error, Result};
use crate::format::{HEADER_LEN, MAGIC};
use crate::header::Header;
use crate::limits::Limits;
use crate::luks2::Header2;

/// A volume of either version, not yet opened by a passphrase.
#[derive(Debug)]
pub enum Volume {
    /// Version 1.
    V1(Box<Header>),
    /// Version 2.
    V2(Header2),
}

/// Where the encrypted contents of a volume lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Where they begin in the volume, bytes.
    pub offset: u64,
    /// How long they are; `None`: up to the end of the file.
    pub len: Option<u64>,
    /// Position of the first sector for the [cipher](SectorCipher), bytes.
    pub position: u64,
    /// Bytes of a sector.
    pub sector_size: u32,
}

impl Volume {
    /// Reads and judges the header at `at` (bytes) on `disk`. `detached`: the contents lie in another file.
    ///
    /// # Errors
    /// What makes it no header of version 1 or 2.
    pub fn read<D: BlockRead + ?Sized>(disk: &D, at: u64, detached: bool) -> Result<Self> {
        let left = disk.size().saturating_sub(at);
        let mut bytes = [0; HEADER_LEN];
        if left < HEADER_LEN as u64 {
            return Err(Error::TooShort(left as usize));
        }
        disk.read_at(at, &mut bytes)?;
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if bytes[..6] == MAGIC && version == 2 {
            return Ok(Self::V2(Header2::read(disk, at)?));
        }
        let header = Header::parse(&bytes)?;
        header.check(detached)?;
        header.spec()?;
        header.hash()?;
        Ok(Self::V1(Box::new(header)))
    }

    /// Where the contents lie.
    ///
    /// # Errors
    /// Version 2: as [`Metadata::segment`](crate::Metadata::segment).
    pub fn payload(&self) -> Result<Payload> {
        match self {
            Self::V1(header) => {
                Ok(Payload { offset: header.payload_offset(), len: None, position: 0, sector_size: 512 })
            }
            Self::V2(header) => {
                let segment = header.metadata().segment()?;
                Ok(Payload {
                    offset: segment.offset,
                    len: segment.len,
                    position: segment.position,
                    sector_size: segment.sector_size,
                })
            }
        }
    }

    /// The cipher.
    ///
    /// # Errors
    /// As [`CipherSpec::named`].
    pub fn spec(&self) -> Result<CipherSpec> {
        match self {
            Self::V1(header) => header.spec(),
            Self::V2(header) => header.metadata().spec(),
        }
    }

    /// Opens the volume by a passphrase: gives the cipher of its contents. `disk` and `at` as for [`read`](Self::read).
    ///
    /// # Errors
    /// [`Error::WrongPassphrase`]; a header that costs more than the limits or that contradicts itself.
    pub fn unlock<D: BlockRead + ?Sized>(
        &self,
        disk: &D,
        at: u64,
        passphrase: &[u8],
        limits: &Limits,
    ) -> Result<Arc<dyn SectorCipher>> {
        let sector_size = self.payload()?.sector_size;
        let key = match self {
            Self::V1(header) => header.unlock(disk, at, passphrase, limits)?.1,
            Self::V2(header) => header.unlock(disk, at, passphrase, limits)?,
        };
        key.cipher(&self.spec()?, sector_size)
    }
}
