//! What the checkers have in common.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;

pub use instar_blockio::check::{CheckReport, Clusters, Repair};

/// Clusters of the file that are in use. Takes memory for what is in it, however far apart.
#[derive(Debug, Default)]
pub(crate) struct ClusterSet {
    pages: BTreeMap<u64, Box<[u64; WORDS]>>,
    len: u64,
}

/// Words of a page.
const WORDS: usize = 64;
/// Clusters of a page.
const REACH: u64 = WORDS as u64 * 64;

impl ClusterSet {
    /// Adds a cluster; says whether it was not there.
    pub fn insert(&mut self, cluster: u64) -> bool {
        let page = self.pages.entry(cluster / REACH).or_insert_with(|| Box::new([0; WORDS]));
        let inside = cluster % REACH;
        let (word, bit) = (&mut page[(inside / 64) as usize], 1 << (inside % 64));
        let new = *word & bit == 0;
        *word |= bit;
        self.len += u64::from(new);
        new
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The first that is not there.
    pub fn first_free(&self) -> u64 {
        let mut next = 0;
        for (&number, page) in &self.pages {
            if number != next {
                break;
            }
            if let Some(at) = page.iter().position(|&word| word != u64::MAX) {
                return number * REACH + at as u64 * 64 + u64::from(page[at].trailing_ones());
            }
            next = number + 1;
        }
        next * REACH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters() {
        let mut set = ClusterSet::default();
        assert_eq!(set.first_free(), 0);
        assert!(set.insert(0) && set.insert(u64::MAX) && !set.insert(0));
        assert_eq!((set.len(), set.first_free()), (2, 1));
        for cluster in 1..REACH + 3 {
            assert!(set.insert(cluster));
        }
        assert_eq!(set.first_free(), REACH + 3);
    }
}
