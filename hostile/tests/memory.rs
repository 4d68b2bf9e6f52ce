//! The crates of the formats on all hostile images, in this process: no panic, and no more memory than a constant and the metadata that
//! is really there, whatever the fields claim.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::PathBuf;
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

#[test]
fn memory_follows_what_is_there() {
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
