//! The meter on a machine without KVM.

use switchover_hybrid::fake::{FakeDirtyLog, FakeMachine};
use switchover_hybrid::machine::Paused;
use switchover_pager::ram::Ram;
use switchover_precopy::bitmap::PageBitmap;
use switchover_precopy::dirty::DirtyLog;
use switchover_wire::clock::Nanos;
use switchover_wire::description::MachineDescription;
use switchover_wire::types::{PAGE_SIZE_U64, PageIndex};

use super::limit::DirtyLimiter;
use super::*;

fn plan(method: Method, time: Duration) -> Plan {
    Plan { time, method, samples_per_gib: 16_384 }
}

/// Waits for the end of the measurement that is under way.
fn result(meter: &DirtyMeter) -> Standing {
    let running = lock(&meter.running).take().unwrap();
    // Kept alive until the thread has ended: it is not interrupted.
    running.thread.join().unwrap();
    drop(running.ends);
    meter.last().unwrap().standing
}

fn rate(standing: Standing) -> u64 {
    let Standing::Measured { bytes_per_second } = standing else { panic!("{standing:?}") };
    bytes_per_second
}

#[test]
fn a_guest_that_writes_has_a_rate_and_one_at_rest_has_none() {
    let machine = FakeMachine::new(PageCount(4096)).unwrap();
    let meter = DirtyMeter::default();
    assert_eq!(meter.last(), None);
    for method in [Method::Book, Method::Sampling] {
        meter.measure(&*machine, plan(method, Duration::from_millis(50))).unwrap();
        assert_eq!(rate(result(&meter)), 0, "{method:?}");
        machine.resume().unwrap();
        meter.measure(&*machine, plan(method, Duration::from_millis(200))).unwrap();
        let found = rate(result(&meter));
        machine.pause().unwrap();
        // It cannot have written more than all of memory in that time.
        assert!(found > 0 && found <= 4096 * PAGE_SIZE_U64 * 5, "{method:?}: {found}");
    }
}

#[test]
fn distinct_pages_count_once() {
    let machine = FakeMachine::new(PageCount(4096)).unwrap();
    let book = Book::open(&*machine).unwrap();
    assert_eq!(book.noted().unwrap(), PageCount(4096), "all pages are noted at first");
    book.rearm().unwrap();
    assert_eq!(book.noted().unwrap(), PageCount(0));
    machine.resume().unwrap();
    while machine.visits() < 20_000 {
        thread::yield_now();
    }
    machine.pause().unwrap();
    // It visits three quarters of its pages, over and over.
    assert_eq!(book.noted().unwrap(), PageCount(3072));
}

#[test]
fn a_large_machine_is_armed_in_pieces() {
    let pages = PageCount(4096 * 64 * 2 + 64);
    let log = FakeDirtyLog::new(PageCount(pages.0 + 640));
    log.start().unwrap();
    let book = Book { log: Arc::new(log), pages };
    book.rearm().unwrap();
    let mut left = PageBitmap::new(PageCount(pages.0 + 640));
    book.log.peek(&mut left).unwrap();
    assert_eq!(left.iter().next(), Some(PageIndex(pages.0)));
}

#[test]
fn one_is_measured_at_a_time_and_can_be_interrupted() {
    let machine = FakeMachine::new(PageCount(64)).unwrap();
    let meter = DirtyMeter::default();
    for method in [Method::Book, Method::Sampling] {
        meter.measure(&*machine, plan(method, Duration::from_secs(3600))).unwrap();
        assert!(meter.is_measuring());
        assert!(matches!(
            meter.measure(&*machine, plan(method, Duration::from_secs(3600))),
            Err(MeterError::Measuring)
        ));
        meter.interrupt();
        assert_eq!(meter.last().unwrap().standing, Standing::Interrupted);
        meter.interrupt();
    }
    meter.measure(&*machine, plan(Method::Book, Duration::from_millis(1))).unwrap();
    assert_eq!(rate(result(&meter)), 0);
    meter.measure(&*machine, plan(Method::Book, Duration::from_secs(3600))).unwrap();
    drop(meter);
}

#[test]
fn a_machine_that_cannot_limit_says_so_and_keeps_no_book() {
    let machine = FakeMachine::new(PageCount(64)).unwrap();
    let limiter = DirtyLimiter::default();
    let error = limiter.hold(machine.clone(), 1 << 20).unwrap_err();
    assert!(error.to_string().contains("the fake machine cannot"), "{error}");
    assert_eq!(limiter.limit(), None);
    limiter.lift();
}

/// A machine that can hold its vCPUs to a limit: it notes what it was told.
struct Limitable {
    machine: Arc<FakeMachine>,
    limit: Mutex<Option<u64>>,
}

impl Machine for Limitable {
    fn describe(&self) -> MachineDescription {
        self.machine.describe()
    }
    fn ram(&self) -> Ram {
        self.machine.ram()
    }
    fn dirty_log(&self) -> Arc<dyn DirtyLog> {
        self.machine.dirty_log()
    }
    fn throttle(&self, percent: u8) {
        self.machine.throttle(percent);
    }
    fn limit_dirty_rate(&self, bytes_per_second: Option<u64>) -> Result<(), MachineError> {
        *lock(&self.limit) = bytes_per_second;
        Ok(())
    }
    fn pause(&self) -> Result<Paused, MachineError> {
        self.machine.pause()
    }
    fn resume(&self) -> Result<(), MachineError> {
        self.machine.resume()
    }
    fn keep_paused(&self) {}
    fn surrender_right_to_run(&self) {}
    fn take_right_to_run(&self) {}
    fn take_back_right_to_run(&self) {}
    fn first_pages(&self) -> Vec<PageIndex> {
        Vec::new()
    }
    fn save_state(&self) -> Result<Vec<u8>, MachineError> {
        self.machine.save_state()
    }
    fn load_state(&self, state: &[u8]) -> Result<(), MachineError> {
        self.machine.load_state(state)
    }
    fn first_entry(&self) -> Option<Nanos> {
        None
    }
    fn stop_for_good(&self, _: &str) {}
}

#[test]
fn a_limit_is_held_changed_and_lifted() {
    let machine = Arc::new(Limitable { machine: FakeMachine::new(PageCount(64)).unwrap(), limit: Mutex::new(None) });
    let limiter = DirtyLimiter::default();
    limiter.hold(Arc::<Limitable>::clone(&machine), 1000).unwrap();
    assert_eq!(*lock(&machine.limit), Some(1000));
    limiter.hold(Arc::<Limitable>::clone(&machine), 2000).unwrap();
    assert_eq!(*lock(&machine.limit), Some(2000));
    assert_eq!(limiter.limit().unwrap().bytes_per_second, 2000);
    limiter.lift();
    assert_eq!((*lock(&machine.limit), limiter.limit()), (None, None));
    limiter.hold(Arc::<Limitable>::clone(&machine), 3000).unwrap();
    drop(limiter);
    assert_eq!(*lock(&machine.limit), None, "a limiter that goes takes its limit along");
}
