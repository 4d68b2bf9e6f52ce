//! How often each cluster of the file is referred to, as far as the tables tell.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;

/// Clusters of a page.
pub(super) const REACH: u64 = 4096;

/// A count that stands in [`Counts::large`].
const LARGE: u8 = u8::MAX;

/// Counts of clusters. Takes a byte for each cluster of a page in which any is referred to, however far apart the pages are.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pages: BTreeMap<u64, Box<[u8]>>,
    large: BTreeMap<u64, u64>,
    shared: bool,
}

impl Counts {
    /// The count of a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        match self.pages.get(&(cluster / REACH)).map_or(0, |page| page[(cluster % REACH) as usize]) {
            LARGE => self.large.get(&cluster).copied().unwrap_or(LARGE.into()),
            small => small.into(),
        }
    }

    /// Counts so many references; gives the new count.
    pub fn add(&mut self, cluster: u64, times: u64) -> u64 {
        if times == 0 {
            return self.get(cluster);
        }
        let page = self.pages.entry(cluster / REACH).or_insert_with(|| alloc::vec![0; REACH as usize].into());
        let count = &mut page[(cluster % REACH) as usize];
        self.shared |= *count > 0 || times > 1;
        if let Some(sum) = u64::from(*count).checked_add(times).and_then(|sum| u8::try_from(sum).ok())
            && sum < LARGE
        {
            *count = sum;
            return sum.into();
        }
        let before = core::mem::replace(count, LARGE);
        let large = self.large.entry(cluster).or_insert(before.into());
        *large = large.saturating_add(times);
        *large
    }

    /// Was any cluster referred to more than once?
    pub fn any_shared(&self) -> bool {
        self.shared
    }

    /// Forgets the references to a cluster.
    pub fn remove(&mut self, cluster: u64) {
        if let Some(page) = self.pages.get_mut(&(cluster / REACH)) {
            page[(cluster % REACH) as usize] = 0;
            self.large.remove(&cluster);
        }
    }

    /// Is any cluster of the page that holds this one referred to?
    pub fn has_page(&self, cluster: u64) -> bool {
        self.pages.contains_key(&(cluster / REACH))
    }

    /// The first cluster at or behind `from` that nothing refers to.
    pub fn first_free(&self, from: u64) -> u64 {
        let mut cluster = from;
        while let Some(page) = self.pages.get(&(cluster / REACH)) {
            let start = (cluster % REACH) as usize;
            if let Some(at) = page[start..].iter().position(|&count| count == 0) {
                return cluster + at as u64;
            }
            cluster = (cluster / REACH + 1) * REACH;
        }
        cluster
    }

    /// First clusters of the pages in which any is referred to, in order.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        self.pages.keys().map(|page| page * REACH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_any_size() {
        let mut counts = Counts::default();
        for wanted in 1..=700 {
            assert_eq!(counts.add(5, 1), wanted);
        }
        assert_eq!(counts.add(u64::MAX / 512, 1), 1);
        assert_eq!((counts.get(5), counts.get(6), counts.get(u64::MAX)), (700, 0, 0));
        assert!(counts.any_shared() && !Counts::default().any_shared());
        assert_eq!([counts.add(8, 254), counts.add(8, 2), counts.add(8, u64::MAX)], [254, 256, u64::MAX]);
        assert_eq!([counts.add(9, 300), counts.add(9, 0), counts.add(10, 0), counts.get(9)], [300, 300, 0, 300]);
        assert!(counts.has_page(7) && !counts.has_page(REACH));
        assert_eq!(counts.pages().collect::<alloc::vec::Vec<_>>(), [0, u64::MAX / 512 / REACH * REACH]);
    }

    #[test]
    fn free_clusters() {
        let mut counts = Counts::default();
        assert_eq!(counts.first_free(3), 3);
        for cluster in 0..REACH + 2 {
            counts.add(cluster, 1);
        }
        assert_eq!((counts.first_free(0), counts.first_free(REACH + 2)), (REACH + 2, REACH + 2));
    }
}
