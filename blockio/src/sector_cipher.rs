use core::fmt::Debug;

use crate::{Error, ErrorKind, Result};

/// Encrypts and decrypts whole sectors of a disk with one key. Any thread may use it, without a copy of its own.
///
/// Each sector has an initialisation vector of its own, made of its *position*: bytes from where the format says that counting
/// begins (the disk, or the file), always a multiple of 512.
pub trait SectorCipher: Debug + Send + Sync {
    /// Bytes of a sector: 512 to 4096, a power of two.
    fn sector_size(&self) -> u32;

    /// Decrypts sectors in place; the first is at `position`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if `position` is no multiple of 512 or `data` not one of the sector size.
    fn decrypt(&self, position: u64, data: &mut [u8]) -> Result<()>;

    /// Encrypts sectors in place; the first is at `position`.
    ///
    /// # Errors
    /// As [`decrypt`](Self::decrypt).
    fn encrypt(&self, position: u64, data: &mut [u8]) -> Result<()>;

    /// Refuses what is not made of whole sectors; for implementors.
    ///
    /// # Errors
    /// As [`decrypt`](Self::decrypt).
    fn check_sectors(&self, position: u64, len: usize) -> Result<()> {
        match position.is_multiple_of(512) && (len as u64).is_multiple_of(self.sector_size().into()) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::InvalidInput).at(position)),
        }
    }
}
