//! VMDK images: opened, walked and read; the same bytes serve as every extent.

use instar_blockio::{BlockMapExt, BlockRead, BlockWrite, FileId, MemBlock};
use instar_vmdk::{CreateOptions, Image, OpenOptions, Subformat, Writer, create};

use crate::Disk;

/// The file may grow to this.
const SPACE: u64 = 8 << 20;
/// Extent files that are attached.
const FILES: u32 = 8;
/// Extents looked at in one walk.
const EXTENTS: usize = 100;
/// Bytes of the disk that are looked at in one walk.
const RANGE: u64 = 256 << 10;

/// The bytes are an image file.
pub fn run(data: &[u8]) {
    for strict in [false, true] {
        let Ok(mut image) = Image::open(Disk::of(data), FileId(1), &OpenOptions { strict }) else {
            break;
        };
        for id in 0..FILES {
            let Some((number, _)) = image.wanted() else { break };
            if image.attach(number, Disk::of(data), FileId(2 + id)).is_err() {
                break;
            }
        }
        walk(&image);
    }
    if let Ok(mut writer) = Writer::open(Disk::of(data).with_room(SPACE), FileId(1), 9) {
        let size = writer.size();
        for at in [0, size / 2, size.saturating_sub(512)] {
            let _ = writer.write_at(at, &[7; 512][..size.saturating_sub(at).min(512) as usize]);
        }
        let _ = writer.finish();
    }
}

fn walk(image: &Image<Disk>) {
    let size = image.size();
    let _ = (image.descriptor(), image.extents_info().count(), image.grain_size());
    for start in [0, size / 3, size.saturating_sub(1000)] {
        let mut at = start;
        for extent in image.extents(start..size.min(start.saturating_add(RANGE))).take(EXTENTS) {
            let Ok(extent) = extent else { break };
            assert!(extent.offset == at && extent.len > 0 && extent.end() <= size, "{extent:?} at {at}");
            at = extent.end();
            let mut buf = vec![0; extent.len.min(4096) as usize];
            let _ = image.read_at(extent.offset, &mut buf);
        }
    }
}

/// A sparse image, a stream, and a descriptor.
pub fn seeds() -> Vec<Vec<u8>> {
    let made = [Subformat::MonolithicSparse, Subformat::StreamOptimized].into_iter().filter_map(|subformat| {
        let mut file = MemBlock::default();
        let options =
            CreateOptions { size: 1 << 20, subformat, name: b"a.vmdk".to_vec(), cid: 7, ..CreateOptions::default() };
        let mut writer = create(&mut file, FileId(0), Vec::new(), options).ok()?;
        writer.write_at(1 << 16, &[5; 1 << 16]).ok()?;
        writer.finish().ok()?;
        let mut bytes = vec![0; file.size() as usize];
        file.read_at(0, &mut bytes).ok()?;
        Some(bytes)
    });
    let text = b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 8 FLAT \"a\" 0\nRW 9 ZERO\n";
    made.chain([text.to_vec()]).collect()
}
