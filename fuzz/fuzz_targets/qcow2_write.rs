//! cargo-fuzz program of [`instar_fuzz::targets::qcow2_write`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| instar_fuzz::targets::qcow2_write::run(data));
