//! Small volumes of both versions, made here.

use instar_luks::{CipherMode, CipherSpec, CreateOptions, Fresh, Hash, Random, create};
use sha2::{Digest, Sha256};

/// Opens them.
pub const PASSPHRASE: &[u8] = b"pass";
/// Bytes of a header of version 2 with its text.
const HEADER2: usize = 0x4000;

fn fresh() -> Fresh {
    let cipher = CipherSpec::named(b"aes", CipherMode::split(b"xts-plain64"), 32).unwrap();
    let options = CreateOptions {
        cipher,
        iv_hash: None,
        hash: Hash::Sha256,
        slot_iterations: 2,
        digest_iterations: 2,
        detached: false,
    };
    create(&options, PASSPHRASE, &mut Random::new(&[1; Random::SEED])).unwrap()
}

/// A volume of version 1 with a sector of contents.
pub fn version_1() -> Vec<u8> {
    let fresh = fresh();
    let mut bytes = vec![0; fresh.header.payload_offset() as usize + 512];
    bytes[..592].copy_from_slice(&fresh.header.to_bytes());
    bytes[fresh.material.offset as usize..][..fresh.material.bytes.len()].copy_from_slice(&fresh.material.bytes);
    bytes
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let found = DIGITS[(word >> (18 - 6 * digit)) as usize % 64];
            text.push(if digit <= group.len() { char::from(found) } else { '=' });
        }
    }
    text
}

/// The text of a volume of version 2 with the key of [`version_1`].
pub fn metadata() -> String {
    let header = fresh().header.to_bytes();
    let (digest, digest_salt, salt) = (&header[112..132], &header[132..164], &header[216..248]);
    format!(
        "{{\"keyslots\":{{\"0\":{{\"type\":\"luks2\",\"key_size\":32,\"af\":{{\"type\":\"luks1\",\"stripes\":4000,\"hash\":\"sha256\"}},\
         \"area\":{{\"type\":\"raw\",\"offset\":\"32768\",\"size\":\"131072\",\"encryption\":\"aes-xts-plain64\",\"key_size\":32}},\
         \"kdf\":{{\"type\":\"pbkdf2\",\"salt\":\"{}\",\"hash\":\"sha256\",\"iterations\":2,\"time\":1,\"memory\":32,\"cpus\":1}}}}}},\
         \"segments\":{{\"0\":{{\"type\":\"crypt\",\"offset\":\"163840\",\"size\":\"dynamic\",\"iv_tweak\":\"0\",\
         \"encryption\":\"aes-xts-plain64\",\"sector_size\":512}}}},\
         \"digests\":{{\"0\":{{\"type\":\"pbkdf2\",\"keyslots\":[\"0\"],\"segments\":[\"0\"],\"salt\":\"{}\",\"digest\":\"{}\",\
         \"iterations\":2,\"hash\":\"sha256\"}}}},\"tokens\":{{}},\"config\":{{}}}}",
        base64(salt),
        base64(digest_salt),
        base64(digest)
    )
}

/// A volume of version 2 with this text, and a sector of contents. Only the first header is there.
pub fn version_2(text: &str, sealed: bool) -> Vec<u8> {
    let mut bytes = vec![0; 163_840 + 512];
    bytes[..6].copy_from_slice(b"LUKS\xba\xbe");
    bytes[7] = 2;
    bytes[8..16].copy_from_slice(&(HEADER2 as u64).to_be_bytes());
    bytes[23] = 1; // sequence number
    bytes[72..78].copy_from_slice(b"sha256");
    bytes[168..172].copy_from_slice(b"uuid");
    let len = text.len().min(HEADER2 - 4096);
    bytes[4096..4096 + len].copy_from_slice(&text.as_bytes()[..len]);
    let material = fresh().material.bytes;
    bytes[32768..32768 + material.len()].copy_from_slice(&material);
    if sealed {
        seal(&mut bytes);
    }
    bytes
}

/// Makes the sum of the first header fit.
pub fn seal(bytes: &mut [u8]) {
    bytes[448..512].fill(0);
    let sum = Sha256::digest(&bytes[..HEADER2]);
    bytes[448..448 + sum.len()].copy_from_slice(&sum);
}
