//! LUKS volumes of both versions: no passphrase opens them, which must take no time.

use sha2::{Digest, Sha256};

use crate::bytes::{Image, Order};
use crate::case::{Case, Due, Group, field};
use Due::{Anything, Description, Refusal, Unreadable};

const SLOT: usize = 208;

/// A volume of version 1 with one key slot.
fn base() -> Image {
    let image = Image::new().put(0, b"LUKS\xba\xbe\0\x01").put(8, b"aes").put(40, b"xts-plain64").put(72, b"sha256");
    let image = image.be32(104, 4096).be32(108, 64).put(112, &[3; 20]).put(132, &[4; 32]).be32(164, 1000);
    let image = image.put(168, b"00000000-0000-0000-0000-000000000000");
    let image = (0..8).fold(image, |image, n| {
        let at = SLOT + 48 * n;
        let active = if n == 0 { 0x00ac_71f3 } else { 0x0000_dead };
        image
            .be32(at, active)
            .be32(at + 4, 1000)
            .put(at + 8, &[5; 32])
            .be32(at + 40, 8 + 504 * n as u32)
            .be32(at + 44, 4000)
    });
    image.with_len((4096 << 9) + (1 << 20))
}

/// A volume of version 2 with this JSON area.
fn second(json: &[u8], size: u64) -> Image {
    let head =
        Image::new().put(0, b"LUKS\xba\xbe\0\x02").be64(8, size).be64(16, 3).put(72, b"sha256").put(104, &[6; 64]);
    let head = head.put(168, b"00000000-0000-0000-0000-000000000000").put(4096, json).with_len(16_384);
    let head = head.put(16_383, &[0]);
    let sum = Sha256::digest(head.bytes());
    head.put(448, &sum).with_len(16 << 20)
}

fn metadata(change: &[(&str, &str)]) -> String {
    let text = r#"{"keyslots":{"0":{"type":"luks2","key_size":64,"af":{"type":"luks1","stripes":4000,"hash":"sha256"},"area":{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64","key_size":64},"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1000,"salt":"BQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU="}}},"tokens":{},"segments":{"0":{"type":"crypt","offset":"8388608","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":512}},"digests":{"0":{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256","iterations":1000,"salt":"BQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU=","digest":"BQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU="}},"config":{"json_size":"12288","keyslots_size":"8355840"}}"#;
    change.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Adds the cases. Whatever the header says, no passphrase fits: reading fails.
pub fn add(cases: &mut Vec<Case>) {
    let mut group = Group::new(cases, "luks", "image.luks");
    const MAX32: u64 = u32::MAX as u64;
    group.fields(
        &base(),
        Order::Big,
        |image| image,
        &[
            field("version", 6, 2, &[(0, Refusal), (3, Refusal), (0xffff, Refusal)]),
            field("payload_offset", 104, 4, &[(0, Refusal), (1, Refusal), (1 << 31, Unreadable), (MAX32, Unreadable)]),
            field("key_bytes", 108, 4, &[(0, Unreadable), (1, Unreadable), (1 << 20, Unreadable), (MAX32, Unreadable)]),
            field("digest_iterations", 164, 4, &[(0, Unreadable), (MAX32, Unreadable)]),
            field("slot_active", SLOT, 4, &[(0, Unreadable), (MAX32, Unreadable)]),
            field("slot_iterations", SLOT + 4, 4, &[(0, Unreadable), (1 << 31, Unreadable), (MAX32, Unreadable)]),
            field("key_material", SLOT + 40, 4, &[(0, Unreadable), (4000, Unreadable), (MAX32, Unreadable)]),
            field(
                "stripes",
                SLOT + 44,
                4,
                &[(0, Unreadable), (1, Unreadable), (1 << 31, Unreadable), (MAX32, Unreadable)],
            ),
        ],
    );
    let all = (0..8).fold(base(), |image, n| image.be32(SLOT + 48 * n, 0x00ac_71f3).be32(SLOT + 48 * n + 4, u32::MAX));
    group.add("slot/eight-of-max-iterations", all, Unreadable).without_qemu();
    let same = (1..8).fold(base(), |image, n| image.be32(SLOT + 48 * n, 0x00ac_71f3).be32(SLOT + 48 * n + 40, 8));
    group.add("slot/all-in-one-place", same, Unreadable);
    for (name, at, text) in [
        ("cipher-unknown", 8, &b"nonesuch\0"[..]),
        ("cipher-escape", 8, b"\x1b[31maes"),
        ("cipher-not-ended", 8, &[b'a'; 32]),
        ("mode-unknown", 40, b"xyz-plain64\0"),
        ("mode-essiv-of-nothing", 40, b"cbc-essiv:nonesuch\0"),
        ("mode-not-ended", 40, &[b'x'; 32]),
        ("hash-unknown", 72, b"nonesuch\0"),
        ("hash-not-ended", 72, &[b'h'; 32]),
        ("uuid-escape", 168, b"\x1b[31m\x07\r\n"),
        ("uuid-not-ended", 168, &[b'u'; 40]),
    ] {
        group.add(format!("text/{name}"), base().put(at, text), Unreadable);
    }
    group.truncations(&base(), 592, &[6, 8, 100, 208, 300, 591]);
    for (name, len) in [("after-the-header", 592), ("in-the-key-material", 9000), ("before-the-payload", 4096 << 9)] {
        group.add(format!("truncated/{name}"), base().with_len(len), Anything);
    }
    second_version(&mut group);
}

fn second_version(group: &mut Group<'_>) {
    let mut add = |name: &str, json: &[u8], due| {
        // qemu-img knows version 1 only.
        group.add(format!("version-2/{name}"), second(json, 16_384), due).without_qemu();
    };
    add("legal", metadata(&[]).as_bytes(), Unreadable);
    for (name, from, to) in [
        (
            "slot-iterations-max",
            "\"iterations\":1000,\"salt\":\"BQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU=\"}}}",
            "\"iterations\":4294967295,\"salt\":\"BQUF\"}}}",
        ),
        ("all-iterations-max", "\"iterations\":1000", "\"iterations\":4294967295"),
        ("iterations-huge", "\"iterations\":1000", "\"iterations\":99999999999999999999999"),
        ("iterations-negative", "\"iterations\":1000", "\"iterations\":-1"),
        ("stripes-max", "\"stripes\":4000", "\"stripes\":4294967295"),
        ("stripes-0", "\"stripes\":4000", "\"stripes\":0"),
        ("area-far", "\"offset\":\"32768\"", "\"offset\":\"18446744073709551615\""),
        ("area-no-number", "\"offset\":\"32768\"", "\"offset\":\"x\""),
        ("area-size-max", "\"size\":\"258048\"", "\"size\":\"18446744073709551615\""),
        ("key-size-max", "\"key_size\":64", "\"key_size\":4294967295"),
        ("key-size-0", "\"key_size\":64", "\"key_size\":0"),
        ("segment-far", "\"offset\":\"8388608\"", "\"offset\":\"18446744073709551104\""),
        ("sector-size-0", "\"sector_size\":512", "\"sector_size\":0"),
        ("sector-size-max", "\"sector_size\":512", "\"sector_size\":2147483648"),
        ("kdf-unknown", "\"type\":\"pbkdf2\",\"hash\"", "\"type\":\"nonesuch\",\"hash\""),
        (
            "argon2-memory",
            "\"type\":\"pbkdf2\",\"hash\":\"sha256\",\"iterations\":1000",
            "\"type\":\"argon2id\",\"time\":4,\"memory\":4294967295,\"cpus\":4",
        ),
        (
            "argon2-time",
            "\"type\":\"pbkdf2\",\"hash\":\"sha256\",\"iterations\":1000",
            "\"type\":\"argon2id\",\"time\":4294967295,\"memory\":32,\"cpus\":1",
        ),
        (
            "argon2-lanes",
            "\"type\":\"pbkdf2\",\"hash\":\"sha256\",\"iterations\":1000",
            "\"type\":\"argon2id\",\"time\":1,\"memory\":64,\"cpus\":4294967295",
        ),
        ("cipher-escape", "aes-xts-plain64", "\\u001b[31maes"),
        ("digest-of-no-slot", "\"keyslots\":[\"0\"]", "\"keyslots\":[\"99\"]"),
    ] {
        add(name, metadata(&[(from, to)]).as_bytes(), Anything);
    }
    add("json/empty", b"", Refusal);
    add("json/open", b"{\"keyslots\":{", Refusal);
    add("json/no-object", b"[]", Refusal);
    add("json/nested", "[".repeat(12_000).as_bytes(), Refusal);
    add(
        "json/nested-in-place",
        format!("{{\"tokens\":{}1{}}}", "[".repeat(5000), "]".repeat(5000)).as_bytes(),
        Refusal,
    );
    add("json/no-utf-8", b"{\"\xff\xfe\":1}", Refusal);
    let slots: Vec<String> = (0..200).map(|n| format!("\"{n}\":{{}}")).collect();
    add("json/many-slots", format!("{{\"keyslots\":{{{}}}}}", slots.join(",")).as_bytes(), Refusal);
    for (name, size) in [("0", 0), ("1", 1), ("odd", 16_385), ("huge", 1 << 40), ("max", u64::MAX)] {
        group
            .add(format!("version-2/header-size-{name}"), second(metadata(&[]).as_bytes(), size), Refusal)
            .without_qemu();
    }
    group.add("version-2/sum", second(metadata(&[]).as_bytes(), 16_384).put(448, &[1; 8]), Refusal).without_qemu();
    let described = second(metadata(&[]).as_bytes(), 16_384).put(24, b"\x1b[31mlabel\x07");
    group.add("version-2/escape-in-label", described, Anything).without_qemu();
    group.add("version-1/described", base(), Description).without_qemu();
}
