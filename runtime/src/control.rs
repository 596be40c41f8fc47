//! The one lock under which it is decided who runs.
//!
//! The run flags, the vCPUs' whereabouts and the right to run change together, so there is no instant at which a vCPU
//! could enter a guest that has just been paused or given away. vCPU threads take the lock when they park and when they
//! start, never between two exits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, unbounded};
use libc::pthread_t;
use switchover_hybrid::machine::Paused;
use switchover_wire::clock::Nanos;

use crate::error::VmError;
use crate::kick::{ExitByte, kick, this_thread};
use crate::lock;
use crate::run_state::{ExitReason, RunFlags, RunState};

/// Something that controllers are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmEvent {
    /// The guest was running and is not to any more. Its vCPUs leave it at once, unless one waits for a page.
    Stop,
    /// The guest runs.
    Resume,
    /// The guest has ended.
    Shutdown,
}

/// No vCPU has entered the guest.
const NOT_ENTERED: u64 = u64::MAX;

/// Run flags, vCPUs' whereabouts, and who waits for a change of them.
#[derive(Debug)]
pub struct Control {
    state: Mutex<State>,
    /// vCPU threads wait here to be let in.
    entrance: Condvar,
    /// Whoever waits for vCPUs to come out, or for the machine's end, waits here.
    changed: Condvar,
    first_entry: AtomicU64,
}

#[derive(Debug)]
struct State {
    flags: RunFlags,
    vcpus: Vec<Whereabouts>,
    tearing_down: bool,
    subscribers: Vec<Sender<VmEvent>>,
}

#[derive(Debug)]
struct Whereabouts {
    place: Place,
    exit_byte: Arc<ExitByte>,
    last_exit: Option<Nanos>,
    /// Parked until then even if the guest runs.
    held_until: Option<Instant>,
    /// How often it was taken out of a guest that runs, to be parked until then.
    holds: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Parked,
    /// In the guest, or handling an exit. `asked`: the signal for the current request has been sent.
    Running {
        thread: pthread_t,
        asked: bool,
    },
    /// Its thread has ended.
    Gone,
}

impl Control {
    /// For a machine with these flags and vCPUs, all parked.
    #[must_use]
    pub fn new(flags: RunFlags, exit_bytes: Vec<Arc<ExitByte>>) -> Self {
        let vcpus = exit_bytes
            .into_iter()
            .map(|exit_byte| Whereabouts {
                place: Place::Parked,
                exit_byte,
                last_exit: None,
                held_until: None,
                holds: 0,
            })
            .collect();
        Self {
            state: Mutex::new(State { flags, vcpus, tearing_down: false, subscribers: Vec::new() }),
            entrance: Condvar::new(),
            changed: Condvar::new(),
            first_entry: AtomicU64::new(NOT_ENTERED),
        }
    }

    /// The state that a controller sees.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        lock(&self.state).flags.state()
    }

    /// Why the machine was stopped for good.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        lock(&self.state).flags.reason()
    }

    /// A new subscription to the events from now on.
    pub fn subscribe(&self) -> Receiver<VmEvent> {
        let (sender, receiver) = unbounded();
        lock(&self.state).subscribers.push(sender);
        receiver
    }

    /// Changes the flags, and lets vCPUs in or asks them out as follows from that. Waits for nobody.
    pub fn change<T>(&self, change: impl FnOnce(&mut RunFlags) -> T) -> T {
        self.apply(&mut lock(&self.state), change)
    }

    /// Pauses for a migration, and waits for all vCPUs to be out.
    ///
    /// # Errors
    /// When the machine may not be paused now, or a vCPU is not out within `patience`; the guest then runs on.
    pub fn pause(&self, patience: Duration) -> Result<Paused, VmError> {
        let mut state = lock(&self.state);
        if let Some(vcpu) = state.vcpus.iter().position(|vcpu| vcpu.place == Place::Gone) {
            return Err(VmError::VcpuGone { vcpu });
        }
        let was_running = self.apply(&mut state, RunFlags::pause)?;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, patience, |state| state.vcpus.iter().any(Whereabouts::is_running))
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(vcpu) = state.vcpus.iter().position(Whereabouts::is_running) {
            self.apply(&mut state, RunFlags::resume)?;
            return Err(VmError::PauseTimeout { vcpu, waited_ms: patience.as_millis() });
        }
        // The guest may have ended itself meanwhile: nobody should move a dead one.
        state.flags.check_alive()?;
        let last_exit = state.vcpus.iter().filter_map(|vcpu| vcpu.last_exit).max().unwrap_or_else(Nanos::now);
        Ok(Paused { last_exit, was_running })
    }

    /// Lets the guest go on after a migration's pause, or start after its arrival.
    ///
    /// # Errors
    /// Without the right to run.
    pub fn resume(&self) -> Result<(), VmError> {
        let mut state = lock(&self.state);
        if let Some(vcpu) = state.vcpus.iter().position(|vcpu| vcpu.place == Place::Gone) {
            return Err(VmError::VcpuGone { vcpu });
        }
        self.apply(&mut state, RunFlags::resume)?;
        // Nobody enters before the lock is let go of. Where it may not resume, who entered before has entered.
        self.first_entry.store(NOT_ENTERED, Ordering::SeqCst);
        Ok(())
    }

    /// When the first vCPU entered the guest after the last [`Self::resume`].
    #[must_use]
    pub fn first_entry(&self) -> Option<Nanos> {
        let entry = self.first_entry.load(Ordering::SeqCst);
        (entry != NOT_ENTERED).then_some(Nanos(entry))
    }

    /// Blocks until the machine is over.
    pub fn wait_exit(&self) -> ExitReason {
        let mut state = lock(&self.state);
        loop {
            if let Some(exit) = state.flags.exit() {
                return exit.clone();
            }
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// A vCPU's thread has left the guest at `last_exit`, or is new. Blocks until it may enter; `false` is the word to end.
    pub fn park(&self, vcpu: usize, last_exit: Option<Nanos>) -> bool {
        let mut state = lock(&self.state);
        let Some(here) = state.vcpus.get_mut(vcpu) else { return false };
        here.place = Place::Parked;
        here.last_exit = last_exit.or(here.last_exit);
        self.changed.notify_all();
        loop {
            if state.tearing_down {
                return false;
            }
            let held = state.vcpus.get(vcpu).and_then(|here| here.held_until);
            let rest = held.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
            state = match (state.flags.may_run(), rest) {
                (true, Duration::ZERO) => break,
                (true, rest) => {
                    self.entrance.wait_timeout(state, rest).unwrap_or_else(std::sync::PoisonError::into_inner).0
                }
                (false, _) => self.entrance.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner),
            };
        }
        let Some(here) = state.vcpus.get_mut(vcpu) else { return false };
        here.held_until = None;
        here.exit_byte.set(false);
        here.place = Place::Running { thread: this_thread(), asked: false };
        true
    }

    /// Keeps a vCPU out of the guest until then. It is parked meanwhile: who pauses the machine finds it out already. A guest
    /// that does not run is left alone, and whatever stops it ends this.
    pub fn hold(&self, vcpu: usize, until: Instant) {
        self.hold_those(vcpu..=vcpu, until);
    }

    /// The same for all vCPUs.
    pub fn hold_all(&self, until: Instant) {
        self.hold_those(0..=usize::MAX, until);
    }

    fn hold_those(&self, which: std::ops::RangeInclusive<usize>, until: Instant) {
        let mut state = lock(&self.state);
        if !state.flags.may_run() {
            return;
        }
        for (_, here) in state.vcpus.iter_mut().enumerate().filter(|(vcpu, _)| which.contains(vcpu)) {
            here.held_until = here.held_until.max(Some(until));
            here.holds += u64::from(matches!(here.place, Place::Running { asked: false, .. }));
            ask_out(std::slice::from_mut(here));
        }
    }

    /// Lets all vCPUs in that are kept out by [`Self::hold`].
    pub fn release(&self) {
        self.let_in(&mut lock(&self.state));
    }

    /// How often each vCPU was taken out by [`Self::hold`].
    #[must_use]
    pub fn holds(&self) -> Vec<u64> {
        lock(&self.state).vcpus.iter().map(|vcpu| vcpu.holds).collect()
    }

    /// A vCPU's thread enters the guest now for the first time since it was parked.
    pub fn entering(&self) {
        self.first_entry.fetch_min(Nanos::now().0, Ordering::SeqCst);
    }

    /// A vCPU's thread is about to end.
    pub fn gone(&self, vcpu: usize) {
        if let Some(here) = lock(&self.state).vcpus.get_mut(vcpu) {
            here.place = Place::Gone;
        }
        self.changed.notify_all();
    }

    /// Tells all vCPU threads to end, and waits until they do, or `patience` is over. Answers whether all have.
    pub fn tear_down(&self, patience: Duration) -> bool {
        let mut state = lock(&self.state);
        state.tearing_down = true;
        ask_out(&mut state.vcpus);
        self.entrance.notify_all();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, patience, |state| state.vcpus.iter().any(|vcpu| vcpu.place != Place::Gone))
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        state.vcpus.iter().all(|vcpu| vcpu.place == Place::Gone)
    }

    fn let_in(&self, state: &mut State) {
        for vcpu in &mut state.vcpus {
            vcpu.held_until = None;
        }
        self.entrance.notify_all();
    }

    fn apply<T>(&self, state: &mut MutexGuard<'_, State>, change: impl FnOnce(&mut RunFlags) -> T) -> T {
        let (ran, had_ended) = (state.flags.may_run(), state.flags.exit().is_some());
        let answer = change(&mut state.flags);
        match (ran, state.flags.may_run()) {
            (true, false) => {
                self.let_in(state);
                ask_out(&mut state.vcpus);
                state.tell(VmEvent::Stop);
            }
            (false, true) => {
                // Whoever was asked and has not come out yet need not any more.
                for vcpu in &mut state.vcpus {
                    if let Place::Running { asked, .. } = &mut vcpu.place {
                        *asked = false;
                        vcpu.exit_byte.set(false);
                    }
                }
                self.entrance.notify_all();
                state.tell(VmEvent::Resume);
            }
            (true, true) | (false, false) => {}
        }
        if let Some(exit) = state.flags.exit()
            && !had_ended
        {
            if matches!(exit, ExitReason::Guest(_) | ExitReason::Shutdown) {
                state.tell(VmEvent::Shutdown);
            }
            self.changed.notify_all();
        }
        answer
    }
}

impl State {
    fn tell(&mut self, event: VmEvent) {
        self.subscribers.retain(|subscriber| subscriber.send(event).is_ok());
    }
}

impl Whereabouts {
    fn is_running(&self) -> bool {
        matches!(self.place, Place::Running { .. })
    }
}

/// One signal a vCPU and request: a vCPU that waits for a page in emulated code cannot come out before the page is here,
/// and more signals would only burn a core.
fn ask_out(vcpus: &mut [Whereabouts]) {
    for vcpu in vcpus {
        if let Place::Running { thread, asked: asked @ false } = &mut vcpu.place {
            *asked = true;
            vcpu.exit_byte.set(true);
            // SAFETY: the thread said under this lock that it runs, having prepared itself, and says under this lock
            // that it parks or ends: it is alive.
            unsafe { kick(*thread) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::JoinHandle;

    use super::*;
    use crate::kick::prepare_thread;

    const LONG: Duration = Duration::from_secs(3600);
    const PATIENCE: Duration = Duration::from_secs(20);

    /// A running machine of one vCPU that is kept out for long, with a thread that would enter.
    fn held() -> (Arc<Control>, Receiver<bool>, JoinHandle<()>) {
        let control = Arc::new(Control::new(RunFlags::booting(), vec![Arc::new(ExitByte::of_none())]));
        control.change(RunFlags::cont).unwrap();
        control.hold(0, Instant::now() + LONG);
        let (sender, entered) = unbounded();
        let (theirs, (parking, parked)) = (Arc::clone(&control), unbounded());
        let thread = std::thread::spawn(move || {
            prepare_thread().unwrap();
            parking.send(()).unwrap();
            sender.send(theirs.park(0, None)).unwrap();
            // As a vCPU's thread would: out of the guest on the next request.
            theirs.park(0, None);
            theirs.gone(0);
        });
        parked.recv().unwrap();
        assert!(entered.recv_timeout(Duration::from_millis(20)).is_err(), "a vCPU that is kept out enters");
        (control, entered, thread)
    }

    fn ends(control: &Control, entered: &Receiver<bool>, thread: JoinHandle<()>) {
        assert_eq!(entered.recv_timeout(PATIENCE), Ok(true), "still kept out");
        assert!(control.tear_down(PATIENCE));
        thread.join().unwrap();
    }

    #[test]
    fn releasing_lets_a_vcpu_in_at_once() {
        let (control, entered, thread) = held();
        control.release();
        ends(&control, &entered, thread);
    }

    #[test]
    fn a_pause_neither_waits_for_a_vcpu_that_is_kept_out_nor_leaves_it_so() {
        let (control, entered, thread) = held();
        let paused = control.pause(Duration::ZERO).unwrap();
        assert!(paused.was_running);
        control.hold(0, Instant::now() + LONG);
        control.resume().unwrap();
        ends(&control, &entered, thread);
    }

    #[test]
    fn a_machine_with_a_vcpu_kept_out_is_torn_down_at_once() {
        let (control, entered, thread) = held();
        assert!(control.tear_down(PATIENCE));
        assert_eq!(entered.recv_timeout(PATIENCE), Ok(false));
        thread.join().unwrap();
    }
}
