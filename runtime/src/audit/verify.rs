//! Whether an audit log is as it was written.
//!
//! What it cannot know: whether whole lines are missing at the end, unless it is told of one that was there; and whether
//! somebody who may write the file has made all of it anew, since no secret goes into the hashes. Both need a hash kept elsewhere.

use std::collections::HashSet;

use super::record::{BROKEN_TAIL, NOTHING_BEFORE, Record, hash};

/// Something about one line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// How many records there are.
    pub records: usize,
    /// The number of the last one, and the hash of its line.
    pub head: Option<(u64, String)>,
    /// What is not as it was written.
    pub problems: Vec<Finding>,
    /// What is as it was written, and worth knowing.
    pub notes: Vec<Finding>,
}

struct Line<'a> {
    number: usize,
    hash: String,
    record: Option<Record>,
    text: &'a [u8],
}

/// Checks a whole log. `known` is the hash of a line that was in it once, or the beginning of such a hash.
#[must_use]
pub fn verify(log: &[u8], known: Option<&str>) -> Verdict {
    let mut verdict = Verdict::default();
    let (whole, rest) = match log.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => (&log[..end], &log[end + 1..]),
        None => (&log[..0], log),
    };
    let texts = whole.split(|byte| *byte == b'\n').take(if log.len() == rest.len() { 0 } else { usize::MAX });
    let lines: Vec<Line<'_>> = texts
        .enumerate()
        .map(|(index, text)| Line { number: index + 1, hash: hash(text), record: Record::parse(text).ok(), text })
        .collect();
    let present: HashSet<u64> = lines.iter().filter_map(|line| Some(line.record.as_ref()?.seq)).collect();
    let mut before: Option<(&Line<'_>, u64)> = None;
    // Half a line that nothing has explained yet.
    let mut fragment: Option<&Line<'_>> = None;
    for line in &lines {
        let Some(record) = &line.record else {
            if let Some(other) = fragment.replace(line) {
                verdict.problem(other.number, "is no record: it was altered");
            }
            continue;
        };
        verdict.records += 1;
        let altered = !record.is_whole(line.text);
        if altered {
            verdict.problem(line.number, "was altered: it does not match its own hash");
        }
        let explained = fragment.take().map(|fragment| {
            let noted = explains(record, &fragment.hash, before.map(|(line, _)| line.hash.as_str()));
            if noted {
                verdict.notes.push(finding(
                    fragment.number,
                    "is half a line, which the next one says: a process or its disk failed",
                ));
            } else {
                verdict.problem(fragment.number, "is no record, and the next line does not say why: it was altered");
            }
            noted
        });
        let place = match before {
            Some((_, seq)) if present.contains(&(seq + 1)) && record.seq != seq + 1 => {
                Some(if record.seq <= seq && lines.iter().filter(|other| other.seq() == Some(record.seq)).count() > 1 {
                    format!("holds record {}, which stands twice", record.seq)
                } else {
                    format!("was moved: it holds record {}, where {} belongs", record.seq, seq + 1)
                })
            }
            Some((_, seq)) if record.seq > seq + 1 => {
                Some(format!("follows on a gap: {} missing", records(seq + 1, record.seq - 1)))
            }
            Some((_, seq)) if record.seq <= seq => {
                Some(format!("was moved: it holds record {}, after record {seq}", record.seq))
            }
            None if record.seq != 1 && !present.contains(&1) => {
                Some(format!("is not the beginning: {} missing", records(1, record.seq.saturating_sub(1))))
            }
            None if record.seq != 1 => Some(format!("was moved: it holds record {}, where 1 belongs", record.seq)),
            _ => None,
        };
        let named = before.map_or(NOTHING_BEFORE, |(line, _)| line.hash.as_str());
        if let Some(place) = place {
            verdict.problem(line.number, &place);
        } else if explained.is_none() && record.prev != named && !altered {
            // Its own hash was made to match.
            verdict.problem(line.number.saturating_sub(1).max(1), "was altered: the line after it names another hash");
        }
        before = Some((line, record.seq));
    }
    if let Some(fragment) = fragment {
        verdict.problem(fragment.number, "is no record: it was altered");
    }
    if !rest.is_empty() {
        verdict.problem(lines.len() + 1, "is half a line: the end was cut off, or its process ended while it wrote");
    }
    verdict.head = before.map(|(line, seq)| (seq, line.hash.clone()));
    if let Some(known) = known
        && !lines.iter().any(|line| line.hash.starts_with(known))
    {
        verdict.problem(
            lines.len().max(1),
            &format!("is the last, and none has the hash {known}: the end was cut off, or all was made anew"),
        );
    }
    verdict
}

/// Whether `record` tells of the half line before it.
pub(super) fn explains(record: &Record, fragment: &str, before: Option<&str>) -> bool {
    record.event == BROKEN_TAIL
        && record.prev == fragment
        && record.data["after"].as_str() == Some(before.unwrap_or(NOTHING_BEFORE))
}

fn records(first: u64, last: u64) -> String {
    if first >= last { format!("record {first} is") } else { format!("records {first} to {last} are") }
}

fn finding(line: usize, reason: &str) -> Finding {
    Finding { line, reason: reason.to_owned() }
}

impl Line<'_> {
    fn seq(&self) -> Option<u64> {
        Some(self.record.as_ref()?.seq)
    }
}

impl Verdict {
    fn problem(&mut self, line: usize, reason: &str) {
        self.problems.push(finding(line, reason));
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use serde_json::json;

    use super::super::record;
    use super::*;

    fn log(count: u64) -> Vec<String> {
        let mut prev = NOTHING_BEFORE.to_owned();
        (1..=count)
            .map(|seq| {
                let line = record::line(seq, UNIX_EPOCH, "command", &json!({ "n": seq }), &prev);
                prev = hash(line.as_bytes());
                line
            })
            .collect()
    }

    fn look(lines: &[String]) -> Vec<(usize, String)> {
        let found = verify((lines.join("\n") + "\n").as_bytes(), None).problems;
        found.into_iter().map(|finding| (finding.line, finding.reason)).collect()
    }

    #[test]
    fn a_log_that_nobody_touched_is_whole() {
        let lines = log(9);
        assert_eq!(look(&lines), []);
        let verdict = verify((lines.join("\n") + "\n").as_bytes(), Some(&hash(lines[8].as_bytes())));
        assert_eq!((verdict.records, verdict.head), (9, Some((9, hash(lines[8].as_bytes())))));
        assert_eq!(verify(b"", None), Verdict::default());
    }

    #[test]
    fn an_altered_line_is_named_wherever_it_stands() {
        for place in 0..5 {
            let mut lines = log(5);
            lines[place] = lines[place].replace("command", "Command");
            let found = look(&lines);
            assert!(found.iter().any(|(line, reason)| *line == place + 1 && reason.contains("altered")), "{found:?}");
        }
        // Together with its own hash: only the next line knows.
        let mut lines = log(5);
        lines[2] = record::line(3, UNIX_EPOCH, "Command", &json!({}), &hash(lines[1].as_bytes()));
        let found = look(&lines);
        assert!(matches!(&found[..], [(3, reason)] if reason.contains("altered")), "{found:?}");
        let mut lines = log(5);
        lines[2] = "not a record at all".to_owned();
        assert!(look(&lines).iter().any(|(line, reason)| *line == 3 && reason.contains("altered")));
    }

    #[test]
    fn a_missing_line_is_named() {
        for (place, expected) in [(0, (1, "record 1 is missing")), (2, (3, "record 3 is missing"))] {
            let mut lines = log(5);
            lines.remove(place);
            let found = look(&lines);
            assert!(
                matches!(&found[..], [(line, reason)] if *line == expected.0 && reason.contains(expected.1)),
                "{found:?}"
            );
        }
        let mut lines = log(6);
        lines.drain(1..4);
        let found = look(&lines);
        assert!(matches!(&found[..], [(2, reason)] if reason.contains("records 2 to 4 are missing")), "{found:?}");
    }

    #[test]
    fn a_moved_line_is_named() {
        for (one, other) in [(0, 1), (1, 3), (3, 4)] {
            let mut lines = log(5);
            lines.swap(one, other);
            let found = look(&lines);
            assert!(found.iter().all(|(_, reason)| reason.contains("moved")), "{found:?}");
            assert_eq!(found[0].0, one + 1, "{found:?}");
        }
        let mut lines = log(4);
        lines.insert(2, lines[1].clone());
        let found = look(&lines);
        assert!(matches!(&found[..], [(3, reason)] if reason.contains("twice")), "{found:?}");
    }

    #[test]
    fn a_cut_end_is_found_where_it_can_be_known() {
        let lines = log(4);
        let text = lines.join("\n");
        let found = verify(text.as_bytes(), None).problems;
        assert!(matches!(&found[..], [Finding { line: 4, reason }] if reason.contains("half a line")), "{found:?}");
        // At the end of a line: not by the file alone.
        let short = lines[..2].join("\n") + "\n";
        assert_eq!(verify(short.as_bytes(), None).problems, []);
        let found = verify(short.as_bytes(), Some(&hash(lines[3].as_bytes())[..16])).problems;
        assert!(matches!(&found[..], [Finding { line: 2, reason }] if reason.contains("cut off")), "{found:?}");
    }
}
