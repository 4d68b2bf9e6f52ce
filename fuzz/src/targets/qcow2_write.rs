//! Existing qcow2 images opened for writing: whatever the file says, changes succeed or fail cleanly.

use instar_blockio::{BlockAlloc, BlockMap, BlockRead, BlockWrite, Codec, FileId, MemBlock, ZeroMode};
use instar_codec::Encoder;
use instar_qcow2::{CreateOptions, Preallocation, Writer, create};

use crate::Disk;

/// The file may grow to this: what a hostile table asks for beyond it does not fit on the disk.
const SPACE: u64 = 8 << 20;

/// The bytes are an image file.
pub fn run(data: &[u8]) {
    let Ok(mut writer) = Writer::open(Disk::of(data).with_room(SPACE), FileId(0), None) else { return };
    let size = writer.size();
    for offset in [0, 511, 4096, size / 2, size.saturating_sub(600)] {
        change(&mut writer, offset, size);
    }
    assert!(writer.read_at(size, &mut [0]).is_err() && writer.extent_at(size, 1).is_err());
    // An image that failed a change may well refuse to be finished.
    let _ = writer.finish();
}

/// A change of each kind. Hostile refcounts give away clusters that are in use, so what comes back may be something else.
fn change(writer: &mut Writer<Disk>, offset: u64, size: u64) {
    let bytes = [0xa5; 600];
    let len = (size - offset.min(size)).min(600);
    let mut back = [0; 600];
    let part = &bytes[..len as usize];
    let _ = writer.write_at(offset, part);
    let _ = writer.read_at(offset, &mut back[..len as usize]);
    if let Ok(extent) = writer.extent_at(offset, u64::MAX) {
        assert!(extent.offset == offset && extent.len > 0 && extent.len <= size - offset, "{extent:?}");
    }
    let _ = writer.write_zeroes(offset, len / 2, ZeroMode::KeepAllocated);
    let _ = writer.read_at(offset, &mut back[..len as usize / 2]);
    let _ = writer.discard(offset, len);
    if let Ok(reservation) = writer.reserve(offset, len) {
        let _ = if len.is_multiple_of(2) { writer.commit(reservation) } else { writer.abort(reservation) };
    }
    let _ = writer.flush();
}

/// Small images of every kind that can be created, with data, zeros and compressed clusters in them.
pub fn seeds() -> Vec<Vec<u8>> {
    let base = CreateOptions { cluster_size: 512, size: 64 << 10, ..CreateOptions::default() };
    let kinds = [
        base.clone(),
        CreateOptions { version: 2, cluster_size: 4096, ..base.clone() },
        CreateOptions { cluster_size: 16 << 10, extended_l2: true, ..base.clone() },
        CreateOptions { refcount_bits: 1, lazy_refcounts: true, ..base.clone() },
        CreateOptions { refcount_bits: 64, preallocation: Preallocation::Metadata, ..base.clone() },
        CreateOptions { compression: Codec::Zstd, cluster_size: 4096, size: (1 << 20) + 512, ..base.clone() },
        CreateOptions { backing_file: Some(b"base.raw".to_vec()), backing_format: Some(b"raw".to_vec()), ..base },
    ];
    kinds.iter().map(image).collect()
}

fn image(options: &CreateOptions) -> Vec<u8> {
    let mut file = MemBlock::default();
    let mut writer = create(&mut file, FileId(0), None, options).expect("good options");
    let cluster = options.cluster_size;
    writer.write_at(0, &vec![0x5a; cluster as usize]).expect("room");
    writer.write_zeroes(3 * cluster, cluster, ZeroMode::Unmap).expect("room");
    let (mut stream, at) = (Vec::new(), 2 * cluster);
    let encoded = Encoder::new(options.compression).encode(&vec![0x77; cluster as usize], &mut stream);
    let packs = options.preallocation == Preallocation::Off && matches!(encoded, Ok(Some(_)));
    let mut packed = None;
    if packs {
        let place = writer.reserve_compressed(at, stream.len() as u32).expect("room");
        packed = Some(place.host);
        writer.commit(place).expect("room");
    }
    writer.finish().expect("a good image");
    if let Some(host) = packed {
        file.write_at(host, &stream).expect("room");
    }
    file.into_bytes()
}
