use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use instar_blockio::SectorCipher;
use zeroize::Zeroizing;

use crate::cipher::CipherSpec;
use crate::error::{Error, Result};

/// The key that encrypts the contents of a volume. Cleared when dropped, and never printed.
pub struct MasterKey {
    bytes: Zeroizing<Vec<u8>>,
}

impl MasterKey {
    pub(crate) fn new(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self { bytes }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The cipher with this key.
    ///
    /// # Errors
    /// As [`CipherSpec::with_key`].
    pub fn cipher(&self, spec: &CipherSpec, sector_size: u32) -> Result<Arc<dyn SectorCipher>> {
        spec.with_key(&self.bytes, sector_size)
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKey({} bytes)", self.bytes.len())
    }
}

/// Cleared memory of a size that a header says, which is bounded by the caller.
pub(crate) fn secret(len: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| Error::OutOfMemory)?;
    bytes.resize(len, 0);
    Ok(Zeroizing::new(bytes))
}
