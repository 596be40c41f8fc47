//! A machine's process: started, listened to, and gone whatever happens.

use std::fmt::Write as _;
use std::io::{self, Read};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use switchover_wire::clock::Nanos;

use super::run_error::RunError;
use super::serial_log::Chunk;

/// A pipe holds 64 KiB.
const READ_BYTES: usize = 1 << 16;
/// Of what a process says on stderr, its last part is kept.
const STDERR_KEPT: usize = 4096;
/// How often a process is looked at that is to end.
const POLL: Duration = Duration::from_millis(5);

/// A process, killed when this is dropped.
pub struct Process {
    who: &'static str,
    child: Child,
    serial: Arc<Capture>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

/// What a process has printed so far, and when.
#[derive(Default)]
pub struct Capture {
    state: Mutex<CaptureState>,
    changed: Condvar,
}

#[derive(Default)]
struct CaptureState {
    chunks: Vec<Chunk>,
    closed: bool,
}

impl Process {
    /// Starts `command`, whose standard output is a serial port. `who` is "the source" or "the destination".
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(who: &'static str, mut command: Command) -> Result<Self, RunError> {
        let failed = |source| RunError::Start { who, source };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: between fork and exec only async-signal-safe functions may be called; `prctl` and `sigprocmask` are
        // plain system calls, and nothing here allocates or locks.
        unsafe {
            command.pre_exec(|| {
                // Should the bench itself be killed, its machines go with it.
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                // The bench blocks the signals that end it, for a thread of its own to take.
                SigSet::empty().thread_set_mask()?;
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(failed)?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let mut process = Self { who, child, serial: Arc::default(), stderr: Arc::default(), readers: Vec::new() };
        if let Some(stdout) = stdout {
            let serial = Arc::clone(&process.serial);
            process.reader("serial reader", move || serial.fill(stdout)).map_err(failed)?;
        }
        if let Some(stderr) = stderr {
            let kept = Arc::clone(&process.stderr);
            process.reader("stderr reader", move || keep_last(stderr, &kept)).map_err(failed)?;
        }
        Ok(process)
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    #[must_use]
    pub fn serial(&self) -> &Capture {
        &self.serial
    }

    /// Says that it ended, where it has.
    ///
    /// # Errors
    /// When it has ended.
    pub fn must_live(&mut self) -> Result<(), RunError> {
        match self.child.try_wait() {
            Ok(Some(status)) => Err(self.ended(status)),
            _ => Ok(()),
        }
    }

    /// Looks for `time` whether it ends, and says so where it does.
    ///
    /// # Errors
    /// When it has ended.
    pub fn must_live_for(&mut self, time: Duration) -> Result<(), RunError> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.must_live()?;
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits until it has ended by itself, as it was told to; after `patience` it is killed. Says how it ended.
    ///
    /// # Errors
    /// When it had to be killed, or ended otherwise than with status 0.
    pub fn must_end(&mut self, patience: Duration) -> Result<(), RunError> {
        let until = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(self.ended(status)),
                _ if Instant::now() >= until => {
                    let _ = self.child.kill();
                    let source = io::Error::from(io::ErrorKind::TimedOut);
                    return Err(RunError::Stop { who: self.who, waited: patience, source });
                }
                _ => thread::sleep(POLL),
            }
        }
    }

    /// The end of what it said on stderr, with a colon in front; empty where it said nothing.
    #[must_use]
    pub fn said(&self) -> String {
        match lock(&self.stderr).trim() {
            "" => String::new(),
            text => format!(": {text}"),
        }
    }

    fn ended(&mut self, status: ExitStatus) -> RunError {
        self.join_readers();
        RunError::Ended { who: self.who, status: status.to_string(), said: self.said() }
    }

    fn reader(&mut self, name: &str, read: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.readers.push(thread::Builder::new().name(name.to_owned()).spawn(read)?);
        Ok(())
    }

    /// Only for a process that has ended: its pipes are closed then.
    fn join_readers(&mut self) {
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.join_readers();
    }
}

impl Capture {
    /// All that has been printed.
    #[must_use]
    pub fn chunks(&self) -> Vec<Chunk> {
        lock(&self.state).chunks.clone()
    }

    /// Waits until `found` finds what it looks for in all that has been printed, the process closes its standard
    /// output, or `until` has come. `found` is called again whenever more has been printed.
    pub fn wait<T>(&self, until: Instant, mut found: impl FnMut(&[Chunk]) -> Option<T>) -> Option<T> {
        let mut state = lock(&self.state);
        loop {
            let result = found(&state.chunks);
            let left = until.checked_duration_since(Instant::now());
            let (None, false, Some(left)) = (&result, state.closed, left) else { return result };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The last lines of what has been printed, with a colon in front; for error messages.
    #[must_use]
    pub fn tail(&self) -> String {
        let bytes: Vec<u8> = self.chunks().into_iter().flat_map(|chunk| chunk.bytes).collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().collect();
        let mut tail = String::new();
        for line in lines.iter().skip(lines.len().saturating_sub(3)) {
            let _ = write!(tail, "{}{line}", if tail.is_empty() { ": " } else { " / " });
        }
        tail
    }

    fn fill(&self, mut from: impl Read) {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    let at = Nanos::now();
                    let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                    lock(&self.state).chunks.push(Chunk { at, bytes });
                    self.changed.notify_all();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }
}

fn keep_last(mut from: impl Read, kept: &Mutex<String>) {
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let mut kept = lock(kept);
        kept.push_str(&String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()));
        if kept.len() > 2 * STDERR_KEPT {
            let cut = kept.len() - STDERR_KEPT;
            let cut = (cut..kept.len()).find(|at| kept.is_char_boundary(*at)).unwrap_or(0);
            kept.drain(..cut);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use nix::unistd::Pid;

    use super::*;

    fn shell(script: &str) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start("the source", command).unwrap()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn text(chunks: &[Chunk]) -> String {
        chunks.iter().map(|chunk| String::from_utf8_lossy(&chunk.bytes).into_owned()).collect()
    }

    #[test]
    fn what_it_prints_is_captured_with_its_time() {
        let before = Nanos::now();
        let mut process = shell("echo one; echo two");
        let found = process.serial().wait(soon(), |chunks| text(chunks).contains("two").then_some(()));
        assert_eq!(found, Some(()));
        process.must_end(Duration::from_secs(20)).unwrap();
        let chunks = process.serial().chunks();
        assert_eq!(text(&chunks), "one\ntwo\n");
        assert!(chunks.iter().all(|chunk| chunk.at >= before && chunk.at <= Nanos::now()));
    }

    #[test]
    fn waiting_ends_when_the_process_does() {
        let process = shell("echo one");
        assert_eq!(process.serial().wait(soon(), |chunks| text(chunks).contains("never").then_some(())), None);
        assert_eq!(process.serial().tail(), ": one");
    }

    #[test]
    fn an_early_end_tells_its_status_and_its_last_words() {
        let mut process = shell("echo why >&2; exit 3");
        let error = process.must_end(Duration::from_secs(20)).unwrap_err().to_string();
        assert_eq!(error, "the source ended too early, with exit status: 3: why");
        assert!(process.must_live().is_err());
    }

    #[test]
    fn a_process_that_does_not_end_is_killed() {
        let mut process = shell("exec sleep 1000");
        process.must_live().unwrap();
        assert!(process.must_end(Duration::from_millis(20)).is_err());
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let process = shell("exec sleep 1000");
        let id = Pid::from_raw(i32::try_from(process.child.id()).unwrap());
        drop(process);
        assert_eq!(nix::sys::signal::kill(id, None), Err(nix::errno::Errno::ESRCH));
    }
}
