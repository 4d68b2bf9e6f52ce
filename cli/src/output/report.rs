//! `info`: what is told of each image.

use instar_guest_protocol::message::{Bitmap, Format, ImageInfo, LuksInfo, Qcow2Info, Snapshot, VmdkInfo};

use super::human;
use super::node::Node;
use crate::formats;
use crate::layer::Layer;
use crate::open::{FileKind, Stat, join_name};
use crate::problem::printable;
use crate::version::QemuVersion;

/// An image and the file it is in.
#[derive(Debug)]
pub struct Described<'a> {
    /// What the guest found.
    pub info: &'a ImageInfo,
    /// The name under which the image is described, not escaped.
    pub shown: String,
    /// The file's name, not escaped.
    pub file: &'a str,
    /// The file.
    pub stat: Stat,
    /// Bytes of disk that the file itself takes, where the image has further parts.
    pub own_allocated: u64,
    /// The file's length, bytes (devices have one too).
    pub file_len: u64,
    /// Further files that the image consists of.
    pub parts: Vec<Part<'a>>,
    /// The nodes between it and the file, its own child first.
    pub layers: Vec<Below<'a>>,
    /// As this version tells it.
    pub version: QemuVersion,
    /// Added to what qemu-img tells, if asked for.
    pub extra: Vec<(&'static str, Node)>,
}

/// A further file of an image.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Its name, not escaped.
    pub name: &'a str,
    /// The file.
    pub stat: Stat,
}

/// A node between an image and its file.
#[derive(Clone, Copy, Debug)]
pub struct Below<'a> {
    /// The node.
    pub layer: &'a Layer,
    /// Bytes.
    pub len: u64,
}

/// QEMU counts in sectors.
const SECTOR: u64 = 512;

fn whole_sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(SECTOR).unwrap_or(bytes)
}

impl Described<'_> {
    fn format(&self) -> Format {
        self.info.format()
    }

    /// Described as a file, not as an image in a file.
    fn is_file(&self) -> bool {
        self.format() == Format::File
    }

    fn format_name(&self) -> &'static str {
        match (self.is_file(), self.stat.kind) {
            (true, FileKind::Block) => "host_device",
            (true, FileKind::Nbd) => "nbd",
            (true, FileKind::Null(driver)) => driver,
            (true, _) => "file",
            _ => formats::name(self.format()),
        }
    }

    fn protocol(&self) -> &'static str {
        protocol_of(self.stat.kind)
    }

    fn virtual_size(&self) -> u64 {
        whole_sectors(self.info.virtual_size)
    }

    /// Name of the backing file from where the program runs.
    fn full_backing(&self) -> Option<(String, String)> {
        let stored = String::from_utf8_lossy(self.info.backing_file.as_deref()?).into_owned();
        Some((join_name(self.file, &stored), stored))
    }

    /// The format recorded for the backing file; without such a file it means nothing.
    fn backing_format(&self) -> Option<&[u8]> {
        self.info.backing_file.as_ref().and(self.info.backing_format.as_deref())
    }

    /// What of `allocated` bytes is told above these nodes: a server does not tell what its export takes.
    fn disk_size(&self, allocated: u64, layers: &[Below<'_>]) -> Option<u64> {
        let told = self.stat.kind != FileKind::Nbd && layers.iter().all(|below| below.layer.tells_disk_size());
        told.then_some(allocated)
    }

    /// For people.
    pub fn human(&self) -> String {
        let size = |bytes| format!("{} ({bytes} bytes)", human::size(bytes));
        let mut out = String::new();
        let mut line = |key: &str, value: &str| out.push_str(&format!("{key}: {value}\n"));
        line("image", &self.shown);
        line("file format", self.format_name());
        line("virtual size", &size(self.virtual_size()));
        line("disk size", &disk_size_text(self.disk_size(self.stat.allocated, &self.layers)));
        if self.info.encrypted {
            line("encrypted", "yes");
        }
        if let Some(cluster_size) = self.info.cluster_size {
            line("cluster_size", &cluster_size.to_string());
        }
        if self.info.dirty {
            line("cleanly shut down", "no");
        }
        if let Some((full, stored)) = self.full_backing() {
            let actual = match full == stored {
                true => String::new(),
                false => format!(" (actual path: {})", printable(full.as_bytes())),
            };
            line("backing file", &format!("{}{actual}", printable(stored.as_bytes())));
        }
        if let Some(format) = self.backing_format() {
            line("backing file format", &printable(format));
        }
        if !self.info.snapshots.is_empty() {
            out.push_str("Snapshot list:\n");
            out.push_str(&human::snapshots(&self.info.snapshots, self.version, &local_time));
        }
        if let Some((_, members)) = self.format_specific() {
            out.push_str("Format specific information:\n");
            out.push_str(&human::tree(&members, 1));
        }
        if !self.is_file() && self.version.shows_child_nodes() {
            let file = |depth: usize, node: &str, name: &str, protocol: &str, len: u64, disk_size: &str| {
                let (name, len) = (printable(name.as_bytes()), size(whole_sectors(len)));
                let members = [("filename", name.as_str()), ("protocol type", protocol), ("file length", &len)];
                child_lines(depth, node, &members, disk_size)
            };
            for (number, part) in self.parts.iter().enumerate().rev() {
                let (node, disk_size) = (self.part_node(number), human::size(part.stat.allocated));
                out.push_str(&file(0, &node, part.name, protocol_of(part.stat.kind), part.stat.len, &disk_size));
            }
            let disk_size = |depth: usize| {
                disk_size_text(self.disk_size(self.own_allocated, self.layers.get(depth..).unwrap_or_default()))
            };
            let mut node = "file".to_owned();
            for (depth, Below { layer, len }) in self.layers.iter().enumerate() {
                let (name, len) = (printable(layer.shown.as_bytes()), size(*len));
                let members = [("image", name.as_str()), ("file format", layer.driver), ("virtual size", &len)];
                out.push_str(&child_lines(depth, &node, &members, &disk_size(depth)));
                node = format!("{node}/{}", layer.child);
            }
            let disk_size = disk_size(self.layers.len());
            out.push_str(&file(self.layers.len(), &node, self.file, self.protocol(), self.file_len, &disk_size));
        }
        for (key, value) in &self.extra {
            out.push_str(&human::tree(&[(key, value.clone())], 0));
        }
        out
    }

    /// As JSON.
    pub fn node(&self) -> Node {
        let mut members = Vec::new();
        let mut put = |key, value| members.push((key, value));
        if self.version.shows_child_nodes() {
            put("children", Node::List(if self.is_file() { Vec::new() } else { self.children() }));
        }
        if let Some(format) = self.backing_format() {
            put("backing-filename-format", Node::bytes(format));
        }
        if !self.info.snapshots.is_empty() {
            put("snapshots", Node::List(self.info.snapshots.iter().map(snapshot).collect()));
        }
        put("virtual-size", Node::Int(self.virtual_size()));
        put("filename", Node::text(self.shown.as_str()));
        if let Some(cluster_size) = self.info.cluster_size {
            put("cluster-size", Node::Int(cluster_size));
        }
        put("format", Node::text(self.format_name()));
        if let Some(bytes) = self.disk_size(self.stat.allocated, &self.layers) {
            put("actual-size", Node::Int(bytes));
        }
        if self.is_file() && self.stat.kind.tells_details() && self.version.shows_child_nodes() {
            put("format-specific", file_specific());
        } else if let Some((kind, data)) = self.format_specific() {
            put("format-specific", Node::Dict(vec![("type", Node::text(kind)), ("data", Node::Dict(data))]));
        }
        if let Some((full, stored)) = self.full_backing() {
            put("full-backing-filename", Node::Text(full));
            put("backing-filename", Node::Text(stored));
        }
        if self.info.encrypted {
            put("encrypted", Node::Bool(true));
        }
        // The raw driver passes the question on, and NBD has no answer.
        let raw = matches!(self.format(), Format::Raw | Format::File);
        let unanswered = matches!(self.format(), Format::Parallels | Format::Dmg | Format::Bochs | Format::Cloop);
        if !unanswered && (!raw || self.stat.kind.tells_details()) {
            put("dirty-flag", Node::Bool(self.info.dirty));
        }
        members.extend(self.extra.iter().cloned());
        Node::Dict(members)
    }

    /// The name of the node of a further file.
    fn part_node(&self, number: usize) -> String {
        if self.info.luks.is_some() { "header".to_owned() } else { format!("extents.{number}") }
    }

    fn children(&self) -> Vec<Node> {
        let parts = self.parts.iter().enumerate().rev();
        let parts = parts.map(|(number, part)| child(&self.part_node(number), part.name, part.stat, part.stat.len));
        let stat = Stat { allocated: self.own_allocated, ..self.stat };
        // What each node is to the one above it.
        let role = |depth: usize| match depth {
            0 => "file",
            depth => self.layers.get(depth - 1).map_or("file", |above| above.layer.child),
        };
        let mut below = child(role(self.layers.len()), self.file, stat, self.file_len);
        for (depth, Below { layer, len }) in self.layers.iter().enumerate().rev() {
            let disk_size = self.disk_size(self.own_allocated, self.layers.get(depth..).unwrap_or_default());
            below = node_over(role(depth), [&layer.shown, layer.driver], *len, stat.kind, disk_size, Some(below));
        }
        parts.chain([below]).collect()
    }

    /// A VMDK image in QEMU's words.
    fn vmdk(&self, info: &VmdkInfo) -> Vec<(&'static str, Node)> {
        let mut names = self.parts.iter().map(|part| part.name);
        let extents = info.extents.iter().map(|extent| {
            let mut members = Vec::new();
            if extent.compressed {
                members.push(("compressed", Node::Bool(true)));
            }
            let name = match extent.device {
                Some(device) if device == self.info.device => {
                    self.layers.first().map_or(self.file, |below| &below.layer.shown)
                }
                Some(_) => names.next().unwrap_or_default(),
                None => "",
            };
            members.extend([("virtual-size", Node::Int(extent.virtual_size)), ("filename", Node::text(name))]);
            if let Some(grain) = extent.cluster_size {
                members.push(("cluster-size", Node::Int(grain)));
            }
            members.push(("format", Node::bytes(&extent.kind)));
            Node::Dict(members)
        });
        vec![
            ("cid", Node::Int(info.cid.into())),
            ("parent-cid", Node::Int(info.parent_cid.into())),
            ("create-type", Node::bytes(&info.create_type)),
            ("extents", Node::List(extents.collect())),
        ]
    }

    fn format_specific(&self) -> Option<(&'static str, Vec<(&'static str, Node)>)> {
        if let Some(info) = &self.info.vmdk {
            return Some(("vmdk", self.vmdk(info)));
        }
        match (&self.info.qcow2, &self.info.luks) {
            (Some(info), _) => Some(("qcow2", qcow2(info, self.version))),
            (None, Some(header)) => Some(("luks", luks(header, self.version, false))),
            (None, None) => None,
        }
    }
}

fn protocol_of(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Block => "host_device",
        FileKind::Nbd => "nbd",
        FileKind::Null(driver) => driver,
        _ => "file",
    }
}

/// A child node for people, in so many others.
fn child_lines(depth: usize, node: &str, members: &[(&str, &str)], disk_size: &str) -> String {
    let indent = "    ".repeat(depth);
    let mut out = format!("{indent}Child node '/{node}':\n");
    for (key, value) in members.iter().chain(&[("disk size", disk_size)]) {
        out.push_str(&format!("{indent}    {key}: {value}\n"));
    }
    out
}

/// A file, as a child of an image.
fn child(node: &str, name: &str, stat: Stat, len: u64) -> Node {
    let disk_size = (stat.kind != FileKind::Nbd).then_some(stat.allocated);
    node_over(node, [name, protocol_of(stat.kind)], whole_sectors(len), stat.kind, disk_size, None)
}

fn disk_size_text(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unavailable".to_owned(), human::size)
}

/// A child of an image: a file, or what lies over one.
fn node_over(
    node: &str,
    [name, format]: [&str; 2],
    len: u64,
    kind: FileKind,
    disk_size: Option<u64>,
    below: Option<Node>,
) -> Node {
    let is_file = below.is_none();
    let mut info = vec![
        ("children", Node::List(below.into_iter().collect())),
        ("virtual-size", Node::Int(len)),
        ("filename", Node::text(name)),
        ("format", Node::text(format)),
    ];
    if let Some(bytes) = disk_size {
        info.push(("actual-size", Node::Int(bytes)));
    }
    if is_file && kind == FileKind::Regular {
        info.push(("format-specific", file_specific()));
    }
    if kind.tells_details() {
        info.push(("dirty-flag", Node::Bool(false)));
    }
    Node::Dict(vec![("name", Node::text(node)), ("info", Node::Dict(info))])
}

fn file_specific() -> Node {
    Node::Dict(vec![("type", Node::text("file")), ("data", Node::Dict(Vec::new()))])
}

fn snapshot(snapshot: &Snapshot) -> Node {
    const SECOND: u64 = 1_000_000_000;
    let mut members = Vec::new();
    if let Some(icount) = snapshot.icount {
        members.push(("icount", Node::Int(icount)));
    }
    members.extend([
        ("vm-clock-nsec", Node::Int(snapshot.vm_clock_nsec % SECOND)),
        ("name", Node::bytes(&snapshot.name)),
        ("date-sec", Node::Int(snapshot.date_sec.into())),
        ("date-nsec", Node::Int(snapshot.date_nsec.into())),
        ("vm-clock-sec", Node::Int(snapshot.vm_clock_nsec / SECOND)),
        ("id", Node::bytes(&snapshot.id)),
        ("vm-state-size", Node::Int(snapshot.vm_state_size)),
    ]);
    Node::Dict(members)
}

fn qcow2(info: &Qcow2Info, version: QemuVersion) -> Vec<(&'static str, Node)> {
    let old = info.version < 3;
    let mut members = vec![
        ("compat", Node::text(if old { "0.10" } else { "1.1" })),
        ("compression-type", Node::text(if info.zstd { "zstd" } else { "zlib" })),
    ];
    if !old {
        members.push(("lazy-refcounts", Node::Bool(info.lazy_refcounts)));
        if !info.bitmaps.is_empty() {
            members.push(("bitmaps", Node::List(info.bitmaps.iter().map(bitmap).collect())));
        }
    }
    members.push(("refcount-bits", Node::Int(info.refcount_bits.into())));
    if let Some(header) = &info.luks {
        members.push(("encrypt", Node::Dict(luks(header, version, true))));
    } else if info.aes {
        members.push(("encrypt", Node::Dict(vec![("format", Node::text("aes"))])));
    }
    if !old {
        if let Some(name) = &info.data_file {
            members.push(("data-file", Node::bytes(name)));
        }
        if info.has_data_file {
            members.push(("data-file-raw", Node::Bool(info.data_file_raw)));
        }
        members.push(("corrupt", Node::Bool(info.corrupt)));
        members.push(("extended-l2", Node::Bool(info.extended_l2)));
    }
    members
}

fn bitmap(bitmap: &Bitmap) -> Node {
    let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
    let flags = flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| Node::text(name)).collect();
    Node::Dict(vec![
        ("flags", Node::List(flags)),
        ("name", Node::bytes(&bitmap.name)),
        ("granularity", Node::Int(bitmap.granularity)),
    ])
}

/// A LUKS header, `inside` a qcow2 image or by itself, in QEMU's words for ciphers and modes.
fn luks(header: &LuksInfo, version: QemuVersion, inside: bool) -> Vec<(&'static str, Node)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mode = text(&header.cipher_mode);
    // `cbc-essiv:sha256`: mode, generator of initial vectors, and its hash.
    let (mode, ivgen) = mode.split_once('-').unwrap_or((&mode, ""));
    let (ivgen, ivgen_hash) = ivgen.split_once(':').map_or((ivgen, None), |(alg, hash)| (alg, Some(hash)));
    // A key for XTS is two keys.
    let key_bytes = if mode == "xts" { header.key_bytes / 2 } else { header.key_bytes };
    let mut members = vec![("ivgen-alg", Node::text(ivgen))];
    let slots = header.slots.iter().map(|slot| {
        let mut members = vec![("active", Node::Bool(slot.active))];
        if slot.active {
            members.push(("iters", Node::Int(slot.iterations.into())));
        }
        members.push(("key-offset", Node::Int(slot.key_offset)));
        if slot.active {
            members.push(("stripes", Node::Int(slot.stripes.into())));
        }
        Node::Dict(members)
    });
    if version.shows_detached_header() {
        members.push(("detached-header", Node::Bool(header.header_device.is_some())));
    }
    members.extend([
        ("hash-alg", Node::text(text(&header.hash))),
        ("cipher-alg", Node::text(format!("{}-{}", text(&header.cipher_name), u64::from(key_bytes) * 8))),
        ("uuid", Node::bytes(&header.uuid)),
    ]);
    // QEMU's hash of the names decides about the order.
    if let Some(hash) = ivgen_hash {
        members.push(("ivgen-hash-alg", Node::text(hash)));
    }
    if inside {
        members.push(("format", Node::text("luks")));
    }
    members.extend([
        ("cipher-mode", Node::text(mode)),
        ("slots", Node::List(slots.collect())),
        ("payload-offset", Node::Int(header.payload_offset)),
        ("master-key-iters", Node::Int(header.digest_iterations.into())),
    ]);
    members
}

/// A date and time in the time zone of the user.
pub fn local_time(seconds: u32) -> String {
    let Ok(stamp) = jiff::Timestamp::from_second(seconds.into()) else { return String::new() };
    stamp.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::json;

    const STAT: Stat = Stat { kind: FileKind::Regular, identity: (0, 0), len: 1000, allocated: 4096 };

    fn described<'a>(info: &'a ImageInfo, file: &'a str) -> Described<'a> {
        Described {
            info,
            shown: file.to_owned(),
            layers: Vec::new(),
            file,
            stat: STAT,
            own_allocated: STAT.allocated,
            file_len: STAT.len,
            parts: Vec::new(),
            version: QemuVersion::default(),
            extra: Vec::new(),
        }
    }

    #[test]
    fn raw() {
        let info = ImageInfo { format: Format::Raw.into(), virtual_size: 1000, ..ImageInfo::default() };
        assert_eq!(
            described(&info, "a").human(),
            "image: a\nfile format: raw\nvirtual size: 1 KiB (1024 bytes)\ndisk size: 4 KiB\nChild node '/file':\n    \
             filename: a\n    protocol type: file\n    file length: 1 KiB (1024 bytes)\n    disk size: 4 KiB\n"
        );
    }

    #[test]
    fn file() {
        let info = ImageInfo { format: Format::File.into(), ..ImageInfo::default() };
        assert!(!described(&info, "a").human().contains("Child node"));
        assert!(json::print(&described(&info, "a").node()).starts_with("{\n    \"children\": [\n    ],\n"));
    }

    #[test]
    fn backing_names_are_joined_and_escaped() {
        let info = ImageInfo {
            format: Format::Qcow2.into(),
            backing_file: Some(b"../b\x1b".to_vec()),
            backing_format: Some(b"qcow2".to_vec()),
            ..ImageInfo::default()
        };
        assert!(
            described(&info, "sub/a")
                .human()
                .contains("backing file: ../b\\x1b (actual path: sub/../b\\x1b)\nbacking file format: qcow2\n")
        );
        let json = json::print(&described(&info, "sub/a").node());
        assert!(
            json.contains("\"full-backing-filename\": \"sub/../b\\u001B\",\n    \"backing-filename\": \"../b\\u001B\"")
        );
    }

    #[test]
    fn luks_modes() {
        let header = |mode: &str, key_bytes| LuksInfo {
            cipher_name: b"aes".to_vec(),
            cipher_mode: mode.as_bytes().to_vec(),
            key_bytes,
            ..LuksInfo::default()
        };
        let text = human::tree(&luks(&header("xts-plain64", 64), QemuVersion::default(), true), 0);
        assert!(text.contains("ivgen alg: plain64\ndetached header: false\n"));
        assert!(text.contains("cipher alg: aes-256\n") && text.contains("cipher mode: xts\n"));
        let text = human::tree(&luks(&header("cbc-essiv:sha256", 32), QemuVersion::default(), true), 0);
        assert!(
            !human::tree(&luks(&header("xts-plain64", 64), QemuVersion::parse("8.2").unwrap(), true), 0)
                .contains("detached")
        );
        assert!(
            text.contains("uuid: \nivgen hash alg: sha256\nformat: luks\n") && text.contains("cipher alg: aes-256\n")
        );
    }
}
