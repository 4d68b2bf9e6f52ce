//! Linker arguments of the guest programs: static, at fixed addresses, without anything of the host's C library.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_FREESTANDING").is_none() {
        return;
    }
    let script = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo")).join("link.ld");
    println!("cargo::rerun-if-changed={}", script.display());
    let arguments = [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
        "-Wl,--gc-sections",
        "-Wl,--no-eh-frame-hdr",
    ];
    for argument in arguments {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", script.display());
}
