//! QEMU's driver `blkdebug`: a node that the operator puts between an image and its file, to let requests fail on purpose.
//!
//! Its rules come from a file of the operator's, from options, or both. Requests fail in the monitor process, so that a guest sees what it
//! would see of a broken disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};

use instar_vmm::{FaultAction, FaultEvent, FaultKinds, FaultRule, MAX_FAULT_RULES};

use crate::problem::{Problem, os_text};
use crate::qdict;

/// QEMU counts in sectors.
const SECTOR: u64 = 512;
/// The largest file of rules, bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// Events that are met here, where requests are all that is seen.
const EVENTS: [(&str, FaultEvent); 3] =
    [("none", FaultEvent::Start), ("read_aio", FaultEvent::Read), ("write_aio", FaultEvent::Write)];
/// Those that only QEMU's own drivers tell of.
const OTHER_EVENTS: &[&str] = &[
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_backing_aio",
    "read_compressed",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
];
const KINDS: [(&str, FaultKinds); 5] = [
    ("read", FaultKinds::READ),
    ("write", FaultKinds::WRITE),
    ("write-zeroes", FaultKinds::WRITE_ZEROES),
    ("discard", FaultKinds::DISCARD),
    ("flush", FaultKinds::FLUSH),
];
/// Limits of requests, which must be multiples of the first. Requests are made here as they come.
const LIMITS: [&str; 6] = ["align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"];

/// The node, as given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugNode {
    config: Option<String>,
    /// Other options: name, value, and whether that was a number or truth value of JSON.
    options: Vec<(String, String, bool)>,
}

/// A section of rules: its kind, and what it says.
type Section = (String, Vec<(String, String)>);

impl DebugNode {
    /// Splits `blkdebug:CONFIG:NAME` behind the first colon: the node, and the name of what lies below it.
    ///
    /// # Errors
    /// There is no second colon.
    pub fn of_name(name: &str) -> Result<(Self, &str), Problem> {
        let (config, below) =
            name.split_once(':').ok_or_else(|| Problem::new("blkdebug requires both config file and image path"))?;
        let config = Some(config.to_owned()).filter(|config| !config.is_empty());
        Ok((Self { config, options: Vec::new() }, below))
    }

    /// Takes note of an option. `bare`: a number or truth value of JSON.
    pub fn take(&mut self, key: &str, value: &str, bare: bool) {
        match key {
            "config" => self.config = Some(value.to_owned()),
            _ => self.options.push((key.to_owned(), value.to_owned(), bare)),
        }
    }

    /// Its rules. Offsets count from where the node begins.
    ///
    /// # Errors
    /// The file can't be read, or makes no sense; an option is unknown, or has a wrong value.
    pub fn rules(&self) -> Result<Vec<FaultRule>, Problem> {
        let mut sections = match &self.config {
            Some(path) => parse_config(&read_config(path)?)?,
            None => Vec::new(),
        };
        let from_options = self.sections()?;
        sections.extend(from_options);
        // QEMU takes all rules about errors first.
        sections.sort_by_key(|(kind, _)| kind != INJECT);
        if sections.len() > MAX_FAULT_RULES {
            return Err(Problem::new(format!("More than {MAX_FAULT_RULES} rules")));
        }
        let rules = sections.iter().map(|(kind, options)| rule(kind, options)).collect::<Result<_, _>>()?;
        self.check_limits()?;
        Ok(rules)
    }

    /// Options about rules, by their numbers.
    fn sections(&self) -> Result<Vec<Section>, Problem> {
        let mut numbered: BTreeMap<(&str, u32), Vec<(String, String)>> = BTreeMap::new();
        for (key, value, _) in &self.options {
            let mut parts = key.splitn(3, '.');
            let (kind, number, option) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
            let number = number.and_then(|number| number.parse::<u32>().ok());
            match (KNOWN.iter().find(|(known, _)| *known == kind), number, option) {
                (Some((kind, known)), Some(number), Some(option)) => {
                    if !known.contains(&option) {
                        return Err(Problem::new(format!("[{kind}] section doesn't support the option '{option}'")));
                    }
                    numbered.entry((kind, number)).or_default().push((option.to_owned(), value.clone()));
                }
                _ if LIMITS.contains(&key.as_str()) => {}
                _ if ["take-child-perms", "unshare-child-perms"].contains(&kind) => {
                    return Err(Problem::new(format!("The option '{kind}' is not provided by this version")));
                }
                _ => {
                    return Err(Problem::new(format!("Block protocol 'blkdebug' doesn't support the option '{key}'")));
                }
            }
        }
        Ok(numbered.into_iter().map(|((kind, _), options)| (kind.to_owned(), options)).collect())
    }

    fn check_limits(&self) -> Result<(), Problem> {
        let mut align = 1;
        for name in LIMITS {
            let Some((_, text, _)) = self.options.iter().rev().find(|(key, ..)| key == name) else { continue };
            let value = crate::options::parse_size(name, text)?;
            let fits = match name {
                "align" => value == 0 || value.is_power_of_two(),
                _ => value.is_multiple_of(align),
            };
            if !fits || value >= i32::MAX as u64 {
                return Err(Problem::new(format!("Cannot meet constraints with {name} {text}")));
            }
            if name == "align" {
                align = value.max(1);
            }
        }
        Ok(())
    }

    /// The file name that says all of it, over a node of this name.
    pub fn name(&self, below: &str) -> Option<String> {
        self.options.is_empty().then(|| format!("blkdebug:{}:{below}", self.config.as_deref().unwrap_or_default()))
    }

    /// It, over a node, in JSON.
    pub fn json(&self, below: &str) -> String {
        let mut members = vec![("image".to_owned(), below.to_owned()), qdict::text("driver", "blkdebug")];
        members.extend(self.config.iter().map(|config| qdict::text("config", config)));
        members.extend(self.options.iter().map(|(key, value, bare)| match bare {
            true => (key.clone(), value.clone()),
            false => qdict::text(key, value),
        }));
        qdict::object(members)
    }
}

const INJECT: &str = "inject-error";
const SET_STATE: &str = "set-state";
/// Kinds of sections and what they may say.
const KNOWN: [(&str, &[&str]); 2] = [
    (INJECT, &["event", "state", "iotype", "errno", "sector", "once", "immediately"]),
    (SET_STATE, &["event", "state", "new_state"]),
];

fn read_config(path: &str) -> Result<String, Problem> {
    let file = File::open(path).map_err(|error| {
        let code = error.raw_os_error().unwrap_or(0);
        Problem::new(format!("Could not read blkdebug config file: {}", os_text(code)))
    })?;
    let mut text = String::new();
    match file.take(MAX_CONFIG + 1).read_to_string(&mut text) {
        Ok(len) if len as u64 > MAX_CONFIG => Err(Problem::new("Cannot read config file: File too large")),
        Ok(_) => Ok(text),
        Err(error) if error.kind() == ErrorKind::InvalidData => {
            Err(Problem::new("Cannot read config file: it is no text"))
        }
        Err(error) => {
            Err(Problem::new(format!("Cannot read config file: {}", os_text(error.raw_os_error().unwrap_or(0)))))
        }
    }
}

/// Reads sections as QEMU writes them: `[kind]` or `[kind "id"]`, and then `option = "value"`.
fn parse_config(text: &str) -> Result<Vec<Section>, Problem> {
    let mut sections: Vec<Section> = Vec::new();
    let mut ids: Vec<(&str, &str)> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(head) = line.strip_prefix('[') {
            let head = head.strip_suffix(']').unwrap_or(head);
            let (kind, id) = head.split_once(' ').map_or((head, None), |(kind, id)| (kind, Some(id.trim_matches('"'))));
            let Some((kind, _)) = KNOWN.iter().find(|(known, _)| *known == kind) else {
                return Err(Problem::new(format!("There is no option group '{kind}'")));
            };
            if let Some(id) = id {
                if ids.contains(&(kind, id)) {
                    return Err(Problem::new(format!("Duplicate ID '{id}' for {kind}")));
                }
                ids.push((kind, id));
            }
            sections.push(((*kind).to_owned(), Vec::new()));
            continue;
        }
        let Some((kind, options)) = sections.last_mut() else { return Err(Problem::new("no group defined")) };
        // What is not in quotes counts for nothing.
        let (option, value) = line.split_once(' ').unwrap_or((line, ""));
        let value = value.trim_start().strip_prefix('=').map_or("", str::trim_start);
        let value = value.strip_prefix('"').and_then(|value| value.split('"').next()).unwrap_or_default();
        if !KNOWN.iter().any(|(known, names)| known == kind && names.contains(&option)) {
            return Err(Problem::new(format!("Invalid parameter '{option}'")));
        }
        options.push((option.to_owned(), value.to_owned()));
    }
    Ok(sections)
}

fn rule(kind: &str, options: &[(String, String)]) -> Result<FaultRule, Problem> {
    let option = |name: &str| options.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let number = |name: &str, default: u64| option(name).map_or(Ok(default), |text| parse_number(name, text));
    let event = option("event").ok_or_else(|| Problem::new("Missing event name for rule"))?;
    let plain = event.replace('.', "_");
    let event = match EVENTS.iter().find(|(name, _)| *name == event) {
        Some((_, event)) => *event,
        None if OTHER_EVENTS.contains(&plain.as_str()) => {
            return Err(Problem::new(format!("The event '{event}' of blkdebug is not provided by this version")));
        }
        None => return Err(invalid_value(event)),
    };
    let state = number("state", 0)? as u32;
    if kind == SET_STATE {
        return Ok(FaultRule { event, state, action: FaultAction::SetState(number("new_state", 0)? as u32) });
    }
    let kinds = match option("iotype") {
        None => FaultKinds::all(),
        // What the system can't tell of a file is taken for data here.
        Some("block-status") => {
            return Err(Problem::new("The iotype 'block-status' of blkdebug is not provided by this version"));
        }
        Some(text) => KINDS.iter().find(|(name, _)| *name == text).ok_or_else(|| invalid_value(text))?.1,
    };
    let switch = |name: &str| option(name).map_or(Ok(false), |text| crate::image_opts::switch(name, text));
    let once = switch("once")?;
    switch("immediately")?;
    let sector = number("sector", u64::MAX)?;
    let action = FaultAction::Fail {
        kinds,
        errno: number("errno", 5)? as i32,
        offset: (sector != u64::MAX).then(|| sector.saturating_mul(SECTOR)),
        once,
    };
    Ok(FaultRule { event, state, action })
}

/// A number as QEMU reads it: decimal, octal or hexadecimal; a negative one wraps.
fn parse_number(name: &str, text: &str) -> Result<u64, Problem> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let (digits, radix) = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    let number = u64::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'));
    let number = number.ok_or_else(|| Problem::new(format!("Parameter '{name}' expects a number")))?;
    Ok(if negative { number.wrapping_neg() } else { number })
}

fn invalid_value(value: &str) -> Problem {
    Problem::new(format!("invalid parameter value: {value}"))
}
