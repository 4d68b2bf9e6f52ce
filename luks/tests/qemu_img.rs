//! Headers that qemu-img and cryptsetup wrote, and damaged ones.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use instar_luks::{CipherMode, Error, HEADER_LEN, Header};
use proptest::prelude::*;
use serde_json::Value;

/// The answer of `qemu-img info` for a new volume of this format and these options, and the header.
fn create(dir: &Path, format: &str, options: &str) -> (Value, Vec<u8>) {
    let path = dir.join("volume");
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{options}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let mut command = Command::new("qemu-img");
    run(command
        .args(["create", "-q", "--object", "secret,id=s,data=pass", "-f", format, "-o", options])
        .arg(&path)
        .arg("1M"));
    let answer = run(Command::new("qemu-img").args(["info", "--output=json"]).arg(&path));
    let info: Value = serde_json::from_slice(&answer).unwrap();
    let data = &info["format-specific"]["data"];
    let bytes = fs::read(path).unwrap();
    let at = if format == "luks" { 0 } else { bytes.windows(6).position(|six| six == b"LUKS\xba\xbe").unwrap() };
    let data = if format == "luks" { data } else { &data["encrypt"] };
    (data.clone(), bytes[at..][..HEADER_LEN].to_vec())
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

#[test]
fn headers_of_qemu_img_read_as_it_shows_them() {
    if Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("SKIPPED: qemu-img is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let plain = "key-secret=s,iter-time=10";
    let cbc = "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512";
    for (format, prefix) in [("luks", ""), ("qcow2", "encrypt.")] {
        for extra in ["", cbc] {
            let options: Vec<_> = [plain, extra]
                .join(",")
                .split(',')
                .filter(|one| !one.is_empty())
                .map(|one| format!("{prefix}{one}"))
                .collect();
            let format_option = if format == "qcow2" { "encrypt.format=luks," } else { "" };
            let (info, bytes) = create(dir.path(), format, &format!("{format_option}{}", options.join(",")));
            let header = Header::parse(&bytes).unwrap();
            let CipherMode { mode, ivgen, ivgen_hash } = header.mode();
            assert_eq!(info["cipher-mode"], text(mode));
            assert_eq!(info["ivgen-alg"], text(ivgen));
            assert_eq!(info["ivgen-hash-alg"].as_str().unwrap_or_default(), text(ivgen_hash));
            assert_eq!(info["hash-alg"], text(header.hash_spec()));
            assert_eq!(info["uuid"], text(header.uuid()));
            assert_eq!(info["payload-offset"], header.payload_offset());
            assert_eq!(info["master-key-iters"], header.digest_iterations());
            // The key of XTS is two keys of the cipher.
            let bits = header.key_bytes() * if mode == b"xts" { 4 } else { 8 };
            assert_eq!(info["cipher-alg"], format!("{}-{bits}", text(header.cipher_name())));
            let slots = info["slots"].as_array().unwrap();
            assert_eq!(slots.len(), header.slots().len());
            for (slot, shown) in header.slots().iter().zip(slots) {
                assert_eq!(shown["active"], slot.active);
                assert_eq!(shown["key-offset"], slot.key_offset);
                if slot.active {
                    assert_eq!((&shown["iters"], &shown["stripes"]), (&slot.iterations.into(), &slot.stripes.into()));
                }
            }
        }
    }
}

/// The first bytes of every LUKS volume of the shared corpus, with what its list says of it.
fn corpus(root: &Path) -> Vec<(String, Vec<u8>)> {
    let list = fs::read_to_string(root.join("MANIFEST.tsv")).unwrap();
    let mut found = Vec::new();
    for line in list.lines() {
        let Some(what) = line.split('\t').find(|field| field.starts_with("luks1 ") && field.split(' ').count() == 4)
        else {
            continue;
        };
        let image = line.split('\t').find(|field| field.starts_with("images/") && field.ends_with(".zst")).unwrap();
        let output = Command::new("zstd").args(["-d", "-q", "-c"]).arg(root.join(image)).output().unwrap();
        assert!(output.status.success(), "{image}");
        found.push((what.to_owned(), output.stdout));
    }
    found
}

#[test]
fn headers_of_the_corpus_read_as_listed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus");
    let zstd = Command::new("zstd").arg("--version").stdout(Stdio::null()).status();
    if !root.exists() || zstd.is_err() {
        eprintln!("SKIPPED: no shared corpus, or no zstd program");
        return;
    }
    let volumes = corpus(&root);
    assert!(volumes.len() > 8, "only {}", volumes.len());
    for (what, bytes) in volumes {
        let header = Header::parse(&bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
        let parts = [header.cipher_name(), header.cipher_mode(), header.hash_spec()].map(text);
        assert_eq!(format!("luks1 {}", parts.join(" ")), what);
    }
}

proptest! {
    /// Whatever the bytes are, what is told of them stays inside the header.
    #[test]
    fn any_bytes_are_described_or_refused(mut bytes in prop::collection::vec(any::<u8>(), HEADER_LEN), sane in any::<bool>()) {
        bytes[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
        if sane {
            for slot in 0..8 {
                bytes[208 + 48 * slot..][..4].copy_from_slice(&0xdead_u32.to_be_bytes());
            }
            for end in [39, 71, 103, 207] {
                bytes[end] = 0;
            }
        }
        match Header::parse(&bytes) {
            Ok(header) => {
                prop_assert!(header.cipher_name().len() < 32 && !header.cipher_mode().contains(&0));
                prop_assert!(header.payload_offset() <= u64::from(u32::MAX) * 512);
            }
            Err(error) => prop_assert!(!sane, "{error}"),
        }
        prop_assert_eq!(Header::parse(&bytes[..HEADER_LEN - 1]).err(), Some(Error::TooShort(HEADER_LEN - 1)));
    }
}
