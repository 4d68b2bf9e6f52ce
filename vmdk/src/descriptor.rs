//! The text that says what an image consists of ("Virtual Disk Format 5.0", The Descriptor File).

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use crate::error::{Error, Result};
use crate::format::SECTOR;

/// Bytes of a descriptor that are looked at.
pub(crate) const MAX_LEN: u64 = (1 << 20) - 1;
/// The CID that stands for no parent.
pub const NO_PARENT: u32 = 0xffff_ffff;
/// Bytes of the name of a file.
const MAX_NAME: usize = 4095;

/// What the text says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Changes whenever the contents change.
    pub cid: u32,
    /// The CID of the parent when this image was made; [`NO_PARENT`] for none.
    pub parent_cid: u32,
    /// The type of image, such as `monolithicSparse`.
    pub create_type: Vec<u8>,
    /// The name of the parent.
    pub parent_name: Option<Vec<u8>>,
    /// The parts of the disk, in order.
    pub extents: Vec<ExtentLine>,
    /// `ddb.geometry.cylinders`, 0 only for small disks.
    pub cylinders: Option<u64>,
}

/// A part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// Bytes of the disk in it.
    pub len: u64,
    /// How they are stored.
    pub kind: ExtentType,
    /// The file that holds it; empty for [`ExtentType::Zero`].
    pub name: Vec<u8>,
    /// Where in a flat file it begins, bytes.
    pub offset: u64,
}

/// How an extent is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentType {
    /// The bytes themselves.
    Flat,
    /// The bytes themselves, on VMFS.
    Vmfs,
    /// Grains.
    Sparse,
    /// Grains, as ESX stores them.
    VmfsSparse,
    /// Grains, as ESX stores them for large disks.
    SeSparse,
    /// Zeroes that are not stored.
    Zero,
}

impl ExtentType {
    /// The keyword.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flat => "FLAT",
            Self::Vmfs => "VMFS",
            Self::Sparse => "SPARSE",
            Self::VmfsSparse => "VMFSSPARSE",
            Self::SeSparse => "SESPARSE",
            Self::Zero => "ZERO",
        }
    }

    fn of(word: &[u8]) -> Option<Self> {
        let all = [Self::Flat, Self::Vmfs, Self::Sparse, Self::VmfsSparse, Self::SeSparse, Self::Zero];
        all.into_iter().find(|kind| kind.name().as_bytes() == word)
    }
}

impl Descriptor {
    /// Reads the text, which ends at the first zero byte.
    ///
    /// # Errors
    /// No type of image, or a line that should tell of an extent and does not.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        let mut found = Self {
            cid: 0,
            parent_cid: NO_PARENT,
            create_type: Vec::new(),
            parent_name: None,
            extents: Vec::new(),
            cylinders: None,
        };
        let mut total = 0u64;
        for line in bytes[..end].split(|&byte| byte == b'\n' || byte == b'\r') {
            let line = line.trim_ascii();
            if line.is_empty() || line[0] == b'#' {
                continue;
            }
            if let Some(extent) = parse_extent(line)? {
                if found.extents.len() >= Error::MAX_EXTENTS {
                    return Err(Error::TooManyExtents(found.extents.len() + 1));
                }
                total =
                    total.checked_add(extent.len).filter(|&sum| sum <= i64::MAX as u64).ok_or(Error::SizeOverflow)?;
                found.extents.push(extent);
            } else {
                found.take_assignment(line);
            }
        }
        if found.create_type.is_empty() {
            return Err(Error::InvalidDescriptor);
        }
        Ok(found)
    }

    /// `key=value`; what is not known is left alone.
    fn take_assignment(&mut self, line: &[u8]) {
        let Some(equals) = line.iter().position(|&byte| byte == b'=') else { return };
        let (key, value) = (line[..equals].trim_ascii(), line[equals + 1..].trim_ascii());
        if key.eq_ignore_ascii_case(b"CID") {
            self.cid = hex(value);
        } else if key.eq_ignore_ascii_case(b"parentCID") {
            self.parent_cid = hex(value);
        } else if key.eq_ignore_ascii_case(b"createType") {
            unquoted(value)[..].clone_into(&mut self.create_type);
            self.create_type.truncate(Error::MAX_TEXT);
        } else if key == b"ddb.geometry.cylinders" {
            self.cylinders = number(unquoted(value));
        } else if key.eq_ignore_ascii_case(b"parentFileNameHint") {
            let name = unquoted(value);
            self.parent_name = Some(name).filter(|name| !name.is_empty() && name.len() <= MAX_NAME).map(<[u8]>::to_vec);
        }
    }
}

/// The first eight hexadecimal digits.
fn hex(value: &[u8]) -> u32 {
    let digits = value.iter().map_while(|&byte| (byte as char).to_digit(16));
    digits.take(8).fold(0, |number, digit| number << 4 | digit)
}

/// What stands between quotation marks; without them all of it.
fn unquoted(value: &[u8]) -> &[u8] {
    let Some(inner) = value.strip_prefix(b"\"") else { return value };
    let end = inner.iter().position(|&byte| byte == b'"').unwrap_or(inner.len());
    &inner[..end]
}

/// `RW 4192256 SPARSE "name" offset`; `None` for a line about something else.
fn parse_extent(line: &[u8]) -> Result<Option<ExtentLine>> {
    let mut words = line.splitn(4, |&byte| byte == b' ' || byte == b'\t');
    let access = words.next().unwrap_or_default();
    if ![&b"RW"[..], b"RDONLY", b"NOACCESS"].iter().any(|word| word.eq_ignore_ascii_case(access)) {
        return Ok(None);
    }
    let invalid = || Error::InvalidExtentLine(Error::text(line));
    if access != b"RW" && access != b"RDONLY" {
        return Err(invalid());
    }
    let sectors =
        words.next().and_then(number).filter(|&sectors| sectors > 0 || access == b"RW").ok_or_else(invalid)?;
    let len = sectors.checked_mul(SECTOR).filter(|&len| len <= i64::MAX as u64).ok_or_else(invalid)?;
    let kind = words.next().unwrap_or_default();
    let kind = ExtentType::of(kind).ok_or_else(|| Error::UnsupportedExtent(Error::text(kind)))?;
    let rest = words.next().unwrap_or_default().trim_ascii();
    if kind == ExtentType::Zero {
        return Ok(Some(ExtentLine { len, kind, name: Vec::new(), offset: 0 }));
    }
    let inner = rest.strip_prefix(b"\"").ok_or_else(invalid)?;
    let end = inner.iter().position(|&byte| byte == b'"').ok_or_else(invalid)?;
    let name = &inner[..end];
    let place = inner[end + 1..].trim_ascii();
    let offset = match (kind, place.is_empty()) {
        (ExtentType::Flat, true) => return Err(invalid()),
        (ExtentType::Flat, false) => number(place).and_then(|at| at.checked_mul(SECTOR)).ok_or_else(invalid)?,
        (ExtentType::Vmfs, false) => number(place).and_then(|at| at.checked_mul(SECTOR)).ok_or_else(invalid)?,
        _ => 0,
    };
    if name.is_empty() || name.len() > MAX_NAME || offset.checked_add(len).is_none() {
        return Err(invalid());
    }
    Ok(Some(ExtentLine { len, kind, name: name.to_owned(), offset }))
}

/// A decimal number without a sign, up to the next blank.
fn number(word: &[u8]) -> Option<u64> {
    let digits = word.split(|&byte| byte == b' ' || byte == b'\t').next()?;
    core::str::from_utf8(digits).ok()?.parse().ok()
}

/// What a new descriptor says, as qemu-img writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Text<'a> {
    pub cid: u32,
    /// With leading zeroes: as it is after the first write.
    pub wide_cid: bool,
    pub parent_cid: u32,
    pub create_type: &'a str,
    pub parent_name: Option<&'a [u8]>,
    /// `RW …`, each with its line feed.
    pub extents: &'a [u8],
    pub hardware_version: &'a str,
    pub tools_version: &'a str,
    pub adapter: &'a str,
    pub size: u64,
}

impl Text<'_> {
    /// The text.
    pub fn render(&self) -> Vec<u8> {
        let heads: u64 = if self.adapter == "ide" { 16 } else { 255 };
        let mut head = String::new();
        let cid = if self.wide_cid { alloc::format!("{:08x}", self.cid) } else { alloc::format!("{:x}", self.cid) };
        // Writing to a string can't fail.
        let _ = write!(
            head,
            "# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={:x}\ncreateType=\"{}\"\n",
            self.parent_cid, self.create_type
        );
        let mut text = head.into_bytes();
        if let Some(name) = self.parent_name {
            text.extend_from_slice(b"parentFileNameHint=\"");
            text.extend_from_slice(name);
            text.extend_from_slice(b"\"\n");
        }
        text.extend_from_slice(b"\n# Extent description\n");
        text.extend_from_slice(self.extents);
        let cylinders = self.size / (63 * heads * SECTOR);
        text.extend_from_slice(
            alloc::format!(
                "\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
                 ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n\
                 ddb.toolsVersion = \"{}\"\n",
                self.hardware_version,
                self.adapter,
                self.tools_version
            )
            .as_bytes(),
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &str) -> Result<Descriptor> {
        Descriptor::parse(std::format!("# Disk DescriptorFile\nversion=1\ncreateType=\"vmfs\"\n{lines}").as_bytes())
    }

    #[test]
    fn lines() {
        let found =
            of("CID=0012aBcd\r\nparentCID=ffffffff\nRW 4 FLAT \"a b.vmdk\" 7\nRW 8 ZERO\nRDONLY 2 VMFS \"c\"\n\0RW")
                .unwrap();
        assert_eq!((found.cid, found.parent_cid, found.parent_name.as_ref()), (0x12_abcd, NO_PARENT, None));
        let line = |len, kind, name: &str, offset| ExtentLine { len, kind, name: name.as_bytes().to_vec(), offset };
        assert_eq!(
            found.extents,
            [
                line(2048, ExtentType::Flat, "a b.vmdk", 3584),
                line(4096, ExtentType::Zero, "", 0),
                line(1024, ExtentType::Vmfs, "c", 0)
            ]
        );
        assert_eq!(of("parentFileNameHint=\"../p.vmdk\"\n").unwrap().parent_name.unwrap(), b"../p.vmdk");
    }

    #[test]
    fn what_is_no_extent_is_an_error() {
        for line in [
            "rw 4 FLAT \"a\" 0",
            "NOACCESS 4 FLAT \"a\" 0",
            "RW -4 FLAT \"a\" 0",
            "RW 4x FLAT \"a\" 0",
            "RW 4 FLAT \"a\"",
            "RW 4 FLAT \"a\" -1",
            "RW 4 FLAT a 0",
            "RW 4 FLAT \"\" 0",
            "RW 4 SPARSE \"a",
            "RW 99999999999999999999 SPARSE \"a\"",
            "RW 9999999999999999999 SPARSE \"a\"",
            "RW",
            "RW ",
        ] {
            assert!(matches!(of(line), Err(Error::InvalidExtentLine(_))), "{line}: {:?}", of(line));
        }
        assert!(matches!(of("RW 4 flat \"a\" 0"), Err(Error::UnsupportedExtent(_))));
        assert_eq!(Descriptor::parse(b"version=1\n"), Err(Error::InvalidDescriptor));
        let many = "RW 1 ZERO\n".repeat(40_000);
        assert!(matches!(of(&many), Err(Error::TooManyExtents(1001))));
        let huge = "RW 9007199254740993 ZERO\n".repeat(2);
        assert_eq!(of(&huge), Err(Error::SizeOverflow));
    }
}
