//! What came out of the two processes' serial ports, as one stream of timed lines.

use switchover_hybrid::report::Side;
use switchover_wire::clock::Nanos;

/// Bytes that one `read` of a process' standard output returned, and when.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// This host's `CLOCK_MONOTONIC` just after the read.
    pub at: Nanos,
    /// What was read.
    pub bytes: Vec<u8>,
}

/// A line and when its line feed was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TimedLine {
    /// When the line feed was read: later than it was written, by the pipe and the reader's waking.
    pub at: Nanos,
    /// The process that printed its line feed.
    pub side: Side,
    /// The line without its line feed.
    pub bytes: Vec<u8>,
}

/// The lines of a guest that moved: all that the source printed, then all that the destination did.
///
/// A line that the move cut in two is joined: the guest's UART goes on at the destination with the next byte. What
/// follows the last line feed is no line yet and is left out.
#[must_use]
pub fn join(source: &[Chunk], destination: &[Chunk]) -> Vec<TimedLine> {
    let mut lines = Vec::new();
    let mut line = Vec::new();
    for (side, chunks) in [(Side::Source, source), (Side::Destination, destination)] {
        for chunk in chunks {
            for &byte in &chunk.bytes {
                if byte == b'\n' {
                    lines.push(TimedLine { at: chunk.at, side, bytes: std::mem::take(&mut line) });
                } else {
                    line.push(byte);
                }
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(at: u64, text: &str) -> Chunk {
        Chunk { at: Nanos(at), bytes: text.as_bytes().to_vec() }
    }

    fn text(lines: &[TimedLine]) -> Vec<(u64, &str, Side)> {
        lines.iter().map(|line| (line.at.0, std::str::from_utf8(&line.bytes).unwrap(), line.side)).collect()
    }

    #[test]
    fn a_line_cut_by_the_move_is_joined() {
        let lines =
            join(&[chunk(1, "one\ntw"), chunk(2, "o\nthr")], &[chunk(9, "ee\nfour\n"), chunk(12, "unfinished")]);
        assert_eq!(
            text(&lines),
            [
                (1, "one", Side::Source),
                (2, "two", Side::Source),
                (9, "three", Side::Destination),
                (9, "four", Side::Destination)
            ]
        );
    }

    #[test]
    fn a_cut_just_before_the_line_feed_is_no_empty_line() {
        let lines = join(&[chunk(1, "one")], &[chunk(2, "\ntwo\n")]);
        assert_eq!(text(&lines), [(2, "one", Side::Destination), (2, "two", Side::Destination)]);
    }
}
