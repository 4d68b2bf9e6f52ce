use instar_blockio::{BlockAlloc, FileId};
use instar_qcow2::{CreateOptions, Image, OpenOptions, create};

use crate::Sparse;

/// How the clusters of an image lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One behind the other.
    Contiguous,
    /// No two neighbours of the disk are neighbours in the file.
    Scattered,
    /// Every other subcluster of 2 KiB is data.
    Subclusters,
    /// Compressed to 20000 bytes each.
    Compressed,
}

const CLUSTER: u64 = 65536;

/// An open qcow2 image of clusters of 64 KiB with all clusters mapped. There is nothing where they point: for look-ups only.
pub fn image(layout: Layout, size: u64) -> Image<Sparse> {
    let mut file = Sparse::default();
    let options = CreateOptions { size, extended_l2: layout == Layout::Subclusters, ..CreateOptions::default() };
    let mut writer = create(&mut file, FileId(0), None, &options).expect("the options are valid");
    let count = size / CLUSTER;
    for index in 0..count {
        let mut plain = |offset, len| {
            let place = writer.reserve(offset, len).expect("memory has room");
            writer.commit(place).expect("memory takes it");
        };
        match layout {
            Layout::Contiguous => plain(index * CLUSTER, CLUSTER),
            Layout::Scattered => plain(scatter(index, count) * CLUSTER, CLUSTER),
            Layout::Subclusters => (0..CLUSTER).step_by(4096).for_each(|at| plain(index * CLUSTER + at, 2048)),
            Layout::Compressed => {
                let place = writer.reserve_compressed(index * CLUSTER, 20000).expect("memory has room");
                writer.commit(place).expect("memory takes it");
            }
        }
    }
    writer.finish().expect("memory takes it");
    Image::open(file, FileId(0), &OpenOptions::default()).expect("it was just made")
}

/// The numbers below a power of two in another order.
fn scatter(index: u64, count: u64) -> u64 {
    index.wrapping_mul(0x9e37_79b1) % count
}

/// So many places on a disk of `size` bytes, in no order.
pub fn offsets(size: u64, count: usize) -> Vec<u64> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..count).map(|_| next() % size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_blockio::{BlockMapExt, BlockRead, ExtentKind};

    #[test]
    fn layouts_are_as_they_say() {
        let count = |layout| {
            let image = image(layout, 64 * CLUSTER);
            let mut runs = (0, 0, 0);
            for extent in image.extents(0..image.size()) {
                match extent.unwrap().kind {
                    ExtentKind::Data { .. } => runs.0 += 1,
                    ExtentKind::Compressed(_) => runs.1 += 1,
                    _ => runs.2 += 1,
                }
            }
            runs
        };
        assert_eq!(count(Layout::Contiguous), (1, 0, 0));
        assert_eq!(count(Layout::Scattered), (64, 0, 0));
        assert_eq!(count(Layout::Subclusters), (64 * 16, 0, 64 * 16));
        assert_eq!(count(Layout::Compressed), (0, 64, 0));
    }
}
