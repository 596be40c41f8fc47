//! The thread that serves faults.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use switchover_pager::cpu;
use switchover_pager::uffd::FaultBuffer;
use switchover_pager::uffd::waiting::Alarm;
use switchover_wire::clock::Nanos;

use super::LazyError;
use super::memory::{FAULTS, LazyMemory};

/// The running thread. It serves for as long as memory is watched, or until pages cannot be had any more: then whoever waits for one
/// goes on waiting.
pub struct FaultThread {
    alarm: Arc<Alarm>,
    thread: JoinHandle<()>,
}

impl FaultThread {
    pub fn start(memory: &Arc<LazyMemory>) -> io::Result<Self> {
        let alarm = Arc::new(Alarm::new()?);
        let (memory, rings) = (Arc::clone(memory), Arc::clone(&alarm));
        let body = move || {
            cpu::be_prompt();
            if let Err(error) = serve(&memory, &rings) {
                memory.fail(error);
            }
        };
        let thread = thread::Builder::new().name("fault-0".to_owned()).spawn(body)?;
        Ok(Self { alarm, thread })
    }

    /// Memory is complete, and nobody watches it: ends the thread.
    pub fn end(self) {
        self.alarm.ring();
        if self.thread.join().is_err() {
            tracing::error!("the thread that serves faults panicked");
        }
    }
}

fn serve(memory: &LazyMemory, alarm: &Alarm) -> Result<(), LazyError> {
    let mut hands = memory.hands(FAULTS)?;
    let (mut buffer, mut faults) = (FaultBuffer::default(), Vec::new());
    while alarm.wait(memory.watch().fd(0)).map_err(LazyError::Wait)? {
        memory.watch().take_faults(0, &mut buffer, &mut faults)?;
        let taken = Nanos::now();
        for page in faults.drain(..) {
            memory.serve(page, taken, &mut hands)?;
        }
    }
    Ok(())
}
