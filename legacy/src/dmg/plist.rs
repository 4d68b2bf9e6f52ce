//! Tables of chunks in the property list: QEMU looks for `<data>` and nothing else, and so does this.

use alloc::vec::Vec;

use instar_blockio::{BlockRead, zeroed};

use super::Error;
use super::chunk::Chunks;
use super::trailer::Part;
use crate::store::read_padded;

/// Most bytes of a property list (QEMU's limit).
const MAX_LEN: u64 = 16 << 20;

/// Finds the tables in the property list.
pub(super) fn read<D: BlockRead>(file: &D, part: Part, found: &mut Chunks) -> Result<(), Error> {
    if part.len > MAX_LEN {
        return Err(Error::PlistTooLong(part.len));
    }
    let mut text = zeroed(part.len as usize)?;
    read_padded(file, part.offset, &mut text)?;
    // To QEMU it is a C string.
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    let mut rest = &text[..end];
    while let Some((_, after)) = split(rest, b"<data>") {
        let (encoded, after) = split(after, b"</data>").ok_or(Error::PlistData)?;
        found.add(&decode(encoded)?)?;
        rest = after;
    }
    Ok(())
}

/// What lies before and behind the first `mark`.
fn split<'a>(text: &'a [u8], mark: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = text.windows(mark.len()).position(|window| window == mark)?;
    Some((&text[..at], &text[at + mark.len()..]))
}

/// Decodes base64. What does not belong to it is passed over.
fn decode(text: &[u8]) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let room = text.len() / 4 * 3 + 3;
    bytes.try_reserve_exact(room).map_err(|_| Error::Io(instar_blockio::ErrorKind::OutOfMemory.into()))?;
    let (mut word, mut digits) = (0u32, 0);
    for digit in text.iter().filter_map(|&byte| digit(byte)) {
        word = word << 6 | u32::from(digit);
        digits += 1;
        if digits == 4 {
            bytes.extend_from_slice(&word.to_be_bytes()[1..]);
            (word, digits) = (0, 0);
        }
    }
    match digits {
        2 => bytes.push((word >> 4) as u8),
        3 => bytes.extend_from_slice(&((word >> 2) as u16).to_be_bytes()),
        _ => {}
    }
    Ok(bytes)
}

fn digit(byte: u8) -> Option<u8> {
    Some(match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64() {
        let cases: [(&[u8], &[u8]); 7] = [
            (b"", b""),
            (b"bWlzaA==", b"mish"),
            (b"\n\tbWlz\n\taDE=\n", b"mish1"),
            (b"bWlz!aDEy", b"mish12"),
            (b"+/+/", b"\xfb\xff\xbf"),
            (b"bWlzaA", b"mish"),
            (b"b", b""),
        ];
        for (text, bytes) in cases {
            assert_eq!(decode(text).unwrap(), bytes, "{text:?}");
        }
    }

    #[test]
    fn marks() {
        assert_eq!(split(b"ab<data>cd", b"<data>"), Some((&b"ab"[..], &b"cd"[..])));
        assert_eq!(split(b"ab<dat", b"<data>"), None);
    }
}
