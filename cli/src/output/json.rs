//! JSON as QEMU prints it: four blanks, empty lists and objects over two lines, everything beyond ASCII escaped.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};

use super::node::Node;

/// Prints a tree, with a final line feed.
pub fn print(node: &Node) -> String {
    let mut out = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut out, Qemu::default());
    // Writing to memory can't fail, and a tree has text keys only.
    if node.serialize(&mut serializer).is_err() {
        out.clear();
    }
    out.push(b'\n');
    String::from_utf8_lossy(&out).into_owned()
}

/// Prints a tree in one line, with a final line feed.
pub fn line(node: &Node) -> String {
    let mut text = serde_json::to_string(node).unwrap_or_default();
    text.push('\n');
    text
}

/// QEMU's layout.
#[derive(Default)]
struct Qemu {
    depth: usize,
}

impl Qemu {
    fn line<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        out.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| out.write_all(b"    "))
    }

    fn open<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        self.line(out)?;
        out.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(b",")?;
        }
        self.line(out)
    }
}

impl Formatter for Qemu {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, fragment: &str) -> io::Result<()> {
        let mut units = [0; 2];
        for c in fragment.chars() {
            match c {
                ' '..='~' => out.write_all(&[c as u8])?,
                _ => c.encode_utf16(&mut units).iter().try_for_each(|unit| write!(out, "\\u{unit:04X}"))?,
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + Write>(&mut self, out: &mut W, escape: CharEscape) -> io::Result<()> {
        match escape {
            CharEscape::Quote => out.write_all(b"\\\""),
            CharEscape::ReverseSolidus => out.write_all(b"\\\\"),
            CharEscape::Solidus => out.write_all(b"/"),
            CharEscape::Backspace => out.write_all(b"\\b"),
            CharEscape::FormFeed => out.write_all(b"\\f"),
            CharEscape::LineFeed => out.write_all(b"\\n"),
            CharEscape::CarriageReturn => out.write_all(b"\\r"),
            CharEscape::Tab => out.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(out, "\\u{byte:04X}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout() {
        let node = Node::Dict(vec![
            ("empty", Node::List(Vec::new())),
            ("list", Node::List(vec![Node::Int(1), Node::Bool(true)])),
            ("none", Node::Dict(Vec::new())),
        ]);
        assert_eq!(
            print(&node),
            "{\n    \"empty\": [\n    ],\n    \"list\": [\n        1,\n        true\n    ],\n    \"none\": {\n    }\n}\n"
        );
    }

    #[test]
    fn escapes() {
        let text = Node::text("é\n\t\x7f\x1b\"\\/\u{1f600}");
        assert_eq!(print(&text), "\"\\u00E9\\n\\t\\u007F\\u001B\\\"\\\\/\\uD83D\\uDE00\"\n");
        assert_eq!(print(&Node::bytes(b"\xff")), "\"\\uFFFD\"\n");
    }
}
