//! What the benchmarks measure on: disk contents, and images in memory.
//!
//! Benchmarks are named group/case/size. `cargo bench -p instar-benches` measures; with `-- --test` each runs once, as a test.

mod contents;
mod images;
mod sparse;

pub use contents::{UNIT, contents};
pub use images::{Layout, image, offsets};
pub use sparse::Sparse;
