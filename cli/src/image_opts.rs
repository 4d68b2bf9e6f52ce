//! Which image the operator means: a file name with `-f`, an `--image-opts` list, or a `json:` file name.

mod below;

use instar_guest_protocol::message::{Format, VhdSize};
use serde_json::Value;

use crate::blkdebug::DebugNode;
use crate::formats::{self, Driver};
use crate::layer::{Between, Layer, Name, RawNode, Slice};
use crate::messages;
use crate::nbd::Address;
use crate::open;
use crate::options::{parse_size, split};
use crate::problem::Problem;
use crate::qdict;

pub use self::below::Below;

/// An image is described by `--image-opts` or has its format from elsewhere.
pub const EXCLUSIVE: &str = "--image-opts and --format are mutually exclusive";

/// An image that the operator named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// As typed; errors quote it.
    pub given: String,
    /// The file's name.
    pub file: String,
    /// The name under which it is described.
    pub shown: String,
    /// Its format; [`Format::Unknown`]: to be found out.
    pub format: Format,
    /// No locks are taken.
    pub force_share: bool,
    /// It is not a file but this NBD export.
    pub nbd: Option<Address>,
    /// The secret that opens an encrypted image.
    pub key_secret: Option<String>,
    /// What is said of the image below it.
    pub below: Below,
    /// The file with its LUKS header, if that is one of its own.
    pub header: Option<String>,
    /// Which size of a VHD counts.
    pub vhd_size: VhdSize,
    /// It must not be written.
    pub read_only: bool,
    /// It is stored nowhere.
    pub null: Option<NullDevice>,
    /// The file that holds its data, if the operator names it.
    pub data_file: Option<String>,
    /// The part that it is of what lies below, if it is raw.
    pub slice: Slice,
    /// The nodes between it and the file, its own child first.
    pub layers: Vec<Layer>,
    /// The node below in JSON, if the name of the image depends on its format, which is to be found out.
    unprobed: Option<String>,
}

/// A disk of zeroes that keeps nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NullDevice {
    /// QEMU's driver.
    pub driver: &'static str,
    /// Bytes.
    pub size: u64,
}

impl NullDevice {
    const SIZE: u64 = 1 << 30;

    /// The device of a file name; `None`: it is another's.
    fn parse(name: &str) -> Result<Option<Self>, Problem> {
        let Some(driver) = name.split(':').next().and_then(null_driver).filter(|_| name.contains(':')) else {
            return Ok(None);
        };
        match name.strip_prefix(driver) {
            Some("://") => Ok(Some(Self { driver, size: Self::SIZE })),
            _ => Err(only_name(driver)),
        }
    }

    /// The device of its options, and how QEMU names it.
    fn of_options(driver: &'static str, options: &[(&str, &str)]) -> Result<(Self, String), Problem> {
        let (mut size, mut reads_zeroes, mut size_text) = (Self::SIZE, None, None);
        for &(key, value) in options {
            match key {
                "size" => (size, size_text) = (parse_size(key, value)?, Some(value)),
                "read-zeroes" => reads_zeroes = switch(key, value).map(|_| Some(value))?,
                "latency-ns" => {
                    parse_size(key, value)?;
                }
                "driver" | "filename" => {}
                _ if COMMON.contains(&key) => check_common(key, value)?,
                _ => return Err(Problem::new(format!("Block protocol '{driver}' doesn't support the option '{key}'"))),
            }
        }
        let quote = |text: &str| Value::from(text).to_string();
        let member = |key: &str, value: Option<&str>| value.map(|value| format!("{}: {}", quote(key), quote(value)));
        let zeroes = member("read-zeroes", reads_zeroes);
        let members = [zeroes, member("driver", Some(driver)), member("size", size_text)];
        let shown = match (reads_zeroes, size_text) {
            (None, None) => format!("{driver}://"),
            _ => format!("json:{{{}}}", members.into_iter().flatten().collect::<Vec<_>>().join(", ")),
        };
        Ok((Self { driver, size }, shown))
    }
}

fn null_driver(name: &str) -> Option<&'static str> {
    ["null-co", "null-aio"].into_iter().find(|driver| *driver == name)
}

fn only_name(driver: &str) -> Problem {
    Problem::new(format!("The only allowed filename for this driver is '{driver}://'"))
}

impl ImageSpec {
    /// An image by file name, with `-f` if given.
    ///
    /// # Errors
    /// The message, complete.
    pub fn of_file(name: &str, format: Option<&str>) -> Result<Self, Problem> {
        let parsed = match name.strip_prefix("json:") {
            Some(json) => parse_json(json).and_then(|mut settings| {
                if let Some(format) = format {
                    settings.push(Setting::new("driver", format));
                }
                Self::of_settings(name, settings)
            }),
            None => Self::plain(name, format),
        };
        parsed.map_err(|problem| problem.within(format!("Could not open '{name}'")))
    }

    /// An image by operand: a file name with `-f` if given, or `--image-opts`.
    ///
    /// # Errors
    /// The message, complete.
    pub fn of_operand(text: &str, image_opts: bool, format: Option<&str>) -> Result<Self, Problem> {
        match (image_opts, format) {
            (true, Some(_)) => Err(Problem::new(EXCLUSIVE)),
            (true, None) => Self::of_opts(text),
            (false, format) => Self::of_file(text, format),
        }
    }

    /// An image by file name, with its format if given.
    ///
    /// # Errors
    /// The message, without `Could not open 'F'` around it.
    pub fn of_new_backing(name: &str, format: Option<&str>) -> Result<Self, Problem> {
        match name.strip_prefix("json:") {
            Some(_) => Self::of_file(name, format),
            None => Self::plain(name, format),
        }
    }

    /// An image by `--image-opts`.
    ///
    /// # Errors
    /// The message, complete.
    pub fn of_opts(opts: &str) -> Result<Self, Problem> {
        let elements = split(opts);
        let parsed = match elements.first() {
            Some((name, None)) => Err(no_node(name)),
            _ => {
                let settings = elements.into_iter().map(|(key, value)| Setting {
                    value: value.unwrap_or_else(|| "on".to_owned()),
                    key,
                    bare: false,
                });
                Self::of_settings(opts, settings.collect())
            }
        };
        parsed.map_err(|problem| problem.within(format!("Could not open '{opts}'")))
    }

    /// qemu-img takes a file of this name for an Apple disk image, unless it begins like an image of another format.
    pub fn is_named_dmg(&self) -> bool {
        self.file.len() > ".dmg".len() && self.file.ends_with(".dmg")
    }

    fn plain(name: &str, format: Option<&str>) -> Result<Self, Problem> {
        if let Some(null) = NullDevice::parse(name)? {
            let format = match format.and_then(null_driver) {
                Some(driver) if driver == null.driver => Format::File,
                Some(driver) => return Err(only_name(driver)),
                None => format.map_or(Ok(Format::Unknown), driver_format)?,
            };
            return Ok(Self { null: Some(null), ..Self::of_name(name, name.to_owned(), format) });
        }
        if let Some(wanted) = format.and_then(wanted_name) {
            return Err(Problem::new(wanted));
        }
        let format = format.map_or(Ok(Format::Unknown), driver_format)?;
        if let Some(address) = Address::parse(name)? {
            return Ok(Self::of_nbd(name, address, format, None));
        }
        if let Some(inner) = name.strip_prefix("blkdebug:") {
            return Self::of_blkdebug(name, inner, format);
        }
        let path = open::path_of(name)?;
        Ok(Self::of_name(name, path.display().to_string(), format))
    }

    /// An image over a node that lets requests fail: `CONFIG:NAME`.
    fn of_blkdebug(given: &str, inner: &str, format: Format) -> Result<Self, Problem> {
        let (node, below) = DebugNode::of_name(inner)?;
        let below = Self::plain(below, None)?;
        if below.nbd.is_some() || below.null.is_some() {
            return Err(Problem::new("The driver 'blkdebug' is provided over files only"));
        }
        let leaf = qdict::object(vec![qdict::text("driver", "file"), qdict::text("filename", &below.file)]);
        let (layer, name) = Between::Debug(node).over(&Name::of_leaf(&below.file, &leaf))?;
        let mut layers = below.layers;
        layers.insert(0, layer);
        Self { layers, shown: name.shown(), ..Self::of_name(given, below.file, format) }.checked()
    }

    /// Refuses rules for requests that are not told apart here.
    fn checked(self) -> Result<Self, Problem> {
        if self.layers.iter().filter(|layer| layer.driver == "blkdebug").count() > 1 {
            return Err(Problem::new("The driver 'blkdebug' is provided once below an image only"));
        }
        if self.format != Format::Raw && self.layers.iter().any(Layer::waits_for_data) {
            return Err(Problem::new(
                "The events read_aio and write_aio of blkdebug are provided for raw disks only (driver=raw or -f raw)",
            ));
        }
        Ok(self)
    }

    fn of_nbd(given: &str, address: Address, format: Format, key_secret: Option<String>) -> Self {
        let shown = address.shown();
        Self { nbd: Some(address), key_secret, ..Self::of_name(given, shown, format) }
    }

    /// What is named, and how QEMU names it.
    fn of_name(given: &str, shown: String, format: Format) -> Self {
        Self {
            given: given.to_owned(),
            file: shown.clone(),
            shown,
            format,
            force_share: false,
            nbd: None,
            key_secret: None,
            below: Below::Recorded,
            header: None,
            vhd_size: VhdSize::ByCreator,
            read_only: false,
            null: None,
            data_file: None,
            slice: Slice::default(),
            layers: Vec::new(),
            unprobed: None,
        }
    }

    /// A backing image by the name and format that are recorded.
    pub fn recorded(name: &str, format: Format) -> Self {
        Self::of_name(name, name.to_owned(), format)
    }

    fn of_settings(given: &str, settings: Vec<Setting>) -> Result<Self, Problem> {
        let (mut settings, below) = Below::split(settings);
        let mut found = Keys::default();
        while let Some(node) = found.peel(&mut settings)? {
            found.below.push(node);
        }
        for setting in &settings {
            found.take(setting)?;
        }
        Ok(Self { below, ..found.finish(given)? })
    }

    /// How QEMU names the image, which turned out to be of this format.
    pub fn shown_as(&self, format: Format) -> String {
        match &self.unprobed {
            Some(below) => format!("json:{{\"driver\": \"{}\", \"file\": {below}}}", formats::name(format)),
            None => self.shown.clone(),
        }
    }

    /// Whether its length was given, and stays.
    pub fn has_fixed_size(&self) -> bool {
        self.slice.size.is_some() || self.layers.iter().any(|layer| layer.slice.size.is_some())
    }
}

/// An option of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    key: String,
    value: String,
    /// A number or truth value of JSON.
    bare: bool,
}

impl Setting {
    fn new(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self { key: key.into(), value: value.into(), bare: false }
    }
}

/// What the keys of an image say.
#[derive(Default)]
struct Keys {
    driver: Option<String>,
    file_driver: Option<String>,
    file_name: Option<String>,
    has_file: bool,
    /// Something is said of what lies below the file.
    has_inner_file: bool,
    own_name: Option<String>,
    encryption: Vec<(String, String)>,
    header: Header,
    unshared: bool,
    size_calc: Option<String>,
    force_share: bool,
    unknown: Option<String>,
    unknown_of_file: Option<String>,
    data: Vec<(String, String)>,
    native_aio: bool,
    read_only: bool,
    discard: bool,
    unmaps: bool,
    /// All of them, as given.
    given: Vec<(String, String)>,
    /// Of a raw image.
    part: RawNode,
    /// The nodes between the image and its file, its own child first.
    below: Vec<Between>,
}

/// What is said of the file with the LUKS header.
#[derive(Default)]
struct Header {
    driver: Option<String>,
    name: Option<String>,
    /// The first key about it.
    key: Option<String>,
    unknown: Option<String>,
}

impl Keys {
    /// Takes the child of the image away, if it is a node over another: what lies below that is the child then.
    fn peel(&mut self, settings: &mut Vec<Setting>) -> Result<Option<Between>, Problem> {
        let driver = settings.iter().rev().find(|setting| setting.key == "file.driver");
        let (mut node, child) = match driver.map(|driver| driver.value.as_str()) {
            Some("raw") => (Between::Raw(RawNode::default()), "file"),
            Some("blkdebug") => (Between::Debug(DebugNode::default()), "image"),
            _ => return Ok(None),
        };
        let (mut has_child, mut unknown) = (false, None);
        for setting in std::mem::take(settings) {
            let Setting { key, value, bare } = &setting;
            let Some(own) = key.strip_prefix("file.") else {
                settings.push(setting);
                continue;
            };
            if let Some(below) = own.strip_prefix(child).and_then(|below| below.strip_prefix('.')) {
                has_child = true;
                settings.push(Setting { key: format!("file.{below}"), ..setting });
                continue;
            }
            match (own, &mut node) {
                ("driver" | "discard" | "detect-zeroes", _) => {}
                ("force-share", _) => self.force_share |= switch("force-share", value)?,
                _ if own == child => return Err(no_node(value)),
                _ if COMMON.contains(&own) => check_common(own, value)?,
                (_, Between::Raw(node)) => {
                    if !node.take(own, value, *bare) {
                        unknown = Some(own.to_owned());
                    }
                }
                (_, Between::Debug(node)) => node.take(own, value, *bare),
            }
        }
        match unknown {
            _ if !has_child => Err(no_child(child)),
            Some(key) => Err(Problem::new(format!("Block format 'raw' does not support the option '{key}'"))),
            None => Ok(Some(node)),
        }
    }

    fn take(&mut self, setting: &Setting) -> Result<(), Problem> {
        let Setting { key, value, bare } = setting;
        let (key, value) = (key.as_str(), value.as_str());
        self.given.push((key.to_owned(), value.to_owned()));
        if self.part.take(key, value, *bare) {
            return Ok(());
        }
        match key {
            "driver" => self.driver = Some(value.to_owned()),
            "file" | "data-file" | "header" => return Err(no_node(value)),
            "node-name" if !is_identifier(value) => {
                return Err(Problem::new(format!("Invalid node-name: '{value}'")));
            }
            "discard" => match value {
                "unmap" | "on" => self.discard = true,
                "ignore" | "off" => self.discard = false,
                _ => return Err(Problem::new("Invalid discard option")),
            },
            "detect-zeroes" => match value {
                "on" | "off" | "unmap" => self.unmaps = value == "unmap",
                _ => return Err(invalid_value(value)),
            },
            "filename" => self.own_name = Some(value.to_owned()),
            "force-share" => self.force_share |= switch(key, value)?,
            "read-only" => self.read_only = switch(key, value)?,
            _ if COMMON.contains(&key) => check_common(key, value)?,
            _ => match key.strip_prefix("file.") {
                Some(key) => {
                    self.has_file = true;
                    self.take_of_file(key, value)?;
                }
                None => self.take_of_format(key, value)?,
            },
        }
        Ok(())
    }

    fn take_of_header(&mut self, key: &str, value: &str) {
        self.header.key.get_or_insert_with(|| format!("header.{key}"));
        match key {
            "driver" => self.header.driver = Some(value.to_owned()),
            "filename" => self.header.name = Some(value.to_owned()),
            _ if COMMON.contains(&key) || OF_FILE.contains(&key) || key == "locking" => {}
            _ => self.header.unknown = Some(key.to_owned()),
        }
    }

    fn take_of_file(&mut self, key: &str, value: &str) -> Result<(), Problem> {
        match key {
            "driver" => self.file_driver = Some(value.to_owned()),
            "filename" => self.file_name = Some(value.to_owned()),
            "locking" => match value {
                "on" | "auto" => {}
                "off" => self.unshared = true,
                _ => return Err(invalid_value(value)),
            },
            "aio" => match value {
                "threads" | "io_uring" => {}
                "native" => self.native_aio = true,
                _ => return Err(invalid_value(value)),
            },
            "force-share" => self.force_share |= switch("file.force-share", value)?,
            _ if COMMON.contains(&key) => check_common(key, value)?,
            _ if OF_FILE.contains(&key) => {}
            _ if key.starts_with("file.") => self.has_inner_file = true,
            _ => self.unknown_of_file = Some(key.to_owned()),
        }
        Ok(())
    }

    fn take_of_format(&mut self, key: &str, value: &str) -> Result<(), Problem> {
        if let Some(key) = key.strip_prefix("header.") {
            self.take_of_header(key, value);
        } else if key.starts_with("encrypt.") || key == "key-secret" {
            self.encryption.push((key.to_owned(), value.to_owned()));
        } else if let Some(key) = key.strip_prefix("data-file.") {
            self.data.push((key.to_owned(), value.to_owned()));
        } else if key == "force_size_calc" {
            self.size_calc = Some(value.to_owned());
        } else if QCOW2_SWITCHES.contains(&key) {
            switch(key, value)?;
        } else if QCOW2_SIZES.contains(&key) {
            parse_size(key, value)?;
        } else if key == "overlap-check" || key == "overlap-check.template" {
            if !["none", "constant", "cached", "all"].contains(&value) {
                return Err(Problem::new(format!(
                    "Unsupported value '{value}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, \
                     constant, cached, all"
                )));
            }
        } else if let Some(area) = key.strip_prefix("overlap-check.") {
            switch(&format!("overlap-check.{area}"), value)?;
        } else {
            self.unknown = Some(key.to_owned());
        }
        Ok(())
    }

    /// The external data file that is named.
    fn data_file(&self) -> Result<Option<String>, Problem> {
        let mut name = None;
        for (key, value) in &self.data {
            match key.as_str() {
                "driver" | "file.driver" => match driver_format(value)? {
                    Format::Raw | Format::File => {}
                    _ => return Err(Problem::new(format!("The driver '{value}' is not provided for a data file"))),
                },
                "filename" | "file.filename" => name = Some(value.clone()),
                key if COMMON.contains(&key) => check_common(key, value)?,
                key => return Err(Problem::new(format!("Block protocol 'file' doesn't support the option '{key}'"))),
            }
        }
        match name.filter(|name| !name.is_empty()) {
            Some(name) => Ok(Some(name)),
            None if self.data.is_empty() => Ok(None),
            None => Err(Problem::new("The 'file' block driver requires a file name")),
        }
    }

    /// The disk that is stored nowhere, if it is one by itself or below a format; and how QEMU names it.
    fn null(&self) -> Result<Option<(NullDevice, Format, String)>, Problem> {
        let (prefix, driver) = match (self.driver.as_deref(), self.file_driver.as_deref()) {
            (Some(driver), _) if null_driver(driver).is_some() => ("", driver),
            (_, Some(driver)) => ("file.", driver),
            _ => return Ok(None),
        };
        let Some(driver) = null_driver(driver) else { return Ok(None) };
        let own = self.given.iter().filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value.as_str())));
        let own: Vec<(&str, &str)> = own.filter(|(key, _)| prefix.is_empty() || *key != "driver").collect();
        let (null, name) = NullDevice::of_options(driver, &own)?;
        if prefix.is_empty() {
            return Ok(Some((null, Format::File, name)));
        }
        let format = self.driver.as_deref().map_or(Ok(Format::Unknown), driver_format)?;
        Ok(Some((null, format, name)))
    }

    /// The address, if it is an NBD export by itself (`driver=nbd`) or below a format (`file.driver=nbd`).
    fn nbd(&self) -> Result<Option<(Address, Format)>, Problem> {
        let (prefix, format) = match (self.driver.as_deref(), self.file_driver.as_deref()) {
            (Some("nbd"), _) => ("", Format::File),
            (driver, Some("nbd")) => ("file.", driver.map_or(Ok(Format::Unknown), driver_format)?),
            _ => return Ok(None),
        };
        let own = self.given.iter().filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value)));
        let own = own.filter(|(key, _)| *key != "driver" && !COMMON.contains(key));
        let own: Vec<(String, String)> = own.map(|(key, value)| (key.to_owned(), value.clone())).collect();
        Ok(Some((Address::of_options(&own)?, format)))
    }

    fn key_secret(&self) -> Option<String> {
        self.encryption.iter().find(|(key, _)| key.ends_with("key-secret")).map(|(_, id)| id.clone())
    }

    /// An option about encryption that the format does not have.
    fn misplaced(&self, format: Format) -> Option<&str> {
        let header = self.header.key.as_deref().filter(|_| format != Format::Luks);
        let fits = |key: &str| match format {
            Format::Unknown => true,
            Format::Luks => key == "key-secret",
            Format::Qcow2 | Format::Qcow => key != "key-secret",
            _ => false,
        };
        header.or(self.encryption.iter().map(|(key, _)| key.as_str()).find(|key| !fits(key)))
    }

    /// The name of the file with the LUKS header.
    fn header_name(&self) -> Result<Option<String>, Problem> {
        let Header { driver, name, key: Some(_), unknown } = &self.header else { return Ok(None) };
        match driver.as_deref() {
            None if name.is_none() => return Err(Problem::new("Must specify either driver or file")),
            None | Some("file") => {}
            Some(other) if formats::driver(other).is_none() => return Err(unknown_driver(other)),
            Some(other) => return Err(Problem::new(format!("The driver '{other}' is not provided below a format"))),
        }
        if let Some(key) = unknown {
            return Err(Problem::new(format!("Block protocol 'file' doesn't support the option '{key}'")));
        }
        match name.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => Ok(Some(name.to_owned())),
            None => Err(Problem::new("The 'file' block driver requires a file name")),
        }
    }

    fn finish(self, given: &str) -> Result<ImageSpec, Problem> {
        if let Some((address, format)) = self.nbd()? {
            if !self.below.is_empty() || self.part != RawNode::default() {
                return Err(Problem::new("A part of an NBD export is not provided by this version"));
            }
            return Ok(ImageSpec::of_nbd(given, address, format, self.key_secret()));
        }
        if let Some((null, format, file)) = self.null()? {
            let leaf = match file.strip_prefix("json:") {
                Some(json) => json.to_owned(),
                None => format!("{{\"driver\": \"{}\"}}", null.driver),
            };
            let spec = ImageSpec { null: Some(null), ..ImageSpec::of_name(given, file, format) };
            return if format == Format::File { Ok(spec) } else { self.placed(spec, &leaf, &[], None) };
        }
        let data_file = self.data_file()?;
        if self.unmaps && !self.discard {
            return Err(Problem::new(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ));
        }
        let is_direct =
            |(key, value): &(String, String)| key.ends_with("cache.direct") && switch(key, value).is_ok_and(|on| on);
        if self.native_aio && !self.given.iter().any(is_direct) {
            return Err(Problem::new(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ));
        }
        let driver = self.driver.as_deref();
        if driver.is_none() && !self.has_file {
            return Err(Problem::new("Must specify either driver or file"));
        }
        let format = driver.map_or(Ok(Format::Unknown), driver_format)?;
        let named = match format {
            Format::File => self.own_name.as_deref(),
            _ if !self.has_file => return Err(no_device()),
            _ if (self.has_inner_file || self.file_name.is_none()) && self.file_driver.is_none() => {
                return Err(Problem::new("Must specify either driver or file"));
            }
            _ => self.file_name.as_deref(),
        };
        if let Some(below) = &self.file_driver {
            match formats::driver(below) {
                Some(Driver::Provided(Format::File)) => {}
                Some(_) => return Err(Problem::new(format!("The driver '{below}' is not provided below a format"))),
                None => return Err(unknown_driver(below)),
            }
        }
        let file = named.filter(|name| !name.is_empty());
        let file = file.ok_or_else(|| Problem::new("The 'file' block driver requires a file name"))?;
        let format_name = driver.unwrap_or("raw");
        let raw_only = self.part.key().filter(|_| format != Format::Raw);
        match (format, raw_only) {
            (Format::Unknown, Some(key)) => {
                return Err(Problem::new(format!("The option '{key}' is not provided without driver=raw")));
            }
            (Format::File, Some(key)) => {
                return Err(Problem::new(format!("Block protocol 'file' doesn't support the option '{key}'")));
            }
            _ => {}
        }
        let named = self.data.first().map(|(key, _)| format!("data-file.{key}"));
        let qcow2_only = named.as_deref().filter(|_| !matches!(format, Format::Qcow2 | Format::Unknown));
        let vhd_only = self.size_calc.as_ref().filter(|_| format != Format::Vpc).and(Some("force_size_calc"));
        let unknown = self
            .unknown
            .as_deref()
            .or(raw_only)
            .or(qcow2_only)
            .or(vhd_only)
            .or(self.own_name.as_deref().filter(|_| format != Format::File).and(Some("filename")))
            .or(self.misplaced(format));
        if let Some(key) = unknown {
            return Err(Problem::new(format!("Block format '{format_name}' does not support the option '{key}'")));
        }
        if let Some(key) = self.unknown_of_file {
            return Err(Problem::new(format!("Block protocol 'file' doesn't support the option '{key}'")));
        }
        let header = self.header_name()?;
        let key_secret = self.key_secret();
        let vhd_size = match self.size_calc.as_deref() {
            None => VhdSize::ByCreator,
            Some("chs") => VhdSize::Geometry,
            Some("current_size") => VhdSize::Current,
            Some(word) => return Err(Problem::new(format!("Invalid size calculation mode: '{word}'"))),
        };
        let mut strong = self.encryption.clone();
        strong.extend(self.size_calc.clone().map(|value| ("force_size_calc".to_owned(), value)));
        let leaf = format!("{{\"driver\": \"file\", \"filename\": {}}}", Value::from(file));
        let spec = ImageSpec {
            force_share: self.force_share || self.unshared,
            key_secret,
            header: header.clone(),
            vhd_size,
            read_only: self.read_only,
            data_file,
            ..ImageSpec::of_name(given, file.to_owned(), format)
        };
        self.placed(spec, &leaf, &strong, header.as_deref())
    }

    /// The image over the node `leaf` (JSON) and the nodes between them, with its name.
    fn placed(
        &self,
        spec: ImageSpec,
        leaf: &str,
        strong: &[(String, String)],
        header: Option<&str>,
    ) -> Result<ImageSpec, Problem> {
        let mut below = Name::of_leaf(&spec.file, leaf);
        let mut layers = Vec::new();
        for node in self.below.iter().rev() {
            let (layer, name) = node.over(&below)?;
            layers.insert(0, layer);
            below = name;
        }
        let slice = self.part.slice()?;
        let spec = ImageSpec { slice, layers, ..spec }.checked()?;
        if let Some(name) = below.passed_on().filter(|_| strong.is_empty() && self.part == RawNode::default()) {
            return Ok(ImageSpec { shown: name.clone(), ..spec });
        }
        let shown = json_name(strong, self.driver.as_deref(), &self.part, header, &below.json);
        let unprobed = (self.driver.is_none() && strong.is_empty()).then_some(below.json);
        Ok(ImageSpec { shown, unprobed, ..spec })
    }
}

/// Runtime options of every node that make no difference to a program that reads or writes an image once.
const COMMON: &[&str] = &["auto-read-only", "cache.direct", "cache.no-flush", "node-name", "read-only"];
/// Likewise of a file.
const OF_FILE: &[&str] = &["aio-max-batch", "drop-cache", "pr-manager", "x-check-cache-dropped"];
/// Likewise of qcow2.
const QCOW2_SWITCHES: &[&str] =
    &["discard-no-unref", "lazy-refcounts", "pass-discard-other", "pass-discard-request", "pass-discard-snapshot"];
/// Likewise, with sizes and numbers.
const QCOW2_SIZES: &[&str] =
    &["cache-clean-interval", "cache-size", "l2-cache-entry-size", "l2-cache-size", "refcount-cache-size"];

fn check_common(key: &str, value: &str) -> Result<(), Problem> {
    match key {
        "auto-read-only" | "cache.direct" | "cache.no-flush" | "read-only" => switch(key, value).map(|_| ()),
        _ => Ok(()),
    }
}

pub fn switch(key: &str, value: &str) -> Result<bool, Problem> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Problem::new(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

fn invalid_value(value: &str) -> Problem {
    Problem::new(format!("invalid parameter value: {value}"))
}

/// A name as QEMU allows it for a node.
fn is_identifier(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

/// What a driver that opens no files says of a file's name.
fn wanted_name(driver: &str) -> Option<String> {
    Some(match driver {
        "nbd" => "File name string for NBD must start with 'nbd:'".to_owned(),
        "vvfat" => "File name string must start with 'fat:'".to_owned(),
        "quorum" => "Number of provided children must be 1 or more".to_owned(),
        driver => format!("The only allowed filename for this driver is '{}://'", null_driver(driver)?),
    })
}

fn no_device() -> Problem {
    no_child("file")
}

fn no_child(role: &str) -> Problem {
    Problem::new(format!("A block device must be specified for \"{role}\""))
}

fn no_node(name: &str) -> Problem {
    Problem::new(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

fn unknown_driver(name: &str) -> Problem {
    Problem::new(format!("Unknown driver '{name}'"))
}

/// The format behind a driver name, as `-f` takes it.
///
/// # Errors
/// `Unknown driver`, or a format that this version does not open.
pub fn driver_format(name: &str) -> Result<Format, Problem> {
    match formats::driver(name) {
        Some(Driver::Provided(format)) => Ok(format),
        Some(Driver::Known(format)) => Err(Problem::new(messages::not_provided(format))),
        Some(Driver::Other) => Err(Problem::new(format!("The driver '{name}' is not provided by this version"))),
        None => Err(unknown_driver(name)),
    }
}

/// How QEMU names an image whose options do not fit into a file name.
fn json_name(
    encryption: &[(String, String)],
    driver: Option<&str>,
    part: &RawNode,
    header: Option<&str>,
    below: &str,
) -> String {
    let mut members = vec![("file".to_owned(), below.to_owned())];
    members.extend(encryption.iter().map(|(key, value)| qdict::text(key, value)));
    let file = |name| qdict::object(vec![qdict::text("driver", "file"), qdict::text("filename", name)]);
    members.extend(header.map(|name| ("header".to_owned(), file(name))));
    members.extend(driver.map(|driver| qdict::text("driver", driver)));
    members.extend(part.members());
    format!("json:{}", qdict::object(members))
}

/// Flattens the JSON of a `json:` name into dotted keys.
fn parse_json(text: &str) -> Result<Vec<Setting>, Problem> {
    let bad = |reason: String| Problem::new(format!("Could not parse the JSON options: {reason}"));
    if text.trim().is_empty() {
        return Err(bad("Expecting a JSON value".to_owned()));
    }
    let parsed = serde_json::from_str(text).or_else(|error| {
        // QEMU takes strings in single quotes as well.
        serde_json::from_str(&double_quoted(text)).map_err(|_| error)
    });
    let value: Value = parsed.map_err(|error| match error.is_eof() {
        true => bad("JSON parse error, premature EOI".to_owned()),
        false => bad(format!("JSON parse error, {error}")),
    })?;
    let Value::Object(members) = value else { return Err(Problem::new("Invalid JSON object given")) };
    let mut keys = Vec::new();
    flatten("", members, &mut keys);
    Ok(keys)
}

/// JSON with strings in single quotes, rewritten with double ones.
fn double_quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut quote, mut escaped) = (None, false);
    for c in text.chars() {
        match (quote, c) {
            (Some(_), '\\') if !escaped => escaped = true,
            (Some(_), c) if escaped => {
                escaped = false;
                out.push_str(if c == '\'' { "'" } else { "\\" });
                if c != '\'' {
                    out.push(c);
                }
            }
            (Some(open), c) if c == open => {
                quote = None;
                out.push('"');
            }
            (Some('\''), '"') => out.push_str("\\\""),
            (None, '"' | '\'') => {
                quote = Some(c);
                out.push('"');
            }
            (_, c) => out.push(c),
        }
    }
    out
}

fn flatten(prefix: &str, members: serde_json::Map<String, Value>, keys: &mut Vec<Setting>) {
    for (name, value) in members {
        let key = format!("{prefix}{name}");
        match value {
            Value::Object(inner) if inner.is_empty() && name == "backing" => {
                keys.push(Setting { bare: true, ..Setting::new(key, "{}") });
            }
            Value::Array(items) if items.is_empty() && name == "backing" => {
                keys.push(Setting { bare: true, ..Setting::new(key, "[]") });
            }
            Value::Object(inner) => flatten(&format!("{key}."), inner, keys),
            Value::Array(items) => {
                let items = items.into_iter().enumerate().map(|(at, item)| (at.to_string(), item)).collect();
                flatten(&format!("{key}."), items, keys);
            }
            Value::String(text) => keys.push(Setting::new(key, text)),
            Value::Bool(on) => keys.push(Setting { bare: true, ..Setting::new(key, if on { "on" } else { "off" }) }),
            other => keys.push(Setting { bare: true, ..Setting::new(key, other.to_string()) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opts(text: &str) -> Result<ImageSpec, String> {
        ImageSpec::of_opts(text).map_err(|problem| problem.to_string())
    }

    #[test]
    fn file_names() {
        let spec = ImageSpec::of_file("file:a.raw", Some("raw")).unwrap();
        assert_eq!((spec.file.as_str(), spec.shown.as_str(), spec.format), ("a.raw", "a.raw", Format::Raw));
        assert_eq!(
            ImageSpec::of_file("a", Some("nosuchfmt")).unwrap_err().to_string(),
            "Could not open 'a': Unknown driver 'nosuchfmt'"
        );
        assert_eq!(
            ImageSpec::of_file("nosuch:thing", None).unwrap_err().to_string(),
            "Could not open 'nosuch:thing': Unknown protocol 'nosuch'"
        );
        assert!(ImageSpec::of_file("a.dmg", None).unwrap().is_named_dmg());
        assert!(!ImageSpec::of_file(".dmg", None).unwrap().is_named_dmg());
        assert_eq!(ImageSpec::of_file("a.dmg", Some("raw")).unwrap().format, Format::Raw);
        assert_eq!(ImageSpec::of_file("a", Some("luks")).unwrap().format, Format::Luks);
    }

    #[test]
    fn image_opts() {
        let spec = opts("driver=qcow2,file.driver=file,file.filename=a,,b,read-only=on").unwrap();
        assert_eq!((spec.file.as_str(), spec.format, spec.force_share), ("a,b", Format::Qcow2, false));
        assert!(opts("driver=raw,file.filename=a,file.locking=off").unwrap().force_share);
        assert_eq!(opts("file.filename=q").unwrap().format, Format::Unknown);
        assert_eq!(opts("driver=file,filename=q").unwrap().format, Format::File);
    }

    #[test]
    fn image_opts_that_are_refused() {
        for (text, want) in [
            ("a.raw", "Cannot find device='a.raw' nor node-name='a.raw'"),
            ("driver=raw", "A block device must be specified for \"file\""),
            (
                "driver=raw,file.filename=a,force_size_calc=chs",
                "Block format 'raw' does not support the option 'force_size_calc'",
            ),
            ("driver=vpc,file.filename=a,force_size_calc=x", "Invalid size calculation mode: 'x'"),
            ("driver=foo,file.filename=a", "Unknown driver 'foo'"),
            ("driver=qcow2,file.filename=a,foo=1", "Block format 'qcow2' does not support the option 'foo'"),
            ("driver=raw,filename=a,file.filename=a", "Block format 'raw' does not support the option 'filename'"),
            ("driver=raw,file.filename=a,file.foo=1", "Block protocol 'file' doesn't support the option 'foo'"),
            ("file.filename=a,file.driver=foo", "Unknown driver 'foo'"),
            ("filename=a", "Must specify either driver or file"),
            ("driver=raw,file.filename=", "The 'file' block driver requires a file name"),
            ("driver=raw,file.filename=a,read-only=x", "Parameter 'read-only' expects 'on' or 'off'"),
            ("driver=qcow2,file.filename=a,offset=512", "Block format 'qcow2' does not support the option 'offset'"),
            ("driver=file,filename=a,offset=512", "Block protocol 'file' doesn't support the option 'offset'"),
            ("file.filename=a,size=512", "The option 'size' is not provided without driver=raw"),
            ("driver=qcow2,file.driver=raw,file.size=512", "A block device must be specified for \"file\""),
            ("driver=qcow2,file.driver=raw,file.filename=a", "A block device must be specified for \"file\""),
            ("driver=qcow2,file.driver=raw,file.file=a", "Cannot find device='a' nor node-name='a'"),
            (
                "driver=qcow2,file.driver=raw,file.foo=2k,file.file.filename=a",
                "Block format 'raw' does not support the option 'foo'",
            ),
            ("driver=qcow2,file.driver=raw,file.file.driver=foo", "Unknown driver 'foo'"),
            ("driver=qcow2,file.file.filename=a", "Must specify either driver or file"),
        ] {
            assert_eq!(opts(text).unwrap_err(), format!("Could not open '{text}': {want}"));
        }
    }

    #[test]
    fn parts_of_files() {
        let spec = opts("driver=raw,offset=1M,size=512k,file.filename=r").unwrap();
        assert_eq!(spec.slice, Slice { offset: 1 << 20, size: Some(512 << 10) });
        assert_eq!(
            (spec.file.as_str(), spec.shown.as_str()),
            (
                "r",
                r#"json:{"offset": "1M", "driver": "raw", "size": "512k", "file": {"driver": "file", "filename": "r"}}"#
            )
        );
        let spec =
            opts("driver=qcow2,file.driver=raw,file.offset=1k,file.file.driver=raw,file.file.file.filename=r").unwrap();
        assert_eq!((spec.file.as_str(), spec.format, spec.slice), ("r", Format::Qcow2, Slice::default()));
        let layers: Vec<(&str, u64)> =
            spec.layers.iter().map(|layer| (layer.shown.as_str(), layer.slice.offset)).collect();
        assert_eq!(
            layers,
            [
                (
                    r#"json:{"offset": "1k", "driver": "raw", "file": {"driver": "raw", "file": {"driver": "file", "filename": "r"}}}"#,
                    1024
                ),
                ("r", 0)
            ]
        );
        let name = "json:{'file':{'driver':'raw','offset':1024,'file':{'filename':'r'}}}";
        let spec = ImageSpec::of_file(name, None).unwrap();
        assert_eq!(
            spec.shown_as(Format::Qcow2),
            r#"json:{"driver": "qcow2", "file": {"offset": 1024, "driver": "raw", "file": {"driver": "file", "filename": "r"}}}"#
        );
    }

    #[test]
    fn keys_make_a_json_name() {
        let spec = opts("driver=qcow2,file.filename=q.qcow2,encrypt.key-secret=s").unwrap();
        assert_eq!(spec.key_secret.as_deref(), Some("s"));
        assert_eq!(
            spec.shown,
            r#"json:{"encrypt.key-secret": "s", "driver": "qcow2", "file": {"driver": "file", "filename": "q.qcow2"}}"#
        );
    }

    #[test]
    fn a_header_of_its_own() {
        let spec = opts("driver=luks,file.filename=d,header.driver=file,header.filename=h,key-secret=s").unwrap();
        assert_eq!(spec.header.as_deref(), Some("h"));
        assert_eq!(
            spec.shown,
            r#"json:{"header": {"driver": "file", "filename": "h"}, "driver": "luks", "file": {"driver": "file", "filename": "d"}, "key-secret": "s"}"#
        );
        for (text, want) in [
            ("driver=luks,file.filename=d,header=h", "Cannot find device='h' nor node-name='h'"),
            ("driver=luks,file.filename=d,header.read-only=on", "Must specify either driver or file"),
            (
                "driver=luks,file.filename=d,header.foo=x,header.filename=h",
                "Block protocol 'file' doesn't support the option 'foo'",
            ),
            (
                "driver=luks,file.filename=d,encrypt.key-secret=s",
                "Block format 'luks' does not support the option 'encrypt.key-secret'",
            ),
            (
                "driver=raw,file.filename=d,header.filename=h",
                "Block format 'raw' does not support the option 'header.filename'",
            ),
            (
                "driver=qcow2,file.filename=d,key-secret=s",
                "Block format 'qcow2' does not support the option 'key-secret'",
            ),
        ] {
            assert_eq!(opts(text).unwrap_err(), format!("Could not open '{text}': {want}"));
        }
    }

    #[test]
    fn json_names() {
        let name = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}"#;
        let spec = ImageSpec::of_file(name, None).unwrap();
        assert_eq!((spec.given.as_str(), spec.file.as_str(), spec.format), (name, "base.qcow2", Format::Qcow2));
        assert!(
            ImageSpec::of_file("json:foo", None).unwrap_err().to_string().contains("Could not parse the JSON options")
        );
        assert_eq!(
            ImageSpec::of_file("json:{}", None).unwrap_err().to_string(),
            "Could not open 'json:{}': Must specify either driver or file"
        );
    }
}
