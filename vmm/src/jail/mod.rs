//! The process that runs the machine, and what is taken from it.
//!
//! The order is: fork; no more privileges than the caller, no inherited files ([`process::fork`]); open `/dev/kvm`; no
//! capabilities, no standard streams ([`process::drop_privileges`]); build the machine; take files and the request; run.
//! From the last step on the process opens nothing, so system call filters belong between taking the request and running.

pub mod process;
