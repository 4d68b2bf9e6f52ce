//! Encrypted contents: which sector of an encrypted image gets which initialisation vector.

use alloc::sync::Arc;

use instar_blockio::{
    self as blockio, BlockWrite, Error, ErrorKind, ExtentKind, FileId, SectorCipher, read_encrypted, zeroed,
};

use crate::addr::HostOffset;
use crate::error::Error as ImageError;
use crate::header::EncryptionMethod;
use crate::write::Writer;

/// Longest run of zeroes that is encrypted at once, bytes.
const MAX_ZEROES: u64 = 1 << 20;

/// The cipher of an image's contents. Vectors are made from the place in the file, in legacy images from the place on the disk.
#[derive(Clone, Debug)]
pub struct ContentsCipher {
    cipher: Arc<dyn SectorCipher>,
    by_disk: bool,
}

impl ContentsCipher {
    /// The cipher of an image that is encrypted by `method`.
    pub(crate) fn new(cipher: Arc<dyn SectorCipher>, method: EncryptionMethod) -> Self {
        Self { cipher, by_disk: method == EncryptionMethod::Aes }
    }

    /// The cipher itself.
    pub fn cipher(&self) -> &Arc<dyn SectorCipher> {
        &self.cipher
    }

    /// The position from which the vector of the sector at disk offset `guest`, that lies at `host` of its file, is made.
    pub fn position(&self, guest: u64, host: u64) -> u64 {
        if self.by_disk { guest } else { host }
    }

    /// Encrypts whole sectors in place.
    ///
    /// # Errors
    /// What is no run of whole sectors.
    pub fn encrypt(&self, guest: u64, host: u64, data: &mut [u8]) -> blockio::Result<()> {
        self.cipher.encrypt(self.position(guest, host), data)
    }
}

impl<D: BlockWrite> Writer<D> {
    /// What encrypts the contents, if they are encrypted: who writes into a reservation by other ways than
    /// [`write_at`](BlockWrite::write_at) has to do that.
    pub fn contents_cipher(&self) -> Option<&ContentsCipher> {
        self.cipher.as_ref()
    }

    /// Writes into the area that the encryption header extension names. `at` counts from its start.
    ///
    /// # Errors
    /// [`ImageError::NoCryptoHeader`] without such an area or outside of it; what the file reports.
    pub fn write_crypto_header(&mut self, at: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let area = self.extensions.crypto.ok_or(ImageError::NoCryptoHeader)?;
        let end = at.checked_add(bytes.len() as u64).filter(|&end| end <= area.len);
        let place = area.offset.0.checked_add(at).filter(|_| end.is_some()).ok_or(ImageError::NoCryptoHeader)?;
        Ok(self.main.write(place, bytes)?)
    }

    /// Takes clusters for the LUKS header of a fresh image.
    pub(crate) fn place_crypto_header(&mut self, len: u64) -> Result<(), ImageError> {
        let geometry = self.header.geometry;
        let count = geometry.clusters(len);
        let at = self.take_clusters(count)? * geometry.cluster_size();
        self.main.extend(at + count * geometry.cluster_size());
        self.extensions.crypto = Some(crate::CryptoHeader { offset: HostOffset(at), len });
        Ok(())
    }

    /// Where bytes of the disk lie in a file, as readers see it.
    pub(crate) fn data_kind(&self, file: FileId, guest: u64, host: u64) -> ExtentKind {
        match &self.cipher {
            None => ExtentKind::Data { file, host },
            Some(cipher) => ExtentKind::Encrypted { file, host, position: cipher.position(guest, host) },
        }
    }

    /// Reads bytes of the disk that lie at `host`.
    pub(crate) fn read_contents(&self, guest: u64, host: u64, buf: &mut [u8]) -> blockio::Result<()> {
        let file = self.data.as_ref().unwrap_or(&self.main);
        match &self.cipher {
            None => file.read(host, buf),
            Some(cipher) => {
                let position = cipher.position(guest, host);
                read_encrypted(&**cipher.cipher(), host, position, buf, |host, buf| file.read(host, buf))
            }
        }
    }

    /// Writes bytes of the disk to `host`.
    pub(crate) fn write_contents(&mut self, guest: u64, host: u64, bytes: &[u8]) -> blockio::Result<()> {
        let Some(cipher) = &self.cipher else { return self.clusters_file().write(host, bytes) };
        if bytes.is_empty() {
            return Ok(());
        }
        let mut stored = zeroed(bytes.len())?;
        stored.copy_from_slice(bytes);
        cipher.encrypt(guest, host, &mut stored)?;
        self.clusters_file().write(host, &stored)
    }

    /// Writes zeroes of the disk to `host`, byte for byte.
    pub(crate) fn fill_contents(&mut self, guest: u64, host: u64, len: u64) -> blockio::Result<()> {
        if self.cipher.is_none() {
            return self.clusters_file().fill(host, len);
        }
        let zeroes = zeroed(len.min(MAX_ZEROES) as usize)?;
        let mut done = 0;
        while done < len {
            let step = (len - done).min(MAX_ZEROES);
            self.write_contents(guest + done, host + done, &zeroes[..step as usize])?;
            done += step;
        }
        Ok(())
    }

    /// The whole sectors around a part of the disk, with what they hold outside of it; `None` if it is whole sectors already, or need
    /// not be.
    pub(crate) fn around(&self, offset: u64, buf: &[u8]) -> blockio::Result<Option<(u64, alloc::vec::Vec<u8>)>> {
        let Some(cipher) = &self.cipher else { return Ok(None) };
        let sector = u64::from(cipher.cipher().sector_size());
        let end = offset + buf.len() as u64;
        let (start, stop) = (offset - offset % sector, end.next_multiple_of(sector));
        if (start, stop) == (offset, end) {
            return Ok(None);
        }
        if stop > self.header.virtual_size {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        let mut whole = zeroed((stop - start) as usize)?;
        blockio::BlockRead::read_at(self, start, &mut whole)?;
        whole[(offset - start) as usize..][..buf.len()].copy_from_slice(buf);
        Ok(Some((start, whole)))
    }
}
