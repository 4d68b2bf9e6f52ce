//! cargo-fuzz program of [`instar_fuzz::targets::monitor::mailbox`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| instar_fuzz::targets::monitor::mailbox(data));
