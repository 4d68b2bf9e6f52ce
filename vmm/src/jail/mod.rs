//! The process that runs the machine, and what is taken from it.

pub mod process;
