//! cargo-fuzz program of [`instar_fuzz::targets::monitor::ring`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| instar_fuzz::targets::monitor::ring(data));
