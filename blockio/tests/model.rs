//! Chains, joined disks and windows against flat models, and the iterator over extents.

use std::ops::Range;

use instar_blockio::{
    BlockMap, BlockMapExt, BlockRead, BlockWrite, Concat, Error, ErrorKind, Extent, ExtentKind, FileId, Layer,
    MemBlock, Overlay, Result, Window, ZeroMode, check_range,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// Bytes a cell of a [`Cells`] disk has, but for the last.
const CELL: u64 = 7;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Cell {
    Data(u8),
    Zero,
    Absent,
}

/// A disk of cells that answers for at most `reach` cells at a time, as a table of entries does.
#[derive(Clone, Debug)]
struct Cells {
    file: u32,
    cells: Vec<Cell>,
    size: u64,
    reach: u64,
}

impl Cells {
    fn cell(&self, offset: u64) -> Cell {
        self.cells[(offset / CELL) as usize]
    }
}

impl BlockRead for Cells {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        for (at, byte) in (offset..).zip(buf) {
            *byte = if let Cell::Data(byte) = self.cell(at) { byte } else { 0 };
        }
        Ok(())
    }
}

impl BlockMap for Cells {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        check_range(self.size, offset, 1)?;
        let kind = |at: u64| match self.cell(at) {
            Cell::Data(_) => ExtentKind::Data { file: FileId(self.file), host: at },
            Cell::Zero => ExtentKind::Zero { host: None },
            Cell::Absent => ExtentKind::Unallocated,
        };
        let same = |at: u64| std::mem::discriminant(&kind(at)) == std::mem::discriminant(&kind(offset));
        let limit = offset.saturating_add(max_len).min(self.size).min((offset / CELL + self.reach) * CELL);
        let end = (offset..limit).find(|&at| !same(at)).unwrap_or(limit);
        Ok(Extent { offset, len: end - offset, depth: 0, kind: kind(offset) })
    }
}

fn cell() -> impl Strategy<Value = Cell> {
    prop_oneof![3 => (1..=255u8).prop_map(Cell::Data), 1 => Just(Cell::Zero), 3 => Just(Cell::Absent)]
}

fn disk(file: u32) -> impl Strategy<Value = Cells> {
    (vec(cell(), 0..12), 0..CELL, 1..4u64).prop_map(move |(cells, cut, reach)| {
        let size = (cells.len() as u64 * CELL).saturating_sub(cut);
        Cells { file, cells, size, reach }
    })
}

fn disks() -> impl Strategy<Value = Vec<Cells>> {
    (disk(0), disk(1), disk(2), 0..=3usize).prop_map(|(a, b, c, count)| vec![a, b, c].into_iter().take(count).collect())
}

fn boxed(disks: &[Cells]) -> Vec<Box<dyn Layer>> {
    disks.iter().map(|disk| Box::new(disk.clone()) as Box<dyn Layer>).collect()
}

/// Who answers for a byte of a chain: depth, and what it is.
fn answer(layers: &[Cells], at: u64) -> (u32, Cell) {
    let mut depth = 0;
    for (index, layer) in layers.iter().enumerate() {
        if at >= layer.size {
            return (depth, Cell::Zero);
        }
        depth = index as u32;
        if layer.cell(at) != Cell::Absent {
            return (depth, layer.cell(at));
        }
    }
    (depth, Cell::Absent)
}

fn byte_of(cell: Cell) -> u8 {
    if let Cell::Data(byte) = cell { byte } else { 0 }
}

/// Reads ranges of all kinds and compares with the flat bytes; ranges past the end must fail.
fn check_reads(
    disk: &impl BlockRead,
    flat: &[u8],
    ranges: &[(usize, usize)],
) -> std::result::Result<(), TestCaseError> {
    prop_assert_eq!(disk.size(), flat.len() as u64);
    for &(start, len) in ranges {
        let mut buf = vec![0xa5; len];
        let done = disk.read_at(start as u64, &mut buf);
        match flat.get(start..start + len) {
            Some(bytes) => prop_assert!(done.is_ok() && buf == bytes, "{start}+{len}: {done:?}"),
            None => prop_assert_eq!(done.unwrap_err().kind(), ErrorKind::OutOfBounds),
        }
    }
    Ok(())
}

/// The extents of a range, having seen that they cover it without a gap.
fn covering(disk: &(impl BlockMap + ?Sized), range: Range<u64>) -> Vec<Extent> {
    let extents: Vec<_> = disk.extents(range.clone()).map(Result::unwrap).collect();
    let mut at = range.start;
    for extent in &extents {
        assert!(extent.offset == at && extent.len > 0, "{extents:?}");
        at = extent.end();
    }
    assert_eq!(at, range.end.max(range.start));
    extents
}

proptest! {
    #[test]
    fn a_chain_is_what_its_layers_say(
        layers in disks(),
        ranges in vec((0..90usize, 0..90usize), 20),
        max_len in 1..40u64,
    ) {
        let chain = Overlay::new(boxed(&layers));
        let size = layers.first().map_or(0, |top| top.size);
        let flat: Vec<u8> = (0..size).map(|at| byte_of(answer(&layers, at).1)).collect();
        check_reads(&chain, &flat, &ranges)?;
        for extent in covering(&chain, 0..size) {
            for at in extent.offset..extent.end() {
                let (depth, cell) = answer(&layers, at);
                prop_assert_eq!(extent.depth, depth, "at {}", at);
                match (extent.kind, cell) {
                    (ExtentKind::Data { file, host }, Cell::Data(_)) => {
                        prop_assert_eq!((file.0, host + at - extent.offset), (depth, at));
                    }
                    (ExtentKind::Zero { host: None }, Cell::Zero) | (ExtentKind::Unallocated, Cell::Absent) => {}
                    other => prop_assert!(false, "at {at}: {other:?}"),
                }
            }
        }
        for at in 0..size {
            let extent = chain.extent_at(at, max_len).unwrap();
            prop_assert!(extent.offset == at && (1..=max_len).contains(&extent.len) && extent.end() <= size);
        }
    }

    #[test]
    fn joined_disks_are_padded_pieces(layers in disks(), ranges in vec((0..1700usize, 0..900usize), 20)) {
        let mut flat = Vec::new();
        for disk in &layers {
            flat.extend((0..disk.size).map(|at| byte_of(disk.cell(at))));
            flat.resize(flat.len().next_multiple_of(512), 0);
        }
        let joined = Concat::new(layers.clone()).unwrap();
        check_reads(&joined, &flat, &ranges)?;
        let starts: Vec<_> = joined.starts().collect();
        for extent in covering(&joined, 0..flat.len() as u64) {
            let bytes = &flat[extent.offset as usize..extent.end() as usize];
            match extent.kind {
                ExtentKind::Data { file, host } => {
                    prop_assert_eq!(host + starts[file.0 as usize], extent.offset);
                    prop_assert!(bytes.iter().all(|&byte| byte != 0));
                }
                _ => prop_assert!(bytes.iter().all(|&byte| byte == 0)),
            }
        }
    }

    #[test]
    fn a_window_is_a_slice(
        disk in disk(0),
        (start, len) in (0..90u64, 0..90u64),
        ranges in vec((0..90usize, 0..90usize), 20),
    ) {
        let size = disk.size;
        let window = Window::new(disk.clone(), start, len);
        prop_assert_eq!(window.is_ok(), start + len <= size);
        if let Ok(window) = window {
            let flat: Vec<u8> = (start..start + len).map(|at| byte_of(disk.cell(at))).collect();
            check_reads(&window, &flat, &ranges)?;
            let moved = covering(&disk, start..start + len);
            let own = covering(&window, 0..len);
            prop_assert_eq!(own.len(), moved.len());
            for (own, moved) in own.iter().zip(&moved) {
                prop_assert_eq!((own.offset + start, own.len, own.kind), (moved.offset, moved.len, moved.kind));
            }
        }
    }

    #[test]
    fn changes_through_a_window_stay_inside(
        (start, len) in (0..32usize, 0..32usize),
        changes in vec((0..40u64, 0..40usize, 0..3u8), 1..10),
    ) {
        let mut flat = vec![0x11; 64];
        let mut window = Window::new(MemBlock::from(flat.clone()), start as u64, len as u64).unwrap();
        for (offset, amount, what) in changes {
            let done = match what {
                0 => window.write_at(offset, &vec![0x22; amount]),
                1 => window.write_zeroes(offset, amount as u64, ZeroMode::KeepAllocated),
                _ => window.discard(offset, amount as u64),
            };
            let inside = flat[start..start + len].get_mut(offset as usize..offset as usize + amount);
            prop_assert_eq!(done.is_ok(), inside.is_some());
            if let Some(bytes) = inside {
                bytes.fill(if what == 0 { 0x22 } else { 0 });
            }
        }
        prop_assert_eq!(window.into_inner().into_bytes(), flat);
    }

    #[test]
    fn clipping_keeps_places(offset in 0..50u64, len in 1..50u64, from in 0..120u64, max in 0..60u64) {
        let extent = Extent { offset, len, depth: 3, kind: ExtentKind::Data { file: FileId(1), host: 1000 + offset } };
        let model: Vec<u64> = (offset..offset + len).filter(|at| (from..from + max).contains(at)).collect();
        match extent.clip(from, max) {
            None => prop_assert!(model.is_empty()),
            Some(part) => {
                prop_assert_eq!((part.offset, part.len, part.depth), (model[0], model.len() as u64, 3));
                prop_assert_eq!(part.kind, ExtentKind::Data { file: FileId(1), host: 1000 + part.offset });
            }
        }
    }
}

/// 40 bytes whose map fails from 20 on.
struct Broken;

impl BlockRead for Broken {
    fn size(&self) -> u64 {
        40
    }
    fn read_at(&self, _: u64, _: &mut [u8]) -> Result<()> {
        Err(ErrorKind::Io.into())
    }
}

impl BlockMap for Broken {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        if offset >= 20 {
            return Err(Error::new(ErrorKind::Corrupt).at(offset));
        }
        Ok(Extent { offset, len: max_len.min(10 - offset % 10), depth: 0, kind: ExtentKind::Unallocated })
    }
}

#[test]
fn extents_before_a_fault_are_handed_out_first() {
    let mut extents = Broken.extents(5..40);
    assert_eq!(extents.next().unwrap().unwrap().len, 15);
    assert_eq!(extents.next().unwrap().unwrap_err(), Error::new(ErrorKind::Corrupt).at(20));
    assert!(extents.next().is_none());
    assert!(Broken.extents(7..7).next().is_none());
}

#[test]
fn only_true_neighbours_are_joined() {
    let data = |offset, host, depth| Extent { offset, len: 4, depth, kind: ExtentKind::Data { file: FileId(0), host } };
    let joins = |mut first: Extent, next: Extent| first.join(&next).then_some(first.len);
    assert_eq!(joins(data(0, 8, 0), data(4, 12, 0)), Some(8));
    assert_eq!(joins(data(0, 8, 0), data(4, 16, 0)), None, "elsewhere in the file");
    assert_eq!(joins(data(0, 8, 0), data(4, 12, 1)), None, "another layer");
    assert_eq!(joins(data(0, 8, 0), data(5, 12, 0)), None, "a gap");
    assert_eq!(joins(data(0, u64::MAX, 0), data(4, 3, 0)), None, "places wrap");
    let zero = |offset, host| Extent { offset, len: 4, depth: 0, kind: ExtentKind::Zero { host } };
    assert_eq!(joins(zero(0, None), zero(4, None)), Some(8));
    assert_eq!(joins(zero(0, None), zero(4, Some((FileId(0), 4)))), None);
    assert_eq!(joins(zero(0, Some((FileId(0), 0))), zero(4, Some((FileId(0), 4)))), Some(8));
    assert_eq!(joins(zero(0, Some((FileId(0), 0))), zero(4, Some((FileId(1), 4)))), None);
}
