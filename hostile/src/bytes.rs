//! Bytes of an image under construction.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// A file's contents: pages that are not all zero, and the length. Copies share the pages that are the same, since hundreds of images differ in
/// a field only.
#[derive(Clone, Debug, Default)]
pub struct Image {
    pages: BTreeMap<usize, Arc<[u8; PAGE]>>,
    len: u64,
}

/// Byte order of a field.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// Most significant byte first.
    Big,
    /// Least significant byte first.
    Little,
}

impl Image {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// With `bytes` at `at`; grows as needed.
    pub fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.len = self.len.max((at + bytes.len()) as u64);
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(PAGE - at % PAGE));
            if self.pages.contains_key(&(at / PAGE)) || now.iter().any(|byte| *byte != 0) {
                let page = self.pages.entry(at / PAGE).or_insert_with(|| Arc::new([0; PAGE]));
                Arc::make_mut(page)[at % PAGE..at % PAGE + now.len()].copy_from_slice(now);
            }
            (at, rest) = (at + now.len(), later);
        }
        self
    }

    /// A field of `width` bytes.
    pub fn int(self, order: Order, at: usize, width: usize, value: u64) -> Self {
        match order {
            Order::Big => self.put(at, &value.to_be_bytes()[8 - width..]),
            Order::Little => self.put(at, &value.to_le_bytes()[..width]),
        }
    }

    /// A big-endian field of 4 bytes.
    pub fn be32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    /// A big-endian field of 8 bytes.
    pub fn be64(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    /// A little-endian field of 4 bytes.
    pub fn le32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_le_bytes())
    }

    /// A little-endian field of 8 bytes.
    pub fn le64(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_le_bytes())
    }

    /// Cut off, or with a hole at the end.
    pub fn with_len(mut self, len: u64) -> Self {
        self.pages.retain(|&number, page| {
            let there = len.saturating_sub((number * PAGE) as u64).min(PAGE as u64) as usize;
            if there > 0 && there < PAGE {
                Arc::make_mut(page)[there..].fill(0);
            }
            there > 0
        });
        self.len = len;
        self
    }

    /// A part of it, holes included.
    pub fn part(&self, at: usize, len: usize) -> Vec<u8> {
        let mut part = vec![0; len];
        self.read(at, &mut part);
        part
    }

    /// Reads a part of it into a buffer; behind the end it is zero.
    pub fn read(&self, at: usize, part: &mut [u8]) {
        part.fill(0);
        let end = at.saturating_add(part.len());
        for (&number, page) in self.pages.range(at / PAGE..=end / PAGE) {
            let start = number * PAGE;
            let (from, to) = (start.max(at), (start + PAGE).min(end));
            if from < to {
                part[from - at..to - at].copy_from_slice(&page[from - start..to - start]);
            }
        }
    }

    /// All of it.
    pub fn bytes(&self) -> Vec<u8> {
        self.part(0, self.len as usize)
    }

    /// What is not a hole: places and bytes.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pages.iter().map(|(&number, page)| {
            let at = (number * PAGE) as u64;
            (at, &page[..(self.len - at).min(PAGE as u64) as usize])
        })
    }

    /// Bytes that are not holes, in whole pages.
    pub fn present(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    /// Length of the file, bytes.
    pub fn size(&self) -> u64 {
        self.len
    }
}

/// CRC-32C, bit by bit: some kilobytes are all it is for.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// RFC 4648.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for part in bytes.chunks(3) {
        let word = part.iter().fold(0u32, |word, &byte| word << 8 | u32::from(byte)) << (8 * (3 - part.len()));
        for digit in 0..4 {
            let index = (word >> (18 - 6 * digit) & 63) as usize;
            out.push(if digit > part.len() { '=' } else { char::from(DIGITS[index]) });
        }
    }
    out
}

/// UTF-16, big-endian as VHD has it or little-endian as VHDX.
pub fn utf16(text: &str, order: Order) -> Vec<u8> {
    let bytes = |unit: u16| match order {
        Order::Big => unit.to_be_bytes(),
        Order::Little => unit.to_le_bytes(),
    };
    text.encode_utf16().flat_map(bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!([base64(b"f"), base64(b"fo"), base64(b"foobar")], ["Zg==", "Zm8=", "Zm9vYmFy"]);
        assert_eq!(utf16("aé", Order::Big), [0, 0x61, 0, 0xe9]);
        let image = Image::new().int(Order::Big, 2, 2, 0x0102).le32(8, 1).with_len(10);
        assert_eq!((image.bytes(), image.size()), (vec![0, 0, 1, 2, 0, 0, 0, 0, 1, 0], 10));
        let long = Image::new().put(PAGE - 1, b"abc").put(9 * PAGE, b"d");
        assert_eq!(long.part(PAGE - 2, 5), b"\0abc\0");
        assert_eq!(long.pieces().count(), 3);
        assert_eq!(long.with_len(PAGE as u64 + 1).bytes()[PAGE - 2..], *b"\0ab");
    }
}
