/// splitmix64: small, and the same on every machine.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.word() % (end as u64).max(1)) as usize
    }
}

/// The longest input that is made, bytes.
const MAX_LEN: usize = 1 << 20;

/// Numbers at which parsers break: ends of ranges, sizes, and flags.
const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    0x1f,
    0x7f,
    0x200,
    0x7fff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 61,
    1 << 62,
    1 << 63,
    u64::MAX,
];

/// Input number `number`: one of the seeds with a few changes. The first inputs are the seeds themselves.
pub fn mutate(seeds: &[Vec<u8>], seed: u64, number: u64) -> Vec<u8> {
    if let Some(plain) = usize::try_from(number).ok().and_then(|number| seeds.get(number)) {
        return plain.clone();
    }
    let mut random = Random::new(seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
    let pick = |random: &mut Random| seeds.get(random.below(seeds.len())).cloned().unwrap_or_default();
    let mut bytes = pick(&mut random);
    for _ in 0..1 + random.below(6) {
        match random.below(12) {
            0..=2 => flip(&mut bytes, &mut random),
            3..=7 => put_number(&mut bytes, &mut random),
            8 => fill(&mut bytes, &mut random),
            9 => bytes.truncate(random.below(bytes.len())),
            10 => copy_within(&mut bytes, &mut random),
            _ => splice(&mut bytes, &pick(&mut random), &mut random),
        }
    }
    bytes.truncate(MAX_LEN);
    bytes
}

/// A place: headers and tables lie at the start, so that is where changes tell most.
fn place(len: usize, random: &mut Random) -> usize {
    match random.below(4) {
        0 => random.below(len),
        1 => random.below(len.min(4096)),
        _ => random.below(len.min(160)),
    }
}

fn flip(bytes: &mut [u8], random: &mut Random) {
    let at = place(bytes.len(), random);
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << random.below(8);
    }
}

/// Overwrites a field of 1, 2, 4 or 8 bytes, at its own alignment, in either byte order.
fn put_number(bytes: &mut [u8], random: &mut Random) {
    let width = 1 << random.below(4);
    let at = place(bytes.len(), random) / width * width;
    let near = random.below(5) as u64;
    let number = match random.below(4) {
        0 => random.word(),
        1 => bytes.len() as u64,
        _ => NUMBERS[random.below(NUMBERS.len())],
    };
    let number = if random.below(3) == 0 { number.wrapping_add(near).wrapping_sub(2) } else { number };
    let big = random.below(2) == 0;
    if let Some(field) = bytes.get_mut(at..at + width) {
        if big {
            field.copy_from_slice(&number.to_be_bytes()[8 - width..]);
        } else {
            field.copy_from_slice(&number.to_le_bytes()[..width]);
        }
    }
}

fn fill(bytes: &mut [u8], random: &mut Random) {
    let at = place(bytes.len(), random);
    let len = 1 + random.below(64);
    let value = [0, 0xff, random.word() as u8][random.below(3)];
    bytes.iter_mut().skip(at).take(len).for_each(|byte| *byte = value);
}

fn copy_within(bytes: &mut [u8], random: &mut Random) {
    let (from, to) = (place(bytes.len(), random), random.below(bytes.len()));
    let len = (1 + random.below(512)).min(bytes.len() - from).min(bytes.len() - to);
    bytes.copy_within(from..from + len, to);
}

/// The start of one input and the rest of another.
fn splice(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = place(bytes.len(), random);
    bytes.truncate(at);
    bytes.extend_from_slice(other.get(at..).unwrap_or_default());
}
