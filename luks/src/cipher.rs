use crate::error::{Error, Result, TextField};
use crate::hash::Hash;

/// Longest key accepted, bytes: two keys of 32.
pub(crate) const MAX_KEY: u32 = 64;

/// A block cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Algorithm {
    /// AES, keys of 16, 24 or 32 bytes.
    Aes,
    /// Serpent, keys of 16, 24 or 32 bytes.
    Serpent,
    /// Twofish, keys of 16, 24 or 32 bytes.
    Twofish,
    /// CAST5, keys of 16 bytes, blocks of 8.
    Cast5,
}

/// How blocks of a sector depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// XEX with a tweak for each block; takes two keys.
    Xts,
    /// Cipher block chaining.
    Cbc,
    /// Counter.
    Ctr,
    /// Each block alone.
    Ecb,
}

/// How the initialisation vector of a sector is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IvGen {
    /// Lower 32 bits of the sector number.
    Plain,
    /// The sector number.
    Plain64,
    /// The sector number, encrypted by a hash of the key.
    Essiv(Hash),
}

/// A cipher with all its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CipherSpec {
    /// The block cipher.
    pub algorithm: Algorithm,
    /// Bytes of the key, both of them in XTS.
    pub key_len: u32,
    /// The mode.
    pub mode: Mode,
    /// The initialisation vectors.
    pub ivgen: IvGen,
}

impl Algorithm {
    const ALL: [Self; 4] = [Self::Aes, Self::Serpent, Self::Twofish, Self::Cast5];

    /// Its name in headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Serpent => "serpent",
            Self::Twofish => "twofish",
            Self::Cast5 => "cast5",
        }
    }

    fn takes_key(self, len: usize) -> bool {
        match self {
            Self::Cast5 => len == 16,
            _ => matches!(len, 16 | 24 | 32),
        }
    }
}

impl Mode {
    const ALL: [Self; 4] = [Self::Xts, Self::Cbc, Self::Ctr, Self::Ecb];

    /// Its name in headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xts => "xts",
            Self::Cbc => "cbc",
            Self::Ctr => "ctr",
            Self::Ecb => "ecb",
        }
    }
}

impl IvGen {
    /// Its name in headers, without the hash.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv(_) => "essiv",
        }
    }
}

impl CipherSpec {
    /// The cipher that a header names.
    ///
    /// # Errors
    /// An unknown name, or parts that don't fit together.
    pub fn named(algorithm: &[u8], mode: CipherMode<'_>, key_len: u32) -> Result<Self> {
        let unknown = Error::UnknownName;
        if mode.ivgen.is_empty() {
            return Err(Error::CipherMode);
        }
        let found = Mode::ALL.into_iter().find(|known| known.name().as_bytes() == mode.mode);
        let found_mode = found.ok_or(unknown(TextField::Mode))?;
        let found = Algorithm::ALL.into_iter().find(|known| known.name().as_bytes() == algorithm);
        let algorithm = found.ok_or(unknown(TextField::Cipher))?;
        let ivgen = match mode.ivgen {
            b"plain" => IvGen::Plain,
            b"plain64" => IvGen::Plain64,
            b"essiv" => IvGen::Essiv(Hash::named(mode.ivgen_hash).ok_or(unknown(TextField::IvHash))?),
            _ => return Err(unknown(TextField::IvGen)),
        };
        let spec = Self { algorithm, key_len, mode: found_mode, ivgen };
        spec.check()?;
        Ok(spec)
    }

    /// Bytes of the block cipher's key.
    pub fn cipher_key_len(&self) -> usize {
        match self.mode {
            Mode::Xts => self.key_len as usize / 2,
            _ => self.key_len as usize,
        }
    }

    /// Do the parts fit together?
    ///
    /// # Errors
    /// [`Error::KeySize`], [`Error::ModeNeedsWideBlocks`] or [`Error::EssivKeySize`].
    pub fn check(&self) -> Result<()> {
        let len = self.cipher_key_len();
        if self.key_len > MAX_KEY {
            return Err(Error::KeyTooLong(self.key_len));
        }
        if !self.algorithm.takes_key(len) || (self.mode == Mode::Xts && !self.key_len.is_multiple_of(2)) {
            return Err(Error::KeySize(self.key_len));
        }
        if self.mode == Mode::Xts && self.algorithm == Algorithm::Cast5 {
            return Err(Error::ModeNeedsWideBlocks);
        }
        match self.ivgen {
            IvGen::Essiv(hash) if !self.algorithm.takes_key(hash.digest_len()) => {
                Err(Error::EssivKeySize(hash.digest_len()))
            }
            _ => Ok(()),
        }
    }
}

/// A cipher mode, `MODE[-IVGEN[:HASH]]`, in its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherMode<'a> {
    /// Block mode, such as `xts`.
    pub mode: &'a [u8],
    /// How initialisation vectors are made, such as `plain64`; empty if not said.
    pub ivgen: &'a [u8],
    /// Hash of `essiv`; empty if not said.
    pub ivgen_hash: &'a [u8],
}

impl<'a> CipherMode<'a> {
    /// Takes the text of a header apart. Any text is accepted.
    ///
    /// ```
    /// let mode = instar_luks::CipherMode::split(b"cbc-essiv:sha256");
    /// assert_eq!((mode.mode, mode.ivgen, mode.ivgen_hash), (&b"cbc"[..], &b"essiv"[..], &b"sha256"[..]));
    /// ```
    pub fn split(text: &'a [u8]) -> Self {
        let (mode, vectors) = cut(text, b'-');
        let (ivgen, ivgen_hash) = cut(vectors, b':');
        Self { mode, ivgen, ivgen_hash }
    }
}

/// Before and behind the first `at`; nothing behind if it is missing.
fn cut(text: &[u8], at: u8) -> (&[u8], &[u8]) {
    match text.iter().position(|byte| *byte == at) {
        Some(place) => (&text[..place], &text[place + 1..]),
        None => (text, &[]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_may_be_missing() {
        let empty: &[u8] = b"";
        assert_eq!(
            CipherMode::split(b"xts-plain64"),
            CipherMode { mode: b"xts", ivgen: b"plain64", ivgen_hash: empty }
        );
        assert_eq!(CipherMode::split(b"ecb"), CipherMode { mode: b"ecb", ivgen: empty, ivgen_hash: empty });
        assert_eq!(CipherMode::split(b""), CipherMode { mode: empty, ivgen: empty, ivgen_hash: empty });
        assert_eq!(CipherMode::split(b"-:"), CipherMode { mode: empty, ivgen: empty, ivgen_hash: empty });
    }

    fn named(algorithm: &str, mode: &str, key_len: u32) -> Result<CipherSpec> {
        CipherSpec::named(algorithm.as_bytes(), CipherMode::split(mode.as_bytes()), key_len)
    }

    #[test]
    fn what_fits_together() {
        let spec = named("aes", "xts-plain64", 64).unwrap();
        assert_eq!((spec.algorithm, spec.mode, spec.cipher_key_len()), (Algorithm::Aes, Mode::Xts, 32));
        assert_eq!(named("serpent", "cbc-essiv:sha256", 16).unwrap().ivgen, IvGen::Essiv(Hash::Sha256));
        for (algorithm, mode, key_len, want) in [
            ("aes", "ecb", 16, Error::CipherMode),
            ("aes", "lrw-plain64", 32, Error::UnknownName(TextField::Mode)),
            ("camellia", "xts-plain64", 32, Error::UnknownName(TextField::Cipher)),
            ("aes", "xts-benbi", 32, Error::UnknownName(TextField::IvGen)),
            ("aes", "cbc-essiv:whirlpool", 32, Error::UnknownName(TextField::IvHash)),
            ("aes", "xts-plain64", 33, Error::KeySize(33)),
            ("aes", "xts-plain64", 65, Error::KeyTooLong(65)),
            ("aes", "cbc-plain64", 64, Error::KeySize(64)),
            ("cast5", "xts-plain64", 32, Error::ModeNeedsWideBlocks),
            ("cast5", "cbc-essiv:sha256", 16, Error::EssivKeySize(32)),
            ("aes", "cbc-essiv:sha512", 32, Error::EssivKeySize(64)),
        ] {
            assert_eq!(named(algorithm, mode, key_len), Err(want), "{algorithm} {mode} {key_len}");
        }
    }
}
