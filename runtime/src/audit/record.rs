//! One line of an audit log.
//!
//! ```text
//! {"seq":7,"time":"2026-11-27T01:17:58.123456Z","event":"command","data":{…},"prev":"…","sum":"…"}
//! ```
//!
//! `prev` is the BLAKE3 hash of the line before, as it stands there, without its newline; `sum` is that of this line up to
//! `,"sum"`, so that the last line can be checked too, which no other names yet.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::Value;

/// What the first line names as the line before it.
pub const NOTHING_BEFORE: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The event that says that the line before it is half a one.
pub const BROKEN_TAIL: &str = "broken-tail";

/// What stands before a line's own hash.
const SUM: &str = ",\"sum\":\"";

/// A line, taken apart.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Counted from 1, through all processes that wrote to the file.
    pub seq: u64,
    /// The wall clock's time, UTC.
    pub time: String,
    /// What happened.
    pub event: String,
    /// More about it.
    pub data: Value,
    /// The hash of the line before.
    pub prev: String,
    /// The hash of this line's beginning.
    sum: String,
}

impl Record {
    /// Reads a line. Whether it is as it was written is another question: [`is_whole`](Self::is_whole).
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(line)
    }

    /// Whether `line`, which this record was read from, matches its own hash.
    #[must_use]
    pub fn is_whole(&self, line: &[u8]) -> bool {
        let start = line.windows(SUM.len()).rposition(|window| window == SUM.as_bytes());
        start.is_some_and(|start| line.get(..start).is_some_and(|front| hash(front) == self.sum))
    }
}

/// A line as it is written, without its newline.
#[must_use]
pub fn line(seq: u64, at: SystemTime, event: &'static str, data: &Value, prev: &str) -> String {
    let time = utc(at);
    let mut line = format!(r#"{{"seq":{seq},"time":"{time}","event":"{event}","data":{data},"prev":"{prev}""#);
    let sum = hash(line.as_bytes());
    line.push_str(SUM);
    line.push_str(&sum);
    line.push_str("\"}");
    line
}

/// The hash that the line after `line` names.
#[must_use]
pub fn hash(line: &[u8]) -> String {
    blake3::hash(line).to_hex().to_string()
}

/// A point in time as RFC 3339 has it, in UTC, to the microsecond.
fn utc(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days are counted from March 1st of the year 0: then the leap day is the last of its year
    // (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days).
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", since.subsec_micros())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (1_795_742_278, "2026-11-27T01:17:58.000000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn every_changed_byte_of_a_line_is_noticed() {
        let text = line(7, UNIX_EPOCH, "command", &json!({ "name": "quit", "odd": ",\"sum\":\"" }), NOTHING_BEFORE);
        let record = Record::parse(text.as_bytes()).unwrap();
        assert_eq!((record.seq, record.event.as_str()), (7, "command"));
        assert!(record.is_whole(text.as_bytes()));
        for place in 0..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[place] ^= 1;
            let noticed = Record::parse(&changed).map_or(true, |record| !record.is_whole(&changed));
            assert!(noticed, "byte {place} of {text}");
        }
    }
}
