//! An open control lane and the signs of life on it: what both sides have of a link besides its page lanes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use switchover_wire::message::{ControlMessage, ControlReader, ControlWriter, MessageError};
use switchover_wire::socket::Socket;

use crate::lanes::Lanes;
use crate::pulse::Pulse;

/// Messages, beside heartbeats, that a peer may send over one link. A well-behaved one sends a few, one for each round, and one for
/// each 2^26 pages that are missing.
const MESSAGES: u32 = 1 << 16;

/// The sending half of a control lane, and its heartbeats.
pub struct Control {
    writer: Arc<Mutex<ControlWriter>>,
    pulse: Option<Pulse>,
}

impl Control {
    /// Takes over `socket`, one of `lanes`: says regularly that this side is there, and calls `silent` once when nothing has come over
    /// any of them for `patience`. Whoever listens has the other half.
    ///
    /// # Errors
    /// When there is no ring or no thread for it.
    pub fn open(
        socket: &Arc<Socket>,
        lanes: &Arc<Lanes>,
        patience: Duration,
        silent: impl FnOnce() + Send + 'static,
    ) -> Result<(Self, Listener), String> {
        let no_ring = |error: MessageError| error.to_string();
        let reader = ControlReader::new(Arc::clone(socket)).map_err(no_ring)?;
        let writer = ControlWriter::new(Arc::clone(socket)).map_err(no_ring)?;
        // With a ring of its own: a ring that changes threads is made anew, which the handoff must not wait for.
        let mut heart = ControlWriter::new(Arc::clone(socket)).map_err(no_ring)?;
        let writer = Arc::new(Mutex::new(writer));
        let speaker = Arc::clone(&writer);
        let beat = move || {
            let _one_at_a_time = speaker.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = heart.send(&ControlMessage::Heartbeat);
        };
        let pulse = Pulse::start(lanes, patience, beat, silent)
            .map_err(|error| format!("cannot start a thread for the control lane: {error}"))?;
        Ok((Self { writer, pulse: Some(pulse) }, Listener { reader, budget: MESSAGES }))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the lane fails.
    pub fn send(&self, message: &ControlMessage) -> Result<(), MessageError> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).send(message)
    }

    /// The sending half, for a thread that tells of something in passing.
    pub fn writer(&self) -> Arc<Mutex<ControlWriter>> {
        Arc::clone(&self.writer)
    }

    /// The lanes are shut down: ends its threads. Safe to repeat.
    pub fn end(&mut self) {
        if let Some(pulse) = self.pulse.take() {
            pulse.end();
        }
    }
}

/// The receiving half of a control lane.
pub struct Listener {
    reader: ControlReader,
    budget: u32,
}

impl Listener {
    /// The next message that is more than a sign of life.
    ///
    /// # Errors
    /// Why none will come: the lane has ended, or its peer talks without end, which would fill this side's memory.
    pub fn next(&mut self) -> Result<ControlMessage, String> {
        loop {
            match self.reader.recv() {
                Ok(ControlMessage::Heartbeat) => {}
                Ok(_) if self.budget == 0 => {
                    return Err("the other side talks and talks on the control lane".to_owned());
                }
                Ok(message) => {
                    self.budget -= 1;
                    return Ok(message);
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_peer_that_talks_without_end_is_not_listened_to() {
        let (ours, theirs) = Socket::pair().unwrap();
        let (ours, theirs) = (Arc::new(ours), Arc::new(theirs));
        let mut talker = ControlWriter::new(theirs).unwrap();
        let talk = move || while talker.send(&ControlMessage::Commit).is_ok() {};
        let talking = thread::spawn(talk);
        let (mut control, mut listener) =
            Control::open(&ours, &Arc::default(), Duration::from_secs(60), || {}).unwrap();
        for _ in 0..MESSAGES {
            assert_eq!(listener.next().unwrap(), ControlMessage::Commit);
        }
        assert!(listener.next().unwrap_err().contains("talks and talks"));
        ours.shutdown();
        talking.join().unwrap();
        control.end();
    }
}
