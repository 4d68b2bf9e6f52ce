//! A small KVM monitor that runs instar's guest programs.
//!
//! A [`Sandbox`] is one run of one guest: a process of its own that holds a virtual machine without devices, kernel or
//! interrupts, whose vCPUs start in ring 3. The caller grants open files to it, sends a request and gets messages back.
//!
//! ```text
//!  caller's process                          monitor process (forked by Sandbox::spawn)
//!  ────────────────                          ─────────────────────────────────────────
//!  Sandbox  ── socket: frames, files ──►     monitor   reads frames, owns the files
//!     │                                         │
//!  watchdog ── shared progress word ────     vm        one thread per vCPU: run, serve the doorbell, run again
//!                                               │
//!                                            virtio    requests on granted files, every number checked
//!                                            ─────────── KVM ───────────
//!                                            guest     ring 3, untrusted from its first parsed byte
//! ```
//!
//! The monitor process never sees a file name and never looks into the bytes that it moves. Whatever the guest does, the
//! run ends with an [`Event::Exited`] or an [`Error`].
//!
//! All `unsafe` of this crate is in `memory`, `rawio` and `jail::process`.
#![warn(missing_docs)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("instar-vmm needs KVM on x86-64 Linux");

mod config;
mod cpu;
mod elf;
mod error;
mod faults;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
mod jail;
mod layout;
mod mail;
mod memory;
mod monitor;
mod paging;
mod rawio;
mod sandbox;
mod stats;
mod virtio;
mod vm;
mod watchdog;
mod wire;
mod workers;

pub use config::Settings;
pub use elf::ElfError;
pub use error::{Error, KvmStep, Misbehaviour, Registers};
pub use faults::{FaultAction, FaultEvent, FaultKinds, FaultRule, MAX_FAULT_RULES};
pub use instar_guest_protocol::boot::DeviceFlags;
pub use instar_guest_protocol::ring::RequestKind;
pub use jail::filter::{AllowedCall, Role as FilterRole, allowed_calls};
pub use sandbox::{Event, Granted, Sandbox, Window};
pub use stats::{DeviceTraffic, Phases, Report, Stats, Traffic, Usage};
pub use virtio::NbdExport;

/// The example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
