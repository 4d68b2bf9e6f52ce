//! Existing qcow2 images whose snapshots, bitmaps and options are changed in place: whatever the file says, each change
//! succeeds or fails cleanly.

use instar_blockio::{BlockWrite, FileId, MemBlock};
use instar_qcow2::{AmendOptions, Bitmaps, NewSnapshot, Result, SnapshotSelector, Writer};

use super::qcow2_write;
use crate::Disk;

/// The file may grow to this: what a hostile table asks for beyond it does not fit on the disk.
const SPACE: u64 = 8 << 20;

/// The last bytes say what is done, the others are an image file.
pub fn run(data: &[u8]) {
    let (image, steps) = data.split_at(data.len().saturating_sub(4));
    let Ok(mut writer) = Writer::open(Disk::of(image).with_room(SPACE), FileId(0), None) else { return };
    let mut bitmaps = writer.load_bitmaps().unwrap_or_default();
    for step in steps {
        // An image that failed a change may well refuse the next.
        let _ = change(&mut writer, &mut bitmaps, *step);
    }
    let _ = writer.store_bitmaps(&mut bitmaps);
    let _ = writer.finish();
}

fn change(writer: &mut Writer<Disk>, bitmaps: &mut Bitmaps, step: u8) -> Result<()> {
    let any = SnapshotSelector::Exact { id: None, name: None };
    let mut amend = |options: AmendOptions| writer.amend(&options, bitmaps, &mut |_, _| {});
    match step % 9 {
        0 => writer.create_snapshot(&NewSnapshot { name: b"new".to_vec(), date_sec: 1, date_nsec: 2 }),
        1 => writer.apply_snapshot(any),
        2 => writer.delete_snapshot(any),
        3 => amend(AmendOptions { refcount_bits: Some(1 << (step / 9 % 7)), ..AmendOptions::default() }),
        4 => amend(AmendOptions { version: Some(2 + u32::from(step / 9 % 2)), ..AmendOptions::default() }),
        5 => writer.add_new_bitmap(bitmaps, b"n", 9 + step / 9 % 4),
        6 => writer.remove_bitmap(bitmaps, b"b"),
        7 => writer.merge_bitmap(bitmaps, b"b", b"n"),
        _ => amend(AmendOptions { size: Some(u64::from(step) << 12), ..AmendOptions::default() }),
    }
}

/// Images with a snapshot, and with a bitmap in version 3.
pub fn seeds() -> Vec<Vec<u8>> {
    qcow2_write::seeds().into_iter().map(|image| grown(image).unwrap_or_default()).collect()
}

fn grown(image: Vec<u8>) -> Result<Vec<u8>> {
    let mut file = MemBlock::from(image);
    let mut writer = Writer::open(&mut file, FileId(0), None)?;
    if writer.header().geometry.refcount_order() != 0 {
        writer.create_snapshot(&NewSnapshot { name: b"one".to_vec(), date_sec: 1, date_nsec: 2 })?;
    }
    let mut bitmaps = writer.load_bitmaps()?;
    if writer.header().version >= 3 {
        writer.add_new_bitmap(&mut bitmaps, b"b", 9)?;
        writer.merge_bits(&mut bitmaps, b"b", 9, 0, &[0x5a])?;
    }
    writer.store_bitmaps(&mut bitmaps)?;
    writer.flush()?;
    writer.finish()?;
    let mut bytes = file.into_bytes();
    bytes.extend([0, 1, 2, 3]);
    Ok(bytes)
}
