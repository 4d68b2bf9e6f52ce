//! LUKS, and the encryption of qcow2 images, which has the same options.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use instar_guest_protocol::message::{Format, KeyChange, LuksOptions, Preallocation, Target};
use instar_luks::{Algorithm, CipherMode, CipherSpec, Error, Hash};

use super::{CreatableFormat, Layout, is_negative, preallocation};
use crate::commands::Objects;
use crate::options::{Kind, Options, Spec, spec};
use crate::problem::{Problem, os_text};

/// A LUKS volume of version 1.
pub static LUKS: CreatableFormat =
    CreatableFormat { format: Format::Luks, options: OPTIONS, layout, compresses: false };

const OPTIONS: &[Spec] = &[
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec("key-secret", Kind::Text, None, "ID of the secret that provides the keyslot passphrase"),
    spec("cipher-alg", Kind::Text, None, "Name of encryption cipher algorithm"),
    spec("cipher-mode", Kind::Text, None, "Name of encryption cipher mode"),
    spec("ivgen-alg", Kind::Text, None, "Name of IV generator algorithm"),
    spec("ivgen-hash-alg", Kind::Text, None, "Name of IV generator hash algorithm"),
    spec("hash-alg", Kind::Text, None, "Name of encryption hash algorithm"),
    spec("iter-time", Kind::Number, None, "Time to spend in PBKDF in milliseconds"),
    spec("detached-header", Kind::Switch, None, "Create a detached LUKS header"),
];

/// Milliseconds that opening takes, unless the user says otherwise.
const ITER_TIME: u64 = 2000;
/// Iterations at least.
const MIN_ITERATIONS: u64 = 1000;

fn layout(options: &Options, objects: &Objects) -> Layout {
    let mut wire = Target { format: Format::Luks.into(), ..Target::default() };
    let mut late = None;
    match of_options(options, "", objects) {
        Ok(luks) => {
            wire.luks = Some(LuksOptions { detached: options.switch("detached-header").unwrap_or(false), ..luks });
        }
        Err(problem) => late = Some(problem),
    }
    match options.text("preallocation").map(|word| (word, preallocation(word))) {
        None => {}
        // There are no tables to make ahead.
        Some((_, Some(Preallocation::Metadata))) => {}
        Some((_, Some(mode))) => wire.preallocation = mode.into(),
        Some((word, None)) => {
            late.get_or_insert(Problem::new(format!("invalid parameter value: {word}")));
        }
    }
    if options.number("size").is_some_and(is_negative) {
        late.get_or_insert(Problem::new("The requested file size is too large"));
    }
    Layout { wire, late, ..Layout::default() }
}

/// The new volume that options with this prefix describe.
///
/// # Errors
/// No secret, unknown names, or parts that do not fit together: the message of qemu-img.
pub fn of_options(options: &Options, prefix: &str, objects: &Objects) -> Result<LuksOptions, Problem> {
    let parts = parts(options, prefix, objects)?;
    let hash = Hash::named(&parts.hash).unwrap_or(Hash::Sha256);
    let time = iteration_time(options, prefix);
    let (slot, digest) = iterations(hash, parts.key_bytes as usize, time)?;
    Ok(LuksOptions { seed: random(SEED)?, slot_iterations: slot, digest_iterations: digest, ..parts })
}

/// Milliseconds that opening a new key slot is to take.
fn iteration_time(options: &Options, prefix: &str) -> u64 {
    options.number(&format!("{prefix}iter-time")).unwrap_or(ITER_TIME)
}

/// Random bytes of which all that is random in a volume is made.
const SEED: usize = 48;
/// Longest key of a volume, bytes.
const MAX_KEY: usize = 64;

/// The change of key slots that options with this prefix describe, for a volume with this hash and length of key.
///
/// # Errors
/// Options that contradict each other, no such secret: the message of qemu-img.
pub fn key_change(
    options: &Options,
    prefix: &str,
    objects: &Objects,
    (hash, key_bytes): (&[u8], usize),
    force: bool,
) -> Result<KeyChange, Problem> {
    let get = |name: &str| options.text(&format!("{prefix}{name}"));
    let problem = |text: &str| Err(Problem::new(text));
    let secret = |id: &str| objects.passphrase(id).map(|mut secret| std::mem::take(&mut *secret));
    let number = |name: &str| options.number(&format!("{prefix}{name}"));
    // The number of a slot is one of 32 bits, whatever was typed.
    let slot = number("keyslot").map(|slot| slot as u32);
    let activate = match get("state") {
        Some("active") => true,
        Some("inactive") => false,
        Some(word) => return Err(Problem::new(format!("Parameter 'state' does not accept value '{word}'"))),
        None => return problem("Parameter 'state' is missing"),
    };
    let mut change = KeyChange { activate, slot, force, seed: random(SEED)?, ..KeyChange::default() };
    if activate {
        let Some(id) = get("new-secret") else { return problem("'new-secret' is required to activate a keyslot") };
        if get("old-secret").is_some() {
            return problem("'old-secret' must not be given when activating keyslots");
        }
        change.new_passphrase = secret(id)?;
        let hash = Hash::named(hash).unwrap_or(Hash::Sha256);
        change.iterations = slot_iterations(hash, key_bytes.min(MAX_KEY), iteration_time(options, prefix))?;
        return Ok(change);
    }
    if get("new-secret").is_some() {
        return problem("'new-secret' must not be given when erasing keyslots");
    }
    if number("iter-time").is_some() {
        return problem("'iter-time' must not be given when erasing keyslots");
    }
    change.old_passphrase = get("old-secret").map(secret).transpose()?;
    if change.slot.is_none() && change.old_passphrase.is_none() {
        return problem(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given",
        );
    }
    Ok(change)
}

/// The volume without what is random or measured.
fn parts(options: &Options, prefix: &str, objects: &Objects) -> Result<LuksOptions, Problem> {
    let get = |name: &str| options.text(&format!("{prefix}{name}"));
    let refused = |name: &str, word: &str| Problem::new(format!("Parameter '{name}' does not accept value '{word}'"));
    let hash_named = |name: &str| match get(name) {
        None => Ok(None),
        Some(word) => Hash::named(word.as_bytes()).map(Some).ok_or_else(|| refused(name, word)),
    };
    let word = get("cipher-alg").unwrap_or("aes-256");
    let (cipher, cipher_key) = cipher(word).ok_or_else(|| match OTHER_CIPHERS.contains(&word) {
        true => Problem::new(format!("Algorithm '{word}' not supported")),
        false => refused("cipher-alg", word),
    })?;
    let mode = choice("cipher-mode", get("cipher-mode").unwrap_or("xts"), &["ecb", "cbc", "xts", "ctr"])?;
    let ivgen = choice("ivgen-alg", get("ivgen-alg").unwrap_or("plain64"), &["plain", "plain64", "essiv"])?;
    let iv_hash = match (ivgen, hash_named("ivgen-hash-alg")?) {
        ("essiv", None) => Some(Hash::Sha256),
        (_, given) => given,
    };
    let hash = hash_named("hash-alg")?.unwrap_or(Hash::Sha256);
    let id = get("key-secret");
    let id = id.ok_or_else(|| Problem::new(format!("Parameter '{prefix}key-secret' is required for cipher")))?;
    let mut passphrase = objects.passphrase(id)?;
    let key_bytes = if mode == "xts" { 2 * cipher_key } else { cipher_key };
    let text = match iv_hash {
        Some(hash) => format!("{mode}-{ivgen}:{hash}"),
        None => format!("{mode}-{ivgen}"),
    };
    check(cipher, word, mode, &text, key_bytes)?;
    Ok(LuksOptions {
        passphrase: std::mem::take(&mut *passphrase),
        cipher_name: cipher.as_bytes().to_vec(),
        cipher_mode: text.into_bytes(),
        hash: hash.name().as_bytes().to_vec(),
        key_bytes,
        ..LuksOptions::default()
    })
}

/// Where the contents of the volume that options describe begin, bytes.
///
/// # Errors
/// As [`of_options`].
pub fn payload_offset(options: &Options, prefix: &str, objects: &Objects) -> Result<u64, Problem> {
    let made = parts(options, prefix, objects)?;
    // A header of 4 KiB, and eight key slots of 4000 stripes in whole blocks of 4 KiB.
    Ok(4096 + 8 * (u64::from(made.key_bytes) * 4000).next_multiple_of(4096))
}

/// Ciphers of QEMU that LUKS has no name for.
const OTHER_CIPHERS: &[&str] = &["des", "3des", "sm4"];

/// Name in the header, and bytes of the key.
fn cipher(word: &str) -> Option<(&'static str, u32)> {
    let (name, bits) = word.rsplit_once('-')?;
    let known = [Algorithm::Aes, Algorithm::Serpent, Algorithm::Twofish, Algorithm::Cast5];
    let algorithm = known.into_iter().find(|algorithm| algorithm.name() == name)?;
    let bits = match (algorithm, bits) {
        (_, "128") => 128,
        (Algorithm::Cast5, _) => return None,
        (_, "192") => 192,
        (_, "256") => 256,
        _ => return None,
    };
    Some((algorithm.name(), bits / 8))
}

fn choice<'a>(name: &str, word: &'a str, known: &[&str]) -> Result<&'a str, Problem> {
    match known.contains(&word) {
        true => Ok(word),
        false => Err(Problem::new(format!("Parameter '{name}' does not accept value '{word}'"))),
    }
}

/// Do the parts fit together?
fn check(cipher: &str, word: &str, mode: &str, text: &str, key_bytes: u32) -> Result<(), Problem> {
    let spec = CipherSpec::named(cipher.as_bytes(), CipherMode::split(text.as_bytes()), key_bytes);
    Err(Problem::new(match spec {
        Ok(_) => return Ok(()),
        // qemu-img sets the generator up before the cipher.
        Err(Error::ModeNeedsWideBlocks | Error::EssivKeySize(_)) if cipher == "cast5" && text.contains("essiv") => {
            format!("Cipher {word} not supported with essiv")
        }
        Err(Error::ModeNeedsWideBlocks) => format!("Unsupported cipher mode {mode}"),
        Err(Error::EssivKeySize(len)) => {
            let name = match cipher {
                "aes" => "AES",
                "serpent" => "Serpent",
                _ => "Twofish",
            };
            format!("No {name} cipher with key size {len} available")
        }
        // The modes that take two keys take none of this cipher.
        Err(_) => format!("Unsupported cipher mode {mode}"),
    }))
}

/// Iterations of the key slot and of the digest, so that this machine takes `time` milliseconds for the slot and an eighth of it for
/// the digest.
fn iterations(hash: Hash, key_len: usize, time: u64) -> Result<(u32, u32), Problem> {
    Ok((measured(hash, key_len, time, 1)?, measured(hash, DIGEST_LEN, time, 8)?))
}

/// Iterations of a key slot.
fn slot_iterations(hash: Hash, key_len: usize, time: u64) -> Result<u32, Problem> {
    measured(hash, key_len, time, 1)
}

/// PBKDF2 iterations into `len` bytes for a part of `time` milliseconds. At least what QEMU takes at least; nothing is measured where
/// that is enough anyway.
fn measured(hash: Hash, len: usize, time: u64, divisor: u64) -> Result<u32, Problem> {
    if time == 0 {
        return Ok(MIN_ITERATIONS as u32);
    }
    let too_many = |count: u64| Problem::new(format!("PBKDF iterations {count} larger than {}", u32::MAX));
    let product = u128::from(per_second(hash, len)) * u128::from(time) / 1000;
    let count = u64::try_from(product).map_err(|_| too_many(u64::MAX))? / divisor;
    let count = count.max(MIN_ITERATIONS);
    u32::try_from(count).map_err(|_| too_many(count))
}

/// Bytes that nobody can guess: keys are made of them.
fn random(len: usize) -> Result<Vec<u8>, Problem> {
    let mut bytes = vec![0; len];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    match read {
        Ok(()) => Ok(bytes),
        Err(error) => {
            let text = os_text(error.raw_os_error().unwrap_or_default());
            Err(Problem::new(format!("Could not read random bytes: {text}")))
        }
    }
}

/// Bytes of the master key's digest.
const DIGEST_LEN: usize = 20;

/// PBKDF2 iterations into `len` bytes that this machine makes in a second. Measured here and not in the guest, which has no clock;
/// nothing secret is involved.
fn per_second(hash: Hash, len: usize) -> u64 {
    const ENOUGH: Duration = Duration::from_millis(100);
    let mut out = vec![0; len];
    let mut count: u32 = 1 << 12;
    loop {
        let start = Instant::now();
        if hash.pbkdf2(b"password", b"salt", count, &mut out).is_err() {
            return MIN_ITERATIONS;
        }
        let took = start.elapsed();
        if took >= ENOUGH || count >= 1 << 30 {
            return (f64::from(count) / took.as_secs_f64().max(1e-9)) as u64;
        }
        count *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_do_not_fit() {
        assert_eq!(cipher("twofish-192"), Some(("twofish", 24)));
        assert_eq!(cipher("cast5-256"), None);
        let error = |cipher: &str, mode: &str, key| {
            let short = mode.split('-').next().unwrap();
            check(cipher, &format!("{cipher}-128"), short, mode, key).map_err(|problem| problem.to_string())
        };
        assert_eq!(error("aes", "xts-plain64", 64), Ok(()));
        assert_eq!(error("cast5", "xts-plain64", 32).unwrap_err(), "Unsupported cipher mode xts");
        assert_eq!(error("cast5", "cbc-essiv:sha256", 16).unwrap_err(), "Cipher cast5-128 not supported with essiv");
        assert_eq!(error("cast5", "xts-essiv:sha256", 32).unwrap_err(), "Cipher cast5-128 not supported with essiv");
        assert_eq!(error("aes", "cbc-essiv:sha1", 16).unwrap_err(), "No AES cipher with key size 20 available");
    }

    #[test]
    fn no_time_means_the_least() {
        assert_eq!(iterations(Hash::Sha256, 64, 0).unwrap(), (1000, 1000));
    }
}
