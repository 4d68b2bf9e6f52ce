//! Compressed units: any stream decodes the same twice or is refused, and what is encoded comes back.

use instar_codec::{Codec, Decoder, Encoder};

const CODECS: [Codec; 3] = [Codec::Deflate, Codec::Zlib, Codec::Zstd];

/// Byte 0 names the codec, bytes 1 and 2 the unit's length; the stream follows.
pub fn run(data: &[u8]) {
    let [codec, low, high, stored @ ..] = data else { return };
    let codec = CODECS[usize::from(*codec) % CODECS.len()];
    let len = usize::from(u16::from_le_bytes([*low, *high]));

    let (mut first, mut second) = (vec![0; len], vec![0xff; len]);
    let mut decoder = Decoder::new();
    let done = decoder.decode(codec, stored, &mut first);
    assert_eq!(decoder.decode(codec, stored, &mut second), done);
    assert!(done.is_err() || first == second, "what was in the buffer must not matter");

    let mut stream = Vec::new();
    if let Ok(Some(len)) = Encoder::new(codec).encode(stored, &mut stream) {
        assert!(len == stream.len() && len < stored.len());
        let mut back = vec![0; stored.len()];
        decoder.decode(codec, &stream, &mut back).expect("an encoded unit decodes");
        assert_eq!(back, stored);
    }
}

/// Streams of each codec, of zeros, of text and of what does not shrink much.
pub fn seeds() -> Vec<Vec<u8>> {
    let text = b"a disk image is a file that stands for a disk, sector for sector. ".repeat(60);
    let noise: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(i) >> 5) as u8 & 0x3f).collect();
    let mut seeds = Vec::new();
    for (index, codec) in CODECS.into_iter().enumerate() {
        for plain in [&[0; 4096][..], &text[..2048], &noise[..]] {
            let [low, high] = (plain.len() as u16).to_le_bytes();
            let mut seed = vec![index as u8, low, high];
            if let Ok(Some(_)) = Encoder::new(codec).encode(plain, &mut seed) {
                seeds.push(seed);
            }
        }
    }
    seeds
}
