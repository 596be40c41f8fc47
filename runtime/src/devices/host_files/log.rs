//! What is printed of the things that a guest does with its host files.

use std::fmt;
use std::io::Write as _;

use crate::devices::output::Output;

/// A log, or none. It drops what it cannot write.
#[derive(Clone, Debug, Default)]
pub struct Log {
    output: Option<Output>,
    name: Option<String>,
}

impl Log {
    /// One that leads there. With a `name`, each line says whose it is.
    #[must_use]
    pub const fn new(output: Output, name: Option<String>) -> Self {
        Self { output: Some(output), name }
    }

    /// Adds a line about the guest.
    pub fn note(&self, line: fmt::Arguments<'_>) {
        match &self.name {
            Some(name) => self.print(format_args!("{name}: VM_APP - {line}")),
            None => self.print(line),
        }
    }

    /// Adds a line about the machine itself, where the log has a name to call it by.
    pub fn note_of_machine(&self, line: &str) {
        if let Some(name) = &self.name {
            self.print(format_args!("{name}: {line}"));
        }
    }

    fn print(&self, line: fmt::Arguments<'_>) {
        if let Some(output) = &self.output {
            let _ = output.clone().write_all(format!("{line}\n").as_bytes());
        }
    }
}
