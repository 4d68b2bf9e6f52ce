//! `info --chain`: a backing chain, followed and validated by the policy, each image in a sandbox of its own.

use std::path::{Path, PathBuf};

use instar_guest_protocol::limits::MAX_CHAIN_DEPTH;
use instar_guest_protocol::message::{
    Failure, Format, ImageInfo, InfoRequest, OpenFile, Progress, Request, Source, reply, request,
};

use crate::commands::Settings;
use crate::confine::Confinement;
use crate::files::Access;
use crate::formats;
use crate::image_opts::ImageSpec;
use crate::open::{Opened, join_name};
use crate::output::human;
use crate::output::node::Node;
use crate::problem::{Problem, printable};
use crate::safety::Report;
use crate::sandbox::{self, Granted, Host, Machine, Vm, Work};
use crate::{guest, messages};

/// A chain as far as it could be followed.
#[derive(Debug)]
pub struct Chain {
    links: Vec<Link>,
    /// Why it could not be followed to its end.
    pub problem: Option<Problem>,
}

/// An image of the chain.
#[derive(Debug)]
struct Link {
    name: String,
    info: ImageInfo,
    report: Report,
}

/// The next image to look at.
struct Hop {
    /// Its name as QEMU composes it.
    name: String,
    file: Opened,
    home: PathBuf,
    format: Format,
}

impl Chain {
    /// Follows the chain of `image`.
    pub fn walk(settings: &Settings, image: &ImageSpec, access: Access) -> Self {
        let mut chain = Self { links: Vec::new(), problem: None };
        chain.problem = chain.follow(settings, image, access).err();
        chain
    }

    fn follow(&mut self, settings: &Settings, image: &ImageSpec, access: Access) -> Result<(), Problem> {
        let mut confinement = settings.confinement()?;
        let path = Path::new(&image.file);
        let given = |problem: Problem| problem.within(format!("Could not open '{}'", image.given));
        let mut file = Opened::of_spec(image, false).map_err(given)?;
        lock(&mut file, access, image.force_share, &image.file).map_err(given)?;
        let home = confinement.allow_home_of(path)?;
        let mut hop = Hop { name: image.file.clone(), file, home, format: image.format };
        let mut seen = Vec::new();
        loop {
            let shown = if self.links.is_empty() { image.given.clone() } else { printable(hop.name.as_bytes()) };
            let within = |problem: Problem| problem.within(format!("Could not open '{shown}'"));
            seen.push(hop.file.stat.identity);
            let info = describe(settings, &hop).map_err(within)?;
            let judge = |name: &[u8], shown: &str| confinement.open(&hop.home, name, shown).map(|_| ());
            let report = Report::of(&info, &hop.name, hop.format, &judge);
            let guessed = hop.format == Format::Unknown && !self.links.is_empty();
            let next = next_hop(&confinement, &hop, &info, access);
            let refers = info.backing_file.is_some() || info.qcow2.as_ref().is_some_and(|qcow2| qcow2.has_data_file);
            self.links.push(Link { name: hop.name, info, report });
            if guessed && refers {
                let problem = Problem::new("Its format is not recorded, and it refers to further files");
                return Err(within(problem));
            }
            match next? {
                None => return Ok(()),
                Some(_) if self.links.len() >= MAX_CHAIN_DEPTH => {
                    return Err(Problem::new(format!("The backing chain is longer than {MAX_CHAIN_DEPTH} images")));
                }
                Some(next) if seen.contains(&next.file.stat.identity) => {
                    let shown = printable(next.name.as_bytes());
                    return Err(Problem::new(format!("The image refers to itself by way of '{shown}'")));
                }
                Some(next) => hop = next,
            }
        }
    }

    /// For people: a line for each image.
    pub fn human(&self, with_safety: bool) -> String {
        let mut out = String::new();
        for (depth, link) in self.links.iter().enumerate() {
            out.push_str(&format!(
                "[{depth}] {} ({}, {})\n",
                printable(link.name.as_bytes()),
                formats::name(link.info.format()),
                human::size(link.info.virtual_size),
            ));
            if with_safety {
                out.push_str(&human::tree(&[("safety", link.report.node())], 1));
            }
        }
        let verdict = if self.problem.is_none() { "complete" } else { "incomplete" };
        out.push_str(&format!("chain: {verdict}, {} images\n", self.links.len()));
        out
    }

    /// As a tree.
    pub fn node(&self, with_safety: bool) -> Node {
        let images = self.links.iter().map(|link| {
            let mut members = vec![
                ("filename", Node::text(link.name.as_str())),
                ("format", Node::text(formats::name(link.info.format()))),
                ("virtual-size", Node::Int(link.info.virtual_size)),
            ];
            if let Some(name) = &link.info.backing_file {
                members.push(("backing-filename", Node::bytes(name)));
            }
            if let Some(format) = &link.info.backing_format {
                members.push(("backing-filename-format", Node::bytes(format)));
            }
            if with_safety {
                members.push(("safety", link.report.node()));
            }
            Node::Dict(members)
        });
        let mut members =
            vec![("images", Node::List(images.collect())), ("complete", Node::Bool(self.problem.is_none()))];
        if let Some(problem) = &self.problem {
            members.push(("problem", Node::text(problem.to_string())));
        }
        Node::Dict(members)
    }
}

fn lock(file: &mut Opened, access: Access, force_share: bool, name: &str) -> Result<(), Problem> {
    match access.force_share || force_share {
        true => Ok(()),
        false => file.lock(access.purpose, name),
    }
}

/// Describes one image.
fn describe(settings: &Settings, hop: &Hop) -> Result<ImageInfo, Problem> {
    let mut machine = Vm::spawn_to_read(guest::INFO, &settings.limits, Work::Headers)?;
    let device = hop.file.grant(&mut machine, false)?.device;
    let named_dmg = hop.name.ends_with(".dmg");
    let image = Source { device, format: hop.format.into(), named_dmg, ..Source::default() };
    let operation = request::Operation::Info(InfoRequest { image, chain: false, safety: true });
    match sandbox::run(&mut machine, &Request { operation: Some(operation) }, &mut Alone)? {
        reply::Result::Info(mut reply) if !reply.images.is_empty() => Ok(reply.images.swap_remove(0)),
        reply::Result::Failure(failure) => Err(messages::open_failure(&failure)),
        _ => Err(Problem::new("The sandboxed parser sent something that makes no sense")),
    }
}

/// What the image names as its backing file.
fn next_hop(confinement: &Confinement, hop: &Hop, info: &ImageInfo, access: Access) -> Result<Option<Hop>, Problem> {
    let Some(stored) = &info.backing_file else { return Ok(None) };
    let name = join_name(&hop.name, &String::from_utf8_lossy(stored));
    let shown = printable(name.as_bytes());
    let within = |problem: Problem| problem.within(format!("Could not open '{shown}'"));
    let format = match &info.backing_format {
        None => Format::Unknown,
        Some(format) => crate::image_opts::driver_format(&String::from_utf8_lossy(format)).map_err(within)?,
    };
    let confined = confinement.open(&hop.home, stored, &shown).map_err(within)?;
    let mut file = Opened::new(confined.fd, confined.stat);
    lock(&mut file, access, false, &shown).map_err(within)?;
    Ok(Some(Hop { name, file, home: confined.dir, format }))
}

/// A guest that gets nothing beside its image.
struct Alone;

impl Host for Alone {
    fn open(&mut self, _: &mut dyn Machine, _: &OpenFile) -> Option<Granted> {
        None
    }

    fn progress(&mut self, _: &Progress) {}

    fn pace(&mut self, _: &Progress) {}

    fn warning(&mut self, _: &Failure) {}
}
