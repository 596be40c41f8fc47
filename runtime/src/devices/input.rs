//! Standard input, byte by byte into the serial port.
//!
//! It is read only while the guest is here and has room: before it arrives and after it has left, input is not for it. A terminal is
//! left in the mode it is in: lines, edited by the kernel.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::devices::serial::InputGate;
use crate::vcpu::Shared;

/// As much as is read at once.
const CHUNK: usize = 64;
/// How often a process in a terminal's background looks whether it has come to the foreground: nothing tells it, in milliseconds.
const FOREGROUND_CHECK_MS: u16 = 1000;

/// The thread that reads standard input. Dropping it ends the thread.
#[derive(Debug)]
pub struct InputPump {
    stop: Arc<AtomicBool>,
    gate: Arc<InputGate>,
    thread: Option<JoinHandle<()>>,
}

impl InputPump {
    /// Feeds standard input to the serial port of `shared`; `None` where it is neither a terminal nor a pipe.
    ///
    /// # Errors
    /// When the host gives no descriptor or thread.
    pub fn start(shared: Arc<Shared>) -> io::Result<Option<Self>> {
        let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        if !input.is_terminal() {
            let kind = input.metadata()?.file_type();
            if !kind.is_fifo() && !kind.is_socket() {
                return Ok(None);
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let gate = Arc::clone(shared.ports.serial.input());
        let name = std::thread::Builder::new().name("serial-input".to_owned());
        let ended = Arc::clone(&stop);
        let thread = name.spawn(move || pump(input, &shared, &ended))?;
        Ok(Some(Self { stop, gate, thread: Some(thread) }))
    }
}

impl Drop for InputPump {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.gate.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pump(mut input: File, shared: &Shared, stop: &AtomicBool) {
    let serial = &shared.ports.serial;
    let mut pending = VecDeque::new();
    let mut ended = false;
    while !(stop.load(Ordering::SeqCst) || ended && pending.is_empty()) {
        serial.feed(&mut pending);
        let wants_more = !ended && pending.is_empty() && serial.accepts_input();
        // Whoever reads a terminal from the background is stopped by the kernel, guest and all.
        let may_read = wants_more && in_foreground(input.as_fd());
        let patience = if wants_more && !may_read { FOREGROUND_CHECK_MS.into() } else { PollTimeout::NONE };
        let mut watched = vec![PollFd::new(serial.input().wakeups(), PollFlags::POLLIN)];
        if may_read {
            watched.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
        if poll(&mut watched, patience).is_err() {
            continue;
        }
        let has_input = watched.get(1).is_some_and(|fd| fd.any().unwrap_or(false));
        serial.input().woken();
        if has_input && serial.accepts_input() {
            let mut chunk = [0; CHUNK];
            match input.read(&mut chunk) {
                Ok(0) | Err(_) => ended = true,
                Ok(length) => pending.extend(chunk.iter().take(length)),
            }
        }
    }
}

fn in_foreground(input: BorrowedFd<'_>) -> bool {
    if !input.is_terminal() {
        return true;
    }
    // SAFETY: neither call has preconditions.
    unsafe { libc::tcgetpgrp(input.as_raw_fd()) == libc::getpgrp() }
}
