//! A hostile image with the files around it, and what is due.

use crate::bytes::{Image, Order};

/// One hostile image.
#[derive(Clone, Debug)]
pub struct Case {
    /// `format/class/what`.
    pub name: String,
    /// The format that the operator gives; `None`: it is guessed.
    pub format: Option<&'static str>,
    /// File name of the image.
    pub image: &'static str,
    /// All files, the image among them.
    pub files: Vec<(String, Content)>,
    /// What the commands owe.
    pub due: Due,
    /// qemu-img may be asked, too: nothing leads outside, and it is known to end.
    pub ask_qemu: bool,
    /// Why instar and qemu-img may judge differently.
    pub differs: Option<&'static str>,
    /// Only commands that describe the image are tried: what it holds is legal and endless.
    pub describe_only: bool,
}

/// What a file is.
#[derive(Clone, Debug)]
pub enum Content {
    /// A regular file.
    Bytes(Image),
    /// A symbolic link.
    Link(String),
    /// A FIFO.
    Fifo,
    /// A directory.
    Directory,
    /// A hard link to another file of the case.
    Hard(String),
}

/// What the commands owe on an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// No command opens it.
    Refusal,
    /// It may be described, but no command reads all of the disk.
    Unreadable,
    /// It is described; whoever follows its references fails.
    Confinement,
    /// It is legal, if extreme: it can be described and read.
    Contents,
    /// It is described; reading may end either way.
    Description,
    /// Only what holds for all.
    Anything,
    /// The same, and qemu-img, which is more liberal with a specification or computes modulo 2^64, may go further.
    Strictness,
    /// The same, and instar may read what qemu-img refuses: what is damaged is not needed for it.
    Liberty,
}

/// Adds the cases of one format.
pub struct Group<'a> {
    cases: &'a mut Vec<Case>,
    format: &'static str,
    image: &'static str,
}

impl<'a> Group<'a> {
    /// Cases of `format` whose image is called `image`.
    pub fn new(cases: &'a mut Vec<Case>, format: &'static str, image: &'static str) -> Self {
        Self { cases, format, image }
    }

    /// An image.
    pub fn add(&mut self, name: impl AsRef<str>, image: Image, due: Due) -> &mut Case {
        self.cases.push(Case {
            name: format!("{}/{}", self.format, name.as_ref()),
            format: Some(self.format),
            image: self.image,
            files: vec![(self.image.to_owned(), Content::Bytes(image))],
            due,
            ask_qemu: true,
            differs: None,
            describe_only: false,
        });
        let last = self.cases.len() - 1;
        &mut self.cases[last]
    }

    /// One case for each value of each field.
    pub fn fields(&mut self, base: &Image, order: Order, fix: fn(Image) -> Image, fields: &[Field<'_>]) {
        for field in fields {
            for &(value, due) in field.values {
                let image = fix(base.clone().int(order, field.at, field.width, value));
                self.add(format!("field/{}={value:#x}", field.name), image, due);
            }
        }
    }

    /// One case for each length to which the file is cut. A file that ends within `needed` is refused; from there on, up to a
    /// length that holds everything, tables or data are missing, which read as zeroes.
    pub fn truncations(&mut self, base: &Image, needed: u64, lens: &[u64]) {
        for &len in lens {
            let due = if len < needed { Due::Refusal } else { Due::Anything };
            self.add(format!("truncated/{len}"), base.clone().with_len(len), due);
        }
    }
}

impl Case {
    /// Another file beside the image.
    pub fn beside(&mut self, name: impl Into<String>, content: Content) -> &mut Self {
        self.files.push((name.into(), content));
        self
    }

    /// qemu-img is not asked: the image leads it outside, or into an endless loop.
    pub fn without_qemu(&mut self) -> &mut Self {
        self.ask_qemu = false;
        self
    }

    /// instar and qemu-img may judge differently, for this reason.
    pub fn may_differ(&mut self, reason: &'static str) -> &mut Self {
        self.differs = Some(reason);
        self
    }

    /// Nobody reads it to the end.
    pub fn endless(&mut self) -> &mut Self {
        self.describe_only = true;
        self.without_qemu()
    }

    /// The format is guessed.
    pub fn guessed(&mut self) -> &mut Self {
        self.format = None;
        self
    }
}

/// A field of a header and the values to try.
pub struct Field<'a> {
    /// Its name in the specification.
    pub name: &'static str,
    /// Where it lies.
    pub at: usize,
    /// Bytes.
    pub width: usize,
    /// Values, and what is due.
    pub values: &'a [(u64, Due)],
}

/// A field, as a row of a table.
pub const fn field<'a>(name: &'static str, at: usize, width: usize, values: &'a [(u64, Due)]) -> Field<'a> {
    Field { name, at, width, values }
}
