//! The images, a file for each format.

mod dmg;
mod foreign;
mod luks;
mod qcow;
mod qcow2;
mod qcow2_tables;
mod qed;
mod small;
mod vdi;
mod vhd;
mod vhdx;
mod vhdx_log;
mod vmdk;

use crate::bytes::Image;
use crate::case::{Case, Content, Due, Group};
use crate::names::Surroundings;

/// All images, always the same for the same surroundings.
pub fn suite(around: &Surroundings) -> Vec<Case> {
    let mut cases = Vec::new();
    qcow2::add(&mut cases, around);
    qcow2_tables::add(&mut cases);
    qcow::add(&mut cases, around);
    qed::add(&mut cases, around);
    vmdk::add(&mut cases, around);
    vhd::add(&mut cases, around);
    vhdx::add(&mut cases, around);
    vhdx_log::add(&mut cases);
    vdi::add(&mut cases);
    small::add(&mut cases);
    dmg::add(&mut cases);
    luks::add(&mut cases);
    foreign::add(&mut cases, around);
    cases
}

/// An image for each forbidden name in one of its fields, with what the names lead to beside it.
fn names(
    group: &mut Group<'_>,
    around: &Surroundings,
    class: &str,
    image: &str,
    room: usize,
    due: Due,
    make: &dyn Fn(&[u8]) -> Image,
) {
    for (what, name) in around.names(image, room) {
        // Whether a name can be shown is not the question here, only that it is not followed.
        let case = group.add(format!("{class}/{what}"), make(&name), due);
        surround(case);
    }
}

/// Puts what the names lead to beside an image.
fn surround(case: &mut Case) {
    case.beside("link", Content::Link("../outside/canary".to_owned()))
        .beside("linkdir", Content::Link("../outside".to_owned()))
        .beside("fifo", Content::Fifo)
        .beside("sub", Content::Directory)
        .beside("base", Content::Bytes(Image::new().put(0, &[0x42; 4096])))
        .without_qemu();
}
