//! cargo-fuzz program of [`instar_fuzz::targets::luks::luks1`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| instar_fuzz::targets::luks::luks1::run(data));
