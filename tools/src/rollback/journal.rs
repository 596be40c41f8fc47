//! What a rollback has begun and done, durable before it goes on: so that one that was killed can be run again.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why there is no journal to go by.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The file could not be used.
    #[error("cannot {attempted} the journal {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        attempted: &'static str,
        /// The journal.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Somebody else is at it.
    #[error("another rollback to this checkpoint is running: it holds the journal {}", .0.display())]
    Locked(PathBuf),
    /// It is of another rollback.
    #[error(
        "the journal {path} is of a rollback that did not come to its end, and that had other machines or another checkpoint: {other}; \
         finish that one first, or remove the journal if you know where its guest is",
        path = path.display()
    )]
    Other {
        /// The journal.
        path: PathBuf,
        /// What it says of itself.
        other: String,
    },
    /// It is no journal.
    #[error("{path} is not a journal of a rollback: line {line} says `{text}`", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is there.
        text: String,
    },
}

/// The steps, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The guest runs nowhere any more.
    Fence,
    /// The checkpoint is whole.
    Verify,
    /// The machines that had the guest have ended.
    Stop,
    /// The guest of the checkpoint is in its new machine, paused.
    Restore,
    /// It is that guest.
    Confirm,
    /// It runs.
    Resume,
    /// That this happened is written down.
    Record,
    /// Nothing of the rollback is left.
    CleanUp,
}

impl Step {
    /// Its name, as it is printed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fence => "fence",
            Self::Verify => "verify",
            Self::Stop => "stop",
            Self::Restore => "restore",
            Self::Confirm => "confirm",
            Self::Resume => "resume",
            Self::Record => "record",
            Self::CleanUp => "clean up",
        }
    }
}

/// How far a step is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// It may have happened, or a part of it.
    Begun,
    /// It has happened.
    Done,
}

/// What is rolled back, to what.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Subject {
    /// The moment that the checkpoint is of, in hexadecimal: it stays when the checkpoint is merged with those that it is based on.
    pub moment: String,
    /// The machines' QMP sockets.
    pub source: String,
    /// As above.
    pub destination: String,
    /// As above.
    pub into: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", untagged, deny_unknown_fields)]
enum Line {
    Begin { rollback: Subject, at: u64 },
    Step { step: Step, stage: Stage, at: u64 },
    Running { ran: usize, at: u64 },
}

/// An open journal, which nobody else has open.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    path: PathBuf,
    steps: Vec<(Step, Stage)>,
    /// The machines that ran the guest when this began, by their numbers.
    ran: Vec<usize>,
}

impl Journal {
    /// Opens the journal at `path`, or begins one. One that came to its end is begun anew.
    ///
    /// # Errors
    /// When it cannot be read or written, another process has it, or it is of something else.
    pub fn open(path: &Path, subject: &Subject) -> Result<Self, JournalError> {
        let io = |attempted| move |source| JournalError::Io { attempted, path: path.to_owned(), source };
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(io("open"))?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => JournalError::Locked(path.to_owned()),
            errno => io("lock")(errno.into()),
        })?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(io("read"))?;
        // Half a line is what a killed writer left: what it tells of had not begun.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut journal = Self { file, path: path.to_owned(), steps: Vec::new(), ran: Vec::new() };
        let begun = journal.take_lines(&text[..whole], subject)?;
        let over = journal.stage(Step::CleanUp) == Some(Stage::Done);
        let keep = if begun && !over { whole } else { 0 };
        journal.file.set_len(keep as u64).map_err(io("cut"))?;
        journal.file.seek(SeekFrom::End(0)).map_err(io("seek in"))?;
        if keep == 0 {
            journal.steps.clear();
            journal.ran.clear();
            journal.append(&Line::Begin { rollback: subject.clone(), at: now() })?;
            // Its name, too, must be there after a crash of the host.
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("make durable"))?;
        }
        Ok(journal)
    }

    /// Whether the rollback of `subject` came to its end, by the journal at `path`.
    #[must_use]
    pub fn is_over(path: &Path, subject: &Subject) -> bool {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let mut lines = text.lines().map(serde_json::from_str::<Line>);
        let own = matches!(lines.next(), Some(Ok(Line::Begin { rollback, .. })) if rollback == *subject);
        own && matches!(lines.next_back(), Some(Ok(Line::Step { step: Step::CleanUp, stage: Stage::Done, .. })))
    }

    /// Says whether it had been begun for `subject`.
    fn take_lines(&mut self, text: &str, subject: &Subject) -> Result<bool, JournalError> {
        let mut of = None;
        for (number, text) in (1..).zip(text.lines()) {
            match (serde_json::from_str(text), &of) {
                (Ok(Line::Begin { rollback, .. }), None) => of = Some(rollback),
                (Ok(Line::Step { step, stage, .. }), Some(_)) => self.steps.push((step, stage)),
                (Ok(Line::Running { ran, .. }), Some(_)) => self.ran.push(ran),
                _ => {
                    let text = text.chars().take(80).collect();
                    return Err(JournalError::Foreign { path: self.path.clone(), line: number, text });
                }
            }
        }
        match of {
            Some(other) if other != *subject && self.stage(Step::CleanUp) != Some(Stage::Done) => {
                let other = serde_json::to_string(&other).unwrap_or_default();
                Err(JournalError::Other { path: self.path.clone(), other })
            }
            of => Ok(of.is_some_and(|of| of == *subject)),
        }
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How far a step has come; `None` where it has not begun.
    #[must_use]
    pub fn stage(&self, step: Step) -> Option<Stage> {
        self.steps.iter().rev().find(|(noted, _)| *noted == step).map(|(_, stage)| *stage)
    }

    /// Whether a step is done.
    #[must_use]
    pub fn is_done(&self, step: Step) -> bool {
        self.stage(step) == Some(Stage::Done)
    }

    /// Notes how far a step is. When this is back, it stays noted whatever happens.
    ///
    /// # Errors
    /// When it cannot be written: nothing that depends on it may be done then.
    pub fn note(&mut self, step: Step, stage: Stage) -> Result<(), JournalError> {
        self.append(&Line::Step { step, stage, at: now() })?;
        self.steps.push((step, stage));
        Ok(())
    }

    /// The machines that ran the guest when this began, by their numbers.
    #[must_use]
    pub fn ran(&self) -> &[usize] {
        &self.ran
    }

    /// Notes that machine number `index` runs the guest.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note_running(&mut self, index: usize) -> Result<(), JournalError> {
        self.append(&Line::Running { ran: index, at: now() })?;
        self.ran.push(index);
        Ok(())
    }

    /// Empties and removes it: nothing has happened.
    ///
    /// # Errors
    /// When it cannot be emptied for good.
    pub fn discard(self) -> Result<(), JournalError> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.sync_all());
        emptied.map_err(|source| JournalError::Io { attempted: "empty", path: self.path.clone(), source })?;
        let _ = std::fs::remove_file(&self.path);
        Ok(())
    }

    fn append(&mut self, line: &Line) -> Result<(), JournalError> {
        let mut text = serde_json::to_string(line).unwrap_or_default();
        text.push('\n');
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|source| JournalError::Io { attempted: "write", path: self.path.clone(), source })
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn subject(into: &str) -> Subject {
        let [moment, source, destination] = ["00ff", "/s", "/d"].map(str::to_owned);
        Subject { moment, source, destination, into: into.to_owned() }
    }

    #[test]
    fn what_was_noted_is_found_again_and_half_a_line_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut journal = Journal::open(&path, &subject("/i")).unwrap();
        assert_eq!(journal.stage(Step::Fence), None);
        journal.note(Step::Fence, Stage::Begun).unwrap();
        journal.note(Step::Fence, Stage::Done).unwrap();
        journal.note(Step::Restore, Stage::Begun).unwrap();
        journal.note_running(1).unwrap();
        assert!(matches!(Journal::open(&path, &subject("/i")), Err(JournalError::Locked(_))));
        drop(journal);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let journal = Journal::open(&path, &subject("/i")).unwrap();
            let lines = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(
                (journal.is_done(Step::Fence), journal.stage(Step::Restore).is_some()),
                (lines >= 3, lines >= 4),
                "{cut}"
            );
        }
        fs::write(&path, &whole).unwrap();
        let journal = Journal::open(&path, &subject("/i")).unwrap();
        assert_eq!((journal.stage(Step::Restore), journal.ran()), (Some(Stage::Begun), &[1][..]));
    }

    #[test]
    fn one_that_is_not_over_is_of_one_rollback_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut journal = Journal::open(&path, &subject("/i")).unwrap();
        journal.note(Step::Resume, Stage::Done).unwrap();
        drop(journal);
        let error = Journal::open(&path, &subject("/other")).unwrap_err().to_string();
        assert!(error.contains("\"/i\""), "{error}");
        let mut journal = Journal::open(&path, &subject("/i")).unwrap();
        assert!(journal.is_done(Step::Resume));
        journal.note(Step::CleanUp, Stage::Done).unwrap();
        drop(journal);
        let journal = Journal::open(&path, &subject("/other")).unwrap();
        assert_eq!(journal.stage(Step::Resume), None, "that was another one");
        journal.discard().unwrap();
        fs::write(&path, "an image\n").unwrap();
        assert!(matches!(Journal::open(&path, &subject("/i")), Err(JournalError::Foreign { line: 1, .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "an image\n", "it is left as it is");
    }
}
