//! The crates of the formats on all hostile images, in this process: no panic, and no more memory than a constant and the metadata that
//! is really there, whatever the fields claim.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use instar_blockio::{BlockMap, BlockMapExt, BlockRead, Error, ErrorKind, FileId, Result};
use instar_hostile::{Content, Image, Surroundings, suite};
use instar_legacy::{bochs, cloop, dmg, parallels, qcow, qed, vdi};

/// Counts the bytes that are allocated, and the most there were.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `at` is from `alloc` above, so from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What opening, reading and checking may take beside the bytes that are there: caches, buffers of units, counts.
const MOST: usize = 24 << 20;

/// A file of the suite.
struct Hostile<'a>(&'a Image);

impl BlockRead for Hostile<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= self.0.size() => self.0.read(offset as usize, buf),
            _ => return Err(Error::new(ErrorKind::OutOfBounds).at(offset)),
        }
        Ok(())
    }
}

/// Looks at some runs of a disk, and reads a little of each.
fn walk(disk: &impl BlockMap) {
    let size = disk.size();
    let mut buf = [0; 4096];
    for start in [0, size / 2, size.saturating_sub(70_000)] {
        for extent in disk.extents(start..size).take(64) {
            let Ok(extent) = extent else { break };
            let len = extent.len.min(4096) as usize;
            let _ = disk.read_at(extent.offset, &mut buf[..len]);
        }
    }
}

/// Most bytes allocated since the last question, beyond `before`.
fn peak_since(before: usize) -> usize {
    PEAK.swap(NOW.load(Ordering::Relaxed), Ordering::Relaxed).saturating_sub(before)
}

/// Most memory that opening and reading an image takes, and that checking it takes.
fn try_image<I: BlockMap, E>(
    open: impl FnOnce() -> std::result::Result<I, E>,
    check: impl FnOnce(&I),
) -> (usize, usize) {
    let before = NOW.load(Ordering::Relaxed);
    peak_since(before);
    let Ok(image) = open() else { return (peak_since(before), 0) };
    walk(&image);
    let reading = peak_since(before);
    check(&image);
    (reading, peak_since(before))
}

fn peaks(format: &str, image: &Image) -> (usize, usize) {
    let id = FileId(0);
    macro_rules! check {
        ($crate_name:ident) => {
            try_image(
                || $crate_name::Image::open(Hostile(image), id, &Default::default()),
                |image| {
                    let _ = $crate_name::check(image, &mut |_| ());
                },
            )
        };
    }
    macro_rules! legacy {
        ($format:ident, $check:expr) => {
            try_image(|| $format::Image::open(Hostile(image), id, &Default::default()), $check)
        };
    }
    match format {
        "qcow2" => try_image(
            || instar_qcow2::Image::open(Hostile(image), id, &Default::default()),
            |image| {
                let _ = image.check(&mut |_| ());
            },
        ),
        "vmdk" => check!(instar_vmdk),
        "vpc" => check!(instar_vhd),
        "vhdx" => check!(instar_vhdx),
        "qcow" => legacy!(qcow, |_| ()),
        "qed" => legacy!(qed, |image| {
            let _ = image.check(&mut |_| ());
        }),
        "vdi" => legacy!(vdi, |image| {
            let _ = image.check(&mut |_| ());
        }),
        "parallels" => legacy!(parallels, |image| {
            let _ = image.check(&mut |_| ());
        }),
        "dmg" => legacy!(dmg, |_| ()),
        "bochs" => legacy!(bochs, |_| ()),
        "cloop" => legacy!(cloop, |_| ()),
        _ => (0, 0),
    }
}

/// The count is of the whole process: one test at a time.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn memory_follows_what_is_there() {
    let _turn = TURN.lock();
    let cases = suite(&Surroundings { outside: PathBuf::from("/nowhere"), port: 1 });
    let mut tried = 0;
    let mut most = [(0, ""), (0, "")];
    for case in &cases {
        let format = case.name.split('/').next().unwrap_or_default();
        for (_, content) in case.files.iter().filter(|(name, _)| name == case.image) {
            let Content::Bytes(image) = content else { continue };
            tried += 1;
            let present = usize::try_from(image.present()).unwrap();
            let (reading, checking) = peaks(format, image);
            for (slot, peak) in most.iter_mut().zip([reading, checking]) {
                *slot = (*slot).max((peak, case.name.as_str()));
            }
            assert!(reading <= MOST + 4 * present, "{}: {reading} bytes to read {present}", case.name);
            assert!(checking <= MOST + 4 * present, "{}: {checking} bytes to check {present}", case.name);
        }
    }
    println!("{tried} images, most memory {most:?}");
    assert!(tried >= 500, "{tried}");
}

/// Values that fields are set to.
const EXTREMES: [u64; 10] =
    [0, 1, 0x7fff_ffff, 0xffff_ffff, u64::MAX, 1 << 63, i64::MAX as u64, 511, (1 << 55) - 1, 1 << 40];

/// Numbers from nowhere, the same in each run (xorshift64*, Vigna 2016).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// An image with some changes: bits flipped, fields at their extremes, the end cut off, pieces copied elsewhere.
fn mutated(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + random.below(4) {
        // Headers and tables stand in front, as a rule.
        let reach = if random.below(3) > 0 { bytes.len().min(1024) } else { bytes.len() };
        let at = random.below(reach);
        match random.below(8) {
            0 | 1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
            2 => bytes.truncate(at.max(8)),
            3 => {
                let (from, len) = (random.below(bytes.len()), 1 + random.below(600));
                let piece: Vec<u8> = bytes.iter().skip(from).take(len).copied().collect();
                bytes.iter_mut().skip(at).zip(piece).for_each(|(old, new)| *old = new);
            }
            other => {
                let value = EXTREMES[random.below(EXTREMES.len())];
                let value = if other % 2 == 0 { value.to_le_bytes() } else { value.to_be_bytes() };
                let width = [2, 4, 8][random.below(3)];
                let part = if other % 2 == 0 { &value[..width] } else { &value[8 - width..] };
                bytes.iter_mut().skip(at & !1).zip(part).for_each(|(old, new)| *old = *new);
            }
        }
    }
    bytes
}

/// The images of the suite, which are wrong in one place each, made wrong in some more.
#[test]
fn memory_follows_what_is_there_after_mutations() {
    const LARGEST: u64 = 1 << 20;
    let _turn = TURN.lock();
    let cases = suite(&Surroundings { outside: PathBuf::from("/nowhere"), port: 1 });
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut tried = BTreeMap::new();
    for case in &cases {
        let format = case.name.split('/').next().unwrap_or_default();
        for (_, content) in case.files.iter().filter(|(name, _)| name == case.image) {
            let Content::Bytes(image) = content else { continue };
            if image.size() > LARGEST || image.size() == 0 {
                continue;
            }
            let bytes = image.bytes();
            let changed = mutated(&bytes, &mut random);
            let (len, image) = (changed.len(), Image::new().put(0, &changed));
            let (reading, checking) = peaks(format, &image);
            *tried.entry(format).or_insert(0) += 1;
            let most = MOST + 4 * len;
            if reading.max(checking) > most {
                let at = std::env::temp_dir().join("instar-memory.img");
                std::fs::write(&at, &changed).unwrap();
                panic!("{}: {reading} bytes to read, {checking} to check {len}: {}", case.name, at.display());
            }
        }
    }
    println!("{tried:?}");
    for format in ["qcow2", "vmdk", "vpc", "vhdx", "qcow", "qed", "vdi", "parallels", "dmg", "bochs", "cloop"] {
        assert!(tried.get(format).is_some_and(|count| *count >= 7), "{format}: {tried:?}");
    }
}
