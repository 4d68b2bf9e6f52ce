//! Damaged images that are changed in place: every change succeeds or fails cleanly, in bounded work.

mod common;

use common::{Cluster, Made, Plan, make};
use instar_blockio::test::Faulty;
use instar_blockio::{FileId, MemBlock};
use instar_qcow2::{AmendOptions, Bitmaps, NewSnapshot, SnapshotSelector, Writer};
use proptest::prelude::*;

/// The file may grow to this: what a hostile table asks for beyond it does not fit on the disk.
const SPACE: u64 = 8 << 20;

fn sample(extended_l2: bool) -> Made {
    let cluster_bits = if extended_l2 { 14 } else { 10 };
    let mixed = if extended_l2 { Cluster::Mixed(0xff, 0xff00) } else { Cluster::ZeroPlaced };
    let clusters = [Cluster::Data, Cluster::Data, mixed, Cluster::Zero, Cluster::Unallocated, Cluster::Compressed];
    make(&Plan { cluster_bits, extended_l2, clusters: clusters.repeat(4), cut: 10, extras: true })
}

/// Does one thing after the other with an image; the answers don't matter.
fn exercise(file: Vec<u8>, order: &[u8]) {
    let (file, faults) = Faulty::new(MemBlock::from(file));
    faults.limit_space(SPACE);
    let Ok(mut writer) = Writer::open(file, FileId(0), None) else { return };
    let mut bitmaps = writer.load_bitmaps().unwrap_or_default();
    for step in order {
        let _ = act(&mut writer, &mut bitmaps, *step);
    }
    let _ = writer.store_bitmaps(&mut bitmaps);
    let _ = writer.finish();
}

fn act(writer: &mut Writer<Faulty<MemBlock>>, bitmaps: &mut Bitmaps, step: u8) -> instar_qcow2::Result<()> {
    let any = SnapshotSelector::Exact { id: None, name: None };
    let mut amend = |options: AmendOptions| writer.amend(&options, bitmaps, &mut |_, _| {});
    match step % 10 {
        0 => writer.create_snapshot(&NewSnapshot { name: b"new".to_vec(), date_sec: 1, date_nsec: 2 }),
        1 => writer.apply_snapshot(any),
        2 => writer.delete_snapshot(any),
        3 => amend(AmendOptions { refcount_bits: Some(1 << (step / 10 % 7)), ..AmendOptions::default() }),
        4 => amend(AmendOptions { version: Some(2), ..AmendOptions::default() }),
        5 => amend(AmendOptions { version: Some(3), lazy_refcounts: Some(true), ..AmendOptions::default() }),
        6 => writer.add_new_bitmap(bitmaps, b"n", 9 + step / 10 % 4),
        7 => writer.remove_bitmap(bitmaps, b"b"),
        8 => writer.merge_bitmap(bitmaps, b"b", b"n"),
        _ => amend(AmendOptions { size: Some(u64::from(step) << 12), ..AmendOptions::default() }),
    }
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
        (0u64..200).prop_map(|cluster| cluster << 10 | 1 << 63),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn damaged_metadata(
        extended_l2: bool,
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), edge(), 1usize..=8), 0..5),
        order in prop::collection::vec(any::<u8>(), 1..6),
    ) {
        let Made { mut file, metadata, .. } = sample(extended_l2);
        for (range, at, value, width) in hits {
            let range = range.get(&metadata).clone();
            let at = range.start + at.index(range.len());
            let bytes = value.to_be_bytes();
            let end = (at + width).min(file.len());
            file[at..end].copy_from_slice(&bytes[8 - (end - at)..]);
        }
        exercise(file, &order);
    }
}

#[test]
fn tables_that_refer_to_themselves() {
    let Made { file, metadata, .. } = sample(false);
    let l1 = metadata[1].start;
    for target in [0, l1, metadata[2].start] {
        for step in 0..10 {
            let mut file = file.clone();
            file[l1..l1 + 8].copy_from_slice(&(target as u64 | 1 << 63).to_be_bytes());
            exercise(file, &[step, step + 10]);
        }
    }
}
