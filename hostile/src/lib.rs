//! Hostile disk images made by code, and what every command of instar must hold on them.
//!
//! [`suite`] makes the images: every format, every class of known attacks (names that lead outside, guessed formats, size fields,
//! unbounded work, structures cut off or pointing at each other), each with what is [`Due`]. [`Trial`] runs the commands on them
//! and looks for everything that must not happen. [`kill`] ends writing commands at random moments; [`faults`] takes away what they need.
//! [`differential`] does random commands by instar and by qemu-img and compares what comes of them.
//!
//! What is due comes from the specifications of the formats and from the verdict of qemu-img, never from what instar answers.
#![forbid(unsafe_code)]

mod bytes;
mod case;
pub mod differential;
pub mod faults;
mod images;
pub mod kill;
mod names;
mod place;
mod process;
mod random;
pub mod trace;
mod trial;

pub use bytes::Image;
pub use case::{Case, Content, Due};
pub use images::suite;
pub use names::Surroundings;
pub use place::Place;
pub use process::{Ended, Program};
pub use trial::{Finding, Report, Trial};
