use zerocopy::FromBytes;

use crate::cipher::CipherMode;
use crate::error::{Error, Result};
use crate::format::{MAGIC, RawHeader, RawSlot, SECTOR, SLOT_ACTIVE, SLOT_COUNT, SLOT_INACTIVE};

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

impl Header {
    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// What makes the bytes no LUKS1 header. Sizes and offsets are not judged: describing needs no key material.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).map_err(|_| Error::TooShort(bytes.len()))?;
        if raw.magic != MAGIC {
            return Err(Error::NotLuks);
        }
        if raw.version.get() != 1 {
            return Err(Error::UnsupportedVersion(raw.version.get()));
        }
        for text in [&raw.cipher_name[..], &raw.cipher_mode, &raw.hash_spec, &raw.uuid] {
            if !text.contains(&0) {
                return Err(Error::UnterminatedText);
            }
        }
        let mut slots = [KeySlot::default(); SLOT_COUNT];
        for (number, (slot, raw)) in slots.iter_mut().zip(&raw.slots).enumerate() {
            *slot = KeySlot::read(number, raw)?;
        }
        Ok(Self { raw, slots })
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
        Ok(Self {
            active,
            iterations: raw.iterations.get(),
            key_offset: u64::from(raw.key_offset.get()) * SECTOR,
            stripes: raw.stripes.get(),
        })
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
        assert_eq!(Header::parse(&bytes).err(), Some(Error::UnterminatedText));
    }
}
