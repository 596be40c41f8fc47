//! Whole migrations with pre-copy, of a machine without KVM, over real sockets and a real userfaultfd: whatever the rounds,
//! lanes, encodings and the moment of the handoff, memory is the same on both sides.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use switchover_hybrid::fake::FakeMachine;
use switchover_hybrid::incoming::Incoming;
use switchover_hybrid::machine::Machine;
use switchover_hybrid::monitor::{Choice, Limits, Mode};
use switchover_hybrid::outgoing::Outgoing;
use switchover_hybrid::report::PrecopyReport;
use switchover_hybrid::security::Security;
use switchover_hybrid::settings::{Bandwidth, Settings, no_observer};
use switchover_hybrid::status::MigrationStatus;
use switchover_pager::ram::Ram;
use switchover_pager::uffd::Watch;
use switchover_precopy::pack::{Compression, PackSettings};
use switchover_wire::address::Address;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

const PAGES: PageCount = PageCount(4096);
const PATIENCE: Duration = Duration::from_secs(60);

fn userfaultfd_or_skip(test: &str) -> bool {
    match Watch::register(Ram::new(PageCount(1)).unwrap()) {
        Ok(watch) => watch.unregister().is_ok(),
        Err(error) => {
            println!("SKIP {test}: {error}");
            false
        }
    }
}

fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "never came: {what}");
        thread::yield_now();
    }
}

struct Pair {
    from: Arc<FakeMachine>,
    to: Arc<FakeMachine>,
    incoming: Incoming,
}

/// A guest that has worked, and a machine that will not change what it gets.
fn pair() -> Pair {
    let from = FakeMachine::new(PAGES).unwrap();
    let to = FakeMachine::incoming(PAGES).unwrap();
    to.freeze();
    from.resume().unwrap();
    until("the guest has worked", || from.visits() > 5_000);
    let machine: Arc<dyn Machine> = Arc::clone(&to) as _;
    let at = "tcp:127.0.0.1:0".parse().unwrap();
    let incoming = Incoming::listen(machine, &at, Settings::default(), Security::default(), no_observer()).unwrap();
    Pair { from, to, incoming }
}

fn settings(mode: Mode, bulk_lanes: u8) -> Settings {
    Settings { limits: Limits { mode, ..Limits::default() }, bulk_lanes, ..Settings::default() }
}

fn start(from: &Arc<FakeMachine>, to: Address, settings: Settings) -> Outgoing {
    let machine: Arc<dyn Machine> = Arc::clone(from) as _;
    Outgoing::start(machine, to, settings, Security::default(), no_observer()).unwrap()
}

fn page(machine: &FakeMachine, page: PageIndex) -> Vec<u8> {
    let ram = machine.ram();
    let start = ram.alias_of(page).unwrap();
    // SAFETY: a whole page of the alias; nobody writes it, since the source is paused and the destination frozen.
    unsafe { std::slice::from_raw_parts(start, PAGE_SIZE) }.to_vec()
}

/// The migration is complete, and both sides hold the same memory.
fn moved_whole(Pair { from, to, incoming }: &Pair, outgoing: &Outgoing, context: &str) -> PrecopyReport {
    let ends = (outgoing.wait(), incoming.wait());
    let errors = (outgoing.progress().error, incoming.progress().error);
    assert_eq!(ends, (MigrationStatus::Completed, MigrationStatus::Completed), "{context}: {errors:?}");
    assert!(to.runs() && !from.runs(), "{context}");
    for index in (0..PAGES.0).map(PageIndex) {
        assert!(page(from, index) == page(to, index), "{context}: {index} differs");
    }
    let classes = incoming.report().pages.unwrap();
    let sum = classes.precopied + classes.zero + classes.pushed + classes.requested;
    assert_eq!(sum, PAGES.0, "{context}: {classes:?}");
    outgoing.report().precopy.unwrap()
}

#[test]
fn a_quiet_guest_converges_and_runs_when_all_of_it_is_there() {
    if !userfaultfd_or_skip("a_quiet_guest_converges_and_runs_when_all_of_it_is_there") {
        return;
    }
    // What the hybrid would choose depends on how fast this host is.
    for (mode, lanes) in [(Mode::Precopy, 1), (Mode::Precopy, 3)] {
        let pair = pair();
        // A guest that writes nothing any more, and limits that even a busy host keeps to: what is tested is how it ends.
        pair.from.freeze();
        let limits = Limits {
            mode,
            downtime_limit: Duration::from_secs(5),
            blackout_target: Duration::from_secs(5),
            ..Limits::default()
        };
        let settings = Settings { limits, ..settings(mode, lanes) };
        let outgoing = start(&pair.from, pair.incoming.address(), settings);
        let report = moved_whole(&pair, &outgoing, "a quiet guest");
        assert_eq!(report.decisions.last().unwrap().verdict.choice, Choice::StopAndCopy);
        assert!(report.decisions.last().unwrap().actual_blackout_ns.is_some());
        assert_eq!(pair.incoming.report().faults.unwrap().remote, 0, "nothing was asked for");
        assert!(report.rounds[0].pages == PAGES.0 && report.rounds[0].zero_pages >= PAGES.0 / 4);
    }
}

#[test]
fn a_guest_that_outruns_the_link_is_handed_over_or_left_alone() {
    if !userfaultfd_or_skip("a_guest_that_outruns_the_link_is_handed_over_or_left_alone") {
        return;
    }
    let slow = Bandwidth { precopy: 8 << 20, postcopy: 0 };
    // As they are: differences would let it keep up.
    let packing = PackSettings { compression: Compression::Off, ..PackSettings::default() };
    let hybrid = pair();
    let outgoing = start(
        &hybrid.from,
        hybrid.incoming.address(),
        Settings { bandwidth: slow, packing, ..settings(Mode::Hybrid, 2) },
    );
    let report = moved_whole(&hybrid, &outgoing, "a fast guest");
    assert_eq!(report.decisions.last().unwrap().verdict.choice, Choice::Postcopy);

    let precopy = pair();
    let limits = Limits {
        mode: Mode::Precopy,
        downtime_limit: Duration::from_millis(1),
        time_budget: Duration::from_millis(500),
        ..Limits::default()
    };
    let outgoing = start(
        &precopy.from,
        precopy.incoming.address(),
        Settings { bandwidth: slow, limits, packing, ..settings(Mode::Precopy, 2) },
    );
    assert_eq!(outgoing.wait(), MigrationStatus::Failed);
    assert!(outgoing.progress().error.unwrap().contains("unharmed on the source"));
    let visits = precopy.from.visits();
    until("the guest goes on", || precopy.from.visits() > visits + 1000);
    assert_ne!(precopy.incoming.wait(), MigrationStatus::Completed);
    assert!(!precopy.to.runs());
}

#[test]
fn a_held_guest_waits_for_the_word() {
    if !userfaultfd_or_skip("a_held_guest_waits_for_the_word") {
        return;
    }
    let pair = pair();
    pair.from.throttle(99);
    let settings = Settings { pause_before_switchover: true, ..settings(Mode::Precopy, 1) };
    let outgoing = start(&pair.from, pair.incoming.address(), settings);
    assert!(outgoing.proceed().is_err(), "there is nothing to go on with");
    until("held", || outgoing.progress().status == MigrationStatus::PreSwitchover);
    assert!(!pair.from.runs() && !pair.to.runs());
    until("taken up", || outgoing.proceed().is_ok());
    moved_whole(&pair, &outgoing, "held");
}

#[test]
fn a_held_guest_may_be_called_back() {
    if !userfaultfd_or_skip("a_held_guest_may_be_called_back") {
        return;
    }
    let pair = pair();
    pair.from.throttle(99);
    let settings = Settings { pause_before_switchover: true, ..settings(Mode::Precopy, 1) };
    let outgoing = start(&pair.from, pair.incoming.address(), settings);
    until("held", || outgoing.progress().status == MigrationStatus::PreSwitchover);
    outgoing.cancel().unwrap();
    assert_eq!(outgoing.wait(), MigrationStatus::Cancelled);
    assert!(pair.from.runs() && !pair.to.runs());
}

/// Numbers that look random and are the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// A network between the two that passes every lane on late, and each at its own pace; or cuts one.
struct Network {
    at: Address,
    over: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Network {
    fn to(destination: &Address, seed: u64, cut_after: Option<u64>) -> Self {
        let Address::Tcp { port, .. } = destination else { panic!("not TCP") };
        let (target, listener) = (*port, TcpListener::bind("127.0.0.1:0").unwrap());
        let at = format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port()).parse().unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let mut copies = Vec::new();
            for number in 1.. {
                let near = listener.accept().unwrap().0;
                if ended.load(Ordering::Acquire) {
                    break;
                }
                let far = TcpStream::connect(("127.0.0.1", target)).unwrap();
                let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                // The third connection is the first bulk lane.
                let cut = cut_after.filter(|_| number == 3);
                copies.push(thread::spawn(move || pass_on(near, far, Dice(seed * 31 + number), cut)));
                copies.push(thread::spawn(move || pass_on(back_from, back_to, Dice(seed * 37 + number), None)));
            }
            copies.into_iter().for_each(|copy| copy.join().unwrap());
        });
        Self { at, over, thread }
    }

    fn end(self) {
        self.over.store(true, Ordering::Release);
        let Address::Tcp { port, .. } = self.at else { return };
        let _ = TcpStream::connect(("127.0.0.1", port));
        self.thread.join().unwrap();
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, mut dice: Dice, cut_after: Option<u64>) {
    let mut buffer = vec![0; 64 * 1024];
    let mut passed = 0;
    loop {
        let room = 1 + usize::try_from(dice.below(64 * 1024)).unwrap();
        let Ok(count) = from.read(&mut buffer[..room.min(64 * 1024)]) else { break };
        passed += count as u64;
        if count == 0 || cut_after.is_some_and(|after| passed > after) {
            break;
        }
        if dice.below(8) == 0 {
            thread::sleep(Duration::from_micros(dice.below(2000)));
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn whatever_the_moment_of_the_handoff_memory_is_the_same() {
    if !userfaultfd_or_skip("whatever_the_moment_of_the_handoff_memory_is_the_same") {
        return;
    }
    for seed in 1..=24 {
        let mut dice = Dice(seed * 0x9e37_79b9);
        let lanes = 1 + u8::try_from(dice.below(4)).unwrap();
        let mode = [Mode::Precopy, Mode::Hybrid][usize::try_from(dice.below(2)).unwrap()];
        let compression = [Compression::Off, Compression::Adaptive, Compression::Lz4, Compression::Zstd]
            [usize::try_from(dice.below(4)).unwrap()];
        let packing = PackSettings { compression, delta_cache_bytes: dice.below(3) << 20, ..PackSettings::default() };
        let bandwidth =
            Bandwidth { precopy: [0, 20 << 20, 200 << 20][usize::try_from(dice.below(3)).unwrap()], postcopy: 0 };
        let limits = Limits { mode, downtime_limit: Duration::from_millis(dice.below(60)), ..Limits::default() };
        let context = format!("seed {seed}: {lanes} lanes, {limits:?}, {packing:?}, {bandwidth:?}");
        let pair = pair();
        pair.from.throttle([0, 50, 95][usize::try_from(dice.below(3)).unwrap()]);
        let network = Network::to(&pair.incoming.address(), seed, None);
        let settings = Settings { limits, bulk_lanes: lanes, packing, bandwidth, ..Settings::default() };
        let outgoing = start(&pair.from, network.at.clone(), settings);
        // The controller's wish may come before, in the middle of, or after the rounds.
        thread::sleep(Duration::from_millis(dice.below(150)));
        let _ = outgoing.start_postcopy();
        moved_whole(&pair, &outgoing, &context);
        network.end();
    }
}

/// The sample that was armed before the first round is not noted where the guest did not write it, and goes along all the same.
#[test]
fn a_handoff_amid_the_first_round_loses_no_page_of_the_sample() {
    if !userfaultfd_or_skip("a_handoff_amid_the_first_round_loses_no_page_of_the_sample") {
        return;
    }
    let pair = pair();
    // What it writes would be noted again.
    pair.from.freeze();
    let slow = Bandwidth { precopy: 4 << 20, postcopy: 0 };
    let limits = Limits { mode: Mode::Precopy, downtime_limit: Duration::ZERO, ..Limits::default() };
    let settings = Settings { limits, bandwidth: slow, ..settings(Mode::Precopy, 2) };
    let outgoing = start(&pair.from, pair.incoming.address(), settings);
    until("it has looked at the sample", || {
        outgoing.report().precopy.is_some_and(|precopy| precopy.samples.iter().any(|sample| sample.probe_pages > 0))
    });
    outgoing.start_postcopy().unwrap();
    let report = moved_whole(&pair, &outgoing, "a handoff amid the first round");
    let last = report.samples.last().unwrap();
    assert!(last.round == 1 && last.left_pages > 0, "this tested nothing: {last:?}");
    assert!(report.handoff_pages >= last.left_pages / 2, "{} of {last:?}", report.handoff_pages);
}

#[test]
fn a_lane_that_is_lost_in_the_rounds_leaves_the_guest_where_it_is() {
    if !userfaultfd_or_skip("a_lane_that_is_lost_in_the_rounds_leaves_the_guest_where_it_is") {
        return;
    }
    for seed in 1..=6 {
        let pair = pair();
        let network = Network::to(&pair.incoming.address(), seed, Some(200_000 * seed));
        let bandwidth = Bandwidth { precopy: 4 << 20, postcopy: 0 };
        let limits = Limits { mode: Mode::Precopy, downtime_limit: Duration::ZERO, ..Limits::default() };
        let settings = Settings { limits, bulk_lanes: 2, bandwidth, ..Settings::default() };
        let outgoing = start(&pair.from, network.at.clone(), settings);
        assert_eq!(outgoing.wait(), MigrationStatus::Failed, "seed {seed}");
        assert_ne!(pair.incoming.wait(), MigrationStatus::Completed);
        let visits = pair.from.visits();
        until("the guest goes on", || pair.from.visits() > visits + 1000);
        assert!(!pair.to.runs());
        network.end();
    }
}
