//! LUKS: changing the key slots of a volume, on a file of its own or inside a qcow2 image.
//!
//! ```text
//!  making    key material ─ flush ─ header: second sector ─ flush ─ first sector ─ flush
//!  erasing   header: first sector ─ flush ─ second sector ─ flush ─ key material ─ flush
//! ```
//!
//! A slot's entry may lie across the two sectors of the header, and its state lies first. So a crash leaves a slot that opens, or one
//! that is not active. While the only active slot is made anew, another one holds the new passphrase.

use core::ops::Range;

use instar_blockio::{BlockRead, BlockWrite, FileId};
use instar_guest_protocol::message::{AmendRefusal, Cause, Failure, Format, Key, KeyChange, Source, Step};
use instar_luks::{self as luks, Header, Limits, MasterKey, Patch, Random, SLOT_COUNT, Volume};

use super::luks::{limits, luks_failure, request_header, volume_failure};
use super::target::TargetDisk;
use crate::ops::failure::{block, failure};
use crate::platform::Platform;

/// What a device writes as a whole, bytes.
const SECTOR: usize = 512;

/// Changes the key slots of the volume whose header and key material lie in `area` of an image, which is open for writing.
///
/// # Errors
/// [`Cause::AmendRefused`]: what the change would lose or does not find; a header that can't be read.
pub(crate) fn change_keys<P: Platform>(
    platform: &P,
    source: &Source,
    change: Option<&KeyChange>,
    area: Range<u64>,
) -> Result<(), Failure> {
    let bad = || failure(Step::Edit, Cause::BadRequest);
    let (change, key) = change.zip(source.key.as_ref()).ok_or_else(bad)?;
    let id = FileId(source.device);
    let file = match source.detached_header {
        true => request_header(platform, id, true)?.0,
        false => platform.file(source.device).ok_or_else(bad)?,
    };
    let at = area.start;
    let read = Volume::read(&file, at, at != 0 || source.detached_header)
        .map_err(|error| volume_failure(&file, id, at, error));
    let Volume::V1(header) = read? else {
        // Version 2 is only read.
        return Err(luks_failure(Step::Edit, id, &[], luks::Error::Unsupported));
    };
    let seed = change.seed.first_chunk().filter(|_| change.seed.len() == Random::SEED).ok_or_else(bad)?;
    let format = if at == 0 { Format::Luks } else { Format::Qcow2 };
    let disk = TargetDisk::new(file, true);
    let mut slots =
        Slots { disk, id, area, header: *header, random: Random::new(seed), limits: limits(key), force: change.force };
    let done = match change.activate {
        true => slots.activate(change, key),
        false => slots.erase(change),
    };
    done.map_err(|failure| Failure { format: format.into(), ..failure })
}

fn refused(refusal: AmendRefusal, slot: usize) -> Failure {
    Failure { value: refusal as u64, value2: slot as u64, ..failure(Step::Edit, Cause::AmendRefused) }
}

/// The key slots of a volume.
struct Slots<D> {
    disk: D,
    id: FileId,
    area: Range<u64>,
    header: Header,
    random: Random,
    limits: Limits,
    force: bool,
}

impl<D: BlockRead + BlockWrite> Slots<D> {
    fn failed(&self, error: luks::Error) -> Failure {
        luks_failure(Step::Edit, self.id, &[], error)
    }

    fn is_active(&self, slot: usize) -> bool {
        self.header.slots().get(slot).is_some_and(|slot| slot.active)
    }

    fn active(&self) -> usize {
        self.header.slots().iter().filter(|slot| slot.active).count()
    }

    fn checked(slot: u32) -> Result<usize, Failure> {
        let number = slot as usize;
        if number < SLOT_COUNT { Ok(number) } else { Err(refused(AmendRefusal::NoSuchSlot, number)) }
    }

    /// Makes a slot that the new passphrase opens.
    fn activate(&mut self, change: &KeyChange, key: &Key) -> Result<(), Failure> {
        let slot = match change.slot {
            Some(slot) => Self::checked(slot)?,
            None => self.header.free_slot().ok_or_else(|| refused(AmendRefusal::NoFreeSlot, 0))?,
        };
        let in_use = self.is_active(slot);
        if in_use && !self.force {
            return Err(refused(AmendRefusal::SlotActive, slot));
        }
        let opened = self.header.unlock(&self.disk, self.area.start, &key.passphrase, &self.limits);
        let (_, master) = opened.map_err(|error| self.failed(error))?;
        let aside = if in_use && self.active() == 1 { self.header.free_slot() } else { None };
        if let Some(aside) = aside {
            self.make(aside, &master, change)?;
        }
        if in_use {
            self.clear(slot)?;
        }
        self.make(slot, &master, change)?;
        aside.map_or(Ok(()), |aside| self.clear(aside))
    }

    /// Erases the slot that is named, or all that the old passphrase opens.
    fn erase(&mut self, change: &KeyChange) -> Result<(), Failure> {
        let old = change.old_passphrase.as_deref();
        if let Some(slot) = change.slot {
            let slot = Self::checked(slot)?;
            if let Some(old) = old
                && !self.opens(slot, old)?
            {
                return Err(refused(AmendRefusal::SlotNotOpened, slot));
            }
            if !self.force && !self.is_active(slot) {
                return Err(refused(AmendRefusal::SlotInactive, slot));
            }
            if !self.force && self.active() == 1 {
                return Err(refused(AmendRefusal::LastSlot, slot));
            }
            return self.clear(slot);
        }
        let old = old.ok_or_else(|| failure(Step::Edit, Cause::BadRequest))?;
        let mut opened = [false; SLOT_COUNT];
        for (slot, opened) in opened.iter_mut().enumerate() {
            *opened = self.opens(slot, old)?;
        }
        let count = opened.iter().filter(|opened| **opened).count();
        if count == 0 {
            return Err(refused(AmendRefusal::NoSlotOpened, 0));
        }
        if !self.force && count == self.active() {
            return Err(refused(AmendRefusal::AllSlotsOpened, 0));
        }
        (0..SLOT_COUNT).filter(|slot| opened[*slot]).try_for_each(|slot| self.clear(slot))
    }

    fn opens(&self, slot: usize, passphrase: &[u8]) -> Result<bool, Failure> {
        let opens = self.header.opens(&self.disk, self.area.start, slot, passphrase, &self.limits);
        opens.map_err(|error| self.failed(error))
    }

    fn make(&mut self, slot: usize, master: &MasterKey, change: &KeyChange) -> Result<(), Failure> {
        let (passphrase, iterations) = (&change.new_passphrase, change.iterations.max(1));
        let made = self.header.add_key(slot, master, passphrase, iterations, &mut self.random);
        let material = made.map_err(|error| self.failed(error))?;
        self.write_material(&material)?;
        let header = self.header.to_bytes();
        self.write(SECTOR as u64, &header[SECTOR..])?;
        self.write(0, &header[..SECTOR])
    }

    fn clear(&mut self, slot: usize) -> Result<(), Failure> {
        // Whether it may go has been decided.
        let erased = self.header.erase_key(slot, true, &mut self.random);
        let noise = erased.map_err(|error| self.failed(error))?;
        let header = self.header.to_bytes();
        self.write(0, &header[..SECTOR])?;
        self.write(SECTOR as u64, &header[SECTOR..])?;
        self.write_material(&noise)
    }

    fn write_material(&mut self, patch: &Patch) -> Result<(), Failure> {
        self.write(patch.offset, &patch.bytes)
    }

    /// Writes at a place of the volume, durably.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let place = self.area.start.checked_add(offset);
        let end = place.and_then(|place| place.checked_add(bytes.len() as u64)).filter(|end| *end <= self.area.end);
        let (Some(place), Some(_)) = (place, end) else {
            // A header inside another image could name any place of it.
            return Err(self.failed(luks::Error::Metadata));
        };
        let done = self.disk.write_at(place, bytes).and_then(|()| self.disk.flush());
        done.map_err(|error| block(Step::Edit, Some(self.id), place, error))
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use instar_blockio::MemBlock;
    use instar_blockio::test::CrashLog;
    use instar_luks::{CipherMode, CipherSpec, CreateOptions, Hash, create};

    use super::*;

    const AREA: Range<u64> = 0..1 << 20;
    const LIMITS: Limits = Limits { iterations: 1000, memory: 0 };

    /// A volume that `old` opens by slot 0.
    fn volume() -> MemBlock {
        let cipher = CipherSpec::named(b"aes", CipherMode::split(b"cbc-plain64"), 16).unwrap();
        let options = CreateOptions {
            cipher,
            iv_hash: None,
            hash: Hash::Sha1,
            slot_iterations: 1,
            digest_iterations: 1,
            detached: false,
        };
        let fresh = create(&options, b"old", &mut Random::new(&[3; Random::SEED])).unwrap();
        let mut bytes = alloc::vec![0; AREA.end as usize];
        bytes[..luks::HEADER_LEN].copy_from_slice(&fresh.header.to_bytes());
        bytes[fresh.material.offset as usize..][..fresh.material.bytes.len()].copy_from_slice(&fresh.material.bytes);
        MemBlock::from(bytes)
    }

    fn header(disk: &MemBlock) -> Header {
        match Volume::read(disk, 0, false) {
            Ok(Volume::V1(header)) => *header,
            other => panic!("{other:?}"),
        }
    }

    fn opens(disk: &MemBlock, passphrase: &[u8]) -> bool {
        // Contents, too, are decrypted alike: the digest in the header is that of the one master key.
        header(disk).unlock(disk, 0, passphrase, &LIMITS).is_ok()
    }

    fn key(passphrase: &[u8]) -> Key {
        Key { passphrase: passphrase.to_vec(), ..Key::default() }
    }

    /// Changes slots; what is on the disk then, and in all states in which a crash could have left it.
    fn change(disk: MemBlock, change: &KeyChange, by: &[u8]) -> (MemBlock, Vec<MemBlock>) {
        let (log, trace) = CrashLog::new(disk.clone());
        let (id, random) = (FileId(0), Random::new(&[5; Random::SEED]));
        let (header, force) = (header(&disk), change.force);
        let mut slots = Slots { disk: log, id, area: AREA, header, random, limits: LIMITS, force };
        match change.activate {
            true => slots.activate(change, &key(by)),
            false => slots.erase(change),
        }
        .unwrap();
        let states: Vec<_> = trace.states(7, 6).map(|state| state.disk).collect();
        (trace.states(7, 0).last().unwrap().disk, states)
    }

    fn activation(slot: Option<u32>, new: &[u8], force: bool) -> KeyChange {
        let new_passphrase = new.to_vec();
        KeyChange { activate: true, slot, new_passphrase, iterations: 1, force, ..KeyChange::default() }
    }

    #[test]
    fn a_crash_leaves_a_passphrase_that_opens() {
        // Made in a free slot.
        let (two, states) = change(volume(), &activation(None, b"new", false), b"old");
        assert!(opens(&two, b"old") && opens(&two, b"new"));
        assert!(states.iter().all(|state| opens(state, b"old")));
        // The old one erased, by passphrase and by number.
        let by_old = KeyChange { old_passphrase: Some(b"old".to_vec()), ..KeyChange::default() };
        let by_number = KeyChange { slot: Some(0), ..KeyChange::default() };
        for erasure in [by_old, by_number] {
            let (one, states) = change(two.clone(), &erasure, b"new");
            assert!(opens(&one, b"new") && !opens(&one, b"old"));
            assert!(states.iter().all(|state| opens(state, b"new")));
        }
        // The only slot made anew in its place.
        let (anew, states) = change(volume(), &activation(Some(0), b"new", true), b"old");
        assert!(opens(&anew, b"new") && !opens(&anew, b"old"));
        assert_eq!(header(&anew).slots().iter().filter(|slot| slot.active).count(), 1);
        assert!(states.iter().all(|state| opens(state, b"old") || opens(state, b"new")));
        assert!(states.iter().any(|state| !opens(state, b"new")));
    }

    #[test]
    fn erased_material_is_overwritten() {
        let (two, _) = change(volume(), &activation(None, b"new", false), b"old");
        let place = header(&two).slots()[0].key_offset as usize;
        let (one, _) = change(two.clone(), &KeyChange { slot: Some(0), ..KeyChange::default() }, b"new");
        let material = |disk: &MemBlock| disk.as_bytes()[place..place + 16 * 4000].to_vec();
        let same = material(&one).iter().zip(material(&two)).filter(|(a, b)| **a == *b).count();
        assert!(same < 1000, "{same} bytes of 64000 are as before");
    }
}
