//! Finds the JSON values in a stream of bytes.
//!
//! QMP has no framing of its own: objects follow each other, one may come in several reads and several in one.
//! A scanner that counts brackets outside strings finds each value's end in one pass over the bytes, however they
//! are cut, and only a complete value is parsed. What is no JSON costs one error, and the stream goes on behind it.

use serde_json::Value;
use thiserror::Error;

/// Input that is no JSON value.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum InputError {
    /// Complete by its brackets, and yet not JSON.
    #[error("JSON parse error, {reason}")]
    Syntax {
        /// The parser's word.
        reason: String,
    },
    /// A value longer than the limit. It is skipped to its end.
    #[error("JSON parse error, a value of more than {limit} bytes")]
    TooLong {
        /// The limit in bytes.
        limit: usize,
    },
}

/// Cuts a byte stream into JSON values.
#[derive(Debug)]
pub struct Framing {
    limit: usize,
    value: Vec<u8>,
    depth: usize,
    place: Place,
    skipping: bool,
}

/// Where the scanner stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// Between two values.
    Outside,
    /// In a number or a word at the top level, which only the byte behind it ends.
    Bare,
    /// In an object or an array.
    Inside,
    /// In a string.
    String,
    /// In a string, behind a backslash.
    Escape,
}

impl Framing {
    /// A scanner that refuses values of more than `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit, value: Vec::new(), depth: 0, place: Place::Outside, skipping: false }
    }

    /// Takes the next bytes of the stream and returns the values that end in them.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Result<Value, InputError>> {
        let mut found = Vec::new();
        for &byte in bytes {
            self.step(byte, &mut found);
        }
        found
    }

    fn step(&mut self, byte: u8, found: &mut Vec<Result<Value, InputError>>) {
        if self.place == Place::Bare && (byte.is_ascii_whitespace() || matches!(byte, b'{' | b'[' | b'"' | b',')) {
            self.end(found);
        }
        self.place = match (self.place, byte) {
            (Place::Outside, byte) if byte.is_ascii_whitespace() => return,
            (Place::String, b'\\') => Place::Escape,
            (Place::Escape, _) => Place::String,
            // A raw newline cannot stand in a JSON string: the quote was never closed. Start again behind it.
            (Place::String, b'\n') => return self.end(found),
            (Place::String, b'"') => Place::Inside,
            (Place::String, _) => Place::String,
            (_, b'"') => Place::String,
            (_, b'{' | b'[') => {
                self.depth += 1;
                Place::Inside
            }
            (Place::Inside, b'}' | b']') => {
                self.depth = self.depth.saturating_sub(1);
                Place::Inside
            }
            (Place::Outside | Place::Bare, _) => Place::Bare,
            (Place::Inside, _) => Place::Inside,
        };
        self.keep(byte, found);
        if self.place == Place::Inside && self.depth == 0 {
            self.end(found);
        }
    }

    fn keep(&mut self, byte: u8, found: &mut Vec<Result<Value, InputError>>) {
        if self.skipping {
            return;
        }
        if self.value.len() < self.limit {
            self.value.push(byte);
        } else {
            found.push(Err(InputError::TooLong { limit: self.limit }));
            self.value = Vec::new();
            self.skipping = true;
        }
    }

    /// The value is complete, or given up: says so, and starts again between two values.
    fn end(&mut self, found: &mut Vec<Result<Value, InputError>>) {
        let value = std::mem::take(&mut self.value);
        if !std::mem::take(&mut self.skipping) {
            found
                .push(serde_json::from_slice(&value).map_err(|error| InputError::Syntax { reason: error.to_string() }));
        }
        self.depth = 0;
        self.place = Place::Outside;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn all(input: &[u8], cut: usize) -> Vec<Result<Value, InputError>> {
        let mut framing = Framing::new(64);
        input.chunks(cut).flat_map(|chunk| framing.feed(chunk)).collect()
    }

    #[test]
    fn values_are_found_however_the_stream_is_cut() {
        let input = br#"{"a":"}\"{"}{"b":[1,{"c":null}]}
            [1,2] 5 true {"d":1}"#;
        let expected = [
            json!({"a": "}\"{"}),
            json!({"b": [1, {"c": null}]}),
            json!([1, 2]),
            json!(5),
            json!(true),
            json!({"d": 1}),
        ]
        .map(Ok);
        for cut in 1..=input.len() {
            assert_eq!(all(input, cut), expected, "cut every {cut} bytes");
        }
    }

    #[test]
    fn after_a_syntax_error_the_stream_goes_on() {
        for garbage in ["{\"execute\": stop}", "{\"a\": ]", "}", "hello ", "{\"a\":\"never closed\n", "\"alone\"", ", "]
        {
            let found = all(format!("{garbage} {{\"ok\":1}}").as_bytes(), 3);
            assert_eq!(found.last(), Some(&Ok(json!({"ok": 1}))), "behind {garbage:?}");
            assert!(found.len() >= 2, "{garbage:?} got no answer");
        }
        assert!(matches!(all(b"{\"execute\": stop}", 5)[..], [Err(InputError::Syntax { .. })]));
    }

    #[test]
    fn a_value_too_long_is_skipped_to_its_end() {
        let long = format!("{{\"a\":\"{}\"}}{{\"ok\":1}}", "x".repeat(100));
        assert_eq!(all(long.as_bytes(), 7), [Err(InputError::TooLong { limit: 64 }), Ok(json!({"ok": 1}))]);
    }

    #[test]
    fn endless_nesting_is_an_error_and_no_crash() {
        let mut framing = Framing::new(1 << 20);
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        assert!(matches!(framing.feed(&deep)[..], [Err(InputError::Syntax { .. })]));
    }
}
