//! Parent locators: how a differencing image names its parent, in as many ways as there are platforms.

use alloc::string::String;
use alloc::vec::Vec;

/// One way to the parent, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ParentLocator {
    /// `W2ru`, `Wi2r`: a Windows path seen from the image's folder.
    Relative(String),
    /// `W2ku`, `Wi2k`, `MacX`: a path on the machine where the image was made.
    Absolute(String),
}

impl ParentLocator {
    /// Reads a locator; `None` for platforms whose names are no paths (`Mac `, an alias) and for unknown ones.
    pub fn parse(platform: [u8; 4], data: &[u8]) -> Option<Self> {
        Some(match &platform {
            b"W2ru" => Self::Relative(utf16_le(data)),
            b"W2ku" => Self::Absolute(utf16_le(data)),
            b"Wi2r" => Self::Relative(bytes_text(data)),
            b"Wi2k" => Self::Absolute(bytes_text(data)),
            b"MacX" => Self::Absolute(of_url(data)),
            _ => return None,
        })
    }

    /// The path from the image's folder, with `/` between folders.
    pub fn relative(&self) -> Option<String> {
        let Self::Relative(path) = self else { return None };
        let path = path.replace('\\', "/");
        let mut rest = path.as_str();
        while let Some(shorter) = rest.strip_prefix("./") {
            rest = shorter;
        }
        // Not relative at all: only its file name will do.
        let elsewhere = rest.starts_with('/') || rest.as_bytes().get(1) == Some(&b':');
        if elsewhere { None } else { Some(rest.into()) }
    }

    /// The bare file name, for a parent beside the image.
    pub fn file_name(&self) -> String {
        let (Self::Relative(path) | Self::Absolute(path)) = self;
        bare_name(path)
    }
}

/// What follows the last separator of a Windows or POSIX path.
pub(crate) fn bare_name(path: &str) -> String {
    match path.rsplit(['/', '\\', ':']).next() {
        Some("." | "..") | None => String::new(),
        Some(name) => name.into(),
    }
}

/// UTF-16, big-endian, up to the first zero; what is not valid becomes U+FFFD.
pub(crate) fn utf16_be(bytes: &[u8]) -> String {
    utf16(bytes.as_chunks::<2>().0.iter().map(|unit| u16::from_be_bytes(*unit)))
}

fn utf16_le(bytes: &[u8]) -> String {
    utf16(bytes.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit)))
}

fn utf16(units: impl Iterator<Item = u16>) -> String {
    let text = units.take_while(|unit| *unit != 0);
    char::decode_utf16(text).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

fn bytes_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The path of a `file:` URL, `%` escapes resolved.
fn of_url(bytes: &[u8]) -> String {
    let text = bytes_text(bytes);
    let path = text.strip_prefix("file://").unwrap_or(&text).as_bytes();
    let mut plain = Vec::new();
    let mut at = 0;
    while let Some(&byte) = path.get(at) {
        let digits = path.get(at + 1..at + 3).and_then(|hex| core::str::from_utf8(hex).ok());
        match digits.filter(|_| byte == b'%').and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(escaped) => {
                plain.push(escaped);
                at += 3;
            }
            None => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn le(text: &str) -> Vec<u8> {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn windows_and_mac_paths() {
        let parse = |platform, data: &[u8]| ParentLocator::parse(platform, data).unwrap();
        let relative = parse(*b"W2ru", &le(".\\disks\\p\u{e4}r.vhd\0x"));
        assert_eq!((relative.relative().unwrap(), relative.file_name()), ("disks/pär.vhd".into(), "pär.vhd".into()));
        let absolute = parse(*b"W2ku", &le("C:\\vm\\parent.vhd"));
        assert_eq!((absolute.relative(), absolute.file_name()), (None, "parent.vhd".into()));
        assert_eq!(parse(*b"MacX", b"file:///a/b%20c.vhd\0").file_name(), "b c.vhd");
        assert_eq!(parse(*b"MacX", b"a%zz%4").file_name(), "a%zz%4");
        assert_eq!(parse(*b"W2ru", &le("\\\\host\\a")).relative(), None);
        assert_eq!(parse(*b"W2ru", &le("..")).file_name(), "");
        assert_eq!(ParentLocator::parse(*b"Mac ", b"alias"), None);
    }
}
