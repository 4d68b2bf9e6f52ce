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

use super::luks::{limits, luks_failure, volume_failure};
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
    let file = platform.file(source.device).ok_or_else(bad)?;
    let at = area.start;
    let read = Volume::read(&file, at, at != 0).map_err(|error| volume_failure(&file, id, at, error));
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
