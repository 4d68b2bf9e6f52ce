//! LUKS volumes of both versions: headers read, keys derived under small limits, key slots made and erased.
//!
//! The bytes are headers only: they replace those of a good volume, whose key material stays, so that also what follows a passphrase that
//! fits is reached.

use std::cell::RefCell;

use instar_blockio::{BlockWrite, MemBlock};
use instar_luks::{Header, Limits, Random, SLOT_COUNT, Volume};

#[path = "../../../luks/tests/volumes/mod.rs"]
mod volumes;

/// Little, so that an input is quick.
const LIMITS: Limits = Limits { iterations: 4000, memory: 1 << 16 };
/// Bytes of a header of version 1.
const HEADER1: usize = 592;
/// Bytes of a header of version 2 with its text, and of its binary part.
const HEADER2: usize = 0x4000;
const BINARY2: usize = 512;
const TEXT_AT: usize = 4096;

/// Whether a key is derived for this input, too. It takes milliseconds, mostly of hashing key material, where a header takes microseconds: one
/// input in 64 gets it, told by a sum of its bytes, and so always the same ones.
fn with_key(data: &[u8]) -> bool {
    data.iter().fold(0_u8, |sum, byte| sum.wrapping_mul(5).wrapping_add(*byte)).is_multiple_of(64)
}

fn open(file: &MemBlock, detached: bool, with_key: bool) {
    let Ok(volume) = Volume::read(file, 0, detached) else { return };
    if let Ok(payload) = volume.payload() {
        assert!(payload.sector_size.is_power_of_two() && payload.offset.is_multiple_of(512), "{payload:?}");
    }
    let _ = volume.spec();
    if !with_key {
        return;
    }
    let opened = volume.unlock(file, 0, volumes::PASSPHRASE, &LIMITS);
    if let Ok(cipher) = opened {
        let plain = vec![0x5a; 2 * cipher.sector_size() as usize];
        let mut data = plain.clone();
        cipher.encrypt(0, &mut data).expect("whole sectors");
        cipher.decrypt(0, &mut data).expect("whole sectors");
        assert_eq!(data, plain);
    }
}

/// The bytes are the header of a volume of version 1.
pub fn luks1(data: &[u8]) {
    luks1_header(data, with_key(data));
}

fn luks1_header(data: &[u8], with_key: bool) {
    thread_local! {
        static VOLUME: (Vec<u8>, RefCell<MemBlock>) = {
            let bytes = volumes::version_1();
            (bytes[..HEADER1].to_vec(), RefCell::new(bytes.into()))
        };
    }
    VOLUME.with(|(good, file)| {
        let file = &mut *file.borrow_mut();
        let mut bytes = good.clone();
        let len = data.len().min(HEADER1);
        bytes[..len].copy_from_slice(&data[..len]);
        file.write_at(0, &bytes).expect("memory");
        luks1_file(file, with_key);
    });
}

fn luks1_file(file: &MemBlock, with_key: bool) {
    open(file, false, with_key);
    open(file, true, with_key);
    let Ok(mut header) = Header::parse(&file.as_bytes()[..HEADER1]) else { return };
    // Key slots change only where the header was found good.
    if header.check(false).is_err() {
        return;
    }
    Header::parse(&header.to_bytes()).expect("what was parsed and found good");
    if !with_key {
        return;
    }
    let Ok((_, key)) = header.unlock(file, 0, volumes::PASSPHRASE, &LIMITS) else { return };
    let mut random = Random::new(&[1; Random::SEED]);
    if let Some(slot) = header.free_slot()
        && let Ok(patch) = header.add_key(slot, &key, b"new", 2, &mut random)
    {
        assert!(patch.offset >= HEADER1 as u64);
    }
    for slot in [0, 1, SLOT_COUNT - 1] {
        let _ = header.erase_key(slot, slot % 2 == 1, &mut random);
    }
    Header::parse(&header.to_bytes()).expect("what was parsed, changed by us");
}

/// The first byte says whether sums are made right and which of the two headers it is; then come the binary header and the text.
pub fn luks2(data: &[u8]) {
    luks2_header(data, with_key(data));
}

fn luks2_header(data: &[u8], with_key: bool) {
    thread_local! {
        static VOLUME: (Vec<u8>, RefCell<MemBlock>) = {
            let bytes = volumes::version_2(&volumes::metadata(), true);
            (bytes[..2 * HEADER2].to_vec(), RefCell::new(bytes.into()))
        };
    }
    let Some((flags, data)) = data.split_first() else { return };
    let (binary, text) = data.split_at(data.len().min(BINARY2));
    let text = &text[..text.len().min(HEADER2 - TEXT_AT)];
    let mut header = VOLUME.with(|(good, _)| good[..HEADER2].to_vec());
    header[..binary.len()].copy_from_slice(binary);
    header[TEXT_AT..][..text.len()].copy_from_slice(text);
    header[TEXT_AT + text.len()..].fill(0);
    if flags & 1 == 1 {
        volumes::seal(&mut header);
    }
    let at = if flags & 2 == 2 { HEADER2 } else { 0 };
    VOLUME.with(|(good, file)| {
        let file = &mut *file.borrow_mut();
        file.write_at(0, good).expect("memory");
        file.write_at(at as u64, &header).expect("memory");
        open(file, false, with_key);
        open(file, true, with_key);
    });
}

/// A volume of version 1, and one with all key slots in use.
pub fn luks1_seeds() -> Vec<Vec<u8>> {
    let good = volumes::version_1()[..HEADER1].to_vec();
    let mut full = good.clone();
    let slot: Vec<u8> = good[208..208 + 40].to_vec();
    for number in 1..SLOT_COUNT {
        full[208 + 48 * number..][..40].copy_from_slice(&slot);
    }
    let essiv = replaced(&good, b"xts-plain64", b"cbc-essiv:md5");
    vec![good, full, essiv]
}

/// Volumes of version 2 with PBKDF2 and Argon2, by the first and the second header.
pub fn luks2_seeds() -> Vec<Vec<u8>> {
    let pbkdf2 = volumes::metadata();
    let argon2 = pbkdf2.replace("\"type\":\"pbkdf2\",\"salt\"", "\"type\":\"argon2id\",\"salt\"");
    let wide = pbkdf2.replace("\"sector_size\":512", "\"sector_size\":4096");
    let seed = |flags: u8, text: &str| {
        let mut binary = volumes::version_2(text, false)[..BINARY2].to_vec();
        if flags & 2 == 2 {
            binary[..6].copy_from_slice(b"SKUL\xba\xbe");
            binary[256..264].copy_from_slice(&(HEADER2 as u64).to_be_bytes());
            binary[23] = 9;
        }
        [&[flags], &binary[..], text.as_bytes()].concat()
    };
    vec![seed(1, &pbkdf2), seed(1, &argon2), seed(3, &wide), seed(3, &argon2)]
}

fn replaced(header: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut header = header.to_vec();
    if let Some(at) = header.windows(from.len()).position(|found| found == from) {
        header[at..at + to.len()].copy_from_slice(to);
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_volumes() {
        for seed in luks1_seeds() {
            let mut bytes = volumes::version_1();
            bytes[..HEADER1].copy_from_slice(&seed);
            Volume::read(&MemBlock::from(bytes), 0, false).unwrap();
            luks1_header(&seed, true);
        }
        luks2_seeds().iter().for_each(|seed| luks2_header(seed, true));
    }
}
