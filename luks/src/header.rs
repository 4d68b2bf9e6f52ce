use core::fmt::{self, Write};

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::cipher::{CipherMode, CipherSpec, IvGen};
use crate::error::{Error, Result, TextField};
use crate::format::{
    MAGIC, RawHeader, RawSlot, SECTOR, SLOT_ACTIVE, SLOT_ALIGN, SLOT_COUNT, SLOT_INACTIVE, SLOTS_AT, STRIPES,
};
use crate::hash::Hash;

/// A checked LUKS1 header.
#[derive(Clone, Copy)]
pub struct Header {
    raw: RawHeader,
    slots: [KeySlot; SLOT_COUNT],
}

/// A key slot: one way to the master key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeySlot {
    /// A passphrase opens it.
    pub active: bool,
    /// PBKDF2 iterations.
    pub iterations: u32,
    /// Where its key material lies in the volume, bytes.
    pub key_offset: u64,
    /// Anti-forensic stripes.
    pub stripes: u32,
}

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Header")
            .field("key_bytes", &self.key_bytes())
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

impl Header {
    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// What makes the bytes no LUKS1 header. Sizes and offsets are judged by [`check`](Self::check).
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).map_err(|_| Error::TooShort(bytes.len()))?;
        if raw.magic != MAGIC {
            return Err(Error::NotLuks);
        }
        if raw.version.get() != 1 {
            return Err(Error::UnsupportedVersion(raw.version.get()));
        }
        for (field, text) in [
            (TextField::Cipher, &raw.cipher_name[..]),
            (TextField::Mode, &raw.cipher_mode),
            (TextField::Hash, &raw.hash_spec),
        ] {
            if !text.contains(&0) {
                return Err(Error::UnterminatedText(field));
            }
        }
        let mut slots = [KeySlot::default(); SLOT_COUNT];
        for (number, (slot, raw)) in slots.iter_mut().zip(&raw.slots).enumerate() {
            *slot = KeySlot::read(number, raw)?;
        }
        Ok(Self { raw, slots })
    }

    /// Judges sizes and places as QEMU does. `detached`: the contents lie in another file.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn check(&self, detached: bool) -> Result<()> {
        let payload = self.raw.payload_offset.get();
        if !detached && u64::from(payload) < SLOTS_AT / SECTOR {
            return Err(Error::PayloadInHeader(payload));
        }
        if self.digest_iterations() == 0 {
            return Err(Error::NoIterations);
        }
        for (number, slot) in self.slots.iter().enumerate() {
            if slot.stripes != STRIPES {
                return Err(Error::SlotStripes(number, slot.stripes));
            }
            if slot.key_offset < SLOTS_AT {
                return Err(Error::SlotInHeader(number));
            }
            if slot.active && slot.iterations == 0 {
                return Err(Error::SlotNoIterations(number));
            }
            let end = slot.key_offset + self.area_len();
            if !detached && end > self.payload_offset() {
                return Err(Error::SlotInPayload(number));
            }
            for (other_number, other) in self.slots.iter().enumerate().skip(number + 1) {
                if end > other.key_offset && other.key_offset + self.area_len() > slot.key_offset {
                    return Err(Error::SlotsOverlap(number, other_number));
                }
            }
        }
        Ok(())
    }

    /// The cipher.
    ///
    /// # Errors
    /// As [`CipherSpec::named`].
    pub fn spec(&self) -> Result<CipherSpec> {
        CipherSpec::named(self.cipher_name(), self.mode(), self.key_bytes())
    }

    /// The hash of the key derivation.
    ///
    /// # Errors
    /// [`Error::UnknownName`].
    pub fn hash(&self) -> Result<Hash> {
        Hash::named(self.hash_spec()).ok_or(Error::UnknownName(TextField::Hash))
    }

    /// Bytes that the key material of a slot takes, up to the next one.
    pub(crate) fn area_len(&self) -> u64 {
        (u64::from(self.key_bytes()) * u64::from(STRIPES)).next_multiple_of(SLOT_ALIGN)
    }

    /// A header without active key slots. `detached`: the contents lie in another file.
    pub(crate) fn new(spec: &CipherSpec, iv_hash: Option<Hash>, hash: Hash, uuid: [u8; 16], detached: bool) -> Self {
        let mut raw = RawHeader::new_zeroed();
        raw.magic = MAGIC;
        raw.version = 1.into();
        put(&mut raw.cipher_name, format_args!("{}", spec.algorithm.name()));
        let iv_hash = match spec.ivgen {
            IvGen::Essiv(hash) => Some(hash),
            _ => iv_hash,
        };
        match iv_hash {
            Some(hash) => put(&mut raw.cipher_mode, format_args!("{}-{}:{hash}", spec.mode.name(), spec.ivgen.name())),
            None => put(&mut raw.cipher_mode, format_args!("{}-{}", spec.mode.name(), spec.ivgen.name())),
        }
        put(&mut raw.hash_spec, format_args!("{hash}"));
        put_uuid(&mut raw.uuid, uuid);
        raw.key_bytes = spec.key_len.into();
        let area = (u64::from(spec.key_len) * u64::from(STRIPES)).next_multiple_of(SLOT_ALIGN);
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX).into();
        for (number, slot) in (0_u64..).zip(&mut raw.slots) {
            slot.active = SLOT_INACTIVE.into();
            slot.key_offset = sectors(SLOTS_AT + number * area);
            slot.stripes = STRIPES.into();
        }
        if !detached {
            raw.payload_offset = sectors(SLOTS_AT + SLOT_COUNT as u64 * area);
        }
        let mut slots = [KeySlot::default(); SLOT_COUNT];
        for (slot, raw) in slots.iter_mut().zip(&raw.slots) {
            *slot = KeySlot::of(raw, false);
        }
        Self { raw, slots }
    }

    /// The header as it lies on disk.
    pub fn to_bytes(&self) -> [u8; size_of::<RawHeader>()] {
        let mut bytes = [0; size_of::<RawHeader>()];
        bytes.copy_from_slice(self.raw.as_bytes());
        bytes
    }

    pub(crate) fn digest(&self) -> (&[u8; 20], &[u8; 32]) {
        (&self.raw.digest, &self.raw.digest_salt)
    }

    pub(crate) fn set_digest(&mut self, digest: [u8; 20], salt: [u8; 32], iterations: u32) {
        self.raw.digest = digest;
        self.raw.digest_salt = salt;
        self.raw.digest_iterations = iterations.into();
    }

    pub(crate) fn slot_salt(&self, number: usize) -> Option<&[u8; 32]> {
        self.raw.slots.get(number).map(|slot| &slot.salt)
    }

    /// Makes a slot active, or inactive if `active` is `None`: salt and iterations.
    pub(crate) fn set_slot(&mut self, number: usize, active: Option<([u8; 32], u32)>) -> Result<()> {
        let no_slot = Error::NoSuchSlot(number);
        let raw = self.raw.slots.get_mut(number).ok_or(no_slot)?;
        let (state, (salt, iterations)) = match active {
            Some(values) => (SLOT_ACTIVE, values),
            None => (SLOT_INACTIVE, ([0; 32], 0)),
        };
        raw.active = state.into();
        raw.salt = salt;
        raw.iterations = iterations.into();
        *self.slots.get_mut(number).ok_or(no_slot)? = KeySlot::of(raw, active.is_some());
        Ok(())
    }

    /// Cipher, such as `aes`.
    pub fn cipher_name(&self) -> &[u8] {
        text(&self.raw.cipher_name)
    }

    /// Mode and initialisation vectors as one text, such as `xts-plain64`.
    pub fn cipher_mode(&self) -> &[u8] {
        text(&self.raw.cipher_mode)
    }

    /// The parts of [`cipher_mode`](Self::cipher_mode).
    pub fn mode(&self) -> CipherMode<'_> {
        CipherMode::split(self.cipher_mode())
    }

    /// Hash of the key derivation, such as `sha256`.
    pub fn hash_spec(&self) -> &[u8] {
        text(&self.raw.hash_spec)
    }

    /// UUID as text.
    pub fn uuid(&self) -> &[u8] {
        text(&self.raw.uuid)
    }

    /// Bytes of the master key.
    pub fn key_bytes(&self) -> u32 {
        self.raw.key_bytes.get()
    }

    /// Where the encrypted contents begin in the volume, bytes.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.raw.payload_offset.get()) * SECTOR
    }

    /// PBKDF2 iterations of the master key's digest.
    pub fn digest_iterations(&self) -> u32 {
        self.raw.digest_iterations.get()
    }

    /// The key slots.
    pub fn slots(&self) -> &[KeySlot; SLOT_COUNT] {
        &self.slots
    }
}

impl KeySlot {
    fn read(number: usize, raw: &RawSlot) -> Result<Self> {
        let active = match raw.active.get() {
            SLOT_ACTIVE => true,
            SLOT_INACTIVE => false,
            other => return Err(Error::SlotState(number, other)),
        };
        Ok(Self::of(raw, active))
    }

    fn of(raw: &RawSlot, active: bool) -> Self {
        Self {
            active,
            iterations: raw.iterations.get(),
            key_offset: u64::from(raw.key_offset.get()) * SECTOR,
            stripes: raw.stripes.get(),
        }
    }
}

/// Writes a text into a field; what does not fit, and the last byte, stay away.
struct Field<'a> {
    field: &'a mut [u8],
    at: usize,
}

impl Write for Field<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            let last = self.field.len().saturating_sub(1);
            *self.field[..last].get_mut(self.at).ok_or(fmt::Error)? = byte;
            self.at += 1;
        }
        Ok(())
    }
}

/// The names of ciphers and hashes are all shorter than the fields.
fn put(field: &mut [u8], text: fmt::Arguments<'_>) {
    let _ = Field { field, at: 0 }.write_fmt(text);
}

/// A random UUID, version 4.
fn put_uuid(field: &mut [u8], mut bytes: [u8; 16]) {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut out = Field { field, at: 0 };
    for (at, byte) in bytes.iter().enumerate() {
        let dash = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
        let _ = write!(out, "{dash}{byte:02x}");
    }
}

/// The field up to its first zero byte.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::HEADER_LEN;

    /// A header with one active slot, field by field as the specification has them.
    fn sample() -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, b"LUKS\xba\xbe"); // magic
        put(6, &[0, 1]); // version
        put(8, b"aes"); // cipher name
        put(40, b"cbc-essiv:sha256"); // cipher mode
        put(72, b"sha1"); // hash
        put(104, &4040_u32.to_be_bytes()); // payload offset, sectors
        put(108, &32_u32.to_be_bytes()); // key bytes
        put(164, &1000_u32.to_be_bytes()); // digest iterations
        put(168, b"11111111-2222-3333-4444-555555555555"); // UUID
        for slot in 0..8_u32 {
            let at = 208 + 48 * slot as usize;
            let state = if slot == 1 { 0x00ac_71f3_u32 } else { 0xdead };
            put(at, &state.to_be_bytes());
            put(at + 4, &(slot * 7).to_be_bytes()); // iterations
            put(at + 40, &(8 + slot * 256).to_be_bytes()); // key material, sectors
            put(at + 44, &4000_u32.to_be_bytes()); // stripes
        }
        bytes
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let header = Header::parse(&sample()).unwrap();
        assert_eq!(header.cipher_name(), b"aes");
        assert_eq!(header.cipher_mode(), b"cbc-essiv:sha256");
        assert_eq!(header.mode().mode, b"cbc");
        assert_eq!(header.hash_spec(), b"sha1");
        assert_eq!(header.uuid(), b"11111111-2222-3333-4444-555555555555");
        assert_eq!((header.key_bytes(), header.payload_offset(), header.digest_iterations()), (32, 2_068_480, 1000));
        let slots = header.slots();
        assert_eq!(slots[1], KeySlot { active: true, iterations: 7, key_offset: 135_168, stripes: 4000 });
        assert!(!slots[0].active && !slots[7].active);
        assert_eq!(slots[7].key_offset, 921_600);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = sample();
        for len in 0..HEADER_LEN {
            assert_eq!(Header::parse(&bytes[..len]).err(), Some(Error::TooShort(len)));
        }
    }

    #[test]
    fn wrong_bytes_are_named() {
        let with = |at: usize, value: u8| {
            let mut bytes = sample();
            bytes[at] = value;
            Header::parse(&bytes).err()
        };
        assert_eq!(with(0, b'X'), Some(Error::NotLuks));
        assert_eq!(with(7, 2), Some(Error::UnsupportedVersion(2)));
        assert_eq!(with(208, 1), Some(Error::SlotState(0, 0x0100_dead)));
        let mut bytes = sample();
        bytes[72..104].fill(b'x');
        assert_eq!(Header::parse(&bytes).err(), Some(Error::UnterminatedText(TextField::Hash)));
    }

    #[test]
    fn a_new_header_is_laid_out_as_by_qemu() {
        let spec = CipherSpec::named(b"aes", CipherMode::split(b"xts-plain64"), 64).unwrap();
        let mut header = Header::new(&spec, None, Hash::Sha256, [0xff; 16], false);
        header.set_digest([1; 20], [2; 32], 1000);
        assert_eq!(header.payload_offset(), 2_068_480);
        assert_eq!(header.slots()[7].key_offset, 1_810_432);
        assert_eq!(header.uuid(), b"ffffffff-ffff-4fff-bfff-ffffffffffff");
        header.check(false).unwrap();
        header.set_slot(2, Some(([3; 32], 77))).unwrap();
        let again = Header::parse(&header.to_bytes()).unwrap();
        assert_eq!((again.slots()[2].active, again.slots()[2].iterations), (true, 77));
        assert_eq!((again.cipher_mode(), again.spec()), (&b"xts-plain64"[..], Ok(spec)));
        assert_eq!(header.set_slot(8, None), Err(Error::NoSuchSlot(8)));
    }

    #[test]
    fn contradictions_are_found() {
        let sound = {
            let spec = CipherSpec::named(b"aes", CipherMode::split(b"cbc-plain64"), 32).unwrap();
            let mut header = Header::new(&spec, None, Hash::Sha1, [0; 16], false);
            header.set_digest([0; 20], [0; 32], 1);
            header.set_slot(0, Some(([0; 32], 1))).unwrap();
            header.to_bytes()
        };
        let with = |at: usize, value: u32| {
            let mut bytes = sound;
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            Header::parse(&bytes).unwrap().check(false)
        };
        assert_eq!(Header::parse(&sound).unwrap().check(false), Ok(()));
        assert_eq!(with(104, 7), Err(Error::PayloadInHeader(7)));
        assert_eq!(with(104, 8), Err(Error::SlotInPayload(0)));
        assert_eq!(with(164, 0), Err(Error::NoIterations));
        assert_eq!(with(212, 0), Err(Error::SlotNoIterations(0)));
        assert_eq!(with(252, u32::MAX), Err(Error::SlotStripes(0, u32::MAX)));
        assert_eq!(with(248, 1), Err(Error::SlotInHeader(0)));
        assert_eq!(with(248, 9), Err(Error::SlotsOverlap(0, 1)));
        assert_eq!(with(248, u32::MAX), Err(Error::SlotInPayload(0)));
        assert_eq!(with(108, u32::MAX), Err(Error::SlotInPayload(0)));
    }
}
