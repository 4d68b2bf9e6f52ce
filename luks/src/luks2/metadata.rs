use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use base64ct::{Base64, Encoding};
use serde::Deserialize;

use crate::cipher::{CipherMode, CipherSpec};
use crate::error::{Error, Result, TextField};
use crate::hash::Hash;

/// Key slots of a volume at most.
const MAX_SLOTS: usize = 32;

/// What the text of the header says.
#[derive(Debug, Deserialize)]
pub struct Metadata {
    pub(super) keyslots: BTreeMap<String, Keyslot>,
    pub(super) segments: BTreeMap<String, RawSegment>,
    pub(super) digests: BTreeMap<String, Digest>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Keyslot {
    #[serde(rename = "type")]
    pub kind: String,
    pub key_size: u32,
    pub af: Option<Splitter>,
    pub area: Area,
    pub kdf: Option<Kdf>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Splitter {
    #[serde(rename = "type")]
    pub kind: String,
    pub stripes: u32,
    pub hash: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Area {
    #[serde(rename = "type")]
    pub kind: String,
    pub offset: String,
    pub size: String,
    pub encryption: Option<String>,
    pub key_size: Option<u32>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Kdf {
    #[serde(rename = "type")]
    pub kind: String,
    pub salt: String,
    pub hash: Option<String>,
    pub iterations: Option<u32>,
    /// Passes.
    pub time: Option<u32>,
    /// KiB.
    pub memory: Option<u32>,
    /// Lanes.
    pub cpus: Option<u32>,
}

#[derive(Debug, Deserialize)]
pub(super) struct RawSegment {
    #[serde(rename = "type")]
    pub kind: String,
    pub offset: String,
    pub size: String,
    pub iv_tweak: Option<String>,
    pub encryption: Option<String>,
    pub sector_size: Option<u32>,
    #[serde(default)]
    pub integrity: Option<Anything>,
    #[serde(default)]
    pub flags: Vec<String>,
}

/// Something whose presence alone counts.
#[derive(Debug)]
pub(super) struct Anything;

impl<'de> Deserialize<'de> for Anything {
    fn deserialize<D: serde::Deserializer<'de>>(source: D) -> core::result::Result<Self, D::Error> {
        serde::de::IgnoredAny::deserialize(source).map(|_| Self)
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Digest {
    #[serde(rename = "type")]
    pub kind: String,
    pub keyslots: Vec<String>,
    pub segments: Vec<String>,
    pub hash: String,
    pub iterations: u32,
    pub salt: String,
    pub digest: String,
}

/// The encrypted part of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the volume, bytes.
    pub offset: u64,
    /// How long it is; `None`: up to the end of the file.
    pub len: Option<u64>,
    /// Position of its first sector for the cipher, bytes.
    pub position: u64,
    /// Bytes of a sector.
    pub sector_size: u32,
}

impl Metadata {
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let found: Self = serde_json::from_slice(text).map_err(|_| Error::Metadata)?;
        // Also a slot that is named many times is tried each time.
        let few = |digest: &Digest| digest.keyslots.len() <= MAX_SLOTS && digest.segments.len() <= MAX_SLOTS;
        let sane =
            found.keyslots.len() <= MAX_SLOTS && found.digests.len() <= MAX_SLOTS && found.digests.values().all(few);
        if sane { Ok(found) } else { Err(Error::Metadata) }
    }

    /// Name and content of the only encrypted segment.
    pub(super) fn crypt_segment(&self) -> Result<(&str, &RawSegment)> {
        let mut found = self.segments.iter().filter(|(_, segment)| segment.kind == "crypt");
        let count = self.segments.len();
        match (found.next(), count) {
            (Some((name, segment)), 1) => Ok((name, segment)),
            _ => Err(Error::Segments(count)),
        }
    }

    /// The encrypted segment.
    ///
    /// # Errors
    /// [`Error::Segments`], [`Error::Unsupported`] (authenticated encryption, a reencryption that is under way), or
    /// [`Error::Metadata`].
    pub fn segment(&self) -> Result<Segment> {
        let (_, raw) = self.crypt_segment()?;
        if raw.integrity.is_some() || !raw.flags.is_empty() {
            return Err(Error::Unsupported);
        }
        let sector_size = raw.sector_size.unwrap_or(512);
        if !sector_size.is_power_of_two() || !(512..=4096).contains(&sector_size) {
            return Err(Error::Metadata);
        }
        let offset = number(&raw.offset)?;
        let len = match raw.size.as_str() {
            "dynamic" => None,
            size => Some(number(size)?),
        };
        let tweak = raw.iv_tweak.as_deref().map_or(Ok(0), number)?;
        let position = tweak.checked_mul(512).ok_or(Error::Metadata)?;
        let whole = |bytes: u64| bytes.is_multiple_of(512);
        match whole(offset) && whole(len.unwrap_or(0)) && offset.checked_add(len.unwrap_or(0)).is_some() {
            true => Ok(Segment { offset, len, position, sector_size }),
            false => Err(Error::Metadata),
        }
    }

    /// The cipher of the segment, as text.
    pub fn encryption(&self) -> &[u8] {
        let segment = self.crypt_segment().ok();
        segment.and_then(|(_, raw)| raw.encryption.as_deref()).unwrap_or_default().as_bytes()
    }

    /// Bytes of the master key, as the first key slot says.
    pub fn key_len(&self) -> u32 {
        self.keyslots.values().next().map_or(0, |slot| slot.key_size)
    }

    /// The cipher of the segment.
    ///
    /// # Errors
    /// As [`CipherSpec::named`].
    pub fn spec(&self) -> Result<CipherSpec> {
        cipher(self.encryption(), self.key_len())
    }
}

/// A cipher by its one text, such as `aes-xts-plain64`.
pub(super) fn cipher(text: &[u8], key_len: u32) -> Result<CipherSpec> {
    let split = text.iter().position(|byte| *byte == b'-').ok_or(Error::UnknownName(TextField::Cipher))?;
    CipherSpec::named(&text[..split], CipherMode::split(&text[split + 1..]), key_len)
}

/// Numbers of 64 bits are texts in this JSON.
pub(super) fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::Metadata)
}

/// Bytes as Base64, at most `max` of them.
pub(super) fn bytes(text: &str, max: usize) -> Result<Vec<u8>> {
    let found = Base64::decode_vec(text).map_err(|_| Error::Metadata)?;
    if found.len() > max { Err(Error::Metadata) } else { Ok(found) }
}

/// A hash by its name.
pub(super) fn hash(name: &str) -> Result<Hash> {
    Hash::named(name.as_bytes()).ok_or(Error::UnknownName(TextField::Hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(segment: &str) -> Result<Segment> {
        let text = alloc::format!(r#"{{"keyslots":{{}},"digests":{{}},"segments":{{{segment}}},"tokens":{{}}}}"#);
        Metadata::parse(text.as_bytes())?.segment()
    }

    #[test]
    fn segments() {
        let sound = r#""0":{"type":"crypt","offset":"32768","size":"dynamic","iv_tweak":"2","encryption":"aes-xts-plain64","sector_size":4096}"#;
        assert_eq!(parse(sound), Ok(Segment { offset: 32768, len: None, position: 1024, sector_size: 4096 }));
        let with = |from: &str, to: &str| parse(&sound.replace(from, to));
        assert_eq!(with("32768", "32767"), Err(Error::Metadata));
        assert_eq!(with("\"2\"", "\"18446744073709551615\""), Err(Error::Metadata));
        assert_eq!(with("4096", "4095"), Err(Error::Metadata));
        assert_eq!(with("dynamic", "-1"), Err(Error::Metadata));
        assert_eq!(with("dynamic", "18446744073709551104"), Err(Error::Metadata));
        assert_eq!(with("\"type\":\"crypt\"", "\"type\":\"linear\""), Err(Error::Segments(1)));
        assert_eq!(with("\"iv_tweak\"", "\"integrity\":{\"a\":[1]},\"iv_tweak\""), Err(Error::Unsupported));
        assert_eq!(parse(""), Err(Error::Segments(0)));
        assert_eq!(parse("{"), Err(Error::Metadata));
    }

    #[test]
    fn deep_nesting_ends() {
        assert_eq!(Metadata::parse(&[b'['; 1 << 20]).unwrap_err(), Error::Metadata);
    }
}
