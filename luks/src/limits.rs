use crate::error::{Error, Result};

/// What opening a volume may cost: a header can ask for years.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Iterations of the hash, of all key slots that are tried together. A second of a current processor is some 10 million. For
    /// Argon2, four for each KiB of memory and pass.
    pub iterations: u64,
    /// Memory of Argon2, bytes.
    pub memory: u64,
}

impl Default for Limits {
    /// 64 million iterations, 64 MiB.
    fn default() -> Self {
        Self { iterations: 1 << 26, memory: 64 << 20 }
    }
}

/// What is left of [`Limits::iterations`].
#[derive(Debug)]
pub(crate) struct Budget {
    left: u64,
    pub memory: u64,
}

impl Budget {
    pub fn new(limits: &Limits) -> Self {
        Self { left: limits.iterations, memory: limits.memory }
    }

    /// Takes `cost` iterations away.
    pub fn spend(&mut self, cost: u64) -> Result<()> {
        self.left = self.left.checked_sub(cost).ok_or(Error::TooManyIterations(cost))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_add_up() {
        let mut budget = Budget::new(&Limits { iterations: 10, memory: 0 });
        budget.spend(6).unwrap();
        assert_eq!(budget.spend(5), Err(Error::TooManyIterations(5)));
        budget.spend(4).unwrap();
    }
}
