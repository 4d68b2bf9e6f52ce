//! The progress of long work.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use signal_hook::consts::SIGUSR1;

use super::human;

/// Cells of the bar.
const WIDTH: usize = 30;

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Show {
    /// Not at all, but for one line on standard error after each SIGUSR1.
    #[default]
    Nothing,
    /// As qemu-img does: `    (12.34/100%)` over and over on standard output, each time at least one percent was gained.
    Percent,
    /// A bar with amount and rate, on standard error.
    Bar,
}

/// Shows how far the work is.
#[derive(Debug)]
pub struct ProgressLine {
    show: Show,
    last: f64,
    /// Zero was shown, or the line is to end without that.
    begun: bool,
    since: Instant,
    /// SIGUSR1 came.
    wanted: Arc<AtomicBool>,
}

impl ProgressLine {
    /// Starts at zero.
    pub fn start(show: Show) -> Self {
        let mut line = Self::prepare(show);
        line.begin();
        line
    }

    /// Shows nothing before the work begins, which is told by [`begin`](Self::begin) or by progress.
    pub fn prepare(show: Show) -> Self {
        let wanted = Arc::new(AtomicBool::new(false));
        if show == Show::Nothing {
            // Without the handler the signal would end the program; that it can't be installed changes nothing else.
            let _ = signal_hook::flag::register(SIGUSR1, wanted.clone());
        }
        Self { show, last: 0.0, begun: false, since: Instant::now(), wanted }
    }

    /// The work begins.
    pub fn begin(&mut self) {
        if !self.begun {
            self.begun = true;
            self.print(0.0, 0, 0);
        }
    }

    /// There is nothing to be shown but the end of the line.
    pub fn give_up(&mut self) {
        self.begun = true;
    }

    /// Is anything shown all the time?
    pub fn is_visible(&self) -> bool {
        self.show != Show::Nothing
    }

    /// Tells how far the work is, in bytes.
    pub fn update(&mut self, done: u64, total: u64) {
        self.begin();
        let percent = match total {
            0 => 100.0,
            total => (done.min(total) as f64) * 100.0 / (total as f64),
        };
        if self.wanted.swap(false, Ordering::Relaxed) {
            let _ = writeln!(io::stderr(), "    ({percent:3.2}/100%)");
        }
        if percent - self.last >= 1.0 || (percent >= 100.0 && self.last < 100.0) {
            self.last = percent;
            self.print(percent, done, total);
        }
    }

    /// Shows how far the work is, whatever was shown last: the steps of an amendment may be estimated anew.
    pub fn step(&mut self, done: u64, total: u64) {
        self.last = (done.min(total) as f64) * 100.0 / (total.max(1) as f64);
        self.print(self.last, 0, 0);
    }

    /// The work is done.
    pub fn complete(&mut self) {
        self.begin();
        self.last = 100.0;
        self.print(100.0, 0, 0);
    }

    /// The work is done, all of which was told as progress.
    pub fn complete_once(&mut self) {
        if self.last < 100.0 {
            self.complete();
        }
    }

    /// The caller ends the line.
    pub fn leave_open(mut self) {
        self.show = Show::Nothing;
    }

    // Not being able to show progress is no reason to stop; the end of the command checks the output.
    fn print(&mut self, percent: f64, done: u64, total: u64) {
        match self.show {
            Show::Nothing => {}
            Show::Percent => {
                let mut out = io::stdout().lock();
                let _ = write!(out, "    ({percent:3.2}/100%)\r").and_then(|()| out.flush());
            }
            Show::Bar => {
                let text = bar(percent, done, total, self.since.elapsed().as_secs_f64());
                let _ = io::stderr().write_all(text.as_bytes());
            }
        }
    }
}

/// `[######        ]  42 %  512 MiB of 1.2 GiB, 800 MiB/s`, over the line before.
fn bar(percent: f64, done: u64, total: u64, seconds: f64) -> String {
    let full = ((percent / 100.0 * WIDTH as f64) as usize).min(WIDTH);
    let mut line = format!("\r[{}{}] {percent:3.0} %", "#".repeat(full), " ".repeat(WIDTH - full));
    if done > 0 {
        let rate = (done as f64 / seconds.max(0.001)) as u64;
        line.push_str(&format!("  {} of {}, {}/s", human::size(done), human::size(total), human::size(rate)));
    }
    // What a longer line left behind.
    line.push_str("\x1b[K");
    line
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        match self.show {
            _ if !self.begun => {}
            Show::Nothing => {}
            Show::Percent => {
                let mut out = io::stdout().lock();
                let _ = out.write_all(b"\n").and_then(|()| out.flush());
            }
            Show::Bar => {
                let _ = io::stderr().write_all(b"\n");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars() {
        assert_eq!(
            bar(50.0, 512 << 20, 1 << 30, 0.5),
            "\r[###############               ]  50 %  512 MiB of 1 GiB, 1 GiB/s\x1b[K"
        );
        assert_eq!(bar(100.0, 0, 0, 0.0), "\r[##############################] 100 %\x1b[K");
    }
}
