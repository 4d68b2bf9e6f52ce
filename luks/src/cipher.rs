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
}
