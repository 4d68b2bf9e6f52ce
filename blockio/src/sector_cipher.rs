use alloc::vec::Vec;
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

/// Reads and decrypts any range of encrypted data: whole sectors in place, the rest through memory of its own.
///
/// The range begins at `host` in a file, which is `position` for the cipher; positions of sectors are multiples of their size.
/// `read` gives the bytes of the file at an offset.
///
/// # Errors
/// Those of `read` and of the cipher; [`ErrorKind::OutOfMemory`].
pub fn read_encrypted(
    cipher: &dyn SectorCipher,
    host: u64,
    position: u64,
    buf: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let sector = u64::from(cipher.sector_size());
    let skip = position % sector;
    let len = (skip as usize).saturating_add(buf.len()).next_multiple_of(sector as usize);
    if skip == 0 && len == buf.len() {
        read(host, buf)?;
        return cipher.decrypt(position, buf);
    }
    let start = host.checked_sub(skip).ok_or(Error::new(ErrorKind::Corrupt).at(host))?;
    let mut whole = Vec::new();
    whole.try_reserve_exact(len).map_err(|_| Error::new(ErrorKind::OutOfMemory))?;
    whole.resize(len, 0);
    read(start, &mut whole)?;
    cipher.decrypt(position - skip, &mut whole)?;
    let part = whole.get(skip as usize..).and_then(|rest| rest.get(..buf.len()));
    buf.copy_from_slice(part.ok_or(Error::new(ErrorKind::OutOfBounds).at(host))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds the sector's number to each byte.
    #[derive(Debug)]
    struct Adding;

    impl SectorCipher for Adding {
        fn sector_size(&self) -> u32 {
            512
        }

        fn decrypt(&self, position: u64, data: &mut [u8]) -> Result<()> {
            self.check_sectors(position, data.len())?;
            for (number, sector) in (position / 512..).zip(data.chunks_mut(512)) {
                sector.iter_mut().for_each(|byte| *byte = byte.wrapping_sub(number as u8));
            }
            Ok(())
        }

        fn encrypt(&self, position: u64, data: &mut [u8]) -> Result<()> {
            self.check_sectors(position, data.len())?;
            for (number, sector) in (position / 512..).zip(data.chunks_mut(512)) {
                sector.iter_mut().for_each(|byte| *byte = byte.wrapping_add(number as u8));
            }
            Ok(())
        }
    }

    #[test]
    fn any_range_reads() {
        let plain: Vec<u8> = (0..4096_u32).map(|at| (at % 251) as u8).collect();
        let mut stored = plain.clone();
        Adding.encrypt(1024, &mut stored).unwrap();
        for (at, len) in [(0, 4096), (512, 512), (1, 1), (511, 2), (100, 3000), (4095, 1)] {
            let mut buf = alloc::vec![0; len];
            let read = |host: u64, out: &mut [u8]| {
                out.copy_from_slice(&stored[host as usize - 700..][..out.len()]);
                Ok(())
            };
            read_encrypted(&Adding, 700 + at as u64, 1024 + at as u64, &mut buf, read).unwrap();
            assert_eq!(buf, plain[at..at + len]);
        }
    }
}
