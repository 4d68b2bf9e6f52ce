//! How results look.

pub mod human;
pub mod json;
pub mod node;
pub mod progress;
pub mod report;
pub mod stats;
