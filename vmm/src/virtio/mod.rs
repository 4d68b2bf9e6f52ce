//! The request queues: what the guest asks for, and how it is done.
//!
//! One queue per vCPU, served by that vCPU's own thread between two runs. `transport` and `queue` know rings, `request` knows
//! the shape of a request, `device` the granted files, `blk`, `copy` and `compare` do the work. None interprets a byte of a file.

mod blk;
mod compare;
mod copy;
mod device;
mod nbd;
mod queue;
mod request;
mod transport;
mod turns;

pub use device::{Device, DeviceTable, Part};
pub use nbd::NbdExport;
pub use request::{KINDS, kind_index};
pub use transport::{Server, offered_words};
