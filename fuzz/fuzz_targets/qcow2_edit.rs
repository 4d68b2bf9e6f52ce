//! cargo-fuzz program of [`instar_fuzz::targets::qcow2_edit`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| instar_fuzz::targets::qcow2_edit::run(data));
