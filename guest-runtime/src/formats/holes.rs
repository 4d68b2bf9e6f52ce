//! Parts of a disk that lie flat in a file: what reads as zero there is told by the holes of the file, as for a raw disk.

use alloc::vec::Vec;

use instar_blockio::{BlockMap, BlockRead, Extent, ExtentKind, FileId, Limits, ReadPart, Result};

use crate::platform::Platform;

/// A disk of which some files hold nothing but its bytes.
pub(crate) struct WithHoles<P, L> {
    disk: L,
    platform: P,
    flat: Option<Vec<FileId>>,
}

/// How many of `len` bytes at `host` of a file are alike, and whether they lie in a hole; `None` behind its end.
///
/// # Errors
/// The device's error.
pub(crate) fn run_in_file<P: Platform>(platform: &P, file: FileId, host: u64, len: u64) -> Result<Option<(u64, bool)>> {
    let Some(below) = platform.file(file.0).filter(|below| host < below.size()) else { return Ok(None) };
    let run = below.extent_at(host, len.min(below.size() - host))?;
    Ok(Some((run.len, matches!(run.kind, ExtentKind::Zero { .. }))))
}

impl<P: Platform, L: BlockMap> WithHoles<P, L> {
    /// `flat`: the files in which the disk lies as it is; `None`: wherever there are data.
    pub(crate) fn new(platform: &P, disk: L, flat: Option<Vec<FileId>>) -> Self {
        Self { disk, platform: platform.clone(), flat }
    }
}

impl<P: Platform, L: BlockRead> BlockRead for WithHoles<P, L> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(offset, buf)
    }

    fn read_many(&self, parts: &mut [ReadPart<'_>]) -> Result<()> {
        self.disk.read_many(parts)
    }

    fn limits(&self) -> Limits {
        self.disk.limits()
    }
}

impl<P: Platform, L: BlockMap> BlockMap for WithHoles<P, L> {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        let extent = self.disk.extent_at(offset, max_len)?;
        let ExtentKind::Data { file, host } = extent.kind else { return Ok(extent) };
        if self.flat.as_ref().is_some_and(|flat| !flat.contains(&file)) {
            return Ok(extent);
        }
        Ok(match run_in_file(&self.platform, file, host, extent.len)? {
            // What lies behind the end of the file is the format's matter.
            None => extent,
            Some((len, false)) => Extent { len, ..extent },
            Some((len, true)) => Extent { len, kind: ExtentKind::Zero { host: Some((file, host)) }, ..extent },
        })
    }
}

#[cfg(test)]
mod tests {
    use instar_blockio::{BlockMapExt, BlockWrite};

    use super::*;
    use crate::host::Host;
    use crate::platform::File;

    /// A format that calls all of its file data.
    struct Flat(File<Host>);

    impl BlockRead for Flat {
        fn size(&self) -> u64 {
            self.0.size()
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            self.0.read_at(offset, buf)
        }
    }

    impl BlockMap for Flat {
        fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
            let kind = ExtentKind::Data { file: FileId(0), host: offset };
            Ok(Extent { offset, len: max_len.min(self.size() - offset), depth: 0, kind })
        }
    }

    #[test]
    fn holes_of_a_flat_file_are_zeroes_with_a_place() {
        const MIB: u64 = 1 << 20;
        let host = Host::new(1);
        let id = FileId(host.grant_bytes(b"").unwrap());
        assert_eq!(id, FileId(0));
        let mut file = host.file(id.0).unwrap();
        file.set_size(8 * MIB).unwrap();
        file.write_at(4 * MIB, &[1; 4096]).unwrap();
        let raw = || Flat(host.file(id.0).unwrap());
        let kinds = |flat: Option<Vec<FileId>>| -> Vec<(u64, ExtentKind)> {
            let disk = WithHoles::new(&host, raw(), flat);
            let extents = disk.extents(0..8 * MIB);
            extents.map(|extent| extent.map(|extent| (extent.len, extent.kind)).unwrap()).collect()
        };
        let zero = |host| ExtentKind::Zero { host: Some((id, host)) };
        let data = |host| ExtentKind::Data { file: id, host };
        for flat in [Some(alloc::vec![id]), None] {
            let [first, second, third] = kinds(flat)[..] else { panic!("three runs") };
            assert_eq!((first, second.1), ((4 * MIB, zero(0)), data(4 * MIB)));
            assert_eq!((third.1, second.0 + third.0), (zero(4 * MIB + second.0), 4 * MIB));
        }
        assert_eq!(kinds(Some(Vec::new())), [(8 * MIB, data(0))]);
    }
}
