//! Files that HdrHistogram's own tools read: `.hgrm` percentile distributions and `.hlog` interval logs.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use thiserror::Error;

use super::aggregate::Aggregate;
use super::latency::PARTS;

/// Lines for each halving of the distance to 100 %, as HdrHistogram's own writers take it.
const TICKS_PER_HALF_DISTANCE: u32 = 5;
/// `.hgrm` files are in microseconds, like most of those that they are compared with.
const NS_PER_US: f64 = 1e3;
/// The log's `Interval_Max` column is in milliseconds by custom; the histograms themselves stay in nanoseconds.
const NS_PER_MS: f64 = 1e6;

/// A file of the report could not be written.
#[derive(Debug, Error)]
#[error("cannot write {path}: {source}; choose another directory with --out", path = path.display())]
pub struct WriteError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Writes `contents` to `path`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_file(path: &Path, contents: &[u8]) -> Result<(), WriteError> {
    fs::write(path, contents).map_err(|source| WriteError { path: path.to_owned(), source })
}

/// Writes `<mode>-fault-<part>.hgrm` for each part that has samples, and `<mode>-faults.hlog` with all parts of all runs.
///
/// # Errors
/// When a file cannot be written.
pub fn write_all(aggregate: &Aggregate, directory: &Path) -> Result<(), WriteError> {
    let mode = &aggregate.report.mode;
    for (part, histogram) in aggregate.merged.iter().filter(|(_, histogram)| !histogram.is_empty()) {
        let path = directory.join(format!("{mode}-fault-{}.hgrm", part.replace('_', "-")));
        write_file(&path, hgrm(histogram).as_bytes())?;
    }
    let path = directory.join(format!("{mode}-faults.hlog"));
    let log = hlog(aggregate).map_err(|source| WriteError { path: path.clone(), source })?;
    write_file(&path, &log)
}

/// The percentile distribution of `histogram` (nanoseconds) in microseconds.
#[must_use]
pub fn hgrm(histogram: &Histogram<u64>) -> String {
    let mut text = format!("{:>12} {:>14} {:>10} {:>14}\n\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)");
    let mut counted = 0;
    for step in histogram.iter_quantiles(TICKS_PER_HALF_DISTANCE) {
        counted += step.count_since_last_iteration();
        let value = us(step.value_iterated_to());
        let quantile = step.quantile_iterated_to();
        let _ = write!(text, "{value:>12.3} {quantile:>14.12} {counted:>10}");
        if quantile < 1.0 {
            let _ = write!(text, " {:>14.2}", 1.0 / (1.0 - quantile));
        }
        text.push('\n');
    }
    let (mean, deviation) = (histogram.mean() / NS_PER_US, histogram.stdev() / NS_PER_US);
    let _ = writeln!(text, "#[Mean    = {mean:>12.3}, StdDeviation   = {deviation:>12.3}]");
    let _ = writeln!(text, "#[Max     = {:>12.3}, Total count    = {:>12}]", us(histogram.max()), histogram.len());
    let _ = writeln!(
        text,
        "#[Buckets = {:>12}, SubBuckets     = {:>12}]",
        histogram.buckets(),
        2 * 10_u64.pow(u32::from(histogram.sigfig())).next_power_of_two()
    );
    text
}

/// Every run's histogram of every part, tagged with the part's name. Time starts at 0 with the earliest drain; a run's
/// interval is its drain.
///
/// The encoding is V2 with deflate: it is the only one that the Java reader takes.
fn hlog(aggregate: &Aggregate) -> io::Result<Vec<u8>> {
    let runs = &aggregate.report.runs;
    let drain_of = |number: u32| {
        let instants = runs.iter().find(|run| run.run == number)?.destination.as_ref()?.instants;
        Some((instants.commit_ns?, instants.last_page_ns?))
    };
    let first = runs.iter().filter_map(|run| drain_of(run.run)).map(|(start, _)| start).min().unwrap_or(0);
    let mut bytes = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("[Histogram log format version 1.3]")
        .add_comment("Fault latencies in nanoseconds; one interval a run and part, from the commit to the last page")
        .with_max_value_divisor(NS_PER_MS)
        .begin_log_with(&mut bytes, &mut serializer)?;
    // The log's intervals go by their start.
    for run in runs {
        let Some((start, end)) = drain_of(run.run) else { continue };
        for part in PARTS {
            let found = aggregate.by_run.get(part.key).into_iter().flatten().find(|(number, _)| *number == run.run);
            let Some((_, histogram)) = found else { continue };
            let (from, length) = (Duration::from_nanos(start - first), Duration::from_nanos(end.saturating_sub(start)));
            log.write_histogram(histogram, from, length, Tag::new(part.key))
                .map_err(|error| io::Error::other(error.to_string()))?;
        }
    }
    Ok(bytes)
}

#[expect(clippy::cast_precision_loss, reason = "printed with three decimals of a microsecond")]
fn us(ns: u64) -> f64 {
    ns as f64 / NS_PER_US
}

#[cfg(test)]
mod tests {
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::super::synthetic;
    use super::*;

    #[test]
    fn a_log_read_back_holds_every_runs_histograms() {
        let aggregate = Aggregate::of("postcopy", "switchover", synthetic::runs(2)).unwrap();
        let log = hlog(&aggregate).unwrap();
        let mut read = Vec::new();
        for entry in IntervalLogIterator::new(&log) {
            if let LogEntry::Interval(interval) = entry.unwrap() {
                use base64::Engine as _;
                let bytes = base64::engine::general_purpose::STANDARD.decode(interval.encoded_histogram()).unwrap();
                let histogram: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
                read.push((interval.tag().unwrap().as_str().to_owned(), histogram));
            }
        }
        assert_eq!(read.len(), 2 * PARTS.len());
        for (tag, histogram) in read {
            assert!(aggregate.by_run[tag.as_str()].iter().any(|(_, written)| *written == histogram), "{tag}");
        }
    }

    #[test]
    fn a_distribution_reads_back_to_the_same_percentiles() {
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        for value in 1..=10_000_u64 {
            histogram.record(value * 1_000).unwrap();
        }
        let text = hgrm(&histogram);
        let rows: Vec<Vec<f64>> = text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.contains("Value") && !line.is_empty())
            .map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect())
            .collect();
        assert!(rows.len() > 20);
        for row in &rows {
            let ns = histogram.value_at_quantile(row[1]);
            assert!((us(ns) - row[0]).abs() <= row[0] * 0.001, "{row:?} is {ns} ns");
        }
        let last = rows.last().unwrap();
        assert_eq!((last[1], last[2]), (1.0, 10_000.0));
        assert!(text.contains("Total count    =        10000]"), "{text}");
        assert!(rows.windows(2).all(|pair| pair[0][0] <= pair[1][0] && pair[0][2] <= pair[1][2]));
    }
}
