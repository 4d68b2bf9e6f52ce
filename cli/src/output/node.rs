//! Results as ordered trees, printed alike for people and as JSON.

use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};

/// A value with the order of its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Int(u64),
    /// Text, not yet escaped.
    Text(String),
    /// Values in order.
    List(Vec<Node>),
    /// Members in order.
    Dict(Vec<(&'static str, Node)>),
}

impl Node {
    /// Text from an image; bytes that are no UTF-8 become U+FFFD, as in QEMU's JSON.
    pub fn bytes(bytes: &[u8]) -> Self {
        Self::Text(String::from_utf8_lossy(bytes).into_owned())
    }

    /// Text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }
}

impl Serialize for Node {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Bool(on) => serializer.serialize_bool(*on),
            Self::Int(number) => serializer.serialize_u64(*number),
            Self::Text(text) => serializer.serialize_str(text),
            Self::List(items) => {
                let mut list = serializer.serialize_seq(Some(items.len()))?;
                for item in items {
                    list.serialize_element(item)?;
                }
                list.end()
            }
            Self::Dict(members) => {
                let mut dict = serializer.serialize_map(Some(members.len()))?;
                for (key, value) in members {
                    dict.serialize_entry(key, value)?;
                }
                dict.end()
            }
        }
    }
}
