//! Moves a toy machine: its "guest" is a thread that counts in every page of its memory. No KVM is needed.
//!
//! What an embedder brings is the `Machine`; everything from `fn main` on is how a migration is driven.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;

use switchover_hybrid::fake::FakeDirtyLog;
use switchover_hybrid::incoming::Incoming;
use switchover_hybrid::machine::{Machine, MachineError, Paused};
use switchover_hybrid::monitor::{Limits, Mode};
use switchover_hybrid::outgoing::Outgoing;
use switchover_hybrid::security::Security;
use switchover_hybrid::settings::{Notice, Settings};
use switchover_hybrid::status::MigrationStatus;
use switchover_pager::ram::Ram;
use switchover_pager::uffd::Watch;
use switchover_precopy::dirty::DirtyLog;
use switchover_wire::clock::Nanos;
use switchover_wire::description::{MachineDescription, RamRegion};
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

struct ToyVm {
    ram: Ram,
    dirty: Arc<FakeDirtyLog>,
    /// The machine's only register: how often its guest has gone through memory.
    rounds: AtomicU64,
    may_run: AtomicBool,
    runs: AtomicBool,
    entered: AtomicU64,
    /// Held while the guest is in a round: whoever holds it sees the guest between two rounds.
    in_guest: Mutex<()>,
}

impl ToyVm {
    fn new(pages: PageCount, may_run: bool) -> Result<Arc<Self>, Box<dyn Error>> {
        let vm = Arc::new(Self {
            ram: Ram::new(pages)?,
            dirty: Arc::new(FakeDirtyLog::new(pages)),
            rounds: AtomicU64::new(0),
            may_run: AtomicBool::new(may_run),
            runs: AtomicBool::new(false),
            entered: AtomicU64::new(0),
            in_guest: Mutex::new(()),
        });
        let guest = Arc::downgrade(&vm);
        thread::spawn(move || {
            while let Some(vm) = guest.upgrade() {
                vm.go_round();
            }
        });
        Ok(vm)
    }

    /// Counts in every page, or does nothing where the machine is paused.
    fn go_round(&self) {
        let _in_guest = self.in_guest.lock();
        if !self.runs.load(SeqCst) {
            thread::yield_now();
            return;
        }
        let _ = self.entered.compare_exchange(0, Nanos::now().0, SeqCst, SeqCst);
        let round = self.rounds.load(SeqCst);
        let starts = (0..self.ram.len_bytes()).step_by(PAGE_SIZE);
        for (page, start) in (0..).zip(starts) {
            let word = self.ram.guest_base().wrapping_add(start).cast::<u64>();
            // SAFETY: inside the guest's memory, which only this thread uses while the machine runs.
            let seen = unsafe { word.read_volatile() };
            assert_eq!(seen, round, "page {page} is not what the guest left there");
            // SAFETY: as above.
            unsafe { word.write_volatile(round + 1) };
            self.dirty.note(PageIndex(page));
        }
        self.rounds.store(round + 1, SeqCst);
    }
}

impl Machine for ToyVm {
    fn describe(&self) -> MachineDescription {
        MachineDescription {
            architecture: "toy".to_owned(),
            page_size: 4096,
            ram: vec![RamRegion { guest_address: 0, pages: self.ram.pages() }],
            vcpus: 1,
            cpuid: Vec::new(),
            xcr0: 0,
            msrs: Vec::new(),
            tsc_khz: 0,
            devices: Vec::new(),
            state_version: 1,
        }
    }

    fn ram(&self) -> Ram {
        self.ram.clone()
    }

    fn dirty_log(&self) -> Arc<dyn DirtyLog> {
        Arc::clone(&self.dirty) as _
    }

    fn throttle(&self, _: u8) {}

    fn limit_dirty_rate(&self, limit: Option<u64>) -> Result<(), MachineError> {
        limit.map_or(Ok(()), |_| Err(MachineError::new("limit the dirty rate", "a toy cannot")))
    }

    fn pause(&self) -> Result<Paused, MachineError> {
        let was_running = self.runs.swap(false, SeqCst);
        let _between_two_rounds = self.in_guest.lock();
        Ok(Paused { last_exit: Nanos::now(), was_running })
    }

    fn resume(&self) -> Result<(), MachineError> {
        if !self.may_run.load(SeqCst) {
            return Err(MachineError::new("run the guest", "it belongs to another machine"));
        }
        self.entered.store(0, SeqCst);
        self.runs.store(true, SeqCst);
        Ok(())
    }

    fn keep_paused(&self) {}

    fn surrender_right_to_run(&self) {
        self.may_run.store(false, SeqCst);
    }

    fn take_right_to_run(&self) {
        self.may_run.store(true, SeqCst);
    }

    fn take_back_right_to_run(&self) {
        self.may_run.store(true, SeqCst);
    }

    fn first_pages(&self) -> Vec<PageIndex> {
        vec![PageIndex(0)]
    }

    fn save_state(&self) -> Result<Vec<u8>, MachineError> {
        Ok(self.rounds.load(SeqCst).to_le_bytes().to_vec())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), MachineError> {
        let bytes = state.try_into().map_err(|error| MachineError::new("load the state", format!("{error}")))?;
        self.rounds.store(u64::from_le_bytes(bytes), SeqCst);
        Ok(())
    }

    fn first_entry(&self) -> Option<Nanos> {
        Some(Nanos(self.entered.load(SeqCst))).filter(|at| at.0 != 0)
    }

    fn stop_for_good(&self, reason: &str) {
        eprintln!("the guest is lost: {reason}");
        self.runs.store(false, SeqCst);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    if let Err(error) = Watch::register(Ram::new(PageCount(1))?).and_then(|watch| watch.unregister()) {
        println!("SKIP: {error}");
        return Ok(());
    }
    let here = ToyVm::new(PageCount(2048), true)?;
    let there = ToyVm::new(PageCount(2048), false)?;
    here.resume()?;

    // Whoever wants to know is told of each step.
    let observer = Arc::new(|notice| match notice {
        Notice::Status(status) => println!("{status}"),
        Notice::Round(number) => println!("round {number}"),
        Notice::Happening(happening) => println!("{happening:?}"),
    });
    let incoming = Incoming::listen(
        there.clone(),
        &"tcp:127.0.0.1:0".parse()?,
        Settings::default(),
        Security::default(),
        observer.clone(),
    )?;
    let hybrid = Limits { mode: Mode::Hybrid, ..Limits::default() };
    let settings = Settings { limits: hybrid, bulk_lanes: 2, ..Settings::default() };
    let outgoing = Outgoing::start(here.clone(), incoming.address(), settings, Security::default(), observer)?;

    // It decides by itself when to hand off; a caller may hurry it, or call it off as long as the guest is here.
    loop {
        match outgoing.wait_for(|status| status.is_final() || status == MigrationStatus::PostcopyPaused) {
            MigrationStatus::Completed => break,
            // The link was lost after the handoff: the guest runs there with what it has, and the two can be joined again.
            MigrationStatus::PostcopyPaused => outgoing.resume(incoming.address(), settings, Security::default())?,
            _ => {
                let failure = outgoing.progress().failure;
                let again = failure.is_some_and(|failure| failure.kind.is_retryable());
                return Err(format!("{:?} (worth another try: {again})", outgoing.progress().error).into());
            }
        }
    }
    assert_eq!(incoming.wait(), MigrationStatus::Completed);
    let (report, moved) = (outgoing.report(), there.rounds.load(SeqCst));
    while there.rounds.load(SeqCst) < moved + 10 {
        thread::yield_now();
    }
    println!("moved in {} rounds, and it counts on", report.precopy.map_or(0, |precopy| precopy.rounds.len()));
    assert!(here.resume().is_err(), "the guest is not ours any more");
    Ok(())
}
