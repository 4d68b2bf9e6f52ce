//! `--object`: secrets, checked as qemu-img checks them.

use serde_json::Value;

use crate::options::split;
use crate::problem::Problem;
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

/// The objects of a command line.
#[derive(Debug, Default)]
pub struct Objects {
    secrets: Vec<String>,
}

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
            match (get("data"), get("file")) {
                (None, None) => return Err("Either 'file' or 'data' must be provided".into()),
                (Some(_), Some(_)) => return Err("'file' and 'data' are mutually exclusive".into()),
                _ => self.secrets.push(id.to_owned()),
            }
        }
        Ok(())
    }

    /// Is there a secret of that name?
    pub fn has_secret(&self, id: &str) -> bool {
        self.secrets.iter().any(|known| known == id)
    }
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
}
