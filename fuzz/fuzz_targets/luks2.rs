//! cargo-fuzz program of [`instar_fuzz::targets::luks::luks2`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| instar_fuzz::targets::luks::luks2::run(data));
