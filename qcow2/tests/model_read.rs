//! Images made byte by byte show the disk that they were made from.

mod common;

use common::{Cluster, Plan, make};
use instar_blockio::{BlockMapExt, BlockRead, ExtentKind, FileId, MemBlock};
use instar_qcow2::{Image, OpenOptions, SnapshotSelector};
use proptest::prelude::*;

const FILE: FileId = FileId(7);

fn open(file: &[u8]) -> Image<MemBlock> {
    Image::open(MemBlock::from(file.to_vec()), FILE, &OpenOptions { strict: true, ..OpenOptions::default() }).unwrap()
}

fn cluster(extended_l2: bool) -> BoxedStrategy<Cluster> {
    let plain = prop_oneof![
        3 => Just(Cluster::Unallocated),
        2 => Just(Cluster::Zero),
        1 => Just(Cluster::ZeroPlaced),
        3 => Just(Cluster::Data),
        1 => Just(Cluster::Compressed),
    ];
    if !extended_l2 {
        return plain.boxed();
    }
    let mixed = (any::<u32>(), any::<u32>()).prop_map(|(allocated, zero)| Cluster::Mixed(allocated, zero & !allocated));
    prop_oneof![2 => plain, 3 => mixed].boxed()
}

fn plan() -> impl Strategy<Value = Plan> {
    let shape = prop_oneof![(9u32..=12, Just(false)), (14u32..=15, Just(true)), (16u32..=17, any::<bool>())];
    (shape, any::<bool>()).prop_flat_map(|((cluster_bits, extended_l2), extras)| {
        let most = if cluster_bits < 12 { 200 } else { 24 };
        let runs = prop::collection::vec((cluster(extended_l2), 1usize..6), 1..most);
        (runs, 0u64..512).prop_map(move |(runs, cut)| Plan {
            cluster_bits,
            extended_l2,
            clusters: runs.into_iter().flat_map(|(cluster, count)| vec![cluster; count]).take(most).collect(),
            cut,
            extras,
        })
    })
}

/// Reads the disk by its extents, as a converter does.
fn read_by_extents(image: &Image<MemBlock>, file: &[u8]) -> Vec<u8> {
    let mut disk = Vec::new();
    for extent in image.extents(0..image.size()) {
        let extent = extent.unwrap();
        assert_eq!(extent.offset, disk.len() as u64);
        let mut bytes = vec![0; extent.len as usize];
        match extent.kind {
            ExtentKind::Data { file: FILE, host } => {
                bytes.copy_from_slice(&file[host as usize..][..extent.len as usize]);
            }
            ExtentKind::Compressed(run) => {
                let mut unit = vec![0; run.unit_len as usize];
                let stored = &file[run.host as usize..][..run.stored_len as usize];
                instar_codec::Decoder::new().decode(run.codec, stored, &mut unit).unwrap();
                let skip = (extent.offset - run.unit_offset) as usize;
                bytes.copy_from_slice(&unit[skip..][..extent.len as usize]);
            }
            ExtentKind::Zero { .. } | ExtentKind::Unallocated => {}
            other => panic!("{other:?}"),
        }
        disk.extend(bytes);
    }
    disk
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn reads_what_was_put_in(plan in plan(), starts in prop::collection::vec((any::<u64>(), 1usize..70_000), 8)) {
        let made = make(&plan);
        let mut image = open(&made.file);
        prop_assert_eq!(image.size(), made.disk.len() as u64);
        let by_extents = read_by_extents(&image, &made.file);
        prop_assert!(by_extents == made.disk);
        for (start, len) in starts {
            let start = (start % image.size()) as usize;
            let len = len.min(made.disk.len() - start);
            let mut buf = vec![0xee; len];
            image.read_at(start as u64, &mut buf).unwrap();
            prop_assert!(buf == made.disk[start..start + len], "{} bytes at {}", len, start);
        }
        if plan.extras {
            image.select_snapshot(SnapshotSelector::IdOrName(b"first")).unwrap();
            prop_assert!(read_by_extents(&image, &made.file) == made.disk);
        }
    }

    #[test]
    fn extents_tell_the_state(plan in plan()) {
        let made = make(&plan);
        let image = open(&made.file);
        let cluster = 1u64 << plan.cluster_bits;
        for extent in image.extents(0..image.size()) {
            let extent = extent.unwrap();
            for (k, &state) in plan.clusters.iter().enumerate() {
                let start = k as u64 * cluster;
                let Some(part) = extent.clip(start, cluster) else { continue };
                let fits = match (state, part.kind) {
                    (Cluster::Unallocated, ExtentKind::Unallocated)
                    | (Cluster::Zero, ExtentKind::Zero { host: None })
                    | (Cluster::ZeroPlaced, ExtentKind::Zero { host: Some(_) })
                    | (Cluster::Data, ExtentKind::Data { .. })
                    | (Cluster::Compressed, ExtentKind::Compressed(_)) => true,
                    (Cluster::Mixed(allocated, zero), kind) => {
                        let sub = cluster / 32;
                        (0..32).filter(|i| part.clip(start + i * sub, sub).is_some()).all(|i| match kind {
                            ExtentKind::Data { .. } => allocated >> i & 1 == 1,
                            ExtentKind::Zero { host } => zero >> i & 1 == 1 && host.is_some(),
                            ExtentKind::Unallocated => (allocated | zero) >> i & 1 == 0,
                            _ => false,
                        })
                    }
                    _ => false,
                };
                prop_assert!(fits, "cluster {}: {:?} as {:?}", k, state, part);
            }
        }
    }
}

#[test]
fn snapshot_and_bitmap_are_listed() {
    let plan = Plan { cluster_bits: 9, extended_l2: false, clusters: vec![Cluster::Data; 70], cut: 100, extras: true };
    let made = make(&plan);
    let image = open(&made.file);
    let snapshots = image.snapshots().unwrap();
    assert_eq!(snapshots.len(), 1);
    assert_eq!((snapshots[0].id.as_slice(), snapshots[0].name.as_slice()), (&b"1"[..], &b"first"[..]));
    assert_eq!((snapshots[0].virtual_size, snapshots[0].icount), (70 * 512 - 100, Some(77)));
    let bitmaps = image.bitmaps().unwrap();
    assert_eq!((bitmaps.len(), bitmaps[0].name.as_slice(), bitmaps[0].granularity_bits), (1, &b"b"[..], 9));
    assert_eq!(bitmaps[0].len, 9); // 70 bits
    let mut bits = [0; 9];
    image.read_bitmap(&bitmaps[0], 0, &mut bits).unwrap();
    assert_eq!(bits, [0xff; 9]);
    assert!(image.read_bitmap(&bitmaps[0], 1, &mut bits).is_err());
}

#[test]
fn an_empty_exbibyte_is_one_short_walk() {
    // 2 MiB clusters, 2^61 bytes: an L1 table of 2^22 entries that lies behind the end of the file.
    let mut file = vec![0; 112];
    file[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    file[20..24].copy_from_slice(&21u32.to_be_bytes());
    file[24..32].copy_from_slice(&(1u64 << 61).to_be_bytes());
    file[36..40].copy_from_slice(&(1u32 << 22).to_be_bytes());
    file[40..48].copy_from_slice(&(1u64 << 30).to_be_bytes());
    file[56..60].copy_from_slice(&1u32.to_be_bytes());
    file[96..100].copy_from_slice(&4u32.to_be_bytes());
    file[100..104].copy_from_slice(&112u32.to_be_bytes());
    let image = Image::open(MemBlock::from(file), FILE, &OpenOptions::default()).unwrap();
    let extents: Vec<_> = image.extents(0..image.size()).map(Result::unwrap).collect();
    assert_eq!(extents.len(), 1);
    assert_eq!((extents[0].len, extents[0].kind), (1 << 61, ExtentKind::Unallocated));
}

#[test]
fn an_image_can_move_to_another_thread() {
    fn layer<T: instar_blockio::Layer>() {}
    layer::<Image<MemBlock>>();
}
