use super::*;

/// The links of the table in docs/monitor.md.
const BITS_PER_SECOND: [u64; 4] = [100_000_000, 1_000_000_000, 5_000_000_000, 20_000_000_000];

fn link(bits_per_second: u64) -> Link {
    Link { bytes_per_second: bits_per_second / 8, delay_ns: 50_000 }
}

fn hybrid() -> Limits {
    Limits { mode: monitor::Mode::Hybrid, ..Limits::default() }
}

#[test]
fn the_monitor_is_near_the_oracle_on_the_judging_seeds() {
    const PAGES: u64 = 8192;
    let mut judged = Vec::new();
    for pattern in Pattern::ALL {
        for seed in JUDGING_SEEDS {
            let guest = synthetic::guest(pattern, seed, PAGES);
            judged.extend(BITS_PER_SECOND.map(|bits| oracle::judge(&guest, link(bits), &hybrid())));
        }
    }
    let summary = table::summary(&judged);
    assert!(
        summary.median_regret.is_some_and(|regret| regret <= 0.10)
            && summary.worst_regret.is_some_and(|regret| regret <= 0.25),
        "{}",
        table::text(&judged)
    );
}
