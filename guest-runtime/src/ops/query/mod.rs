//! Questions about images: where their contents lie, whether two have the same, how large a copy would be.

pub mod check;
pub mod compare;
pub mod map;
pub mod measure;
mod status;
mod strict;
