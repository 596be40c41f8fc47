//! Whether the other side is still there.
//!
//! TCP notices a dead peer after minutes, or not at all while nothing is sent. So each side says every now and then that it is
//! there, and listens for anything at all from the other: a page is as good a sign of life as a heartbeat.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::lanes::Lanes;

/// Heartbeats go out this often at least, whatever this side's own patience: the other side's may be shorter.
const MOST_SELDOM: Duration = Duration::from_millis(200);

/// How much of the patience passes between two looks.
const LOOKS: u32 = 10;

/// The shortest patience with a silent peer that makes sense: less, and a busy host is taken for a dead one.
pub const LEAST_PATIENCE: Duration = Duration::from_secs(1);

/// Two threads over one link, which end with the handle: one speaks, which may block, and one listens, which never does.
#[derive(Debug)]
pub struct Pulse {
    end: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pulse {
    /// Calls `beat` at regular times, and `silent` once when nothing has come over `lanes` for `patience`. When it returns they
    /// are shut down.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        lanes: &Arc<Lanes>,
        patience: Duration,
        mut beat: impl FnMut() + Send + 'static,
        silent: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let patience = patience.max(LEAST_PATIENCE);
        let (end, ended) = bounded::<()>(0);
        let mut pulse = Self { end: Some(end), threads: Vec::new() };
        let (speaking, listening) = (ended.clone(), Arc::clone(lanes));
        let interval = (patience / LOOKS).min(MOST_SELDOM);
        let speak = move || {
            while is_due(&speaking, interval) {
                beat();
            }
        };
        pulse.threads.push(thread::Builder::new().name("heartbeat".to_owned()).spawn(speak)?);
        let listen = move || {
            if falls_silent(&ended, &listening, patience) {
                silent();
                listening.shut_down();
            }
        };
        pulse.threads.push(thread::Builder::new().name("listen for life".to_owned()).spawn(listen)?);
        Ok(pulse)
    }

    /// Ends both. The lanes must have been shut down, or what is spoken be read: a heartbeat may be on its way.
    pub fn end(mut self) {
        self.end = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that listens for the other side panicked");
            }
        }
    }
}

/// Waits for an interval; `false` when the end comes first.
fn is_due(ended: &Receiver<()>, interval: Duration) -> bool {
    ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout)
}

/// Waits until nothing has come for `patience`; `false` when the end comes first.
fn falls_silent(ended: &Receiver<()>, lanes: &Lanes, patience: Duration) -> bool {
    let (mut heard, mut since) = (lanes.received(), Instant::now());
    let interval = patience / LOOKS;
    loop {
        let looked = Instant::now();
        if !is_due(ended, interval) {
            return false;
        }
        let now = lanes.received();
        // This host itself may have stood still: that is no silence of the other side.
        let stood_still = looked.elapsed() > interval * 3;
        if now != heard || stood_still {
            (heard, since) = (now, Instant::now());
        } else if since.elapsed() >= patience {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use switchover_wire::message::{ControlMessage, ControlReader, ControlWriter};
    use switchover_wire::ring::Ring;
    use switchover_wire::socket::Socket;
    use switchover_wire::types::{LaneId, LaneRole};

    use super::*;

    const CONTROL: LaneId = LaneId { role: LaneRole::Control, index: 0 };

    fn lanes(socket: &Arc<Socket>) -> Arc<Lanes> {
        let lanes = Arc::new(Lanes::default());
        lanes.add(CONTROL, Arc::clone(socket));
        lanes
    }

    #[test]
    fn a_peer_that_says_nothing_is_given_up() {
        let (ours, _theirs) = Socket::pair().unwrap();
        let ours = Arc::new(ours);
        let (told, silence) = bounded(1);
        let pulse = Pulse::start(&lanes(&ours), LEAST_PATIENCE, || {}, move || told.send(()).unwrap()).unwrap();
        silence.recv().unwrap();
        // Its reader is woken.
        assert!(ControlReader::new(Arc::clone(&ours)).unwrap().recv().is_err());
        pulse.end();
    }

    #[test]
    fn a_peer_whose_heart_beats_is_not() {
        let (ours, theirs) = Socket::pair().unwrap();
        let (ours, theirs) = (Arc::new(ours), Arc::new(theirs));
        let beats = Arc::new(AtomicUsize::new(0));
        let writer = std::sync::Mutex::new(ControlWriter::new(theirs).unwrap());
        let count = Arc::clone(&beats);
        let there = Arc::new(Lanes::default());
        let beat = move || {
            count.fetch_add(1, Ordering::Relaxed);
            writer.lock().unwrap().send(&ControlMessage::Heartbeat).unwrap();
        };
        // The one that speaks hears nothing itself, and gives the other up in the end.
        let (told, silence) = bounded(1);
        let speaker = Pulse::start(&there, 3 * LEAST_PATIENCE, beat, move || told.send(()).unwrap()).unwrap();
        let given_up = Arc::new(AtomicUsize::new(0));
        let falsely = Arc::clone(&given_up);
        let silent = move || falsely.store(1, Ordering::Relaxed);
        let listener = Pulse::start(&lanes(&ours), LEAST_PATIENCE, || {}, silent).unwrap();
        let mut reader = ControlReader::new(Arc::clone(&ours)).unwrap();
        while silence.try_recv().is_err() {
            assert_eq!(reader.recv().unwrap(), ControlMessage::Heartbeat);
        }
        listener.end();
        speaker.end();
        assert_eq!(given_up.load(Ordering::Relaxed), 0);
        assert!(beats.load(Ordering::Relaxed) >= 10);
    }

    #[test]
    fn a_heartbeat_that_is_not_read_keeps_nobody_from_listening() {
        let (ours, theirs) = Socket::pair().unwrap();
        let ours = Arc::new(ours);
        let blocked = Arc::clone(&ours);
        let much = vec![0; 64 << 20];
        let beat = move || {
            let _ = Ring::new(2).unwrap().send_all(blocked.as_fd(), &[IoSlice::new(&much)]);
        };
        let (told, silence) = bounded(1);
        let pulse = Pulse::start(&lanes(&ours), LEAST_PATIENCE, beat, move || told.send(()).unwrap()).unwrap();
        silence.recv().unwrap();
        pulse.end();
        drop(theirs);
    }
}
