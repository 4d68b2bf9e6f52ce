use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

use crate::{BlockMap, BlockRead, BlockWrite, Extent, Limits, MemBlock, Result, ZeroMode};

/// Unit in which a device writes indivisibly, bytes.
const SECTOR: usize = 512;

/// A disk in memory that remembers every change and every flush in order.
///
/// A [`Trace`] of it gives the states in which a crash could have left the disk: what was flushed is
/// there, of the rest anything may be.
///
/// ```
/// use instar_blockio::test::CrashLog;
/// use instar_blockio::{BlockWrite, MemBlock};
/// let (mut disk, trace) = CrashLog::new(MemBlock::zeroed(2));
/// disk.write_at(0, b"d")?;
/// disk.flush()?;
/// disk.write_at(1, b"m")?;
/// // No state has the metadata without the data.
/// assert!(trace.states(1, 4).all(|state| state.disk.as_bytes() != b"\0m"));
/// # Ok::<(), instar_blockio::Error>(())
/// ```
#[derive(Debug)]
pub struct CrashLog {
    disk: MemBlock,
    trace: Trace,
}

/// The record of a [`CrashLog`]. Clones share it.
#[derive(Clone, Debug)]
pub struct Trace(Arc<Mutex<Record>>);

#[derive(Debug)]
struct Record {
    start: MemBlock,
    events: Vec<Event>,
}

/// One recorded request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes were written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// A range was zeroed or discarded.
    Zero {
        /// Where it begins.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The size was set.
    SetSize(u64),
    /// All before this is durable.
    Flush,
}

/// What a crash could have left.
#[derive(Clone, Debug)]
pub struct CrashState {
    /// The crash came after so many events.
    pub cut: usize,
    /// Which of the cut's states this is: 0 has every change, 1 only the flushed ones, the others a
    /// part of the rest.
    pub variant: usize,
    /// The contents.
    pub disk: MemBlock,
}

impl CrashLog {
    /// A disk with these contents, already durable, and its record.
    pub fn new(disk: MemBlock) -> (Self, Trace) {
        let trace = Trace(Arc::new(Mutex::new(Record { start: disk.clone(), events: Vec::new() })));
        (Self { disk, trace: trace.clone() }, trace)
    }

    fn record(&self, event: Event) {
        self.trace.record().events.push(event);
    }
}

impl Trace {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The events so far.
    pub fn events(&self) -> Vec<Event> {
        self.record().events.clone()
    }

    /// Crash states, cut by cut in order: for a crash after each event the state with every change,
    /// the one with only the flushed changes, and `samples` that lost some of the changes since the last
    /// flush, chosen by `seed`. Every second of them loses single sectors of 512 bytes of a write.
    ///
    /// Cuts with fewer than two changes since the last flush have only the first two.
    pub fn states(&self, seed: u64, samples: usize) -> impl Iterator<Item = CrashState> {
        let record = self.record();
        let (start, events) = (record.start.clone(), record.events.clone());
        drop(record);
        let mut random = Random(seed);
        let mut durable = start;
        let mut flushed = 0;
        (0..=events.len()).flat_map(move |cut| {
            if cut > 0 && events[cut - 1] == Event::Flush {
                events[flushed..cut].iter().for_each(|event| apply(&mut durable, event, |_| true));
                flushed = cut;
            }
            let open = &events[flushed..cut];
            let variants = match open.len() {
                0 => 1,
                1 => 2,
                _ => 2 + samples,
            };
            let states: Vec<_> = (0..variants)
                .map(|variant| CrashState { cut, variant, disk: survivors(&durable, open, variant, &mut random) })
                .collect();
            states
        })
    }
}

/// `durable` and those of the changes in `open` that the variant keeps.
fn survivors(durable: &MemBlock, open: &[Event], variant: usize, random: &mut Random) -> MemBlock {
    let mut disk = durable.clone();
    let whole_requests = variant.is_multiple_of(2);
    for event in open {
        match variant {
            0 => apply(&mut disk, event, |_| true),
            1 => {}
            _ if whole_requests => {
                let kept = random.bit();
                apply(&mut disk, event, |_| kept);
            }
            _ => apply(&mut disk, event, |_| random.bit()),
        }
    }
    disk
}

/// Makes a change, in the sectors that `keeps` says yes to.
fn apply(disk: &mut MemBlock, event: &Event, mut keeps: impl FnMut(usize) -> bool) {
    let mut put = |offset: u64, bytes: &[u8]| {
        // Cut where the disk's sectors begin, not where the write does.
        let mut done = 0;
        while done < bytes.len() {
            let inside = (offset as usize + done) % SECTOR;
            let end = bytes.len().min(done + SECTOR - inside);
            if keeps(done) {
                disk.write_at(offset + done as u64, &bytes[done..end]).expect("memory");
            }
            done = end;
        }
    };
    match event {
        Event::Write { offset, bytes } => put(*offset, bytes),
        Event::Zero { offset, len } => put(*offset, &std::vec![0; *len as usize]),
        Event::SetSize(size) if keeps(0) => disk.set_size(*size).expect("memory"),
        Event::SetSize(_) | Event::Flush => {}
    }
}

/// splitmix64: small, and the same on every machine.
struct Random(u64);

impl Random {
    fn bit(&mut self) -> bool {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) & 1 == 1
    }
}

impl BlockRead for CrashLog {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(offset, buf)
    }

    fn limits(&self) -> Limits {
        self.disk.limits()
    }
}

impl BlockWrite for CrashLog {
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> Result<()> {
        self.disk.write_at(offset, buf)?;
        self.record(Event::Write { offset, bytes: buf.to_vec() });
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.disk.write_zeroes(offset, len, mode)?;
        self.record(Event::Zero { offset, len });
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        self.disk.discard(offset, len)?;
        self.record(Event::Zero { offset, len });
        Ok(())
    }

    fn set_size(&mut self, size: u64) -> Result<()> {
        self.disk.set_size(size)?;
        self.record(Event::SetSize(size));
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.disk.flush()?;
        self.record(Event::Flush);
        Ok(())
    }
}

impl BlockMap for CrashLog {
    fn extent_at(&self, offset: u64, max_len: u64) -> Result<Extent> {
        self.disk.extent_at(offset, max_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::string::String;

    fn pictures(trace: &Trace, samples: usize) -> BTreeSet<String> {
        trace
            .states(7, samples)
            .map(|state| String::from_utf8_lossy(state.disk.as_bytes()).replace('\0', "-"))
            .collect()
    }

    #[test]
    fn flushed_writes_stay_and_others_may_be_lost_in_any_order() {
        let (mut disk, trace) = CrashLog::new(MemBlock::zeroed(4));
        disk.write_at(0, b"a").unwrap();
        disk.write_at(1, b"b").unwrap();
        disk.flush().unwrap();
        disk.write_at(2, b"c").unwrap();
        disk.write_at(3, b"d").unwrap();
        let seen = pictures(&trace, 40);
        let all: BTreeSet<String> = ["----", "a---", "-b--", "ab--", "abc-", "ab-d", "abcd"].map(String::from).into();
        assert_eq!(seen, all);
        assert_eq!(trace.events().len(), 5);
        // The same seed gives the same states.
        let bytes = || trace.states(3, 9).map(|state| state.disk.into_bytes()).collect::<Vec<_>>();
        assert_eq!(bytes(), bytes());
    }

    #[test]
    fn every_cut_has_its_prefix_first() {
        let (mut disk, trace) = CrashLog::new(MemBlock::zeroed(1));
        for byte in [b"1", b"2", b"3"] {
            disk.write_at(0, byte).unwrap();
        }
        let prefixes: Vec<_> = trace.states(0, 3).filter(|state| state.variant == 0).collect();
        assert_eq!(prefixes.iter().map(|state| state.disk.as_bytes()[0]).collect::<Vec<_>>(), b"\x00123");
        assert_eq!(prefixes.iter().map(|state| state.cut).collect::<Vec<_>>(), [0, 1, 2, 3]);
    }

    #[test]
    fn a_long_write_can_be_torn_between_sectors_only() {
        let (mut disk, trace) = CrashLog::new(MemBlock::zeroed(2048));
        disk.write_at(256, &[1; 1024]).unwrap();
        disk.write_at(2047, &[1]).unwrap();
        let mut torn = 0;
        for state in trace.states(5, 50) {
            let bytes = state.disk.as_bytes();
            let pieces = [&bytes[256..512], &bytes[512..1024], &bytes[1024..1280]];
            assert!(pieces.iter().all(|piece| piece.iter().all(|byte| *byte == piece[0])));
            torn += usize::from(pieces.iter().any(|piece| piece[0] != pieces[0][0]));
        }
        assert!(torn > 0);
    }

    #[test]
    fn size_and_zeroes_are_changes_as_well() {
        let (mut disk, trace) = CrashLog::new(MemBlock::from(b"xyz".to_vec()));
        disk.set_size(5).unwrap();
        disk.flush().unwrap();
        disk.write_zeroes(0, 1, ZeroMode::Unmap).unwrap();
        disk.discard(1, 1).unwrap();
        let all: BTreeSet<String> = ["xyz", "xyz--", "-yz--", "x-z--", "--z--"].map(String::from).into();
        assert_eq!(pictures(&trace, 40), all);
        assert_eq!(disk.size(), 5);
        assert_eq!(trace.events()[2], Event::Zero { offset: 0, len: 1 });
    }
}
