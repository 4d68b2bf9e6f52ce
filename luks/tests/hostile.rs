//! Changed headers of both versions: opening ends, in bounded time and memory, and without a panic.

mod volumes;

use instar_blockio::MemBlock;
use instar_luks::{Error, Limits, Volume};
use proptest::prelude::*;

/// Little, so that a case is quick.
const LIMITS: Limits = Limits { iterations: 2000, memory: 1 << 16 };

/// Opens what the bytes hold, if anything.
fn open(bytes: Vec<u8>) -> Result<(), Error> {
    let disk = MemBlock::from(bytes);
    let volume = Volume::read(&disk, 0, false)?;
    let _ = volume.payload();
    let _ = volume.spec();
    volume.unlock(&disk, 0, volumes::PASSPHRASE, &LIMITS).map(|_| ())
}

#[test]
fn the_volumes_open() {
    open(volumes::version_1()).unwrap();
    open(volumes::version_2(&volumes::metadata(), true)).unwrap();
    let argon2 = volumes::metadata().replace("\"type\":\"pbkdf2\",\"salt\"", "\"type\":\"argon2id\",\"salt\"");
    assert_ne!(argon2, volumes::metadata());
    open(volumes::version_2(&argon2, true)).unwrap_err();
}

#[test]
fn a_slot_that_is_named_a_thousand_times_costs_no_more() {
    let many = format!("\"keyslots\":[{}]", vec!["\"0\""; 500].join(","));
    let text = volumes::metadata().replace("\"keyslots\":[\"0\"]", &many);
    assert_ne!(text, volumes::metadata());
    let disk = MemBlock::from(volumes::version_2(&text, true));
    let opened = Volume::read(&disk, 0, false).and_then(|volume| {
        volume.unlock(&disk, 0, b"another", &Limits { iterations: u64::MAX, memory: 0 }).map(|_| ())
    });
    assert!(matches!(opened, Err(Error::Metadata | Error::WrongPassphrase)), "{opened:?}");
}

/// What a changed header may be called: anything but a lack of memory.
fn judge(opened: Result<(), Error>) -> Result<(), TestCaseError> {
    prop_assert!(!matches!(opened, Err(Error::OutOfMemory)), "{opened:?}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Bytes of the header and of the first key material.
    #[test]
    fn changed_bytes_of_version_1(changes in prop::collection::vec((0_usize..600, any::<u8>()), 1..6)) {
        let mut bytes = volumes::version_1();
        changes.into_iter().for_each(|(at, value)| bytes[at] = value);
        judge(open(bytes))?;
    }

    /// Whole fields of 32 bits: sizes, places, counts.
    #[test]
    fn changed_numbers_of_version_1(changes in prop::collection::vec((26_usize..148, any::<u32>()), 1..4)) {
        let mut bytes = volumes::version_1();
        for (word, value) in changes {
            bytes[word * 4..][..4].copy_from_slice(&value.to_be_bytes());
        }
        judge(open(bytes))?;
    }

    /// The text of version 2 with characters changed, sealed again.
    #[test]
    fn changed_text_of_version_2(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut text = volumes::metadata().into_bytes();
        for (at, value) in changes {
            let at = at.index(text.len());
            text[at] = value;
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        judge(open(volumes::version_2(&text, true)))?;
    }

    /// Its numbers replaced by others.
    #[test]
    fn changed_numbers_of_version_2(which in any::<prop::sample::Index>(), number in any::<u64>(), small in any::<bool>()) {
        let text = volumes::metadata();
        let is_digit = |at: usize| text.as_bytes()[at].is_ascii_digit();
        let starts: Vec<usize> = (1..text.len()).filter(|&at| is_digit(at) && !is_digit(at - 1)).collect();
        let start = starts[which.index(starts.len())];
        let end = (start..text.len()).find(|&at| !is_digit(at)).unwrap();
        let number = if small { number % 70_000 } else { number };
        let changed = format!("{}{number}{}", &text[..start], &text[end..]);
        judge(open(volumes::version_2(&changed, true)))?;
    }

    /// Bytes of the binary header, with and without a sum that fits.
    #[test]
    fn changed_bytes_of_version_2(changes in prop::collection::vec((6_usize..512, any::<u8>()), 1..4), sealed in any::<bool>()) {
        let mut bytes = volumes::version_2(&volumes::metadata(), false);
        changes.into_iter().for_each(|(at, value)| bytes[at] = value);
        if sealed {
            volumes::seal(&mut bytes);
        }
        judge(open(bytes))?;
    }
}
