//! Ciphers over sectors: block ciphers in their modes, with an initialisation vector for each sector.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;

use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use cipher::array::{Array, ArraySize};
use cipher::consts::U16;
use cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use instar_blockio::{self as blockio, SectorCipher};
use serpent::Serpent;
use twofish::Twofish;
use zeroize::Zeroizing;

use crate::cipher::{Algorithm, CipherSpec, IvGen, Mode};
use crate::error::{Error, Result};

/// Bytes in which positions count.
const UNIT: u64 = 512;
/// Longest sector, bytes.
const MAX_SECTOR: usize = 4096;

/// A block cipher with its key.
trait Cipher: BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync + 'static {}
impl<T: BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync + 'static> Cipher for T {}

impl CipherSpec {
    /// The cipher with this key, over sectors of `sector_size` bytes (512 to 4096, a power of two).
    ///
    /// # Errors
    /// Parts that do not fit together, or a key or sector of a wrong size.
    pub fn with_key(&self, key: &[u8], sector_size: u32) -> Result<Arc<dyn SectorCipher>> {
        self.check()?;
        let size_fits = sector_size.is_power_of_two() && (512..=MAX_SECTOR as u32).contains(&sector_size);
        if key.len() != self.key_len as usize || !size_fits {
            return Err(Error::KeySize(self.key_len));
        }
        let len = self.cipher_key_len();
        match (self.algorithm, len) {
            (Algorithm::Aes, 16) => self.wide::<Aes128>(key, sector_size),
            (Algorithm::Aes, 24) => self.wide::<Aes192>(key, sector_size),
            (Algorithm::Aes, 32) => self.wide::<Aes256>(key, sector_size),
            (Algorithm::Serpent, _) => self.wide::<Serpent>(key, sector_size),
            (Algorithm::Twofish, _) => self.wide::<Twofish>(key, sector_size),
            (Algorithm::Cast5, _) => self.any::<Cast5>(key, sector_size),
            _ => Err(Error::KeySize(self.key_len)),
        }
    }

    /// With blocks of 16 bytes, which XTS needs.
    fn wide<C: Cipher<BlockSize = U16> + KeyInit>(&self, key: &[u8], size: u32) -> Result<Arc<dyn SectorCipher>> {
        if self.mode != Mode::Xts {
            return self.any::<C>(key, size);
        }
        let (data, tweak) = key.split_at(self.cipher_key_len());
        let mode = Xts { data: new::<C>(data)?, tweak: new::<C>(tweak)? };
        Ok(Arc::new(Sectors { mode, iv: self.vectors(key)?, size }))
    }

    fn any<C: Cipher + KeyInit>(&self, key: &[u8], size: u32) -> Result<Arc<dyn SectorCipher>> {
        let (cipher, iv) = (new::<C>(key)?, self.vectors(key)?);
        Ok(match self.mode {
            Mode::Xts => return Err(Error::ModeNeedsWideBlocks),
            Mode::Cbc => Arc::new(Sectors { mode: Cbc(cipher), iv, size }),
            Mode::Ctr => Arc::new(Sectors { mode: Ctr(cipher), iv, size }),
            Mode::Ecb => Arc::new(Sectors { mode: Ecb(cipher), iv, size }),
        })
    }

    fn vectors(&self, key: &[u8]) -> Result<Vectors> {
        Ok(match self.ivgen {
            IvGen::Plain => Vectors::Plain,
            IvGen::Plain64 => Vectors::Plain64,
            IvGen::Essiv(hash) => {
                let salt = Zeroizing::new(hash.digest(&[key]));
                Vectors::Essiv(match (self.algorithm, salt.len()) {
                    (Algorithm::Aes, 16) => Box::new(new::<Aes128>(&salt)?),
                    (Algorithm::Aes, 24) => Box::new(new::<Aes192>(&salt)?),
                    (Algorithm::Aes, 32) => Box::new(new::<Aes256>(&salt)?),
                    (Algorithm::Serpent, _) => Box::new(new::<Serpent>(&salt)?),
                    (Algorithm::Twofish, _) => Box::new(new::<Twofish>(&salt)?),
                    (Algorithm::Cast5, _) => Box::new(new::<Cast5>(&salt)?),
                    (_, len) => return Err(Error::EssivKeySize(len)),
                })
            }
        })
    }
}

fn new<C: KeyInit>(key: &[u8]) -> Result<C> {
    C::new_from_slice(key).map_err(|_| Error::KeySize(key.len() as u32))
}

/// Makes initialisation vectors.
enum Vectors {
    Plain,
    Plain64,
    Essiv(Box<dyn EncryptNumber>),
}

/// Encrypts a sector number, as ESSIV wants it.
trait EncryptNumber: Send + Sync {
    fn encrypt(&self, number: u64, out: &mut [u8]);
}

impl<C: Cipher> EncryptNumber for C {
    fn encrypt(&self, number: u64, out: &mut [u8]) {
        let mut block = Block::<C>::default();
        put(&mut block, &number.to_le_bytes());
        self.encrypt_block(&mut block);
        put(out, &block);
    }
}

/// Copies as much as fits.
fn put(out: &mut [u8], bytes: &[u8]) {
    out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = *byte);
}

impl Vectors {
    /// Fills `out`, all zero, with the vector of a sector.
    fn make(&self, number: u64, out: &mut [u8]) {
        match self {
            Self::Plain => put(out, &(number as u32).to_le_bytes()),
            Self::Plain64 => put(out, &number.to_le_bytes()),
            Self::Essiv(cipher) => cipher.encrypt(number, out),
        }
    }
}

/// A mode over single sectors.
trait SectorMode: Send + Sync {
    /// `iv(n, out)` makes the vector of the n-th sector of `data`.
    fn encrypt(&self, data: &mut [u8], sector: usize, iv: &dyn Fn(u64, &mut [u8]));
    fn decrypt(&self, data: &mut [u8], sector: usize, iv: &dyn Fn(u64, &mut [u8]));
}

struct Sectors<M> {
    mode: M,
    iv: Vectors,
    size: u32,
}

impl<M> fmt::Debug for Sectors<M> {
    /// Says nothing of the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sectors").field("size", &self.size).finish_non_exhaustive()
    }
}

impl<M: SectorMode> Sectors<M> {
    fn iv(&self, position: u64) -> impl Fn(u64, &mut [u8]) {
        let step = u64::from(self.size) / UNIT;
        move |index, out| self.iv.make((position / UNIT).wrapping_add(index.wrapping_mul(step)), out)
    }
}

impl<M: SectorMode> SectorCipher for Sectors<M> {
    fn sector_size(&self) -> u32 {
        self.size
    }

    fn decrypt(&self, position: u64, data: &mut [u8]) -> blockio::Result<()> {
        self.check_sectors(position, data.len())?;
        self.mode.decrypt(data, self.size as usize, &self.iv(position));
        Ok(())
    }

    fn encrypt(&self, position: u64, data: &mut [u8]) -> blockio::Result<()> {
        self.check_sectors(position, data.len())?;
        self.mode.encrypt(data, self.size as usize, &self.iv(position));
        Ok(())
    }
}

/// The whole blocks of a sector, whose size is a multiple of theirs.
fn blocks<N: ArraySize>(sector: &mut [u8]) -> &mut [Array<u8, N>] {
    Array::slice_as_chunks_mut(sector).0
}

fn xor(out: &mut [u8], with: &[u8]) {
    out.iter_mut().zip(with).for_each(|(byte, with)| *byte ^= with);
}

struct Xts<C> {
    data: C,
    tweak: C,
}

/// Sectors whose first tweaks are made in one go: a block cipher is at its best with several blocks.
const TWEAKS: usize = 8;
/// Blocks of the longest sector.
const MAX_BLOCKS: usize = MAX_SECTOR / 16;

impl<C: Cipher<BlockSize = U16>> Xts<C> {
    fn run(&self, data: &mut [u8], size: usize, iv: &dyn Fn(u64, &mut [u8]), act: impl Fn(&C, &mut [Array<u8, U16>])) {
        let mut index = 0;
        let mut tweaks = [0_u128; MAX_BLOCKS];
        for group in data.chunks_mut(TWEAKS * size) {
            let mut first = [Array::<u8, U16>::default(); TWEAKS];
            let count = group.len() / size;
            for block in &mut first[..count] {
                iv(index, block);
                index += 1;
            }
            self.tweak.encrypt_blocks(&mut first[..count]);
            for (sector, first) in group.chunks_exact_mut(size).zip(first) {
                let mut tweak = u128::from_le_bytes(first.into());
                let blocks = blocks::<U16>(sector);
                for (block, kept) in blocks.iter_mut().zip(&mut tweaks) {
                    *kept = tweak;
                    mix(block, tweak);
                    // Multiplied by x in GF(2^128), without a branch.
                    tweak = (tweak << 1) ^ (0x87 * (tweak >> 127));
                }
                act(&self.data, blocks);
                blocks.iter_mut().zip(&tweaks).for_each(|(block, tweak)| mix(block, *tweak));
            }
        }
    }
}

fn mix(block: &mut Array<u8, U16>, tweak: u128) {
    let mixed = u128::from_le_bytes((*block).into()) ^ tweak;
    *block = mixed.to_le_bytes().into();
}

impl<C: Cipher<BlockSize = U16>> SectorMode for Xts<C> {
    fn encrypt(&self, data: &mut [u8], sector: usize, iv: &dyn Fn(u64, &mut [u8])) {
        self.run(data, sector, iv, |cipher, blocks| cipher.encrypt_blocks(blocks));
    }

    fn decrypt(&self, data: &mut [u8], sector: usize, iv: &dyn Fn(u64, &mut [u8])) {
        self.run(data, sector, iv, |cipher, blocks| cipher.decrypt_blocks(blocks));
    }
}

struct Cbc<C>(C);

impl<C: Cipher> SectorMode for Cbc<C> {
    fn encrypt(&self, data: &mut [u8], sector: usize, iv: &dyn Fn(u64, &mut [u8])) {
        for (index, sector) in (0..).zip(data.chunks_exact_mut(sector)) {
            let mut before = Block::<C>::default();
            iv(index, &mut before);
            for block in blocks::<C::BlockSize>(sector) {
                xor(block, &before);
                self.0.encrypt_block(block);
                before = block.clone();
            }
        }
    }

    fn decrypt(&self, data: &mut [u8], sector: usize, iv: &dyn Fn(u64, &mut [u8])) {
        let mut stored = [0; MAX_SECTOR];
        for (index, sector) in (0..).zip(data.chunks_exact_mut(sector)) {
            let stored = &mut stored[..sector.len()];
            stored.copy_from_slice(sector);
            self.0.decrypt_blocks(blocks::<C::BlockSize>(sector));
            let mut before = Block::<C>::default();
            iv(index, &mut before);
            let (head, tail) = sector.split_at_mut(before.len());
            xor(head, &before);
            // Each block but the first is mixed with the stored one before it.
            xor(tail, stored);
        }
    }
}

struct Ctr<C>(C);

impl<C: Cipher> Ctr<C> {
    fn apply(&self, data: &mut [u8], sector: usize, iv: &dyn Fn(u64, &mut [u8])) {
        let mut stream = [0; MAX_SECTOR];
        for (index, sector) in (0..).zip(data.chunks_exact_mut(sector)) {
            let stream = &mut stream[..sector.len()];
            let mut counter = Block::<C>::default();
            iv(index, &mut counter);
            for block in blocks::<C::BlockSize>(stream) {
                block.copy_from_slice(&counter);
                count(&mut counter);
            }
            self.0.encrypt_blocks(blocks::<C::BlockSize>(stream));
            xor(sector, stream);
        }
    }
}

/// Adds one to a big-endian number.
fn count(counter: &mut [u8]) {
    for byte in counter.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            return;
        }
    }
}

impl<C: Cipher> SectorMode for Ctr<C> {
    fn encrypt(&self, data: &mut [u8], sector: usize, iv: &dyn Fn(u64, &mut [u8])) {
        self.apply(data, sector, iv);
    }

    fn decrypt(&self, data: &mut [u8], sector: usize, iv: &dyn Fn(u64, &mut [u8])) {
        self.apply(data, sector, iv);
    }
}

struct Ecb<C>(C);

impl<C: Cipher> SectorMode for Ecb<C> {
    fn encrypt(&self, data: &mut [u8], _: usize, _: &dyn Fn(u64, &mut [u8])) {
        self.0.encrypt_blocks(blocks::<C::BlockSize>(data));
    }

    fn decrypt(&self, data: &mut [u8], _: usize, _: &dyn Fn(u64, &mut [u8])) {
        self.0.decrypt_blocks(blocks::<C::BlockSize>(data));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cipher::CipherMode;
    use crate::hash::Hash;

    #[test]
    fn xts_of_the_standard() {
        // IEEE 1619-2007, vector 10: AES-256, data unit 0xff, 512 bytes 0, 1, 2, …
        let mut key = [0; 64];
        let digits = "2718281828459045235360287471352662497757247093699959574966967627\
                      3141592653589793238462643383279502884197169399375105820974944592";
        for (at, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap();
        }
        let spec = CipherSpec::named(b"aes", CipherMode::split(b"xts-plain64"), 64).unwrap();
        let cipher = spec.with_key(&key, 512).unwrap();
        let plain: [u8; 512] = core::array::from_fn(|at| at as u8);
        let mut data = plain;
        cipher.encrypt(0xff * 512, &mut data).unwrap();
        assert_eq!(data[..8], [0x1c, 0x3b, 0x3a, 0x10, 0x2f, 0x77, 0x03, 0x86]);
        cipher.decrypt(0xff * 512, &mut data).unwrap();
        assert_eq!(data, plain);
    }

    #[test]
    fn every_cipher_leads_back_and_sectors_are_independent() {
        for algorithm in [Algorithm::Aes, Algorithm::Serpent, Algorithm::Twofish, Algorithm::Cast5] {
            for mode in [Mode::Xts, Mode::Cbc, Mode::Ctr, Mode::Ecb] {
                for ivgen in [IvGen::Plain, IvGen::Plain64, IvGen::Essiv(Hash::Md5), IvGen::Essiv(Hash::Sha256)] {
                    for size in [512, 4096] {
                        let key_len = if mode == Mode::Xts { 32 } else { 16 };
                        let spec = CipherSpec { algorithm, key_len, mode, ivgen };
                        if spec.check().is_err() {
                            continue;
                        }
                        let key: alloc::vec::Vec<u8> = (0..key_len as u8).collect();
                        let cipher = spec.with_key(&key, size).unwrap();
                        let plain: alloc::vec::Vec<u8> = (0..20 * size).map(|at| (at / 3) as u8).collect();
                        let mut data = plain.clone();
                        cipher.encrypt(1 << 42, &mut data).unwrap();
                        assert_ne!(data, plain);
                        // One sector from the middle by itself.
                        let at = 9 * size as usize;
                        let mut one = data[at..][..size as usize].to_vec();
                        cipher.decrypt((1 << 42) + at as u64, &mut one).unwrap();
                        assert_eq!(one, plain[at..][..size as usize], "{spec:?} {size}");
                        cipher.decrypt(1 << 42, &mut data).unwrap();
                        assert_eq!(data, plain, "{spec:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn only_whole_sectors() {
        let spec = CipherSpec::named(b"aes", CipherMode::split(b"cbc-plain64"), 32).unwrap();
        let cipher = spec.with_key(&[1; 32], 512).unwrap();
        assert!(cipher.decrypt(100, &mut [0; 512]).is_err());
        assert!(cipher.encrypt(512, &mut [0; 513]).is_err());
        assert!(spec.with_key(&[1; 31], 512).is_err() && spec.with_key(&[1; 32], 1000).is_err());
    }
}
