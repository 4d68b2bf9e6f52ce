//! Header extensions: spec chapter "Header extensions" and those that follow it.

use alloc::vec::Vec;

use zerocopy::{FromBytes, IntoBytes};

use crate::addr::HostOffset;
use crate::error::{BitmapsFault, Error, Result};
use crate::format::{
    EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_CRYPTO, EXT_DATA_FILE, EXT_END, EXT_FEATURE_NAMES, MAX_BACKING_FORMAT,
    MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, RawBitmapsExtension, RawCryptoExtension, RawExtension, RawFeatureName,
};
use crate::header::{Autoclear, EncryptionMethod, Header};

/// The header extensions of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Name of the backing file's format.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file.
    pub data_file: Option<Vec<u8>>,
    /// Where the LUKS header lies.
    pub crypto: Option<CryptoHeader>,
    /// Names of feature bits.
    pub feature_names: Vec<FeatureName>,
    /// Where the bitmap directory lies; only if the autoclear bit vouches for it.
    pub bitmaps: Option<BitmapDirectory>,
    /// There is a bitmaps extension, but a program that knows nothing of bitmaps changed the image: they are lost.
    pub stale_bitmaps: bool,
    /// Extensions without meaning here, in their order.
    pub unknown: Vec<UnknownExtension>,
}

/// Where the LUKS header of an encrypted image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CryptoHeader {
    /// Its place, a multiple of the cluster size.
    pub offset: HostOffset,
    /// Its length, bytes.
    pub len: u64,
}

/// Where the bitmap directory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BitmapDirectory {
    /// Its place, a multiple of the cluster size.
    pub offset: HostOffset,
    /// Its length, bytes.
    pub len: u64,
    /// Bitmaps in it, 1 to 65535.
    pub count: u32,
}

/// The kind of a feature bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FeatureKind {
    /// Of [`Incompatible`](crate::Incompatible).
    Incompatible,
    /// Of [`Compatible`](crate::Compatible).
    Compatible,
    /// Of [`Autoclear`].
    Autoclear,
    /// None of them.
    Other(u8),
}

/// A name that the image gives to a feature bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// Which set of features.
    pub kind: FeatureKind,
    /// Bit number.
    pub bit: u8,
    /// The name, at most 46 bytes.
    pub name: Vec<u8>,
}

/// An extension that has no meaning here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownExtension {
    /// Its type.
    pub magic: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

impl Extensions {
    /// Reads the extensions of `header` in `area`, the bytes from the header's end to the backing file name or the
    /// end of the first cluster.
    ///
    /// # Errors
    /// The first fault found.
    pub fn parse(header: &Header, area: &[u8]) -> Result<Self> {
        let mut all = Self::default();
        for item in Walk::new(area) {
            let (magic, data) = item?;
            all.take(header, magic, data)?;
        }
        let encrypted = header.encryption == EncryptionMethod::Luks;
        if encrypted && all.crypto.is_none() { Err(Error::NoCryptoHeader) } else { Ok(all) }
    }

    fn take(&mut self, header: &Header, magic: u32, data: &[u8]) -> Result<()> {
        match magic {
            EXT_BACKING_FORMAT => {
                if data.len() > MAX_BACKING_FORMAT as usize {
                    return Err(Error::BackingFormatTooLong(len32(data)));
                }
                self.backing_format = Some(c_string(data).to_vec());
            }
            EXT_DATA_FILE => self.data_file = Some(file_name(data).to_vec()),
            EXT_CRYPTO => self.crypto = Some(CryptoHeader::parse(header, data)?),
            EXT_BITMAPS => match BitmapDirectory::parse(header, data)? {
                Some(bitmaps) => self.bitmaps = Some(bitmaps),
                None => self.stale_bitmaps = true,
            },
            EXT_FEATURE_NAMES => self.feature_names = FeatureName::parse_table(data).collect(),
            _ => self.unknown.push(UnknownExtension { magic, data: data.to_vec() }),
        }
        Ok(())
    }

    /// The extensions as bytes, in QEMU's order and with the end mark.
    pub fn emit(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(name) = &self.backing_format {
            push(&mut out, EXT_BACKING_FORMAT, name);
        }
        if let Some(name) = &self.data_file {
            push(&mut out, EXT_DATA_FILE, name);
        }
        if let Some(crypto) = &self.crypto {
            let raw = RawCryptoExtension { offset: crypto.offset.0.into(), len: crypto.len.into() };
            push(&mut out, EXT_CRYPTO, raw.as_bytes());
        }
        if !self.feature_names.is_empty() {
            let table: Vec<u8> = self.feature_names.iter().flat_map(FeatureName::emit).collect();
            push(&mut out, EXT_FEATURE_NAMES, &table);
        }
        if let Some(bitmaps) = &self.bitmaps {
            let raw = RawBitmapsExtension {
                nb_bitmaps: bitmaps.count.into(),
                reserved: 0.into(),
                directory_size: bitmaps.len.into(),
                directory_offset: bitmaps.offset.0.into(),
            };
            push(&mut out, EXT_BITMAPS, raw.as_bytes());
        }
        for extension in &self.unknown {
            push(&mut out, extension.magic, &extension.data);
        }
        push(&mut out, EXT_END, &[]);
        out
    }
}

fn push(out: &mut Vec<u8>, magic: u32, data: &[u8]) {
    let head = RawExtension { magic: magic.into(), len: len32(data).into() };
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Extensions lie inside a cluster, so their lengths fit.
fn len32(data: &[u8]) -> u32 {
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}

/// The bytes before the first zero: QEMU takes names as C strings.
pub(crate) fn c_string(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

/// The name of a file, without the zeroes behind it. To QEMU it, too, is a C string; one that goes on behind a zero is kept whole, so
/// that nobody follows a part of what others see.
pub(crate) fn file_name(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    &bytes[..end]
}

/// Steps through an extension area, up to its end mark.
struct Walk<'a> {
    rest: &'a [u8],
    ended: bool,
}

impl<'a> Walk<'a> {
    fn new(area: &'a [u8]) -> Self {
        Self { rest: area, ended: false }
    }

    fn step(&mut self) -> Result<Option<(u32, &'a [u8])>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (head, rest) =
            RawExtension::read_from_prefix(self.rest).map_err(|_| Error::ExtensionTooLarge(len32(self.rest)))?;
        let len = head.len.get();
        let data = rest.get(..len as usize).ok_or(Error::ExtensionTooLarge(len))?;
        if head.magic.get() == EXT_END {
            return Ok(None);
        }
        self.rest = rest.get(data.len().next_multiple_of(8)..).unwrap_or_default();
        Ok(Some((head.magic.get(), data)))
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<(u32, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let item = self.step().transpose();
        self.ended = !matches!(item, Some(Ok(_)));
        item
    }
}

/// Whether a parser that sees only `window`, the first bytes of an area of `area_len`, comes to the same end as one
/// that sees all.
pub(crate) fn end_inside(window: &[u8], area_len: usize) -> bool {
    let mut at = 0usize;
    while let Some(Ok((head, rest))) = window.get(at..).map(RawExtension::read_from_prefix) {
        let len = head.len.get() as usize;
        if len > area_len - at - 8 {
            return true; // an error in any case
        }
        if len > rest.len() {
            return false;
        }
        if head.magic.get() == EXT_END {
            return true;
        }
        at += 8 + len.next_multiple_of(8);
    }
    false
}

impl CryptoHeader {
    fn parse(header: &Header, data: &[u8]) -> Result<Self> {
        if header.encryption != EncryptionMethod::Luks {
            return Err(Error::UnexpectedCryptoHeader);
        }
        let raw = RawCryptoExtension::read_from_bytes(data).map_err(|_| Error::CryptoExtensionLength(len32(data)))?;
        let offset = HostOffset(raw.offset.get());
        if !header.geometry.is_aligned(offset.0) {
            return Err(Error::CryptoHeaderOffset(offset.0));
        }
        Ok(Self { offset, len: raw.len.get() })
    }
}

impl BitmapDirectory {
    /// `None` if the autoclear bit is not set: then another program changed the image and the bitmaps mean nothing.
    fn parse(header: &Header, data: &[u8]) -> Result<Option<Self>> {
        let fault = |fault| Err(Error::BitmapsExtension(fault));
        let Ok(raw) = RawBitmapsExtension::read_from_bytes(data) else {
            return fault(BitmapsFault::Length(len32(data)));
        };
        if !header.autoclear.contains(Autoclear::BITMAPS) {
            return Ok(None);
        }
        let (count, len, offset) = (raw.nb_bitmaps.get(), raw.directory_size.get(), raw.directory_offset.get());
        if raw.reserved.get() != 0 {
            return fault(BitmapsFault::Reserved);
        }
        if count > MAX_BITMAPS {
            return fault(BitmapsFault::TooMany(count));
        }
        if count == 0 {
            return fault(BitmapsFault::None);
        }
        if !header.geometry.is_aligned(offset) {
            return fault(BitmapsFault::DirectoryOffset(offset));
        }
        if len > MAX_BITMAP_DIRECTORY_BYTES {
            return fault(BitmapsFault::DirectorySize(len));
        }
        Ok(Some(Self { offset: HostOffset(offset), len, count }))
    }
}

impl FeatureName {
    fn parse_table(data: &[u8]) -> impl Iterator<Item = Self> + '_ {
        data.chunks_exact(size_of::<RawFeatureName>())
            .filter_map(|entry| RawFeatureName::read_from_bytes(entry).ok())
            .take_while(|raw| raw.name[0] != 0)
            .map(|raw| Self { kind: raw.kind.into(), bit: raw.bit, name: c_string(&raw.name).to_vec() })
    }

    fn emit(&self) -> [u8; size_of::<RawFeatureName>()] {
        let mut out = [0; size_of::<RawFeatureName>()];
        out[0] = match self.kind {
            FeatureKind::Incompatible => 0,
            FeatureKind::Compatible => 1,
            FeatureKind::Autoclear => 2,
            FeatureKind::Other(kind) => kind,
        };
        out[1] = self.bit;
        for (to, from) in out[2..].iter_mut().zip(&self.name) {
            *to = *from;
        }
        out
    }

    /// The table that QEMU writes into version 3 images.
    pub fn defaults() -> Vec<Self> {
        use FeatureKind::{Autoclear, Compatible, Incompatible};
        [
            (Incompatible, 0, "dirty bit"),
            (Incompatible, 1, "corrupt bit"),
            (Incompatible, 2, "external data file"),
            (Incompatible, 3, "compression type"),
            (Incompatible, 4, "extended L2 entries"),
            (Compatible, 0, "lazy refcounts"),
            (Autoclear, 0, "bitmaps"),
            (Autoclear, 1, "raw external data"),
        ]
        .into_iter()
        .map(|(kind, bit, name)| Self { kind, bit, name: name.as_bytes().to_vec() })
        .collect()
    }
}

impl From<u8> for FeatureKind {
    fn from(kind: u8) -> Self {
        match kind {
            0 => Self::Incompatible,
            1 => Self::Compatible,
            2 => Self::Autoclear,
            other => Self::Other(other),
        }
    }
}

/// What an image calls the incompatible features of `bits`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FeatureNames {
    /// Names found, in the order of the image's table.
    pub names: Vec<Vec<u8>>,
    /// Bits that have no name there.
    pub unnamed: u64,
}

impl FeatureNames {
    /// Looks the bits up in a feature name table.
    pub fn find(table: &[FeatureName], bits: u64) -> Self {
        let mut found = Self { names: Vec::new(), unnamed: bits };
        for entry in table.iter().filter(|entry| entry.kind == FeatureKind::Incompatible) {
            let bit = 1u64.checked_shl(entry.bit.into()).unwrap_or(0);
            if found.unnamed & bit != 0 {
                found.names.push(entry.name.clone());
                found.unnamed &= !bit;
            }
        }
        found
    }

    /// Looks the bits up in an extension area that may be damaged otherwise.
    pub(crate) fn in_area(area: &[u8], bits: u64) -> Self {
        let table = Walk::new(area)
            .map_while(|item| item.ok())
            .filter(|&(magic, _)| magic == EXT_FEATURE_NAMES)
            .last()
            .map(|(_, data)| FeatureName::parse_table(data).collect::<Vec<_>>());
        Self::find(&table.unwrap_or_default(), bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::HEADER_LEN;

    fn header(encryption: u8, autoclear: u8) -> Header {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        bytes[23] = 16; // cluster_bits
        bytes[35] = encryption;
        bytes[59] = 1; // refcount_table_clusters
        bytes[95] = autoclear;
        bytes[103] = 112; // header_length
        Header::parse(&bytes).unwrap()
    }

    fn parse(area: &[u8]) -> Result<Extensions> {
        Extensions::parse(&header(0, 1), area)
    }

    const BITMAPS: [u8; 32] = [
        0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24, // magic, length
        0, 0, 0, 2, 0, 0, 0, 0, // nb_bitmaps, reserved
        0, 0, 0, 0, 0, 0, 0, 64, // directory_size
        0, 0, 0, 0, 0, 5, 0, 0, // directory_offset
    ];

    #[test]
    fn qemus_own_table() {
        let extensions = Extensions { feature_names: FeatureName::defaults(), ..Extensions::default() };
        let bytes = extensions.emit();
        assert_eq!(bytes.len(), 8 + 8 * 48 + 8);
        assert_eq!(bytes[..8], [0x68, 0x03, 0xf8, 0x57, 0, 0, 1, 0x80]);
        assert_eq!(bytes[8..20], *b"\0\0dirty bit\0");
        assert_eq!(bytes[8 + 7 * 48..][..20], *b"\x02\x01raw external data\0");
        assert_eq!(parse(&bytes), Ok(extensions));
    }

    #[test]
    fn each_kind_comes_back() {
        let all = Extensions {
            backing_format: Some(b"raw".to_vec()),
            data_file: Some(b"data.raw".to_vec()),
            crypto: Some(CryptoHeader { offset: HostOffset(0x5_0000), len: 0x1234 }),
            feature_names: vec![FeatureName { kind: FeatureKind::Other(9), bit: 63, name: b"x".to_vec() }],
            bitmaps: Some(BitmapDirectory { offset: HostOffset(0x5_0000), len: 64, count: 2 }),
            stale_bitmaps: false,
            unknown: vec![UnknownExtension { magic: 0x1234_5678, data: b"12345".to_vec() }],
        };
        assert_eq!(Extensions::parse(&header(2, 1), &all.emit()), Ok(all));
    }

    #[test]
    fn names_end_at_the_first_zero() {
        let area = [&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 4][..], b"ra\0w\0\0\0\0"].concat();
        assert_eq!(parse(&area).unwrap().backing_format.as_deref(), Some(&b"ra"[..]));
    }

    #[test]
    fn areas_that_break_off() {
        let unknown = |len: u8| [0x12, 0x34, 0x56, 0x78, 0, 0, 0, len];
        assert_eq!(parse(&[]), Ok(Extensions::default()));
        assert_eq!(parse(&[0; 4]), Err(Error::ExtensionTooLarge(4)));
        assert_eq!(parse(&unknown(1)), Err(Error::ExtensionTooLarge(1)));
        assert_eq!(parse(&unknown(0)).unwrap().unknown.len(), 1);
        // The padding may be cut off; the end mark's length counts too.
        assert!(parse(&[&unknown(5)[..], b"12345"].concat()).is_ok());
        assert_eq!(parse(&[0, 0, 0, 0, 0, 0, 0, 1]), Err(Error::ExtensionTooLarge(1)));
    }

    #[test]
    fn windows() {
        let mut area = [0; 100];
        area[..8].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 40]);
        assert!(end_inside(&area[..56], 100)); // extension and end mark
        assert!(!end_inside(&area[..55], 100));
        assert!(!end_inside(&area[..40], 100));
        area[7] = 93;
        assert!(end_inside(&area[..40], 100)); // wrong, however much is read
    }

    #[test]
    fn lengths_and_encryption() {
        let long = [&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 16][..], &[b'a'; 16]].concat();
        assert_eq!(parse(&long), Err(Error::BackingFormatTooLong(16)));
        let mut crypto = [0; 24];
        crypto[..8].copy_from_slice(&[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16]);
        assert_eq!(parse(&crypto), Err(Error::UnexpectedCryptoHeader));
        assert_eq!(Extensions::parse(&header(2, 0), &[]), Err(Error::NoCryptoHeader));
        crypto[15] = 1;
        assert_eq!(Extensions::parse(&header(2, 0), &crypto), Err(Error::CryptoHeaderOffset(1)));
        crypto[7] = 8;
        assert_eq!(Extensions::parse(&header(2, 0), &crypto), Err(Error::CryptoExtensionLength(8)));
    }

    #[test]
    fn bitmaps_need_their_bit() {
        let there = Some(BitmapDirectory { offset: HostOffset(0x5_0000), len: 64, count: 2 });
        assert_eq!(parse(&BITMAPS).unwrap().bitmaps, there);
        let stale = Extensions::parse(&header(0, 0), &BITMAPS).unwrap();
        assert_eq!((stale.bitmaps, stale.stale_bitmaps), (None, true));
    }

    #[test]
    fn bitmaps_have_bounds() {
        let fault = |at: usize, patch: &[u8]| {
            let mut area = BITMAPS;
            area[at..at + patch.len()].copy_from_slice(patch);
            parse(&area).unwrap_err()
        };
        let cases = [
            (fault(7, &[23]), BitmapsFault::Length(23)),
            (fault(15, &[1]), BitmapsFault::Reserved),
            (fault(9, &[1]), BitmapsFault::TooMany(65538)),
            (fault(11, &[0]), BitmapsFault::None),
            (fault(31, &[1]), BitmapsFault::DirectoryOffset(0x5_0001)),
            (fault(20, &[4]), BitmapsFault::DirectorySize((64 << 20) + 64)),
        ];
        for (error, expected) in cases {
            assert_eq!(error, Error::BitmapsExtension(expected));
        }
    }
}
