use switchover_hybrid::monitor::Choice;
use switchover_hybrid::trace;

use super::*;

/// 32 MiB: a round takes from 13 ms to a quarter of a second.
const PAGES: u64 = 8192;
/// Of the judging seeds those that an unoptimised build plays in some seconds; `switchover simulate --synthetic` plays all.
const SEEDS: usize = 3;
/// The links that the monitor is judged on; the last is what loopback carries.
const BITS_PER_SECOND: [u64; 3] = [1_000_000_000, 5_000_000_000, 20_000_000_000];

fn link(bits_per_second: u64) -> Link {
    Link { bytes_per_second: bits_per_second / 8, delay_ns: 50_000 }
}

fn hybrid() -> Limits {
    Limits { mode: monitor::Mode::Hybrid, ..Limits::default() }
}

/// The worst traces stay above the 25 % that is wanted of all of them: docs/monitor.md says which and why. What is held
/// here is that they stay few, and get no worse.
#[test]
fn the_monitor_is_near_the_oracle_on_the_judging_seeds() {
    let mut judged = Vec::new();
    for pattern in Pattern::ALL {
        for seed in JUDGING_SEEDS.take(SEEDS) {
            let guest = synthetic::guest(pattern, seed, PAGES);
            judged.extend(BITS_PER_SECOND.map(|bits| oracle::judge(&guest, link(bits), &hybrid())));
        }
    }
    let summary = table::summary(&judged);
    let above = judged.iter().filter(|one| one.regret.is_none_or(|regret| regret > 0.25)).count();
    assert!(
        summary.median_regret.is_some_and(|regret| regret <= 0.10)
            && above * 50 <= judged.len()
            && summary.worst_regret.is_some_and(|regret| regret <= 0.50),
        "{above} above 25 %\n{}",
        table::text(&judged)
    );
}

#[test]
fn the_hybrid_never_stops_for_longer_than_its_target() {
    let limits = Limits { blackout_target: Duration::from_millis(4), ..hybrid() };
    for pattern in Pattern::ALL {
        let judged = oracle::judge(&synthetic::guest(pattern, 1, 2048), link(5_000_000_000), &limits);
        for outcome in [Some(judged.monitor), judged.oracle].into_iter().flatten() {
            assert!(outcome.blackout <= 0.004, "{pattern}: {outcome:?}");
        }
    }
}

#[test]
fn precopy_that_cannot_converge_gives_up_and_the_oracle_agrees() {
    let mut trace = Trace::new("all of it, all the time", 4096);
    trace.epochs.push(trace::Epoch::new(1_000_000, &[u64::MAX; 64], &[], None));
    let guest = Guest::from_trace(&trace).unwrap();
    let limits = Limits { downtime_limit: Duration::from_millis(50), round_budget: 5, ..Limits::default() };
    let judged = oracle::judge(&guest, link(1_000_000_000), &limits);
    assert_eq!((judged.monitor.end, judged.oracle, judged.regret), (Choice::GiveUp, None, Some(0.0)));
    let judged = oracle::judge(&guest, link(1_000_000_000), &Limits { mode: monitor::Mode::Hybrid, ..limits });
    assert_eq!(judged.monitor.end, Choice::Postcopy);
}

#[test]
fn an_idle_guest_converges_in_both_modes() {
    let guest = synthetic::guest(Pattern::Idle, 1, 2048);
    for limits in [hybrid(), Limits::default()] {
        let judged = oracle::judge(&guest, link(1_000_000_000), &limits);
        assert!(judged.monitor.round <= 3 && judged.monitor.blackout <= 0.005, "{judged:?}");
    }
}

#[test]
fn a_missed_end_is_the_worst_regret() {
    let mut judged = oracle::judge(&synthetic::guest(Pattern::Idle, 1, 2048), link(1_000_000_000), &hybrid());
    judged.regret = None;
    let summary = table::summary([&judged]);
    assert_eq!((summary.missed, summary.median_regret, summary.worst_regret), (1, None, None));
    assert!(table::text(&[judged]).ends_with("median missed, worst missed\n"));
}

#[test]
fn a_file_that_is_no_trace_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.json");
    assert!(load(&path).unwrap_err().sentence.contains("No such file"));
    std::fs::write(&path, "{}").unwrap();
    let Failure { status, sentence } = load(&path).unwrap_err();
    assert!(status == 1 && sentence.contains("t.json") && sentence.contains("switchover.trace/v2"), "{sentence}");
}

#[test]
fn a_trace_is_played_as_what_it_holds() {
    use switchover_hybrid::report::{FaultAnswer, FaultRecord};
    use switchover_hybrid::trace::drain::Drain;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.json");
    let mut trace = Trace::new("faults alone", 640);
    let fault = FaultRecord { page: 3, taken_ns: 100, woken_ns: Some(200), answer: FaultAnswer::Remote };
    trace.drain =
        Some(Drain { vcpus: 1, held: true, missing: None, zero_pages: 0, entry_ns: None, faults: vec![fault] });
    std::fs::write(&path, trace.to_json().unwrap()).unwrap();
    assert!(load(&path).unwrap_err().sentence.contains("--faults"));
    assert_eq!(Toucher::from_trace(&read(&path).unwrap(), 0).unwrap().vcpus[0].len(), 1);
    trace.epochs.push(trace::Epoch::new(1_000_000, &[1; 10], &[], None));
    trace.drain = None;
    std::fs::write(&path, trace.to_json().unwrap()).unwrap();
    assert_eq!(load(&path).unwrap().epochs.len(), 1);
    assert!(Toucher::from_trace(&read(&path).unwrap(), 0).is_err());
}
