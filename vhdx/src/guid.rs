//! GUIDs: as they are stored, as text, and new ones.

use core::fmt;

/// A GUID as it is stored: the first three fields are little-endian.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// All zero: "none".
    pub const ZERO: Self = Self([0; 16]);

    /// Reads `{XXXXXXXX-XXXX-XXXX-XXXX-XXXXXXXXXXXX}`; the braces may be missing, letters are of any case.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('{').map_or(Some(text), |rest| rest.strip_suffix('}'))?;
        let mut bytes = [0; 16];
        let mut places = ORDER.iter();
        let mut digits = text.bytes().enumerate();
        while let Some((at, byte)) = digits.next() {
            if matches!(at, 8 | 13 | 18 | 23) {
                if byte != b'-' {
                    return None;
                }
                continue;
            }
            let high = char::from(byte).to_digit(16)?;
            let low = char::from(digits.next()?.1).to_digit(16)?;
            bytes[*places.next()?] = (high << 4 | low) as u8; // below 256
        }
        places.next().is_none().then_some(Self(bytes))
    }
}

/// Which stored byte each pair of digits stands for.
const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, place) in ORDER.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0[*place])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Makes GUIDs and numbers out of the caller's random bytes: they are to differ, not to be secret.
#[derive(Clone, Debug)]
pub(crate) struct GuidSource {
    state: [u64; 2],
}

impl GuidSource {
    pub(crate) fn new(seed: [u8; 16]) -> Self {
        let [a, b] = [0, 8].map(|at| u64::from_le_bytes(core::array::from_fn(|k| seed[at + k])));
        Self { state: [a, b] }
    }

    /// One step of splitmix64 on each half; the halves are mixed into the result.
    pub(crate) fn number(&mut self) -> u64 {
        let mut mixed = 0_u64;
        for (state, gamma) in self.state.iter_mut().zip([0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03]) {
            *state = state.wrapping_add(gamma);
            let mut z = *state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed = mixed.rotate_left(32) ^ z ^ (z >> 31);
        }
        mixed
    }

    /// A GUID of version 4.
    pub(crate) fn guid(&mut self) -> Guid {
        let (a, b) = (self.number().to_le_bytes(), self.number().to_le_bytes());
        let mut bytes: [u8; 16] = core::array::from_fn(|at| if at < 8 { a[at] } else { b[at - 8] });
        bytes[7] = bytes[7] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Guid(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BAT_REGION, PARENT_LOCATOR};
    use std::string::ToString;

    #[test]
    fn text_and_bytes() {
        let bat = Guid::parse("{2DC27766-F623-4200-9D64-115E9BFD4A08}").unwrap();
        assert_eq!(bat, Guid(BAT_REGION));
        assert_eq!(bat.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
        assert_eq!(Guid::parse("a8d35f2d-b30b-454d-abf7-d3d84834ab0c"), Some(Guid(PARENT_LOCATOR)));
        for bad in
            ["", "{", "{}", "2dc27766", "{2dc27766-f623-4200-9d64-115e9bfd4a08", "2dc27766xf623-4200-9d64-115e9bfd4a08"]
        {
            assert_eq!(Guid::parse(bad), None, "{bad}");
        }
        assert_eq!(Guid::parse("2dc27766-f623-4200-9d64-115e9bfd4a080"), None);
        assert_eq!(Guid::parse("2dc27766-f623-4200-9d64-115e9bfd4a0800"), None);
        assert_eq!(Guid::parse("2dc27766-f623-4200-9d64-115e9bfd4aé8"), None);
    }

    #[test]
    fn new_ones_differ_and_are_of_version_4() {
        let mut source = GuidSource::new([0; 16]);
        let (a, b) = (source.guid(), source.guid());
        assert_ne!(a, b);
        assert_ne!(a, GuidSource::new([1; 16]).guid());
        for guid in [a, b] {
            assert_eq!((guid.0[7] >> 4, guid.0[8] >> 6), (4, 2));
        }
    }
}
