//! How a command ends that did not do what it was told.

use std::fmt;
use std::process::ExitCode;

/// A failure as the user sees it: a sentence that says what was tried, on what, and what to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The process's exit status: 1 failed, 2 bad usage.
    pub status: u8,
    /// The sentence.
    pub sentence: String,
}

impl Failure {
    /// What was asked for was tried, and failed.
    pub fn failed(sentence: impl fmt::Display) -> Self {
        Self { status: 1, sentence: sentence.to_string() }
    }

    /// What was asked for makes no sense.
    pub fn usage(sentence: impl fmt::Display) -> Self {
        Self { status: 2, sentence: sentence.to_string() }
    }

    /// Prints the sentence on stderr and gives the exit status.
    #[must_use]
    pub fn report(&self) -> ExitCode {
        say(&self.sentence);
        ExitCode::from(self.status)
    }
}

/// Tells the user something on stderr. A closed stderr is no reason to end.
pub fn say(sentence: impl fmt::Display) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr().lock(), "switchover: {sentence}");
}
