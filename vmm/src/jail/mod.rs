//! The process that runs the machine, and what is taken from it.
//!
//! The order is: fork; no more privileges than the caller, no inherited files ([`process::fork`]); open `/dev/kvm`; another
//! user if the caller was root, no capabilities, no standard streams, no part of any file system
//! ([`process::drop_privileges`]); build the machine; take files and the request; a system call filter for each thread
//! ([`filter`]); run.

pub mod filter;
pub mod process;
