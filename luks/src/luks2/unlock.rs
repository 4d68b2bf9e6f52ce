use alloc::vec::Vec;

use argon2::Argon2;
use instar_blockio::BlockRead;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::Header2;
use super::metadata::{self, Area, Digest, Kdf, Keyslot};
use crate::af;
use crate::cipher::MAX_KEY;
use crate::error::{Error, Result};
use crate::format::STRIPES;
use crate::hash::Hash;
use crate::key::{MasterKey, secret};
use crate::limits::{Budget, Limits};

/// Longest salt or digest, bytes.
const MAX_FIELD: usize = 512;

impl Header2 {
    /// Finds the master key of the encrypted segment: tries the passphrase on each key slot. `at`: where the volume begins on
    /// `disk`, bytes.
    ///
    /// # Errors
    /// [`Error::WrongPassphrase`]; metadata that contradicts itself, costs too much or names what is not known.
    pub fn unlock<D: BlockRead + ?Sized>(
        &self,
        disk: &D,
        at: u64,
        passphrase: &[u8],
        limits: &Limits,
    ) -> Result<MasterKey> {
        let mut budget = Budget::new(limits);
        let (segment, _) = self.metadata().crypt_segment()?;
        let mut digests = self.metadata().digests.values();
        let digest = digests.find(|digest| digest.segments.iter().any(|name| name == segment));
        let digest = digest.filter(|digest| digest.kind == "pbkdf2").ok_or(Error::Metadata)?;
        // What is wrong with one slot is told only if no other opens.
        let mut failed = Error::WrongPassphrase;
        for name in &digest.keyslots {
            let Some(slot) = self.metadata().keyslots.get(name).filter(|slot| slot.kind == "luks2") else { continue };
            match try_slot(disk, at, slot, digest, passphrase, &mut budget) {
                Ok(Some(key)) => return Ok(key),
                Ok(None) => {}
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }
}

fn try_slot<D: BlockRead + ?Sized>(
    disk: &D,
    at: u64,
    slot: &Keyslot,
    digest: &Digest,
    passphrase: &[u8],
    budget: &mut Budget,
) -> Result<Option<MasterKey>> {
    let splitter = slot.af.as_ref().filter(|af| af.kind == "luks1" && af.stripes == STRIPES).ok_or(Error::Metadata)?;
    let hash = metadata::hash(&splitter.hash)?;
    if slot.key_size > MAX_KEY || slot.key_size == 0 {
        return Err(Error::KeyTooLong(slot.key_size));
    }
    let material_len = slot.key_size as usize * STRIPES as usize;
    let mut material = read_area(disk, at, &slot.area, material_len)?;
    let area_key_len = slot.area.key_size.filter(|len| (1..=MAX_KEY).contains(len)).ok_or(Error::Metadata)?;
    let encryption = slot.area.encryption.as_deref().ok_or(Error::Metadata)?;
    let spec = metadata::cipher(encryption.as_bytes(), area_key_len)?;
    let mut derived = secret(area_key_len as usize)?;
    derive(slot.kdf.as_ref().ok_or(Error::Metadata)?, passphrase, &mut derived, budget)?;
    spec.with_key(&derived, 512)?.decrypt(0, &mut material)?;
    let mut key = secret(slot.key_size as usize)?;
    af::merge(hash, &material[..material_len], &mut key);
    let key = MasterKey::new(key);
    Ok(is_master(&key, digest, budget)?.then_some(key))
}

fn read_area<D: BlockRead + ?Sized>(disk: &D, at: u64, area: &Area, len: usize) -> Result<Zeroizing<Vec<u8>>> {
    let (offset, size) = (metadata::number(&area.offset)?, metadata::number(&area.size)?);
    let stored = len.next_multiple_of(512);
    if area.kind != "raw" || size < stored as u64 {
        return Err(Error::Metadata);
    }
    let mut material = secret(stored)?;
    disk.read_at(at.checked_add(offset).ok_or(Error::Metadata)?, &mut material)?;
    Ok(material)
}

fn derive(kdf: &Kdf, passphrase: &[u8], out: &mut [u8], budget: &mut Budget) -> Result<()> {
    let salt = metadata::bytes(&kdf.salt, MAX_FIELD)?;
    let algorithm = match kdf.kind.as_str() {
        "pbkdf2" => {
            let hash: Hash = metadata::hash(kdf.hash.as_deref().ok_or(Error::Metadata)?)?;
            let iterations = kdf.iterations.ok_or(Error::Metadata)?;
            budget.spend(hash.pbkdf2_cost(iterations, out.len()))?;
            return hash.pbkdf2(passphrase, &salt, iterations, out);
        }
        "argon2i" => argon2::Algorithm::Argon2i,
        "argon2id" => argon2::Algorithm::Argon2id,
        _ => return Err(Error::Unsupported),
    };
    let (Some(time), Some(memory), Some(lanes)) = (kdf.time, kdf.memory, kdf.cpus) else {
        return Err(Error::Metadata);
    };
    let bytes = u64::from(memory) * 1024;
    if bytes > budget.memory {
        return Err(Error::TooMuchMemory(bytes));
    }
    budget.spend(u64::from(memory).saturating_mul(time.into()).saturating_mul(4))?;
    let parameters = argon2::Params::new(memory, time, lanes, Some(out.len())).map_err(|_| Error::KeyDerivation)?;
    let argon2 = Argon2::new(algorithm, argon2::Version::V0x13, parameters);
    argon2.hash_password_into(passphrase, &salt, out).map_err(|error| match error {
        argon2::Error::OutOfMemory => Error::OutOfMemory,
        _ => Error::KeyDerivation,
    })
}

fn is_master(key: &MasterKey, digest: &Digest, budget: &mut Budget) -> Result<bool> {
    let hash = metadata::hash(&digest.hash)?;
    let salt = metadata::bytes(&digest.salt, MAX_FIELD)?;
    let want = metadata::bytes(&digest.digest, MAX_FIELD)?;
    if want.len() < 16 {
        return Err(Error::Metadata);
    }
    budget.spend(hash.pbkdf2_cost(digest.iterations, want.len()))?;
    let mut found = secret(want.len())?;
    hash.pbkdf2(key.bytes(), &salt, digest.iterations, &mut found)?;
    Ok(bool::from(found.ct_eq(&want)))
}
