//! `-o` lists: how options are parsed, printed and explained.

use instar_guest_protocol::message::Format;

use crate::creation::Creatable;
use crate::problem::Problem;
use crate::size::{self, SizeError};

/// The kind of value that an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Switch,
    /// Bytes, with a suffix.
    Size,
    /// A plain number.
    Number,
}

/// An option of a format.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    name: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    help: &'static str,
}

/// An option: its name, what it takes, the default that the `Formatting` line shows, the help text.
pub const fn spec(name: &'static str, kind: Kind, default: Option<&'static str>, help: &'static str) -> Spec {
    Spec { name, kind, default, help }
}

/// The file below; a format's own option of the same name goes before.
const FILE: &[Spec] = &[
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec("nocow", Kind::Switch, None, "Turn off copy-on-write (valid only on btrfs)"),
    spec("preallocation", Kind::Text, None, "Preallocation mode (allowed values: off, falloc, full)"),
    spec("extent_size_hint", Kind::Size, None, "Extent size hint for the image file, 0 to disable"),
];

/// The options of a format, then those of the file below it.
fn all(format: Creatable) -> impl Iterator<Item = &'static Spec> {
    let own = format.options;
    own.iter().chain(FILE.iter().filter(|below| own.iter().all(|spec| spec.name != below.name)))
}

/// One or several `-o` arguments, not yet looked into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OptionList {
    text: Option<String>,
}

impl OptionList {
    /// Adds another `-o`.
    ///
    /// # Errors
    /// The message: an empty list, or a comma at either end.
    pub fn add(&mut self, list: &str) -> Result<(), String> {
        let trailing = list.len() - list.trim_end_matches(',').len();
        if list.is_empty() || (list.starts_with(',') && !list.starts_with(",,")) || trailing % 2 == 1 {
            return Err(format!("Invalid option list: {list}"));
        }
        self.text = Some(match self.text.take() {
            Some(before) => format!("{before},{list}"),
            None => list.to_owned(),
        });
        Ok(())
    }

    /// Was there none?
    pub fn is_empty(&self) -> bool {
        self.text.is_none()
    }

    /// Does it ask for help?
    pub fn wants_help(&self) -> bool {
        self.elements().any(|(key, value)| value.is_none() && (key == "help" || key == "?"))
    }

    fn elements(&self) -> impl Iterator<Item = (String, Option<String>)> {
        split(self.text.as_deref().unwrap_or_default()).into_iter()
    }
}

/// Splits `a=b,c=d,e` into keys and values; a doubled comma stands for one.
pub fn split(list: &str) -> Vec<(String, Option<String>)> {
    let mut elements = Vec::new();
    let mut current = String::new();
    let mut chars = list.chars().peekable();
    let mut push = |element: String| {
        elements.push(match element.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (element, None),
        });
    };
    if list.is_empty() {
        return elements;
    }
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.next_if_eq(&',').is_some() => current.push(','),
            ',' => push(std::mem::take(&mut current)),
            c => current.push(c),
        }
    }
    push(current);
    elements
}

/// Parsed creation options.
#[derive(Clone, Debug)]
pub struct Options {
    format: Creatable,
    values: Vec<(&'static Spec, Value)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Text(String),
    /// The word that was given, and its meaning.
    Switch(String, bool),
    Size(u64),
    Number(String, u64),
}

impl Options {
    /// Parses a list for a format; later values win.
    ///
    /// # Errors
    /// The message of the first bad element.
    pub fn parse(format: Creatable, list: &OptionList) -> Result<Self, Problem> {
        Self::parse_by(format, list, &|key| all(format).find(|spec| spec.name == key))
    }

    /// Parses a list of changes to an image of a format, of which only those of `specs` can be made.
    ///
    /// # Errors
    /// The message of the first bad element.
    pub fn parse_changes(format: Creatable, specs: &'static [Spec], list: &OptionList) -> Result<Self, Problem> {
        Self::parse_by(format, list, &|key| specs.iter().find(|spec| spec.name == key))
    }

    fn parse_by(
        format: Creatable,
        list: &OptionList,
        find: &dyn Fn(&str) -> Option<&'static Spec>,
    ) -> Result<Self, Problem> {
        let mut options = Self { format, values: Vec::new() };
        for (key, value) in list.elements() {
            let (key, value) = match (value, key.strip_prefix("no")) {
                (Some(value), _) => (key.as_str(), value),
                (None, Some(positive)) => (positive, "off".to_owned()),
                (None, None) => (key.as_str(), "on".to_owned()),
            };
            let Some(spec) = find(key) else {
                let problem = Problem::new(format!("Invalid parameter '{key}'"));
                return Err(match format.options.iter().any(|spec| spec.name == key) {
                    true => problem.with_hint("This option is only supported for image creation"),
                    false => problem,
                });
            };
            options.set(spec, parse_value(spec, value)?);
        }
        Ok(options)
    }

    fn set(&mut self, spec: &'static Spec, value: Value) {
        self.values.retain(|(known, _)| known.name != spec.name);
        self.values.push((spec, value));
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.values.iter().find(|(spec, _)| spec.name == name).map(|(_, value)| value)
    }

    /// Sets a text option of the format, if the format has it.
    pub fn set_text(&mut self, name: &str, text: &str) -> bool {
        let spec = all(self.format).find(|spec| spec.name == name);
        if let Some(spec) = spec {
            self.set(spec, Value::Text(text.to_owned()));
        }
        spec.is_some()
    }

    /// Sets the size.
    pub fn set_size(&mut self, size: u64) {
        if let Some(spec) = all(self.format).find(|spec| spec.name == "size") {
            self.set(spec, Value::Size(size));
        }
    }

    /// A text option that was given.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A switch that was given.
    pub fn switch(&self, name: &str) -> Option<bool> {
        match self.get(name)? {
            Value::Switch(_, on) => Some(*on),
            _ => None,
        }
    }

    /// A size or number that was given.
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.get(name)? {
            Value::Size(number) | Value::Number(_, number) => Some(*number),
            _ => None,
        }
    }

    /// Was any option with this prefix given?
    pub fn any_with_prefix(&self, prefix: &str) -> bool {
        self.values.iter().any(|(spec, _)| spec.name.starts_with(prefix))
    }

    /// `Formatting 'F', fmt=qcow2 …`, with a line feed.
    pub fn formatting_line(&self, file: &str) -> String {
        let mut line = format!("Formatting '{file}', fmt={}", self.format.name());
        for spec in all(self.format) {
            let shown = match (self.get(spec.name), spec.default) {
                (Some(Value::Text(text)), _) => text.replace(',', ",,"),
                (Some(Value::Switch(word, _) | Value::Number(word, _)), _) => word.clone(),
                // Sizes are shown signed, as qemu-img does.
                (Some(Value::Size(size)), _) => size.cast_signed().to_string(),
                (None, Some(default)) => default.to_owned(),
                (None, None) => continue,
            };
            line.push_str(&format!(" {}={shown}", spec.name));
        }
        line.push('\n');
        line
    }
}

fn parse_value(spec: &Spec, text: String) -> Result<Value, Problem> {
    let name = spec.name;
    match spec.kind {
        Kind::Text => Ok(Value::Text(text)),
        Kind::Switch => match text.as_str() {
            "on" | "yes" | "true" | "y" => Ok(Value::Switch(text, true)),
            "off" | "no" | "false" | "n" => Ok(Value::Switch(text, false)),
            _ => Err(Problem::new(format!("Parameter '{name}' expects 'on' or 'off'"))),
        },
        Kind::Size => parse_size(name, &text).map(Value::Size),
        Kind::Number => match parse_number(&text) {
            Some(Some(number)) => Ok(Value::Number(text, number)),
            Some(None) => Err(Problem::new(format!("Value '{text}' is too large for parameter '{name}'"))),
            None => Err(Problem::new(format!("Parameter '{name}' expects a number"))),
        },
    }
}

/// The value of a size parameter.
///
/// # Errors
/// The message.
pub fn parse_size(name: &str, text: &str) -> Result<u64, Problem> {
    match size::parse(text) {
        Ok(size) => Ok(size),
        Err(SizeError::OutOfRange) => {
            Err(Problem::new(format!("Value '{text}' is out of range for parameter '{name}'")))
        }
        Err(SizeError::Malformed) => Err(Problem::new(format!(
            "Parameter '{name}' expects a non-negative number below 2^64"
        ))
        .with_hint(
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
        )),
    }
}

/// A number as `strtoull` takes it (a minus wraps around); `Some(None)` if it's too large.
fn parse_number(text: &str) -> Option<Option<u64>> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (digits, radix) = match digits.strip_prefix("0x") {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    let number = u64::from_str_radix(digits, radix).ok();
    Some(number.map(|number| if negative { number.wrapping_neg() } else { number }))
}

/// `create -f FMT -o help`; with a file name, the options of the file are merged in.
pub fn help(format: Creatable, with_file: bool) -> String {
    let mut specs: Vec<&Spec> = match with_file {
        true => all(format).collect(),
        false => format.options.iter().collect(),
    };
    if with_file && format.format == Format::Raw {
        specs.retain(|spec| spec.name != "size");
        specs.push(&FILE[0]);
    }
    let mut text = match with_file {
        true => "Supported options:\n".to_owned(),
        false => format!("Supported {} options:\n", format.name()),
    };
    text.push_str(&lines(&specs));
    if !with_file {
        text.push_str(
            "\nThe protocol level may support further options.\nSpecify the target filename to include those options.\n",
        );
    }
    text
}

/// `amend -f FMT -o help`.
pub fn help_on_changes(format: &str, specs: &[Spec]) -> String {
    format!("Amend options for '{format}':\n{}", lines(&specs.iter().collect::<Vec<&Spec>>()))
}

/// A line for each option, by name.
fn lines(specs: &[&Spec]) -> String {
    let mut specs = specs.to_vec();
    specs.sort_by_key(|spec| spec.name);
    let mut text = String::new();
    for spec in specs {
        let kind = match spec.kind {
            Kind::Text => "str",
            Kind::Switch => "bool (on/off)",
            Kind::Size => "size",
            Kind::Number => "num",
        };
        let left = format!("  {}=<{kind}>", spec.name);
        text.push_str(&format!("{left:<24} - {}\n", spec.help));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::creation::{qcow2, raw};

    fn list(text: &str) -> OptionList {
        let mut list = OptionList::default();
        list.add(text).unwrap();
        list
    }

    fn error(format: Creatable, text: &str) -> String {
        Options::parse(format, &list(text)).unwrap_err().to_string()
    }

    #[test]
    fn elements() {
        assert_eq!(
            split("a=b,,c,d,e="),
            [("a".to_owned(), Some("b,c".to_owned())), ("d".to_owned(), None), ("e".to_owned(), Some(String::new()))]
        );
    }

    #[test]
    fn lists_are_joined() {
        let mut twice = list("size=1M,cluster_size=1k");
        twice.add("cluster_size=2k").unwrap();
        let options = Options::parse(&qcow2::QCOW2, &twice).unwrap();
        assert_eq!(options.number("cluster_size"), Some(2048));
        for bad in ["", ",", "a,", ",a"] {
            assert_eq!(OptionList::default().add(bad).unwrap_err(), format!("Invalid option list: {bad}"));
        }
        assert!(list("x=1,help").wants_help() && list("?").wants_help() && !list("help=1").wants_help());
    }

    #[test]
    fn messages() {
        assert_eq!(error(&qcow2::QCOW2, "nosuch=1"), "Invalid parameter 'nosuch'");
        assert_eq!(error(&raw::RAW, "cluster_size=3"), "Invalid parameter 'cluster_size'");
        assert_eq!(error(&qcow2::QCOW2, "lazy_refcounts=maybe"), "Parameter 'lazy_refcounts' expects 'on' or 'off'");
        assert_eq!(error(&qcow2::QCOW2, "refcount_bits=4k"), "Parameter 'refcount_bits' expects a number");
        assert_eq!(
            error(&qcow2::QCOW2, "refcount_bits=99999999999999999999"),
            "Value '99999999999999999999' is too large for parameter 'refcount_bits'"
        );
        assert_eq!(error(&qcow2::QCOW2, "cluster_size=-5"), "Value '-5' is out of range for parameter 'cluster_size'");
        assert!(error(&raw::RAW, "size=10Mx").starts_with(
            "Parameter 'size' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means"
        ));
    }

    #[test]
    fn formatting() {
        let mut options =
            Options::parse(&qcow2::QCOW2, &list("compat=v3,lazy_refcounts=yes,backing_file=a,,b")).unwrap();
        options.set_size(1 << 20);
        assert_eq!(
            options.formatting_line("n.q"),
            "Formatting 'n.q', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1048576 compat=v3 \
             backing_file=a,,b lazy_refcounts=yes refcount_bits=16\n"
        );
        let options = Options::parse(&raw::RAW, &list("size=10E,preallocation=full,nocow=on")).unwrap();
        assert_eq!(
            options.formatting_line("n"),
            "Formatting 'n', fmt=raw size=-6917529027641081856 nocow=on preallocation=full\n"
        );
    }

    #[test]
    fn bare_words_switch() {
        let options = Options::parse(&qcow2::QCOW2, &list("lazy_refcounts,noextended_l2")).unwrap();
        assert_eq!((options.switch("lazy_refcounts"), options.switch("extended_l2")), (Some(true), Some(false)));
    }

    #[test]
    fn help_texts() {
        let text = help(&raw::RAW, true);
        assert_eq!(
            text,
            "Supported options:\n  extent_size_hint=<size> - Extent size hint for the image file, 0 to disable\n  \
             nocow=<bool (on/off)>  - Turn off copy-on-write (valid only on btrfs)\n  preallocation=<str>    - \
             Preallocation mode (allowed values: off, falloc, full)\n  size=<size>            - Virtual disk size\n"
        );
        assert!(help(&qcow2::QCOW2, false).ends_with("\nSpecify the target filename to include those options.\n"));
    }
}
