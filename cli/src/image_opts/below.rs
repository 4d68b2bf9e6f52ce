//! What the operator says of the image below another: `backing` and `backing.*`.

use instar_guest_protocol::message::Format;
use serde_json::Value;

use super::{ImageSpec, Setting, no_node, wanted_name};
use crate::formats;
use crate::open::join_name;
use crate::problem::Problem;
use crate::program;
use crate::qdict::bucket;

/// What is said of the image below another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Below {
    /// Nothing: it is the one that the image records, if any.
    #[default]
    Recorded,
    /// There is none.
    Hidden {
        /// Said by an empty name, which QEMU warns of.
        by_empty_name: bool,
        /// An option that is of no use then.
        unused: Option<String>,
    },
    /// How it is opened, and perhaps which one it is.
    Given(Given),
}

/// Options of an image below another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// Without `backing.` before them.
    settings: Vec<Setting>,
    /// `backing=NAME`: there are no nodes that could be meant.
    node: Option<String>,
}

impl Below {
    /// Takes what is said of the image below out of the options of an image.
    pub(super) fn split(settings: Vec<Setting>) -> (Vec<Setting>, Self) {
        let (mut own, mut below, mut said) = (Vec::new(), Vec::new(), None);
        for setting in settings {
            match setting.key.strip_prefix("backing") {
                // A number, a truth value or something empty is no way to say it.
                Some("") if setting.bare && setting.value != "null" => own.push(setting),
                Some("") => said = Some(setting),
                Some(rest) if rest.starts_with('.') => {
                    below.push(Setting { key: rest[1..].to_owned(), ..setting });
                }
                _ => own.push(setting),
            }
        }
        let hides = said.as_ref().is_some_and(|said| said.bare || said.value.is_empty());
        let given = Given { node: said.as_ref().map(|said| said.value.clone()).filter(|_| !hides), settings: below };
        match said {
            Some(said) if hides => (own, Self::Hidden { by_empty_name: !said.bare, unused: given.first_key() }),
            None if given.settings.is_empty() => (own, Self::Recorded),
            _ => (own, Self::Given(given)),
        }
    }

    /// Warns of what is said in an odd way; to be done when the image of `format`, which is over it, is opened.
    ///
    /// # Errors
    /// The message, without `Could not open 'F'` around it.
    pub fn heed(&self, format: Format) -> Result<(), Problem> {
        let Self::Hidden { by_empty_name, unused } = self else { return Ok(()) };
        if *by_empty_name {
            program::warn("Use of \"backing\": \"\" is deprecated; use \"backing\": null instead");
        }
        unused.as_ref().map_or(Ok(()), |key| Err(unknown(format, key)))
    }

    /// Is something said of the image below beside keys?
    pub fn says_more_than_keys(&self) -> bool {
        matches!(self, Self::Given(given) if !given.is_about_keys())
    }

    /// For what looks at an image alone: nothing may be said of another, but keys that nobody needs.
    ///
    /// # Errors
    /// The message, without `Could not open 'F'` around it.
    pub fn check_unused(&self, format: Format) -> Result<(), Problem> {
        match self {
            Self::Given(given) if self.says_more_than_keys() => {
                given.first_key().map_or(Ok(()), |key| Err(unknown(format, &key)))
            }
            _ => Ok(()),
        }
    }
}

fn unknown(format: Format, key: &str) -> Problem {
    Problem::new(match format {
        Format::File => format!("Block protocol 'file' doesn't support the option '{key}'"),
        Format::Unknown => return unknown(Format::Raw, key),
        _ => format!("Block format '{}' does not support the option '{key}'", formats::name(format)),
    })
}

impl Given {
    /// It is said which image it is.
    pub fn is_named(&self) -> bool {
        self.node.is_some() || self.settings.iter().any(|setting| setting.key == "file.filename")
    }

    /// Nothing is said but which secrets open encrypted images.
    fn is_about_keys(&self) -> bool {
        let about_keys = |setting: &Setting| {
            let last = setting.key.rsplit("backing.").next();
            matches!(last, Some("encrypt.key-secret" | "key-secret" | "encrypt.format"))
        };
        self.node.is_none() && self.settings.iter().all(about_keys)
    }

    /// The image by what is said alone; `recorded`: its format, if nothing is said of that.
    ///
    /// # Errors
    /// The message, without the image above around it.
    pub fn alone(&self, recorded: Format) -> Result<ImageSpec, Problem> {
        match &self.node {
            Some(name) if self.settings.is_empty() => Err(no_node(name)),
            Some(_) => {
                Err(Problem::new("Cannot reference an existing block device with additional options or a new filename"))
            }
            None => {
                let name = self.settings.iter().find(|setting| setting.key.ends_with("filename"));
                ImageSpec::of_settings(name.map_or("", |name| &name.value), self.settings(recorded))
            }
        }
    }

    fn settings(&self, recorded: Format) -> Vec<Setting> {
        let mut settings = self.settings.clone();
        if recorded != Format::Unknown && settings.iter().all(|setting| setting.key != "driver") {
            settings.push(Setting::new("driver", formats::name(recorded)));
        }
        settings
    }

    /// The image in the file that the image above records, and in the format, if nothing is said of that.
    ///
    /// # Errors
    /// As [`alone`](Self::alone).
    pub fn over(&self, name: &str, recorded: Format) -> Result<ImageSpec, Problem> {
        let mut settings = self.settings(recorded);
        // The name is for the node at the bottom.
        let mut prefix = String::new();
        let key = loop {
            let of = |key: &str| settings.iter().rev().find(|setting| setting.key == format!("{prefix}{key}"));
            match of("driver").map(|driver| driver.value.as_str()) {
                Some(driver) if Format::of_driver(driver.as_bytes()) == Some(Format::File) => {}
                Some(driver) if let Some(problem) = wanted_name(driver) => {
                    let address = settings.iter().filter_map(|setting| setting.key.strip_prefix(&prefix));
                    let address =
                        address.filter(|key| driver == "nbd" && is_address(key)).min_by_key(|key| bucket(key));
                    return Err(Problem::new(match address {
                        Some(key) => format!("Option '{key}' cannot be used with a file name"),
                        None => problem,
                    }));
                }
                None if !prefix.is_empty() => {}
                _ => {
                    prefix.push_str("file.");
                    continue;
                }
            }
            if of("filename").is_some() {
                return Err(Problem::new("Can't specify 'file' and 'filename' options at the same time"));
            }
            break format!("{prefix}filename");
        };
        settings.push(Setting::new(key, name));
        ImageSpec::of_settings(name, settings)
    }

    /// The image, as far as it can be told before the image above was looked at.
    pub fn likely(&self) -> Option<ImageSpec> {
        match self.is_named() {
            true => self.alone(Format::Unknown).ok(),
            false => {
                let over = self.over("recorded", Format::Unknown);
                over.or_else(|_| self.alone(Format::Unknown)).ok()
            }
        }
    }

    /// The option that QEMU comes upon first.
    fn first_key(&self) -> Option<String> {
        if self.node.is_some() && self.settings.is_empty() {
            return Some("backing".to_owned());
        }
        let keys = self.settings.iter().map(|setting| format!("backing.{}", setting.key));
        keys.chain(self.node.iter().map(|_| "backing".to_owned())).min_by_key(|key| bucket(key))
    }
}

impl ImageSpec {
    /// QEMU's name for the image if what lies below it is not what it records; `recorded` is that as far as it is known.
    pub fn shown_over(&self, recorded: Option<&str>) -> Option<String> {
        let below = match &self.below {
            Below::Recorded => return None,
            Below::Hidden { .. } => "null".to_owned(),
            Below::Given(given) => {
                let spec = match recorded {
                    Some(recorded) if !given.is_named() => {
                        given.over(&join_name(&self.file, recorded), Format::Unknown)
                    }
                    _ => given.alone(Format::Unknown),
                };
                let spec = spec.ok().filter(|spec| recorded != Some(spec.shown_as(spec.format).as_str()))?;
                spec.json()
            }
        };
        // It comes before the others.
        Some(format!("json:{{\"backing\": {below}, {}", &self.json()[1..]))
    }

    /// The image in JSON.
    fn json(&self) -> String {
        let shown = self.shown_as(self.format);
        match shown.strip_prefix("json:") {
            Some(json) => json.to_owned(),
            None => format!(
                "{{\"driver\": \"{}\", \"file\": {{\"driver\": \"file\", \"filename\": {}}}}}",
                formats::name(self.format),
                Value::from(shown),
            ),
        }
    }
}

/// An option of an NBD export that says where it is.
fn is_address(key: &str) -> bool {
    ["host", "port", "path", "export", "tls-creds"].contains(&key) || key.starts_with("server.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn below(text: &str) -> Below {
        ImageSpec::of_opts(&format!("driver=qcow2,file.filename=t,{text}")).unwrap().below
    }

    fn given(text: &str) -> Given {
        match below(text) {
            Below::Given(given) => given,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn none_below() {
        let json =
            |value: &str| ImageSpec::of_file(&format!("json:{{\"file.filename\":\"t\",\"backing\":{value}}}"), None);
        assert_eq!(json("null").unwrap().below, Below::Hidden { by_empty_name: false, unused: None });
        assert_eq!(json("\"\"").unwrap().below, Below::Hidden { by_empty_name: true, unused: None });
        assert_eq!(below("backing="), Below::Hidden { by_empty_name: true, unused: None });
        assert_eq!(below("read-only=on"), Below::Recorded);
        for wrong in ["5", "true", "{}", "[]"] {
            assert!(json(wrong).unwrap_err().to_string().ends_with("does not support the option 'backing'"), "{wrong}");
        }
        let both = below("backing=,backing.driver=raw").heed(Format::Qcow2).unwrap_err();
        assert_eq!(both.to_string(), "Block format 'qcow2' does not support the option 'backing.driver'");
    }

    #[test]
    fn named() {
        let given = given("backing.driver=raw,backing.file.filename=b,backing.offset=512,backing.backing=");
        assert!(given.is_named());
        let spec = given.alone(Format::Unknown).unwrap();
        assert_eq!((spec.file.as_str(), spec.format, spec.slice.offset), ("b", Format::Raw, 512));
        assert_eq!(spec.below, Below::Hidden { by_empty_name: true, unused: None });
        assert_eq!(given.likely(), Some(spec));
    }

    #[test]
    fn recorded_but_otherwise() {
        let driver = given("backing.driver=vmdk");
        assert!(!driver.is_named());
        assert_eq!(driver.over("r", Format::Unknown).unwrap().format, Format::Vmdk);
        assert_eq!(
            driver.alone(Format::Unknown).unwrap_err().to_string(),
            "A block device must be specified for \"file\""
        );
        let part = given("backing.driver=raw,backing.file.driver=raw,backing.file.offset=1k")
            .over("r", Format::Unknown)
            .unwrap();
        assert_eq!((part.file.as_str(), part.layers[0].slice.offset), ("r", 1024));
        let null = given("backing.file.driver=null-co");
        assert_eq!(
            null.over("r", Format::Unknown).unwrap_err().to_string(),
            "The only allowed filename for this driver is 'null-co://'"
        );
        assert!(null.alone(Format::Unknown).unwrap().null.is_some());
        for twice in ["backing.driver=file,backing.filename=x", "backing.file.driver=raw,backing.file.file.filename=x"]
        {
            let problem = given(twice).over("r", Format::Unknown).unwrap_err().to_string();
            assert_eq!(problem, "Can't specify 'file' and 'filename' options at the same time");
        }
    }

    #[test]
    fn nodes() {
        let node = given("backing=x");
        assert!(node.is_named());
        assert_eq!(node.alone(Format::Unknown).unwrap_err().to_string(), "Cannot find device='x' nor node-name='x'");
        let more = given("backing=x,backing.driver=raw").alone(Format::Unknown).unwrap_err();
        assert!(more.to_string().starts_with("Cannot reference an existing block device"));
    }

    #[test]
    fn keys_alone() {
        let keys = below("backing.encrypt.key-secret=b,backing.backing.key-secret=c");
        keys.check_unused(Format::Qcow2).unwrap();
        let Below::Given(given) = keys else { panic!() };
        let (first, Below::Given(second)) =
            (given.over("b", Format::Unknown).unwrap(), given.over("b", Format::Unknown).unwrap().below)
        else {
            panic!()
        };
        assert_eq!(first.key_secret.as_deref(), Some("b"));
        assert_eq!(second.over("c", Format::Unknown).unwrap().key_secret.as_deref(), Some("c"));
    }

    #[test]
    fn the_first_option_is_the_one_that_is_blamed() {
        let named = below("backing.file.filename=b,backing.driver=raw");
        assert_eq!(
            named.check_unused(Format::Qcow2).unwrap_err().to_string(),
            "Block format 'qcow2' does not support the option 'backing.driver'"
        );
        assert_eq!(["driver", "file", "backing"].map(bucket), [239, 463, 198]);
    }
}
