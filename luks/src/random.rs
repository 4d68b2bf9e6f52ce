use aes::Aes256;
use cipher::{BlockCipherEncrypt, KeyInit};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Random bytes, all made of one seed: AES-256 in counter mode.
///
/// A new volume takes some 256 KiB of random bytes. The seed must come from a good source (on a host: the kernel's), be used once
/// and be forgotten.
#[derive(Debug)]
pub struct Random {
    cipher: Aes256,
    counter: u128,
    block: [u8; 16],
    used: usize,
}

impl Random {
    /// Bytes of a seed.
    pub const SEED: usize = 48;

    /// Starts from a seed.
    pub fn new(seed: &[u8; Self::SEED]) -> Self {
        let mut key = [0; 32];
        let mut start = [0; 16];
        key.copy_from_slice(&seed[..32]);
        start.copy_from_slice(&seed[32..]);
        let cipher = Aes256::new(&key.into());
        key.zeroize();
        Self { cipher, counter: u128::from_be_bytes(start), block: [0; 16], used: 16 }
    }

    /// Fills `out` with bytes never given before.
    pub fn fill(&mut self, out: &mut [u8]) {
        for byte in out {
            if self.used == self.block.len() {
                let mut block = self.counter.to_be_bytes().into();
                self.cipher.encrypt_block(&mut block);
                self.block = block.into();
                self.counter = self.counter.wrapping_add(1);
                self.used = 0;
            }
            *byte = core::mem::take(&mut self.block[self.used]);
            self.used += 1;
        }
    }
}

impl Drop for Random {
    fn drop(&mut self) {
        self.block.zeroize();
        self.counter.zeroize();
    }
}

/// The cipher clears its key schedule itself.
impl ZeroizeOnDrop for Random {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_one_stream() {
        let mut whole = [0; 100];
        Random::new(&[9; 48]).fill(&mut whole);
        let mut pieces = [0; 100];
        let mut random = Random::new(&[9; 48]);
        pieces.chunks_mut(7).for_each(|piece| random.fill(piece));
        assert_eq!(whole, pieces);
        assert_ne!(whole[..16], whole[16..32]);
        let mut other = [0; 100];
        Random::new(&[8; 48]).fill(&mut other);
        assert_ne!(whole, other);
    }
}
