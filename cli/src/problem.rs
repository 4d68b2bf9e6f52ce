//! One error line as the user sees it, with the lines that explain it.

use std::fmt;

/// A message, without the program's name before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The message.
    text: String,
    /// Lines that follow it without a prefix.
    hint: Option<String>,
    /// The message is but an error number's, and is not said without what failed.
    unworded: bool,
}

/// `errno`: invalid argument.
pub const EINVAL: i32 = 22;

impl Problem {
    /// A message.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), hint: None, unworded: false }
    }

    /// Why an image can't be opened where QEMU's driver has no words for it, but only an error number.
    pub fn unworded(errno: i32) -> Self {
        Self { unworded: true, ..Self::new(os_text(errno)) }
    }

    /// The same as said of the file in which the image lies.
    pub fn of_image_in(self, file: &str) -> Self {
        if self.unworded { self.within(format!("Could not open '{file}'")) } else { self }
    }

    /// The same with an explaining line behind it.
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        let hint = match self.hint {
            Some(first) => format!("{first}\n{}", hint.into()),
            None => hint.into(),
        };
        Self { hint: Some(hint), ..self }
    }

    /// The same as the reason of something larger: `context: message`.
    pub fn within(self, context: impl fmt::Display) -> Self {
        Self { text: format!("{context}: {}", self.text), unworded: false, ..self }
    }

    /// A system call that failed on a file: `Could not open 'F': No such file or directory`.
    pub fn file(verb: &str, name: &str, error: rustix::io::Errno) -> Self {
        Self::new(format!("Could not {verb} '{name}': {}", os_text(error.raw_os_error())))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        match &self.hint {
            Some(hint) => write!(f, "\n{hint}"),
            None => Ok(()),
        }
    }
}

/// What the C library calls an error number.
pub fn os_text(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Bytes from an image, fit for a terminal: what is no UTF-8, and every control character, as `\xNN`.
pub fn printable(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                c if c.is_control() => {
                    let mut encoded = [0; 4];
                    for byte in c.encode_utf8(&mut encoded).bytes() {
                        out.push_str(&format!("\\x{byte:02x}"));
                    }
                }
                // Marks that reorder or hide text.
                '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' => {
                    out.push_str(&c.escape_unicode().to_string());
                }
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_go_before_hints() {
        let problem = Problem::new("Failed to get \"write\" lock")
            .with_hint("Is another process using the image [a]?")
            .within("Could not open 'a'");
        assert_eq!(
            problem.to_string(),
            "Could not open 'a': Failed to get \"write\" lock\nIs another process using the image [a]?"
        );
    }

    #[test]
    fn errors_are_named_as_in_c() {
        assert_eq!(os_text(2), "No such file or directory");
        assert_eq!(
            Problem::file("open", "x", rustix::io::Errno::ACCESS).to_string(),
            "Could not open 'x': Permission denied"
        );
    }

    #[test]
    fn image_text_is_harmless() {
        assert_eq!(printable(b"a\x1b[2J\n\xff\xc2\x9bz"), "a\\x1b[2J\\x0a\\xff\\xc2\\x9bz");
        assert_eq!(printable("é".as_bytes()), "é");
        assert_eq!(printable("\u{202e}x".as_bytes()), "\\u{202e}x");
    }
}
