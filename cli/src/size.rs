//! Sizes as typed: `64M`, `1.5G`, `0x1000`; and the messages about those that are none.

/// The largest size that qemu-img takes where it prints `Must be between`.
const MAX: u64 = i64::MAX as u64;

/// Why a text is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number, an unknown suffix, or text behind it.
    Malformed,
    /// Larger than 64 bits hold, or negative.
    OutOfRange,
}

/// Parses a size: decimal with an optional fraction, or `0x` hexadecimal; a suffix of `b k m g t p e` in either case
/// multiplies by powers of 1024.
///
/// # Errors
/// As [`SizeError`] says. `8E` fits (2^63); `16E` does not.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    if let Some(positive) = text.strip_prefix('-') {
        // A sign is understood before digits alone.
        let whole = !positive.is_empty() && positive.bytes().all(|byte| byte.is_ascii_digit());
        return Err(if whole { SizeError::OutOfRange } else { SizeError::Malformed });
    }
    parse_unsigned(text.strip_prefix('+').unwrap_or(text))
}

fn parse_unsigned(text: &str) -> Result<u64, SizeError> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return parse_hex(hex);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, rest) = text.split_at(digits);
    let (fraction, suffix) = split_fraction(rest);
    let fraction = fraction.unwrap_or_default();
    if whole.is_empty() && fraction.is_empty() {
        return Err(SizeError::Malformed);
    }
    let shift = suffix_shift(suffix)?;
    if shift == 0 && fraction.bytes().any(|digit| digit != b'0') {
        return Err(SizeError::Malformed);
    }
    let whole: u64 = match whole {
        "" => 0,
        digits => digits.parse().map_err(|_| SizeError::OutOfRange)?,
    };
    let scaled = whole.checked_shl(shift).filter(|scaled| scaled >> shift == whole).ok_or(SizeError::OutOfRange)?;
    scaled.checked_add(scale_fraction(fraction, shift)).ok_or(SizeError::OutOfRange)
}

fn parse_hex(digits: &str) -> Result<u64, SizeError> {
    let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(end);
    if number.is_empty() || !suffix.is_empty() {
        return Err(SizeError::Malformed);
    }
    u64::from_str_radix(number, 16).map_err(|_| SizeError::OutOfRange)
}

/// `.5G` → (`5`, `G`).
fn split_fraction(text: &str) -> (Option<&str>, &str) {
    match text.strip_prefix('.') {
        None => (None, text),
        Some(rest) => {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            (Some(&rest[..end]), &rest[end..])
        }
    }
}

fn suffix_shift(suffix: &str) -> Result<u32, SizeError> {
    Ok(match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(SizeError::Malformed),
    })
}

/// `0.digits * 2^shift`, rounded down. Digits beyond the eighteenth cannot change a result below 2^60.
fn scale_fraction(digits: &str, shift: u32) -> u64 {
    let digits = &digits[..digits.len().min(18)];
    let numerator = u128::from(digits.parse::<u64>().unwrap_or(0));
    let denominator = 10u128.pow(digits.len() as u32);
    u64::try_from((numerator << shift) / denominator).unwrap_or(u64::MAX)
}

/// Parses a size of which qemu-img says `Invalid WHAT specified`, within `min..=max`.
///
/// # Errors
/// The message.
pub fn parse_named(what: &str, text: &str, min: u64, max: u64) -> Result<u64, String> {
    match parse(text) {
        Err(SizeError::Malformed) => Err(format!("Invalid {what} specified: '{text}'.")),
        Ok(size) if (min..=max).contains(&size) => Ok(size),
        _ => Err(format!("Invalid {what} specified. Must be between {min} and {max}.")),
    }
}

/// Parses the size of an image.
///
/// # Errors
/// The message.
pub fn parse_image_size(text: &str) -> Result<u64, String> {
    parse_named("image size", text, 0, MAX)
}

/// Parses a plain decimal or hexadecimal number within `min..=max`.
///
/// # Errors
/// The message.
pub fn parse_count(what: &str, text: &str, min: u64, max: u64) -> Result<u64, String> {
    let digits = text.trim_start();
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            Some(digits.parse().unwrap_or(u64::MAX))
        }
        None => digits.strip_prefix('-').filter(|rest| rest.parse::<u64>().is_ok()).map(|_| u64::MAX),
    };
    match number {
        None => Err(format!("Invalid {what} specified: '{text}'.")),
        Some(number) if (min..=max).contains(&number) => Ok(number),
        Some(_) => Err(format!("Invalid {what} specified. Must be between {min} and {max}.")),
    }
}

/// Parses `-S`: a multiple of 512 up to 16 MiB; 0 turns sparse output off.
///
/// # Errors
/// The message.
pub fn parse_sparse_size(text: &str) -> Result<u64, String> {
    const LIMIT: u64 = 16 << 20;
    let size = parse_named("buffer size for sparse output", text, 0, MAX)?;
    match size % 512 == 0 && size <= LIMIT {
        true => Ok(size),
        false => Err(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {LIMIT}. Select 0 \
             to disable sparse detection (fully allocates output)."
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, want) in [
            ("0", 0),
            ("010", 10),
            ("1000", 1000),
            ("64M", 64 << 20),
            ("1.5G", 3 << 29),
            ("1.3k", 1331),
            ("0.0001k", 0),
            ("0x100000", 1 << 20),
            (" 5k", 5120),
            ("1b", 1),
            ("7E", 7 << 60),
            ("8E", 1 << 63),
            ("2t", 2 << 40),
            ("1.", 1),
            ("1.0b", 1),
            (".5k", 512),
            ("+5k", 5120),
            ("0.5E", 1 << 59),
        ] {
            assert_eq!(parse(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn malformed_sizes() {
        for text in [
            "", "12X", "1MB", "1.5b", "1e3", "10 ", "abc", "-x", "0x", "0x10k", ".", "1.5", "+-5", "1 k", "1kk", "-5k",
            "-0x5",
        ] {
            assert_eq!(parse(text), Err(SizeError::Malformed), "{text}");
        }
    }

    #[test]
    fn sizes_out_of_range() {
        for text in ["16E", "99999999999999999999", "-1", "-0"] {
            assert_eq!(parse(text), Err(SizeError::OutOfRange), "{text}");
        }
    }

    #[test]
    fn image_size_messages() {
        assert_eq!(parse_image_size("64X").unwrap_err(), "Invalid image size specified: '64X'.");
        assert_eq!(
            parse_image_size("8E").unwrap_err(),
            "Invalid image size specified. Must be between 0 and 9223372036854775807."
        );
        assert_eq!(parse_image_size("1.5G"), Ok(1610612736));
    }

    #[test]
    fn sparse_sizes() {
        assert_eq!(parse_sparse_size("0"), Ok(0));
        assert_eq!(parse_sparse_size("1.5k"), Ok(1536));
        assert!(parse_sparse_size("1000").unwrap_err().contains("Valid sizes are multiples of 512 up to 16777216."));
        assert_eq!(parse_sparse_size("abc").unwrap_err(), "Invalid buffer size for sparse output specified: 'abc'.");
    }

    #[test]
    fn counts() {
        assert_eq!(parse_count("number of coroutines", "16", 1, 16), Ok(16));
        assert_eq!(
            parse_count("number of coroutines", "17", 1, 16).unwrap_err(),
            "Invalid number of coroutines specified. Must be between 1 and 16."
        );
        assert_eq!(
            parse_count("number of coroutines", "1k", 1, 16).unwrap_err(),
            "Invalid number of coroutines specified: '1k'."
        );
    }
}
