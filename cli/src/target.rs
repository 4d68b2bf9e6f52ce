//! The files of the image that is written.

use std::path::{Path, PathBuf};

use crate::cleanup::Leftovers;
use crate::creation::Layout;
use crate::creation::vmdk::ExtentFiles;
use crate::files::Files;
use crate::image_opts::ImageSpec;
use crate::lock::Purpose;
use crate::open::{self, Opened};
use crate::problem::Problem;
use crate::sandbox::{Granted, Machine};

/// A target to be created.
#[derive(Debug)]
pub struct NewTarget {
    /// Its name as typed.
    given: String,
    path: PathBuf,
    data_file: Option<String>,
    extent_files: Option<ExtentFiles>,
    /// Extent files that were made.
    extent_count: usize,
    late: Option<Problem>,
    files: Vec<Opened>,
    leftovers: Leftovers,
}

impl NewTarget {
    /// A target of that name.
    ///
    /// # Errors
    /// A name that is no file name.
    pub fn new(given: &str, layout: &Layout) -> Result<Self, Problem> {
        // qemu-img finds out about the empty name when it creates the file.
        let path = if given.is_empty() { PathBuf::new() } else { open::path_of(given)? };
        Ok(Self {
            given: given.to_owned(),
            path,
            data_file: layout.data_file.clone(),
            extent_files: layout.extent_files,
            extent_count: 0,
            late: layout.late.clone(),
            files: Vec::new(),
            leftovers: Leftovers::default(),
        })
    }

    /// Its name as typed.
    pub fn given(&self) -> &str {
        &self.given
    }

    /// Creates and grants the main file, which must be none of the `sources`.
    ///
    /// # Errors
    /// The message, without the target's name before it.
    pub fn open_main(&mut self, machine: &mut dyn Machine, sources: &Files) -> Result<Granted, Problem> {
        let (path, shown) = (self.path.clone(), self.path.display().to_string());
        self.create(&path, &shown, sources)?;
        match self.late.take() {
            Some(problem) => Err(problem),
            None => self.grant(machine),
        }
    }

    /// Creates and grants the external data file, which must be none of the `sources`.
    ///
    /// # Errors
    /// The message, without the target's name before it.
    pub fn open_data(&mut self, machine: &mut dyn Machine, sources: &Files) -> Result<Granted, Problem> {
        let name = self.data_file.take();
        let name = name.ok_or_else(|| Problem::new("The sandbox asked for a data file that is not wanted"))?;
        self.create(Path::new(&name), &name, sources)?;
        self.grant(machine)
    }

    /// Creates and grants the next extent file, which must be none of the `sources`. Its name is composed here: the guest has no say
    /// in it.
    ///
    /// # Errors
    /// The message, without the target's name before it.
    pub fn open_extent(&mut self, machine: &mut dyn Machine, sources: &Files) -> Result<Granted, Problem> {
        let path = self.path.to_string_lossy().into_owned();
        let name = self.extent_files.and_then(|files| files.name(&path, self.extent_count));
        let name = name.ok_or_else(|| Problem::new("The sandbox asked for an extent that is not wanted"))?;
        self.extent_count += 1;
        self.create(Path::new(&name), &name, sources)?;
        self.grant(machine)
    }

    fn create(&mut self, path: &Path, shown: &str, sources: &Files) -> Result<(), Problem> {
        let created = open::create(path, shown, &mut self.leftovers, &|stat| sources.check_target(stat))?;
        self.files.push(created);
        Ok(())
    }

    fn grant(&mut self, machine: &mut dyn Machine) -> Result<Granted, Problem> {
        match self.files.last() {
            Some(file) => file.grant(machine, true),
            None => Err(Problem::new("The target is not open")),
        }
    }

    /// The target is complete: nothing of it is to be removed.
    pub fn complete(self) {
        self.leftovers.keep();
    }
}

/// Grants an existing file to be written, which must be none of the `sources`.
///
/// # Errors
/// The message, without the target's name around it.
pub fn open_existing(
    machine: &mut dyn Machine,
    spec: &ImageSpec,
    sources: &Files,
) -> Result<(Opened, Granted), Problem> {
    if spec.read_only {
        return Err(Problem::new("Block node is read-only"));
    }
    let mut opened = Opened::of_spec(spec, true)?;
    opened.lock(Purpose::Write, &spec.file)?;
    sources.check_target(&opened.stat)?;
    let granted = opened.grant(machine, true)?;
    Ok((opened, granted))
}
