//! Makes the guest programs and prepares them for embedding.
//!
//! One cargo call builds all of them, freestanding, in profile `guest` and in a target directory of its own (the outer build
//! holds the lock on the other). Each program is then cut down to its load segments, and a map of its functions is kept
//! beside it. `INSTAR_GUEST_DIR=<directory>` takes ready programs instead (packagers, coverage runs). `INSTAR_GUEST_FAST=1` links
//! them without optimisation across crates: several times faster to build and slower to run, for work on the programs themselves.

use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{LittleEndian, Object, ObjectSymbol, SymbolKind};
use sha2::{Digest, Sha256};

/// The programs: names of the binaries behind `instar-guest-`.
const PROGRAMS: [&str; 6] = ["info", "convert", "create", "edit", "query", "selftest"];

/// Profile `guest`, for a build outside of the workspace, where the manifest with the profiles is not seen.
const PROFILE: [&str; 7] = [
    "profile.guest.inherits=\"release\"",
    "profile.guest.panic=\"abort\"",
    "profile.guest.lto=\"fat\"",
    "profile.guest.codegen-units=1",
    "profile.guest.debug=false",
    "profile.guest.strip=\"none\"",
    "profile.guest.overflow-checks=true",
];

/// What `INSTAR_GUEST_FAST` changes in the profile.
const FAST: [&str; 5] = [
    "profile.guest.lto=\"off\"",
    "profile.guest.opt-level=1",
    "profile.guest.codegen-units=16",
    "profile.guest.incremental=true",
    "profile.guest.package.\"*\".opt-level=2",
];

/// Settings of the outer build that must not reach the programs: coverage flags, wrappers, targets, profiles.
const OUTER: [&str; 10] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CLIPPY_ARGS",
    "CARGO_TARGET_DIR",
    "CARGO_PRIMARY_PACKAGE",
    "CARGO_INCREMENTAL",
    "LLVM_PROFILE_FILE",
    "__CARGO_DEFAULT_LIB_METADATA",
];
const OUTER_PREFIXES: [&str; 3] = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=INSTAR_GUEST_DIR");
    println!("cargo::rerun-if-env-changed=INSTAR_GUEST_FAST");
    let out = PathBuf::from(variable("OUT_DIR"));
    let programs = match env::var_os("INSTAR_GUEST_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => build(&out),
    };
    let mut hashes = Vec::new();
    for name in PROGRAMS {
        let path = programs.join(format!("instar-guest-{name}"));
        println!("cargo::rerun-if-changed={}", path.display());
        let elf = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        hashes.push(format!("{name} {}", embed(&out, name, &elf)));
    }
    println!("cargo::rustc-env=INSTAR_GUEST_HASHES={}", hashes.join(","));
}

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("{name} is set by cargo"))
}

/// Builds the programs and gives their directory.
fn build(out: &Path) -> PathBuf {
    let cli = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let workspace = cli.parent().expect("the crate lies in a workspace");
    let fast = env::var_os("INSTAR_GUEST_FAST").is_some_and(|value| value == "1");
    let target = target_directory(out, fast);
    let mut cargo = Command::new(variable("CARGO"));
    cargo.args(["build", "--quiet", "--bins", "--features", "freestanding", "--profile", "guest"]);
    cargo.arg("--manifest-path").arg(workspace.join("guest-runtime/Cargo.toml")).arg("--target-dir").arg(&target);
    PROFILE.iter().chain(FAST.iter().filter(|_| fast)).for_each(|setting| {
        cargo.arg("--config").arg(setting);
    });
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if OUTER.contains(&&*text) || OUTER_PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
            cargo.env_remove(&name);
        }
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", remapped_paths(workspace));
    assert!(cargo.status().expect("cargo runs").success(), "the guest programs could not be built");
    let programs = target.join("guest");
    for name in PROGRAMS {
        watch(&programs.join(format!("instar-guest-{name}.d")));
    }
    for file in ["Cargo.toml", "Cargo.lock", "guest-runtime/Cargo.toml", "guest-runtime/link.ld"] {
        println!("cargo::rerun-if-changed={}", workspace.join(file).display());
    }
    programs
}

/// Where the programs are built: beside the profiles of the outer build, so that all of these share one set of programs.
fn target_directory(out: &Path, fast: bool) -> PathBuf {
    // TARGET/PROFILE/build/PACKAGE/out
    let outer = out.ancestors().nth(4).filter(|_| out.ancestors().nth(2).is_some_and(|dir| dir.ends_with("build")));
    outer.unwrap_or(out).join(if fast { "guest-programs-fast" } else { "guest-programs" })
}

/// Compiler flags that take the machine's directories out of the programs' panic messages, so that they are the same bytes
/// wherever they are built.
fn remapped_paths(workspace: &Path) -> OsString {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let registries = home.and_then(|home| fs::read_dir(home.join("registry/src")).ok());
    let mut directories: Vec<PathBuf> = registries.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    directories.push(workspace.to_owned());
    let mut flags = OsString::new();
    for directory in directories {
        if !flags.is_empty() {
            flags.push("\x1f");
        }
        flags.push("--remap-path-prefix=");
        flags.push(directory);
        flags.push("/=");
    }
    flags
}

/// Asks for another run when a source file of the program changes: all that the dependency file names.
fn watch(dependencies: &Path) {
    let Ok(text) = fs::read_to_string(dependencies) else { return };
    let Some((_, files)) = text.lines().next().and_then(|line| line.split_once(": ")) else { return };
    // A blank inside a name is written as `\ `.
    for file in files.replace("\\ ", "\0").split_whitespace() {
        println!("cargo::rerun-if-changed={}", file.replace('\0', " "));
    }
}

/// Writes the program as it is embedded, and its map, and names both to the compiler. Gives the program's SHA-256.
fn embed(out: &Path, name: &str, elf: &[u8]) -> String {
    let program = out.join(format!("{name}.elf"));
    let map = out.join(format!("{name}.map"));
    let bytes = stripped(elf);
    let hash = Sha256::digest(&bytes);
    fs::write(&program, bytes).expect("OUT_DIR is writable");
    fs::write(&map, symbol_map(elf)).expect("OUT_DIR is writable");
    let name = name.to_uppercase();
    println!("cargo::rustc-env=INSTAR_GUEST_{name}={}", program.display());
    println!("cargo::rustc-env=INSTAR_GUEST_{name}_MAP={}", map.display());
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The program up to the end of its last load segment, without section headers.
fn stripped(elf: &[u8]) -> Vec<u8> {
    /// Offset and length of the three header fields about sections: place; then entry size, count and name index.
    const SECTION_FIELDS: [(usize, usize); 2] = [(40, 8), (58, 6)];
    let header = FileHeader64::<LittleEndian>::parse(elf).expect("an ELF file");
    let segments = header.program_headers(LittleEndian, elf).expect("program headers");
    let loaded = segments.iter().filter(|segment| segment.p_type(LittleEndian) == PT_LOAD);
    let ends = loaded.map(|segment| segment.p_offset(LittleEndian) + segment.p_filesz(LittleEndian));
    let len = ends.max().expect("a load segment") as usize;
    let mut program = elf[..len].to_vec();
    for (offset, len) in SECTION_FIELDS {
        program[offset..offset + len].fill(0);
    }
    program
}

/// One line per function, by ascending address: hexadecimal address, blank, name.
fn symbol_map(elf: &[u8]) -> String {
    let file = ElfFile64::<LittleEndian>::parse(elf).expect("an ELF file");
    let functions = file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text);
    let mut lines: Vec<(u64, String)> = functions
        .filter_map(|symbol| Some((symbol.address(), format!("{:#}", rustc_demangle::demangle(symbol.name().ok()?)))))
        .collect();
    lines.sort();
    lines.dedup_by_key(|(address, _)| *address);
    lines.iter().fold(String::new(), |mut map, (address, name)| {
        let _ = writeln!(map, "{address:x} {name}");
        map
    })
}
