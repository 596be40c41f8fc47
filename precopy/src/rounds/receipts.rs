//! Reading what the destination says it has taken.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv};
use switchover_pager::cpu::CpuMeter;
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_wire::frame::bulk::Taken;
use switchover_wire::ring::RingError;
use switchover_wire::tls::record::Opener;

use super::{RoundsError, Shared};

/// Receipts taken in one read.
const AT_ONCE: usize = 64;

/// The thread that reads them.
pub struct Receipts {
    thread: Option<JoinHandle<()>>,
    wake: Arc<EventFd>,
}

/// One lane's unread rest.
struct Inbox {
    lane: PageLane,
    bytes: [u8; Taken::LEN * AT_ONCE],
    filled: usize,
    open: bool,
    /// On a TLS lane, taken when the first receipt comes.
    opener: Option<Box<Opener>>,
}

impl Receipts {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there is none, or no eventfd to end it by.
    pub fn start(
        shared: &Arc<Shared>,
        lanes: &[PageLane],
        cpu: &Arc<CpuMeter>,
        notify: &Notify,
    ) -> Result<Self, RoundsError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| RoundsError::EventFd(errno.into()))?;
        let wake = Arc::new(wake);
        let mut inboxes: Vec<_> = lanes.iter().cloned().map(Inbox::new).collect();
        let (shared, cpu, notify, woken) = (Arc::clone(shared), Arc::clone(cpu), Arc::clone(notify), Arc::clone(&wake));
        let body = move || cpu.measure(|| read_all(&shared, &mut inboxes, &woken, &notify));
        let thread = thread::Builder::new().name("receipts".to_owned()).spawn(body).map_err(RoundsError::Thread)?;
        Ok(Self { thread: Some(thread), wake })
    }

    /// Ends the thread. Safe to repeat.
    pub fn stop(&mut self) {
        if let Err(errno) = self.wake.write(1) {
            tracing::error!(%errno, "cannot wake the thread that reads receipts");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that reads receipts panicked");
        }
    }
}

impl Drop for Receipts {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Inbox {
    fn new(lane: PageLane) -> Self {
        Self { lane, bytes: [0; Taken::LEN * AT_ONCE], filled: 0, open: true, opener: None }
    }

    /// Takes what has come. `false` when the destination has closed the lane.
    fn read(&mut self) -> Result<bool, RingError> {
        let failed = |errno: Errno| RingError::Io { operation: "receive", source: errno.into() };
        let fd = self.lane.socket.as_fd().as_raw_fd();
        if let Some(tls) = self.lane.socket.tls() {
            let opener = match &mut self.opener {
                Some(opener) => opener,
                none => none.insert(tls.take_opener()?),
            };
            let count = match recv(fd, opener.space(1).0, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Ok(false),
                Ok(count) => count,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(true),
                Err(errno) => return Err(failed(errno)),
            };
            opener.received(count);
            return self.open().map(|()| true);
        }
        match recv(fd, &mut self.bytes[self.filled..], MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.filled += count;
                self.lane.socket.counters().add_received(count as u64);
                Ok(true)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(true),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Opens what has come of a TLS lane. Of more receipts than there is room for the last one is kept: each says what those
    /// before it say.
    fn open(&mut self) -> Result<(), RingError> {
        let Some(opener) = &mut self.opener else { return Ok(()) };
        loop {
            let plain = opener.plaintext()?;
            if plain.is_empty() {
                return Ok(());
            }
            if self.filled == self.bytes.len() {
                self.bytes.copy_within(self.filled - Taken::LEN.., 0);
                self.filled = Taken::LEN;
            }
            let count = plain.len().min(self.bytes.len() - self.filled);
            self.bytes[self.filled..self.filled + count].copy_from_slice(&plain[..count]);
            self.filled += count;
            opener.take(count);
            self.lane.socket.counters().add_received(count as u64);
        }
    }

    /// The latest receipt among what has come; a partial one is kept.
    fn latest(&mut self) -> Result<Option<Taken>, String> {
        let whole = self.filled - self.filled % Taken::LEN;
        let mut latest = None;
        for bytes in self.bytes[..whole].chunks_exact(Taken::LEN) {
            let mut one = [0; Taken::LEN];
            one.copy_from_slice(bytes);
            latest = Some(Taken::decode(&one).map_err(|error| error.to_string())?);
        }
        self.bytes.copy_within(whole..self.filled, 0);
        self.filled -= whole;
        Ok(latest)
    }
}

fn read_all(shared: &Shared, inboxes: &mut [Inbox], wake: &EventFd, notify: &Notify) {
    loop {
        let ready = {
            let open = inboxes.iter().filter(|inbox| inbox.open);
            let mut polled: Vec<_> = std::iter::once(wake.as_fd())
                .chain(open.map(|inbox| inbox.lane.socket.as_fd()))
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    let reason = format!("cannot wait for what the destination says: {errno}");
                    return notify(PagerEvent::Broken { reason });
                }
            }
            polled.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect::<Vec<_>>()
        };
        if ready.first() == Some(&true) {
            return;
        }
        let open = inboxes.iter_mut().enumerate().filter(|(_, inbox)| inbox.open);
        for ((index, inbox), _) in open.zip(ready.iter().skip(1)).filter(|(_, ready)| **ready) {
            if let Err(reason) = take(shared, index, inbox) {
                inbox.open = false;
                // After a halt a lane may be closed under this thread, and what it says is of no more use.
                if !shared.halted.load(Ordering::Acquire) {
                    notify(PagerEvent::LaneFailed { lane: inbox.lane.id, reason });
                }
            }
        }
    }
}

fn take(shared: &Shared, index: usize, inbox: &mut Inbox) -> Result<(), String> {
    if !inbox.read().map_err(|error| error.to_string())? {
        return Err("the destination closed it".to_owned());
    }
    if let Some(taken) = inbox.latest()? {
        let never_sent = |_| format!("the destination says that it took {} frames, which were not sent", taken.frames);
        shared.books.taken(index, taken.frames).map_err(never_sent)?;
        shared.receipt_came();
    }
    Ok(())
}
