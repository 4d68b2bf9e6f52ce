//! Detection against the genuine qemu-img, and over a corpus of real images where there is one.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use instar_guest::detect::{Detection, HEAD_LEN, TAIL_LEN, detect};
use instar_guest_protocol::message::Format;

fn name(format: Format) -> &'static str {
    match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
        Format::Qcow => "qcow",
        Format::Vmdk => "vmdk",
        Format::Vpc => "vpc",
        Format::Vhdx => "vhdx",
        Format::Vdi => "vdi",
        Format::Qed => "qed",
        Format::Parallels => "parallels",
        Format::Luks => "luks",
        Format::Bochs => "bochs",
        Format::Cloop => "cloop",
        other => panic!("no format that probing gives: {other:?}"),
    }
}

/// Head, tail and length of a stream, without holding it.
fn sample(mut stream: impl Read) -> std::io::Result<Detection> {
    let (mut head, mut tail, mut file_len) = (Vec::new(), Vec::new(), 0);
    let mut buf = vec![0; 1 << 20];
    loop {
        let len = stream.read(&mut buf)?;
        if len == 0 {
            return Ok(detect(&head, &tail, file_len));
        }
        file_len += len as u64;
        head.extend_from_slice(&buf[..len.min(HEAD_LEN - head.len())]);
        tail.extend_from_slice(&buf[len.saturating_sub(TAIL_LEN)..len]);
        tail.drain(..tail.len().saturating_sub(TAIL_LEN));
    }
}

#[test]
fn the_corpus_is_probed_as_by_qemu_img() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus");
    let Ok(manifest) = std::fs::read_to_string(corpus.join("MANIFEST.tsv")) else {
        return eprintln!("SKIPPED: no corpus at {}", corpus.display());
    };
    let mut lines = manifest.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    let header = lines.next().unwrap();
    let column = |title: &str| header.iter().position(|known| *known == title).unwrap();
    let (title, kind, stored, probed) = (column("name"), column("kind"), column("stored_as"), column("probed_format"));

    let (mut seen, mut wrong) = (0, Vec::new());
    for line in lines {
        let path = corpus.join(line[stored]);
        let found = if path.extension().is_some_and(|extension| extension == "zst") {
            let Ok(mut zstd) = Command::new("zstd").arg("-dcq").arg(&path).stdout(Stdio::piped()).spawn() else {
                return eprintln!("SKIPPED: zstd can't be run");
            };
            let found = sample(zstd.stdout.take().unwrap()).unwrap();
            assert!(zstd.wait().unwrap().success(), "{}", path.display());
            found
        } else {
            sample(File::open(&path).unwrap()).unwrap()
        };
        seen += 1;
        let good = match line[probed] {
            // qemu-img could not open it, so its answer is not known; ours goes by the kind below.
            "-" => true,
            // By the file name alone: see the module.
            "dmg" => found.format == Format::Raw && found.specific == Format::Dmg,
            probed => name(found.format) == probed,
        } && specific_of(line[kind]).is_none_or(|expected| found.specific == expected)
            // A boot sector alone: its partitions would lie behind the end.
            || line[title] == "grub_mbr.raw" && found.specific == Format::Raw;
        if !good {
            wrong.push(format!("{} ({}, probed {}): {found:?}", line[title], line[kind], line[probed]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 100, "only {seen} images in the corpus");
}

/// What the corpus says that a file is, in its own words.
fn specific_of(kind: &str) -> Option<Format> {
    let kinds = [
        ("qcow2", Format::Qcow2),
        ("vhdx", Format::Vhdx),
        ("vhd ", Format::Vpc),
        ("vdi", Format::Vdi),
        ("qed", Format::Qed),
        ("luks", Format::Luks),
        ("dmg", Format::Dmg),
        ("ewf", Format::Ewf),
        ("iso", Format::Iso),
        ("raw gpt", Format::Gpt),
        ("raw mbr", Format::Mbr),
        ("raw bitlocker", Format::Bitlocker),
    ];
    kinds.into_iter().find(|(start, _)| kind.starts_with(start)).map(|(_, format)| format)
}

/// Pieces of which files are put together, with an opinion that qemu-img can be asked about.
const PIECES: [&[u8]; 16] = [
    b"QFI\xfb\0\0\0\x01",
    b"QFI\xfb\0\0\0\x02",
    b"LUKS\xba\xbe\0\x01",
    b"KDMV\x01\0\0\0",
    b"conectix",
    b"vhdxfile",
    b"WithouFreSpacExt\x02\0\0\0",
    b"#",
    b" ",
    b"\n",
    b"\r\n",
    b"version=1",
    b"version=3\n",
    b"\0",
    b"\x7f\x10\xda\xbe",
    b"comment",
];

/// The driver that qemu-img chose, as far as its message tells: none of the files can be opened but as raw.
fn probed_by_qemu(path: &Path) -> Option<String> {
    let done = match Command::new("qemu-img").args(["info", "--output=json"]).arg(path).output() {
        Ok(done) => done,
        Err(error) => {
            eprintln!("SKIPPED: qemu-img can't be run: {error}");
            return None;
        }
    };
    let message = String::from_utf8_lossy(&done.stderr).into_owned();
    if done.status.success() {
        return Some("raw".into());
    }
    let tells = [
        ("VDI", "vdi"),
        ("VHDX", "vhdx"),
        ("VMDK", "vmdk"),
        ("L1 entry size", "vmdk"),
        ("LUKS", "luks"),
        ("header checksum", "vpc"),
        ("sectors per track", "parallels"),
        ("must be at least 2 bytes", "qcow"),
        ("cluster size: 2^0", "qcow2"),
    ];
    let known = tells.iter().find(|(words, _)| message.contains(words));
    Some(known.unwrap_or_else(|| panic!("unknown message: {message}")).1.into())
}

#[test]
fn made_up_files_are_probed_as_by_qemu_img() {
    let dir: PathBuf = std::env::temp_dir().join(format!("instar-detect-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("file.img");
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut below = |end: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % end as u64) as usize
    };
    let mut seen = std::collections::BTreeSet::new();
    for case in 0..300 {
        let mut bytes = Vec::new();
        // Either a header mark and perhaps VDI's, or text.
        if below(2) == 0 {
            bytes.extend_from_slice(PIECES[below(7)]);
            bytes.resize(64, 0);
            bytes.extend_from_slice(PIECES[13 + below(2)]);
            // Room behind the header, so that every driver comes to its own complaint.
            bytes.resize(64 << 10, 0);
        } else {
            for _ in 0..below(5) {
                bytes.extend_from_slice(PIECES[7 + below(6)]);
            }
            bytes.extend_from_slice([&b"version=1\n"[..], b"version=2\r\n", b"version=2\n"][below(3)]);
            bytes.resize(4096, 0);
        }
        std::fs::write(&path, &bytes).unwrap();
        let Some(theirs) = probed_by_qemu(&path) else { break };
        let ours = sample(&bytes[..]).unwrap();
        let start = &bytes[..80];
        assert_eq!(name(ours.format), theirs, "case {case}: {}", start.escape_ascii());
        seen.insert(theirs);
    }
    std::fs::remove_dir_all(&dir).unwrap();
    eprintln!("drivers seen: {seen:?}");
}
