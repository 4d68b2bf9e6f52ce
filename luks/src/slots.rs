//! Key slots of version 1: from a passphrase to the master key, and making and erasing slots.

use alloc::vec::Vec;

use instar_blockio::BlockRead;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::af;
use crate::cipher::{CipherSpec, MAX_KEY};
use crate::error::{Error, Result};
use crate::format::{SECTOR, SLOT_COUNT, STRIPES};
use crate::hash::Hash;
use crate::header::Header;
use crate::key::{MasterKey, secret};
use crate::limits::{Budget, Limits};
use crate::random::Random;

/// Bytes to write, and where in the volume.
#[derive(Debug)]
pub struct Patch {
    /// Where, bytes from the start of the volume.
    pub offset: u64,
    /// What.
    pub bytes: Vec<u8>,
}

impl Header {
    /// Finds the master key: tries the passphrase on each active slot. `at`: where the volume begins on `disk`, bytes.
    ///
    /// # Errors
    /// [`Error::WrongPassphrase`]; a header that contradicts itself, costs too much or names what is not known.
    pub fn unlock<D: BlockRead + ?Sized>(
        &self,
        disk: &D,
        at: u64,
        passphrase: &[u8],
        limits: &Limits,
    ) -> Result<(usize, MasterKey)> {
        let mut budget = Budget::new(limits);
        for number in 0..SLOT_COUNT {
            if let Some(key) = self.try_slot(disk, at, number, passphrase, &mut budget)? {
                return Ok((number, key));
            }
        }
        Err(Error::WrongPassphrase)
    }

    /// Does the passphrase open this slot?
    ///
    /// # Errors
    /// As [`unlock`](Self::unlock), but for the passphrase.
    pub fn opens<D: BlockRead + ?Sized>(
        &self,
        disk: &D,
        at: u64,
        slot: usize,
        passphrase: &[u8],
        limits: &Limits,
    ) -> Result<bool> {
        Ok(self.try_slot(disk, at, slot, passphrase, &mut Budget::new(limits))?.is_some())
    }

    fn try_slot<D: BlockRead + ?Sized>(
        &self,
        disk: &D,
        at: u64,
        number: usize,
        passphrase: &[u8],
        budget: &mut Budget,
    ) -> Result<Option<MasterKey>> {
        let (spec, hash) = (self.spec()?, self.hash()?);
        let slot = self.slots().get(number).ok_or(Error::NoSuchSlot(number))?;
        let Some(salt) = self.slot_salt(number).filter(|_| slot.active) else { return Ok(None) };
        if self.key_bytes() > MAX_KEY || slot.stripes != STRIPES {
            return Err(Error::SlotStripes(number, slot.stripes));
        }
        let key_len = self.key_bytes() as usize;
        budget.spend(hash.pbkdf2_cost(slot.iterations, key_len))?;
        budget.spend(hash.pbkdf2_cost(self.digest_iterations(), self.digest().0.len()))?;
        let mut material = secret((key_len * STRIPES as usize).next_multiple_of(SECTOR as usize))?;
        let place = at.checked_add(slot.key_offset).ok_or(Error::SlotInPayload(number))?;
        disk.read_at(place, &mut material)?;
        let mut derived = secret(key_len)?;
        hash.pbkdf2(passphrase, salt, slot.iterations, &mut derived)?;
        spec.with_key(&derived, SECTOR as u32)?.decrypt(0, &mut material)?;
        let mut key = secret(key_len)?;
        af::merge(hash, &material[..key_len * STRIPES as usize], &mut key);
        let key = MasterKey::new(key);
        Ok(self.is_master(&key, hash)?.then_some(key))
    }

    fn is_master(&self, key: &MasterKey, hash: Hash) -> Result<bool> {
        let (want, salt) = self.digest();
        let mut digest = Zeroizing::new([0; 20]);
        hash.pbkdf2(key.bytes(), salt, self.digest_iterations(), &mut digest[..])?;
        Ok(bool::from(digest.ct_eq(want)))
    }

    /// Makes a slot that the passphrase opens, and says what to write besides the header: that first.
    ///
    /// # Errors
    /// A slot that is in use or not there.
    pub fn add_key(
        &mut self,
        slot: usize,
        key: &MasterKey,
        passphrase: &[u8],
        iterations: u32,
        random: &mut Random,
    ) -> Result<Patch> {
        let (spec, hash) = (self.spec()?, self.hash()?);
        let place = *self.slots().get(slot).ok_or(Error::NoSuchSlot(slot))?;
        if place.active {
            return Err(Error::SlotInUse(slot));
        }
        let mut salt = [0; 32];
        random.fill(&mut salt);
        let mut bytes = secret((key.bytes().len() * STRIPES as usize).next_multiple_of(SECTOR as usize))?;
        let (material, _) = bytes.split_at_mut(key.bytes().len() * STRIPES as usize);
        random.fill(material);
        af::split(hash, key.bytes(), material);
        let mut derived = secret(key.bytes().len())?;
        hash.pbkdf2(passphrase, &salt, iterations, &mut derived)?;
        spec.with_key(&derived, SECTOR as u32)?.encrypt(0, &mut bytes)?;
        self.set_slot(slot, Some((salt, iterations)))?;
        // It is encrypted now: no secret any more.
        Ok(Patch { offset: place.key_offset, bytes: core::mem::take(&mut *bytes) })
    }

    /// The first slot that is not in use.
    pub fn free_slot(&self) -> Option<usize> {
        self.slots().iter().position(|slot| !slot.active)
    }

    /// Makes a slot inactive and says with what to overwrite its key material, once the header is written. The last active slot is
    /// erased only if `force` says so.
    ///
    /// # Errors
    /// [`Error::LastSlot`], [`Error::NoSuchSlot`].
    pub fn erase_key(&mut self, slot: usize, force: bool, random: &mut Random) -> Result<Patch> {
        let place = *self.slots().get(slot).ok_or(Error::NoSuchSlot(slot))?;
        let others = self.slots().iter().enumerate().any(|(number, other)| other.active && number != slot);
        if place.active && !others && !force {
            return Err(Error::LastSlot(slot));
        }
        if self.key_bytes() > MAX_KEY {
            return Err(Error::KeyTooLong(self.key_bytes()));
        }
        let len = (self.key_bytes() as usize * STRIPES as usize).next_multiple_of(SECTOR as usize);
        let mut bytes = alloc::vec![0; len];
        random.fill(&mut bytes);
        self.set_slot(slot, None)?;
        Ok(Patch { offset: place.key_offset, bytes })
    }
}

/// What a new volume is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The cipher.
    pub cipher: CipherSpec,
    /// Hash named beside a generator of initialisation vectors that needs none.
    pub iv_hash: Option<Hash>,
    /// Hash of the key derivation.
    pub hash: Hash,
    /// PBKDF2 iterations of the key slot.
    pub slot_iterations: u32,
    /// PBKDF2 iterations of the master key's digest.
    pub digest_iterations: u32,
    /// The contents lie in another file.
    pub detached: bool,
}

/// A new volume.
#[derive(Debug)]
pub struct Fresh {
    /// Its header, with the first key slot active.
    pub header: Header,
    /// The key material of that slot.
    pub material: Patch,
    /// The key of its contents.
    pub key: MasterKey,
}

/// Makes the header of a new volume with one key slot.
///
/// # Errors
/// Parts of the cipher that do not fit together.
pub fn create(options: &CreateOptions, passphrase: &[u8], random: &mut Random) -> Result<Fresh> {
    options.cipher.check()?;
    let mut key = secret(options.cipher.key_len as usize)?;
    random.fill(&mut key);
    let key = MasterKey::new(key);
    let (mut uuid, mut salt, mut digest) = ([0; 16], [0; 32], [0; 20]);
    random.fill(&mut uuid);
    random.fill(&mut salt);
    options.hash.pbkdf2(key.bytes(), &salt, options.digest_iterations, &mut digest)?;
    let mut header = Header::new(&options.cipher, options.iv_hash, options.hash, uuid, options.detached);
    header.set_digest(digest, salt, options.digest_iterations);
    let material = header.add_key(0, &key, passphrase, options.slot_iterations, random)?;
    Ok(Fresh { header, material, key })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cipher::CipherMode;
    use instar_blockio::MemBlock;

    fn volume(fresh: &Fresh, more: &[&Patch]) -> MemBlock {
        let mut bytes = alloc::vec![0; fresh.header.payload_offset().max(1 << 20) as usize];
        bytes[..592].copy_from_slice(&fresh.header.to_bytes());
        for patch in more.iter().copied().chain([&fresh.material]) {
            bytes[patch.offset as usize..][..patch.bytes.len()].copy_from_slice(&patch.bytes);
        }
        MemBlock::from(bytes)
    }

    fn options(mode: &[u8], key_len: u32, hash: Hash) -> CreateOptions {
        CreateOptions {
            cipher: CipherSpec::named(b"aes", CipherMode::split(mode), key_len).unwrap(),
            iv_hash: None,
            hash,
            slot_iterations: 3,
            digest_iterations: 2,
            detached: false,
        }
    }

    #[test]
    fn slots_come_and_go() {
        let mut random = Random::new(&[5; 48]);
        let mut fresh = create(&options(b"xts-plain64", 64, Hash::Sha256), b"one", &mut random).unwrap();
        let limits = Limits::default();
        let (slot, key) = fresh.header.unlock(&volume(&fresh, &[]), 0, b"one", &limits).unwrap();
        assert_eq!((slot, key.bytes()), (0, fresh.key.bytes()));
        let second = fresh.header.add_key(1, &key, b"two", 3, &mut random).unwrap();
        let disk = volume(&fresh, &[&second]);
        assert_eq!(fresh.header.unlock(&disk, 0, b"two", &limits).unwrap().0, 1);
        assert_eq!(fresh.header.unlock(&disk, 0, b"three", &limits).unwrap_err(), Error::WrongPassphrase);
        assert!(fresh.header.opens(&disk, 0, 0, b"one", &limits).unwrap());
        assert_eq!(fresh.header.add_key(1, &key, b"", 1, &mut random).unwrap_err(), Error::SlotInUse(1));
        fresh.header.erase_key(0, false, &mut random).unwrap();
        assert_eq!(fresh.header.unlock(&disk, 0, b"one", &limits).unwrap_err(), Error::WrongPassphrase);
        assert_eq!(fresh.header.erase_key(1, false, &mut random).unwrap_err(), Error::LastSlot(1));
        fresh.header.erase_key(1, true, &mut random).unwrap();
        assert_eq!(fresh.header.free_slot(), Some(0));
    }

    #[test]
    fn a_volume_that_costs_too_much_is_refused_at_once() {
        let mut random = Random::new(&[5; 48]);
        let mut fresh = create(&options(b"cbc-essiv:sha256", 32, Hash::Sha1), b"x", &mut random).unwrap();
        let disk = volume(&fresh, &[]);
        fresh.header.set_slot(0, Some(([0; 32], u32::MAX))).unwrap();
        let error = fresh.header.unlock(&disk, 0, b"x", &Limits::default()).unwrap_err();
        assert_eq!(error, Error::TooManyIterations(2 * u64::from(u32::MAX)));
    }
}
