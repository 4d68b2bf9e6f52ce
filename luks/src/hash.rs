use alloc::vec::Vec;
use core::fmt;

use hmac::{EagerHash, Hmac, KeyInit, Mac};
use md5::Md5;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::digest::Digest;
use sha2::{Sha224, Sha256, Sha384, Sha512};
use sm3::Sm3;

use crate::error::{Error, Result};

/// A hash algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hash {
    /// MD5, 16 bytes.
    Md5,
    /// SHA-1, 20 bytes.
    Sha1,
    /// SHA-224, 28 bytes.
    Sha224,
    /// SHA-256, 32 bytes.
    Sha256,
    /// SHA-384, 48 bytes.
    Sha384,
    /// SHA-512, 64 bytes.
    Sha512,
    /// RIPEMD-160, 20 bytes.
    Ripemd160,
    /// SM3, 32 bytes.
    Sm3,
}

/// Runs an expression with `$D` standing for the hash's type.
macro_rules! with_hash {
    ($hash:expr, $D:ident => $body:expr) => {
        match $hash {
            Hash::Md5 => {
                type $D = Md5;
                $body
            }
            Hash::Sha1 => {
                type $D = Sha1;
                $body
            }
            Hash::Sha224 => {
                type $D = Sha224;
                $body
            }
            Hash::Sha256 => {
                type $D = Sha256;
                $body
            }
            Hash::Sha384 => {
                type $D = Sha384;
                $body
            }
            Hash::Sha512 => {
                type $D = Sha512;
                $body
            }
            Hash::Ripemd160 => {
                type $D = Ripemd160;
                $body
            }
            Hash::Sm3 => {
                type $D = Sm3;
                $body
            }
        }
    };
}

impl Hash {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Md5, Self::Sha1, Self::Sha224, Self::Sha256, Self::Sha384, Self::Sha512, Self::Ripemd160, Self::Sm3];

    /// The algorithm that a header names.
    pub fn named(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name().as_bytes() == name)
    }

    /// Its name in headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
            Self::Sm3 => "sm3",
        }
    }

    /// Bytes of a digest: 16 to 64.
    pub fn digest_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 | Self::Sm3 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The digest of several parts, one behind the other.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        with_hash!(self, D => {
            let mut state = D::new();
            parts.iter().for_each(|part| state.update(part));
            state.finalize().to_vec()
        })
    }

    /// Fills `out` with PBKDF2 of the passphrase.
    ///
    /// # Errors
    /// [`Error::NoIterations`].
    pub fn pbkdf2(self, passphrase: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) -> Result<()> {
        fn fill<D: EagerHash>(passphrase: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) -> Result<()>
        where
            Hmac<D>: Clone + Mac + KeyInit + Sync,
        {
            pbkdf2::pbkdf2::<Hmac<D>>(passphrase, salt, iterations, out).map_err(|_| Error::KeyDerivation)
        }
        if iterations == 0 {
            return Err(Error::NoIterations);
        }
        with_hash!(self, D => fill::<D>(passphrase, salt, iterations, out))
    }

    /// What PBKDF2 into `len` bytes costs: iterations of the hash, all blocks together.
    pub(crate) fn pbkdf2_cost(self, iterations: u32, len: usize) -> u64 {
        u64::from(iterations).saturating_mul(len.div_ceil(self.digest_len()).max(1) as u64)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn names_lead_back() {
        for hash in Hash::ALL {
            assert_eq!(Hash::named(hash.name().as_bytes()), Some(hash));
            assert_eq!(hash.digest(&[b"x"]).len(), hash.digest_len());
        }
        assert_eq!(Hash::named(b"whirlpool"), None);
    }

    #[test]
    fn digests_of_abc() {
        // RFC 1321, FIPS 180-4, the RIPEMD-160 page of its authors, GB/T 32905.
        for (hash, want) in [
            (Hash::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (Hash::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (Hash::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (Hash::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
            (Hash::Sm3, "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"),
        ] {
            assert_eq!(hash.digest(&[b"a", b"bc"]), hex(want), "{hash}");
        }
    }

    #[test]
    fn pbkdf2_of_the_rfcs() {
        // RFC 6070 and RFC 7914, section 11.
        let mut out = [0; 20];
        Hash::Sha1.pbkdf2(b"password", b"salt", 4096, &mut out).unwrap();
        assert_eq!(out.to_vec(), hex("4b007901b765489abead49d926f721d065a429c1"));
        let mut out = [0; 64];
        Hash::Sha256.pbkdf2(b"passwd", b"salt", 1, &mut out).unwrap();
        assert_eq!(out[..16].to_vec(), hex("55ac046e56e3089fec1691c22544b605"));
        assert_eq!(Hash::Sha256.pbkdf2(b"", b"", 0, &mut out), Err(Error::NoIterations));
        assert_eq!(Hash::Sha256.pbkdf2_cost(1000, 64), 2000);
    }
}
