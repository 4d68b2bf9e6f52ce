//! The files of a run: which device is which file, who named it, and what went wrong with the ones that were asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{FileRole, Format, OpenFile};

use crate::confine::Confinement;
use crate::image_opts::{Below, ImageSpec};
use crate::lock::Purpose;
use crate::open::{Opened, Stat, join_name, open_to_read, open_to_write};
use crate::problem::{Problem, printable};
use crate::sandbox::{Granted, Machine};

/// Who named a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The operator.
    Operator,
    /// The image on that device, as its backing file.
    Backing(u32),
    /// The image on that device, as its external data file.
    Data(u32),
    /// The image on that device, as a part of it.
    Extent(u32),
}

/// A granted file.
#[derive(Debug)]
pub struct Record {
    /// Its name as QEMU composes it: not escaped if an image gave it.
    pub name: String,
    /// The open file.
    pub file: Opened,
    /// Who named it.
    pub origin: Origin,
    /// Its directory, free of symbolic links.
    home: PathBuf,
    /// Images from the one that the operator named to this one.
    depth: usize,
    /// The locks could not be taken, which matters only if the image is not raw.
    pub lock_problem: Option<Problem>,
    /// What the operator named to hold its data.
    data_file: Option<NamedData>,
    /// The file with its LUKS header.
    header: Option<Granted>,
    /// What the operator says of the image below it.
    below: Below,
    /// What the guest called that image when it asked for it.
    recorded: Option<String>,
    /// The node right below it, if that is not its file.
    child: Option<String>,
    /// It is known to be raw.
    is_raw: bool,
}

/// Where a file has its place among the others.
struct Place {
    name: String,
    origin: Origin,
    home: PathBuf,
    depth: usize,
}

impl Place {
    /// The name, fit for a message.
    fn shown(&self) -> String {
        shown(&self.name, self.origin)
    }
}

fn shown(name: &str, origin: Origin) -> String {
    match origin {
        Origin::Operator => name.to_owned(),
        _ => printable(name.as_bytes()),
    }
}

/// How a file is opened, and whether it is written.
#[derive(Clone, Copy)]
struct Use {
    access: Access,
    writable: bool,
}

/// An external data file that the operator named.
#[derive(Debug)]
struct NamedData {
    name: String,
    /// It is written, as the image is.
    writable: bool,
    /// It is open.
    granted: Option<Granted>,
}

/// The image below another, by the operator's will.
enum Lower {
    /// It is this one.
    Named(ImageSpec),
    /// It is the one that is recorded; this is said of it.
    Recorded(ImageSpec),
}

impl Lower {
    /// As it is written: by nobody else.
    fn locked(mut self) -> Self {
        let (Self::Named(spec) | Self::Recorded(spec)) = &mut self;
        spec.force_share = false;
        self
    }
}

impl Record {
    /// What lies below, as which the image records `name`: the operator's word goes before the guest's.
    fn lower(&self, wanted: &OpenFile, name: &str) -> Result<Lower, Problem> {
        match &self.below {
            Below::Recorded => Ok(Lower::Recorded(ImageSpec::recorded(name, wanted.format()))),
            Below::Hidden { .. } => Err(Problem::new("The sandbox asked for a backing image where there is none")),
            Below::Given(given) if given.is_named() || wanted.name.is_empty() => {
                given.alone(wanted.format()).map(Lower::Named)
            }
            Below::Given(given) => given.over(name, wanted.format()).map(Lower::Recorded),
        }
    }

    /// QEMU's name for the image below, if the operator says which one that is.
    pub fn named_below(&self) -> Option<String> {
        match &self.below {
            Below::Given(given) if given.is_named() => {
                given.alone(Format::Unknown).ok().map(|spec| spec.shown_as(spec.format))
            }
            _ => None,
        }
    }

    /// As which image the one below is recorded, once it was asked for.
    pub fn recorded(&self) -> Option<&str> {
        self.recorded.as_deref()
    }

    /// A file of which nothing is said but its place.
    fn plain(file: Opened, Place { name, origin, home, depth }: Place) -> Self {
        Self {
            name,
            file,
            origin,
            home,
            depth,
            lock_problem: None,
            data_file: None,
            header: None,
            below: Below::Recorded,
            recorded: None,
            child: None,
            is_raw: false,
        }
    }

    /// The name, fit for a message.
    pub fn shown(&self) -> String {
        shown(&self.name, self.origin)
    }

    /// Where the image says that its data lie: QEMU's name for the node, and where that begins for what the guest sees.
    pub fn node_of_data(&self) -> (&str, u64) {
        match &self.child {
            _ if self.is_raw => (&self.name, self.file.base()),
            Some(child) => (child, 0),
            None => (&self.name, 0),
        }
    }
}

/// A file that was asked for and not granted.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Who asked: the device of the image that names it, none for targets.
    pub referrer: Option<u32>,
    /// As what.
    pub role: FileRole,
    /// What messages call the file.
    pub shown: String,
    /// Why not.
    pub problem: Problem,
}

/// How files are opened.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// What for.
    pub purpose: Purpose,
    /// No locks.
    pub force_share: bool,
}

/// The files of a run.
#[derive(Debug, Default)]
pub struct Files {
    records: BTreeMap<u32, Record>,
    confinement: Confinement,
    refusal: Option<Refusal>,
}

impl Files {
    /// No files yet.
    pub fn new(confinement: Confinement) -> Self {
        Self { confinement, ..Self::default() }
    }

    /// The file of a device.
    pub fn get(&self, device: u32) -> Option<&Record> {
        self.records.get(&device)
    }

    /// The image on `device` is looked at alone: what the operator says of the one below counts for nothing.
    pub fn forget_below(&mut self, device: u32) {
        if let Some(record) = self.records.get_mut(&device) {
            record.below = Below::Recorded;
        }
    }

    /// The last file that was refused.
    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_ref()
    }

    /// Remembers why a file was refused.
    pub fn refuse(&mut self, refusal: Refusal) {
        self.refusal = Some(refusal);
    }

    /// Makes sure that a file to be written is none of those that are read, under whatever name and lock.
    ///
    /// # Errors
    /// It is one of them.
    pub fn check_target(&self, target: &Stat) -> Result<(), Problem> {
        match self.records.values().any(|record| record.file.stat.identity == target.identity) {
            true => Err(Problem::new("The target is one of the files to be read")),
            false => Ok(()),
        }
    }

    /// Would a file be opened that the image on `device` names?
    ///
    /// # Errors
    /// Why not.
    pub fn judge(&self, device: u32, name: &[u8], shown: &str) -> Result<(), Problem> {
        match self.records.get(&device) {
            Some(record) => self.confinement.open(&record.home, name, shown).map(|_| ()),
            None => Err(Problem::new("No such image")),
        }
    }

    /// Opens and grants an image that the operator named.
    ///
    /// # Errors
    /// The message, without `Could not open 'F'` around it.
    pub fn open_named(&mut self, machine: &mut dyn Machine, spec: &ImageSpec, access: Access) -> Result<u32, Problem> {
        Ok(self.grant_image(machine, spec, access)?.device)
    }

    /// The same, as the guest is told of it.
    ///
    /// # Errors
    /// As [`open_named`](Self::open_named).
    pub fn grant_image(
        &mut self,
        machine: &mut dyn Machine,
        spec: &ImageSpec,
        access: Access,
    ) -> Result<Granted, Problem> {
        let file = Opened::of_spec(spec, false)?;
        self.grant_named(machine, spec, file, (Origin::Operator, 1), Use { access, writable: false })
    }

    /// Opens and grants an image that the operator named, to be changed in place.
    ///
    /// # Errors
    /// The message, without `Could not open 'F'` around it.
    pub fn open_to_change(&mut self, machine: &mut dyn Machine, spec: &ImageSpec) -> Result<u32, Problem> {
        if spec.force_share {
            return Err(Problem::new("force-share=on can only be used with read-only images"));
        }
        if spec.read_only {
            return Err(Problem::new("Block node is read-only"));
        }
        let file = Opened::of_spec(spec, true)?;
        let access = Access { purpose: Purpose::Write, force_share: false };
        Ok(self.grant_named(machine, spec, file, (Origin::Operator, 1), Use { access, writable: true })?.device)
    }

    /// Grants a file that the operator named.
    fn grant_named(
        &mut self,
        machine: &mut dyn Machine,
        spec: &ImageSpec,
        file: Opened,
        (origin, depth): (Origin, usize),
        how: Use,
    ) -> Result<Granted, Problem> {
        let home = match spec.nbd.is_some() || spec.null.is_some() {
            // What lies there names files beneath the allowed directories, if any.
            true => PathBuf::from("/"),
            false => self.confinement.allow_home_of(Path::new(&spec.file))?,
        };
        let place = Place { name: spec.file.clone(), origin, home, depth };
        self.keep(machine, spec, file, place, how)
    }

    /// Locks and grants an open file, with what `spec` says of it beside its name.
    fn keep(
        &mut self,
        machine: &mut dyn Machine,
        spec: &ImageSpec,
        mut file: Opened,
        place: Place,
        how: Use,
    ) -> Result<Granted, Problem> {
        let Use { access, writable } = how;
        let shown = place.shown();
        let lock_problem = match access.force_share || spec.force_share {
            true => None,
            false => take_locks(&mut file, access.purpose, spec.format, &shown)?,
        };
        let granted = file.grant(machine, writable)?;
        file.note_len(&granted);
        let header = match &spec.header {
            Some(name) => Some(self.grant_header(machine, name, (access, spec.force_share), writable)?),
            None => None,
        };
        let data_file = spec.data_file.clone().map(|name| NamedData { name, writable, granted: None });
        let record = Record {
            lock_problem,
            data_file,
            header,
            below: spec.below.clone(),
            child: spec.layers.first().map(|layer| layer.shown.clone()),
            is_raw: spec.format == Format::Raw,
            ..Record::plain(file, place)
        };
        self.records.insert(granted.device, record);
        Ok(granted)
    }

    /// Opens and grants the file of a LUKS header, which the operator named.
    fn grant_header(
        &mut self,
        machine: &mut dyn Machine,
        name: &str,
        (access, force_share): (Access, bool),
        writable: bool,
    ) -> Result<Granted, Problem> {
        let path = Path::new(name);
        let mut file = if writable { open_to_write(path)? } else { open_to_read(path)? };
        let lock_problem = match access.force_share || force_share {
            true => None,
            false => take_locks(&mut file, access.purpose, Format::Luks, name)?,
        };
        let home = self.confinement.allow_home_of(path)?;
        let granted = file.grant(machine, writable)?;
        file.note_len(&granted);
        let place = Place { name: name.to_owned(), origin: Origin::Operator, home, depth: 1 };
        self.records.insert(granted.device, Record { lock_problem, ..Record::plain(file, place) });
        Ok(granted)
    }

    /// Opens and grants what an image names, within the confinement; remembers why if it doesn't.
    pub fn open_embedded(&mut self, machine: &mut dyn Machine, wanted: &OpenFile, access: Access) -> Option<Granted> {
        let mut name = String::from_utf8_lossy(&wanted.name).into_owned();
        if let Some(referrer) = self.records.get_mut(&wanted.referrer) {
            let recorded = Some(name.clone()).filter(|name| wanted.role() == FileRole::Backing && !name.is_empty());
            referrer.recorded = recorded.or(referrer.recorded.take());
            name = join_name(&referrer.name, &name);
        }
        let shown = printable(name.as_bytes());
        match self.try_embedded(machine, wanted, access, name, &shown) {
            Ok(granted) => Some(granted),
            Err(problem) => {
                self.refuse(Refusal { referrer: Some(wanted.referrer), role: wanted.role(), shown, problem });
                None
            }
        }
    }

    fn try_embedded(
        &mut self,
        machine: &mut dyn Machine,
        wanted: &OpenFile,
        access: Access,
        name: String,
        shown: &str,
    ) -> Result<Granted, Problem> {
        if wanted.role() == FileRole::LuksHeader {
            let header = self.records.get(&wanted.referrer).and_then(|record| record.header);
            return header.ok_or_else(|| Problem::new("The sandbox asked for a header that nobody named"));
        }
        let origin = match wanted.role() {
            FileRole::Backing => Origin::Backing(wanted.referrer),
            FileRole::Data => Origin::Data(wanted.referrer),
            FileRole::Extent => Origin::Extent(wanted.referrer),
            _ => return Err(Problem::new("The sandbox asked for a file of an unknown kind")),
        };
        if let (Origin::Data(_), Some(granted)) = (origin, self.named_data(machine, wanted, access)?) {
            return Ok(granted);
        }
        if wanted.writable {
            return Err(unnamed_to_write(shown));
        }
        let Some(referrer) = self.records.get(&wanted.referrer) else {
            return Err(Problem::new("The sandbox asked for a file in the name of an image that it does not have"));
        };
        if referrer.depth >= MAX_CHAIN_DEPTH {
            return Err(Problem::new(format!("The backing chain is longer than {MAX_CHAIN_DEPTH} images")));
        }
        // Parts make no chain longer.
        let depth = referrer.depth + usize::from(wanted.role() != FileRole::Extent);
        let how = Use { access, writable: false };
        let lower = match wanted.role() {
            FileRole::Backing => referrer.lower(wanted, &name)?,
            _ => Lower::Recorded(ImageSpec::recorded(&name, wanted.format())),
        };
        match lower {
            // Whatever it is and wherever it lies: the operator's names are not confined, and they come to an end.
            Lower::Named(spec) => {
                let file = Opened::of_spec(&spec, false)?;
                self.grant_named(machine, &spec, file, (origin, depth), how)
            }
            Lower::Recorded(spec) => {
                spec.below.heed(spec.format)?;
                let confined = self.confinement.open(&referrer.home, &wanted.name, shown)?;
                if self.is_ancestor(wanted.referrer, confined.stat.identity) {
                    return Err(Problem::new(format!("The image refers to itself by way of '{shown}'")));
                }
                let file = Opened::new(confined.fd, confined.stat).cut_as(&spec)?;
                self.keep(machine, &spec, file, Place { name, origin, home: confined.dir, depth }, how)
            }
        }
    }

    /// Opens and grants the external data file that the operator named for an image, once; `None` if there is none.
    fn named_data(
        &mut self,
        machine: &mut dyn Machine,
        wanted: &OpenFile,
        access: Access,
    ) -> Result<Option<Granted>, Problem> {
        let Some(Record { depth, home, data_file: Some(named), .. }) = self.records.get_mut(&wanted.referrer) else {
            return Ok(None);
        };
        if let Some(granted) = &named.granted {
            return Ok(Some(*granted));
        }
        let (depth, home, name) = (*depth, home.clone(), named.name.clone());
        let (mut file, granted) = open_data(machine, &name, named.writable, access)?;
        named.granted = Some(granted);
        file.note_len(&granted);
        let place = Place { name, origin: Origin::Data(wanted.referrer), home, depth };
        self.records.insert(granted.device, Record::plain(file, place));
        Ok(Some(granted))
    }

    /// Opens and grants a backing image that is to be written, within the confinement unless the operator named it. `None` if it can't be
    /// opened at all: that is told when it is asked for to be read.
    pub fn open_base(&mut self, machine: &mut dyn Machine, wanted: &OpenFile) -> Option<Result<Granted, Problem>> {
        let referrer = self.records.get(&wanted.referrer)?;
        let name = join_name(&referrer.name, &String::from_utf8_lossy(&wanted.name));
        let shown = printable(name.as_bytes());
        let (origin, depth) = (Origin::Backing(wanted.referrer), referrer.depth + 1);
        if depth > MAX_CHAIN_DEPTH {
            return None;
        }
        let how = Use { access: Access { purpose: Purpose::Write, force_share: false }, writable: true };
        let writable = |file: Opened| file.into_writable().map_err(|errno| Problem::file("reopen", &shown, errno));
        match referrer.lower(wanted, &name).ok()?.locked() {
            Lower::Named(spec) => {
                let file = Opened::of_spec(&spec, false).ok()?;
                let file = writable(file);
                Some(file.and_then(|file| self.grant_named(machine, &spec, file, (origin, depth), how)))
            }
            Lower::Recorded(spec) => {
                let confined = self.confinement.open(&referrer.home, &wanted.name, &shown).ok()?;
                if self.is_ancestor(wanted.referrer, confined.stat.identity) {
                    return None;
                }
                let file =
                    spec.below.heed(spec.format).and_then(|()| Opened::new(confined.fd, confined.stat).cut_as(&spec));
                let file = file.and_then(writable);
                let place = Place { name, origin, home: confined.dir, depth };
                Some(file.and_then(|file| self.keep(machine, &spec, file, place, how)))
            }
        }
    }

    /// Is the file one of the images on the way from the operator's image to `device`?
    fn is_ancestor(&self, device: u32, identity: (u64, u64)) -> bool {
        let mut at = Some(device);
        while let Some(record) = at.and_then(|device| self.records.get(&device)) {
            if record.file.stat.identity == identity {
                return true;
            }
            at = match record.origin {
                Origin::Operator => None,
                Origin::Backing(of) | Origin::Data(of) | Origin::Extent(of) => Some(of),
            };
        }
        false
    }

    /// Puts a problem with the file `device` into the words of the image that the operator named: that image's device, and
    /// the problem with one `Could not open backing file` for each step on the way.
    pub fn seen_from_the_top(&self, device: u32, problem: Problem) -> (u32, Problem) {
        let (mut device, mut problem) = (device, self.worded(device, problem));
        while let Some(record) = self.records.get(&device) {
            match record.origin {
                Origin::Operator => break,
                Origin::Data(of) | Origin::Extent(of) => device = of,
                Origin::Backing(of) => {
                    problem = problem.within("Could not open backing file");
                    device = of;
                }
            }
        }
        (device, problem)
    }

    /// A problem with the image on a device, in which its file is named where that is all there is to say.
    pub fn worded(&self, device: u32, problem: Problem) -> Problem {
        match self.records.get(&device) {
            Some(record) => problem.of_image_in(&record.child.clone().unwrap_or_else(|| record.shown())),
            None => problem,
        }
    }

    /// The last refusal in the words of the image that the operator named.
    pub fn refusal_from_the_top(&self) -> Option<(u32, Problem)> {
        let refusal = self.refusal.as_ref()?;
        let problem = match refusal.role {
            FileRole::Backing => refusal.problem.clone().within("Could not open backing file"),
            _ => refusal.problem.clone(),
        };
        Some(self.seen_from_the_top(refusal.referrer?, problem))
    }
}

/// Opens and grants an external data file that the operator named.
///
/// # Errors
/// The message, without `Could not open 'F'` of the image around it.
pub fn open_data(
    machine: &mut dyn Machine,
    name: &str,
    writable: bool,
    access: Access,
) -> Result<(Opened, Granted), Problem> {
    let path = Path::new(name);
    let mut file = if writable { open_to_write(path) } else { open_to_read(path) }?;
    if writable || !access.force_share {
        file.lock(if writable { Purpose::Write } else { access.purpose }, name)?;
    }
    let granted = file.grant(machine, writable)?;
    Ok((file, granted))
}

/// An image asks for a file to be written that only it named.
pub fn unnamed_to_write(shown: &str) -> Problem {
    Problem::new(format!(
        "Could not open '{shown}': refused: only files that you name yourself are written (a data file: \
         --image-opts driver=qcow2,file.filename=...,data-file.filename=...)"
    ))
}

/// Takes locks, as far as QEMU does: describing a raw image needs none, and until its format is known, a problem with them
/// may turn out not to matter.
fn take_locks(file: &mut Opened, purpose: Purpose, format: Format, name: &str) -> Result<Option<Problem>, Problem> {
    match (purpose, format) {
        (Purpose::Describe, Format::Raw | Format::File) => Ok(None),
        (Purpose::Describe, Format::Unknown) => Ok(file.lock(purpose, name).err()),
        _ => file.lock(purpose, name).map(|()| None),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::sandbox::fake::Script;

    const READ: Access = Access { purpose: Purpose::Read, force_share: false };

    fn wanted(referrer: u32, name: &str, role: FileRole) -> OpenFile {
        OpenFile { role: role.into(), referrer, name: name.as_bytes().to_vec(), ..OpenFile::default() }
    }

    fn setup(names: &[&str]) -> (tempfile::TempDir, Files, Script) {
        let tmp = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(tmp.path().join(name), name.as_bytes()).unwrap();
        }
        (tmp, Files::default(), Script::default())
    }

    fn named(tmp: &tempfile::TempDir, name: &str) -> ImageSpec {
        ImageSpec::of_file(tmp.path().join(name).to_str().unwrap(), None).unwrap()
    }

    #[test]
    fn problems_are_told_from_the_top() {
        let (tmp, mut files, mut machine) = setup(&["top", "mid"]);
        let top = files.open_named(&mut machine, &named(&tmp, "top"), READ).unwrap();
        let mid = files.open_embedded(&mut machine, &wanted(top, "mid", FileRole::Backing), READ).unwrap();
        assert!(files.open_embedded(&mut machine, &wanted(mid.device, "miss", FileRole::Backing), READ).is_none());
        let (device, problem) = files.refusal_from_the_top().unwrap();
        assert_eq!(device, top);
        assert_eq!(
            problem.to_string(),
            format!(
                "Could not open backing file: Could not open backing file: Could not open '{}/miss': No such file or \
                 directory",
                tmp.path().display()
            )
        );
        assert!(files.open_embedded(&mut machine, &wanted(mid.device, "miss", FileRole::Data), READ).is_none());
        assert!(
            files
                .refusal_from_the_top()
                .unwrap()
                .1
                .to_string()
                .starts_with("Could not open backing file: Could not open '/")
        );
    }

    #[test]
    fn cycles_are_found_by_identity() {
        let (tmp, mut files, mut machine) = setup(&["top", "mid"]);
        fs::hard_link(tmp.path().join("top"), tmp.path().join("alias")).unwrap();
        let top = files.open_named(&mut machine, &named(&tmp, "top"), READ).unwrap();
        let mid = files.open_embedded(&mut machine, &wanted(top, "mid", FileRole::Backing), READ).unwrap();
        assert!(files.open_embedded(&mut machine, &wanted(mid.device, "alias", FileRole::Backing), READ).is_none());
        assert!(files.refusal().unwrap().problem.to_string().contains("refers to itself"));
    }

    #[test]
    fn chains_have_an_end() {
        let names: Vec<String> = (0..=MAX_CHAIN_DEPTH).map(|n| n.to_string()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (tmp, mut files, mut machine) = setup(&names);
        let mut device = files.open_named(&mut machine, &named(&tmp, "0"), READ).unwrap();
        for name in &names[1..MAX_CHAIN_DEPTH] {
            device = files.open_embedded(&mut machine, &wanted(device, name, FileRole::Backing), READ).unwrap().device;
        }
        let last = wanted(device, names[MAX_CHAIN_DEPTH], FileRole::Backing);
        assert!(files.open_embedded(&mut machine, &last, READ).is_none());
        assert!(files.refusal().unwrap().problem.to_string().contains("longer than 200 images"));
    }

    /// What a guest that was taken over may ask for, each with the reason that the user is told.
    #[test]
    fn hostile_names_are_refused() {
        let (tmp, mut files, mut machine) = setup(&["top", "x"]);
        let outside = tempfile::NamedTempFile::new().unwrap();
        let absolute = outside.path().to_str().unwrap().to_owned();
        let beside = format!("../{}", outside.path().file_name().unwrap().to_str().unwrap());
        std::os::unix::fs::symlink(outside.path(), tmp.path().join("link")).unwrap();
        fs::create_dir(tmp.path().join("dir")).unwrap();
        let top = files.open_named(&mut machine, &named(&tmp, "top"), READ).unwrap();
        let (long, longer) = ("a/".repeat(2047), "x".repeat(1 << 20));
        for (name, reason) in [
            ("../x", "No such file"),
            (&absolute, "lies outside"),
            (&beside, "lies outside"),
            ("/etc/passwd", "lies outside"),
            ("/proc/self/fd/0", "lies outside"),
            ("link", "lies outside"),
            ("dir", "regular file"),
            ("", "the name is empty"),
            ("x\0", "control characters"),
            ("x\n", "control characters"),
            ("\u{1b}[2Jx", "control characters"),
            ("nbd://host/x", "'nbd:'"),
            ("json:{}", "'json:'"),
            ("fd:0", "'fd:'"),
            (&long, ""),
            (&longer, "the name is too long"),
        ] {
            for role in [FileRole::Backing, FileRole::Data, FileRole::Extent] {
                let outcome = files.open_embedded(&mut machine, &wanted(top, name, role), READ);
                assert!(outcome.is_none(), "{:.40}", name.escape_debug());
                let told = files.refusal().unwrap().problem.to_string();
                let is_outside = reason == "No such file" && told.contains("lies outside");
                assert!(told.contains(reason) || is_outside, "{:.40}: {told:.200}", name.escape_debug());
                assert!(!told.chars().any(char::is_control), "{told:?}");
            }
        }
        assert_eq!(machine.granted, 1);
    }

    /// Whatever a guest that was taken over asks for below an image, the operator has said what lies there.
    #[test]
    fn the_operators_word_goes_before_the_guests() {
        let (tmp, mut files, mut machine) = setup(&["top", "x"]);
        let outside = tempfile::NamedTempFile::new().unwrap();
        let (top, other) = (tmp.path().join("top"), outside.path());
        let mut ask = |more: &str, names: &[&str]| -> Vec<String> {
            let spec = ImageSpec::of_opts(&format!("driver=qcow2,file.filename={}{more}", top.display())).unwrap();
            let device = files.open_named(&mut machine, &spec, READ).unwrap();
            let told = names.iter().map(|name| {
                match files.open_embedded(&mut machine, &wanted(device, name, FileRole::Backing), READ) {
                    Some(granted) => files.get(granted.device).unwrap().name.clone(),
                    None => files.refusal().unwrap().problem.to_string(),
                }
            });
            told.collect()
        };
        let beside = tmp.path().join("x").display().to_string();
        let names = ["x", "", "/etc/passwd"];
        assert_eq!(ask("", &names)[0], beside);
        for told in ask(",backing=", &names) {
            assert_eq!(told, "The sandbox asked for a backing image where there is none");
        }
        let named = format!(",backing.driver=raw,backing.file.filename={}", other.display());
        assert_eq!(ask(&named, &names), vec![other.display().to_string(); 3]);
        let told = ask(",backing.driver=raw", &names);
        assert_eq!(
            (told[0].as_str(), told[1].as_str()),
            (beside.as_str(), "A block device must be specified for \"file\"")
        );
        assert!(told[2].contains("lies outside"), "{told:?}");
    }

    #[test]
    fn requests_that_make_no_sense_are_refused() {
        let (tmp, mut files, mut machine) = setup(&["top", "x"]);
        let top = files.open_named(&mut machine, &named(&tmp, "top"), READ).unwrap();
        let writable = OpenFile { writable: true, ..wanted(top, "x", FileRole::Backing) };
        for request in [wanted(7, "x", FileRole::Backing), wanted(top, "x", FileRole::Target), writable] {
            assert!(files.open_embedded(&mut machine, &request, READ).is_none());
        }
    }
}
