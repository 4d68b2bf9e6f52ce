//! `--object`: secrets, checked as qemu-img checks them.

use std::fmt;
use std::io::Read;

use aes::Aes256;
use cipher::{BlockCipherDecrypt, KeyInit};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::problem::{Problem, os_text};
use crate::program::{Fail, print};

/// Kinds of objects that qemu-img offers, in the order of its list. All but secrets are taken without a look.
const KINDS: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret",
    "secret_keyring",
    "thread-context",
    "throttle-group",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];
/// Kinds that QEMU has and qemu-img has not.
const OTHER_KINDS: &[&str] = &["authz-pam", "iothread", "tls-cipher-suites"];

/// Properties of a secret.
const KNOWN: &[&str] = &["qom-type", "id", "data", "file", "format", "keyid", "iv"];

/// What is said of a kind's properties.
const SECRET_HELP: &str = "secret options:
  data=<string>
  file=<string>
  format=<QCryptoSecretFormat>
  iv=<string>
  keyid=<string>
";

/// The objects of a command line. Secrets are read when they are named, as by qemu-img, and cleared when they are dropped.
#[derive(Clone, Default)]
pub struct Objects {
    /// Names of all objects.
    ids: Vec<String>,
    secrets: Vec<Secret>,
}

impl fmt::Debug for Objects {
    /// Names only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.secrets.iter().map(|secret| &secret.id)).finish()
    }
}

#[derive(Clone)]
struct Secret {
    id: String,
    bytes: Zeroizing<Vec<u8>>,
}

/// A property of an object, which may be a secret.
type Member = (String, Zeroizing<String>);

/// Longest secret, bytes.
const MAX_SECRET: u64 = 1 << 20;

impl Objects {
    /// Takes one `--object` argument; `false`: it asked for help, which has been printed, and there is nothing else to do.
    ///
    /// # Errors
    /// The message.
    pub fn add(&mut self, text: &str) -> Result<bool, Fail> {
        let members = match text.starts_with('{') {
            true => json_members(text)?,
            false => match keyval_members(text)? {
                Some(members) => members,
                None => return help(text).map(|()| false),
            },
        };
        // Of what is named twice the last counts.
        let get = |wanted: &str| members.iter().rev().find(|(key, _)| key == wanted).map(|(_, value)| value.as_str());
        let missing = |key: &str| Problem::new(format!("Parameter '{key}' is missing"));
        let refused = |key: &str, word: &str| Problem::new(format!("Parameter '{key}' does not accept value '{word}'"));
        let kind = get("qom-type").ok_or_else(|| missing("qom-type"))?;
        if !KINDS.contains(&kind) && !OTHER_KINDS.contains(&kind) {
            return Err(refused("qom-type", kind).into());
        }
        let id = get("id").ok_or_else(|| missing("id"))?;
        let base64 = match get("format").filter(|_| kind == "secret") {
            None | Some("raw") => false,
            Some("base64") => true,
            Some(other) => return Err(refused("format", other).into()),
        };
        if let Some((key, _)) = members.iter().find(|(key, _)| kind == "secret" && !KNOWN.contains(&key.as_str())) {
            return Err(Problem::new(match key.split_once('.') {
                Some((key, _)) => format!("Parameters '{key}.*' are unexpected"),
                None => format!("Parameter '{key}' is unexpected"),
            })
            .into());
        }
        if OTHER_KINDS.contains(&kind) {
            return Err(Problem::new(format!("invalid object type: {kind}")).into());
        }
        if !is_identifier(id) {
            let hint = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";
            return Err(Problem::new("Parameter 'id' expects an identifier").with_hint(hint).into());
        }
        if self.ids.iter().any(|known| known == id) {
            let text = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Problem::new(text).into());
        }
        if kind == "secret" {
            keep_out_of_core_files();
            let bytes = self.read(&get, base64)?;
            self.secrets.push(Secret { id: id.to_owned(), bytes });
        }
        self.ids.push(id.to_owned());
        Ok(true)
    }

    /// The secret that these properties describe.
    fn read<'a>(&self, get: &impl Fn(&str) -> Option<&'a str>, base64: bool) -> Result<Zeroizing<Vec<u8>>, Problem> {
        let input = match (get("data"), get("file")) {
            (None, None) => return Err(Problem::new("Either 'file' or 'data' must be provided")),
            (Some(_), Some(_)) => return Err(Problem::new("'file' and 'data' are mutually exclusive")),
            (Some(data), None) => Zeroizing::new(data.as_bytes().to_vec()),
            (None, Some(file)) => read_secret_file(file)?,
        };
        match get("keyid") {
            Some(key) => decrypt(self.find(key)?, get("iv"), input, base64),
            None if base64 => decode_base64(&input),
            None => Ok(input),
        }
    }

    fn find(&self, id: &str) -> Result<&[u8], Problem> {
        let found = self.secrets.iter().find(|known| known.id == id);
        found.map(|secret| &secret.bytes[..]).ok_or_else(|| Problem::new(format!("No secret with id '{id}'")))
    }

    /// Is there a secret of that name?
    pub fn has_secret(&self, id: &str) -> bool {
        self.find(id).is_ok()
    }

    /// The passphrase that a secret holds.
    ///
    /// # Errors
    /// No such secret, or one that is no text.
    pub fn passphrase(&self, id: &str) -> Result<Zeroizing<Vec<u8>>, Problem> {
        let bytes = self.find(id)?;
        match str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(Zeroizing::new(bytes.to_vec())),
            _ => Err(Problem::new(format!("Data from secret {id} is not valid UTF-8"))),
        }
    }
}

fn is_identifier(id: &str) -> bool {
    let valid = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_');
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.bytes().all(valid)
}

fn help(text: &str) -> Result<(), Fail> {
    let kind = text.split(',').next().unwrap_or_default();
    match kind {
        "secret" => print(SECRET_HELP),
        "help" | "?" => {
            let names: String = KINDS.iter().map(|kind| format!("  {kind}\n")).collect();
            print(&format!("List of user creatable objects:\n{names}"))
        }
        _ if KINDS.contains(&kind) => print(&format!("There are no options for {kind}.\n")),
        _ => Err(Problem::new(format!("invalid object type: {kind}")).into()),
    }
}

/// Reads a file that holds a secret.
///
/// # Errors
/// The message of the system's refusal.
pub fn read_secret_file(name: &str) -> Result<Zeroizing<Vec<u8>>, Problem> {
    keep_out_of_core_files();
    let failed = |what: &str, error: std::io::Error| {
        let text = os_text(error.raw_os_error().unwrap_or_default());
        Problem::new(format!("Unable to read {name}: {what} file “{name}”: {text}"))
    };
    let file = std::fs::File::open(name).map_err(|error| failed("Failed to open", error))?;
    // As long as it may be, so that no part is left behind by growing.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SECRET as usize + 1));
    file.take(MAX_SECRET + 1).read_to_end(&mut bytes).map_err(|error| failed("Error reading", error))?;
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

/// Base64 as QEMU reads it: a last group that is not complete is left out.
fn decode_base64(input: &[u8]) -> Result<Zeroizing<Vec<u8>>, Problem> {
    let valid = |c: &u8| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'/' | b'=' | b'\n');
    if !input.iter().all(valid) {
        return Err(Problem::new("Base64 data contains invalid characters"));
    }
    let digits: Zeroizing<Vec<u8>> = Zeroizing::new(input.iter().copied().filter(|c| *c != b'\n').collect());
    let mut bytes = Zeroizing::new(Vec::with_capacity(digits.len()));
    for group in digits.as_chunks::<4>().0 {
        let word = group.iter().fold(0_u32, |word, digit| word << 6 | value(*digit));
        let [_, first, second, third] = word.to_be_bytes();
        bytes.push(first);
        bytes.extend(Some(second).filter(|_| group[2] != b'='));
        bytes.extend(Some(third).filter(|_| group[3] != b'='));
    }
    Ok(bytes)
}

/// What a digit of Base64 stands for.
fn value(digit: u8) -> u32 {
    u32::from(match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => 0,
    })
}

/// AES-256 in CBC mode, with PKCS #7 padding.
fn decrypt(
    key: &[u8],
    iv: Option<&str>,
    stored: Zeroizing<Vec<u8>>,
    base64: bool,
) -> Result<Zeroizing<Vec<u8>>, Problem> {
    let key: &[u8; 32] = key.try_into().map_err(|_| Problem::new("Key should be 32 bytes in length"))?;
    let iv = decode_base64(iv.ok_or_else(|| Problem::new("IV is required to decrypt secret"))?.as_bytes())?;
    let wrong = || Problem::new(format!("IV should be 16 bytes in length not {}", iv.len()));
    let mut before: [u8; 16] = iv.as_slice().try_into().map_err(|_| wrong())?;
    let mut bytes = if base64 { decode_base64(&stored)? } else { stored };
    let cipher = Aes256::new(&(*key).into());
    let len = bytes.len();
    let (blocks, rest) = bytes.as_chunks_mut::<16>();
    if !rest.is_empty() {
        return Err(Problem::new(format!("Length {len} must be a multiple of block size 16")));
    }
    for block in blocks {
        let stored = *block;
        let mut plain = stored.into();
        cipher.decrypt_block(&mut plain);
        block.iter_mut().zip(plain).zip(before).for_each(|((out, plain), before)| *out = plain ^ before);
        before = stored;
    }
    let padding = usize::from(bytes.last().copied().unwrap_or_default());
    if padding > 16 || padding > len {
        let text = format!("Incorrect number of padding bytes ({padding}) found on decrypted data");
        return Err(Problem::new(text));
    }
    bytes.truncate(len - padding);
    Ok(bytes)
}

/// Takes `KEY=VALUE,…` apart; `None`: there is a wish for help among them.
fn keyval_members(text: &str) -> Result<Option<Vec<Member>>, Problem> {
    let mut members = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        // A doubled comma is one of the value.
        let mut element = Zeroizing::new(String::with_capacity(rest.len()));
        let mut chars = rest.char_indices().peekable();
        let mut end = rest.len();
        while let Some((at, c)) = chars.next() {
            if c == ',' && chars.next_if(|(_, next)| *next == ',').is_none() {
                end = at + 1;
                break;
            }
            element.push(c);
        }
        rest = &rest[end..];
        let (key, value) = match element.split_once('=') {
            Some((key, value)) => (key, value),
            None if matches!(element.as_str(), "help" | "?") => return Ok(None),
            // The kind may stand alone, at the start.
            None if members.is_empty() && !element.is_empty() => ("qom-type", element.as_str()),
            None if element.is_empty() => return Err(Problem::new("Invalid parameter ''")),
            None => return Err(Problem::new(format!("Expected '=' after parameter '{}'", element.as_str()))),
        };
        if !key.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(Problem::new(format!("Invalid parameter '{key}'")));
        }
        members.push((key.to_owned(), Zeroizing::new(value.to_owned())));
    }
    Ok(Some(members))
}

/// The members of an object in JSON, in their order.
struct Members(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members: Vec<(String, Value)> = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if members.iter().any(|(known, _)| *known == key) {
                        return Err(serde::de::Error::custom("duplicate key"));
                    }
                    members.push((key, value));
                }
                Ok(Members(members))
            }
        }
        source.deserialize_map(Visit)
    }
}

fn json_members(text: &str) -> Result<Vec<Member>, Problem> {
    let bad = |error: serde_json::Error| {
        let words = error.to_string();
        // Without the place: the argument may hold a secret, and qemu-img tells no place either.
        let reason = words.split(" at line ").next().unwrap_or_default();
        Problem::new(match reason {
            "trailing characters" => "Expecting at most one JSON value".to_owned(),
            _ if error.is_eof() => "JSON parse error, premature EOI".to_owned(),
            _ => format!("JSON parse error, {reason}"),
        })
    };
    let Members(members) = serde_json::from_str(text).map_err(bad)?;
    let member = |(key, value): (String, Value)| match value {
        Value::String(text) => Ok((key, Zeroizing::new(text))),
        _ if KNOWN.contains(&key.as_str()) => {
            Err(Problem::new(format!("Invalid parameter type for '{key}', expected: string")))
        }
        other => Ok((key, Zeroizing::new(other.to_string()))),
    };
    members.into_iter().map(member).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(objects: &mut Objects, text: &str) -> String {
        match objects.add(text) {
            Ok(_) => "fine".to_owned(),
            Err(Fail::Message(problem)) => problem.to_string(),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn objects() {
        for (text, want) in [
            ("secret,id=s,data=abc", "fine"),
            ("secret,id=s,data=abc,", "fine"),
            ("id=s,qom-type=secret,data=x,data=y", "fine"),
            (r#"{"qom-type":"secret","id":"s","data":"x"}"#, "fine"),
            ("foo", "Parameter 'qom-type' does not accept value 'foo'"),
            ("", "Parameter 'qom-type' is missing"),
            ("secret,data=abc", "Parameter 'id' is missing"),
            ("secret,id=s", "Either 'file' or 'data' must be provided"),
            ("secret,id=s,data=abc,file=x", "'file' and 'data' are mutually exclusive"),
            ("secret,id=s,data=abc,foo=d", "Parameter 'foo' is unexpected"),
            ("secret,id=s,data.a=abc", "Parameters 'data.*' are unexpected"),
            ("secret,id=s,data", "Expected '=' after parameter 'data'"),
            ("secret,id=s,data=x,format=z", "Parameter 'format' does not accept value 'z'"),
            ("secret,id=s,=x", "Invalid parameter ''"),
            ("iothread,id=s", "invalid object type: iothread"),
            (r#"{"qom-type":"secret""#, "JSON parse error, premature EOI"),
            (r#"{"qom-type":"secret","id":"s","data":"x"} {}"#, "Expecting at most one JSON value"),
            (r#"{"qom-type":"secret","id":"s","data":"x","id":"t"}"#, "JSON parse error, duplicate key"),
            (r#"{"qom-type":"secret","id":"s","data":5}"#, "Invalid parameter type for 'data', expected: string"),
        ] {
            assert_eq!(add(&mut Objects::default(), text), want, "{text}");
        }
        for id in ["9x", "", "a b", "ä"] {
            let text = add(&mut Objects::default(), &format!("secret,id={id},data=x"));
            assert!(text.starts_with("Parameter 'id' expects an identifier"), "{text}");
        }
        let mut objects = Objects::default();
        assert_eq!(add(&mut objects, "secret,id=s,data=abc"), "fine");
        let again = "attempt to add duplicate property 's' to object (type 'container')";
        assert_eq!(add(&mut objects, "secret,id=s,data=abc"), again);
    }

    #[test]
    fn secrets() {
        let mut objects = Objects::default();
        let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        let iv = "AAECAwQFBgcICQoLDA0ODw==";
        for (text, want) in [
            ("secret,id=plain,data=a,,bc", "fine"),
            ("secret,id=coded,data=YWJj,format=base64", "fine"),
            ("secret,id=cut,data=YWJjYWJ,format=base64", "fine"),
            ("secret,id=odd,data=YW!J,format=base64", "Base64 data contains invalid characters"),
            ("secret,id=binary,data=/w==,format=base64", "fine"),
            ("secret,id=nul,data=AA==,format=base64", "fine"),
            (&format!("secret,id=key,data={key},format=base64"), "fine"),
            // printf hunter2 | openssl enc -aes-256-cbc -a -K 000102…1f -iv 00…0f
            (&format!("secret,id=closed,data=5Oc1d6/9hbpDg7sQDpNVfw==,format=base64,keyid=key,iv={iv}"), "fine"),
            ("secret,id=x,data=YWJj,keyid=key", "IV is required to decrypt secret"),
            ("secret,id=x,data=YWJj,keyid=plain,iv=AAAA", "Key should be 32 bytes in length"),
            ("secret,id=x,data=YWJj,keyid=key,iv=AAAA", "IV should be 16 bytes in length not 3"),
            (&format!("secret,id=x,data=YWJj,keyid=key,iv={iv}"), "Length 4 must be a multiple of block size 16"),
            // A secret can't be encrypted by itself, nor by one that comes later.
            (&format!("secret,id=x,data=YWJj,keyid=x,iv={iv}"), "No secret with id 'x'"),
        ] {
            assert_eq!(add(&mut objects, text), want, "{text}");
        }
        let read = |id: &str| objects.passphrase(id).map(|bytes| bytes.to_vec()).map_err(|problem| problem.to_string());
        assert_eq!(read("plain").unwrap(), b"a,bc");
        assert_eq!(read("coded").unwrap(), b"abc");
        assert_eq!(read("cut").unwrap(), b"abc");
        assert_eq!(read("closed").unwrap(), b"hunter2");
        assert_eq!(read("binary").unwrap_err(), "Data from secret binary is not valid UTF-8");
        assert_eq!(read("nul").unwrap_err(), "Data from secret nul is not valid UTF-8");
        assert_eq!(read("none").unwrap_err(), "No secret with id 'none'");
        assert!(!format!("{objects:?}").contains("abc"));
        let text = add(&mut Objects::default(), "secret,id=file,file=/nonexistent/secret");
        assert!(text.ends_with("“/nonexistent/secret”: No such file or directory"), "{text}");
        let text = add(&mut Objects::default(), "secret,id=file,file=/");
        assert!(text.ends_with("Error reading file “/”: Is a directory"), "{text}");
    }
}
