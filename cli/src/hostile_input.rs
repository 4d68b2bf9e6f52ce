//! What comes from outside, as it should not be: words of the command line, and answers of a guest that was taken over.
//!
//! `INSTAR_FUZZ_INPUTS=10000000 cargo test --release -p instar hostile_input` makes a long run of it.

#[path = "../../fuzz/src/mutate.rs"]
mod mutate;

use std::sync::atomic::{AtomicU64, Ordering};

use instar_guest_protocol::message::{
    Bitmap, Cause, Failure, Format, ImageInfo, LuksInfo, Qcow2Info, Snapshot, VmdkExtent, VmdkInfo,
};
use prost::Message;

use crate::args::{self, Argument, Key, Operands, Opt};
use crate::commands::Objects;
use crate::config;
use crate::creation;
use crate::image_opts::ImageSpec;
use crate::messages;
use crate::nbd::Address;
use crate::open::{FileKind, Stat};
use crate::options::{OptionList, Options};
use crate::output::json;
use crate::output::report::Described;
use crate::size;
use crate::version::QemuVersion;

/// Feeds `run` with changes of the seeds; says after a panic which input it was.
fn feed(seeds: &[Vec<u8>], run: impl Fn(u64, &[u8])) {
    struct Tell(AtomicU64);
    impl Drop for Tell {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("input {}", self.0.load(Ordering::Relaxed));
            }
        }
    }
    let count = std::env::var("INSTAR_FUZZ_INPUTS").map_or(5000, |text| text.parse().expect("a number"));
    let at = Tell(AtomicU64::new(0));
    for number in 0..count {
        at.0.store(number, Ordering::Relaxed);
        run(number, &mutate::mutate(seeds, 2026, number));
    }
}

const fn opt(key: Key, short: Option<u8>, long: &'static str, argument: Argument) -> Opt {
    Opt { key, short, long: Some(long), argument, abbreviable: true }
}

const TABLE: [Opt; 5] = [
    opt(Key::Help, Some(b'h'), "help", Argument::None),
    opt(Key::Options, Some(b'o'), "options", Argument::Required),
    opt(Key::Output, None, "output", Argument::Required),
    opt(Key::Object, None, "object", Argument::Required),
    opt(Key::Trace, Some(b'T'), "trace", Argument::Optional),
];

#[test]
fn any_words_are_survived() {
    let lines: [&str; 20] = [
        "-o\0cluster_size=64k,compat=1.1\0--output=json\0a.qcow2\x0010G",
        "-ho\0size=1M\0--\0-x\0--trace=a",
        "cluster_size=4096,extended_l2=on,lazy_refcounts=off,preallocation=metadata,backing_file=a,,b",
        "subformat=streamOptimized,adapter_type=lsilogic,hwversion=4,compat6=on",
        "block_size=1M,log_size=4M,block_state_zero=off,subformat=fixed",
        "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10",
        "size=1.5T,?,help",
        "8388607.99999T",
        "0x7fffffffffffffff",
        "1e999",
        "driver=qcow2,file.driver=file,file.filename=a,backing.driver=raw",
        "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a\"},\"size\":1e999}",
        "json:{\"a\":[[[[[{\"b\":null}]]]]]}",
        "driver=nbd,host=localhost,port=10809,export=x",
        "nbd://[::1]:10809/a%20b",
        "nbd+unix:///x?socket=/tmp/s",
        "nbd:unix:/tmp/s:exportname=a",
        "allow-dirs = [\"/srv\"]\nrequire-known-raw = true\ntimeout = 60\nqemu-version = \"8.2\"\n",
        "secret,id=sec0,data=abc,format=base64",
        "secret,id=sec0,data=%2x,,keyid=k,iv=AAAA",
    ];
    let seeds: Vec<Vec<u8>> = lines.iter().map(|line| line.as_bytes().to_vec()).collect();
    feed(&seeds, |number, bytes| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let words: Vec<String> = text.split('\0').map(str::to_owned).collect();
        for operands in [Operands::Anywhere, Operands::EndOptions] {
            let parsed = args::parse(&TABLE, &words, operands);
            assert!(parsed.operands.len() <= words.len());
        }
        let _ = size::parse(&text);
        let _ = size::parse_named("a number", &text, 1, 100).map(|value| assert!((1..=100).contains(&value)));
        let _ = size::parse_count("a number", &text, 1, 100).map(|value| assert!((1..=100).contains(&value)));
        let _ = size::parse_image_size(&text).map(|value| assert!(value <= 1 << 63));
        let _ = size::parse_sparse_size(&text);
        let mut list = OptionList::default();
        if list.add(&text).is_ok() {
            let format = creation::FORMATS[number as usize % creation::FORMATS.len()];
            let _ = Options::parse(format, &list).map(|options| (format.layout)(&options, &Objects::default()));
        }
        for format in [None, Some("qcow2"), Some(&text[..])] {
            let _ = ImageSpec::of_operand(&text, number % 2 == 0, format);
        }
        let _ = ImageSpec::of_new_backing(&text, None);
        let _ = Address::parse(&text);
        let _ = config::parse(&text);
        if !text.contains("file") {
            let _ = Objects::default().add(&text);
        }
    });
}

/// No byte that a terminal takes for a command.
fn expect_plain(text: &str) {
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
}

#[test]
fn any_answer_is_told_without_control_bytes() {
    let info = ImageInfo {
        format: Format::Qcow2.into(),
        virtual_size: 1 << 30,
        backing_file: Some(b"../b\x1b[2J".to_vec()),
        backing_format: Some(b"raw\0".to_vec()),
        ..ImageInfo::default()
    };
    let snapshot = Snapshot { id: b"1\x07".to_vec(), name: b"\xff\xfe\n".to_vec(), ..Snapshot::default() };
    let bitmap = Bitmap { name: b"\x9b31m".to_vec(), granularity: 1 << 16, ..Bitmap::default() };
    let infos = [
        info.clone(),
        ImageInfo { snapshots: vec![snapshot.clone(), snapshot], ..info.clone() },
        ImageInfo { qcow2: Some(Qcow2Info { bitmaps: vec![bitmap], ..Qcow2Info::default() }), ..info },
        ImageInfo {
            format: Format::Vmdk.into(),
            vmdk: Some(VmdkInfo { extents: vec![VmdkExtent::default(); 2], ..VmdkInfo::default() }),
            ..ImageInfo::default()
        },
        ImageInfo {
            format: Format::Luks.into(),
            luks: Some(LuksInfo { cipher_name: b"aes\r".to_vec(), key_bytes: u32::MAX, ..LuksInfo::default() }),
            ..ImageInfo::default()
        },
    ];
    let mut seeds: Vec<Vec<u8>> = infos.iter().map(ImageInfo::encode_to_vec).collect();
    for cause in [Cause::TargetTooSmall, Cause::OpenRefused, Cause::BitmapInconsistent] {
        let failure = Failure { cause: cause.into(), text: b"a\x1bb".to_vec(), value: u64::MAX, ..Failure::default() };
        seeds.push(failure.encode_to_vec());
    }
    let stat = Stat { kind: FileKind::Regular, identity: (0, 0), len: 1000, allocated: 4096 };
    feed(&seeds, |_, bytes| {
        if let Ok(info) = ImageInfo::decode(bytes) {
            let described = Described {
                info: &info,
                shown: "a".to_owned(),
                layers: Vec::new(),
                file: "a",
                stat,
                own_allocated: stat.allocated,
                file_len: stat.len,
                parts: Vec::new(),
                version: QemuVersion::default(),
                extra: Vec::new(),
            };
            expect_plain(&described.human());
            let printed = json::print(&described.node());
            expect_plain(&printed);
            serde_json::from_str::<serde_json::Value>(&printed).expect("what is printed is JSON");
        }
        if let Ok(failure) = Failure::decode(bytes) {
            expect_plain(&messages::warning(&failure));
            expect_plain(&messages::open_failure(&failure).to_string());
            expect_plain(&messages::work_failure(&failure).to_string());
            expect_plain(&messages::create_failure(&failure, Format::Qcow2).to_string());
        }
    });
}
