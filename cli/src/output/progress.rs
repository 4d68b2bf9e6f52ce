//! The progress line of `-p`.

use std::io::{self, Write};

/// Prints `    (12.34/100%)` over and over, each time at least one percent was gained.
#[derive(Debug)]
pub struct ProgressLine {
    enabled: bool,
    last: f64,
}

impl ProgressLine {
    /// Starts the line at zero, if the user wants one.
    pub fn start(enabled: bool) -> Self {
        let line = Self { enabled, last: 0.0 };
        line.print(0.0);
        line
    }

    /// Tells how far the work is.
    pub fn update(&mut self, done: u64, total: u64) {
        let percent = match total {
            0 => 100.0,
            total => (done.min(total) as f64) * 100.0 / (total as f64),
        };
        if percent - self.last >= 1.0 || (percent >= 100.0 && self.last < 100.0) {
            self.last = percent;
            self.print(percent);
        }
    }

    /// The work is done.
    pub fn complete(&mut self) {
        self.last = 100.0;
        self.print(100.0);
    }

    fn print(&self, percent: f64) {
        if self.enabled {
            let mut out = io::stdout().lock();
            // Not being able to show progress is no reason to stop; the end of the command checks the output.
            let _ = write!(out, "    ({percent:3.2}/100%)\r").and_then(|()| out.flush());
        }
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.enabled {
            let mut out = io::stdout().lock();
            let _ = out.write_all(b"\n").and_then(|()| out.flush());
        }
    }
}
