//! Parent locator: how a differencing image names its parent. Spec chapter 2.6.2.6.

use alloc::string::String;
use alloc::vec::Vec;

use zerocopy::FromBytes;

use crate::error::{Error, Result};
use crate::format::{RawLocator, RawLocatorEntry, VHDX_LOCATOR};
use crate::guid::Guid;

/// What a differencing image says of its parent. Texts are as they are stored, with `\` between folders; what is no valid
/// UTF-16 becomes U+FFFD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentLocator {
    /// `parent_linkage`: [`data_write_guid`](crate::Header::data_write_guid) of the parent.
    pub linkage: Option<Guid>,
    /// `parent_linkage2`: another one that is accepted as well.
    pub linkage2: Option<Guid>,
    /// `relative_path`: seen from the folder of the image.
    pub relative_path: Option<String>,
    /// `volume_path`: beneath a volume named by its GUID.
    pub volume_path: Option<String>,
    /// `absolute_win32_path`: with a drive letter.
    pub absolute_win32_path: Option<String>,
}

impl ParentLocator {
    /// Reads the item.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let (head, rest) = RawLocator::ref_from_prefix(bytes).map_err(|_| Error::Locator(0))?;
        if head.kind != VHDX_LOCATOR {
            return Err(Error::LocatorKind(Guid(head.kind)));
        }
        let mut locator = Self::default();
        let entries = rest.chunks_exact(size_of::<RawLocatorEntry>());
        let count = head.entry_count.get();
        for (number, chunk) in (0..count).zip(entries.map(Some).chain(core::iter::repeat(None))) {
            let broken = Error::Locator(number);
            let entry = chunk.and_then(|chunk| RawLocatorEntry::ref_from_bytes(chunk).ok()).ok_or(broken)?;
            let text = |at: u32, len: u16| bytes.get(at as usize..)?.get(..usize::from(len));
            let key = text(entry.key_at.get(), entry.key_len.get()).ok_or(broken)?;
            let value = text(entry.value_at.get(), entry.value_len.get()).ok_or(broken)?;
            locator.take(key, value);
        }
        Ok(locator)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) {
        let is = |name: &str| key.len() == name.len() * 2 && name.encode_utf16().eq(units(key));
        let guid = || Guid::parse(&text(value));
        if is("parent_linkage") {
            self.linkage = guid();
        } else if is("parent_linkage2") {
            self.linkage2 = guid();
        } else if is("relative_path") {
            self.relative_path = Some(text(value));
        } else if is("volume_path") {
            self.volume_path = Some(text(value));
        } else if is("absolute_win32_path") {
            self.absolute_win32_path = Some(text(value));
        }
    }

    /// The names under which to look for the parent, in this order and without repetition: the relative, volume and absolute path
    /// with `/` between folders, then the bare file names of these, for a parent that was moved together with its child.
    pub fn names(&self) -> Vec<String> {
        let paths = [&self.relative_path, &self.volume_path, &self.absolute_win32_path];
        let mut names: Vec<String> = Vec::new();
        let mut add = |name: String| {
            if !name.is_empty() && !names.contains(&name) {
                names.push(name);
            }
        };
        let slashed = || paths.into_iter().flatten().map(|path| path.replace('\\', "/"));
        slashed().for_each(&mut add);
        for path in slashed() {
            add(path.rsplit(['/', ':']).next().unwrap_or_default().into());
        }
        names
    }

    /// Whether an image with this `DataWriteGuid` is the parent, unchanged. Without any linkage nothing is known, so
    /// no image is.
    pub fn is_parent(&self, data_write_guid: Guid) -> bool {
        let known = |linkage: Option<Guid>| linkage.is_some_and(|guid| guid != Guid::ZERO && guid == data_write_guid);
        known(self.linkage) || known(self.linkage2)
    }
}

fn units(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit))
}

fn text(bytes: &[u8]) -> String {
    char::decode_utf16(units(bytes)).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::borrow::ToOwned;

    fn utf16(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    /// An item with these entries, texts behind the entries.
    fn item(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut bytes = VHDX_LOCATOR.to_vec();
        bytes.extend([0, 0, entries.len() as u8, 0]);
        let mut texts = Vec::new();
        let base = 20 + 12 * entries.len();
        for (key, value) in entries {
            let (key, value) = (utf16(key), utf16(value));
            let at = (base + texts.len()) as u32;
            bytes.extend(at.to_le_bytes());
            bytes.extend((at + key.len() as u32).to_le_bytes());
            bytes.extend((key.len() as u16).to_le_bytes());
            bytes.extend((value.len() as u16).to_le_bytes());
            texts.extend(key.into_iter().chain(value));
        }
        bytes.extend(texts);
        bytes
    }

    const LINKAGE: &str = "{f88d4d92-6fcc-408d-9bef-9b7c89f15c89}";

    #[test]
    fn what_hyper_v_writes() {
        let bytes = item(&[
            ("parent_linkage", LINKAGE),
            ("parent_linkage2", "{00000000-0000-0000-0000-000000000000}"),
            ("relative_path", ".\\fat-parent.vhdx"),
            ("absolute_win32_path", "C:\\Projects\\fat-parent.vhdx"),
            ("volume_path", "\\\\?\\Volume{5e0bd954-71b2-4bff-a928-082af7ab0f8f}\\Projects\\fat-parent.vhdx"),
            ("something_else", "x"),
        ]);
        let locator = ParentLocator::parse(&bytes).unwrap();
        let names = [
            "./fat-parent.vhdx",
            "//?/Volume{5e0bd954-71b2-4bff-a928-082af7ab0f8f}/Projects/fat-parent.vhdx",
            "C:/Projects/fat-parent.vhdx",
            "fat-parent.vhdx",
        ];
        assert_eq!(locator.names(), names);
        assert!(locator.is_parent(Guid::parse(LINKAGE).unwrap()));
        assert!(!locator.is_parent(Guid::ZERO));
        assert_eq!(ParentLocator::default().names(), Vec::<String>::new());
        let drive = ParentLocator { absolute_win32_path: Some("C:a.vhdx".to_owned()), ..ParentLocator::default() };
        assert_eq!(drive.names(), ["C:a.vhdx", "a.vhdx"]);
    }

    #[test]
    fn broken_items() {
        let good = item(&[("relative_path", "p"), ("parent_linkage", "no guid")]);
        assert_eq!(ParentLocator::parse(&good).unwrap().linkage, None);
        for len in 0..good.len() {
            assert!(ParentLocator::parse(&good[..len]).is_err(), "{len} bytes");
        }
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            ParentLocator::parse(&bytes)
        };
        assert!(matches!(with(0, 1), Err(Error::LocatorKind(_))));
        // More entries than there are.
        assert!(matches!(with(19, 0xff), Err(Error::Locator(2..))));
        assert_eq!(with(23, 0xff), Err(Error::Locator(0)));
        assert_eq!(with(43, 0xff), Err(Error::Locator(1)));
    }

    #[test]
    fn lone_surrogates_become_replacements() {
        assert_eq!(text(&[0x41, 0, 0, 0xd8, 0x42]), "A\u{fffd}");
    }
}
