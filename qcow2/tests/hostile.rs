//! Damaged images end in an error or in some contents, and in bounded work.

mod common;

use std::cell::Cell;

use common::{Cluster, Made, Plan, make};
use instar_blockio::{BlockMap, BlockRead, Extent, FileId, MemBlock, Result as BlockResult};
use instar_qcow2::{Image, OpenOptions, SnapshotSelector, feature_names};
use proptest::prelude::*;

/// Counts requests and bytes.
struct Counted {
    disk: MemBlock,
    bytes: Cell<u64>,
}

impl BlockRead for Counted {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        self.bytes.set(self.bytes.get() + buf.len() as u64);
        self.disk.read_at(offset, buf)
    }
}

fn sample(extended_l2: bool) -> Made {
    let cluster_bits = if extended_l2 { 14 } else { 10 };
    let mixed = if extended_l2 { Cluster::Mixed(0xff, 0xff00) } else { Cluster::ZeroPlaced };
    let clusters = [Cluster::Data, Cluster::Data, mixed, Cluster::Zero, Cluster::Unallocated, Cluster::Compressed];
    make(&Plan { cluster_bits, extended_l2, clusters: clusters.repeat(4), cut: 10, extras: true })
}

/// Does all that can be done with an image, up to bounds of its own; the answers don't matter.
fn exercise(file: Vec<u8>, strict: bool) {
    let len = file.len() as u64;
    let disk = Counted { disk: MemBlock::from(file), bytes: Cell::new(0) };
    if let Ok(names) = feature_names(&disk, u64::MAX) {
        assert!(names.names.len() <= 64);
    }
    let options = OpenOptions { strict, ..OpenOptions::default() };
    let mut image = match Image::open(&disk, FileId(0), &options) {
        Ok(image) => image,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    // Nothing is read twice for want of memory here, save what opening walks twice.
    assert!(disk.bytes.get() <= 4 * len + (1 << 20), "{} bytes read of {len}", disk.bytes.get());
    let _ = (image.snapshots().is_ok(), image.check_readable(), image.encryption());
    if let Ok(bitmaps) = image.bitmaps() {
        for bitmap in bitmaps {
            let mut bits = vec![0; bitmap.len.min(1 << 16) as usize];
            let _ = image.read_bitmap(&bitmap, 0, &mut bits);
        }
    }
    walk(&image);
    if image.select_snapshot(SnapshotSelector::Exact { id: None, name: None }).is_ok() {
        walk(&image);
    }
}

fn walk(image: &Image<&Counted>) {
    let size = image.virtual_size();
    for start in [0, size / 2, size.saturating_sub(5000)] {
        let mut at = start;
        for _ in 0..40 {
            if at >= size {
                break;
            }
            let Ok(Extent { offset, len, .. }) = image.extent_at(at, size) else { break };
            assert!(offset == at && len > 0 && len <= size - at);
            let mut buf = vec![0; len.min(3000) as usize];
            let _ = image.read_at(at, &mut buf);
            at += len;
        }
    }
    assert!(image.extent_at(size, 1).is_err());
    assert!(image.read_at(size, &mut [0]).is_err());
}

/// Values that sit at the edges of checks.
fn edge() -> impl Strategy<Value = u64> {
    let bit = (0u32..64).prop_map(|bit| 1u64 << bit);
    prop_oneof![
        Just(0),
        Just(u64::MAX),
        bit.clone(),
        bit.clone().prop_map(|v| v - 1),
        bit.prop_map(u64::wrapping_neg),
        any::<u64>(),
        0u64..1 << 20,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn damaged_metadata(
        extended_l2: bool,
        strict: bool,
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), edge(), 1usize..=8), 1..5),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let Made { mut file, metadata, .. } = sample(extended_l2);
        for (range, at, value, width) in hits {
            let range = range.get(&metadata).clone();
            let at = range.start + at.index(range.len());
            let bytes = value.to_be_bytes();
            let end = (at + width).min(file.len());
            file[at..end].copy_from_slice(&bytes[8 - (end - at)..]);
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        exercise(file, strict);
    }

    #[test]
    fn fields_at_their_edges(extended_l2: bool, field in 0usize..14, value in edge()) {
        // Offset and width of each header field.
        const FIELDS: [(usize, usize); 14] = [
            (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8),
            (96, 4), (100, 4),
        ];
        let Made { mut file, .. } = sample(extended_l2);
        let (at, width) = FIELDS[field];
        file[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        exercise(file, false);
    }

    #[test]
    fn noise_behind_the_magic(tail in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut file = b"QFI\xfb\0\0\0\x03".to_vec();
        file.extend(tail);
        exercise(file, false);
    }
}

#[test]
fn tables_that_refer_to_themselves() {
    let Made { file, metadata, .. } = sample(false);
    let l1 = metadata[1].start;
    for target in [0, l1, metadata[2].start] {
        let mut file = file.clone();
        file[l1..l1 + 8].copy_from_slice(&(target as u64 | 1 << 63).to_be_bytes());
        exercise(file, false);
    }
}
