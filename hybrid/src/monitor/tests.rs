use proptest::prelude::*;

use super::*;

const GBIT: u64 = 125_000_000;

fn limits(mode: Mode) -> Limits {
    Limits { mode, ..Limits::default() }
}

/// 1 GiB at 1 Gbit/s: 33 µs a page; the end of a second round in which `dirty` of 100,000 pages were written again.
fn round_end(dirty: u64) -> Sample {
    Sample {
        at_ns: 12_000_000_000,
        round: 2,
        round_ns: 3_300_000_000,
        round_over: true,
        round_pages: 100_000,
        dirty_pages: dirty,
        rewritten_pages: dirty,
        fresh_pages: 300,
        fresh_dirty_pages: dirty / 400,
        bytes_per_second: GBIT,
        bytes_per_page: 4096.0,
        bytes_per_data_page: 4096.0,
        handoff_ns: 2_000_000,
        ..Sample::default()
    }
}

fn choice(mode: Mode, sample: &Sample) -> Choice {
    Monitor::new(limits(mode)).observe(sample).choice
}

#[test]
fn a_rest_that_fits_is_copied_and_one_page_more_is_not() {
    // 2 ms of handoff and 3 ms of pages, or 298: 91 or 9094 pages of 32.8 µs. No round is left that could help.
    let full = |pages: u64| Sample { round_pages: pages, ..round_end(pages) };
    for (mode, most, above) in [(Mode::Hybrid, 91, Choice::Postcopy), (Mode::Precopy, 9094, Choice::GiveUp)] {
        let limits = Limits { round_budget: 2, ..limits(mode) };
        assert_eq!(Monitor::new(limits).observe(&full(most)).choice, Choice::StopAndCopy, "{mode:?}");
        assert_eq!(Monitor::new(limits).observe(&full(most + 1)).choice, above, "{mode:?}");
    }
}

#[test]
fn what_fits_is_copied_where_no_round_gains_anything() {
    let stuck = Sample { round_pages: 5000, fresh_dirty_pages: 300, ..round_end(5000) };
    assert_eq!(choice(Mode::Precopy, &stuck), Choice::StopAndCopy);
    let shrinking = Sample { fresh_dirty_pages: 0, ..round_end(5000) };
    assert_eq!(choice(Mode::Precopy, &shrinking), Choice::AnotherRound, "a shorter blackout is in reach");
}

#[test]
fn nothing_left_is_nothing_to_wait_for() {
    for mode in [Mode::Precopy, Mode::Hybrid] {
        let unmeasured = Sample { bytes_per_second: 0, ..round_end(0) };
        assert_eq!(choice(mode, &round_end(0)), Choice::StopAndCopy);
        assert_eq!(choice(mode, &unmeasured), Choice::StopAndCopy);
    }
}

#[test]
fn a_round_that_shrinks_the_rest_leads_to_another() {
    // A twentieth was written again: the next round takes a twentieth of the time.
    assert_eq!(choice(Mode::Hybrid, &Sample { fresh_dirty_pages: 0, ..round_end(5_000) }), Choice::AnotherRound);
}

#[test]
fn a_working_set_written_over_and_over_goes_to_postcopy() {
    let hot = Sample { fresh_dirty_pages: 300, ..round_end(100_000) };
    assert_eq!(choice(Mode::Hybrid, &hot), Choice::Postcopy);
    assert_eq!(choice(Mode::Precopy, &hot), Choice::AnotherRound, "its budget is not spent");
}

#[test]
fn a_hot_guest_is_handed_off_within_the_first_round() {
    let mut monitor = Monitor::new(limits(Mode::Hybrid));
    let pages = 100_000;
    for step in 1..=100 {
        let sent = pages * step / 100;
        let verdict = monitor.observe(&Sample {
            at_ns: step * 33_000_000,
            round: 1,
            round_ns: step * 33_000_000,
            round_over: step == 100,
            round_pages: pages,
            left_pages: pages - sent,
            dirty_pages: sent * 98 / 100,
            rewritten_pages: 0,
            fresh_pages: 1000,
            fresh_dirty_pages: 900,
            ..round_end(0)
        });
        if verdict.choice == Choice::Postcopy {
            assert!((20..90).contains(&step), "{step}: {}", verdict.reason);
            return;
        }
        assert_eq!(verdict.choice, Choice::AnotherRound);
    }
    panic!("it was never handed off");
}

#[test]
fn an_idle_guest_is_copied_and_stopped() {
    let mut monitor = Monitor::new(limits(Mode::Hybrid));
    for step in 1..=10 {
        let verdict = monitor.observe(&Sample {
            at_ns: step * 330_000_000,
            round: 1,
            round_ns: step * 330_000_000,
            round_over: step == 10,
            round_pages: 100_000,
            left_pages: 100_000 - step * 10_000,
            dirty_pages: step,
            rewritten_pages: 0,
            fresh_pages: 300,
            fresh_dirty_pages: 0,
            ..round_end(0)
        });
        assert_ne!(verdict.choice, Choice::Postcopy, "{step}: {}", verdict.reason);
        assert!(step == 10 || verdict.choice == Choice::AnotherRound, "{step}: {}", verdict.reason);
    }
    let last = monitor.observe(&Sample { round_pages: 10, ..round_end(0) });
    assert_eq!(last.choice, Choice::StopAndCopy, "{}", last.reason);
}

#[test]
fn a_spent_budget_ends_it_each_way() {
    let hot = Sample { fresh_dirty_pages: 300, ..round_end(100_000) };
    for spend in [
        |limits: &mut Limits| limits.time_budget = Duration::from_secs(11),
        |limits: &mut Limits| limits.round_budget = 2,
    ] {
        for (mode, end) in [(Mode::Precopy, Choice::GiveUp), (Mode::Hybrid, Choice::Postcopy)] {
            let mut limits = limits(mode);
            spend(&mut limits);
            let verdict = Monitor::new(limits).observe(&hot);
            assert_eq!(verdict.choice, end);
            assert!(verdict.reason.contains("is spent"), "{}", verdict.reason);
            assert_eq!(
                Monitor::new(limits).observe(&round_end(50)).choice,
                Choice::StopAndCopy,
                "what fits still is copied"
            );
        }
    }
    let mut limits = limits(Mode::Precopy);
    limits.time_budget = Duration::from_secs(12);
    assert_eq!(Monitor::new(limits).observe(&hot).choice, Choice::AnotherRound, "not before it is spent");
    limits.round_budget = 3;
    assert_eq!(Monitor::new(limits).observe(&hot).choice, Choice::AnotherRound);
}

#[test]
fn limits_may_change_in_mid_run() {
    let mut monitor = Monitor::new(limits(Mode::Precopy));
    let stuck = Sample { round_pages: 20_000, fresh_dirty_pages: 300, ..round_end(20_000) };
    assert_eq!(monitor.observe(&stuck).choice, Choice::AnotherRound);
    monitor.set_limits(Limits { downtime_limit: Duration::from_secs(1), ..limits(Mode::Precopy) });
    assert_eq!(monitor.observe(&stuck).choice, Choice::StopAndCopy);
    monitor.set_limits(Limits { time_budget: Duration::ZERO, ..limits(Mode::Precopy) });
    assert_eq!(monitor.observe(&stuck).choice, Choice::GiveUp);
}

#[test]
fn without_a_measured_bandwidth_it_goes_on() {
    let unmeasured = Sample { bytes_per_second: 0, ..round_end(100_000) };
    assert_eq!(choice(Mode::Hybrid, &unmeasured), Choice::AnotherRound);
    let mut monitor = Monitor::new(limits(Mode::Hybrid));
    monitor.observe(&round_end(100_000));
    let prediction = monitor.observe(&unmeasured).prediction;
    assert!(prediction.stop_blackout_ns < 4_000_000_000, "the last bandwidth counts: {prediction:?}");
}

#[test]
fn a_blackout_is_the_handoff_and_the_pages_left() {
    let sample = Sample { unacknowledged_pages: 500, left_pages: 250, bytes_per_page: 2048.0, ..round_end(1000) };
    let predict = |sample: &Sample| Monitor::new(limits(Mode::Precopy)).observe(sample).prediction;
    // Written pages at 4096 bytes; those left at what this round's pages took. What is under way is there before the pause,
    let expected = |written: u64| 2_000_000 + (written * 4096) * 8 + (250 * 2048) * 8;
    let near = |found: u64, written| assert!(found.abs_diff(expected(written)) <= 500_000, "{found} {written}");
    near(predict(&sample).stop_blackout_ns, 1000);
    assert_eq!(predict(&sample).postcopy_blackout_ns, 2_000_000);
    // unless that takes too long.
    near(predict(&Sample { unacknowledged_pages: 2000, ..sample }).stop_blackout_ns, 3000);
    // As differences, all that was sent before takes as many bytes; however few, they are packed first: 7.5 µs a page.
    for (bytes, copied) in [(1024, 1250 * 1024 * 8), (512, 1000 * 7500), (64, 1000 * 7500)] {
        let small = predict(&Sample { bytes_per_difference: f64::from(bytes), ..sample }).stop_blackout_ns;
        assert!(small.abs_diff(2_000_000 + copied) <= 100_000, "{bytes}: {small}");
    }
}

#[test]
fn pages_that_a_long_watched_sample_shows_cold_are_waited_for() {
    // Half of RAM is zero pages that nobody touches, still to be sent; what an idle guest writes goes as differences.
    let at = |step: u64, written: u64| Sample {
        at_ns: step * 100_000_000,
        round: 1,
        round_ns: step * 100_000_000,
        round_pages: 65_536,
        left_pages: 65_536 - step * 3379,
        dirty_pages: step * 61,
        fresh_pages: 3379,
        fresh_dirty_pages: 3,
        bytes_per_second: 125_000_000,
        limit_bytes_per_second: 125_000_000,
        bytes_per_page: 4101.0,
        bytes_per_data_page: 4101.0,
        bytes_per_difference: 100.0,
        probe_pages: 512 - step * 26,
        probe_dirty_pages: written,
        probe_zero_pages: 252,
        probe_ns: step * 100_000_000,
        handoff_ns: 1_400_000,
        ..Sample::default()
    };
    let last = |written| {
        let mut monitor = Monitor::new(limits(Mode::Precopy));
        let verdicts: Vec<_> = (1..=10).map(|step| monitor.observe(&at(step, written))).collect();
        verdicts.into_iter().next_back().unwrap()
    };
    let cold = last(0);
    assert_eq!(cold.choice, Choice::AnotherRound, "{}", cold.reason);
    assert!(cold.prediction.next_round_pages < 1000, "{}", cold.prediction.next_round_pages);
    assert!(last(100).prediction.next_round_pages > 2 * cold.prediction.next_round_pages, "it believes in the sample");
}

/// 256 MiB at 5 Gbit/s, 2.5 ms after the first round began: 400 of 500 sampled pages with bytes, and so many written.
fn early(written: u64) -> Sample {
    Sample {
        at_ns: 2_600_000,
        round: 1,
        round_ns: 2_500_000,
        round_pages: 65_536,
        left_pages: 65_136,
        fresh_pages: 400,
        bytes_per_second: 5 * GBIT,
        bytes_per_page: 4096.0,
        handoff_ns: 1_600_000,
        probe_pages: 500,
        probe_dirty_pages: written,
        probe_zero_pages: 100,
        probe_ns: 2_600_000,
        ..Sample::default()
    }
}

#[test]
fn a_sample_that_is_hot_already_is_handed_off_at_once() {
    for (written, expected) in [(0, Choice::AnotherRound), (5, Choice::AnotherRound), (400, Choice::Postcopy)] {
        let verdict = Monitor::new(limits(Mode::Hybrid)).observe(&early(written));
        assert_eq!(verdict.choice, expected, "{written}: {}", verdict.reason);
    }
    let unmeasured = Sample { bytes_per_second: 0, ..early(400) };
    assert_eq!(choice(Mode::Hybrid, &unmeasured), Choice::AnotherRound, "what the link carries is not known");
    let too_few = Sample { probe_pages: 40, probe_dirty_pages: 40, probe_zero_pages: 0, ..early(0) };
    assert_eq!(choice(Mode::Hybrid, &too_few), Choice::AnotherRound);
}

#[test]
fn a_stop_amid_the_first_round_waits_until_the_link_was_measured_for_a_while() {
    let fits = Limits { downtime_limit: Duration::from_secs(1), ..limits(Mode::Precopy) };
    assert_eq!(Monitor::new(fits).observe(&early(400)).choice, Choice::AnotherRound);
    let mut monitor = Monitor::new(fits);
    let mut last = Choice::AnotherRound;
    for step in 1..=5 {
        let sent = step * 4000;
        last = monitor
            .observe(&Sample {
                round_ns: step * 10_000_000,
                left_pages: 65_536 - sent,
                dirty_pages: sent,
                fresh_pages: 4000,
                fresh_dirty_pages: 4000,
                ..early(400)
            })
            .choice;
    }
    assert_eq!(last, Choice::StopAndCopy);
}

#[test]
fn zero_pages_of_the_sample_shorten_the_blackout() {
    let blackout = |zero| {
        let sample = Sample { probe_zero_pages: zero, ..early(0) };
        Monitor::new(limits(Mode::Precopy)).observe(&sample).prediction.stop_blackout_ns - sample.handoff_ns
    };
    assert!(blackout(250).abs_diff(blackout(0) / 2) < 1_000_000, "{} {}", blackout(250), blackout(0));
}

#[test]
fn postcopy_mode_knows_no_rounds() {
    assert_eq!(choice(Mode::Postcopy, &round_end(1)), Choice::Postcopy);
}

#[test]
fn older_samples_can_be_read() {
    let mut value = serde_json::to_value(round_end(7)).unwrap();
    for added in [
        "bytes_per_data_page",
        "fresh_pages",
        "fresh_dirty_pages",
        "bytes_per_difference",
        "probe_pages",
        "probe_dirty_pages",
        "probe_zero_pages",
        "probe_ns",
        "limit_bytes_per_second",
        "within_host",
    ] {
        value.as_object_mut().unwrap().remove(added).unwrap();
    }
    let read: Sample = serde_json::from_value(value).unwrap();
    assert_eq!((read.dirty_pages, read.fresh_pages), (7, 0));
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), 0..100_000_u64, any::<u64>(), Just(u64::MAX)]
}

fn bytes() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(4096.0), any::<f64>(), Just(f64::NAN), Just(f64::INFINITY)]
}

prop_compose! {
    fn sample()(
        numbers in proptest::array::uniform16(number()),
        round in prop_oneof![0..4_u32, any::<u32>()],
        flags: [bool; 2],
        bytes in proptest::array::uniform3(bytes()),
    ) -> Sample {
        let [at_ns, round_ns, round_pages, left_pages, unacknowledged_pages, dirty_pages, rewritten_pages, fresh_pages,
            fresh_dirty_pages, bytes_per_second, handoff_ns, probe_pages, probe_dirty_pages, probe_zero_pages, probe_ns,
            limit_bytes_per_second] = numbers;
        Sample {
            at_ns, round, round_ns, round_over: flags[0], round_pages, left_pages, unacknowledged_pages, dirty_pages, rewritten_pages,
            fresh_pages, fresh_dirty_pages, bytes_per_second, bytes_per_page: bytes[0], bytes_per_data_page: bytes[1],
            bytes_per_difference: bytes[2], probe_pages, probe_dirty_pages, probe_zero_pages, probe_ns, limit_bytes_per_second,
            within_host: flags[1], handoff_ns,
        }
    }
}

proptest! {
    #[test]
    fn no_sample_breaks_it(samples in proptest::collection::vec(sample(), 1..50), mode in prop::sample::select(vec![Mode::Precopy, Mode::Postcopy, Mode::Hybrid])) {
        let mut monitor = Monitor::new(limits(mode));
        for sample in &samples {
            let verdict = monitor.observe(sample);
            prop_assert!(!verdict.reason.contains("NaN"), "{}", verdict.reason);
            let rest = sample.left_pages != 0 || sample.dirty_pages != 0 || sample.unacknowledged_pages != 0;
            prop_assert!(verdict.choice != Choice::Postcopy || mode != Mode::Precopy);
            prop_assert!(verdict.choice != Choice::GiveUp || mode == Mode::Precopy);
            if verdict.choice == Choice::StopAndCopy && rest {
                let limit = monitor.limits.stop_limit().as_nanos();
                prop_assert!(u128::from(verdict.prediction.stop_blackout_ns) <= limit + 1, "{verdict:?}");
            }
        }
    }
}
