//! The nodes that the operator puts between an image and its file: QEMU's drivers `raw`, which shows a part of what lies below, and
//! `blkdebug`, which lets requests fail.

use instar_vmm::{FaultAction, FaultRule, Window};
use serde_json::Value;

use crate::blkdebug::DebugNode;
use crate::options::parse_size;
use crate::problem::Problem;
use crate::qdict::{self, Member};

/// QEMU counts in sectors.
const SECTOR: u64 = 512;

/// The part that a raw node shows of what lies below.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    /// Where it begins, bytes.
    pub offset: u64,
    /// Bytes; `None`: all that follows.
    pub size: Option<u64>,
}

/// Where a node lies in the file at the bottom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    base: u64,
    /// Bytes, in whole sectors.
    pub len: u64,
    /// Its length stays.
    fixed: bool,
}

impl Extent {
    /// A whole file of `len` bytes.
    pub fn whole(len: u64) -> Self {
        Self { base: 0, len: whole_sectors(len), fixed: false }
    }

    /// What a raw node shows of it.
    ///
    /// # Errors
    /// The slice lies outside, or is no number of whole sectors.
    pub fn cut(self, slice: Slice) -> Result<Self, Problem> {
        let Slice { offset, size } = slice;
        let Some(rest) = self.len.checked_sub(offset) else {
            return Err(Problem::new(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({})",
                self.len
            )));
        };
        match size {
            Some(size) if size > rest => {
                return Err(Problem::new(format!(
                    "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the \
                     containing file ({})",
                    self.len
                )));
            }
            Some(size) if !size.is_multiple_of(SECTOR) => {
                return Err(Problem::new("Specified size is not multiple of 512"));
            }
            _ => {}
        }
        // Both lie inside of a file, the length of which is at most `i64::MAX`.
        let base = self.base.saturating_add(offset);
        let len = size.unwrap_or(if self.fixed { rest } else { whole_sectors(rest) });
        Ok(Self { base, len, fixed: self.fixed || size.is_some() })
    }

    /// A rule of a node here, with an offset that counts from the beginning of the file; `None`: that lies nowhere.
    pub fn rule(self, rule: &FaultRule) -> Option<FaultRule> {
        let mut rule = *rule;
        if let FaultAction::Fail { offset: Some(offset), .. } = &mut rule.action {
            *offset = offset.checked_add(self.base)?;
        }
        Some(rule)
    }

    /// What of the file a guest gets.
    pub fn window(self) -> Window {
        Window { offset: self.base, len: self.fixed.then_some(self.len) }
    }
}

fn whole_sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(SECTOR).unwrap_or(bytes)
}

/// What the operator says of a raw node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawNode {
    offset: Option<Given>,
    size: Option<Given>,
}

/// A number as given.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Given {
    text: String,
    /// In JSON, without quotes.
    bare: bool,
}

impl Given {
    fn json(&self) -> String {
        if self.bare { self.text.clone() } else { Value::from(self.text.as_str()).to_string() }
    }
}

impl RawNode {
    /// Takes note of `offset` or `size`; `false`: it is something else. `bare`: a number of JSON.
    pub fn take(&mut self, key: &str, text: &str, bare: bool) -> bool {
        let slot = match key {
            "offset" => &mut self.offset,
            "size" => &mut self.size,
            _ => return false,
        };
        *slot = Some(Given { text: text.to_owned(), bare });
        true
    }

    /// An option that only a raw node has.
    pub fn key(&self) -> Option<&'static str> {
        self.offset.as_ref().map(|_| "offset").or(self.size.as_ref().map(|_| "size"))
    }

    /// The part that it shows.
    ///
    /// # Errors
    /// What is given is no size.
    pub fn slice(&self) -> Result<Slice, Problem> {
        let number = |key, given: &Option<Given>| given.as_ref().map(|given| parse_size(key, &given.text)).transpose();
        Ok(Slice { offset: number("offset", &self.offset)?.unwrap_or(0), size: number("size", &self.size)? })
    }

    /// Its members in JSON.
    pub fn members(&self) -> impl Iterator<Item = Member> {
        let given = [("offset", &self.offset), ("size", &self.size)];
        given.into_iter().filter_map(|(key, given)| Some((key.to_owned(), given.as_ref()?.json())))
    }
}

/// A node between an image and its file, as given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Between {
    /// It shows a part of what lies below.
    Raw(RawNode),
    /// It lets requests fail.
    Debug(DebugNode),
}

/// How QEMU names a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// As a file name, if one says all of it.
    pub file: Option<String>,
    /// In JSON.
    pub json: String,
    /// A format over it has its name.
    pub is_protocol: bool,
}

impl Name {
    /// Of a file, or what takes the place of one.
    pub fn of_leaf(file: &str, json: &str) -> Self {
        let file = Some(file.to_owned()).filter(|file| !file.starts_with("json:"));
        Self { file, json: json.to_owned(), is_protocol: true }
    }

    /// The name of a format over this node, of which nothing else need be said.
    pub fn passed_on(&self) -> Option<&String> {
        self.file.as_ref().filter(|_| self.is_protocol)
    }

    /// As it is shown.
    pub fn shown(&self) -> String {
        self.file.clone().unwrap_or_else(|| format!("json:{}", self.json))
    }
}

impl Between {
    /// Its name over a node of the name `below`.
    fn name(&self, below: &Name) -> Name {
        match self {
            Self::Raw(node) => {
                let mut members = vec![qdict::text("driver", "raw"), ("file".to_owned(), below.json.clone())];
                members.extend(node.members());
                let file = below.passed_on().filter(|_| *node == RawNode::default()).cloned();
                Name { file, json: qdict::object(members), is_protocol: false }
            }
            Self::Debug(node) => Name {
                file: below.file.as_deref().and_then(|below| node.name(below)),
                json: node.json(&below.json),
                is_protocol: true,
            },
        }
    }

    /// The node over one of the name `below`, and its name.
    ///
    /// # Errors
    /// An option has a wrong value.
    pub fn over(&self, below: &Name) -> Result<(Layer, Name), Problem> {
        let name = self.name(below);
        let shown = name.shown();
        let layer = match self {
            Self::Raw(node) => Layer { shown, driver: "raw", child: "file", slice: node.slice()?, rules: Vec::new() },
            Self::Debug(node) => {
                Layer { shown, driver: "blkdebug", child: "image", slice: Slice::default(), rules: node.rules()? }
            }
        };
        Ok((layer, name))
    }
}

/// A node between an image and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// QEMU's name for it.
    pub shown: String,
    /// QEMU's name for what it is.
    pub driver: &'static str,
    /// QEMU's name for what lies below, in it.
    pub child: &'static str,
    /// What it shows of the node below.
    pub slice: Slice,
    /// How requests are to fail.
    pub rules: Vec<FaultRule>,
}

impl Layer {
    /// It tells how much of a disk it takes.
    pub fn tells_disk_size(&self) -> bool {
        self.driver != "blkdebug"
    }

    /// It waits for reads or writes of data, which it could not tell from those of tables.
    pub fn waits_for_data(&self) -> bool {
        self.rules.iter().any(|rule| rule.event != instar_vmm::FaultEvent::Start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(offset: u64, size: Option<u64>) -> Slice {
        Slice { offset, size }
    }

    #[test]
    fn slices_of_slices() {
        let whole = Extent::whole(10_000);
        assert_eq!((whole.len, whole.window()), (10_240, Window::default()));
        let behind = whole.cut(slice(1024, None)).unwrap();
        assert_eq!((behind.len, behind.window()), (9216, Window { offset: 1024, len: None }));
        let part = behind.cut(slice(512, Some(2048))).unwrap();
        assert_eq!((part.len, part.window()), (2048, Window { offset: 1536, len: Some(2048) }));
        // What lies in a part ends with it.
        let inner = part.cut(slice(1000, None)).unwrap();
        assert_eq!((inner.len, inner.window()), (1048, Window { offset: 2536, len: Some(1048) }));
        assert_eq!(whole.cut(slice(10_240, None)).unwrap().len, 0);
    }

    #[test]
    fn slices_outside() {
        let whole = Extent::whole(4096);
        for (offset, size, want) in [
            (4097, None, "Offset (4097) cannot be greater than size of the containing file (4096)"),
            (u64::MAX, Some(u64::MAX), "Offset (18446744073709551615) cannot be"),
            (512, Some(3585), "The sum of offset (512) and size (3585) has to be"),
            (0, Some(u64::MAX), "The sum of offset (0) and size (18446744073709551615)"),
            (0, Some(1000), "Specified size is not multiple of 512"),
        ] {
            let problem = whole.cut(slice(offset, size)).unwrap_err().to_string();
            assert!(problem.starts_with(want), "{problem}");
        }
    }
}
