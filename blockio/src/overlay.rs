use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::{BlockMap, BlockRead, Error, ErrorKind, Extent, ExtentKind, Layer, Limits, Result, check_range};

/// A chain of layers as one disk: the image itself first, then its backing, and so on.
///
/// The size is the first layer's. A run that a layer does not hold is asked from the next one:
///
/// ```text
///   offset      0      1 MiB     2 MiB     3 MiB
///   layer 0     | data   | –       | –       |      size 3 MiB
///   layer 1     | data   | zero    |                size 2 MiB, the rest reads as zero
///   answer      | data 0 | zero 1  | zero 0  |      (kind, depth)
/// ```
///
/// * [`depth`](Extent::depth) is the number of the layer that answers.
/// * Behind the end of a shorter backing the disk reads as zero, whatever deeper layers hold. Such a
///   run is [`Zero`](ExtentKind::Zero) without a place, at the depth of the last layer that reaches so
///   far, as `qemu-img map` reports it.
/// * A run that no layer holds stays [`Unallocated`](ExtentKind::Unallocated), at the depth of the last layer.
///
/// ```
/// use instar_blockio::{BlockRead, Layer, MemBlock, Overlay};
/// let layers: Vec<Box<dyn Layer>> = vec![Box::new(MemBlock::from(b"top".to_vec()))];
/// let disk = Overlay::new(layers);
/// assert_eq!(disk.size(), 3);
/// ```
pub struct Overlay {
    layers: Vec<Box<dyn Layer>>,
}

impl Overlay {
    /// A chain, the top first. Without any layer it is a disk of size 0.
    pub fn new(layers: Vec<Box<dyn Layer>>) -> Self {
        Self { layers }
    }

    /// Gives the layers back.
    pub fn into_layers(self) -> Vec<Box<dyn Layer>> {
        self.layers
    }

    /// The layer that answers at `offset`, with its answer in depths of the chain. `max_len` is not 0.
    fn resolve(&self, offset: u64, max_len: u64) -> Result<(usize, Extent)> {
        check_range(self.size(), offset, 1)?;
        let mut answer = (0, Extent { offset, len: max_len, depth: 0, kind: ExtentKind::Unallocated });
        for (index, layer) in self.layers.iter().enumerate() {
            let left = match layer.size().checked_sub(offset) {
                Some(left) if left > 0 => left,
                _ => {
                    answer.1.kind = ExtentKind::Zero { host: None };
                    return Ok(answer);
                }
            };
            let max_len = answer.1.len.min(left);
            let mut extent = layer
                .extent_at(offset, max_len)?
                .clip(offset, max_len)
                .filter(|extent| extent.offset == offset)
                .ok_or(Error::new(ErrorKind::Corrupt).at(offset))?;
            // A layer may be a chain itself.
            let depth = u32::try_from(index).map_err(|_| Error::new(ErrorKind::Unsupported))?;
            extent.depth = extent.depth.saturating_add(depth);
            answer = (index, extent);
            if extent.kind != ExtentKind::Unallocated {
                break;
            }
        }
        Ok(answer)
    }

    /// Which layer to read at `offset` (`None`: zeros) and how many bytes of it, at most `max_len`.
    fn source(&self, offset: u64, max_len: u64) -> Result<(Option<usize>, u64)> {
        let (index, extent) = self.resolve(offset, max_len)?;
        let reads = match extent.kind {
            ExtentKind::Zero { .. } | ExtentKind::Unallocated => None,
            ExtentKind::Data { .. } | ExtentKind::Compressed(_) | ExtentKind::Encrypted { .. } => Some(index),
        };
        Ok((reads, extent.len))
    }

    /// [`source`](Self::source) with neighbours joined: a layer splits a long read better itself.
    fn joined_source(&self, offset: u64, max_len: u64) -> Result<(Option<usize>, u64)> {
        let (source, mut len) = self.source(offset, max_len)?;
        while len < max_len {
            match self.source(offset + len, max_len - len)? {
                (next, more) if next == source => len += more,
                _ => break,
            }
        }
        Ok((source, len))
    }

    fn fill(&self, source: Option<usize>, offset: u64, buf: &mut [u8]) -> Result<()> {
        match source.and_then(|index| self.layers.get(index)) {
            Some(layer) => layer.read_at(offset, buf),
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }
}

impl BlockRead for Overlay {
    fn size(&self) -> u64 {
        self.layers.first().map_or(0, |top| top.size())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size(), offset, buf.len() as u64)?;
        let (mut offset, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (source, len) = self.joined_source(offset, rest.len() as u64)?;
            // len <= rest.len(), so it fits in usize.
            let (now, later) = rest.split_at_mut(len as usize);
            self.fill(source, offset, now)?;
            (offset, rest) = (offset + len, later);
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        self.layers.iter().map(|layer| layer.limits()).fold(Limits::BYTE, |sum, one| Limits {
            request_align: sum.request_align.max(one.request_align),
            preferred_align: sum.preferred_align.max(one.preferred_align),
            ..sum
        })
    }
}

impl BlockMap for Overlay {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        if max_len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput).at(offset));
        }
        Ok(self.resolve(offset, max_len.min(self.size().saturating_sub(offset)))?.1)
    }
}

impl core::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.layers.iter().map(|layer| layer.size())).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockMapExt, FileId, MemBlock};
    use std::vec;

    /// One character a byte: `-` unallocated, `0` zero, anything else data.
    struct Text(&'static [u8], FileId);

    impl BlockRead for Text {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            check_range(self.size(), offset, buf.len() as u64)?;
            let from = offset as usize;
            for (byte, &have) in buf.iter_mut().zip(&self.0[from..]) {
                *byte = if matches!(have, b'-' | b'0') { 0 } else { have };
            }
            Ok(())
        }
    }

    impl BlockMap for Text {
        fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
            check_range(self.size(), offset, 1)?;
            let class = |byte: &u8| if matches!(byte, b'-' | b'0') { *byte } else { b'x' };
            let rest = &self.0[offset as usize..];
            let len = rest.iter().take_while(|byte| class(byte) == class(&rest[0])).count() as u64;
            let kind = match class(&rest[0]) {
                b'-' => ExtentKind::Unallocated,
                b'0' => ExtentKind::Zero { host: None },
                _ => ExtentKind::Data { file: self.1, host: offset },
            };
            Ok(Extent { offset, len: len.min(max_len), depth: 0, kind })
        }
    }

    fn chain(texts: &[&'static str]) -> Overlay {
        let layer = |(id, text): (usize, &&'static str)| -> Box<dyn Layer> {
            Box::new(Text(text.as_bytes(), FileId(id as u32)))
        };
        Overlay::new(texts.iter().enumerate().map(layer).collect())
    }

    fn map(disk: &Overlay) -> Vec<(u64, u64, u32, ExtentKind)> {
        disk.extents(0..disk.size())
            .map(|run| run.unwrap())
            .map(|run| (run.offset, run.len, run.depth, run.kind))
            .collect()
    }

    const ZERO: ExtentKind = ExtentKind::Zero { host: None };
    const NONE: ExtentKind = ExtentKind::Unallocated;

    fn data(file: u32, host: u64) -> ExtentKind {
        ExtentKind::Data { file: FileId(file), host }
    }

    #[test]
    fn the_first_layer_that_knows_answers() {
        let disk = chain(&["ab--00----", "XXXX--00--", "1111111111"]);
        let mut all = [0xff; 10];
        disk.read_at(0, &mut all).unwrap();
        assert_eq!(&all, b"abXX\0\0\0\x0011");
        assert_eq!(
            map(&disk),
            [(0, 2, 0, data(0, 0)), (2, 2, 1, data(1, 2)), (4, 2, 0, ZERO), (6, 2, 1, ZERO), (8, 2, 2, data(2, 8))]
        );
    }

    #[test]
    fn a_shorter_backing_hides_what_lies_deeper() {
        // Depths as `qemu-img map --output=json` prints them for images of 8, 3 and 9 units.
        let disk = chain(&["--------", "-b-", "ccccccccc"]);
        assert_eq!(map(&disk), [(0, 1, 2, data(2, 0)), (1, 1, 1, data(1, 1)), (2, 1, 2, data(2, 2)), (3, 5, 0, ZERO)]);
        let mut all = [0xff; 8];
        disk.read_at(0, &mut all).unwrap();
        assert_eq!(&all, b"cbc\0\0\0\0\0");

        let disk = chain(&["----", "---", "-"]);
        assert_eq!(map(&disk), [(0, 1, 2, NONE), (1, 2, 1, ZERO), (3, 1, 0, ZERO)]);
    }

    #[test]
    fn a_longer_backing_is_cut() {
        let disk = chain(&["a-", "bbbb"]);
        assert_eq!(disk.size(), 2);
        assert_eq!(map(&disk), [(0, 1, 0, data(0, 0)), (1, 1, 1, data(1, 1))]);
        assert_eq!(disk.read_at(1, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(disk.extent_at(2, 1).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(disk.extent_at(u64::MAX, u64::MAX).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(disk.extent_at(0, 0).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(disk.extent_at(1, u64::MAX).unwrap().len, 1);
    }

    #[test]
    fn without_layers_or_with_an_empty_backing() {
        let none = Overlay::new(vec![]);
        assert_eq!(none.size(), 0);
        none.read_at(0, &mut []).unwrap();
        assert_eq!(none.extent_at(0, 1).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(map(&chain(&["--", ""])), [(0, 2, 0, ZERO)]);
        assert_eq!(map(&chain(&["--"])), [(0, 2, 0, NONE)]);
    }

    #[test]
    fn a_chain_can_be_a_layer_and_move() {
        fn layer<T: Layer>(_: &T) {}
        let inner = chain(&["--", "b-"]);
        let disk = Overlay::new(vec![Box::new(Text(b"--", FileId(9))), Box::new(inner)]);
        layer(&disk);
        assert_eq!(map(&disk), [(0, 1, 2, data(1, 0)), (1, 1, 2, NONE)]);
    }

    /// A layer that answers with another offset than asked.
    struct Liar(MemBlock);

    impl BlockRead for Liar {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            self.0.read_at(offset, buf)
        }
    }

    impl BlockMap for Liar {
        fn extent_at(&self, offset: u64, _: u64) -> Result<Extent> {
            Ok(Extent { offset: offset + 1, len: u64::MAX, depth: 0, kind: NONE })
        }
    }

    #[test]
    fn an_answer_outside_the_question_is_an_error() {
        let disk = Overlay::new(vec![Box::new(Liar(MemBlock::zeroed(8)))]);
        assert_eq!(disk.extent_at(0, 4).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(disk.read_at(0, &mut [0; 4]).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
