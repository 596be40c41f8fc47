//! A small blocking QMP client, for this runtime's socket and for QEMU's.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use switchover_runtime::qmp::framing::{Framing, InputError};
use thiserror::Error;

/// How long a command's reply may take. Every QMP command answers at once; only a hung process does not.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a socket that is not there yet is tried again.
const CONNECT_RETRY: Duration = Duration::from_millis(5);
/// How often `query-migrate` is asked while waiting for a status.
const POLL: Duration = Duration::from_millis(2);
/// Longest message taken. QEMU's longest, its schema, is a quarter of a megabyte.
const MESSAGE_LIMIT: usize = 64 << 20;

/// Why a command was not carried out.
#[derive(Debug, Error)]
pub enum QmpError {
    /// Nobody listens on the socket.
    #[error("cannot connect to the QMP socket {path} within {waited:?}: {source}; is the machine running with --qmp unix:{path}?", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// How long it was tried.
        waited: Duration,
        /// The last attempt's error.
        source: io::Error,
    },
    /// Reading or writing failed.
    #[error("cannot {attempted} on the QMP socket: {source}")]
    Io {
        /// What was tried.
        attempted: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The other side closed the connection.
    #[error("the QMP socket was closed before `{waiting_for}` was answered: the process at its other end has gone")]
    Closed {
        /// The command or event that was waited for.
        waiting_for: String,
    },
    /// What came is not QMP.
    #[error("the peer on the QMP socket does not speak QMP: {reason}")]
    Protocol {
        /// What is wrong with it.
        reason: String,
    },
    /// The command was refused.
    #[error("`{command}` was refused: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QMP's error class: `GenericError`, `CommandNotFound`, …
        class: String,
        /// The reason.
        desc: String,
    },
    /// Nothing came in time.
    #[error("waited {waited:?} for {waiting_for} in vain; {last}")]
    Timeout {
        /// What was waited for.
        waiting_for: String,
        /// For how long.
        waited: Duration,
        /// What was seen instead.
        last: String,
    },
    /// The migration that was waited for failed or was cancelled.
    #[error("the migration ended as `{status}`: {desc}")]
    MigrationFailed {
        /// `failed` or `cancelled`.
        status: String,
        /// The reason that `query-migrate` gives.
        desc: String,
    },
}

impl QmpError {
    /// Whether nobody listens on the socket, which is what a process that has ended leaves.
    #[must_use]
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::Connect { source, .. } if nobody_listens(source))
    }
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// A connection to a QMP socket, negotiated and ready for commands.
#[derive(Debug)]
pub struct QmpClient {
    stream: UnixStream,
    framing: Framing,
    received: VecDeque<Value>,
    events: VecDeque<Value>,
    next_id: u64,
    greeting: Value,
}

impl QmpClient {
    /// Connects to the socket at `path`, trying again until `timeout` while it is not there yet, and negotiates.
    ///
    /// # Errors
    /// When nobody listens in time, or what listens does not speak QMP.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let started = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(source) => {
                    if !nobody_listens(&source) || started.elapsed() >= timeout {
                        return Err(QmpError::Connect { path: path.to_owned(), waited: timeout, source });
                    }
                    thread::sleep(CONNECT_RETRY);
                }
            }
        };
        let mut client = Self {
            stream,
            framing: Framing::new(MESSAGE_LIMIT),
            received: VecDeque::new(),
            events: VecDeque::new(),
            next_id: 0,
            greeting: Value::Null,
        };
        // QEMU takes one connection at a time: a second one gets its greeting when the first has gone.
        let greeting = client.receive("the greeting", started + timeout.max(REPLY_TIMEOUT))?;
        client.greeting = greeting.get("QMP").cloned().ok_or_else(|| QmpError::Protocol {
            reason: format!("it said {} instead of a greeting", shortened(&greeting)),
        })?;
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// What the other side said of itself: `{"version": …, "capabilities": …}`.
    #[must_use]
    pub const fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Executes a command and returns what its reply holds under `return`. `arguments` is an object, or null for none.
    /// Events that come meanwhile are kept for [`wait_event`](Self::wait_event).
    ///
    /// # Errors
    /// When the command is refused, or the connection breaks, or no reply comes.
    #[expect(clippy::needless_pass_by_value, reason = "callers build the arguments on the spot with json!")]
    pub fn execute(&mut self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut command = json!({ "execute": name, "id": id });
        if !arguments.is_null() {
            command["arguments"] = arguments.clone();
        }
        let mut line = command.to_string();
        line.push_str("\r\n");
        self.stream.write_all(line.as_bytes()).map_err(|source| match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                QmpError::Closed { waiting_for: name.to_owned() }
            }
            _ => QmpError::Io { attempted: format!("send `{name}`"), source },
        })?;
        let until = Instant::now() + REPLY_TIMEOUT;
        loop {
            let mut message = self.receive(name, until)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message.get("id").and_then(Value::as_u64) != Some(id) {
                return Err(QmpError::Protocol {
                    reason: format!("the reply to `{name}` has not its id {id}: {}", shortened(&message)),
                });
            } else if let Some(error) = message.get("error") {
                let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
                return Err(QmpError::Refused { command: name.to_owned(), class: text("class"), desc: text("desc") });
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                return Err(QmpError::Protocol {
                    reason: format!("the reply to `{name}` has neither return nor error: {}", shortened(&message)),
                });
            }
        }
    }

    /// Asks `query-migrate` every few milliseconds until its status is one of `wanted`, and returns that answer.
    ///
    /// # Errors
    /// When the migration ends as `failed` or `cancelled` and that is not wanted, or `timeout` passes.
    pub fn wait_status(&mut self, wanted: &[&str], timeout: Duration) -> Result<Value, QmpError> {
        let until = Instant::now() + timeout;
        loop {
            let answer = self.execute("query-migrate", json!({}))?;
            let status = answer.get("status").and_then(Value::as_str).unwrap_or("none");
            if wanted.contains(&status) {
                return Ok(answer);
            }
            if matches!(status, "failed" | "cancelled") {
                let desc = answer.get("error-desc").and_then(Value::as_str).unwrap_or("no reason was given");
                return Err(QmpError::MigrationFailed { status: status.to_owned(), desc: desc.to_owned() });
            }
            if Instant::now() >= until {
                return Err(QmpError::Timeout {
                    waiting_for: format!("the migration to become {}", wanted.join(" or ")),
                    waited: timeout,
                    last: format!("it is `{status}`"),
                });
            }
            thread::sleep(POLL);
        }
    }

    /// The next event called `name`, be it one that came earlier. Events of other names before it are dropped.
    ///
    /// # Errors
    /// When none comes within `timeout`, or the connection breaks.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<Value, QmpError> {
        let until = Instant::now() + timeout;
        loop {
            let message = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive(name, until)?,
            };
            if message.get("event").and_then(Value::as_str) == Some(name) {
                return Ok(message);
            }
        }
    }

    /// The events that have come and were not waited for, oldest first.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    fn receive(&mut self, waiting_for: &str, until: Instant) -> Result<Value, QmpError> {
        let started = Instant::now();
        let failed = |source| QmpError::Io { attempted: format!("wait for `{waiting_for}`"), source };
        loop {
            if let Some(message) = self.received.pop_front() {
                return Ok(message);
            }
            let in_vain = || QmpError::Timeout {
                waiting_for: format!("`{waiting_for}`"),
                waited: until.saturating_duration_since(started),
                last: "nothing came".to_owned(),
            };
            let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
            self.stream.set_read_timeout(Some(left.ok_or_else(in_vain)?)).map_err(failed)?;
            let mut bytes = [0; 16384];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(QmpError::Closed { waiting_for: waiting_for.to_owned() }),
                Ok(count) => {
                    let found: Result<Vec<Value>, InputError> =
                        self.framing.feed(bytes.get(..count).unwrap_or_default()).into_iter().collect();
                    self.received.extend(found.map_err(|error| QmpError::Protocol { reason: error.to_string() })?);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(in_vain()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(QmpError::Closed { waiting_for: waiting_for.to_owned() });
                }
                Err(source) => return Err(failed(source)),
            }
        }
    }
}

/// A message, as much of it as an error sentence bears.
fn shortened(message: &Value) -> String {
    let text = message.to_string();
    match text.char_indices().nth(120) {
        Some((cut, _)) => format!("{}…", text.get(..cut).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const GREETING: &str =
        r#"{"QMP":{"version":{"qemu":{"micro":0,"minor":0,"major":10},"package":""},"capabilities":[]}}"#;
    const NEGOTIATED: &str = r#"{"return":{},"id":0}"#;

    /// A peer that says each of `says` in turn after the greeting, one for each command, whatever the command is.
    fn peer(says: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(GREETING.as_bytes()).unwrap();
            let mut framing = Framing::new(1 << 16);
            let mut says = says.iter();
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut bytes) {
                for _ in framing.feed(&bytes[..count]) {
                    let Some(text) = says.next() else { return };
                    stream.write_all(text.as_bytes()).unwrap();
                }
            }
        });
        (directory, path)
    }

    fn connect(path: &Path) -> QmpClient {
        QmpClient::connect(path, Duration::from_secs(5)).unwrap()
    }

    #[test]
    fn a_command_returns_its_value_and_events_are_kept() {
        let (_directory, path) = peer(&[NEGOTIATED, r#"{"event":"STOP"}{"event":"RESUME"}{"return":{"a":1},"id":1}"#]);
        let mut client = connect(&path);
        assert_eq!(client.greeting()["version"]["qemu"]["major"], 10);
        assert_eq!(client.execute("any", Value::Null).unwrap(), json!({"a": 1}));
        assert_eq!(client.wait_event("RESUME", Duration::from_secs(5)).unwrap()["event"], "RESUME");
        assert!(client.take_events().is_empty());
        assert!(matches!(client.wait_event("STOP", Duration::from_millis(20)), Err(QmpError::Timeout { .. })));
    }

    #[test]
    fn a_refusal_carries_its_class_and_reason() {
        let (_directory, path) = peer(&[NEGOTIATED, r#"{"error":{"class":"GenericError","desc":"no"},"id":1}"#]);
        let error = connect(&path).execute("migrate", json!({})).unwrap_err();
        assert_eq!(error.to_string(), "`migrate` was refused: no");
        assert!(matches!(error, QmpError::Refused { class, .. } if class == "GenericError"));
    }

    #[test]
    fn a_failed_migration_ends_the_wait_with_its_reason() {
        let (_directory, path) = peer(&[
            NEGOTIATED,
            r#"{"return":{"status":"active"},"id":1}"#,
            r#"{"return":{"status":"failed","error-desc":"nobody there"},"id":2}"#,
        ]);
        let error = connect(&path).wait_status(&["completed"], Duration::from_secs(5)).unwrap_err();
        assert_eq!(error.to_string(), "the migration ended as `failed`: nobody there");
    }

    #[test]
    fn a_peer_that_goes_away_is_an_error() {
        let (_directory, path) = peer(&[NEGOTIATED]);
        let error = connect(&path).execute("quit", Value::Null).unwrap_err();
        assert!(matches!(error, QmpError::Closed { .. }), "{error}");
    }

    #[test]
    fn a_socket_that_never_appears_is_named_and_one_that_appears_late_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("none");
        let error = QmpClient::connect(&path, Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");

        let (made, other) = peer(&[NEGOTIATED]);
        let mover = thread::spawn({
            let path = path.clone();
            move || {
                thread::sleep(Duration::from_millis(30));
                std::os::unix::fs::symlink(&other, &path).unwrap();
            }
        });
        connect(&path);
        mover.join().unwrap();
        drop(made);
    }

    #[test]
    fn a_peer_that_speaks_something_else_is_told_apart() {
        let (_directory, path) = peer(&[r#"{"return":{},"id":"another"}"#]);
        let error = QmpClient::connect(&path, Duration::from_secs(5)).unwrap_err();
        assert!(matches!(error, QmpError::Protocol { .. }), "{error}");
    }
}
