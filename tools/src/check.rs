//! `switchover check`: whether this host can do it, and what to change where it cannot.

mod probes;

use std::fmt::Write as _;
use std::io::Write as _;

use crate::failure::Failure;

/// What a look at one thing found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The thing: "kvm", "userfaultfd".
    pub name: &'static str,
    /// How it is.
    pub verdict: Verdict,
}

/// How a thing is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It is there; the text says what was seen.
    Fine(String),
    /// It is needed and not there.
    Missing {
        /// What was seen.
        seen: String,
        /// What to do about it.
        fix: String,
    },
    /// It is not there, and only some uses want it.
    Wanting {
        /// What was seen.
        seen: String,
        /// Who wants it, and what to do.
        fix: String,
    },
}

/// Looks at everything that a migration on this host stands on.
#[must_use]
pub fn look() -> Vec<Finding> {
    probes::all()
}

/// Prints what was found.
///
/// # Errors
/// When something that is needed is missing.
pub fn main() -> Result<(), Failure> {
    let findings = look();
    let _ = std::io::stdout().lock().write_all(table(&findings).as_bytes());
    let missing: Vec<_> = findings
        .iter()
        .filter_map(|finding| matches!(finding.verdict, Verdict::Missing { .. }).then_some(finding.name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::failed(format_args!(
        "this host cannot move a guest as it is: {} missing; the lines that begin with `fix` say what to change",
        missing.join(", ")
    )))
}

fn table(findings: &[Finding]) -> String {
    let mut out = String::new();
    for Finding { name, verdict } in findings {
        let (word, seen, fix) = match verdict {
            Verdict::Fine(seen) => ("ok", seen, None),
            Verdict::Missing { seen, fix } => ("missing", seen, Some(fix)),
            Verdict::Wanting { seen, fix } => ("optional", seen, Some(fix)),
        };
        let _ = writeln!(out, "{word:9} {name:12} {seen}");
        if let Some(fix) = fix {
            let _ = writeln!(out, "{:9} {:12} {fix}", "", "fix:");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_says_how_it_is_and_what_to_do() {
        let text = table(&[
            Finding { name: "kvm", verdict: Verdict::Fine("API 12".to_owned()) },
            Finding {
                name: "userfaultfd",
                verdict: Verdict::Missing { seen: "not permitted".to_owned(), fix: "run as root".to_owned() },
            },
        ]);
        assert_eq!(
            text,
            "ok        kvm          API 12\n\
             missing   userfaultfd  not permitted\n          fix:         run as root\n"
        );
    }

    #[test]
    fn a_look_finds_each_thing_once() {
        let findings = look();
        let mut names: Vec<_> = findings.iter().map(|finding| finding.name).collect();
        for needed in ["kvm", "userfaultfd", "io_uring", "memory", "files"] {
            assert!(names.contains(&needed), "{needed} was not looked at");
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), findings.len());
    }
}
