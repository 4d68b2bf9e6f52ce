//! guest-runtime
#![no_std]
#![forbid(unsafe_code)]
