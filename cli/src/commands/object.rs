//! `--object`: secrets, checked as qemu-img checks them.

use std::fmt;
use std::io::Read;

use aes::Aes256;
use base64ct::{Base64, Encoding};
use cipher::{BlockCipherDecrypt, KeyInit};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::options::split;
use crate::problem::{Problem, os_text};
use crate::program::Fail;

/// Kinds of objects that qemu-img knows; all but secrets are taken without a look.
const KINDS: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-pam",
    "authz-simple",
    "iothread",
    "main-loop",
    "secret",
    "secret_keyring",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// The objects of a command line. Secrets are read when they are needed, and cleared when they are dropped.
#[derive(Clone, Default)]
pub struct Objects {
    secrets: Vec<Secret>,
}

impl fmt::Debug for Objects {
    /// Names only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.secrets.iter().map(|secret| &secret.id)).finish()
    }
}

/// A secret as it was given.
#[derive(Clone)]
struct Secret {
    id: String,
    from: Origin,
    base64: bool,
    /// The secret by which it is encrypted, and the initialisation vector.
    encrypted: Option<(String, Option<String>)>,
}

#[derive(Clone)]
enum Origin {
    Data(Zeroizing<String>),
    File(String),
}

/// Secrets that are encrypted by secrets that are encrypted …
const MAX_DEPTH: usize = 8;
/// Longest secret, bytes.
const MAX_SECRET: u64 = 1 << 20;

impl Objects {
    /// Takes one `--object` argument.
    ///
    /// # Errors
    /// The message.
    pub fn add(&mut self, text: &str) -> Result<(), Fail> {
        let members = match text.starts_with('{') {
            true => json_members(text)?,
            false => keyval_members(text),
        };
        let get = |wanted: &str| members.iter().find(|(key, _)| key == wanted).map(|(_, value)| value.as_str());
        let missing = |key: &str| Fail::from(format!("Parameter '{key}' is missing"));
        let kind = get("qom-type").ok_or_else(|| missing("qom-type"))?;
        if !KINDS.contains(&kind) {
            return Err(format!("Parameter 'qom-type' does not accept value '{kind}'").into());
        }
        let id = get("id").ok_or_else(|| missing("id"))?;
        if kind == "secret" {
            let known = ["qom-type", "id", "data", "file", "format", "keyid", "iv", "loaded"];
            if let Some((key, _)) = members.iter().find(|(key, _)| !known.contains(&key.as_str())) {
                return Err(format!("Parameter '{key}' is unexpected").into());
            }
            let base64 = match get("format") {
                None | Some("raw") => false,
                Some("base64") => true,
                Some(other) => return Err(format!("Parameter 'format' does not accept value '{other}'").into()),
            };
            let from = match (get("data"), get("file")) {
                (None, None) => return Err("Either 'file' or 'data' must be provided".into()),
                (Some(_), Some(_)) => return Err("'file' and 'data' are mutually exclusive".into()),
                (Some(data), None) => Origin::Data(Zeroizing::new(data.to_owned())),
                (None, Some(file)) => Origin::File(file.to_owned()),
            };
            keep_out_of_core_files();
            let encrypted = get("keyid").map(|key| (key.to_owned(), get("iv").map(str::to_owned)));
            self.secrets.push(Secret { id: id.to_owned(), from, base64, encrypted });
        }
        Ok(())
    }

    /// Is there a secret of that name?
    pub fn has_secret(&self, id: &str) -> bool {
        self.secrets.iter().any(|known| known.id == id)
    }

    /// The passphrase that a secret holds.
    ///
    /// # Errors
    /// No such secret, or one that can't be read or decrypted, or is no text.
    pub fn passphrase(&self, id: &str) -> Result<Zeroizing<Vec<u8>>, Problem> {
        let bytes = self.read(id, 0)?;
        match str::from_utf8(&bytes) {
            Ok(_) => Ok(bytes),
            Err(_) => Err(Problem::new(format!("Data from secret {id} is not valid UTF-8"))),
        }
    }

    fn read(&self, id: &str, depth: usize) -> Result<Zeroizing<Vec<u8>>, Problem> {
        let found = self.secrets.iter().find(|known| known.id == id).filter(|_| depth < MAX_DEPTH);
        let secret = found.ok_or_else(|| Problem::new(format!("No secret with id '{id}'")))?;
        let input = match &secret.from {
            Origin::Data(data) => Zeroizing::new(data.as_bytes().to_vec()),
            Origin::File(file) => read_secret_file(file)?,
        };
        let bytes = if secret.base64 { decode_base64(&input)? } else { input };
        match &secret.encrypted {
            None => Ok(bytes),
            Some((key, iv)) => decrypt(&self.read(key, depth + 1)?, iv.as_deref(), bytes),
        }
    }
}

/// Reads a file that holds a secret.
///
/// # Errors
/// The message of the system's refusal.
pub fn read_secret_file(name: &str) -> Result<Zeroizing<Vec<u8>>, Problem> {
    keep_out_of_core_files();
    let failed = |error: std::io::Error| {
        let text = os_text(error.raw_os_error().unwrap_or_default());
        Problem::new(format!("Unable to read {name}: Failed to open file “{name}”: {text}"))
    };
    let file = std::fs::File::open(name).map_err(failed)?;
    // As long as it may be, so that no part is left behind by growing.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SECRET as usize + 1));
    file.take(MAX_SECRET + 1).read_to_end(&mut bytes).map_err(failed)?;
    match bytes.len() as u64 > MAX_SECRET {
        true => Err(Problem::new(format!("Unable to read {name}: the secret is too long"))),
        false => Ok(bytes),
    }
}

/// A crash of this program must not write secrets to disk, and no other process of the user may look into it.
fn keep_out_of_core_files() {
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
}

fn decode_base64(input: &[u8]) -> Result<Zeroizing<Vec<u8>>, Problem> {
    let text: Zeroizing<Vec<u8>> = Zeroizing::new(input.iter().copied().filter(|c| !c.is_ascii_whitespace()).collect());
    let bad = || Problem::new("Base64 data is not valid");
    let text = str::from_utf8(&text).map_err(|_| bad())?;
    Ok(Zeroizing::new(Base64::decode_vec(text).map_err(|_| bad())?))
}

/// AES-256 in CBC mode, with PKCS #7 padding.
fn decrypt(key: &[u8], iv: Option<&str>, mut bytes: Zeroizing<Vec<u8>>) -> Result<Zeroizing<Vec<u8>>, Problem> {
    let key: &[u8; 32] = key.try_into().map_err(|_| Problem::new("Key should be 32 bytes in length"))?;
    let iv = decode_base64(iv.ok_or_else(|| Problem::new("IV is required to decrypt secret"))?.as_bytes())?;
    let wrong = || Problem::new(format!("IV should be 16 bytes in length not {}", iv.len()));
    let mut before: [u8; 16] = iv.as_slice().try_into().map_err(|_| wrong())?;
    let cipher = Aes256::new(&(*key).into());
    let (blocks, rest) = bytes.as_chunks_mut::<16>();
    if !rest.is_empty() || blocks.is_empty() {
        return Err(Problem::new("Length of the encrypted secret is no multiple of the cipher's block"));
    }
    for block in blocks {
        let stored = *block;
        let mut plain = stored.into();
        cipher.decrypt_block(&mut plain);
        block.iter_mut().zip(plain).zip(before).for_each(|((out, plain), before)| *out = plain ^ before);
        before = stored;
    }
    let padding = usize::from(bytes.last().copied().unwrap_or_default());
    if padding > 16 || padding > bytes.len() {
        let text = format!("Incorrect number of padding bytes ({padding}) found on decrypted data");
        return Err(Problem::new(text));
    }
    let len = bytes.len() - padding;
    bytes.truncate(len);
    Ok(bytes)
}

fn keyval_members(text: &str) -> Vec<(String, String)> {
    let elements = split(text).into_iter().enumerate();
    let element = |(at, (key, value)): (usize, (String, Option<String>))| match value {
        Some(value) => (key, value),
        // The kind may stand alone, at the start.
        None if at == 0 => ("qom-type".to_owned(), key),
        None => (key, "on".to_owned()),
    };
    elements.map(element).collect()
}

fn json_members(text: &str) -> Result<Vec<(String, String)>, Problem> {
    let value = serde_json::from_str(text).map_err(|error| Problem::new(format!("JSON parse error, {error}")))?;
    let Value::Object(members) = value else { return Err(Problem::new("JSON parse error, expecting an object")) };
    let member = |(key, value): (String, Value)| match value {
        Value::String(text) => (key, text),
        other => (key, other.to_string()),
    };
    Ok(members.into_iter().map(member).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects() {
        let add = |text: &str| match Objects::default().add(text) {
            Ok(()) => "fine".to_owned(),
            Err(Fail::Message(problem)) => problem.to_string(),
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!(add("secret,id=s,data=abc"), "fine");
        assert_eq!(add(r#"{"qom-type":"secret","id":"s","data":"x"}"#), "fine");
        assert_eq!(add("foo"), "Parameter 'qom-type' does not accept value 'foo'");
        assert_eq!(add("secret,data=abc"), "Parameter 'id' is missing");
        assert_eq!(add("secret,id=s"), "Either 'file' or 'data' must be provided");
        assert_eq!(add("secret,id=s,data=abc,foo=d"), "Parameter 'foo' is unexpected");
    }

    #[test]
    fn secrets() {
        let mut objects = Objects::default();
        let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        for text in [
            "secret,id=plain,data=abc",
            "secret,id=coded,data=YWJj,format=base64",
            &format!("secret,id=key,data={key},format=base64"),
            // printf hunter2 | openssl enc -aes-256-cbc -a -K 000102…1f -iv 00…0f
            "secret,id=closed,data=5Oc1d6/9hbpDg7sQDpNVfw==,format=base64,keyid=key,iv=AAECAwQFBgcICQoLDA0ODw==",
            "secret,id=no-iv,data=YWJj,keyid=key",
            "secret,id=loop,data=YWJj,keyid=loop,iv=AAECAwQFBgcICQoLDA0ODw==",
            "secret,id=file,file=/nonexistent/secret",
        ] {
            objects.add(text).unwrap_or_else(|_| panic!("{text}"));
        }
        let read = |id: &str| objects.passphrase(id).map(|bytes| bytes.to_vec()).map_err(|problem| problem.to_string());
        assert_eq!(read("plain").unwrap(), b"abc");
        assert_eq!(read("coded").unwrap(), b"abc");
        assert_eq!(read("no-iv").unwrap_err(), "IV is required to decrypt secret");
        assert_eq!(read("loop").unwrap_err(), "No secret with id 'loop'");
        assert_eq!(read("none").unwrap_err(), "No secret with id 'none'");
        assert!(read("file").unwrap_err().contains("No such file or directory"));
        assert!(!format!("{objects:?}").contains("abc"));
        assert_eq!(read("closed").unwrap(), b"hunter2");
    }
}
