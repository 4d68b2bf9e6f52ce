//! Requests that fail on purpose, as QEMU's driver `blkdebug` lets them, to test who calls.

use std::sync::{Mutex, PoisonError};

use bitflags::bitflags;
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Rules that a file may have.
pub const MAX_FAULT_RULES: usize = 256;
/// The state that a file begins in.
const FIRST_STATE: u32 = 1;

bitflags! {
    /// Kinds of requests.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FaultKinds: u32 {
        /// Reading, also to copy or to compare.
        const READ = 1;
        /// Writing, also of a copy.
        const WRITE = 2;
        /// Writing zeroes.
        const WRITE_ZEROES = 4;
        /// Giving space back.
        const DISCARD = 8;
        /// Making durable what was written.
        const FLUSH = 16;
    }
}

/// What makes a rule take effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FaultEvent {
    /// The file is granted.
    Start = 0,
    /// Something is read, or is about to.
    Read = 1,
    /// The same of a write.
    Write = 2,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// Requests fail from now on, until another rule of this kind takes effect.
    Fail {
        /// Which.
        kinds: FaultKinds,
        /// The error.
        errno: i32,
        /// Only those that touch this byte of the file.
        offset: Option<u64>,
        /// Only the first one.
        once: bool,
    },
    /// The file's state is this number.
    SetState(u32),
}

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultRule {
    /// When it takes effect.
    pub event: FaultEvent,
    /// Only if the file's state, which begins with 1, is this; 0: in any.
    pub state: u32,
    /// What it does.
    pub action: FaultAction,
}

/// A rule between the processes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RawRule {
    event: u32,
    state: u32,
    /// 0: the state is set to `value`.
    kinds: u32,
    errno: i32,
    /// All ones: anywhere.
    offset: u64,
    once: u32,
    value: u32,
}

impl From<&FaultRule> for RawRule {
    fn from(rule: &FaultRule) -> Self {
        let raw =
            Self { event: rule.event as u32, state: rule.state, kinds: 0, errno: 0, offset: 0, once: 0, value: 0 };
        match rule.action {
            FaultAction::SetState(value) => Self { value, ..raw },
            FaultAction::Fail { kinds, errno, offset, once } => {
                Self { kinds: kinds.bits(), errno, offset: offset.unwrap_or(u64::MAX), once: once.into(), ..raw }
            }
        }
    }
}

impl From<&RawRule> for FaultRule {
    fn from(raw: &RawRule) -> Self {
        let event = match raw.event {
            1 => FaultEvent::Read,
            2 => FaultEvent::Write,
            _ => FaultEvent::Start,
        };
        let action = match FaultKinds::from_bits_truncate(raw.kinds) {
            kinds if kinds.is_empty() => FaultAction::SetState(raw.value),
            kinds => FaultAction::Fail {
                kinds,
                errno: raw.errno,
                offset: (raw.offset != u64::MAX).then_some(raw.offset),
                once: raw.once != 0,
            },
        };
        Self { event, state: raw.state, action }
    }
}

/// The rules of a file.
#[derive(Debug)]
pub struct Faults {
    rules: Vec<FaultRule>,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    state: u32,
    /// Rules that let requests fail.
    active: Vec<usize>,
    /// Rules that are used up.
    spent: Vec<usize>,
}

impl Faults {
    /// The rules of a file that was just granted.
    pub fn new(rules: Vec<FaultRule>) -> Self {
        let mut now = Now { state: FIRST_STATE, active: Vec::new(), spent: Vec::new() };
        now.meet(&rules, FaultEvent::Start);
        Self { rules, now: Mutex::new(now) }
    }

    /// Lets a request fail, if it is to: one of a single kind, on `len` bytes from `offset` on.
    pub fn pass(&self, kind: FaultKinds, offset: u64, len: u64) -> Result<(), Errno> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        if kind == FaultKinds::READ {
            now.meet(&self.rules, FaultEvent::Read);
        } else if kind == FaultKinds::WRITE {
            now.meet(&self.rules, FaultEvent::Write);
        }
        let failing = now.active.iter().position(|&index| match self.rules[index].action {
            FaultAction::Fail { kinds, offset: at, .. } => {
                kinds.contains(kind) && at.is_none_or(|at| at >= offset && at - offset < len)
            }
            FaultAction::SetState(_) => false,
        });
        let Some(place) = failing else { return Ok(()) };
        match self.rules[now.active[place]].action {
            FaultAction::Fail { errno, once, .. } if errno > 0 => {
                if once {
                    let index = now.active.remove(place);
                    now.spent.push(index);
                }
                Err(Errno::from_raw_os_error(errno))
            }
            _ => Ok(()),
        }
    }
}

impl Now {
    /// Rules for `event` take effect: those that let requests fail in the place of all others that do.
    fn meet(&mut self, rules: &[FaultRule], event: FaultEvent) {
        let meant = |rule: &FaultRule| rule.event == event && (rule.state == 0 || rule.state == self.state);
        let found: Vec<usize> =
            (0..rules.len()).filter(|index| meant(&rules[*index]) && !self.spent.contains(index)).collect();
        let (failing, setting): (Vec<usize>, Vec<usize>) =
            found.into_iter().partition(|&index| matches!(rules[index].action, FaultAction::Fail { .. }));
        if !failing.is_empty() {
            self.active = failing;
        }
        if let Some(FaultAction::SetState(state)) = setting.first().map(|&index| rules[index].action) {
            self.state = state;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(event: FaultEvent, state: u32, kinds: FaultKinds, offset: Option<u64>, once: bool) -> FaultRule {
        FaultRule { event, state, action: FaultAction::Fail { kinds, errno: 5, offset, once } }
    }

    #[test]
    fn requests_fail_where_and_as_often_as_told() {
        let read = FaultKinds::READ;
        let faults = Faults::new(vec![
            fail(FaultEvent::Start, 0, read, Some(1000), true),
            fail(FaultEvent::Start, 0, FaultKinds::FLUSH, None, false),
        ]);
        assert_eq!(faults.pass(read, 0, 1000), Ok(()));
        assert_eq!(faults.pass(FaultKinds::WRITE, 0, 2000), Ok(()));
        assert_eq!(faults.pass(read, 1000, 1), Err(Errno::IO));
        assert_eq!(faults.pass(read, 0, 2000), Ok(()));
        assert_eq!(faults.pass(FaultKinds::FLUSH, 0, 0), Err(Errno::IO));
        assert_eq!(faults.pass(FaultKinds::FLUSH, 0, 0), Err(Errno::IO));
    }

    #[test]
    fn states_and_events() {
        let set = |event, state, to| FaultRule { event, state, action: FaultAction::SetState(to) };
        // The third read and all that follows.
        let faults = Faults::new(vec![
            set(FaultEvent::Read, 1, 2),
            set(FaultEvent::Read, 2, 3),
            fail(FaultEvent::Read, 3, FaultKinds::all(), None, false),
        ]);
        for _ in 0..2 {
            assert_eq!(faults.pass(FaultKinds::READ, 0, 512), Ok(()));
        }
        assert_eq!(faults.pass(FaultKinds::WRITE, 0, 512), Ok(()));
        assert_eq!(faults.pass(FaultKinds::READ, 0, 512), Err(Errno::IO));
        assert_eq!(faults.pass(FaultKinds::WRITE, 0, 512), Err(Errno::IO));
    }

    #[test]
    fn rules_survive_the_way_to_the_monitor() {
        for rule in [
            fail(FaultEvent::Write, 7, FaultKinds::all(), Some(9), true),
            fail(FaultEvent::Start, 0, FaultKinds::READ, None, false),
            FaultRule { event: FaultEvent::Read, state: 1, action: FaultAction::SetState(0) },
        ] {
            assert_eq!(FaultRule::from(&RawRule::from(&rule)), rule);
        }
    }
}
