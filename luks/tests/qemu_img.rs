//! Headers that qemu-img and cryptsetup wrote, and damaged ones.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use instar_blockio::{BlockRead, MemBlock};
use instar_luks::{
    CipherMode, CipherSpec, CreateOptions, Error, HEADER_LEN, Hash, Header, Limits, Random, Volume, create,
};
use proptest::prelude::*;
use serde_json::Value;

/// The answer of `qemu-img info` for a new volume of this format and these options, and the header.
fn create_by_qemu(dir: &Path, format: &str, options: &str) -> (Value, Vec<u8>) {
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
            let (info, bytes) = create_by_qemu(dir.path(), format, &format!("{format_option}{}", options.join(",")));
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

/// Runs a command that must succeed.
fn must(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("SKIPPED: {program} is not installed");
    }
    found
}

/// Combinations of options of `qemu-img create -f luks`, which measures for seconds how fast the machine is: more ciphers are tried the
/// other way round. (QEMU stops with an assertion for keys of 24 bytes, whose key material is no whole number of sectors.)
const COMBINATIONS: &[&str] = &[
    "",
    "cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5,hash-alg=sha1",
    "cipher-alg=cast5-128,cipher-mode=ctr,ivgen-alg=essiv,ivgen-hash-alg=md5,hash-alg=sm3",
    "ivgen-hash-alg=sha1,cipher-mode=ecb",
];

#[test]
fn volumes_of_qemu_img_open() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.luks");
    let secret = ["--object", "secret,id=s,data=pass word"];
    let opts = format!("driver=luks,key-secret=s,file.filename={}", path.display());
    for combination in COMBINATIONS {
        let options = format!("key-secret=s,iter-time=1,{combination}");
        let options = options.trim_end_matches(',');
        must(
            Command::new("qemu-img")
                .args(["create", "-q"])
                .args(secret)
                .args(["-f", "luks", "-o", options])
                .arg(&path)
                .arg("1M"),
        );
        let commands = ["-c", "write -P 0x5a 0 8k", "-c", "write -P 0xa5 1047552 1k"];
        must(Command::new("qemu-io").args(secret).arg("--image-opts").args(commands).arg(&opts));
        let disk = MemBlock::from(fs::read(&path).unwrap());
        let volume = Volume::read(&disk, 0, false).unwrap();
        let cipher = volume.unlock(&disk, 0, b"pass word", &Limits::default()).unwrap();
        let payload = volume.payload().unwrap();
        let mut read = vec![0; 8192];
        disk.read_at(payload.offset, &mut read).unwrap();
        cipher.decrypt(payload.position, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 0x5a), "{combination}");
        read.truncate(1024);
        disk.read_at(payload.offset + 1_047_552, &mut read).unwrap();
        cipher.decrypt(payload.position + 1_047_552, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 0xa5), "{combination}");
        if combination.is_empty() {
            let wrong = volume.unlock(&disk, 0, b"pass", &Limits::default()).unwrap_err();
            assert_eq!(wrong, Error::WrongPassphrase);
        }
    }
}

#[test]
fn qemu_and_cryptsetup_open_what_is_created() {
    let (qemu, cryptsetup) = (have("qemu-io"), have("cryptsetup"));
    let dir = tempfile::tempdir().unwrap();
    let (path, pass) = (dir.path().join("n.luks"), dir.path().join("pass"));
    fs::write(&pass, "pass").unwrap();
    for (number, (algorithm, mode, key_len, hash)) in [
        ("aes", "xts-plain64", 64, Hash::Sha256),
        ("aes", "cbc-essiv:sha256", 16, Hash::Sha1),
        ("serpent", "xts-plain", 48, Hash::Sha512),
        ("twofish", "ctr-plain64", 32, Hash::Ripemd160),
        ("cast5", "cbc-plain64", 16, Hash::Sha224),
        ("aes", "ecb-plain64", 32, Hash::Sha384),
        ("aes", "cbc-essiv:sha256", 32, Hash::Sha1),
        ("aes", "ctr-plain", 32, Hash::Sha224),
        ("serpent", "cbc-essiv:md5", 16, Hash::Ripemd160),
        ("serpent", "ctr-plain64", 32, Hash::Sha256),
        ("twofish", "xts-essiv:sha256", 64, Hash::Sha256),
        ("twofish", "cbc-plain", 16, Hash::Sha1),
        ("twofish", "ecb-plain64", 32, Hash::Sha512),
        ("cast5", "ctr-essiv:md5", 16, Hash::Sha256),
        ("cast5", "ecb-plain64", 16, Hash::Sha1),
    ]
    .into_iter()
    .enumerate()
    {
        let cipher = CipherSpec::named(algorithm.as_bytes(), CipherMode::split(mode.as_bytes()), key_len).unwrap();
        let options = CreateOptions {
            cipher,
            iv_hash: None,
            hash,
            slot_iterations: 1000,
            digest_iterations: 1000,
            detached: false,
        };
        let mut random = Random::new(&[number as u8; Random::SEED]);
        let fresh = create(&options, b"pass", &mut random).unwrap();
        let payload = fresh.header.payload_offset() as usize;
        let mut bytes = vec![0; payload + (1 << 20)];
        bytes[..HEADER_LEN].copy_from_slice(&fresh.header.to_bytes());
        bytes[fresh.material.offset as usize..][..fresh.material.bytes.len()].copy_from_slice(&fresh.material.bytes);
        bytes[payload..].fill(0x3c);
        let cipher = fresh.key.cipher(&cipher, 512).unwrap();
        cipher.encrypt(0, &mut bytes[payload..]).unwrap();
        fs::write(&path, &bytes).unwrap();
        if qemu {
            let opts = format!("driver=luks,key-secret=s,file.filename={}", path.display());
            let answer = must(
                Command::new("qemu-io")
                    .args(["--object", "secret,id=s,data=pass", "--image-opts", "-c", "read -P 0x3c 0 1M"])
                    .arg(opts),
            );
            let answer = String::from_utf8_lossy(&answer);
            assert!(!answer.contains("failed") && answer.contains("read 1048576"), "{mode}: {answer}");
        }
        if cryptsetup {
            must(Command::new("cryptsetup").arg("luksDump").arg(&path));
            // Opening a key slot goes through the kernel's ciphers, which a container may not have: only a wrong passphrase
            // (exit code 2) contradicts.
            let tested = Command::new("cryptsetup")
                .args(["open", "--test-passphrase", "--type", "luks1", "--key-file"])
                .arg(&pass)
                .arg(&path)
                .output()
                .unwrap();
            assert_ne!(tested.status.code(), Some(2), "{mode}: {}", String::from_utf8_lossy(&tested.stderr));
        }
    }
}

/// Runs cryptsetup with the passphrase of a file; `false`, and a word about it, if it can't do that here.
fn cryptsetup(args: &[&str], pass: &Path) -> bool {
    let done = Command::new("cryptsetup").args(["--batch-mode", "--key-file"]).arg(pass).args(args).output().unwrap();
    if !done.status.success() {
        eprintln!("SKIPPED: cryptsetup {}: {}", args.join(" "), String::from_utf8_lossy(&done.stderr).trim());
    }
    done.status.success()
}

#[test]
fn version_2_of_cryptsetup_opens() {
    if !have("cryptsetup") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, pass, more) = (dir.path().join("v2.luks"), dir.path().join("pass"), dir.path().join("more"));
    let volume_name = path.to_str().unwrap();
    fs::write(&pass, "pass").unwrap();
    fs::write(&more, "another").unwrap();
    let pbkdf2 = &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"][..];
    let argon2 = ["--pbkdf-parallel", "2", "--pbkdf-force-iterations", "4"];
    let argon2id = [&["--pbkdf", "argon2id", "--pbkdf-memory", "64"][..], &argon2].concat();
    let argon2i = [&["--pbkdf", "argon2i", "--pbkdf-memory", "32"][..], &argon2].concat();
    for (kdf, sector_size, cipher) in [
        (pbkdf2, "512", "aes-xts-plain64"),
        (&argon2id, "1024", "aes-xts-plain64"),
        (&argon2i, "2048", "aes-cbc-essiv:sha256"),
        (&argon2id, "4096", "aes-cbc-plain64"),
    ] {
        fs::write(&path, vec![0; 20 << 20]).unwrap();
        let format = ["luksFormat", "--type", "luks2", "--sector-size", sector_size, "--cipher", cipher, volume_name];
        if !cryptsetup(&[kdf, &format].concat(), &pass) {
            return;
        }
        let mut added = vec!["luksAddKey"];
        added.extend(pbkdf2);
        added.extend([volume_name, more.to_str().unwrap()]);
        if !cryptsetup(&added, &pass) {
            return;
        }
        let bytes = fs::read(&path).unwrap();
        let limits = Limits::default();
        let open = |bytes: Vec<u8>, passphrase: &[u8], limits: &Limits| {
            let disk = MemBlock::from(bytes);
            let volume = Volume::read(&disk, 0, false)?;
            assert!(matches!(volume, Volume::V2(_)));
            volume.unlock(&disk, 0, passphrase, limits)
        };
        for passphrase in [&b"pass"[..], b"another"] {
            let opened = open(bytes.clone(), passphrase, &limits).unwrap();
            assert_eq!(opened.sector_size().to_string(), sector_size);
        }
        assert_eq!(open(bytes.clone(), b"other", &limits).unwrap_err(), Error::WrongPassphrase);
        let costly = open(bytes.clone(), b"pass", &Limits { iterations: 10, memory: 1 << 30 }).unwrap_err();
        assert!(matches!(costly, Error::TooManyIterations(_)), "{costly}");
        if kdf.contains(&"argon2id") {
            let hungry = open(bytes.clone(), b"pass", &Limits { memory: (64 << 10) - 1, ..limits }).unwrap_err();
            assert_eq!(hungry, Error::TooMuchMemory(64 << 10));
        }
        // A damaged first header, in its binary part and in its text: the second one serves. Both: none.
        for at in [5000, 10, 0] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            let size = 0x4000;
            if at != 0 {
                open(damaged.clone(), b"pass", &limits).unwrap();
            }
            damaged[size + 5000] ^= 1;
            assert!(open(damaged, b"pass", &limits).is_err());
        }
    }
}

/// What QEMU wrote into a volume of version 1 is read after cryptsetup made one of version 2 of it.
#[test]
fn contents_of_version_2_are_decrypted() {
    if !have("cryptsetup") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, pass) = (dir.path().join("v.luks"), dir.path().join("pass"));
    fs::write(&pass, "pass").unwrap();
    fs::write(&path, vec![0; 6 << 20]).unwrap();
    let name = path.to_str().unwrap();
    let format = ["luksFormat", "--type", "luks1", "--pbkdf-force-iterations", "1000", name];
    if !cryptsetup(&format, &pass) {
        return;
    }
    let opts = format!("driver=luks,key-secret=s,file.filename={name}");
    let commands = ["-c", "write -P 0x5a 0 8k", "-c", "write -P 0xa5 1M 64k"];
    must(Command::new("qemu-io").args(["--object", "secret,id=s,data=pass", "--image-opts"]).args(commands).arg(opts));
    if !cryptsetup(&["convert", "--type", "luks2", name], &pass) {
        return;
    }
    let disk = MemBlock::from(fs::read(&path).unwrap());
    let volume = Volume::read(&disk, 0, false).unwrap();
    assert!(matches!(volume, Volume::V2(_)));
    let cipher = volume.unlock(&disk, 0, b"pass", &Limits::default()).unwrap();
    let payload = volume.payload().unwrap();
    for (at, len, byte) in [(0, 8 << 10, 0x5a), (1 << 20, 64 << 10, 0xa5)] {
        let mut read = vec![0; len];
        disk.read_at(payload.offset + at, &mut read).unwrap();
        cipher.decrypt(payload.position + at, &mut read).unwrap();
        assert!(read.iter().all(|found| *found == byte), "at {at}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Changed bytes of a header never panic, and never cost more than the limits allow.
    #[test]
    fn hostile_headers_of_version_1_end(changes in prop::collection::vec((0_usize..592, any::<u8>()), 1..6)) {
        let cipher = CipherSpec::named(b"aes", CipherMode::split(b"xts-plain64"), 32).unwrap();
        let options = CreateOptions {
            cipher, iv_hash: None, hash: Hash::Sha1, slot_iterations: 2, digest_iterations: 2, detached: false,
        };
        let fresh = create(&options, b"p", &mut Random::new(&[1; Random::SEED])).unwrap();
        let mut bytes = vec![0; fresh.header.payload_offset() as usize];
        bytes[..HEADER_LEN].copy_from_slice(&fresh.header.to_bytes());
        bytes[fresh.material.offset as usize..][..fresh.material.bytes.len()].copy_from_slice(&fresh.material.bytes);
        for (at, value) in changes {
            bytes[at] = value;
        }
        let disk = MemBlock::from(bytes);
        if let Ok(volume) = Volume::read(&disk, 0, false) {
            let opened = volume.unlock(&disk, 0, b"p", &Limits { iterations: 1000, memory: 1 << 16 });
            // Opens only where what was changed matters to no key slot that is tried before.
            if let Err(error) = opened {
                prop_assert!(!matches!(error, Error::OutOfMemory | Error::NotLuks), "{error}");
            }
        }
    }
}
