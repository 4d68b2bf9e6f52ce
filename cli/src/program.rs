//! Under which name the program was called, and how it speaks to the user.

use std::io::{self, Write};

use crate::problem::Problem;

/// How the program was called.
#[derive(Clone, Debug)]
pub struct Program {
    /// `argv[0]` as it is; usage hints repeat it.
    called: String,
    /// Its last component, the prefix of messages.
    name: String,
}

/// Why a command ends with an exit status of 1.
#[derive(Debug, PartialEq, Eq)]
pub enum Fail {
    /// One message.
    Message(Problem),
    /// A message about the command line, followed by the hint at `--help`.
    Usage(String),
    /// A complaint of the option parser.
    Getopt(String),
    /// Everything has been said.
    Said,
    /// As the other, with an exit status of its own.
    Status(u8, Box<Fail>),
}

impl Fail {
    /// The same with another exit status than 1.
    pub fn with_status(self, status: u8) -> Self {
        Self::Status(status, Box::new(self))
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Status(status, _) => *status,
            _ => 1,
        }
    }
}

impl From<Problem> for Fail {
    fn from(problem: Problem) -> Self {
        Self::Message(problem)
    }
}

impl From<String> for Fail {
    fn from(text: String) -> Self {
        Self::Message(Problem::new(text))
    }
}

impl From<&str> for Fail {
    fn from(text: &str) -> Self {
        Self::Message(Problem::new(text))
    }
}

/// What a command returns.
pub type Outcome = Result<(), Fail>;

impl Program {
    /// Takes the name from `argv[0]`.
    pub fn new(called: String) -> Self {
        let name = called.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("instar").to_owned();
        Self { called, name }
    }

    /// How it calls itself.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its own name or qemu-img's?
    pub fn is_qemu_img(&self) -> bool {
        self.name == "qemu-img"
    }

    /// Prints an error, as qemu-img does. `command` is the subcommand, if one was recognised.
    pub fn report(&self, fail: &Fail, command: Option<&str>) {
        let command = command.map(|name| format!(" {name}")).unwrap_or_default();
        let (called, name) = (&self.called, &self.name);
        let text = match fail {
            Fail::Said => return,
            Fail::Status(_, fail) => {
                return self.report(fail, Some(command.trim_start()).filter(|name| !name.is_empty()));
            }
            Fail::Message(problem) => format!("{name}: {problem}\n"),
            Fail::Usage(text) => format!("{name}: {text}\nTry '{called}{command} --help' for more info\n"),
            Fail::Getopt(text) => format!("{called}{command}: {text}\nTry '{called}{command} --help' for more info\n"),
        };
        // Nothing can be done about a standard error that is closed; the exit status still tells.
        let _ = io::stderr().write_all(text.as_bytes());
    }

    /// Prints a warning: the work goes on.
    pub fn warn(&self, text: &str) {
        let _ = io::stderr().write_all(format!("{}: warning: {text}\n", self.name).as_bytes());
    }
}

/// Prints a warning where it is not known how the program was called.
pub fn warn(text: &str) {
    let called = std::env::args_os().next().unwrap_or_default();
    Program::new(called.to_string_lossy().into_owned()).warn(text);
}

/// Writes to standard output and makes sure that it arrived.
///
/// # Errors
/// A full disk, a closed pipe.
pub fn print(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| {
        let reason = error.raw_os_error().map_or_else(|| error.to_string(), crate::problem::os_text);
        Fail::Message(Problem::new(format!("Could not write to standard output: {reason}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert!(Program::new("/usr/bin/qemu-img".to_owned()).is_qemu_img());
        assert!(!Program::new("target/release/instar".to_owned()).is_qemu_img());
        assert_eq!(Program::new(String::new()).name, "instar");
    }
}
