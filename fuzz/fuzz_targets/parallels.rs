//! cargo-fuzz program of [`instar_fuzz::targets::legacy::parallels`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| instar_fuzz::targets::legacy::parallels(data));
