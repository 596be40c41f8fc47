//! The thread's part: lines into a file, each with the hash of the one before.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};
use thiserror::Error;

use super::record::{self, BROKEN_TAIL, NOTHING_BEFORE, Record, hash};
use super::verify::explains;

/// How much of a log's end is looked at before it is gone on with. Holds some dozens of the longest lines.
const TAIL: u64 = 256 << 10;

/// The log could not be gone on with.
#[derive(Debug, Error)]
pub enum AuditError {
    /// The file.
    #[error("cannot write the audit log {path}: {source}; choose a path that can be written, or do without --audit")]
    File {
        /// Its path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Two chains in one file would be none.
    #[error("another process writes to the audit log {path}: give each machine one of its own")]
    Shared {
        /// Its path.
        path: PathBuf,
    },
    /// Going on with it would make it look whole.
    #[error(
        "the end of the audit log {path} is not as it was written: {reason}; see `switchover audit verify`, and move it away, or \
         choose another"
    )]
    Tail {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// The thread that writes.
    #[error(
        "cannot start the thread that writes the audit log {path}: {source}; is the process limit (`ulimit -u`) reached?"
    )]
    Thread {
        /// The log's path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A log that is open.
#[derive(Debug)]
pub struct Writer {
    file: Flock<File>,
    path: PathBuf,
    /// Of the last whole record.
    seq: u64,
    last: String,
    /// What stands behind it, where it is half a line: its hash and how many bytes it has.
    fragment: Option<(String, usize)>,
    /// Notes that were never written.
    lost: u64,
    failing: bool,
}

impl Writer {
    /// Goes on with a log.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        let failed = |source| AuditError::File { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(path).map_err(failed)?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => AuditError::Shared { path: path.to_owned() },
            errno => failed(errno.into()),
        })?;
        let length = file.metadata().map_err(failed)?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL))).map_err(failed)?;
        let mut tail = Vec::new();
        Read::by_ref(&mut *file).take(TAIL).read_to_end(&mut tail).map_err(failed)?;
        if ends_without_newline(&tail) {
            file.write_all(b"\n").map_err(failed)?;
            tail.push(b'\n');
        }
        let (last, seq, fragment) =
            continue_from(&tail, length > TAIL).map_err(|reason| AuditError::Tail { path: path.to_owned(), reason })?;
        Ok(Self { file, path: path.to_owned(), seq, last, fragment, lost: 0, failing: false })
    }

    /// So many notes have been lost on their way here.
    pub fn lose(&mut self, notes: u64) {
        self.lost += notes;
    }

    /// Writes a note. What cannot be written is said aloud and counted, and noted as soon as it can be.
    pub fn note(&mut self, at: SystemTime, event: &'static str, data: &Value) {
        let written = self.mend(at).and_then(|()| self.write(at, event, data));
        match written {
            Ok(()) if self.failing => {
                self.failing = false;
                tracing::warn!("the audit log {} takes lines again", self.path.display());
            }
            Ok(()) => {}
            Err(error) => {
                self.lost += 1;
                if !self.failing {
                    self.failing = true;
                    tracing::error!(
                        "the audit log {} cannot be written: {error}; the machine goes on, and what happens to it is not noted",
                        self.path.display()
                    );
                }
            }
        }
    }

    /// What the disk has, it keeps.
    pub fn flush(&mut self) {
        if let Err(error) = self.file.sync_data() {
            tracing::error!("the audit log {} may not be on its disk: {error}", self.path.display());
        }
    }

    /// Says of half a line that it is one, and of lost notes how many they were.
    fn mend(&mut self, at: SystemTime) -> io::Result<()> {
        if let Some((fragment, bytes)) = self.fragment.clone() {
            let data = json!({ "bytes": bytes, "after": self.last });
            let line = record::line(self.seq + 1, at, BROKEN_TAIL, &data, &fragment);
            // Ends the half line as well.
            self.append(&format!("\n{line}\n"), 1)?;
        }
        if self.lost > 0 {
            self.write(at, "lost", &json!({ "notes": self.lost }))?;
            self.lost = 0;
        }
        Ok(())
    }

    fn write(&mut self, at: SystemTime, event: &'static str, data: &Value) -> io::Result<()> {
        let line = record::line(self.seq + 1, at, event, data, &self.last);
        self.append(&format!("{line}\n"), 0)
    }

    /// Appends a line, which begins at `start` of `text` and is followed by its newline; in one piece, where the kernel plays along.
    fn append(&mut self, text: &str, start: usize) -> io::Result<()> {
        let bytes = text.as_bytes();
        let mut done = 0;
        while done < bytes.len() {
            match self.file.write(&bytes[done..]) {
                Ok(0) => return self.cut_off(&bytes[..done], start, io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.cut_off(&bytes[..done], start, error),
            }
        }
        self.seq += 1;
        self.last = hash(&bytes[start..bytes.len() - 1]);
        self.fragment = None;
        Ok(())
    }

    /// Only the beginning of a line was taken. What half a line has been ended by this attempt is not told of any more: the next
    /// will find the end of the file otherwise, and says so.
    fn cut_off(&mut self, written: &[u8], start: usize, error: io::Error) -> io::Result<()> {
        if !written.is_empty() {
            // Taken back, where that can be: an append-only file (chattr +a) does not let it.
            let length = self.file.metadata().map(|metadata| metadata.len().saturating_sub(written.len() as u64));
            let taken_back = length.and_then(|length| self.file.set_len(length)).is_ok();
            if !taken_back && written.len() > start {
                self.fragment = Some((hash(&written[start..]), written.len() - start));
            }
        }
        Err(error)
    }
}

/// Where the chain stands at the end of `tail`, the last part of a log: the last line's hash and number, and half a line behind it.
type Standing = (String, u64, Option<(String, usize)>);

/// Whether all that its last line lacks is its newline: nothing of it is lost.
fn ends_without_newline(tail: &[u8]) -> bool {
    let line = tail.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    Record::parse(line).is_ok_and(|record| record.is_whole(line))
}

fn continue_from(tail: &[u8], cut: bool) -> Result<Standing, &'static str> {
    let (whole, rest) = match tail.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => (&tail[..end], &tail[end + 1..]),
        None if cut => return Err("its last line is too long"),
        None => (&tail[..0], tail),
    };
    let fragment = (!rest.is_empty()).then(|| (hash(rest), rest.len()));
    let mut lines = whole.split(|byte| *byte == b'\n').rev();
    let Some(line) = lines.next().filter(|line| !line.is_empty()) else {
        return Ok((NOTHING_BEFORE.to_owned(), 0, fragment));
    };
    let record = Record::parse(line).map_err(|_| "its last line is no record")?;
    if !record.is_whole(line) {
        return Err("its last line was altered");
    }
    match lines.next() {
        None if !cut && record.prev != NOTHING_BEFORE => return Err("lines before its last one are missing"),
        // What half a line stood after is for `verify` to check.
        Some(before) if record.event == BROKEN_TAIL => {
            let after = record.data["after"].as_str();
            if !explains(&record, &hash(before), after) {
                return Err("the line before its last one was altered, or others are missing between them");
            }
        }
        Some(before) if hash(before) != record.prev => {
            return Err("the line before its last one was altered, or others are missing between them");
        }
        _ => {}
    }
    Ok((hash(line), record.seq, fragment))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Audit;
    use super::super::verify::verify;
    use super::*;

    fn noted(path: &Path, count: usize) {
        let audit = Audit::append(path).unwrap();
        for n in 0..count {
            audit.note("command", json!({ "n": n }));
        }
        audit.flush();
    }

    /// Waits until the thread of a log that was let go of has closed it.
    fn free(path: &Path) {
        while matches!(Writer::open(path), Err(AuditError::Shared { .. })) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_log_is_gone_on_with_where_it_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        for _ in 0..3 {
            noted(&path, 5);
            free(&path);
        }
        let verdict = verify(&fs::read(&path).unwrap(), None);
        assert_eq!((verdict.records, verdict.problems, verdict.notes), (15, vec![], vec![]));
        assert_eq!(verdict.head.unwrap().0, 15);
    }

    #[test]
    fn half_a_line_is_noted_and_not_hidden() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        for cut in [1, 40, 200] {
            let _ = fs::remove_file(&path);
            noted(&path, 3);
            free(&path);
            let whole = fs::read(&path).unwrap();
            fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            assert_eq!(verify(&fs::read(&path).unwrap(), None).problems.len(), 1);
            noted(&path, 2);
            free(&path);
            // And a second time right behind it.
            noted(&path, 1);
            let log = fs::read(&path).unwrap();
            let verdict = verify(&log, None);
            assert_eq!(verdict.problems, [], "{}", String::from_utf8_lossy(&log));
            if cut == 1 {
                assert_eq!(verdict.notes, [], "all of it was there");
                continue;
            }
            assert!(matches!(&verdict.notes[..], [note] if note.line == 3 && note.reason.contains("half a line")));
            // Another half in its place is an alteration.
            let text = String::from_utf8(log).unwrap();
            let lines: Vec<_> = text.lines().collect();
            let forged = text.replace(&format!("{}\n", lines[2]), "{\"seq\":3\n");
            assert!(!verify(forged.as_bytes(), None).problems.is_empty());
        }
    }

    #[test]
    fn a_log_whose_end_was_altered_is_not_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        noted(&path, 3);
        free(&path);
        let whole = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = whole.lines().collect();
        let forged = lines[2].replace("command", "Command");
        for log in [
            format!("{}\n{}\n{forged}\n", lines[0], lines[1]),
            format!("{}\n{}\n", lines[0], lines[2]),
            format!("{}\n", lines[2]),
            "something else\n".to_owned(),
        ] {
            fs::write(&path, &log).unwrap();
            assert!(matches!(Writer::open(&path), Err(AuditError::Tail { .. })), "{log}");
            assert_eq!(fs::read_to_string(&path).unwrap(), log, "it was left alone");
        }
    }

    #[test]
    fn two_processes_do_not_write_one_log() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let _first = Audit::append(&path).unwrap();
        assert!(matches!(Audit::append(&path), Err(AuditError::Shared { .. })));
    }

    fn full() -> Flock<File> {
        let file = OpenOptions::new().append(true).open("/dev/full").unwrap();
        Flock::lock(file, FlockArg::LockSharedNonblock).map_err(|(_, errno)| errno).unwrap()
    }

    #[test]
    fn a_full_disk_loses_notes_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(&folder.path().join("audit")).unwrap();
        let good = std::mem::replace(&mut writer.file, full());
        for n in 0..3 {
            writer.note(SystemTime::UNIX_EPOCH, "command", &json!({ "n": n }));
        }
        assert_eq!(writer.lost, 3);
        writer.file = good;
        writer.note(SystemTime::UNIX_EPOCH, "command", &json!({ "n": 3 }));
        let log = fs::read(&writer.path).unwrap();
        assert_eq!(verify(&log, None).problems, []);
        assert!(String::from_utf8(log).unwrap().contains(r#""event":"lost","data":{"notes":3}"#));
    }
}
