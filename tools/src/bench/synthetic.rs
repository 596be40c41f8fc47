//! Made-up runs, for the tests of everything that is done with real ones.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "made-up numbers, all of them small and positive"
)]

use hdrhistogram::Histogram;
use switchover_hybrid::monitor::{Choice, Prediction, Sample, Verdict};
use switchover_hybrid::report::{
    CpuSeconds, DecisionReport, EncodedHistogram, EncodingCounts, FaultReport, Instants, LaneBytes, PageClasses,
    PhaseSpan, PrecopyReport, RateSeries, RoundReport, Side, SideReport,
};
use switchover_hybrid::status::MigrationStatus;
use switchover_wire::clock::HostClock;

use super::aggregate::Aggregate;
use super::bandwidth::Bandwidth;
use super::comparison::Comparison;
use super::figures::Figures;
use super::guest_trace::{GuestPeriod, GuestTrace, Marks};
use super::host_info::HostInfo;
use super::matrix::Matrix;
use super::modes::Family;
use super::schema::{OURS, PeerInfo, Report, RunReport, SCHEMA, Settings};
use super::vmm::Account;

const MS: u64 = 1_000_000;
/// When the guest is ready; everything else follows from it.
const READY: u64 = 3_600_000 * MS;
const PERIOD_MS: u64 = 100;
const WARM_UP: u64 = 2_000 * MS;
const SLICE: u64 = 2 * MS;

/// Numbers that look random and are the same every time.
struct Noise(u64);

impl Noise {
    /// Between 0 and 1.
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Around `median`, with a long tail upwards.
    fn latency(&mut self, median: f64, spread: f64) -> u64 {
        let normal = (0..6).map(|_| self.next()).sum::<f64>() - 3.0;
        let tail = if self.next() < 0.005 { 1.0 + 12.0 * self.next() } else { 1.0 };
        (median * (spread * normal).exp() * tail) as u64
    }
}

/// The two sides of a run that went well.
pub fn sides(seed: u64) -> (SideReport, SideReport) {
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let clock = HostClock { boot_id: "11111111-2222-3333-4444-555555555555".to_owned() };
    let migrate = READY + WARM_UP;
    let handoff = migrate + 180 * MS;
    let last_exit = handoff + 400_000 + (noise.next() * 4e5) as u64;
    let commit = last_exit + 2_600_000 + (noise.next() * 9e5) as u64;
    let commit_there = commit + 60_000;
    let first_entry = commit_there + 300_000 + (noise.next() * 3e5) as u64;
    let drain = (210.0 + 40.0 * noise.next()) as u64 * MS;
    let last_page = commit_there + drain;
    let drained = last_page + 700_000;
    let faults = faults(&mut noise);
    let requested = faults.remote;
    let pushed = 65_700 - requested;
    let phase = |name: &str, start_ns, end_ns| PhaseSpan { name: name.to_owned(), start_ns, end_ns: Some(end_ns) };
    let lane = |lane: &str, sent, received| LaneBytes { lane: lane.to_owned(), sent, received };
    let bulk = pushed * 4110;
    let source = SideReport {
        side: Side::Source,
        session: format!("{seed:032x}"),
        status: MigrationStatus::Completed,
        error: None,
        failure: None,
        clock: clock.clone(),
        phases: vec![
            phase("setup", migrate + MS, migrate + 120 * MS),
            phase("active", migrate + 120 * MS, handoff),
            phase("device", handoff, commit),
            phase("pause", handoff + 50_000, last_exit + 40_000),
            phase("save-state", last_exit + 50_000, last_exit + 900_000),
            phase("postcopy-active", commit, drained),
        ],
        instants: Instants {
            last_exit_ns: Some(last_exit),
            commit_ns: Some(commit),
            drained_ns: Some(drained),
            ..Instants::default()
        },
        lanes: vec![
            lane("control lane 0", 21_000, 900),
            lane("fault lane 0", requested * 4120, (requested + faults.raced) * 16),
            lane("bulk lane 0", bulk, 0),
        ],
        state_bytes: 18_432,
        ram_pages: 131_072,
        pages: None,
        faults: None,
        fault_trace: Vec::new(),
        rates: None,
        cpu: CpuSeconds { user: 0.05, system: 0.19 },
        precopy: None,
        interruptions: Vec::new(),
        unacknowledged: None,
        comparison: None,
    };
    let destination = SideReport {
        side: Side::Destination,
        phases: vec![
            phase("setup", migrate + 2 * MS, migrate + 119 * MS),
            phase("active", migrate + 119 * MS, commit_there),
            phase("load-state", last_exit + 1_000_000, commit - 100_000),
            phase("postcopy-active", commit_there, drained + 300_000),
        ],
        instants: Instants {
            commit_ns: Some(commit_there),
            first_entry_ns: Some(first_entry),
            last_page_ns: Some(last_page),
            drained_ns: Some(drained + 100_000),
            ..Instants::default()
        },
        lanes: source.lanes.iter().map(|l| lane(&l.lane, l.received, l.sent)).collect(),
        pages: Some(PageClasses {
            precopied: 0,
            zero: 131_072 - pushed - requested,
            pushed,
            requested,
            discarded: faults.raced,
        }),
        rates: Some(rates(&mut noise, commit_there, drain, &faults, pushed)),
        faults: Some(faults),
        fault_trace: Vec::new(),
        cpu: CpuSeconds { user: 0.08, system: 0.31 },
        ..source.clone()
    };
    (source, destination)
}

/// The two sides of a hybrid run that went over to post-copy after three rounds.
pub fn hybrid_sides(seed: u64) -> (SideReport, SideReport) {
    let (mut source, destination) = sides(seed);
    let last_exit = source.instants.last_exit_ns.unwrap();
    source.precopy = Some(precopy(seed, last_exit, Choice::Postcopy));
    (source, destination)
}

/// Three rounds that ended just before `end`.
fn precopy(seed: u64, end: u64, choice: Choice) -> PrecopyReport {
    let mut noise = Noise(seed.wrapping_mul(0xd1b5_4a32_d192_ed03) | 1);
    let (mut rounds, mut decisions, mut samples) = (Vec::new(), Vec::new(), Vec::new());
    let start_ns = end - 61 * MS;
    let mut at = start_ns;
    for (index, (length, pages, dirtied)) in
        [(34, 65_700, 24_100), (16, 24_100, 15_300), (9, 15_300, 12_900)].into_iter().enumerate()
    {
        let round = index as u32 + 1;
        let round_end = at + length * MS + (noise.next() * 5e5) as u64;
        rounds.push(RoundReport {
            round,
            start_ns: at,
            end_ns: round_end,
            pages,
            data_pages: pages - 120,
            zero_pages: 100,
            deferred_pages: 20,
            wire_bytes: pages * 4105,
            dirtied_pages: dirtied,
            dirtied: None,
        });
        samples.push(Sample {
            at_ns: round_end - start_ns,
            round,
            round_over: true,
            round_pages: pages,
            ..Sample::default()
        });
        let last = round == 3;
        decisions.push(DecisionReport {
            at_ns: round_end,
            round,
            verdict: Verdict {
                choice: if last { choice } else { Choice::AnotherRound },
                reason: if last { "another round gains less than it costs" } else { "another round pays" }.to_owned(),
                prediction: Prediction {
                    next_round_pages: dirtied * 9 / 10,
                    next_dirty_pages: 0,
                    next_round_ns: length * MS / 2,
                    stop_blackout_ns: 21 * MS,
                    postcopy_blackout_ns: 4 * MS,
                    drain_ns: 18 * MS,
                },
            },
            actual_round_pages: (!last).then_some(dirtied),
            actual_round_ns: (!last).then_some(length * MS * 11 / 20),
            actual_blackout_ns: (last && choice != Choice::GiveUp).then_some(4 * MS + 300_000),
        });
        at = round_end;
    }
    PrecopyReport {
        start_ns,
        rounds,
        decisions,
        samples,
        encodings: EncodingCounts {
            raw: 90_000,
            lz4: 14_000,
            bytes_in: 104_000 << 12,
            bytes_out: 96_000 << 12,
            ..EncodingCounts::default()
        },
        throttle_percent: 20,
        handoff_pages: 12_900,
        missing: None,
    }
}

/// `count` post-copy runs that went well, each different.
pub fn runs(count: u32) -> Vec<RunReport> {
    (1..=count).map(|number| run(number, sides(u64::from(number)))).collect()
}

/// `count` hybrid runs that went well, each different.
pub fn hybrid_runs(count: u32) -> Vec<RunReport> {
    (1..=count).map(|number| run(number, hybrid_sides(u64::from(number) + 100))).collect()
}

/// `count` pre-copy runs that did not converge.
pub fn stayed_runs(count: u32) -> Vec<RunReport> {
    (1..=count).map(stayed).collect()
}

fn stayed(number: u32) -> RunReport {
    let mut run = runs(number).remove(number as usize - 1);
    let marks = run.marks.as_mut().unwrap();
    marks.handoff_ns = marks.completed_ns;
    let (progress, end) = (run.figures.progress, marks.completed_ns);
    for period in &mut run.guest.as_mut().unwrap().periods {
        period.side = Side::Source;
    }
    let source = run.source.as_mut().unwrap();
    source.status = MigrationStatus::Failed;
    source.instants = Instants::default();
    source.phases.truncate(2);
    source.phases[1].end_ns = Some(end);
    source.precopy = Some(precopy(u64::from(number), end, Choice::GiveUp));
    run.figures = Figures::of_attempt(source, progress);
    run.destination = None;
    run.not_converged = Some("the budget is spent".to_owned());
    run
}

/// A report of all modes in one cell, and their aggregates; pre-copy did not converge.
pub fn three_modes(count: u32) -> (Report, Vec<Aggregate>) {
    let runs = [("precopy", stayed_runs(count)), ("postcopy", runs(count)), ("hybrid", hybrid_runs(count))];
    let aggregates: Vec<_> = runs
        .into_iter()
        .map(|(mode, runs)| {
            let aggregate = Aggregate::of(mode, "switchover", runs).unwrap();
            aggregate.in_cell("random".to_owned(), Bandwidth::UNLIMITED)
        })
        .collect();
    (report(aggregates.iter().map(|aggregate| aggregate.report.clone()).collect()), aggregates)
}

/// The peer of [`beside_a_peer`].
pub fn peer() -> PeerInfo {
    PeerInfo {
        name: "qemu".to_owned(),
        title: "QEMU".to_owned(),
        version: "10.0.2".to_owned(),
        program: "/usr/bin/qemu-system-x86_64".to_owned(),
    }
}

/// A report of this VMM's post-copy and hybrid beside a slower peer's pre-copy and post-copy, and their aggregates.
pub fn beside_a_peer(count: u32) -> (Report, Vec<Aggregate>) {
    let peers = |seed, stands_ms| (1..=count).map(|number| peer_run(number, seed, stands_ms)).collect();
    let entries = [
        ("postcopy", OURS, Family::PostCopy, runs(count)),
        ("hybrid", OURS, Family::PostCopy, hybrid_runs(count)),
        ("precopy", "qemu", Family::PreCopy, peers(300, 95)),
        ("postcopy", "qemu", Family::PostCopy, peers(400, 31)),
        ("postcopy-preempt", "qemu", Family::PostCopy, peers(500, 19)),
    ];
    let aggregates: Vec<_> = entries
        .into_iter()
        .map(|(mode, vmm, family, runs)| {
            let aggregate = Aggregate::of(mode, vmm, runs).unwrap();
            aggregate.of_family(family).in_cell("random".to_owned(), Bandwidth::UNLIMITED)
        })
        .collect();
    let mut report = report(aggregates.iter().map(|aggregate| aggregate.report.clone()).collect());
    report.comparison = Comparison::of(&report.modes, &peer());
    report.settings.peer = Some(peer());
    (report, aggregates)
}

/// A run of a VMM that reports nothing, whose guest stands still for `stands_ms`, and for three times as long while its
/// memory follows.
fn peer_run(number: u32, seed: u64, stands_ms: u64) -> RunReport {
    let mut run = run(number, sides(seed + u64::from(number)));
    let guest = run.guest.as_mut().unwrap();
    let marks = run.marks.unwrap();
    let first = guest.periods.iter().position(|period| period.read_ns > marks.handoff_ns).unwrap();
    for period in &mut guest.periods[first..first + 5] {
        period.visits /= 4;
        period.max_gap_us = stands_ms * 1_000 + u64::from(number) * 400;
    }
    let account = Account {
        own_downtime_ns: Some(2 * MS),
        total_ns: Some(560 * MS),
        setup_ns: Some(3 * MS),
        drain_ns: Some(400 * MS),
        drain_bytes: Some((250 + u64::from(number)) << 20),
        wire_bytes: Some(270 << 20),
        page_requests: Some(420),
    };
    let figures = Figures::of_account(&account, guest.progress(&marks)).with_cpu(Some(390 * MS), guest.working_set);
    RunReport { figures, source: None, destination: None, ..run }
}

/// A report of such runs of one mode, which the caller has aggregated.
pub fn report(modes: Vec<super::schema::ModeReport>) -> Report {
    Report {
        schema: SCHEMA.to_owned(),
        created: "2026-11-20T19:45:00Z".to_owned(),
        switchover: "0.1.0".to_owned(),
        verified: modes.iter().all(|mode| mode.verified),
        host: HostInfo::here(),
        settings: Settings {
            guest: "random".to_owned(),
            append: "ws=256M period=100".to_owned(),
            memory: 512 << 20,
            vcpus: 1,
            link: "tcp".to_owned(),
            runs: 5,
            period_ms: PERIOD_MS,
            warmup_s: 2.0,
            after_s: 2.0,
            patience_s: None,
            hold_push_s: None,
            parameters: serde_json::Map::new(),
            seccomp: "on".to_owned(),
            seed: 7,
            peer: None,
        },
        floor: Some(crate::floor::synthetic()),
        matrix: Matrix::of(&modes),
        comparison: None,
        interrupted: false,
        modes,
    }
}

fn run(number: u32, (source, destination): (SideReport, SideReport)) -> RunReport {
    let handoff = source.instants.last_exit_ns.unwrap();
    let drained = destination.instants.drained_ns.unwrap();
    let marks = Marks {
        warm_up_ns: READY,
        migrate_ns: READY + WARM_UP,
        handoff_ns: handoff - 500_000,
        completed_ns: drained + 2 * MS,
    };
    let guest = guest(u64::from(number), handoff, drained);
    let figures = Figures::of(&source, &destination, guest.progress(&marks));
    let figures = figures.with_cpu(Some(310 * MS), guest.working_set);
    let doubts = guest.doubts(Side::Destination, 0);
    RunReport {
        run: number,
        verified: doubts.is_empty(),
        doubts,
        not_converged: None,
        figures,
        marks: Some(marks),
        felt: None,
        guest: Some(guest),
        source: Some(source),
        destination: Some(destination),
    }
}

fn guest(seed: u64, handoff: u64, drained: u64) -> GuestTrace {
    let mut noise = Noise(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1);
    let periods = (0..46).map(|number| {
        let start = READY + number * PERIOD_MS * MS;
        let end = start + PERIOD_MS * MS;
        let within =
            |from: u64, to: u64| (to.min(end).saturating_sub(from.max(start))) as f64 / (PERIOD_MS * MS) as f64;
        let slow = within(handoff + 4 * MS, drained) * 0.72 + within(handoff, handoff + 4 * MS);
        let visits = (148_000.0 * (1.0 - slow) * (0.985 + 0.03 * noise.next())) as u64;
        let max_gap_us =
            if within(handoff, handoff + 4 * MS) > 0.0 { 5_200 } else { 90 + (200.0 * noise.next()) as u64 };
        GuestPeriod {
            number,
            read_ns: end + (noise.next() * 9e5) as u64,
            side: if end < handoff { Side::Source } else { Side::Destination },
            visits,
            max_gap_us,
            bad: 0,
            vcpu_visits: vec![visits],
            times: Vec::new(),
        }
    });
    GuestTrace {
        working_set: 256 << 20,
        tsc_khz: 2_445_406,
        vcpus: 1,
        ready_ns: Some(READY),
        periods: periods.collect(),
        ..GuestTrace::default()
    }
}

fn faults(noise: &mut Noise) -> FaultReport {
    let (remote, raced, local) = (1_450 + (noise.next() * 300.0) as u64, 61, 5_210);
    let new = || Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3).unwrap();
    let [mut total, mut queue, mut wire, mut place, mut wake, mut local_total] = [(); 6].map(|()| new());
    for _ in 0..remote {
        let parts = [(2_600.0, 0.35), (78_000.0, 0.5), (2_100.0, 0.25), (4_900.0, 0.4)];
        let values = parts.map(|(median, spread)| noise.latency(median, spread));
        for (histogram, value) in [&mut queue, &mut wire, &mut place, &mut wake].into_iter().zip(values) {
            histogram.record(value).unwrap();
        }
        total.record(values.iter().sum()).unwrap();
    }
    for _ in 0..raced {
        total.record(noise.latency(120_000.0, 0.6)).unwrap();
    }
    for _ in 0..local {
        local_total.record(noise.latency(6_300.0, 0.4)).unwrap();
    }
    let encode = |histogram| EncodedHistogram::encode(&histogram).unwrap();
    FaultReport {
        remote,
        raced,
        local,
        joined: 37,
        total: encode(total),
        queue: encode(queue),
        wire: encode(wire),
        place: encode(place),
        wake: encode(wake),
        local_total: encode(local_total),
    }
}

fn rates(noise: &mut Noise, start_ns: u64, drain: u64, faults: &FaultReport, pushed: u64) -> RateSeries {
    let slices = (drain / SLICE) as usize;
    let weight = |slice: usize| (-3.0 * slice as f64 / slices as f64).exp();
    let sum: f64 = (0..slices).map(weight).sum();
    let faulted = (faults.remote + faults.raced) as f64 / sum;
    RateSeries {
        start_ns,
        slice_ns: SLICE,
        faults: (0..slices).map(|slice| (faulted * weight(slice) * (0.5 + noise.next())) as u32).collect(),
        pushed: (0..slices).map(|_| (pushed as f64 / slices as f64 * (0.7 + 0.6 * noise.next())) as u32).collect(),
    }
}
