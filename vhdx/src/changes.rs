//! What a log changes in the file, and the file as it is with these changes: nothing is written.

use alloc::collections::BTreeMap;

use instar_blockio::{BlockRead, BlockWrite, Limits, Result as BlockResult, ZeroMode, check_range};

use crate::error::{LogFault, Result};
use crate::format::{DATA_SECTOR_HEAD, DATA_SECTOR_TAIL, LOG_SECTOR};
use crate::log::Replay;
use crate::pages::read_padded;
use crate::region::Area;

/// Changes that are kept, at most: sectors of 1 GiB, and some 20 MiB of memory.
const MAX_CHANGES: usize = 1 << 18;

const SECTOR: usize = LOG_SECTOR as usize;

/// The new bytes of a sector: most lie in the log, the first and last ones in the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DataAt {
    /// Offset of the data sector in the file.
    pub sector: u64,
    pub leading: [u8; DATA_SECTOR_HEAD],
    pub trailing: [u8; DATA_SECTOR_TAIL],
}

/// Runs of the file that don't overlap: a sector of data, or any number of sectors of zeroes.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// By their start: end and data.
    runs: BTreeMap<u64, (u64, Option<DataAt>)>,
}

impl Changes {
    /// Adds a change over earlier ones. Without data it is zeroes; data fill one sector.
    pub(crate) fn add(&mut self, area: Area, data: Option<DataAt>) -> Result<()> {
        if area.len == 0 {
            return Ok(());
        }
        self.cut(area.at, area.end());
        if self.runs.len() >= MAX_CHANGES {
            return Err(LogFault::TooManyChanges.into());
        }
        self.runs.insert(area.at, (area.end(), data));
        Ok(())
    }

    /// Takes a range out. Only runs of zeroes are ever longer than a sector, so only these are split.
    fn cut(&mut self, start: u64, end: u64) {
        if let Some((&at, &(stop, data))) = self.runs.range(..start).next_back()
            && stop > start
        {
            self.runs.insert(at, (start, data));
            if stop > end {
                self.runs.insert(end, (stop, data));
            }
        }
        while let Some((&at, &(stop, data))) = self.runs.range(start..end).next() {
            self.runs.remove(&at);
            if stop > end {
                self.runs.insert(end, (stop, data));
            }
        }
    }

    /// The first run that reaches into `start..end`, clipped to it.
    fn first(&self, start: u64, end: u64) -> Option<(Area, Option<DataAt>)> {
        if start >= end {
            return None;
        }
        let before = self.runs.range(..=start).next_back().filter(|(_, (stop, _))| *stop > start);
        let (&at, &(stop, data)) = before.or_else(|| self.runs.range(start..end).next())?;
        let from = at.max(start);
        Some((Area { at: from, len: stop.min(end) - from }, data))
    }
}

/// A file as it is once its log has been replayed.
#[derive(Debug)]
pub(crate) struct Replayed<D> {
    file: D,
    replay: Option<Replay>,
}

impl<D: BlockRead> Replayed<D> {
    pub(crate) fn new(file: D, replay: Option<Replay>) -> Self {
        Self { file, replay }
    }

    /// The file as it is.
    pub(crate) fn raw(&self) -> &D {
        &self.file
    }

    /// The log changes something.
    pub(crate) fn is_changed(&self) -> bool {
        self.replay.is_some()
    }

    /// What the log changes in a run of the file, first of all: where, and whether it is zeroes.
    pub(crate) fn first_change(&self, at: u64, len: u64) -> Option<(Area, bool)> {
        let changes = &self.replay.as_ref()?.changes;
        changes.first(at, at.saturating_add(len)).map(|(area, data)| (area, data.is_none()))
    }

    /// Puts changes into bytes that were read at `offset`.
    fn patch(&self, changes: &Changes, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        let end = offset + buf.len() as u64; // inside the file
        let mut at = offset;
        while let Some((area, data)) = changes.first(at, end) {
            let part = &mut buf[(area.at - offset) as usize..][..area.len as usize];
            match data {
                None => part.fill(0),
                Some(data) => {
                    let sector = sector(&self.file, &data)?;
                    let skip = (area.at % LOG_SECTOR) as usize;
                    part.copy_from_slice(&sector[skip..skip + part.len()]);
                }
            }
            at = area.end();
        }
        Ok(())
    }
}

fn sector<D: BlockRead>(file: &D, data: &DataAt) -> BlockResult<[u8; SECTOR]> {
    let mut bytes = [0; SECTOR];
    read_padded(file, data.sector, &mut bytes)?;
    bytes[..DATA_SECTOR_HEAD].copy_from_slice(&data.leading);
    bytes[SECTOR - DATA_SECTOR_TAIL..].copy_from_slice(&data.trailing);
    Ok(bytes)
}

impl<D: BlockRead> BlockRead for Replayed<D> {
    fn size(&self) -> u64 {
        self.replay.as_ref().map_or(self.file.size(), |replay| replay.file_len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> BlockResult<()> {
        let Some(replay) = &self.replay else { return self.file.read_at(offset, buf) };
        check_range(replay.file_len, offset, buf.len() as u64)?;
        read_padded(&self.file, offset, buf)?;
        self.patch(&replay.changes, offset, buf)
    }

    fn limits(&self) -> Limits {
        self.file.limits()
    }
}

/// Carries out the changes in the file itself. The log still holds them, so this may be done again after a crash.
pub(crate) fn apply<D: BlockWrite>(file: &mut D, replay: &Replay) -> BlockResult<()> {
    if file.size() < replay.file_len {
        file.set_size(replay.file_len)?;
    }
    for (&at, &(end, data)) in &replay.changes.runs {
        // Nothing lies behind the end of the file.
        let end = end.min(replay.file_len);
        match data {
            _ if end <= at => {}
            None => file.write_zeroes(at, end - at, ZeroMode::KeepAllocated)?,
            Some(data) => {
                let bytes = sector(file, &data)?;
                file.write_at(at, &bytes[..(end - at) as usize])?;
            }
        }
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[derive(Clone, Debug)]
    struct Change {
        at: u64,
        sectors: u64,
        data: bool,
    }

    proptest! {
        /// Against a list of sectors, each zero, changed by the n-th change, or untouched.
        #[test]
        fn later_changes_win(changes in proptest::collection::vec((0u64..24, 1u64..9, any::<bool>()), 0..30)) {
            let changes: Vec<Change> =
                changes.into_iter().map(|(at, sectors, data)| Change { at, sectors: if data { 1 } else { sectors }, data }).collect();
            let mut map = Changes::default();
            let mut model = [None; 40];
            for (number, change) in changes.iter().enumerate() {
                let data = change.data.then_some(DataAt { sector: number as u64, leading: [0; 8], trailing: [0; 4] });
                map.add(Area { at: change.at * LOG_SECTOR, len: change.sectors * LOG_SECTOR }, data).unwrap();
                for sector in change.at..change.at + change.sectors {
                    model[sector as usize] = Some(data);
                }
            }
            let mut seen = [None; 40];
            let mut at = 0;
            while let Some((area, data)) = map.first(at, 40 * LOG_SECTOR) {
                prop_assert!(area.at >= at && area.len > 0 && (data.is_none() || area.len == LOG_SECTOR));
                for sector in area.at / LOG_SECTOR..area.end() / LOG_SECTOR {
                    seen[sector as usize] = Some(data);
                }
                at = area.end();
            }
            prop_assert_eq!(seen, model);
            // Nothing lies in an empty range, even inside of a run.
            prop_assert!((0..40 * 2).all(|half| map.first(half * LOG_SECTOR / 2, half * LOG_SECTOR / 2).is_none()));
        }
    }
}
