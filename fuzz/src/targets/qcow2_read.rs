//! qcow2 images: opened, walked, read, in every state that they hold.

use instar_blockio::{BlockMapExt, BlockRead, FileId};
use instar_qcow2::{Image, OpenOptions, SnapshotSelector};

use super::qcow2_write;
use crate::Disk;

/// Extents looked at in one walk.
const EXTENTS: usize = 300;
/// Bytes read in one walk.
const READ: u64 = 256 << 10;

/// The bytes are an image file.
pub fn run(data: &[u8]) {
    for strict in [false, true] {
        let options = OpenOptions { strict, ..OpenOptions::default() };
        // Only behind good headers lies what the second opening may see differently.
        let Ok(image) = Image::open(Disk::of(data), FileId(7), &options) else { return };
        look(image);
    }
}

fn look(mut image: Image<Disk>) {
    let _ = (image.header(), image.backing_file(), image.encryption(), image.check_readable());
    if let Ok(bitmaps) = image.bitmaps() {
        for bitmap in bitmaps.iter().take(20) {
            let mut bits = vec![0; bitmap.len.min(4096) as usize];
            let _ = image.read_bitmap(bitmap, 0, &mut bits);
        }
    }
    if image.needs_data_file() {
        image.attach_data_file(Disk::of_parts(Vec::new(), 1 << 16), FileId(8));
    }
    walk(&image);
    for snapshot in image.snapshots().unwrap_or_default().iter().take(10) {
        let selector = SnapshotSelector::Exact { id: Some(&snapshot.id), name: Some(&snapshot.name) };
        if image.select_snapshot(selector).is_ok() {
            walk(&image);
        }
    }
}

fn walk(image: &Image<Disk>) {
    let size = image.size();
    let mut left = READ;
    for start in [0, size / 3, size.saturating_sub(1000)] {
        let mut at = start;
        for extent in image.extents(start..size).take(EXTENTS) {
            let Ok(extent) = extent else { break };
            assert!(extent.offset == at && extent.len > 0 && extent.end() <= size, "{extent:?} at {at}");
            at = extent.end();
            // Whether it can be read is another matter.
            let mut buf = vec![0; extent.len.min(4096).min(left) as usize];
            let _ = image.read_at(extent.offset, &mut buf);
            left -= buf.len() as u64;
        }
    }
    assert!(image.read_at(size, &mut [0]).is_err());
}

/// The images of the writing target; one of them again with a snapshot and with a bitmap.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = qcow2_write::seeds();
    if let Some(plain) = seeds.first().cloned() {
        seeds.push(with_snapshot(plain.clone()));
        seeds.push(with_bitmap(plain));
    }
    seeds
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Room of one cluster of 512 bytes at the end.
fn append(file: &mut Vec<u8>) -> usize {
    let at = file.len().next_multiple_of(512);
    file.resize(at + 512, 0);
    at
}

fn with_snapshot(mut file: Vec<u8>) -> Vec<u8> {
    let table = append(&mut file);
    let l1_size: [u8; 4] = file[36..40].try_into().expect("4 bytes");
    let l1_offset: [u8; 8] = file[40..48].try_into().expect("8 bytes");
    put(&mut file, table, &l1_offset);
    put(&mut file, table + 8, &l1_size);
    put(&mut file, table + 12, &[0, 1, 0, 4]); // lengths of id and name
    put(&mut file, table + 36, &16u32.to_be_bytes()); // extra data: state size, disk size
    put(&mut file, table + 48, &(64u64 << 10).to_be_bytes());
    put(&mut file, table + 56, b"1snap");
    put(&mut file, 60, &1u32.to_be_bytes());
    put(&mut file, 64, &(table as u64).to_be_bytes());
    file
}

fn with_bitmap(mut file: Vec<u8>) -> Vec<u8> {
    let (directory, table, bits) = (append(&mut file), append(&mut file), append(&mut file));
    put(&mut file, table, &(bits as u64).to_be_bytes());
    put(&mut file, directory, &(table as u64).to_be_bytes());
    put(&mut file, directory + 8, &1u32.to_be_bytes()); // entries of the table
    put(&mut file, directory + 16, &[1, 9, 0, 3]); // dirty tracking, 512 bytes a bit, length of the name
    put(&mut file, directory + 24, b"map");
    let header_len = u32::from_be_bytes(file[100..104].try_into().expect("4 bytes")) as usize;
    put(&mut file, 95, &[1]); // autoclear: the bitmaps are valid
    put(&mut file, header_len, &0x2385_2875u32.to_be_bytes());
    put(&mut file, header_len + 4, &24u32.to_be_bytes());
    put(&mut file, header_len + 8, &1u32.to_be_bytes());
    put(&mut file, header_len + 16, &32u64.to_be_bytes());
    put(&mut file, header_len + 24, &(directory as u64).to_be_bytes());
    put(&mut file, header_len + 32, &[0; 8]); // end of the extensions
    file
}

#[cfg(test)]
mod tests {
    use instar_blockio::MemBlock;

    use super::*;

    #[test]
    fn the_seeds_are_what_they_claim() {
        let seeds = seeds();
        let open = |bytes: &Vec<u8>| {
            Image::open(
                MemBlock::from(bytes.clone()),
                FileId(0),
                &OpenOptions { strict: true, ..OpenOptions::default() },
            )
            .unwrap()
        };
        let images: Vec<_> = seeds.iter().map(open).collect();
        let [.., snapshot, bitmap] = &images[..] else { panic!("{} seeds", images.len()) };
        assert_eq!(snapshot.snapshots().unwrap()[0].name, b"snap");
        assert_eq!((bitmap.bitmaps().unwrap()[0].name.as_slice(), bitmap.bitmaps().unwrap()[0].len), (&b"map"[..], 16));
        for image in &images {
            let mut all = vec![0; image.size() as usize];
            image.read_at(0, &mut all).unwrap();
            assert!(all.contains(&0x5a));
        }
    }
}
