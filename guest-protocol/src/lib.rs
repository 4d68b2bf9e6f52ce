//! What the guest program and the monitor (VMM) share, and nothing else: numbers, layouts and messages.
//!
//! ```text
//!  guest, ring 3                                   monitor
//!  ─────────────                                   ───────
//!  boot page      ◄── written before the start ──  [`boot`]
//!  virtqueue      ──► requests on granted files ─► [`ring`]     kick: `out` to [`port::KICK`]
//!  mailbox        ──► one message, one answer ───► [`message`]  call: `out` to [`port::CALL`]
//! ```
//!
//! Each side treats what the other wrote as untrusted. The monitor never looks into a message: it hands the bytes to the
//! process that the user started, which decodes them within the limits of [`limits`].
#![no_std]
#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

extern crate alloc;

pub mod boot;
pub mod limits;
pub mod message;
pub mod port;
pub mod ring;
